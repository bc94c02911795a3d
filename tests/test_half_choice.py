# SPDX-License-Identifier: Apache-2.0
"""Halves chosen by the set loss: valid, never worse than whole blocks, as good as single exchanges can make them."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from optimum_blockprune.errors import ConfigurationError, PlanError
from optimum_blockprune.half import Half, joined_halves
from optimum_blockprune.half_choice import choose_halves
from optimum_blockprune.ica import choose_blocks, set_loss


BLOCKS = 6


def random_shares(seed: int, networks: int = 5) -> tuple[Tensor, Tensor]:
    """Shares [C, 2T] with rows that sum to 1, some networks in few halves only; and weights."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.rand(networks, 2 * BLOCKS, generator=generator, dtype=torch.float64).pow(4)
    weights = torch.rand(networks, generator=generator, dtype=torch.float64)
    return parts / parts.sum(1, keepdim=True), weights / weights.sum()


def leaves_blocks(halves: tuple[int, ...]) -> bool:
    try:
        joined_halves(BLOCKS, [Half(half // 2, ("attention", "mlp")[half % 2]) for half in halves])
    except PlanError as error:
        assert "must alternate" in str(error)
        return False
    return True


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_is_chosen_leaves_blocks_and_no_exchange_is_better(seed: int, count: int) -> None:
    shares, weights = random_shares(seed)
    removable = (0, 1, 2, 4, 5)
    chosen = choose_halves(shares, weights, removable, count)
    assert len(chosen) == 2 * count and leaves_blocks(chosen)
    assert {half // 2 for half in chosen} <= set(removable)
    loss = set_loss(shares, weights, chosen)
    free = [half for half in range(2 * BLOCKS) if half // 2 in removable]
    others = [each for each in combinations(free, 2 * count) if len(set(each) - set(chosen)) <= 2]
    assert min(set_loss(shares, weights, each) for each in others if leaves_blocks(each)) >= loss - 1e-10
    blocks = choose_blocks(shares[:, ::2] + shares[:, 1::2], weights, removable, count)
    whole = [half for block in blocks for half in (2 * block, 2 * block + 1)]
    assert loss <= set_loss(shares, weights, whole) + 1e-10


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_best_run_of_halves(count: int) -> None:
    shares, weights = random_shares(7)
    chosen = choose_halves(shares, weights, (1, 2, 3, 4), count, contiguous=True)
    runs = [tuple(range(start, start + 2 * count)) for start in range(2, 10 - 2 * count + 1)]
    assert chosen == min(runs, key=lambda run: set_loss(shares, weights, run))


def test_halves_of_no_network_go_first() -> None:
    shares = torch.full((2, 2 * BLOCKS), 0.1, dtype=torch.float64)
    shares[:, 5:7] = 0.0
    assert choose_halves(shares, torch.ones(2), range(BLOCKS), 1) == (5, 6)
    assert choose_halves(shares, torch.ones(2), range(BLOCKS), 0) == ()


def test_too_much() -> None:
    shares, weights = random_shares(0)
    with pytest.raises(ConfigurationError, match="3 blocks are to be removed, but 2 may be"):
        choose_halves(shares, weights, (1, 4), 3)
    with pytest.raises(ConfigurationError, match="No 2 consecutive blocks"):
        choose_halves(shares, weights, (1, 4), 2, contiguous=True)
