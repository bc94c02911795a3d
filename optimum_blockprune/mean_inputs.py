# SPDX-License-Identifier: Apache-2.0
"""What goes into some modules on average: with it, a bias can make up for inputs that are removed (FLAP's idea)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import Tensor, nn

from .batches import CalibrationWindows
from .channel_sums import INPUT, TokenSums
from .measures import raise_non_finite
from .runner import BlockRunner


def mean_inputs(
    runner: BlockRunner,
    windows: CalibrationWindows,
    modules: Mapping[Hashable, nn.Module],
    *,
    batch_size: int,
    advance: Callable[[int], Any] = lambda windows: None,
) -> dict[Hashable, Tensor]:
    """Mean of every input of some modules of the blocks, over all tokens that are not padding, in one dense pass.

    The dense model's means are our choice: the authors of arXiv 2508.05239 take those of a model whose units are off
    already, and a mean of the texts' means.

    Args:
        runner: Runs the model.
        windows: The text.
        modules: By name.
        batch_size: Windows per forward pass.
        advance: Called with the number of windows after each pass.

    Returns:
        fp64 [inputs] by name.

    Raises:
        NonFiniteError: An input is NaN or infinite.
    """
    sums = TokenSums()
    for name, module in modules.items():
        sums.watch(name, [(module, INPUT)], lambda rows: rows)
    for batch in windows.batches(batch_size):
        sums.begin(runner.positions(batch))
        runner.observe(batch, sums.visits)
        advance(len(batch.input_ids))
    if not sums.finite:
        raise_non_finite(runner.diagnose, windows.batches(batch_size))
    return {name: sums.mean(name) for name in modules}
