# SPDX-License-Identifier: Apache-2.0
"""Losses of a model without one more block: the trunk runs once, and at every candidate a branch leaves it.

What lies before a candidate is the same for all that come after it, so a candidate costs only the blocks behind it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

from torch import Tensor

from .batches import Batch
from .errors import UnsupportedModelError
from .half import Half, Removal, Unit, blocks_off, first_block, halves_of, units_of
from .inputs import vocabulary_of
from .losses import Head, prediction_losses
from .passes import prove
from .runner import BlockOutput, BlockRunner
from .stand_ins import bytes_of


# Our choice: what the hidden states that stay valid between two steps may take.
_HELD_BYTES = 2**28

# What goes (None: nothing) and the losses of the predictions without it, [windows, S] or [1, 1].
Measured = tuple[Removal | None, Tensor]


class Branches:
    """Measures candidates on one batch after the other, and keeps the states that stay valid when a block goes.

    Args:
        runner: Runs the model; counts what it spends.
    """

    def __init__(self, runner: BlockRunner) -> None:
        self.runner = runner
        self._held = _Held()
        self._gone: set[Half] = set()
        self._size = 0

    def check(self, batch: Batch) -> None:
        """Proves on a few tokens, which no counter counts, that blocks and head can be taken apart.

        Raises:
            UnsupportedModelError: Blocks share more than their return value, or the head mixes positions.
        """
        prove(self.runner, batch)
        runner = BlockRunner(self.runner.model, self.runner.stack.layout.stack)
        last = runner.run_to(batch, runner.num_blocks - 1, ())
        whole = runner.nll(batch, start=last)[0].item()
        alone = prediction_losses(head_of(runner), last.value, batch, vocabulary_of(runner.stack.layout)).sum().item()
        # Half precision differs between shapes of the same product.
        if math.isfinite(whole) and abs(alone - whole) > 2e-2 * max(1.0, abs(whole)):
            raise UnsupportedModelError(
                f"{runner.stack.layout.subject}: its head gives single positions another loss ({alone:.4f}) than "
                f"whole windows ({whole:.4f}). Use search='naive', which does not take them apart."
            )

    def begin(self, off: Collection[Unit]) -> None:
        """Begins a step in which `off` is gone: forgets what the difference to the last step made wrong."""
        gone = halves_of(off)
        changed = gone ^ self._gone
        if changed:
            self._held.forget(min(half.block for half in changed))
        self._gone = gone

    def cut(self, size: int) -> None:
        """Says how many windows a batch has from here on; states of other batches are of no use."""
        if size != self._size:
            self._held, self._size = _Held(), size

    def losses(
        self, batch: Batch, place: tuple[int, int], off: Sequence[Unit], wanted: Collection[Removal | None]
    ) -> Iterator[Measured]:
        """Walks the trunk once; at every candidate, branches off past it to the end.

        Args:
            batch: Some windows.
            place: Which ones: what is held for a batch is found by this.
            off: What is gone.
            wanted: Candidates; `None` is the model as it is.

        Yields:
            Each of `wanted` with the NLL of every prediction, nats, float64 [B, S], 0 where nothing is predicted.
        """
        self._held.turn_to(place)
        state: BlockOutput | None = None
        before: int | None = None
        gone = blocks_off(off)
        for block in range(self.runner.num_blocks):
            if block in gone:
                continue
            for removal in wanted:
                if removal is not None and first_block(removal) == block:
                    state = self._trunk(batch, before, off, state)
                    yield removal, self._rest(batch, [*off, *units_of(removal)], state)
            before = block
        if None in wanted:
            yield None, self._rest(batch, off, state)

    def _trunk(
        self, batch: Batch, stop: int | None, off: Sequence[Unit], state: BlockOutput | None
    ) -> BlockOutput | None:
        """The output of block `stop` (`None`: the embeddings), from the last state that is known before it."""
        if stop is None:
            return None
        start = self._held.last(stop, state)
        if start is not None and start.block == stop:
            return start
        reached = self.runner.run_to(batch, stop, off, start)
        self._held.keep(reached)
        return reached

    def _rest(self, batch: Batch, off: Sequence[Unit], state: BlockOutput | None) -> Tensor:
        """The losses of the model without `off`, from the stored state on."""
        last = self.runner.last_block(off)
        reached = state if state is not None and state.block >= last else self.runner.run_to(batch, last, off, state)
        return head_losses(self.runner, batch, reached)


def head_losses(runner: BlockRunner, batch: Batch, reached: BlockOutput) -> Tensor:
    """The NLL of every prediction, float64 [B, S], from the output of the last block that is on."""
    heads = runner.counters.head_forwards
    losses = prediction_losses(head_of(runner), reached.value, batch, vocabulary_of(runner.stack.layout))
    # Counted per window, in however many parts the head ran.
    runner.counters.head_forwards = heads + len(batch.input_ids)
    return losses


def head_of(runner: BlockRunner) -> Head:
    """What comes after the last block, on stored outputs of it."""
    return lambda part, value: runner.logits(part, (), BlockOutput(runner.num_blocks - 1, value))


class _Held:
    """States of the trunk that the next step can start from: removing a block changes nothing before it.

    They are bounded by `_HELD_BYTES`; once that is full, later batches start from their embeddings again.
    """

    def __init__(self) -> None:
        self._batches: dict[tuple[int, int], dict[int, BlockOutput]] = {}
        self._here: dict[int, BlockOutput] = {}
        self._bytes = 0

    def forget(self, first: int) -> None:
        """Forgets the outputs of block `first` and of all behind it."""
        for states in self._batches.values():
            for block in [block for block in states if block >= first]:
                self._bytes -= bytes_of(states.pop(block).value)

    def turn_to(self, place: tuple[int, int]) -> None:
        """Turns to a batch of the step; all steps see the same ones."""
        self._here = self._batches.setdefault(place, {})

    def last(self, stop: int, state: BlockOutput | None) -> BlockOutput | None:
        """The deepest of `state` and what is held, not past block `stop`."""
        known = [held for block, held in self._here.items() if block <= stop]
        return max([*known, *([] if state is None else [state])], key=lambda held: held.block, default=None)

    def keep(self, state: BlockOutput) -> None:
        """Holds a state if there is room for it."""
        size = bytes_of(state.value)
        if self._bytes + size <= _HELD_BYTES:
            self._bytes += size
            self._here[state.block] = state
