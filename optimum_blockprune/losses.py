# SPDX-License-Identifier: Apache-2.0
"""The negative log-likelihood of a batch, given its logits, and how many logits are computed at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional as F

from .batches import Batch


# Logits of one head call: 2**26 values are 256 MiB in float32. One window is the least that a call can score.
_MAX_LOGITS = 2**26


def token_nll(logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """Summed NLL (nats, float64 scalar on the logits' device) and the number of predictions.

    Args:
        logits: [B, S, vocabulary].
        batch: The windows that gave them; each token predicts the next one, predictions from or of padding are left
            out. With labels, the labelled positions predict those.
    """
    if batch.labels is not None:
        labels = batch.labels.to(logits.device)
        total = F.cross_entropy(logits.flatten(0, 1).double(), labels.flatten(), reduction="sum", ignore_index=-100)
        return total, int((batch.labels != -100).sum())
    targets = batch.input_ids[:, 1:].to(logits.device)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none").double()
    if batch.attention_mask is None:
        return losses.sum(), losses.numel()
    scored = (batch.attention_mask[:, 1:] & batch.attention_mask[:, :-1]).flatten()
    # Not multiplied by the mask: a padded position may hold NaN.
    return losses[scored.to(losses.device)].sum(), int(scored.sum())


def head_rows(batch: Batch, vocabulary: int) -> Iterator[tuple[slice, Batch]]:
    """Cuts a batch into as many windows at a time as keep the logits small; also yields which windows they are."""
    windows, length = batch.input_ids.shape
    step = max(1, _MAX_LOGITS // (length * vocabulary))
    if step >= windows:
        yield slice(0, windows), batch
        return
    for row in range(0, windows, step):
        yield slice(row, row + step), batch.rows(slice(row, row + step))


def perplexity_of(loss: float) -> float:
    """exp(mean NLL), infinite instead of an overflow."""
    return math.exp(loss) if loss < 700 else math.inf
