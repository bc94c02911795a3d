# SPDX-License-Identifier: Apache-2.0
"""One step of a search by the loss of the whole model: every candidate measured, exactly, as a race, or naively.

What the loss is (see `losses`) and which candidates there are (see `half`) is the business of the windows and of the
context; what to do with the losses, of the strategy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from optimum.utils import logging
from torch import Tensor

from .batches import Batch, CalibrationWindows
from .branching import Branches, Measured, head_losses
from .errors import NonFiniteError
from .half import Removal, Unit, blocks_off, name_of, units_of
from .losses import predicted
from .passes import branches, in_order_of_blocks
from .racing import Tally, cells_of, looks, shared_error
from .strategies.base import SearchContext


logger = logging.get_logger("optimum.blockprune.steps")

RACE, NAIVE = "race", "naive"


class Steps:
    """Measures the candidates of one greedy step, part by part of the windows.

    Args:
        context: Of the search.
        how: `"exact"`, `"race"` or `"naive"`; see `SLEBOptions`.
        confidence: Of a race.
        key: Names the measurements of a state, given what is removed in it.

    Attributes:
        how: See above.
        looks: Numbers of windows after which a race drops candidates; empty for the other searches.
    """

    def __init__(
        self, context: SearchContext, how: str, confidence: float | None, key: Callable[[Sequence[Removal]], str]
    ) -> None:
        self.context, self.how, self._confidence, self._key = context, how, confidence, key
        self.windows = context.require_windows()
        self.naive_block_forwards = 0
        self.looks = looks(self.windows.num_windows) if how == RACE else ()
        self._parts = _parts(self.windows, self.looks, context.seed)
        self._branches = Branches(context.runner)
        if how != NAIVE:
            self._branches.check(next(iter(self.windows.batches(1))).beginning())

    def step(
        self, removed: list[Removal], title: str, *, with_dense: bool
    ) -> tuple[dict[Removal | None, float], dict[Removal, int]]:
        """Measures all candidates of a step.

        Returns:
            The loss (nats per prediction, all windows) by candidate, key `None` is the model as it is, where asked;
            and for those that a race dropped the number of tokens that it took.
        """
        off = units_off(removed)
        candidates = self.context.removals(off)
        tally = Tally([*candidates, *([None] if with_dense else [])])
        dropped: dict[Removal, int] = {}
        self._branches.begin(off)
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

    def loss(self, removed: list[Removal]) -> float:
        """The loss of one state (nats per prediction, all windows); it may be NaN or infinite."""
        runner, off = self.context.runner, units_off(removed)

        def measure(size: int) -> dict[str, Tensor]:
            # An entry for each batch: added up in one order, by however many processes.
            losses, tokens = torch.zeros(self.windows.num_windows, dtype=torch.float64), 0
            for start, batch in self.context.batches(size):
                loss, count = runner.nll(batch, off)
                losses[start], tokens = loss.item(), tokens + count
            return {"losses": losses, "tokens": torch.tensor(tokens)}

        found = self.context.measured(f"{self._key(removed)}-alone", measure)
        return (found["losses"].sum() / found["tokens"]).item()

    def _measure(self, number: int, removed: list[Removal], tally: Tally, update: Callable[[], Any]) -> None:
        """Adds part `number` of the windows to the tally."""
        part, wanted = self._parts[number - 1], list(tally.sums)
        off = units_off(removed)

        def measure(size: int) -> dict[str, Tensor]:
            losses = self._losses(number, off, wanted, size, update)
            return {} if losses is None else {"losses": losses}  # an empty share does not know their shape

        found = self.context.measured(f"{self._key(removed)}-{number}", measure)["losses"]
        whole = Batch(part.input_ids, part.attention_mask, labels=part.labels)
        tally.add(wanted, found, cells_of(predicted(whole).long()), part.num_tokens)

    def _losses(
        self,
        number: int,
        off: list[Unit],
        wanted: list[Removal | None],
        size: int,
        update: Callable[[], Any],
    ) -> Tensor | None:
        """Summed losses [candidates, windows, cells] of a part, 0 for the windows of other processes."""
        part = self._parts[number - 1]
        sums: Tensor | None = None
        self._branches.cut(size)
        for start, block, losses in self._measured(number, self.context.batches(size, part), off, wanted):
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
        runner, naive = self.context.runner, self.how == NAIVE
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
        error = shared_error(self._confidence, candidates, len(self.looks))
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


def units_off(removed: Sequence[Removal]) -> list[Unit]:
    """The blocks and halves that some removals switch off."""
    return [unit for removal in removed for unit in units_of(removal)]
