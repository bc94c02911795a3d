# SPDX-License-Identifier: Apache-2.0
"""Scores every run of blocks at once, from one stream of boundary states.

Removing blocks a to b-1 puts boundary state a (the run's input X) where state b (its output Y) belongs. MI-PRUN (arXiv
2601.07212, Section 3) asks for the mutual information of X and Y over tokens and names no estimator, so none of these
is "the authors'". All work coordinate by coordinate: joint estimators in thousands of dimensions need more tokens than
there are, and mutual information of the whole state is blind to rotations, which removal is not.

What is not covered: what the rest of the model does with the difference between X and Y.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .measures import PairMoments, fp64_zeros, half_ranks, normal_scores


# Mutual information is clipped at -0.5 ln(1e-6) = 6.9 nats per coordinate, variance ratios at 1e6.
_EPSILON = 1e-6
# Pairs of boundaries worked on at a time by the histogram.
_PAIRS = 32


class RunEstimator(ABC):
    """Scores every run of blocks from chunks of boundary states; a higher score says: rather remove it."""

    def coordinates(self, width: int) -> Tensor | None:
        """Indices of the coordinates (of `width`) that `add` wants to see; `None` for all."""
        return None

    @abstractmethod
    def add(self, states: Tensor) -> None:
        """Takes one chunk [T+1, n, d]: the same n tokens at every boundary."""

    @abstractmethod
    def begin(self, states: Tensor) -> None:
        """Sees the first chunk of all, which another process adds."""

    @abstractmethod
    def sums(self) -> dict[str, Tensor]:
        """What was added up so far; `"offset"`, where there is one, is no sum but the same in every process."""

    @abstractmethod
    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Goes on from the sums of several processes, added up."""

    @abstractmethod
    def all_runs(self) -> Tensor:
        """[T+1, T+1] fp64: entry (a, b), a < b, is the score of removing blocks a to b-1; 0 elsewhere."""

    def additive_runs(self) -> Tensor:
        """Like `all_runs`, the table whose sum over disjoint runs is to be maximised; the same unless overridden."""
        return self.all_runs()

    @property
    @abstractmethod
    def stored_values(self) -> int:
        """Number of values that the statistics hold."""


class GaussianCopula(RunEstimator):
    """Coordinate-wise Gaussian-copula mutual information, in nats (our choice of estimator; a surrogate).

        z = Phi^-1( (rank - 1/2) / n ),   rho_c = corr(z_x, z_y),   I = mean_c -0.5 ln(1 - min(rho_c^2, 1 - 1e-6))

    Ranks are taken inside a chunk: exact ranks would need every hidden state at once. Equal values share their mean
    rank, since states in 16 bits are full of ties and breaking them by position would correlate X with Y; a constant
    coordinate then has no variance and counts as 0. Blind to sign and scale: a flipped coordinate looks redundant.
    """

    def __init__(self) -> None:
        self._moments = PairMoments()

    def add(self, states: Tensor) -> None:
        """See `RunEstimator.add`."""
        self._moments.add(states, normal_scores)

    def begin(self, states: Tensor) -> None:
        """See `RunEstimator.begin`."""
        self._moments.begin(states, normal_scores)

    def sums(self) -> dict[str, Tensor]:
        """See `RunEstimator.sums`."""
        return self._moments.sums()

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """See `RunEstimator.restore`."""
        self._moments.restore(sums)

    def all_runs(self) -> Tensor:
        """See `RunEstimator.all_runs`; nats per coordinate, 0 to 6.9."""
        return self._moments.average(_gaussian_information)

    @property
    def stored_values(self) -> int:
        """See `RunEstimator.stored_values`: about d (T+1)^2."""
        return self._moments.stored_values


class IdentityDecoder(RunEstimator):
    """How well Y is decoded by X itself: what removal of the run relies on (ours; D = Y - X).

        I_id  = mean_c 0.5 ln( var(Y_c) / max(E[D_c^2], eps var(Y_c)) )      the score, in nats
        D_add = mean_c 0.5 ln( 1 + E[D_c^2] / var(X_c) )                     the cost that adds up over runs

    I_id is the Barber-Agakov bound with the decoder N(X, diag), a true bound where Y_c is Gaussian; it sees shifts,
    signs and scales. Ratios are clipped at 1e6 either way, and a coordinate that is constant on both sides with the
    same value counts as no difference.
    """

    def __init__(self) -> None:
        self._moments = PairMoments()

    def add(self, states: Tensor) -> None:
        """See `RunEstimator.add`."""
        self._moments.add(states)

    def begin(self, states: Tensor) -> None:
        """See `RunEstimator.begin`."""
        self._moments.begin(states)

    def sums(self) -> dict[str, Tensor]:
        """See `RunEstimator.sums`."""
        return self._moments.sums()

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """See `RunEstimator.restore`."""
        self._moments.restore(sums)

    def all_runs(self) -> Tensor:
        """See `RunEstimator.all_runs`; I_id in nats per coordinate, -6.9 to 6.9."""
        return self._moments.average(_identity_information)

    def additive_runs(self) -> Tensor:
        """See `RunEstimator.additive_runs`; -D_add in nats per coordinate."""
        return -self._moments.average(_identity_damage)

    @property
    def stored_values(self) -> int:
        """See `RunEstimator.stored_values`: about d (T+1)^2."""
        return self._moments.stored_values


class Histogram(RunEstimator):
    """Coordinate-wise histogram mutual information, in nats: equal-frequency bins, averaged over some coordinates.

    Plug-in value minus its bias (B-1)^2 / (2n), at least 0 per coordinate. Saturates at ln B. Bins are cut inside a
    chunk, and equal values share a bin. Holds C T(T+1)/2 B^2 counts.

    It sees every dependence, also the one that removal cannot use: one coordinate of an embedding nearly gives the
    token away, so that block 0 looks redundant (SmolLM2-135M: 0.9 nats, among the highest of all blocks, and removing
    it destroys the model). Protect the first block.

    Args:
        bins: B.
        num_coordinates: C, the number of coordinates to look at.
        seed: Seed of their choice.
    """

    def __init__(self, bins: int, num_coordinates: int, seed: int) -> None:
        self._bins = bins
        self._num_coordinates = num_coordinates
        self._seed = seed
        self._tokens = 0
        self._counts = self._pairs = torch.empty(0)

    def coordinates(self, width: int) -> Tensor:
        """See `RunEstimator.coordinates`."""
        order = torch.randperm(width, generator=torch.Generator().manual_seed(self._seed))
        return order[: self._num_coordinates].sort().values

    def add(self, states: Tensor) -> None:
        """See `RunEstimator.add`; `states` holds the chosen coordinates only."""
        boundaries, tokens, width = states.shape
        bins = half_ranks(states.permute(0, 2, 1).contiguous()) * self._bins // (2 * tokens)
        if not len(self._counts):
            self.begin(states)
        one = torch.ones((), dtype=torch.int32, device=states.device)
        for first, second, counts in self._parts():
            cells = bins[first] * self._bins + bins[second]
            counts.scatter_add_(-1, cells, one.expand(cells.shape))
        self._tokens += tokens

    def begin(self, states: Tensor) -> None:
        """See `RunEstimator.begin`."""
        boundaries, _, width = states.shape
        self._pairs = torch.triu_indices(boundaries, boundaries, 1, device=states.device)
        shape = (self._pairs.shape[1], width, self._bins**2)
        self._counts = torch.zeros(shape, dtype=torch.int32, device=states.device)

    def sums(self) -> dict[str, Tensor]:
        """See `RunEstimator.sums`."""
        return {"pairs": self._counts, "count": torch.tensor(self._tokens)}

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """See `RunEstimator.restore`."""
        self._counts, self._tokens = sums["pairs"], int(sums["count"])
        # n (n - 1) / 2 pairs of n boundaries
        boundaries = (1 + math.isqrt(1 + 8 * len(self._counts))) // 2
        self._pairs = torch.triu_indices(boundaries, boundaries, 1)

    def all_runs(self) -> Tensor:
        """See `RunEstimator.all_runs`; nats per coordinate, 0 to ln B."""
        bias = (self._bins - 1) ** 2 / (2 * self._tokens)
        boundaries = int(self._pairs[1, -1]) + 1
        scores = fp64_zeros(self._counts, boundaries, boundaries)
        for first, second, counts in self._parts():
            joint = counts.to(scores.device).double().unflatten(-1, (self._bins, self._bins)) / self._tokens
            plug_in = _entropy(joint.sum(-1)) + _entropy(joint.sum(-2)) - _entropy(joint.flatten(-2))
            scores[first.to(scores.device), second.to(scores.device)] = (plug_in - bias).clamp(min=0).mean(-1)
        return scores

    @property
    def stored_values(self) -> int:
        """See `RunEstimator.stored_values`: C T(T+1)/2 B^2."""
        return self._counts.numel()

    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Some pairs at a time: first boundaries, second boundaries, and a view of their counts."""
        return zip(*(tensor.split(_PAIRS) for tensor in (*self._pairs, self._counts)), strict=True)


def _gaussian_information(_mean: Tensor, covariance: Tensor) -> Tensor:
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    scale = variance.unsqueeze(-1) * variance.unsqueeze(-2)
    squared = torch.where(scale > 0, covariance.square() / scale, 0)
    return -0.5 * torch.log1p(-squared.clamp(max=1 - _EPSILON))


def _squared_difference(mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """E[(Y - X)^2] [c, a, b] and the variances [c, T+1]."""
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    spread = variance.unsqueeze(-1) + variance.unsqueeze(-2) - 2 * covariance
    return spread.clamp(min=0) + (mean.unsqueeze(-1) - mean.unsqueeze(-2)).square(), variance


def _identity_information(mean: Tensor, covariance: Tensor) -> Tensor:
    difference, variance = _squared_difference(mean, covariance)
    return -0.5 * torch.log(_clipped_ratio(difference, variance.unsqueeze(-2), otherwise=1.0))


def _identity_damage(mean: Tensor, covariance: Tensor) -> Tensor:
    difference, variance = _squared_difference(mean, covariance)
    return 0.5 * torch.log1p(_clipped_ratio(difference, variance.unsqueeze(-1), otherwise=0.0, least=0.0))


def _clipped_ratio(top: Tensor, bottom: Tensor, *, otherwise: float, least: float = _EPSILON) -> Tensor:
    """top / bottom between `least` and 1e6; `otherwise` where both are 0."""
    ratio = (top / bottom).clamp(least, 1 / _EPSILON)
    return torch.where((top == 0) & (bottom == 0), otherwise, ratio)


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)
