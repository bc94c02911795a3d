# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import TextPositions
from tqdm.auto import tqdm

from optimum_blockprune.batches import Batch, CalibrationWindows
from optimum_blockprune.errors import CalibrationError, ConfigurationError, NonFiniteError
from optimum_blockprune.strategies.base import NoOptions, SearchContext
from optimum_blockprune.strategies.similarity import Angular, AngularOptions, ShortGPT


class FakeRunner(TextPositions):
    """Two-dimensional states; block i turns them by a fixed angle, and the last token of a window by another."""

    def __init__(self, turns: list[float], last_turns: list[float] | None = None) -> None:
        self.num_blocks = len(turns)
        self.turns = list(zip(turns, last_turns or turns, strict=True))
        self.scale = [1.0] * len(turns)

    def stream(self, batch: Batch, visit: Callable[[int, Tensor], None], *, per_block: int = 1) -> None:
        mask = self.positions(batch)
        last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
        angle, length = batch.input_ids.float(), 1.0
        for position, (turn, last_turn) in enumerate([(0.0, 0.0), *self.turns]):
            angle = angle + torch.where(last, last_turn, turn)
            length *= self.scale[position - 1] if position else 1.0
            hidden = length * torch.stack([angle.cos(), angle.sin()], dim=-1)
            visit(position, torch.where(mask.unsqueeze(-1), hidden, math.nan))

    def diagnose(self, batch: Batch) -> None:
        raise NonFiniteError("first in the output of block 1")


def context_for(
    runner: FakeRunner, num_remove: int, options: Any = None, *, mask: Tensor | None = None, **fields: Any
) -> SearchContext:
    tokens = torch.arange(24).view(4, 6)
    values: dict[str, Any] = {
        "windows": CalibrationWindows.from_tokens(tokens, mask, source="test"),
        "removable": tuple(range(runner.num_blocks)),
        "batch_size": 3,
        **fields,
    }
    return SearchContext(
        runner=runner,
        options=options or NoOptions(),
        num_remove=num_remove,
        seed=0,
        progress=lambda total, description: tqdm(total=total, desc=description, disable=True),
        provenance={"model_type": "fake"},
        **values,
    )


def padded() -> Tensor:
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[0, :3] = mask[1, 2:] = False
    return mask


# --- ShortGPT --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, padded()], ids=["full", "padded"])
def test_shortgpt_removes_the_lowest_block_influence_first(mask: Tensor | None) -> None:
    turns = [0.5, 0.1, 0.9, 0.02, 0.3]
    plan = ShortGPT().select(context_for(FakeRunner(turns), 3, mask=mask))
    expected = [1 - math.cos(turn) for turn in turns]
    assert plan.removed_blocks == (3, 1, 4)
    assert list(plan.scores.values()) == pytest.approx(expected, rel=1e-3)
    assert [step["block"] for step in plan.steps] == [3, 1, 4]
    assert plan.steps[0]["block_influence"] == plan.scores["3"]


def test_shortgpt_averages_over_all_real_tokens() -> None:
    runner = FakeRunner([0.2, 0.2], last_turns=[0.8, 0.2])
    influence = list(ShortGPT().select(context_for(runner, 1, mask=padded())).scores.values())
    tokens = int(padded().sum())
    expected = ((tokens - 4) * (1 - math.cos(0.2)) + 4 * (1 - math.cos(0.8))) / tokens
    assert influence == pytest.approx([expected, 1 - math.cos(0.2)], rel=1e-4)


def test_shortgpt_breaks_ties_by_index() -> None:
    assert ShortGPT().select(context_for(FakeRunner([0.0] * 4), 2)).removed_blocks == (0, 1)


def test_shortgpt_leaves_protected_blocks() -> None:
    context = context_for(FakeRunner([0.1, 0.2, 0.3, 0.4]), 2, removable=(1, 3))
    assert ShortGPT().select(context).removed_blocks == (1, 3)


def test_shortgpt_looks_at_directions_only() -> None:
    runner = FakeRunner([0.1, 0.0, 0.2])
    runner.scale = [1.0, 3.0, 1.0]
    assert ShortGPT().select(context_for(runner, 1)).removed_blocks == (1,)


def test_the_states_may_be_about_other_positions_than_the_tokens() -> None:
    """An encoder of sound has frames."""

    class Frames(FakeRunner):
        def positions(self, batch: Batch) -> Tensor:
            return torch.ones(len(batch.input_ids), 9, dtype=torch.bool)

        def stream(self, batch: Batch, visit: Callable[[int, Tensor], None], *, per_block: int = 1) -> None:
            super().stream(Batch(torch.arange(9).expand(len(batch.input_ids), -1)), visit)

    turns = [0.5, 0.1, 0.9]
    for strategy, options in ((ShortGPT, NoOptions()), (Angular, AngularOptions()), (Angular, AngularOptions("all"))):
        plan = strategy().select(context_for(Frames(turns), 1, options, mask=padded()))
        assert plan.removed_blocks == (1,)


# --- angular ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, padded()], ids=["full", "padded"])
def test_angular_removes_the_run_with_the_closest_ends(mask: Tensor | None) -> None:
    runner = FakeRunner([0.1] * 5, last_turns=[0.5, 0.4, 0.3, -0.2, 0.6])
    plan = Angular().select(context_for(runner, 2, AngularOptions(), mask=mask))
    assert plan.removed_blocks == (2, 3)
    assert plan.details["distances"] == pytest.approx([angle / math.pi for angle in (0.9, 0.7, 0.1, 0.4)], rel=1e-4)
    assert plan.steps[0]["start"] == 2 and plan.steps[0]["length"] == 2
    assert plan.options == {"tokens": "last"}


def test_angular_over_all_tokens() -> None:
    runner = FakeRunner([0.3, 0.2, 0.05, 0.4], last_turns=[0.01, 0.01, 0.7, 0.7])
    assert Angular().select(context_for(runner, 2, AngularOptions())).removed_blocks == (0, 1)
    plan = Angular().select(context_for(runner, 2, AngularOptions("all")))
    expected = [(5 * every + last) / 6 / math.pi for every, last in ((0.5, 0.02), (0.25, 0.71), (0.45, 1.4))]
    assert plan.details["distances"] == pytest.approx(expected, rel=1e-4)
    assert plan.removed_blocks == (1, 2)


def test_angular_tries_only_runs_without_protected_blocks() -> None:
    runner = FakeRunner([0.1, 0.1, 0.1, 0.5, 0.5])
    context = context_for(runner, 2, AngularOptions(), removable=(0, 2, 3, 4))
    assert Angular().select(context).removed_blocks == (2, 3)


def test_angular_without_a_removable_run() -> None:
    context = context_for(FakeRunner([0.1] * 5), 3, AngularOptions(), removable=(0, 1, 3, 4))
    with pytest.raises(ConfigurationError, match="no 3 consecutive blocks are removable among"):
        Angular().select(context)


def test_angular_may_take_every_block_but_one_end() -> None:
    plan = Angular().select(context_for(FakeRunner([0.3, 0.1, 0.2]), 2, AngularOptions()))
    assert plan.removed_blocks == (1, 2)


def test_angular_options_are_checked() -> None:
    with pytest.raises(ConfigurationError, match=r"Unknown tokens 'lats' for angular. Did you mean 'last'\?"):
        AngularOptions("lats")


# --- both ------------------------------------------------------------------------------------------------------------


BOTH = [(ShortGPT, NoOptions()), (Angular, AngularOptions()), (Angular, AngularOptions("all"))]


@pytest.mark.parametrize("strategy, options", BOTH)
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_batch_size_changes_nothing(strategy: type, options: Any, batch_size: int) -> None:
    def details(size: int) -> dict[str, Any]:
        runner = FakeRunner([0.3, 0.2, 0.05, 0.4])
        return dict(strategy().select(context_for(runner, 2, options, mask=padded(), batch_size=size)).details)

    for one, other in zip(details(3).values(), details(batch_size).values(), strict=True):
        assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("strategy, options", BOTH)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_states_are_diagnosed(strategy: type, options: Any, bad: float) -> None:
    runner = FakeRunner([0.1, 0.2, 0.3])
    runner.scale[1] = bad
    with pytest.raises(NonFiniteError, match="block 1"):
        strategy().select(context_for(runner, 1, options))


@pytest.mark.parametrize("strategy, options", BOTH)
def test_data_is_required_and_nothing_protected(strategy: type, options: Any) -> None:
    assert (strategy.protect_first, strategy.protect_last, strategy.needs_data) == (0, 0, True)
    assert not strategy.needs_loss
    with pytest.raises(CalibrationError, match="dataset"):
        strategy().select(context_for(FakeRunner([0.1, 0.2]), 1, options, windows=None))
