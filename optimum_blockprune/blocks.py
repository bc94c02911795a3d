# SPDX-License-Identifier: Apache-2.0
"""Finds the block list of a live model by structure, and refuses models whose blocks are not plain modules.

No model names: the list is a `ModuleList` as long as the configuration says, outside vision and audio towers, the
largest by parameters; lists of the same length beside it belong to it and are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from .architectures import layout_for
from .errors import UnsupportedModelError


_OTHER_TOWERS = re.compile(r"vision|visual|audio|speech|image", re.IGNORECASE)


@dataclass(frozen=True)
class BlockStack:
    """The blocks of a live model.

    Attributes:
        model: The model they belong to.
        path: Name of the list inside the model, such as `model.layers`.
        blocks: The list itself; its entries are the blocks in order.
    """

    model: PreTrainedModel
    path: str
    blocks: nn.ModuleList

    def __len__(self) -> int:
        return len(self.blocks)


def find_blocks(model: PreTrainedModel) -> BlockStack:
    """Returns the block list of a decoder-only model.

    Raises:
        UnsupportedModelError: Not a plain `PreTrainedModel` (quantised, PEFT-wrapped, compiled), or no single list
            fits the configuration.
    """
    refuse_wrapped(model)
    layout = layout_for(model.config)
    if not model.can_generate():
        raise UnsupportedModelError(
            f"{type(model).__name__} ('{layout.model_type}') has no language-model head; load it with "
            "AutoModelForCausalLM."
        )
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layout.num_blocks and not _OTHER_TOWERS.search(name)
    ]
    if not lists:
        raise UnsupportedModelError(
            f"Model type '{layout.model_type}': found no list of {layout.num_blocks} blocks in {type(model).__name__}."
        )
    path, blocks = max(lists, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))
    parent = path.rpartition(".")[0]
    beside = [name for name, _ in lists if name != path and name.rpartition(".")[0] == parent]
    if beside:
        raise UnsupportedModelError(
            f"Model type '{layout.model_type}' spreads a block over parallel lists ({path}, {', '.join(beside)}), "
            "which this version does not cut."
        )
    if len({id(block) for block in blocks}) != len(blocks):
        raise UnsupportedModelError(f"Model type '{layout.model_type}' uses one block module at several depths.")
    return BlockStack(model, path, blocks)


def refuse_wrapped(model: object) -> None:
    """Raises `UnsupportedModelError` for quantised, PEFT-wrapped, compiled and foreign models; says how to unwrap."""
    kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    modules = model.modules() if isinstance(model, nn.Module) else ()
    if any(type(module).__module__.startswith("peft.") for module in modules):
        raise UnsupportedModelError(
            f"This '{kind}' model carries PEFT layers. Merge them first: model = model.merge_and_unload() on the "
            "PeftModel (load the adapter with peft.PeftModel.from_pretrained if it came by add_adapter)."
        )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        method = getattr(model, "quantization_method", None)
        raise UnsupportedModelError(
            f"This '{kind}' model is quantised ({getattr(method, 'value', method) or 'unknown method'}). Load it "
            "unquantised, or call model.dequantize() first, then prune and quantise the result."
        )
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(f"This '{kind}' model is compiled; pass the original model (model._orig_mod).")
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"Expected a transformers PreTrainedModel, got {type(model).__module__}.{type(model).__name__}."
        )
