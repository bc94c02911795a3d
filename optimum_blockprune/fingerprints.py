# SPDX-License-Identifier: Apache-2.0
"""What tells one search from another: the model, the text, what is asked for, and the versions.

Two runs with equal fingerprints measure the same numbers, up to rounding. What only says how they are computed (the
device, the number of processes, the batch size, weights that are offloaded) is no part of it, nor is where the model
or the text lies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import entry_points
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from .batches import CalibrationWindows
from .blocks import BlockStack
from .budget_rules import HELD_OUT_FIELDS
from .environment import versions
from .recipe import BUDGET_FIELDS, Recipe
from .registry import GROUP, build_options, get_strategy
from .streaming import source_of
from .tensors import StoredTensor, read_weights


# Where a model came from and what it was written with; class and dtypes are those of the live model.
_VOLATILE = ("_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype")
# Fields that reach the result through the windows alone, whose own fingerprint is in `data`; and one that only rounds.
_BY_DATA = ("dataset", "dataset_text_field", "num_samples", "seqlen", "use_chat_template", "calibration_recipe")
_BY_DATA += HELD_OUT_FIELDS
_BY_ROUNDING = ("batch_size",)
# Our choice: values looked at in each tensor, and pieces of bytes in each tensor of a file. Whatever trains, merges or
# converts a model changes nearly all values of a tensor; one that differs in single values only is not told apart.
_SAMPLES, _PIECES, _PIECE_BYTES = 48, 8, 64


def run_fingerprint(
    stack: BlockStack,
    recipe: Recipe,
    windows: CalibrationWindows | None,
    held_out: CalibrationWindows | None = None,
) -> dict[str, Any]:
    """Describes a search in JSON values, one group of entries each for model, data, recipe and versions.

    Args:
        stack: The blocks of the dense model.
        recipe: What is wanted.
        windows: The text that is measured on; `None` for a strategy that measures nothing.
        held_out: The text that a budget of quality is held to.
    """
    return {
        "model": model_fingerprint(stack),
        "data": None if windows is None else _data(windows),
        **({} if held_out is None else {"held_out": _data(held_out)}),
        "recipe": _recipe(stack, recipe),
        "versions": {**_plug_in(recipe.strategy), **versions()},
    }


def model_fingerprint(stack: BlockStack) -> dict[str, Any]:
    """The class, and hashes of the configuration and of the weights; dtypes in words, as they often differ."""
    model = stack.model
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    return {
        "type": type(model).__name__,
        "stack": stack.layout.stack,
        "blocks": len(stack),
        "dtypes": ", ".join(sorted(dtypes)),
        "streamed": source_of(model) is not None,
        "config": _hash(json.dumps(_lasting(model.config.to_dict()), sort_keys=True).encode()),
        "weights": _hash(*_weights(model, tensors)),
    }


def _data(windows: CalibrationWindows) -> dict[str, Any]:
    """The tokens, and their numbers in words."""
    described = windows.describe()
    found = {name: described[name] for name in ("fingerprint", "windows", "seqlen", "tokens")}
    return found if windows.teacher is None else {**found, "k": windows.teacher.k}


def _recipe(stack: BlockStack, recipe: Recipe) -> dict[str, Any]:
    """What is asked for, with every default as it is resolved: an option may be given or left out."""
    strategy = get_strategy(recipe.strategy)
    options = build_options(strategy, recipe.strategy_options or {})
    left_out = (*_BY_DATA, *_BY_ROUNDING, *BUDGET_FIELDS)
    resolved = {
        **recipe.requested,
        "stack": stack.layout.stack,
        "objective": recipe.objective or next(iter(strategy.objectives), None),
        "protect_first": strategy.protect_first if recipe.protect_first is None else recipe.protect_first,
        "protect_last": strategy.protect_last if recipe.protect_last is None else recipe.protect_last,
        "strategy_options": _lasting(asdict(options)),
    }
    return {**{name: value for name, value in vars(recipe).items() if name not in left_out}, **resolved}


def _plug_in(strategy: str) -> dict[str, str]:
    """The version of the distribution that brings the strategy."""
    found = (entry.dist for entry in entry_points(group=GROUP, name=strategy))
    return {each.name: each.version for each in found if each is not None}


def _lasting(value: Any) -> Any:
    """A configuration as JSON values, without what is volatile; other values by what they say of themselves."""
    if isinstance(value, Mapping):
        return {str(name): _lasting(inner) for name, inner in value.items() if name not in _VOLATILE}
    if isinstance(value, (list, tuple)):
        return [_lasting(inner) for inner in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    """Names, shapes, dtypes and some values of all tensors, wherever these are.

    A streamed model would have to be read once for that, as its tensors are read whole or not at all; so its files are
    looked into.
    """
    source, offloaded = source_of(model), dict(_offloaded(model))
    for name, tensor in tensors.items():
        yield _described(name, tensor.dtype, tensor.shape)
        if not tensor.is_meta:
            yield _sample(tensor)
        elif source is None and name in offloaded:
            weights, inner = offloaded[name]
            yield _sample(weights[inner])
    if source is not None:
        for name, stored in sorted(read_weights(source.folder).tensors.items()):
            yield _described(name, stored.dtype, stored.shape)
            with stored.file.open("rb", buffering=0) as file:
                yield from _pieces(stored, file)


def _offloaded(model: nn.Module) -> Iterator[tuple[str, tuple[Mapping[str, Tensor], str]]]:
    """Where accelerate keeps the tensors that are not on a device; single ones are read from there."""
    for path, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            weights = getattr(each, "weights_map", None)
            if weights is not None:
                own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
                yield from ((f"{path}.{name}" if path else name, (weights, name)) for name, _ in own)


def _described(name: str, dtype: Any, shape: Any) -> bytes:
    return json.dumps([name, str(dtype), list(shape)]).encode()


def _sample(tensor: Tensor) -> bytes:
    """Some values, evenly spread from the first to the last, bit for bit."""
    if not tensor.numel():
        return b""
    count = min(_SAMPLES, tensor.numel())
    places = torch.arange(count, device=tensor.device) * (tensor.numel() - 1) // max(1, count - 1)
    if tensor.dim():
        # By coordinates: a tensor that is not contiguous would have to be copied to be seen flat.
        tensor = tensor.detach()[torch.unravel_index(places, tensor.shape)]
    return tensor.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _pieces(stored: StoredTensor, file: BinaryIO) -> Iterator[bytes]:
    """Some pieces of a tensor's bytes, evenly spread, read from its file."""
    last = max(0, stored.num_bytes - _PIECE_BYTES)
    for number in range(_PIECES):
        file.seek(stored.start + last * number // (_PIECES - 1))
        yield file.read(min(_PIECE_BYTES, stored.num_bytes))


def _hash(*parts: bytes) -> str:
    """SHA-256 (hex) of parts, each with its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
