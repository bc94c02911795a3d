# SPDX-License-Identifier: Apache-2.0
"""Runs calibration text through a model one block at a time, so that whatever is captured is of one block only.

The residual stream of all windows is held between blocks; every block runs once per window. Windows are split into
groups of texts, in order and of nearly equal size. Batches never straddle two groups, so that what a group is made of
depends on the recipe alone.

Memory: `stored_values`, windows x S x d in the model's own precision and on the devices where the blocks leave it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from .batches import Batch, CalibrationWindows
from .measures import content_mask
from .offload import held
from .passes import in_order_of_blocks, prove
from .runner import BlockOutput, BlockRunner
from .stand_ins import map_tensors


@dataclass(eq=False)
class TextGroup:
    """Some windows, and how far they have come.

    Attributes:
        batches: The windows.
        masks: Bool [B, S] per batch: the tokens that count.
        states: Per batch, the output of the last block that has run; empty before the first.
    """

    batches: list[Batch]
    masks: list[Tensor]
    states: list[BlockOutput] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return sum(int(mask.sum()) for mask in self.masks)


class LayerStream:
    """The residual stream of all windows; see the module docstring.

    Args:
        runner: Runs the model.
        windows: The windows.
        groups: Number of groups of texts; at most one per window.
        batch_size: Windows per forward pass.
        keep_first: Whether the first token of each window counts, whose activations are massive.
        max_tokens: Most tokens that count in one group.
    """

    def __init__(
        self,
        runner: BlockRunner,
        windows: CalibrationWindows,
        *,
        groups: int,
        batch_size: int,
        keep_first: bool,
        max_tokens: int,
    ) -> None:
        self._runner = runner
        self._windows = windows
        count = min(groups, windows.num_windows)
        ends = [number * windows.num_windows // count for number in range(count + 1)]
        self.groups: list[TextGroup] = []
        for start, stop in zip(ends, ends[1:], strict=False):
            batches = list(_part(windows, slice(start, stop)).batches(batch_size))
            self.groups.append(TextGroup(batches, counted_tokens(runner, batches, keep_first, max_tokens)))

    def check(self) -> None:
        """Proves on a few tokens, which no counter counts, that blocks can be run one after the other.

        Raises:
            UnsupportedModelError: They share more than their return value.
        """
        prove(self._runner, next(iter(self._windows.batches(1))).beginning())

    def advance(
        self,
        group: TextGroup,
        block: int,
        visits: Mapping[nn.Module, Callable[[Tensor, Any], None]],
        begin: Callable[[Tensor], None],
    ) -> None:
        """Runs one group from where it is to the end of a block.

        Args:
            group: One of `groups`.
            block: The block.
            visits: See `BlockRunner.observe`; modules of that block.
            begin: Called with the mask of each batch before it runs.
        """
        if in_order_of_blocks(self._runner):
            reached = group.states[0].block if group.states else -1
            for before in range(reached + 1, block):
                self._step(group, before, {}, lambda mask: None)
        self._step(group, block, visits, begin)

    def _step(
        self,
        group: TextGroup,
        block: int,
        visits: Mapping[nn.Module, Callable[[Tensor, Any], None]],
        begin: Callable[[Tensor], None],
    ) -> None:
        states: list[BlockOutput | None] = [*group.states] or [None] * len(group.batches)
        with held(self._runner.stack.blocks[block]):
            for number, (batch, mask) in enumerate(zip(group.batches, group.masks, strict=True)):
                begin(mask)
                states[number] = self._runner.observe(batch, visits, start=states[number], stop=block)
        group.states[:] = states

    @property
    def stored_values(self) -> int:
        """Number of values held between blocks."""
        sizes: list[int] = []

        def count(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        for group in self.groups:
            for state in group.states:
                map_tensors(state.value, count)
        return sum(sizes)


def counted_tokens(runner: BlockRunner, batches: Iterable[Batch], keep_first: bool, most: int) -> list[Tensor]:
    """Which tokens count: not padding, nor the first token of each window unless `keep_first` says so.

    Of more than `most` of them, evenly spaced ones do, no matter how windows are batched.

    Returns:
        Bool [B, S] per batch, on the CPU.
    """
    masks = [runner.positions(batch) for batch in batches]
    masks = masks if keep_first else [content_mask(mask) for mask in masks]
    total = sum(int(mask.sum()) for mask in masks)
    if total <= most:
        return masks
    chosen, before = [], 0
    for mask in masks:
        number = before + mask.flatten().cumsum(0).view_as(mask)
        before += int(mask.sum())
        chosen.append(mask & (number * most // total > (number - 1) * most // total))
    return chosen


def _part(windows: CalibrationWindows, rows: slice) -> CalibrationWindows:
    """Some of the windows; the fingerprint stays that of all."""
    return replace(
        windows,
        input_ids=windows.input_ids[rows],
        attention_mask=None if windows.attention_mask is None else windows.attention_mask[rows],
        extra={name: tensors[rows] for name, tensors in windows.extra.items()},
        labels=None if windows.labels is None else windows.labels[rows],
    )
