# SPDX-License-Identifier: Apache-2.0
"""Adapters go in, compute nothing new at first, are merged exactly, and leave no trace."""

from __future__ import annotations

import sys

import pytest
import torch
from accelerate import cpu_offload
from families import block_list, plain_logits, tiny_model
from torch import Tensor, nn
from toys import assert_unchanged, snapshot, toy_folder
from transformers.pytorch_utils import Conv1D

from optimum_blockprune.adapters import ADAPTER, Merge, adapted, merged_weights, require_peft, target_layers
from optimum_blockprune.blocks import BlockStack, find_blocks
from optimum_blockprune.errors import ConfigurationError, NonFiniteError, UnsupportedModelError
from optimum_blockprune.healing_spec import HealingSpec
from optimum_blockprune.loading import load_model


FAMILIES = ("llama", "gpt2", "gemma2", "mixtral", "bloom", "phi3")
SPEC = HealingSpec(rank=3, alpha=6.0)


def stirred(layers: dict[str, nn.Module]) -> None:
    """Lets the adapters do something."""
    generator = torch.Generator().manual_seed(3)
    for layer in layers.values():
        weight = layer.lora_B[ADAPTER].weight
        weight.data = torch.randn(weight.shape, generator=generator).to(weight) * 0.1


def stack_of(family: str) -> BlockStack:
    return find_blocks(tiny_model(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_computes_what_the_adapted_one_did(family: str, ids: Tensor) -> None:
    stack = stack_of(family)
    model, targets = stack.model, target_layers(stack)
    before, parameters = snapshot(model), dict(model.named_parameters())
    dense = plain_logits(model, ids)
    with adapted(stack, targets, SPEC) as layers:
        assert list(layers) == list(targets)
        assert torch.equal(plain_logits(model, ids), dense)
        learns = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert len(learns) == 2 * len(targets) and all(ADAPTER in name for name in learns)
        stirred(layers)
        live, values = plain_logits(model, ids), merged_weights(layers)
    assert_unchanged(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    merge = Merge()
    merge.put(values)
    assert not torch.allclose(live, dense, atol=1e-2)
    assert torch.allclose(plain_logits(model, ids), live, atol=1e-5 * dense.abs().max())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert set(map(id, values)) == {id(module.weight) for module in targets.values()}
    merge.undo()
    assert_unchanged(model, before)


def test_all_linear_layers_of_the_blocks_are_targets_and_nothing_else() -> None:
    for family, per_block in {"llama": 7, "gpt2": 4, "phi3": 4}.items():
        stack = stack_of(family)
        targets = target_layers(stack)
        assert len(targets) == per_block * len(stack)
        assert all(isinstance(module, (nn.Linear, Conv1D)) for module in targets.values())
        assert all(stack.blocks.get_submodule(name) is module for name, module in targets.items())


def test_targets_can_be_named() -> None:
    stack = stack_of("llama")
    assert set(target_layers(stack, ["q_proj", "mlp.up_proj"])) == {
        f"{block}.{name}" for block in range(len(stack)) for name in ("self_attn.q_proj", "mlp.up_proj")
    }
    with pytest.raises(ConfigurationError, match="called 'q_prj'. Did you mean 'q_proj'"):
        target_layers(stack, ["q_prj"])
    # The end of a name is no name.
    with pytest.raises(ConfigurationError, match="called 'proj'"):
        target_layers(stack, ["proj"])


def test_a_weight_that_is_used_twice_is_left_alone() -> None:
    stack = stack_of("llama")
    blocks = block_list(stack.model)
    blocks[1].mlp.up_proj = blocks[0].mlp.up_proj
    blocks[3].mlp.gate_proj.weight = blocks[2].mlp.gate_proj.weight
    names = set(target_layers(stack))
    assert not names & {"0.mlp.up_proj", "1.mlp.up_proj", "2.mlp.gate_proj", "3.mlp.gate_proj"}
    assert "2.mlp.up_proj" in names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_learns_in_float32_and_stays_what_it_is(dtype: torch.dtype) -> None:
    stack = find_blocks(tiny_model("llama").to(dtype))
    targets = target_layers(stack)
    learns = torch.float64 if dtype == torch.float64 else torch.float32
    with adapted(stack, targets, SPEC) as layers:
        assert {part.weight.dtype for layer in layers.values() for part in (layer.lora_A[ADAPTER],)} == {learns}
        stirred(layers)
        values = merged_weights(layers)
    assert {value.dtype for value in values.values()} == {dtype}


def test_a_failure_inside_leaves_no_trace() -> None:
    stack = stack_of("gpt2")
    stack.model.train()
    stack.blocks[1].eval()
    stack.blocks[2].requires_grad_(False)
    before = snapshot(stack.model)
    asked = [parameter.requires_grad for parameter in stack.model.parameters()]
    with pytest.raises(KeyboardInterrupt), adapted(stack, target_layers(stack), SPEC):
        raise KeyboardInterrupt
    assert_unchanged(stack.model, before)
    assert [parameter.requires_grad for parameter in stack.model.parameters()] == asked
    assert not hasattr(stack.blocks, "peft_config")


def test_an_adapter_that_is_not_finite_is_not_merged() -> None:
    stack = stack_of("llama")
    with adapted(stack, target_layers(stack), SPEC) as layers:
        layers["1.mlp.up_proj"].lora_A[ADAPTER].weight.data[0, 0] = float("nan")
        with pytest.raises(NonFiniteError, match="'1.mlp.up_proj'.*learning_rate"):
            merged_weights(layers)


def test_weights_that_are_elsewhere_cannot_be_trained(tmp_path) -> None:
    streamed = load_model(toy_folder(tmp_path / "toy"), stream=True)
    offloaded = cpu_offload(tiny_model("llama"))
    for model in (streamed, offloaded):
        with pytest.raises(UnsupportedModelError, match="offloaded or streamed"):
            target_layers(find_blocks(model))


def test_a_missing_peft_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    require_peft()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'optimum-blockprune\[heal\]'"):
        require_peft()
