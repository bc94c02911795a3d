# SPDX-License-Identifier: Apache-2.0
"""Units are read off two empty models: which tensors are theirs, along which axis, and why others have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from families import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from zoo import causal, other_stacks

from optimum_blockprune.block_kinds import kinds_of
from optimum_blockprune.blocks import BlockStack, find_blocks
from optimum_blockprune.errors import UnsupportedModelError
from optimum_blockprune.units import find_units, narrower_model
from optimum_blockprune.widths import UnitGroup


NOT_SMALLER = (
    "field 'num_attention_heads' does not change the size of the projections: its classes take the size of a head "
    "from hidden_size / heads, so that no ordinary checkpoint has fewer heads"
)


def empty(config: PretrainedConfig, kind: Any = None) -> PreTrainedModel:
    """The model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config) if kind is None else kind(config)


def stack_of(family: str, **fields: Any) -> BlockStack:
    return find_blocks(empty(tiny_config(family, 3, **fields)))


def tensors(group: UnitGroup) -> dict[str, tuple[int, tuple[int, ...], int]]:
    return {cut.name: (cut.axis, cut.parts, cut.rest) for cut in group.tensors}


def attributes(group: UnitGroup) -> dict[str, tuple[int, int]]:
    return {f"{each.module}.{each.name}": (each.per_unit, each.constant) for each in group.attributes}


def only(stack: BlockStack, family: str) -> tuple[UnitGroup, ...]:
    """The candidates of the only group, which all blocks have and nothing speaks against."""
    found, reasons = find_units(stack, family)
    assert reasons == []
    (each,) = found
    assert each.blocks == tuple(range(len(stack)))
    return each.candidates


# MLPs


def test_channels_of_llama() -> None:
    (group,) = only(stack_of("llama"), "mlp")
    assert (group.family, group.unit, group.writer, group.units) == ("mlp", "channel", "mlp.down_proj", 48)
    assert (group.fields, group.fixed, group.inputs_per_unit) == ({"intermediate_size": 1}, {}, 1)
    assert tensors(group) == {
        "mlp.down_proj.weight": (1, (1,), 0),
        "mlp.gate_proj.weight": (0, (1,), 0),
        "mlp.up_proj.weight": (0, (1,), 0),
    }
    assert attributes(group) == {
        "mlp.intermediate_size": (1, 0),
        "mlp.down_proj.in_features": (1, 0),
        "mlp.gate_proj.out_features": (1, 0),
        "mlp.up_proj.out_features": (1, 0),
    }
    assert group.tensors[0].name == "mlp.down_proj.weight" and not group.reads_config


def test_biases_of_readers_are_theirs_and_that_of_the_writer_is_not() -> None:
    (group,) = only(stack_of("llama", mlp_bias=True), "mlp")
    assert tensors(group).keys() == {
        "mlp.down_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.gate_proj.bias",
        "mlp.up_proj.weight",
        "mlp.up_proj.bias",
    }
    assert tensors(group)["mlp.up_proj.bias"] == (0, (1,), 0)


def test_gate_and_up_in_one_tensor_of_phi3_have_two_orders() -> None:
    orders = only(stack_of("phi3"), "mlp")
    assert {tensors(each)["mlp.gate_up_proj.weight"] for each in orders} == {(0, (1, 1), 0), (0, (2,), 0)}
    for each in orders:
        assert tensors(each)["mlp.down_proj.weight"] == (1, (1,), 0)
        assert attributes(each) == {"mlp.down_proj.in_features": (1, 0), "mlp.gate_up_proj.out_features": (2, 0)}


def test_conv1d_of_gpt2_lies_the_other_way() -> None:
    (group,) = only(stack_of("gpt2"), "mlp")
    # n_inner is not set, and then is four times the hidden size.
    assert (group.units, group.fields, group.writer) == (128, {"n_inner": 1}, "mlp.c_proj")
    assert group.tensors[0].name == "mlp.c_proj.weight"
    assert tensors(group) == {
        "mlp.c_proj.weight": (0, (1,), 0),
        "mlp.c_fc.weight": (1, (1,), 0),
        "mlp.c_fc.bias": (0, (1,), 0),
    }
    assert attributes(group) == {"mlp.c_proj.nx": (1, 0), "mlp.c_fc.nf": (1, 0)}
    (given,) = only(stack_of("gpt2", n_inner=40), "mlp")
    assert (given.units, given.fields) == (40, {"n_inner": 1})


@pytest.mark.parametrize(
    ("family", "field", "units", "bias"),
    [("gpt_neox", "intermediate_size", 48, True), ("falcon", "ffn_hidden_size", 128, False)],
)
def test_channels_of_parallel_blocks(family: str, field: str, units: int, bias: bool) -> None:
    (group,) = only(stack_of(family), "mlp")
    assert (group.units, group.fields, group.writer) == (units, {field: 1}, "mlp.dense_4h_to_h")
    expected = {"mlp.dense_4h_to_h.weight": (1, (1,), 0), "mlp.dense_h_to_4h.weight": (0, (1,), 0)}
    assert tensors(group) == expected | ({"mlp.dense_h_to_4h.bias": (0, (1,), 0)} if bias else {})


def test_dense_and_shared_channels_beside_experts() -> None:
    """Block 1 is dense, the others have experts and a shared one; the experts themselves are stacked."""
    stack = find_blocks(empty(causal.tiny_config("qwen2_moe", 4, shared_expert_intermediate_size=40)))
    found, reasons = find_units(stack, "mlp")
    groups = {each.blocks: each.candidates for each in found}
    assert groups.keys() == {(1,), (0, 2, 3)}
    (dense,), (shared,) = groups[1,], groups[0, 2, 3]
    assert (dense.writer, dense.fields, dense.units) == ("mlp.down_proj", {"intermediate_size": 1}, 48)
    assert (shared.writer, shared.units) == ("mlp.shared_expert.down_proj", 40)
    assert shared.fields == {"shared_expert_intermediate_size": 1}
    assert all(name.startswith("mlp.shared_expert.") for name in tensors(shared)) and len(shared.tensors) == 3
    assert reasons == [
        "Model type 'qwen2_moe': field 'moe_intermediate_size' shapes mlp.experts.down_proj, "
        "mlp.experts.gate_up_proj, and no projection whose inputs are the units"
    ]


def test_stacked_experts_have_no_units() -> None:
    found, (reason,) = find_units(stack_of("mixtral"), "mlp")
    assert found == []
    assert "'mixtral': field 'intermediate_size' shapes mlp.experts.down_proj, mlp.experts.gate_up_proj" in reason


def test_a_field_of_shared_and_of_stacked_experts_is_refused() -> None:
    """DeepSeek's shared experts are plain projections, but as wide as the stacked ones by the same field."""
    stack = find_blocks(empty(causal.tiny_config("deepseek_v3")))
    found, reasons = find_units(stack, "mlp")
    assert {tuple(each.candidates[0].fields) for each in found} == {("intermediate_size",)}
    assert reasons == [
        "Model type 'deepseek_v3': field 'moe_intermediate_size' shapes 'mlp.experts.gate_up_proj' [4, 96, 32]: "
        "experts that are stacked in one tensor cannot lose channels exactly in this version"
    ]


def test_a_field_of_two_stacks_is_refused() -> None:
    model = empty(other_stacks.tiny_config("t5"), transformers.T5ForConditionalGeneration)
    for name, other in (("encoder", "decoder.block.0.layer.2"), ("decoder", "encoder.block.0.layer.1")):
        found, (reason,) = find_units(find_blocks(model, name), "mlp")
        assert found == [] and reason == (
            f"Model type 't5' ({name}): field 'd_ff' also shapes '{other}.DenseReluDense.wi.weight', outside of the "
            "blocks of this stack"
        )


def test_a_model_without_a_field_says_nothing() -> None:
    """Bloom's MLP is four times the hidden size, and no field says so."""
    assert find_units(stack_of("bloom"), "mlp") == ([], [])


# Attention


@pytest.mark.parametrize(("heads", "kv", "size"), [(4, 2, 8), (4, 4, 8), (8, 2, 4), (4, 2, 16)])
def test_kv_groups_of_llama(heads: int, kv: int, size: int) -> None:
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": size}
    (group,) = only(stack_of("llama", **shape), "attention")
    queries = heads // kv
    assert (group.family, group.unit, group.units) == ("attention", "kv_group", kv)
    assert group.fields == {"num_attention_heads": queries, "num_key_value_heads": 1}
    assert group.fixed == {"head_dim": size} and group.inputs_per_unit == queries * size
    assert tensors(group) == {
        "self_attn.o_proj.weight": (1, (queries * size,), 0),
        "self_attn.q_proj.weight": (0, (queries * size,), 0),
        "self_attn.k_proj.weight": (0, (size,), 0),
        "self_attn.v_proj.weight": (0, (size,), 0),
    }
    assert attributes(group) == {
        "self_attn.o_proj.in_features": (queries * size, 0),
        "self_attn.q_proj.out_features": (queries * size, 0),
        "self_attn.k_proj.out_features": (size, 0),
        "self_attn.v_proj.out_features": (size, 0),
    }
    values = group.values(1)
    assert values == {"num_attention_heads": queries, "num_key_value_heads": 1, "head_dim": size}


def test_heads_that_share_one_kv_head_go_alone() -> None:
    (group,) = only(stack_of("llama", num_key_value_heads=1), "attention")
    assert (group.unit, group.units, group.fields) == ("head", 4, {"num_attention_heads": 1})
    assert group.fixed == {"head_dim": 8, "num_key_value_heads": 1}
    assert tensors(group) == {"self_attn.o_proj.weight": (1, (8,), 0), "self_attn.q_proj.weight": (0, (8,), 0)}
    fused = only(stack_of("phi3", num_key_value_heads=1), "attention")
    assert {tensors(each)["self_attn.qkv_proj.weight"] for each in fused} == {(0, (8,), 16)}


def test_q_k_and_v_in_one_tensor_of_phi3() -> None:
    orders = only(stack_of("phi3"), "attention")
    assert [tensors(each)["self_attn.qkv_proj.weight"] for each in orders] == [
        (0, (16, 8, 8), 0),
        (0, (32,), 0),
        (0, (16, 16), 0),
    ]
    for each in orders:
        assert tensors(each)["self_attn.o_proj.weight"] == (1, (16,), 0)
        assert attributes(each)["self_attn.num_key_value_heads"] == (1, 0)
        assert attributes(each)["self_attn.qkv_proj.out_features"] == (32, 0)


def test_mixtral_has_heads() -> None:
    (group,) = only(stack_of("mixtral"), "attention")
    assert (group.unit, group.units, len(group.tensors)) == ("kv_group", 2, 4)


def test_qwen2_has_biases_on_q_k_and_v() -> None:
    (group,) = only(stack_of("qwen2", use_sliding_window=False), "attention")
    names = [name for name in tensors(group) if name.endswith("bias")]
    assert names == [f"self_attn.{each}_proj.bias" for each in "qkv"]
    assert [tensors(group)[name] for name in names] == [(0, (16,), 0), (0, (8,), 0), (0, (8,), 0)]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "bloom"])
def test_heads_that_the_hidden_size_decides(family: str) -> None:
    found, reasons = find_units(stack_of(family), "attention")
    assert (found, reasons) == ([], [f"Model type '{family}': {NOT_SMALLER}"])


def test_heads_that_a_class_does_not_take() -> None:
    found, (reason,) = find_units(stack_of("falcon"), "attention")
    assert found == []
    assert reason == "Model type 'falcon' does not take other values of num_attention_heads, num_kv_heads, head_dim"


def test_one_head_is_no_question() -> None:
    one = {"num_attention_heads": 1, "num_key_value_heads": 1}
    assert find_units(stack_of("llama", **one), "attention") == ([], [])


def test_heads_that_differ_between_blocks_are_refused() -> None:
    found, reasons = find_units(find_blocks(empty(causal.tiny_config("gemma4_text#moe"))), "attention")
    assert found == [] and reasons == ["Model type 'gemma4_text': 'num_key_value_heads' differs between blocks"]


# Nothing of the model is touched


def test_live_and_empty_models_have_the_same_units() -> None:
    model = tiny_model("phi3", 3)
    before = model.config.to_dict()
    for family in ("mlp", "attention"):
        assert find_units(find_blocks(model), family) == find_units(stack_of("phi3"), family)
    assert model.config.to_dict() == before


def test_narrower_model() -> None:
    stack = stack_of("llama")
    before = stack.model.config.to_dict()
    made = narrower_model(stack, {"intermediate_size": 24, "num_key_value_heads": 1})
    assert type(made) is type(stack.model) and made.device.type == "meta"
    block = made.model.layers[2]
    assert block.mlp.down_proj.weight.shape == (32, 24) and block.self_attn.k_proj.weight.shape == (8, 32)
    assert stack.model.config.to_dict() == before and stack.blocks[2].mlp.down_proj.weight.shape == (32, 48)


def test_values_that_the_classes_refuse() -> None:
    with pytest.raises(UnsupportedModelError, match="'llama'"):
        narrower_model(stack_of("llama"), {"num_attention_heads": 3})
    with pytest.raises(UnsupportedModelError, match="'falcon' does not take other values of head_dim"):
        narrower_model(stack_of("falcon"), {"head_dim": 4})


# Kinds of blocks


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "gpt_neox", "opt", "phi3"])
def test_numbers_and_weights_make_no_kinds(family: str) -> None:
    assert kinds_of(find_blocks(tiny_model(family, 3)).blocks) == [[0, 1, 2]]


def test_windows_make_kinds() -> None:
    blocks = stack_of("gemma2").blocks  # sliding, full, sliding
    assert kinds_of(blocks) == [[0, 2], [1]]
    assert kinds_of(blocks[1:]) == [[0], [1]]


def test_shapes_make_kinds() -> None:
    blocks = find_blocks(empty(causal.tiny_config("qwen2_moe", 4))).blocks
    assert sorted(kinds_of(blocks)) == [[0, 2, 3], [1]]


@pytest.mark.parametrize("values", [(0.0, 0.5, 0.5), (1, 1, 2), (True, True, False), ("a", "a", "b"), (0, 1, 1)])
def test_any_plain_attribute_makes_kinds(values: tuple[Any, ...]) -> None:
    """Also where a value equals the number of its block by chance."""
    blocks = stack_of("llama").blocks
    for block, value in zip(blocks, values, strict=True):
        block.mlp.trait = value
    assert kinds_of(blocks) == ([[0, 1], [2]] if values[0] == values[1] else [[0], [1, 2]])


def test_only_whole_numbers_are_numbers_of_blocks() -> None:
    blocks = stack_of("llama").blocks
    for number, block in enumerate(blocks):
        block.rate = float(number)
    assert kinds_of(blocks) == [[0], [1], [2]]
    for number, block in enumerate(blocks):
        block.rate = bool(number)
    assert kinds_of(blocks[:2]) == [[0], [1]]


def test_attributes_that_say_nothing_make_no_kinds() -> None:
    blocks = stack_of("llama").blocks
    for number, block in enumerate(blocks):
        block.number, block._private, block.table = number, f"x{number}", [number]
    assert kinds_of(blocks) == [[0, 1, 2]]
