# SPDX-License-Identifier: Apache-2.0
"""Batches that do not fit are halved: once for all, without leaving anything behind, and down to one window."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator

import pytest
import torch

from optimum_blockprune.errors import BlockPruningError, ConfigurationError
from optimum_blockprune.memory import OUT_OF_MEMORY, BatchSize, out_of_memory


CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB"
CPU = "[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"


class Device:
    """Holds `room` windows at a time; counts what it is asked for."""

    def __init__(self, room: int, error: Exception | None = None) -> None:
        self.room, self.asked = room, []
        self.error = error or OUT_OF_MEMORY(CUDA)

    def measure(self, batch_size: int) -> str:
        self.asked.append(batch_size)
        if batch_size > self.room:
            raise self.error
        return f"measured with {batch_size}"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """Captures what the module says; Optimum's loggers do not hand it on."""
    logger = logging.getLogger("optimum.blockprune.memory")
    logger.addHandler(caplog.handler)
    monkeypatch.setattr(logger, "propagate", False)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_what_fits_is_measured_once(log: pytest.LogCaptureFixture) -> None:
    device = Device(room=8)
    assert BatchSize(8).run(device.measure) == "measured with 8"
    assert device.asked == [8]
    assert not log.records


@pytest.mark.parametrize(("start", "room", "asked"), [(8, 2, [8, 4, 2]), (7, 1, [7, 3, 1]), (2, 1, [2, 1])])
def test_it_is_halved_until_it_fits(start: int, room: int, asked: list[int], log: pytest.LogCaptureFixture) -> None:
    device = Device(room)
    assert BatchSize(start).run(device.measure) == f"measured with {asked[-1]}"
    assert device.asked == asked
    assert [record.levelname for record in log.records] == ["WARNING"] * (len(asked) - 1)
    assert f"batch_size={start}; going on with {asked[1]}" in log.records[0].getMessage()


def test_the_size_that_fits_is_remembered() -> None:
    size, device = BatchSize(8), Device(room=3)
    size.run(device.measure)
    assert size.value == 2
    size.run(device.measure)
    assert device.asked == [8, 4, 2, 2]


def test_one_window_that_does_not_fit_is_refused_with_advice() -> None:
    device = Device(room=0)
    with pytest.raises(BlockPruningError, match=r"a single window \(CUDA out of memory.*seqlen.*dtype.*stream=True"):
        BatchSize(2).run(device.measure)
    assert device.asked == [2, 1]


@pytest.mark.parametrize("error", [OUT_OF_MEMORY("HIP"), torch.cuda.OutOfMemoryError(CUDA), RuntimeError(CPU)])
def test_every_device_counts(error: Exception) -> None:
    assert out_of_memory(error)
    assert BatchSize(4).run(Device(2, error).measure) == "measured with 2"


def test_the_allocator_of_the_cpu_counts() -> None:
    """The real one, asked for more than there can be."""
    sizes = []

    def measure(batch_size: int) -> int:
        sizes.append(batch_size)
        return torch.empty(2**46 if batch_size > 1 else 1, dtype=torch.float64).numel()

    assert BatchSize(2).run(measure) == 1
    assert sizes == [2, 1]


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError(CUDA), KeyboardInterrupt()])
def test_other_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error)):
        BatchSize(4).run(Device(2, error).measure)


def test_nothing_of_the_failed_call_is_alive_in_the_next() -> None:
    """Half of the memory would not be enough if the traceback still held the other half."""
    held: list[weakref.ref[torch.Tensor]] = []

    def measure(batch_size: int) -> bool:
        if batch_size == 1:
            return held[0]() is None
        activations = torch.zeros(batch_size)
        held.append(weakref.ref(activations))
        raise OUT_OF_MEMORY(CUDA)

    assert BatchSize(2).run(measure)


@pytest.mark.parametrize("value", [0, -1])
def test_impossible_sizes_are_refused(value: int) -> None:
    with pytest.raises(ConfigurationError, match=f"batch_size={value} must be at least 1"):
        BatchSize(value)
