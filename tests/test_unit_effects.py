# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from families import block_list, random_ids, tiny_model

from optimum_blockprune.batches import Batch
from optimum_blockprune.blocks import find_blocks
from optimum_blockprune.runner import BlockRunner
from optimum_blockprune.trial import usable_units
from optimum_blockprune.unit_effects import UnitEffects


IDS = random_ids(4, 8)


def test_blocks_between_run_in_one_go() -> None:
    """Only blocks 1 and 3 are looked at: 0 and 2 run once, 4 never."""
    model = tiny_model("llama", 5)
    (group,), _ = usable_units(find_blocks(model), ("attention",))
    runner, done = BlockRunner(model), []
    effects = UnitEffects(runner, {1: [group], 3: [group]}, "l1")
    effects.add(Batch(IDS), torch.ones(4, 8, dtype=torch.bool), done.append)
    assert runner.counters.block_forwards == 4 * (2 + 2 * (1 + 2))
    assert done == [3, 3] and effects.runs == 6 and effects.tokens == 32


@pytest.mark.parametrize("reduction", ["l1", "l2"])
def test_against_weights_set_to_zero(reduction: str) -> None:
    model, mask = tiny_model("llama", 3), torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) > 0.3
    (group,), _ = usable_units(find_blocks(model), ("attention",))
    effects = UnitEffects(BlockRunner(model), {2: [group]}, reduction)
    for rows in (slice(0, 3), slice(3, 4)):
        effects.add(Batch(IDS[rows]), mask[rows], lambda _runs: None)

    def output() -> torch.Tensor:
        return BlockRunner(model).run_to(Batch(IDS), 2).value[mask].double()

    def size(values: torch.Tensor) -> float:
        return float(values.abs().sum() if reduction == "l1" else values.square().sum().sqrt())

    dense, weight, expected = output(), block_list(model)[2].self_attn.o_proj.weight, []
    for unit in range(2):
        original = weight.detach().clone()
        with torch.no_grad():
            weight[:, unit * 16 : (unit + 1) * 16] = 0
            expected.append(size(output() - dense))
            weight.copy_(original)
    assert effects.effects(2, group) == pytest.approx(expected, rel=1e-5)
    assert effects.output_size(2) == pytest.approx(size(dense), rel=1e-6)


def test_infinity_is_seen() -> None:
    model = tiny_model("llama", 1)
    (group,), _ = usable_units(find_blocks(model), ("attention",))
    with torch.no_grad():
        model.get_input_embeddings().weight[int(IDS[0, 0])] = math.inf
    effects = UnitEffects(BlockRunner(model), {0: [group]}, "l1")
    effects.add(Batch(IDS), torch.ones(4, 8, dtype=torch.bool), lambda _runs: None)
    assert not effects.finite
