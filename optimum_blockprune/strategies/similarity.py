# SPDX-License-Identifier: Apache-2.0
"""One-pass baselines by similarity of hidden states: ShortGPT (Block Influence) and angular distance (Gromov et al.).

Both look at directions only: a block that rescales the residual stream looks idle. Both measure the dense model once
and never again after a removal. Neither protects a block by default, as published.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..batches import Batch
from ..errors import ConfigurationError, nearest
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
from .base import PruningStrategy, SearchContext


TOKENS: dict[str, Callable[[Tensor], Tensor]] = {"last": last_tokens, "all": real_tokens}


class ShortGPT(PruningStrategy):
    """Removes the blocks that turn the hidden state least (ShortGPT, arXiv 2403.03853).

    1. One forward pass: Block Influence of each block, 1 - mean cosine of its input and output, over all tokens that
       are not padding (the paper's definition; the first token counts).
    2. Remove the blocks with the lowest values, lowest first; equal values by index.
    """

    name: ClassVar[str] = "shortgpt"

    def select(self, context: SearchContext) -> PruningPlan:
        """See the class. Raises `NonFiniteError` when a hidden state is NaN or infinite."""
        influence = _mean_distances(context, [1], block_influence, real_tokens)[1]
        removed = sorted(context.removable, key=lambda block: (influence[block], block))[: context.num_remove]
        steps = [{"block": block, "block_influence": influence[block]} for block in removed]
        return context.plan(removed, scores=dict(enumerate(influence)), steps=steps, nested=True)


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
    """

    name: ClassVar[str] = "angular"
    Options: ClassVar[type] = AngularOptions

    def select(self, context: SearchContext) -> PruningPlan:
        """See the class.

        Raises:
            ConfigurationError: No run of `num_remove` consecutive blocks is free of protected blocks.
            NonFiniteError: A hidden state is NaN or infinite.
        """
        length, removable = context.num_remove, set(context.removable)
        lengths = range(1, length + 1)
        starts = {
            n: [start for start in context.removable if removable.issuperset(range(start, start + n))] for n in lengths
        }
        if not starts[length]:
            raise ConfigurationError(
                f"angular removes consecutive blocks, and no {length} consecutive blocks are removable among "
                f"{list(context.removable)}. Ask for fewer blocks or protect fewer."
            )
        distances = _mean_distances(context, lengths, angular_distance, TOKENS[context.options.tokens])
        best = {n: min(starts[n], key=lambda start, n=n: (distances[n][start], start)) for n in lengths}
        runs = {n: range(best[n], best[n] + n) for n in lengths}
        steps = [{"start": best[length], "length": length, "distance": distances[length][best[length]]}]
        return context.plan(
            runs.pop(length),
            scores=dict(enumerate(distances[1])),
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
    """By gap: entry a is the mean distance between boundary a and the one `gap` blocks later, over the tokens."""
    windows, runner = context.require_windows(), context.runner
    with context.progress(windows.num_windows, "Similarity") as bar:

        def measure(size: int) -> dict[str, Tensor]:
            sums = BoundaryDistance(gaps, distance)

            def watch(_start: int, batch: Batch) -> Visit:
                return sums.watch(tokens(runner.positions(batch)))

            held = sums.span * (1 / windows.seqlen if tokens is last_tokens else 1)
            stream(runner, context.batches(size), watch, copies=held, done=bar.update)
            return sums.sums(runner.num_blocks)

        found = context.measured("similarity", measure)
    means = {gap: (found[str(gap)] / found["tokens"]).tolist() for gap in gaps}
    if not all(math.isfinite(mean) for each in means.values() for mean in each):
        raise_non_finite(context.runner.diagnose, windows.batches(context.batch_size))
    return means
