# SPDX-License-Identifier: Apache-2.0
"""SLEB: greedy removal by the loss of the whole model (arXiv 2402.09025, ICML 2024), exact and without waste."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from optimum.utils import logging
from torch import Tensor

from ..batches import Batch, CalibrationWindows
from ..branching import Branches, Measured, head_losses
from ..errors import ConfigurationError, NonFiniteError, nearest
from ..half import Removal, Unit, blocks_off, name_of, units_of
from ..losses import perplexity_of, predicted
from ..passes import branches, in_order_of_blocks
from ..plan import PruningPlan
from ..racing import CELL, Tally, cells_of, looks, shared_error
from ..teacher import tail_mass
from .base import BLOCK, HALF_BLOCK, PruningStrategy, SearchContext


logger = logging.get_logger("optimum.blockprune.sleb")

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
    of the predictions from those of the dense model (see `losses`). The released code sums window means times the
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
    objectives: ClassVar[tuple[str, ...]] = ("nll", "kl")
    protect_first: ClassVar[int] = 1
    protect_last: ClassVar[int] = 1

    def select(self, context: SearchContext) -> PruningPlan:
        """See the class. Raises `NonFiniteError` when the dense model has no finite loss."""
        search, objective = _Search(context), context.objective or self.objectives[0]
        dense: float | None = None
        removed: list[Removal] = []
        steps: list[dict[str, Any]] = []
        scores: dict[Removal, float] = {}
        for number in range(1, context.num_remove + 1):
            losses, dropped = search.step(removed, f"SLEB {number}/{context.num_remove}", with_dense=dense is None)
            dense = losses.pop(None, dense)
            scores = scores or losses
            # min() keeps the first of equals and the candidates ascend: a tie goes to the lowest index.
            best = min(losses, key=losses.__getitem__)
            removed.append(best)
            loss = losses[best]
            step = {"block": name_of(best), "loss": loss, "candidates": _named(losses)}
            words = f"loss {loss:.4f}"
            if objective == "nll":
                step["perplexity"] = perplexity_of(loss)
                words += f", perplexity {perplexity_of(loss):.2f} (dense {perplexity_of(dense):.2f})"
            elif objective == "kl":
                words = f"KL(dense || pruned) {loss:.4f} nats per token"
            steps.append({**step, "dropped": _named(dropped)} if search.looks else step)
            logger.info(f"SLEB {number}/{context.num_remove}: removed block {name_of(best)}; {words}")
            if not context.go_on(removed):
                break
        details = {
            "objective": objective,
            **_kept(search.windows),
            "dense_loss": dense,
            "naive_block_forwards": search.naive_block_forwards,
        }
        if context.options.search == "race":
            details["race"] = {"looks": list(search.looks), "windows": search.windows.num_windows, "cell": CELL}
        return context.plan(removed, scores=scores, steps=steps, details=details, nested=True)


class _Search:
    """Measures the candidates of one greedy step, part by part of the windows.

    Attributes:
        looks: Numbers of windows after which a race drops candidates; empty for the other searches.
    """

    def __init__(self, context: SearchContext) -> None:
        self.context = context
        self.windows = context.require_windows()
        self.naive_block_forwards = 0
        self.looks = looks(self.windows.num_windows) if context.options.search == "race" else ()
        self._parts = _parts(self.windows, self.looks, context.seed)
        self._branches = Branches(context.runner)
        if context.options.search != "naive":
            self._branches.check(next(iter(self.windows.batches(1))).beginning())

    def step(
        self, removed: list[Removal], title: str, *, with_dense: bool
    ) -> tuple[dict[Removal | None, float], dict[Removal, int]]:
        """Measures all candidates of a step.

        Returns:
            The loss (nats per prediction, all windows) by candidate, key `None` is the model as it is, where asked;
            and for those that a race dropped the number of tokens that it took.
        """
        off = _units(removed)
        candidates = self.context.removals(off)
        tally = Tally([*candidates, *([None] if with_dense else [])])
        dropped: dict[Removal, int] = {}
        self._branches.begin(removed)
        batches = [math.ceil(part.num_windows / self.context.batch_size) for part in self._parts]
        with self.context.progress(sum(batches) * len(tally.sums), title) as bar:
            done = 0
            for number in range(1, len(self._parts) + 1):
                self._measure(number, removed, tally, bar.update)
                done += batches[number - 1] * len(tally.sums)
                if number < len(self._parts):
                    measured = len(tally.sums)
                    dropped.update(self._losers(tally, off, len(candidates)))
                    done += sum(batches[number:]) * (measured - len(tally.sums))
                # What was read back, or measured by another process, counts as done.
                bar.update(max(0, done - bar.n))
        self._count_naive(candidates, off, with_dense)
        return self._finite(tally.means(), off), dropped

    def _measure(self, number: int, removed: list[Removal], tally: Tally, update: Callable[[], Any]) -> None:
        """Adds part `number` of the windows to the tally."""
        part, wanted = self._parts[number - 1], list(tally.sums)
        place = (len(removed) + 1, number)

        def measure(size: int) -> dict[str, Tensor]:
            losses = self._losses(place, _units(removed), wanted, size, update)
            return {} if losses is None else {"losses": losses}  # an empty share does not know their shape

        found = self.context.measured(f"sleb-{place[0]}-{place[1]}", measure)["losses"]
        whole = Batch(part.input_ids, part.attention_mask, labels=part.labels)
        tally.add(wanted, found, cells_of(predicted(whole).long()), part.num_tokens)

    def _losses(
        self,
        place: tuple[int, int],
        off: list[Unit],
        wanted: list[Removal | None],
        size: int,
        update: Callable[[], Any],
    ) -> Tensor | None:
        """Summed losses [candidates, windows, cells] of a part, 0 for the windows of other processes."""
        part = self._parts[place[1] - 1]
        sums: Tensor | None = None
        self._branches.cut(size)
        for start, block, losses in self._measured(place[1], self.context.batches(size, part), off, wanted):
            cells = cells_of(losses)
            if sums is None:
                # On the device of the losses: reading a value after each candidate would stall a GPU.
                sums = cells.new_zeros(len(wanted), part.num_windows, cells_of(part.input_ids[:1]).shape[1])
            # One row for each window; naive: one for the whole batch.
            sums[wanted.index(block), start : start + len(cells), : cells.shape[1]] = cells
            update()
        return sums

    def _measured(
        self, part: int, batches: Iterable[tuple[int, Batch]], off: list[Unit], wanted: Sequence[Removal | None]
    ) -> Iterator[tuple[int, Removal | None, Tensor]]:
        """The first window of a batch, a candidate and the losses without it."""
        runner, naive = self.context.runner, self.context.options.search == "naive"
        if in_order_of_blocks(runner) and not naive:
            for start, batch, block, reached in branches(runner, batches, off, wanted):
                yield start, block, head_losses(runner, batch, reached)
            return
        for start, batch in batches:
            if naive:
                measured = self._naive(batch, off, wanted)
            else:
                measured = self._branches.losses(batch, (part, start), off, wanted)
            for block, losses in measured:
                yield start, block, losses

    def _naive(self, batch: Batch, off: list[Unit], wanted: Sequence[Removal | None]) -> Iterator[Measured]:
        for removal in wanted:
            without = off if removal is None else [*off, *units_of(removal)]
            yield removal, self.context.runner.nll(batch, without)[0].view(1, 1)

    def _losers(self, tally: Tally, off: list[Unit], candidates: int) -> dict[Removal, int]:
        """Takes those that cannot win any more out of the tally; returns them with the number of tokens seen."""
        finite = self._finite(tally.means(), off)
        error = shared_error(self.context.options.confidence, candidates, len(self.looks))
        tried = [block for block in finite if block is not None]
        stay = {None, *tally.contenders(tried, error, self.windows.num_windows)}
        # Those without a finite loss were named in a warning; an exact search lists them nowhere either.
        gone = [block for block in tally.sums if block not in stay]
        for block in gone:
            del tally.sums[block]
        return {block: tally.tokens for block in gone if block in finite}

    def _count_naive(self, candidates: list[Removal], off: list[Unit], with_dense: bool) -> None:
        """A block of which one half is on counts like a whole one."""
        runs = [[*off, *units_of(removal)] for removal in candidates] + ([off] if with_dense else [])
        spent = sum(self.context.runner.num_blocks - len(blocks_off(run)) for run in runs)
        self.naive_block_forwards += spent * self.windows.num_windows

    def _finite(self, means: dict[Removal | None, float], off: list[Unit]) -> dict[Removal | None, float]:
        """Drops candidates without a finite loss; raises when the model itself or all of them have none."""
        finite = {block: loss for block, loss in means.items() if math.isfinite(loss)}
        lost = [block for block in means if block not in finite]
        if None in lost or not set(finite) - {None}:
            for batch in self.windows.batches(self.context.batch_size):
                self.context.runner.diagnose(batch, off)
            without = ", ".join(map(str, off)) or "nothing"
            raise NonFiniteError(
                f"The loss is NaN or infinite although every block's output is finite (switched off: {without}): the "
                "final norm or the head overflows. Load the model in another dtype."
            )
        if lost:
            names = [name_of(removal) for removal in lost]
            logger.warning(f"Without block {names} the loss is not finite; not removing any of these in this step.")
        return finite


def _parts(windows: CalibrationWindows, looks: Sequence[int], seed: int) -> list[CalibrationWindows]:
    """What is measured between two looks; windows are shuffled where there are any, as neighbours are alike."""
    if not looks:
        return [windows]
    order = torch.randperm(windows.num_windows, generator=torch.Generator().manual_seed(seed)).tolist()
    return [windows.part(order[begin:end]) for begin, end in zip((0, *looks), (*looks, len(order)), strict=True)]


def _kept(windows: CalibrationWindows) -> dict[str, Any]:
    """How much of the dense model's predictions a divergence looks at."""
    return {} if windows.teacher is None else {"k": windows.teacher.k, "tail_mass": tail_mass(windows)}


def _units(removed: Sequence[Removal]) -> list[Unit]:
    return [unit for removal in removed for unit in units_of(removal)]


def _named(values: dict[Any, Any]) -> dict[str, Any]:
    """By name: JSON objects have string keys."""
    return {str(name_of(removal)): value for removal, value in values.items()}
