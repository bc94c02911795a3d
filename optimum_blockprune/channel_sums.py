# SPDX-License-Identifier: Apache-2.0
"""Sums over tokens of what goes into modules and comes out of them, streamed: no activation outlives its batch.

Sums are fp64 and lie on the device of what they are sums of (on the CPU where that has no fp64).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError
from .measures import fp64_zeros, real_tokens
from .stand_ins import hidden_of


INPUT, OUTPUT = "input", "output"
# A module, and which side of it.
Source = tuple[nn.Module, str]


@dataclass
class _Watch:
    """One sum: `of` is called once all sources of a batch have been seen.

    Attributes:
        key: Its name.
        sources: What it is made of.
        of: From the real tokens' rows of each source, [n, ...], to what is summed, [n, ...].
        rows: What has been seen of this batch.
    """

    key: Hashable
    sources: tuple[Source, ...]
    of: Callable[..., Tensor]
    rows: dict[Source, Tensor]


class TokenSums:
    """Named sums over tokens; `visits` goes to `BlockRunner.observe`.

    Attributes:
        tokens: Number of tokens summed over so far.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._watches: list[_Watch] = []
        self._sums: dict[Hashable, Tensor] = {}
        self._chosen = torch.empty(0, dtype=torch.long)
        self._positions = 0

    def watch(self, key: Hashable, sources: Sequence[Source], of: Callable[..., Tensor]) -> None:
        """Adds a sum.

        Args:
            key: Its name.
            sources: Modules of one block that all run once in a pass, and which side of each.
            of: Maps the rows of the sources, [n, channels] each, to what is summed over n. Rows are held until the
                last of the sources has run, no longer.
        """
        self._watches.append(_Watch(key, tuple(sources), of, {}))

    def begin(self, mask: Tensor, *, again: bool = False) -> None:
        """Turns to a batch; `mask` [B, S] says which tokens count, and `again` that they were counted before."""
        self._positions = mask.numel()
        self._chosen = real_tokens(mask)
        self.tokens += 0 if again else len(self._chosen)
        for watch in self._watches:
            watch.rows.clear()

    @property
    def visits(self) -> Mapping[nn.Module, Callable[[Tensor, Any], None]]:
        """What to call whenever a module has run."""
        modules = {module: None for watch in self._watches for module, _ in watch.sources}
        return {module: self._visitor(module) for module in modules}

    def total(self, key: Hashable) -> Tensor:
        """The sum, fp64."""
        return self._sums[key]

    def mean(self, key: Hashable) -> Tensor:
        """The sum over the number of tokens, fp64."""
        return self._sums[key] / self.tokens

    def clear(self) -> None:
        """Forgets what was summed; the watches stay."""
        self._sums.clear()
        self.tokens = 0

    def sums(self) -> dict[str, Tensor]:
        """What was summed so far, by the number of its watch, and `"tokens"`; for `restore`."""
        keys = {str(number): watch.key for number, watch in enumerate(self._watches)}
        found = {number: self._sums[key] for number, key in keys.items() if key in self._sums}
        return {**found, "tokens": torch.tensor(self.tokens)}

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Takes over sums of this object or of several with the same watches, added up; they lie on the CPU then."""
        self.tokens = int(sums["tokens"])
        self._sums = {watch.key: sums[str(n)] for n, watch in enumerate(self._watches) if str(n) in sums}

    @property
    def finite(self) -> bool:
        """Whether no sum is NaN or infinite."""
        return all(bool(torch.isfinite(values).all()) for values in self._sums.values())

    @property
    def stored_values(self) -> int:
        """Number of values held between batches."""
        return sum(values.numel() for values in (*self._sums.values(), *self._pending()))

    def _pending(self) -> Iterator[Tensor]:
        return (rows for watch in self._watches for rows in watch.rows.values())

    def _visitor(self, module: nn.Module) -> Callable[[Tensor, Any], None]:
        def visit(incoming: Tensor, outgoing: Any) -> None:
            sides = {INPUT: incoming, OUTPUT: outgoing}
            for watch in self._watches:
                mine = [source for source in watch.sources if source[0] is module]
                # A copy of the rows: the model may change a value in place before the last source has run.
                watch.rows.update((source, self._rows(sides[source[1]])) for source in mine)
                if mine and len(watch.rows) == len(set(watch.sources)):
                    self._add(watch.key, watch.of(*(watch.rows[source] for source in watch.sources)))
                    watch.rows.clear()

        return visit

    def _rows(self, values: Any) -> Tensor:
        """The tokens that count, [n, channels], of [B, S, channels] or [B * S, channels]."""
        hidden = hidden_of(values)
        flat = hidden.reshape(-1, hidden.shape[-1])
        if len(flat) != self._positions:
            raise UnsupportedModelError(
                f"A module sees {len(flat)} rows where the batch has {self._positions} tokens, so that padding cannot "
                "be told from text in it. Use a strategy that measures no activations (magnitude)."
            )
        self._chosen = self._chosen.to(flat.device)
        return flat.index_select(0, self._chosen)

    def _add(self, key: Hashable, values: Tensor) -> None:
        home = fp64_zeros(values, 0).device
        # Where the device has fp64, the values are widened one by one while they are added up.
        summed = values.sum(0, dtype=torch.float64) if home == values.device else values.sum(0).to(home, torch.float64)
        self._sums[key] = self._sums[key] + summed if key in self._sums else summed


def magnitudes(values: Tensor, reduction: str) -> Tensor:
    """What is summed per entry: |x| for `"l1"`, x^2 for `"l2"`, at least fp32."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return wide.abs() if reduction == "l1" else wide.square()
