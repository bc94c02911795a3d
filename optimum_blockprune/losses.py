# SPDX-License-Identifier: Apache-2.0
"""The negative log-likelihood of a batch, given its logits."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from .batches import Batch


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


def perplexity_of(loss: float) -> float:
    """exp(mean NLL), infinite instead of an overflow."""
    return math.exp(loss) if loss < 700 else math.inf
