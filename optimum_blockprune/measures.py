# SPDX-License-Identifier: Apache-2.0
"""What happens to the residual stream between two blocks: tensor functions and streaming sums, all fp64.

Boundary p is the residual stream before block p; boundary T is the output of the last block. Where half-blocks are
looked at, there is another one within each block, and T is twice their number (`half.Row`). `PairMoments` compares
all boundaries with each other, coordinate by coordinate; `BoundaryDistance` those a fixed number of blocks apart.
Sums live on the device of the first states they see; nothing is read back from it before the end.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .batches import Batch
from .errors import NonFiniteError


# Coordinates worked on at a time: the fp64 working copies hold this many rows of [T+1, n].
_COLUMNS = 64
# Tokens of a chunk that offsets are taken from: they need not be exact.
_SAMPLE = 256


def real_tokens(mask: Tensor) -> Tensor:
    """Flat positions in [B * S] of the tokens that are not padding, ascending; `mask` is `BlockRunner.positions`."""
    return mask.flatten().nonzero().squeeze(1)


def content_mask(mask: Tensor) -> Tensor:
    """[B, S] bool: real tokens without the first one of each window, whose activations are massive (our choice)."""
    return mask & (mask.cumsum(1) > 1)


def last_tokens(mask: Tensor) -> Tensor:
    """Flat positions in [B * S] of the last token of each window that is not padding."""
    length = mask.shape[1]
    column = torch.where(mask, torch.arange(length), -1).amax(1)
    return (torch.arange(len(mask)) * length + column)[column >= 0]


class PairMoments:
    """Means and covariances of all boundary states with each other, per coordinate, streamed in fp64.

    Holds d (T+1)^2 products. Values are taken relative to a median of the first chunk: this keeps large offsets
    (massive activations) from drowning the differences, and a constant coordinate has variance exactly 0.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift = self._sums = self._products = torch.empty(0)
        self._begun = False

    @property
    def stored_values(self) -> int:
        """Number of values held."""
        return self._shift.numel() + self._sums.numel() + self._products.numel()

    def begin(self, states: Tensor, transform: Callable[[Tensor], Tensor] = Tensor.double) -> None:
        """Takes the offsets from a chunk without adding it; the first chunk that is added does so by itself."""
        boundaries, tokens, width = states.shape
        self._begun = True
        sample = states[:, :: max(1, tokens // _SAMPLE)]
        self._sums = fp64_zeros(states, width, boundaries)
        self._shift = torch.zeros_like(self._sums)
        self._products = fp64_zeros(states, width, boundaries, boundaries)
        for part in _column_parts(width):
            self._shift[part] = _middle(self._values(sample, part, transform))

    def add(self, states: Tensor, transform: Callable[[Tensor], Tensor] = Tensor.double) -> None:
        """Adds a chunk.

        Args:
            states: [T+1, n, d].
            transform: Maps [c, T+1, n] (some coordinates) to what is to be averaged, fp64 and of the same shape.
        """
        if not self._begun:
            self.begin(states, transform)
        for part in _column_parts(states.shape[2]):
            values = self._values(states, part, transform) - self._shift[part].unsqueeze(-1)
            self._sums[part] += values.sum(-1)
            self._products[part] += values @ values.mT
        self.count += states.shape[1]

    def _values(self, states: Tensor, part: slice, transform: Callable[[Tensor], Tensor]) -> Tensor:
        return transform(states[:, :, part].to(self._sums.device).permute(2, 0, 1).contiguous())

    def sums(self) -> dict[str, Tensor]:
        """What was added up, and the offsets, which are no sum: see `restore`."""
        return {
            "moments": self._sums,
            "products": self._products,
            "count": torch.tensor(self.count),
            "offset": self._shift,
        }

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Goes back to what `sums` gave, or to the sum of several that were begun with the same chunk."""
        self._sums, self._products = sums["moments"], sums["products"]
        self.count, self._shift, self._begun = int(sums["count"]), sums["offset"], True

    def average(self, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Mean over coordinates of `score(mean [c, T+1], covariance [c, T+1, T+1])`, upper triangle only."""
        width, boundaries = self._sums.shape
        total = torch.zeros(boundaries, boundaries, dtype=torch.float64, device=self._sums.device)
        for part in _column_parts(width):
            offset = self._sums[part] / self.count
            covariance = self._products[part] / self.count - offset.unsqueeze(-1) * offset.unsqueeze(-2)
            total += score(self._shift[part] + offset, covariance).sum(0)
        return (total / width).triu(1)


def dpi_violation_rate(scores: Tensor, tolerance: float = 1e-9) -> float:
    """Share of boundary triples a < b < c with M[a,c] > min(M[a,b], M[b,c]) + tolerance; 0 if there is no triple.

    The data-processing inequality (arXiv 2601.07212, Eq. 2) forbids them for true mutual information along a Markov
    chain; a surrogate score may break it.

    Args:
        scores: M [T+1, T+1], as `RunEstimator.all_runs` returns it.
        tolerance: Same unit as the scores.
    """
    places = torch.arange(len(scores), device=scores.device)
    ordered = (places[:, None, None] < places[:, None]) & (places[:, None] < places)
    bound = torch.minimum(scores.unsqueeze(2), scores.unsqueeze(0))
    violated = ordered & (scores.unsqueeze(1) > bound + tolerance)
    return int(violated.sum()) / max(1, math.comb(len(scores), 3))


class BoundaryDistance:
    """Summed distances between each boundary and the one some blocks later, streamed; see `watch`.

    Args:
        gaps: Numbers of blocks in between, each at least 1.
        distance: Maps two sets of states [m, d] to m distances.
    """

    def __init__(self, gaps: Collection[int], distance: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._gaps = tuple(gaps)
        self._distance = distance
        self._sums: dict[tuple[int, int], Tensor] = {}
        self.count = 0

    @property
    def span(self) -> int:
        """Number of boundaries whose states of a batch are held at a time."""
        return max(self._gaps) + 1

    def watch(self, tokens: Tensor) -> Callable[[int, Tensor], None]:
        """Starts a batch.

        Args:
            tokens: Flat positions in its [B * S].

        Returns:
            What takes its boundary states [B, S, d], in order of position; batches may take turns.
        """
        recent: deque[Tensor] = deque(maxlen=self.span)
        self.count += len(tokens)

        def visit(position: int, hidden: Tensor) -> None:
            states = hidden.flatten(0, 1).index_select(0, tokens.to(hidden.device))
            recent.append(states)
            for gap in self._gaps:
                if len(recent) > gap:
                    self._add((gap, position - gap), self._distance(recent[-1 - gap].to(states.device), states))

        return visit

    def _add(self, key: tuple[int, int], distances: Tensor) -> None:
        total = distances.to(_fp64_device(distances.device)).double().sum()
        self._sums[key] = self._sums[key] + total if key in self._sums else total

    def sums(self, num_blocks: int) -> dict[str, Tensor]:
        """By gap, `"1"`, ...: fp64 [num_blocks + 1 - gap], entry a the summed distance between boundaries a and
        a + gap; and `"tokens"`, the number of terms. All zero where no batch was seen."""
        found = {str(gap): [self._sums.get((gap, a)) for a in range(num_blocks + 1 - gap)] for gap in self._gaps}
        zero = torch.zeros((), dtype=torch.float64)
        sums = {gap: torch.stack([zero if x is None else x.cpu() for x in each]) for gap, each in found.items()}
        return {**sums, "tokens": torch.tensor(self.count)}


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """1 - cos of states [m, d], 0 to 2 (ShortGPT, arXiv 2403.03853), as |u - v|^2 / 2 of the unit vectors.

    The difference keeps the precision that 1 - cos loses where the states are nearly equal.
    """
    return (_unit(before) - _unit(after)).square().sum(-1) / 2


def angular_distance(before: Tensor, after: Tensor) -> Tensor:
    """arccos(cos) / pi of states [m, d], 0 to 1 (Gromov et al., arXiv 2403.17887), without the arccos.

    2 atan2(|u - v|, |u + v|) is the same angle, precise where the states are nearly equal.
    """
    u, v = _unit(before), _unit(after)
    return torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)) * (2 / math.pi)


def half_ranks(values: Tensor) -> Tensor:
    """Twice the mean rank along the last dimension, less one: whole numbers 1 to 2n - 1; equal values are equal."""
    rows = values.reshape(-1, values.shape[-1])
    order = _order(rows)
    ranks = torch.empty_like(order).scatter_(-1, order, _half_ranks_in_order(rows.gather(-1, order)))
    return ranks.view(values.shape)


def normal_scores(values: Tensor) -> Tensor:
    """Phi^-1((mean rank - 1/2) / n) along the last dimension, fp64."""
    count = values.shape[-1]
    quantiles = torch.arange(2 * count, dtype=torch.float64, device=values.device) / (2 * count)
    return torch.special.ndtri(quantiles)[half_ranks(values)]


def raise_non_finite(diagnose: Callable[[Batch], None], batches: Iterable[Batch]) -> NoReturn:
    """Ends a measurement that came out as NaN or infinity: `diagnose` may name the block, batch by batch.

    Raises:
        NonFiniteError: Always.
    """
    for batch in batches:
        diagnose(batch)
    raise NonFiniteError(
        "NaN or infinity appeared in the hidden states, although no block alone shows it. Check the weights, or load "
        "the model in another dtype (float16 overflows where bfloat16 and float32 do not)."
    )


def _half_ranks_in_order(ordered: Tensor) -> Tensor:
    """`half_ranks` of rows that ascend."""
    differs = ordered[..., 1:] != ordered[..., :-1]
    if ordered.device.type != "cpu":  # asking which rows have equal values would wait for the device
        return _shared_half_ranks(differs)
    ranks = torch.arange(1, 2 * ordered.shape[-1], 2).expand(ordered.shape).clone()
    tied = ~differs.all(-1)
    ranks[tied] = _shared_half_ranks(differs[tied])
    return ranks


def _shared_half_ranks(differs: Tensor) -> Tensor:
    """First plus last place (and one) of the equal values around each; `differs` [..., n-1] says where they end."""
    count = differs.shape[-1] + 1
    place = torch.arange(count, device=differs.device)
    first = torch.where(F.pad(differs, (1, 0), value=True), place, 0).cummax(-1).values
    last = torch.where(F.pad(differs, (0, 1), value=True), place, count).flip(-1).cummin(-1).values.flip(-1)
    return first + last + 1


def _order(rows: Tensor) -> Tensor:
    """What sorts each row. On a CPU NumPy needs less than half of PyTorch's time for it."""
    if rows.device.type != "cpu":
        return rows.argsort(-1)
    wide = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))  # NumPy has no bfloat16
    parts = [part.numpy() for part in wide.chunk(torch.get_num_threads())]
    with ThreadPoolExecutor(len(parts)) as pool:  # NumPy's sort uses one core, and lets others run
        return torch.from_numpy(np.concatenate(list(pool.map(np.argsort, parts))))


def _middle(values: Tensor) -> Tensor:
    """A median along the last dimension. Where PyTorch has no deterministic one, by sorting."""
    if values.device.type == "cpu":
        return values.median(-1).values
    return values.sort(-1).values[..., values.shape[-1] // 2]


def _unit(states: Tensor) -> Tensor:
    return F.normalize(states.double() if states.dtype == torch.float64 else states.float(), dim=-1)


def _fp64_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device


def fp64_zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros in fp64 near `like`; Apple GPUs have no fp64, their statistics are kept on the CPU."""
    return torch.zeros(shape, dtype=torch.float64, device=_fp64_device(like.device))


def _column_parts(width: int) -> Iterator[slice]:
    return (slice(start, start + _COLUMNS) for start in range(0, width, _COLUMNS))
