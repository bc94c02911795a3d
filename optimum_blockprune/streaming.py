# SPDX-License-Identifier: Apache-2.0
"""Loads a model whose blocks stay in their safetensors files and are read whenever they run (`stream=True`).

What is in memory: everything outside the blocks (embeddings, head, norms), and the block that runs. The model is
built empty, the rest is read tensor by tensor, and accelerate's hooks fetch the blocks from the files. Files are read,
not mapped into memory, so that a limit on memory (a cgroup) sees one block. Address space is no measure of it:
`init_empty_weights` allocates every parameter for a moment, untouched, and the heap may keep the addresses.

Some checkpoints cannot be read like that, because transformers turns their tensors into others while it loads them
(experts that are fused, modules kept in fp32). It then loads such a model itself, with the blocks on "disk": what it
changed is written to a temporary folder, which goes when the model goes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import attach_align_device_hook
from huggingface_hub import snapshot_download
from optimum.utils import logging
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from .architectures import layout_for
from .blocks import BlockStack, find_blocks
from .errors import CheckpointError, ConfigurationError, UnsupportedModelError
from .file_weights import DTYPES, FileWeights, Homes, find_homes, tensors_of
from .offload import hold_while_running
from .skeleton import load_skeleton
from .tensors import INDEX_FILE, WEIGHTS_FILE, StoredWeights, read_weights, shard_names


logger = logging.get_logger("optimum.blockprune.streaming")

# What is understood beside the arguments that say where files come from.
_ARGUMENTS = ("dtype", "device_map", "attn_implementation", "offload_folder")
_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
_ADAPTER_FILE = "adapter_config.json"
# Since version 5, a model is loaded in the dtype of its files unless another one is asked for.
_DTYPE = "auto" if int(version("transformers").split(".")[0]) >= 5 else torch.float32


@dataclass(frozen=True)
class Streamed:
    """Where the blocks of a streamed model come from.

    Attributes:
        folder: The checkpoint.
        exact: Whether its tensors are the model's bit for bit: no other dtype was asked for.
    """

    folder: Path
    exact: bool


_SOURCES: weakref.WeakKeyDictionary[nn.Module, Streamed] = weakref.WeakKeyDictionary()


def source_of(model: nn.Module) -> Streamed | None:
    """Where a model is streamed from; `None` for one that is in memory."""
    return _SOURCES.get(model)


def lies_elsewhere(model: nn.Module) -> bool:
    """Whether some weights are streamed or offloaded, so that nothing can be done to them."""
    return source_of(model) is not None or any(each.is_meta for each in model.parameters())


def load_streamed(
    path: str, config: PretrainedConfig, kind: Any, *, hub: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Returns the model, and what is missing in its files as transformers reports it.

    Args:
        path: Repo id or folder.
        config: Its configuration.
        kind: The class whose `from_config` and `from_pretrained` are called.
        hub: Where files come from.
        settings: `dtype`, `attn_implementation`, `offload_folder`, and `device_map`: the one device to compute on.

    Raises:
        CheckpointError: There are no safetensors files, or they are not whole.
        ConfigurationError: An argument that does not go with streaming.
    """
    if getattr(config, "rescale_every", 0):
        raise UnsupportedModelError(
            f"'{config.model_type}' cannot be streamed: with rescale_every={config.rescale_every} its forward divides "
            "weights in place, which those in the files do not follow. Load the model without stream=True."
        )
    device = _device(settings)
    folder = _local(path, hub)
    weights = read_weights(folder)
    dtype = _dtype_of(settings.get("dtype"), config, weights)
    made = {"dtype": dtype}
    if settings.get("attn_implementation") is not None:
        made["attn_implementation"] = settings["attn_implementation"]
    model = _empty(kind, config, made, remote_code=hub.get("trust_remote_code", False))
    stacks = [find_blocks(model, name) for name in layout_for(model).kind.stacks]
    devices = _device_map(model, stacks, str(device))
    if _keeps_wide(model, dtype):
        _follow_dtypes(model, load_skeleton(kind, folder, config, **made)[0])
    homes = find_homes(model, stacks, weights)
    if homes is None:
        _refuse_wide(model, dtype)
        made |= {"trust_remote_code": hub.get("trust_remote_code", False)}
        model, info = _offloaded(folder, kind, devices, made, settings.get("offload_folder"))
    else:
        _fill(model, stacks, homes, device)
        info = {}
        model.hf_device_map = devices
        _finish(model, folder, dtype)
    for stack in stacks:
        for block in model.get_submodule(stack.path):
            hold_while_running(block)
    stored = {tensor.dtype for tensor in weights.tensors.values()}
    _SOURCES[model] = Streamed(folder, {DTYPES.get(each) for each in stored} <= {dtype})
    return model, info


def _empty(kind: Any, config: PretrainedConfig, settings: dict[str, Any], *, remote_code: bool) -> PreTrainedModel:
    """The model without parameters; its buffers are computed."""
    with init_empty_weights(include_buffers=False):
        if issubclass(kind, PreTrainedModel):
            model = kind._from_config(config, **settings)
        else:
            model = kind.from_config(config, trust_remote_code=remote_code, **settings)
    # Inside, every tensor was replaced by one of its own.
    model.tie_weights()
    return model


def _device(settings: Mapping[str, Any]) -> torch.device:
    """The one device that everything runs on."""
    unknown = sorted(name for name, value in settings.items() if name not in _ARGUMENTS and value is not None)
    if unknown:
        raise ConfigurationError(
            f"{', '.join(unknown)} cannot be used with stream=True, which takes {', '.join(_ARGUMENTS)} and what says "
            "where files come from. Leave it out, or load the model without stream."
        )
    wanted = settings.get("device_map")
    if isinstance(wanted, Mapping) and list(wanted) == [""]:
        wanted = wanted[""]
    try:
        return torch.device("cpu" if wanted is None else wanted)
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(
            f"device_map={settings['device_map']!r} does not go with stream=True: blocks stay in their files, and all "
            "of them run on one device. Name that one (device_map='cuda:0'), or leave out stream=True."
        ) from error


def _local(path: str, hub: Mapping[str, Any]) -> Path:
    """The folder of the files, fetched where `path` is a repo id."""
    if "gguf_file" in hub:
        raise UnsupportedModelError(
            f"stream=True reads safetensors files, and {hub['gguf_file']} is none. Load it without stream=True, and "
            "save it: the folder can be streamed."
        )
    folder, inside = Path(path), hub.get("subfolder", "")
    if not folder.is_dir():
        folder = _fetched(path, inside, {name: hub[name] for name in _DOWNLOAD if name in hub})
    folder = folder / inside
    if (folder / _ADAPTER_FILE).is_file():
        raise CheckpointError(f"'{folder}' holds a PEFT adapter; merge it into its model and save the result.")
    if not any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
        found = sorted(file.name for file in folder.iterdir() if file.is_file())
        raise CheckpointError(
            f"stream=True reads {WEIGHTS_FILE} or {INDEX_FILE}, and '{folder}' has neither ({', '.join(found[:5])}). "
            "Load the model without stream=True, and save it: the folder can be streamed."
        )
    return folder


def _fetched(repo: str, inside: str, hub: dict[str, Any]) -> Path:
    """Downloads the weights: the index first, since a repository may hold other weights as well."""

    def download(names: Sequence[str]) -> Path:
        patterns = [f"{inside}/{name}" if inside else name for name in names]
        return Path(snapshot_download(repo, allow_patterns=patterns, **hub))

    folder = download([WEIGHTS_FILE, INDEX_FILE, "config.json", "generation_config.json", _ADAPTER_FILE])
    index = folder / inside / INDEX_FILE
    if index.is_file() and not (folder / inside / WEIGHTS_FILE).is_file():
        folder = download(shard_names(index))
    return folder


def _dtype_of(wanted: Any, config: PretrainedConfig, weights: StoredWeights) -> torch.dtype:
    """The dtype that `from_pretrained` gives the model."""
    wanted = _DTYPE if wanted is None else wanted
    if wanted != "auto":
        return getattr(torch, wanted) if isinstance(wanted, str) else wanted
    named = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if named is not None:
        return getattr(torch, named) if isinstance(named, str) else named
    stored = (DTYPES.get(tensor.dtype) for tensor in weights.tensors.values())
    return next((dtype for dtype in stored if dtype is not None and dtype.is_floating_point), torch.float32)


def _keeps_wide(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether transformers keeps some modules of this class in fp32 where half precision is asked for."""
    halves = {
        "_keep_in_fp32_modules": (torch.float16,),
        "_keep_in_fp32_modules_strict": (torch.float16, torch.bfloat16),
    }
    return any(dtype in dtypes and getattr(model, name, None) for name, dtypes in halves.items())


def _follow_dtypes(model: PreTrainedModel, skeleton: PreTrainedModel) -> None:
    """Gives every parameter the dtype that it has where transformers loads the model."""
    wanted = dict(skeleton.named_parameters(remove_duplicate=False))
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name in wanted and parameter.dtype != wanted[name].dtype:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, nn.Parameter(parameter.to(wanted[name].dtype), False))
    model.tie_weights()


def _refuse_wide(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """transformers forgets of tensors on "disk" that they stay in fp32."""
    if _keeps_wide(model, dtype):
        raise UnsupportedModelError(
            f"'{model.config.model_type}' cannot be streamed in {dtype}: some of its modules stay in float32, and "
            "tensors change while they are loaded. Use stream=True with dtype='float32', or load the model without it."
        )


def _device_map(model: PreTrainedModel, stacks: Sequence[BlockStack], device: str) -> dict[str, str]:
    """Blocks on disk, everything else on the device, in as few entries as that takes."""
    lists = [stack.path for stack in stacks]

    def entries(name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
        if name in lists:
            yield from ((f"{name}.{block}", "disk") for block in range(len(module)))
        elif any(path.startswith(f"{name}.") for path in lists) or not name:
            start = f"{name}." if name else ""
            direct = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            yield from ((f"{start}{tensor}", device) for tensor, _ in direct)
            for child, inner in module.named_children():
                yield from entries(f"{start}{child}", inner)
        else:
            yield name, device

    return dict(entries("", model))


def _fill(model: PreTrainedModel, stacks: Sequence[BlockStack], homes: Homes, device: torch.device) -> None:
    """Reads what lies outside the blocks; lets accelerate fetch the blocks."""
    reader = FileWeights(homes)
    paths = tuple(f"{stack.path}." for stack in stacks)
    for names, tensor in tensors_of(model):
        inside = [name.startswith(paths) for name in names]
        if isinstance(tensor, nn.Parameter) and all(inside):
            continue
        value = reader[names[0]].to(device)
        if isinstance(tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=tensor.requires_grad)
        for name in names:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, value)
    for stack in stacks:
        for number, block in enumerate(stack.blocks):
            attach_align_device_hook(
                block,
                execution_device=device,
                offload=True,
                weights_map=reader,
                module_name=f"{stack.path}.{number}",
                skip_keys=getattr(model, "_skip_keys_device_placement", None),
            )
    for name, buffer in list(model.named_buffers()):
        if buffer.device != device:
            parent, _, last = name.rpartition(".")
            model.get_submodule(parent)._buffers[last] = buffer.to(device)


def _finish(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """What `from_pretrained` does beside reading weights."""
    model.config.dtype = dtype
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


# Leaving it to transformers


def _offloaded(
    folder: Path, kind: Any, devices: dict[str, str], settings: Mapping[str, Any], given: str | Path | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Loads with the blocks on "disk" by transformers and accelerate; see the module docstring."""
    place = Path(tempfile.mkdtemp(prefix="blockprune-stream-") if given is None else given)
    logger.info(f"Tensors of '{folder}' change while transformers loads them; what becomes of them is in '{place}'.")
    arguments = {**settings, "offload_folder": os.fspath(place), "device_map": devices}
    try:
        with warnings.catch_warnings():
            # Tensors that belong to no module below are in the map, too.
            warnings.filterwarnings("ignore", "The following device_map keys do not match", UserWarning)
            model, info = kind.from_pretrained(folder, **arguments, output_loading_info=True, local_files_only=True)
    except BaseException:
        if given is None:
            shutil.rmtree(place, ignore_errors=True)
        raise
    if given is None:
        weakref.finalize(model, shutil.rmtree, place, ignore_errors=True)
    return model, info
