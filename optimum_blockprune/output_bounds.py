# SPDX-License-Identifier: Apache-2.0
"""Bounds on how far units move the output of their block: which sums they need, and their scores afterwards.

The formulas are in `block_bound`; here live modules are put into them. A norm behind a writer (Gemma-2, OLMo-2) is no
part of arXiv 2412.06419: the columns of that writer are multiplied by |gain| E[1 / rms], in every place where the
writer occurs (our choice).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from .block_bound import Reach, absolute, channel_scores, local_readers
from .block_parts import SEQUENTIAL, BlockParts, FeedForward
from .channel_sums import INPUT, OUTPUT, Source, TokenSums, magnitudes
from .errors import UnsupportedModelError
from .norm_gain import Norm
from .widths import UnitGroup


PAPER, LOCAL, NONE = "paper", "local", "none"


class OutputBounds:
    """The scores of the units of some blocks, in three steps: `watch`, one pass over the text, `scores`.

    Args:
        blocks: The blocks of a live model.
        parts: What surrounds the units, by block.
        reduction: `"l1"` or `"l2"`.
        propagate: What lies behind an attention unit: `"paper"`, `"local"` or `"none"` (the residual path only).

    Attributes:
        sums: What is streamed.
        vector_means: Mean of v over hidden coordinates, by block, for the blocks whose attention was scored.
    """

    def __init__(
        self, blocks: nn.ModuleList, parts: Mapping[int, BlockParts], *, reduction: str, propagate: str
    ) -> None:
        self._blocks, self._parts = blocks, parts
        self._reduction, self._propagate = reduction, propagate
        self._watched: set[Hashable] = set()
        self.sums = TokenSums()
        self.vector_means: dict[int, float] = {}

    def watch(self, block: int, group: UnitGroup) -> None:
        """Asks for the sums that the units of a group need.

        Raises:
            UnsupportedModelError: `"local"` needs what cannot be seen in this block.
        """
        writer = self._blocks[block].get_submodule(group.writer)
        self._sum(("units", block, group.writer), [(writer, INPUT)], self._magnitudes)
        self._watch_post(block, group.writer)
        if group.family != "attention":
            return
        for number, ffn in enumerate(self._reached(block)):
            self._watch_post(block, ffn.group.writer)
            if self._propagate == LOCAL:
                _require_slopes(ffn, block)
                self._sum(("slopes", block, number), _slope_sources(ffn), _Slopes(ffn))

    def watch_output(self, block: int) -> None:
        """Asks for the size of a block's output."""
        self._sum(("output", block), [(self._blocks[block], OUTPUT)], self._magnitudes)

    def output_size(self, block: int) -> float:
        """Sum of |y| over tokens and coordinates of the output (`"l1"`), or its Frobenius norm (`"l2"`)."""
        total = float(self.sums.total(("output", block)).sum())
        return total if self._reduction == "l1" else total**0.5

    def scores(self, block: int, group: UnitGroup) -> list[float]:
        """The score of each unit of a group: the sum over its channels (our choice)."""
        reach = self._reach(block) if group.family == "attention" else None
        if group.family == "attention":
            self.vector_means[block] = 1.0 if reach is None else float(reach.vector.mean())
        totals = self.sums.total(("units", block, group.writer))
        channels = channel_scores(self._absolute(block, group.writer), totals, self._reduction, reach)
        return channels[: group.units * group.inputs_per_unit].view(group.units, -1).sum(1).tolist()

    def _reached(self, block: int) -> tuple[FeedForward, ...]:
        """The FFNs that attention of the block feeds."""
        parts = self._parts[block]
        return parts.ffns if parts.flow == SEQUENTIAL and self._propagate != NONE else ()

    def _reach(self, block: int) -> Reach | None:
        found = []
        for number, ffn in enumerate(self._reached(block)):
            if self._propagate == LOCAL:
                weights = [_columns(stream.reader, stream.entries) for stream in ffn.streams]
                slopes = self.sums.mean(("slopes", block, number))
                gain = _ones(weights[0]) if ffn.norm is None else ffn.norm.gain
                readers = local_readers(weights, slopes, gain)
            else:
                readers = sum(_columns(stream.reader, stream.entries) for stream in ffn.up) / len(ffn.up)
            found.append(Reach(readers, self._absolute(block, ffn.group.writer)[: ffn.group.units]))
        return reduce(Reach.joined, found) if found else None

    def _absolute(self, block: int, writer: str) -> Tensor:
        """|W| of a writer, [inputs, d], seen from behind the norm that may follow."""
        weights, norm = absolute(self._blocks[block].get_submodule(writer)), self._parts[block].posts.get(writer)
        if norm is None:
            return weights
        gain = norm.gain.abs()
        return weights * (gain * self.sums.mean(("post", block, writer)).to(gain)).to(weights)

    def _watch_post(self, block: int, writer: str) -> None:
        norm = self._parts[block].posts.get(writer)
        if norm is not None:
            self._sum(("post", block, writer), _both_sides(norm), norm.inverse)

    def _magnitudes(self, rows: Tensor) -> Tensor:
        return magnitudes(rows, self._reduction)

    def _sum(self, key: Hashable, sources: Sequence[Source], of: Callable[..., Tensor]) -> None:
        if key not in self._watched:
            self._watched.add(key)
            self.sums.watch(key, sources, of)


def _ones(weights: Tensor) -> Tensor:
    """fp64 [d]: the gain where there is no norm."""
    return torch.ones(len(weights), dtype=torch.float64, device=weights.device)


def _both_sides(norm: Norm) -> list[Source]:
    return [(norm.module, INPUT), (norm.module, OUTPUT)]


def _columns(reader: nn.Module, entries: Tensor) -> Tensor:
    """|W| of one stream, [d, m]."""
    weights = absolute(reader)
    return weights.index_select(1, entries.to(weights.device))


def _slope_sources(ffn: FeedForward) -> list[Source]:
    readers = dict.fromkeys((stream.reader, OUTPUT) for stream in ffn.streams)
    return [*(_both_sides(ffn.norm) if ffn.norm is not None else ()), *readers]


class _Slopes:
    """Product rule at the observed activations: |act'(g) u / rms| and |act(g) / rms|, or |act'(z) / rms|."""

    def __init__(self, ffn: FeedForward) -> None:
        self._ffn = ffn

    def __call__(self, *rows: Tensor) -> Tensor:
        """From the rows of `_slope_sources` to [n, streams, m]."""
        ffn, inverse, outputs = self._ffn, 1.0, rows
        if ffn.norm is not None:
            inverse, outputs = ffn.norm.inverse(*rows[:2]).unsqueeze(-1), rows[2:]
        readers = list(dict.fromkeys(stream.reader for stream in ffn.streams))
        first, *others = (stream.of(outputs[readers.index(stream.reader)]) for stream in ffn.streams)
        with torch.enable_grad():
            point = first.detach().to(torch.promote_types(first.dtype, torch.float32)).requires_grad_()
            value = ffn.activation(point)
            (slope,) = torch.autograd.grad(value.sum(), point)
        terms = [slope * others[0], value.detach()] if others else [slope]
        return torch.stack([(term * inverse).abs() for term in terms], 1)


def _require_slopes(ffn: FeedForward, block: int) -> None:
    lacking = []
    if ffn.activation is None:
        lacking.append("its activation function")
    elif not ffn.product:
        lacking.append(f"the writer's input as activation{' times up' if len(ffn.streams) > 1 else ''}")
    if ffn.norm is None and not ffn.bare:
        lacking.append("the norm before it")
    if lacking:
        raise UnsupportedModelError(
            f"propagate='local' needs the slope of the FFN before '{ffn.group.writer}' in block {block}, but "
            f"{' and '.join(lacking)} cannot be seen there. Use propagate='paper' or 'exact'."
        )
