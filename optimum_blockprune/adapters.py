# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters on the blocks of a live model: put in, merged into the weights, taken out again without a trace.

LoRA: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685); the layers are those of
peft. A merge replaces what parameters hold, not the parameters, and can be taken back.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .blocks import BlockStack
from .errors import ConfigurationError, NonFiniteError, UnsupportedModelError, nearest
from .healing_spec import HealingSpec
from .offload import is_offloaded


# Name of the adapter inside peft's layers.
ADAPTER = "healing"


def require_peft() -> None:
    """Raises `ConfigurationError` with the remedy where peft is missing."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            "Healing needs peft, which is not installed: pip install 'optimum-blockprune[heal]'"
        ) from error


def target_layers(stack: BlockStack, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The linear layers that get adapters, by name inside the block list (`"0.self_attn.q_proj"`).

    A weight that is used in several places has no adapter of its own and is left out.

    Args:
        stack: The blocks.
        names: Last parts of names inside a block, such as `"q_proj"` or `"mlp.c_fc"`; all linear layers without it.

    Raises:
        ConfigurationError: No linear layer has such a name.
        UnsupportedModelError: There is nothing to adapt, or the weights are not in memory.
    """
    if is_offloaded(stack.blocks) or any(parameter.is_meta for parameter in stack.model.parameters()):
        raise UnsupportedModelError(
            f"{stack.layout.subject}: weights that are offloaded or streamed cannot be trained. Load the model on one "
            "device, without stream=True."
        )
    uses: dict[int, int] = {}
    for _, module in stack.model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    found = {
        name: module
        for name, module in stack.blocks.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and uses[id(module.weight)] == 1
    }
    if not found:
        raise UnsupportedModelError(f"{stack.layout.subject} has no linear layers of their own in its blocks.")
    inner = {name: name.partition(".")[2] for name in found}
    for name in names or ():
        if not any(_ends_in(each, name) for each in inner.values()):
            last = {each.rpartition(".")[2] for each in inner.values()}
            raise ConfigurationError(f"No linear layer of a block is called {name!r}.{nearest(name, last)}")
    if not names:
        return found
    return {name: each for name, each in found.items() if any(_ends_in(inner[name], end) for end in names)}


def _ends_in(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


@contextmanager
def adapted(stack: BlockStack, targets: Mapping[str, nn.Module], spec: HealingSpec) -> Iterator[dict[str, nn.Module]]:
    """Puts adapters on the targets, which compute nothing new yet; afterwards every module is where it was.

    Yields:
        peft's layers by the names of the targets. Only their adapters ask for gradients. They are kept in float32
        where the model is in half precision.
    """
    model = stack.model
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    flags = [(module, module.training) for module in model.modules()]
    attributes = dict(vars(stack.blocks))
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        _inject(stack, targets, spec)
        layers = {name: stack.blocks.get_submodule(name) for name in targets}
        for layer in layers.values():
            for part in (layer.lora_A, layer.lora_B):
                half = part[ADAPTER].weight.dtype in (torch.float16, torch.bfloat16)
                part[ADAPTER].to(torch.float32 if half else part[ADAPTER].weight.dtype).requires_grad_(True)
        yield layers
    finally:
        for name, module in targets.items():
            parent, _, child = name.rpartition(".")
            stack.blocks.get_submodule(parent)._modules[child] = module
        vars(stack.blocks).clear()
        vars(stack.blocks).update(attributes)
        for parameter, asked in wanted:
            parameter.requires_grad_(asked)
        for module, training in flags:
            module.training = training


def _inject(stack: BlockStack, targets: Mapping[str, nn.Module], spec: HealingSpec) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        # A pattern is held against whole names; lists are held against their ends.
        target_modules="|".join(map(re.escape, targets)),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in targets.values()),
    )
    with warnings.catch_warnings():
        # Where a block has both kinds of layers; peft then does the right thing for each.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        try:
            inject_adapter_in_model(config, stack.blocks, adapter_name=ADAPTER)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UnsupportedModelError(
                f"{stack.layout.subject}: peft puts no adapters on it: {' '.join(str(error).split())}"
            ) from error


@torch.no_grad()
def merged_weights(layers: Mapping[str, nn.Module]) -> dict[nn.Parameter, Tensor]:
    """What the weights hold once the adapters are merged into them; nothing is changed yet.

    Raises:
        NonFiniteError: An adapter holds NaN or infinity.
    """
    found: dict[nn.Parameter, Tensor] = {}
    for name, layer in layers.items():
        weight, change = layer.get_base_layer().weight, layer.get_delta_weight(ADAPTER)
        # Summed before it is rounded.
        whole = (weight.to(change.dtype) + change.to(weight.device)).to(weight.dtype)
        if not torch.isfinite(whole).all():
            raise NonFiniteError(f"The adapter of '{name}' came out with NaN or infinity: lower learning_rate.")
        found[weight] = whole
    return found


class Merge:
    """Values of parameters that can be taken back."""

    def __init__(self) -> None:
        self._before: dict[nn.Parameter, Any] = {}

    def put(self, values: Mapping[nn.Parameter, Tensor]) -> None:
        """Lets parameters hold other tensors of the same shape and dtype."""
        for parameter, value in values.items():
            self._before.setdefault(parameter, parameter.data)
            parameter.data = value

    def undo(self) -> None:
        """Lets them hold what they held, the very same tensors."""
        while self._before:
            parameter, value = self._before.popitem()
            parameter.data = value
