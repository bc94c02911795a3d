# SPDX-License-Identifier: Apache-2.0
"""The architecture table, `architectures.json`, as frozen values.

The facts are data: families whose exactness the test suite proves, configuration fields with the rule that each
follows, constraints on which blocks may go, and weights outside the blocks that have a slice for every block. What a
rule does is in `rules` and `constraints`. Adding a family is adding a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class FieldRule:
    """What happens to a configuration field when blocks go.

    Attributes:
        name: The configuration field.
        rule: Key of `rules.RULES`.
        model_types: The types that it is about; empty: all with such a field.
        stack: Where one flat configuration describes two stacks: the one that the field belongs to.
        base: Number of the first block in lists of block numbers.
        shift: For periods: block i belongs to the pattern when `(i + shift - offset) % period == 0`.
        offset_field: For periods: the field that holds `offset`; 0 without one.
        unless: A field whose list, where it is stored, says more than this one.
        list_field: For periods: a list of block numbers that can name exceptions from the pattern.
        half: Which half of a block it is about, where the two come from different blocks.
    """

    name: str
    rule: str
    model_types: tuple[str, ...] = ()
    stack: str = "decoder"
    base: int = 0
    shift: int = 0
    offset_field: str | None = None
    unless: str | None = None
    list_field: str | None = None
    half: str = "attention"


@dataclass(frozen=True)
class Constraint:
    """Blocks that must stay, or a model type that cannot lose any.

    Attributes:
        rule: Key of `constraints.CONSTRAINTS`; `"uncached"` for types whose own cache is not exact,
            `"uncopied"` for types whose files cannot be renumbered, `"whole_attention"` for types whose heads cannot
            go alone.
        reason: Why, in words that follow a colon.
        model_types: The types it is about; empty: every type with `field`.
        field: The configuration field that it looks at; without a set value the constraint does not apply.
        unset: A field whose set value keeps the constraint from applying.
        root_field: The same for a value in the whole model's configuration, by its dotted path.
        values: Values of `field` that it is about.
        stack: The stack that it is about; both if `None`.
    """

    rule: str
    reason: str
    model_types: tuple[str, ...] = ()
    field: str | None = None
    unset: str | None = None
    root_field: str | None = None
    values: tuple[Any, ...] = ()
    stack: str | None = None


@dataclass(frozen=True)
class SlicedTensor:
    """A weight outside the blocks with one equal slice for every block.

    Attributes:
        module: End of the module's name.
        axis: The axis of its `weight` that holds the slices one after the other.
        attribute: The module's attribute that repeats the size of that axis.
    """

    module: str
    axis: int
    attribute: str


@dataclass(frozen=True)
class Table:
    """The whole of `architectures.json`."""

    families: frozenset[str]
    uncached: tuple[Constraint, ...]
    uncopied: tuple[Constraint, ...]
    whole_attention: tuple[Constraint, ...]
    zero_padding: frozenset[str]
    counts: Mapping[str, Mapping[str, str]]
    fields: Mapping[str, FieldRule]
    constraints: tuple[Constraint, ...]
    tensors: tuple[SlicedTensor, ...]
    widths: Mapping[str, tuple[str, ...]]


@cache
def table() -> Table:
    """Reads `architectures.json` once."""
    data = json.loads(files(__package__).joinpath("architectures.json").read_text(encoding="utf-8"))
    return Table(
        families=frozenset(data["families"]),
        uncached=tuple(Constraint(**_frozen(row)) for row in data["uncached"]),
        uncopied=tuple(Constraint(**_frozen(row)) for row in data["uncopied"]),
        whole_attention=tuple(Constraint(**_frozen(row)) for row in data["whole_attention"]),
        zero_padding=frozenset(data["zero_padding"]),
        counts=data["counts"],
        fields={name: FieldRule(name, **_frozen(row)) for name, row in data["fields"].items()},
        constraints=tuple(Constraint(**_frozen(row)) for row in data["constraints"]),
        tensors=tuple(SlicedTensor(**row) for row in data["tensors"]),
        widths={name: tuple(fields) for name, fields in data["widths"].items()},
    )


def _frozen(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
