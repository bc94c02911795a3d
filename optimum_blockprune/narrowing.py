# SPDX-License-Identifier: Apache-2.0
"""Cuts units out of a block, or switches them off in the dense one; the two must compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from .widths import ZEROS, UnitGroup, Width


def narrow(
    block: nn.Module,
    group: UnitGroup,
    kept: Sequence[int],
    width: int,
    assign: Callable[[Any, str, Any], None],
    *,
    own_config: bool = False,
) -> None:
    """Cuts units out of a block.

    Args:
        block: The block.
        group: Their group.
        kept: The units that stay.
        width: Number of units afterwards; zeros fill up what is more than `kept`.
        assign: `setattr`, or one that remembers.
        own_config: Whether modules that look into the configuration get one of their own, since the model's describes
            other blocks as well.
    """
    for cut in group.tensors:
        path, _, leaf = cut.name.rpartition(".")
        module = block.get_submodule(path)
        tensor = getattr(module, leaf)
        shorter = _selected(tensor.detach(), cut.axis, cut.indices(kept, group.units, width))
        if isinstance(tensor, nn.Parameter):
            shorter = nn.Parameter(shorter, requires_grad=tensor.requires_grad)
        assign(module, leaf, shorter)
    for attribute in group.attributes:
        value = attribute.per_unit * width + attribute.constant
        assign(block.get_submodule(attribute.module), attribute.name, value)
    if own_config and group.reads_config:
        _give_config(block, group, width, assign)


def _give_config(block: nn.Module, group: UnitGroup, width: int, assign: Callable[[Any, str, Any], None]) -> None:
    """Only to the modules around the group's tensors, whose configuration is the one with its fields."""
    owners = {cut.name.rpartition(".")[0].rpartition(".")[0] for cut in group.tensors}
    for path in owners:
        module = block.get_submodule(path)
        if isinstance(getattr(module, "config", None), PretrainedConfig):
            config = copy.deepcopy(module.config)
            for name, value in group.values(width).items():
                setattr(config, name, value)
            assign(module, "config", config)


def _selected(tensor: Tensor, axis: int, indices: tuple[int, ...]) -> Tensor:
    index = torch.tensor(indices, device=tensor.device)
    chosen = tensor.index_select(axis, index.clamp(min=0))
    if ZEROS in indices:
        # Filled in, not multiplied: zeros must not carry the sign of what was there.
        empty = [place for place, entry in enumerate(indices) if entry == ZEROS]
        chosen.index_fill_(axis, torch.tensor(empty, device=tensor.device), 0)
    return chosen


@contextmanager
def units_off(block: nn.Module, narrowed: Sequence[tuple[UnitGroup, Sequence[int]]]) -> Iterator[None]:
    """Switches the units of a block off, all but the kept ones: the writer reads zeros from them."""
    handles = []
    try:
        for group, kept in narrowed:
            handles.append(block.get_submodule(group.writer).register_forward_pre_hook(_masking(group, tuple(kept))))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _masking(group: UnitGroup, kept: tuple[int, ...]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        mask = writer_mask(group, kept, args[0].device)
        return (torch.where(mask, args[0], torch.zeros((), dtype=args[0].dtype, device=mask.device)), *args[1:])

    return hook


@contextmanager
def width_off(blocks: nn.ModuleList, width: Width) -> Iterator[None]:
    """Switches off in the dense model what a plan's width leaves out; the truth that a narrowed model is held to."""
    with ExitStack() as contexts:
        for each in width.narrowed:
            contexts.enter_context(units_off(blocks[each.block], [(width.groups[each.group], each.kept)]))
        yield


def writer_mask(group: UnitGroup, kept: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Bool [inputs of the writer]: which of them belong to kept units."""
    cut = group.tensors[0]
    mask = torch.zeros(cut.size(group.units), dtype=torch.bool, device=device)
    mask[list(cut.indices(kept, group.units))] = True
    return mask
