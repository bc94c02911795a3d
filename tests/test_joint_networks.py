# SPDX-License-Identifier: Apache-2.0
"""Networks of all blocks, held to regressions and to planted structure."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from optimum_blockprune.errors import NonFiniteError
from optimum_blockprune.ica import joint_subspace
from optimum_blockprune.joint_networks import (
    STANDARDISED,
    UNIFORM,
    UPDATE,
    BlockUpdates,
    JointNetworks,
    joint_networks,
)


TOKENS, WIDTHS = 60, (30, 50, 40)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def updates_of(widths: tuple[int, ...] = WIDTHS, rank: int = 4, noise: float = 0.0) -> list[Tensor]:
    """Z_l of blocks that share `rank` time courses; sparse places, so that there is something to rotate to."""
    courses = normal(TOKENS, rank)
    courses -= courses.mean(0)
    parts = [courses @ normal(rank, width, seed=7 + number).pow(3) for number, width in enumerate(widths)]
    return [part + noise * (extra - extra.mean(0)) for part, extra in zip(parts, map(_noise, widths), strict=True)]


def _noise(width: int) -> Tensor:
    return normal(TOKENS, width, seed=100 + width)


def found(z: list[Tensor], **changes: object) -> JointNetworks:
    settings = {"components": 4, "restarts": 2, "seed": 0}
    networks = joint_networks(z.__getitem__, len(z), **{**settings, **changes})
    assert networks is not None
    return networks


def test_maps_are_standardised_over_the_channels_of_all_blocks() -> None:
    z = found(updates_of()).maps.z
    assert z.shape == (4, sum(WIDTHS))
    torch.testing.assert_close(z @ z.T / (sum(WIDTHS) - 1), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-9)
    assert float(z.mean(1).abs().max()) < 1e-9


def regressed(stacked: Tensor, z: Tensor) -> Tensor:
    """Coefficients [T, C] of the maps, with a constant beside them."""
    design = torch.cat([z, torch.ones(1, z.shape[1], dtype=z.dtype)]).T
    return torch.linalg.lstsq(design, stacked.T).solution[:-1].T


def test_weights_are_the_variance_of_regressed_time_courses() -> None:
    """With as many components as the rank, the maps and a constant explain the updates wholly."""
    z = updates_of()
    networks = found(z)
    stacked = torch.cat(z, dim=1)
    courses = regressed(stacked, networks.maps.z)
    torch.testing.assert_close(networks.variances, courses.square().sum(0), rtol=1e-8, atol=0)
    centred = stacked - stacked.mean(1, keepdim=True)
    torch.testing.assert_close(courses @ networks.maps.z, centred, rtol=0, atol=1e-8)


def test_weights_with_fewer_components_are_those_within_the_subspace() -> None:
    z = updates_of(noise=0.5)
    networks = found(z)
    v, _ = joint_subspace(sum(each @ each.T for each in z), 4)
    courses = v @ v.T @ regressed(torch.cat(z, dim=1), networks.maps.z)
    torch.testing.assert_close(networks.variances, courses.square().sum(0), rtol=1e-8, atol=0)


def test_participation_adds_up() -> None:
    networks = found(updates_of())
    for weights in ("variance", "uniform"):
        result = networks.participation(0.8, weights)
        assert sum(result.blocks) == pytest.approx(1.0)
        assert float(result.weights.sum()) == pytest.approx(1.0)
        expected = (result.weights.unsqueeze(1) * result.shares).sum(0)
        assert result.blocks == pytest.approx(expected.tolist())


def test_weights_matter() -> None:
    networks = found(updates_of())
    uniform = networks.participation(0.8, UNIFORM)
    assert uniform.weights.tolist() == [0.25] * 4
    assert uniform.blocks != pytest.approx(networks.participation(0.8).blocks)


def test_empty_networks_are_left_out() -> None:
    networks = found(updates_of())
    z = networks.maps.z.clone()
    z[0] = z[0].clamp(-0.5, 0.5)
    emptied = JointNetworks(type(networks.maps)(z, networks.maps.log), networks.sizes, networks.variances)
    result = emptied.participation(0.8)
    assert float(result.weights[0]) == 0.0
    assert sum(result.blocks) == pytest.approx(1.0)


def test_without_rotation_leverage_is_the_one_network() -> None:
    z = updates_of()
    result = found(z, control="leverage_only").participation(0.0)
    v, w = joint_subspace(sum(each @ each.T for each in z), 4)
    u = torch.cat(z, dim=1).T @ v / w.sqrt()
    u -= u.mean(0)
    leverage = (u @ torch.linalg.inv(u.T @ u) * u).sum(1)
    expected = [float(part.sum()) / 4 for part in leverage.split(WIDTHS)]
    assert result.blocks == pytest.approx(expected)
    assert result.weights.tolist() == [1.0]


@pytest.mark.parametrize("control", ["none", "leverage_only", "random_rotation"])
def test_noise_takes_part_least(control: str) -> None:
    """The sanity check of the notes: three blocks, the one in the middle has nothing to do with the others."""
    z = updates_of((60, 60, 60))
    z[1] = 0.1 * _noise(60)
    z[1] -= z[1].mean(0)
    blocks = found(z, control=control).participation(0.9).blocks
    assert blocks[1] == min(blocks)
    assert blocks[1] < 0.1


def test_blocks_that_add_nothing() -> None:
    assert joint_networks(lambda _: torch.zeros(20, 5).double(), 2, components=2, restarts=1, seed=0) is None
    with pytest.raises(NonFiniteError):
        joint_networks(lambda _: torch.full((20, 5), math.nan).double(), 2, components=2, restarts=1, seed=0)


# --- updates ---------------------------------------------------------------------------------------------------------


def filled(states: Tensor) -> BlockUpdates:
    """States [boundaries, T, d] as two batches: every second of the first windows' tokens, all of the others'."""
    updates = BlockUpdates(len(states) - 1, states.shape[1])
    half = states.shape[1] // 2
    wide = torch.zeros(len(states), 2 * half, states.shape[2]).to(states)
    wide[:, ::2] = states[:, :half]
    for rows, hidden in ((torch.arange(0, 2 * half, 2), wide), (torch.arange(half), states[:, half:])):
        visit = updates.watch(rows)
        for position, each in enumerate(hidden):
            visit(position, each.unsqueeze(0))
    return updates


def test_updates_are_relative_to_what_comes_in() -> None:
    states = normal(3, 20, 8).float()
    updates = filled(states)
    assert updates.stored_values == states.numel()
    wide = states.double()
    size = wide[1].square().mean(1, keepdim=True).sqrt()
    update = (wide[2] - wide[1]) / size
    centred = update - update.mean(0)
    torch.testing.assert_close(updates.of(1, UPDATE), centred)
    torch.testing.assert_close(updates.of(1, STANDARDISED), centred / centred.square().mean(0).sqrt())


def test_scale_of_the_stream_does_not_matter() -> None:
    states = normal(3, 20, 8)
    torch.testing.assert_close(filled(states).of(1), filled(1000 * states).of(1))


def test_an_input_of_zeros_is_no_division_by_zero() -> None:
    states = torch.zeros(2, 20, 8)
    assert torch.equal(filled(states).of(0), torch.zeros(20, 8).double())
