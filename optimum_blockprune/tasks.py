# SPDX-License-Identifier: Apache-2.0
"""Makes plain text into what a kind of model is measured on; our choices, where models were trained otherwise.

* A decoder predicts each next token of a window.
* An encoder with a masked-LM head predicts tokens that are masked: 15 % of each window, all of them replaced by the
  mask token, chosen by the seed (BERT masks as many, and leaves a fifth of them readable).
* Of an encoder-decoder, the encoder reads the first half of a window, and the decoder predicts the second half.
"""

from __future__ import annotations

import re
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .architectures import Layout
from .batches import CalibrationWindows
from .errors import CalibrationError
from .inputs import decoder_start
from .model_rows import RowInputs


_MASKED = 0.15
_FURTHER = re.compile(r"pixel|image|video|audio|features|input_values|mm_token|grid|spatial")
_READ_BY_ENCODER = re.compile(r"^(input_ids|attention_mask|input_features|input_values|pixel_values|bbox)$")


def row_inputs(model: PreTrainedModel, layout: Layout) -> RowInputs:
    """Says which inputs of the model rows may bring besides tokens."""
    two_stacks = len(layout.kind.stacks) > 1
    wanted = _READ_BY_ENCODER if two_stacks else _FURTHER
    names = frozenset(name for name in signature(model.forward).parameters if wanted.search(name))
    return RowInputs(names, two_stacks, decoder_start(model) if two_stacks else 0)


def fitted(
    windows: CalibrationWindows, model: PreTrainedModel, layout: Layout, tokenizer: Any, *, masked: bool, seed: int
) -> CalibrationWindows:
    """Returns the windows as the model is measured on them; those that hold the model's own inputs stay as they are.

    Args:
        windows: Cut from text.
        model: The model.
        layout: Of the stack that is looked at.
        tokenizer: Knows the mask token.
        masked: Whether an encoder's loss is wanted; its hidden states alone need no masks.
        seed: Of the choice of masked tokens.

    Raises:
        CalibrationError: The model reads no text, or masks are wanted and it has no mask token or no head for them.
    """
    if windows.extra or windows.labels is not None:
        return windows
    if len(layout.kind.stacks) > 1:
        return _split(windows, model, layout)
    if layout.kind.is_text_decoder or not masked:
        return windows
    return _mask(windows, model, layout, tokenizer, seed)


def _split(windows: CalibrationWindows, model: PreTrainedModel, layout: Layout) -> CalibrationWindows:
    if model.main_input_name != "input_ids":
        raise CalibrationError(
            f"{layout.subject} reads '{model.main_input_name}', not text: give dataset=[{{'{model.main_input_name}': "
            "..., 'labels': ...}, ...], one dict per example as your processor returns it."
        )
    half = windows.seqlen // 2
    if half < 2:
        raise CalibrationError("An encoder-decoder reads half of each window: give seqlen of at least 4.")
    read, said = windows.input_ids[:, :half], windows.input_ids[:, half:]
    extra: dict[str, tuple[Tensor, ...]] = {"input_ids": tuple(read.split(1))}
    mask = windows.attention_mask
    if mask is not None:
        extra["attention_mask"] = tuple(mask[:, :half].long().split(1))
    start = torch.full((windows.num_windows, 1), decoder_start(model))
    said = torch.cat([start, said], dim=1)
    mask = None if mask is None else torch.cat([torch.ones_like(start).bool(), mask[:, half:]], dim=1)
    return CalibrationWindows.from_tokens(said, mask, source=windows.source, recipe=windows.recipe, extra=extra)


def _mask(
    windows: CalibrationWindows, model: PreTrainedModel, layout: Layout, tokenizer: Any, seed: int
) -> CalibrationWindows:
    token = getattr(tokenizer, "mask_token_id", None)
    if token is None or model.get_output_embeddings() is None:
        missing = "mask token: give its tokenizer" if token is None else "masked-LM head"
        raise CalibrationError(
            f"{layout.subject} has no {missing}, so there is no loss to measure. Use a strategy that looks at hidden "
            "states only (mi_prun, shortgpt, angular)."
        )
    generator = torch.Generator().manual_seed(seed)
    ids, mask = windows.input_ids, windows.attention_mask
    order = torch.rand(ids.shape, generator=generator)
    order = order if mask is None else order.masked_fill(~mask, 2.0)
    count = max(1, round(_MASKED * windows.seqlen))
    chosen = torch.zeros(ids.shape, dtype=torch.bool).scatter_(1, order.argsort(1)[:, :count], True)
    chosen = chosen if mask is None else chosen & mask
    return CalibrationWindows.from_tokens(
        ids.masked_fill(chosen, token),
        mask,
        source=windows.source,
        recipe=windows.recipe,
        labels=torch.where(chosen, ids, -100),
    )
