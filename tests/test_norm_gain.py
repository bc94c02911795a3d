# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from optimum_blockprune.norm_gain import read_norm


pytestmark = pytest.mark.usefixtures("no_pictures")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class RMS(nn.Module):
    def __init__(self, width: int, shift: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(width, seed=1))
        self.shift, self.eps = shift, 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return ((wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()) * (self.weight + self.shift)).to(x)


def layer_norm(width: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(width)
    with torch.no_grad():
        norm.weight.copy_(normal(width, seed=2))
        norm.bias.copy_(normal(width, seed=3))
    return norm


@pytest.mark.parametrize("width", [7, 32])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_rms_norms_of_both_kinds(width: int, shift: float) -> None:
    module, x = RMS(width, shift), normal(2, 5, width) * 3
    norm = read_norm(module, x, module(x))
    assert not norm.centred
    assert torch.equal(norm.gain, module.weight.detach().double() + shift)
    flat = x.flatten(0, 1)
    expected = (flat.double().square().mean(-1) + 1e-6).rsqrt()
    torch.testing.assert_close(norm.inverse(flat, module(flat)).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [7, 32])
def test_layer_norm(width: int) -> None:
    module, x = layer_norm(width), normal(2, 5, width) * 3 + 1
    norm = read_norm(module, x, module(x))
    assert norm.centred
    assert torch.equal(norm.gain, module.weight.detach().double())
    flat = x.flatten(0, 1)
    expected = (flat.double().var(-1, unbiased=False) + 1e-5).rsqrt()
    torch.testing.assert_close(norm.inverse(flat, module(flat)).double(), expected, rtol=1e-6, atol=0)


def test_a_norm_without_weights() -> None:
    module, x = nn.LayerNorm(8, elementwise_affine=False), normal(2, 3, 8)
    assert read_norm(module, x, module(x)).gain.tolist() == pytest.approx([1.0] * 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    module, x = RMS(64, 1.0).to(dtype), normal(4, 16, 64).to(dtype)
    norm = read_norm(module, x, module(x))
    torch.testing.assert_close(norm.gain, module.weight.detach().double() + 1, rtol=1e-2, atol=1e-2)
    flat = x.flatten(0, 1)
    expected = flat.float().square().mean(-1).rsqrt()
    torch.testing.assert_close(norm.inverse(flat, module(flat)), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    "module",
    [nn.Identity(), nn.SiLU(), nn.ReLU(), nn.Linear(8, 8), nn.Sequential(nn.LayerNorm(8)), nn.Softmax(-1)],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_are_no_norms(module: nn.Module) -> None:
    x = normal(2, 3, 8)
    assert read_norm(module, x, module(x)) is None


def test_a_norm_of_something_else_is_none() -> None:
    """What came out must follow from what went in."""
    module, x = RMS(8), normal(2, 3, 8)
    assert read_norm(module, x, module(x) + x) is None
