# SPDX-License-Identifier: Apache-2.0
"""One-pass baselines by similarity of hidden states: ShortGPT (Block Influence) and angular distance (Gromov et al.).

Both look at directions only: a block that rescales the residual stream looks idle. Both measure the dense model once
and never again after a removal. Neither protects a block by default, as published.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..batches import Batch
from ..errors import ConfigurationError, nearest
from ..half import name_of
from ..measures import (
    BoundaryDistance,
    angular_distance,
    block_influence,
    last_tokens,
    raise_non_finite,
    real_tokens,
)
from ..passes import Visit, stream
from ..plan import PruningPlan
from .base import BLOCK, HALF_BLOCK, PruningStrategy, SearchContext
from .selection import best_disjoint_runs


TOKENS: dict[str, Callable[[Tensor], Tensor]] = {"last": last_tokens, "all": real_tokens}


class ShortGPT(PruningStrategy):
    """Removes the blocks that turn the hidden state least (ShortGPT, arXiv 2403.03853).

    1. One forward pass: Block Influence of each block, 1 - mean cosine of its input and output, over all tokens that
       are not padding (the paper's definition; the first token counts).
    2. Remove the blocks with the lowest values, lowest first; equal values by index.

    Half-blocks (our choice): the influence of every pair of neighbours, whole blocks among them. Pairs overlap, so the
    N disjoint ones with the smallest sum go, found exactly (dynamic programming), lowest first. That sum is at most
    that of the N lowest blocks. Choices for different N need not be nested; the plan lists each.
    """

    name: ClassVar[str] = "shortgpt"
    units: ClassVar[tuple[str, ...]] = (BLOCK, HALF_BLOCK)

    def select(self, context: SearchContext) -> PruningPlan:
        """See the class. Raises `NonFiniteError` when a hidden state is NaN or infinite."""
        influence = _mean_distances(context, [1], block_influence, real_tokens)[1]
        if context.unit == HALF_BLOCK:
            return _least_pairs(context, influence)
        removed = sorted(context.removable, key=lambda block: (influence[block], block))[: context.num_remove]
        steps = [{"block": block, "block_influence": influence[block]} for block in removed]
        return context.plan(removed, scores=dict(enumerate(influence)), steps=steps, nested=True)


def _least_pairs(context: SearchContext, influence: Sequence[float]) -> PruningPlan:
    """Removes the disjoint pairs of halves with the smallest sum of `influence`, by first half."""
    row = context.row

    def kept(start: int, length: int) -> float:
        return -math.fsum(influence[start : start + length : row.per_block])

    found = best_disjoint_runs(
        kept, removable=row.free(context.removable), num_remove=context.num_remove, step=row.per_block
    )
    scores = row.scores(influence)
    chosen = {count: sorted(row.removals(each.order), key=scores.__getitem__) for count, each in found.items()}
    removed = chosen.pop(context.num_remove)
    steps = [{"block": name_of(each), "block_influence": scores[each]} for each in removed]
    return context.plan(removed, scores=scores, steps=steps, nested=False, smaller=chosen)


@dataclass(frozen=True)
class AngularOptions:
    """Options of the angular strategy.

    Attributes:
        tokens: `"last"` compares the last token of each window that is not padding, as published; `"all"` every
            token that is not padding (ours; holds as many states of one batch as blocks are removed).
    """

    tokens: str = "last"

    def __post_init__(self) -> None:
        if self.tokens not in TOKENS:
            raise ConfigurationError(f"Unknown tokens {self.tokens!r} for angular.{nearest(str(self.tokens), TOKENS)}")


class Angular(PruningStrategy):
    """Removes the one run of blocks whose ends are closest in angle (Gromov et al., arXiv 2403.17887).

    1. One forward pass: for every start a, the mean of arccos(cos) / pi between the states before block a and before
       block a + num_remove.
    2. Remove the run with the smallest value; equal values by index. Only runs without a protected block compete.

    The same pass compares shorter runs, so that the plan also knows the best run of every smaller number of blocks.

    Half-blocks (our choice): the runs are those of 2 x `num_remove` halves, which may begin within a block.
    """

    name: ClassVar[str] = "angular"
    units: ClassVar[tuple[str, ...]] = (BLOCK, HALF_BLOCK)
    Options: ClassVar[type] = AngularOptions

    def select(self, context: SearchContext) -> PruningPlan:
        """See the class.

        Raises:
            ConfigurationError: No run of `num_remove` consecutive blocks is free of protected blocks.
            NonFiniteError: A hidden state is NaN or infinite.
        """
        length, row = context.num_remove, context.row
        lengths = range(1, length + 1)
        starts = {n: row.starts(context.removable, n) for n in lengths}
        if not starts[length]:
            raise ConfigurationError(
                f"angular removes consecutive blocks, and no {length} consecutive blocks are removable among "
                f"{list(context.removable)}. Ask for fewer blocks or protect fewer."
            )
        distances = _mean_distances(context, lengths, angular_distance, TOKENS[context.options.tokens])
        best = {n: min(starts[n], key=lambda start, n=n: (distances[n][start], start)) for n in lengths}
        runs = {n: row.removals(range(best[n], best[n] + n * row.per_block)) for n in lengths}
        steps = [{"start": row.name(best[length]), "length": length, "distance": distances[length][best[length]]}]
        return context.plan(
            runs.pop(length),
            scores=row.scores(distances[1]),
            steps=steps,
            details={"distances": distances[length]},
            nested=False,
            smaller=runs,
        )


def _mean_distances(
    context: SearchContext,
    gaps: Collection[int],
    distance: Callable[[Tensor, Tensor], Tensor],
    tokens: Callable[[Tensor], Tensor],
) -> dict[int, list[float]]:
    """By gap: entry a is the mean distance between boundary a and the one `gap` blocks later, over the tokens.

    Boundaries are those of `context.row`: with half-blocks, there are some within blocks.
    """
    windows, runner, row = context.require_windows(), context.runner, context.row
    with context.progress(windows.num_windows, "Similarity") as bar:

        def measure(size: int) -> dict[str, Tensor]:
            sums = BoundaryDistance([row.per_block * gap for gap in gaps], distance)

            def watch(_start: int, batch: Batch) -> Visit:
                return sums.watch(tokens(runner.positions(batch)))

            held = sums.span * (1 / windows.seqlen if tokens is last_tokens else 1)
            stream(runner, context.batches(size), watch, copies=held, done=bar.update, per_block=row.per_block)
            return sums.sums(row.pieces)

        found = context.measured("similarity", measure)
    means = {gap: (found[str(row.per_block * gap)] / found["tokens"]).tolist() for gap in gaps}
    if not all(math.isfinite(mean) for each in means.values() for mean in each):
        raise_non_finite(context.runner.diagnose, windows.batches(context.batch_size))
    return means
