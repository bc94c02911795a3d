# SPDX-License-Identifier: Apache-2.0
"""Loads a model and its tokenizer for pruning, after refusing from the configuration alone what cannot be pruned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import EntryNotFoundError
from optimum.utils import logging
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .architectures import layout_for
from .errors import BlockPruningError, ConfigurationError, PlanError, UnsupportedModelError
from .per_layer import as_plain, has_own_widths, narrowed_class
from .plan import PruningPlan
from .report import REPORT_FILE, PruningReport
from .streaming import load_streamed


logger = logging.get_logger("optimum.blockprune.loading")

# What configurations, tokenizers and models take alike; everything else in **kwargs is for the model only.
_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "gguf_file",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)

# Those that name a file or a version inside the model's repository, and mean nothing in another one.
_MODEL_ONLY = ("gguf_file", "revision", "subfolder")

# How a load fails: no such file or repository, a malformed one, a package or a device that is not there.
_LOAD_ERRORS = (
    *(OSError, EOFError, ValueError, KeyError, ImportError, RuntimeError, AssertionError),
    *(SafetensorError, UnpicklingError),
)


def load_model(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Loads a model in evaluation mode, with the class that its configuration names.

    Args:
        path: Repo id, folder, or a `.gguf` file (the same as its folder with `gguf_file=`).
        **kwargs: For `from_pretrained` of that class: `revision`, `token`, `dtype`, `device_map`,
            `trust_remote_code` (False unless given), `gguf_file`, ... Our own is `stream=True`: the blocks stay in
            their safetensors files and are read one at a time whenever they run; `device_map` is then the one device
            to compute on.

    Raises:
        UnsupportedModelError: By the configuration, before any weight is read: no blocks that can go, quantised, or in
            need of `trust_remote_code=True`. By the weights: some are missing.
        ConfigurationError: The path or repository does not exist or is not a model, or an argument does not go with
            `stream=True`.
        CheckpointError: What is to be streamed is not in safetensors files.
    """
    path, kwargs = split_gguf(path, kwargs)
    stream = kwargs.pop("stream", False)
    if not isinstance(stream, bool):
        raise ConfigurationError(f"stream={stream!r} must be True or False.")
    _check_dtype(kwargs.get("dtype"))
    config = load_config(path, **hub_arguments(kwargs))
    kind = class_for(config, remote_code=kwargs.get("trust_remote_code", False))
    plan = _plan_of(path, kwargs) if has_own_widths(config) else None
    if stream and plan is not None:
        raise UnsupportedModelError(
            f"'{path}' was pruned with layout='per_layer', which stream=True does not read. Load it without stream."
        )
    loader = kind if plan is None else narrowed_class(kind, plan)
    try:
        model, info = (_streamed if stream else _loaded)(path, config, loader, kwargs)
    except _LOAD_ERRORS as error:
        raise _explained(error, path) from error
    # GGUF readers skip tensors that the class computes itself; their own reports are complete.
    missing = sorted(map(str, info.get("missing_keys") or []))
    if missing and "gguf_file" not in kwargs:
        raise UnsupportedModelError(
            f"The checkpoint '{path}' ('{config.model_type}') lacks {len(missing)} tensors that the model needs, such "
            f"as {missing[:3]}; they would be random. Get the complete checkpoint."
        )
    return dequantised(model if plan is None else as_plain(model, kind)).eval()


def _loaded(path: str, config: Any, loader: Any, kwargs: Mapping[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    return loader.from_pretrained(path, **{"trust_remote_code": False, **kwargs}, output_loading_info=True)


def _streamed(
    path: str, config: Any, loader: Any, kwargs: Mapping[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    settings = {name: value for name, value in kwargs.items() if name not in _HUB_ARGUMENTS}
    return load_streamed(path, config, loader, hub=hub_arguments(kwargs), settings=settings)


def _plan_of(path: str | Path, kwargs: Mapping[str, Any]) -> PruningPlan:
    """The plan beside a model whose configuration does not say how wide its blocks are."""
    if Path(path).is_dir():
        return PruningPlan.from_file(Path(path) / kwargs.get("subfolder", ""))
    return PruningPlan.from_hub(path, revision=kwargs.get("revision"), token=kwargs.get("token"))


def records_beside(path: str | Path, kwargs: Mapping[str, Any]) -> tuple[PruningPlan, PruningReport | None]:
    """The plan of a pruned model and its report, if there is one, from the folder or repository of the model.

    Args:
        path, kwargs: What the model was loaded with.

    Raises:
        PlanError: There is no plan, or it is malformed.
        CheckpointError: The report is malformed.
    """
    try:
        plan = _plan_of(path, kwargs)
    except EntryNotFoundError as error:
        raise PlanError(f"There is no plan in the repository '{path}'.") from error
    if Path(path).is_dir():
        folder = Path(path) / (kwargs.get("subfolder") or "")
        return plan, PruningReport.from_file(folder) if (folder / REPORT_FILE).is_file() else None
    try:
        return plan, PruningReport.from_hub(path, revision=kwargs.get("revision"), token=kwargs.get("token"))
    except EntryNotFoundError:
        return plan, None


def class_for(config: Any, *, remote_code: bool) -> type:
    """What `from_pretrained` is called on: the repository's own code where it may run, else the named class."""
    if remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    return layout_for(config).kind.auto_class


def read_config(path: str | Path, **hub: Any) -> Any:
    """Loads only the configuration, whatever it is of.

    Raises:
        ConfigurationError: There is no such path or repository, or no configuration in it.
        UnsupportedModelError: It needs `trust_remote_code=True`.
    """
    if not Path(path).exists() and (Path(path).is_absolute() or str(path).startswith(".") or str(path).count("/") > 1):
        raise ConfigurationError(f"There is no file or folder '{path}'.")
    try:
        return AutoConfig.from_pretrained(path, **{"trust_remote_code": False, **hub})
    except _LOAD_ERRORS as error:
        raise _explained(error, path) from error


def load_config(path: str | Path, **hub: Any) -> Any:
    """Loads only the configuration and refuses what cannot be pruned; see `load_model`."""
    config = read_config(path, **hub)
    layout_for(config)
    quantisation = getattr(config, "quantization_config", None)
    if quantisation and "gguf_file" not in hub:
        method = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else quantisation.quant_method
        raise UnsupportedModelError(
            f"This '{config.model_type}' checkpoint is quantised ({getattr(method, 'value', method)}). Prune the "
            "unquantised model (or dequantise this one and save it), then quantise the result."
        )
    return config


def find_tokenizer(path: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase | None:
    """Loads the tokenizer that lies with a model; `None` if there is none (only text needs one)."""
    try:
        return _tokenizer_at(path, kwargs)
    except ConfigurationError as error:
        logger.info(str(error))
        return None


def find_processor(path: str | Path, model: PreTrainedModel, **kwargs: Any) -> Any:
    """Loads what prepares images or sound, so that it travels along; `None` for a model that reads text only.

    Whatever cannot be loaded here (a processor of another library, a package that is missing) is said and left out.
    """
    if model.main_input_name == "input_ids" and layout_for(model).place == ():
        return None
    path, kwargs = split_gguf(path, kwargs)
    try:
        return AutoProcessor.from_pretrained(path, **{"trust_remote_code": False, **hub_arguments(kwargs)})
    except (*_LOAD_ERRORS, AttributeError, TypeError) as error:
        logger.warning(f"No processor can be loaded from '{path}', so none is saved: {str(error).strip()}")
        return None


def load_tokenizer(path: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a place of its own.

    Args:
        path: Repo id, folder, or a `.gguf` file.
        **kwargs: As for the model; `revision`, `subfolder` and `gguf_file` are the model's and are left out.

    Raises:
        ConfigurationError: There is no tokenizer.
    """
    return _tokenizer_at(path, {name: value for name, value in kwargs.items() if name not in _MODEL_ONLY})


def _tokenizer_at(path: str | Path, kwargs: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    path, kwargs = split_gguf(path, kwargs)
    try:
        return AutoTokenizer.from_pretrained(path, **{"trust_remote_code": False, **hub_arguments(kwargs)})
    except (*_LOAD_ERRORS, AttributeError, TypeError) as error:
        # Many kinds of failure mean "no usable tokenizer here".
        raise ConfigurationError(f"No tokenizer can be loaded from '{path}': {str(error).strip()}") from error


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Picks the arguments that say where files come from."""
    return {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}


def split_gguf(path: str | Path, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Turns a path to a `.gguf` file into its folder and `gguf_file=`; drops arguments that are `None`."""
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    path = Path(path) if Path(path).exists() else path
    if isinstance(path, Path) and path.is_file():
        if path.suffix != ".gguf":
            raise ConfigurationError(f"'{path}' is a file; give a model folder, a repo id or a .gguf file.")
        return str(path.parent), {**kwargs, "gguf_file": path.name}
    return str(path), kwargs


def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """Clears the quantisation marker of a model that was read from GGUF: its weights are ordinary tensors by then."""
    quantizer = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    if getattr(method, "value", method) == "gguf":
        model.hf_quantizer = None
        for name in ("is_quantized", "quantization_method"):
            if hasattr(model, name):
                delattr(model, name)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model


def _check_dtype(dtype: Any) -> None:
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigurationError(f"Unknown dtype {dtype!r}; possible are auto, float32, bfloat16, float16, float64.")


def _explained(error: Exception, path: str | Path) -> BlockPruningError:
    """Says in one line what a failed load needs."""
    text = str(error)
    if "trust_remote_code" in text:
        return UnsupportedModelError(
            f"'{path}' runs code from its repository. Read that code, then pass trust_remote_code=True "
            "(--trust-remote-code) if you trust it."
        )
    if isinstance(error, BlockPruningError):
        return error
    if isinstance(error, UnpicklingError):
        return UnsupportedModelError(
            f"'{path}' has .bin files that hold more than tensors, which is not read: it could run code. Get the "
            "checkpoint as safetensors."
        )
    if isinstance(error, ImportError):
        return ConfigurationError(f"Loading '{path}' needs a package that is not installed: {text}")
    return ConfigurationError(f"'{path}' cannot be loaded as a model: {text.strip()}")
