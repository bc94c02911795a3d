# SPDX-License-Identifier: Apache-2.0
"""What a unit really does to the output of its block: the block runs once as it is and once without each unit.

Blocks run one after the other from stored outputs, so that a change of one block costs one run of that block. Only the
unit's own block is looked at: this is the objective of arXiv 2412.06419 itself, |f(X) - f(X, s)|, unit by unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .batches import Batch
from .channel_sums import magnitudes
from .measures import fp64_zeros, real_tokens
from .narrowing import units_off
from .offload import held
from .runner import BlockOutput, BlockRunner
from .stand_ins import hidden_of
from .widths import UnitGroup


class UnitEffects:
    """Sums of |Y' - Y| (`"l1"`) or its Frobenius norm (`"l2"`) over tokens and hidden coordinates, unit by unit.

    Args:
        runner: Runs the blocks and counts what they cost.
        units: The groups of each block whose units are tried.
        reduction: `"l1"` or `"l2"`.

    Attributes:
        tokens: Number of tokens looked at so far.
        runs: Runs of a block that one batch takes.
    """

    def __init__(self, runner: BlockRunner, units: Mapping[int, Sequence[UnitGroup]], reduction: str) -> None:
        self._runner, self._units, self._reduction = runner, units, reduction
        self._changes: dict[tuple[int, str, int], Tensor] = {}
        self._sizes: dict[int, Tensor] = {}
        self.tokens = 0
        self.runs = sum(1 + sum(group.units for group in groups) for groups in units.values())

    def add(self, batch: Batch, mask: Tensor, done: Callable[[int], object]) -> None:
        """Looks at one batch.

        Args:
            batch: Windows.
            mask: Bool [B, S]: the tokens that count.
            done: Called with the number of further runs.
        """
        tokens = real_tokens(mask)
        self.tokens += len(tokens)
        state = None
        for block in sorted(self._units):
            before = state
            if block and (state is None or state.block < block - 1):
                before = self._runner.run_to(batch, block - 1, (), state)
            with held(self._runner.stack.blocks[block]):
                state = self._try_units(batch, block, before, tokens)
            done(1 + sum(group.units for group in self._units[block]))

    def _try_units(self, batch: Batch, block: int, before: BlockOutput | None, tokens: Tensor) -> BlockOutput:
        """Runs a block as it is and without each of its units; returns what it gives as it is."""
        state = self._runner.run_to(batch, block, (), before)
        dense = _rows(state.value, tokens)
        self._keep(self._sizes, block, dense)
        for group, unit in _each_unit(self._units[block]):
            others = [other for other in range(group.units) if other != unit]
            with units_off(self._runner.stack.blocks[block], [(group, others)]):
                changed = self._runner.run_to(batch, block, (), before)
            self._keep(self._changes, (block, group.writer, unit), _rows(changed.value, tokens) - dense)
        return state

    def clear(self) -> None:
        """Forgets what was summed."""
        self._changes.clear()
        self._sizes.clear()
        self.tokens = 0

    def sums(self) -> dict[str, Tensor]:
        """What was summed so far, fp64 [units] and [blocks], and `"tokens"`; for `restore`."""
        zero = torch.zeros((), dtype=torch.float64)
        changes = [self._changes.get(key, zero).cpu() for key in self._keys()]
        sizes = [self._sizes.get(block, zero).cpu() for block in sorted(self._units)]
        return {
            "changes": torch.stack(changes),
            "sizes": torch.stack(sizes),
            "tokens": torch.tensor(self.tokens),
        }

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Takes over sums of this object or of several for the same units, added up."""
        self._changes = dict(zip(self._keys(), sums["changes"], strict=True))
        self._sizes = dict(zip(sorted(self._units), sums["sizes"], strict=True))
        self.tokens = int(sums["tokens"])

    def _keys(self) -> list[tuple[int, str, int]]:
        """Every unit that is tried."""
        return [
            (block, group.writer, unit)
            for block in sorted(self._units)
            for group, unit in _each_unit(self._units[block])
        ]

    def effects(self, block: int, group: UnitGroup) -> list[float]:
        """The effect of each unit of a group."""
        return [self._reduced(self._changes[block, group.writer, unit]) for unit in range(group.units)]

    def output_size(self, block: int) -> float:
        """The same measure of the block's output itself, on the same tokens."""
        return self._reduced(self._sizes[block])

    @property
    def finite(self) -> bool:
        """Whether no sum is NaN or infinite."""
        return all(bool(torch.isfinite(total)) for total in (*self._changes.values(), *self._sizes.values()))

    def _keep(self, totals: dict, key: object, values: Tensor) -> None:
        home = fp64_zeros(values, 0).device
        total = magnitudes(values, self._reduction).to(home).sum(dtype=torch.float64)
        totals[key] = totals[key] + total if key in totals else total

    def _reduced(self, total: Tensor) -> float:
        return float(total) if self._reduction == "l1" else float(total) ** 0.5


def _each_unit(groups: Sequence[UnitGroup]) -> Iterable[tuple[UnitGroup, int]]:
    return ((group, unit) for group in groups for unit in range(group.units))


def _rows(value: object, tokens: Tensor) -> Tensor:
    """The tokens that count of a block's output, [n, d], at least fp32."""
    rows = hidden_of(value).flatten(0, 1)
    rows = rows.index_select(0, tokens.to(rows.device))
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
