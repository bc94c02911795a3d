# SPDX-License-Identifier: Apache-2.0
"""SLEB: greedy removal by the loss of the whole model (arXiv 2402.09025, ICML 2024), exact and without waste."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from optimum.utils import logging
from torch import Tensor

from ..batches import Batch, CalibrationWindows
from ..errors import ConfigurationError, NonFiniteError, UnsupportedModelError, nearest
from ..inputs import vocabulary_of
from ..losses import Head, perplexity_of, predicted, prediction_losses
from ..plan import PruningPlan
from ..racing import CELL, Tally, cells_of, looks, shared_error
from ..runner import BlockOutput, BlockRunner
from ..stand_ins import map_tensors
from .base import PruningStrategy, SearchContext


logger = logging.get_logger("optimum.blockprune.sleb")

# "prefix" is the earlier name of "exact".
SEARCHES = ("exact", "race", "naive", "prefix")
CONFIDENCE = 0.999
# Our choice: what the hidden states that stay valid between two steps may take.
_HELD_BYTES = 2**28

# A block (None: the model as it is) and its summed losses, [windows, cells] or [1, 1].
_Measured = tuple[int | None, Tensor]


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

    The loss is the mean next-token NLL (nats per prediction). The released code sums window means times the window
    length, which orders candidates in the same way because all its windows are full.

    Cost of a step with n blocks left and c candidates between them: the shared prefix once, and per candidate the
    blocks after it; about half of the naive c * (n - 1) block-forwards per window. A race pays that for a part of the
    windows, and for the others only the candidates that can still win. The prefix before the block removed last is not
    run again in the next step. Memory: one batch of hidden states for the prefix, one for the running branch, at most
    256 MiB of prefixes for the next step, and the logits of at most 1,024 predictions.
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
        steps: list[dict[str, Any]] = []
        scores: dict[int, float] = {}
        for number in range(1, context.num_remove + 1):
            losses, dropped = search.step(removed, f"SLEB {number}/{context.num_remove}", with_dense=dense is None)
            dense = losses.pop(None, dense)
            scores = scores or losses
            # min() keeps the first of equals and the candidates ascend: a tie goes to the lowest index.
            best = min(losses, key=losses.__getitem__)
            removed.append(best)
            loss = losses[best]
            step = {"block": best, "loss": loss, "perplexity": perplexity_of(loss), "candidates": _named(losses)}
            steps.append({**step, "dropped": _named(dropped)} if search.looks else step)
            logger.info(
                f"SLEB {number}/{context.num_remove}: removed block {best}; loss {loss:.4f}, perplexity "
                f"{perplexity_of(loss):.2f} (dense {perplexity_of(dense):.2f})"
            )
        details = {"objective": "nll", "dense_loss": dense, "naive_block_forwards": search.naive_block_forwards}
        if context.options.search == "race":
            details["race"] = {"looks": list(search.looks), "windows": search.windows.num_windows, "cell": CELL}
        return context.plan(removed, scores=scores, steps=steps, details=details, nested=True)


class _Search:
    """Measures the candidates of one greedy step, batch by batch.

    Attributes:
        looks: Numbers of windows after which a race drops candidates; empty for the other searches.
    """

    def __init__(self, context: SearchContext) -> None:
        self.context = context
        self.runner = context.runner
        self.windows = context.require_windows()
        self.naive_block_forwards = 0
        self.looks = looks(self.windows.num_windows) if context.options.search == "race" else ()
        self._parts = _parts(self.windows, self.looks, context.seed)
        self._held = _Held()
        if context.options.search != "naive":
            first = next(iter(self.windows.batches(1)))
            # A runner of its own: these few tokens are no calibration window and do not count as one.
            runner = BlockRunner(self.runner.model, self.runner.stack.layout.stack)
            beginning = first.beginning()
            runner.check_replay(beginning)
            self._check_head(runner, beginning)

    def _check_head(self, runner: BlockRunner, batch: Batch) -> None:
        """Single positions through the head must give what whole windows do: an unknown head may mix positions."""
        whole = runner.nll(batch)[0].item()
        last = runner.run_to(batch, runner.num_blocks - 1, ())
        alone = prediction_losses(_head_of(runner), last.value, batch, vocabulary_of(runner.stack.layout)).sum().item()
        # Half precision differs between shapes of the same product.
        if math.isfinite(whole) and abs(alone - whole) > 2e-2 * max(1.0, abs(whole)):
            raise UnsupportedModelError(
                f"{runner.stack.layout.subject}: its head gives single positions another loss ({alone:.4f}) than "
                f"whole windows ({whole:.4f}). Use search='naive', which does not take them apart."
            )

    def step(
        self, removed: list[int], title: str, *, with_dense: bool
    ) -> tuple[dict[int | None, float], dict[int, int]]:
        """Measures all candidates of a step.

        Returns:
            The loss (nats per prediction, all windows) by candidate, key `None` is the model as it is, where asked;
            and for those that a race dropped the number of tokens that it took.
        """
        candidates = [block for block in self.context.removable if block not in removed]
        tally = Tally([*candidates, *([None] if with_dense else [])])
        size, dropped = self.context.batch_size, dict[int, int]()
        self._held.begin(removed)
        batches = [math.ceil(part.num_windows / size) for part in self._parts]
        with self.context.progress(sum(batches) * len(tally.sums), title) as bar:
            for number, part in enumerate(self._parts, 1):
                for batch in part.batches(size):
                    self._held.next_batch()
                    self._measure(batch, removed, tally, bar.update)
                if number < len(self._parts):
                    measured = len(tally.sums)
                    dropped.update(self._losers(tally, removed, len(candidates)))
                    bar.update(sum(batches[number:]) * (measured - len(tally.sums)))
        self._count_naive(len(candidates), removed, with_dense)
        return self._finite(tally.means(), removed), dropped

    def _measure(self, batch: Batch, removed: list[int], tally: Tally, update: Any) -> None:
        measure = self._naive if self.context.options.search == "naive" else self._branches
        tally.count(cells_of(predicted(batch).long()), batch.num_tokens)
        for block, sums in measure(batch, removed, list(tally.sums)):
            tally.add(block, sums)
            update()

    def _losers(self, tally: Tally, removed: list[int], candidates: int) -> dict[int, int]:
        """Takes those that cannot win any more out of the tally; returns them with the number of tokens seen."""
        finite = self._finite(tally.means(), removed)
        error = shared_error(self.context.options.confidence, candidates, len(self.looks))
        tried = [block for block in finite if block is not None]
        stay = {None, *tally.contenders(tried, error, self.windows.num_windows)}
        # Those without a finite loss were named in a warning; an exact search lists them nowhere either.
        gone = [block for block in tally.sums if block not in stay]
        for block in gone:
            del tally.sums[block]
        return {block: tally.tokens for block in gone if block in finite}

    def _naive(self, batch: Batch, removed: list[int], wanted: Sequence[int | None]) -> Iterator[_Measured]:
        for block in wanted:
            yield block, self.runner.nll(batch, removed if block is None else [*removed, block])[0].view(1, 1)

    def _branches(self, batch: Batch, removed: list[int], wanted: Sequence[int | None]) -> Iterator[_Measured]:
        """Walks the trunk once; at every candidate, branches off past it to the end."""
        state: BlockOutput | None = None
        before: int | None = None
        for block in range(self.runner.num_blocks):
            if block in removed:
                continue
            if block in wanted:
                state = self._trunk(batch, before, removed, state)
                yield block, self._cells(batch, [*removed, block], state)
            before = block
        if None in wanted:
            yield None, self._cells(batch, removed, state)

    def _trunk(
        self, batch: Batch, stop: int | None, removed: list[int], state: BlockOutput | None
    ) -> BlockOutput | None:
        """The output of block `stop` (`None`: the embeddings), from the last state that is known before it."""
        if stop is None:
            return None
        start = self._held.last(stop, state)
        if start is not None and start.block == stop:
            return start
        reached = self.runner.run_to(batch, stop, removed, start)
        self._held.keep(reached)
        return reached

    def _cells(self, batch: Batch, off: list[int], state: BlockOutput | None) -> Tensor:
        """Summed losses [windows, cells] of the model without `off`, from the stored state on."""
        last = max((block for block in range(self.runner.num_blocks) if block not in off), default=None)
        if last is None:
            raise UnsupportedModelError("A run needs at least one block that is not switched off.")
        reached = state if state is not None and state.block >= last else self.runner.run_to(batch, last, off, state)
        heads = self.runner.counters.head_forwards

        losses = prediction_losses(
            _head_of(self.runner), reached.value, batch, vocabulary_of(self.runner.stack.layout)
        )
        # Counted per window, in however many parts the head ran.
        self.runner.counters.head_forwards = heads + len(batch.input_ids)
        return cells_of(losses)

    def _count_naive(self, candidates: int, removed: list[int], with_dense: bool) -> None:
        alive = self.runner.num_blocks - len(removed)
        spent = candidates * (alive - 1) + (alive if with_dense else 0)
        self.naive_block_forwards += spent * self.windows.num_windows

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


def _head_of(runner: BlockRunner) -> Head:
    """What comes after the last block, on stored outputs of it."""
    return lambda part, value: runner.logits(part, (), BlockOutput(runner.num_blocks - 1, value))


class _Held:
    """States of the trunk that the next step can start from: removing a block changes nothing before it.

    They are bounded by `_HELD_BYTES`; once that is full, later batches start from their embeddings again.
    """

    def __init__(self) -> None:
        self._batches: list[dict[int, BlockOutput]] = []
        self._batch = -1
        self._bytes = 0

    def begin(self, removed: list[int]) -> None:
        """Begins a step: forgets what the last removal made wrong."""
        self._batch = -1
        for states in self._batches:
            for block in [block for block in states if removed and block >= removed[-1]]:
                self._bytes -= _bytes_of(states.pop(block))

    def next_batch(self) -> None:
        """Turns to the next batch of the step; all steps see the same ones in the same order."""
        self._batch += 1
        if self._batch == len(self._batches):
            self._batches.append({})

    def last(self, stop: int, state: BlockOutput | None) -> BlockOutput | None:
        """The deepest of `state` and what is held, not past block `stop`."""
        known = [held for block, held in self._batches[self._batch].items() if block <= stop]
        return max([*known, *([] if state is None else [state])], key=lambda held: held.block, default=None)

    def keep(self, state: BlockOutput) -> None:
        """Holds a state if there is room for it."""
        size = _bytes_of(state)
        if self._bytes + size <= _HELD_BYTES:
            self._bytes += size
            self._batches[self._batch][state.block] = state


def _parts(windows: CalibrationWindows, looks: Sequence[int], seed: int) -> list[CalibrationWindows]:
    """What is measured between two looks; windows are shuffled where there are any, as neighbours are alike."""
    if not looks:
        return [windows]
    order = torch.randperm(windows.num_windows, generator=torch.Generator().manual_seed(seed))
    return [_rows(windows, order[begin:end]) for begin, end in zip((0, *looks), (*looks, len(order)), strict=True)]


def _rows(windows: CalibrationWindows, rows: Tensor) -> CalibrationWindows:
    return replace(
        windows,
        input_ids=windows.input_ids[rows],
        attention_mask=None if windows.attention_mask is None else windows.attention_mask[rows],
        extra={name: tuple(tensors[row] for row in rows.tolist()) for name, tensors in windows.extra.items()},
        labels=None if windows.labels is None else windows.labels[rows],
    )


def _bytes_of(state: BlockOutput) -> int:
    sizes: list[int] = []
    map_tensors(state.value, lambda tensor: sizes.append(tensor.nbytes) or tensor)
    return sum(sizes)


def _named(values: dict[Any, Any]) -> dict[str, Any]:
    """By name: JSON objects have string keys."""
    return {str(block): value for block, value in values.items()}
