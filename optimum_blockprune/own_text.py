# SPDX-License-Identifier: Apache-2.0
"""Text that a model writes itself: more examples of what it predicts, where there is little text to learn from.

Windows of given text are continued from a few tokens on, each next token drawn from what the model predicts, at
temperature 1 and without tokens that end a text. Learning from what the dense model writes: LLM-QAT (arXiv
2305.17888). Ours: beginnings that are cut out of the given text, and that such windows join it, for fits and healing,
but never judge.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from optimum.utils import logging
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LogitsProcessor, PreTrainedModel

from .architectures import layout_for
from .batches import CalibrationWindows
from .generation import continuation, continues_text, ends_of
from .memory import BatchSize


logger = logging.get_logger("optimum.blockprune.own_text")

# Tokens of given text that a window begins with, at most; a quarter of a short one. Our choice.
_PROMPT = 32
# Windows that are written side by side, unless even more are read so: a step computes one token of each. Our choice.
SIDE_BY_SIDE = 32


@dataclass(frozen=True)
class Prompts:
    """Beginnings of windows that are to be written.

    Attributes:
        windows: The beginnings, a window each.
        length: Tokens of a whole window.
        seeds: What each of them is drawn with: a window does not depend on those that it shares a batch with.
    """

    windows: CalibrationWindows
    length: int
    seeds: tuple[int, ...]

    def written(self, model: PreTrainedModel, first: int, beginnings: Tensor) -> Tensor:
        """Whole windows [B, S], on the CPU.

        Args:
            model: The dense model; not changed.
            first: Number of the first of these windows among all.
            beginnings: Their prompts [B, P].
        """
        drawn = _Drawn(self.seeds[first : first + len(beginnings)], ends_of(model))
        new = continuation(model, beginnings, self.length - beginnings.shape[1], processors=[drawn])
        return torch.cat([beginnings, new.to(beginnings.device)], dim=1)


def prompts_of(model: PreTrainedModel, windows: CalibrationWindows, count: int | None, seed: int) -> Prompts | None:
    """What is to be written; `None` if nothing.

    Args:
        model: The dense model. One that does not continue text (an encoder, one that reads more than text) writes
            nothing, with a warning.
        windows: Given text. All of it is continued in turn, from places that are spread over each window.
        count: Windows to write.
        seed: Of the draws.
    """
    if not count:
        return None
    length = max(1, min(_PROMPT, windows.seqlen // 4))
    rows = [row for row in _real(windows) if len(row) >= length]
    if not continues_text(model, layout_for(model)) or windows.extra or windows.labels is not None or not rows:
        logger.warning(f"generated_samples={count} has no effect: there is no running text that this model continues.")
        return None
    rounds = -(-count // len(rows))
    begun = []
    for number in range(count):
        turn, row = number // len(rows), rows[number % len(rows)]
        place = turn * (len(row) - length) // max(1, rounds - 1)
        begun.append(row[place : place + length])
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (count,), generator=generator).tolist()
    beginnings = CalibrationWindows.from_tokens(torch.stack(begun), source="beginnings")
    return Prompts(beginnings, windows.seqlen, tuple(seeds))


def with_own_text(windows: CalibrationWindows, written: Tensor) -> CalibrationWindows:
    """The given windows, and after them those that were written [n, S]."""
    mask = windows.attention_mask
    if mask is not None:
        mask = torch.cat([mask, torch.ones(written.shape, dtype=torch.bool)])
    ids = torch.cat([windows.input_ids, written])
    return CalibrationWindows.from_tokens(ids, mask, source=windows.source, recipe=windows.recipe)


def written_alone(model: PreTrainedModel, prompts: Prompts, batch_size: int) -> Tensor:
    """All windows [n, S], written by one process; half as many side by side where memory runs out."""

    def write(size: int) -> Tensor:
        rows: list[Tensor] = []
        # Not the bar's own number: a bar that is switched off does not count.
        first = 0
        with tqdm(total=len(prompts.seeds), desc="Writing text", leave=False) as bar:
            for batch in prompts.windows.batches(size):
                rows.append(prompts.written(model, first, batch.input_ids))
                first += len(batch.input_ids)
                bar.update(len(batch.input_ids))
        return torch.cat(rows)

    return BatchSize(max(batch_size, SIDE_BY_SIDE)).run(write)


def _real(windows: CalibrationWindows) -> list[Tensor]:
    """The tokens of every window that are no padding."""
    if windows.attention_mask is None:
        return list(windows.input_ids)
    return [row[mask] for row, mask in zip(windows.input_ids, windows.attention_mask, strict=True)]


class _Drawn(LogitsProcessor):
    """Makes the largest logit a draw: of logits minus the logarithms of exponential noise (Gumbel-max)."""

    def __init__(self, seeds: Sequence[int], ends: Collection[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._ends = sorted(ends)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Of logits [B, vocabulary]."""
        size = scores.shape[-1]
        noise = torch.stack([torch.empty(size).exponential_(generator=each) for each in self._generators])
        scores = scores.float() - noise.to(scores.device).log()
        scores[:, [end for end in self._ends if end < size]] = -torch.inf
        return scores
