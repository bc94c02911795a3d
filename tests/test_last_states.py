# SPDX-License-Identifier: Apache-2.0
"""Walks that go on from their last state see what runs from the tokens see, and spend less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import random_ids, tiny_model

from optimum_blockprune import UnsupportedModelError, last_states
from optimum_blockprune.batches import Batch
from optimum_blockprune.half import Half
from optimum_blockprune.last_states import LastStates, can_go_on
from optimum_blockprune.runner import BlockRunner
from optimum_blockprune.stand_ins import bytes_of, hidden_of


OFF = [1, Half(2, "mlp")]
BATCHES = {number: Batch(random_ids(seed=number)) for number in range(3)}


def walked(runner: BlockRunner, states: LastStates) -> list[torch.Tensor]:
    """The states of every batch behind blocks 0, 2, 2 and 4."""
    found = []
    for stop in (0, 2, 2, 4):
        for key, batch in BATCHES.items():
            found.append(hidden_of(states.at(key, batch, stop, OFF).value))
    return found


@pytest.mark.parametrize("room", [None, 1], ids=["all are held", "one is held"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_states_are_those_of_whole_runs(family: str, room: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = BlockRunner(tiny_model(family))
    one = bytes_of(runner.run_to(BATCHES[0], 0).value)
    if room is not None:
        monkeypatch.setattr(last_states, "STATE_BYTES", room * one)
    wanted = [hidden_of(runner.run_to(batch, stop, OFF).value) for stop in (0, 2, 2, 4) for batch in BATCHES.values()]
    before = runner.counters.block_forwards
    found = walked(runner, LastStates(runner))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    # Blocks 0, 2, 3 and 4 once for each of two windows; from the tokens: 1, 2, 2 and 4 blocks.
    held, others = (3, 0) if room is None else (1, 2)
    assert runner.counters.block_forwards - before == 2 * (4 * held + 9 * others)


def test_a_state_is_held_once() -> None:
    runner = BlockRunner(tiny_model("llama"))
    states = LastStates(runner)
    for stop in range(5):
        states.at("batch", BATCHES[0], stop)
    assert states._bytes == bytes_of(states.at("batch", BATCHES[0], 4).value)


def test_where_memory_ran_out_nothing_is_held() -> None:
    runner = BlockRunner(tiny_model("llama"))
    states = LastStates(runner)
    states.cut(4)
    states.at("batch", BATCHES[0], 2)
    states.cut(4)
    assert states._bytes
    states.cut(2)
    assert states.at("batch", BATCHES[0], 4) is None and not states._bytes and not states._states


def test_where_blocks_share_more_every_run_starts_from_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise UnsupportedModelError("they share")

    monkeypatch.setattr(last_states, "prove", refuse)
    runner = BlockRunner(tiny_model("llama"))
    assert not can_go_on(runner, BATCHES[0])
    states = LastStates(runner, held=can_go_on(runner, BATCHES[0]))
    assert states.at("batch", BATCHES[0], 2) is None


def test_what_nobody_asks_for_again_is_not_held() -> None:
    runner = BlockRunner(tiny_model("llama"))
    assert can_go_on(runner, BATCHES[0])
    states = LastStates(runner)
    states.at("batch", BATCHES[0], 1)
    wanted = hidden_of(runner.run_to(BATCHES[0], 3).value)
    assert torch.equal(hidden_of(states.at("batch", BATCHES[0], 3, keep=False).value), wanted)
    assert not states._states and not states._bytes


def test_in_front_of_the_first_block_there_is_no_state() -> None:
    assert LastStates(BlockRunner(tiny_model("llama"))).at("batch", BATCHES[0], None) is None
