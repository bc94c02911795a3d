# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import TextPositions
from tqdm.auto import tqdm

from optimum_blockprune.batches import Batch, CalibrationWindows
from optimum_blockprune.errors import CalibrationError, ConfigurationError, NonFiniteError
from optimum_blockprune.estimators import GaussianCopula, IdentityDecoder
from optimum_blockprune.strategies.base import SearchContext
from optimum_blockprune.strategies.mi_prun import ESTIMATORS, SEARCHES, MIPrun, MIPrunOptions
from optimum_blockprune.strategies.selection import maximal_runs


WIDTH = 16


class FakeRunner(TextPositions):
    """A residual stream without a model: every token id has a vector, every block adds noise of its own size to it."""

    def __init__(self, sizes: list[float], *, dtype: torch.dtype = torch.float32, vocabulary: int = 4096) -> None:
        generator = torch.Generator().manual_seed(7)
        self.num_blocks = len(sizes)
        self.states = [torch.randn(vocabulary, WIDTH, generator=generator)]
        for size in sizes:
            step = size * torch.randn(vocabulary, WIDTH, generator=generator)
            self.states.append(self.states[-1] + step)
        self.states = [states.to(dtype) for states in self.states]
        self.windows_seen = 0
        self.batch_sizes: list[int] = []

    def stream(self, batch: Batch, visit: Callable[[int, Tensor], None], *, per_block: int = 1) -> None:
        self.windows_seen += len(batch.input_ids)
        self.batch_sizes.append(len(batch.input_ids))
        for position, states in enumerate(self.states):
            hidden = states[batch.input_ids]
            if batch.attention_mask is not None:  # what attention leaves at padded positions may be anything
                hidden[~batch.attention_mask] = math.nan
            visit(position, hidden)

    def diagnose(self, batch: Batch) -> None:
        for block, states in enumerate(self.states[1:]):
            if not torch.isfinite(states[batch.input_ids]).all():
                raise NonFiniteError(f"first in the output of block {block}")


@contextmanager
def propagating(name: str) -> Iterator[None]:
    """Optimum's loggers keep their records from the root logger, where pytest listens."""
    logger = logging.getLogger(name)
    before, logger.propagate = logger.propagate, True
    try:
        yield
    finally:
        logger.propagate = before


def windows_of(count: int, length: int, mask: Tensor | None = None) -> CalibrationWindows:
    """Windows without a repeated token."""
    return CalibrationWindows.from_tokens(torch.arange(count * length).view(count, length), mask, source="test")


def context_for(
    runner: FakeRunner, windows: CalibrationWindows | None, num_remove: int, **options: Any
) -> SearchContext:
    batch_size, seed = options.pop("batch_size", 4), options.pop("seed", 0)
    return SearchContext(
        runner=runner,
        windows=windows,
        options=MIPrunOptions(**options),
        num_remove=num_remove,
        removable=tuple(range(runner.num_blocks)),
        batch_size=batch_size,
        seed=seed,
        progress=lambda total, description: tqdm(total=total, desc=description, disable=True),
        provenance={"model_type": "fake"},
    )


SIZES = [1.0, 0.9, 0.6, 0.05, 0.1, 0.7, 0.02, 0.03]


@pytest.mark.parametrize(
    "estimator, select", [*((estimator, "fast") for estimator in ESTIMATORS), ("identity_decoder", "dp")]
)
def test_removes_what_changes_the_stream_least(estimator: str, select: str) -> None:
    runner = FakeRunner(SIZES)
    plan = MIPrun().select(context_for(runner, windows_of(16, 64), 4, estimator=estimator, select=select))
    assert set(plan.removed_blocks) == {3, 4, 6, 7}
    assert plan.details["estimator"] == estimator and plan.details["select"] == select
    assert runner.windows_seen == 16  # one pass


def test_dp_breaks_up_a_sum_of_mutual_information_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Two single blocks are credited twice for what they keep, one run of two only once."""
    context = context_for(FakeRunner(SIZES), windows_of(16, 64), 4, select="dp")
    with propagating("optimum"), caplog.at_level("WARNING"):
        plan = MIPrun().select(context)
    assert [run["length"] for run in plan.details["runs"]] == [1, 1, 1, 1]
    assert "estimator='identity_decoder'" in caplog.text


def test_best_run_comes_first_and_ascends() -> None:
    plan = MIPrun().select(context_for(FakeRunner(SIZES), windows_of(16, 64), 4))
    assert plan.removed_blocks == (6, 7, 3, 4)
    assert [run["start"] for run in plan.details["runs"]] == [3, 6]


def test_plan_says_how_it_was_chosen() -> None:
    plan = MIPrun().select(context_for(FakeRunner(SIZES), windows_of(16, 64), 4, chunk_tokens=256))
    details = plan.details
    scores = list(plan.scores.values())
    assert len(scores) == 8
    assert sorted(range(8), key=scores.__getitem__, reverse=True)[:2] == [6, 7]
    assert details["tokens"] == 16 * 63
    assert 0.0 <= details["dpi_violation_rate"] <= 1.0
    assert details["evaluations"] == plan.steps[-1]["evaluations"]
    assert [run["length"] for run in details["runs"]] == [2, 2]
    assert sum(run["score"] for run in details["runs"]) == pytest.approx(plan.steps[-1]["score"])
    assert plan.steps[0]["iteration"] == 1
    assert plan.options["estimator"] == "gaussian_copula"
    json.dumps(plan.to_dict())


def test_scores_are_those_of_the_estimator_on_all_tokens() -> None:
    runner = FakeRunner(SIZES)
    windows = windows_of(16, 64)
    plan = MIPrun().select(context_for(runner, windows, 4, chunk_tokens=2048))
    direct = GaussianCopula()
    direct.add(torch.stack([states[windows.input_ids[:, 1:].flatten()] for states in runner.states]))
    assert list(plan.scores.values()) == pytest.approx(direct.all_runs().diagonal(1).tolist(), rel=1e-9)


def test_dp_with_the_identity_decoder_minimises_the_added_damage() -> None:
    runner = FakeRunner([0.3, 0.2, 0.4, 0.25, 0.1, 0.35])
    windows = windows_of(16, 64)
    plan = MIPrun().select(context_for(runner, windows, 3, estimator="identity_decoder", select="dp"))
    direct = IdentityDecoder()
    direct.add(torch.stack([states[windows.input_ids[:, 1:].flatten()] for states in runner.states]))
    damage = (-direct.additive_runs()).tolist()

    def cost(blocks: tuple[int, ...]) -> float:
        return sum(damage[start][start + length] for start, length in maximal_runs(blocks))

    best = min(itertools.combinations(range(6), 3), key=cost)
    assert sorted(plan.removed_blocks) == list(best)
    assert -sum(run["score"] for run in plan.details["runs"]) == pytest.approx(cost(best), rel=1e-9)


@pytest.mark.parametrize("select", SEARCHES)
def test_protected_blocks_stay(select: str) -> None:
    context = replace(context_for(FakeRunner(SIZES), windows_of(8, 64), 3, select=select), removable=(0, 1, 2, 4, 5))
    assert set(MIPrun().select(context).removed_blocks) <= {0, 1, 2, 4, 5}


def test_no_block_is_protected_by_default() -> None:
    assert (MIPrun.protect_first, MIPrun.protect_last, MIPrun.needs_data, MIPrun.unit) == (0, 0, True, "block")
    assert not MIPrun.needs_loss


# --- which tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_padding_and_first_tokens_are_not_looked_at(estimator: str) -> None:
    mask = torch.ones(8, 64, dtype=torch.bool)
    mask[0, :10] = mask[3, 40:] = mask[5, 1:] = False
    runner = FakeRunner(SIZES)
    padded = MIPrun().select(context_for(runner, windows_of(8, 64, mask), 4, estimator=estimator))
    assert padded.details["tokens"] == 8 * 64 - 10 - 24 - 63 - 8
    first = [0 if row else 10 for row in range(8)]
    for states in runner.states:  # massive first tokens
        for row, column in enumerate(first):
            states[row * 64 + column] = 1e4
    again = MIPrun().select(context_for(runner, windows_of(8, 64, mask), 4, estimator=estimator))
    assert again.details == padded.details


@pytest.mark.parametrize("max_tokens, tokens", [(100, 100), (8, 8), (3, 3), (10**6, 8 * 31)])
def test_tokens_are_an_even_share_of_the_windows(max_tokens: int, tokens: int) -> None:
    plan = MIPrun().select(context_for(FakeRunner(SIZES), windows_of(8, 32), 2, max_tokens=max_tokens))
    assert plan.details["tokens"] == tokens


def test_too_few_tokens() -> None:
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[:, 0] = mask[0, 1] = True
    with pytest.raises(CalibrationError, match="1 usable tokens in 3 windows"):
        MIPrun().select(context_for(FakeRunner(SIZES), windows_of(3, 8, mask), 2))


def test_data_is_required() -> None:
    with pytest.raises(CalibrationError, match="dataset"):
        MIPrun().select(context_for(FakeRunner(SIZES), None, 2))


# --- the same again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 64])
def test_batch_size_changes_nothing(estimator: str, batch_size: int) -> None:
    choices: dict[str, Any] = {"estimator": estimator, "max_tokens": 150, "chunk_tokens": 64}
    plans = []
    for size in (4, batch_size):
        context = context_for(FakeRunner(SIZES), windows_of(10, 32), 3, batch_size=size, **choices)
        plans.append(MIPrun().select(context))
    assert plans[0] == plans[1]


def test_seed_chooses_the_tokens_and_no_global_generator_is_used() -> None:
    def scores(seed: int) -> list[float]:
        context = context_for(FakeRunner(SIZES), windows_of(8, 64), 3, max_tokens=100, seed=seed)
        return list(MIPrun().select(context).scores.values())

    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = scores(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert scores(0) == one
    assert scores(1) != one


# --- memory ----------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.values = max([self.values, *sizes])
        return out


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_memory_stays_within_its_bound(estimator: str) -> None:
    runner = FakeRunner(SIZES[:3])
    runner.states = [states[:512] for states in runner.states]
    context = context_for(
        runner, windows_of(16, 32), 1, estimator=estimator, chunk_tokens=128, bins=4, coordinates=8, batch_size=1
    )
    with LargestTensor() as largest:
        plan = MIPrun().select(context)
    chunk, sums = 4 * 128 * WIDTH, {"histogram": 8 * 6 * 4**2}.get(estimator, WIDTH * (4**2 + 2 * 4))
    if estimator == "histogram":
        chunk = 4 * 128 * 8
    assert plan.details["tokens"] == 16 * 31
    assert plan.details["stored_values"] == chunk + sums
    assert largest.values <= 4 * 128 * WIDTH


def test_chunks_hold_no_more_windows_than_there_are() -> None:
    plan = MIPrun().select(context_for(FakeRunner(SIZES), windows_of(2, 32), 1))
    assert plan.details["stored_values"] == 9 * (2 * 32) * WIDTH + WIDTH * (9**2 + 2 * 9)


def test_windows_longer_than_a_chunk() -> None:
    runner = FakeRunner(SIZES)
    plan = MIPrun().select(context_for(runner, windows_of(4, 256), 2, chunk_tokens=50))
    assert plan.details["tokens"] == 4 * 50
    assert runner.batch_sizes == [1] * 4


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_non_finite_states_are_named(estimator: str, bad: float) -> None:
    runner = FakeRunner(SIZES)
    for states in runner.states[6:]:
        states[70, 3] = bad
    with pytest.raises(NonFiniteError, match="block 5"):
        MIPrun().select(context_for(runner, windows_of(4, 64), 2, estimator=estimator, coordinates=1))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"estimator": "gaussian"}, r"Unknown estimator 'gaussian' for mi_prun. Did you mean 'gaussian_copula'\?"),
        ({"select": "exact"}, "Unknown select 'exact' for mi_prun. Available: dp, fast"),
        ({"estimator": 3}, "Unknown estimator 3"),
        ({"k": 0}, "k=0 of mi_prun must be a whole number of at least 1"),
        ({"bins": 1}, "bins=1"),
        ({"max_tokens": 1.5}, "max_tokens=1.5"),
        ({"chunk_tokens": True}, "chunk_tokens=True"),
        ({"coordinates": "64"}, "coordinates='64'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MIPrunOptions(**options)
