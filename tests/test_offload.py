# SPDX-License-Identifier: Apache-2.0
"""Weights that are fetched are kept while a block is held, whoever attached the hooks, and not a moment longer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from families import block_list, plain_logits, tiny_model
from torch import Tensor, nn
from toys import toy_folder
from transformers import PreTrainedModel

from optimum_blockprune.loading import load_model
from optimum_blockprune.offload import copied, held, is_offloaded


CPU = torch.device("cpu")


def on_host(folder: Path) -> PreTrainedModel:
    model = tiny_model("llama")
    cpu_offload(model, execution_device=CPU)
    return model


def on_disk(folder: Path) -> PreTrainedModel:
    model = tiny_model("llama")
    disk_offload(model, str(folder), execution_device=CPU)
    return model


def streamed(folder: Path) -> PreTrainedModel:
    return load_model(toy_folder(folder, num_blocks=5), stream=True)


def mapped(folder: Path) -> PreTrainedModel:
    toy_folder(folder, num_blocks=5)
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    blocks = {f"model.layers.{block}": "disk" for block in range(5)}
    return load_model(folder, device_map={**blocks, **rest}, offload_folder=folder / "parts")


each_kind = pytest.mark.parametrize("load", [on_host, on_disk, streamed, mapped])


class Counted(Mapping[str, Tensor]):
    """Weights that count how often they are fetched."""

    def __init__(self, weights: Mapping[str, Tensor], reads: list[str]) -> None:
        self._weights, self._reads = weights, reads

    def __getitem__(self, name: str) -> Tensor:
        self._reads.append(name)
        return self._weights[name]

    def __iter__(self) -> Any:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def counted(block: nn.Module) -> list[str]:
    """Makes all fetches of a block count."""
    reads: list[str] = []
    for module in block.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            if getattr(each, "offload", False):
                each.weights_map = Counted(each.weights_map, reads)
    return reads


def places(block: nn.Module) -> set[str]:
    return {parameter.device.type for parameter in block.parameters()}


@each_kind
def test_a_held_block_is_fetched_once(load: Callable[[Path], PreTrainedModel], ids: Tensor, tmp_path: Path) -> None:
    model, plain = load(tmp_path), tiny_model("llama")
    truth, block = plain_logits(plain, ids), block_list(model)[2]
    assert is_offloaded([block]) and is_offloaded(block_list(model))
    reads = counted(block)
    with held(block):
        assert places(block) == {"cpu"}
        assert all(
            torch.equal(*pair) for pair in zip(block.parameters(), block_list(plain)[2].parameters(), strict=True)
        )
        for _ in range(3):
            assert torch.equal(plain_logits(model, ids), truth)
        with held(block):
            assert places(block) == {"cpu"}
        assert places(block) == {"cpu"}
    assert len(reads) == len(list(block.parameters())) == len(set(block.parameters()))
    assert places(block) == {"meta"} and is_offloaded([block])
    assert torch.equal(plain_logits(model, ids), truth)
    assert len(reads) == 2 * len(list(block.parameters()))


@each_kind
def test_nothing_is_held_after_a_failure(load: Callable[[Path], PreTrainedModel], ids: Tensor, tmp_path: Path) -> None:
    model = load(tmp_path)
    block, truth = block_list(model)[0], plain_logits(model, ids)
    with pytest.raises(KeyboardInterrupt), held(block):
        raise KeyboardInterrupt
    assert places(block) == {"meta"}
    assert torch.equal(plain_logits(model, ids), truth)


def test_a_fetch_that_fails_leaves_nothing_behind(ids: Tensor, tmp_path: Path) -> None:
    model = on_host(tmp_path)
    block = block_list(model)[0]
    hook = block.mlp.down_proj._hf_hook
    weights, hook.weights_map = hook.weights_map, {}
    with pytest.raises(KeyError), held(block):
        raise AssertionError("not reached")
    assert places(block) == {"meta"}
    hook.weights_map = weights
    assert torch.equal(plain_logits(model, ids), plain_logits(tiny_model("llama"), ids))


def test_a_block_in_memory_is_left_alone(ids: Tensor) -> None:
    model = tiny_model("llama")
    block = block_list(model)[1]
    before = list(block.parameters())
    with held(block):
        assert all(one is other for one, other in zip(block.parameters(), before, strict=True))
    assert not is_offloaded(block_list(model))
    add_hook_to_module(block, AlignDevicesHook(execution_device=CPU))
    assert not is_offloaded([block])
    with held(block):
        assert places(block) == {"cpu"}


@each_kind
def test_a_copy_of_a_held_block_is_whole_and_shares_the_source(
    load: Callable[[Path], PreTrainedModel], tmp_path: Path
) -> None:
    block = block_list(load(tmp_path))[1]
    reads = counted(block)
    with held(block):
        twin = copied(block)
    hooks = [
        (part._hf_hook, other._hf_hook)
        for part, other in zip(block.modules(), twin.modules(), strict=True)
        if hasattr(part, "_hf_hook")
    ]
    assert places(twin) == {"cpu"}
    assert hooks and all(one.weights_map is other.weights_map for one, other in hooks if hasattr(one, "weights_map"))
    assert all(
        torch.equal(*pair)
        for pair in zip(twin.parameters(), block_list(tiny_model("llama"))[1].parameters(), strict=True)
    )
    assert len(reads) == len(list(block.parameters()))
