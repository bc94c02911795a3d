# SPDX-License-Identifier: Apache-2.0
"""Tries on one block of the real model whether units can be cut out of it, and in which order fused tensors hold them.

The truth is the block itself with units switched off at their writer. A copy of the block, narrowed, must compute the
same; where several orders of a fused tensor are possible, the one that does is the right one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import BlockStack
from .errors import UnsupportedModelError
from .narrowing import narrow, units_off
from .plain_units import plain_units
from .runner import BlockRunner
from .stand_ins import hidden_of
from .units import Found, find_units
from .widths import FAMILIES, UnitGroup


# Largest difference relative to the largest value of the block's output: a wrong order is off by about 1.
_TOLERANCE = {torch.float16: 3e-2, torch.bfloat16: 6e-2}
_FULL_TOLERANCE = 1e-4


def usable_units(
    stack: BlockStack, families: Sequence[str] = FAMILIES, layout: str = "uniform"
) -> tuple[tuple[UnitGroup, ...], tuple[tuple[int, ...], ...]]:
    """Returns the groups of units that this model can lose exactly, and where they are.

    Args:
        stack: The blocks of a live model.
        families: `"mlp"`, `"attention"` or both.
        layout: `"uniform"` needs configuration fields that say how many there are; the others do without.

    Returns:
        The groups, and for each of them the blocks that have it.

    Raises:
        UnsupportedModelError: One of the families has no units that can be cut exactly; says why.
    """
    groups: list[UnitGroup] = []
    places: list[tuple[int, ...]] = []
    for family in families:
        reason = stack.layout.whole_attention() if family == "attention" else None
        if reason is not None:
            raise UnsupportedModelError(_no_units(stack, family, "", [reason]))
        found, reasons = find_units(stack, family)
        proven = _proven(stack, found, reasons)
        if not proven and layout != "uniform":
            proven = _proven(stack, plain_units(stack, family), reasons)
        if not proven:
            raise UnsupportedModelError(_no_units(stack, family, layout, reasons))
        groups += [group for group, _ in proven]
        places += [blocks for _, blocks in proven]
    return tuple(groups), tuple(places)


def _proven(stack: BlockStack, found: Sequence[Found], reasons: list[str]) -> list[tuple[UnitGroup, tuple[int, ...]]]:
    proven = []
    for each in found:
        try:
            proven.append((decided(stack, each), each.blocks))
        except UnsupportedModelError as error:
            reasons.append(str(error).rstrip("."))
    return proven


def _no_units(stack: BlockStack, family: str, layout: str, reasons: Sequence[str]) -> str:
    why = "; ".join(dict.fromkeys(reasons)) or "its configuration has no field for their number"
    other = " Layout 'per_layer' may hold what no ordinary checkpoint can." if layout == "uniform" else ""
    return (
        f"{stack.layout.subject}: its {_NAMES[family]} cannot be cut exactly: {why}. Prune another family (strategy "
        f"option families), or whole blocks.{other}"
    )


_NAMES = {"mlp": "MLP channels", "attention": "attention heads"}


def decided(stack: BlockStack, found: Found) -> UnitGroup:
    """Returns the candidate that is right.

    Raises:
        UnsupportedModelError: None of them is: the units cannot be cut out exactly.
    """
    group = found.candidates[0]
    subject = f"{stack.layout.subject}: the units of '{group.writer}'"
    if group.units < 2:
        raise UnsupportedModelError(f"{subject} are one only")
    block = stack.blocks[found.blocks[0]]
    if any(parameter.device.type == "meta" for parameter in block.parameters()):
        raise UnsupportedModelError(
            f"{subject} cannot be tried, since the weights are offloaded. Load the model on one device, or make the "
            "plan elsewhere and apply it to the files (`optimum-cli blockprune apply`)"
        )
    kept = tuple(unit for unit in range(group.units) if unit % 3)
    call = _captured_call(stack, found.blocks[0])
    with torch.no_grad(), units_off(block, [(group, kept)]):
        truth = hidden_of(call(block))
    failure = "none of the possible orders of its tensors gives what the block computes with the units switched off"
    for candidate, reads_config in product(found.candidates, (False, True)):
        trial, tried = copy.deepcopy(block), replace(candidate, reads_config=reads_config)
        try:
            narrow(trial, tried, kept, len(kept), setattr, own_config=True)
            with torch.no_grad():
                output = hidden_of(call(trial))
        except (RuntimeError, ValueError, IndexError) as error:
            failure = " ".join(str(error).split())[:160]
            continue
        if output.shape == truth.shape and _close(output, truth):
            return tried
    raise UnsupportedModelError(f"{subject} cannot be cut out exactly: {failure}")


def _captured_call(stack: BlockStack, block: int) -> Callable[[nn.Module], Any]:
    """The arguments that the model calls a block with, as a function of the module to call."""
    arguments = BlockRunner(stack.model, stack.layout.stack).arguments_of(block)

    def call(module: nn.Module) -> Any:
        args, kwargs = arguments
        return module(*copy.deepcopy(args), **{name: _copied(value) for name, value in kwargs.items()})

    return call


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _close(output: Tensor, truth: Tensor) -> bool:
    error = (output.float() - truth.float()).abs().max() / truth.float().abs().max().clamp_min(1e-9)
    return bool(error <= _TOLERANCE.get(truth.dtype, _FULL_TOLERANCE))
