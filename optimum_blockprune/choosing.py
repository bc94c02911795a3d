# SPDX-License-Identifier: Apache-2.0
"""From a recipe to a plan: budget, protections, windows, strategy; what can be checked early is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

from optimum.utils import logging
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .architectures import Layout
from .asked import asked_for
from .batches import CalibrationWindows
from .blocks import BlockStack, find_blocks
from .budget_rules import QUALITY_BUDGETS
from .budgets import of_depth, part_of, plan_within
from .compensating import NONE, check_compensation, compensated
from .environment import versions
from .errors import PlanError
from .fingerprints import run_fingerprint
from .half import halves_of
from .ledger import Ledger
from .per_layer import refuse_own_widths
from .plan import PruningPlan
from .reading import calibration_of, held_out_part, taught
from .recipe import Recipe
from .registry import build_options, get_strategy
from .report import PruningReport
from .runner import BlockRunner
from .strategies.base import BLOCK, HALF_BLOCK, Place, PruningStrategy, SearchContext, WidthTask
from .surgery import check_plan
from .team import Team
from .widths import Width


logger = logging.get_logger("optimum.blockprune.choosing")

# From the fingerprint of a search to its ledger; `None` where nothing is kept.
Keep = Callable[[Mapping[str, Any]], Ledger | None]


def choose(
    model: PreTrainedModel,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    report: PruningReport,
    *,
    base_model: str | None = None,
    unit_scores: dict[Place, list[float]] | None = None,
    keep: Keep | None = None,
) -> PruningPlan:
    """Lets the strategy of `recipe` choose what `model` loses, which is not changed.

    Args:
        model: The dense model.
        recipe: What is wanted.
        tokenizer: For calibration text.
        report: Gets seconds, tokens and what the search spent.
        base_model: Name of the dense model for the plan; by default what its configuration says.
        unit_scores: Gets the score of every unit, from strategies that remove units of width.
        keep: Opens the ledger of a search that measures; what an earlier run left there is not measured again.

    Raises:
        BlockPruningError: The recipe, the model or the text does not fit; as much as possible before the search.
        PlanError: A strategy did not keep to its budget or to the protections.
    """
    search = Search(model, recipe, tokenizer, report, base_model=base_model, unit_scores=unit_scores, keep=keep)
    return search.plan()


class Search:
    """One search, which may give plans of several depths; everything that can be checked before it is when it is made.

    Attributes:
        windows: What is calibrated on; `None` where nothing is measured.

    Args and errors: see `choose`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase | None,
        report: PruningReport,
        *,
        base_model: str | None = None,
        unit_scores: dict[Place, list[float]] | None = None,
        keep: Keep | None = None,
    ) -> None:
        refuse_own_widths(model.config)
        self._recipe, self._report = recipe, report
        self._strategy = strategy = get_strategy(recipe.strategy)()
        options = build_options(type(strategy), recipe.strategy_options or {})
        stack = find_blocks(model, recipe.stack)
        task, removable, num_remove = asked_for(recipe, strategy, options, stack)
        runner = BlockRunner(model, recipe.stack)
        _require_halves(runner, recipe, strategy)
        windows = calibration_of(stack, recipe, strategy, tokenizer, report)
        objective = recipe.objective or next(iter(strategy.objectives), None)
        self.windows = windows = taught(runner, recipe, objective, windows, report)
        self._held_out = None
        if recipe.budget in QUALITY_BUDGETS:
            wanted = recipe.held_out_dataset, recipe.held_out_samples
            self._held_out = held_out_part(stack, recipe, tokenizer, windows, *wanted)
        check_compensation(runner, windows, recipe)
        self._context = SearchContext(
            runner=runner,
            windows=windows,
            options=options,
            num_remove=num_remove,
            removable=removable,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            progress=lambda total, description: tqdm(total=total, desc=description, leave=False),
            provenance=_provenance(stack.layout, recipe, windows, base_model),
            width=task,
            unit_scores={} if unit_scores is None else unit_scores,
            unit=recipe.unit or BLOCK,
            objective=objective,
            compensation=recipe.compensation,
            generated_samples=recipe.generated_samples,
            team=_team(stack, recipe, windows, self._held_out),
            ledger=_ledger(stack, recipe, windows, self._held_out, keep),
        )
        self._check = partial(_check_choice, strategy=recipe.strategy)

    def plan(self, num_blocks: int | None = None) -> PruningPlan:
        """The plan that was asked for, or the one of fewer blocks; the search itself runs once, if it can."""
        context, plan = self._context, self._widest
        if num_blocks is not None and num_blocks != plan.num_removed:
            context = part_of(context, num_blocks)
            plan = of_depth(self._strategy, context, plan, self._check)
        if self._recipe.compensation != NONE and self._held_out is None:
            with self._report.timed("compensation"):
                plan = compensated(context, plan, self._recipe.compensation)
        check_plan(context.runner.model, plan)
        _record_cost(self._report, plan, self._context)
        return plan

    @cached_property
    def _widest(self) -> PruningPlan:
        with self._report.timed("search"):
            return plan_within(self._recipe, self._strategy, self._context, self._held_out, self._check)


def _team(
    stack: BlockStack, recipe: Recipe, windows: CalibrationWindows | None, held_out: CalibrationWindows | None
) -> Team:
    """The processes that measure together, which must have been asked for the same."""
    if (team := Team.current()).size > 1:
        for name, described in run_fingerprint(stack, recipe, windows, held_out).items():
            team.check_same(name, json.dumps(described))
    return team


def _require_halves(runner: BlockRunner, recipe: Recipe, strategy: PruningStrategy) -> None:
    """Refuses a model without halves before any text is read, if they are wanted."""
    if recipe.unit == HALF_BLOCK:
        runner.halves.names()
        if strategy.needs_data and not strategy.needs_loss:
            runner.halves.shown()  # hidden states are measured, also those between halves


def _ledger(
    stack: BlockStack,
    recipe: Recipe,
    windows: CalibrationWindows | None,
    held_out: CalibrationWindows | None,
    keep: Keep | None,
) -> Ledger | None:
    """What was measured before; of several processes, the first one reads and writes it."""
    if keep is None or (windows is None and held_out is None):
        return None
    return Team.current().by_first(lambda: keep(run_fingerprint(stack, recipe, windows, held_out)))


def _record_cost(report: PruningReport, plan: PruningPlan, context: SearchContext) -> None:
    report.block_forwards = context.runner.counters.block_forwards
    report.head_forwards = context.runner.counters.head_forwards
    report.naive_block_forwards = plan.details.get("naive_block_forwards")
    report.tokens = context.windows.num_tokens if context.windows is not None else None
    if context.ledger is not None and context.ledger.reused:
        report.reused_measurements, report.naive_block_forwards = context.ledger.reused, None  # not comparable
        logger.info(
            f"{context.ledger.reused} measurements were read from '{context.ledger.folder}' and not made again; "
            "seconds, block_forwards and head_forwards count the others only."
        )


def _provenance(
    layout: Layout, recipe: Recipe, windows: CalibrationWindows | None, base_model: str | None
) -> dict[str, Any]:
    return {
        "model_type": layout.model_type,
        "stack": layout.stack,
        "base_model": base_model or layout.base_model,
        "strategy": recipe.strategy,
        "requested": recipe.requested,
        "calibration": windows.describe() if windows is not None else None,
        "versions": versions(),
    }


def score_units(
    model: PreTrainedModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None
) -> dict[int, dict[str, list[float]]]:
    """Score of every unit of width by block and writer; see `choose` for the errors."""
    scores: dict[Place, list[float]] = {}
    plan = choose(model, recipe, tokenizer, PruningReport(), unit_scores=scores)
    found: dict[int, dict[str, list[float]]] = {}
    for place, each in scores.items():
        found.setdefault(place.block, {})[plan.width.groups[place.group].writer] = each
    return found


def _check_choice(plan: PruningPlan, context: SearchContext, strategy: str) -> None:
    """A third party's strategy may err."""
    if not isinstance(plan, PruningPlan):
        raise PlanError(f"Strategy '{strategy}' returned {type(plan).__name__}, not a PruningPlan.")
    if context.width is not None:
        _check_widths(plan.width, context.width, strategy)
        return
    chosen = {half.block for half in halves_of(plan.removed_units)}
    if plan.width or plan.num_removed != context.num_remove or not chosen <= set(context.removable):
        raise PlanError(
            f"Strategy '{strategy}' chose {sorted(chosen)}; it was asked for {context.num_remove} of "
            f"{list(context.removable)}."
        )


def _check_widths(width: Width, task: WidthTask, strategy: str) -> None:
    kept = {(each.block, each.group): len(each.kept) for each in width.narrowed}
    fixed = task.layout == "uniform"
    wrong = [
        place
        for place in task.places
        if kept.get((place.block, place.group)) != place.keep and (fixed or not place.free)
    ]
    if wrong or width.layout != task.layout or width.groups != task.groups:
        raise PlanError(f"Strategy '{strategy}' did not keep to the widths that it was asked for.")
    for family in {group.family for group in task.groups}:
        places = [place for place in task.free if task.group_of(place).family == family]
        asked, got = sum(place.keep for place in places), sum(kept[place.block, place.group] for place in places)
        if got > asked:
            raise PlanError(f"Strategy '{strategy}' keeps {got} units of the {family}; it was asked for {asked}.")
