# SPDX-License-Identifier: Apache-2.0
"""SLEB: greedy removal by the loss of the whole model (arXiv 2402.09025, ICML 2024), exact and without waste."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigurationError, nearest
from ..greedy import Walk
from ..half import Removal
from ..plan import PruningPlan
from ..steps import Steps
from .base import BLOCK, HALF_BLOCK, PruningStrategy, SearchContext


# "prefix" is the earlier name of "exact".
SEARCHES = ("exact", "race", "naive", "prefix")
CONFIDENCE = 0.999


@dataclass(frozen=True)
class SLEBOptions:
    """Options of SLEB.

    Attributes:
        search: `"exact"` (earlier name: `"prefix"`) runs, for candidate j, only what comes after block j, from the
            shared hidden states before it. `"race"` does so on growing parts of the same windows and drops
            candidates that cannot win any more. `"naive"` is the published procedure, a whole forward pass per
            candidate: the reference that the tests and the benchmark compare with. Exact and naive choose the same
            blocks; race does in each step with the stated confidence.
        confidence: Of a race: the probability that a step does not drop the block that an exact search would choose,
            between 0.5 and 1, 0.999 unless given; see `racing` for what is assumed. No other search takes it.
    """

    search: str = "exact"
    confidence: float | None = None

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise ConfigurationError(f"Unknown search {self.search!r} for sleb.{nearest(str(self.search), SEARCHES)}")
        if self.search != "race":
            if self.confidence is not None:
                raise ConfigurationError(
                    f"confidence={self.confidence!r} belongs to search='race'; search={self.search!r} drops no "
                    "candidate early. Leave it out, or set search=race."
                )
            return
        confidence = CONFIDENCE if self.confidence is None else self.confidence
        if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0.5 < confidence < 1:
            raise ConfigurationError(
                f"confidence={confidence!r} must be a number above 0.5 and below 1, such as {CONFIDENCE}."
            )
        object.__setattr__(self, "confidence", float(confidence))


class SLEB(PruningStrategy):
    """Greedy by the model's loss, re-measured after every removal (SLEB).

    1. For every removable block that is still there: the loss of the model without it and without those removed
       before, summed over all calibration windows.
    2. Remove the block with the smallest loss; on a tie the one with the lowest index (strict comparison, as
       released).
    3. Repeat until enough blocks are gone. The first and the last block stay, as in the released code.

    The loss is the mean next-token NLL (nats per prediction); with objective "kl", our choice, the mean KL divergence
    of the predictions from those of the dense model (see `losses`), with "task" the NLL of completions alone (see
    `completions`). The released code sums window means times the
    window length, which orders candidates in the same way because all its windows are full.

    Cost of a step with n blocks left and c candidates between them: the shared prefix once, and per candidate the
    blocks after it; about half of the naive c * (n - 1) block-forwards per window. A race pays that for a part of the
    windows, and for the others only the candidates that can still win. The prefix before the block removed last is not
    run again in the next step. Memory: one batch of hidden states for the prefix, one for the running branch, at most
    256 MiB of prefixes for the next step, and the logits of at most 1,024 predictions.
    """

    name: ClassVar[str] = "sleb"
    Options: ClassVar[type] = SLEBOptions
    needs_loss: ClassVar[bool] = True
    units: ClassVar[tuple[str, ...]] = (BLOCK, HALF_BLOCK)
    objectives: ClassVar[tuple[str, ...]] = ("nll", "kl", "task")
    protect_first: ClassVar[int] = 1
    protect_last: ClassVar[int] = 1

    def select(self, context: SearchContext) -> PruningPlan:
        """See the class. Raises `NonFiniteError` when the dense model has no finite loss."""
        options = context.options
        walk = Walk(Steps(context, options.search, options.confidence, _key), "SLEB")
        walk.go()
        details = {**walk.details(), "naive_block_forwards": walk.measured.naive_block_forwards}
        return context.plan(walk.removed, scores=walk.scores, steps=walk.steps, details=details, nested=True)


def _key(removed: Sequence[Removal]) -> str:
    """Steps are told apart by their number: what went before follows from it."""
    return f"sleb-{len(removed) + 1}"
