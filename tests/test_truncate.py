# SPDX-License-Identifier: Apache-2.0
"""A plan cut short is the plan of a search for fewer blocks."""

from __future__ import annotations

from typing import Any

import pytest
from toys import toy_pruner

from optimum_blockprune import PruningPlan
from optimum_blockprune.errors import PlanError


NESTED = ("sleb", "shortgpt", "random", "manual")
OWN = ("angular", "mi_prun")


def plan_for(strategy: str, num_blocks: int, **options: Any) -> PruningPlan:
    if strategy == "manual":
        options = {"blocks": ",".join("4132"[:num_blocks])}
    return toy_pruner(strategy=strategy, num_blocks=num_blocks, strategy_options=options or None).make_plan()


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        *((name, {}) for name in (*NESTED, *OWN)),
        ("sleb", {"search": "race"}),
        ("mi_prun", {"select": "dp", "estimator": "identity_decoder"}),
    ],
)
def test_a_shorter_plan_is_what_a_smaller_budget_gives(strategy: str, options: dict[str, Any]) -> None:
    plan = plan_for(strategy, 4, **options)
    assert plan.nested == (strategy in NESTED)
    for count in (1, 2, 3):
        short, own = plan.truncate(count), plan_for(strategy, count, **options)
        assert short.removed_blocks == own.removed_blocks
        assert short.blocks == own.blocks and short.requested == own.requested == {"num_blocks": count}
        assert short.scores == pytest.approx(own.scores)
        assert short.details["truncated_from"] == 4
        assert PruningPlan.from_dict(short.to_dict()) == short
        if strategy == "sleb":
            assert [step["block"] for step in short.steps] == list(short.removed_blocks)
    assert plan.truncate(4) is plan
    assert plan.truncate(0).removed_blocks == () and len(plan.truncate(0).blocks) == plan.num_blocks


def test_a_plan_cut_twice() -> None:
    for strategy in (*NESTED, *OWN):
        plan = plan_for(strategy, 4)
        assert plan.truncate(3).truncate(2).removed_blocks == plan.truncate(2).removed_blocks


def test_choices_need_not_be_nested() -> None:
    plan = PruningPlan.from_removed("llama", 6, (1, 2), nested=False, smaller={"1": (4,)})
    assert plan.truncate(1).removed_blocks == (4,)
    assert plan.truncate(1).kept_blocks == (0, 1, 2, 3, 5)
    assert PruningPlan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("count", [3, -1, True, 1.0, "1", None])
def test_numbers_that_a_plan_does_not_have(count: Any) -> None:
    with pytest.raises(PlanError, match="is not a number from 0 to 2"):
        PruningPlan.from_removed("llama", 6, (1, 2), nested=True).truncate(count)


@pytest.mark.parametrize("nested", [None, False])
def test_a_plan_that_does_not_know_says_so(nested: bool | None) -> None:
    plan = PruningPlan.from_removed("llama", 6, (1, 2), strategy="theirs", nested=nested)
    with pytest.raises(PlanError, match="'theirs' does not say .* for 1 blocks: choose again with num_blocks=1"):
        plan.truncate(1)


def test_width_has_no_prefix() -> None:
    with pytest.raises(PlanError, match="Only a plan that removes blocks"):
        toy_pruner(strategy="magnitude").make_plan().truncate(1)


@pytest.mark.parametrize("smaller", [{"1": (1, 2)}, {"2": (1, 1)}, {"1": (6,)}, {"1": (-1,)}, {"one": (1,)}])
def test_smaller_choices_that_are_none(smaller: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="is none"):
        PruningPlan.from_removed("llama", 6, (1, 2), nested=False, smaller=smaller)


def test_joined_plans_know_no_order() -> None:
    first = PruningPlan.from_removed("llama", 6, (1,), nested=True)
    joined = first.then(PruningPlan.from_removed("llama", 5, (1,), nested=True))
    with pytest.raises(PlanError, match="choose again"):
        joined.truncate(1)
