# SPDX-License-Identifier: Apache-2.0
"""How many blocks have to go for a model to become so much faster, measured on this machine; our definition.

What is timed, for a batch of one: a `prefill`, one forward pass over 512 tokens without a cache (fewer where the
model's positions end before), and, of a model that generates, a `decode`, 32 tokens generated greedily with the KV
cache after 8. Tokens are made up; each timing follows a warm-up. The dense model and the pruned one, really cut and
put back, take turns five times; a speed-up is the ratio of the two medians, and that of the model is the smaller one
of the two kinds of work.

The blocks that are cut for it are the last ones that may go. Where blocks are unlike each other, others may give
another speed-up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from optimum.utils import logging
from torch import Tensor
from transformers import PreTrainedModel

from .architectures import layout_for
from .batches import CalibrationWindows
from .errors import ConfigurationError
from .evaluation import seconds_of
from .inputs import probe_batch
from .plan import PruningPlan
from .surgery import apply_plan


logger = logging.get_logger("optimum.blockprune.speedup")

REPEATS = 5
PREFILL_TOKENS, DECODE_TOKENS = 512, 32

# What was measured for a number of blocks: a speed-up by kind of work.
Speedups = dict[str, float]


def fewest_blocks(most: int, target: float, measure: Callable[[int], Speedups]) -> tuple[int, dict[str, Any]]:
    """The smallest number of blocks whose measured speed-up reaches a target, found by bisection.

    Args:
        most: Blocks that may go.
        target: The speed-up wanted, of every kind of work.
        measure: Gives the speed-ups without a number of blocks; asked once for each number.

    Returns:
        The number, and what was measured: `speedup`, one for each kind, and `trail`, all numbers that were tried.

    Raises:
        ConfigurationError: Without all the blocks that may go, the model is not fast enough.
    """
    known: dict[int, Speedups] = {}

    def speedup(count: int) -> float:
        if count not in known:
            known[count] = measure(count)
            shown = ", ".join(f"{name} {value:.3f}" for name, value in known[count].items())
            logger.info(f"Without {count} blocks: {shown} times as fast.")
        return min(known[count].values())

    if speedup(most) < target:
        shown = " and ".join(f"{name} {value:.3f}" for name, value in known[most].items())
        reachable = int(speedup(most) * 1000) / 1000
        raise ConfigurationError(
            f"target_speedup={target} cannot be reached: without the {most} blocks that may go, {shown} times as fast "
            f"was measured. The largest reachable target_speedup is {reachable}."
        )
    slow, fast = 0, most
    while fast - slow > 1:
        middle = (slow + fast) // 2
        slow, fast = (slow, middle) if speedup(middle) >= target else (middle, fast)
    trail = [{"removed": count, **_named(known[count])} for count in sorted(known)]
    return fast, {"speedup": speedup(fast), **_named(known[fast]), "trail": trail}


def timed_in_turns(model: PreTrainedModel, plan: PruningPlan) -> Tensor:
    """Seconds of the dense model and of the pruned one: float64 [REPEATS, 2, kinds of work]. The model stays as it is.

    Args:
        model: The dense model.
        plan: What the other one lacks.
    """
    found = []
    for _ in range(REPEATS):
        dense = request_seconds(model)
        journal = apply_plan(model, plan)
        try:
            found.append([dense, request_seconds(model)])
        finally:
            journal.rollback()
    return torch.tensor(found, dtype=torch.float64)


def speedups_of(seconds: Tensor) -> Speedups:
    """Ratios of medians, from what `timed_in_turns` gave."""
    dense, pruned = seconds.median(dim=0).values.tolist()
    return {name: a / b for name, a, b in zip(("prefill", "decode"), dense, pruned, strict=False)}


def request_seconds(model: PreTrainedModel) -> list[float]:
    """Seconds of a prefill and, of a model that generates, of decoding; see the module."""
    batch = probe_batch(model, layout_for(model), windows=1, length=PREFILL_TOKENS)
    extra = {name: (tensor,) for name, tensor in batch.extra.items()}
    windows = CalibrationWindows.from_tokens(batch.input_ids, source="made-up tokens", extra=extra)
    return [seconds for _, seconds in seconds_of(model, windows, decode_tokens=DECODE_TOKENS).values()]


def _named(speedups: Speedups) -> dict[str, float]:
    return {f"{name}_speedup": value for name, value in speedups.items()}
