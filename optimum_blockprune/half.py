# SPDX-License-Identifier: Apache-2.0
"""Half-blocks by number: what a block's attention adds to the residual stream, and what its MLP adds to that."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .errors import PlanError


ATTENTION, MLP = "attention", "mlp"
PARTS = (ATTENTION, MLP)


class Half(NamedTuple):
    """One half of a block of the dense model."""

    block: int
    part: str

    def __str__(self) -> str:
        return f"{self.block}.{self.part}"

    @classmethod
    def read(cls, text: str) -> Half:
        """Reads what `str` wrote.

        Raises:
            ValueError: It is no such text.
        """
        block, _, part = text.partition(".")
        if part not in PARTS or not (block.isascii() and block.isdigit()):
            raise ValueError(f"{text!r} is no half of a block; write '4.attention' or '4.mlp'")
        return cls(int(block), part)

    @property
    def place(self) -> int:
        """Its number in the order A0 M0 A1 M1 ..."""
        return 2 * self.block + (self.part == MLP)


@dataclass(frozen=True)
class BlockSource:
    """Where one block of the result comes from: original block indices of its two halves."""

    attention: int
    mlp: int

    def of(self, part: str) -> int:
        """The original block of one of its halves."""
        return self.mlp if part == MLP else self.attention


def pair_name(first: Half, second: Half) -> int | str:
    """Name of two halves that go together: the block's number where they are of one block."""
    return first.block if first.block == second.block else f"{first}+{second}"


def pair_names(halves: Sequence[str]) -> list[int | str]:
    """Names of the pairs in a list of halves, two by two; one that cannot be read stays as it is."""
    pairs = zip(halves[::2], halves[1::2], strict=False)
    try:
        return [pair_name(Half.read(first), Half.read(second)) for first, second in pairs]
    except ValueError:
        return list(halves)


# A block or a half of one, by its number in the dense model.
Unit = int | Half
# What can go so that blocks are left: a block, or two halves that are neighbours among those that are left.
Removal = int | tuple[Half, Half]


def units_of(removal: Removal) -> list[Unit]:
    """The block, or its two halves."""
    return [removal] if isinstance(removal, int) else list(removal)


def first_block(removal: Removal) -> int:
    """The first block that a removal changes."""
    return removal if isinstance(removal, int) else removal[0].block


def name_of(removal: Removal) -> int | str:
    """Its name in plans and reports: 4, or `"4.mlp+5.attention"`."""
    return removal if isinstance(removal, int) else pair_name(*removal)


def removals(num_blocks: int, gone: Collection[Unit], free: Collection[int]) -> list[Removal]:
    """All that can go next when half-blocks may go: neighbours among the halves that are left, in order.

    Args:
        num_blocks: Number of blocks of the dense model.
        gone: What went before.
        free: Blocks that may lose halves.
    """
    off = halves_of(gone)
    left = [Half(block, part) for block in range(num_blocks) for part in PARTS if Half(block, part) not in off]
    pairs = [pair for pair in zip(left, left[1:], strict=False) if all(half.block in free for half in pair)]
    return [pair[0].block if pair[0].block == pair[1].block else pair for pair in pairs]


@dataclass(frozen=True)
class Row:
    """A model as a row of pieces, with a boundary of the residual stream before each and one behind the last.

    Attributes:
        num_blocks: Number of blocks of the dense model.
        per_block: Pieces of each block: 1 where blocks go, 2 where halves may (A0 M0 A1 M1 ...). Any run of pieces
            whose length is a multiple of it can go: what is left makes up blocks.
    """

    num_blocks: int
    per_block: int = 1

    @property
    def pieces(self) -> int:
        """Number of pieces."""
        return self.num_blocks * self.per_block

    @property
    def boundaries(self) -> int:
        """Number of boundaries."""
        return self.pieces + 1

    def free(self, blocks: Iterable[int]) -> list[int]:
        """The pieces of some blocks, ascending."""
        return [self.per_block * block + part for block in sorted(blocks) for part in range(self.per_block)]

    def starts(self, blocks: Iterable[int], count: int) -> list[int]:
        """Where the runs of pieces begin that are worth `count` blocks and lie within `blocks`."""
        free, length = set(self.free(blocks)), self.per_block * count
        return [start for start in sorted(free) if free.issuperset(range(start, start + length))]

    def removals(self, pieces: Sequence[int]) -> list[Removal]:
        """What goes with the pieces of some runs, run after run: blocks, or pairs of halves."""
        if self.per_block == 1:
            return list(pieces)
        halves = [Half(piece // 2, PARTS[piece % 2]) for piece in pieces]
        pairs = zip(halves[::2], halves[1::2], strict=True)
        return [pair[0].block if pair[0].block == pair[1].block else pair for pair in pairs]

    def name(self, piece: int) -> int | str:
        """A run by its first piece: `4` where it begins with a block, `"4.mlp"` where within one."""
        block, part = divmod(piece, self.per_block)
        return str(Half(block, PARTS[part])) if part else block

    def scores(self, values: Sequence[float]) -> dict[Removal, float]:
        """What goes at each start, with the value of that start."""
        return {self.removals(range(at, at + self.per_block))[0]: value for at, value in enumerate(values)}


def halves_of(units: Iterable[Unit]) -> set[Half]:
    """All halves of some blocks and halves."""
    return {half for unit in units for half in ([unit] if isinstance(unit, Half) else [Half(unit, p) for p in PARTS])}


def blocks_off(units: Collection[Unit]) -> set[int]:
    """The blocks of which nothing is left."""
    gone = halves_of(units)
    return {half.block for half in gone if half.part == ATTENTION and Half(half.block, MLP) in gone}


def single_halves(units: Collection[Unit]) -> dict[int, str]:
    """Of blocks of which one half is left: the half that is off."""
    gone = halves_of(units)
    whole = blocks_off(units)
    return {half.block: half.part for half in gone if half.block not in whole}


def sorted_halves(removed: Iterable[Removal | Half]) -> list[Half]:
    """The halves of some blocks, pairs of halves and halves, in the order of removal."""
    found: list[Half] = []
    for each in removed:
        if isinstance(each, Half):
            found.append(each)
        else:
            found += [Half(each, part) for part in PARTS] if isinstance(each, int) else each
    return found


def names_of(removed: Sequence[Removal | Half]) -> tuple[int | str, ...]:
    """How a plan lists them: by number where all are blocks, else all by their halves."""
    if all(isinstance(each, int) for each in removed):
        return tuple(removed)
    return tuple(map(str, sorted_halves(removed)))


def read_units(names: Iterable[int | str | Half]) -> tuple[Unit, ...]:
    """Blocks and halves by name: `"3"`, `"3.mlp"`; empty names are left out.

    Raises:
        PlanError: One is neither.
    """
    found: list[Unit] = []
    for name in names:
        try:
            found += [name] if not isinstance(name, str) else [_unit(name.strip())] if name.strip() else []
        except ValueError as error:
            raise PlanError(
                f"{name!r} is neither a block ('4') nor a half of one ('4.mlp', '4.attention')."
            ) from error
    return tuple(found)


def _unit(name: str) -> Unit:
    return Half.read(name) if "." in name else int(name)


def joined_halves(num_blocks: int, order: Sequence[Half]) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """What half-blocks leave.

    Args:
        num_blocks: Number of blocks before.
        order: The halves that go, in the order of removal.

    Returns:
        For every block of the result the blocks that its attention and its MLP come from; and the blocks that are gone
        altogether, in the order of removal.

    Raises:
        PlanError: A half does not exist, is named twice, or what is left does not make up blocks.
    """
    gone = set(order)
    wrong = [half for half in order if not 0 <= half.block < num_blocks]
    if wrong or len(gone) < len(order):
        raise PlanError(
            f"Half-block {wrong[0]} does not exist: this model has blocks 0 to {num_blocks - 1}."
            if wrong
            else f"A half-block is removed twice: {', '.join(map(str, order))}."
        )
    left = [Half(block, part) for block in range(num_blocks) for part in PARTS if Half(block, part) not in gone]
    if any(half.part != PARTS[place % 2] for place, half in enumerate(left)) or len(left) % 2:
        raise PlanError(
            f"Without {', '.join(map(str, order))} the halves that are left do not make up blocks: attention and "
            "MLP must alternate."
        )
    seen: set[Half] = set()
    whole = []
    for half in order:
        seen.add(half)
        if blocks_off([half, *seen]) >= {half.block}:
            whole.append(half.block)
    pairs = tuple((a.block, m.block) for a, m in zip(left[::2], left[1::2], strict=True))
    return pairs, tuple(whole)
