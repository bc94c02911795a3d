# SPDX-License-Identifier: Apache-2.0
"""What goes into some modules on average: with it, a bias can make up for inputs that are removed (FLAP's idea)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .channel_sums import INPUT, TokenSums
from .measures import raise_non_finite
from .passes import sum_tokens


if TYPE_CHECKING:
    from .strategies.base import SearchContext


def mean_inputs(
    context: SearchContext, modules: Mapping[Hashable, nn.Module], advance: Callable[[int], Any] = lambda windows: None
) -> dict[Hashable, Tensor]:
    """Mean of every input of some modules of the blocks, over all tokens that are not padding, in one dense pass.

    The dense model's means are our choice: the authors of arXiv 2508.05239 take those of a model whose units are off
    already, and a mean of the texts' means.

    Args:
        context: Runner and windows.
        modules: By name.
        advance: Called with the number of windows after each pass.

    Returns:
        fp64 [inputs] by name.

    Raises:
        NonFiniteError: An input is NaN or infinite.
    """
    sums = TokenSums()
    for name, module in modules.items():
        sums.watch(name, [(module, INPUT)], lambda rows: rows)

    def measure(size: int) -> dict[str, Tensor]:
        sums.clear()
        runner = context.runner
        sum_tokens(runner, context.batches(size), sums, runner.positions, done=advance)
        return sums.sums()

    sums.restore(context.measured("mean-inputs", measure))
    if not sums.finite:
        raise_non_finite(context.runner.diagnose, context.require_windows().batches(context.batch_size))
    return {name: sums.mean(name) for name in modules}
