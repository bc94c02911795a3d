# SPDX-License-Identifier: Apache-2.0
"""Racing: which candidates can still have the smallest mean loss, from what a part of the windows has shown.

Pure statistics; nothing here knows a model. All candidates are scored on the same predictions, so that what counts
is the difference between two of them, which varies far less than the losses. The test is our choice:

* Samples. The predictions of a window are cut into cells of `CELL` neighbours; a cell's summed difference is one
  sample. From `ENOUGH_WINDOWS` windows on, whole windows are the samples.
* Test. One-sided Student t on the ratio of summed differences to predictions, against the candidate that leads. The
  question is who wins on *all* windows, so the standard error shrinks by sqrt(1 - share seen), as it does for every
  sample drawn without replacement.
* Confidence. The error is shared (Bonferroni) among all rivals and all looks of one step: whoever leads, the
  candidate with the smallest mean is dropped in a step with at most the stated error.
* Assumption. The windows come in random order, and samples are independent. Neighbouring predictions are not, which is
  why single ones are no samples; nor are the cells of a window quite, since a text suits one block more than another.
  So from `WIDER_FROM` windows on, the standard error is at least the one that the spread of whole windows gives.
  With fewer windows than `ENOUGH_WINDOWS` the stated confidence holds as far as that goes, and no further.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


CELL = 16
WIDER_FROM, ENOUGH_WINDOWS = 3, 16
# The first look comes after this share of the windows, each further one after a quarter more.
_FIRST_SHARE = 16
# Terms of the continued fraction: far more than it needs for a thousand degrees of freedom.
_TERMS = 400


class Tally:
    """What was measured so far in a step.

    Args:
        candidates: Those to measure.

    Attributes:
        sums: Summed losses by candidate, one tensor [windows, cells] per part of the windows.
        counts: Number of predictions, one tensor per part.
        tokens: Number of tokens seen.
    """

    def __init__(self, candidates: Iterable[Any]) -> None:
        self.sums: dict[Any, list[Tensor]] = {candidate: [] for candidate in candidates}
        self.counts: list[Tensor] = []
        self.tokens = 0

    def add(self, candidates: Sequence[Any], sums: Tensor, counts: Tensor, tokens: int) -> None:
        """Adds a part of the windows.

        Args:
            candidates: All that are left, in the order of `sums`.
            sums: Summed losses [candidates, windows, cells]; of other cells where nothing is compared.
            counts: Number of predictions, [windows, cells].
            tokens: Number of tokens.
        """
        self.counts.append(counts)
        self.tokens += tokens
        for candidate, each in zip(candidates, sums, strict=True):
            self.sums[candidate].append(each)

    def means(self) -> dict[Any, float]:
        """Nats per prediction."""
        predictions = sum(int(counts.sum()) for counts in self.counts)
        return {each: sum(part.sum() for part in parts).item() / predictions for each, parts in self.sums.items()}

    def contenders(self, candidates: Iterable[Any], error: float, windows: int) -> list[Any]:
        """Those of `candidates` that may still have the smallest mean over all `windows`; see `contenders`."""
        counts = torch.cat(self.counts)
        losses = {candidate: torch.cat(self.sums[candidate]) for candidate in candidates}
        return contenders(losses, counts, error, len(counts) / windows)


def looks(windows: int) -> tuple[int, ...]:
    """Numbers of windows after which candidates are compared; after all of them, exact means decide.

    Args:
        windows: Number of windows in all.
    """
    seen, found = max(1, windows // _FIRST_SHARE), []
    while seen < windows:
        found.append(seen)
        seen += math.ceil(seen / 4)
    return tuple(found)


def cells_of(values: Tensor) -> Tensor:
    """Sums of `CELL` neighbours: `[B, S]` becomes `[B, ceil(S / CELL)]`, the last cell may be smaller."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % CELL))
    return padded.unflatten(1, (-1, CELL)).sum(2)


def contenders(losses: Mapping[Any, Tensor], counts: Tensor, error: float, share: float = 0.0) -> list[Any]:
    """The candidates that may still have the smallest mean loss, in the order given.

    Args:
        losses: For each candidate the finite summed losses `[windows, cells]`, of the same predictions for all.
        counts: Number of predictions in each cell, `[windows, cells]`.
        error: Probability with which one comparison may go wrong: see `shared_error`.
        share: Which part of all windows these are, below 1; 0 where they are a sample of infinitely many.
    """
    enough = len(counts) >= ENOUGH_WINDOWS
    number = len(counts) if enough else int((counts > 0).sum())
    if number < 2:
        return list(losses)
    leader = min(losses, key=lambda block: losses[block].sum().item())
    limit = student_t_quantile(error, number - 1) * math.sqrt(1 - share)
    counts, stay = counts.double(), []
    for block, sums in losses.items():
        differences = sums.double() - losses[leader].double()
        deviation = 0.0 if enough else _deviation(differences.flatten(), counts.flatten())
        if len(counts) >= WIDER_FROM:
            deviation = max(deviation, _deviation(differences.sum(1), counts.sum(1)))
        if (differences.sum() / counts.sum()).item() - limit * deviation <= 0:
            stay.append(block)
    return stay


def shared_error(confidence: float, candidates: int, number_of_looks: int) -> float:
    """The error of one comparison (Bonferroni): every rival may lead at every look.

    Args:
        confidence: That the best candidate of a step is not dropped.
        candidates: Number of candidates of the step.
        number_of_looks: How often they are compared.
    """
    return (1 - confidence) / max(1, (candidates - 1) * number_of_looks)


@cache
def student_t_quantile(upper: float, freedom: int) -> float:
    """The value that Student's t exceeds with probability `upper` (below 0.5), for `freedom` degrees of freedom."""
    low, high = 0.0, 1.0
    while _exceeds(high, freedom) > upper:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _exceeds(middle, freedom) > upper else (low, middle)
    return high


def _deviation(differences: Tensor, counts: Tensor) -> float:
    """Standard error of the mean difference, in nats per prediction.

    The mean is a ratio of sums, because samples at padding hold fewer predictions; for equal samples this is the
    usual standard error of a mean. Samples without predictions do not count.
    """
    used = counts > 0
    differences, counts = differences[used], counts[used]
    number, total = len(counts), counts.sum()
    if number < 2:
        return 0.0
    residuals = differences - differences.sum() / total * counts
    return (residuals.square().sum() * number / (number - 1)).sqrt().item() / total.item()


def _exceeds(value: float, freedom: int) -> float:
    """P(T > value) for a value of at least 0: half of the regularised incomplete beta function (DLMF 8.17)."""
    half, x = freedom / 2, freedom / (freedom + value * value)
    if x < (half + 1) / (half + 2.5):
        return _beta(half, 0.5, x) / 2
    return (1 - _beta(0.5, half, 1 - x)) / 2


def _beta(a: float, b: float, x: float) -> float:
    """I_x(a, b) by its continued fraction (DLMF 8.17.22), from the last term back."""
    if x <= 0:
        return 0.0
    value = 1.0
    for term in reversed(_coefficients(a, b, x)):
        value = 1 + term / value
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(scale + a * math.log(x) + b * math.log1p(-x)) / (a * value)


def _coefficients(a: float, b: float, x: float) -> Sequence[float]:
    terms = []
    for m in range(_TERMS):
        terms.append(-(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)))
        terms.append((m + 1) * (b - m - 1) * x / ((a + 2 * m + 1) * (a + 2 * m + 2)))
    return terms
