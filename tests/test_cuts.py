# SPDX-License-Identifier: Apache-2.0
"""Cuts of byte ranges: equal to `index_select` with rows of zeros, in no more memory than the buffer."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import chain
from math import prod

import numpy as np
import pytest

from optimum_blockprune.cuts import ZEROS, Cut
from optimum_blockprune.errors import CheckpointError


SHAPES = [(12,), (1, 12), (7, 12), (12, 1), (3, 5, 4), (1, 6, 5), (4, 1, 3, 2)]
# From one byte at a time to everything at once.
BUFFERS = [1, 3, 8, 50, 64, 200, 2**16]


class Stored:
    """A tensor of random bytes in a file, with a record of what is read."""

    def __init__(self, shape: Sequence[int], element_bytes: int, seed: int = 0) -> None:
        self.shape, self.element_bytes = tuple(shape), element_bytes
        size = (*shape, element_bytes)
        # No zeros among them: what is zero was filled in.
        self.values = np.random.default_rng(seed).integers(1, 256, size, dtype=np.uint8)
        self.file = io.BytesIO(self.values.tobytes())
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, target: memoryview) -> None:
        assert offset >= 0 and offset + len(target) <= self.values.nbytes
        self.reads.append((offset, len(target)))
        self.file.seek(offset)
        assert self.file.readinto(target) == len(target)

    def chunks(self, cut: Cut, buffer: int) -> Iterator[memoryview]:
        memory = memoryview(bytearray(b"\xff" * buffer))
        return cut.chunks(self.shape, self.element_bytes, read=self.read, buffer=memory)

    def cut(self, cut: Cut, buffer: int) -> list[bytes]:
        return [bytes(chunk) for chunk in self.chunks(cut, buffer)]

    def expected(self, cut: Cut) -> bytes:
        """By indexing a tensor that has zeros behind the end of the axis, where -1 points to."""
        edge = [(0, 0)] * self.values.ndim
        edge[cut.axis] = (0, 1)
        return np.pad(self.values, edge).take(cut.indices, axis=cut.axis).tobytes()


def selections(size: int, seed: int = 0) -> list[tuple[int, ...]]:
    random = np.random.default_rng(seed)
    return [
        tuple(range(size)),
        (),
        (0,),
        (size - 1,),
        (ZEROS, ZEROS),
        (ZEROS, 0, ZEROS, ZEROS, 0),
        tuple(range(size // 2)) + (ZEROS,) * size,
        tuple(reversed(range(size))),
        tuple(index for index in range(size) for _ in range(2)),
        tuple(random.integers(ZEROS, size, 2 * size).tolist()),
        tuple(sorted(random.choice(size, (size + 1) // 2, replace=False).tolist())),
    ]


# --- the bytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("element_bytes", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_indexing(shape: tuple[int, ...], element_bytes: int) -> None:
    for axis, size in enumerate(shape):
        for number, indices in enumerate(selections(size)):
            cut, stored = Cut(axis, indices), Stored(shape, element_bytes, seed=number)
            cut.check(shape, "x")
            for buffer in BUFFERS:
                chunks = stored.cut(cut, buffer)
                assert b"".join(chunks) == stored.expected(cut), (axis, indices, buffer)
                assert all(0 < len(chunk) <= buffer for chunk in chunks)
                assert sum(map(len, chunks)) == prod(cut.shape(shape)) * element_bytes


def test_random_cuts() -> None:
    random = np.random.default_rng(5)
    for seed in range(300):
        shape = tuple(random.integers(1, 9, random.integers(1, 5)).tolist())
        axis = int(random.integers(len(shape)))
        indices = tuple(random.integers(ZEROS, shape[axis], random.integers(0, 12)).tolist())
        cut, stored = Cut(axis, indices), Stored(shape, int(random.choice([1, 2, 4])), seed)
        chunks = stored.cut(cut, int(random.integers(1, 300)))
        assert b"".join(chunks) == stored.expected(cut), (shape, cut)


@pytest.mark.parametrize(
    ("shape", "cut", "result"),
    [
        ((0, 4), Cut(0, ()), (0, 4)),
        ((0, 4), Cut(1, (1,)), (0, 1)),
        ((3, 0), Cut(0, (2, ZEROS)), (2, 0)),
        ((3, 4), Cut(1, ()), (3, 0)),
    ],
)
def test_nothing_is_read_for_a_result_without_elements(
    shape: tuple[int, ...], cut: Cut, result: tuple[int, ...]
) -> None:
    stored = Stored(shape, 4)
    cut.check(shape, "x")
    assert cut.shape(shape) == result
    assert stored.cut(cut, 64) == [] and stored.reads == []


@pytest.mark.parametrize("buffer", BUFFERS)
def test_an_axis_without_entries_can_be_padded(buffer: int) -> None:
    stored = Stored((3, 0, 2), 2)
    assert b"".join(stored.cut(Cut(1, (ZEROS, ZEROS)), buffer)) == bytes(24)
    assert stored.reads == [] or all(length == 0 for _, length in stored.reads)


# --- how they are read ---------------------------------------------------------------------------------------------


def test_one_row_is_read_in_runs() -> None:
    stored = Stored((10, 4), 1)
    chunks = stored.cut(Cut(0, (2, 3, 4, ZEROS, 0, 9)), 100)
    assert stored.reads == [(8, 12), (0, 4), (36, 4)]
    assert [len(chunk) for chunk in chunks] == [24]


def test_zero_is_no_continuation_of_zeros() -> None:
    stored = Stored((4,), 1)
    stored.cut(Cut(0, (ZEROS, 0, 1, ZEROS)), 100)
    assert stored.reads == [(0, 2)]


def test_long_runs_are_split_and_short_ones_share_a_chunk() -> None:
    stored = Stored((20, 2), 1)
    chunks = stored.cut(Cut(0, (0, 2, 4, *range(6, 20))), 8)
    assert stored.reads == [(0, 2), (4, 2), (8, 2), (12, 2), (14, 8), (22, 8), (30, 8), (38, 2)]
    assert [len(chunk) for chunk in chunks] == [8, 8, 8, 8, 2]


def test_as_many_rows_as_fit_are_read_at_once() -> None:
    stored = Stored((5, 6), 2)
    cut = Cut(1, (5, ZEROS, 0))  # a row is 12 bytes, and 6 afterwards
    chunks = stored.cut(cut, 2 * 18 + 17)
    assert stored.reads == [(0, 24), (24, 24), (48, 12)]
    assert [len(chunk) for chunk in chunks] == [12, 12, 6]


def test_a_row_that_does_not_fit_is_read_in_runs() -> None:
    stored = Stored((3, 6), 2)
    chunks = stored.cut(Cut(1, (4, 5, 0)), 17)
    assert stored.reads == [(8, 4), (0, 2), (20, 4), (12, 2), (32, 4), (24, 1), (25, 1)]
    assert [len(chunk) for chunk in chunks] == [17, 1]


@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_lies_in_the_one_buffer(shape: tuple[int, ...], buffer: int) -> None:
    """What is read and what is yielded are parts of the caller's memory; nothing is collected elsewhere."""
    memory = bytearray(buffer)
    area = np.frombuffer(memory, np.uint8)
    targets: list[memoryview] = []

    def read(offset: int, target: memoryview) -> None:
        targets.append(target)

    for axis, size in enumerate(shape):
        cut = Cut(axis, (*range(size), ZEROS, *range(size)))
        chunks = cut.chunks(shape, 2, read=read, buffer=memoryview(memory))
        for piece in chain(chunks, targets):
            assert len(piece) <= buffer
            assert np.shares_memory(np.frombuffer(piece, np.uint8), area)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-1, 2, 9])
def test_an_axis_that_does_not_exist(axis: int) -> None:
    with pytest.raises(CheckpointError, match=rf"'some\.weight' of shape \[3, 4\] has no axis {axis}"):
        Cut(axis, (0,)).check((3, 4), "some.weight")


def test_a_scalar_has_no_axis() -> None:
    with pytest.raises(CheckpointError, match="'scale' .* has no axis 0"):
        Cut(0, ()).check((), "scale")


@pytest.mark.parametrize("index", [-2, 4, 100])
def test_an_entry_that_does_not_exist(index: int) -> None:
    with pytest.raises(CheckpointError, match=f"'some.weight' .* has no entry {index} along axis 1: they are 0 to 3"):
        Cut(1, (0, ZEROS, index, 3)).check((3, 4), "some.weight")
