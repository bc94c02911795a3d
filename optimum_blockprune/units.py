# SPDX-License-Identifier: Apache-2.0
"""Finds the units of width of a model: which parts of which tensors belong to an MLP channel or to a KV group.

No model names and no list of layouts. Two empty models are built, one from the configuration as it is and one with
fewer channels (or heads) in it: the tensors whose shapes differ are those that the units own, the plain attributes
that differ are those that follow, and the one projection whose *input* became shorter is where the units end. What
shapes cannot tell, the order inside a fused tensor, stays open here as a list of candidates; `trial` decides.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .architectures import descend, set_fields
from .block_kinds import kinds_of
from .blocks import BlockStack
from .errors import UnsupportedModelError
from .table import table
from .template import empty_model, plain, quiet, reread
from .widths import CutAttribute, CutTensor, UnitGroup


@dataclass(frozen=True)
class Question:
    """A change of the configuration that leaves units out.

    Attributes:
        family, unit: See `UnitGroup`.
        units: Their number now; `None` where only the built model can tell.
        fewer: Their number in the second model.
        fields, fixed: See `UnitGroup`.
        heads_per_unit: Query heads of a KV group.
    """

    family: str
    unit: str
    units: int | None
    fewer: int
    fields: Mapping[str, int]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    heads_per_unit: int = 1

    def values(self) -> dict[str, Any]:
        """The changed fields."""
        return {**{name: each * self.fewer for name, each in self.fields.items()}, **self.fixed}


@dataclass(frozen=True)
class Found:
    """Units that a configuration can have fewer of.

    Attributes:
        candidates: The group with each possible order inside its fused tensors.
        blocks: The blocks that have it.
    """

    candidates: tuple[UnitGroup, ...]
    blocks: tuple[int, ...]


def find_units(stack: BlockStack, family: str) -> tuple[list[Found], list[str]]:
    """Returns the groups of one family, and why others cannot be cut.

    Args:
        stack: The blocks of a live model, or of one on the meta device.
        family: `"mlp"` or `"attention"`.
    """
    found: list[Found] = []
    reasons: list[str] = []
    with quiet():
        before = empty_model(type(stack.model), reread(stack.layout.root, stack.layout.subject), stack.layout.subject)
        try:
            questions = list(_questions(stack.layout.config, family))
        except UnsupportedModelError as error:
            return [], [f"{stack.layout.subject}: {str(error)}"]
        for choices in questions:
            try:
                found += _answer(stack, before, choices)
            except UnsupportedModelError as error:
                reasons.append(str(error).rstrip("."))
    return found, reasons


def _questions(config: PretrainedConfig, family: str) -> Iterator[list[Question]]:
    """Every field that may hold units, with a few smaller numbers to try: classes refuse some."""
    if family == "attention":
        yield from _head_questions(config)
        return
    asked: set[str] = set()
    for name in table().widths["mlp"]:
        own_name = (config.attribute_map or {}).get(name, name)
        if own_name in asked:
            continue  # another name of the same field
        asked.add(own_name)
        value = whole(config, name)
        if value is not None and value > 1:
            fewer = dict.fromkeys((value // 2, value - value // 4, value - 1))
            yield [Question("mlp", "channel", value, less, {name: 1}) for less in fewer if less]
        elif value is None and name in config.to_dict() and whole(config, "hidden_size"):
            # Not set means a multiple of the hidden size.
            yield [Question("mlp", "channel", None, config.hidden_size, {name: 1})]


def _head_questions(config: PretrainedConfig) -> Iterator[list[Question]]:
    names = table().widths
    heads_name, heads = first_whole(config, names["heads"])
    kv_name, kv = first_whole(config, names["kv_heads"])
    unclear = next((name for name in names["kv_heads"] if kv_name is None and name in config.to_dict()), None)
    if unclear is not None and _differs(config, unclear):
        raise UnsupportedModelError(f"'{unclear}' differs between blocks")
    if heads_name is None or heads < 2:
        return
    size_name, size = first_whole(config, names["head_dim"])
    size = size or (whole(config, "hidden_size") or 0) // heads
    fixed: dict[str, Any] = {size_name or "head_dim": size}
    kv = kv or heads
    if heads % kv:
        return
    if kv == 1:
        # All query heads share one KV head, which stays.
        unit, units, per_unit, fields = "head", heads, 1, {heads_name: 1}
        fixed |= {kv_name: 1}
    else:
        unit, units, per_unit = "kv_group", kv, heads // kv
        fields = {heads_name: per_unit, **({kv_name: 1} if kv_name else {})}
    yield [Question("attention", unit, units, less, fields, fixed, per_unit) for less in range(units - 1, 0, -1)]


def first_whole(config: PretrainedConfig, names: tuple[str, ...]) -> tuple[str | None, int | None]:
    """The first of several fields that holds a positive whole number, with its value."""
    return next(((name, whole(config, name)) for name in names if whole(config, name) is not None), (None, None))


def _differs(config: PretrainedConfig, name: str) -> bool:
    per_block = name in (getattr(config, "per_layer_attributes", None) or ())
    return per_block or isinstance(config.to_dict().get(name), (list, tuple, dict))


def whole(config: PretrainedConfig, name: str) -> int | None:
    """A field that holds a positive whole number; a number that differs between blocks cannot be asked for."""
    if name in (getattr(config, "per_layer_attributes", None) or ()):
        return None
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _answer(stack: BlockStack, before: PreTrainedModel, choices: list[Question]) -> list[Found]:
    """Builds the first of the smaller models that its classes accept, and reads the units off it."""
    failure: UnsupportedModelError | None = None
    for question in choices:
        try:
            after = narrower_model(stack, question.values())
        except UnsupportedModelError as error:
            failure = failure or error
            continue
        return list(_read_off(stack, before, after, question))
    raise failure or UnsupportedModelError(f"{stack.layout.subject} has too few units.")


def narrower_model(stack: BlockStack, values: Mapping[str, Any]) -> PreTrainedModel:
    """The empty model that transformers builds with other values of some fields.

    Raises:
        UnsupportedModelError: Its classes do not accept them.
    """
    layout = stack.layout
    root = copy.deepcopy(layout.root)
    try:
        set_fields(descend(root, layout.place), values, setattr)
    except Exception as error:  # configuration classes check their fields in many ways
        raise UnsupportedModelError(f"{layout.subject} does not take other values of {', '.join(values)}") from error
    return empty_model(type(stack.model), reread(root, layout.subject), layout.subject)


def _read_off(
    stack: BlockStack, before: PreTrainedModel, after: PreTrainedModel, question: Question
) -> Iterator[Found]:
    subject = f"{stack.layout.subject}: field '{next(iter(question.fields))}'"
    old, new = ({name: tuple(t.shape) for name, t in each.state_dict().items()} for each in (before, after))
    if old.keys() != new.keys():
        raise UnsupportedModelError(f"{subject} decides which modules there are, not only how wide they are")
    changed = {name: (old[name], new[name]) for name in old if old[name] != new[name]}
    outside = sorted(name for name in changed if not name.startswith(f"{stack.path}."))
    if outside:
        raise UnsupportedModelError(f"{subject} also shapes '{outside[0]}', outside of the blocks of this stack")
    if not changed:
        if question.family == "mlp":
            return  # a field that this model does not use
        raise UnsupportedModelError(
            f"{subject} does not change the size of the projections: its classes take the size of a head from "
            "hidden_size / heads, so that no ordinary checkpoint has fewer heads"
        )
    blocks_before, blocks_after = before.get_submodule(stack.path), after.get_submodule(stack.path)
    for blocks in kinds_of(blocks_before):
        start = f"{stack.path}.{blocks[0]}."
        inside = {name[len(start) :]: shapes for name, shapes in changed.items() if name.startswith(start)}
        if inside:
            reader = _Reader(subject, blocks_before[blocks[0]], blocks_after[blocks[0]], inside, question)
            yield from (Found(candidates, tuple(blocks)) for candidates in reader.groups())


@dataclass(frozen=True)
class _Reader:
    """Reads the groups of one kind of block off its two empty forms."""

    subject: str
    before: nn.Module
    after: nn.Module
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    question: Question

    def groups(self) -> Iterator[tuple[UnitGroup, ...]]:
        writers = {name.rpartition(".")[0]: name for name in self.shapes if self._reads_units(name)}
        if not writers:
            raise UnsupportedModelError(
                f"{self.subject} shapes {', '.join(sorted(self.shapes))}, and no projection whose inputs are the units"
            )
        homes: dict[str, list[str]] = {writer: [] for writer in writers}
        for name in self.shapes:
            if name not in writers.values():
                homes[max(writers, key=lambda writer: _common(writer, name))].append(name)
        for writer, readers in homes.items():
            yield self._group(writer, [writers[writer], *readers])

    def _reads_units(self, name: str) -> bool:
        path, _, leaf = name.rpartition(".")
        return leaf == "weight" and self._axis(name) == input_axis(self.before.get_submodule(path))

    def _axis(self, name: str) -> int:
        old, new = self.shapes[name]
        axes = [axis for axis, (one, other) in enumerate(zip(old, new, strict=True)) if one != other]
        if len(axes) != 1 or len(old) > 2:
            experts = "experts that are stacked in one tensor cannot lose channels exactly in this version"
            reason = experts if "expert" in name else "not along one axis of a plain projection"
            raise UnsupportedModelError(f"{self.subject} shapes '{name}' {list(old)}: {reason}")
        return axes[0]

    def _group(self, writer: str, names: list[str]) -> tuple[UnitGroup, ...]:
        question = self.question
        size, fewer = (shape[self._axis(names[0])] for shape in self.shapes[names[0]])
        units, less = (size, fewer) if question.family == "mlp" else (question.units, question.fewer)
        if question.units not in (None, units) or units == less:
            raise UnsupportedModelError(f"{self.subject} is not how wide '{writer}' is")
        own = (size - fewer) // (units - less)
        options = [self._cuts(name, units, less, own) for name in names]
        # The parts of one module are in one order (weight and bias).
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
        orders = [
            max(len(each) for each, name in zip(options, names, strict=True) if name.rpartition(".")[0] == module)
            for module in modules
        ]
        base = UnitGroup(
            question.family,
            question.unit,
            writer,
            units,
            dict(question.fields),
            dict(question.fixed),
            attributes=self._attributes(writer, modules, units, less),
        )
        return tuple(
            replace(
                base,
                tensors=tuple(
                    each[choice[modules.index(name.rpartition(".")[0])] % len(each)]
                    for each, name in zip(options, names, strict=True)
                ),
            )
            for choice in product(*map(range, orders))
        )

    def _cuts(self, name: str, units: int, less: int, own: int) -> list[CutTensor]:
        """The possible orders of a tensor's entries, the likeliest first; one that is no wider than a unit has one."""
        axis = self._axis(name)
        old, new = (shape[axis] for shape in self.shapes[name])
        each, remainder = divmod(old - new, units - less)
        rest = old - each * units
        if remainder or each < 1 or rest < 0:
            raise UnsupportedModelError(f"{self.subject}: '{name}' does not have an equal part for every unit")
        orders: list[tuple[int, ...]] = [(each,)]
        if each > own and not rest:
            grouped, uneven = divmod(each, self.question.heads_per_unit + 2)
            if self.question.family == "attention" and not uneven:
                orders.insert(0, (grouped * self.question.heads_per_unit, grouped, grouped))
            orders += [(each // parts,) * parts for parts in (2, 3) if each % parts == 0]
        return [CutTensor(name, axis, parts, rest) for parts in dict.fromkeys(orders)]

    def _attributes(self, writer: str, modules: list[str], units: int, less: int) -> tuple[CutAttribute, ...]:
        """Numbers that follow, of the modules that belong to this writer and of those around them."""
        found = []
        others = {name.rpartition(".")[0] for name in self.shapes} - set(modules)
        # Nor what is around another writer only.
        around = {part for name in (*others, writer) for part in _parents(name)}
        others |= {part for part in around if not f"{writer}.".startswith(f"{part}.") and part}
        after = dict(self.after.named_modules())
        for path, module in self.before.named_modules():
            if path in others:
                continue
            for name in vars(module).keys() & vars(after[path]).keys():
                old, new = getattr(module, name), getattr(after[path], name)
                if not (plain(old) and plain(new)) or old == new or name.startswith("_"):
                    continue
                if type(old) is not int or type(new) is not int or (old - new) % (units - less):
                    raise UnsupportedModelError(
                        f"{self.subject} also changes '{path}.{name}' from {old} to {new}, which is no count of units"
                    )
                per_unit = (old - new) // (units - less)
                if per_unit * units > old:
                    raise UnsupportedModelError(f"{self.subject} also changes '{path}.{name}', no count of units")
                found.append(CutAttribute(path, name, per_unit, old - per_unit * units))
        return tuple(sorted(found, key=lambda each: (each.module, each.name)))


def _parents(name: str) -> Iterator[str]:
    """The names of the modules around one, from the inside out."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def input_axis(module: nn.Module) -> int | None:
    """The axis of a projection's weight that its inputs lie along; `None` if it is no plain projection."""
    if isinstance(module, nn.Linear):
        return 1
    return 0 if isinstance(module, Conv1D) else None


def _common(one: str, other: str) -> int:
    """Number of leading parts that two dotted names share."""
    count = 0
    for left, right in zip(one.split("."), other.split("."), strict=False):
        if left != right:
            break
        count += 1
    return count
