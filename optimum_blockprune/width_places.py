# SPDX-License-Identifier: Apache-2.0
"""What a strategy of unit `"width"` is asked for: where units are, and how many of them stay."""

from __future__ import annotations

from dataclasses import dataclass

from .widths import UnitGroup


@dataclass(frozen=True)
class Place:
    """Units of one group in one block.

    Attributes:
        block: Number of the block.
        group: Position of the group in `WidthTask.groups`.
        units: Number of units now.
        keep: Number that stays where every block keeps the same share.
        cost: Parameters that go with one unit.
        free: Whether units may go; the others are protected.
    """

    block: int
    group: int
    units: int
    keep: int
    cost: int
    free: bool = True


@dataclass(frozen=True)
class WidthTask:
    """What a strategy of unit `"width"` is asked for.

    Attributes:
        groups: The kinds of units.
        places: Every block and group that the model has.
        layout: `"uniform"` needs exactly `keep` units in every place; of the others, the sum of them over the free
            places of a family counts.
        align: Kept channels of an MLP are a multiple of it.
        allowed: For each group, the numbers of units that the model's classes accept, ascending.
    """

    groups: tuple[UnitGroup, ...]
    places: tuple[Place, ...]
    layout: str
    align: int
    allowed: tuple[tuple[int, ...], ...]

    @property
    def free(self) -> tuple[Place, ...]:
        """The places that may lose units."""
        return tuple(place for place in self.places if place.free)

    def room(self, group: int, widest: int) -> int:
        """Units that blocks are padded to: as many as a configuration can say, all where it can say nothing."""
        kind = self.groups[group]
        return next(n for n in self.allowed[group] if n >= widest) if kind.fields else kind.units

    def group_of(self, place: Place) -> UnitGroup:
        """The kind of units of a place."""
        return self.groups[place.group]
