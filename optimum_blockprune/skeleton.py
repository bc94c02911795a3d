# SPDX-License-Identifier: Apache-2.0
"""Loads a checkpoint's names and shapes into a model on the meta device; the weights are never read."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from .tensors import read_weights


_LOADS_ON_META = int(version("transformers").split(".")[0]) >= 5


def load_skeleton(
    model_class: type[PreTrainedModel], folder: str | Path, config: PretrainedConfig, **settings: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Returns the model without weights, and what transformers reports of the keys.

    Args:
        model_class: The class to load with.
        folder: The checkpoint.
        config: Its configuration, as it was read from the folder.
        **settings: For `from_pretrained`.
    """
    settings = {**settings, "config": config, "device_map": {"": "meta"}, "output_loading_info": True}
    if _LOADS_ON_META:
        return model_class.from_pretrained(folder, local_files_only=True, **settings)
    # transformers 4 opens files on the target device, and meta is none to them; tensors that are there already load.
    shapes = {name: tensor.shape for name, tensor in read_weights(Path(folder)).tensors.items()}
    state = {name: torch.empty(shape, dtype=model_dtype(config), device="meta") for name, shape in shapes.items()}
    model, report = model_class.from_pretrained(None, state_dict=state, **settings)
    if model.can_generate() and (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model, report


def model_dtype(config: PretrainedConfig) -> torch.dtype:
    """The dtype that a configuration names; float32 if it names none."""
    named = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    return getattr(torch, named) if isinstance(named, str) else named
