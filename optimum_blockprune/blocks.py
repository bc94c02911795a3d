# SPDX-License-Identifier: Apache-2.0
"""Finds a block list of a live model by structure, and refuses models whose blocks are not plain modules.

No model names: the list is a `ModuleList` as long as the configuration says, in a module with a configuration of the
same class, outside vision and audio towers, on the right side of an encoder-decoder, the largest by parameters; lists
of the same length beside it belong to it and are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from .architectures import Layout, layout_for
from .errors import UnsupportedModelError
from .kinds import STACKS


_OTHER_TOWERS = re.compile(r"vision|visual|audio|speech|image|(?<![a-z])mtp", re.IGNORECASE)


@dataclass(frozen=True)
class BlockStack:
    """The blocks of one stack of a live model.

    Attributes:
        model: The model they belong to.
        layout: How the configuration describes them.
        path: Name of the list inside the model, such as `model.layers`.
        blocks: The list itself; its entries are the blocks in order.
    """

    model: PreTrainedModel
    layout: Layout
    path: str
    blocks: nn.ModuleList

    def __len__(self) -> int:
        return len(self.blocks)


def find_blocks(model: PreTrainedModel, stack: str | None = None) -> BlockStack:
    """Returns the block list of a model.

    Args:
        model: A loaded model.
        stack: `"decoder"` or `"encoder"` of an encoder-decoder; by default its decoder.

    Raises:
        UnsupportedModelError: Not a plain `PreTrainedModel` (quantised, PEFT-wrapped, compiled), or no single list
            fits the configuration.
    """
    refuse_wrapped(model)
    layout = layout_for(model, stack)
    lists = _candidates(model, layout)
    if not lists:
        raise UnsupportedModelError(
            f"{layout.subject}: found no list of {layout.num_blocks} blocks in {type(model).__name__}."
        )
    path, blocks = max(lists, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))
    parent = path.rpartition(".")[0]
    beside = [name for name, _ in lists if name != path and name.rpartition(".")[0] == parent]
    if beside:
        raise UnsupportedModelError(
            f"{layout.subject} spreads a block over parallel lists ({path}, {', '.join(beside)}), which this version "
            "does not cut."
        )
    if len({id(block) for block in blocks}) != len(blocks):
        raise UnsupportedModelError(f"{layout.subject} uses one block module at several depths.")
    return BlockStack(model, layout, path, blocks)


def _candidates(model: PreTrainedModel, layout: Layout) -> list[tuple[str, nn.ModuleList]]:
    """Lists of the right length that do not belong to another stack or tower."""
    others = set(STACKS) - {layout.stack} if len(layout.kind.stacks) > 1 else set()
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == layout.num_blocks
        and next(module.parameters(), None) is not None  # tables of angles are no blocks
        and _side(name) not in others
    ]
    # A tower of another kind has a configuration of another class, or says in its name what it is.
    ours = [(name, module) for name, module in lists if _config_class(model, name) is type(layout.config)]
    plain = [(name, module) for name, module in ours or lists if not _OTHER_TOWERS.search(name)]
    return plain or ours


def _side(name: str) -> str | None:
    """The stack that a name speaks of first: the decoder may be a whole model with an `encoder` of its own."""
    return next((part for part in name.split(".") if part in STACKS), None)


def _config_class(model: PreTrainedModel, name: str) -> type | None:
    """Class of the configuration of the nearest module above that has one."""
    while name:
        name = name.rpartition(".")[0]
        config = getattr(model.get_submodule(name), "config", None)
        if config is not None:
            return type(config)
    return None


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
