# SPDX-License-Identifier: Apache-2.0
"""Puts maps into the weights of modules that write to the residual stream; see `folds`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PlanError
from .folds import CHANGE, DIAGONAL, Fold, Folds


def fold_into(block: nn.Module, fold: Fold, tensor: Tensor, assign: Callable[[Any, str, Any], None]) -> None:
    """Makes a module give `y T`, or `y + a D`, where it gave `y`.

    Args:
        block: The block that the module is in.
        fold: Which module, and how its weight lies.
        tensor: T, its diagonal, or D.
        assign: `setattr`, or one that remembers.

    Raises:
        PlanError: The module is not there, or has another shape.
    """
    try:
        module = block.get_submodule(fold.module)
        weight = module.weight
    except AttributeError as error:
        raise PlanError(f"The plan folds statistics into '{fold.module}' of block {fold.block}: {error}.") from error
    for name, parameter in (("weight", weight), ("bias", getattr(module, "bias", None))):
        if parameter is not None and touches(fold, name):
            value = folded(parameter.detach(), fold, tensor, name)
            assign(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))


def touches(fold: Fold, name: str) -> bool:
    """Whether a map changes the module's `"weight"` or `"bias"`."""
    return name == "weight" or fold.kind != CHANGE


def folded(value: Tensor, fold: Fold, tensor: Tensor, name: str = "weight") -> Tensor:
    """A weight or a bias with the map in it, computed in float32 or wider, in its own dtype.

    Args:
        value: The weight, or the bias `[d]`.
        fold: The map's entry.
        tensor: T, its diagonal, or D.
        name: `"weight"` or `"bias"`.

    Raises:
        PlanError: The shapes do not fit.
    """
    axis = 0 if name == "bias" else fold.axis
    if tuple(tensor.shape) != _shape(value, fold, axis):
        raise PlanError(
            f"The plan folds a tensor of shape {list(tensor.shape)} into the {name} of '{fold.module}' of block "
            f"{fold.block}, which has shape {list(value.shape)}: it was made for another model."
        )
    if value.is_meta:
        return value.clone()
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    factor = tensor.to(wide.device, wide.dtype)
    offset = fold.offset if name == "weight" else 0.0
    if fold.kind == CHANGE:
        mapped = wide + (factor.T if axis == 0 else factor)
    elif fold.kind == DIAGONAL:
        mapped = (wide + offset) * (factor if wide.dim() == 1 or axis == 1 else factor[:, None]) - offset
    elif name == "bias":
        mapped = wide @ factor
    else:
        mapped = factor.T @ wide if axis == 0 else wide @ factor
    return mapped.to(value.dtype).contiguous()


def _shape(value: Tensor, fold: Fold, axis: int) -> tuple[int, ...] | None:
    """The shape of the tensor that fits a weight or a bias; `None` where none does."""
    if fold.kind == CHANGE:
        return tuple(value.shape if axis else value.shape[::-1]) if value.dim() == 2 else None
    return (value.shape[axis],) * (1 if fold.kind == DIAGONAL else 2) if axis < value.dim() else None


def fold_all(blocks: nn.ModuleList, folds: Folds, assign: Callable[[Any, str, Any], None]) -> None:
    """Puts all maps of a plan into the blocks of its dense model; see `fold_into`."""
    tensors = folds.tensors()
    for each in folds.entries:
        fold_into(blocks[each.block], each, tensors[each.tensor], assign)


class Prepared:
    """Maps in live blocks that can be switched on and off; their weights are computed once.

    Args:
        blocks: The blocks of the dense model.
        entries: In the order in which they go into the weights.
        tensors: All T and D by name.
    """

    def __init__(self, blocks: nn.ModuleList, entries: Iterable[Fold], tensors: Mapping[str, Tensor]) -> None:
        self._before: dict[tuple[nn.Module, str], Any] = {}
        self._after: dict[tuple[nn.Module, str], Any] = {}

        def assign(module: nn.Module, name: str, value: Any) -> None:
            self._before.setdefault((module, name), getattr(module, name))
            self._after[module, name] = value
            setattr(module, name, value)

        try:
            for each in entries:
                fold_into(blocks[each.block], each, tensors[each.tensor], assign)
        finally:
            self._set(self._before)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Puts the maps in, and the old weights back at the end, however it ends."""
        try:
            self._set(self._after)
            yield
        finally:
            self._set(self._before)

    def _set(self, values: Mapping[tuple[nn.Module, str], Any]) -> None:
        for (module, name), value in values.items():
            setattr(module, name, value)
