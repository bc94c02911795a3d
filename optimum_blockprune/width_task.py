# SPDX-License-Identifier: Apache-2.0
"""From a budget to the number of units that each block keeps, before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from torch import nn

from .blocks import BlockStack
from .errors import ConfigurationError, UnsupportedModelError
from .plan import PruningPlan
from .recipe import Recipe
from .strategies.base import Place, PruningStrategy, WidthTask
from .template import quiet
from .trial import usable_units
from .units import narrower_model
from .widths import UnitGroup


def width_task(stack: BlockStack, recipe: Recipe, strategy: type[PruningStrategy], options: Any) -> WidthTask:
    """Finds the units of the model and how many of them stay.

    Raises:
        ConfigurationError: The budget cannot be met, or the layout does not fit the protected blocks.
        UnsupportedModelError: The model has no such units that can be cut exactly.
    """
    layout = stack.layout
    # What cannot be pruned at all is refused before it runs for the first time: some models change when they do.
    layout.check(PruningPlan.from_removed(layout.model_type, layout.num_blocks, (), stack=layout.stack))
    groups, blocks = usable_units(stack, strategy.families_of(options), recipe.layout)
    with quiet():
        allowed = tuple(_allowed(stack, group, recipe) for group in groups)
    free = _free_blocks(stack, recipe, strategy)
    places = [
        Place(block, number, group.units, group.units, unit_cost(stack.blocks[block], group), block in free)
        for number, group in enumerate(groups)
        for block in blocks[number]
    ]
    if not any(place.free for place in places):
        raise ConfigurationError("Every block with such units is protected (protect_first, protect_last).")
    keep = _kept_counts(stack, recipe, places, allowed)
    counted = tuple(
        Place(place.block, place.group, place.units, keep[place.group] if place.free else place.units, place.cost)
        if place.free
        else place
        for place in places
    )
    return WidthTask(groups, counted, recipe.layout, recipe.align, allowed)


def unit_cost(block: nn.Module, group: UnitGroup) -> int:
    """Parameters of a block that belong to one unit of a group."""
    total = 0
    for cut in group.tensors:
        shape = block.get_parameter(cut.name).shape
        total += math.prod(shape) // shape[cut.axis] * sum(cut.parts)
    return total


def _free_blocks(stack: BlockStack, recipe: Recipe, strategy: type[PruningStrategy]) -> set[int]:
    """Blocks that may lose units."""
    given = (recipe.protect_first, recipe.protect_last)
    if recipe.layout == "uniform":
        if any(given):
            raise ConfigurationError(
                "layout='uniform' gives all blocks the same width, so that none can be protected: set protect_first "
                "and protect_last to 0, or use layout='padded' or 'per_layer'."
            )
        return set(range(len(stack)))
    own = (strategy.protect_first, strategy.protect_last)
    first, last = (mine if theirs is None else theirs for mine, theirs in zip(own, given, strict=True))
    return set(range(first, len(stack) - last))


def _allowed(stack: BlockStack, group: UnitGroup, recipe: Recipe) -> tuple[int, ...]:
    """Numbers of units that can be asked for: multiples for channels, what the classes accept for heads."""
    if group.family == "mlp":
        return (*range(recipe.align, group.units, recipe.align), group.units)
    if recipe.layout == "per_layer" or not group.fields:
        return tuple(range(1, group.units + 1))
    return (*(count for count in range(1, group.units) if _accepted(stack, group, count)), group.units)


def _accepted(stack: BlockStack, group: UnitGroup, count: int) -> bool:
    try:
        narrower_model(stack, group.values(count))
    except UnsupportedModelError:
        return False
    return True


def _kept_counts(
    stack: BlockStack, recipe: Recipe, places: Sequence[Place], allowed: Sequence[tuple[int, ...]]
) -> list[int]:
    """Units that each free place of a group keeps."""
    (name, value), *_ = recipe.requested.items()
    units = [next(place.units for place in places if place.group == group) for group in range(len(allowed))]
    if name == "num_blocks":
        raise ConfigurationError(
            f"num_blocks={value} counts blocks, but strategy '{recipe.strategy}' removes channels and heads: use "
            "sparsity or target_params."
        )
    _require_choice(recipe, units, allowed)
    if name == "target_params":
        return _for_target(stack, recipe, places, units, allowed)
    counts = [_nearest(total, Fraction(str(value)), choices) for total, choices in zip(units, allowed, strict=True)]
    if 0 in counts:
        least = [(total, choices[0]) for total, choices in zip(units, allowed, strict=True) if len(choices) > 1]
        # At half of the least number, that number is as close as none, and stays.
        largest = min(math.floor((1 - Fraction(count, 2 * total)) * 10_000) for total, count in least) / 10_000
        total, count = least[0] if len(least) == 1 else min(least, key=lambda pair: pair[0] / pair[1])
        raise ConfigurationError(
            f"sparsity={value} would leave less than {count} of {total} units in a block, the least that can be kept. "
            f"The largest possible sparsity is {largest}."
        )
    if counts == units:
        steps = [
            1 - Fraction(choices[-2] + total, 2 * total)
            for total, choices in zip(units, allowed, strict=True)
            if len(choices) > 1
        ]
        smallest = (math.floor(min(steps) * 10_000) + 1) / 10_000
        raise ConfigurationError(
            f"sparsity={value} removes nothing: kept units are rounded to {_grid(allowed)}. The smallest sparsity "
            f"that removes some is {smallest}."
        )
    return counts


def _require_choice(recipe: Recipe, units: Sequence[int], allowed: Sequence[tuple[int, ...]]) -> None:
    """Some group must be able to lose units; the others stay whole."""
    if all(len(choices) == 1 for choices in allowed):
        raise ConfigurationError(
            f"Nothing can go: a block has {' and '.join(map(str, units))} units, and kept channels are a multiple of "
            f"align={recipe.align}. Give a smaller align."
        )


def _nearest(units: int, sparsity: Fraction, choices: Sequence[int]) -> int:
    """The allowed number of units that comes closest, 0 included; the larger one of two that are as close."""
    if len(choices) == 1:
        return units
    wanted = units * (1 - sparsity)
    return min((0, *choices), key=lambda count: (abs(count - wanted), -count))


def _grid(allowed: Sequence[tuple[int, ...]]) -> str:
    return " and ".join(
        f"{choices[0]}, {choices[1]}, ..." if len(choices) > 2 else f"{choices}" for choices in allowed
    )


def _for_target(
    stack: BlockStack,
    recipe: Recipe,
    places: Sequence[Place],
    units: Sequence[int],
    allowed: Sequence[tuple[int, ...]],
) -> list[int]:
    """The smallest share of units whose removal reaches the target, the same share in every family."""
    target, total = recipe.target_params, sum(parameter.numel() for parameter in stack.model.parameters())
    if recipe.layout == "padded":
        raise ConfigurationError(
            "target_params cannot be promised with layout='padded', whose size depends on the widest block: use "
            "'uniform' or 'per_layer', or give a sparsity."
        )
    if target >= total:
        raise ConfigurationError(
            f"target_params={target:,} leaves nothing to remove: the model has {total:,} parameters."
        )

    def size(counts: Sequence[int]) -> int:
        gone = (place.cost * (place.units - counts[place.group]) for place in places if place.free)
        return total - sum(gone)

    least = [choices[0] for choices in allowed]
    if size(least) > target:
        raise ConfigurationError(
            f"target_params={target:,} cannot be reached by removing units of width: the least that can be kept "
            f"leaves {size(least):,} of {total:,} parameters. The smallest possible target_params is {size(least):,}."
        )
    # Where the number that is kept steps down, by the share that is removed then.
    shares = sorted(
        {
            1 - Fraction(low + high, 2 * total_units)
            for total_units, choices in zip(units, allowed, strict=True)
            for low, high in zip(choices, choices[1:], strict=False)
        }
    )
    first, last = 0, len(shares) - 1
    while first < last:
        middle = (first + last) // 2
        if size(_stepped(units, shares[middle], allowed)) <= target:
            last = middle
        else:
            first = middle + 1
    return _stepped(units, shares[first], allowed)


def _stepped(units: Sequence[int], share: Fraction, allowed: Sequence[tuple[int, ...]]) -> list[int]:
    """Like `_nearest`, but never 0, and the smaller one of two that are as close."""
    return [
        min(choices, key=lambda count, wanted=total * (1 - share): (abs(count - wanted), count))
        for total, choices in zip(units, allowed, strict=True)
    ]
