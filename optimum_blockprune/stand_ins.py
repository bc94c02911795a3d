# SPDX-License-Identifier: Apache-2.0
"""Modules that take a block's place in the model's list while the runner runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class _StandIn(nn.Module):
    """Takes a block's place and answers for its attributes (`attention_type`, `layer_idx`, ...)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # Not a submodule: its parameters must not be seen, moved or hooked through the stand-in.
        object.__setattr__(self, "_block", block)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_block"), name)


class Bypass(_StandIn):
    """Returns the incoming hidden states in the form in which the model's blocks return theirs."""

    def __init__(self, block: nn.Module, return_type: tuple[type, int]) -> None:
        super().__init__(block)
        self._form = return_type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = incoming_hidden(args, kwargs)
        kind, length = self._form
        return kind((hidden, *[None] * (length - 1))) if length else hidden


class Replay(_StandIn):
    """Returns a copy of a stored output: a block may change its input in place, the store must stay."""

    def __init__(self, block: nn.Module, value: Any) -> None:
        super().__init__(block)
        self._value = value

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return map_tensors(self._value, Tensor.clone)


def incoming_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a block."""
    return args[0] if args else kwargs["hidden_states"]


def hidden_of(output: Any) -> Any:
    """The hidden states in what a block returned."""
    return output[0] if isinstance(output, (tuple, list)) else output


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Applies `function` to every tensor in nested tuples and lists."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, function) for item in value)
    return value
