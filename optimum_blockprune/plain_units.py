# SPDX-License-Identifier: Apache-2.0
"""Finds units that no configuration field can take away: classes that derive the size of a head from the hidden size.

Such a model (GPT-2, OPT, BERT, Falcon) has no ordinary checkpoint with fewer heads, but it computes the same without
them, so that layouts `"padded"` and `"per_layer"` can hold the result. The projections of a block and the number of
heads in the configuration say which parts belong to which unit; as always, `trial` decides whether that is true.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .block_kinds import kinds_of
from .blocks import BlockStack
from .table import table
from .units import Found, first_whole, input_axis, whole
from .widths import CutAttribute, CutTensor, UnitGroup


_ATTENTION = re.compile(r"att(n|ention)?", re.IGNORECASE)
_CROSS = re.compile(r"cross|encoder_att", re.IGNORECASE)


@dataclass(frozen=True)
class _Projection:
    """A linear map inside a block."""

    name: str
    module: nn.Module
    axis: int

    @property
    def inputs(self) -> int:
        return self.module.weight.shape[self.axis]

    @property
    def outputs(self) -> int:
        return self.module.weight.shape[1 - self.axis]

    def cuts(self, parts: tuple[int, ...], rest: int = 0) -> list[CutTensor]:
        """Weight and bias as a reader of the residual stream, whose outputs belong to units."""
        weight = CutTensor(f"{self.name}.weight", 1 - self.axis, parts, rest)
        return [weight] if self.module.bias is None else [weight, CutTensor(f"{self.name}.bias", 0, parts, rest)]

    def follows(self, per_unit: int, *, inputs: bool, rest: int = 0) -> CutAttribute:
        """The module's own note of how many inputs or outputs it has."""
        names = ("in_features", "out_features") if isinstance(self.module, nn.Linear) else ("nx", "nf")
        return CutAttribute(self.name, names[0] if inputs else names[1], per_unit, rest)


def plain_units(stack: BlockStack, family: str) -> list[Found]:
    """Groups of one family whose number no configuration field says; their `fields` are empty."""
    found = []
    for numbers in kinds_of(stack.blocks):
        block = stack.blocks[numbers[0]]
        candidates = _heads(stack, block) if family == "attention" else _channels(stack, block)
        if candidates:
            found.append(Found(tuple(candidates), tuple(numbers)))
    return found


def _projections(block: nn.Module) -> Iterator[_Projection]:
    for name, module in block.named_modules():
        axis = input_axis(module)
        if axis is not None and module.weight.ndim == 2:
            yield _Projection(name, module, axis)


def _attention_of(name: str) -> str | None:
    """The self-attention that a module belongs to; `None` for all others."""
    parts = name.split(".")
    place = next((number for number, part in enumerate(parts) if _ATTENTION.search(part)), None)
    if place is None or any(_CROSS.search(part) for part in parts):
        return None
    return ".".join(parts[: place + 1])


def _channels(stack: BlockStack, block: nn.Module) -> list[UnitGroup]:
    hidden = whole(stack.layout.config, "hidden_size")
    rest = [each for each in _projections(block) if not _ATTENTION.search(each.name)]
    writers = [each for each in rest if each.outputs == hidden and each.inputs != hidden]
    if len(writers) != 1:
        return []
    writer, units = writers[0], writers[0].inputs
    readers = [each for each in rest if each.inputs == hidden and each.outputs in (units, 2 * units)]
    orders = [(1,)] if all(each.outputs == units for each in readers) else [(1, 1), (2,)]
    groups = []
    for order in orders:
        tensors = [CutTensor(f"{writer.name}.weight", writer.axis, (1,))]
        attributes = [writer.follows(1, inputs=True)]
        for each in readers:
            share = each.outputs // units
            tensors += each.cuts(order if share == 2 else (1,))
            attributes.append(each.follows(share, inputs=False))
        groups.append(
            UnitGroup("mlp", "channel", writer.name, units, tensors=tuple(tensors), attributes=tuple(attributes))
        )
    return groups if readers else []


def _heads(stack: BlockStack, block: nn.Module) -> list[UnitGroup]:
    config = stack.layout.config
    hidden, (_, heads) = whole(config, "hidden_size"), first_whole(config, table().widths["heads"])
    if not hidden or not heads or hidden % heads:
        return []
    size = hidden // heads
    homes: dict[str, list[_Projection]] = {}
    for each in _projections(block):
        home = _attention_of(each.name)
        if home is not None:
            homes.setdefault(home, []).append(each)
    if len(homes) != 1:
        return []
    [(home, projections)] = homes.items()
    *readers, writer = projections
    kv = _kv_heads([each.outputs for each in readers], heads, size)
    if kv is None or writer.inputs != hidden or writer.outputs != hidden:
        return []
    return list(_head_groups(stack, block, home, readers, writer, heads, kv, size))


def _kv_heads(outputs: list[int], heads: int, size: int) -> int | None:
    """Number of KV heads by what the readers give; `None` if they are something else."""
    if not outputs or any(each % size for each in outputs):
        return None
    counts = [each // size for each in outputs]
    kv = (counts[0] - heads) // 2 if len(counts) == 1 else min(counts)
    return kv if kv > 0 and heads % kv == 0 else None


def _head_groups(
    stack: BlockStack,
    block: nn.Module,
    home: str,
    readers: list[_Projection],
    writer: _Projection,
    heads: int,
    kv: int,
    size: int,
) -> Iterator[UnitGroup]:
    shared = kv == 1
    units, queries = (heads, 1) if shared else (kv, heads // kv)
    orders = [(queries * size, size, size), ((queries + 2) * size,)] if len(readers) == 1 else [()]
    for order in orders:
        tensors = [CutTensor(f"{writer.name}.weight", writer.axis, (queries * size,))]
        attributes = [writer.follows(queries * size, inputs=True)]
        for each in readers:
            if shared and each.outputs == size:
                continue  # the K or V of all heads
            rest = each.outputs - heads * size if shared else 0
            parts = (size,) if shared else order or (each.outputs // units,)
            tensors += each.cuts(parts, rest)
            attributes.append(each.follows(sum(parts), inputs=False, rest=rest))
        counts = {heads: queries, **({} if shared else {kv: 1}), heads * size: queries * size}
        # Which of the numbers around the projections follow cannot be seen; more is tried before less.
        for names in (counts, {heads: queries}, {}):
            apart = {each.name for each in (*readers, writer)}
            others = tuple(each for each in _numbers(block, home, names, apart) if _is_common(stack, each, block))
            yield UnitGroup(
                "attention",
                "head" if shared else "kv_group",
                writer.name,
                units,
                tensors=tuple(tensors),
                attributes=(*attributes, *others),
            )


def _is_common(stack: BlockStack, attribute: CutAttribute, block: nn.Module) -> bool:
    """Whether all blocks have this number: the number of a block may equal that of the heads by chance."""
    value = getattr(block.get_submodule(attribute.module), attribute.name)
    modules = (dict(each.named_modules()).get(attribute.module) for each in stack.blocks)
    return all(getattr(module, attribute.name, value) == value for module in modules if module is not None)


def _numbers(block: nn.Module, home: str, counts: dict[int, int], apart: set[str]) -> Iterator[CutAttribute]:
    for path, module in block.get_submodule(home).named_modules():
        name = f"{home}.{path}" if path else home
        for attribute, value in vars(module).items() if name not in apart else ():
            if type(value) is int and value in counts and not attribute.startswith("_"):
                yield CutAttribute(name, attribute, counts[value])
