# SPDX-License-Identifier: Apache-2.0
"""Estimators against closed forms, and against the ways in which a tempting implementation would be wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from optimum_blockprune.estimators import GaussianCopula, Histogram, IdentityDecoder, RunEstimator


CLIP = -0.5 * math.log(1e-6)  # 6.9 nats


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chain(factor: float, boundaries: int, tokens: int, width: int) -> Tensor:
    """[T+1, n, d] with unit variance; states k blocks apart are correlated by factor**k."""
    noise = normal(boundaries, tokens, width)
    states = [noise[0]]
    for step in noise[1:]:
        states.append(factor * states[-1] + math.sqrt(1 - factor**2) * step)
    return torch.stack(states)


def score(estimator: RunEstimator, states: Tensor, chunk: int | None = None) -> Tensor:
    for part in states.split(chunk or states.shape[1], dim=1):
        estimator.add(part)
    return estimator.all_runs()


def pair(estimator: RunEstimator, x: Tensor, y: Tensor) -> float:
    return float(score(estimator, torch.stack([x, y]))[0, 1])


def every_estimator(width: int) -> list[RunEstimator]:
    return [GaussianCopula(), IdentityDecoder(), Histogram(8, width, seed=0)]


# --- Gaussian copula -------------------------------------------------------------------------------------------------


def test_copula_finds_the_information_of_all_pairs_of_a_gaussian_chain() -> None:
    scores = score(GaussianCopula(), chain(0.9, 5, 16384, 8), chunk=2048)
    for a in range(5):
        for b in range(a + 1, 5):
            assert float(scores[a, b]) == pytest.approx(-0.5 * math.log(1 - 0.9 ** (2 * (b - a))), abs=0.02)
    assert torch.equal(scores, scores.triu(1))


def test_copula_bias_of_independent_states() -> None:
    assert pair(GaussianCopula(), normal(2000, 400), normal(2000, 400, seed=1)) == pytest.approx(1 / 4000, rel=0.3)


def test_copula_is_clipped_for_identical_states() -> None:
    states = normal(500, 4)
    assert pair(GaussianCopula(), states, states) == pytest.approx(CLIP, abs=1e-3)


def test_copula_sees_no_monotone_map_and_no_outlier() -> None:
    x, y = normal(4000, 4), normal(4000, 4) * 0.6 + normal(4000, 4, seed=1) * 0.8
    plain = pair(GaussianCopula(), x, y)
    x, y = x.exp(), y**3
    y[0] = 1e6
    assert pair(GaussianCopula(), x, y) == pytest.approx(plain, abs=0.02)


def test_copula_of_chunks_is_near_the_copula_of_the_whole() -> None:
    states = chain(0.8, 4, 8192, 8).exp()
    whole, chunks = score(GaussianCopula(), states), score(GaussianCopula(), states, chunk=1024)
    torch.testing.assert_close(chunks, whole, atol=0.01, rtol=0.01)


def test_copula_does_not_take_ties_for_information() -> None:
    """Breaking ties by position, alike on both sides, would give far more than the bias 1 / (2n)."""
    x, y = normal(2000, 200).round(), normal(2000, 200, seed=1).round()
    assert pair(GaussianCopula(), x, y) == pytest.approx(1 / 4000, rel=0.3)


# --- identity decoder ------------------------------------------------------------------------------------------------


def test_identity_decoder_on_known_variances() -> None:
    x = normal(40000, 6)
    estimator = IdentityDecoder()
    information = pair(estimator, x, x + 0.5 * normal(40000, 6, seed=1))
    assert information == pytest.approx(0.5 * math.log(1.25 / 0.25), abs=0.01)
    assert float(estimator.additive_runs()[0, 1]) == pytest.approx(-0.5 * math.log(1.25), abs=0.01)


@pytest.mark.parametrize(
    "change, information, damage",
    [
        (lambda x: x, CLIP, 0.0),
        (lambda x: -x, 0.5 * math.log(1 / 4), 0.5 * math.log(5)),
        (lambda x: x + 2, 0.5 * math.log(1 / 4), 0.5 * math.log(5)),
        (lambda x: 3 * x, 0.5 * math.log(9 / 4), 0.5 * math.log(5)),
    ],
    ids=["identity", "sign flip", "shift of two standard deviations", "times three"],
)
def test_identity_decoder_sees_what_mutual_information_cannot(change, information: float, damage: float) -> None:
    x = normal(20000, 4)
    estimator = IdentityDecoder()
    assert pair(estimator, x, change(x)) == pytest.approx(information, abs=0.03)
    assert -float(estimator.additive_runs()[0, 1]) == pytest.approx(damage, abs=0.03)
    assert pair(GaussianCopula(), x, change(x)) == pytest.approx(CLIP, abs=1e-3)
    assert pair(Histogram(16, 4, seed=0), x, change(x)) > 2.5


def test_identity_decoder_is_precise_for_nearly_equal_states_far_from_zero() -> None:
    x = normal(5000, 3) + torch.tensor([0.0, 1e3, 1e5], dtype=torch.float64)
    y = x + 1e-3 * normal(5000, 3, seed=1)
    estimator = IdentityDecoder()
    score(estimator, torch.stack([x, y]), chunk=700)
    direct = 0.5 * torch.log1p((y - x).square().mean(0) / x.var(0, correction=0))
    assert -float(estimator.additive_runs()[0, 1]) == pytest.approx(float(direct.mean()), rel=1e-7)


def test_identity_decoder_equals_the_direct_formula_for_all_pairs() -> None:
    states = chain(0.7, 4, 300, 5) * torch.arange(1, 6)
    scores = score(IdentityDecoder(), states, chunk=64)
    for a in range(4):
        for b in range(a + 1, 4):
            error = (states[b] - states[a]).square().mean(0)
            direct = 0.5 * torch.log(states[b].var(0, correction=0) / error)
            assert float(scores[a, b]) == pytest.approx(float(direct.mean()), rel=1e-9)


# --- histogram -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_histogram_finds_the_information_of_gaussians(correlation: float) -> None:
    x = normal(32768, 4)
    y = correlation * x + math.sqrt(1 - correlation**2) * normal(32768, 4, seed=1)
    expected = -0.5 * math.log(1 - correlation**2)
    states = torch.stack([x, y])
    assert float(score(Histogram(32, 4, seed=0), states, chunk=2048)[0, 1]) == pytest.approx(expected, abs=0.03)


def test_histogram_equals_counting() -> None:
    x, y = normal(240, 1), normal(240, 1) + normal(240, 1, seed=1)
    order = torch.stack([x, y]).squeeze(-1).argsort(-1).argsort(-1)
    bins = order * 4 // 240
    joint = torch.zeros(4, 4, dtype=torch.float64)
    for i, j in bins.T.tolist():
        joint[i, j] += 1 / 240
    expected = float((joint * (joint / joint.sum(0) / joint.sum(1, keepdim=True)).log()).sum()) - 9 / 480
    assert pair(Histogram(4, 1, seed=0), x, y) == pytest.approx(expected, rel=1e-9)


def test_histogram_saturates_at_the_logarithm_of_its_bins() -> None:
    x = normal(4096, 2)
    assert pair(Histogram(16, 2, seed=0), x, x) == pytest.approx(math.log(16) - 15**2 / 8192, abs=1e-9)


def test_histogram_scores_all_pairs_in_the_right_place() -> None:
    states = chain(0.8, 12, 4000, 2)  # 66 pairs: several parts
    scores = score(Histogram(8, 2, seed=0), states)
    for a, b in ((0, 1), (0, 11), (3, 7), (10, 11)):
        assert float(scores[a, b]) == pytest.approx(pair(Histogram(8, 2, seed=0), states[a], states[b]), rel=1e-9)
    assert torch.equal(scores, scores.triu(1))


def test_histogram_draws_its_coordinates_by_the_seed() -> None:
    draws = [Histogram(8, 5, seed=seed).coordinates(100).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert sorted(set(draws[0])) == draws[0] and len(draws[0]) == 5
    assert Histogram(8, 64, seed=0).coordinates(3).tolist() == [0, 1, 2]
    assert GaussianCopula().coordinates(100) is None


def test_histogram_states_its_size() -> None:
    estimator = Histogram(8, 3, seed=0)
    score(estimator, normal(5, 50, 3))
    assert estimator.stored_values == 3 * (5 * 4 // 2) * 8**2


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4])
def test_constant_coordinates_carry_no_information(index: int, constant: float) -> None:
    states = torch.full((2, 1000, 1), constant, dtype=torch.float64)
    estimator = every_estimator(1)[index]
    assert float(score(estimator, states, chunk=300)[0, 1]) == 0.0
    assert float(estimator.additive_runs()[0, 1]) == 0.0


def test_a_coordinate_that_is_constant_on_one_side() -> None:
    dead, live = torch.ones(500, 1), normal(500, 1).float()
    for x, y in ((dead, live), (live, dead)):
        copula, identity, histogram = (pair(estimator, x, y) for estimator in every_estimator(1))
        assert copula == histogram == 0.0
        assert -CLIP - 1e-9 <= identity < 0.0
    estimator = IdentityDecoder()
    pair(estimator, dead, live)
    assert -float(estimator.additive_runs()[0, 1]) == pytest.approx(0.5 * math.log1p(1e6))


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_precision_is_taken(index: int, dtype: torch.dtype) -> None:
    states = chain(0.9, 3, 512, 2)
    exact = score(every_estimator(2)[index], states)
    scores = score(every_estimator(2)[index], states.to(dtype))
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, exact, atol=0.02, rtol=0)


@pytest.mark.parametrize("index", range(3))
def test_estimators_leave_the_states_alone(index: int) -> None:
    states = chain(0.9, 3, 64, 2)
    before = states.clone()
    score(every_estimator(2)[index], states)
    assert torch.equal(states, before)
