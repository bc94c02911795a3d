# SPDX-License-Identifier: Apache-2.0
"""The module of a block whose output goes into the residual stream unchanged: where a linear map can be put.

It is seen, not named: something is added to the output of a candidate, and the block must give exactly that much more,
up to one constant factor. A projection takes a whole matrix, a norm behind it (sandwich norms) a diagonal one. What is
no plain module of either kind (the experts of a mixture) takes none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .folding import folded
from .folds import DIAGONAL, MATRIX, Fold
from .inputs import evaluating


_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 5e-2}
_FULL_TOLERANCE = 1e-3

# Runs the block on made-up tokens and returns the stream behind it.
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Writer:
    """A module that writes to the stream.

    Attributes:
        module: Its name in the block.
        kind: `"matrix"` of a projection, whose weight may become any other; `"diagonal"` of a norm.
        axis, offset: See `Fold`.
        factor: The stream gets its output times this (residual multipliers).
    """

    module: str
    kind: str
    axis: int
    offset: float
    factor: float

    def fold(self, block: int, kind: str, tensor: str) -> Fold:
        """The entry of a map that goes into it."""
        return Fold(block, self.module, kind, self.axis, self.offset, tensor)


def find_writer(block: nn.Module, run: Run) -> Writer | None:
    """The last module that writes to the stream, a projection rather than a norm; `None` if there is none.

    Args:
        block: A live block.
        run: See `Run`.
    """
    with torch.no_grad(), evaluating(block):
        plain = run()
        width = plain.shape[-1]
        found = [name for name in _in_order(block, run) if _axis_of(block.get_submodule(name), width) is not None]
        norms: list[Writer] = []
        for name in reversed(found):
            factor = _factor(block.get_submodule(name), run, plain)
            if factor is None:
                continue
            writer = _writer(block, name, factor, run, width)
            if writer is not None and writer.kind == MATRIX:
                return writer
            norms += [] if writer is None else [writer]
        return norms[0] if norms else None


def _in_order(block: nn.Module, run: Run) -> list[str]:
    """Modules without children that run once, in the order in which they do."""
    seen: list[str] = []
    handles = [
        module.register_forward_hook(lambda _module, _args, _output, name=name: seen.append(name))
        for name, module in block.named_modules()
        if name and not any(True for _ in module.children())
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in seen if seen.count(name) == 1]


def _axis_of(module: nn.Module, width: int) -> int | None:
    """The axis of its weight along which `width` outputs lie; `None` for a module that takes no map."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return None
    if isinstance(module, (nn.Linear, Conv1D)):
        axis = 0 if isinstance(module, nn.Linear) else 1
        return axis if weight.shape[axis] == width else None
    return 0 if tuple(weight.shape) == (width,) else None


def _factor(module: nn.Module, run: Run, plain: Tensor) -> float | None:
    """What the block's output gains per unit that the module's output gains; `None` where that is no constant."""
    added: list[Tensor] = []

    def add(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
        added.append(noise * output.abs().mean().clamp_min(1e-3))
        return output + added[-1]

    handle = module.register_forward_hook(add)
    try:
        gained = run().float() - plain.float()
    finally:
        handle.remove()
    if len(added) != 1 or added[0].numel() != gained.numel():
        return None
    noise = added[0].float().view_as(gained)
    factor = ((gained * noise).sum() / noise.square().sum()).item()
    # What is lost by rounding grows with the stream, not with what was added to it.
    scale = noise.abs().max().item() * abs(factor) + _rounding(plain)
    tolerance = _TOLERANCE.get(plain.dtype, _FULL_TOLERANCE)
    fits = bool((gained - factor * noise).abs().max().item() <= tolerance * scale)
    return factor if factor and fits else None


def _rounding(plain: Tensor) -> float:
    return plain.float().abs().max().item() * (1e-3 if plain.dtype == torch.float32 else 1.0)


def _writer(block: nn.Module, name: str, factor: float, run: Run, width: int) -> Writer | None:
    """The writer, if a map put into its weight gives what the map does to its output."""
    module = block.get_submodule(name)
    axis = _axis_of(module, width)
    kind = DIAGONAL if module.weight.dim() == 1 else MATRIX
    generator = torch.Generator().manual_seed(1)
    scales = (1 + 0.5 * torch.rand(width, generator=generator)).to(module.weight.device)
    for offset in (0.0,) if kind == MATRIX else (0.0, 1.0):
        writer = Writer(name, kind, axis, offset, factor)
        fold = writer.fold(0, DIAGONAL, "")
        with _output_of(module, lambda output: output * scales.to(output.dtype)):
            wanted = run()
        with _weights_of(module, fold, scales):
            got = run()
        error = (got.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp_min(1e-9)
        if error.item() <= _TOLERANCE.get(wanted.dtype, 1e-5):
            return writer
    return None


@contextmanager
def _output_of(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _module, _args, output: change(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _weights_of(module: nn.Module, fold: Fold, scales: Tensor) -> Iterator[None]:
    before = {name: parameter for name, parameter in module.named_parameters(recurse=False)}
    try:
        for name, parameter in before.items():
            setattr(module, name, nn.Parameter(folded(parameter.detach(), fold, scales, name)))
        yield
    finally:
        for name, parameter in before.items():
            setattr(module, name, parameter)
