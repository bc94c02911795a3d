# SPDX-License-Identifier: Apache-2.0
"""Magnitude: the norm of all weights of a unit, by hand, and that the smallest go; the model is only looked at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import block_list, tiny_model
from torch import Tensor, nn
from toys import assert_unchanged, counting, snapshot
from transformers import PreTrainedModel
from zoo import causal

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan
from optimum_blockprune.errors import ConfigurationError
from optimum_blockprune.registry import get_strategy


def magnitude(families: str = "mlp", **fields: Any) -> BlockPruningConfig:
    budget = {} if "target_params" in fields else {"sparsity": 0.5}
    return BlockPruningConfig("magnitude", strategy_options={"families": families}, **{**budget, **fields})


def norms(*stacked: Tensor) -> list[float]:
    """One norm for every row of tensors whose rows are units."""
    return torch.cat([each.detach().double().flatten(1) for each in stacked], dim=1).norm(dim=1).tolist()


def heads(weight: Tensor, units: int) -> Tensor:
    """Rows of a projection by unit."""
    return weight.unflatten(0, (units, -1))


def llama_mlp(block: nn.Module) -> list[float]:
    mlp = block.mlp
    return norms(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T)


def llama_mlp_with_biases(block: nn.Module) -> list[float]:
    mlp = block.mlp
    biases = mlp.gate_proj.bias[:, None], mlp.up_proj.bias[:, None]
    return norms(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T, *biases)


def llama_attention(block: nn.Module) -> list[float]:
    attention = block.self_attn
    readers = [heads(each.weight, 2) for each in (attention.q_proj, attention.k_proj, attention.v_proj)]
    return norms(*readers, heads(attention.o_proj.weight.T, 2))


def phi3_mlp(block: nn.Module) -> list[float]:
    gate, up = block.mlp.gate_up_proj.weight.chunk(2)
    return norms(gate, up, block.mlp.down_proj.weight.T)


def phi3_attention(block: nn.Module) -> list[float]:
    q, k, v = block.self_attn.qkv_proj.weight.split([32, 16, 16])
    return norms(heads(q, 2), heads(k, 2), heads(v, 2), heads(block.self_attn.o_proj.weight.T, 2))


def phi3_multi_query(block: nn.Module) -> list[float]:
    q = block.self_attn.qkv_proj.weight[:32]
    return norms(heads(q, 4), heads(block.self_attn.o_proj.weight.T, 4))


def gpt2_mlp(block: nn.Module) -> list[float]:
    return norms(block.mlp.c_fc.weight.T, block.mlp.c_fc.bias[:, None], block.mlp.c_proj.weight)


def gpt2_attention(block: nn.Module) -> list[float]:
    weight, bias = block.attn.c_attn.weight.T.chunk(3), block.attn.c_attn.bias.chunk(3)
    rows = [heads(each, 4) for each in (*weight, *bias)]
    return norms(*rows, heads(block.attn.c_proj.weight, 4))


CASES = {
    "llama": ("llama", "mlp", {}, llama_mlp, "mlp.down_proj"),
    "llama with biases": ("llama", "mlp", {"mlp_bias": True}, llama_mlp_with_biases, "mlp.down_proj"),
    "llama heads": ("llama", "attention", {}, llama_attention, "self_attn.o_proj"),
    "phi3": ("phi3", "mlp", {}, phi3_mlp, "mlp.down_proj"),
    "phi3 heads": ("phi3", "attention", {}, phi3_attention, "self_attn.o_proj"),
    "phi3 multi-query": ("phi3", "attention", {"num_key_value_heads": 1}, phi3_multi_query, "self_attn.o_proj"),
    "gpt2": ("gpt2", "mlp", {}, gpt2_mlp, "mlp.c_proj"),
    "gpt2 heads": ("gpt2", "attention", {}, gpt2_attention, "attn.c_proj"),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_by_hand_and_the_smallest_go(case: str) -> None:
    family, families, fields, by_hand, writer = CASES[case]
    model = tiny_model(family, 3, **fields)
    layout = "per_layer" if case == "gpt2 heads" else "uniform"
    pruner = BlockPruner(model, magnitude(families, layout=layout))
    expected = {number: by_hand(block) for number, block in enumerate(block_list(model))}
    before = snapshot(model)
    scores = pruner.score()
    plan = pruner.make_plan()
    assert_unchanged(model, before)
    assert scores.keys() == expected.keys()
    for number, values in expected.items():
        assert scores[number].keys() == {writer}
        assert scores[number][writer] == pytest.approx(values, rel=1e-5)
        # No two units are so alike that rounding could change the order.
        order = sorted(range(len(values)), key=lambda unit: values[unit])
        assert all(values[a] * 1.00001 < values[b] for a, b in zip(order, order[1:], strict=False))
        (kept,) = (each.kept for each in plan.width.narrowed if each.block == number)
        assert kept == tuple(sorted(order[len(order) // 2 :]))


def test_the_plan_says_how_close_it_was() -> None:
    model = tiny_model("llama", 2)
    pruner = BlockPruner(model, magnitude())
    plan, scores = pruner.make_plan(), pruner.score()
    assert plan.strategy == "magnitude" and plan.requested == {"sparsity": 0.5} and plan.scores == {}
    assert plan.details == {"align": 8} and plan.options == {"families": "mlp"} and plan.calibration is None
    assert [step["block"] for step in plan.steps] == [0, 1]
    for step in plan.steps:
        values = sorted(scores[step["block"]]["mlp.down_proj"])
        assert (step["writer"], step["kept"]) == ("mlp.down_proj", 24)
        assert (step["highest_removed"], step["lowest_kept"]) == (values[23], values[24])
    assert PruningPlan.from_dict(plan.to_dict()) == plan


def test_both_families_have_scores_of_their_own() -> None:
    model = tiny_model("llama", 2)
    both = BlockPruner(model, magnitude("both")).score()
    for families, writer in (("mlp", "mlp.down_proj"), ("attention", "self_attn.o_proj")):
        alone = BlockPruner(model, magnitude(families)).score()
        assert {block: each[writer] for block, each in both.items()} == {
            block: each[writer] for block, each in alone.items()
        }
    assert [len(both[0][writer]) for writer in ("mlp.down_proj", "self_attn.o_proj")] == [48, 2]


@pytest.mark.parametrize(("factor", "sparsity", "stays"), [(1e-3, 0.17, False), (1e3, 0.8, True)])
@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_every_tensor_of_a_unit_counts(part: str, factor: float, sparsity: float, stays: bool) -> None:
    """Unit 7 of block 1: large by one tensor alone, or small in that one while the others are zero."""
    model = tiny_model("phi3", 2)
    mlp = block_list(model)[1].mlp
    places = {
        "gate": mlp.gate_up_proj.weight[7],
        "up": mlp.gate_up_proj.weight[48 + 7],
        "down": mlp.down_proj.weight[:, 7],
    }
    with torch.no_grad():
        for name, weights in places.items():
            weights *= factor if name == part else 0
    plan = BlockPruner(model, magnitude(sparsity=sparsity)).make_plan()
    ((_, narrowing),) = plan.width.of_block(1)
    assert (7 in narrowing.kept) == stays


def test_protected_blocks_have_no_scores() -> None:
    model = tiny_model("llama", 4)
    pruner = BlockPruner(model, magnitude(layout="per_layer", protect_first=1, protect_last=1))
    assert pruner.score().keys() == {1, 2}
    plan = pruner.make_plan()
    assert [len(each.kept) for each in plan.width.narrowed] == [48, 24, 24, 48]
    assert [step["block"] for step in plan.steps] == [1, 2]


def test_half_precision_is_summed_in_full() -> None:
    """The square of 1 + 1/128 has more digits than bfloat16 holds."""
    model = tiny_model("llama", 1).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.model.layers[0].mlp.parameters():
            parameter.fill_(1 + 1 / 128)
    scores = BlockPruner(model, magnitude()).score()[0]["mlp.down_proj"]
    assert scores == pytest.approx([(1 + 1 / 128) * (3 * 32) ** 0.5] * 48, rel=1e-7)


def test_blocks_with_other_units() -> None:
    model = causal.tiny_model("qwen2_moe", 4, shared_expert_intermediate_size=32)
    scores = BlockPruner(model, magnitude()).score()
    assert {block: {writer: len(each) for writer, each in rows.items()} for block, rows in scores.items()} == {
        1: {"mlp.down_proj": 48},
        **{block: {"mlp.shared_expert.down_proj": 32} for block in (0, 2, 3)},
    }
    shared = causal.block_list("qwen2_moe", model)[2].mlp.shared_expert
    by_hand = norms(shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight.T)
    assert scores[2]["mlp.shared_expert.down_proj"] == pytest.approx(by_hand, rel=1e-5)


def test_no_data_is_read() -> None:
    model = tiny_model("llama", 2)
    pruner = BlockPruner(model, magnitude(dataset="no/such/file.txt"))
    with counting(model) as searched:
        plan = pruner.make_plan()
    with counting(model) as tried:
        BlockPruner(model, BlockPruningConfig("random", sparsity=0.5, strategy_options={"unit": "width"})).make_plan()
    assert len(searched) == len(tried) and plan.calibration is None and pruner.report.tokens is None


@pytest.mark.parametrize("families", ["heads", "", "mlp,attention"])
def test_unknown_families(families: str) -> None:
    with pytest.raises(ConfigurationError, match="Unknown families .* for magnitude"):
        magnitude(families)


def test_what_it_removes() -> None:
    kind = get_strategy("magnitude")
    assert kind.unit_of(kind.Options()) == "width" and not kind.needs_data
    for name, families in (("mlp", ("mlp",)), ("attention", ("attention",)), ("both", ("mlp", "attention"))):
        assert kind.families_of(kind.Options(name)) == families


def test_scores_are_of_the_model_as_it_is() -> None:
    """After a pruning, on what is left."""
    model: PreTrainedModel = tiny_model("llama", 2)
    pruner = BlockPruner(model, magnitude())
    dense = pruner.score()
    plan = pruner.make_plan()
    pruner.prune(plan=plan)
    for block, rows in pruner.score().items():
        kept = plan.width.narrowed[block].kept
        assert rows["mlp.down_proj"] == pytest.approx([dense[block]["mlp.down_proj"][unit] for unit in kept], rel=1e-6)
