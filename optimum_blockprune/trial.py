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
from .inputs import evaluating
from .narrowing import narrow, units_off
from .offload import copied, held
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
    places: list[list[int]] = []
    for family in families:
        reason = stack.layout.whole_attention() if family == "attention" else None
        if reason is not None:
            raise UnsupportedModelError(_no_units(stack, family, "", [reason]))
        candidates, reasons = find_units(stack, family)
        proven = _proven(stack, candidates, reasons, layout)
        if not proven and layout != "uniform":
            proven = _proven(stack, plain_units(stack, family), reasons, layout)
        if not proven:
            raise UnsupportedModelError(_no_units(stack, family, layout, reasons))
        for group, blocks in proven:
            if group not in groups:  # blocks of several kinds may have the same units
                groups.append(group)
                places.append([])
            places[groups.index(group)] += blocks
    return tuple(groups), tuple(tuple(sorted(blocks)) for blocks in places)


def _proven(
    stack: BlockStack, found: Sequence[Found], reasons: list[str], layout: str
) -> list[tuple[UnitGroup, tuple[int, ...]]]:
    """The groups that pass the trial; one field speaks for all kinds of blocks, so that all or none of them may."""
    proven, failed = [], set()
    for each in found:
        try:
            proven.append((decided(stack, each), each.blocks))
        except UnsupportedModelError as error:
            reasons.append(str(error).rstrip("."))
            failed |= set(each.candidates[0].fields)
    if layout == "per_layer":
        return proven
    return [(group, blocks) for group, blocks in proven if not failed & set(group.fields)]


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
    with held(stack.blocks[found.blocks[0]]):
        return _decided(stack, found)


def _decided(stack: BlockStack, found: Found) -> UnitGroup:
    group = found.candidates[0]
    subject = f"{stack.layout.subject}: the units of '{group.writer}'"
    if group.units < 2:
        raise UnsupportedModelError(f"{subject} are one only")
    block = stack.blocks[found.blocks[0]]
    shapes = dict(block.named_parameters())
    if any(shapes[cut.name].shape[cut.axis] != cut.size(group.units) for cut in group.tensors):
        raise UnsupportedModelError(f"{subject} are fewer already than its configuration says; prune them in one step")
    if any(parameter.device.type == "meta" for parameter in block.parameters()):
        raise UnsupportedModelError(
            f"{subject} cannot be tried, since the model has no weights (they lie on the device 'meta'). Load it with "
            "its weights, or make the plan elsewhere and apply it to the files (`optimum-cli blockprune apply`)"
        )
    call = _captured_call(stack, found.blocks[0])
    some = tuple(unit for unit in range(group.units) if unit % 3)
    # A second choice that shares no pattern with the first: one alone may be right by accident.
    first_half = tuple(range((group.units + 1) // 2))
    dense = _outputs(call, block, group)
    truths = []
    for kept in (some, first_half):
        with units_off(block, [(group, kept)]):
            truths.append((kept, _outputs(call, block, group)))
        if _close(truths[-1][1][0], dense[0]):
            raise UnsupportedModelError(f"{subject} give nothing on made-up tokens, so that nothing can be tried")
    failure = _expected_failure(group)
    for candidate, reads_config in product(found.candidates, (False, True)):
        tried = replace(candidate, reads_config=reads_config)
        try:
            if all(_same(_narrowed_outputs(call, block, tried, kept), truth) for kept, truth in truths):
                return tried
        except _FAILURES as error:
            failure = " ".join(str(error).split())[:160]
    raise UnsupportedModelError(f"{subject} cannot be cut out exactly: {failure}")


def _expected_failure(group: UnitGroup) -> str:
    norms = sorted({cut.name.rpartition(".")[0] for cut in group.tensors if "norm" in cut.name.lower()})
    if norms:
        return f"'{norms[0]}' normalises all of them together, and has other statistics without some"
    return "none of the possible orders of its tensors gives what the block computes with the units switched off"


# How a forward fails on tensors that do not fit.
_FAILURES = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)


def _narrowed_outputs(
    call: Callable[[nn.Module], Any], block: nn.Module, group: UnitGroup, kept: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    trial = copied(block)
    narrow(trial, group, kept, len(kept), setattr, own_config=True)
    return _outputs(call, trial, group)


@torch.no_grad()
def _outputs(call: Callable[[nn.Module], Any], block: nn.Module, group: UnitGroup) -> tuple[Tensor, Tensor]:
    """What the writer gives, and the block: a norm behind the writer may hide that its output has another scale."""
    seen: list[Tensor] = []
    handle = block.get_submodule(group.writer).register_forward_hook(lambda _module, _args, out: seen.append(out))
    try:
        with evaluating(block):  # dropout would make two runs differ
            output = hidden_of(call(block))
    finally:
        handle.remove()
    if not seen:
        raise UnsupportedModelError(f"'{group.writer}' does not run on made-up tokens, so that nothing can be tried")
    return seen[-1], output


def _same(outputs: tuple[Tensor, Tensor], truths: tuple[Tensor, Tensor]) -> bool:
    return all(map(_close, outputs, truths))


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
    if output.shape != truth.shape:
        return False
    error = (output.float() - truth.float()).abs().max() / truth.float().abs().max().clamp_min(1e-9)
    return bool(error <= _TOLERANCE.get(truth.dtype, _FULL_TOLERANCE))
