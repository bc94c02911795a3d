# SPDX-License-Identifier: Apache-2.0
"""The block list is found in every family, and models that are more than plain modules are refused."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, block_list, block_path, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForSequenceClassification
from zoo import multimodal, other_stacks

from optimum_blockprune.blocks import find_blocks, refuse_wrapped
from optimum_blockprune.errors import UnsupportedModelError


with warnings.catch_warnings():
    # Reads attributes of transformers that are deprecated, at import.
    warnings.simplefilter("ignore")
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer


LORA = peft.LoraConfig(r=2, target_modules=["q_proj"])
filter_peft = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_the_list(family: str) -> None:
    model = tiny_model(family)
    stack = find_blocks(model)
    assert stack.path == block_path(family)
    assert stack.blocks is block_list(model)
    assert stack.model is model
    assert len(stack) == 5


@pytest.mark.parametrize(
    "name", ["bert", "bert#bare", "modernbert", "bart", "t5", "t5gemma", "encoder-decoder", "whisper"]
)
def test_finds_the_list_of_each_stack(name: str) -> None:
    model = other_stacks.tiny_model(name)
    stacks = other_stacks.stacks(name)
    for stack in stacks:
        found = find_blocks(model, stack)
        assert found.blocks is other_stacks.block_list(name, model, stack)
        assert (found.path, found.layout.stack) == (other_stacks.SPECIMENS[name]["stacks"][stack]["path"], stack)
        assert len(found) == other_stacks.depth(name, stack)
    assert find_blocks(model).layout.stack == stacks[-1]


def test_stacks_of_one_depth_are_told_apart() -> None:
    model = other_stacks.tiny_model("bart", 5, 5)
    assert [find_blocks(model, stack).path for stack in ("encoder", "decoder")] == [
        "model.encoder.layers",
        "model.decoder.layers",
    ]


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl", "blip-2", "qwen2_audio"])
def test_finds_the_text_decoder_beside_towers_of_its_depth(name: str) -> None:
    model = multimodal.tiny_model(name)
    found = find_blocks(model)
    assert found.blocks is multimodal.block_list(name, model)
    assert found.path == multimodal.SPECIMENS[name]["path"]
    towers = {
        len(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not path.startswith(found.path)
    }
    assert towers
    for depth in towers:
        model = multimodal.tiny_model(name, depth)
        assert find_blocks(model).blocks is multimodal.block_list(name, model)


def test_a_stack_that_is_not_there_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="'llama' has no 'encoder' stack"):
        find_blocks(tiny_model("llama"), "encoder")


def test_lists_of_other_length_inside_the_blocks_do_not_confuse() -> None:
    model = tiny_model("llama")
    for block in model.model.layers:
        block.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
    assert find_blocks(model).path == "model.layers"


def test_towers_of_other_senses_are_left_alone() -> None:
    model = tiny_model("llama")
    model.vision_tower = nn.ModuleList(nn.Linear(500, 500) for _ in range(5))
    assert find_blocks(model).path == "model.layers"


def test_parallel_lists_are_refused() -> None:
    model = tiny_model("llama")
    model.model.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(5))
    with pytest.raises(UnsupportedModelError, match="'llama' spreads a block over parallel lists.*model.norms"):
        find_blocks(model)


def test_a_list_of_another_length_is_not_taken() -> None:
    model = tiny_model("llama")
    del model.model.layers[4]
    with pytest.raises(UnsupportedModelError, match="'llama': found no list of 5 blocks in LlamaForCausalLM"):
        find_blocks(model)


def test_one_block_at_several_depths_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[3] = model.model.layers[1]
    with pytest.raises(UnsupportedModelError, match="one block module at several depths"):
        find_blocks(model)


@filter_peft
def test_peft_model_is_refused_and_accepted_once_merged() -> None:
    inner = tiny_model("llama")
    wrapped = peft.get_peft_model(inner, LORA)
    for model in (wrapped, inner):
        with pytest.raises(UnsupportedModelError, match="'llama'.*PEFT.*merge_and_unload"):
            find_blocks(model)
    assert len(find_blocks(wrapped.merge_and_unload())) == 5


@filter_peft
def test_added_adapter_is_refused_even_when_deleted() -> None:
    # What `model.add_adapter` does, which asks for the newest PEFT.
    model = peft.inject_adapter_in_model(LORA, tiny_model("llama"), adapter_name="extra")
    with pytest.raises(UnsupportedModelError, match="PEFT"):
        find_blocks(model)
    # The adapter goes, its layers stay.
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        layer.delete_adapter("extra")
    with pytest.raises(UnsupportedModelError, match="PEFT"):
        find_blocks(model)


@pytest.mark.parametrize("mark", ["hf_quantizer", "is_quantized"])
def test_quantised_model_is_refused(mark: str) -> None:
    model = tiny_model("llama")
    setattr(model, mark, SimpleNamespace(quantization_config=None) if mark == "hf_quantizer" else True)
    model.quantization_method = SimpleNamespace(value="bitsandbytes")
    with pytest.raises(UnsupportedModelError, match=r"'llama' model is quantised \(bitsandbytes\).*dequantize\(\)"):
        find_blocks(model)


def test_compiled_model_is_refused() -> None:
    model = tiny_model("llama")
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(UnsupportedModelError, match="'llama' model is compiled.*_orig_mod"):
        find_blocks(compiled)
    assert len(find_blocks(compiled._orig_mod)) == 5


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), "llama", None])
def test_foreign_objects_are_refused(thing: object) -> None:
    with pytest.raises(
        UnsupportedModelError, match=f"Expected a transformers PreTrainedModel, got.*{type(thing).__name__}"
    ):
        refuse_wrapped(thing)


def test_model_without_a_language_model_head_is_refused() -> None:
    classifier = AutoModelForSequenceClassification.from_config(tiny_config("llama"))
    for model in (tiny_model("llama").model, classifier):
        with pytest.raises(UnsupportedModelError, match=rf"'llama' \({type(model).__name__}\).*AutoModelForCausalLM"):
            find_blocks(model)
