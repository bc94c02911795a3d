# SPDX-License-Identifier: Apache-2.0
"""Rows that hold a model's own inputs: pixels beside the tokens, sound and its transcript, a text and its answer.

They are what a processor returns for one example, with a leading dimension of one: `{"input_ids": [1, n],
"pixel_values": ..., ...}` for a model with a text decoder, `{"input_features": ..., "labels": [1, n]}` or
`{"input_ids": ..., "labels": ...}` for an encoder-decoder. They are taken whole: cutting tokens would part them from
what they stand for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .batches import CalibrationWindows
from .errors import CalibrationError


@dataclass(frozen=True)
class RowInputs:
    """What a model reads besides tokens.

    Attributes:
        names: Names of the inputs, as its forward has them.
        two_stacks: Whether rows hold what an encoder reads, and the decoder's tokens as `labels` or
            `decoder_input_ids`.
        start: The token that a decoder's output begins with.
    """

    names: frozenset[str]
    two_stacks: bool = False
    start: int = 0


def is_model_row(row: Mapping[str, Any], inputs: RowInputs) -> bool:
    """Whether a row is meant for the model as it is."""
    if inputs.two_stacks:
        return bool({"labels", "decoder_input_ids"} & set(row))
    return "input_ids" in row and bool(inputs.names & set(row))


def windows_from_rows(
    rows: Sequence[Mapping[str, Any]], inputs: RowInputs, *, source: str, seqlen: int
) -> CalibrationWindows:
    """Makes a window of every row.

    Args:
        rows: The chosen rows.
        inputs: What the model reads.
        source: For messages and reports.
        seqlen: The most tokens that a row may have.

    Raises:
        CalibrationError: A row lacks an input, or is too long.
    """
    tokens = [_tokens(row, inputs, index, seqlen) for index, row in enumerate(rows)]
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    lengths = torch.tensor([len(row) for row in tokens])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    present = sorted(name for name in inputs.names if name in rows[0])
    extra = {name: tuple(_tensor(row, name, index) for index, row in enumerate(rows)) for name in present}
    width = ids.shape[1]
    extra = {
        name: tuple(_widened(tensor, len(row), width) for tensor, row in zip(tensors, tokens, strict=True))
        for name, tensors in extra.items()
    }
    if inputs.two_stacks:
        extra = _padded_alike(extra)
    return CalibrationWindows.from_tokens(ids, mask, source=source, extra=extra)


def _tokens(row: Mapping[str, Any], inputs: RowInputs, index: int, seqlen: int) -> Tensor:
    if not inputs.two_stacks:
        tokens = _tensor(row, "input_ids", index).flatten().long()
    elif row.get("decoder_input_ids") is not None:
        tokens = _tensor(row, "decoder_input_ids", index).flatten().long()
    else:
        labels = _tensor(row, "labels", index).flatten().long()
        tokens = torch.cat([torch.tensor([inputs.start]), labels[labels != -100]])
    if not 2 <= len(tokens) <= seqlen:
        raise CalibrationError(
            f"Row {index} has {len(tokens)} tokens; 2 to {seqlen} (seqlen) are possible. Rows with further inputs are "
            "not cut: raise seqlen, or give shorter rows."
        )
    return tokens


def _tensor(row: Mapping[str, Any], name: str, index: int) -> Tensor:
    if row.get(name) is None:
        raise CalibrationError(f"Row {index} has no '{name}', but rows before it have.")
    try:
        return torch.as_tensor(row[name]).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(f"Row {index}: '{name}' is not a tensor ({error}).") from error


def _widened(tensor: Tensor, tokens: int, width: int) -> Tensor:
    """Fills up inputs with one entry per token to the length of the longest row."""
    if tensor.ndim == 2 and tensor.shape == (1, tokens) and tokens < width:
        return torch.nn.functional.pad(tensor, (0, width - tokens))
    return tensor


def _padded_alike(extra: Mapping[str, tuple[Tensor, ...]]) -> dict[str, tuple[Tensor, ...]]:
    """Fills up what an encoder reads to the longest row, with a mask where tokens were filled up."""
    alike = dict(extra)
    read = extra.get("input_ids")
    if read is None:
        return alike
    read = tuple(tensor.reshape(1, -1).long() for tensor in read)
    width = max(tensor.shape[1] for tensor in read)
    if any(tensor.shape[1] < width for tensor in read) or "attention_mask" in extra:
        given = extra.get("attention_mask", tuple(torch.ones_like(tensor) for tensor in read))
        masks = (mask.reshape(1, -1).long() for mask in given)
        alike["attention_mask"] = tuple(torch.nn.functional.pad(mask, (0, width - mask.shape[1])) for mask in masks)
    alike["input_ids"] = tuple(torch.nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in read)
    return alike
