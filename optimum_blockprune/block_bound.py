# SPDX-License-Identifier: Apache-2.0
"""How far a channel can move the output of its block: the bound of LLM-BIP (arXiv 2412.06419) as tensor functions.

With `x_j` the input of a writer at channel j, `W^j` the row of its weight (inputs x outputs) and everything absolute:

    FFN channel        |x_j| |W_D^j|
    attention channel  |x_j| |W_O^j| (I + R |W_D|)         printed in the paper with R = |W_U|

Both are matrices, tokens x hidden coordinates. As scalars (our reading): `"l1"`, the sum of all entries, `"l2"`, the
Frobenius norm; both split into a statistic of x_j times a number of the weights. No d x d matrix is ever made: the sum
needs (I + R |W_D|) 1 only, the norm the rows (|W_O| R) |W_D|.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError
from .measures import fp64_zeros
from .units import input_axis


# Rows worked on at a time.
_ROWS = 512


@dataclass(frozen=True)
class Reach:
    """What an FFN adds on the way from a hidden coordinate to the block's output: I + R |W_D|.

    Attributes:
        readers: R, [d, m], not negative.
        writer: |W_D|, [m, d].
    """

    readers: Tensor
    writer: Tensor

    @cached_property
    def vector(self) -> Tensor:
        """v = (I + R |W_D|) 1, fp64 [d], by two products with a vector."""
        return 1 + _times(self.readers, self.writer.sum(1, dtype=torch.float64))

    def joined(self, other: Reach) -> Reach:
        """The reach of two FFNs side by side."""
        return Reach(torch.cat([self.readers, other.readers], 1), torch.cat([self.writer, other.writer]))


def absolute(module: nn.Module) -> Tensor:
    """|W| of a projection, [inputs, outputs], at least fp32, where fp64 can be had.

    Raises:
        UnsupportedModelError: The module is no plain projection.
    """
    axis = input_axis(module)
    if axis is None:
        raise UnsupportedModelError(f"{type(module).__name__} is no plain projection, so its weight cannot be read.")
    weight = module.weight.detach()
    weight = weight.to(fp64_zeros(weight, 0).device, torch.promote_types(weight.dtype, torch.float32)).abs()
    return weight.T if axis == 1 else weight


def local_readers(readers: Sequence[Tensor], slopes: Tensor, gain: Tensor) -> Tensor:
    """R of the local bound, [d, m]: |gain| times the sum over readers of |W| with its columns times their slopes.

    Args:
        readers: |W| of gate and up, or of the only reader, [d, m] each.
        slopes: fp64 [readers, m]: E|act'(g) u / rms| and E|act(g) / rms|, or E|act'(z) / rms|.
        gain: fp64 [d], of the norm before them.
    """
    total = sum(weights * each.to(weights) for weights, each in zip(readers, slopes, strict=True))
    return total * gain.abs().to(total).unsqueeze(1)


def channel_scores(writer: Tensor, totals: Tensor, reduction: str, reach: Reach | None = None) -> Tensor:
    """Scores of a writer's inputs, fp64 [inputs].

    Args:
        writer: |W| [inputs, d].
        totals: fp64 [inputs]: sum of |x| (`"l1"`) or of x^2 (`"l2"`) over tokens.
        reduction: `"l1"` or `"l2"`.
        reach: What else of the block lies behind; nothing behind an FFN.
    """
    statistic = totals.to(writer.device)
    if reduction == "l1":
        ones = fp64_zeros(writer, writer.shape[1]) + 1
        return statistic * _times(writer, ones if reach is None else reach.vector.to(writer.device))
    return statistic.sqrt() * torch.cat([_row_norms(rows, reach) for rows in writer.split(_ROWS)])


def _row_norms(rows: Tensor, reach: Reach | None) -> Tensor:
    if reach is not None:
        rows = rows + (rows @ reach.readers.to(rows)) @ reach.writer.to(rows)
    return rows.double().norm(dim=1)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """A product in fp64 without an fp64 copy of the whole matrix."""
    return torch.cat([rows.double() @ vector for rows in matrix.split(_ROWS)])
