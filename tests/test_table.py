# SPDX-License-Identifier: Apache-2.0
"""Every row of the architecture table is reached, by the configurations of transformers that it is about."""

from __future__ import annotations

import re
from typing import Any

import pytest
from configs import changes, layout_of, newest, removal
from families import FAMILIES
from transformers import CONFIG_MAPPING

from optimum_blockprune.constraints import CONSTRAINTS
from optimum_blockprune.errors import UnsupportedModelError
from optimum_blockprune.rules import RULES
from optimum_blockprune.table import Constraint, Table, table


SIX = {"num_hidden_layers": 6}
ROWS = [(row, model_type) for row in table().constraints for model_type in row.model_types or (None,)]
# Fields that a default configuration lacks and a row is about.
GIVEN: dict[tuple[str, str], dict[str, Any]] = {
    ("keep_one", "bamba"): {"attn_layer_indices": [1, 4]},
    ("keep_first", "deberta-v2"): {"conv_kernel_size": 3},
    # Another row forbids any removal otherwise.
    ("keep_first", "rwkv"): {"rescale_every": 0},
}
# A removal that breaks a rule with named types; of blocks 0 to the last, -1.
BREAKING = {
    "keep_first": [0],
    "keep_last": [-1],
    "keep_one": [1, 4],
    "last_is": [-1],
    "not_below": [-1],
    "refuse": [1],
    "refuse_period": [1],
    "tail_only": [0],
}
# Rows for every type with a field: one such type, the field, and a removal that breaks the rule.
BY_FIELD: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "scale_attn_by_inverse_layer_idx": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, [1]),
    "vision_config.deepstack_visual_indexes": ("qwen3_vl", {}, [1]),
    "spatial_target_layers": ("granite4_vision", {}, [1]),
    "n_layers_per_attn_res_block": ("inkling2_text", {**SIX, "n_layers_per_attn_res_block": 2}, [1]),
    "num_kv_shared_layers": ("gemma3n_text", {"num_hidden_layers": 10, "num_kv_shared_layers": 3}, [4]),
    "indexer_types": ("glm_moe_dsa", {**SIX, "indexer_types": ["full", "shared"] * 3}, [2]),
    "layer_types": ("lfm2", {**SIX, "full_attn_idxs": [1, 4]}, [1, 4]),
    "layers_block_type": ("nemotron_h", {"layers_block_type": ["mamba", "attention", "mlp", "mamba"]}, [1]),
    "block_types": ("recurrent_gemma", SIX, [2, 5]),
}
PAIRS = [[["global", "local"], 3]]
# For every field: a type that has it, its stack, fields, the removed blocks, and what becomes of the field.
FOLLOWS: dict[str, tuple[str, str | None, dict[str, Any], list[int], Any]] = {
    "layer_types": (
        "gemma2",
        None,
        {"num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2},
        [1],
        ["full_attention", "full_attention", "sliding_attention"],
    ),
    "mlp_layer_types": ("kimi_linear", None, SIX, [1], ["dense", *["sparse"] * 4]),
    "no_rope_layers": ("smollm3", None, {**SIX, "no_rope_layers": [1, 0, 1, 1, 0, 0]}, [1], [1, 1, 1, 0, 0]),
    "layers_block_type": ("nemotron_h", None, {}, [1], ["linear_attention", "full_attention", "mlp"]),
    "layer_rope_theta": (
        "granite_swa",
        None,
        {**SIX, "layer_rope_theta": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]},
        [1],
        [1.0, 3.0, 4.0, 5.0, 6.0],
    ),
    "indexer_types": (
        "glm_moe_dsa",
        None,
        {**SIX, "indexer_types": ["full", "shared", "full", "shared", "shared", "full"]},
        [3],
        ["full", "shared", "full", "shared", "full"],
    ),
    "num_attention_heads_per_layer": (
        "laguna",
        None,
        {**SIX, "num_attention_heads_per_layer": [4, 8, 4, 2, 8, 4]},
        [1],
        [4, 4, 2, 8, 4],
    ),
    "activation_sparsity_pattern": (
        "gemma3n_text",
        None,
        {"num_hidden_layers": 5, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.1, 0.2, 0.3, 0.4, 0.5]},
        [1],
        [0.1, 0.3, 0.4, 0.5],
    ),
    "intermediate_size": (
        "gemma3n_text",
        None,
        {"num_hidden_layers": 5, "num_kv_shared_layers": 0, "intermediate_size": [1, 2, 3, 4, 5]},
        [1],
        [1, 3, 4, 5],
    ),
    # Lists in Hunyuan's own files.
    "num_experts": ("llama", None, {**SIX, "num_experts": [1, 2, 3, 4, 5, 6]}, [1], [1, 3, 4, 5, 6]),
    "num_shared_expert": (
        "hunyuan_v1_moe",
        None,
        {**SIX, "num_shared_expert": [1, 2, 1, 2, 2, 1]},
        [1],
        [1, 1, 2, 2, 1],
    ),
    "moe_topk": ("hunyuan_v1_moe", None, {**SIX, "moe_topk": [1, 2, 1, 2, 2, 1]}, [1], [1, 1, 2, 2, 1]),
    "moe_intermediate_size": (
        "hunyuan_v1_moe",
        None,
        {**SIX, "moe_intermediate_size": [1, 2, 3, 4, 5, 6]},
        [1],
        [1, 3, 4, 5, 6],
    ),
    "attention_layers": (
        "gpt_neo",
        None,
        {"num_layers": 6, "attention_types": PAIRS},
        [1],
        ["global", "global", "local", "global", "local"],
    ),
    "attention_types": (
        "gpt_neo",
        None,
        {"num_layers": 6, "attention_types": PAIRS},
        [1, 4],
        [[["global"], 1], [["global"], 1], [["local"], 1], [["local"], 1]],
    ),
    "attention_window": (
        "led",
        "encoder",
        {"encoder_layers": 6, "attention_window": [2, 4, 6, 8, 10, 12]},
        [1],
        [2, 6, 8, 10, 12],
    ),
    "sliding_windows": (
        "moonshine_streaming",
        "encoder",
        {
            "decoder_layers": 6,
            "encoder_config": {**SIX, "sliding_windows": [[16, 4], [16, 3], [16, 2], [16, 1], [16, 0], [8, 0]]},
        },
        [1],
        [[16, 4], [16, 2], [16, 1], [16, 0], [8, 0]],
    ),
    "kv_source_layers": (
        "mistral_large4",
        None,
        {"text_config": {**SIX, "kv_source_layers": [0, 1, 2, 2, 2, 5]}},
        [1],
        [0, 1, 1, 1, 4],
    ),
    "moe_layers": ("llama4_text", None, {**SIX, "moe_layers": [1, 2, 4]}, [1], [1, 3]),
    "mlp_only_layers": ("qwen2_moe", None, {**SIX, "mlp_only_layers": [1, 3, 5]}, [1], [2, 4]),
    "full_attn_idxs": ("lfm2", None, {**SIX, "full_attn_idxs": [1, 4]}, [1], [3]),
    "attn_layer_indices": ("bamba", None, {**SIX, "attn_layer_indices": [1, 4]}, [1], [3]),
    "cross_attention_layers": ("mllama", None, {"text_config": {**SIX, "cross_attention_layers": [1, 4]}}, [1], [3]),
    "rope_scaling_layers": ("molmo2", None, {"text_config": {**SIX, "rope_scaling_layers": [1, 3]}}, [1], [2]),
    "ple_layer_ids": ("qwen4_exp_text", None, {**SIX, "eos_token_id": 2, "ple_layer_ids": [2, 5, 6]}, [1], [4, 5]),
    "per_layer_config": ("gemma4_text", None, SIX, [1], {"4": {"head_dim": 512}}),
    "num_blocks": ("xlstm", None, {"num_hidden_layers": 6, "num_blocks": 6}, [1], 5),
    "num_hidden_groups": ("albert", None, {**SIX, "num_hidden_groups": 6}, [1], 5),
    "first_k_dense_replace": ("deepseek_v3", None, SIX, [1], 2),
    "num_dense_layers": ("lfm2_moe", None, {}, [1], 1),
    "max_window_layers": ("qwen2", None, {**SIX, "max_window_layers": 3, "use_sliding_window": True}, [1], 2),
    "moe_layer_start_index": ("ernie4_5_moe", None, {**SIX, "moe_layer_start_index": 3}, [1], 2),
    "moe_layer_end_index": ("ernie4_5_moe", None, {**SIX, "moe_layer_end_index": 4}, [1, 5], 3),
    "num_kv_shared_layers": ("gemma3n_text", None, {"num_hidden_layers": 10, "num_kv_shared_layers": 3}, [8], 2),
    "n_input_layers": ("dory", None, {}, [1, 9, 30], 7),
    "n_recurrent_layers": ("dory", None, {}, [1, 9, 30], 19),
    "n_output_layers": ("dory", None, {}, [1, 9, 30], 7),
    "block_types": (
        "recurrent_gemma",
        None,
        SIX,
        [1],
        ["recurrent", "attention", "recurrent", "recurrent", "attention"],
    ),
    "decoder_sparse_step": ("qwen2_moe", None, {**SIX, "decoder_sparse_step": 2}, [3], 1),
    "scale_depth": ("minicpm3", None, {**SIX, "scale_depth": 1.4}, [1], 1.4 * (5 / 6) ** 0.5),
}
# Periods without a list: a removal that they cannot follow, and one that they can.
PERIODS: dict[str, tuple[str, str | None, dict[str, Any], list[int], list[int]]] = {
    "encoder_sparse_step": ("nllb-moe", "encoder", {"encoder_layers": 6, "encoder_sparse_step": 2}, [1], [2, 3]),
    "moe_layer_interval": (
        "ernie4_5_moe",
        None,
        {**SIX, "moe_layer_interval": 2, "moe_layer_start_index": 0},
        [3],
        [2, 3],
    ),
    "attn_layer_period": ("jamba", None, {}, [1], list(range(8, 16))),
    "expert_layer_period": ("jamba", None, {"attn_layer_period": 1, "attn_layer_offset": 0}, [1], [2, 3]),
}


def test_the_table_is_read_once_into_values() -> None:
    assert isinstance(table(), Table)
    assert table() is table()
    with pytest.raises(AttributeError):
        table().families = frozenset()
    rows = (*table().constraints, *table().uncached, *table().fields.values())
    assert all(isinstance(row.model_types, tuple) for row in rows), "a list in a frozen value"
    assert all(isinstance(row.values, tuple) for row in table().constraints)


def test_families_are_those_that_the_suite_proves() -> None:
    # The whole list is held to the sweep's outcome by `test_architectures_page.py`.
    assert table().families > set(FAMILIES)
    assert len(FAMILIES) == 16


def test_rows_name_known_rules_and_all_rules_are_used() -> None:
    assert {row.rule for row in table().fields.values()} == set(RULES)
    assert {row.rule for row in table().constraints} == set(CONSTRAINTS)
    assert {row.rule for row in table().uncached} == {"uncached"}
    for row in table().fields.values():
        assert row.stack in ("encoder", "decoder"), row.name
        assert row.offset_field is None or row.rule in ("must_match", "count_between"), row.name
        assert (row.shift == 0 and row.list_field is None) or row.rule == "must_match", row.name
        assert row.base == 0 or row.rule == "renumber", row.name
        assert row.list_field is None or row.list_field in table().fields, row.name


@pytest.mark.parametrize("row", [*table().constraints, *table().uncached], ids=lambda row: row.reason[:30])
def test_constraints_say_about_what_and_why(row: Constraint) -> None:
    assert row.model_types or row.field or row.root_field
    assert row.reason and not row.reason.endswith("."), "the message goes on behind it"
    assert row.stack in (None, "encoder", "decoder")
    assert not row.values or row.rule in ("keep_other", "last_is", "nearest", "refuse")


@newest
def test_rows_name_registered_model_types() -> None:
    rows = (*table().constraints, *table().uncached)
    named = {model_type for row in rows for model_type in row.model_types}
    assert named | table().families | table().zero_padding | set(table().counts) <= set(CONFIG_MAPPING)


# Constraints


@newest
@pytest.mark.parametrize(("row", "model_type"), ROWS, ids=lambda value: value if isinstance(value, str) else None)
def test_every_constraint_is_reached(row: Constraint, model_type: str | None) -> None:
    if model_type is None:
        name, fields, removed = BY_FIELD[row.field or row.root_field]
    else:
        name, fields, removed = model_type, GIVEN.get((row.rule, model_type), {}), BREAKING[row.rule]
    layout = layout_of(name, row.stack, **fields)
    plan = removal(layout, [block % layout.num_blocks for block in removed])
    with pytest.raises(UnsupportedModelError, match=f"'{name}'.*{re.escape(row.reason)}"):
        layout.check(plan)


@newest
@pytest.mark.parametrize("row", table().uncached, ids=lambda row: row.field or row.model_types[0])
def test_every_type_without_an_exact_cache_is_reached(row: Constraint) -> None:
    for model_type in row.model_types or ("deepseek_v32",):
        assert layout_of(model_type).uncached() == row.reason
    assert layout_of("llama").uncached() is None


# Fields


def test_every_field_has_its_example() -> None:
    assert set(FOLLOWS) | set(PERIODS) == set(table().fields)
    assert not set(FOLLOWS) & set(PERIODS)


@newest
@pytest.mark.parametrize("name", FOLLOWS)
def test_every_field_follows(name: str) -> None:
    model_type, stack, fields, removed, expected = FOLLOWS[name]
    assert changes(model_type, removed, stack, **fields)[name] == expected


@newest
@pytest.mark.parametrize("name", PERIODS)
def test_every_period_is_kept(name: str) -> None:
    model_type, stack, fields, removed, whole = PERIODS[name]
    with pytest.raises(UnsupportedModelError, match=f"'{model_type}'.*'{name}=[0-9]+'.*groups of [0-9]+ consecutive"):
        changes(model_type, removed, stack, **fields)
    layout = layout_of(model_type, stack, **fields)
    found = layout.changes(removal(layout, whole))
    assert found.pop(layout.count_field) == layout.num_blocks - len(whole)
    assert name not in found


@newest
def test_depths_under_other_names() -> None:
    for model_type, names in table().counts.items():
        for stack, name in names.items():
            layout = layout_of(model_type, stack)
            assert layout.count_field == name
            assert layout.changes(removal(layout, [1])) == {name: layout.num_blocks - 1}
