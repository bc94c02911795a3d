# SPDX-License-Identifier: Apache-2.0
"""Makes any configuration class tiny: by the names of its fields first, by hand-written overrides after that."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig


VOCABULARY = 96
HIDDEN = 32

# The first pattern that matches the whole name of an integer field gives its value.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"type_vocab_size|.*_token_id|.*_token_index|qk_head_dim", -1),
    (r".*vocab_size.*|.*_vocab", VOCABULARY),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq(uence)?_len(gth)?|max_(target|source)_positions", 128),
    (r"original_max_position_embeddings|context_length|model_max_length", 128),
    (r"(.*_)?hidden_size|n_embd|n_embed|d_model|dim|emb_dim|.*embedding_size|word_embed_proj_dim|d_embed", HIDDEN),
    (r"hidden_dim|embedding_dim|lru_width|.*_embed_dim|output_dim|input_dim|embed_dim", HIDDEN),
    (r".*intermediate_size|.*intermediate_size_mlp|.*ffn_dim|n_inner|d_ff|d_inner|.*ffn_hidden_size|dff", 48),
    (r"dim_ff|mlp_dim|feed_forward_size", 48),
    (r"(num_)?(.*_)?attention_heads|n_heads?|num_heads|.*_num_heads|.*_n_heads|num_query_groups", 4),
    (r"(.*_)?(num_key_value|num_kv|num_key)_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"conv1d_width", 4),
    (r".*head_dim|d_kv|attention_head_dim|dim_head|d_head|kv_channels|rotary_dim|.*head_size|mamba_headdim", 8),
    (r"(.*_)?sliding_window(_size)?|attention_window(_size)?|window_size|attention_chunk_size|local_attention", 4),
    (r"num_experts|(moe_)?num_(local_)?experts|n_routed_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_topk|top_k_experts|moe_top_k|moe_k", 2),
    (r"n_group|topk_group|num_expert_group|(.*_)?(n|num)_shared_experts", 1),
    (r"(kv|q|o)_lora_rank|o_groups", 8),
    (r"(.*_)?(n_groups|ngroups|num_groups)", 2),
    (r"index_topk", 4),
    (r"index_n_heads", 2),
    (r"(mamba_|ssm_)?(d_state|state_size)|time_step_rank|mamba_dt_rank", 8),
    (r"(mamba_)?chunk_size|block_size", 8),
    (r"(mamba_)?d_head|mamba_d_head", 8),
    (r"num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_layers|depth", 2),
    (r"num_nextn_predict_layers|num_mtp_layers", 0),
    (r".*_rank", 8),
)
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_fields(config_class: type[PretrainedConfig], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns constructor arguments for a tiny configuration: integer fields by name, then `overrides`.

    Only fields with a positive integer default are shrunk; everything else keeps the class's own default. Nested
    configurations become dictionaries that are shrunk in the same way, with the nested `overrides` on top.
    """
    stored = config_class().to_dict()
    fields = _shrunk(stored)
    fields.update({name: token for name, token in _TOKENS.items() if name in stored})
    fields.update(overrides)
    for name, sub_class in config_class.sub_configs.items():
        inner = overrides.get(name)
        if isinstance(stored.get(name), dict) or isinstance(inner, Mapping):
            fields[name] = _tiny_sub_config(sub_class, stored.get(name) or {}, inner or {})
    return fields


def _tiny_sub_config(sub_class: type[Any], stored: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    model_type = overrides.get("model_type", stored.get("model_type"))
    if sub_class is AutoConfig or "model_type" in overrides:
        sub_class = CONFIG_MAPPING[model_type]
    fields = tiny_fields(sub_class, overrides)
    return {**fields, "model_type": model_type} if model_type else fields


def _shrunk(stored: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in stored.items():
        if type(value) is not int or value <= 0:
            continue
        size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), -1)
        if size >= 0:
            fields[name] = size
    if "kv_lora_rank" in stored and "num_key_value_heads" in fields:
        # Latent attention has as many key heads as query heads, by definition.
        fields["num_key_value_heads"] = fields.get("num_attention_heads", 4)
    return fields
