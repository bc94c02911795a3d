# SPDX-License-Identifier: Apache-2.0
"""Putting modules into formulas; the formulas themselves are held to the truth in `test_bip`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import block_list, random_ids, tiny_model
from transformers import PreTrainedModel

from optimum_blockprune.batches import Batch
from optimum_blockprune.block_parts import find_parts
from optimum_blockprune.blocks import find_blocks
from optimum_blockprune.errors import UnsupportedModelError
from optimum_blockprune.output_bounds import LOCAL, PAPER, OutputBounds
from optimum_blockprune.runner import BlockRunner
from optimum_blockprune.trial import usable_units
from optimum_blockprune.widths import UnitGroup


def measured(model: PreTrainedModel, propagate: str, **changes: object) -> tuple[OutputBounds, tuple[UnitGroup, ...]]:
    """Bounds of block 0 after one batch; `changes` are those of its FFN."""
    stack = find_blocks(model)
    groups, _ = usable_units(stack)
    parts = find_parts(stack, {0: groups})
    parts[0] = replace(parts[0], ffns=tuple(replace(ffn, **changes) for ffn in parts[0].ffns))
    bounds = OutputBounds(stack.blocks, parts, reduction="l1", propagate=propagate)
    for group in groups:
        bounds.watch(0, group)
        bounds.watch(0, group)  # asked twice, summed once
    bounds.watch_output(0)
    runner, batch = BlockRunner(model), Batch(random_ids())
    bounds.sums.begin(runner.positions(batch))
    runner.observe(batch, bounds.sums.visits, stop=0)
    return bounds, groups


def test_gate_and_up_are_averaged_where_they_look_alike() -> None:
    model = tiny_model("llama", 1)
    bounds, (_, attention) = measured(model, PAPER, activation=None)
    bounds.scores(0, attention)
    mlp = block_list(model)[0].mlp
    gate, up, down = (getattr(mlp, name).weight.detach().abs().T for name in ("gate_proj", "up_proj", "down_proj"))
    v = 1 + (gate + up) / 2 @ down.sum(1)
    assert bounds.vector_means[0] == pytest.approx(float(v.mean()))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"activation": None}, "its activation function cannot be seen"),
        ({"product": False}, "the writer's input as activation times up cannot"),
        ({"norm": None}, "the norm before it cannot"),
        ({"activation": None, "norm": None}, "its activation function and the norm before it cannot"),
    ],
)
def test_local_needs_to_see(changes: dict[str, object], message: str) -> None:
    model = tiny_model("llama", 1)
    with pytest.raises(UnsupportedModelError, match=f"block 0, but {message}.*propagate='paper' or 'exact'"):
        measured(model, LOCAL, **changes)
    measured(model, PAPER, **changes)


def test_an_ffn_without_a_norm_before_it_has_gain_one() -> None:
    model = tiny_model("exaone4", 1)
    bounds, (_, attention) = measured(model, LOCAL)
    records = {}
    block = block_list(model)[0]
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(block.mlp, name).register_forward_hook(lambda _m, _a, out, name=name: records.update({name: out}))
    model(random_ids())
    gate, up, down = (getattr(block.mlp, name).weight.detach().double().abs().T for name in records)
    norm = block.post_feedforward_layernorm
    out = records["down_proj"].detach().double().flatten(0, 1)
    down = down * norm.weight.detach().double().abs() * (out.square().mean(-1) + norm.variance_epsilon).rsqrt().mean()
    g, u = (records[name].detach().double().flatten(0, 1) for name in ("gate_proj", "up_proj"))
    sigmoid = torch.sigmoid(g)
    slope = sigmoid * (1 + g * (1 - sigmoid))
    readers = gate * (slope * u).abs().mean(0) + up * (g * sigmoid).abs().mean(0)
    bounds.scores(0, attention)
    assert bounds.vector_means[0] == pytest.approx(float((1 + readers @ down.sum(1)).mean()), rel=1e-5)


def test_the_size_of_an_output() -> None:
    model = tiny_model("llama", 1)
    bounds, _ = measured(model, PAPER)
    expected = BlockRunner(model).run_to(Batch(random_ids()), 0).value
    assert bounds.output_size(0) == pytest.approx(float(expected.double().abs().sum()))
