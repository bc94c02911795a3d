# SPDX-License-Identifier: Apache-2.0
"""From a recipe to a plan: budget, protections, windows, strategy; what can be checked early is."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from optimum.utils import logging
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .architectures import Layout
from .asked import asked_for
from .batches import CalibrationWindows, refuse_shared
from .blocks import BlockStack, find_blocks
from .budget_rules import QUALITY_BUDGETS
from .budgets import plan_within
from .calibration import WindowSpec, build_windows
from .compensating import NONE, check_compensation, compensated
from .completions import Reader, reader_of
from .environment import versions
from .errors import CalibrationError, PlanError
from .fingerprints import run_fingerprint
from .half import halves_of
from .inputs import positions_of, vocabulary_of
from .ledger import Ledger
from .per_layer import refuse_own_widths
from .plan import PruningPlan
from .recipe import Recipe
from .registry import build_options, get_strategy
from .report import PruningReport
from .runner import BlockRunner
from .strategies.base import BLOCK, HALF_BLOCK, Place, PruningStrategy, SearchContext, WidthTask
from .surgery import check_plan
from .tasks import fitted, row_inputs
from .teacher import with_teacher
from .team import Team
from .text import HUB_DATASETS
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
    refuse_own_widths(model.config)
    strategy = get_strategy(recipe.strategy)()
    options = build_options(type(strategy), recipe.strategy_options or {})
    stack = find_blocks(model, recipe.stack)
    task, removable, num_remove = asked_for(recipe, strategy, options, stack)
    runner = BlockRunner(model, recipe.stack)
    _require_halves(runner, recipe, strategy)
    windows = _taught(runner, recipe, _calibrate(stack, recipe, tokenizer, report), report)
    held_out = _held_out_part(stack, recipe, tokenizer, windows)
    check_compensation(runner, windows, recipe)
    team = _team(stack, recipe, windows, held_out)
    context = SearchContext(
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
        objective=recipe.objective or next(iter(strategy.objectives), None),
        compensation=recipe.compensation,
        team=team,
        ledger=_ledger(stack, recipe, windows, held_out, keep),
    )
    with report.timed("search"):
        plan = plan_within(recipe, strategy, context, held_out, partial(_check_choice, strategy=recipe.strategy))
    plan = _compensated(context, plan, recipe, report)
    check_plan(model, plan)
    _record_cost(report, plan, context)
    return plan


def _team(
    stack: BlockStack, recipe: Recipe, windows: CalibrationWindows | None, held_out: CalibrationWindows | None
) -> Team:
    """The processes that measure together, which must have been asked for the same."""
    if (team := Team.current()).size > 1:
        for name, described in run_fingerprint(stack, recipe, windows, held_out).items():
            team.check_same(name, json.dumps(described))
    return team


def _compensated(context: SearchContext, plan: PruningPlan, recipe: Recipe, report: PruningReport) -> PruningPlan:
    if recipe.compensation == NONE:
        return plan
    with report.timed("compensation"):
        return compensated(context, plan, recipe.compensation)


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


def window_spec(recipe: Recipe, /, **changes: Any) -> WindowSpec:
    """The recipe's way to cut text, with some of it replaced."""
    spec = {
        "num_samples": recipe.num_samples,
        "seqlen": recipe.seqlen,
        "seed": recipe.seed,
        "text_field": recipe.dataset_text_field,
        "use_chat_template": recipe.use_chat_template,
        "recipe": recipe.calibration_recipe,
    }
    return WindowSpec(**{**spec, **changes})


def held_out_split(dataset: Any, order: Sequence[str] = ("test", "validation", "train")) -> str:
    """The split to evaluate on: the test split, or the nearest to it that a data set with several splits has."""
    if isinstance(dataset, str) and dataset in HUB_DATASETS:
        splits: Collection[str] = HUB_DATASETS[dataset].splits
    else:
        splits = dataset if isinstance(dataset, Mapping) else ()
    return next((split for split in order if split in splits), order[0])


def held_out(
    model: PreTrainedModel,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Any,
    num_samples: int | None,
    stride: int | None,
) -> CalibrationWindows:
    """Windows to evaluate on: running text of the split that nothing was chosen on; see `BlockPruner.evaluate`."""
    if num_samples is None and dataset == "c4":
        num_samples = recipe.num_samples
    # Windows that overlap need running text, not a choice of windows from all over it.
    chosen = num_samples if stride is None else None
    wanted = window_spec(recipe, num_samples=chosen, recipe="windows", split=held_out_split(dataset))
    stack = find_blocks(model, recipe.stack)
    text = windows_for(stack, dataset, tokenizer, wanted, reader_of(recipe, dataset))
    if chosen != num_samples:
        text = text.first(num_samples)
    return fitted(text, model, stack.layout, tokenizer, masked=True, seed=recipe.seed)


def windows_for(
    stack: BlockStack,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    spec: WindowSpec,
    read: Reader = build_windows,
) -> CalibrationWindows:
    """Cuts windows that the model can read: no longer than its positions, no token outside its vocabulary."""
    inputs = row_inputs(stack.model, stack.layout)
    spec = WindowSpec(**{**vars(spec), "inputs": inputs, "max_length": positions_of(stack.layout)})
    windows = read(dataset, tokenizer, spec)
    vocabulary = vocabulary_of(stack.layout)
    largest = int(windows.input_ids.max())
    if largest >= vocabulary:
        raise CalibrationError(
            f"Token {largest} is outside the model's vocabulary of {vocabulary}: the tokenizer or the token ids "
            "belong to another model."
        )
    return windows


def _calibrate(
    stack: BlockStack, recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, report: PruningReport
) -> CalibrationWindows | None:
    """The windows as the strategy measures on them; `None` for one that measures nothing."""
    strategy = get_strategy(recipe.strategy)
    compensates = recipe.compensation != NONE
    if not strategy.needs_data and not compensates:
        if recipe.dataset is not None and (
            recipe.budget not in QUALITY_BUDGETS or recipe.held_out_dataset is not None
        ):
            logger.warning(
                f"Strategy '{recipe.strategy}' measures nothing; dataset={recipe.dataset!r:.80} has no effect."
            )
        return None
    if recipe.dataset is None:
        what = "Compensation" if compensates and not strategy.needs_data else f"Strategy '{recipe.strategy}'"
        raise CalibrationError(
            f"{what} measures the model on text: give dataset=... (--dataset PATH): wikitext2, "
            "c4, alpaca, a .txt, .jsonl or .parquet file, or your own texts."
        )
    with report.timed("calibration"):
        windows = windows_for(stack, recipe.dataset, tokenizer, window_spec(recipe), reader_of(recipe, recipe.dataset))
        measured = strategy.needs_loss or compensates
        return fitted(windows, stack.model, stack.layout, tokenizer, masked=measured, seed=recipe.seed)


def _taught(
    runner: BlockRunner, recipe: Recipe, windows: CalibrationWindows | None, report: PruningReport
) -> CalibrationWindows | None:
    """The windows with what the dense model predicts on them, where the search is to stay close to that."""
    objective = recipe.objective or next(iter(get_strategy(recipe.strategy).objectives), None)
    if windows is None or objective != "kl":
        return windows
    with report.timed("dense predictions"), Team.current().together():
        return with_teacher(runner, windows, recipe.batch_size)


def _held_out_part(
    stack: BlockStack,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    windows: CalibrationWindows | None,
) -> CalibrationWindows | None:
    """Text that a budget of quality is held to: windows that are not calibrated on; `None` for other budgets."""
    if recipe.budget not in QUALITY_BUDGETS:
        return None
    count, dataset = recipe.held_out_samples or recipe.num_samples, recipe.held_out_dataset
    if dataset is not None:
        split = held_out_split(dataset, ("validation", "test", "train"))
        found = windows_for(
            stack, dataset, tokenizer, window_spec(recipe, num_samples=count, recipe="windows", split=split)
        )
        refuse_shared(windows, found)
    elif recipe.dataset is not None:
        read = reader_of(recipe, recipe.dataset)
        found = windows_for(stack, recipe.dataset, tokenizer, window_spec(recipe, beside=count), read)
    else:
        raise CalibrationError(
            f"{recipe.budget} is held to text: give dataset=... (--dataset PATH), of which a part is held out, or "
            "held_out_dataset=... (--held-out-dataset PATH)."
        )
    return fitted(found, stack.model, stack.layout, tokenizer, masked=True, seed=recipe.seed)


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
