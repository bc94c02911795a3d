# SPDX-License-Identifier: Apache-2.0
"""What a recipe asks of a model: which blocks may go and how many must, or which widths; tried before any search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optimum.utils import logging
from torch import nn
from transformers import PreTrainedModel

from .architectures import Layout
from .blocks import BlockStack, find_blocks
from .budget_rules import OPEN_BUDGETS
from .completions import TASK
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
KNOW_HALVES = "sleb, search, mi_prun, shortgpt, angular, functional_network with option unit=block"


# For messages: the strategies of this package that know an objective.
KNOW_OBJECTIVES = "sleb, search"

# What has no meaning for prompts and completions.
_HOW_TEXT_IS_READ = ("dataset_text_field", "use_chat_template", "calibration_recipe")


def asked_for(
    recipe: Recipe, strategy: PruningStrategy, options: Any, stack: BlockStack
) -> tuple[WidthTask | None, tuple[int, ...], int]:
    """The task of a strategy of width; else the blocks that may go, and how many have to. Tried on the model."""
    _check_objective(recipe, strategy, stack.layout)
    if strategy.unit_of(options) == "width":
        _refuse_budget(recipe, stack)
        if recipe.compensation != "none":
            raise ConfigurationError(
                f"compensation={recipe.compensation!r} is for strategies that remove blocks; leave it out."
            )
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
    while True:
        try:
            check_plan(stack.model, any_choice(stack.layout, removable, num_remove))
        except UnsupportedModelError:
            if recipe.budget not in OPEN_BUDGETS or num_remove == 1:
                raise
            num_remove -= 1
        else:
            return None, removable, num_remove


def _refuse_budget(recipe: Recipe, stack: BlockStack) -> None:
    """Units of width are chosen for a share or a number of parameters only."""
    if recipe.budget not in ("target_size_gb", *OPEN_BUDGETS):
        return
    instead = "sparsity or target_params"
    kinds = {parameter.element_size() for parameter in stack.model.parameters()}
    if recipe.budget == "target_size_gb" and len(kinds) == 1:
        instead = f"target_params={int(recipe.target_size_gb * 10**9) // kinds.pop()}"
    raise ConfigurationError(
        f"{recipe.budget} is for strategies that remove blocks; '{recipe.strategy}' removes channels and heads: use "
        f"{instead}."
    )


def _check_objective(recipe: Recipe, strategy: PruningStrategy, layout: Layout) -> None:
    if recipe.objective is not None and recipe.objective not in strategy.objectives:
        known = " or ".join(map(repr, strategy.objectives))
        raise ConfigurationError(
            f"'{recipe.strategy}' has no objective {recipe.objective!r}: "
            + (f"it knows {known}. Choose one of these, " if known else "leave it out, ")
            + f"or choose another strategy ({KNOW_OBJECTIVES})."
        )
    if recipe.objective != TASK:
        return
    if not layout.kind.is_text_decoder:
        raise UnsupportedModelError(
            f"{layout.subject} does not continue text, so that there is no likelihood of a completion: "
            "objective='task' is for decoders of text. Leave it out."
        )
    given = [name for name in _HOW_TEXT_IS_READ if getattr(recipe, name) != getattr(Recipe, name)]
    if given:
        raise ConfigurationError(
            f"objective='task' reads the columns 'prompt' and 'completion' as they are: leave {' and '.join(given)} "
            "out."
        )


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


def any_choice(layout: Layout, removable: Sequence[int], count: int) -> PruningPlan:
    """A plan of as many blocks, the last ones that may go: whatever the choice will be, it must be possible."""
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
    """Number of blocks that the recipe's budget takes from this model, 1 where only measuring tells.

    Raises:
        ConfigurationError: The budget cannot be met, given the protections.
    """
    if removes(recipe) == "width":
        return 0
    stack = find_blocks(model, recipe.stack)
    count = _budget(recipe, stack, _removable(recipe, get_strategy(recipe.strategy)(), stack))
    return 1 if recipe.budget in OPEN_BUDGETS else count


def refuse_named_depths(recipe: Recipe) -> None:
    """Raises `ConfigurationError` where depths are named beside a budget that only measuring turns into one."""
    if recipe.budget in OPEN_BUDGETS:
        raise ConfigurationError(
            f"--export names the depths, and {recipe.budget} asks for one that only measuring tells: leave one of "
            "them out."
        )


def _budget(recipe: Recipe, stack: BlockStack, removable: tuple[int, ...]) -> int:
    def size(module: nn.Module) -> int:
        in_bytes = recipe.budget == "target_size_gb"
        return sum(each.numel() * (each.element_size() if in_bytes else 1) for each in module.parameters())

    sizes, total = [size(block) for block in stack.blocks], size(stack.model)
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
