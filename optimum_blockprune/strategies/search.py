# SPDX-License-Identifier: Apache-2.0
"""Greedy removal, then local search by exchanges: our composition of published parts."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from optimum.utils import logging

from ..errors import ConfigurationError, PlanError
from ..greedy import Walk, named
from ..half import Half, Removal, joined_halves, name_of, sorted_halves
from ..plan import PruningPlan
from ..steps import RACE, Steps, units_off
from .base import BLOCK, HALF_BLOCK, PruningStrategy, SearchContext


logger = logging.get_logger("optimum.blockprune.search")

CONFIDENCE = 0.999


@dataclass(frozen=True)
class SearchOptions:
    """Options of the search.

    Attributes:
        swaps: Sweeps of exchanges after the greedy walk, 0 for none. A sweep tries for every removal whether another
            one in its place is better; the search ends early with a sweep that finds none.
        time_budget: Seconds after which no further step begins once there is a result (the walk always ends); `None`
            for no limit. What is found by then depends on the machine, and so does the plan.
        confidence: That a step does not drop its best candidate before all windows were seen; see `racing`.
    """

    swaps: int = 2
    time_budget: float | None = None
    confidence: float = CONFIDENCE

    def __post_init__(self) -> None:
        if isinstance(self.swaps, bool) or not isinstance(self.swaps, int) or self.swaps < 0:
            raise ConfigurationError(f"swaps={self.swaps!r} must be a whole number from 0 on.")
        limit = self.time_budget
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0):
            raise ConfigurationError(f"time_budget={limit!r} must be a number of seconds above 0.")
        confidence = self.confidence
        if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0.5 < confidence < 1:
            raise ConfigurationError(
                f"confidence={confidence!r} must be a number above 0.5 and below 1, such as {CONFIDENCE}."
            )


class Search(PruningStrategy):
    """A greedy walk as SLEB's, then exchanges of one removal for another, as long as they help (our composition).

    1. The walk: at each step the removal with the smallest loss, as a race (see `SLEB`).
    2. Sweeps: each removal is taken back in turn, in an order that the seed decides, and all candidates are measured
       without the others; the best one takes its place if its loss on all windows is smaller than that of the best
       state so far. Of half-blocks, a pair whose return would leave no blocks stays.

    The loss is the KL divergence from the dense model (as EvoPress, arXiv 2410.14649, and FinerCut, arXiv 2405.18218,
    measure it) unless `objective` says otherwise. The result is never worse on its own windows than the greedy walk.

    Cost: a sweep has as many steps as there are removals, each like a step of SLEB. With a budget of quality or of
    speed (`max_kl`, ...) the walk ends where the budget does, and no exchange follows.
    """

    name: ClassVar[str] = "search"
    Options: ClassVar[type] = SearchOptions
    needs_loss: ClassVar[bool] = True
    units: ClassVar[tuple[str, ...]] = (BLOCK, HALF_BLOCK)
    objectives: ClassVar[tuple[str, ...]] = ("kl", "nll")
    protect_first: ClassVar[int] = 1
    protect_last: ClassVar[int] = 1

    def select(self, context: SearchContext) -> PruningPlan:
        """See the class. Raises `NonFiniteError` when the dense model has no finite loss."""
        end = None if context.options.time_budget is None else time.monotonic() + context.options.time_budget
        walk = Walk(Steps(context, RACE, context.options.confidence, _key), "Search")
        walk.go()
        exchanges = _Exchanges(context, walk, end)
        if not context.stepwise:
            exchanges.run()
        smaller = {count: walk.removed[:count] for count in range(1, len(walk.removed))} if exchanges.accepted else {}
        details = {**walk.details(), "greedy_loss": walk.loss, "loss": exchanges.loss, **exchanges.details()}
        return context.plan(
            exchanges.removed,
            scores=walk.scores,
            steps=walk.steps if not exchanges.accepted else (),
            details=details,
            nested=not exchanges.accepted,
            smaller=smaller,
        )


class _Exchanges:
    """Takes removals back and looks for better ones.

    Attributes:
        removed: The best state so far.
        loss: Its loss on all windows.
        accepted: The exchanges that made it, as JSON objects.
    """

    def __init__(self, context: SearchContext, walk: Walk, end: float | None) -> None:
        self.context, self.walk, self.removed, self.loss = context, walk, list(walk.removed), walk.loss
        self.accepted: list[dict[str, Any]] = []
        self._end, self._cut, self._sweeps, self._tried = end, False, 0, set()

    def run(self) -> None:
        """Sweeps until nothing helps any more, or sweeps or time are used up."""
        generator = torch.Generator().manual_seed(self.context.seed)
        for number in range(1, self.context.options.swaps + 1):
            before = len(self.accepted)
            order = torch.randperm(len(self.removed), generator=generator).tolist()
            for removal in [self.removed[place] for place in order]:
                if self._over():
                    return
                self._exchange(removal, number)
            self._sweeps = number
            if len(self.accepted) == before:
                return

    def details(self) -> dict[str, Any]:
        """What the plan says of it."""
        return {"exchanges": self.accepted, "sweeps": self._sweeps, "out_of_time": self._cut}

    def _over(self) -> bool:
        """Whether the time is used up; of several processes, the first one's clock decides for all."""
        end = self._end
        if end is not None:
            self._cut = self._cut or self.context.team.from_first(lambda: time.monotonic() >= end)
        return self._cut

    def _exchange(self, removal: Removal, sweep: int) -> None:
        rest = [each for each in self.removed if each != removal]
        state = _state(rest)
        # A state without one of its removals was measured completely before.
        if state in self._tried or not _makes_blocks(self.context.runner.num_blocks, rest):
            return
        self._tried.add(state)
        losses, _ = self.walk.measured.step(rest, f"Exchange {name_of(removal)}", with_dense=False)
        best = min(losses, key=losses.__getitem__)
        if not losses[best] < self.loss:
            return
        self.removed, self.loss = [*rest, best], losses[best]
        self.accepted.append(
            {
                "sweep": sweep,
                "back": name_of(removal),
                "block": name_of(best),
                "loss": self.loss,
                "candidates": named(losses),
            }
        )
        logger.info(f"Exchanged {name_of(removal)} for {name_of(best)}; {self.walk.words(self.loss)}")


def _makes_blocks(num_blocks: int, removed: Sequence[Removal]) -> bool:
    """Whether what is left are blocks: a pair may lie inside another one that went later."""
    try:
        joined_halves(num_blocks, sorted_halves(removed))
    except PlanError:
        return False
    return True


def _state(removed: Sequence[Removal]) -> frozenset[int | Half]:
    return frozenset(sorted_halves(removed))


def _key(removed: Sequence[Removal]) -> str:
    """States are told apart by what is gone, whatever the order."""
    names = sorted(str(unit) for unit in sorted_halves(removed))
    return f"search-{len(units_off(removed))}-{hashlib.sha256(' '.join(names).encode()).hexdigest()[:16]}"
