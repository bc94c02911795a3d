# SPDX-License-Identifier: Apache-2.0
"""What makes a pruning plan one: parts that agree with each other, and, in a file, values of the declared types.

`plan` uses this module; the plans that come here are values that it made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_type_hints

from .errors import PlanError
from .half import ATTENTION, MLP, PARTS, Half, blocks_off, joined_halves
from .json_values import fits, misfit, spelled_type


# What `PruningPlan.parts` says of each plan that was joined.
PART_FIELDS = ("strategy", "requested", "options", "scores", "steps", "details", "calibration", "seed")


def check_parts(plan: Any) -> None:
    """Rejects a plan whose parts contradict each other.

    Raises:
        PlanError: They do.
    """
    numbers = [plan.num_blocks, *plan.removed_blocks]
    numbers += [half for source in plan.blocks for half in (source.attention, source.mlp)]
    if any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
        raise PlanError("Block numbers in a plan must be integers.")
    if not isinstance(plan.model_type, str) or not plan.model_type:
        raise PlanError("A plan needs the model type that it was made for.")
    if plan.stack not in ("decoder", "encoder"):
        raise PlanError(f"A plan is for the 'decoder' or the 'encoder' of a model, not for {plan.stack!r}.")
    if len(set(plan.removed_blocks)) != len(plan.removed_blocks):
        raise PlanError(f"A block is removed twice: {list(plan.removed_blocks)}.")
    if not plan.blocks:
        raise PlanError("The plan removes every block; at least one must stay.")
    if plan.removed_halves:
        _check_halves(plan)
    else:
        split = [source for source in plan.blocks if source.attention != source.mlp]
        if split or (plan.halves and not _of_halves(plan.smaller.values())):
            raise PlanError(
                f"The plan removes whole blocks, but {split[0] if split else 'it'} names halves of blocks."
            )
        _check_numbers(plan)
    _check_smaller(plan)
    _check_places(plan)


def _check_places(plan: Any) -> None:
    """What becomes narrower, and what something is folded into, lies in halves that stay."""
    groups = plan.width.groups
    narrowed = [Half(each.block, plan.part_of(groups[each.group].writer)) for each in plan.width.narrowed]
    folded = [Half(each.block, plan.part_of(each.module)) for each in plan.folds.entries]
    kept = {Half(source.of(part), part) for source in plan.blocks for part in PARTS}
    for halves, what in ((narrowed, "narrows"), (folded, "folds statistics into")):
        lost = sorted(half for half in halves if half not in kept)
        if lost:
            half = f"the {lost[0].part} half of " if plan.removed_halves else ""
            raise PlanError(f"The plan {what} {half}block {lost[0].block}, which it does not keep.")
    for group in groups if plan.removed_halves else ():
        if len({plan.part_of(name) for name in (group.writer, *(cut.name for cut in group.tensors))}) > 1:
            raise PlanError(f"The units before '{group.writer}' in the plan lie in both halves of a block.")


def _check_numbers(plan: Any) -> None:
    """Kept and removed blocks are all there are."""
    gone, kept = set(plan.removed_blocks), list(plan.kept_blocks)
    # The count first: a file may claim any number of blocks, which would be counted out in memory.
    complete = len(kept) + len(gone) == plan.num_blocks and gone <= set(range(plan.num_blocks))
    if not complete or kept != [index for index in range(plan.num_blocks) if index not in gone]:
        raise PlanError(
            f"Kept blocks {kept} and removed blocks {list(plan.removed_blocks)} do not make up blocks 0 to "
            f"{plan.num_blocks - 1} in order."
        )


def _check_smaller(plan: Any) -> None:
    """The smaller choices name some of the blocks, or halves of which as many blocks less are left."""
    for count, names in plan.smaller.items():
        halves = _of_halves([names])
        if halves:
            _check_modules(plan)
        known = _leaves_blocks(plan.num_blocks, names) if halves else set(names) <= set(range(plan.num_blocks))
        worth = len(names) / 2 if halves else len(names)
        if len(set(names)) != len(names) or f"{worth:g}" != count or not known:
            raise PlanError(f"The plan's choice for {count} blocks, {list(names)}, is none.")


def _of_halves(choices: Iterable[Sequence[int | str]]) -> bool:
    return any(isinstance(name, str) for choice in choices for name in choice)


def _leaves_blocks(num_blocks: int, names: Sequence[int | str]) -> bool:
    try:
        joined_halves(num_blocks, [Half.read(str(name)) for name in names])
    except (ValueError, PlanError):
        return False
    return True


def _check_modules(plan: Any) -> None:
    if set(plan.halves.values()) != set(PARTS):
        raise PlanError("A plan that removes half-blocks must say which modules make up which half ('halves').")


def _check_halves(plan: Any) -> None:
    """Kept and removed halves are all there are, in order, and the plan says which modules they are."""
    try:
        order = [Half.read(text) for text in plan.removed_halves]
    except (ValueError, AttributeError) as error:
        raise PlanError(f"The plan is malformed: {error}.") from error
    gone = set(order)
    kept = [half for each in plan.blocks for half in (Half(each.attention, ATTENTION), Half(each.mlp, MLP))]
    places = [half.place for half in kept]
    complete = len(gone) == len(order) and len(kept) + len(gone) == 2 * plan.num_blocks and not gone & set(kept)
    if (
        not complete
        or places != sorted(places)
        or any(not 0 <= half.block < plan.num_blocks for half in (*order, *kept))
    ):
        raise PlanError(f"Kept and removed halves do not make up the halves of {plan.num_blocks} blocks in order.")
    if set(plan.removed_blocks) != blocks_off(gone):
        raise PlanError(f"The blocks that lost both halves are {sorted(blocks_off(gone))}; the plan says otherwise.")
    _check_modules(plan)


def check_types(plan: Any) -> None:
    """Rejects a plan with a value that no code of this package could have written.

    Plans made in Python need no such check, and strategies of others may keep what they like in theirs.

    Raises:
        PlanError: There is one; the message names its field.
    """
    fault = misfit(plan) or _fault_of_parts(plan)
    if fault:
        raise PlanError(f"The plan is malformed: {fault}.")


def _fault_of_parts(plan: Any) -> str | None:
    """What is wrong with the record of the plans that were joined in this one."""
    parts = plan.details.get("parts")
    if parts is None:
        return None
    if not fits(parts, list[Mapping[str, Any]]) or not parts:
        return "'parts' of its details must be a list of objects, one for every plan that was joined"
    hints = get_type_hints(type(plan))
    for part in parts:
        for name in PART_FIELDS:
            if (name == "strategy" or name in part) and not fits(part.get(name), hints[name]):
                return f"'{name}' of a part in its details must be {spelled_type(hints[name])}"
    return None
