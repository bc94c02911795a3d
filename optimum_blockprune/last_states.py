# SPDX-License-Identifier: Apache-2.0
"""The last state of each batch from which a walk from the front of a model to its back goes on."""

from __future__ import annotations

from collections.abc import Collection, Hashable

from optimum.utils import logging

from .batches import Batch
from .errors import UnsupportedModelError
from .half import Unit
from .passes import STATE_BYTES, prove
from .runner import BlockOutput, BlockRunner
from .stand_ins import bytes_of


logger = logging.get_logger("optimum.blockprune.last_states")


def can_go_on(runner: BlockRunner, batch: Batch) -> bool:
    """Whether runs may start behind a block: not where blocks share more than their return value.

    Args:
        runner: Runs the model; its counters do not count this.
        batch: A few tokens.
    """
    try:
        prove(runner, batch)
    except UnsupportedModelError as error:
        logger.info(f"Every measurement starts from the tokens: {error}")
        return False
    return True


class LastStates:
    """Block outputs, one for each batch, `STATE_BYTES` of them at most: batches beyond that start from their tokens.

    Args:
        runner: Runs the model.
        held: Whether any are held at all; see `can_go_on`.
    """

    def __init__(self, runner: BlockRunner, *, held: bool = True) -> None:
        self._runner = runner
        self._states: dict[Hashable, BlockOutput] = {}
        self._bytes = self._size = 0
        self._most = STATE_BYTES if held else 0

    def cut(self, size: int) -> None:
        """Says how many windows a batch has from here on; once these are fewer, memory ran out, and none is held."""
        if size < self._size:
            self._states.clear()
            self._bytes = self._most = 0
        self._size = size

    def at(
        self, key: Hashable, batch: Batch, stop: int | None, off: Collection[Unit] = (), *, keep: bool = True
    ) -> BlockOutput | None:
        """The output of a block, from the last state of this batch; `None` for the embeddings, and where none is held.

        Args:
            key: Of the batch, the same at every step.
            batch: Input windows.
            stop: The block, not in front of the last one that was asked for; `None` for none.
            off: What is off; nothing that is on changes up to the last block that was asked for.
            keep: Whether something will be asked for this batch again.
        """
        if stop is None or not self._most:
            return None
        start = self._states.get(key)
        if start is not None and start.block == stop:
            return start
        reached = self._runner.run_to(batch, stop, off, start)
        self._replace(key, reached, keep)
        return reached

    def _replace(self, key: Hashable, state: BlockOutput, keep: bool) -> None:
        before = self._states.pop(key, None)
        self._bytes -= 0 if before is None else bytes_of(before.value)
        size = bytes_of(state.value)
        if keep and self._bytes + size <= self._most:
            self._states[key] = state
            self._bytes += size
