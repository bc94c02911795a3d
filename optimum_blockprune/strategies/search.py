# SPDX-License-Identifier: Apache-2.0
"""Greedy removal and exchanges or, where maps make up for what goes, the best runs: our composition of known parts."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from optimum.utils import logging

from ..errors import ConfigurationError, PlanError
from ..greedy import Walk, named
from ..half import Half, Removal, joined_halves, name_of, names_of, sorted_halves
from ..near_best import Run, fewest_runs
from ..plan import PruningPlan
from ..run_costs import Costs, run_costs
from ..seeds import one_pass_choices
from ..steps import RACE, Steps, units_off
from .base import BLOCK, HALF_BLOCK, PruningStrategy, SearchContext


logger = logging.get_logger("optimum.blockprune.search")

CONFIDENCE = 0.999
# Runs of up to so many blocks are measured first where a budget decides after every number; our choice.
FEW = 4
# Sums of costs that are at most so many times the smallest one are as good.
AS_GOOD = 1.1


@dataclass(frozen=True)
class SearchOptions:
    """Options of the search.

    Attributes:
        swaps: Sweeps of exchanges after the greedy walk, 0 for none. A sweep tries for every removal whether another
            one in its place is better; the search ends early with a sweep that finds none.
        time_budget: Seconds after which no further step begins once there is a result (the walk, or the first part of
            the windows that judge runs, always ends); `None` for no limit. What is found by then depends on the
            machine, and so does the plan.
        seeds: Whether the exchanges begin with what `shortgpt` or `angular` choose where that is better than the walk.
        compensated: Whether to choose what costs least with maps in front of the gaps (`compensation="ridge"` or as
            asked for); `None` for where compensation is asked for. `swaps`, `seeds` and `confidence` are refused then.
        confidence: That a step does not drop its best candidate before all windows were seen; see `racing`.
    """

    swaps: int = 2
    time_budget: float | None = None
    seeds: bool = True
    compensated: bool | None = None
    confidence: float = CONFIDENCE

    def __post_init__(self) -> None:
        if isinstance(self.swaps, bool) or not isinstance(self.swaps, int) or self.swaps < 0:
            raise ConfigurationError(f"swaps={self.swaps!r} must be a whole number from 0 on.")
        if not isinstance(self.seeds, bool):
            raise ConfigurationError(f"seeds={self.seeds!r} must be true or false.")
        if self.compensated not in (None, True, False):
            raise ConfigurationError(f"compensated={self.compensated!r} must be true, false or left out.")
        limit = self.time_budget
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0):
            raise ConfigurationError(f"time_budget={limit!r} must be a number of seconds above 0.")
        confidence = self.confidence
        if isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0.5 < confidence < 1:
            raise ConfigurationError(
                f"confidence={confidence!r} must be a number above 0.5 and below 1, such as {CONFIDENCE}."
            )


class Search(PruningStrategy):
    """What costs least by the divergence from the dense model (our composition).

    Without compensation, a greedy walk as SLEB's, then exchanges of one removal for another, as long as they help:

    1. The walk: at each step the removal with the smallest loss, as a race (see `SLEB`).
    2. The choices of ShortGPT and angular, one pass each. If one has a smaller loss, the sweeps begin with it.
    3. Sweeps: each removal is taken back in turn, in an order that the seed decides, and all candidates are measured
       without the others; the best one takes its place if its loss on all windows is smaller than that of the best
       state so far. Of half-blocks, a pair whose return would leave no blocks stays.

    The loss is the KL divergence from the dense model (as EvoPress, arXiv 2410.14649, and FinerCut, arXiv 2405.18218,
    measure it) unless `objective` says otherwise. The result is never worse on its own windows than the best of these
    beginnings.

    Cost: a sweep has as many steps as there are removals, each like a step of SLEB. With a budget of quality or of
    speed (`max_kl`, ...) the walk ends where the budget does, and no exchange follows.

    With compensation, or `compensated`, the cost of every run with its map (see `run_costs`), and the set of the
    fewest runs whose sum of costs is within 10 % of the smallest one, exactly (see `fewest_runs`). Costs are known no
    better, and every gap needs a map of its own, which fits other text less well than the text that it was fitted to
    (our choice; in the spirit of the one-standard-error rule of Breiman et al., Classification and Regression Trees).
    Greedy removal is no guide there: a map makes up for a whole run nearly as well as for one block of it, so that few
    long gaps are worth more than many short ones. The loss is then the KL divergence, whatever the objective. Cost:
    see `run_costs`; there are no steps.
    """

    name: ClassVar[str] = "search"
    Options: ClassVar[type] = SearchOptions
    needs_loss: ClassVar[bool] = True
    units: ClassVar[tuple[str, ...]] = (BLOCK, HALF_BLOCK)
    objectives: ClassVar[tuple[str, ...]] = ("kl", "nll", "task")
    protect_first: ClassVar[int] = 1
    protect_last: ClassVar[int] = 1

    def select(self, context: SearchContext) -> PruningPlan:
        """See the class.

        Raises:
            NonFiniteError: The dense model has no finite loss.
            ConfigurationError: The objective is another one where maps are fitted, which are judged by the divergence;
                or no choice has a finite cost.
        """
        asked, clock = context.compensation != "none", _Clock(context)
        if asked if context.options.compensated is None else context.options.compensated:
            _refuse_ignored(context)
            return _best_runs(context, context.compensation if asked else "ridge", clock)
        walk = Walk(Steps(context, RACE, context.options.confidence, _key), "Search")
        walk.go()
        exchanges = _Exchanges(context, walk, clock)
        if not context.stepwise:
            exchanges.run()
        moved = exchanges.removed != walk.removed
        smaller = {count: walk.removed[:count] for count in range(1, len(walk.removed))} if moved else {}
        details = {**walk.details(), "greedy_loss": walk.loss, "loss": exchanges.loss, **exchanges.details()}
        return context.plan(
            exchanges.removed,
            scores=walk.scores,
            steps=() if moved else walk.steps,
            details=details,
            nested=not moved,
            smaller=smaller,
        )


def _refuse_ignored(context: SearchContext) -> None:
    """What would be ignored where maps are fitted is an error."""
    without = "leave it out, or set strategy option compensated=false."
    if context.objective != "kl":
        raise ConfigurationError(
            f"objective={context.objective!r} is not what search measures with compensation, which is the divergence "
            f"from the dense model: {without}"
        )
    for name in ("swaps", "seeds", "confidence"):
        value = getattr(context.options, name)
        if value != getattr(SearchOptions, name):
            raise ConfigurationError(f"{name}={value!r} only counts for a search without compensation: {without}")


class _Clock:
    """Knows when the time is up; of several processes, the first one's clock decides for all.

    Attributes:
        ran_out: Whether it was.
    """

    def __init__(self, context: SearchContext) -> None:
        limit = context.options.time_budget
        self._team, self._end = context.team, None if limit is None else time.monotonic() + limit
        self.ran_out = False

    def over(self) -> bool:
        """Looks, unless it is known."""
        end = self._end
        if end is not None and not self.ran_out:
            over = self._team.from_first(lambda: {"over": torch.tensor(time.monotonic() >= end)})
            self.ran_out = bool(over["over"])
        return self.ran_out


def _best_runs(context: SearchContext, compensation: str, clock: _Clock) -> PruningPlan:
    """Few runs whose costs with maps have a sum near the smallest one, for every number of blocks.

    Where a budget decides after every number, runs are measured up to a few blocks at first, and up to twice as many
    each time that it goes on.
    """
    first: Costs = {}
    whole: Costs = {}
    found: dict[int, list[Run]] = {}
    asked, most = 0, min(FEW, context.num_remove) if context.stepwise else context.num_remove
    while True:
        costs = run_costs(replace(context, num_remove=most), compensation, clock.over)
        # What was asked about is not chosen anew.
        first, whole = costs.first | first, costs.whole | whole
        found = fewest_runs(costs.whole, most, step=context.row.per_block, slack=AS_GOOD) | found
        runs = _Runs(context, compensation, first, whole, found, clock)
        if not context.stepwise:
            return runs.plan(most)
        for count in range(asked + 1, most + 1):
            if not context.go_on(runs.removals(count)):
                return runs.plan(count)
        asked, most = most, min(2 * most, context.num_remove)


@dataclass(frozen=True)
class _Runs:
    """What was chosen for every number of blocks; for the costs see `RunCosts`."""

    context: SearchContext
    compensation: str
    first: Costs
    whole: Costs
    found: Mapping[int, Sequence[Run]]
    clock: _Clock

    def removals(self, count: int) -> list[Removal]:
        """What goes, the cheapest run first.

        Raises:
            ConfigurationError: No choice of so many blocks has a finite cost.
        """
        if count not in self.found:
            raise ConfigurationError(
                f"Every choice of {count} blocks has a run whose divergence is not finite; ask for fewer."
            )
        ordered = sorted(self.found[count], key=self.whole.__getitem__)
        return [each for run in ordered for each in self._of(run)]

    def plan(self, count: int) -> PruningPlan:
        """The plan that removes so many blocks, and knows the choices of fewer."""
        removed = self.removals(count)
        total = math.fsum(self.whole[run] for run in self.found[count])
        logger.info(
            f"{len(self.found[count])} runs; their divergences with maps add up to {total:.4f} nats per token."
        )
        return self.context.plan(
            removed,
            scores={self._of(run)[0]: cost for run, cost in self.first.items() if run[1] == 1 and math.isfinite(cost)},
            steps=[{"run": names_of(self._of(run)), "kl": self.whole[run]} for run in self.found[count]],
            details={
                "chosen_with": self.compensation,
                "additive_kl": total,
                "runs_measured": len(self.first),
                "runs_judged_on_all": len(self.whole),
                "out_of_time": self.clock.ran_out,
            },
            nested=False,
            smaller={few: self.removals(few) for few in self.found if few < count},
        )

    def _of(self, run: Run) -> list[Removal]:
        row = self.context.row
        return row.removals(range(run[0], run[0] + run[1] * row.per_block))


class _Exchanges:
    """Takes removals back and looks for better ones.

    Attributes:
        removed: The best state so far.
        loss: Its loss on all windows.
        accepted: The exchanges that made it, as JSON objects.
    """

    def __init__(self, context: SearchContext, walk: Walk, clock: _Clock) -> None:
        self.context, self.walk, self.removed, self.loss = context, walk, list(walk.removed), walk.loss
        self.accepted: list[dict[str, Any]] = []
        self._clock, self._sweeps, self._tried, self._seeds = clock, 0, set(), {}

    def run(self) -> None:
        """Sweeps, from the best beginning, until nothing helps any more, or sweeps or time are used up."""
        if self.context.options.seeds and not self._clock.over():
            self._begin(one_pass_choices(self.context))
        generator = torch.Generator().manual_seed(self.context.seed)
        for number in range(1, self.context.options.swaps + 1):
            before = len(self.accepted)
            order = torch.randperm(len(self.removed), generator=generator).tolist()
            for removal in [self.removed[place] for place in order]:
                if self._clock.over():
                    return
                self._exchange(removal, number)
            self._sweeps = number
            if len(self.accepted) == before:
                return

    def details(self) -> dict[str, Any]:
        """What the plan says of it."""
        return {
            "seeds": self._seeds,
            "exchanges": self.accepted,
            "sweeps": self._sweeps,
            "out_of_time": self._clock.ran_out,
        }

    def _begin(self, seeds: Mapping[str, list[Removal]]) -> None:
        for name, removed in seeds.items():
            loss = self.walk.measured.loss(removed)
            if not math.isfinite(loss):
                continue
            self._seeds[name] = loss
            if loss < self.loss:
                self.removed, self.loss = removed, loss
                logger.info(f"The choice of '{name}' is a better beginning; {self.walk.words(loss)}")

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
