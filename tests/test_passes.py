# SPDX-License-Identifier: Apache-2.0
"""Passes in the order of blocks: the numbers of the order of batches, each block fetched once, states bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from families import block_list, random_ids
from tiers import often
from torch import Tensor
from toys import toy_folder
from transformers import PreTrainedModel

from optimum_blockprune import UnsupportedModelError, passes
from optimum_blockprune.batches import Batch
from optimum_blockprune.branching import Branches, head_losses
from optimum_blockprune.channel_sums import INPUT, OUTPUT, TokenSums
from optimum_blockprune.loading import load_model
from optimum_blockprune.runner import BlockRunner


BLOCKS = 6
# Windows, tokens and width of the tiny models, in fp32.
STATE = 2 * 12 * 32 * 4

Load = Callable[[Path], PreTrainedModel]


def streamed(folder: Path) -> PreTrainedModel:
    return load_model(folder, stream=True)


def offloaded(folder: Path) -> PreTrainedModel:
    model = load_model(folder)
    cpu_offload(model, execution_device=torch.device("cpu"))
    return model


LOADS = pytest.mark.parametrize("load", [streamed, offloaded])


@pytest.fixture
def batches() -> list[tuple[int, Batch]]:
    """Three batches, the second one padded, the last one smaller."""
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 7:] = False
    return [(0, Batch(random_ids(2, 12, seed=1))), (2, Batch(random_ids(2, 12, seed=2), mask))] + [
        (4, Batch(random_ids(1, 12, seed=3)))
    ]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that are held, in order: filled by passes."""
    seen: list[int] = []
    held = passes.held
    numbers: dict[int, int] = {}

    def noted(block: Any) -> Any:
        seen.append(numbers.setdefault(id(block), len(numbers)))
        return held(block)

    monkeypatch.setattr(passes, "held", noted)
    return seen


def boundaries(runner: BlockRunner, batches: list[tuple[int, Batch]], **settings: Any) -> dict[int, list[Tensor]]:
    """All states of all batches; they come in order."""
    found: dict[int, list[Tensor]] = {}

    def watch(key: int, _batch: Batch) -> passes.Visit:
        states = found.setdefault(key, [])

        def visit(position: int, hidden: Tensor) -> None:
            assert position == len(states)
            states.append(hidden.clone())

        return visit

    passes.stream(runner, batches, watch, **settings)
    return found


def assert_equal_states(found: dict[int, list[Tensor]], other: dict[int, list[Tensor]]) -> None:
    assert list(found) == list(other)
    for key, states in found.items():
        assert len(states) == BLOCKS + 1
        assert all(torch.equal(*pair) for pair in zip(states, other[key], strict=True))


@LOADS
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_stream_shows_the_same_states(
    family: str, load: Load, tmp_path: Path, batches: list[tuple[int, Batch]], fetched: list[int]
) -> None:
    toy_folder(tmp_path, family)
    resident, runner = BlockRunner(load_model(tmp_path)), BlockRunner(load(tmp_path))
    done: list[int] = []
    truth = boundaries(resident, batches)
    assert fetched == [] and not passes.in_order_of_blocks(resident)
    assert_equal_states(boundaries(runner, batches, done=done.append), truth)
    assert fetched == list(range(BLOCKS)) and passes.in_order_of_blocks(runner)
    assert sum(done) == 5
    assert runner.counters == resident.counters
    assert all(parameter.device.type == "meta" for parameter in block_list(runner.model).parameters())


@pytest.mark.parametrize(("room", "groups"), [(3, 1), (2, 2), (1, 3), (0, 3)])
def test_batches_go_in_groups_where_states_are_many(
    room: int, groups: int, tmp_path: Path, batches: list[tuple[int, Batch]], monkeypatch: Any, fetched: list[int]
) -> None:
    monkeypatch.setattr(passes, "STATE_BYTES", room * STATE)
    runner = BlockRunner(streamed(toy_folder(tmp_path)))
    found = boundaries(runner, batches, copies=0)
    assert_equal_states(found, boundaries(BlockRunner(load_model(tmp_path)), batches))
    assert fetched == list(range(BLOCKS)) * groups


def test_what_the_watchers_hold_counts(
    tmp_path: Path, batches: list[tuple[int, Batch]], monkeypatch: Any, fetched: list[int], caplog: Any
) -> None:
    monkeypatch.setattr(passes, "STATE_BYTES", 3 * STATE)
    monkeypatch.setattr(passes.logger, "propagate", True)
    caplog.set_level("INFO", logger="optimum.blockprune.passes")
    boundaries(BlockRunner(streamed(toy_folder(tmp_path))), batches, copies=2)
    assert len(fetched) == 3 * BLOCKS
    assert "fetched for 2 windows at a time" in caplog.text


def watched(model: PreTrainedModel) -> TokenSums:
    """Sums in several blocks, one of them over two modules."""
    sums, blocks = TokenSums(), block_list(model)
    for number in (0, 3):
        mlp = blocks[number].mlp
        sums.watch(("in", number), [(mlp.down_proj, INPUT)], lambda rows: rows)
        sums.watch(("both", number), [(mlp.gate_proj, OUTPUT), (mlp.up_proj, OUTPUT)], torch.mul)
        sums.watch(("out", number), [(blocks[number], OUTPUT)], torch.abs)
    return sums


@LOADS
@pytest.mark.parametrize("room", [10, 1])
def test_sums_over_tokens_are_the_same(
    room: int, load: Load, tmp_path: Path, batches: list[tuple[int, Batch]], monkeypatch: Any, fetched: list[int]
) -> None:
    monkeypatch.setattr(passes, "STATE_BYTES", room * STATE)
    toy_folder(tmp_path)
    runners = [BlockRunner(load_model(tmp_path)), BlockRunner(load(tmp_path))]
    found, done = [], list[int]()
    for runner in runners:
        sums = watched(runner.model)
        passes.sum_tokens(runner, batches, sums, runner.positions, stop=4, done=done.append)
        found.append(sums.sums())
    assert fetched == list(range(5)) * (1 if room > 3 else 3)
    assert sum(done) == 10
    assert found[0].keys() == found[1].keys() and len(found[0]) == 7
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert runners[0].counters == runners[1].counters


def depth_first(
    model: PreTrainedModel, batches: list[tuple[int, Batch]], removed: list[int], wanted: list[int | None]
) -> dict[tuple[int, int | None], Tensor]:
    measured = Branches(BlockRunner(model))
    return {
        (key, candidate): losses
        for key, batch in batches
        for candidate, losses in measured.losses(batch, (0, key), removed, wanted)
    }


def breadth_first(
    runner: BlockRunner, batches: list[tuple[int, Batch]], removed: list[int], wanted: list[int | None]
) -> Iterator[tuple[tuple[int, int | None], Tensor]]:
    for key, batch, candidate, reached in passes.branches(runner, batches, removed, wanted):
        yield (key, candidate), head_losses(runner, batch, reached)


@pytest.mark.parametrize(
    ("load", "family"),
    often(
        product((streamed, offloaded), ("llama", "gpt2", "gemma2")),
        kept=lambda case: case[0] is streamed or case[1] == "llama",
    ),
)
@pytest.mark.parametrize(
    ("removed", "wanted"),
    [([], [1, 2, 3, 4, None]), ([2, 4], [0, 1, 3, 5]), ([5, 0], [1, 4, None]), ([], [None]), ([1, 2, 3, 5], [0, 4])],
)
def test_branches_give_the_losses_of_one_candidate_after_the_other(
    family: str,
    load: Load,
    removed: list[int],
    wanted: list[int | None],
    tmp_path: Path,
    batches: list[tuple[int, Batch]],
    fetched: list[int],
) -> None:
    toy_folder(tmp_path, family)
    runner = BlockRunner(load(tmp_path))
    found = dict(breadth_first(runner, batches, removed, wanted))
    truth = depth_first(load_model(tmp_path), batches, removed, wanted)
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[key], truth[key]) for key in truth)
    # One step of a greedy search reads the weights once.
    assert len(fetched) == BLOCKS - len(removed)


@pytest.mark.parametrize(("room", "reads"), [(100, 1), (6, 3), (3, 6), (0, 12)])
def test_candidates_go_in_parts_where_states_are_many(
    room: int, reads: int, tmp_path: Path, batches: list[tuple[int, Batch]], monkeypatch: Any, fetched: list[int]
) -> None:
    monkeypatch.setattr(passes, "STATE_BYTES", room * STATE)
    runner = BlockRunner(streamed(toy_folder(tmp_path)))
    wanted = [1, 2, 3, None]
    found = dict(breadth_first(runner, batches, [], wanted))
    truth = depth_first(load_model(tmp_path), batches, [], wanted)
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[key], truth[key]) for key in truth)
    assert len(fetched) <= reads * BLOCKS


def test_a_model_without_blocks_cannot_be_run(tmp_path: Path, batches: list[tuple[int, Batch]]) -> None:
    runner = BlockRunner(streamed(toy_folder(tmp_path)))
    with pytest.raises(UnsupportedModelError, match="at least one block"):
        list(passes.branches(runner, batches, [0, 1, 2, 3, 4], [5]))


def test_blocks_that_share_more_than_their_output_are_refused(
    tmp_path: Path, batches: list[tuple[int, Batch]]
) -> None:
    model = streamed(toy_folder(tmp_path))
    shared: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        shared[:] = [output]

    def add(_module: Any, _args: Any, output: Any) -> Any:
        return output + (shared.pop() if shared else 0)

    model.register_forward_pre_hook(lambda *_: shared.clear())
    block_list(model)[1].register_forward_hook(keep)
    block_list(model)[4].register_forward_hook(add)
    with pytest.raises(UnsupportedModelError, match="share more than their hidden states.* not offloaded"):
        boundaries(BlockRunner(model), batches)


def test_the_proof_is_given_once(tmp_path: Path, batches: list[tuple[int, Batch]], monkeypatch: Any) -> None:
    model = streamed(toy_folder(tmp_path))
    proofs: list[int] = []
    check = BlockRunner.check_replay

    def noted(self: BlockRunner, batch: Batch) -> None:
        proofs.append(1)
        check(self, batch)

    monkeypatch.setattr(BlockRunner, "check_replay", noted)
    for _ in range(2):
        boundaries(BlockRunner(model), batches)
    assert len(proofs) == 1
