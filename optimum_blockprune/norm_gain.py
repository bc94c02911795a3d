# SPDX-License-Identifier: Apache-2.0
"""Reads off a live module whether it is a norm, and what its gain is: no class names, no list of layouts.

A norm computes `gain * (x - mean) / denominator + offset`; some subtract the mean (LayerNorm), some do not (RMSNorm),
and some store their gain less one. All of that shows in what the module does with two opposite vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .measures import fp64_zeros
from .offload import copied


# Made-up vectors are this large, so that no norm's epsilon matters.
_LARGE = 1e3
# Largest error relative to what is looked at; half precision rounds to 0.4 %.
_TOLERANCE = 1e-2
_SAME_GAIN = 1e-4


@dataclass(frozen=True)
class Norm:
    """A norm over hidden coordinates.

    Attributes:
        module: The live module.
        gain: fp64 [d]: what it multiplies with.
        offset: [d]: what it adds.
        centred: Whether it subtracts the mean first.
    """

    module: nn.Module
    gain: Tensor
    offset: Tensor
    centred: bool

    def inverse(self, before: Tensor, after: Tensor) -> Tensor:
        """1 / denominator of every token [n], from what went in and came out, [n, d] each.

        The least-squares answer: no epsilon has to be known, and half-precision outputs average out.
        """
        numerator = self._numerator(before)
        found = (_wide(after) - self.offset.to(numerator)) * numerator
        return found.sum(-1) / numerator.square().sum(-1).clamp_min(torch.finfo(numerator.dtype).tiny)

    def explains(self, before: Tensor, after: Tensor) -> bool:
        """Whether the module computes on [n, d] what this describes."""
        fitted = self.inverse(before, after).unsqueeze(-1) * self._numerator(before)
        moved = _wide(after) - self.offset.to(fitted)
        return bool((moved - fitted).norm() <= _TOLERANCE * moved.norm()) and bool(moved.norm() > 0)

    def _numerator(self, before: Tensor) -> Tensor:
        wide = _wide(before)
        if self.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        return wide * self.gain.to(wide)


def read_norm(module: nn.Module, before: Tensor, after: Tensor) -> Norm | None:
    """Returns the norm that `module` is, or `None`.

    Args:
        module: A live module.
        before, after: What went in and what came out, [..., d].
    """
    width = before.shape[-1]
    sizes = [tuple(parameter.shape) for parameter in module.parameters()]
    if before.shape != after.shape or width < 4 or any(size != (width,) for size in sizes) or [*module.children()]:
        return None
    try:
        gain, offset = _measured(module, before)
    except (TypeError, ValueError, RuntimeError):  # called with more than hidden states, or not on such shapes
        return None
    if gain is None or not bool(torch.isfinite(gain).all()):
        return None
    flat = before.reshape(-1, width), after.reshape(-1, width)
    readings = (Norm(module, _stored(module, gain), offset, centred) for centred in (False, True))
    return next((norm for norm in readings if norm.explains(*flat)), None)


@torch.no_grad()
def _measured(module: nn.Module, like: Tensor) -> tuple[Tensor | None, Tensor]:
    """Gain and offset, fp64 [d]; no gain where the module does more than scale-free arithmetic."""
    # A copy in full precision: the live one may round its output.
    twin = copied(module).float().eval()
    pattern = _pattern(like.shape[-1]).to(like.device)
    plus, minus, double = (twin(factor * _LARGE * pattern.view(1, 1, -1)).flatten() for factor in (1, -1, 2))
    if not torch.allclose(plus, double, rtol=1e-3, atol=1e-3 * float(plus.abs().max())):
        return None, plus
    unit = pattern / pattern.square().mean().sqrt()
    home = fp64_zeros(like, 0).device
    return ((plus - minus) / 2 / unit).to(home).double(), ((plus + minus) / 2).to(home).double()


def _pattern(width: int) -> Tensor:
    """[d], no entry 0, mean 0: a norm that subtracts the mean and one that does not agree on it."""
    pattern = torch.ones(width)
    pattern[1::2] = -1
    if width % 2:
        pattern[-3:] = torch.tensor([2.0, -1.0, -1.0])
    return pattern


def _stored(module: nn.Module, gain: Tensor) -> Tensor:
    """The parameter that the measured gain is, or one more than it is: those are exact."""
    for parameter in module.parameters():
        for shift in (0, 1):
            exact = parameter.detach().to(gain.device).double() + shift
            if torch.allclose(exact, gain, rtol=_SAME_GAIN, atol=_SAME_GAIN * float(gain.abs().max())):
                return exact
    return gain


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
