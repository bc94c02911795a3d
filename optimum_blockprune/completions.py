# SPDX-License-Identifier: Apache-2.0
"""Windows of a task: prompts with the completions that a model ought to give (columns as in TRL).

Prompt and completion are tokenised as one text, without special tokens. The tokens that the prompt alone begins with
in the same way are the prompt; a token that straddles the two belongs to the completion. Only tokens of the completion
are scored: the label of a position is the token after it where that one is of the completion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from optimum.utils import logging
from torch import Tensor

from .batches import CalibrationWindows
from .calibration import WindowSpec, build_windows, chosen_rows, clipped_seqlen, padded, too_few
from .errors import CalibrationError
from .recipe import Recipe
from .text import iterate, open_rows


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger("optimum.blockprune.completions")

Reader = Callable[[Any, "PreTrainedTokenizerBase | None", WindowSpec], CalibrationWindows]
TASK = "task"
COLUMNS = ("prompt", "completion")
_NONE = -100


def reader_of(recipe: Recipe, dataset: Any) -> Reader:
    """How a data set is read: with objective "task" its own rows by their completions, anything else as text."""
    given = dataset is recipe.dataset or (isinstance(dataset, str) and dataset == recipe.dataset)
    return completion_windows if recipe.objective == TASK and given else build_windows


def completion_windows(
    dataset: Any, tokenizer: PreTrainedTokenizerBase | None, spec: WindowSpec
) -> CalibrationWindows:
    """Turns rows with `prompt` and `completion` into windows whose labels are the tokens of the completions.

    Args:
        dataset: See `calibration.build_windows`; its rows have the two columns, both of plain text.
        tokenizer: Of the model.
        spec: How many rows, how long and how chosen. One that is too long loses the beginning of its prompt, and a
            completion that is still too long after one token its end.

    Returns:
        One window per row, padded on the right to the longest.

    Raises:
        CalibrationError: The rows are no such rows, too few, or one of them has nothing to score.
    """
    seqlen = clipped_seqlen(spec)
    source, rows = open_rows(dataset, spec.split)
    if tokenizer is None:
        raise CalibrationError(f"{source} holds text, which needs a tokenizer: give tokenizer=... .")
    chosen = [(index, *_texts(row, index, source)) for index, row in _chosen(rows, source, spec)]
    read = [_tokens(*each, source, tokenizer) for each in chosen]
    pairs = [_cut(*each, seqlen) for each in read]
    _tell(read, pairs, seqlen)
    ids, mask = padded([(tokens, torch.ones_like(tokens, dtype=torch.bool)) for tokens, _ in pairs])
    labels = torch.full_like(ids, _NONE)
    for row, (tokens, start) in enumerate(pairs):
        # Nothing predicts the very first token.
        first = max(1, start)
        labels[row, first - 1 : len(tokens) - 1] = tokens[first:]
    return CalibrationWindows.from_tokens(ids, mask, source=source, recipe=TASK, labels=labels)


def _chosen(rows: Any, source: str, spec: WindowSpec) -> list[tuple[int, Any]]:
    """Chosen rows and their numbers; of a stream its first ones, or those that come next."""
    first = next(iterate(rows, source), None)
    if first is None:
        raise CalibrationError(f"{source} is empty: there are no rows to calibrate on. Give another dataset=... .")
    _texts(first, 0, source)  # of what is no task at all, this says more than a number of rows
    if hasattr(rows, "__len__"):
        _require(len(rows), source, spec)
        return [(index, rows[index]) for index in chosen_rows(len(rows), spec, source)]
    begin = 0 if spec.beside is None else spec.num_samples
    found = list(islice(enumerate(iterate(rows, source)), begin, spec.needed))
    _require(begin + len(found), source, spec)
    return found


def _require(found: int, source: str, spec: WindowSpec) -> None:
    if spec.needed is None or found >= spec.needed:
        return
    if spec.beside is not None:
        raise too_few(source, found, spec)
    raise CalibrationError(
        f"{source} is too short: {found} rows found, {spec.num_samples} needed. Lower num_samples (--num-samples) to "
        f"{found} or fewer, or give more rows."
    )


def _texts(row: Any, index: int, source: str) -> tuple[str, str]:
    if not isinstance(row, Mapping) or not all(isinstance(row.get(name), str) for name in COLUMNS):
        has = f"its columns are: {', '.join(map(str, row))}" if isinstance(row, Mapping) else "it has no columns"
        raise CalibrationError(
            f"objective='task' needs rows with two columns of plain text, 'prompt' and 'completion'; row {index} of "
            f"{source} is no such row ({has}). Give such rows, or another objective."
        )
    return row["prompt"], row["completion"]


def _tokens(
    index: int, prompt: str, completion: str, source: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, int]:
    """The tokens of one row, and where the completion begins."""
    alone, whole = (
        tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for text in (prompt, prompt + completion)
    )
    both = min(len(alone), len(whole))
    start = next((at for at in range(both) if alone[at] != whole[at]), both)
    if len(whole) <= max(1, start):
        raise CalibrationError(
            f"Row {index} of {source} has nothing to score: its prompt has {start} tokens, its completion "
            f"{len(whole) - start}, of which one that nothing comes before does not count. Give a longer one, or "
            "leave the row out."
        )
    return torch.tensor(whole, dtype=torch.long), start


def _cut(tokens: Tensor, start: int, seqlen: int) -> tuple[Tensor, int]:
    """At most `seqlen` tokens: the prompt loses its beginning, but for one token; then the completion its end."""
    away = min(max(0, len(tokens) - seqlen), max(0, start - 1))
    return tokens[away:][:seqlen], start - away


def _tell(read: list[tuple[Tensor, int]], pairs: list[tuple[Tensor, int]], seqlen: int) -> None:
    longer = sum(len(tokens) > seqlen for tokens, _ in read)
    if longer:
        logger.info("%d of %d prompts lose their beginning: rows are cut to %d tokens.", longer, len(read), seqlen)
    torn = sum(len(old) - begin > len(new) - start for (old, begin), (new, start) in zip(read, pairs, strict=True))
    if torn:
        logger.warning(f"{torn} of {len(read)} completions are longer than seqlen={seqlen} allows and lose their end.")
