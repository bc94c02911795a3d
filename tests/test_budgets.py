# SPDX-License-Identifier: Apache-2.0
"""Budgets that are measured: quality on held-out text, size, speed; on models of which it is known what can go."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from families import tiny_model
from ranks import Outcome, Scenario, play
from tiers import often
from torch import Tensor
from toys import (
    TEXTS,
    assert_unchanged,
    config,
    seconds_by_blocks,
    snapshot,
    text,
    toy_folder,
    toy_pruner,
    wide,
    word_tokenizer,
)
from transformers import PreTrainedModel
from zoo import other_stacks

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan, PruningStrategy, budgets, speedup
from optimum_blockprune import choosing as choosing_module
from optimum_blockprune import reading as reading_module
from optimum_blockprune.batches import CalibrationWindows
from optimum_blockprune.blocks import find_blocks
from optimum_blockprune.calibration import WindowSpec, build_windows
from optimum_blockprune.errors import CalibrationError, ConfigurationError, NonFiniteError, ResumeError
from optimum_blockprune.evaluation import EvaluationSpec, evaluate_model, size_of
from optimum_blockprune.half import blocks_off
from optimum_blockprune.ledger import Ledger
from optimum_blockprune.reading import window_spec, windows_for
from optimum_blockprune.recipe import Recipe
from optimum_blockprune.speedup import fewest_blocks


DEPTH, IDLE = 8, (2, 5, 6)
WINDOWS = 6
# Removing an idle block changes nearly nothing, removing another one at least a hundred times as much.
BOUNDS = {"max_ppl_increase": 0.01, "max_kl": 0.002}


def with_idle_blocks() -> PreTrainedModel:
    """A model whose blocks `IDLE` add next to nothing to the stream, and whose predictions are sharp."""
    model = tiny_model("llama", DEPTH)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
        for block in IDLE:
            for module in (model.model.layers[block].self_attn.o_proj, model.model.layers[block].mlp.down_proj):
                module.weight.mul_(1e-3)
    return model


@cache
def own_text(make: Callable[[], PreTrainedModel] = with_idle_blocks) -> tuple[tuple[int, ...], ...]:
    """Thirty rows that the model itself has drawn: no other model expects them better."""
    model, generator = make(), torch.Generator().manual_seed(3)
    ids = torch.randint(4, 96, (30, 1), generator=generator)
    for _ in range(23):
        with torch.no_grad():
            last = model(input_ids=ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, torch.multinomial(last.softmax(-1), 1, generator=generator)], dim=1)
    return tuple(map(tuple, ids.tolist()))


def rows() -> list[dict[str, list[int]]]:
    return [{"input_ids": list(row)} for row in own_text()]


def held_out_rows(seed: int = 0, count: int = WINDOWS) -> CalibrationWindows:
    """The documented choice: what comes after the calibration windows in the order of the seed, sorted."""
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    chosen = order[WINDOWS : WINDOWS + count].sort().values
    return CalibrationWindows.from_tokens(torch.tensor(own_text())[chosen], source="own")


def idle_config(strategy: str = "sleb", **fields: Any) -> BlockPruningConfig:
    return config(strategy, **{"dataset": rows(), "num_samples": WINDOWS, "seqlen": 24, **fields})


def idle_pruner(**fields: Any) -> BlockPruner:
    return BlockPruner(with_idle_blocks(), idle_config(**fields), word_tokenizer())


def quality(plan: PruningPlan, windows: CalibrationWindows) -> dict[str, float]:
    """Increase of the perplexity and KL, measured on the pruned model itself."""
    dense = with_idle_blocks()
    pruned = plan.apply(copy.deepcopy(dense))
    spec = EvaluationSpec(speed=False, continuations=0)
    theirs, ours = evaluate_model(dense, windows, spec), evaluate_model(pruned, windows, spec, baseline=dense)
    increase = ours["perplexity"] / theirs["perplexity"] - 1
    return {"max_ppl_increase": increase, "max_kl": ours["kl"], "perplexity": ours["perplexity"]}


# Quality with maps: fitted to every depth, and measured with it


def wide_pruner(**fields: Any) -> BlockPruner:
    text = [{"input_ids": list(row)} for row in own_text(sharp)]
    given = {"dataset": text, "num_samples": 12, "seqlen": 24, "compensation": "ridge", "protect_first": 1, **fields}
    return BlockPruner(sharp(), config(**given), word_tokenizer())


def sharp() -> PreTrainedModel:
    """A model whose blocks do much, and whose predictions are sharp."""
    model = wide("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


def with_maps(plan: PruningPlan, windows: CalibrationWindows) -> dict[str, float]:
    """As `quality`, of the wide model."""
    dense, spec = sharp(), EvaluationSpec(speed=False, continuations=0)
    theirs = evaluate_model(dense, windows, spec)
    ours = evaluate_model(plan.apply(sharp()), windows, spec, baseline=dense)
    return {"kl": ours["kl"], "increase": ours["perplexity"] / theirs["perplexity"] - 1}


@pytest.mark.parametrize("budget", often(["max_kl", "max_ppl_increase"], kept=lambda budget: budget == "max_kl"))
@pytest.mark.parametrize(
    "fields",
    often(
        [
            {"strategy": "sleb"},
            {"strategy": "search", "compensation": "ridge"},
            {"strategy": "shortgpt", "compensation": "auto"},
            {"strategy": "random", "compensation": "scale"},
            {"strategy": "sleb", "unit": "half_block"},
        ],
        kept=lambda fields: fields["strategy"] in ("search", "random") or "unit" in fields,
    ),
    ids=lambda fields: "-".join(fields.values()),
)
def test_a_budget_of_quality_is_held_to_the_model_with_its_maps(fields: dict[str, Any], budget: str) -> None:
    figure = {"max_kl": "kl", "max_ppl_increase": "increase"}[budget]
    pruner = wide_pruner(**fields, **{budget: 1e6})
    before = snapshot(pruner.model)
    trail = pruner.make_plan().details["budget"]["trail"]
    assert_unchanged(pruner.model, before)
    reached = [max(entry[figure], 1e-9) for entry in trail]
    limit = (reached[0] + max(reached)) / 2
    kept = next((number for number, value in enumerate(reached) if value > limit), len(reached))
    assert 0 < kept < len(reached)
    plan = wide_pruner(**fields, **{budget: limit}).make_plan()
    assert plan.num_removed == kept and [each["within"] for each in plan.details["budget"]["trail"]][-1] is False
    assert plan.requested == {budget: limit} and plan.details["compensation"]["asked"] == pruner.config.compensation
    same = wide_pruner(**fields, num_blocks=kept).make_plan()
    assert (plan.removed_names, plan.folds) == (same.removed_names, same.folds)
    wanted = pruner.config.recipe
    windows = windows_for(find_blocks(pruner.model), wanted.dataset, pruner.tokenizer, window_spec(wanted, beside=12))
    assert windows.describe()["fingerprint"] == plan.details["budget"]["held_out"]["fingerprint"]
    assert plan.details["budget"][figure] == pytest.approx(with_maps(plan, windows)[figure], rel=1e-3, abs=1e-6)


def test_maps_let_more_go() -> None:
    """The figure of every depth is that of the model with maps, and some of them help."""
    with_them, without = (
        wide_pruner(compensation=each, max_kl=1e6).make_plan().details["budget"]["trail"] for each in ("ridge", "none")
    )
    assert sum(each["kl"] for each in with_them) < 0.9 * sum(each["kl"] for each in without)


# Quality: as much goes as may


@pytest.mark.parametrize("budget", often(BOUNDS, kept=lambda budget: budget == "max_kl"))
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"strategy_options": {"search": "race"}},
        {"unit": "half_block"},
        {"unit": "half_block", "strategy": "shortgpt"},
        {"unit": "half_block", "strategy": "mi_prun"},
        {"strategy": "shortgpt"},
        {"strategy": "mi_prun"},
        {"strategy": "angular"},
        {"strategy": "manual", "strategy_options": {"blocks": "6,2,5,3"}},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())) or "sleb",
)
def test_as_many_blocks_go_as_the_held_out_text_allows(fields: dict[str, Any], budget: str) -> None:
    bound = BOUNDS[budget]
    pruner = idle_pruner(**fields, **{budget: bound})
    before = snapshot(pruner.model)
    plan = pruner.make_plan()
    assert_unchanged(pruner.model, before)
    # Angular removes one run of neighbours.
    assert blocks_off(plan.removed_units) == ({5, 6} if fields.get("strategy") == "angular" else set(IDLE))
    assert plan.requested == {budget: bound} and "truncated_from" not in plan.details
    figures, held_out = plan.details["budget"], held_out_rows()
    assert figures["held_out"]["fingerprint"] == held_out.fingerprint
    measured = quality(plan, held_out)
    assert measured[budget] <= bound
    assert figures["perplexity"] == pytest.approx(measured["perplexity"], rel=1e-5)
    assert figures["increase"] == pytest.approx(measured["max_ppl_increase"], rel=1e-3, abs=1e-6)
    assert ("kl" in figures) == (budget == "max_kl")
    if budget == "max_kl":
        assert figures["kl"] == pytest.approx(measured["max_kl"], rel=1e-3, abs=1e-7)
    assert [entry["removed"] for entry in figures["trail"]] == list(range(1, plan.num_removed + 2))
    assert [entry["within"] for entry in figures["trail"]] == [True] * plan.num_removed + [False]
    more = {**fields, "num_blocks": plan.num_removed + 1}
    assert quality(pruner.make_plan(idle_config(**more)), held_out)[budget] > 2 * bound


@pytest.mark.parametrize("unit", [None, "half_block"])
@pytest.mark.parametrize("budget", often(BOUNDS, kept=lambda budget: budget == "max_kl"))
def test_a_greedy_search_makes_one_step_too_many_at_most(budget: str, unit: str | None) -> None:
    pruner = idle_pruner(unit=unit, **{budget: BOUNDS[budget]})
    plan = pruner.make_plan()
    spent, naive = pruner.report.block_forwards, pruner.report.naive_block_forwards
    held_out = plan.details["budget"]["block_forwards"]
    # Dense, and a pass for each of four depths; for KL the dense model runs beside it.
    passes = sum(DEPTH - gone for gone in range(5)) + (4 * DEPTH if budget == "max_kl" else 0)
    assert unit or held_out == WINDOWS * passes
    longer = pruner.make_plan(idle_config(num_blocks=4, unit=unit))
    assert spent == pruner.report.block_forwards + held_out
    assert naive == pruner.report.naive_block_forwards + held_out
    # And the plan is what the same search gives for its depth.
    plain = pruner.make_plan(idle_config(num_blocks=3, unit=unit))
    assert plan.removed_units == plain.removed_units == longer.truncate(3).removed_units
    assert (plan.steps, plan.scores, plan.calibration) == (plain.steps, plain.scores, plain.calibration)


def test_all_may_go_that_can() -> None:
    plan = idle_pruner(max_kl=1e6, protect_first=4, protect_last=1).make_plan()
    assert sorted(plan.removed_blocks) == [4, 5, 6]
    assert all(entry["within"] for entry in plan.details["budget"]["trail"])


def test_a_strategy_without_data_is_held_to_text_as_well(caplog) -> None:
    plan = idle_pruner(strategy="random", max_kl=1e6, protect_first=2, protect_last=1, seed=4).make_plan()
    assert sorted(plan.removed_blocks) == [2, 3, 4, 5, 6] and plan.calibration is None
    assert plan.details["budget"]["held_out"]["fingerprint"] == held_out_rows(seed=4).fingerprint
    with pytest.raises(CalibrationError, match="max_kl is held to text: give dataset"):
        idle_pruner(strategy="random", max_kl=1.0, dataset=None).make_plan()


@pytest.mark.parametrize(("name", "stack"), [("t5", "decoder"), ("bart", "encoder"), ("bert", "encoder")])
def test_other_kinds_of_models(name: str, stack: str) -> None:
    model, tokenizer = other_stacks.tiny_model(name), word_tokenizer()
    given = config("shortgpt", max_kl=1e6, stack=None if stack == "decoder" else stack)
    if name == "bert":
        with pytest.raises(CalibrationError, match="no mask token"):
            BlockPruner(model, given, tokenizer).make_plan()
        tokenizer.add_special_tokens({"mask_token": "w9"})
    plan = BlockPruner(model, given, tokenizer).make_plan()
    assert plan.stack == stack and plan.num_removed == plan.details["budget"]["trail"][-1]["removed"] > 0


# Strategies of others


@pytest.fixture
def installed(monkeypatch) -> Callable[[type], None]:
    def install(strategy: type) -> None:
        monkeypatch.setattr(choosing_module, "get_strategy", lambda name: strategy)

    return install


class LastOnes(PruningStrategy):
    """The last blocks that may go; measures something that depends on their number, and knows no smaller choice."""

    name: ClassVar[str] = "sleb"
    asked: ClassVar[list[int]] = []

    def select(self, context: Any) -> PruningPlan:
        """See the class."""
        share = torch.tensor(context.num_remove if context.team.is_first else 0)
        found = context.measured("number", lambda size: {"number": share})
        assert found["number"].item() == context.num_remove
        self.asked.append(context.num_remove)
        return context.plan(sorted(context.removable, reverse=True)[: context.num_remove])


def test_a_strategy_that_knows_no_smaller_choice_is_asked_for_each(installed, tmp_path: Path, monkeypatch) -> None:
    installed(LastOnes)
    LastOnes.asked.clear()
    fields = {"protect_first": 4, "protect_last": 1, "max_kl": BOUNDS["max_kl"]}
    plan = idle_pruner(**fields).make_plan(resume_dir=tmp_path / "kept")
    assert plan.removed_blocks == (6, 5) and LastOnes.asked == [3, 1, 2]


def test_a_strategy_that_errs_is_refused(installed) -> None:
    class TooMany(LastOnes):
        def select(self, context: Any) -> PruningPlan:
            return context.plan([2, 3, 4, 5, 6, 7], nested=True)

    installed(TooMany)
    with pytest.raises(budgets.PlanError, match="it was asked for 3"):
        idle_pruner(max_kl=1.0, protect_first=4, protect_last=1).make_plan()


# What cannot be kept


@pytest.mark.parametrize("budget", BOUNDS)
@pytest.mark.parametrize("strategy", ["sleb", "shortgpt"])
def test_where_nothing_can_go_the_smallest_budget_is_named(strategy: str, budget: str) -> None:
    pruner = idle_pruner(strategy=strategy, protect_first=3, protect_last=3, **{budget: 1e-3})
    with pytest.raises(
        ConfigurationError, match=rf"{budget}=0.001 allows for no removal: without \d, which"
    ) as caught:
        pruner.make_plan()
    smallest = float(str(caught.value).split(f"The smallest {budget} that removes a block is ")[1].rstrip("."))
    first = str(caught.value).split("without ")[1][0]
    again = idle_config(strategy, protect_first=3, protect_last=3, **{budget: smallest})
    assert pruner.make_plan(again).removed_names[:1] == (first,)
    with pytest.raises(ConfigurationError, match="allows for no removal"):
        pruner.make_plan(idle_config(strategy, protect_first=3, protect_last=3, **{budget: smallest - 2e-4}))


def test_a_dense_model_without_a_finite_loss_is_refused() -> None:
    pruner = idle_pruner(strategy="shortgpt", max_kl=1.0)
    with torch.no_grad():
        pruner.model.lm_head.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="held-out text is NaN"):
        pruner.make_plan()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_kl": 0}, "max_kl=0 is too small; it must be above 0"),
        ({"max_ppl_increase": -0.1}, "max_ppl_increase=-0.1 is too small"),
        ({"max_ppl_increase": "0.1"}, "max_ppl_increase must be a number, not '0.1'"),
        ({"max_kl": True}, "max_kl must be a number, not True"),
        ({"max_kl": float("inf")}, "max_kl must be a number, not inf"),
        ({"target_speedup": 1}, "target_speedup=1 is too small; it must be above 1"),
        ({"target_size_gb": 0.0}, "target_size_gb=0.0 is too small"),
        ({"max_kl": 0.1, "max_ppl_increase": 0.1}, "Give one budget, not 2: max_ppl_increase=0.1 and max_kl=0.1"),
        ({"max_kl": 0.1, "sparsity": 0.1}, "Give one budget, not 2"),
        ({"held_out_samples": 3}, "held_out_samples only count for max_ppl_increase and max_kl; the budget is spars"),
        ({"num_blocks": 1, "held_out_dataset": "a.txt"}, "held_out_dataset only count for .*the budget is num_blocks"),
        ({"max_kl": 0.1, "held_out_samples": 0}, "held_out_samples=0 is too small"),
        ({"max_kl": 0.1, "held_out_dataset": ""}, "held_out_dataset is an empty string"),
        ({"max_kl": 0.1, "num_samples": 4, "held_out_samples": 13}, "num_samples=4 windows at most 12 are held out"),
    ],
)
def test_impossible_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Recipe(**fields)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"max_kl": 0.1}, "max_kl is for strategies that remove blocks; 'magnitude' removes channels"),
        ({"target_speedup": 1.5}, "use sparsity or target_params"),
        ({"target_size_gb": 1e-4}, "use target_params=25000."),
    ],
)
def test_width_has_other_budgets(budget: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        toy_pruner().make_plan(config("magnitude", **budget))


# Held-out text


def rows_of(windows: CalibrationWindows) -> set[tuple[int, ...]]:
    return set(map(tuple, windows.input_ids.tolist()))


class Stream:
    """Rows without a length."""

    def __init__(self, found: list[Any]) -> None:
        self.found = found

    def __iter__(self) -> Any:
        return iter(self.found)


@pytest.mark.parametrize("recipe", ["windows", "sleb"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_windows_are_no_calibration_windows(recipe: str, seed: int) -> None:
    texts = [text(40, number) for number in range(30)]
    spec = {"num_samples": 5, "seqlen": 10, "seed": seed, "recipe": recipe}
    ours = build_windows(texts, word_tokenizer(), WindowSpec(**spec))
    theirs = build_windows(texts, word_tokenizer(), WindowSpec(**spec, beside=7))
    assert not rows_of(ours) & rows_of(theirs) and ours.fingerprint != theirs.fingerprint
    assert len(rows_of(theirs)) == theirs.num_windows == (7 if recipe == "windows" else 7 * 4)
    assert theirs.seqlen == ours.seqlen == 10


@pytest.mark.parametrize("kind", [list, Stream])
def test_held_out_rows_are_no_calibration_rows(kind: type, monkeypatch) -> None:
    monkeypatch.setattr("optimum_blockprune.calibration.open_rows", lambda dataset, split: ("rows", kind(dataset)))
    found = [{"input_ids": [number + 1] * 4} for number in range(20)]
    for seed in range(4):
        spec = {"num_samples": 5, "seqlen": 4, "seed": seed}
        ours, theirs = (build_windows(found, None, WindowSpec(**spec, **more)) for more in ({}, {"beside": 15}))
        assert (ours.num_windows, theirs.num_windows) == (5, 15) and len(rows_of(ours) | rows_of(theirs)) == 20
        with pytest.raises(CalibrationError, match="it has 20 windows, and 21 are needed: 5 to calibrate on, 16 held"):
            build_windows(found, None, WindowSpec(**spec, beside=16))


def test_too_little_text_is_refused_before_the_search() -> None:
    with pytest.raises(
        CalibrationError, match="it has 20 windows, and 22 are needed: 11 to calibrate on, 11 held out"
    ):
        toy_pruner(max_kl=1.0, num_samples=11).make_plan()
    assert toy_pruner(max_kl=1e6, num_samples=11, held_out_samples=9).make_plan().num_removed == 4


def test_another_text_can_be_held_out(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(text(200, seed=77))
    plan = toy_pruner(max_kl=1e6, held_out_dataset=tmp_path / "other.txt", held_out_samples=3).make_plan()
    held_out = plan.details["budget"]["held_out"]
    assert (held_out["source"], held_out["windows"]) == (str(tmp_path / "other.txt"), 3)
    with pytest.raises(CalibrationError, match="windows of held_out_dataset are windows of dataset as well"):
        toy_pruner(max_kl=1e6, held_out_dataset=TEXTS).make_plan()


def test_a_data_set_with_splits_is_held_out_by_its_validation_split() -> None:
    order = ("validation", "test", "train")
    assert reading_module.held_out_split("wikitext2", order) == "validation"
    assert reading_module.held_out_split("alpaca", order) == "train"
    assert reading_module.held_out_split("wikitext2") == "test"


# Size


@pytest.mark.parametrize("strategy", ["random", "sleb"])
def test_as_few_blocks_go_as_the_size_needs(strategy: str) -> None:
    model = tiny_model("llama", 6)
    block = 4 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    dense = size_of(model)["size_bytes"]
    for bound, count in ((dense - 1, 1), (dense - block, 1), (dense - block - 1, 2), (dense - 3 * block, 3)):
        pruner = toy_pruner(strategy=strategy, target_size_gb=bound / 1e9)
        pruner.prune()
        assert pruner.plan.num_removed == count and size_of(pruner.model)["size_bytes"] <= bound
        achieved = pruner.report.achieved
        assert (achieved["size_bytes_before"], achieved["size_bytes_after"]) == (dense, dense - count * block)


def test_the_dtype_counts_for_the_size() -> None:
    halved = size_of(tiny_model("llama", 6))["size_bytes"] / 2e9
    with pytest.raises(ConfigurationError, match="leaves nothing to remove: the weights of the model take"):
        BlockPruner(tiny_model("llama", 6).bfloat16(), config("random", target_size_gb=halved)).make_plan()
    with pytest.raises(ConfigurationError, match="cannot be reached: removing the 4 blocks") as caught:
        toy_pruner(target_size_gb=1e-6).make_plan()
    smallest = float(str(caught.value).rsplit(" ", 1)[1].rstrip("."))
    assert toy_pruner(target_size_gb=smallest).make_plan().num_removed == 4


# Speed


@pytest.mark.parametrize(("target", "count"), [(1.01, 1), (8 / 7, 1), (1.15, 2), (8 / 6, 2), (1.34, 3), (2.0, 4)])
@pytest.mark.parametrize("strategy", often(["sleb", "random", "shortgpt"], kept=lambda strategy: strategy == "random"))
def test_as_few_blocks_go_as_the_speed_needs(strategy: str, target: float, count: int, monkeypatch) -> None:
    monkeypatch.setattr(speedup, "request_seconds", seconds_by_blocks)
    pruner = toy_pruner(strategy=strategy, target_speedup=target)
    before = snapshot(pruner.model)
    plan = pruner.make_plan()
    assert_unchanged(pruner.model, before)
    assert plan.num_removed == count and plan.requested == {"target_speedup": target}
    figures = plan.details["budget"]
    assert figures["prefill_speedup"] == figures["speedup"] == pytest.approx(8 / (8 - count))
    assert figures["decode_speedup"] == pytest.approx(7 / (7 - count))
    # One less was measured, and is not enough.
    assert count == 1 or any(entry["removed"] == count - 1 for entry in figures["trail"])


def test_a_speed_that_cannot_be_reached_names_the_largest(monkeypatch) -> None:
    monkeypatch.setattr(speedup, "request_seconds", seconds_by_blocks)
    message = r"target_speedup=2.1 cannot be reached: without the 4 blocks that may go, prefill 2.000 and decode 2.333"
    with pytest.raises(ConfigurationError, match=message + ".*The largest reachable target_speedup is 2.0."):
        toy_pruner(target_speedup=2.1).make_plan()


def test_medians_are_compared_and_turns_alternate(monkeypatch) -> None:
    model, order = tiny_model("llama", 4), []
    outliers = iter([9.0, 1, 1, 1, 1, 90, 1, 1, 1, 1])

    def seconds(live: PreTrainedModel) -> list[float]:
        order.append(len(live.model.layers))
        return [len(live.model.layers) * next(outliers)]

    monkeypatch.setattr(speedup, "request_seconds", seconds)
    found = speedup.timed_in_turns(model, PruningPlan.from_blocks(model, [1, 2]))
    assert order == [4, 2] * 5 and speedup.speedups_of(found) == {"prefill": 2.0}


def test_the_smallest_number_is_found_among_all() -> None:
    for most in range(1, 12):
        for wanted in range(1, most + 1):
            tried: list[int] = []

            def measure(count: int, tried: list[int] = tried) -> dict[str, float]:
                tried.append(count)
                return {"prefill": 1 + count, "decode": 2 + count}

            count, figures = fewest_blocks(most, 1 + wanted, measure)
            assert count == wanted and figures["speedup"] == 1 + wanted
            assert len(set(tried)) == len(tried) <= 1 + most.bit_length()


@pytest.mark.parametrize("family", ["llama", "bert", "bart"])
def test_a_model_is_really_timed_and_put_back(family: str) -> None:
    model = tiny_model(family, 4) if family == "llama" else other_stacks.tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = speedup.timed_in_turns(model, PruningPlan.from_blocks(model, [1, 2]))
    assert found.shape[:2] == (speedup.REPEATS, 2) and bool((found > 0).all())
    assert found.shape[2] == (2 if model.can_generate() else 1)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


# Going on after a crash, and several processes


@pytest.mark.parametrize(
    ("fields", "written"),
    often(
        [
            *(({"max_kl": 0.002}, written) for written in (1, 2, 4)),
            *(({"strategy": "shortgpt", "max_kl": 0.002}, written) for written in (1, 2, 4)),
            *(({"strategy": "search", "max_kl": 0.002, "compensation": "ridge"}, written) for written in (1, 4, 7)),
        ],
        kept=lambda case: case[1] == (4 if "compensation" in case[0] else 2),
    ),
    ids=str,
)
def test_a_search_goes_on_after_an_interruption(fields, written: int, tmp_path: Path, monkeypatch) -> None:
    whole = idle_pruner(**fields).make_plan()
    write = Ledger.write
    done: list[str] = []

    def interrupt(ledger: Ledger, key: str, tensors: dict[str, Tensor]) -> None:
        if len(done) == written:
            raise KeyboardInterrupt
        done.append(key)
        write(ledger, key, tensors)

    monkeypatch.setattr(Ledger, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        idle_pruner(**fields).make_plan(resume_dir=tmp_path / "kept")
    monkeypatch.setattr(Ledger, "write", write)
    with pytest.raises(ResumeError, match="held_out"):
        idle_pruner(**fields, held_out_samples=5).make_plan(resume_dir=tmp_path / "kept")
    pruner = idle_pruner(**fields)
    assert pruner.make_plan(resume_dir=tmp_path / "kept") == whole
    assert pruner.report.reused_measurements == written


CASES: dict[str, dict[str, Any]] = {
    "kl": {"max_kl": 0.145, "num_samples": 3},
    "one-pass": {"max_kl": 0.09, "strategy": "shortgpt", "num_samples": 3},
    "increase": {"max_ppl_increase": 0.05, "num_samples": 3},
    "maps": {"max_kl": 0.16, "num_samples": 4, "compensation": "ridge", "generated_samples": 40},
    "speed": {"target_speedup": 8 / 6},
}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Outcome], Path]:
    folder = tmp_path_factory.mktemp("budgets")
    scenario = Scenario("plans", {"cases": list(CASES.items()), "folder": str(folder)})
    return play({"plans": scenario}, folder)["plans"], folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_choose_what_one_does(name: str, played) -> None:
    outcomes, folder = played
    assert [each.code for each in outcomes] == [0, 0], outcomes[1].err
    first, second = (PruningPlan.from_file(folder / f"{name}-{rank}.json") for rank in (0, 1))
    assert first == second
    if name == "speed":
        assert first.num_removed == 2 and first.details["budget"]["speedup"] == 8 / 6
        return
    pruner = toy_pruner(**CASES[name])
    alone = pruner.make_plan()
    assert alone.removed_blocks == first.removed_blocks and 0 < alone.num_removed < 4
    for ours, theirs in zip(alone.details["budget"]["trail"], first.details["budget"]["trail"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    said = [json.loads(line) for each in outcomes for line in each.out.splitlines()]
    shares = [line["block_forwards"] for line in said if line["name"] == name]
    # What the dense model predicts on the windows that judge maps, every process finds out for itself.
    repeated = sum(shares) - pruner.report.block_forwards
    assert min(shares) > 0 and (0 < repeated < 0.05 * sum(shares) if name == "maps" else repeated == 0)


# What plans, configurations, cards and commands make of it


def test_configurations_and_plans_keep_the_budget(tmp_path: Path) -> None:
    given = BlockPruningConfig(max_kl=0.1, held_out_dataset="a.txt", held_out_samples=9)
    assert BlockPruningConfig.from_dict(given.to_dict()) == given
    other = BlockPruningConfig.from_dict(given.to_dict(), num_blocks=2)
    assert other.recipe.requested == {"num_blocks": 2} and other.held_out_dataset is None
    in_memory = BlockPruningConfig(max_kl=0.1, held_out_dataset=["some text"])
    assert json.dumps(in_memory.to_dict()) and in_memory.to_dict()["held_out_dataset"] is None
    plan = idle_pruner(max_kl=BOUNDS["max_kl"]).make_plan()
    assert PruningPlan.from_file(plan.save(tmp_path / "plan.json")) == plan
    assert BlockPruningConfig.from_plan(plan).recipe.requested == {"max_kl": BOUNDS["max_kl"]}
    shorter = plan.truncate(2)
    assert shorter.requested == {"num_blocks": 2} and "budget" not in shorter.details and "budget" in plan.details


def test_scores_do_not_depend_on_the_budget() -> None:
    pruner = toy_pruner(max_kl=0.1, held_out_samples=2)
    assert pruner.score() == toy_pruner().score()


def test_a_card_says_what_was_asked_for_and_reached(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("\n".join([*TEXTS, text(400, 9)]), encoding="utf-8")
    fields = {"max_kl": 0.3, "dataset": "texts.txt", "held_out_samples": 6}
    pruner = BlockPruner.from_pretrained(toy_folder(tmp_path / "dense"), config(**fields))
    pruner.prune(tmp_path / "out")
    figures = pruner.plan.details["budget"]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "- Asked for: `max_kl=0.3`" in card
    assert f"`kl={figures['kl']:.4g}`" in card and f"`perplexity_dense={figures['perplexity_dense']:.4g}`" in card
    assert figures["held_out"]["fingerprint"] in card
    assert "--max-kl 0.3" in card and "--held-out-samples 6" in card
    assert pruner.report.requested == {"max_kl": 0.3} and pruner.report.strategy_details["budget"] == figures
    assert BlockPruningConfig.from_pretrained(tmp_path / "out").recipe.requested == {"max_kl": 0.3}
    cut = pruner.plan.truncate(1)
    fresh = BlockPruner.from_pretrained(tmp_path / "dense", config(**fields))
    fresh.prune(tmp_path / "cut", plan=cut)
    assert "--num-blocks 1" in fresh.report.command and "held-out" not in fresh.report.command


@pytest.mark.parametrize(
    "budget", [{"kl": "x", "held_out": 3}, {"kl": None, "held_out": {"windows": "many"}}, [1], {"kl": {}}, 7]
)
def test_details_of_any_shape_make_a_card(budget: Any, tmp_path: Path) -> None:
    pruner = toy_pruner()
    plan = pruner.make_plan()
    pruner.prune(tmp_path / "out", plan=plan.with_provenance(details={**plan.details, "budget": budget}))
    assert "Reached" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
