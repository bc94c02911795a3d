# SPDX-License-Identifier: Apache-2.0
"""Width as plain values: which units a block is made of, where each one lies, and which of them are kept.

A *unit* is the smallest piece that can go alone: a channel of an MLP, or a KV head with all its query heads (a query
head where all of them share one KV head). Units of one kind form a `UnitGroup`. Every unit ends in one module that
writes to the residual stream, the group's *writer* (`down_proj`, `o_proj`): without its columns there, a unit is off.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import PlanError
from .json_values import finite, misfit


FAMILIES = ("mlp", "attention")
LAYOUTS = ("uniform", "padded", "per_layer")

# In lists of indices: zeros go here.
ZEROS = -1

# Our choice: kept units that a file may list. Twice those of the widest public models would fit; ranges are short to
# write, and their numbers are not to fill the memory.
MAX_KEPT = 2**24


@dataclass(frozen=True)
class CutTensor:
    """A tensor of a block of which each unit owns a part along one axis.

    Attributes:
        name: Inside the block, such as `mlp.gate_up_proj.weight`.
        axis: The axis that becomes shorter.
        parts: Entries per unit, for every stretch of the axis: `(1,)` for a plain projection, `(1, 1)` for gate and up
            one after the other, `(2,)` for gate and up taking turns, `(4 * 64, 64, 64)` for Q, K and V in a row.
        rest: Entries at the end that belong to no unit (K and V that all query heads share).
    """

    name: str
    axis: int
    parts: tuple[int, ...]
    rest: int = 0

    def size(self, units: int) -> int:
        """Length of the axis with so many units."""
        return units * sum(self.parts) + self.rest

    def indices(self, kept: Sequence[int], units: int, width: int | None = None) -> tuple[int, ...]:
        """Which entries of the axis make up the kept units, in their new order.

        Args:
            kept: The units.
            units: Number of units now.
            width: Number of units afterwards; zeros (`ZEROS`) fill up what is more than `kept`.
        """
        filling = (len(kept) if width is None else width) - len(kept)
        found: list[int] = []
        start = 0
        for size in self.parts:
            for unit in kept:
                found.extend(range(start + unit * size, start + (unit + 1) * size))
            found.extend([ZEROS] * (filling * size))
            start += units * size
        found.extend(range(start, start + self.rest))
        return tuple(found)


@dataclass(frozen=True)
class CutAttribute:
    """A number in a module of a block that follows the units: `per_unit * units + constant`."""

    module: str
    name: str
    per_unit: int
    constant: int = 0


@dataclass(frozen=True)
class UnitGroup:
    """Units of one kind, the same in every block that has them.

    Attributes:
        family: `"mlp"` or `"attention"`.
        unit: `"channel"`, `"kv_group"` (a KV head with its query heads) or `"head"` (a query head).
        writer: The module inside the block that all of them end in.
        units: Their number before pruning.
        fields: Configuration fields that hold the number of units, each with its value per unit.
        fixed: Configuration fields that must be written out, since they are derived from others otherwise.
        tensors: What belongs to them; the first one is the writer's weight.
        attributes: Numbers that follow.
        reads_config: Whether its modules look the fields up in the configuration while they run.
    """

    family: str
    unit: str
    writer: str
    units: int
    fields: Mapping[str, int] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    tensors: tuple[CutTensor, ...] = ()
    attributes: tuple[CutAttribute, ...] = ()
    reads_config: bool = False

    @property
    def inputs_per_unit(self) -> int:
        """Inputs of the writer that belong to one unit, side by side: 1, or query heads times head size."""
        return self.tensors[0].parts[0]

    def values(self, units: int) -> dict[str, Any]:
        """The configuration fields with so many units."""
        return {**{name: units * each for name, each in self.fields.items()}, **self.fixed}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> UnitGroup:
        """Reads what `dataclasses.asdict` wrote.

        Raises:
            PlanError: A value is impossible.
            LookupError, TypeError, ValueError: It is malformed.
        """
        tensors = tuple(CutTensor(**{**row, "parts": tuple(row["parts"])}) for row in data["tensors"])
        attributes = tuple(CutAttribute(**row) for row in data["attributes"])
        group = cls(**{**data, "tensors": tensors, "attributes": attributes})
        fault = next(filter(None, map(misfit, (group, *tensors, *attributes))), None)
        if fault:
            raise PlanError(f"A group of units in the plan is malformed: {fault}.")
        _check_sizes(group)
        return group


@dataclass(frozen=True)
class Narrowing:
    """The kept units of one group in one block.

    Attributes:
        block: Original number of the block.
        group: Position of the group in the plan's `groups`.
        kept: Its units that stay, ascending; all of them where the block keeps its width.
        means: What the writer's bias makes up for: the mean of each of its inputs that go, ascending; empty where the
            removed units are simply missing.
    """

    block: int
    group: int
    kept: tuple[int, ...]
    means: tuple[float, ...] = ()


@dataclass(frozen=True)
class Width:
    """The width part of a plan; empty where nothing becomes narrower.

    Attributes:
        layout: `"uniform"`: the same number of units in every block; `"padded"`: zeros fill up to the widest block;
            `"per_layer"`: every block has its own number, which only this package loads.
        groups: The kinds of units.
        narrowed: One entry for every block and group that the model has.
        padded_to: Layout `"padded"`: the units of each group that every block is stored with; by default what the
            widest block keeps.
    """

    layout: str = "uniform"
    groups: tuple[UnitGroup, ...] = ()
    narrowed: tuple[Narrowing, ...] = ()
    padded_to: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _validate(self)

    def __bool__(self) -> bool:
        return bool(self.narrowed)

    @property
    def loads_anywhere(self) -> bool:
        """Whether the result is an ordinary checkpoint."""
        return self.layout != "per_layer"

    def width_of(self, group: int) -> int:
        """Units of a group that each block is stored with, unless every block has its own number."""
        if self.padded_to:
            return self.padded_to[group]
        return max(len(each.kept) for each in self.narrowed if each.group == group)

    def stored(self, narrowing: Narrowing) -> int:
        """Units that one block is stored with."""
        return len(narrowing.kept) if self.layout == "per_layer" else self.width_of(narrowing.group)

    def fields(self) -> dict[str, Any]:
        """Configuration fields that follow; none where blocks differ and no field can say so."""
        if not self.loads_anywhere:
            return {}
        return {
            name: value
            for number, group in enumerate(self.groups)
            for name, value in group.values(self.width_of(number)).items()
        }

    def of_block(self, block: int) -> list[tuple[UnitGroup, Narrowing]]:
        """What an original block keeps."""
        return [(self.groups[each.group], each) for each in self.narrowed if each.block == block]

    def totals(self) -> dict[str, dict[str, int]]:
        """Units before and after, summed over blocks, by family."""
        found: dict[str, dict[str, int]] = {}
        for each in self.narrowed:
            group = self.groups[each.group]
            sums = found.setdefault(group.family, {"before": 0, "after": 0})
            sums["before"] += group.units
            sums["after"] += len(each.kept)
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON types; kept units as ranges."""
        narrowed = [{**asdict(each), "kept": spelled(each.kept)} for each in self.narrowed]
        groups = [asdict(group) for group in self.groups]
        return {"layout": self.layout, "groups": groups, "narrowed": narrowed, "padded_to": list(self.padded_to)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Width:
        """Reads what `to_dict` wrote.

        Raises:
            PlanError: It contradicts itself.
            LookupError, TypeError, ValueError: It is malformed.
        """
        unknown = sorted(set(data) - set(cls.__dataclass_fields__))
        if unknown:
            raise PlanError(f"Unknown fields in the width of the plan: {', '.join(unknown)}.")
        groups = tuple(UnitGroup.from_dict(group) for group in data["groups"])
        _refuse_too_many([each["kept"] for each in data["narrowed"]])
        narrowed = tuple(
            Narrowing(**{**each, "kept": read_ranges(each["kept"]), "means": tuple(each.get("means", ()))})
            for each in data["narrowed"]
        )
        width = cls(data["layout"], groups, narrowed, tuple(data.get("padded_to", ())))
        fault = misfit(width) or next(filter(None, map(misfit, narrowed)), None)
        if fault or not all(finite(each.means) for each in narrowed):
            raise PlanError(f"The width of the plan is malformed: {fault or 'means must be finite numbers'}.")
        return width


def spelled(numbers: Iterable[int]) -> str:
    """Spells ascending numbers as `0-2,7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def read_ranges(text: str) -> tuple[int, ...]:
    """Reads what `spelled` wrote."""
    return tuple(number for run in _runs(text) for number in run)


def _runs(text: str) -> list[range]:
    ends = [part.partition("-") for part in text.split(",") if part]
    return [range(int(first), int(last or first) + 1) for first, _, last in ends]


def _refuse_too_many(texts: Iterable[str]) -> None:
    """Counts the kept units before any of them is written out."""
    count = sum(max(0, run.stop - run.start) for text in texts for run in _runs(text))
    if count > MAX_KEPT:
        raise PlanError(f"The plan lists more than {MAX_KEPT} kept units, which no model has.")


def _check_sizes(group: UnitGroup) -> None:
    """Sizes of a group as they can be: something to cut, and nothing of a negative size."""
    if group.units < 1 or not group.tensors:
        raise PlanError(f"The units before {group.writer!r} in the plan are malformed: there are no units or tensors.")
    for cut in group.tensors:
        if cut.axis < 0 or cut.rest < 0 or not cut.parts or min(cut.parts) < 1:
            raise PlanError(
                f"The tensor {cut.name!r} in the plan is malformed: axis and rest are 0 or more, parts 1 or more."
            )


def _validate(width: Width) -> None:
    if width.layout not in LAYOUTS:
        raise PlanError(f"Unknown layout {width.layout!r} of a plan; possible: {', '.join(LAYOUTS)}.")
    seen: set[tuple[int, int]] = set()
    for each in width.narrowed:
        if not 0 <= each.group < len(width.groups):
            raise PlanError(f"The plan has no group {each.group} of units.")
        group, place = width.groups[each.group], f"{width.groups[each.group].writer} of block {each.block}"
        if (each.block, each.group) in seen:
            raise PlanError(f"The plan narrows {place} twice.")
        seen.add((each.block, each.group))
        if not each.kept:
            raise PlanError(f"The plan removes every unit before {place}; at least one must stay.")
        if list(each.kept) != sorted(set(each.kept)) or each.kept[0] < 0 or each.kept[-1] >= group.units:
            raise PlanError(f"The kept units before {place} must be ascending numbers from 0 to {group.units - 1}.")
        gone = (group.units - len(each.kept)) * group.inputs_per_unit
        if each.means and len(each.means) != gone:
            raise PlanError(f"The plan has {len(each.means)} means for the {gone} inputs that go before {place}.")
    unused = set(range(len(width.groups))) - {group for _, group in seen}
    if unused:
        raise PlanError(f"No block of the plan has the units of group {min(unused)}.")
    if width.padded_to:
        _enough_room(width)
    if width.layout == "uniform":
        _same_counts(width)


def _enough_room(width: Width) -> None:
    if width.layout != "padded" or len(width.padded_to) != len(width.groups):
        raise PlanError("Only layout 'padded' has a number of units that blocks are padded to, one for every group.")
    for each in width.narrowed:
        room = width.padded_to[each.group]
        if not len(each.kept) <= room <= width.groups[each.group].units:
            raise PlanError(f"Block {each.block} keeps {len(each.kept)} units, but is padded to {room}.")


def _same_counts(width: Width) -> None:
    for number, group in enumerate(width.groups):
        counts = {len(each.kept) for each in width.narrowed if each.group == number}
        if len(counts) > 1:
            raise PlanError(
                f"Layout 'uniform' keeps the same number of units in every block, but {group.writer} keeps "
                f"{min(counts)} in one and {max(counts)} in another; use layout 'padded' or 'per_layer'."
            )
