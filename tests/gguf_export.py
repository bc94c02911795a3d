# SPDX-License-Identifier: Apache-2.0
"""Writes small Llama, Mistral, Qwen3 and Gemma 3 checkpoints to GGUF in float32, for the round-trip tests only.

Everything is read from the checkpoint's folder (`config.json`, `model.safetensors`), as a converter would: nothing
that a pruned checkpoint does not say itself can reach the file. Unlike llama.cpp's converter it writes Gemma 3's kept
window pattern as `attention.sliding_window_pattern`. Not covered: sharded checkpoints, RoPE scaling, real tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file


# Mistral has no architecture of its own in GGUF: it is written, and read back, as a Llama.
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}


def write_gguf(folder: Path, target: Path) -> Path:
    """Converts the checkpoint in `folder` to the GGUF file `target`."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = _ARCHITECTURES[fields["model_type"]]
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name("round trip")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _write_sizes(writer, fields)
    _write_attention(writer, fields)
    _write_tokenizer(writer, fields)
    names = gguf.get_tensor_name_map(architecture, fields["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored = np.ascontiguousarray(_as_stored(name, tensor, fields), dtype=np.float32)
        # A tensor without a name is an error: it would be missing from the file without a word.
        writer.add_tensor(_stored_name(names, name), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _stored_name(names: gguf.TensorNameMap, name: str) -> str:
    stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if stored is None:
        raise KeyError(f"GGUF has no name for the tensor {name}")
    return stored


def _write_sizes(writer: gguf.GGUFWriter, fields: Mapping[str, Any]) -> None:
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_vocab_size(fields["vocab_size"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])


def _write_attention(writer: gguf.GGUFWriter, fields: Mapping[str, Any]) -> None:
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_key_length(_head_dim(fields))
    writer.add_value_length(_head_dim(fields))
    writer.add_rope_dimension_count(_head_dim(fields))
    writer.add_rope_freq_base(_rope_theta(fields, "full_attention"))
    if fields["model_type"] == "gemma3_text":
        writer.add_rope_freq_base_swa(_rope_theta(fields, "sliding_attention"))
        writer.add_sliding_window(fields["sliding_window"])
        # Without this key a reader assumes that every sixth block attends to everything.
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in fields["layer_types"]])


def _write_tokenizer(writer: gguf.GGUFWriter, fields: Mapping[str, Any]) -> None:
    """A stand-in vocabulary: readers size the embedding table by it."""
    special = ["<unk>", "<s>", "</s>"]
    plain = [f"t{token}" for token in range(len(special), fields["vocab_size"])]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(special + plain)
    writer.add_token_scores([0.0] * fields["vocab_size"])
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * len(plain))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _head_dim(fields: Mapping[str, Any]) -> int:
    return fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]


def _rope_theta(fields: Mapping[str, Any], kind: str) -> float:
    """Base of the rotary frequencies; transformers 4.57 writes it flat, transformers 5 in `rope_parameters`."""
    if "rope_parameters" in fields:
        rope = fields["rope_parameters"]
        return float(rope.get(kind, rope)["rope_theta"])
    local = fields["model_type"] == "gemma3_text" and kind == "sliding_attention"
    return float(fields["rope_local_base_freq" if local else "rope_theta"])


def _as_stored(name: str, tensor: np.ndarray, fields: Mapping[str, Any]) -> np.ndarray:
    """The tensor in the form that GGUF readers expect of its architecture."""
    kind = fields["model_type"]
    if kind == "gemma3_text" and name.endswith("norm.weight"):
        # Gemma computes with 1 + weight, GGUF holds the sum.
        return tensor + 1
    if kind in ("llama", "mistral") and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = fields["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        return _interleaved(tensor, heads)
    return tensor


def _interleaved(tensor: np.ndarray, heads: int) -> np.ndarray:
    """The two rotary halves of each head merged row by row: GGUF's Llama rotates neighbouring rows."""
    halves = tensor.reshape(heads, 2, -1, tensor.shape[-1])
    return halves.swapaxes(1, 2).reshape(tensor.shape)
