# SPDX-License-Identifier: Apache-2.0
"""Plans made from plans: cut short, or joined with the one that was made for what the first leaves.

`plan` uses this module and documents both; the plans that come here are values that it made.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from .errors import PlanError
from .folds import joined_folds
from .half import Half, sorted_halves
from .joining import all_inputs, composed


def truncated(plan: Any, num_blocks: int) -> Any:
    """See `PruningPlan.truncate`."""
    most = plan.num_removed
    if plan.width or not most:
        raise PlanError("Only a plan that removes blocks or half-blocks, and nothing else, can be cut short.")
    if isinstance(num_blocks, bool) or not isinstance(num_blocks, int) or not 0 <= num_blocks <= most:
        raise PlanError(f"This plan removes {most} blocks; {num_blocks!r} is not a number from 0 to {most}.")
    if num_blocks == most:
        return plan
    if plan.folds:
        raise PlanError(
            "This plan's compensation was fitted to all that it removes, and is wrong for less: choose again with "
            f"num_blocks={num_blocks}."
        )
    details: dict[str, Any] = {"truncated_from": most}
    steps: tuple[Mapping[str, Any], ...] = ()
    order: tuple[int | str, ...] = plan.removed_halves[: 2 * num_blocks] or plan.removed_blocks[:num_blocks]
    smaller: Mapping[str, Any] = {}
    if plan.nested:
        steps = plan.steps[:num_blocks] if len(plan.steps) == most else ()
        details = {**plan.details, **details}
    elif num_blocks:
        if str(num_blocks) not in plan.smaller:
            raise PlanError(
                f"This plan of '{plan.strategy}' does not say what it would have removed for {num_blocks} blocks: "
                f"choose again with num_blocks={num_blocks}."
            )
        order = plan.smaller[str(num_blocks)]
        smaller = {count: blocks for count, blocks in plan.smaller.items() if int(count) < num_blocks}
    provenance = {**vars(plan), "steps": steps, "details": details, "smaller": smaller}
    provenance["requested"] = {"num_blocks": num_blocks}
    details.pop("budget", None)  # what was measured for it is of another depth
    if not any(isinstance(name, str) for each in (order, *smaller.values()) for name in each):
        provenance["halves"] = {}
    for name in ("model_type", "num_blocks", "blocks", "removed_blocks", "removed_halves"):
        del provenance[name]
    if order and isinstance(order[0], str):
        return type(plan).from_halves(plan.model_type, plan.num_blocks, map(Half.read, order), **provenance)
    return type(plan).from_removed(plan.model_type, plan.num_blocks, order, **provenance)


def followed(first: Any, second: Any) -> Any:
    """See `PruningPlan.then`."""
    theirs = (second.model_type, second.stack, second.num_blocks)
    if theirs != (first.model_type, first.stack, len(first.blocks)):
        raise PlanError(
            f"The second plan is for {second.num_blocks} blocks of '{second.model_type}' ({second.stack}); the "
            f"first leaves {len(first.blocks)} of '{first.model_type}' ({first.stack})."
        )
    parts = [part for plan in (first, second) for part in plan.parts()]
    whole = _removing_both(
        first,
        second,
        stack=first.stack,
        strategy="+".join(part["strategy"] for part in parts),
        base_model=first.base_model,
        requested={},
        details={"parts": parts},
        calibration=first.calibration or second.calibration,
        seed=first.seed,
        versions=second.versions or first.versions,
    )

    def stays(block: int, module: str) -> bool:
        return whole.new_place(block, module) is not None

    return whole.with_provenance(
        width=composed(first.width, second.width, first.old_place, stays),
        folds=joined_folds(first.folds, second.folds, first.old_place, stays, partial(all_inputs, first.width)),
    )


def _removing_both(first: Any, second: Any, **provenance: Any) -> Any:
    """The plan that removes what the two remove, and no more."""
    if not first.removed_halves and not second.removed_halves:
        gone = (*first.removed_blocks, *(first.kept_blocks[block] for block in second.removed_blocks))
        return type(first).from_removed(first.model_type, first.num_blocks, gone, **provenance)
    # A block that the second plan removes whole may be made of halves of two blocks.
    later = (Half(first.blocks[half.block].of(half.part), half.part) for half in sorted_halves(second.removed_units))
    halves = _joined_halves(first.halves, second.halves)
    order = (*sorted_halves(first.removed_units), *later)
    return type(first).from_halves(first.model_type, first.num_blocks, order, halves, **provenance)


def _joined_halves(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    both = {**second, **first}
    other = [name for name, part in second.items() if both[name] != part]
    if other:
        raise PlanError(
            f"The module '{other[0]}' belongs to the {first[other[0]]} half of a block in the first plan and to the "
            "other half in the second one, so that they cannot be joined in one plan; prune twice into two folders."
        )
    return both
