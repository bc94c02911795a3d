# SPDX-License-Identifier: Apache-2.0
"""What transformers would build from the pruned configuration: the measure that surgery and checks go by.

Two empty models on the meta device, one from the configuration as it is and one from the pruned configuration as a
checkpoint gives it back, tell without any knowledge of the architecture

* which plain attributes follow a block's number or the depth (indices, windows, kinds, counts, sharing modes): those
  that differ between the two;
* whether the kept blocks fit the places that they get: names and shapes of all tensors must agree;
* whether the configuration comes back as it was written.

A block that cannot be expressed is found here, before any weight is touched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from .architectures import descend
from .blocks import BlockStack
from .errors import PlanError, UnsupportedModelError
from .names import renumber_key
from .plan import PruningPlan
from .table import SlicedTensor, table


# Attributes of a module that say how it is run at the moment, not what it is; the last one is set by each pass.
RUN_SETTINGS = frozenset({"training", "gradient_checkpointing", "expert_capacity"})


@dataclass(frozen=True)
class Template:
    """The model before and after, without weights.

    Attributes:
        path: Name of the block list.
        before: Built from the configuration as it is.
        after: Built from the pruned configuration, as a checkpoint gives it back.
        plan: What lies between them.
    """

    path: str
    before: PreTrainedModel
    after: PreTrainedModel
    plan: PruningPlan

    def pairs(self, model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, nn.Module]]:
        """Yields (module of `model`, its like before, its like after) for every module that stays."""
        before, after = dict(self.before.named_modules()), dict(self.after.named_modules())
        for name, module in model.named_modules():
            new = renumber_key(name, self.path, self.plan)
            if new is not None and name in before and new in after:
                yield module, before[name], after[new]

    def sliced(self) -> list[tuple[str, SlicedTensor]]:
        """Modules outside the blocks whose weight has a slice for every block, by name."""
        names = [name for name, _ in self.before.named_modules() if not name.startswith(f"{self.path}.")]
        return [(name, row) for row in table().tensors for name in names if f".{name}".endswith(f".{row.module}")]


def make_template(stack: BlockStack, plan: PruningPlan) -> Template:
    """Builds both empty models and holds the kept blocks to the second one.

    Args:
        stack: The blocks of a live model, or of one on the meta device.
        plan: What is to be kept; must fit the stack's layout.

    Raises:
        UnsupportedModelError: The pruned configuration cannot be saved and read back, or describes other blocks than
            the kept ones.
    """
    layout = stack.layout
    _refuse_lost_padding(stack)
    edited = layout.edited(plan)
    with quiet():
        read = reread(edited, layout.subject)
        _same_fields(descend(edited, layout.place), descend(read, layout.place), layout.subject, plan)
        kind = type(stack.model)
        # Read back as well: what a file does not hold (the attention implementation) must not differ between the two.
        before = empty_model(kind, reread(layout.root, layout.subject), layout.subject)
        after = empty_model(kind, read, layout.subject)
    template = Template(stack.path, before, after, plan)
    _same_tensors(template, layout.subject)
    _same_lists(template, layout.subject)
    return template


def _refuse_lost_padding(stack: BlockStack) -> None:
    """Some classes set the padding token's embedding to zero whenever they are loaded, whatever the file says."""
    if stack.layout.root.model_type not in table().zero_padding:
        return
    embedding = stack.model.get_input_embeddings()
    row = getattr(embedding, "padding_idx", None)
    if row is not None and embedding.weight.device.type != "meta" and bool(embedding.weight[row].any()):
        raise UnsupportedModelError(
            f"{stack.layout.subject} loses the embedding of its padding token ({row}) whenever it is loaded, and this "
            "model's is not zero, so that no file could hold it. Set it to zero first: "
            f"model.get_input_embeddings().weight.data[{row}] = 0."
        )


def plain(value: Any) -> bool:
    """Whether an attribute says something about the architecture that can be compared and copied."""
    if isinstance(value, (tuple, list)):
        return all(plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def merged_attributes(
    live: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Yields the attributes that the pruning changes, with their new value.

    An attribute that the user gave another value than the constructor did is left alone.
    """
    for name in before.keys() & after.keys() & live.keys() - RUN_SETTINGS:
        old, new = before[name], after[name]
        if plain(old) and plain(new) and not _same(old, new) and _same(live[name], old):
            yield name, copy.copy(new)


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and (one == other or (one != one and other != other))


def reread(config: PretrainedConfig, subject: str) -> PretrainedConfig:
    """The configuration as its class gives it back from a file."""
    try:
        return type(config).from_dict(copy.deepcopy(config.to_dict()))
    except Exception as error:  # configuration classes check their fields in many ways
        raise UnsupportedModelError(
            f"{subject} cannot be described without these blocks; its configuration class says: {_first_line(error)}"
        ) from error


def _same_fields(written: PretrainedConfig, read: PretrainedConfig, subject: str, plan: PruningPlan) -> None:
    """Some classes change a list when they read it; a field that follows the blocks must come back as written."""
    stored = read.to_dict()
    for name, value in written.to_dict().items():
        if name in table().fields and stored.get(name) != value:
            advice = " Keep other blocks (such as the last one)." if plan.num_removed else ""
            raise UnsupportedModelError(
                f"{subject} cannot lose {_lost(plan)} exactly: '{name}' would be {value}, and its configuration class "
                f"reads that back as {stored.get(name)}.{advice}"
            )


def _lost(plan: PruningPlan) -> str:
    return "these blocks" if plan.num_removed else "these channels and heads"


def empty_model(kind: type[PreTrainedModel], config: PretrainedConfig, subject: str) -> PreTrainedModel:
    """The model without weights."""
    try:
        with torch.device("meta"):
            return kind(config)
    except Exception as error:  # constructors fail in many ways
        raise UnsupportedModelError(
            f"{subject}: {kind.__name__} cannot be built without these blocks: {_first_line(error)}"
        ) from error


def _same_tensors(template: Template, subject: str) -> None:
    """Every kept block must be what the pruned configuration builds in its place, tensor by tensor."""
    old = {name: tensor.shape for name, tensor in template.before.state_dict().items()}
    new = {name: tensor.shape for name, tensor in template.after.state_dict().items()}
    old |= _cut_shapes(template, old, subject)
    kept = {renumber_key(name, template.path, template.plan): shape for name, shape in old.items()}
    kept.pop(None, None)
    for name, row in template.sliced():
        weight = f"{name}.weight"
        shape = list(kept[weight])
        shape[row.axis] = shape[row.axis] * len(template.plan.blocks) // template.plan.num_blocks
        kept[weight] = torch.Size(shape)
    wrong = sorted(name for name in kept.keys() | new.keys() if kept.get(name) != new.get(name))
    if wrong:
        advice = " Its blocks differ by position; choose others, such as the last ones."
        advice = advice if template.plan.num_removed else ""
        problem = _mismatch(wrong[0], kept, new)
        raise UnsupportedModelError(f"{subject} cannot lose {_lost(template.plan)} exactly: {problem}.{advice}")


def _cut_shapes(template: Template, shapes: Mapping[str, torch.Size], subject: str) -> dict[str, torch.Size]:
    """Shapes of the tensors that lose units, under their old names.

    Where every block has its own width, no configuration describes the result: the template has the dense widths.
    """
    width, found = template.plan.width, {}
    for narrowing in width.narrowed:
        group = width.groups[narrowing.group]
        for cut in group.tensors:
            name = f"{template.path}.{narrowing.block}.{cut.name}"
            shape = list(shapes.get(name, ()))
            if len(shape) <= cut.axis or shape[cut.axis] != cut.size(group.units):
                raise PlanError(
                    f"{subject}: the plan cuts '{name}' into {group.units} units along axis {cut.axis}, which does "
                    f"not fit its shape {shape}; it was made for another model."
                )
            shape[cut.axis] = cut.size(width.stored(narrowing))
            found[name] = torch.Size(shape)
    return found if width.loads_anywhere else {}


def _same_lists(template: Template, subject: str) -> None:
    """A list of modules outside the blocks may have an entry for every kind of block, or for every few blocks."""
    old, new = (
        {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
        for model in (template.before, template.after)
    )
    for name, length in old.items():
        moved = renumber_key(name, template.path, template.plan)
        if moved not in (None, template.path) and new.get(moved) != length:
            raise UnsupportedModelError(
                f"{subject} cannot lose these blocks exactly: '{name}' has {length} entries that follow from the "
                f"blocks, and would have {new.get(moved, 'none')}. Keep other blocks (one of each kind)."
            )


def _mismatch(name: str, kept: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    if name not in new:
        detail = f"the kept blocks have a tensor '{name}' for which the pruned configuration has no place"
    elif name not in kept:
        detail = f"the pruned configuration asks for a tensor '{name}' which the kept blocks do not have"
    else:
        detail = f"tensor '{name}' has shape {list(kept[name])}, the pruned configuration asks for {list(new[name])}"
    return detail


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Trial configurations are no news to the user."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
