# SPDX-License-Identifier: Apache-2.0
"""The search: a greedy walk, then exchanges that are accepted where they help on all windows."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from contexts import context_of
from families import block_list, random_ids, tiny_model
from transformers import PreTrainedModel

from optimum_blockprune import BlockPruner, BlockPruningConfig
from optimum_blockprune.batches import CalibrationWindows
from optimum_blockprune.errors import ConfigurationError
from optimum_blockprune.plan import PruningPlan
from optimum_blockprune.runner import BlockRunner
from optimum_blockprune.strategies import search as module
from optimum_blockprune.strategies.base import SearchContext
from optimum_blockprune.strategies.search import Search, SearchOptions
from optimum_blockprune.strategies.similarity import Angular, ShortGPT
from optimum_blockprune.teacher import with_teacher


def context_for(model: PreTrainedModel, count: int, **changes: Any) -> SearchContext:
    """A context in which all but the first and the last block may go, close to the dense model."""
    windows = CalibrationWindows.from_tokens(random_ids(6, 16), source="made up")
    settings = {
        "options": SearchOptions(),
        "num_remove": count,
        "removable": tuple(range(1, model.config.num_hidden_layers - 1)),
        "objective": "kl",
    }
    return context_of(model, with_teacher(BlockRunner(model), windows, 2), **{**settings, **changes})


def divergence(context: SearchContext, removed: tuple[int, ...]) -> float:
    """Of the model without some blocks, by whole forward passes."""
    total, count = 0.0, 0
    for batch in context.windows.batches(2):
        loss, predictions = context.runner.nll(batch, removed)
        total, count = total + loss.item(), count + predictions
    return total / count


def misleading() -> PreTrainedModel:
    """Greedy errs: block 2 alone costs least, but 3 and 4, which take each other back, cost nothing together."""
    model = tiny_model("llama", 7)
    blocks = block_list(model)
    with torch.no_grad():
        for number in (1, 2, 3, 4, 5):
            for parameter in (blocks[number].self_attn.o_proj.weight, blocks[number].mlp.down_proj.weight):
                parameter.zero_()
        generator = torch.Generator().manual_seed(0)
        for number, size in ((1, 0.3), (2, 0.05), (5, 0.3)):
            weight = blocks[number].mlp.down_proj.weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * size)
        blocks[4].load_state_dict(blocks[3].state_dict())
        # Small norms in front: what block 3 adds hardly changes what block 4 reads.
        weight = blocks[3].mlp.down_proj.weight
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
        blocks[4].mlp.down_proj.weight.copy_(-weight)
    return model


def test_exchanges_find_what_greedy_misses() -> None:
    context = context_for(misleading(), 2, options=SearchOptions(seeds=False))
    greedy = Search().select(replace(context, options=SearchOptions(swaps=0, seeds=False)))
    plan = Search().select(context)
    every = {pair: divergence(context, pair) for pair in combinations(context.removable, 2)}
    best = min(every, key=every.__getitem__)
    assert 2 in greedy.removed_blocks and best == (3, 4)
    assert set(plan.removed_blocks) == set(best)
    assert plan.details["loss"] == pytest.approx(every[best], abs=1e-9)
    assert plan.details["greedy_loss"] == pytest.approx(every[tuple(sorted(greedy.removed_blocks))], rel=1e-6)
    assert plan.nested is False and plan.truncate(1).removed_blocks == greedy.removed_blocks[:1]


@pytest.mark.parametrize("unit", ["block", "half_block"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_it_is_never_worse_than_its_walk(family: str, unit: str) -> None:
    context = context_for(tiny_model(family, 6), 2, unit=unit)
    plan = Search().select(context)
    assert plan.details["loss"] <= plan.details["greedy_loss"]
    assert plan.num_removed == 2
    assert divergence(context, plan.removed_units) == pytest.approx(plan.details["loss"], rel=1e-4)
    better = {name: loss for name, loss in plan.details["seeds"].items() if loss < plan.details["greedy_loss"]}
    assert set(plan.details["seeds"]) == {"shortgpt", "angular"} and plan.details["loss"] <= min(
        better.values(), default=1
    )
    moved = plan.details["loss"] < plan.details["greedy_loss"]
    assert moved == bool(plan.details["exchanges"] or better) == (not plan.nested)


@pytest.mark.parametrize("unit", ["block", "half_block"])
@pytest.mark.parametrize("kind", [ShortGPT, Angular])
def test_it_begins_with_the_choice_of_one_pass_that_is_better_than_the_walk(kind: Any, unit: str) -> None:
    context = context_for(misleading(), 2, unit=unit, options=SearchOptions(swaps=0))
    plan = Search().select(context)
    own = kind().select(replace(context, options=kind.Options(), objective=None))
    seed = divergence(context, own.removed_units)
    assert plan.details["seeds"][kind.name] == pytest.approx(seed, rel=1e-6)
    assert plan.details["loss"] <= seed
    # What takes itself back is one run, whose ends are alike; greedy does not see it.
    assert plan.details["loss"] < 0.5 * plan.details["greedy_loss"] and set(plan.removed_blocks) == {3, 4}
    assert divergence(context, plan.removed_units) == pytest.approx(plan.details["loss"], rel=1e-4)
    assert plan.nested is False and plan.truncate(1).num_removed == 1


def test_choices_that_cannot_be_are_no_beginnings() -> None:
    """No two of these blocks are neighbours."""
    plan = Search().select(context_for(misleading(), 2, removable=(1, 3, 5)))
    assert set(plan.details["seeds"]) == {"shortgpt"}


def test_without_exchanges_and_seeds_it_is_nested() -> None:
    plan = Search().select(context_for(misleading(), 2, options=SearchOptions(swaps=0, seeds=False)))
    assert plan.nested is True and len(plan.steps) == 2 and plan.details["exchanges"] == []
    assert plan.details["seeds"] == {}
    assert plan.details["loss"] == plan.details["greedy_loss"]


def test_one_seed_makes_one_plan() -> None:
    first, second = (Search().select(context_for(misleading(), 2)) for _ in range(2))
    assert first.to_dict() == second.to_dict()


def test_time_is_looked_at_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk ends whatever the time; the exchange that would begin after it does not."""
    clock = iter([0.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    plan = Search().select(context_for(misleading(), 2, options=SearchOptions(time_budget=1.0)))
    assert plan.details["out_of_time"] is True and plan.details["exchanges"] == []
    assert plan.num_removed == 2


def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    rows = [{"input_ids": row} for row in random_ids(6, 16).tolist()]
    config = BlockPruningConfig("search", num_blocks=2, dataset=rows, num_samples=6, seqlen=16)
    first = BlockPruner(misleading(), config)
    plan = first.make_plan(resume_dir=tmp_path / "kept")
    whole = BlockPruner(misleading(), config).make_plan()
    assert json.dumps(plan.to_dict()) == json.dumps(whole.to_dict())
    assert BlockPruningConfig.from_plan(plan).strategy == "search"


def test_a_budget_of_quality_ends_the_walk() -> None:
    rows = [{"input_ids": row} for row in random_ids(12, 16).tolist()]
    settings = {"dataset": rows, "num_samples": 6, "seqlen": 16, "held_out_samples": 6}
    pruner = BlockPruner(misleading(), BlockPruningConfig("search", max_kl=100.0, **settings))
    plan = pruner.make_plan()
    assert plan.num_removed == 5 and plan.details["exchanges"] == []


@pytest.mark.parametrize(
    "options",
    [{"swaps": -1}, {"swaps": True}, {"seeds": 1}, {"time_budget": 0}, {"time_budget": "1"}, {"confidence": 1.0}],
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        SearchOptions(**options)


def test_a_plan_reads_back() -> None:
    plan = Search().select(context_for(misleading(), 2))
    assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
