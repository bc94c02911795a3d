# SPDX-License-Identifier: Apache-2.0
"""SLEB: greedy removal by the loss of the whole model (arXiv 2402.09025, ICML 2024), exact and without waste."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from optimum.utils import logging
from torch import Tensor

from ..batches import Batch
from ..errors import ConfigurationError, NonFiniteError, nearest
from ..losses import perplexity_of
from ..plan import PruningPlan
from ..runner import BlockOutput, BlockRunner
from .base import PruningStrategy, SearchContext


logger = logging.get_logger("optimum.blockprune.sleb")

SEARCHES = ("prefix", "naive")

# A block (None: the model as it is), its summed loss and the number of predictions.
_Measured = tuple[int | None, tuple[Tensor, int]]


@dataclass(frozen=True)
class SLEBOptions:
    """Options of SLEB.

    Attributes:
        search: `"prefix"` runs, for candidate j, only what comes after block j, from the shared hidden states
            before it. `"naive"` is the published procedure, a whole forward pass per candidate: the reference that
            the tests and the benchmark compare with. Both choose the same blocks.
    """

    search: str = "prefix"

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise ConfigurationError(f"Unknown search {self.search!r} for sleb.{nearest(str(self.search), SEARCHES)}")


class SLEB(PruningStrategy):
    """Greedy by the model's loss, re-measured after every removal (SLEB).

    1. For every removable block that is still there: the loss of the model without it and without those removed
       before, summed over all calibration windows.
    2. Remove the block with the smallest loss; on a tie the one with the lowest index (strict comparison, as
       released).
    3. Repeat until enough blocks are gone. The first and the last block stay, as in the released code.

    The loss is the mean next-token NLL (nats per prediction). The released code sums window means times the window
    length, which orders candidates in the same way because all its windows are full.

    Cost of a step with n blocks left and c candidates between them: the shared prefix once, and per candidate the
    blocks after it; about half of the naive c * (n - 1) block-forwards per window. Memory: one batch of hidden
    states for the prefix and one for the running branch.
    """

    name: ClassVar[str] = "sleb"
    Options: ClassVar[type] = SLEBOptions
    needs_loss: ClassVar[bool] = True
    protect_first: ClassVar[int] = 1
    protect_last: ClassVar[int] = 1

    def select(self, context: SearchContext) -> PruningPlan:
        """See the class. Raises `NonFiniteError` when the dense model has no finite loss."""
        search = _Search(context)
        dense: float | None = None
        removed: list[int] = []
        steps: list[dict[str, object]] = []
        scores: dict[int, float] = {}
        for number in range(1, context.num_remove + 1):
            losses = search.step(removed, f"SLEB {number}/{context.num_remove}", with_dense=dense is None)
            dense = losses.pop(None, dense)
            scores = scores or losses
            # min() keeps the first of equals and the candidates ascend: a tie goes to the lowest index.
            best = min(losses, key=losses.__getitem__)
            removed.append(best)
            loss = losses[best]
            steps.append(
                {"block": best, "loss": loss, "perplexity": perplexity_of(loss), "candidates": _named(losses)}
            )
            logger.info(
                f"SLEB {number}/{context.num_remove}: removed block {best}; loss {loss:.4f}, perplexity "
                f"{perplexity_of(loss):.2f} (dense {perplexity_of(dense):.2f})"
            )
        details = {"objective": "nll", "dense_loss": dense, "naive_block_forwards": search.naive_block_forwards}
        return context.plan(removed, scores=scores, steps=steps, details=details, nested=True)


class _Search:
    """Measures the candidates of one greedy step, batch by batch."""

    def __init__(self, context: SearchContext) -> None:
        self.context = context
        self.runner = context.runner
        self.windows = context.require_windows()
        self.naive_block_forwards = 0
        if context.options.search == "prefix":
            first = next(iter(self.windows.batches(1)))
            # A runner of its own: these few tokens are no calibration window and do not count as one.
            runner = BlockRunner(self.runner.model, self.runner.stack.layout.stack)
            runner.check_replay(first.beginning())

    def step(self, removed: list[int], title: str, *, with_dense: bool) -> dict[int | None, float]:
        """Returns the loss (nats per prediction) by candidate; key `None` is the model as it is, where asked."""
        candidates = [block for block in self.context.removable if block not in removed]
        wanted: list[int | None] = [*candidates, *([None] if with_dense else [])]
        measure = self._naive if self.context.options.search == "naive" else self._prefix
        totals: dict[int | None, Tensor] = {}
        predictions: dict[int | None, int] = {}
        batches = math.ceil(self.windows.num_windows / self.context.batch_size)
        with self.context.progress(batches * len(wanted), title) as bar:
            for batch in self.windows.batches(self.context.batch_size):
                for block, (loss, count) in measure(batch, removed, wanted):
                    # Summed on the device: reading a value here would stall it once per candidate.
                    totals[block] = totals[block] + loss if block in totals else loss
                    predictions[block] = predictions.get(block, 0) + count
                    bar.update()
        alive = self.runner.num_blocks - len(removed)
        spent = len(candidates) * (alive - 1) + (alive if with_dense else 0)
        self.naive_block_forwards += spent * self.windows.num_windows
        means = {block: totals[block].item() / predictions[block] for block in wanted}
        return self._finite(means, removed)

    def _naive(self, batch: Batch, removed: list[int], wanted: list[int | None]) -> Iterator[_Measured]:
        for block in wanted:
            yield block, self.runner.nll(batch, removed if block is None else [*removed, block])

    def _prefix(self, batch: Batch, removed: list[int], wanted: list[int | None]) -> Iterator[_Measured]:
        """Walks the trunk once; at every candidate, branches off past it to the end."""
        left = set(wanted)
        state: BlockOutput | None = None
        for block in range(self.runner.num_blocks):
            if block in removed:
                continue
            if block in left:
                left.remove(block)
                yield block, self.runner.nll(batch, [*removed, block], state)
            if not left:
                return
            state = self.runner.run_to(batch, block, removed, state)
        yield None, self.runner.nll(batch, removed, state)

    def _finite(self, means: dict[int | None, float], removed: list[int]) -> dict[int | None, float]:
        """Drops candidates without a finite loss; raises when the model itself or all of them have none."""
        finite = {block: loss for block, loss in means.items() if math.isfinite(loss)}
        lost = [block for block in means if block not in finite]
        if None in lost or not set(finite) - {None}:
            for batch in self.windows.batches(self.context.batch_size):
                self.runner.diagnose(batch, removed)
            raise NonFiniteError(
                f"The loss is NaN or infinite although every block's output is finite (without {removed}): the "
                "final norm or the head overflows. Load the model in another dtype."
            )
        if lost:
            logger.warning(f"Without block {lost} the loss is not finite; not removing any of these in this step.")
        return finite


def _named(losses: dict[int | None, float]) -> dict[str, float]:
    """Candidates by name: JSON objects have string keys."""
    return {str(block): loss for block, loss in losses.items()}
