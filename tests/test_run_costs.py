# SPDX-License-Identifier: Apache-2.0
"""What runs cost with maps in front of the gap, and the choice that the smallest sum of them makes."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from contexts import context_of
from families import block_list, random_ids
from tiers import often
from torch import Tensor
from toys import wide
from transformers import PreTrainedModel

from optimum_blockprune import BlockPruner, BlockPruningConfig, run_costs
from optimum_blockprune.batches import CalibrationWindows
from optimum_blockprune.errors import CalibrationError, ConfigurationError, NonFiniteError
from optimum_blockprune.fitting import crossed_parts
from optimum_blockprune.folding import Prepared
from optimum_blockprune.folds import Fold
from optimum_blockprune.half import Half
from optimum_blockprune.runner import BlockRunner
from optimum_blockprune.strategies import search
from optimum_blockprune.strategies.base import SearchContext
from optimum_blockprune.strategies.search import Search, SearchOptions
from optimum_blockprune.teacher import with_teacher


WRITERS = {
    "llama": {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"},
    "gpt2": {"attention": "attn.c_proj", "mlp": "mlp.c_proj"},
}


def context_for(model: PreTrainedModel, count: int, **changes: Any) -> SearchContext:
    """A context in which all but the first and the last block may go."""
    settings = {
        "windows": CalibrationWindows.from_tokens(random_ids(8, 16), source="made up"),
        "options": SearchOptions(),
        "num_remove": count,
        "removable": tuple(range(1, model.config.num_hidden_layers - 1)),
        "objective": "kl",
        "compensation": "ridge",
    }
    return context_of(model, **{**settings, **changes})


def streams(runner: BlockRunner, windows: CalibrationWindows, per_block: int) -> list[Tensor]:
    """The stream [windows, tokens, d] at every boundary, fp64."""
    seen: dict[int, list[Tensor]] = {}
    for batch in windows.batches(1):
        runner.stream(batch, lambda at, hidden: seen.setdefault(at, []).append(hidden.double()), per_block=per_block)
    return [torch.cat(seen[at]) for at in sorted(seen)]


def parts_of(context: SearchContext) -> list[tuple[CalibrationWindows, CalibrationWindows]]:
    return crossed_parts(context.windows, run_costs.ROUNDS, judging=run_costs.JUDGING, fitting=run_costs.FITTING)


def cost_by_hand(context: SearchContext, family: str, first: int, count: int, parts: int) -> float:
    """The mean over the first few parts."""
    found = [_loss_of_part(context, family, first, count, *part) for part in parts_of(context)[:parts]]
    return sum(total for total, _ in found) / sum(tokens for _, tokens in found)


def _loss_of_part(
    context: SearchContext,
    family: str,
    first: int,
    count: int,
    fitted: CalibrationWindows,
    judges: CalibrationWindows,
) -> tuple[float, int]:
    """By ordinary least squares on rows that hold the shrinkage, and the loss of the whole model."""
    runner, per_block = context.runner, context.row.per_block
    states = streams(runner, fitted, 2)
    begin, end = 2 * first // per_block, 2 * first // per_block + 2 * count
    written = states[begin] - states[begin - 1]
    weights = 1 / states[begin][:, 1:].norm(dim=-1, keepdim=True)
    still = written[:, 0] * weights.square().mean(1).sqrt()
    added, missing = (
        (each * weights).flatten(0, 1) for each in (written[:, 1:], (states[end] - states[begin])[:, 1:])
    )
    width = added.shape[1]
    shrinkage = run_costs.STRENGTH * (added.T @ added).diagonal().mean()
    rows = torch.cat([added, still, shrinkage.sqrt() * torch.eye(width, dtype=torch.float64)])
    wanted = torch.cat([missing, torch.zeros(len(still) + width, width, dtype=torch.float64)])
    change = torch.linalg.lstsq(rows, wanted).solution
    half = Half((begin - 1) // 2, ("attention", "mlp")[(begin - 1) % 2])
    fold = Fold(half.block, WRITERS[family][half.part], "matrix", int(family == "gpt2"), 0.0, "map")
    tensor = (torch.eye(width, dtype=torch.float64) + change).float()
    gone = [Half(piece // 2, ("attention", "mlp")[piece % 2]) for piece in range(begin, end)]
    judges, total, tokens = with_teacher(runner, judges, 2), 0.0, 0
    with Prepared(runner.stack.blocks, [fold], {"map": tensor}).on():
        for batch in judges.batches(2):
            loss, predictions = runner.nll(batch, gone)
            total, tokens = total + loss.item(), tokens + predictions
    return total, tokens


@pytest.mark.parametrize("unit", ["block", "half_block"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_costs_are_those_of_the_model_with_the_map_in_it(family: str, unit: str) -> None:
    context = context_for(wide(family), 3, unit=unit)
    costs = run_costs.run_costs(context, "ridge")
    row = context.row
    every = {(start, count) for count in (1, 2, 3) for start in row.starts(context.removable, count)}
    assert set(costs.first) == every and set(costs.whole) < every
    tried = [(row.per_block, 1), (row.per_block * 2, 2), (row.per_block + 1, 3 if unit == "half_block" else 2)]
    for run in tried:
        assert costs.first[run] == pytest.approx(cost_by_hand(context, family, *run, 1), rel=2e-3, abs=1e-6)
    for run in [*costs.whole][::3]:
        assert costs.whole[run] == pytest.approx(cost_by_hand(context, family, *run, 4), rel=2e-3, abs=1e-6)


def test_runs_of_no_good_set_are_dropped_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    context, seen = context_for(wide("llama"), 3), []
    losses = run_costs._Part.losses

    def noted(part: Any, starts: Any) -> Any:
        seen.append({(start.piece, count) for start in starts for count in start.counts})
        return losses(part, starts)

    monkeypatch.setattr(run_costs._Part, "losses", noted)
    costs = run_costs.run_costs(context, "ridge")
    assert len(seen) == 4 and seen[0] > seen[1] >= seen[2] >= seen[3] == set(costs.whole)
    # With a slack that drops nothing, what is left has the same costs.
    monkeypatch.setattr(run_costs, "SLACK", 1e9)
    every = run_costs.run_costs(context, "ridge").whole
    assert set(every) == seen[0] and all(every[run] == cost for run, cost in costs.whole.items())


@pytest.mark.parametrize("unit", ["block", "half_block"])
def test_little_memory_costs_passes_not_figures(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_for(wide("llama"), 2, unit=unit)
    together = run_costs.run_costs(context, "ridge")
    monkeypatch.setattr(run_costs, "_MAX_BYTES", 1)
    assert run_costs.run_costs(context, "ridge") == together


def test_maps_make_runs_cheaper() -> None:
    """On the windows that judge, which no map has seen; blocks that do the same linear thing can be made up for."""
    model = wide("llama", 8)
    with torch.no_grad():
        for block in block_list(model)[2:6]:
            block.mlp.down_proj.weight.copy_(block_list(model)[2].mlp.down_proj.weight)
    windows = CalibrationWindows.from_tokens(random_ids(64, 32), source="made up")
    context = context_for(model, 2, windows=windows)
    costs, plain = (run_costs.run_costs(context, kind) for kind in ("ridge", "scale"))
    assert sum(costs.first.values()) < sum(plain.first.values())


@pytest.mark.parametrize(
    ("family", "unit"),
    often(
        product(["llama", "gpt2", "gemma2", "mixtral"], ["block", "half_block"]),
        kept=lambda case: case[0] == "llama" or case in (("gpt2", "block"), ("gemma2", "half_block")),
    ),
)
def test_the_choice_is_the_fewest_of_all_runs_that_are_as_good_as_the_best(
    family: str, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_costs, "SLACK", 1e9)
    context = context_for(wide(family, 6), 2, unit=unit)
    plan, costs, row = Search().select(context), run_costs.run_costs(context, "ridge").whole, context.row
    free, best = row.free(context.removable), None
    ends = {run: run[0] + run[1] * row.per_block for run in costs}
    sets = [[run] for run in costs if run[1] == 2]
    singles = [run for run in costs if run[1] == 1]
    # Neighbours are one run, which is scored as one.
    sets += [[one, two] for one, two in combinations(singles, 2) if ends[one] < two[0]]
    best = min(sum(costs[run] for run in each) for each in sets)
    good = [each for each in sets if sum(costs[run] for run in each) <= search.AS_GOOD * best]
    fewest = min(map(len, good))
    expected = min(sum(costs[run] for run in each) for each in good if len(each) == fewest)
    assert plan.details["additive_kl"] == pytest.approx(expected, rel=1e-9) and len(plan.steps) == fewest
    assert plan.num_removed == 2 and len(free) == 4 * row.per_block
    assert plan.truncate(1).num_removed == 1
    assert plan.details["runs_measured"] == plan.details["runs_judged_on_all"] == len(costs)


@pytest.mark.parametrize("late", [0, 2, 9])
def test_time_that_is_up_leaves_parts_out(late: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock goes on by a second each time that it is looked at: first, and before every part but one."""
    seconds, parts = iter(range(100)), []
    losses = run_costs._Part.losses
    monkeypatch.setattr(run_costs._Part, "losses", lambda part, starts: parts.append(part) or losses(part, starts))
    monkeypatch.setattr(search.time, "monotonic", lambda: next(seconds))
    plan = Search().select(context_for(wide("llama"), 2, options=SearchOptions(time_budget=late + 0.5)))
    assert len(parts) == min(1 + late, 4) and plan.details["out_of_time"] is (late < 3)
    assert plan.num_removed == 2


@pytest.mark.parametrize("last", [1, 4, 6, 9])
def test_where_a_budget_decides_long_runs_are_measured_only_when_they_are_needed(
    last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[Any]] = []
    measured: list[int] = []
    costs = run_costs.run_costs

    def noted(context: SearchContext, *args: Any) -> Any:
        measured.append(context.num_remove)
        return costs(context, *args)

    def go_on(removed: Any) -> bool:
        asked.append(list(removed))
        return len(removed) < last

    monkeypatch.setattr(search, "run_costs", noted)
    windows = CalibrationWindows.from_tokens(random_ids(4, 8), source="made up")
    plan = Search().select(context_for(wide("llama", 11), 9, windows=windows, go_on=go_on))
    assert measured == {1: [4], 4: [4], 6: [4, 8], 9: [4, 8, 9]}[last]
    assert [len(each) for each in asked] == list(range(1, last + 1))
    # The plan and those of fewer blocks are what was asked about.
    assert [list(plan.truncate(count).removed_blocks) for count in range(1, last + 1)] == asked


@pytest.mark.parametrize("family", ["gpt_neox", "falcon"])
def test_blocks_without_halves_can_be_chosen(family: str) -> None:
    plan = Search().select(context_for(wide(family, 6), 2))
    assert len(plan.removed_blocks) == 2 and plan.details["additive_kl"] > 0


def test_the_first_block_has_nothing_in_front_of_it() -> None:
    context = context_for(wide("llama"), 1, removable=(0, 1, 2))
    costs = run_costs.run_costs(context, "ridge")
    judges = with_teacher(context.runner, parts_of(context)[0][1], 2)
    losses = [context.runner.nll(batch, [0]) for batch in judges.batches(2)]
    plain = sum(loss.item() for loss, _ in losses) / sum(count for _, count in losses)
    assert costs.first[0, 1] == pytest.approx(plain, rel=1e-5)


def config(**fields: Any) -> BlockPruningConfig:
    rows = [{"input_ids": row} for row in random_ids(8, 16).tolist()]
    return BlockPruningConfig(**{"dataset": rows, "num_samples": 8, "seqlen": 16, "num_blocks": 2, **fields})


def test_auto_chooses_and_compensates(tmp_path: Path) -> None:
    pruner = BlockPruner(wide("llama"), config(strategy="auto"))
    plan = pruner.make_plan()
    assert plan.details["chosen_with"] == "ridge" and plan.details["compensation"]["asked"] == "ridge"
    pruner.prune(save_dir=tmp_path / "pruned")
    assert pruner.model.config.num_hidden_layers == 4


def test_without_compensation_it_can_be_chosen_for() -> None:
    plan = BlockPruner(wide("llama"), config(strategy="search", strategy_options={"compensated": True})).make_plan()
    greedy = BlockPruner(wide("llama"), config(strategy="search")).make_plan()
    assert plan.details["chosen_with"] == "ridge" and "compensation" not in plan.details
    assert "chosen_with" not in greedy.details and greedy.details["greedy_loss"] > 0


def test_another_objective_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="objective='nll'"):
        BlockPruner(wide("llama"), config(strategy="auto", objective="nll")).make_plan()


@pytest.mark.parametrize("option", [{"swaps": 1}, {"confidence": 0.9}])
def test_options_that_would_be_ignored_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(option))):
        BlockPruner(wide("llama"), config(strategy="auto", strategy_options=option)).make_plan()


def test_one_window_cannot_be_fitted_on_and_judge() -> None:
    fields = {"strategy": "search", "num_samples": 1, "strategy_options": {"compensated": True}}
    with pytest.raises(CalibrationError, match="at least two windows"):
        BlockPruner(wide("llama"), config(**fields)).make_plan()


def test_numbers_that_are_none_are_refused() -> None:
    model = wide("llama")
    with torch.no_grad():
        block_list(model)[2].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        run_costs.run_costs(context_for(model, 2), "ridge")
