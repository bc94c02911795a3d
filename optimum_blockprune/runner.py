# SPDX-License-Identifier: Apache-2.0
"""Runs a model with blocks switched off or replayed, without knowing which model it is.

The model's own `forward` is called every time, so masks, rotary tables, per-layer keyword arguments, caches and
device hooks stay the model's business. Only entries of its block list are exchanged for stand-ins while it runs:

* a `Bypass` hands the incoming streams on: a block that is off, or one that need not run;
* a `Replay` hands out a stored block output, whatever comes in: everything before it need not run.

A run can also end after a block; the head then never runs. All exchanges are undone in `finally`. Of an
encoder-decoder, one stack is looked at; the other one runs as it is. What is *not* covered: models whose blocks pass
more between each other than their return value (`check_replay` refuses those).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch
from .blocks import BlockStack, find_blocks
from .errors import NonFiniteError, UnsupportedModelError
from .forms import EndOfRun, learned
from .half import Unit, blocks_off, single_halves
from .halves import KnownHalves, half_off, middle_watched
from .inputs import Caller, evaluating, probe_batch, vocabulary_of
from .kinds import ENCODER
from .losses import head_rows, token_nll
from .offload import is_offloaded
from .stand_ins import Bypass, Form, Replay, exchanged, hidden_of, hooks, incoming_hidden, rows_of


@dataclass
class Counters:
    """What the runner has spent: blocks and heads are counted per window, so that the batch size does not matter."""

    block_forwards: int = 0
    head_forwards: int = 0


@dataclass(frozen=True)
class BlockOutput:
    """What block `block` returned for a batch, stored so that a later run can start after it.

    `value` is the block's own return value: hidden states [B, S, d], or a tuple that begins with them.
    """

    block: int
    value: Any


class BlockRunner:
    """Runs a model block by block; see the module docstring.

    Args:
        model: A `PreTrainedModel`, wherever its weights lie (CPU, GPU, several devices, offloaded).
        stack: `"decoder"` or `"encoder"` of an encoder-decoder; by default its decoder.

    Raises:
        UnsupportedModelError: The block list cannot be found.
    """

    def __init__(self, model: nn.Module, stack: str | None = None) -> None:
        self.stack: BlockStack = find_blocks(model, stack)
        self.model = model
        self.counters = Counters()
        self._form: Form | None = None
        self._call = Caller(model, self.stack.layout)
        self.halves = KnownHalves(self.stack, lambda: self._forward(probe_batch(model, self.stack.layout)))

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the model."""
        return len(self.stack)

    @property
    def device(self) -> torch.device:
        """Where inputs go. Offloaded weights lie on `meta`; accelerate's hooks then move the inputs themselves."""
        try:
            device = next(self.model.get_input_embeddings().parameters()).device
        except NotImplementedError:  # a model of several inputs has no one embedding
            device = next(self.model.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

    # --- what strategies and the gate use -------------------------------------------------------------------------

    def logits(self, batch: Batch, off: Collection[Unit] = (), start: BlockOutput | None = None) -> Tensor:
        """Returns the logits [B, S, vocabulary] without the blocks `off`; only what comes after `start` runs."""
        return self._run(batch, off, start=start)

    def stream(self, batch: Batch, visit: Callable[[int, Tensor], None], *, per_block: int = 1) -> None:
        """Runs all blocks once, without the head, and shows the residual stream at every boundary.

        Args:
            batch: Input windows.
            visit: Called as `visit(position, hidden)` for position 0 (input of block 0) to T (output of the last
                block) in order; `hidden` is [B, S, d] on the device of the block, valid during the call, read-only.
            per_block: 2 also shows the stream between the halves of every block: position 2i is the input of block
                i, 2i + 1 what enters its MLP half, 2T the output of the last block.

        Raises:
            UnsupportedModelError: The model runs some blocks several times, so that there is no one stream; or see
                `KnownHalves.shown`.
        """
        seen = iter(range(per_block * self.num_blocks + 1))

        def in_order(position: int, hidden: Tensor) -> None:
            if position != next(seen, None):
                raise UnsupportedModelError(
                    f"{self.stack.layout.subject} runs some blocks several times in one pass, so that what one does "
                    "to the stream has no one measure. Use sleb with --strategy-option search=naive, or name blocks."
                )
            visit(position, hidden)

        self._learn_form()  # before the hooks: these probes are not part of the stream
        halves = self.halves.shown() if per_block > 1 else ()
        with ExitStack() as watched, hooks() as hook:
            enter = self.stack.blocks[0].register_forward_pre_hook
            hook(enter(lambda _, args, kwargs: in_order(0, incoming_hidden(args, kwargs)), with_kwargs=True))
            for index, block in enumerate(self.stack.blocks):
                hook(block.register_forward_hook(_visitor(per_block * (index + 1), in_order)))
                if halves:
                    middle = partial(in_order, per_block * index + 1)
                    watched.enter_context(middle_watched(block, halves[index], middle))
            self._run(batch, (), stop=self.num_blocks - 1)

    def observe(
        self,
        batch: Batch,
        visits: Mapping[nn.Module, Callable[[Tensor, Any], None]],
        *,
        start: BlockOutput | None = None,
        stop: int | None = None,
    ) -> BlockOutput:
        """Runs blocks once, without the head, and shows what goes into some modules and what comes out.

        Args:
            batch: Input windows.
            visits: Called as `visit(input, output)` whenever the module has run; both are valid during the call only.
            start: The block output to start after; the embeddings without it.
            stop: The last block to run; the last one of all unless given.
        """
        self._learn_form()
        stop = self.num_blocks - 1 if stop is None else stop
        with hooks() as hook:
            for module, visit in visits.items():
                hook(module.register_forward_hook(_observer(visit), with_kwargs=True))
            return self.run_to(batch, stop, start=start)

    def positions(self, batch: Batch) -> Tensor:
        """Bool [B, S] on the CPU: the tokens of the stack that are not padding, in the shape of its hidden states.

        Where an encoder looks at sound, they are frames.
        """
        if not batch.extra:
            mask = batch.attention_mask
            return torch.ones(batch.input_ids.shape, dtype=torch.bool) if mask is None else mask.cpu().bool()
        shape = tuple(self.first_hidden(batch).shape[:2])
        reads = self.stack.layout.stack == ENCODER and len(self.stack.layout.kind.stacks) > 1
        mask = batch.extra.get("attention_mask") if reads else batch.attention_mask
        # Another shape: the mask is about samples of sound, the states about frames.
        matches = mask is not None and tuple(mask.shape) == shape
        return mask.cpu().bool() if matches else torch.ones(shape, dtype=torch.bool)

    def arguments_of(self, block: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model calls a block with, on made-up tokens."""
        self._learn_form()
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append((args, kwargs))
            raise EndOfRun

        with torch.no_grad(), hooks() as hook, suppress(EndOfRun):
            hook(self.stack.blocks[block].register_forward_pre_hook(enter, with_kwargs=True))
            self._forward(probe_batch(self.model, self.stack.layout))
        if not seen:
            raise UnsupportedModelError(f"{self.stack.layout.subject}: block {block} does not run on text alone.")
        return seen[0]

    def first_hidden(self, batch: Batch) -> Tensor:
        """The hidden states [B, S, d] that go into the first block; runs what lies before it."""
        self._learn_form()
        seen: list[Tensor] = []

        def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append(incoming_hidden(args, kwargs))
            raise EndOfRun

        with torch.no_grad(), hooks() as hook, suppress(EndOfRun):
            hook(self.stack.blocks[0].register_forward_pre_hook(enter, with_kwargs=True))
            self._forward(batch)
        return seen[0]

    def run_to(
        self, batch: Batch, stop: int, off: Collection[Unit] = (), start: BlockOutput | None = None
    ) -> BlockOutput:
        """Runs from after `start` (the embeddings without it) to the end of block `stop` and returns its output."""
        return BlockOutput(stop, self._run(batch, off, start=start, stop=stop))

    def nll(self, batch: Batch, off: Collection[Unit] = (), start: BlockOutput | None = None) -> tuple[Tensor, int]:
        """Returns the summed negative log-likelihood (nats, float64 scalar) and the number of predictions.

        Each token predicts the next one, or the labels at their own positions where the batch has any (masked
        tokens). Positions whose own token or whose next token is padding are left out. Only the blocks after `start`
        that are not `off` run; the head runs on as many windows at a time as keep its logits small.
        """
        last = self.last_block(off)
        reached = start if start is not None and start.block >= last else self.run_to(batch, last, off, start)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        count = 0
        for rows, part in head_rows(batch, vocabulary_of(self.stack.layout)):
            state = BlockOutput(self.num_blocks - 1, rows_of(reached.value, rows, len(batch.input_ids)))
            loss, predictions = token_nll(self._run(part, (), start=state), part)
            total += loss.to(total.device)
            count += predictions
        return total, count

    def check_replay(self, batch: Batch) -> None:
        """Proves on `batch` that resuming after each block gives the logits of a plain run.

        Of offloaded blocks, slow to fetch, only the last is tried: the state there is of blocks that ran one by one.

        Raises:
            UnsupportedModelError: The blocks share more than their return value, so that prefixes cannot be reused.
        """
        plain, state = self._run(batch, ()), None
        tried = range(self.num_blocks - 1 if is_offloaded(self.stack.blocks) else 0, self.num_blocks)
        for block in range(self.num_blocks):
            try:
                state = self.run_to(batch, block, start=state)
                resumed = self._run(batch, (), start=state) if block in tried else plain
                same, cause = torch.allclose(resumed, plain, rtol=1e-4, atol=1e-4, equal_nan=True), None
            except (LookupError, TypeError, AttributeError) as error:  # a block looks for what another one left
                same, cause = False, error
            if not same:
                raise UnsupportedModelError(
                    f"{self.stack.layout.subject}: resuming after block {block} does not give the "
                    "model's own output, so its blocks share more than their hidden states. Use a one-pass strategy "
                    "or search=naive, on a model that is not offloaded."
                ) from cause

    def last_block(self, off: Collection[Unit]) -> int:
        """The last block of which something is on."""
        gone = blocks_off(off)
        last = max((block for block in range(self.num_blocks) if block not in gone), default=None)
        if last is None:
            raise UnsupportedModelError("A run needs at least one block that is not switched off.")
        return last

    def diagnose(self, batch: Batch, off: Collection[Unit] = ()) -> None:
        """Raises `NonFiniteError` naming the first block whose output is not finite; returns if there is none."""
        state, gone = None, blocks_off(off)
        for block in range(self.num_blocks):
            if block in gone:
                continue
            state = self.run_to(batch, block, off, state)
            hidden = hidden_of(state.value)
            valid = hidden if batch.attention_mask is None else hidden[batch.attention_mask.to(hidden.device)]
            if not torch.isfinite(valid).all():
                raise NonFiniteError(
                    f"NaN or infinity first appears in the output of block {block}. Check the weights, or load the "
                    "model in another dtype (float16 overflows where bfloat16 and float32 do not)."
                )

    # --- how it works ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _run(
        self,
        batch: Batch,
        off: Collection[Unit],
        *,
        start: BlockOutput | None = None,
        stop: int | None = None,
    ) -> Any:
        """One call of the model's forward; returns the logits, or the output of block `stop`."""
        self._learn_form()
        first, gone = 0 if start is None else start.block + 1, blocks_off(off)
        live = [block for block in range(first, self.num_blocks if stop is None else stop + 1) if block not in gone]
        reached: list[Any] = []

        def finish(_module: nn.Module, _args: Any, output: Any) -> None:
            reached.append(output)
            raise EndOfRun

        # Halves first: finding them runs the whole model.
        with self._half_of(live, off), self._exchanged(live, start), hooks() as hook:
            if stop is not None:
                hook(self.stack.blocks[stop].register_forward_hook(finish))
            try:
                output = self._forward(batch)
            except EndOfRun:
                output = None
        self.counters.block_forwards += len(live) * len(batch.input_ids)
        if stop is not None:
            return reached[0]
        self.counters.head_forwards += len(batch.input_ids)
        return output

    def _exchanged(self, live: list[int], start: BlockOutput | None) -> AbstractContextManager[None]:
        others: dict[int, nn.Module] = {}
        for block in set(range(self.num_blocks)) - set(live):
            original = self.stack.blocks[block]
            resumes = start is not None and block == start.block
            others[block] = Replay(original, start.value) if resumes else Bypass(original, self._form)
        return exchanged(self.stack.blocks, others)

    @contextmanager
    def _half_of(self, live: Collection[int], off: Collection[Unit]) -> Iterator[None]:
        """Switches single halves of live blocks off."""
        with ExitStack() as open_halves:
            for block, part in single_halves(off).items():
                if block in live:
                    open_halves.enter_context(half_off(self.stack.blocks[block], self.halves.of(block), part))
            yield

    def _forward(self, batch: Batch) -> Tensor:
        with evaluating(self.model):
            return self._call(batch, self.device)

    def _learn_form(self) -> None:
        """Finds out once how blocks return and receive their streams, so that bypassed ones do the same."""
        if self._form is not None:
            return
        self._form = learned(
            self.stack, lambda: self._forward(probe_batch(self.model, self.stack.layout, windows=1, length=2))
        )
        self._call.forget()


def _visitor(position: int, visit: Callable[[int, Tensor], None]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        visit(position, hidden_of(output))

    return hook


def _observer(visit: Callable[[Tensor, Any], None]) -> Callable[[nn.Module, Any, Any, Any], None]:
    def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        visit(args[0] if args else next(iter(kwargs.values())), output)

    return hook
