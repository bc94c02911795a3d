# SPDX-License-Identifier: Apache-2.0
"""`check` says from a configuration alone what can go, what stays and why, and who reads the result."""

from __future__ import annotations

from typing import Any

import pytest
from families import tiny_config
from transformers import CONFIG_MAPPING, PretrainedConfig
from zoo import causal, multimodal, other_stacks

from optimum_blockprune.checking import Check, check_config
from optimum_blockprune.errors import PlanError, UnsupportedModelError


def named(config: PretrainedConfig, architecture: str) -> PretrainedConfig:
    config.architectures = [architecture]
    return config


def only(config: PretrainedConfig, **arguments: Any) -> Check:
    [check] = check_config(config, **arguments)
    return check


def test_a_plain_decoder_may_lose_any_block() -> None:
    check = only(tiny_config("llama"))
    assert check.prunable
    assert (check.model_type, check.class_name, check.stack, check.num_blocks) == (
        "llama",
        "LlamaForCausalLM",
        "decoder",
        5,
    )
    assert (check.search, check.removable, check.protected, check.evidence) == ("yes", (0, 1, 2, 3, 4), {}, "proven")
    assert set(check.units) == {"block", "half_block", "mlp", "attention"}
    assert check.units["half_block"].startswith("tried on the weights")
    assert {name: verdict["verdict"] for name, verdict in check.runtimes.items()} == dict.fromkeys(
        ("transformers", "vllm", "llama.cpp"), "same"
    )
    assert all(verdict["same_without"] == [0, 1, 2, 3, 4] for verdict in check.runtimes.values())


@pytest.mark.parametrize(
    "name, reason", [("doge", "block 0 holds weights outside its modules"), ("hrm_text", "found no list of 36 blocks")]
)
def test_halves_are_refused_where_an_empty_model_tells(name: str, reason: str) -> None:
    assert reason in only(causal.tiny_config(name)).units["half_block"]


def test_blocks_that_stay_have_reasons() -> None:
    check = only(named(multimodal.tiny_config("qwen3_vl"), "Qwen3VLForConditionalGeneration"))
    assert check.prunable and check.removable == tuple(range(len(check.protected), check.num_blocks))
    assert all("DeepStack" in reason for reason in check.protected.values())
    first = only(named(causal.tiny_config("modernbert-decoder"), "ModernBertDecoderForCausalLM"))
    assert set(first.protected) == {0} and "attention norm" in first.protected[0]


def test_choices_that_only_the_user_can_make() -> None:
    check = only(CONFIG_MAPPING["jamba"]())
    assert check.prunable and check.search != "yes"
    assert "attn_layer_period" in check.search
    assert check.removable == (31,) and not check.protected
    tail = only(causal.tiny_config("diffllama"))
    assert tail.removable == (5,) and "last blocks" in tail.search


def test_named_blocks_are_checked_as_they_are() -> None:
    config = causal.tiny_config("gemma3_text")
    check = only(config, removed=[1, 3])
    assert check.prunable and check.removable == (1, 3)
    assert check.changes["num_hidden_layers"] == 4
    assert check.changes["layer_types"] == [config.layer_types[block] for block in (0, 2, 4, 5)]
    refused = only(causal.tiny_config("diffllama"), removed=[1])
    assert not refused.prunable and "'diffllama'" in refused.units["block"]
    with pytest.raises(PlanError, match="Block 9 does not exist"):
        only(config, removed=[9])


def test_llama_cpp_reads_another_pattern() -> None:
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 2
    config = CONFIG_MAPPING["gemma3_text"](num_hidden_layers=12, layer_types=kinds)
    check = only(config)
    assert check.runtimes["llama.cpp"]["verdict"] == "same"
    assert check.runtimes["llama.cpp"]["same_without"] == [11]
    pruned = only(config, removed=[2])
    assert pruned.runtimes["llama.cpp"]["verdict"] == "differs"
    assert "window" in pruned.runtimes["llama.cpp"]["reason"]
    assert pruned.runtimes["vllm"]["verdict"] == "same"


def test_both_stacks_of_an_encoder_decoder() -> None:
    config = named(other_stacks.tiny_config("bart"), "BartForConditionalGeneration")
    assert [check.stack for check in check_config(config)] == ["encoder", "decoder"]
    assert only(config, stack="encoder").num_blocks == 5
    with pytest.raises(UnsupportedModelError, match="no 'encoder' stack"):
        check_config(tiny_config("llama"), stack="encoder")


@pytest.mark.parametrize(
    ("model_type", "reason"), [("vit", "neither a language model"), ("xlm", "parallel lists"), ("zamba2", "position")]
)
def test_what_cannot_be_pruned_is_said(model_type: str, reason: str) -> None:
    check = only(CONFIG_MAPPING[model_type]())
    assert not check.prunable
    assert f"'{model_type}'" in check.units["block"] and reason in check.units["block"]


def test_the_cache_of_some_types_cannot_be_compared() -> None:
    assert only(causal.tiny_config("llama")).cache is None
    assert "selects tokens" in only(causal.tiny_config("glm_moe_dsa")).cache


def test_as_json() -> None:
    values = only(causal.tiny_config("modernbert-decoder")).to_dict()
    assert values["prunable"] is True
    assert list(values["protected"]) == ["0"]
