# SPDX-License-Identifier: Apache-2.0
"""The regression of a map: which tokens are fitted, how they weigh, and that the first one of a window stays."""

from __future__ import annotations

import pytest
import torch
from families import random_ids
from torch import Tensor

from optimum_blockprune.batches import CalibrationWindows
from optimum_blockprune.fitting import STRENGTHS, Tokens, crossed_parts, fitting_part, solved, weights_of
from optimum_blockprune.folds import CHANGE, DIAGONAL, MATRIX


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sums_of(y: Tensor, missing: Tensor, still: Tensor | None = None) -> dict[str, Tensor]:
    still = torch.zeros(0, y.shape[1], dtype=y.dtype) if still is None else still
    return {"moments": y.T @ y, "missing": y.T @ missing, "still": still.T @ still}


# Tokens


def test_first_tokens_are_told_from_others_and_from_padding() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)
    tokens = Tokens.of(mask)
    assert tokens.others.tolist() == [1, 2, 6, 7] and tokens.firsts.tolist() == [0, 5, 10]
    states = torch.arange(12.0).reshape(3, 4, 1)
    assert tokens.fitted(states).flatten().tolist() == [1, 2, 6, 7]


def test_first_tokens_are_scaled_as_the_others_of_their_window() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)
    weights = torch.tensor([[1.0], [7.0], [2.0], [4.0]])
    found = Tokens.of(mask).first(torch.ones(3, 4, 2), weights)
    # A window of one token has no others, and nothing to be scaled by.
    assert found.tolist() == [pytest.approx([each, each]) for each in (5.0, 10.0**0.5, 0.0)]


def test_every_token_weighs_by_its_own_norm() -> None:
    states = torch.tensor([[3.0, 4.0], [0.0, 0.5], [0.0, 0.0]])
    weights = weights_of(states)
    assert (weights * states).norm(dim=1).tolist() == pytest.approx([1, 1, 0])
    assert torch.isfinite(weights).all()


def test_some_windows_judge() -> None:
    windows = CalibrationWindows.from_tokens(random_ids(9, 8), source="made up")
    fitted, judges = fitting_part(windows, 4)
    assert torch.equal(judges.input_ids, windows.input_ids[[3, 7]]) and fitted.num_windows == 7
    fitted, judges = fitting_part(windows, 100)
    assert torch.equal(judges.input_ids, windows.input_ids[[8]]) and fitted.num_windows == 8


def test_windows_judge_each_once_what_others_were_fitted_on() -> None:
    windows = CalibrationWindows.from_tokens(random_ids(9, 8), source="made up")
    for tokens, count, expected in (
        (1000, 4, [[0, 4, 8], [1, 5], [2, 6], [3, 7]]),
        (40, 2, [[0, 4, 8], [2, 6]]),
        (17, 3, [[1], [4], [7]]),
        (1, 3, [[1], [4], [7]]),
        (1, 1, [[4]]),
    ):
        pairs = crossed_parts(windows, count, judging=tokens, fitting=1000)
        assert [judges.input_ids.tolist() for _, judges in pairs] == [
            windows.input_ids[rows].tolist() for rows in expected
        ]
        for rows, (fitted, _) in zip(expected, pairs, strict=True):
            rest = [row for row in range(9) if row not in rows]
            assert torch.equal(fitted.input_ids, windows.input_ids[rest])
    ((fitted, _),) = crossed_parts(windows, 1, judging=1, fitting=25)
    assert torch.equal(fitted.input_ids, windows.input_ids[[1, 3, 6, 8]])
    assert len(crossed_parts(windows.part([0, 1]), 4, judging=1000, fitting=1000)) == 2


# The solution


def test_the_map_minimises_what_it_should() -> None:
    """Against the same problem, given to a solver of least squares with both penalties as further rows."""
    y, z, still, strength = numbers(50, 6), numbers(50, 6, seed=1), numbers(5, 6, seed=2), 0.7
    sums, identity = sums_of(y, z - y, still), torch.eye(6, dtype=torch.float64)
    penalty = (strength * sums["moments"].diagonal().mean()).sqrt() * identity
    wanted = torch.linalg.lstsq(torch.cat([y, still, penalty]), torch.cat([z, still, penalty])).solution
    assert torch.allclose(solved(sums, MATRIX, strength).double(), wanted, atol=1e-5)
    diagonal = solved(sums, DIAGONAL, strength)
    for channel in range(6):
        column = torch.cat([y[:, channel], still[:, channel], penalty[0, :1]])
        target = torch.cat([z[:, channel], still[:, channel], penalty[0, :1]])
        assert diagonal[channel].item() == pytest.approx(((column @ target) / (column @ column)).item(), rel=1e-5)


def test_the_change_of_a_weight_minimises_what_it_should() -> None:
    """More inputs than outputs, and fewer tokens than inputs; see above."""
    inputs, missing, still, strength = numbers(9, 12), numbers(9, 5, seed=1), numbers(2, 12, seed=2), 0.7
    sums, identity = sums_of(inputs, missing, still), torch.eye(12, dtype=torch.float64)
    penalty = (strength * sums["moments"].diagonal().mean()).sqrt() * identity
    targets = torch.cat([missing, torch.zeros(2 + 12, 5, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(torch.cat([inputs, still, penalty]), targets).solution
    found = solved(sums, CHANGE, strength)
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert solved(sums, CHANGE, 1e9).abs().max() < 1e-6


@pytest.mark.parametrize("strength", STRENGTHS)
def test_what_the_others_lack_does_not_leak_into_a_massive_first_token(strength: float) -> None:
    """All of them lack the same thing, and all have a little of what the first token has 1,000 times."""
    size = 32
    sink = torch.zeros(size, dtype=torch.float64)
    sink[0] = 1.0
    y = 0.2 * numbers(400, size) + 0.05 * sink
    missing = 0.2 * numbers(400, size, seed=1) + numbers(1, size, seed=2)
    massive = 1000 * sink + numbers(1, size, seed=3)

    def moved(sums: dict[str, Tensor]) -> float:
        change = massive @ solved(sums, MATRIX, strength).double() - massive
        return (change.norm() / massive.norm()).item()

    assert moved(sums_of(y, missing)) > 0.1
    assert moved(sums_of(y, missing, massive)) < 1e-3
    # The others get nearly as much of what they lack.
    left = [
        (y @ solved(sums, MATRIX, strength).double() - y - missing).square().sum()
        for sums in (sums_of(y, missing), sums_of(y, missing, massive))
    ]
    assert left[1] < 1.2 * left[0]


def test_an_ordinary_first_token_changes_next_to_nothing() -> None:
    y, missing = numbers(400, 16), numbers(400, 16, seed=1)
    without, given = (solved(sums_of(y, missing, still), MATRIX, 0.3) for still in (None, numbers(1, 16, seed=2)))
    assert (without - given).abs().max() < 0.02


def test_strong_shrinkage_leaves_the_identity() -> None:
    y, missing = numbers(40, 6), numbers(40, 6, seed=1)
    assert torch.allclose(solved(sums_of(y, missing), MATRIX, 1e9), torch.eye(6), atol=1e-6)
    assert torch.allclose(solved(sums_of(y, missing), DIAGONAL, 1e9), torch.ones(6), atol=1e-6)
