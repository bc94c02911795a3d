# SPDX-License-Identifier: Apache-2.0
"""Finds by watching a live block what surrounds its units: gate and up of the FFN, activation, norms, residual paths.

No model names. Each block is called on made-up tokens, once as it is and with units switched off; which value is equal
to which, and what moves when something else is off, tells what the modules are to each other:

* readers of the FFN: the projections whose outputs belong to its units; a fused one holds several streams;
* the gate: the stream that is also the input of a module that maps it elementwise, the activation;
* a norm before the readers: its output is their input; a norm behind a writer: its input is the writer's output;
* parallel residual: the FFN's channels stay what they are when all attention units are off;
* a residual block: without its units, output minus input (times one number) is the same for every token.

Where the activation is no module, the usual functions are tried on each stream. What is not covered: others (the gate
is then not told from up), mixtures of experts and blocks that norm after the residual sum (both end in `UNKNOWN`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import BlockStack
from .errors import UnsupportedModelError
from .inputs import evaluating, probe_batch
from .narrowing import units_off
from .norm_gain import Norm, read_norm
from .offload import held
from .runner import BlockRunner
from .stand_ins import hidden_of, hooks, incoming_hidden, map_tensors
from .trial import usable_units
from .units import input_axis
from .widths import CutTensor, UnitGroup


SEQUENTIAL, PARALLEL, UNKNOWN = "sequential", "parallel", "unknown"
# How much of a block's work may be left when all its units are off.
_REST = 0.05
_CLOSE, _SAME = 1e-2, 1e-6
_FUNCTIONS = (F.silu, F.gelu, partial(F.gelu, approximate="tanh"), F.relu, torch.sigmoid)

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Stream:
    """One output per unit of a reader: the whole of a plain projection, half of a fused one.

    Attributes:
        reader: The projection.
        entries: Long [m]: which of its outputs, in the order of the units.
    """

    reader: nn.Module
    entries: Tensor

    def of(self, outputs: Tensor) -> Tensor:
        """This stream of [..., outputs of the reader]."""
        return outputs.index_select(-1, self.entries.to(outputs.device))


@dataclass(frozen=True)
class FeedForward:
    """An FFN.

    Attributes:
        group: Its units.
        writer: The projection that they end in.
        streams: What its readers give, the gate first where it is known.
        activation: Maps the first stream elementwise; `None` where no such thing was seen.
        norm: The norm before the readers; `None` where none was seen.
        post: The norm behind the writer; `None` in most models.
        bare: Whether the readers see the residual stream itself.
        product: Whether the writer's input was seen to be the activation's output times the other stream.
    """

    group: UnitGroup
    writer: nn.Module
    streams: tuple[Stream, ...]
    activation: Activation | None
    norm: Norm | None
    post: Norm | None
    bare: bool
    product: bool

    @property
    def up(self) -> tuple[Stream, ...]:
        """What stands for the `W_U` of the paper: all but the gate, or everything where no gate was seen."""
        return self.streams[1:] if self.activation is not None and len(self.streams) > 1 else self.streams

    @property
    def reading(self) -> str:
        """In words, which weights `up` is."""
        if len(self.streams) == 1:
            return "the only reader"
        return "up" if len(self.up) == 1 else "average of gate and up"


@dataclass(frozen=True)
class BlockParts:
    """What surrounds the units of one block.

    Attributes:
        posts: The norm behind a writer, by the writer's name.
        ffns: The FFNs, those side by side all of them.
        flow: How attention reaches the FFN: `SEQUENTIAL`, `PARALLEL` (not at all), or `UNKNOWN`.
    """

    posts: Mapping[str, Norm]
    ffns: tuple[FeedForward, ...]
    flow: str


def find_parts(
    stack: BlockStack, units: Mapping[int, Sequence[UnitGroup]], *, flow: bool = True
) -> dict[int, BlockParts]:
    """Returns the parts of some blocks.

    Args:
        stack: The blocks of a live model, which is not changed.
        units: All groups of units that are known of each of them.
        flow: Whether it matters how attention reaches the FFN; FFNs that are not in `units` are then looked for.
    """
    units = {block: tuple(groups) for block, groups in units.items()}
    lacking = [block for block, groups in units.items() if not _of_family(groups, "mlp")]
    for block, groups in _ffn_groups(stack).items() if flow and lacking else ():
        if block in lacking:
            units[block] += groups
    arguments = _captured(stack, units)
    found: dict[int, BlockParts] = {}
    with evaluating(stack.model), torch.no_grad():
        for number, groups in units.items():
            with held(stack.blocks[number]):
                found[number] = _Probe(stack.blocks[number], *arguments[number]).parts(groups, flow=flow)
    return found


def _ffn_groups(stack: BlockStack) -> dict[int, tuple[UnitGroup, ...]]:
    """FFNs that the task does not name; they need not fit any layout, since nothing is cut."""
    try:
        groups, places = usable_units(stack, ("mlp",), "per_layer")
    except UnsupportedModelError:
        return {}
    found: dict[int, tuple[UnitGroup, ...]] = {}
    for group, blocks in zip(groups, places, strict=True):
        for block in blocks:
            found[block] = (*found.get(block, ()), group)
    return found


def _captured(stack: BlockStack, blocks: Collection[int]) -> dict[int, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the model calls blocks with, on made-up tokens."""
    seen: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keeper(block: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.setdefault(block, (map_tensors(args, Tensor.clone), _copied(kwargs)))

        return hook

    # A runner of its own: these few tokens are no calibration window and do not count as one.
    runner = BlockRunner(stack.model, stack.layout.stack)
    runner.arguments_of(0)  # it learns how the blocks return their streams, before anything is kept
    with hooks() as hook:
        for block in blocks:
            hook(stack.blocks[block].register_forward_pre_hook(keeper(block), with_kwargs=True))
        runner.run_to(probe_batch(stack.model, stack.layout), max(blocks))
    return seen


def _copied(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: map_tensors(value, Tensor.clone) for name, value in kwargs.items()}


@dataclass(frozen=True)
class _Record:
    """What went into a module and what came out, copies."""

    incoming: Tensor
    outgoing: Tensor


class _Probe:
    """Calls one block on the same made-up input."""

    def __init__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._block, self._args, self._kwargs = block, args, kwargs
        self._hidden = incoming_hidden(args, kwargs).clone()
        self._records, self._output = self._run(block.modules())

    def parts(self, groups: Sequence[UnitGroup], *, flow: bool) -> BlockParts:
        """What surrounds the units of `groups`."""
        attention, mlp = _of_family(groups, "attention"), _of_family(groups, "mlp")
        posts = {group.writer: self._norm_behind(self._block.get_submodule(group.writer)) for group in groups}
        posts = {writer: norm for writer, norm in posts.items() if norm is not None}
        found = (self._feed_forward(group, posts, attention) for group in mlp)
        ffns = tuple(ffn for ffn in found if ffn is not None)
        reached = self._flow(ffns, attention, mlp) if flow and attention else UNKNOWN
        return BlockParts(posts, ffns, reached)

    def _run(
        self, modules: Iterable[nn.Module], off: Sequence[UnitGroup] = ()
    ) -> tuple[dict[nn.Module, _Record], Tensor]:
        """One call, with all units of the groups `off` switched off."""
        records: dict[nn.Module, _Record] = {}

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            values = (args[0] if args else next(iter(kwargs.values()), None), hidden_of(output))
            if all(isinstance(value, Tensor) and value.is_floating_point() for value in values):
                records[module] = _Record(*(value.clone() for value in values))

        with hooks() as keep, units_off(self._block, [(group, ()) for group in off]):
            for module in modules:
                keep(module.register_forward_hook(hook, with_kwargs=True))
            output = self._block(*map_tensors(self._args, Tensor.clone), **_copied(self._kwargs))
        return records, hidden_of(output)

    def _norm_behind(self, writer: nn.Module) -> Norm | None:
        record = self._records.get(writer)
        return None if record is None else self._norm(lambda each: _equal(each.incoming, record.outgoing))

    def _norm(self, fits: Any) -> Norm | None:
        candidates = (
            read_norm(module, record.incoming, record.outgoing)
            for module, record in self._records.items()
            if fits(record)
        )
        return next((norm for norm in candidates if norm is not None), None)

    def _feed_forward(
        self, group: UnitGroup, posts: Mapping[str, Norm], attention: Sequence[UnitGroup]
    ) -> FeedForward | None:
        writer, streams = self._block.get_submodule(group.writer), _streams(self._block, group)
        if not streams or any(module not in self._records for module in (writer, *(s.reader for s in streams))):
            return None
        outputs = [stream.of(self._records[stream.reader].outgoing) for stream in streams]
        activation, gate = self._activation(outputs, {writer, *(stream.reader for stream in streams)})
        if activation is None:
            activation, gate = self._function(outputs, writer)
        product = activation is not None and self._misfit(activation, gate, outputs, writer) <= _CLOSE
        if activation is not None:
            streams = (streams[gate], *(stream for number, stream in enumerate(streams) if number != gate))
        read = self._records[streams[0].reader].incoming
        norm = self._norm(lambda record: _equal(record.outgoing, read))
        bare = norm is None and _error(read, self._residual(attention, posts)) <= _CLOSE
        return FeedForward(group, writer, streams, activation, norm, posts.get(group.writer), bare, product)

    def _activation(self, outputs: Sequence[Tensor], known: set[nn.Module]) -> tuple[Activation | None, int]:
        """The module that one of the streams goes into, and which of them."""
        for module, record in self._records.items():
            elementwise = record.incoming.shape == record.outgoing.shape and not [*module.children()]
            if module in known or not elementwise or _equal(record.incoming, record.outgoing):
                continue
            number = next((number for number, output in enumerate(outputs) if _equal(record.incoming, output)), None)
            if number is not None and read_norm(module, record.incoming, record.outgoing) is None:
                return module.forward, number
        return None, 0

    def _function(self, outputs: Sequence[Tensor], writer: nn.Module) -> tuple[Activation | None, int]:
        """The function of a stream that explains what the writer reads, and which stream."""
        tries = [(function, number) for function in _FUNCTIONS for number in range(len(outputs))]
        misfits = [self._misfit(function, number, outputs, writer) for function, number in tries]
        best = min(range(len(tries)), key=misfits.__getitem__)
        return tries[best] if misfits[best] <= _CLOSE else (None, 0)

    def _misfit(self, activation: Activation, gate: int, outputs: Sequence[Tensor], writer: nn.Module) -> float:
        """How far the writer's input is from the activation of one stream times the other."""
        factors = [activation(output) if number == gate else output for number, output in enumerate(outputs)]
        return _error(self._records[writer].incoming, reduce(torch.mul, factors)) if len(factors) < 3 else 1.0

    def _residual(self, attention: Sequence[UnitGroup], posts: Mapping[str, Norm]) -> Tensor:
        """What comes in plus what attention adds."""
        total = self._hidden.flatten()
        for group in attention:
            last = posts[group.writer].module if group.writer in posts else self._block.get_submodule(group.writer)
            total = total + self._records[last].outgoing.flatten()
        return total

    def _flow(self, ffns: Sequence[FeedForward], attention: Sequence[UnitGroup], mlp: Sequence[UnitGroup]) -> str:
        if not ffns or len(ffns) < len(mlp):
            return UNKNOWN
        without, _ = self._run([ffn.writer for ffn in ffns], attention)
        if all(_error(without[ffn.writer].incoming, self._records[ffn.writer].incoming) <= _SAME for ffn in ffns):
            return PARALLEL
        _, output = self._run((), [*attention, *mlp])
        rest, work = (_beyond_residual(self._hidden, each) for each in (output, self._output))
        rounding = torch.finfo(self._hidden.dtype).eps * _centred(self._hidden).norm()
        return SEQUENTIAL if float(rest) <= _REST * float(work) + float(rounding) else UNKNOWN


def _of_family(groups: Iterable[UnitGroup], family: str) -> list[UnitGroup]:
    return [group for group in groups if group.family == family]


def _streams(block: nn.Module, group: UnitGroup) -> tuple[Stream, ...]:
    """What the readers of an FFN give, in the order of its tensors; empty where one is no plain projection."""
    found: list[Stream] = []
    for cut in group.tensors[1:]:
        path, _, leaf = cut.name.rpartition(".")
        reader = block.get_submodule(path)
        if leaf != "weight" or reader.weight.dim() != 2:
            continue
        if input_axis(reader) != 1 - cut.axis:
            return ()
        found += (Stream(reader, entries) for entries in _entries(cut, group.units))
    return tuple(found)


def _entries(cut: CutTensor, units: int) -> Iterable[Tensor]:
    """For each of a unit's entries along the axis, where it lies in all units."""
    start, numbers = 0, torch.arange(units)
    for size in cut.parts:
        for offset in range(size):
            yield start + numbers * size + offset
        start += units * size


def _equal(one: Tensor, other: Tensor) -> bool:
    """Equal values; the shapes may differ by how tokens are arranged."""
    return one.shape[-1] == other.shape[-1] and torch.equal(one.float().flatten(), other.float().flatten())


def _error(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over the norm of `other`; the shapes may differ by how tokens are arranged."""
    if one.numel() != other.numel():
        return float("inf")
    one, other = one.float().flatten(), other.float().flatten()
    return float((one - other).norm() / other.norm().clamp_min(1e-30))


def _centred(hidden: Tensor) -> Tensor:
    flat = hidden.float().flatten(0, -2)
    return flat - flat.mean(0)


def _beyond_residual(before: Tensor, after: Tensor) -> Tensor:
    """How much of `after` is neither `before` times a number nor the same for all tokens."""
    start, end = _centred(before), _centred(after)
    factor = (start * end).sum() / start.square().sum().clamp_min(1e-30)
    return (end - factor * start).norm()
