# SPDX-License-Identifier: Apache-2.0
"""The negative log-likelihood of a batch, given its logits, and how many logits are computed at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .batches import Batch
from .stand_ins import hidden_of, map_tensors, rows_of


# Logits of one head call: 2**26 values are 256 MiB in float32. One window is the least that whole windows need.
_MAX_LOGITS = 2**26
# Predictions of one head call where single ones are scored; more of them are no faster.
_MAX_PREDICTIONS = 1024
_NONE = -100

# Runs the head on a stored output of the last block for some windows; returns logits.
Head = Callable[[Batch, Any], Tensor]


def token_nll(logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """Summed NLL (nats, float64 scalar on the logits' device) and the number of predictions.

    Args:
        logits: [B, S, vocabulary].
        batch: The windows that gave them; each token predicts the next one, predictions from or of padding are left
            out. With labels, the labelled positions predict those.
    """
    targets = targets_of(batch)
    return _nll(logits.flatten(0, 1), targets.flatten()).sum(), int((targets != _NONE).sum())


def targets_of(batch: Batch) -> Tensor:
    """Long [B, S], where the batch lies: the token that each position predicts, -100 where it predicts none."""
    if batch.labels is not None:
        return batch.labels
    targets = F.pad(batch.input_ids[:, 1:], (0, 1), value=_NONE)
    if batch.attention_mask is None:
        return targets
    real = batch.attention_mask
    return targets.masked_fill(~F.pad(real[:, 1:] & real[:, :-1], (0, 1)), _NONE)


def predicted(batch: Batch) -> Tensor:
    """Bool [B, S]: the positions that predict a token."""
    return targets_of(batch) != _NONE


def prediction_losses(head: Head, value: Any, batch: Batch, vocabulary: int) -> Tensor:
    """The NLL of every prediction, from what the last block returned; whole logits of a batch never exist.

    The head looks at positions one by one, so only those that predict something go through it, a bounded number at a
    time, each as a window of one token. Where that cannot be (further inputs, hidden states of another shape than the
    tokens), whole windows go through it.

    Args:
        head: Runs the head.
        value: What the last block returned for the batch.
        batch: The windows.
        vocabulary: Number of tokens.

    Returns:
        Nats, float64 `[B, S]` on the device of the logits, 0 where nothing is predicted.
    """
    shape = batch.input_ids.shape
    if batch.extra or hidden_of(value).shape[:2] != shape:
        parts = [
            _nll(head(part, rows_of(value, rows, shape[0])).flatten(0, 1), targets_of(part).flatten())
            for rows, part in head_rows(batch, vocabulary)
        ]
        return torch.cat(parts).view(shape)
    targets = targets_of(batch).flatten()
    places = (targets != _NONE).nonzero().squeeze(1)
    losses: Tensor | None = None
    for chosen in places.split(max(1, min(_MAX_PREDICTIONS, _MAX_LOGITS // vocabulary))):
        part = Batch(batch.input_ids.flatten()[chosen, None])
        found = _nll(head(part, _positions(value, chosen, shape)).squeeze(1), targets[chosen])
        losses = found.new_zeros(shape.numel()) if losses is None else losses
        losses[chosen.to(losses.device)] = found
    return torch.zeros(shape, dtype=torch.float64) if losses is None else losses.view(shape)


def head_rows(batch: Batch, vocabulary: int) -> Iterator[tuple[slice, Batch]]:
    """Cuts a batch into as many windows at a time as keep the logits small; also yields which windows they are."""
    windows, length = batch.input_ids.shape
    step = max(1, _MAX_LOGITS // (length * vocabulary))
    if step >= windows:
        yield slice(0, windows), batch
        return
    for row in range(0, windows, step):
        yield slice(row, row + step), batch.rows(slice(row, row + step))


def kl_of(truth: Tensor, logits: Tensor) -> Tensor:
    """Summed KL(truth || model) in nats over rows of logits [n, vocabulary], float64 on the CPU."""
    rows = F.kl_div(logits.log_softmax(-1), truth.log_softmax(-1), reduction="none", log_target=True)
    return rows.double().sum().cpu()


def perplexity_of(loss: float) -> float:
    """exp(mean NLL), infinite instead of an overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Float64 [N], 0 where there is no target, whatever the logits [N, vocabulary] are there: padding may hold NaN."""
    losses = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none", ignore_index=_NONE)
    return losses.double()


def _positions(value: Any, chosen: Tensor, shape: torch.Size) -> Any:
    """Some positions of a stored output, each as a window of one token; other tensors are passed on whole."""

    def pick(tensor: Tensor) -> Tensor:
        if tensor.shape[:2] != shape:
            return tensor
        return tensor.flatten(0, 1)[chosen.to(tensor.device), None]

    return map_tensors(value, pick)
