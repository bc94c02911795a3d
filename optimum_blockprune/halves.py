# SPDX-License-Identifier: Apache-2.0
"""The two halves of a block: what its attention adds to the residual stream, and what its MLP adds to that.

    x1 = x + attention half(x),    y = x1 + MLP half(x1)

Which modules make up which half is seen, not named: a block is run on made-up tokens, its children are put in the
order in which they run, and every place to cut this order in two is tried. It is right when

* the block is the identity with both halves off;
* without its MLP half, its output does not depend on the modules of that half, and the other way round;
* one half after the other gives, bit for bit, what the whole block gives.

A half is off when its last module returns zeros. The stream in the middle, x1, is what enters the first module of the
MLP half: that is seen, too, and not assumed. Where no cut passes, the block has no halves: attention and MLP side
by side (parallel residual), norms behind the residual sum, learned weights on the residual path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import BlockStack
from .errors import UnsupportedModelError
from .half import ATTENTION, MLP, PARTS
from .inputs import evaluating
from .stand_ins import hidden_of, hooks, incoming_hidden


@dataclass(frozen=True)
class Child:
    """A direct child of a block that runs.

    Attributes:
        name: Its name in the block.
        parts: How many values it returns; 0 for a tensor, else of a tuple that begins with one.
        kind: Type of what it returns.
    """

    name: str
    parts: int
    kind: type


@dataclass(frozen=True)
class BlockHalves:
    """The halves of one block: children in the order in which they run.

    Attributes:
        attention: Those of the attention half.
        mlp: Those of the MLP half.
        shown: Whether the first module of the MLP half is called with the stream between the halves, bit for bit.
    """

    attention: tuple[Child, ...]
    mlp: tuple[Child, ...]
    shown: bool = True

    def of(self, half: str) -> tuple[Child, ...]:
        """The children of a half."""
        return self.attention if half == ATTENTION else self.mlp

    @property
    def names(self) -> dict[str, str]:
        """The half of every child, by its name."""
        return {child.name: half for half in PARTS for child in self.of(half)}


class Silent(nn.Module):
    """Takes the place of a module of a half that is off: hands its input on, or returns zeros in its shape."""

    def __init__(self, original: nn.Module, child: Child, *, last: bool) -> None:
        super().__init__()
        # Not a submodule: see `stand_ins`.
        object.__setattr__(self, "_original", original)
        self._child, self._last = child, last

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_original"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = _first_tensor(args, kwargs)
        hidden = torch.zeros_like(hidden) if self._last else hidden
        if not self._child.parts:
            return hidden
        return self._child.kind((hidden, *[None] * (self._child.parts - 1)))


@contextmanager
def half_off(block: nn.Module, halves: BlockHalves, half: str) -> Iterator[None]:
    """Switches a half of a block off: it adds nothing to the residual stream, and none of its modules runs."""
    originals = dict(block._modules)
    children = halves.of(half)
    try:
        for child in children:
            block._modules[child.name] = Silent(originals[child.name], child, last=child is children[-1])
        yield
    finally:
        block._modules.update(originals)


def learn_halves(blocks: nn.ModuleList, forward: Callable[[], Any]) -> tuple[BlockHalves | None, ...]:
    """The halves of all blocks, `None` for those that have none.

    Args:
        blocks: The blocks of a live model.
        forward: Runs the model on made-up tokens.
    """
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    with hooks() as hook, torch.no_grad():
        for number, block in enumerate(blocks):
            keep = partial(_keep, arguments, number)
            hook(block.register_forward_pre_hook(keep, with_kwargs=True))
        forward()
    found = [
        find_halves(block, arguments[number]) if number in arguments else None for number, block in enumerate(blocks)
    ]
    known = dict.fromkeys(halves for halves in found if halves is not None)
    for number, block in enumerate(blocks):
        if found[number] is None and number in arguments:
            # A half that adds nothing does not show where it begins; in a block like the others it begins there.
            found[number] = next((each for each in known if _fits(block, each, arguments[number])), None)
    return tuple(
        None if halves is None else replace(halves, shown=_shown(block, halves, arguments[number]))
        for number, (block, halves) in enumerate(zip(blocks, found, strict=True))
    )


def _shown(block: nn.Module, halves: BlockHalves, arguments: tuple[tuple[Any, ...], Mapping[str, Any]]) -> bool:
    """Whether the stream in the middle enters the first module of the MLP half, once in a run."""
    seen: list[Tensor] = []
    with torch.no_grad(), evaluating(block):
        with half_off(block, halves, MLP):
            middle = _run(block, *arguments)
        with middle_watched(block, halves, lambda hidden: seen.append(hidden.clone())):
            _run(block, *arguments)
    return len(seen) == 1 and torch.equal(seen[0], middle)


@contextmanager
def middle_watched(block: nn.Module, halves: BlockHalves, visit: Callable[[Tensor], None]) -> Iterator[None]:
    """Shows the stream between the halves of a block whenever it runs.

    Args:
        block: A live block.
        halves: Its halves.
        visit: Called with [B, S, d], the shape of what enters the block, also where the block flattens it (OPT).
    """
    shapes: list[torch.Size] = []

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
        shapes[:] = [incoming_hidden(args, kwargs).shape]

    def middle(_module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = _first_tensor(args, kwargs)
        visit(hidden.reshape(shapes[0]) if hidden.numel() == shapes[0].numel() else hidden)

    with hooks() as hook:
        hook(block.register_forward_pre_hook(enter, with_kwargs=True))
        hook(block.get_submodule(halves.mlp[0].name).register_forward_pre_hook(middle, with_kwargs=True))
        yield


def _fits(block: nn.Module, halves: BlockHalves, arguments: tuple[tuple[Any, ...], Mapping[str, Any]]) -> bool:
    run = partial(_run, block, *arguments)
    with torch.no_grad(), evaluating(block):
        return _children_in_order(block, run) == [*halves.attention, *halves.mlp] and _proven(
            block, halves, run, run()
        )


def _keep(seen: dict[int, Any], number: int, _module: nn.Module, args: Any, kwargs: Any) -> None:
    """Keeps what a block is called with; its hidden states as they are now."""
    hidden = incoming_hidden(args, kwargs).clone()
    seen[number] = ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


class KnownHalves:
    """The halves of the blocks of a model, found when they are asked for first.

    Args:
        stack: The blocks of a live model.
        forward: Runs the model on made-up tokens.
    """

    def __init__(self, stack: BlockStack, forward: Callable[[], Any]) -> None:
        self._stack, self._forward = stack, forward
        self._found: tuple[BlockHalves | None, ...] | None = None

    def of(self, block: int) -> BlockHalves:
        """The halves of a block.

        Raises:
            UnsupportedModelError: The block has none; see the module docstring.
        """
        if self._found is None:
            self._found = learn_halves(self._stack.blocks, self._forward)
        found = self._found[block]
        if found is None:
            raise UnsupportedModelError(
                f"{self._stack.layout.subject}: block {block} has no halves that add to the residual stream one after "
                "the other (attention and MLP side by side, or norms behind the sum). Remove whole blocks."
            )
        return found

    def shown(self) -> tuple[BlockHalves, ...]:
        """The halves of all blocks, between which the stream can be looked at.

        Raises:
            UnsupportedModelError: A block has no halves, or does not show the stream between them.
        """
        found = tuple(self.of(block) for block in range(len(self._stack)))
        hidden = [block for block, halves in enumerate(found) if not halves.shown]
        if hidden:
            raise UnsupportedModelError(
                f"{self._stack.layout.subject}: in block {hidden[0]} no module takes in the stream between attention "
                "and MLP as it is, so that it cannot be looked at. Use sleb or random, or remove whole blocks."
            )
        return found

    def names(self) -> dict[str, str]:
        """To which half the modules of the blocks belong, by their names in a block.

        Raises:
            UnsupportedModelError: A block has no halves, or a name means another half in another block.
        """
        names: dict[str, str] = {}
        for block in range(len(self._stack)):
            for name, part in self.of(block).names.items():
                if names.setdefault(name, part) != part:
                    raise UnsupportedModelError(
                        f"{self._stack.layout.subject}: '{name}' belongs to the {part} half of block {block} and to "
                        "the other half of blocks before it. Remove whole blocks."
                    )
        return names


def find_halves(block: nn.Module, arguments: tuple[tuple[Any, ...], Mapping[str, Any]]) -> BlockHalves | None:
    """The halves of a block, or `None` where it has none; see the module docstring.

    Args:
        block: A live block, which is not changed.
        arguments: What the model calls it with.
    """
    args, kwargs = arguments
    run = partial(_run, block, args, kwargs)
    with torch.no_grad(), evaluating(block):
        children = _children_in_order(block, run)
        if children is None:
            return None
        whole = run()
        # From the end: a dropout behind attention is then part of its half, and the residual stream enters the other.
        for cut in reversed(range(1, len(children))):
            halves = BlockHalves(tuple(children[:cut]), tuple(children[cut:]))
            if _proven(block, halves, run, whole) and _matters(block, halves, run, whole):
                return halves
    return None


Run = Callable[..., Tensor]


def _run(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Tensor | None = None) -> Tensor:
    """The hidden states that come out; with the given ones in the place of those that go in."""
    given = incoming_hidden(args, dict(kwargs)) if hidden is None else hidden
    if args:
        args = (given.clone(), *args[1:])
    else:
        kwargs = {**kwargs, "hidden_states": given.clone()}
    return hidden_of(block(*args, **kwargs))


def _children_in_order(block: nn.Module, run: Run) -> list[Child] | None:
    """The children that run, in order; `None` where one runs twice, is no plain module, or holds weights unused."""
    seen: list[Child] = []
    handles = [
        child.register_forward_hook(
            lambda _module, _args, output, name=name: seen.append(_child(name, output)), always_call=False
        )
        for name, child in block.named_children()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    names = [child.name for child in seen]
    idle = [child for name, child in block.named_children() if name not in names]
    if len(set(names)) != len(names) or any(any(True for _ in child.parameters()) for child in idle):
        return None
    if any(True for _ in block.parameters(recurse=False)):
        return None
    return seen


def _child(name: str, output: Any) -> Child:
    return Child(name, len(output) if isinstance(output, (tuple, list)) else 0, type(output))


def _proven(block: nn.Module, halves: BlockHalves, run: Run, whole: Tensor) -> bool:
    try:
        with half_off(block, halves, MLP):
            middle = run()
            with half_off(block, halves, ATTENTION):
                nothing = run(middle)
            if not torch.equal(nothing, middle):
                return False
        with half_off(block, halves, ATTENTION):
            again = run(middle)
        return torch.equal(again, whole)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        # A cut in the wrong place gives modules what they cannot read.
        return False


def _matters(block: nn.Module, halves: BlockHalves, run: Run, whole: Tensor) -> bool:
    """Whether the block gives something else without either half: only then is the cut between them seen."""
    outputs = []
    for half in PARTS:
        with half_off(block, halves, half):
            outputs.append(run())
    return not any(torch.equal(output, whole) for output in outputs)


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    found = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if found is None:
        raise TypeError("a module of a half must be called with a tensor")
    return found
