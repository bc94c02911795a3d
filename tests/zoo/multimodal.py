# SPDX-License-Identifier: Apache-2.0
"""Tiny random multimodal models whose text decoder can be pruned, and the truth that pruned ones are held to."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel


# A specimen's keys: "class" and "model_type"; "path" of the text blocks; "text_config", the attribute path of their
# configuration (empty: the top one), and "count", its field that holds the depth; "config", the constructor's
# arguments, and "per_block", patterns in the text configuration that are cycled to the depth. Inputs: "ids" (shapes
# of random ids), "random" (shapes of random numbers) and "text" (values), beside or instead of the usual input ids;
# "image", what `image_inputs` builds. "carried": keyword arguments that a block hands on behind its hidden states.
# "producers": blocks (of six) that later ones take keys and values from, so that silencing them has no meaning.
# "generates" and "round_trip" are given where they are false, with a "reason".
_STORED: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
SPECIMENS: dict[str, dict[str, Any]] = _STORED["specimens"]
UNBUILT: dict[str, str] = _STORED["unbuilt"]
NAMES = tuple(SPECIMENS)
WITH_IMAGES = tuple(name for name in NAMES if SPECIMENS[name]["images"])
# Text ids lie between the special tokens, which end at 2, and the first image or audio token.
_FIRST_TEXT, _LAST_TEXT = 3, 80


def tiny_config(name: str, num_blocks: int = 6) -> PretrainedConfig:
    """The configuration of specimen `name` with `num_blocks` text blocks."""
    specimen = SPECIMENS[name]
    fields = copy.deepcopy(specimen["config"])
    text = fields
    for part in specimen["text_config"].split(".") if specimen["text_config"] else ():
        text = text[part]
    text[specimen["count"]] = num_blocks
    for field, kinds in specimen.get("per_block", {}).items():
        text[field] = list(islice(cycle(kinds), num_blocks))
    return CONFIG_MAPPING[specimen["model_type"]](**fields)


def tiny_model(name: str, num_blocks: int = 6) -> PreTrainedModel:
    """A model with random weights, the same at every call, on the CPU in float32, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, SPECIMENS[name]["class"])(tiny_config(name, num_blocks)).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def block_list(name: str, model: nn.Module) -> nn.ModuleList:
    """The blocks of the text decoder, at the path that the specimen writes down."""
    return model.get_submodule(SPECIMENS[name]["path"])


def silenced(name: str, model: PreTrainedModel, off: Collection[int]) -> PreTrainedModel:
    """The truth: a deep copy in which the blocks `off` return what comes in, in the form they return their own."""
    twin = copy.deepcopy(model)
    blocks = block_list(name, twin)
    # All forms first: a model with some blocks silenced may not run until the others are, too.
    lengths = {block: _length(name, twin, blocks[block]) for block in off}
    for block, length in lengths.items():
        blocks[block].forward = partial(_identity, SPECIMENS[name].get("carried", []), length)
    return twin


def _length(name: str, model: PreTrainedModel, block: nn.Module) -> int:
    """Parts of the tuple that a block returns; 0 for a bare tensor."""
    seen: list[Any] = []
    handle = block.register_forward_hook(lambda _module, _args, output: seen.append(output))
    plain_logits(model, text_inputs(name))
    handle.remove()
    # A block that text alone skips (Mllama's cross-attention) returns a bare tensor.
    return len(seen[0]) if seen and isinstance(seen[0], tuple) else 0


def _identity(carried: list[str], length: int, hidden_states: Tensor, *_args: Any, **keywords: Any) -> Any:
    rest = [keywords.get(stream) for stream in carried]
    return (hidden_states, *rest, *[None] * (length - 1 - len(rest))) if length else hidden_states


def text_inputs(name: str) -> dict[str, Tensor]:
    """Two rows of twelve random text tokens, and whatever else a forward pass without images needs."""
    specimen = SPECIMENS[name]
    generator = torch.Generator().manual_seed(0)
    inputs = {
        field: torch.randint(_FIRST_TEXT, _LAST_TEXT, shape, generator=generator)
        for field, shape in specimen.get("ids", {"input_ids": [2, 12]}).items()
    }
    inputs |= {field: torch.tensor(value) for field, value in specimen.get("text", {}).items()}
    inputs |= {field: torch.randn(shape, generator=generator) for field, shape in specimen.get("random", {}).items()}
    return inputs


def image_inputs(name: str, model: PreTrainedModel, seed: int = 0) -> dict[str, Tensor]:
    """Two rows with one random image each, drawn with `seed`, and as many placeholders as the image has features."""
    image = SPECIMENS[name]["image"]
    placeholder = _token(model.config)
    inputs = text_inputs(name)
    ids = inputs["input_ids"]
    start, end = (torch.full((2, 1), token) for token in image.get("around", (3, 3)))
    places = torch.full((2, image["tokens"]), placeholder)
    ids = torch.cat((ids[:, :3], start, places, end, ids[:, 3:]), dim=1)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(image["pixel_values"], generator=generator)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), image.get("pixels", "pixel_values"): pixels}
    inputs |= {field: torch.tensor(value) for field, value in image.get("extra", {}).items()}
    inputs |= {field: torch.ones(shape, dtype=torch.long) for field, shape in image.get("ones", {}).items()}
    inputs |= {field: torch.ones(shape, dtype=torch.bool) for field, shape in image.get("bools", {}).items()}
    if "marks" in image:
        inputs[image["marks"]] = (ids == placeholder).long()
    return inputs


def _token(config: PretrainedConfig) -> int:
    return config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index


def plain_logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """An ordinary forward pass without a cache."""
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits
