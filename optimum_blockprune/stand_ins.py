# SPDX-License-Identifier: Apache-2.0
"""Modules that take a block's place in the model's list while the runner runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Form:
    """How a model's blocks return their result, and which arguments of the next block its parts become.

    Attributes:
        kind: Type of the return value: a tensor, or a tuple or list that begins with the hidden states.
        length: Number of its parts; 0 for a tensor.
        carried: Part -> position or name of the argument under which the next block receives the same object. Most
            models carry the hidden states only; some a second stream beside them (router states, position biases).
    """

    kind: type
    length: int
    carried: Mapping[int, int | str]


class _StandIn(nn.Module):
    """Takes a block's place and answers for its attributes (`attention_type`, `layer_idx`, ...)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # Not a submodule: its parameters must not be seen, moved or hooked through the stand-in.
        object.__setattr__(self, "_block", block)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_block"), name)


class Bypass(_StandIn):
    """Hands on what comes in, in the form in which the model's blocks return it."""

    def __init__(self, block: nn.Module, form: Form) -> None:
        super().__init__(block)
        self._form = form

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # A copy: some models change hidden states in place between blocks, which must not reach what came before.
        hidden = incoming_hidden(args, kwargs).clone()
        if not self._form.length:
            return hidden
        rest = [_argument(self._form.carried.get(part), args, kwargs) for part in range(1, self._form.length)]
        return self._form.kind((hidden, *rest))


class Replay(_StandIn):
    """Returns a copy of a stored output: a block may change its input in place, the store must stay."""

    def __init__(self, block: nn.Module, value: Any) -> None:
        super().__init__(block)
        self._value = value

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return map_tensors(self._value, Tensor.clone)


@contextmanager
def exchanged(blocks: nn.ModuleList, others: Mapping[int, nn.Module]) -> Iterator[None]:
    """Exchanges entries of a block list; the blocks themselves are not touched."""
    entries = blocks._modules
    originals = dict(entries)
    try:
        entries.update((str(block), other) for block, other in others.items())
        yield
    finally:
        entries.update(originals)


@contextmanager
def hooks() -> Iterator[Callable[[Any], None]]:
    """Collects handles of hooks and removes them at the end."""
    handles: list[Any] = []
    try:
        yield handles.append
    finally:
        for handle in handles:
            handle.remove()


def learn_form(outputs: Sequence[Any], arguments: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> Form:
    """Finds out from one run how blocks return and receive their streams.

    Args:
        outputs: What the blocks returned, in order.
        arguments: What they were called with.
    """
    first = outputs[0]
    parts = len(first) if isinstance(first, (tuple, list)) else 0
    carried: dict[int, int | str] = {}
    for output, (args, kwargs) in zip(outputs, arguments[1:], strict=False):
        given = {**dict(enumerate(args)), **kwargs}
        for part in range(1, parts):
            value = output[part]
            if value is not None and not isinstance(value, (bool, int, float, str)):
                carried.update((part, name) for name, argument in given.items() if argument is value)
    return Form(type(first), parts, carried)


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


def bytes_of(value: Any) -> int:
    """What the tensors in nested tuples and lists take."""
    sizes: list[int] = []
    map_tensors(value, lambda tensor: sizes.append(tensor.nbytes) or tensor)
    return sum(sizes)


def rows_of(value: Any, rows: slice, windows: int) -> Any:
    """The given windows of a stored output; tensors without a window dimension are passed on whole."""
    return map_tensors(value, lambda tensor: tensor[rows] if tensor.shape[:1] == (windows,) else tensor)


def _argument(name: int | str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(name, int):
        return args[name] if name < len(args) else None
    return kwargs.get(name)
