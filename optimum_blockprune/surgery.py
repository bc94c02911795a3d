# SPDX-License-Identifier: Apache-2.0
"""Executes a plan on a live model: in place, where it lies, without copying or moving a kept block.

What has to change is read off the template: what transformers builds from the pruned configuration. Everything that
is changed goes through a `Journal`, so that a failure or a later refusal puts the model back exactly as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .architectures import set_fields
from .blocks import BlockStack, find_blocks
from .errors import UnsupportedModelError
from .folding import fold_all
from .half import MLP
from .names import renumber_key
from .narrowing import narrow
from .per_layer import refuse_own_widths
from .plan import PruningPlan
from .streaming import source_of
from .table import SlicedTensor
from .template import RUN_SETTINGS, Template, make_template, merged_attributes


_ABSENT = object()


class Journal:
    """Remembers old values while it assigns new ones; `rollback` restores them in reverse order."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        """`setattr` that can be taken back."""
        if isinstance(target, PretrainedConfig):
            # Setting one field may set others: all of them come back.
            self._undo.append(partial(_restore_fields, target, dict(vars(target))))
        else:
            self._undo.append(partial(_restore, target, name, getattr(target, name, _ABSENT)))
        setattr(target, name, value)

    def extend(self, later: Journal) -> None:
        """Takes over what another journal remembers of changes that were made after its own."""
        self._undo += later._undo

    def rollback(self) -> None:
        """Restores every value; may be called once."""
        while self._undo:
            self._undo.pop()()


def _restore(target: Any, name: str, value: Any) -> None:
    if value is _ABSENT:
        delattr(target, name)
    else:
        setattr(target, name, value)


def _restore_fields(config: PretrainedConfig, fields: dict[str, Any]) -> None:
    vars(config).clear()
    vars(config).update(fields)


def check_plan(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Raises what `apply_plan` would raise for this model and plan, from empty models alone; see `make_template`."""
    refuse_own_widths(model.config)
    stack = find_blocks(model, plan.stack)
    stack.layout.check(plan)
    plan.folds.tensors()
    make_template(stack, plan)


def apply_plan(model: PreTrainedModel, plan: PruningPlan) -> Journal:
    """Removes the blocks that `plan` does not keep from `model`, in place; the result is not proven here.

    1. The configuration follows the table's rules, copies of it in inner modules follow the template.
    2. Every attribute that depends on a block's number or on the depth follows the template.
    3. Weights outside the blocks that have a slice per block lose slices.
    4. What the plan folds into weights goes into them: these tensors are copied.
    5. The block list keeps its identity and loses entries; what is left loses units of width, in copies as well.
    6. The device map is renumbered; hooks stay on their modules.

    Returns:
        The journal that takes all of it back.

    Raises:
        PlanError: The plan belongs to another model.
        UnsupportedModelError: The architecture cannot be expressed exactly. The model is unchanged after any error.
    """
    refuse_own_widths(model.config)
    stack = find_blocks(model, plan.stack)
    stack.layout.check(plan)
    template = make_template(stack, plan)
    journal = Journal()
    try:
        _follow_attributes(model, template, journal)
        _follow_configs(stack, template, journal)
        for name, row in template.sliced():
            _cut_slices(model.get_submodule(name), row, plan, journal)
        for each in plan.folds.entries:
            _refuse_offloaded(stack, stack.blocks[each.block], "changed")
        fold_all(stack.blocks, plan.folds, journal.set)
        _cut_list(stack, plan, journal)
        _narrow_blocks(stack, plan, journal)
        _renumber_device_map(stack, plan, journal)
        _follow_generation_config(model, plan, journal)
        earlier = getattr(model.config, "block_pruning", None)
        journal.set(model.config, "block_pruning", provenance(plan, earlier))
    except BaseException:
        journal.rollback()
        raise
    return journal


def provenance(plan: PruningPlan, previous: dict[str, Any] | None) -> dict[str, Any]:
    """The inert `block_pruning` entry of `config.json`; an earlier one is kept under `previous`."""
    entry: dict[str, Any] = {
        "strategy": plan.strategy,
        "removed_blocks": list(plan.removed_blocks),
        **({"removed_halves": list(plan.removed_halves)} if plan.removed_halves else {}),
        "num_blocks": plan.num_blocks,
        **({"compensated": [f"{each.block}.{each.module}" for each in plan.folds.entries]} if plan.folds else {}),
        **({"layout": plan.width.layout, "units": plan.width.totals()} if plan.width else {}),
        "base_model": plan.base_model,
        "versions": dict(plan.versions),
    }
    return {**entry, "previous": previous} if previous else entry


def _follow_attributes(model: PreTrainedModel, template: Template, journal: Journal) -> None:
    for module, before, after in template.pairs(model):
        for name, value in list(merged_attributes(vars(module), vars(before), vars(after))):
            journal.set(module, name, value)


def _follow_configs(stack: BlockStack, template: Template, journal: Journal) -> None:
    """The configuration by the table; copies of it that inner modules were built with by the template."""
    layout = stack.layout
    set_fields(layout.config, layout.changes(template.plan), journal.set)
    done = {id(config) for config in _configs_below(stack.model.config)}
    for module, before, after in template.pairs(stack.model):
        config = getattr(module, "config", None)
        if not isinstance(config, PretrainedConfig) or id(config) in done:
            continue
        done.add(id(config))
        for name, value in list(merged_attributes(vars(config), vars(before.config), vars(after.config))):
            journal.set(config, name, value)


def _configs_below(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _configs_below(value)


def _cut_slices(module: nn.Module, row: SlicedTensor, plan: PruningPlan, journal: Journal) -> None:
    """Replaces a weight by one with the kept blocks' slices: the only weight that is copied."""
    weight = module.weight
    parts = weight.detach().chunk(plan.num_blocks, dim=row.axis)
    kept = torch.cat([parts[block] for block in plan.kept_blocks], dim=row.axis)
    journal.set(module, "weight", nn.Parameter(kept, requires_grad=weight.requires_grad))
    journal.set(module, row.attribute, kept.shape[row.axis])


def _narrow_blocks(stack: BlockStack, plan: PruningPlan, journal: Journal) -> None:
    """In the blocks of the result; the dense tensors live on in the journal until it is proven."""
    width = plan.width
    for each in width.narrowed:
        group = width.groups[each.group]
        block = stack.blocks[plan.new_place(each.block, group.writer)]
        if len(each.kept) == group.units == width.stored(each):
            continue
        _refuse_offloaded(stack, block, "narrowed")
        own_config = not width.loads_anywhere
        narrow(block, group, each.kept, width.stored(each), journal.set, means=each.means, own_config=own_config)


def _refuse_offloaded(stack: BlockStack, block: nn.Module, how: str) -> None:
    """The weights of an offloaded block lie elsewhere, where nothing can be done to them."""
    offloaded = any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in block.modules())
    if offloaded or source_of(stack.model) is not None:
        raise UnsupportedModelError(
            f"{stack.layout.subject}: weights that are offloaded cannot be {how}. Load the model on a device, or "
            "apply the plan to the files: plan.apply_to_checkpoint(src, dst), `optimum-cli blockprune apply`."
        )


def _cut_list(stack: BlockStack, plan: PruningPlan, journal: Journal) -> None:
    # The ModuleList object stays: other modules and hooks may hold it.
    kept = {str(new): stack.blocks[old] for new, old in enumerate(plan.kept_blocks)}
    for source, block in zip(plan.blocks, kept.values(), strict=True):
        if source.mlp != source.attention:
            journal.set(block, "_modules", _joined(block, stack.blocks[source.mlp], plan))
    journal.set(stack.blocks, "_modules", kept)


def _joined(block: nn.Module, other: nn.Module, plan: PruningPlan) -> dict[str, nn.Module | None]:
    """The children of a block with the MLP half of another one."""
    mine = {name: child for name, child in block._modules.items() if plan.halves.get(name) != MLP}
    theirs = {name: child for name, child in other._modules.items() if plan.halves.get(name) == MLP}
    # In the order of the block that they move into: modules are listed in it.
    order = [*dict.fromkeys([*block._modules, *theirs])]
    return {name: (theirs | mine)[name] for name in order if name in mine or name in theirs}


def _renumber_device_map(stack: BlockStack, plan: PruningPlan, journal: Journal) -> None:
    device_map = getattr(stack.model, "hf_device_map", None)
    if device_map is None:
        return
    renamed = {}
    for name, device in device_map.items():
        new = renumber_key(name, stack.path, plan)
        if new is not None:
            renamed[new] = device
    journal.set(stack.model, "hf_device_map", renamed)


def _follow_generation_config(model: PreTrainedModel, plan: PruningPlan, journal: Journal) -> None:
    """`assistant_early_exit` is the one generation setting that is a block number: blocks below it are counted."""
    generation = getattr(model, "generation_config", None)
    early_exit = getattr(generation, "assistant_early_exit", None)
    if early_exit is not None:
        below = sum(block < early_exit for block in plan.kept_blocks)
        journal.set(generation, "assistant_early_exit", below or None)


def block_traits(blocks: nn.ModuleList) -> Iterator[tuple[str, Any]]:
    """Yields (`position.submodule.attribute`, value) for every plain public attribute of the blocks.

    These are what a block is besides its weights: windows, scales, kinds, numbers. A reloaded block must have the
    same as the live one it was saved from.
    """
    for position, block in enumerate(blocks):
        for name, module in block.named_modules():
            for attribute, value in vars(module).items():
                plain = isinstance(value, (bool, int, float, str)) or value is None
                if plain and not attribute.startswith("_") and attribute not in RUN_SETTINGS:
                    yield f"{position}.{name}.{attribute}", value
