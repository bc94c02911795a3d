# SPDX-License-Identifier: Apache-2.0
"""Chooses half-blocks so that no functional network is emptied: our extension of `ica.choose_blocks`, no paper's.

What can go together is a set of disjoint pairs of neighbours in the row A0 M0 A1 M1 ... (runs of even length, see
`half.Row`). The set loss is that of `ica.set_loss`, over shares of halves.

What is not covered: the smallest loss. As with blocks, what is found is a set that no single exchange makes better.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from itertools import product

from torch import Tensor

from .errors import ConfigurationError
from .half import Row
from .ica import TIE, choose_blocks, set_loss


Loss = Callable[[Collection[int]], float]


def choose_halves(
    shares: Tensor, weights: Tensor, removable: Iterable[int], count: int, *, contiguous: bool = False
) -> tuple[int, ...]:
    """Numbers of 2 x `count` halves with a small set loss, ascending, which leave blocks.

    1. Add the pair with the smallest loss, `count` times. Pairs are neighbours among the halves that are left.
    2. Exchange two halves for two others while that lowers the loss.
    3. Do 2 from the blocks that `choose_blocks` finds, too, and take the better one: whole blocks with a smaller loss
       are never missed.

    Args:
        shares: e [C, 2T], by half.
        weights: w [C].
        removable: Blocks that may lose halves.
        count: Number of blocks that these halves are worth.
        contiguous: The best run of halves instead.

    Raises:
        ConfigurationError: So much cannot be removed.
    """
    row, removable = Row(shares.shape[1] // 2, 2), sorted(set(removable))
    loss = partial(set_loss, shares, weights / (float(weights.sum()) or 1.0))
    if contiguous and count:
        runs = [tuple(range(start, start + 2 * count)) for start in row.starts(removable, count)]
        if not runs:
            raise ConfigurationError(f"No {count} consecutive blocks may all be removed. Protect or remove fewer.")
        return min(runs, key=loss)
    of_blocks = choose_blocks(shares[:, ::2] + shares[:, 1::2], weights, removable, count)
    free = row.free(removable)
    chosen: tuple[int, ...] = ()
    for _ in range(count):
        chosen = min((_with(chosen, pair) for pair in _pairs(row, free, chosen)), key=loss)
    starts = (chosen, tuple(row.free(of_blocks)))
    return min((_exchanged(row, free, start, loss) for start in starts), key=loss)


def _exchanged(row: Row, free: Collection[int], chosen: tuple[int, ...], loss: Loss) -> tuple[int, ...]:
    """The set from which no exchange leads to a smaller loss; each one lowers it, so this ends."""
    while True:
        better = min(_exchanges(row, free, chosen), key=loss, default=chosen)
        if not loss(better) < loss(chosen) - TIE:
            return chosen
        chosen = better


def _exchanges(row: Row, free: Collection[int], chosen: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All sets with two halves less and two others more that leave blocks."""
    attention, mlp = ([half for half in chosen if half % 2 == part] for part in (0, 1))
    for back in product(attention, mlp):
        rest = tuple(half for half in chosen if half not in back)
        if _leaves_blocks(row, rest):
            for pair in _pairs(row, free, rest):
                if set(pair) != set(back):
                    yield _with(rest, pair)


def _pairs(row: Row, free: Collection[int], gone: Collection[int]) -> Iterator[tuple[int, int]]:
    """Neighbours among the halves that are left, both of which may go."""
    left, may = [half for half in range(row.pieces) if half not in gone], set(free)
    yield from ((first, second) for first, second in zip(left, left[1:], strict=False) if {first, second} <= may)


def _leaves_blocks(row: Row, gone: Collection[int]) -> bool:
    left = [half for half in range(row.pieces) if half not in gone]
    return all(half % 2 == place % 2 for place, half in enumerate(left))


def _with(chosen: tuple[int, ...], pair: tuple[int, int]) -> tuple[int, ...]:
    return tuple(sorted((*chosen, *pair)))
