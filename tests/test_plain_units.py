# SPDX-License-Identifier: Apache-2.0
"""Units that no configuration field counts, by the projections of a block: candidates, which the trial then judges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from families import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from zoo import other_stacks

from optimum_blockprune.blocks import BlockStack, find_blocks
from optimum_blockprune.plain_units import plain_units
from optimum_blockprune.widths import UnitGroup


def empty(config: PretrainedConfig, kind: Any = None) -> BlockStack:
    """The blocks of a model without weights."""
    with torch.device("meta"):
        return find_blocks(AutoModelForCausalLM.from_config(config) if kind is None else kind(config))


def stack_of(family: str, **fields: Any) -> BlockStack:
    return empty(tiny_config(family, 3, **fields))


def tensors(group: UnitGroup) -> dict[str, tuple[int, tuple[int, ...], int]]:
    return {cut.name: (cut.axis, cut.parts, cut.rest) for cut in group.tensors}


def attributes(group: UnitGroup) -> dict[str, tuple[int, int]]:
    return {f"{each.module}.{each.name}": (each.per_unit, each.constant) for each in group.attributes}


def candidates(stack: BlockStack, family: str) -> tuple[UnitGroup, ...]:
    """Those of the only group; none of them speaks of configuration fields."""
    (found,) = plain_units(stack, family)
    assert found.blocks == tuple(range(len(stack)))
    assert all((each.family, each.fields, each.fixed) == (family, {}, {}) for each in found.candidates)
    shapes = dict(stack.blocks[0].named_parameters())
    for each in found.candidates:
        assert each.tensors[0].name == f"{each.writer}.weight"
        assert all(shapes[cut.name].shape[cut.axis] == cut.size(each.units) for cut in each.tensors)
        assert len(tensors(each)) == len(each.tensors)
    return found.candidates


def first(stack: BlockStack, family: str = "attention") -> UnitGroup:
    return candidates(stack, family)[0]


# Heads


def test_heads_of_gpt2() -> None:
    stack = stack_of("gpt2")
    found = candidates(stack, "attention")
    for each in found:
        assert (each.unit, each.writer, each.units) == ("kv_group", "attn.c_proj", 4)
        assert tensors(each)["attn.c_proj.weight"] == (0, (8,), 0)  # Conv1D: inputs first
        assert tensors(each)["attn.c_attn.weight"][0] == 1 and tensors(each)["attn.c_attn.bias"][0] == 0
        assert tensors(each).keys() == {"attn.c_proj.weight", "attn.c_attn.weight", "attn.c_attn.bias"}
    orders = [(tensors(each)["attn.c_attn.weight"][1], tensors(each)["attn.c_attn.bias"][1]) for each in found]
    assert set(orders) == {((8, 8, 8),) * 2, ((24,),) * 2}
    own = {"attn.c_proj.nx": (8, 0), "attn.c_attn.nf": (24, 0)}
    around = {"attn.embed_dim": (8, 0), "attn.num_heads": (1, 0), "attn.split_size": (8, 0)}
    assert attributes(found[0]) == own | around
    # More is tried before less.
    assert [attributes(each) for each in found[:3]] == [own | around, own | {"attn.num_heads": (1, 0)}, own]


def test_heads_of_opt() -> None:
    group = first(stack_of("opt"))
    assert (group.unit, group.writer, group.units) == ("kv_group", "self_attn.out_proj", 4)
    readers = {f"self_attn.{each}_proj.{leaf}": (0, (8,), 0) for each in "qkv" for leaf in ("weight", "bias")}
    assert tensors(group) == {"self_attn.out_proj.weight": (1, (8,), 0), **readers}
    assert attributes(group) == {
        "self_attn.out_proj.in_features": (8, 0),
        **{f"self_attn.{each}_proj.out_features": (8, 0) for each in "qkv"},
        "self_attn.embed_dim": (8, 0),
        "self_attn.num_heads": (1, 0),
    }


def test_heads_of_bert() -> None:
    group = first(empty(other_stacks.tiny_config("bert"), transformers.BertForMaskedLM))
    assert (group.writer, group.units) == ("attention.output.dense", 4)
    readers = [f"attention.self.{each}" for each in ("query", "key", "value")]
    assert tensors(group) == {
        "attention.output.dense.weight": (1, (8,), 0),
        **{f"{each}.{leaf}": (0, (8,), 0) for each in readers for leaf in ("weight", "bias")},
    }
    assert (
        attributes(group).items()
        >= {
            "attention.self.num_attention_heads": (1, 0),
            "attention.self.all_head_size": (8, 0),
        }.items()
    )
    assert "attention.self.attention_head_size" not in attributes(group)


def test_heads_of_falcon_share_one_kv_head() -> None:
    found = candidates(stack_of("falcon"), "attention")
    for each in found:
        assert (each.unit, each.units) == ("head", 4)
        assert tensors(each) == {
            "self_attention.dense.weight": (1, (8,), 0),
            "self_attention.query_key_value.weight": (0, (8,), 16),
        }
        assert attributes(each)["self_attention.query_key_value.out_features"] == (8, 16)
        assert "self_attention.num_kv_heads" not in attributes(each)
    assert attributes(found[0])["self_attention.num_heads"] == (1, 0)


def test_heads_of_falcon_with_a_kv_head_each() -> None:
    found = candidates(stack_of("falcon", multi_query=False, num_kv_heads=4, bias=True), "attention")
    assert {tensors(each)["self_attention.query_key_value.bias"] for each in found} == {
        (0, (8, 8, 8), 0),
        (0, (24,), 0),
    }
    assert "self_attention.dense.bias" not in tensors(found[0])
    assert attributes(found[0])["self_attention.num_kv_heads"] == (1, 0) and found[0].unit == "kv_group"


def test_kv_groups_of_the_new_falcon() -> None:
    found = candidates(stack_of("falcon", new_decoder_architecture=True, num_kv_heads=2), "attention")
    assert {(each.units, tensors(each)["self_attention.dense.weight"]) for each in found} == {(2, (1, (16,), 0))}
    orders = {tensors(each)["self_attention.query_key_value.weight"] for each in found}
    assert orders == {(0, (16, 8, 8), 0), (0, (32,), 0)}
    # Twice as many query heads as KV heads.
    assert attributes(found[0])["self_attention.num_heads"] == (2, 0)
    assert attributes(found[0])["self_attention.hidden_size"] == (16, 0)
    assert attributes(found[0])["self_attention.num_kv_heads"] == (1, 0)


def test_heads_of_gpt_neox_lie_one_after_the_other_or_mixed() -> None:
    orders = [
        tensors(each)["attention.query_key_value.weight"] for each in candidates(stack_of("gpt_neox"), "attention")
    ]
    assert set(orders) == {(0, (8, 8, 8), 0), (0, (24,), 0)}


def test_separate_projections_of_llama() -> None:
    group = first(stack_of("llama"))
    assert (group.unit, group.units) == ("kv_group", 2)
    assert tensors(group) == {
        "self_attn.o_proj.weight": (1, (16,), 0),
        "self_attn.q_proj.weight": (0, (16,), 0),
        "self_attn.k_proj.weight": (0, (8,), 0),
        "self_attn.v_proj.weight": (0, (8,), 0),
    }
    shared = first(stack_of("llama", num_key_value_heads=1))
    assert (shared.unit, shared.units) == ("head", 4)
    assert tensors(shared) == {"self_attn.o_proj.weight": (1, (8,), 0), "self_attn.q_proj.weight": (0, (8,), 0)}


def test_the_number_of_a_block_is_no_number_of_heads() -> None:
    """Block 4 of a model with four heads, which is of another kind than those before it."""
    stack = empty(tiny_config("gpt2", 5))
    for number, block in enumerate(stack.blocks):
        block.attn.kind = number == 4
    found = plain_units(stack, "attention")
    assert [each.blocks for each in found] == [(0, 1, 2, 3), (4,)] and stack.blocks[4].attn.layer_idx == 4
    assert all("attn.layer_idx" not in attributes(each) for kind in found for each in kind.candidates)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"head_dim": 16}),  # the writer's inputs are not the hidden size
        ("llama", {"head_dim": 4}),
        ("t5", {}),
    ],
)
def test_shapes_that_say_something_else(family: str, fields: dict[str, Any]) -> None:
    stack = stack_of(family, **fields) if family != "t5" else t5_decoder()
    assert plain_units(stack, "attention") == []


def t5_decoder() -> BlockStack:
    """Two attentions in a block."""
    return empty(other_stacks.tiny_config("t5"), transformers.T5ForConditionalGeneration)


def test_two_attentions_in_a_block_are_not_told_apart() -> None:
    stack = stack_of("opt")
    for block in stack.blocks:
        block.other_attn = nn.Linear(32, 32, device="meta")
    assert plain_units(stack, "attention") == []


# Channels


@pytest.mark.parametrize(
    ("family", "writer", "reader", "units"),
    [
        ("bloom", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h", 128),
        ("gpt_neox", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h", 48),
        ("opt", "fc2", "fc1", 48),
    ],
)
def test_channels(family: str, writer: str, reader: str, units: int) -> None:
    (group,) = candidates(stack_of(family), "mlp")
    assert (group.unit, group.writer, group.units) == ("channel", writer, units)
    assert tensors(group) == {
        f"{writer}.weight": (1, (1,), 0),
        f"{reader}.weight": (0, (1,), 0),
        f"{reader}.bias": (0, (1,), 0),
    }
    assert attributes(group) == {f"{writer}.in_features": (1, 0), f"{reader}.out_features": (1, 0)}


def test_channels_of_conv1d() -> None:
    (group,) = candidates(stack_of("gpt2"), "mlp")
    assert tensors(group) == {
        "mlp.c_proj.weight": (0, (1,), 0),
        "mlp.c_fc.weight": (1, (1,), 0),
        "mlp.c_fc.bias": (0, (1,), 0),
    }
    assert attributes(group) == {"mlp.c_proj.nx": (1, 0), "mlp.c_fc.nf": (1, 0)}


def test_gate_and_up_apart_and_in_one() -> None:
    (apart,) = candidates(stack_of("llama"), "mlp")
    assert tensors(apart).keys() == {f"mlp.{name}_proj.weight" for name in ("down", "gate", "up")}
    fused = candidates(stack_of("phi3"), "mlp")
    assert [tensors(each)["mlp.gate_up_proj.weight"] for each in fused] == [(0, (1, 1), 0), (0, (2,), 0)]
    assert all(attributes(each)["mlp.gate_up_proj.out_features"] == (2, 0) for each in fused)


def test_two_writers_are_not_told_apart() -> None:
    stack = stack_of("opt")
    for block in stack.blocks:
        block.extra = nn.Linear(24, 32, device="meta")
    assert plain_units(stack, "mlp") == []


def test_as_wide_as_the_stream_is_not_told_apart() -> None:
    assert plain_units(stack_of("llama", intermediate_size=32), "mlp") == []
