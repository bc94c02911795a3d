# SPDX-License-Identifier: Apache-2.0
"""Finds and captures the signals of the units of one block: a matrix tokens x channels.

    act_up    [a | u]: what the activation gives and what the up projection gives, for every unit (arXiv 2508.05239)
    product   h: what goes into the writer, a * u in a gated MLP (our choice, for comparison)

Where units have one reader only, there is no u, and the signal is the writer's input. Where the activation cannot be
seen or there are more than two readers, the writer's input takes the place of [a | u] as well (our choice).

What is not covered: experts, whose modules see some of the tokens only; these are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .block_parts import FeedForward, find_parts
from .blocks import BlockStack
from .errors import UnsupportedModelError
from .measures import real_tokens
from .stand_ins import hidden_of
from .widths import UnitGroup


ACT_UP, PRODUCT = "act_up", "product"
SIGNALS = (ACT_UP, PRODUCT)


@dataclass(frozen=True)
class Channel:
    """One signal per unit.

    Attributes:
        module: Where it is seen.
        read: Picks what is looked at, [..., m], from what goes into the module and what comes out.
        of: Maps rows of that, [n, m], to the signals of the units, [n, units].
    """

    module: nn.Module
    read: Callable[[Tensor, Any], Tensor]
    of: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Signals:
    """The signals of one group of units in one block.

    Attributes:
        units: Number of units.
        channels: One channel of every unit each.
        stands_in: Whether the writer's input stands in for an activation that was not seen.
    """

    units: int
    channels: tuple[Channel, ...]
    stands_in: bool = False

    def per_unit(self, values: Tensor) -> Tensor:
        """From one value per column of the matrix to the largest one per unit."""
        return values.view(len(self.channels), self.units).amax(0)


def find_signals(
    stack: BlockStack, units: Mapping[int, Sequence[UnitGroup]], kind: str = ACT_UP
) -> dict[tuple[int, str], Signals]:
    """Returns the signals by block and writer.

    Args:
        stack: The blocks of a live model; each named one is called on made-up tokens.
        units: Groups of MLP channels by block.
        kind: `ACT_UP` or `PRODUCT`.
    """
    parts = find_parts(stack, units, flow=False) if kind == ACT_UP and units else {}
    found: dict[tuple[int, str], Signals] = {}
    for block, groups in units.items():
        ffns = {ffn.group.writer: ffn for ffn in parts[block].ffns} if parts else {}
        for group in groups:
            writer = stack.blocks[block].get_submodule(group.writer)
            plain = Channel(writer, lambda incoming, _: incoming, lambda rows: rows)
            signals = Signals(group.units, (plain,), stands_in=kind == ACT_UP)
            found[block, group.writer] = _act_up(signals, ffns.get(group.writer))
    return found


def _act_up(plain: Signals, ffn: FeedForward | None) -> Signals:
    """[a | u] where it was seen, the writer's input elsewhere."""
    if ffn is None:
        return plain
    if len(ffn.streams) == 1:
        return Signals(plain.units, plain.channels)
    if len(ffn.streams) > 2 or ffn.activation is None:
        return plain
    gate, up = ffn.streams
    activation = ffn.activation
    act = Channel(gate.reader, lambda _, outgoing: hidden_of(outgoing), lambda rows: activation(gate.of(rows)))
    return Signals(plain.units, (act, Channel(up.reader, act.read, up.of)))


class Capture:
    """Fills the matrix of one block and one group of texts, batch by batch; `visits` goes to `BlockRunner.observe`.

    Args:
        signals: What to capture.
        tokens: Number of tokens that count, in all batches together.

    Attributes:
        signals: As given.
    """

    def __init__(self, signals: Signals, tokens: int) -> None:
        self.signals = signals
        self._tokens = tokens
        self._filled = [0] * len(signals.channels)
        self._values: Tensor | None = None
        self._chosen = torch.empty(0, dtype=torch.long)
        self._positions = 0

    @property
    def stored_values(self) -> int:
        """Number of values held."""
        return 0 if self._values is None else self._values.numel()

    @property
    def visits(self) -> dict[nn.Module, Callable[[Tensor, Any], None]]:
        """What to call whenever a module has run."""
        modules = dict.fromkeys(channel.module for channel in self.signals.channels)
        return {module: self._visitor(module) for module in modules}

    def begin(self, mask: Tensor) -> None:
        """Starts a batch; `mask` [B, S] says which tokens count."""
        self._positions = mask.numel()
        self._chosen = real_tokens(mask)

    def take(self) -> Tensor:
        """Hands the matrix [tokens, channels * units] over, in the model's own precision.

        Raises:
            UnsupportedModelError: A module did not run once per batch.
        """
        if any(filled != self._tokens for filled in self._filled):
            raise UnsupportedModelError(
                f"The modules around the MLP channels gave signals of {self._filled} tokens where the text has "
                f"{self._tokens}: they do not run once per pass. Use a strategy that measures no activations "
                "(magnitude), or unit=block."
            )
        values, self._values = self._values, None
        return values

    def _visitor(self, module: nn.Module) -> Callable[[Tensor, Any], None]:
        def visit(incoming: Tensor, outgoing: Any) -> None:
            for number, channel in enumerate(self.signals.channels):
                if channel.module is module:
                    self._put(number, channel.of(self._rows(channel.read(incoming, outgoing))))

        return visit

    def _rows(self, values: Tensor) -> Tensor:
        """The tokens that count, [n, m], of [B, S, m] or [B * S, m]; a copy, which the model cannot change later."""
        flat = values.reshape(-1, values.shape[-1])
        if len(flat) != self._positions:
            raise UnsupportedModelError(
                f"A module of the MLP sees {len(flat)} rows where the batch has {self._positions} tokens (an "
                "expert?), so that text cannot be told from padding. Use a strategy that measures no activations "
                "(magnitude), or unit=block."
            )
        self._chosen = self._chosen.to(flat.device)
        return flat.index_select(0, self._chosen)

    def _put(self, number: int, rows: Tensor) -> None:
        units, start = self.signals.units, self._filled[number]
        self._filled[number] += len(rows)
        if self._values is None:
            self._values = rows.new_empty(self._tokens, units * len(self.signals.channels))
        if self._filled[number] <= self._tokens:  # more are refused in the end
            self._values[start : start + len(rows), number * units : (number + 1) * units].copy_(rows)
