# SPDX-License-Identifier: Apache-2.0
"""Depths of one plan: which may be asked for, and a model that is dense again afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import plain_logits, random_ids, silenced, tiny_model
from toys import NUM_BLOCKS, TEXTS, assert_unchanged, config, snapshot, toy_pruner

from optimum_blockprune import BlockPruner, PruningPlan
from optimum_blockprune.depths import checked_counts, pruned_to
from optimum_blockprune.errors import ConfigurationError, PlanError
from optimum_blockprune.evaluation import EvaluationSpec


PLAN = PruningPlan.from_blocks(tiny_model("llama", NUM_BLOCKS), [4, 1, 2])
FAST = EvaluationSpec(speed=False, continuations=0)


def test_the_dense_model_comes_first() -> None:
    assert checked_counts(PLAN, [3, 1, 1]) == [0, 1, 3]
    assert checked_counts(PLAN, (0,)) == [0]


@pytest.mark.parametrize("counts", [[], [-1], [True], [1.0], ["2"]])
def test_counts_that_are_none(counts: list[Any]) -> None:
    with pytest.raises(ConfigurationError, match="such as"):
        checked_counts(PLAN, counts)


def test_counts_that_the_plan_does_not_have() -> None:
    with pytest.raises(PlanError, match="removes 3 blocks"):
        checked_counts(PLAN, [1, 4])
    with pytest.raises(PlanError, match="choose again with num_blocks=1"):
        checked_counts(PruningPlan.from_removed("llama", 6, (1, 2), nested=False), [1])
    with pytest.raises(PlanError, match="one size only"):
        checked_counts(toy_pruner(strategy="magnitude").make_plan(), [1])


def test_a_model_is_pruned_for_a_while() -> None:
    model = tiny_model("llama", NUM_BLOCKS)
    before = snapshot(model)
    with pruned_to(model, PLAN) as expected:
        assert expected.plan is PLAN
        assert torch.equal(
            plain_logits(model, random_ids()),
            plain_logits(silenced(tiny_model("llama", NUM_BLOCKS), [1, 2, 4]), random_ids()),
        )
    assert_unchanged(model, before)
    with pytest.raises(KeyboardInterrupt), pruned_to(model, PLAN):
        raise KeyboardInterrupt
    assert_unchanged(model, before)
    with pruned_to(model, PLAN.truncate(0)) as expected:
        assert expected is None
        assert_unchanged(model, before)


def test_every_depth_is_what_pruning_to_it_gives() -> None:
    pruner = toy_pruner(num_blocks=3)
    before = snapshot(pruner.model)
    plan = pruner.make_plan()
    found = pruner.measure_depths(TEXTS[:3], spec=FAST)
    assert_unchanged(pruner.model, before)
    assert found == pruner.report.depths
    assert [entry["removed"] for entry in found] == [0, 1, 2, 3]
    for entry in found:
        own = BlockPruner(tiny_model("llama", NUM_BLOCKS), config(), pruner.tokenizer)
        if entry["removed"]:
            own.prune(plan=plan.truncate(entry["removed"]))
        alone = own.evaluate(TEXTS[:3], spec=FAST)
        assert {**entry, "label": alone["label"]} == {**alone, "removed": entry["removed"]}
    pruner.prune(plan=pruner.plan)
    assert pruner.report.depths == found


def test_some_depths_with_speed() -> None:
    pruner = toy_pruner(num_blocks=3)
    pruner.make_plan()
    found = pruner.measure_depths(TEXTS[:3], [2])
    assert [entry["removed"] for entry in found] == [0, 2]
    assert all(entry["decode_tokens_per_second"] > 0 and entry["generation"] for entry in found)
    middle = pruner.measure_depths(TEXTS[:3])[1:-1]
    assert len(middle) == 2 and not any("generation" in entry for entry in middle)


def test_depths_of_another_plan_are_forgotten() -> None:
    pruner = toy_pruner(num_blocks=2)
    pruner.make_plan()
    pruner.measure_depths(TEXTS[:3], spec=FAST)
    pruner.make_plan(config(num_blocks=1))
    assert pruner.report.depths == []
    pruner.measure_depths(TEXTS[:3], spec=FAST)
    pruner.prune(plan=PLAN)
    assert pruner.report.depths == []


def test_depths_need_a_plan_and_a_dense_model() -> None:
    pruner = toy_pruner(num_blocks=2)
    with pytest.raises(PlanError, match="make_plan"):
        pruner.measure_depths(TEXTS[:3])
    pruner.prune()
    with pytest.raises(PlanError, match="has 4 blocks; the plan was made for 6"):
        pruner.measure_depths(TEXTS[:3])
    with pytest.raises(PlanError, match="has 4 blocks; the plan was made for 6"):
        pruner.export("nowhere", [1])
