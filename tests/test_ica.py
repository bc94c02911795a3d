# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch
from torch import Tensor

from optimum_blockprune import ica
from optimum_blockprune.errors import ConfigurationError, NonFiniteError
from optimum_blockprune.ica import (
    Maps,
    choose_blocks,
    effective_components,
    joint_subspace,
    leading_maps,
    random_start,
    rotated_maps,
    set_loss,
    shares,
    spatial_maps,
    standardised,
    symmetric_fastica,
    whitened,
)


SHAPES = [(40, 150), (150, 40), (60, 60)]
OVERFLOWING = {"cube": lambda s: (s * math.inf, s.mean(1))}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def laplace(*shape: int, seed: int = 0) -> Tensor:
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs())


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def identity(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def mixed(sources: int = 6, places: int = 4000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Independent Laplace sources [C, N], and their whitened mixture [C, N]."""
    true = laplace(sources, places, seed=seed)
    return true, whitened((normal(sources, sources, seed=seed + 1) @ true).T)


def fitted(signals: Tensor, **changes: object) -> Maps:
    settings = {"components": 5, "restarts": 2, "seed_parts": (0, 1, 2)}
    maps = spatial_maps(signals, **{**settings, **changes})
    assert maps is not None
    return maps


# --- signals ---------------------------------------------------------------------------------------------------------


def test_standardised_channels_and_untouched_input() -> None:
    signals = (normal(50, 7) * torch.arange(1, 8) + 100).float()
    before = signals.clone()
    z = standardised(signals)
    assert z.dtype == torch.float64
    close(z.mean(0), torch.zeros(7, dtype=torch.float64))
    close(z.square().mean(0), torch.ones(7, dtype=torch.float64))
    assert torch.equal(signals, before)


def test_dead_channels_do_not_explode() -> None:
    signals = normal(50, 8)
    signals[:, 1] = 12345.678
    signals[:, 2] = 12345.678 + 1e-9 * normal(50)
    signals[:, 3] = 0.0
    z = standardised(signals)
    assert torch.equal(z[:, [1, 3]], torch.zeros(50, 2, dtype=torch.float64))
    assert float(z[:, 2].abs().max()) < 1e-7
    close(z[:, 4:].square().mean(0), torch.ones(4, dtype=torch.float64))


def test_the_median_is_that_of_channels_that_vary() -> None:
    signals = torch.zeros(50, 9, dtype=torch.float64)
    signals[:, 0] = normal(50)
    signals[:, 1] = normal(50, seed=1)
    signals[:, 2] = 1e-9 * normal(50, seed=2)
    z = standardised(signals)
    close(z.square().mean(0)[:2], torch.ones(2, dtype=torch.float64))
    assert float(z[:, 2:].abs().max()) < 1e-7


def test_all_channels_dead() -> None:
    assert torch.equal(standardised(torch.full((5, 3), 7.0)), torch.zeros(5, 3, dtype=torch.float64))
    for control in ("none", "leverage_only", "random_rotation"):
        assert spatial_maps(torch.ones(50, 30), components=2, restarts=1, seed_parts=(0,), control=control) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_signals_are_refused(value: float) -> None:
    signals = normal(5, 3)
    signals[2, 1] = value
    with pytest.raises(NonFiniteError, match="in the signals.*another dtype"):
        standardised(signals)
    with pytest.raises(NonFiniteError, match="token by token"):
        joint_subspace(torch.full((3, 3), value), 2)


def test_components_follow_tokens() -> None:
    assert [effective_components(128, tokens) for tokens in (0, 19, 20, 400, 10000)] == [1, 1, 1, 20, 128]


# --- subspace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_leading_maps_span_what_the_svd_spans(shape: tuple[int, int]) -> None:
    z = standardised(normal(*shape) @ torch.diag(torch.linspace(1, 9, shape[1], dtype=torch.float64)).cumsum(1))
    u = leading_maps(z, 5)
    expected = torch.linalg.svd(z, full_matrices=False)[2][:5].T
    close(u.T @ u, identity(5), 1e-12)
    close(u @ u.T, expected @ expected.T, 1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_leading_maps_stop_at_the_rank(shape: tuple[int, int]) -> None:
    tokens, channels = shape
    u = leading_maps(normal(tokens, 3) @ normal(3, channels, seed=1), 10)
    assert u.shape == (channels, 3)
    close(u.T @ u, identity(3), 1e-12)
    # Centred tokens have one direction less than there are.
    assert leading_maps(standardised(normal(6, 50)), 10).shape == (50, 5)
    assert leading_maps(torch.zeros(shape, dtype=torch.float64), 10).shape == (channels, 0)


def test_leading_maps_stay_orthonormal_where_eigenvalues_differ_widely() -> None:
    scales = torch.logspace(0, -4, 5, dtype=torch.float64)
    z = torch.linalg.qr(normal(40, 5))[0] * scales @ torch.linalg.qr(normal(150, 5, seed=1))[0].T
    u = leading_maps(z, 5)
    close(u.T @ u, identity(5), 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_whitening(shape: tuple[int, int]) -> None:
    y = whitened(leading_maps(standardised(normal(*shape)), 6))
    assert y.dtype == torch.float64
    close(y @ y.T / shape[1], identity(6))
    close(y.mean(1), torch.zeros(6, dtype=torch.float64))


def test_whitening_drops_what_centring_removes() -> None:
    constant = torch.full((50, 1), 50**-0.5, dtype=torch.float64)
    u = torch.linalg.qr(torch.cat([constant, normal(50, 4)], dim=1))[0] @ torch.linalg.qr(normal(5, 5, seed=1))[0]
    y = whitened(u)
    assert y.shape == (4, 50)
    close(y @ y.T / 50, identity(4))
    close(y.mean(1), torch.zeros(4, dtype=torch.float64))
    assert whitened(constant).shape == (0, 50)
    assert whitened(constant[:, :0]).shape == (0, 50)


def test_whitening_does_not_pick_arbitrary_vectors() -> None:
    """A rotation of U rotates Y: nothing else is decided in between."""
    u, rotation = torch.linalg.qr(normal(80, 6))[0], random_start(6, [3])
    close(whitened(u @ rotation), rotation.T @ whitened(u))


# --- FastICA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contrast", ["cube", "tanh"])
def test_fastica_separates_independent_sources(contrast: str) -> None:
    true, y = mixed()
    fit = symmetric_fastica(y, random_start(6, [0]), contrast=contrast)
    assert fit.converged and fit.finite and 1 < fit.iterations < 300
    close(fit.matrix @ fit.matrix.T, identity(6), 1e-12)
    found = torch.corrcoef(torch.cat([true, fit.matrix @ y]))[:6, 6:].abs()
    assert sorted(found.argmax(1).tolist()) == list(range(6))
    assert float(found.amax(1).min()) > 0.98
    assert float(found.sort(1).values[:, -2].max()) < 0.2


@pytest.mark.parametrize("contrast, theirs", [("cube", "cube"), ("tanh", "logcosh")])
def test_fastica_equals_scikit_learn(contrast: str, theirs: str) -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    _, y = mixed(sources=8)
    start = random_start(8, [1])
    reference = decomposition.FastICA(
        algorithm="parallel", whiten=False, fun=theirs, w_init=start.numpy(), max_iter=300, tol=1e-4
    ).fit(y.T.numpy())
    fit = symmetric_fastica(y, start, contrast=contrast)
    assert fit.converged
    assert fit.iterations == reference.n_iter_ < 300
    close(fit.matrix, torch.from_numpy(numpy.array(reference.components_)), 1e-6)


def test_fastica_stays_orthogonal_beside_spikes() -> None:
    """The eigenvectors of W W^T would miss by 7e-4 here."""
    places = normal(20000, 12)
    places[torch.arange(5), torch.arange(5)] += 1e4
    fit = symmetric_fastica(whitened(places), random_start(12, [0]), max_iter=20)
    close(fit.matrix @ fit.matrix.T, identity(12), 1e-12)


def test_fastica_says_that_it_did_not_converge() -> None:
    _, y = mixed()
    fit = symmetric_fastica(y, random_start(6, [0]), max_iter=2, tol=1e-12)
    assert (fit.converged, fit.finite, fit.iterations) == (False, True, 2)


def test_fastica_stops_where_the_cube_overflows() -> None:
    start = random_start(6, [0])
    fit = symmetric_fastica(normal(6, 100) * 1e110, start)
    assert (fit.converged, fit.finite, fit.iterations) == (False, False, 1)
    close(fit.matrix, start)


def test_one_component_is_a_sign() -> None:
    fit = symmetric_fastica(whitened(laplace(100, 1)), random_start(1, [0]))
    assert fit.converged
    assert fit.matrix.abs().tolist() == [[1.0]]


def test_random_starts() -> None:
    start = random_start(7, (1, 2, 3, 0))
    close(start @ start.T, identity(7), 1e-12)
    assert start.dtype == torch.float64
    assert torch.equal(start, random_start(7, [1, 2, 3, 0]))
    for other in ((1, 2, 3, 1), (1, 2, 30), (12, 3, 0), (3, 2, 1, 0)):
        assert float((start - random_start(7, other)).abs().max()) > 0.1


# --- maps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", ["none", "leverage_only", "random_rotation"])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_identities(shape: tuple[int, int], control: str) -> None:
    signals, channels = laplace(*shape), shape[1]
    u = leading_maps(standardised(signals), 5)
    leverage = torch.linalg.qr(u - u.mean(0))[0].square().sum(1)
    z = fitted(signals, control=control).z
    close(z.mean(1), torch.zeros(5, dtype=torch.float64))
    close(z.std(1), torch.ones(5, dtype=torch.float64))
    close(z.square().sum(0), (channels - 1) * leverage)
    assert float(z.square().sum()) == pytest.approx(5 * (channels - 1), rel=1e-12)


def test_peaks() -> None:
    signals = laplace(80, 60)
    ours, free, rotated = (fitted(signals, control=name) for name in ("none", "leverage_only", "random_rotation"))
    assert torch.equal(ours.peak, ours.z.abs().amax(0))
    assert torch.equal(rotated.peak, rotated.z.abs().amax(0))
    # Only the score without ICA is the same under every rotation.
    close(free.peak, ours.z.square().sum(0).sqrt())
    close(free.peak, rotated.z.square().sum(0).sqrt())
    assert float((ours.peak - rotated.peak).abs().max()) > 0.1
    for control in (free, rotated):
        assert (control.log.contrast, control.log.restarts, control.log.iterations) == ("none", 0, 0)


def test_maps_find_planted_networks() -> None:
    """Three groups of ten channels, each with its own time course, among noise."""
    signals = normal(400, 200)
    for network in range(3):
        signals[:, 10 * network : 10 * (network + 1)] += 3 * normal(400, 1, seed=network + 1)
    maps = fitted(signals, components=3, restarts=3)
    assert maps.log.converged
    assert float(maps.peak[:30].min()) > 2 * float(maps.peak[30:].max())
    owner = maps.z.abs().argmax(0)[:30].view(3, 10)
    assert torch.equal(owner, owner[:, :1].expand(3, 10))
    assert len(owner[:, 0].unique()) == 3


def test_maps_depend_on_their_seed_alone() -> None:
    signals = normal(60, 90)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = fitted(signals, control="random_rotation")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(fitted(signals, control="random_rotation").z, first.z)
    assert torch.equal(fitted(signals).z, fitted(signals).z)
    other = fitted(signals, control="random_rotation", seed_parts=(0, 1, 3))
    assert float((other.z - first.z).abs().max()) > 0.1


def test_the_sparsest_converged_fit_is_chosen() -> None:
    _, y = mixed()
    fits = [symmetric_fastica(y, random_start(6, (4, restart))) for restart in range(3)]
    assert all(fit.converged for fit in fits)
    maps = rotated_maps(y, restarts=3, seed_parts=(4,))
    size = math.sqrt(1 - 1 / y.shape[1])  # the sample standard deviation of a row of Y is 1 / size
    norms = [float((fit.matrix @ y).abs().sum(1).max()) * size for fit in fits]
    assert float(maps.z.abs().sum(1).max()) == pytest.approx(min(norms), rel=1e-12)
    assert maps.log.iterations == fits[norms.index(min(norms))].iterations
    assert (maps.log.converged, maps.log.restarts, maps.log.contrast) == (True, 3, "cube")


def test_a_converged_fit_goes_before_a_sparser_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _, y = mixed()
    sparse = symmetric_fastica(y, random_start(6, [0])).matrix
    answers = iter([ica.Rotation(sparse, False, True, 300), ica.Rotation(random_start(6, [9]), True, True, 7)])
    monkeypatch.setattr(ica, "symmetric_fastica", lambda *_, **__: next(answers))
    maps = rotated_maps(y, restarts=2, seed_parts=(0,))
    assert (maps.log.converged, maps.log.iterations) == (True, 7)


def test_overflow_of_the_cube_leads_to_tanh(monkeypatch: pytest.MonkeyPatch) -> None:
    _, y = mixed()
    expected = rotated_maps(y, restarts=2, seed_parts=(0,), contrast="tanh")
    assert (expected.log.restarts, expected.log.contrast) == (2, "tanh")
    monkeypatch.setattr(ica, "_CONTRASTS", {**ica._CONTRASTS, **OVERFLOWING})
    maps = rotated_maps(y, restarts=2, seed_parts=(0,))
    assert torch.equal(maps.z, expected.z)
    assert (maps.log.converged, maps.log.restarts, maps.log.contrast) == (True, 4, "tanh")


def test_no_finite_fit_means_no_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ica, "_CONTRASTS", {**OVERFLOWING, "tanh": OVERFLOWING["cube"]})
    _, y = mixed()
    assert rotated_maps(y, restarts=2, seed_parts=(0,)) is None
    assert rotated_maps(y, restarts=2, seed_parts=(0,), contrast="tanh") is None


def test_the_last_resort_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    _, y = mixed()
    fastica = symmetric_fastica
    monkeypatch.setattr(
        ica, "symmetric_fastica", lambda y, start, *, contrast: fastica(y, start, contrast=contrast, max_iter=1)
    )
    maps = rotated_maps(y, restarts=2, seed_parts=(0,))
    assert (maps.log.converged, maps.log.restarts, maps.log.iterations) == (False, 4, 1)
    assert bool(maps.z.isfinite().all())


def test_maps_of_half_precision_signals() -> None:
    signals = laplace(80, 60)
    maps = fitted(signals.bfloat16(), control="leverage_only")
    assert maps.z.dtype == torch.float64
    close(maps.peak, fitted(signals.bfloat16().double(), control="leverage_only").peak)


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_joint_subspace_is_that_of_all_blocks_side_by_side() -> None:
    blocks = [normal(30, width, seed=width) for width in (20, 50, 10)]
    vectors, weights = joint_subspace(sum(block @ block.T for block in blocks), 4)
    left, values, right = torch.linalg.svd(torch.cat(blocks, dim=1), full_matrices=False)
    close(vectors @ vectors.T, left[:, :4] @ left[:, :4].T, 1e-10)
    torch.testing.assert_close(weights, values[:4].square(), rtol=1e-10, atol=0)
    u = torch.cat([block.T @ (vectors / weights.sqrt()) for block in blocks])
    close(u @ u.T, right[:4].T @ right[:4], 1e-10)


def test_joint_subspace_drops_zero_directions() -> None:
    rows = normal(30, 3)
    vectors, weights = joint_subspace(rows @ rows.T, 10)
    assert vectors.shape == (30, 3) and weights.shape == (3,)
    assert joint_subspace(torch.zeros(5, 5), 2)[0].shape == (5, 0)


def test_shares_against_the_definition() -> None:
    maps, sizes = laplace(4, 60), (10, 30, 20)
    actual = shares(maps, sizes, quantile=0.8)
    tau = numpy.quantile(maps.abs().amax(0).numpy(), 0.8)
    ends = list(itertools.accumulate(sizes))
    for network, values in enumerate(maps.tolist()):
        energy = [value**2 if abs(value) >= tau else 0.0 for value in values]
        parts = [sum(energy[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
        assert actual[network].tolist() == pytest.approx([part / sum(energy) for part in parts])
    close(actual.sum(1), torch.ones(4, dtype=torch.float64))


def test_shares_of_an_empty_map_are_zero() -> None:
    maps = torch.stack([laplace(60), torch.full((60,), 1e-3, dtype=torch.float64)])
    assert shares(maps, (30, 30))[1].tolist() == [0.0, 0.0]
    assert shares(torch.zeros(2, 6), (3, 3)).tolist() == [[0.0, 0.0]] * 2


def test_set_loss_values() -> None:
    table = torch.tensor([[0.25, 0.25, 0.5], [1.0, 0.0, 0.0]], dtype=torch.float64)
    weights = torch.tensor([0.75, 0.25], dtype=torch.float64)
    expected = -0.75 * math.log(0.25 + 1e-6) - 0.25 * math.log(1e-6)
    assert set_loss(table, weights, [2, 0]) == pytest.approx(expected)
    assert set_loss(table, weights, [0, 2]) == set_loss(table, weights, [2, 0])
    assert set_loss(table, weights, []) == pytest.approx(0, abs=2e-6)
    # Rounding may carry a sum above 1, where the logarithm ends.
    assert set_loss(table * (1 + 1e-5), weights, [0, 1, 2]) == pytest.approx(-math.log(1e-6))


def test_emptying_one_network_costs_more_than_thinning_many() -> None:
    # Block 0 is all of network 0, block 1 a quarter of each network: the same participation.
    table = torch.tensor([[1.0, 0.25], [0, 0.25], [0, 0.25], [0, 0.25]], dtype=torch.float64)
    weights = torch.full((4,), 0.25, dtype=torch.float64)
    assert float(weights @ table[:, 0]) == float(weights @ table[:, 1])
    assert set_loss(table, weights, [0]) > 5 * set_loss(table, weights, [1])


def test_set_loss_grows_faster_the_more_is_gone() -> None:
    table = normal(5, 6).abs()
    table /= table.sum(1, keepdim=True)
    weights = torch.ones(5, dtype=torch.float64)
    for first, second, third in itertools.permutations(range(6), 3):
        alone = set_loss(table, weights, [first]) - set_loss(table, weights, [])
        late = set_loss(table, weights, [first, second, third]) - set_loss(table, weights, [second, third])
        assert late > alone > 0


def random_shares(seed: int, networks: int = 5, blocks: int = 7) -> tuple[Tensor, Tensor]:
    table = laplace(networks, blocks, seed=seed).square()
    return table / table.sum(1, keepdim=True), laplace(networks, seed=seed + 100).abs()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_chosen_blocks_cannot_be_bettered_by_one_exchange(seed: int, count: int) -> None:
    table, weights = random_shares(seed)
    removable = [1, 2, 3, 5, 6]
    chosen = choose_blocks(table, weights, removable, count)
    assert len(chosen) == count and set(chosen) <= set(removable) and list(chosen) == sorted(chosen)
    loss = set_loss(table, weights, chosen)
    for other in itertools.combinations(removable, count):
        if count == 1 or len(set(other) & set(chosen)) >= count - 1:
            assert loss <= set_loss(table, weights, other) + 1e-9


@pytest.mark.parametrize("count", range(6))
def test_chosen_blocks_are_the_best_where_networks_do_not_overlap(count: int) -> None:
    """Each block has its own network: the loss is a sum, and greedy is exact."""
    weights = torch.tensor([0.3, 0.1, 0.25, 0.15, 0.2], dtype=torch.float64)
    best = min(itertools.combinations(range(5), count), key=lambda blocks: float(weights[list(blocks)].sum()))
    assert choose_blocks(identity(5), weights, range(5), count) == best


def test_exchanges_mend_a_greedy_start() -> None:
    # Block 0 is the cheapest alone, yet the pair 1, 2 is the only one that empties nothing.
    table = torch.tensor([[0.4, 0.6, 0.0, 0.0], [0.4, 0.0, 0.6, 0.0], [0.0, 0.45, 0.45, 0.1]], dtype=torch.float64)
    weights = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    removable = [0, 1, 2]
    assert choose_blocks(table, weights, removable, 1) == (0,)
    assert choose_blocks(table, weights, removable, 2) == (1, 2)
    assert set_loss(table, weights, [1, 2]) < 0.5 * set_loss(table, weights, [0, 2])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e9])
def test_equal_losses_remove_the_larger_index(scale: float) -> None:
    table = torch.full((3, 6), 1 / 6, dtype=torch.float64)
    weights = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64) * scale
    assert choose_blocks(table, weights, [0, 2, 3, 5], 2) == (3, 5)
    assert choose_blocks(table, weights, range(1, 5), 2, contiguous=True) == (3, 4)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_the_scale_of_weights_does_not_matter(scale: float) -> None:
    table, weights = random_shares(0)
    assert choose_blocks(table, weights * scale, range(7), 3) == choose_blocks(table, weights, range(7), 3)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_window(seed: int, count: int) -> None:
    table, weights = random_shares(seed)
    removable = [0, 1, 2, 4, 5, 6]
    windows = [tuple(range(first, first + count)) for first in range(7 - count + 1)]
    windows = [window for window in windows if 3 not in window]
    best = min(windows, key=lambda window: set_loss(table, weights, window))
    assert choose_blocks(table, weights, removable, count, contiguous=True) == best


def test_no_blocks_at_all() -> None:
    table, weights = random_shares(0)
    assert choose_blocks(table, weights, [], 0) == choose_blocks(table, weights, [1], 0, contiguous=True) == ()
    assert choose_blocks(table, torch.zeros(5, dtype=torch.float64), [1, 2], 1) == (2,)


@pytest.mark.parametrize("count", [-1, 3])
def test_too_many_blocks_are_refused(count: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{count} blocks are to be removed, but 2 may be"):
        choose_blocks(*random_shares(0), [1, 2], count)


def test_a_window_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="No 2 consecutive blocks"):
        choose_blocks(*random_shares(0), [1, 3, 5], 2, contiguous=True)
