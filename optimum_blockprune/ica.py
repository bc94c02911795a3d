# SPDX-License-Identifier: Apache-2.0
"""Functional networks of a model by spatial independent component analysis (arXiv 2508.05239): tensor functions, fp64.

Tokens are the time axis, channels the places. For one layer and one group of texts, `spatial_maps` goes

    signals [T, N] -> standardised -> leading_maps U [N, C] -> whitened Y [C, N] -> rotated_maps z [C, N]

A map is one network; a channel's `Maps.peak` says how strongly it belongs to any. For whole blocks (our extension)
the maps of all blocks are made together; `joint_subspace`, `shares`, `set_loss` and `choose_blocks` serve that.

Rows of z have mean 0 and sample standard deviation 1 (divisor N - 1) over the N channels, so that two identities hold:

    sum_c z_ci^2 = (N - 1) lev_i            lev_i: squared row norm of the centred, orthonormalised U
    sum_i sum_c z_ci^2 = C (N - 1)          the same for every layer: no per-layer total tells layers apart

What is not covered: which signals to take, streaming, and any matching of networks across groups.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from .errors import ConfigurationError, NonFiniteError
from .measures import fp64_zeros


Contrast = Literal["cube", "tanh"]
Control = Literal["none", "leverage_only", "random_rotation"]

# A channel counts as constant below this share of the median standard deviation (our choice).
_DEAD = 1e-6
# A direction counts as lost when centring leaves less than this share of U (our choice).
_LOST = 1e-7
# Keeps the loss of an emptied network finite: -ln(1e-6) = 13.8.
_FLOOR = 1e-6
# Set losses (of weights that sum to 1) nearer than this are equal: rounding must not decide.
TIE = 1e-11


@dataclass(frozen=True)
class Rotation:
    """What `symmetric_fastica` found; when not `finite`, `matrix` [C, C] is the last rotation that was."""

    matrix: Tensor
    converged: bool
    finite: bool
    iterations: int


@dataclass(frozen=True)
class FitLog:
    """How maps came about: `iterations` of the chosen fit with `contrast`, one of `restarts` (both contrasts counted).

    Not `converged`: a last resort. Controls have `True`, 0, "none" and 0.
    """

    converged: bool
    restarts: int
    contrast: Contrast | Literal["none"]
    iterations: int


@dataclass(frozen=True)
class Maps:
    """Maps `z` [C, N], rows with mean 0 and sample standard deviation 1; `rotation_free`: single rows mean nothing."""

    z: Tensor
    log: FitLog
    rotation_free: bool = False

    @property
    def peak(self) -> Tensor:
        """[N], in standard deviations: max_c |z|, or sqrt(sum_c z^2) where there was no ICA (`leverage_only`)."""
        return self.z.square().sum(0).sqrt() if self.rotation_free else self.z.abs().amax(0)


def effective_components(components: int, tokens: int) -> int:
    """min(components, tokens // 20), at least 1 (our choice): fewer tokens do not carry more networks."""
    return max(1, min(components, tokens // 20))


def standardised(signals: Tensor) -> Tensor:
    """Signals [T, N] per channel over tokens with mean 0 and population standard deviation 1, fp64.

    A channel whose deviation is below 1e-6 of the median of all channels that vary at all is centred only (our
    choice; arXiv 2508.05239 has the machine epsilon of its dtype): division would turn rounding into signal.

    Raises:
        NonFiniteError: NaN or infinity in `signals`.
    """
    _require_finite(signals, "the signals")
    wide = signals.to(fp64_zeros(signals, 0).device).double()
    # Relative to the first token, a constant channel is exactly 0, whatever its value.
    values = wide - wide[:1]
    values -= values.mean(0)
    deviation = values.square().mean(0).sqrt()
    # The median of nothing is NaN, which is above no deviation.
    dead = (deviation == 0) | (deviation < _DEAD * deviation[deviation > 0].median())
    return values.div_(deviation.masked_fill_(dead, 1.0))


def leading_maps(z: Tensor, components: int) -> Tensor:
    """U [N, C]: the leading right singular vectors of z [T, N], orthonormal; fewer where the rank is lower.

    Works on the smaller of the two Gram matrices (exact, and the authors' full SVD yields the same subspace).
    """
    tokens, channels = z.shape
    size = max(tokens, channels)
    if tokens > channels:
        return _top_eigenpairs(z.T @ z, components, size)[0]
    vectors, values = _top_eigenpairs(z @ z.T, components, size)
    # The polar factor mends what a small eigenvalue costs in orthogonality.
    return _polar(z.T @ (vectors / values.sqrt()))


def whitened(u: Tensor) -> Tensor:
    """Y [C, N] from U [N, C]: rows have mean 0 over the N channels, and Y Y^T / N = I (arXiv 2508.05239's code).

    A direction that centring removes (constant over the channels) is dropped: C shrinks by one.
    """
    left, values, right = torch.linalg.svd(u.double() - u.double().mean(0), full_matrices=False)
    kept = values > _LOST * u.norm()
    # Centring leaves C - 1 singular values equal, so singular vectors are arbitrary; their product is not.
    white = left @ right if bool(kept.all()) else left[:, kept]
    return white.T * math.sqrt(len(u))


def symmetric_fastica(
    y: Tensor, start: Tensor, *, contrast: Contrast = "cube", max_iter: int = 300, tol: float = 1e-4
) -> Rotation:
    """Parallel FastICA on whitened Y [C, N], from `start` [C, C] (arXiv 2508.05239's code).

        W <- sym( g(W Y) Y^T / N - diag(mean g'(W Y)) W ),    sym(W) = (W W^T)^(-1/2) W

    until max_c | |<w_c new, w_c old>| - 1 | < tol. Stops at once when a value is not finite.
    """
    matrix = _polar(start.to(y))
    for iteration in range(1, max_iter + 1):
        response, slope = _CONTRASTS[contrast](matrix @ y)
        update = response @ y.T / y.shape[1] - slope.unsqueeze(1) * matrix
        if not bool(update.isfinite().all()):
            return Rotation(matrix, converged=False, finite=False, iterations=iteration)
        previous, matrix = matrix, _polar(update)
        change = ((matrix * previous).sum(1).abs() - 1).abs().amax()
        if float(change) < tol:
            return Rotation(matrix, converged=True, finite=True, iterations=iteration)
    return Rotation(matrix, converged=False, finite=True, iterations=max_iter)


def random_start(components: int, seed_parts: Sequence[int]) -> Tensor:
    """A random orthogonal matrix [C, C], fp64 on the CPU, the same for the same (seed, layer, group, restart).

    It has its own generator: neither other layers nor the order in which they are worked on can change it.
    """
    text = ",".join(str(int(part)) for part in seed_parts)
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(seed)
    return _polar(torch.randn(components, components, generator=generator, dtype=torch.float64))


def spatial_maps(
    signals: Tensor,
    *,
    components: int,
    restarts: int,
    seed_parts: Sequence[int],
    control: Control = "none",
    contrast: Contrast = "cube",
) -> Maps | None:
    """The maps of one layer and one group of texts, from signals [T, N].

    Up to `components` of them (see `effective_components`); `seed_parts` is (seed, layer, group), the rest as for
    `rotated_maps`. `None`: all channels are constant, or no fit was finite; skip this layer and group.

    Raises:
        NonFiniteError: NaN or infinity in `signals`.
    """
    y = whitened(leading_maps(standardised(signals), components))
    return rotated_maps(y, restarts=restarts, seed_parts=seed_parts, control=control, contrast=contrast)


def rotated_maps(
    y: Tensor, *, restarts: int, seed_parts: Sequence[int], control: Control = "none", contrast: Contrast = "cube"
) -> Maps | None:
    """Turns whitened Y [C, N] into maps: independent ones, or a control (our choice) that shows what ICA adds.

    Fits that converged go first, then the one whose largest map has the smallest L1 norm (the authors' CPU rule). When
    no fit of the cube converged, tanh gets the same starts; when none of these did either, the same rule picks from
    all finite fits of both, as a last resort (our choice). `None`: Y has no rows, or no fit was finite.

    Args:
        y: As `whitened` returns it.
        restarts: Number of random starts, at least 1 (the authors: 10 on the CPU, 1 on the GPU).
        seed_parts: The number of the restart is appended for `random_start`.
        control: "leverage_only": no rotation at all. "random_rotation": the first random start instead of ICA's.
        contrast: "cube" (the authors') or "tanh".
    """
    if not len(y):
        return None
    if control == "leverage_only":
        return Maps(_unit_rows(y), FitLog(True, 0, "none", 0), rotation_free=True)
    starts = [random_start(len(y), [*seed_parts, restart]).to(y) for restart in range(restarts)]
    if control == "random_rotation":
        return Maps(_unit_rows(starts[0] @ y), FitLog(True, 0, "none", 0))
    fits = [(symmetric_fastica(y, start, contrast=contrast), contrast) for start in starts]
    if contrast == "cube" and not any(fit.converged for fit, _ in fits):
        fits += [(symmetric_fastica(y, start, contrast="tanh"), "tanh") for start in starts]
    usable = [pair for pair in fits if pair[0].finite]
    if not usable:
        return None
    fit, used = min(usable, key=lambda pair: (not pair[0].converged, float((pair[0].matrix @ y).abs().sum(1).amax())))
    return Maps(_unit_rows(fit.matrix @ y), FitLog(fit.converged, len(fits), used, fit.iterations))


def joint_subspace(gram: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors V [T, C] and eigenvalues [C], descending, of G = sum_l Z_l Z_l^T [T, T] (our extension).

    Numerically zero ones are dropped. The rows of block l are then U_l = Z_l^T V / sqrt(eigenvalues).

    Raises:
        NonFiniteError: NaN or infinity in `gram`.
    """
    _require_finite(gram, "the sum over blocks of token by token products")
    return _top_eigenpairs(gram.to(fp64_zeros(gram, 0).device).double(), components, len(gram))


def shares(maps: Tensor, sizes: Sequence[int], quantile: float = 0.9) -> Tensor:
    """Network shares e [C, L]: how much of network c lies in block l; rows sum to 1, or to 0 (our extension).

        e_cl = sum_{i in l} z_ci^2 1[|z_ci| >= tau] / the same sum over all blocks

    `maps` is z [C, N], the channels of all blocks side by side and standardised together; `sizes` [L] sums to N. tau
    is the `quantile` of max_c |z_ci| over all i; a map that never reaches it gets zeros.
    """
    magnitude = maps.double().abs()
    tau = torch.quantile(magnitude.amax(0), quantile)
    energy = torch.where(magnitude >= tau, magnitude, 0.0).square_()
    parts = torch.stack([part.sum(1) for part in energy.split(list(sizes), dim=1)], dim=1)
    total = parts.sum(1, keepdim=True)
    return torch.where(total > 0, parts / total, 0.0)


def set_loss(shares: Tensor, weights: Tensor, blocks: Iterable[int]) -> float:
    """What removing `blocks` costs: F = sum_c w_c phi(sum_l e_cl), phi(x) = -ln(1 - x + 1e-6) (our extension).

    phi is convex: emptying one network costs more than thinning many by the same total. `shares` is e [C, L],
    `weights` w [C], non-negative, and `blocks` holds indices in L, each once, in any order.
    """
    removed = shares[:, sorted(blocks)].sum(1).clamp(max=1.0)
    return float((weights.to(shares) * -torch.log(1 - removed + _FLOOR)).sum())


def choose_blocks(
    shares: Tensor, weights: Tensor, removable: Iterable[int], count: int, *, contiguous: bool = False
) -> tuple[int, ...]:
    """`count` blocks with a small set loss, ascending (our extension); not always the smallest one.

    Adds the block with the smallest loss, `count` times; then makes the exchange that lowers the loss most, until none
    does. Equal losses: the larger index is removed. `contiguous`: the best window of consecutive blocks instead. The
    scale of `weights` does not matter.

    Raises:
        ConfigurationError: Fewer than `count` blocks, or no such window, may be removed.
    """
    candidates = sorted(set(removable), reverse=True)
    if not 0 <= count <= len(candidates):
        raise ConfigurationError(f"{count} blocks are to be removed, but {len(candidates)} may be. Protect fewer.")
    loss = partial(set_loss, shares, weights / (float(weights.sum()) or 1.0))
    chosen: tuple[int, ...] = ()
    if contiguous and count:
        spans = (tuple(range(first, first + count)) for first in candidates)
        windows = [span for span in spans if set(span) <= set(candidates)]
        if not windows:
            raise ConfigurationError(f"No {count} consecutive blocks may all be removed. Protect or remove fewer.")
        return _least(windows, loss)
    for _ in range(count):
        chosen = _least([_with(chosen, block) for block in candidates if block not in chosen], loss)
    # Every exchange lowers the loss, so this ends.
    while (better := _least([chosen, *_exchanges(chosen, candidates)], loss)) != chosen:
        chosen = better
    return chosen


def _exchanges(chosen: tuple[int, ...], candidates: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for block in (block for block in candidates if block not in chosen):
        for out in chosen:
            yield _with(tuple(kept for kept in chosen if kept != out), block)


def _with(blocks: tuple[int, ...], block: int) -> tuple[int, ...]:
    return tuple(sorted((*blocks, block)))


def _least(options: Sequence[tuple[int, ...]], loss: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    """The first of `options` that is as good as the best."""
    losses = [loss(option) for option in options]
    return next(option for option, value in zip(options, losses, strict=True) if value <= min(losses) + TIE)


def _cube(s: Tensor) -> tuple[Tensor, Tensor]:
    square = s.square()
    return square * s, 3 * square.mean(1)


def _tanh(s: Tensor) -> tuple[Tensor, Tensor]:
    response = s.tanh()
    return response, 1 - response.square().mean(1)


# s -> g(s) and the row means of g'(s)
_CONTRASTS: dict[Contrast, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"cube": _cube, "tanh": _tanh}


def _polar(matrix: Tensor) -> Tensor:
    """sym(W) = (W W^T)^(-1/2) W of square W, and M (M^T M)^(-1/2) of tall M.

    From the singular vectors, since W W^T squares the condition: with maps of one spike beside Gaussian ones, its
    eigenvectors leave the rows orthogonal to three digits only.
    """
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def _top_eigenpairs(gram: Tensor, components: int, size: int) -> tuple[Tensor, Tensor]:
    """Vectors [n, C] and values [C], descending, without those that rounding alone would explain."""
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0)[:components], vectors.flip(1)[:, :components]
    kept = values > size * torch.finfo(values.dtype).eps * values[:1]
    return vectors[:, kept], values[kept]


def _unit_rows(maps: Tensor) -> Tensor:
    centred = maps - maps.mean(1, keepdim=True)
    return centred / centred.std(1, keepdim=True)


def _require_finite(values: Tensor, what: str) -> None:
    if not bool(values.isfinite().all()):
        raise NonFiniteError(
            f"NaN or infinity appeared in {what}. Check the weights, or load the model in another dtype (float16 "
            "overflows where bfloat16 and float32 do not)."
        )
