# SPDX-License-Identifier: Apache-2.0
"""What vLLM and llama.cpp assume about blocks, decided from configurations alone."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pytest
from families import tiny_model
from transformers import CONFIG_MAPPING

from optimum_blockprune import PruningPlan
from optimum_blockprune.runtimes import RuntimeRule, read_alike, runtime_facts


SLIDING, FULL = "sliding_attention", "full_attention"
EVERY_SIXTH = [SLIDING] * 5 + [FULL]
EVERY_FOURTH = [SLIDING] * 3 + [FULL]
MIXED = {"layer_types": [FULL, SLIDING]}
QUERIES = {"query_pre_attn_scalar": 8, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 8}
WINDOW = {"sliding_window": 4, "max_position_embeddings": 128}
NO_WINDOW = {"sliding_window": None, "max_position_embeddings": 128}
# One configuration for every type that a rule speaks of, which every runtime that knows the type reads alike.
ALIKE: dict[str, dict[str, Any]] = {
    "gpt_oss": {"layer_types": [SLIDING, FULL] * 2},
    "llama4_text": {
        "num_hidden_layers": 8,
        "layer_types": (["chunked_attention"] * 3 + [FULL]) * 2,
        "no_rope_layers": [1, 1, 1, 0] * 2,
        "moe_layers": [1, 3, 5, 7],
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8192,
    },
    "qwen2": {"layer_types": [FULL] * 4},
    "qwen3": {"layer_types": [FULL] * 4},
    "qwen2_moe": {"layer_types": [FULL] * 4, "mlp_only_layers": [], "decoder_sparse_step": 1},
    "qwen3_moe": {"mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True, **NO_WINDOW},
    "exaone4": {"num_hidden_layers": 64, "layer_types": EVERY_FOURTH * 16, "sliding_window": 4},
    "deepseek_v2": {"num_hidden_layers": 27, "q_lora_rank": None, "vocab_size": 96},
    "deepseek_v3": {"num_hidden_layers": 50, "q_lora_rank": 8, "moe_layer_freq": 1},
    "gpt2": {"scale_attn_by_inverse_layer_idx": False, "n_ctx": 128},
    "gpt_neox": {"rotary_pct": 0.25},
    "gemma2": {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, **QUERIES},
    "gemma3_text": {"num_hidden_layers": 12, "layer_types": EVERY_SIXTH * 2, "sliding_window": 4, **QUERIES},
    "cohere2": {"layer_types": EVERY_FOURTH * 2, "rotary_pct": 1.0},
    "afmoe": {"layer_types": EVERY_FOURTH * 2},
    "laguna": {
        "layer_types": [FULL, SLIDING, SLIDING, SLIDING],
        "sliding_window": 4,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "cohere2_moe": {"mlp_layer_types": ["dense", "sparse"]},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0, 1], "layer_types": [FULL] * 5},
    "baichuan": {"num_hidden_layers": 40, "hidden_size": 5120},
    "mistral": NO_WINDOW,
    "mixtral": NO_WINDOW,
    "phi3": NO_WINDOW,
    "starcoder2": NO_WINDOW,
    "falcon": {"alibi": False, "parallel_attn": True, "new_decoder_architecture": False, "multi_query": True}
    | {"num_kv_heads": 1},
}
# Per runtime and type one change for every rule, in the rules' order, that breaks this rule.
BREAKING: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("vllm", "gpt_oss"): [{"layer_types": [FULL, SLIDING]}],
    ("vllm", "llama4_text"): [{"moe_layers": [0, 2, 4, 6]}],
    ("vllm", "qwen2"): [MIXED],
    ("vllm", "qwen3"): [MIXED],
    ("vllm", "qwen2_moe"): [MIXED],
    ("vllm", "exaone4"): [{"layer_types": [FULL] * 64}],
    ("vllm", "deepseek_v2"): [{"moe_layer_freq": 2}],
    ("vllm", "deepseek_v3"): [{"moe_layer_freq": 2}],
    ("vllm", "gpt2"): [{"scale_attn_by_inverse_layer_idx": True}],
    ("llama.cpp", "gemma2"): [{"layer_types": [FULL, SLIDING]}, {"num_hidden_layers": 46}],
    ("llama.cpp", "gpt_oss"): [{"layer_types": [SLIDING, SLIDING]}],
    ("llama.cpp", "gemma3_text"): [{"layer_types": [SLIDING, FULL]}, {"num_hidden_layers": 62}],
    ("llama.cpp", "cohere2"): [{"layer_types": [FULL, SLIDING]}, {"rotary_pct": None}],
    ("llama.cpp", "afmoe"): [{"layer_types": [FULL, SLIDING]}],
    ("llama.cpp", "laguna"): [{"layer_types": [SLIDING, FULL]}, {"mlp_layer_types": ["sparse", "dense"]}],
    ("llama.cpp", "cohere2_moe"): [{"mlp_layer_types": ["sparse", "dense"]}],
    ("llama.cpp", "smollm3"): [{"no_rope_layers": [1, 1, 0]}, MIXED],
    ("llama.cpp", "llama4_text"): [
        {"layer_types": [FULL, "chunked_attention"]},
        {"no_rope_layers": [0, 1]},
        {"moe_layers": [0, 2]},
        {"attention_chunk_size": 16},
    ],
    ("llama.cpp", "baichuan"): [{"num_hidden_layers": 32}],
    ("llama.cpp", "deepseek_v2"): [{"num_hidden_layers": 25}],
    ("llama.cpp", "deepseek_v3"): [{"num_hidden_layers": 27}],
    ("llama.cpp", "exaone4"): [{"num_hidden_layers": 60}],
    ("llama.cpp", "qwen2_moe"): [{"mlp_only_layers": [0]}, MIXED],
    ("llama.cpp", "qwen3_moe"): [{"decoder_sparse_step": 2}, WINDOW, {"norm_topk_prob": False}],
    ("llama.cpp", "qwen2"): [MIXED],
    ("llama.cpp", "qwen3"): [MIXED],
    ("llama.cpp", "mistral"): [WINDOW],
    ("llama.cpp", "mixtral"): [WINDOW],
    ("llama.cpp", "phi3"): [WINDOW],
    ("llama.cpp", "starcoder2"): [WINDOW],
    ("llama.cpp", "gpt2"): [{"scale_attn_by_inverse_layer_idx": True}, {"n_ctx": None}],
    ("llama.cpp", "gpt_neox"): [{"rotary_pct": None}],
    ("llama.cpp", "falcon"): [{"num_kv_heads": 71}],
}
CASES = [
    (facts.name, model_type, index, rule)
    for facts in runtime_facts()
    for model_type in sorted({name for rule in facts.rules for name in rule.model_types})
    for index, rule in enumerate(facts.rules_for(model_type))
]


def verdicts(model_type: str, **fields: Any) -> dict[str, str]:
    """Only the verdicts, by runtime."""
    return {name: verdict.verdict for name, verdict in read_alike({"model_type": model_type, **fields}).items()}


@pytest.mark.parametrize(
    ("runtime", "model_type", "index", "rule"), CASES, ids=[f"{case[0]}-{case[1]}-{case[2]}" for case in CASES]
)
def test_every_rule_accepts_and_rejects(runtime: str, model_type: str, index: int, rule: RuntimeRule) -> None:
    alike = {"model_type": model_type, **ALIKE[model_type]}
    broken = {**alike, **BREAKING[runtime, model_type][index]}
    assert rule.holds(alike) is True
    assert rule.holds(broken) is False
    assert read_alike(alike)[runtime].verdict == "same"
    verdict = read_alike(broken)[runtime]
    assert verdict.verdict == "differs"
    assert rule.reason in verdict.reason


def test_the_examples_cover_every_row() -> None:
    facts = {entry.name: entry for entry in runtime_facts()}
    assert set(BREAKING) == {(runtime, model_type) for runtime, model_type, _, _ in CASES}
    for (runtime, model_type), changes in BREAKING.items():
        assert len(changes) == len(facts[runtime].rules_for(model_type))


def test_rows_do_not_contradict_each_other() -> None:
    for facts in runtime_facts():
        ruled = {name for rule in facts.rules for name in rule.model_types}
        assert not ruled & facts.as_written
        assert not ruled & set(facts.unread)
        assert not facts.as_written & set(facts.unread)


def test_model_types_exist() -> None:
    for facts in runtime_facts():
        named = {name for rule in facts.rules for name in rule.model_types} | facts.as_written | set(facts.unread)
        # Baichuan lives outside transformers.
        assert named - set(CONFIG_MAPPING) <= {"baichuan"}


def test_types_read_as_written_are_the_same_whatever_they_say() -> None:
    for facts in runtime_facts():
        for model_type in facts.as_written:
            assert verdicts(model_type)[facts.name] == "same"


def test_unread_types_are_unknown_with_their_reason() -> None:
    for facts in runtime_facts():
        for model_type, reason in facts.unread.items():
            verdict = read_alike({"model_type": model_type})[facts.name]
            assert (verdict.verdict, verdict.reason) == ("unknown", reason)


def test_file_has_the_version_that_the_reader_knows() -> None:
    data = json.loads(files("optimum_blockprune").joinpath("runtimes.json").read_text(encoding="utf-8"))
    assert data["format_version"] == 1
    assert list(data["runtimes"]) == ["vllm", "llama.cpp"]


def pruned_fields(family: str, num_blocks: int, removed: list[int], **overrides: Any) -> dict[str, Any]:
    """The final configuration of a really pruned model."""
    model = tiny_model(family, num_blocks, **overrides)
    if removed:
        PruningPlan.from_blocks(model, removed=removed).apply(model)
    return model.config.to_dict()


def test_llama_is_the_same_everywhere() -> None:
    assert verdicts(**pruned_fields("llama", 6, [1, 4])) == {"vllm": "same", "llama.cpp": "same"}


@pytest.mark.parametrize(
    ("removed", "verdict"), [([], "same"), ([0], "differs"), ([11], "same"), ([0, 1, 2, 3, 4, 5], "same")]
)
def test_gemma3_is_the_same_while_it_is_periodic(removed: list[int], verdict: str) -> None:
    periodic = {"layer_types": EVERY_SIXTH * 2, "query_pre_attn_scalar": 8}
    fields = pruned_fields("gemma3_text", 12, removed, **periodic)
    assert verdicts(**fields) == {"vllm": "same", "llama.cpp": verdict}


@pytest.mark.parametrize(("kept", "verdict"), [([1, 1, 1, 0, 1], "same"), ([1, 1, 1, 1], "differs")])
def test_smollm3_without_rotary_positions(kept: list[int], verdict: str) -> None:
    written = [*kept, 0]
    fields = pruned_fields("smollm3", len(written), [len(kept)], no_rope_layers=written)
    assert verdicts(**fields) == {"vllm": "same", "llama.cpp": verdict}


def test_gemma2_27b_loses_its_scale_in_llama_cpp() -> None:
    fields = {"layer_types": [SLIDING, FULL] * 23, "query_pre_attn_scalar": 144, "hidden_size": 4608}
    fields |= {"num_attention_heads": 32, "head_dim": 128}
    assert verdicts("gemma2", num_hidden_layers=46, **fields)["llama.cpp"] == "same"
    fields["layer_types"] = [SLIDING, FULL] * 22
    assert verdicts("gemma2", num_hidden_layers=44, **fields) == {"vllm": "same", "llama.cpp": "differs"}


def test_a_missing_list_is_unknown() -> None:
    assert verdicts("cohere2", rotary_pct=1.0)["llama.cpp"] == "unknown"
    assert verdicts("gpt_oss", layer_types=None) == {"vllm": "unknown", "llama.cpp": "unknown"}


def test_a_type_that_nobody_checked_is_unknown() -> None:
    found = read_alike({"model_type": "brand_new"})
    assert {verdict.verdict for verdict in found.values()} == {"unknown"}
    assert all("brand_new" in verdict.reason for verdict in found.values())
    assert read_alike({})["vllm"].verdict == "unknown"


def test_windows_that_no_input_reaches_do_not_count() -> None:
    fields = {"sliding_window": 4096, "max_position_embeddings": 2048}
    assert verdicts("mistral", **fields)["llama.cpp"] == "same"
    assert (
        verdicts("qwen3_moe", **{**ALIKE["qwen3_moe"], **WINDOW, "use_sliding_window": False})["llama.cpp"] == "same"
    )
