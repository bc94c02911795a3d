# SPDX-License-Identifier: Apache-2.0
"""Smaller batches where the device has no memory for larger ones.

What counts as "out of memory" is accelerate's list (CUDA, ROCm, XPU, MPS, the CPU's allocator) and PyTorch's own
exception. A process that the operating system kills for its memory cannot be helped from inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from optimum.utils import logging

from .errors import BlockPruningError, ConfigurationError


logger = logging.get_logger("optimum.blockprune.memory")

T = TypeVar("T")

# `torch.OutOfMemoryError` since 2.5; the same class under its older name before.
OUT_OF_MEMORY: type[RuntimeError] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


class BatchSize:
    """A number of windows per forward pass that is halved when it turns out too large, and stays so.

    What is measured may not depend on it, nor may the windows that one of several processes takes: each process has
    its own.

    Args:
        value: Windows per forward pass to begin with.

    Attributes:
        value: Windows per forward pass that the next measurement begins with.

    Raises:
        ConfigurationError: `value` is less than 1.
    """

    def __init__(self, value: int) -> None:
        if value < 1:
            raise ConfigurationError(f"batch_size={value!r} must be at least 1.")
        self.value = value

    def run(self, measure: Callable[[int], T]) -> T:
        """Calls `measure` with the batch size, and from the beginning with half of it each time memory runs out.

        Args:
            measure: Gets the windows per forward pass. It keeps nothing of a call that failed.

        Raises:
            BlockPruningError: The device has no memory for one window.
        """
        while True:
            try:
                return measure(self.value)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                reason = " ".join(str(error).split())
            # Only here, where the traceback has gone, are the tensors of the failed call free.
            clear_device_cache(garbage_collection=True)
            self._halve(reason)

    def _halve(self, reason: str) -> None:
        if self.value == 1:
            raise BlockPruningError(
                f"The device has no memory for a single window ({reason}). Give shorter windows (seqlen, --seqlen), a "
                'smaller dtype, stream=True (--stream), or more devices (device_map="auto").'
            )
        smaller = self.value // 2
        logger.warning(f"Out of memory with batch_size={self.value}; going on with {smaller} ({reason}).")
        self.value = smaller


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the allocator of the CPU, has no memory left."""
    return isinstance(error, OUT_OF_MEMORY) or should_reduce_batch_size(error)
