# SPDX-License-Identifier: Apache-2.0
"""Lets a model continue held-out text, and counts how much it repeats itself (see `repetition`).

Greedy, so that a dense and a pruned model differ by their weights only. The text itself is not kept, and nothing here
says whether it is true or makes sense.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from .architectures import Layout, layout_for
from .batches import CalibrationWindows
from .errors import ConfigurationError
from .inputs import evaluating, positions_of
from .repetition import distinct, repetition_rate


def check_generation(
    model: PreTrainedModel,
    windows: CalibrationWindows,
    *,
    continuations: int = 20,
    prompt_tokens: int = 32,
    new_tokens: int = 64,
) -> dict[str, Any] | None:
    """Measures how much a model repeats itself when it continues the beginnings of `windows`.

    Windows that are shorter than two prompts give half their tokens; a model with few positions gets shorter prompts
    and writes less. The model's own settings for generation (sampling, penalties, minimum length) are set aside; only
    its end-of-text tokens count: they end a continuation and are no part of it.

    Args:
        model: The model; not changed.
        windows: Held-out text. The same windows give a dense and a pruned model the same prompts.
        continuations: Windows to continue, from the first one on; all there are if fewer.
        prompt_tokens: Tokens of each that the model reads.
        new_tokens: Tokens that it writes at most.

    Returns:
        `continuations`, `prompt_tokens` and `new_tokens` as used, `tokens` (written in all, a sign of continuations
        that end at once), `repetition` (mean over continuations of the share of repeated 4-grams), `distinct_1`,
        `distinct_2` and `distinct_3`. `None` where there is nothing to continue: an encoder, an encoder-decoder, a
        model or windows with more than text.

    Raises:
        ConfigurationError: A count is not a whole number of at least 1.
    """
    counts = {"continuations": continuations, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"{name} must be a whole number of at least 1, not {value!r}.")
    layout = layout_for(model)
    if not continues_text(model, layout) or windows.extra or windows.labels is not None:
        return None
    limit = positions_of(layout)
    lengths = (prompt_tokens, windows.seqlen // 2, *(() if limit is None else (limit // 2,)))
    prompts = _prompts(windows, continuations, max(1, min(lengths)))
    if prompts is None:
        return None
    prompt_tokens = prompts.shape[1]
    new_tokens = new_tokens if limit is None else min(new_tokens, limit - prompt_tokens)
    written = _continue(model, prompts, new_tokens)
    return {
        "continuations": len(written),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "tokens": sum(map(len, written)),
        "repetition": sum(map(repetition_rate, written)) / len(written),
        **{f"distinct_{n}": distinct(written, n) for n in (1, 2, 3)},
    }


def continues_text(model: PreTrainedModel, layout: Layout) -> bool:
    """Whether a model reads text and nothing else, and writes what comes next."""
    kind = layout.kind
    return kind.is_text_decoder and kind.task == "text-generation" and model.can_generate()


def _prompts(windows: CalibrationWindows, count: int, length: int) -> Tensor | None:
    """The first `length` real tokens of the first `count` windows that have as many; `None` if none has."""
    if windows.attention_mask is None:
        return windows.input_ids[:count, :length]
    rows = (row[mask][:length] for row, mask in zip(windows.input_ids, windows.attention_mask, strict=True))
    whole = [row for row in rows if len(row) == length][:count]
    return torch.stack(whole) if whole else None


def _continue(model: PreTrainedModel, prompts: Tensor, new_tokens: int) -> list[list[int]]:
    """Greedy continuations, each up to its first end-of-text token."""
    ends = ends_of(model)
    return [_until(row, ends) for row in continuation(model, prompts, new_tokens, ends=ends).tolist()]


def continuation(
    model: PreTrainedModel,
    prompts: Tensor,
    new_tokens: int,
    *,
    ends: Collection[int] = (),
    processors: Sequence[LogitsProcessor] = (),
) -> Tensor:
    """What a model says after prompts, always its largest logit: [B, at most `new_tokens`].

    Args:
        model: The model; not changed, and its own settings for generation are set aside.
        prompts: Tokens [B, P].
        new_tokens: Tokens that it writes.
        ends: Tokens after which a row is filled up with one of them; without any all rows are as long.
        processors: Change the logits before.
    """
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )
    ids = prompts.to(model.device)
    with torch.no_grad(), evaluating(model), _own_settings(model, settings):
        # Not the model's own attribute: some models wrap `generate`.
        output = GenerationMixin.generate(
            model,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            logits_processor=LogitsProcessorList(processors),
        )
    return output[:, ids.shape[1] :]


@contextmanager
def _own_settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """`generate` fills what its settings leave open from the model's own ones, so those are exchanged."""
    own = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = own


def ends_of(model: PreTrainedModel) -> set[int]:
    """The tokens that end a text."""
    for config in (model.generation_config, model.config, model.config.get_text_config(decoder=True)):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return {ends} if isinstance(ends, int) else set(ends)
    return set()


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]
