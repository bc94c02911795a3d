# SPDX-License-Identifier: Apache-2.0
"""Executes a plan on a live model: in place, where it lies, without copying or moving a kept weight.

Everything that is changed goes through a `Journal`, so that a failure or a later refusal puts the model back exactly
as it was. Reads the plan and the architecture table; knows nothing of strategies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .architectures import layout_for, set_fields
from .blocks import BlockStack, find_blocks
from .plan import PruningPlan


# Copies of the block count that modules outside the blocks keep for their own loops.
_COUNT_ATTRIBUTES = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")

# Attributes of a block that say how it is run at the moment, not what it is.
_RUN_SETTINGS = ("training", "gradient_checkpointing")

_ABSENT = object()


class Journal:
    """Remembers old values while it assigns new ones; `rollback` restores them in reverse order."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        """`setattr` that can be taken back."""
        self._undo.append((target, name, getattr(target, name, _ABSENT)))
        setattr(target, name, value)

    def rollback(self) -> None:
        """Restores every value; may be called once."""
        while self._undo:
            target, name, value = self._undo.pop()
            if value is _ABSENT:
                delattr(target, name)
            else:
                setattr(target, name, value)


def apply_plan(model: PreTrainedModel, plan: PruningPlan) -> Journal:
    """Removes the blocks that `plan` does not keep from `model`, in place; the result is not proven here.

    1. Per-block configuration fields and the block count follow the table's rules.
    2. Every attribute that holds a block's number is renumbered.
    3. Lists that modules copied from the configuration are refreshed.
    4. The block list keeps its identity and loses entries.
    5. The device map is renumbered; hooks stay on their modules.

    Returns:
        The journal that takes all of it back.

    Raises:
        PlanError: The plan belongs to another model.
        UnsupportedModelError: The architecture cannot be expressed exactly. The model is unchanged after any error.
    """
    stack = find_blocks(model)
    layout = layout_for(model.config)
    layout.check(plan)
    journal = Journal()
    try:
        changes = layout.changes(plan)
        _refresh_copies(model, changes, journal)
        for config in _configs_of(model):
            set_fields(config, changes, journal.set)
        _renumber_blocks(stack, plan, journal)
        _cut_list(stack, plan, journal)
        _renumber_device_map(stack, plan, journal)
        _follow_generation_config(model, plan, journal)
        journal.set(model.config, "block_pruning", provenance(plan, model.config))
    except BaseException:
        journal.rollback()
        raise
    return journal


def provenance(plan: PruningPlan, config: Any) -> dict[str, Any]:
    """The inert `block_pruning` entry of `config.json`; an earlier one is kept under `previous`."""
    entry: dict[str, Any] = {
        "strategy": plan.strategy,
        "removed_blocks": list(plan.removed_blocks),
        "num_blocks": plan.num_blocks,
        "base_model": plan.base_model,
        "versions": dict(plan.versions),
    }
    previous = getattr(config, "block_pruning", None)
    return {**entry, "previous": previous} if previous else entry


def index_attributes(blocks: nn.ModuleList) -> set[tuple[str, str]]:
    """Finds the (submodule, attribute) pairs that hold the block's own position, such as (`self_attn`, `layer_idx`).

    A pair counts when it equals the position in every block that has it, and at least two do: a single coincidence,
    such as a size that equals one block's number, does not count. A submodule that only one block has (the one
    attention block of a hybrid) counts when its attribute has the name of one that was found this way.
    """
    found: dict[tuple[str, str], list[bool]] = {}
    for position, block in enumerate(blocks):
        for name, module in block.named_modules():
            for attribute, value in vars(module).items():
                if type(value) is int:
                    found.setdefault((name, attribute), []).append(value == position)
    always = {pair: hits for pair, hits in found.items() if all(hits)}
    names = {attribute for (_, attribute), hits in always.items() if len(hits) > 1}
    return {(name, attribute) for (name, attribute) in always if attribute in names}


def _read(block: nn.Module, pair: tuple[str, str]) -> Any:
    name, attribute = pair
    try:
        value = vars(block.get_submodule(name)).get(attribute)
    except AttributeError:  # blocks of different kinds: this one has no such submodule
        return None
    return value if type(value) is int else None


def _renumber_blocks(stack: BlockStack, plan: PruningPlan, journal: Journal) -> None:
    for name, attribute in index_attributes(stack.blocks):
        for new, old in enumerate(plan.kept_blocks):
            if _read(stack.blocks[old], (name, attribute)) is not None:
                journal.set(stack.blocks[old].get_submodule(name), attribute, new)


def _configs_of(model: PreTrainedModel) -> list[Any]:
    """The configuration, and copies of it that inner models were built with."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in configs if type(config) is type(model.config)}.values())


def _cut_list(stack: BlockStack, plan: PruningPlan, journal: Journal) -> None:
    # The ModuleList object stays: other modules and hooks may hold it.
    kept = {str(new): stack.blocks[old] for new, old in enumerate(plan.kept_blocks)}
    journal.set(stack.blocks, "_modules", kept)


def _refresh_copies(model: PreTrainedModel, changes: Mapping[str, Any], journal: Journal) -> None:
    """Updates what modules copied from the configuration at construction: per-block lists and the count."""
    old_lists = [(getattr(model.config, name), new) for name, new in changes.items() if isinstance(new, list)]
    count = model.config.num_hidden_layers
    for module in model.modules():
        for attribute, value in list(vars(module).items()):
            if attribute in _COUNT_ATTRIBUTES and value == count:
                journal.set(module, attribute, changes["num_hidden_layers"])
            for old, new in old_lists:
                if isinstance(value, list) and value == old:
                    journal.set(module, attribute, list(new))


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


def renumber_key(name: str, path: str, plan: PruningPlan) -> str | None:
    """Returns a module or tensor name after pruning; None if it belongs to a removed block.

    Args:
        name: Such as `model.layers.7.mlp.up_proj.weight`.
        path: Of the block list, such as `model.layers`.
        plan: The plan that renumbers.
    """
    match = re.match(rf"{re.escape(path)}\.(\d+)(?=\.|$)", name)
    if match is None:
        return name
    block = int(match[1])
    if block not in plan.kept_blocks:
        return None
    return f"{path}.{plan.kept_blocks.index(block)}{name[match.end() :]}"


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
                if plain and not attribute.startswith("_") and attribute not in _RUN_SETTINGS:
                    yield f"{position}.{name}.{attribute}", value
