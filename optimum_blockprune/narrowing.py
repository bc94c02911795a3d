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

from .errors import PlanError
from .widths import ZEROS, UnitGroup, Width


def narrow(
    block: nn.Module,
    group: UnitGroup,
    kept: Sequence[int],
    width: int,
    assign: Callable[[Any, str, Any], None],
    *,
    means: Sequence[float] = (),
    own_config: bool = False,
) -> None:
    """Cuts units out of a block.

    Args:
        block: The block.
        group: Their group.
        kept: The units that stay.
        width: Number of units afterwards; zeros fill up what is more than `kept`.
        assign: `setattr`, or one that remembers.
        means: What the writer's bias makes up for; see `widths.Narrowing`.
        own_config: Whether modules that look into the configuration get one of their own, since the model's describes
            other blocks as well.
    """
    if means:
        writer = block.get_submodule(group.writer)
        shifted = nn.Parameter(_compensated(writer, group, kept, means), requires_grad=writer.bias.requires_grad)
        assign(writer, "bias", shifted)
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


def _compensated(writer: nn.Module, group: UnitGroup, kept: Sequence[int], means: Sequence[float]) -> Tensor:
    """The bias plus what the inputs that go add to the output on average."""
    if writer.bias is None:
        raise PlanError(f"The plan makes up for removed units by a bias of '{group.writer}', which has none.")
    gone = (~writer_mask(group, tuple(kept), writer.weight.device)).nonzero().squeeze(1)
    wide = torch.promote_types(writer.weight.dtype, torch.float32)
    columns = writer.weight.detach().index_select(group.tensors[0].axis, gone).to(wide)
    average = torch.tensor(means, dtype=wide, device=columns.device)
    added = columns @ average if group.tensors[0].axis == 1 else average @ columns
    return (writer.bias.detach().to(wide) + added).to(writer.bias.dtype)


def _selected(tensor: Tensor, axis: int, indices: tuple[int, ...]) -> Tensor:
    index = torch.tensor(indices, device=tensor.device)
    chosen = tensor.index_select(axis, index.clamp(min=0))
    if ZEROS in indices:
        # Filled in, not multiplied: zeros must not carry the sign of what was there.
        empty = [place for place, entry in enumerate(indices) if entry == ZEROS]
        chosen.index_fill_(axis, torch.tensor(empty, device=tensor.device), 0)
    return chosen


@contextmanager
def units_off(
    block: nn.Module, narrowed: Sequence[tuple[UnitGroup, Sequence[int]]], means: Sequence[float] = ()
) -> Iterator[None]:
    """Switches the units of a block off, all but the kept ones: the writer reads zeros, or their means, from them."""
    handles = []
    try:
        for group, kept in narrowed:
            hook = _masking(group, tuple(kept), means)
            handles.append(block.get_submodule(group.writer).register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _masking(
    group: UnitGroup, kept: tuple[int, ...], means: Sequence[float]
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        mask = writer_mask(group, kept, args[0].device)
        filling = torch.zeros(len(mask), dtype=args[0].dtype, device=mask.device)
        if means:
            filling[~mask] = torch.tensor(means, dtype=args[0].dtype, device=mask.device)
        return (torch.where(mask, args[0], filling), *args[1:])

    return hook


@contextmanager
def width_off(blocks: nn.ModuleList, width: Width) -> Iterator[None]:
    """Switches off in the dense model what a plan's width leaves out; the truth that a narrowed model is held to."""
    with ExitStack() as contexts:
        for each in width.narrowed:
            group = width.groups[each.group]
            contexts.enter_context(units_off(blocks[each.block], [(group, each.kept)], each.means))
        yield


def writer_mask(group: UnitGroup, kept: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Bool [inputs of the writer]: which of them belong to kept units."""
    cut = group.tensors[0]
    mask = torch.zeros(cut.size(group.units), dtype=torch.bool, device=device)
    mask[list(cut.indices(kept, group.units))] = True
    return mask
