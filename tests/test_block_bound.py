# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from optimum_blockprune.block_bound import Reach, absolute, channel_scores, local_readers
from optimum_blockprune.errors import UnsupportedModelError


INPUTS, WIDTH, CHANNELS, TOKENS = 12, 40, 24, 50


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reach() -> Reach:
    return Reach(normal(WIDTH, CHANNELS, seed=1).abs(), normal(CHANNELS, WIDTH, seed=2).abs())


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("reduction", ["l1", "l2"])
def test_scores_are_the_reduced_matrices(reduction: str, behind: bool) -> None:
    x, writer, path = normal(TOKENS, INPUTS).abs(), normal(INPUTS, WIDTH, seed=3).abs(), reach() if behind else None
    rows = writer if path is None else writer @ (torch.eye(WIDTH, dtype=torch.float64) + path.readers @ path.writer)
    matrices = torch.einsum("tj,jk->jtk", x, rows)
    expected = matrices.sum((1, 2)) if reduction == "l1" else matrices.square().sum((1, 2)).sqrt()
    totals = x.sum(0) if reduction == "l1" else x.square().sum(0)
    torch.testing.assert_close(channel_scores(writer, totals, reduction, path), expected)


def test_v_by_two_products() -> None:
    path = reach()
    torch.testing.assert_close(path.vector, 1 + (path.readers @ path.writer).sum(1))


class _Shapes(TorchDispatchMode):
    """Remembers the shapes of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.shapes.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("reduction", ["l1", "l2"])
def test_no_square_matrix_of_the_hidden_size(reduction: str) -> None:
    with _Shapes() as seen:
        channel_scores(normal(INPUTS, WIDTH).abs(), torch.ones(INPUTS, dtype=torch.float64), reduction, reach())
    assert (WIDTH, CHANNELS) in seen.shapes
    assert (WIDTH, WIDTH) not in seen.shapes


def test_ffns_side_by_side_add_up() -> None:
    one, other = reach(), Reach(normal(WIDTH, 7, seed=4).abs(), normal(7, WIDTH, seed=5).abs())
    torch.testing.assert_close(one.joined(other).vector, one.vector + other.vector - 1)


def test_local_readers() -> None:
    gate, up, slopes, gain = normal(4, 3).abs(), normal(4, 3, seed=1).abs(), normal(2, 3, seed=2).abs(), normal(4)
    expected = gain.abs().diag() @ (gate @ slopes[0].diag() + up @ slopes[1].diag())
    torch.testing.assert_close(local_readers([gate, up], slopes, gain), expected)
    torch.testing.assert_close(local_readers([up], slopes[:1], gain), gain.abs().diag() @ up @ slopes[0].diag())


def test_weights_are_inputs_by_outputs() -> None:
    linear, conv = nn.Linear(3, 5), Conv1D(5, 3)
    assert torch.equal(absolute(linear), linear.weight.detach().abs().T)
    assert torch.equal(absolute(conv), conv.weight.detach().abs())
    assert absolute(nn.Linear(3, 5).bfloat16()).dtype == torch.float32
    with pytest.raises(UnsupportedModelError, match="Embedding is no plain projection"):
        absolute(nn.Embedding(3, 5))
