# SPDX-License-Identifier: Apache-2.0
"""The trial picks the order in which a fused tensor really holds its units, and refuses what cannot be cut exactly."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from families import block_list, tiny_config, tiny_model
from torch import Tensor, nn
from toys import assert_unchanged, snapshot
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from zoo import causal, other_stacks

from optimum_blockprune.blocks import BlockStack, find_blocks
from optimum_blockprune.errors import UnsupportedModelError
from optimum_blockprune.narrowing import narrow, units_off
from optimum_blockprune.trial import decided, usable_units
from optimum_blockprune.units import Found, find_units
from optimum_blockprune.widths import LAYOUTS, CutAttribute, CutTensor, UnitGroup


def parts_of(group: UnitGroup, tensor: str) -> tuple[int, ...]:
    return {cut.name: cut.parts for cut in group.tensors}[tensor]


def found_in(model: PreTrainedModel, family: str) -> tuple[BlockStack, Found]:
    stack = find_blocks(model)
    (found,), _ = find_units(stack, family)
    return stack, found


class TakingTurns(Phi3MLP):
    """Gate and up channel by channel in one tensor, as GPT-OSS has them."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        both = self.gate_up_proj(hidden_states)
        return self.down_proj(both[..., 1::2] * self.activation_fn(both[..., 0::2]))


class Reversed(Phi3MLP):
    """The first gate belongs to the last channel: no order of the table."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate.flip(-1)))


class Normed(Phi3MLP):
    """Divides by the size of all channels together, before the writer."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        inner = up * self.activation_fn(gate)
        return self.down_proj(inner / inner.norm(dim=-1, keepdim=True))


def phi3_with(kind: type[nn.Module], blocks: int = 2) -> PreTrainedModel:
    """Other MLPs on the same tensors."""
    model = tiny_model("phi3", blocks)
    for block in block_list(model):
        block.mlp.__class__ = kind
    return model


# The right order


@pytest.mark.parametrize("kind", [Phi3MLP, TakingTurns])
def test_order_of_gate_and_up(kind: type[nn.Module]) -> None:
    stack, found = found_in(phi3_with(kind), "mlp")
    right = {Phi3MLP: (1, 1), TakingTurns: (2,)}[kind]
    assert len(found.candidates) == 2
    for candidates in (found.candidates, found.candidates[::-1]):
        group = decided(stack, Found(candidates, found.blocks))
        assert parts_of(group, "mlp.gate_up_proj.weight") == right and group in found.candidates


@pytest.mark.parametrize("kv", [2, 4])
def test_order_of_q_k_and_v(kv: int) -> None:
    stack, found = found_in(tiny_model("phi3", 2, num_key_value_heads=kv), "attention")
    assert len(found.candidates) > 1
    for candidates in (found.candidates, found.candidates[::-1]):
        group = decided(stack, Found(candidates, found.blocks))
        assert parts_of(group, "self_attn.qkv_proj.weight") == (32 // kv, 8, 8)


@pytest.mark.parametrize(
    ("family", "tensor", "right"),
    [
        ("gpt2", "attn.c_attn.weight", (8, 8, 8)),
        ("gpt_neox", "attention.query_key_value.weight", (24,)),
    ],
)
def test_order_without_a_configuration_field(family: str, tensor: str, right: tuple[int, ...]) -> None:
    (group,), blocks = usable_units(find_blocks(tiny_model(family, 2)), ("attention",), "per_layer")
    assert parts_of(group, tensor) == right and blocks == ((0, 1),)


def test_modules_that_look_their_heads_up_get_a_configuration_of_their_own() -> None:
    """Phi-3 splits its fused tensor by the heads that the configuration says, Llama by the size of a head."""
    for family, expected in (("phi3", True), ("llama", False)):
        stack, found = found_in(tiny_model(family, 2), "attention")
        assert decided(stack, found).reads_config is expected


# Several groups and several kinds of blocks


def test_both_families_with_their_blocks() -> None:
    groups, blocks = usable_units(find_blocks(tiny_model("llama", 3)))
    assert [group.writer for group in groups] == ["mlp.down_proj", "self_attn.o_proj"]
    assert blocks == ((0, 1, 2), (0, 1, 2))
    groups, blocks = usable_units(find_blocks(tiny_model("llama", 3)), ("attention",))
    assert [group.family for group in groups] == ["attention"] and blocks == ((0, 1, 2),)


def test_kinds_of_blocks_with_equal_units_are_one_group() -> None:
    """Sliding and full attention."""
    model = tiny_model("gemma2", 3)
    groups, blocks = usable_units(find_blocks(model))
    assert len(groups) == 2 and blocks == ((0, 1, 2), (0, 1, 2))


def test_kinds_of_blocks_with_other_units_are_others() -> None:
    groups, blocks = usable_units(find_blocks(causal.tiny_model("qwen2_moe", 4)), ("mlp",))
    assert {group.writer: each for group, each in zip(groups, blocks, strict=True)} == {
        "mlp.down_proj": (1,),
        "mlp.shared_expert.down_proj": (0, 2, 3),
    }


@pytest.mark.parametrize("kind", [Reversed, Normed])
def test_one_kind_that_cannot_be_cut(kind: type[nn.Module]) -> None:
    """One field speaks for all blocks, so that they must all be able; of their own they need not."""
    model = tiny_model("phi3", 3)
    mlp = block_list(model)[1].mlp
    mlp.__class__, mlp.trait = kind, 1
    for block in (block_list(model)[0], block_list(model)[2]):
        block.mlp.trait = 0
    # The empty models know nothing of the trait: the kinds are those of the live blocks.
    stack = find_blocks(model)
    (found,), _ = find_units(stack, "mlp")
    with pytest.raises(UnsupportedModelError, match="none of the possible orders of its tensors"):
        decided(stack, replace(found, blocks=(1,)))
    assert decided(stack, replace(found, blocks=(0, 2))).writer == "mlp.down_proj"


# Refusals


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [Reversed, Normed])
def test_no_order_is_right(kind: type[nn.Module], layout: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        usable_units(find_blocks(phi3_with(kind)), ("mlp",), layout)
    message = str(caught.value)
    assert message.startswith(
        "Model type 'phi3': its MLP channels cannot be cut exactly: Model type 'phi3': the units of 'mlp.down_proj' "
        "cannot be cut out exactly: none of the possible orders of its tensors gives what the block computes with the "
        "units switched off"
    )
    assert "Prune another family (strategy option families), or whole blocks." in message
    assert ("Layout 'per_layer' may hold" in message) == (layout == "uniform")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_norm_over_all_heads_is_named(layout: str) -> None:
    with pytest.raises(UnsupportedModelError, match="'self_attn.[kq]_norm' normalises all of them together"):
        usable_units(find_blocks(tiny_model("olmo2", 2)), ("attention",), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_that_the_table_refuses(layout: str) -> None:
    reasons = {
        "bloom": (find_blocks(tiny_model("bloom", 2)), "Model type 'bloom'", "ALiBi gives every head a slope"),
        "falcon": (find_blocks(tiny_model("falcon", 2, alibi=True)), "Model type 'falcon'", "ALiBi gives every head"),
        "t5": (
            find_blocks(other_stacks.tiny_model("t5", 2, 2), "encoder"),
            r"Model type 't5' \(encoder\)",
            "the relative position bias has one column per head",
        ),
    }
    for stack, subject, reason in reasons.values():
        with pytest.raises(
            UnsupportedModelError, match=f"^{subject}: its attention heads cannot be cut exactly: {reason}"
        ):
            usable_units(stack, ("mlp", "attention") if layout == "per_layer" else ("attention",), layout)


def test_one_unit_cannot_go() -> None:
    one = tiny_model("llama", 2, num_attention_heads=1, num_key_value_heads=1)
    with pytest.raises(UnsupportedModelError, match="its configuration has no field for their number. Prune another"):
        usable_units(find_blocks(one), ("attention",))
    with pytest.raises(UnsupportedModelError, match="the units of 'self_attn.o_proj' are one only"):
        usable_units(find_blocks(one), ("attention",), "per_layer")


def test_blocks_that_are_narrow_already() -> None:
    stack, found = found_in(tiny_model("llama", 2), "mlp")
    mlp = stack.blocks[0].mlp
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight[:40].clone())
    with pytest.raises(UnsupportedModelError, match="'mlp.down_proj' are fewer already than its configuration says"):
        decided(stack, found)


def test_weights_that_lie_elsewhere() -> None:
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_config("llama", 2))
    offloaded = tiny_model("llama", 2)
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="cannot be tried, since the model has no weights"):
        usable_units(find_blocks(empty))
    assert usable_units(find_blocks(offloaded)) == usable_units(find_blocks(tiny_model("llama", 2)))
    assert {parameter.device.type for parameter in offloaded.parameters()} == {"meta"}


def test_what_is_right_for_one_choice_only_is_not_right() -> None:
    """Query heads alone, K and V whole: of heads 1 and 2, each has a KV head of its own by accident."""
    stack, found = found_in(tiny_model("llama", 2), "attention")
    (group,) = found.candidates
    single = replace(
        group,
        unit="head",
        units=4,
        tensors=(CutTensor("self_attn.o_proj.weight", 1, (8,)), CutTensor("self_attn.q_proj.weight", 0, (8,))),
        attributes=(CutAttribute("self_attn", "num_key_value_groups", 0, 1),),
    )
    block, hidden = stack.blocks[0].self_attn, torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    turn = stack.model.model.rotary_emb(hidden, torch.arange(5)[None])
    for kept, right in (((1, 2), True), ((0, 1), False)):
        with torch.no_grad(), units_off(stack.blocks[0], [(single, kept)]):
            truth = block(hidden, position_embeddings=turn, attention_mask=None)[0]
        twin = copy.deepcopy(stack.blocks[0])
        narrow(twin, single, kept, 2, setattr)
        with torch.no_grad():
            output = twin.self_attn(hidden, position_embeddings=turn, attention_mask=None)[0]
        assert torch.allclose(output, truth, atol=1e-5) == right
    with pytest.raises(UnsupportedModelError, match="cannot be cut out exactly"):
        decided(stack, Found((single,), found.blocks))


def test_what_a_norm_behind_the_writer_hides_is_seen() -> None:
    """The block alone is as it should be: the norm divides the wrong scale out again."""

    class Scaled(Phi3MLP):
        def forward(self, hidden_states: Tensor) -> Tensor:
            gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
            inner = up * self.activation_fn(gate)
            output = self.down_proj(inner * inner.shape[-1])
            return output / output.norm(dim=-1, keepdim=True)

    stack, found = found_in(phi3_with(Scaled), "mlp")
    with pytest.raises(UnsupportedModelError, match="none of the possible orders"):
        decided(stack, found)


# The model stays as it is


@pytest.mark.parametrize(
    ("family", "layout"),
    [("llama", "uniform"), ("phi3", "per_layer"), ("gpt2", "padded"), ("olmo2", "uniform"), ("bloom", "per_layer")],
)
def test_the_model_is_untouched(family: str, layout: str) -> None:
    model = tiny_model(family, 2).train()
    block_list(model)[0].mlp.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    parameters = [id(parameter) for parameter in model.parameters()]
    before = snapshot(model)
    refused = False
    try:
        usable_units(find_blocks(model), layout=layout)
    except UnsupportedModelError:
        refused = True
    assert refused == (family in ("olmo2", "bloom"))
    assert_unchanged(model, before)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_dropout_does_not_matter() -> None:
    """GPT-2 drops a tenth of what its attention gives, while it is trained."""
    model = tiny_model("gpt2", 2, resid_pdrop=0.5, attn_pdrop=0.5)
    expected = usable_units(find_blocks(model), layout="per_layer")
    assert usable_units(find_blocks(model.train()), layout="per_layer") == expected
    assert all(module.training for module in model.modules())


def test_no_hook_is_left_when_a_block_fails() -> None:
    model = tiny_model("llama", 2)
    stack, found = found_in(model, "mlp")

    class Broken(type(stack.blocks[0].mlp)):
        def forward(self, hidden_states: Tensor) -> Any:
            super().forward(hidden_states)
            raise ArithmeticError

    stack.blocks[0].mlp.__class__ = Broken
    before = snapshot(model)
    with pytest.raises((ArithmeticError, UnsupportedModelError)):
        decided(stack, found)
    assert_unchanged(model, before)
