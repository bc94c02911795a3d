# SPDX-License-Identifier: Apache-2.0
"""Ranges arrive byte for byte: as far as the system copies them, and the rest through the buffer."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from optimum_blockprune import copying
from optimum_blockprune.copying import PAGE_BYTES, append_range
from optimum_blockprune.tensors import StoredTensor


BYTES = bytes(range(256)) * 40


def head(start: int) -> bytes:
    """What lies before a range in its target, so that it begins at the same place within a page as in its source."""
    return (b"header" * 2000)[: PAGE_BYTES + start % PAGE_BYTES]


needs_system = pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="Linux only")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(BYTES)
    return path


def appended(source: Path, start: int, count: int) -> tuple[int, bytes]:
    """What `append_range` returns, and what the target holds then."""
    target = source.with_name("target")
    with source.open("rb") as read, target.open("wb") as written:
        written.write(head(start))
        done = append_range(read, written, start, count)
        assert read.tell() == 0
        written.write(b"end")
    return done, target.read_bytes()


def tensor_copied(source: Path, start: int, count: int, buffer: int = 100) -> bytes:
    """What the target holds after a whole tensor was appended."""
    target = source.with_name("target")
    tensor = StoredTensor("w", "U8", (count,), source, start, count)
    with source.open("rb") as read, target.open("wb") as written:
        written.write(head(start))
        tensor.copy(read, written, memoryview(bytearray(buffer)))
    return target.read_bytes()


@needs_system
@pytest.mark.parametrize(("start", "count"), [(0, len(BYTES)), (7, 1), (300, 5000), (0, 0)])
@pytest.mark.parametrize("piece", [64, 1000, 2**24])
def test_the_range_comes_after_what_was_written(
    start: int, count: int, piece: int, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "_PIECE_BYTES", piece)
    assert appended(source, start, count) == (count, head(start) + BYTES[start : start + count] + b"end")


@needs_system
def test_a_source_that_ends_early_gives_what_it_has(source: Path) -> None:
    assert appended(source, len(BYTES) - 10, 50) == (10, head(len(BYTES) - 10) + BYTES[-10:] + b"end")


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
def test_a_system_that_refuses_leaves_it_to_the_buffer(
    code: int, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    assert appended(source, 3, 500) == (0, head(3) + b"end")
    assert tensor_copied(source, 3, 500) == head(3) + BYTES[3:503]


def test_a_system_without_it_leaves_it_to_the_buffer(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    assert appended(source, 3, 500) == (0, head(3) + b"end")
    assert tensor_copied(source, 3, 500) == head(3) + BYTES[3:503]


@needs_system
def test_the_buffer_takes_over_where_the_system_stops(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.copy_file_range, []

    def twice(*arguments: int) -> int:
        calls.append(arguments)
        if len(calls) > 2:
            raise OSError(errno.EIO, "broken")
        return real(*arguments)

    monkeypatch.setattr(copying, "_PIECE_BYTES", 90)
    monkeypatch.setattr(os, "copy_file_range", twice)
    assert tensor_copied(source, 11, 1000) == head(11) + BYTES[11:1011]
    assert len(calls) == 3


def test_another_place_within_the_page_is_for_the_buffer(source: Path) -> None:
    target = source.with_name("target")
    tensor = StoredTensor("w", "U8", (5000,), source, 7, 5000)
    with source.open("rb") as read, target.open("wb") as written:
        written.write(b"header")
        assert append_range(read, written, 7, 5000) == 0
        tensor.copy(read, written, memoryview(bytearray(100)))
    assert target.read_bytes() == b"header" + BYTES[7:5007]
