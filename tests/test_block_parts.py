# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from families import block_list, tiny_model
from toys import assert_unchanged, snapshot
from transformers import PreTrainedModel

from optimum_blockprune.block_parts import PARALLEL, SEQUENTIAL, UNKNOWN, BlockParts, FeedForward, find_parts
from optimum_blockprune.blocks import find_blocks
from optimum_blockprune.trial import usable_units


def parts_of(model: PreTrainedModel, *families: str, flow: bool = True) -> dict[int, BlockParts]:
    stack = find_blocks(model)
    groups, places = usable_units(stack, families or ("mlp", "attention"), "per_layer")
    units: dict[int, list[Any]] = {}
    for group, blocks in zip(groups, places, strict=True):
        for block in blocks:
            units.setdefault(block, []).append(group)
    return find_parts(stack, units, flow=flow)


def name_in(model: PreTrainedModel, block: int, module: Any) -> str:
    return next(name for name, each in block_list(model)[block].named_modules() if each is module)


GATED = {
    # family: readers of gate and up, norm before them, activation
    "llama": (("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "mlp.act_fn"),
    "gemma2": (("mlp.gate_proj", "mlp.up_proj"), "pre_feedforward_layernorm", "mlp.act_fn"),
    "phi3": (("mlp.gate_up_proj", "mlp.gate_up_proj"), "post_attention_layernorm", "mlp.activation_fn"),
}
PLAIN = {
    "gpt2": ("mlp.c_fc", "ln_2"),
    "opt": ("fc1", "final_layer_norm"),
    "nemotron": ("mlp.up_proj", "post_attention_layernorm"),
}


@pytest.mark.parametrize("family", GATED)
@pytest.mark.parametrize("asked", ["attention", "both"])
def test_gated_ffns(family: str, asked: str) -> None:
    model = tiny_model(family, 2)
    readers, norm, activation = GATED[family]
    for block, parts in parts_of(model, *(("attention",) if asked == "attention" else ())).items():
        (ffn,) = parts.ffns
        assert parts.flow == SEQUENTIAL
        assert tuple(name_in(model, block, stream.reader) for stream in ffn.streams) == readers
        assert name_in(model, block, ffn.norm.module) == norm
        assert ffn.activation == block_list(model)[block].get_submodule(activation).forward
        assert ffn.product and not ffn.bare
        assert ffn.reading == "up" and ffn.up == ffn.streams[1:]


def test_halves_of_a_fused_reader() -> None:
    gate, up = parts_of(tiny_model("phi3", 1))[0].ffns[0].streams
    assert gate.entries.tolist() == list(range(48))
    assert up.entries.tolist() == list(range(48, 96))


@pytest.mark.parametrize("family", PLAIN)
def test_plain_ffns(family: str) -> None:
    model = tiny_model(family, 2)
    reader, norm = PLAIN[family]
    for block, parts in parts_of(model).items():
        (ffn,) = parts.ffns
        assert parts.flow == SEQUENTIAL
        assert name_in(model, block, ffn.streams[0].reader) == reader and len(ffn.streams) == 1
        assert name_in(model, block, ffn.norm.module) == norm
        assert ffn.product and ffn.reading == "the only reader" and ffn.up == ffn.streams


@pytest.mark.parametrize("family", ["phi", "gpt_neox", "cohere", "falcon"])
def test_parallel_residual(family: str) -> None:
    assert {parts.flow for parts in parts_of(tiny_model(family, 2)).values()} == {PARALLEL}


def test_sequential_residual_of_the_same_class() -> None:
    model = tiny_model("gpt_neox", 2, use_parallel_residual=False)
    assert {parts.flow for parts in parts_of(model).values()} == {SEQUENTIAL}


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_norms_behind_writers(family: str) -> None:
    model = tiny_model(family, 2)
    for block, parts in parts_of(model).items():
        names = {writer: name_in(model, block, norm.module) for writer, norm in parts.posts.items()}
        assert names == {
            "self_attn.o_proj": "post_attention_layernorm",
            "mlp.down_proj": "post_feedforward_layernorm",
        }
        weight = block_list(model)[block].post_feedforward_layernorm.weight
        assert torch.equal(parts.ffns[0].post.gain, weight.detach().double() + 1)


def test_no_norm_behind_writers() -> None:
    assert all(not parts.posts for parts in parts_of(tiny_model("llama", 2)).values())


def test_an_ffn_that_reads_the_residual_stream_itself() -> None:
    (ffn,) = parts_of(tiny_model("exaone4", 1))[0].ffns
    assert ffn.bare and ffn.norm is None
    assert ffn.post is not None


def test_an_activation_that_is_no_module() -> None:
    """LFM2 writes `F.silu(w1(x)) * w3(x)`."""
    model = tiny_model("lfm2", 2)
    ffn = parts_of(model)[0].ffns[0]
    assert [name_in(model, 0, stream.reader) for stream in ffn.streams] == ["feed_forward.w1", "feed_forward.w3"]
    assert ffn.activation is torch.nn.functional.silu and ffn.product


def test_without_an_activation_gate_and_up_are_not_told_apart() -> None:
    ffn = parts_of(tiny_model("llama", 1))[0].ffns[0]
    blind = FeedForward(**{**vars(ffn), "activation": None})
    assert blind.up == blind.streams and blind.reading == "average of gate and up"


def test_an_unusual_activation_is_none_of_the_known() -> None:
    model = tiny_model("llama", 1)
    mlp = block_list(model)[0].mlp

    class Odd(type(mlp)):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(torch.sin(3 * self.gate_proj(x)) * self.up_proj(x))

    mlp.__class__ = Odd
    ffn = parts_of(model)[0].ffns[0]
    assert ffn.activation is None and not ffn.product


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_no_ffn(family: str) -> None:
    for parts in parts_of(tiny_model(family, 2), "attention").values():
        assert parts.flow == UNKNOWN and parts.ffns == ()


def test_a_block_that_norms_after_its_sum() -> None:
    """OPT-350m: the derivation does not hold."""
    model = tiny_model("opt", 2, do_layer_norm_before=False)
    assert {parts.flow for parts in parts_of(model).values()} == {UNKNOWN}


def test_the_flow_is_not_looked_at_in_vain() -> None:
    (parts,) = parts_of(tiny_model("llama", 1), "attention", flow=False).values()
    assert parts == BlockParts({}, (), UNKNOWN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = tiny_model("gemma2", 2).to(dtype)
    for parts in parts_of(model).values():
        (ffn,) = parts.ffns
        assert parts.flow == SEQUENTIAL and len(parts.posts) == 2
        assert ffn.reading == "up" and ffn.product and ffn.norm is not None


def test_nothing_is_changed() -> None:
    model = tiny_model("gemma2", 2).train()
    before = snapshot(model)
    parts_of(model)
    assert_unchanged(model, before)
