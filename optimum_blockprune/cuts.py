# SPDX-License-Identifier: Apache-2.0
"""Cuts of stored tensors: some entries of one axis, in any order, read as bytes and never held as a whole.

A row-major tensor is seen as `[outer, n, inner]`: `n` entries of `inner` bytes along the cut axis, `outer` times. What
is read and what is yielded share one buffer of the caller, whatever the size of the tensor. Elements are never looked
into, so every dtype of whole bytes will do; packed ones (four or six bits) are refused where the cut is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from .errors import CheckpointError
from .widths import ZEROS


# Fills a piece of memory with the stored bytes of a tensor that begin at an offset.
Read = Callable[[int, memoryview], None]


@dataclass(frozen=True)
class Cut:
    """What is left of one axis of a tensor.

    Attributes:
        axis: The axis, counted from the front.
        indices: The old entry for every new one; `ZEROS` (-1) for an entry of zeros.
    """

    axis: int
    indices: tuple[int, ...]

    def check(self, shape: tuple[int, ...], name: str) -> None:
        """Holds the cut against a stored tensor.

        Raises:
            CheckpointError: The tensor has no such axis, or no such entry.
        """
        if not 0 <= self.axis < len(shape):
            raise CheckpointError(f"Tensor '{name}' of shape {list(shape)} has no axis {self.axis} to cut.")
        size = shape[self.axis]
        wrong = next((index for index in self.indices if not ZEROS <= index < size), None)
        if wrong is not None:
            raise CheckpointError(
                f"Tensor '{name}' of shape {list(shape)} has no entry {wrong} along axis {self.axis}: they are 0 to "
                f"{size - 1}, and {ZEROS} stands for zeros."
            )

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape that a tensor of `shape` is cut to."""
        return (*shape[: self.axis], len(self.indices), *shape[self.axis + 1 :])

    def chunks(
        self, shape: tuple[int, ...], element_bytes: int, *, read: Read, buffer: memoryview
    ) -> Iterator[memoryview]:
        """Yields the bytes of the cut tensor in order; each chunk is a part of `buffer`, valid until the next.

        1. One row (`outer` is 1): read just the runs of consecutive entries that stay.
        2. Several rows: read as many whole ones as fit, with room for what becomes of them, and take the entries.
        3. Rows that do not fit the buffer: read the runs of each.

        Args:
            shape: The stored shape; it has passed `check`.
            element_bytes: Size of an element.
            read: Reads stored bytes; its offsets begin with the tensor.
            buffer: All the memory there is for tensors.
        """
        outer, inner = prod(shape[: self.axis]), prod(shape[self.axis + 1 :]) * element_bytes
        old, new = shape[self.axis] * inner, len(self.indices) * inner
        if not outer * new:
            return
        rows = len(buffer) // (old + new)
        if outer == 1 or not rows:
            yield from _join(self._runs(outer, old, inner), read, buffer)
            return
        for first in range(0, outer, rows):
            count = min(rows, outer - first)
            stored, cut = buffer[: count * old], buffer[count * old : count * (old + new)]
            read(first * old, stored)
            self._take(stored, cut, count, inner)
            yield cut

    def _take(self, stored: memoryview, cut: memoryview, rows: int, inner: int) -> None:
        """Fills `cut` from whole rows that lie in memory."""
        source = np.frombuffer(stored, np.uint8).reshape(rows, -1, inner)
        target = np.frombuffer(cut, np.uint8).reshape(rows, len(self.indices), inner)
        indices = np.asarray(self.indices, np.intp)
        if source.size:
            # Any other mode would copy `target` first, in order not to leave it half filled; `check` saw the indices.
            source.take(indices, axis=1, out=target, mode="clip")
        target[:, indices == ZEROS] = 0

    def _runs(self, outer: int, old: int, inner: int) -> Iterator[tuple[int | None, int]]:
        """Offset and length, in bytes, of every stretch to read; no offset where zeros go."""
        indices = np.asarray(self.indices, np.int64)
        before, after = indices[:-1], indices[1:]
        # The entry 0 follows zeros numerically, but does not continue them.
        joined = np.where(before == ZEROS, after == ZEROS, after == before + 1)
        starts = np.concatenate(([0], np.flatnonzero(~joined) + 1))
        firsts = indices[starts].tolist()
        lengths = np.diff(starts, append=len(indices)).tolist()
        for row in range(outer):
            for first, length in zip(firsts, lengths, strict=True):
                yield (None if first == ZEROS else row * old + first * inner), length * inner


def _join(runs: Iterator[tuple[int | None, int]], read: Read, buffer: memoryview) -> Iterator[memoryview]:
    """Reads runs one after the other into full buffers: short ones share a chunk, long ones are split."""
    filled = 0
    for offset, length in runs:
        while length:
            piece = buffer[filled : filled + length]
            if offset is None:
                np.frombuffer(piece, np.uint8)[:] = 0
            else:
                read(offset, piece)
                offset += len(piece)
            filled, length = filled + len(piece), length - len(piece)
            if filled == len(buffer):
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]
