# SPDX-License-Identifier: Apache-2.0
"""What every measurement of a strategy goes through: shares, smaller batches, and what was measured before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contexts import context_of
from families import random_ids, tiny_model
from torch import Tensor
from toys import toy_pruner
from transformers import PreTrainedModel

from optimum_blockprune import PruningPlan
from optimum_blockprune.batches import CalibrationWindows
from optimum_blockprune.errors import BlockPruningError
from optimum_blockprune.ledger import Ledger
from optimum_blockprune.strategies.base import SearchContext
from optimum_blockprune.team import Team


# The options make each of them measure all that it can measure.
MEASURING = {
    "sleb": {},
    "sleb-race": {"search": "race"},
    "sleb-naive": {"search": "naive"},
    "mi_prun": {},
    "shortgpt": {},
    "angular": {},
    "bip": {"propagate": "exact"},
    "functional_network": {"groups": 2, "components": 2},
    "functional_network-block": {"unit": "block", "components": 2},
}


@pytest.fixture(scope="module")
def context() -> SearchContext:
    windows = CalibrationWindows.from_tokens(random_ids(7, 8), source="random")
    return context_of(tiny_model("llama", 3), windows, batch_size=3)


def plan_of(name: str, model: PreTrainedModel | None = None, **fields: Any) -> PruningPlan:
    strategy = name.split("-")[0]
    fields |= {"protect_first": 1, "protect_last": 1} if name.endswith("block") else {}
    wide = {"num_samples": 8, "seqlen": 24, "dataset": ["w5 w17 w9 w40 " * 12 + f"w{20 + n} " * 30 for n in range(8)]}
    pruner = toy_pruner("llama", strategy=strategy, strategy_options=MEASURING[name], **{**wide, **fields})
    if model is not None:
        pruner.model = model
    return pruner.make_plan()


def same(plan: PruningPlan, other: PruningPlan) -> None:
    assert plan.removed_blocks == other.removed_blocks
    assert plan.width == other.width
    assert plan.scores == pytest.approx(other.scores, rel=1e-5, abs=1e-7)


# Shares


def test_every_window_is_in_the_share_of_one_process(context: SearchContext) -> None:
    ids = context.windows.input_ids
    for size in (1, 2, 3):
        seen: dict[int, Tensor] = {}
        for rank in range(2):
            mine = context_of(context.runner.model, context.windows, batch_size=3, team=Team(rank, 2))
            for start, batch in mine.batches(size):
                assert len(batch.input_ids) <= size
                assert (start // 3) % 2 == rank
                seen[start] = batch.input_ids
        assert torch.equal(torch.cat([seen[start] for start in sorted(seen)]), ids)


def test_one_process_takes_all(context: SearchContext) -> None:
    assert [(start, len(batch.input_ids)) for start, batch in context.batches(3)] == [(0, 3), (3, 3), (6, 1)]
    part = context.windows.part([6, 2])
    (found,) = context.batches(8, part)
    assert torch.equal(found[1].input_ids, context.windows.input_ids[[6, 2]])
    assert part.fingerprint == context.windows.fingerprint


# What was measured before


def test_a_measurement_in_the_ledger_is_not_made_again(context: SearchContext, tmp_path: Path) -> None:
    calls: list[int] = []

    def measure(size: int) -> dict[str, Tensor]:
        calls.append(size)
        return {"sum": torch.arange(3).double() / 7, "count": torch.tensor(size)}

    ledger = Ledger.open(tmp_path / "ledger", {"run": 1})
    kept = context_of(context.runner.model, context.windows, ledger=ledger)
    first, second = kept.measured("one", measure), kept.measured("one", measure)
    assert calls == [2]
    assert torch.equal(first["sum"], second["sum"]) and torch.equal(first["count"], second["count"])
    assert first["sum"].dtype == second["sum"].dtype == torch.float64
    kept.measured("another", measure)
    assert calls == [2, 2]
    ledger.close()


# Memory


class Small:
    """A device with room for few windows: a forward of more runs out of memory, with half of the blocks done."""

    def __init__(self, model: PreTrainedModel, most: int) -> None:
        self.refused = 0
        self._most = most
        layers = model.model.layers
        self._handle = layers[len(layers) // 2].register_forward_pre_hook(self._enter)

    def _enter(self, _module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if len(args[0]) > self._most:
            self.refused += 1
            raise torch.OutOfMemoryError("no room")


@pytest.fixture
def small() -> Iterator[Callable[[PreTrainedModel, int], Small]]:
    handles: list[Small] = []

    def make(model: PreTrainedModel, most: int) -> Small:
        handles.append(Small(model, most))
        return handles[-1]

    yield make
    for each in handles:
        each._handle.remove()


@pytest.mark.parametrize("name", MEASURING)
def test_too_large_a_batch_is_halved_and_the_plan_stays(name: str, small: Callable[..., Small]) -> None:
    roomy = plan_of(name, batch_size=2)
    model = tiny_model("llama", 6)
    device = small(model, 2)  # what is tried on made-up tokens are two windows
    plan = plan_of(name, model, batch_size=8)
    same(plan, roomy)
    # Twice in all: whatever is measured next begins with the size that found room. A race of eight windows looks at
    # one or two at a time.
    assert device.refused == (0 if name == "sleb-race" else 2)


def test_no_room_for_a_single_window_is_said(small: Callable[..., Small]) -> None:
    model = tiny_model("llama", 6)
    small(model, 0)
    with pytest.raises(BlockPruningError, match="no memory for a single window"):
        plan_of("shortgpt", model, batch_size=2)
