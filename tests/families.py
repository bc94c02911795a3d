# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every proven family, and the truth that pruned models are held to.

Weights are perturbed so that no two blocks are alike, layer types do not repeat with a period, and windows are shorter
than the inputs: a block in a wrong place, with a wrong number or of a wrong kind changes the logits. Nothing here uses
the package: the paths of the block lists are written down, and a block is silenced by replacing its `forward`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


FAMILIES = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "falcon",
    "bloom",
    "olmo2",
    "granite",
    "smollm3",
)
VOCABULARY = 96
_PATHS = {
    "gpt2": "transformer.h",
    "falcon": "transformer.h",
    "bloom": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
}
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA_LIKE = {
    **_TOKENS,
    "pad_token_id": 0,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_BLOOM_LIKE = {**_TOKENS, "hidden_size": 32, "num_attention_heads": 4}
_OPT = {"pad_token_id": 0, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128}
_QWEN = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
_GEMMA = {"head_dim": 8, "sliding_window": 4}
_FIELDS: dict[str, dict[str, Any]] = {
    "mistral": {**_LLAMA_LIKE, "sliding_window": 4},
    "mixtral": {**_LLAMA_LIKE, "num_local_experts": 4},
    "qwen2": {**_LLAMA_LIKE, **_QWEN},
    "qwen3": {**_LLAMA_LIKE, **_QWEN},
    "gemma2": {**_LLAMA_LIKE, **_GEMMA},
    "gemma3_text": {**_LLAMA_LIKE, **_GEMMA},
    "gpt2": {**_TOKENS, "n_embd": 32, "n_head": 4, "n_positions": 128},
    "gpt_neox": {name: value for name, value in _LLAMA_LIKE.items() if name != "num_key_value_heads"},
    "opt": {
        **_BLOOM_LIKE,
        "pad_token_id": 0,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 128,
    },
    "falcon": _BLOOM_LIKE,
    "bloom": {**_BLOOM_LIKE, "pad_token_id": 0},
    "granite": {**_LLAMA_LIKE, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 2.0},
}


def tiny_config(family: str, num_blocks: int = 5, **overrides: Any) -> PretrainedConfig:
    """A configuration with `num_blocks` blocks; `overrides` are further configuration fields."""
    fields = {**_FIELDS.get(family, _LLAMA_LIKE), "num_hidden_layers": num_blocks}
    if family in ("gemma2", "gemma3_text"):
        kinds = ("sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention")
        fields["layer_types"] = list(islice(cycle(kinds), num_blocks))
    if family == "smollm3":
        fields["no_rope_layers"] = list(islice(cycle((1, 0, 1, 1, 0)), num_blocks))
    return CONFIG_MAPPING[family](**{**fields, **overrides})


def tiny_model(family: str, num_blocks: int = 5, **overrides: Any) -> PreTrainedModel:
    """A model with random weights, the same at every call, on the CPU in float32, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(family, num_blocks, **overrides)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def random_ids(windows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed))


def block_path(family: str) -> str:
    """Name of the block list, written down here and not searched for."""
    return _PATHS.get(family, "model.layers")


def block_list(model: PreTrainedModel) -> nn.ModuleList:
    """The block list itself."""
    return model.get_submodule(block_path(model.config.model_type))


def plain_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """An ordinary forward pass."""
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def silenced(model: PreTrainedModel, off: Collection[int]) -> PreTrainedModel:
    """The truth: a deep copy in which the blocks `off` return what comes in, in the form the block itself returns."""
    twin = copy.deepcopy(model)
    for block in off:
        _silence(twin, block_list(twin)[block])
    return twin


def _silence(model: PreTrainedModel, block: nn.Module) -> None:
    seen: list[Any] = []
    handle = block.register_forward_hook(lambda _module, _args, output: seen.append(output))
    plain_logits(model, torch.zeros(1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device))
    handle.remove()
    length = len(seen[0]) if isinstance(seen[0], tuple) else 0

    def identity(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return (hidden_states, *[None] * (length - 1)) if length else hidden_states

    block.forward = identity
