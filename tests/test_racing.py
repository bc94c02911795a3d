# SPDX-License-Identifier: Apache-2.0
"""Racing drops what cannot win, and the best candidate no more often than it says."""

from __future__ import annotations

import math

import pytest
import torch
from tiers import often
from torch import Tensor

from optimum_blockprune.racing import (
    CELL,
    ENOUGH_WINDOWS,
    cells_of,
    contenders,
    looks,
    shared_error,
    student_t_quantile,
)


def normal(means: list[float], windows: int, cells: int, seed: int, deviation: float = 0.1) -> dict[int, Tensor]:
    """Summed losses of cells: a hard or an easy text for all, and what tells the candidates apart."""
    generator = torch.Generator().manual_seed(seed)
    shared = 3 + torch.randn(windows, cells, generator=generator, dtype=torch.float64)
    return {
        block: CELL * (shared + mean + deviation * torch.randn(windows, cells, generator=generator))
        for block, mean in enumerate(means)
    }


def full(windows: int, cells: int) -> Tensor:
    return torch.full((windows, cells), CELL)


# Student's t


@pytest.mark.parametrize(
    ("upper", "freedom", "expected"),
    [
        # Tables of any textbook; the last two by integrating the density.
        (0.001, 1, 318.309),
        (0.025, 10, 2.22814),
        (0.001, 7, 4.78529),
        (0.005, 120, 2.61742),
        (0.4, 3, 0.276671),
        (1.2e-5, 31, 4.961248),
        (1e-5, 2000, 4.275143),
    ],
)
def test_quantiles(upper: float, freedom: int, expected: float) -> None:
    assert student_t_quantile(upper, freedom) == pytest.approx(expected, rel=1e-5)


def test_quantiles_fall_with_the_degrees_of_freedom() -> None:
    found = [student_t_quantile(1e-4, freedom) for freedom in (1, 2, 5, 20, 100, 10_000)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(3.719, abs=2e-3)  # the normal distribution


# Looks and cells


@pytest.mark.parametrize("windows", [1, 2, 3, 8, 16, 50, 128, 1000])
def test_looks_grow_and_stop_before_the_end(windows: int) -> None:
    found = looks(windows)
    assert list(found) == sorted(set(found))
    assert all(0 < seen < windows for seen in found)
    assert len(found) <= 14
    assert bool(found) == (windows > 1)


def test_looks_of_the_usual_numbers() -> None:
    assert looks(8) == (1, 2, 3, 4, 5, 7)
    assert looks(128)[:4] == (8, 10, 13, 17)


def test_cells_are_sums_of_neighbours() -> None:
    values = torch.arange(2 * 35, dtype=torch.float64).view(2, 35)
    cells = cells_of(values)
    assert cells.shape == (2, 3)
    assert cells[0].tolist() == [sum(range(16)), sum(range(16, 32)), 32 + 33 + 34]
    assert cells.sum() == values.sum()


# Who stays


def test_wide_gaps_leave_one() -> None:
    assert contenders(normal([0.5, 0.0, 0.4, 0.9], 2, 16, 0), full(2, 16), 1e-4) == [1]


def test_those_within_the_noise_stay() -> None:
    losses = normal([0.001, 0.0, 0.002, 0.8], 2, 16, 0)
    assert contenders(losses, full(2, 16), 1e-4) == [0, 1, 2]


def test_equals_stay_and_a_constant_gap_decides() -> None:
    losses = normal([0.0], 2, 8, 0)
    assert contenders({1: losses[0], 4: losses[0].clone()}, full(2, 8), 1e-3) == [1, 4]
    assert contenders({1: losses[0] + 1e-3, 4: losses[0]}, full(2, 8), 1e-3) == [4]


def test_one_sample_says_nothing() -> None:
    losses = normal([0.0, 5.0], 1, 1, 0)
    assert contenders(losses, full(1, 1), 1e-3) == [0, 1]


def test_padding_does_not_count() -> None:
    losses = normal([0.0, 0.05, 0.3], 2, 16, 1)
    counts = full(2, 16)
    padded = {block: torch.nn.functional.pad(sums, (0, 40)) for block, sums in losses.items()}
    for error in (0.3, 1e-2, 1e-4):
        expected = contenders(losses, counts, error)
        assert contenders(padded, torch.nn.functional.pad(counts, (0, 40)), error) == expected


def test_smaller_errors_keep_more() -> None:
    losses = normal([0.03 * block for block in range(12)], 1, 32, 0)
    kept = [set(contenders(losses, full(1, 32), error)) for error in (0.2, 1e-2, 1e-4, 1e-8)]
    assert kept[0] < kept[2] < kept[3]
    assert kept[0] <= kept[1] <= kept[2]


def test_a_larger_share_keeps_fewer() -> None:
    losses = normal([0.02 * block for block in range(12)], 1, 32, 0)
    kept = [set(contenders(losses, full(1, 32), 1e-4, share)) for share in (0.0, 0.5, 0.9)]
    assert kept[0] > kept[2]
    assert kept[0] >= kept[1] >= kept[2]


@pytest.mark.parametrize("windows", [4, ENOUGH_WINDOWS])
def test_windows_that_disagree_keep_a_candidate(windows: int) -> None:
    """Cells would say that 0 wins for sure; every other window says the opposite."""
    losses = normal([0.0, 0.1], windows, 64, 0)
    assert contenders(losses, full(windows, 64), 1e-4) == [0]
    swing = torch.where(torch.arange(windows) % 2 == 0, 0.6, -0.6)[:, None] * CELL
    assert contenders({0: losses[0], 1: losses[1] + swing}, full(windows, 64), 1e-4) == [0, 1]


# The confidence


def race(losses: dict[int, Tensor], confidence: float) -> list[int]:
    """A whole race; returns who reaches the end."""
    windows, cells = losses[0].shape
    live = list(losses)
    for seen in looks(windows):
        error = shared_error(confidence, len(losses), len(looks(windows)))
        seen_losses = {block: losses[block][:seen] for block in live}
        live = contenders(seen_losses, full(seen, cells), error, seen / windows)
    return live


@pytest.mark.parametrize("confidence", often([0.9, 0.99, 0.999], kept=lambda confidence: confidence == 0.9))
def test_the_best_is_dropped_no_more_often_than_stated(confidence: float) -> None:
    """Close rivals, normal differences: the rate over 2,000 races stays below the error, within sampling error."""
    races, lost, survivors = 2000, 0, 0
    for seed in range(races):
        losses = normal([0.0, 0.005, 0.005, 0.01, 0.2], 6, 8, seed)
        best = min(losses, key=lambda block: losses[block].sum().item())
        live = race(losses, confidence)
        lost += best not in live
        survivors += len(live)
    error = 1 - confidence
    assert lost / races <= error + 2 * math.sqrt(error * confidence / races)
    assert survivors / races < 4.5  # it does drop: four rivals are close, one is not


def test_one_comparison_errs_as_often_as_stated() -> None:
    """Two equal candidates of infinitely many windows: one of them is dropped in twice the one-sided error."""
    trials, error = 2000, 0.05
    dropped = sum(len(contenders(normal([0.0, 0.0], 1, 12, seed), full(1, 12), error)) < 2 for seed in range(trials))
    assert dropped / trials == pytest.approx(2 * error, abs=3 * math.sqrt(2 * error / trials))


def test_the_error_is_shared_among_rivals_and_looks() -> None:
    assert shared_error(0.99, 11, 5) == pytest.approx(0.01 / 50)
    assert shared_error(0.99, 1, 5) == pytest.approx(0.01)
