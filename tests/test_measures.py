# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from optimum_blockprune.batches import Batch
from optimum_blockprune.errors import NonFiniteError
from optimum_blockprune.measures import (
    BoundaryDistance,
    PairMoments,
    angular_distance,
    block_influence,
    content_mask,
    dpi_violation_rate,
    half_ranks,
    last_tokens,
    normal_scores,
    raise_non_finite,
    real_tokens,
)


LEFT_AND_RIGHT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
FULL = torch.ones(2, 3, dtype=torch.bool)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_real_tokens_leave_padding_out() -> None:
    assert real_tokens(FULL).tolist() == list(range(6))
    assert real_tokens(LEFT_AND_RIGHT).tolist() == [2, 3, 4, 5, 6, 11]


def test_content_leaves_the_first_real_token_out() -> None:
    assert content_mask(FULL).tolist() == [[False, True, True]] * 2
    assert content_mask(LEFT_AND_RIGHT).flatten().nonzero().flatten().tolist() == [3, 5, 6]


def test_last_tokens_are_real_ones() -> None:
    assert last_tokens(FULL).tolist() == [2, 5]
    assert last_tokens(LEFT_AND_RIGHT).tolist() == [3, 6, 11]
    assert last_tokens(torch.zeros(1, 2, dtype=torch.bool)).tolist() == []


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_half_ranks_share_the_mean_rank_among_equals() -> None:
    values = torch.tensor([[3.0, 1.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    # Mean ranks 4, 1.5, 1.5, 3 and 2.5 throughout; twice that, less one.
    assert half_ranks(values).tolist() == [[7, 2, 2, 5], [4, 4, 4, 4]]


def test_half_ranks_against_counting() -> None:
    values = normal(5, 3, 100, dtype=torch.bfloat16).float().round(decimals=1)
    less = (values.unsqueeze(-1) > values.unsqueeze(-2)).sum(-1)
    equal = (values.unsqueeze(-1) == values.unsqueeze(-2)).sum(-1)
    assert torch.equal(half_ranks(values), 2 * less + equal)


def test_normal_scores() -> None:
    scores = normal_scores(torch.tensor([10.0, 30.0, 20.0]))
    expected = torch.special.ndtri(torch.tensor([1 / 6, 5 / 6, 1 / 2], dtype=torch.float64))
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, expected)


# --- moments ---------------------------------------------------------------------------------------------------------


def gathered(moments: PairMoments) -> tuple[Tensor, Tensor]:
    """Mean and upper covariance, summed over coordinates."""
    means: list[Tensor] = []
    covariance = moments.average(lambda mean, covariance: means.append(mean) or covariance)
    return torch.cat(means), covariance


@pytest.mark.parametrize("width", [1, 63, 130])
def test_moments_equal_the_direct_formula(width: int) -> None:
    states = normal(4, 500, width).cumsum(0) + 1000
    moments = PairMoments()
    moments.add(states)
    mean, covariance = gathered(moments)
    torch.testing.assert_close(mean, states.mean(1).T, rtol=1e-12, atol=0)
    centred = states - states.mean(1, keepdim=True)
    expected = torch.einsum("and,bnd->ab", centred, centred) / 500 / width
    torch.testing.assert_close(covariance, expected.triu(1), rtol=1e-10, atol=1e-12)


def test_moments_do_not_depend_on_the_chunks() -> None:
    states = normal(3, 600, 5) * 3 + 7
    whole, parts = PairMoments(), PairMoments()
    whole.add(states)
    for part in states.split([1, 99, 400, 100], dim=1):
        parts.add(part)
    assert parts.count == whole.count == 600
    for one, other in zip(gathered(whole), gathered(parts), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_moments_leave_their_input_alone_and_state_their_size() -> None:
    states = normal(3, 50, 5)
    before = states.clone()
    moments = PairMoments()
    assert moments.stored_values == 0
    moments.add(states)
    assert torch.equal(states, before)
    assert moments.stored_values == 5 * (3 * 3 + 2 * 3)


# --- data-processing inequality --------------------------------------------------------------------------------------


def test_dpi_holds_along_a_gaussian_chain() -> None:
    places = torch.arange(6, dtype=torch.float64)
    correlation = 0.9 ** (places - places[:, None]).abs()
    information = (-0.5 * torch.log1p(-correlation.square().clamp(max=1 - 1e-6))).triu(1)
    assert dpi_violation_rate(information) == 0.0


def test_dpi_counts_ordered_triples_only() -> None:
    scores = torch.tensor([[0, 1.0, 2.0, 0.5], [0, 0, 1.0, 1.0], [0, 0, 0, 1.0], [0, 0, 0, 0]])
    # Triples 012 (2 > 1, violated), 013, 023 and 123 (equal, not violated).
    assert dpi_violation_rate(scores) == 1 / 4
    assert dpi_violation_rate(scores, tolerance=1.5) == 0.0


def test_dpi_without_triples() -> None:
    assert dpi_violation_rate(torch.ones(2, 2)) == 0.0


# --- distances -------------------------------------------------------------------------------------------------------


def test_distances_equal_their_definitions() -> None:
    before, after = normal(200, 16), normal(200, 16, seed=1)
    cosine = torch.nn.functional.cosine_similarity(before, after)
    torch.testing.assert_close(block_influence(before, after), 1 - cosine)
    torch.testing.assert_close(angular_distance(before, after), torch.arccos(cosine) / math.pi)


@pytest.mark.parametrize("factor, influence, angle", [(2.0, 0.0, 0.0), (-1.0, 2.0, 1.0)])
def test_distances_at_their_ends(factor: float, influence: float, angle: float) -> None:
    states = normal(10, 8, dtype=torch.float32)
    torch.testing.assert_close(block_influence(states, factor * states), torch.full((10,), influence))
    torch.testing.assert_close(angular_distance(states, factor * states), torch.full((10,), angle))


def test_distances_are_precise_where_states_are_nearly_equal() -> None:
    angle = 1e-4  # 1 - cos is 5e-9, which float32 cannot tell from 0
    before = torch.tensor([[1.0, 0.0]])
    after = torch.tensor([[math.cos(angle), math.sin(angle)]])
    assert float(angular_distance(before, after)) == pytest.approx(angle / math.pi, rel=1e-4)
    assert float(block_influence(before, after)) == pytest.approx(angle**2 / 2, rel=1e-4)


def test_half_precision_is_widened_first() -> None:
    states = torch.full((1, 8), 300.0, dtype=torch.float16)  # the squares exceed float16
    assert float(block_influence(states, states)) == 0.0


@pytest.mark.parametrize("gap", [1, 2, 4])
def test_boundary_distance_streams(gap: int) -> None:
    boundaries = normal(5, 6, 3, 8)  # [T+1, B, S, d]
    distance = BoundaryDistance({1, gap}, block_influence)
    for windows in (slice(0, 4), slice(4, 6)):
        part = boundaries[:, windows]
        visit = distance.watch(torch.arange(part.shape[1] * 3))
        for position, hidden in enumerate(part):
            visit(position, hidden)
    flat = boundaries.flatten(1, 2)
    sums = distance.sums(4)
    assert sums["tokens"] == 18
    for each in (1, gap):
        expected = [float(block_influence(flat[a], flat[a + each]).mean()) for a in range(5 - each)]
        assert (sums[str(each)] / 18).tolist() == pytest.approx(expected, rel=1e-12)


def test_batches_may_take_turns() -> None:
    boundaries = normal(5, 2, 3, 8)
    one, other = BoundaryDistance([1, 2], block_influence), BoundaryDistance([1, 2], block_influence)
    visits = [one.watch(torch.arange(3)) for _ in range(2)]
    for position in range(5):
        for window, visit in enumerate(visits):
            visit(position, boundaries[position, window, None])
    for window in range(2):
        visit = other.watch(torch.arange(3))
        for position in range(5):
            visit(position, boundaries[position, window, None])
    found, expected = one.sums(4), other.sums(4)
    assert one.span == 3
    assert all(torch.equal(found[name], expected[name]) for name in ("1", "2", "tokens"))


def test_boundary_distance_keeps_no_view_of_what_it_saw() -> None:
    distance = BoundaryDistance([1], block_influence)
    visit = distance.watch(torch.tensor([0, 1]))
    reused = normal(1, 2, 4)
    second = normal(1, 2, 4, seed=1)
    expected = float(block_influence(reused[0], second[0]).mean())
    visit(0, reused)
    visit(1, reused.copy_(second))
    assert (distance.sums(1)["1"] / 2).tolist() == pytest.approx([expected])


def test_boundary_distance_that_saw_nothing_is_zero() -> None:
    sums = BoundaryDistance([1, 3], block_influence).sums(4)
    assert {name: values.tolist() for name, values in sums.items()} == {"1": [0.0] * 4, "3": [0.0] * 2, "tokens": 0}


# --- errors ----------------------------------------------------------------------------------------------------------


def test_raise_non_finite_lets_the_diagnosis_speak_first() -> None:
    def diagnose(batch: Batch) -> None:
        if batch is LEFT_AND_RIGHT:
            raise NonFiniteError("block 7")

    with pytest.raises(NonFiniteError, match="block 7"):
        raise_non_finite(diagnose, [FULL, LEFT_AND_RIGHT])
    with pytest.raises(NonFiniteError, match="no block alone"):
        raise_non_finite(diagnose, [FULL])
