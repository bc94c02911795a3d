# SPDX-License-Identifier: Apache-2.0
"""The rules of the architecture table: the new value of one configuration field, given the blocks that stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import UnsupportedModelError


@dataclass(frozen=True)
class Following:
    """What a rule sees.

    Attributes:
        name, value: The field as it is.
        kept: Original indices of the blocks that stay.
        num_blocks: Blocks before.
        subject: The model, in words that begin a message.
        base: Number of the first block in lists of block numbers.
        phase: For periods: block i belongs to the pattern when `(i + phase) % value == 0`.
        exceptions: For periods: blocks that a list field takes out of the pattern; `None` without such a field.
    """

    name: str
    value: Any
    kept: tuple[int, ...]
    num_blocks: int
    subject: str
    base: int = 0
    phase: int = 0
    exceptions: tuple[int, ...] | None = None

    @property
    def position(self) -> dict[int, int]:
        """New index of every kept block."""
        return {block: index for index, block in enumerate(self.kept)}

    def in_pattern(self, block: int) -> bool:
        """Whether a period includes this block."""
        return (block + self.phase) % self.value == 0


def is_set(value: Any) -> bool:
    """False for absent, empty, zero and False: fields that say nothing about the blocks."""
    return value is not None and value is not False and value != 0 and value != [] and value != {}


def _slice(field: Following) -> Any:
    """One entry per block; the same field may hold one value for all blocks, which stays."""
    if not isinstance(field.value, (list, tuple)):
        return field.value
    if len(field.value) != field.num_blocks:
        raise UnsupportedModelError(
            f"{field.subject}: '{field.name}' has {len(field.value)} entries for {field.num_blocks} blocks, so they "
            "cannot be matched to each other."
        )
    return [field.value[block] for block in field.kept]


def _slice_sources(field: Following) -> list[Any]:
    """One entry per block that is the number of the block it reads from, or -1 or None."""
    entries = _slice(field)
    lost = [source for source in entries if _is_block(source) and source not in field.position]
    if lost:
        raise UnsupportedModelError(
            f"{field.subject}: '{field.name}' makes blocks read keys and values of block {lost[0]}, which is removed. "
            f"Keep block {lost[0]}, or remove its readers as well."
        )
    return [field.position[source] if _is_block(source) else source for source in entries]


def _is_block(source: Any) -> bool:
    return isinstance(source, int) and not isinstance(source, bool) and source >= 0


def _renumber(field: Following) -> list[int]:
    moved = (field.position.get(block - field.base) for block in field.value)
    return [block + field.base for block in moved if block is not None]


def _sparse_keys(field: Following) -> dict[Any, Any]:
    """Settings by block number; keys that are no numbers (kinds of blocks) stay."""
    moved = {}
    for key, value in field.value.items():
        number = int(key) if str(key).isdigit() else None
        if number is None:
            moved[key] = value
        elif number in field.position:
            moved[type(key)(field.position[number])] = value
    return moved


def _count(field: Following) -> int:
    """A field that repeats the number of blocks; one with another number is about something else."""
    return len(field.kept) if field.value == field.num_blocks else field.value


def _count_below(field: Following) -> int:
    return sum(block < field.value for block in field.kept)


def _count_between(field: Following) -> int:
    """A section that begins where the blocks of another field end."""
    start = -field.phase
    return sum(start <= block < start + field.value for block in field.kept)


def _count_last(field: Following) -> int:
    return sum(block >= field.num_blocks - field.value for block in field.kept)


def _last_below(field: Following) -> int:
    """An inclusive upper end; -1 ("to the last block") stays."""
    if field.value < 0:
        return field.value
    last = sum(block <= field.value for block in field.kept) - 1
    if last < 0:
        raise UnsupportedModelError(
            f"{field.subject}: '{field.name}={field.value}' cannot say that none of the blocks up to it is left. Keep "
            f"one of blocks 0 to {field.value}."
        )
    return last


def _write_out(field: Following) -> list[Any]:
    """A cyclic pattern, written out in full for the kept blocks."""
    return [field.value[block % len(field.value)] for block in field.kept]


def _write_pairs(field: Following) -> list[Any]:
    """GPT-Neo's `[[kinds, repeats], ...]`, written out as one pair per kept block."""
    kinds = [kind for pattern, repeats in field.value for _ in range(repeats) for kind in pattern]
    return [[[kinds[block]], 1] for block in field.kept]


def _must_match(field: Following) -> Any:
    """A period: accepted when the pattern recomputed on load equals the kept one, or a list can name the exceptions.

    With such a list, the period becomes 1 and the list holds every block outside the pattern (`exceptions`).
    """
    if all(field.in_pattern(old) == field.in_pattern(new) for new, old in enumerate(field.kept)):
        return field.value
    if field.exceptions is not None:
        return 1
    raise UnsupportedModelError(
        f"{field.subject} repeats its block kinds with '{field.name}={field.value}', and no list can say otherwise: "
        "after this removal it would load as another pattern. Remove blocks so that the rest keeps the period, for "
        f"example whole groups of {field.value} consecutive blocks (--blocks)."
    )


def exceptions_written_out(field: Following) -> list[int]:
    """New numbers of the kept blocks outside a period's pattern, once the period itself has become 1."""
    outside = [block for block in field.kept if not field.in_pattern(block) or block in (field.exceptions or ())]
    return [field.position[block] for block in outside]


def _rescale(field: Following) -> float:
    """MiniCPM3 multiplies residuals by `scale_depth / sqrt(depth)`; this keeps the quotient."""
    return field.value * (len(field.kept) / field.num_blocks) ** 0.5


RULES: Mapping[str, Callable[[Following], Any]] = {
    "slice": _slice,
    "slice_sources": _slice_sources,
    "renumber": _renumber,
    "sparse_keys": _sparse_keys,
    "count": _count,
    "count_below": _count_below,
    "count_between": _count_between,
    "count_last": _count_last,
    "last_below": _last_below,
    "write_out": _write_out,
    "write_pairs": _write_pairs,
    "must_match": _must_match,
    "rescale": _rescale,
}
