# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every causal language model, and the truth that pruned ones are held to.

`causal.json` holds the facts of each specimen: configuration fields on top of the generic shrinking, the path of its
block list, the field with the depth (`count`, null where only lists hold it; `more_counts` follow it), and `returns`,
which names the arguments of a block that a silenced one hands on in place of what it computes. Blocks in `needed`
cannot be silenced: later ones read from them beside the hidden states. `generates`, `round_trip` and `cache_exact`
(cached generation picks the tokens of plain forward passes) hold unless the specimen says otherwise. Weights are
perturbed so that no two blocks are alike. Nothing here uses the package.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Collection, Mapping
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.reformer import modeling_reformer

from .shrink import VOCABULARY, tiny_fields


_STORED: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
SPECIMENS: dict[str, dict[str, Any]] = _STORED["specimens"]
NAMES: tuple[str, ...] = tuple(SPECIMENS)
UNBUILT: dict[str, str] = _STORED["unbuilt"]


def default_blocks(name: str) -> int:
    """Number of blocks where none is asked for: 6, unless the specimen says."""
    return SPECIMENS[name].get("num_blocks", 6)


def tiny_config(name: str, num_blocks: int | None = None, **overrides: Any) -> PretrainedConfig:
    """The configuration with `num_blocks` blocks; `overrides` are further fields, dictionaries are merged."""
    specimen = SPECIMENS[name]
    blocks = default_blocks(name) if num_blocks is None else num_blocks
    fields = copy.deepcopy(specimen["fields"])
    for path in (specimen["count"], *specimen.get("more_counts", ())):
        if path:
            _put(fields, path, blocks)
    for path, pattern in specimen.get("per_block", {}).items():
        _put(fields, path, list(islice(cycle(pattern), blocks)))
    _merge(fields, overrides)
    config_class = CONFIG_MAPPING[specimen["model_type"]]
    return config_class(**tiny_fields(config_class, fields))


def tiny_model(name: str, num_blocks: int | None = None, **overrides: Any) -> PreTrainedModel:
    """A model with random weights, the same at every call, on the CPU in float32, in evaluation mode."""
    config = tiny_config(name, num_blocks, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in _perturbed(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def block_list(name: str, model: nn.Module) -> nn.ModuleList:
    """The block list itself, by the path written down in the specimen."""
    return model.get_submodule(SPECIMENS[name]["path"])


def random_ids(windows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed))


def plain_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """An ordinary forward pass without a cache."""
    more = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def silenced(name: str, model: PreTrainedModel, off: Collection[int]) -> PreTrainedModel:
    """The truth: a deep copy in which the blocks `off` return what comes in, in the form the block itself returns."""
    twin = copy.deepcopy(model)
    specimen = SPECIMENS[name]
    for block in off:
        for path, role in specimen.get("parallel", {}).items():
            twin.get_submodule(path)[block].forward = _ROLES[role]
        if "parallel" not in specimen:
            module = block_list(name, twin)[block]
            returns = specimen.get("returns", "hidden_states")
            module.forward = partial(_pass_on, inspect.signature(module.forward), returns, specimen.get("form"))
    return twin


def _pass_on(signature: inspect.Signature, returns: Any, form: str | None, *args: Any, **kwargs: Any) -> Any:
    """Stands in for a block's `forward`: hands on one argument of the call, or several in a tuple, list or record."""
    given = signature.bind(*args, **kwargs)
    given.apply_defaults()
    if isinstance(returns, str):
        return given.arguments[returns]
    passed = [None if name is None else given.arguments[name] for name in returns]
    if form == "list":
        return passed
    return tuple(passed) if form is None else getattr(modeling_reformer, form)(*passed)


# XLM keeps no module per block: its lists of parts add zero to the residual stream, or hand it through.
_ROLES = {
    "attention": lambda hidden_states, *_args, **_kwargs: (torch.zeros_like(hidden_states),),
    "addition": torch.zeros_like,
    "norm": lambda hidden_states: hidden_states,
}


def _perturbed(model: nn.Module) -> list[nn.Parameter]:
    """Every floating-point parameter but the tables of sines, which are computed again when a model is loaded."""
    fixed = {
        id(table) for part in model.modules() if "Sinusoidal" in type(part).__name__ for table in part.parameters()
    }
    return [weight for weight in model.parameters() if weight.is_floating_point() and id(weight) not in fixed]


def _put(fields: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for part in parents:
        fields = fields.setdefault(part, {})
    fields[last] = value


def _merge(fields: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    for field, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(fields.get(field), dict):
            _merge(fields[field], value)
        else:
            fields[field] = value
