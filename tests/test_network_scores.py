# SPDX-License-Identifier: Apache-2.0
"""Scores are recomputed from plain hooks; what is held is counted among the objects that are alive."""

from __future__ import annotations

import copy
import gc
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from contexts import context_of
from families import block_list, random_ids, tiny_model
from tiers import often
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_blockprune import network_scores
from optimum_blockprune.batches import CalibrationWindows
from optimum_blockprune.errors import NonFiniteError
from optimum_blockprune.ica import FitLog, spatial_maps
from optimum_blockprune.layer_stream import LayerStream
from optimum_blockprune.network_scores import MapSettings, NetworkScores
from optimum_blockprune.runner import BlockRunner
from optimum_blockprune.trial import usable_units


BLOCKS = (0, 1, 3)
WINDOWS, LENGTH, UNITS = 6, 20, 48
DOWN = "mlp.down_proj"


def search_of(model: PreTrainedModel, batch_size: int = 2, groups: int = 2, **settings: Any) -> NetworkScores:
    """Blocks 0, 1 and 3, two groups of 57 tokens."""
    runner = BlockRunner(model)
    (group,), _ = usable_units(runner.stack, ("mlp",))
    windows = CalibrationWindows.from_tokens(random_ids(WINDOWS, LENGTH), source="test")
    most = settings.pop("most", 4096)

    def stream_for(size: int) -> LayerStream:
        return LayerStream(runner, windows, groups=groups, batch_size=size, keep_first=False, max_tokens=most)

    values = {"components": 2, "restarts": 2, "seed": 5, **settings}
    context = replace(context_of(model, windows, batch_size=batch_size), runner=runner)
    return NetworkScores(context, stream_for, {block: (group,) for block in BLOCKS}, MapSettings(**values))


def scores_of(model: PreTrainedModel, **settings: Any) -> dict[int, Tensor]:
    found = search_of(model, **settings).run(lambda: None)
    return {block: torch.tensor(scores, dtype=torch.float64) for (block, _), scores in found.items()}


def hooked(model: PreTrainedModel, block: int, rows: slice) -> Tensor:
    """[a | u] of one block and some windows, by plain hooks, without the first token of each window."""
    mlp = block_list(model)[block].mlp
    seen: dict[nn.Module, Tensor] = {}
    with torch.no_grad():
        handles = [
            module.register_forward_hook(lambda module, _, output: seen.update({module: output.clone()}))
            for module in (mlp.act_fn, mlp.up_proj)
        ]
        model(input_ids=random_ids(WINDOWS, LENGTH)[rows], use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.cat([seen[mlp.act_fn], seen[mlp.up_proj]], dim=-1)[:, 1:].flatten(0, 1)


GROUPS = (slice(0, 3), slice(3, 6))


def test_scores_are_those_of_plain_hooks() -> None:
    model = tiny_model("llama")
    scores = scores_of(model)
    assert set(scores) == set(BLOCKS)
    for block in BLOCKS:
        peaks = []
        for number, rows in enumerate(GROUPS):
            maps = spatial_maps(hooked(model, block, rows), components=2, restarts=2, seed_parts=(5, block, number))
            peaks += [maps.z.abs().amax(0)[:UNITS], maps.z.abs().amax(0)[UNITS:]]
        torch.testing.assert_close(scores[block], torch.stack(peaks).amax(0), rtol=1e-4, atol=1e-5)


def test_leverage_by_numpy_alone() -> None:
    model = tiny_model("llama")
    scores = scores_of(model, control="leverage_only")
    for block in BLOCKS:
        peaks = []
        for rows in GROUPS:
            x = hooked(model, block, rows).double().numpy()
            z = (x - x.mean(0)) / x.std(0)
            u = numpy.linalg.svd(z, full_matrices=False)[2][:2].T
            basis = numpy.linalg.qr(u - u.mean(0))[0]
            peaks.append(numpy.sqrt((2 * UNITS - 1) * (basis**2).sum(1)).reshape(2, UNITS).max(0))
        expected = torch.from_numpy(numpy.max(peaks, axis=0))
        torch.testing.assert_close(scores[block], expected, rtol=1e-5, atol=1e-6)


def test_runs_are_repeatable_and_batches_do_not_matter() -> None:
    model = tiny_model("llama")
    state = torch.get_rng_state()
    scores = scores_of(model)
    for block, again in scores_of(model).items():
        assert torch.equal(scores[block], again)
    for batch_size in (1, 6):
        for block, other in scores_of(model, batch_size=batch_size).items():
            torch.testing.assert_close(other, scores[block], rtol=1e-3, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), state)
    assert any(not torch.equal(scores[block], other) for block, other in scores_of(model, seed=6).items())


def test_each_block_runs_once_and_no_further_than_needed() -> None:
    search = search_of(tiny_model("llama"))
    steps: list[None] = []
    search.run(lambda: steps.append(None))
    assert len(steps) == search.steps == 6
    assert search._runner.counters.block_forwards == 4 * WINDOWS
    assert search._runner.counters.head_forwards == 0


def test_details() -> None:
    search = search_of(tiny_model("llama"), groups=3, components=128)
    search.run(lambda: None)
    details = search.details()
    assert details["tokens"] == [38, 38, 38]
    assert details["components"] == [1, 1, 1]
    assert details["fits"] == 9 == sum(details["contrasts"].values())
    assert details["converged"] <= 9
    assert details["skipped"] == details["constant"] == details["writer_input_blocks"] == []


# --- memory ----------------------------------------------------------------------------------------------------------


def live_values(others: set[int]) -> int:
    """Floating-point numbers in tensors that are alive, each storage once."""
    gc.collect()
    storages: dict[int, int] = {}
    for each in gc.get_objects():
        if issubclass(type(each), Tensor) and each.is_floating_point() and id(each) not in others:
            storage = each.untyped_storage()
            if storage.data_ptr() not in others:
                storages[storage.data_ptr()] = storage.nbytes() // each.element_size()
    return sum(storages.values())


@pytest.mark.parametrize("most", often([4096, 40], kept=lambda most: most == 40))
def test_memory_is_bounded_by_one_layers_signals(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Residual streams of all windows, the signals of one block and one group, and a score per unit: no more."""
    model = tiny_model("llama")
    search = search_of(model, most=most)
    tokens = min(most, 57)
    streams, signals, scores = WINDOWS * LENGTH * 32, tokens * 2 * UNITS, len(BLOCKS) * UNITS
    gc.collect()
    before = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    others = {id(each) for each in before} | {each.untyped_storage().data_ptr() for each in before}
    seen: list[int] = []
    original = network_scores.standardised

    def counted(values: Tensor) -> Tensor:
        assert values.shape == (tokens, 2 * UNITS)
        seen.append(live_values(others))
        return original(values)

    monkeypatch.setattr(network_scores, "standardised", counted)
    search.run(lambda: None)
    assert len(seen) == 6
    assert max(seen) <= streams + signals + scores
    assert max(seen) >= streams + signals
    assert search.details()["stored_values"] <= streams + signals + scores
    assert search.details()["stored_values"] >= max(seen)


# --- what can go wrong -----------------------------------------------------------------------------------------------


def spoiled(monkeypatch: pytest.MonkeyPatch, fails: set[tuple[int, int]]) -> None:
    """ICA comes out as not finite in some blocks and groups."""
    original = network_scores.rotated_maps

    def rotated(y: Tensor, *, seed_parts: tuple[int, ...], **settings: Any) -> Any:
        return None if seed_parts[1:] in fails else original(y, seed_parts=seed_parts, **settings)

    monkeypatch.setattr(network_scores, "rotated_maps", rotated)


@contextmanager
def propagating() -> Iterator[None]:
    """Optimum's loggers keep their records from the root logger, where pytest listens."""
    logger = logging.getLogger("optimum.blockprune.functional_network")
    before, logger.propagate = logger.propagate, True
    try:
        yield
    finally:
        logger.propagate = before


def test_a_group_without_a_fit_is_skipped(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    plain = scores_of(model)
    spoiled(monkeypatch, {(1, 0)})
    search = search_of(model)
    with propagating():
        found = search.run(lambda: None)
    assert "block 1 and group 0" in caplog.text
    assert search.details()["skipped"] == [[1, 0]]
    assert search.details()["fits"] == 5
    other = spatial_maps(hooked(model, 1, GROUPS[1]), components=2, restarts=2, seed_parts=(5, 1, 1)).peak
    expected = other.view(2, UNITS).amax(0)
    torch.testing.assert_close(torch.tensor(found[1, DOWN]).double(), expected, rtol=1e-4, atol=1e-5)
    assert found[0, DOWN] == plain[0].tolist()


def test_a_block_without_any_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled(monkeypatch, {(1, 0), (1, 1)})
    with pytest.raises(NonFiniteError, match=r"before mlp\.down_proj of block 1.*leverage_only"):
        scores_of(tiny_model("llama"))


def test_infinite_weights_are_named() -> None:
    model = tiny_model("llama")
    search = search_of(model)
    with torch.no_grad():
        block_list(model)[0].mlp.up_proj.weight[3] = math.nan
    with pytest.raises(NonFiniteError, match="first appears in the output of block 0"):
        search.run(lambda: None)


def test_nan_inside_an_mlp_alone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing shows at the outputs of the blocks: the message still says where."""
    original = network_scores.Capture.take

    def take(self: Any) -> Tensor:
        values = original(self)
        values[0, 0] = math.nan
        return values

    monkeypatch.setattr(network_scores.Capture, "take", take)
    with pytest.raises(NonFiniteError, match="In the MLP of block 0: NaN or infinity"):
        scores_of(tiny_model("llama"))


def test_a_block_whose_channels_do_not_vary() -> None:
    """None of its channels belongs to a network: they all score 0, which is no failure."""
    model = tiny_model("llama")
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            block_list(model)[1].mlp.get_submodule(name).weight.zero_()
    search = search_of(model)
    found = search.run(lambda: None)
    assert found[1, DOWN] == [0.0] * UNITS
    assert min(found[0, DOWN]) > 0
    assert search.details()["constant"] == [[1, 0], [1, 1]]
    assert search.details()["skipped"] == []


def test_an_activation_that_is_not_seen_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    for block in block_list(model):
        del block.mlp.act_fn
        block.mlp.act_fn = _odd
    search = search_of(model)
    with propagating():
        search.run(lambda: None)
    assert search.details()["writer_input_blocks"] == list(BLOCKS)
    assert "blocks 0-1,3 was not seen" in caplog.text


def _odd(gate: Tensor) -> Tensor:
    return torch.sin(3 * gate) + 0.3 * gate


def test_planted_dead_channels_score_least() -> None:
    model, dead = tiny_model("llama"), [3, 17, 40]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for block in block_list(twin):
            block.mlp.gate_proj.weight[dead] = 0.0
            block.mlp.up_proj.weight[dead] = 0.0
    for control in ("none", "leverage_only", "random_rotation"):
        for scores in scores_of(twin, control=control).values():
            assert sorted(scores.argsort()[:3].tolist()) == dead


def test_controls_are_named_in_the_figures() -> None:
    model = tiny_model("llama")
    for control in ("leverage_only", "random_rotation"):
        search = search_of(model, control=control)
        search.run(lambda: None)
        assert search.details()["control"] == control
        assert search.details()["contrasts"] == {"none": 6}
    assert FitLog(True, 0, "none", 0).converged
