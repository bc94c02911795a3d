# SPDX-License-Identifier: Apache-2.0
"""The windows of text that a recipe asks for: to calibrate on, to hold budgets to, to evaluate on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from optimum.utils import logging
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .batches import CalibrationWindows, refuse_shared
from .blocks import BlockStack, find_blocks
from .budget_rules import QUALITY_BUDGETS
from .calibration import WindowSpec, build_windows
from .completions import Reader, reader_of
from .errors import CalibrationError
from .inputs import positions_of, vocabulary_of
from .recipe import Recipe
from .report import PruningReport
from .runner import BlockRunner
from .strategies.base import PruningStrategy
from .tasks import fitted, row_inputs
from .teacher import with_teacher
from .team import Team
from .text import HUB_DATASETS


logger = logging.get_logger("optimum.blockprune.choosing")


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


def calibration_of(
    stack: BlockStack,
    recipe: Recipe,
    strategy: PruningStrategy,
    tokenizer: PreTrainedTokenizerBase | None,
    report: PruningReport,
) -> CalibrationWindows | None:
    """The windows as the strategy measures on them; `None` for one that measures nothing."""
    compensates = recipe.compensation != "none"
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


def taught(
    runner: BlockRunner,
    recipe: Recipe,
    objective: str | None,
    windows: CalibrationWindows | None,
    report: PruningReport,
) -> CalibrationWindows | None:
    """The windows with what the dense model predicts on them, where the search is to stay close to that."""
    if windows is None or objective != "kl":
        return windows
    with report.timed("dense predictions"), Team.current().together():
        return with_teacher(runner, windows, recipe.batch_size)


def held_out_part(
    stack: BlockStack,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    windows: CalibrationWindows | None,
    dataset: Any,
    count: int | None,
) -> CalibrationWindows:
    """Text that a choice is held to: `count` windows (by default as many as are calibrated on) that are not.

    They are of `dataset` or, without one, of the part of the recipe's own that is not calibrated on.
    """
    count = count or recipe.num_samples
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
