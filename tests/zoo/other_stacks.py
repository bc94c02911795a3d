# SPDX-License-Identifier: Apache-2.0
"""Tiny random encoders and encoder-decoders, and the truth that pruned ones are held to; independent of the package.

`encoders.json` and `seq2seq.json` hold the facts. Of a stack: `path` and `count`; `more_counts`, fields that follow
the count; `returns`, the arguments of a block's call that a silenced block hands back in the form of its own result;
`parallel`, the lists whose entries make up a block; `fixed`, blocks that cannot be removed exactly. Of a specimen:
`class`, `model_type`, `fields`, `per_block` (patterns repeated up to the depth), `depth` where it is not 5 and 6,
`inputs` and what they consist of, `generates` where it is false (and `why_not`), and `notes`.
"""

from __future__ import annotations

import copy
import inspect
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


VOCABULARY = 96
_FILES = [json.loads(Path(__file__).with_name(name).read_text()) for name in ("encoders.json", "seq2seq.json")]
SPECIMENS: dict[str, dict[str, Any]] = {**_FILES[0]["specimens"], **_FILES[1]["specimens"]}
ENCODERS: tuple[str, ...] = tuple(_FILES[0]["specimens"])
SEQ2SEQ: tuple[str, ...] = tuple(_FILES[1]["specimens"])
UNBUILT: dict[str, str] = {**_FILES[0]["unbuilt"], **_FILES[1]["unbuilt"]}


def stacks(name: str) -> tuple[str, ...]:
    """Names of the block lists: "encoder", and "decoder" where there is one."""
    return tuple(SPECIMENS[name]["stacks"])


def _put(fields: Any, path: str, value: Any) -> None:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        fields = fields[part]
    fields[last] = value


def depth(name: str, stack: str) -> int:
    """Number of blocks where none is asked for: 5 in an encoder and 6 in a decoder, unless the specimen says."""
    return SPECIMENS[name].get("depth", {"encoder": 5, "decoder": 6})[stack]


def tiny_config(name: str, encoder_blocks: int | None = None, decoder_blocks: int | None = None) -> PretrainedConfig:
    """The configuration with so many blocks; patterns of `per_block` are repeated up to the depth."""
    specimen = SPECIMENS[name]
    fields = copy.deepcopy(specimen["fields"])
    for stack, facts in specimen["stacks"].items():
        asked = encoder_blocks if stack == "encoder" else decoder_blocks
        blocks = depth(name, stack) if asked is None else asked
        for path in (facts["count"], *facts.get("more_counts", ())):
            _put(fields, path, blocks)
        for path, pattern in specimen.get("per_block", {}).get(stack, {}).items():
            _put(fields, path, list(islice(cycle(pattern), blocks)))
    return CONFIG_MAPPING[specimen["model_type"]](**fields)


def tiny_model(name: str, encoder_blocks: int | None = None, decoder_blocks: int | None = None) -> PreTrainedModel:
    """The model with random weights, the same at every call, on the CPU in float32, in evaluation mode."""
    config = tiny_config(name, encoder_blocks, decoder_blocks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, SPECIMENS[name]["class"])(config).float().eval()
    # Tables of sines are computed again when a model is loaded, so they stay as they are.
    fixed = {
        id(weight)
        for module in model.modules()
        if "Sinusoidal" in type(module).__name__
        for weight in module.parameters()
    }
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and id(parameter) not in fixed:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def block_list(name: str, model: nn.Module, stack: str) -> nn.ModuleList:
    """The block list itself, by the path written down in the specimen."""
    return model.get_submodule(SPECIMENS[name]["stacks"][stack]["path"])


def silenced(name: str, model: PreTrainedModel, stack: str, off: Collection[int]) -> PreTrainedModel:
    """The truth: a deep copy in which the blocks `off` return what comes in, in the form the block itself returns.

    Use it without a cache: a silenced block fills no slot, and models take the position from the slot of block 0.
    """
    twin = copy.deepcopy(model)
    facts = SPECIMENS[name]["stacks"][stack]
    for block in off:
        if facts.get("parallel"):
            _silence_parallel(twin, facts["parallel"], block)
        else:
            module = block_list(name, twin, stack)[block]
            signature = inspect.signature(module.forward)
            module.forward = partial(_pass_on, signature, facts.get("returns", "hidden_states"), facts.get("kind"))
    return twin


def _pass_on(signature: inspect.Signature, returns: Any, kind: str | None, *args: Any, **kwargs: Any) -> Any:
    """Stands in for a block's `forward`: a tensor, a tuple, a dict or a named tuple of arguments of the call."""
    given = signature.bind(*args, **kwargs)
    given.apply_defaults()
    values = given.arguments
    if isinstance(returns, str):
        return _copied(values[returns])
    if isinstance(returns, dict):
        passed = {key: name and _copied(values[name]) for key, name in returns.items()}
        return passed if kind is None else getattr(transformers.models.reformer.modeling_reformer, kind)(**passed)
    return tuple(name and _copied(values[name]) for name in returns)


def _copied(value: Any) -> Any:
    # Some models change hidden states in place after a block, which must not reach what came before it.
    return value.clone() if isinstance(value, Tensor) else value


def _silence_parallel(model: nn.Module, lists: dict[str, str], block: int) -> None:
    """XLM keeps no module per block: its lists of parts add zero to the residual stream or hand it through."""
    for path, part in lists.items():
        module = model.get_submodule(path)[block]
        module.forward = {"attention": _no_attention, "addition": torch.zeros_like, "identity": _copied}[part]


def _no_attention(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor]:
    return (torch.zeros_like(hidden_states),)


def inputs(name: str, model: PreTrainedModel) -> dict[str, Tensor]:
    """Everything for `model(**inputs)`, with teacher forcing; the same at every call."""
    generator = torch.Generator().manual_seed(2)
    specimen = SPECIMENS[name]
    made: dict[str, Tensor] = {}
    if specimen["inputs"] == "text" or "audio_tokens" in specimen:
        made["input_ids"] = torch.randint(3, VOCABULARY, (2, specimen.get("text_length", 12)), generator=generator)
        made["input_ids"][:, : specimen.get("audio_tokens", 0)] = 1
    for key, shape in specimen.get("floats", {}).items():
        made[key] = torch.randn(shape, generator=generator)
    if model.config.is_encoder_decoder:
        shape = specimen.get("decoder_shape", (2, 9))
        made["decoder_input_ids"] = torch.randint(3, VOCABULARY, tuple(shape), generator=generator)
    for key, shape in specimen.get("ones", {}).items():
        made[key] = torch.ones(shape, dtype=torch.long)
    for key, values in specimen.get("tensors", {}).items():
        made[key] = torch.tensor(values)
    return {key: value.to(model.device) for key, value in made.items()}


def plain_logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """An ordinary forward pass without a cache; a bare encoder gives its last hidden states."""
    more = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        output = model(**inputs, **more)
    return output.logits if "logits" in output else output.last_hidden_state
