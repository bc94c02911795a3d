# SPDX-License-Identifier: Apache-2.0
"""Joins two plans that were applied one after the other: their widths, and what depends on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .errors import PlanError
from .widths import ZEROS, Narrowing, UnitGroup, Width


def composed(
    first: Width, second: Width, old_place: Callable[[int, str], int], stays: Callable[[int, str], bool]
) -> Width:
    """One width for two that were applied one after the other.

    Args:
        first: Of the dense model.
        second: Of what the first plan left; its block numbers are those of that model.
        old_place: Gives the original block of a module, by the block of that model in which it lies and its name.
        stays: Tells whether a module of an original block, by its number and its name, is there after both plans.

    Raises:
        PlanError: Together they are of no one layout.
    """
    # What the second plan removes whole need not agree in width with what it narrows.
    first = _that_stays(first, stays)
    if not second:
        return first
    moved = Width(
        second.layout,
        second.groups,
        tuple(
            replace(each, block=old_place(each.block, second.groups[each.group].writer)) for each in second.narrowed
        ),
        second.padded_to,
    )
    if not first:
        return moved
    if first.layout != second.layout or first.layout == "padded":
        raise PlanError(
            f"Widths of layout '{first.layout}' and '{second.layout}' cannot be joined in one plan; use 'uniform' or "
            "'per_layer' for both, or prune twice into two folders."
        )
    return _joined(first, moved)


def _that_stays(width: Width, stays: Callable[[int, str], bool]) -> Width:
    """What is left of a width when blocks or halves go; groups that nobody has any more go with them."""
    narrowed = [each for each in width.narrowed if stays(each.block, width.groups[each.group].writer)]
    if not narrowed:
        return Width()
    used = sorted({each.group for each in narrowed})
    return Width(
        width.layout,
        tuple(width.groups[number] for number in used),
        tuple(replace(each, group=used.index(each.group)) for each in narrowed),
        tuple(width.padded_to[number] for number in used) if width.padded_to else (),
    )


def _joined(first: Width, second: Width) -> Width:
    groups = list(first.groups)
    found = {(each.block, each.group): each for each in first.narrowed}
    for each in second.narrowed:
        theirs = second.groups[each.group]
        same = [
            number
            for number, group in enumerate(groups)
            if (group.family, group.writer) == (theirs.family, theirs.writer) and (each.block, number) in found
        ]
        if same:
            before = found[each.block, same[0]]
            if groups[same[0]].unit != theirs.unit or len(before.kept) != theirs.units:
                raise PlanError(
                    f"The first plan leaves {len(before.kept)} units of kind '{groups[same[0]].unit}' before "
                    f"'{theirs.writer}' of block {each.block}, the second one is for {theirs.units} of kind "
                    f"'{theirs.unit}', so that they cannot be joined in one plan; prune twice into two folders."
                )
            found[each.block, same[0]] = _after(before, each, groups[same[0]])
        else:
            if theirs not in groups:
                groups.append(theirs)
            found[each.block, groups.index(theirs)] = each
    used = sorted({number for _, number in found})
    narrowed = tuple(replace(each, group=used.index(number)) for (_, number), each in sorted(found.items()))
    return Width(first.layout, tuple(groups[number] for number in used), narrowed)


def _after(first: Narrowing, second: Narrowing, group: UnitGroup) -> Narrowing:
    """One narrowing for two; the numbers of the second are places in what the first keeps."""
    kept = tuple(first.kept[unit] for unit in second.kept)
    means: dict[int, Sequence[float]] = {}
    for each, numbers in ((first, range(group.units)), (second, first.kept)):
        gone = [number for place, number in enumerate(numbers) if place not in set(each.kept)]
        size = group.inputs_per_unit
        means.update((unit, each.means[place * size : (place + 1) * size]) for place, unit in enumerate(gone))
    if not any(means.values()):
        return replace(first, kept=kept)
    nothing = (0.0,) * group.inputs_per_unit
    return replace(first, kept=kept, means=tuple(mean for unit in sorted(means) for mean in means[unit] or nothing))


def all_inputs(width: Width, change: Any, block: int, module: str) -> Any:
    """A change of a module that a width narrows, for the module as it was: zero where inputs are gone.

    Args:
        width: Of the first plan.
        change: Tensor `[inputs, d]`, of what that plan leaves of the module.
        block: Original number of its block.
        module: Its name in the block.
    """
    for group, narrowing in width.of_block(block):
        if group.writer == module:
            cut = group.tensors[0]
            places = cut.indices(narrowing.kept, group.units, width.stored(narrowing))
            kept = [row for row, place in enumerate(places) if place != ZEROS]
            whole = change.new_zeros(cut.size(group.units), change.shape[1])
            whole[[places[row] for row in kept]] = change[kept]
            return whole
    return change
