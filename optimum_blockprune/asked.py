# SPDX-License-Identifier: Apache-2.0
"""What a recipe asks of a model: which blocks may go and how many must, or which widths; tried before any search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optimum.utils import logging
from transformers import PreTrainedModel

from .architectures import Layout
from .blocks import BlockStack, find_blocks
from .errors import ConfigurationError, UnsupportedModelError
from .plan import PruningPlan
from .recipe import Recipe
from .registry import build_options, get_strategy
from .strategies.base import PruningStrategy, WidthTask
from .surgery import check_plan
from .template import make_template
from .width_task import width_task
from .widths import Narrowing, Width


logger = logging.get_logger("optimum.blockprune.choosing")

# For messages: the strategies of this package that search half-blocks.
KNOW_HALVES = "sleb, mi_prun, shortgpt, angular, functional_network with option unit=block"


def asked_for(
    recipe: Recipe, strategy: PruningStrategy, options: Any, stack: BlockStack
) -> tuple[WidthTask | None, tuple[int, ...], int]:
    """The task of a strategy of width; else the blocks that may go, and how many have to. Tried on the model."""
    if strategy.unit_of(options) == "width":
        if recipe.unit is not None:
            raise ConfigurationError(
                f"unit={recipe.unit!r} is for strategies that remove blocks ({KNOW_HALVES}); '{recipe.strategy}' "
                "removes channels and heads here, whose scores rank no blocks. Leave it out."
            )
        task = width_task(stack, recipe, type(strategy), options)
        check_plan(stack.model, _any_width(stack.layout, task))
        return task, (), 0
    _refuse_width_fields(recipe)
    _check_unit(recipe, strategy)
    removable = _removable(recipe, strategy, stack)
    num_remove = _budget(recipe, stack, removable)
    # Whatever the choice will be, as many blocks must be able to go.
    check_plan(stack.model, _any_choice(stack.layout, removable, num_remove))
    return None, removable, num_remove


def _check_unit(recipe: Recipe, strategy: PruningStrategy) -> None:
    if recipe.unit is not None and recipe.unit not in strategy.units:
        raise ConfigurationError(
            f"'{recipe.strategy}' does not remove half-blocks: leave unit={recipe.unit!r} out, or choose another "
            f"strategy ({KNOW_HALVES})."
        )


def _refuse_width_fields(recipe: Recipe) -> None:
    """A field that would be ignored is an error."""
    given = [name for name in ("layout", "align") if getattr(recipe, name) != getattr(Recipe, name)]
    if given:
        raise ConfigurationError(
            f"{' and '.join(given)} only count for strategies that remove channels and heads; '{recipe.strategy}' "
            "removes blocks. Leave them out."
        )


def _any_choice(layout: Layout, removable: tuple[int, ...], count: int) -> PruningPlan:
    chosen = removable[len(removable) - count :]
    return PruningPlan.from_removed(layout.model_type, layout.num_blocks, chosen, stack=layout.stack)


def _any_width(layout: Layout, task: WidthTask) -> PruningPlan:
    """A plan of the widths that are asked for, to be tried before the search."""
    narrowed = tuple(Narrowing(place.block, place.group, tuple(range(place.keep))) for place in task.places)
    width = Width(task.layout, task.groups, narrowed)
    if task.layout == "padded":
        room = tuple(task.room(group, width.width_of(group)) for group in range(len(task.groups)))
        width = Width(task.layout, task.groups, narrowed, room)
    return PruningPlan.from_removed(layout.model_type, layout.num_blocks, (), width=width, stack=layout.stack)


def removes(recipe: Recipe) -> str:
    """What the recipe's strategy removes: `"block"` or `"width"`."""
    strategy = get_strategy(recipe.strategy)
    return strategy.unit_of(build_options(strategy, recipe.strategy_options or {}))


def num_to_remove(model: PreTrainedModel, recipe: Recipe) -> int:
    """Number of blocks that the recipe's budget takes from this model.

    Raises:
        ConfigurationError: The budget cannot be met, given the protections.
    """
    if removes(recipe) == "width":
        return 0
    stack = find_blocks(model, recipe.stack)
    return _budget(recipe, stack, _removable(recipe, get_strategy(recipe.strategy)(), stack))


def _budget(recipe: Recipe, stack: BlockStack, removable: tuple[int, ...]) -> int:
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in stack.blocks]
    total = sum(parameter.numel() for parameter in stack.model.parameters())
    return recipe.budget_blocks(len(stack), removable, block_params=sizes, total_params=total)


def _removable(recipe: Recipe, strategy: PruningStrategy, stack: BlockStack) -> tuple[int, ...]:
    """Blocks that are not protected; refuses architectures that cannot lose each of them, before the search."""
    first = strategy.protect_first if recipe.protect_first is None else recipe.protect_first
    last = strategy.protect_last if recipe.protect_last is None else recipe.protect_last
    layout = stack.layout
    candidates = range(first, len(stack) - last)
    staying = layout.protected(candidates)
    if not layout.proven:
        staying |= _fixed_by_position(stack, [block for block in candidates if block not in staying])
    removable = tuple(block for block in candidates if block not in staying)
    for block, reason in sorted(staying.items()):
        logger.info(f"Block {block} stays: {reason}.")
    return removable


def _fixed_by_position(stack: BlockStack, candidates: Sequence[int]) -> dict[int, str]:
    """Tries each block of a type that the table does not know: some cannot go because of what the others then are."""
    layout, found = stack.layout, {}
    for block in candidates if len(stack) > 1 else ():
        plan = PruningPlan.from_removed(layout.model_type, layout.num_blocks, [block], stack=layout.stack)
        try:
            make_template(stack, plan)
        except UnsupportedModelError as error:
            found[block] = str(error).rstrip(".")
    if found and len(found) == len(candidates):
        raise UnsupportedModelError(next(iter(found.values())) + ".")
    return found
