# SPDX-License-Identifier: Apache-2.0
"""The loss of a batch, given its logits, and how many logits are computed at a time.

It is the negative log-likelihood of what comes next, or, of a batch with a teacher, the Kullback-Leibler divergence
KL(dense || pruned) of the predictions at the same positions. Of the dense model's distribution its k most likely
tokens are known, and the mass of all others as one more outcome: merging outcomes never increases a divergence (data
processing), so that the loss is a lower bound of the divergence over all tokens, and equal to it for k = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .batches import Batch, Teacher
from .stand_ins import hidden_of, map_tensors, rows_of


# Logits of one head call: 2**26 values are 256 MiB in float32. One window is the least that whole windows need.
_MAX_LOGITS = 2**26
# Predictions of one head call where single ones are scored; more of them are no faster.
_MAX_PREDICTIONS = 1024
_NONE = -100

# Runs the head on a stored output of the last block for some windows; returns logits.
Head = Callable[[Batch, Any], Tensor]


def token_nll(logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """Summed loss (nats, float64 scalar on the logits' device) and the number of predictions.

    Args:
        logits: [B, S, vocabulary].
        batch: The windows that gave them; each token predicts the next one, predictions from or of padding are left
            out. With labels, the labelled positions predict those.
    """
    targets = targets_of(batch)
    teacher = None if batch.teacher is None else batch.teacher.flat()
    return _losses(logits.flatten(0, 1), targets.flatten(), teacher).sum(), int((targets != _NONE).sum())


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
    """The loss of every prediction, from what the last block returned; whole logits of a batch never exist.

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
            _losses(
                head(part, rows_of(value, rows, shape[0])).flatten(0, 1),
                targets_of(part).flatten(),
                None if part.teacher is None else part.teacher.flat(),
            )
            for rows, part in head_rows(batch, vocabulary)
        ]
        return torch.cat(parts).view(shape)
    targets = targets_of(batch).flatten()
    teacher = None if batch.teacher is None else batch.teacher.flat()
    losses: Tensor | None = None
    for chosen, logits in position_logits(head, value, batch, vocabulary):
        found = _losses(logits, targets[chosen], None if teacher is None else teacher.rows(chosen))
        losses = found.new_zeros(shape.numel()) if losses is None else losses
        losses[chosen.to(losses.device)] = found
    return torch.zeros(shape, dtype=torch.float64) if losses is None else losses.view(shape)


def position_logits(head: Head, value: Any, batch: Batch, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs the head on the positions that predict something, a bounded number at a time.

    Args:
        head: Runs the head, each position as a window of one token.
        value: What the last block returned for the batch.
        batch: The windows, without further inputs.
        vocabulary: Number of tokens.

    Yields:
        The positions, as numbers into the flattened `[B, S]`, and their logits `[n, vocabulary]`.
    """
    shape = batch.input_ids.shape
    places = predicted(batch).flatten().nonzero().squeeze(1)
    for chosen in places.split(max(1, min(_MAX_PREDICTIONS, _MAX_LOGITS // vocabulary))):
        part = Batch(batch.input_ids.flatten()[chosen, None])
        yield chosen, head(part, _positions(value, chosen, shape)).squeeze(1)


def summary(logits: Tensor, k: int) -> Teacher:
    """The k most likely tokens of each position, and the mass of the others.

    Args:
        logits: [N, vocabulary].
        k: At most the vocabulary.

    Returns:
        `[N, k]`, float32, on the device of the logits.
    """
    logs = logits.float().log_softmax(-1)
    values, tokens = logs.topk(k)
    return Teacher(tokens.int(), values, logs.scatter(-1, tokens, -math.inf).logsumexp(-1))


def divergence(logits: Tensor, teacher: Teacher) -> Tensor:
    """KL(teacher || logits) at every position over k + 1 outcomes, nats, float64 `[N]`.

    Each outcome adds p log(p / q) - p + q, which is never negative and adds up to the same, since both sides sum to 1:
    of nearly equal distributions the rounding of the logarithms then counts to second order only.

    Args:
        logits: [N, vocabulary].
        teacher: `[N, k]`.
    """
    logs, tokens = logits.float().log_softmax(-1), teacher.tokens.long()
    others = logs.scatter(-1, tokens, -math.inf).logsumexp(-1, keepdim=True)
    found = torch.cat([logs.gather(-1, tokens), others], -1).double()
    wanted = torch.cat([teacher.values, teacher.rest[:, None]], -1).double()
    p, q = wanted.exp(), found.exp()
    return torch.where(p == 0, q, p * (wanted - found) - p + q).sum(-1)


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


def _losses(logits: Tensor, targets: Tensor, teacher: Teacher | None) -> Tensor:
    """Float64 [N], 0 where there is no target, whatever the logits [N, vocabulary] are there: padding may hold NaN."""
    if teacher is not None:
        # A part at a time: there are several copies of the logits meanwhile.
        size = max(1, min(_MAX_PREDICTIONS, _MAX_LOGITS // logits.shape[-1]))
        rows = [slice(start, start + size) for start in range(0, len(logits), size)]
        found = torch.cat([divergence(logits[each], teacher.rows(each).to(logits.device)) for each in rows])
        return found.masked_fill(targets.to(logits.device) == _NONE, 0.0)
    losses = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none", ignore_index=_NONE)
    return losses.double()


def _positions(value: Any, chosen: Tensor, shape: torch.Size) -> Any:
    """Some positions of a stored output, each as a window of one token; other tensors are passed on whole."""

    def pick(tensor: Tensor) -> Tensor:
        if tensor.shape[:2] != shape:
            return tensor
        return tensor.flatten(0, 1)[chosen.to(tensor.device), None]

    return map_tensors(value, pick)
