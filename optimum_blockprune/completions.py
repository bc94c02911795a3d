# SPDX-License-Identifier: Apache-2.0
"""Windows of a task: prompts with the completions that a model ought to give (columns as in TRL).

Prompt and completion are tokenised as one text, without special tokens. What the prompt alone begins with in the same
way is the prompt; a token that straddles the two belongs to the completion. Only tokens of the completion are scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from optimum.utils import logging
from torch import Tensor

from .batches import CalibrationWindows
from .calibration import WindowSpec, chosen_rows, clipped_seqlen, padded
from .errors import CalibrationError
from .text import iterate, open_rows


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger("optimum.blockprune.completions")

TASK = "task"
COLUMNS = ("prompt", "completion")
_NONE = -100


def completion_windows(
    dataset: Any, tokenizer: PreTrainedTokenizerBase | None, spec: WindowSpec
) -> CalibrationWindows:
    """Turns rows with `prompt` and `completion` into windows whose labels are the tokens of the completions.

    Args:
        dataset: See `calibration.build_windows`; its rows have the two columns, both of text.
        tokenizer: Of the model.
        spec: How many rows, how long and how chosen. One that is too long loses the beginning of its prompt.

    Returns:
        One window per row, padded on the right to the longest.

    Raises:
        CalibrationError: The rows are no such rows, or too few.
    """
    seqlen = clipped_seqlen(spec)
    source, rows = open_rows(dataset, spec.split)
    if tokenizer is None:
        raise CalibrationError(f"{source} holds text, which needs a tokenizer: give tokenizer=... .")
    if spec.use_chat_template or spec.recipe != "windows":
        wrong = "use_chat_template" if spec.use_chat_template else f"calibration_recipe={spec.recipe!r}"
        raise CalibrationError(f"objective='task' reads prompts and completions as they are: leave {wrong} out.")
    if not hasattr(rows, "__len__"):  # a stream may have no end
        rows = list(islice(iterate(rows, source), spec.needed))
    if not len(rows) or (spec.num_samples is not None and len(rows) < spec.num_samples):
        raise CalibrationError(
            f"{source} has {len(rows)} rows, {spec.num_samples or 1} are needed. Lower num_samples (--num-samples), "
            "or give more rows."
        )
    chosen = chosen_rows(len(rows), spec, source)
    read = [_read(rows[index], index, source, tokenizer) for index in chosen]
    longer = sum(len(tokens) > seqlen for tokens, _ in read)
    if longer:
        logger.info("%d of %d examples are longer than %d tokens and lose some of them.", longer, len(read), seqlen)
    pairs = [_cut(*each, seqlen) for each in read]
    ids, mask = padded([(tokens, torch.ones_like(tokens).bool()) for tokens, _ in pairs])
    labels = torch.full_like(ids, _NONE)
    for row, (tokens, start) in enumerate(pairs):
        # The position before a token predicts it; nothing predicts the very first one.
        first = max(1, start)
        labels[row, first - 1 : len(tokens) - 1] = tokens[first:]
    return CalibrationWindows.from_tokens(ids, mask, source=source, recipe="task", labels=labels)


def _read(row: Any, index: int, source: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, int]:
    """The tokens of one row, and where the completion begins."""
    if not isinstance(row, Mapping) or not all(isinstance(row.get(name), str) for name in COLUMNS):
        has = f"its columns are: {', '.join(map(str, row))}" if isinstance(row, Mapping) else "it has no columns"
        raise CalibrationError(
            f"objective='task' needs rows with two columns of plain text, 'prompt' and 'completion'; row {index} of "
            f"{source} is no such row ({has}). Give such rows, or another objective."
        )
    prompt, completion = (row[name] for name in COLUMNS)
    alone, whole = (
        tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for text in (prompt, prompt + completion)
    )
    start = next((at for at, pair in enumerate(zip(alone, whole, strict=False)) if pair[0] != pair[1]), len(alone))
    start = min(start, len(whole))
    if len(whole) - max(1, start) < 1:
        raise CalibrationError(
            f"Row {index} of {source} has no token of a completion that something comes before: its prompt has "
            f"{start} tokens, its completion {len(whole) - start}."
        )
    return torch.tensor(whole, dtype=torch.long), start


def _cut(tokens: Tensor, start: int, seqlen: int) -> tuple[Tensor, int]:
    """At most `seqlen` tokens: the prompt loses its beginning, but for one token; then the completion its end."""
    away = min(max(0, len(tokens) - seqlen), max(0, start - 1))
    return tokens[away:][:seqlen], start - away
