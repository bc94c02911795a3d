# SPDX-License-Identifier: Apache-2.0
"""Runs a causal language model with blocks switched off or replayed, without knowing which model it is.

The model's own `forward` is called every time, so masks, rotary tables, per-layer keyword arguments, caches and
device hooks stay the model's business. Only entries of its block list are exchanged for stand-ins while it runs:

* a `Bypass` hands the incoming hidden states on: a block that is off, or one that need not run;
* a `Replay` hands out a stored block output, whatever comes in: everything before it need not run.

A run can also end after a block; the head then never runs. All exchanges are undone in `finally`.

What is *not* covered: models whose blocks pass more between each other than their return value (`check_replay`
refuses those), and encoder-decoders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import BlockStack, find_blocks
from .calibration import Batch
from .errors import NonFiniteError, UnsupportedModelError
from .stand_ins import Bypass, Replay, hidden_of, incoming_hidden, map_tensors


# Logits of one head call: 2**26 values are 256 MiB in float32. One window is the least that a call can score.
_MAX_LOGITS = 2**26


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


class _EndOfRun(Exception):
    """Leaves the model's forward once the last wanted block has run; never leaves this module."""


class BlockRunner:
    """Runs a model block by block; see the module docstring.

    Args:
        model: A causal `PreTrainedModel`, wherever its weights lie (CPU, GPU, several devices, offloaded).

    Raises:
        UnsupportedModelError: The block list cannot be found.
    """

    def __init__(self, model: nn.Module) -> None:
        self.stack: BlockStack = find_blocks(model)
        self.model = model
        self.counters = Counters()
        self._return_type: tuple[type, int] | None = None
        self._takes_positions = "position_ids" in signature(model.forward).parameters

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the model."""
        return len(self.stack)

    @property
    def device(self) -> torch.device:
        """Where inputs go. Offloaded weights lie on `meta`; accelerate's hooks then move the inputs themselves."""
        device = self.model.get_input_embeddings().weight.device
        return torch.device("cpu") if device.type == "meta" else device

    # --- what strategies and the gate use -------------------------------------------------------------------------

    def logits(self, batch: Batch, off: Collection[int] = ()) -> Tensor:
        """Returns the logits [B, S, vocabulary] of the model with the blocks `off` switched off."""
        return self._run(batch, off)

    def stream(self, batch: Batch, visit: Callable[[int, Tensor], None]) -> None:
        """Runs all blocks once, without the head, and shows the residual stream at every boundary.

        Args:
            batch: Input windows.
            visit: Called as `visit(position, hidden)` for position 0 (input of block 0) to T (output of the last
                block) in order; `hidden` is [B, S, d] on the device of the block, valid during the call, read-only.
        """
        self._learn_return_type()  # before the hooks: its probe is not part of the stream
        with self._hooks() as hook:
            enter = self.stack.blocks[0].register_forward_pre_hook
            hook(enter(lambda _, args, kwargs: visit(0, incoming_hidden(args, kwargs)), with_kwargs=True))
            for index, block in enumerate(self.stack.blocks):
                hook(block.register_forward_hook(_visitor(index, visit)))
            self._run(batch, (), stop=self.num_blocks - 1)

    def run_to(
        self, batch: Batch, stop: int, off: Collection[int] = (), start: BlockOutput | None = None
    ) -> BlockOutput:
        """Runs from after `start` (the embeddings without it) to the end of block `stop` and returns its output."""
        return BlockOutput(stop, self._run(batch, off, start=start, stop=stop))

    def nll(self, batch: Batch, off: Collection[int] = (), start: BlockOutput | None = None) -> tuple[Tensor, int]:
        """Returns the summed next-token negative log-likelihood (nats, float64 scalar) and the number of predictions.

        Positions whose own token or whose next token is padding are left out. Only the blocks after `start` that
        are not `off` run; the head runs on as many windows at a time as keep its logits small.
        """
        last = max((block for block in range(self.num_blocks) if block not in off), default=None)
        if last is None:
            raise UnsupportedModelError("A run needs at least one block that is not switched off.")
        reached = start if start is not None and start.block >= last else self.run_to(batch, last, off, start)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        count = 0
        for rows in self._head_rows(batch):
            part = Batch(batch.input_ids[rows], None if batch.attention_mask is None else batch.attention_mask[rows])
            state = BlockOutput(self.num_blocks - 1, _rows_of(reached.value, rows, len(batch.input_ids)))
            loss, predictions = token_nll(self._run(part, (), start=state), part)
            total += loss.to(total.device)
            count += predictions
        return total, count

    def check_replay(self, batch: Batch) -> None:
        """Proves on `batch` that resuming after each block gives the logits of a plain run.

        Raises:
            UnsupportedModelError: The blocks share more than their return value, so that prefixes cannot be reused.
        """
        plain = self._run(batch, ())
        state = None
        for block in range(self.num_blocks):
            state = self.run_to(batch, block, start=state)
            if not torch.allclose(self._run(batch, (), start=state), plain, rtol=1e-4, atol=1e-4, equal_nan=True):
                raise UnsupportedModelError(
                    f"Model type '{self.model.config.model_type}': resuming after block {block} does not give the "
                    "model's own output, so its blocks share more than their hidden states. Use a one-pass strategy."
                )

    def diagnose(self, batch: Batch, off: Collection[int] = ()) -> None:
        """Raises `NonFiniteError` naming the first block whose output is not finite; returns if there is none."""
        state = None
        for block in range(self.num_blocks):
            if block in off:
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
        off: Collection[int],
        *,
        start: BlockOutput | None = None,
        stop: int | None = None,
    ) -> Any:
        """One call of the model's forward; returns the logits, or the output of block `stop`."""
        self._learn_return_type()
        first = 0 if start is None else start.block + 1
        end = self.num_blocks if stop is None else stop + 1
        live = [block for block in range(first, end) if block not in off]
        reached: list[Any] = []

        def finish(_module: nn.Module, _args: Any, output: Any) -> None:
            reached.append(output)
            raise _EndOfRun

        with self._stand_ins(set(range(self.num_blocks)) - set(live), start), self._hooks() as hook:
            if stop is not None:
                hook(self.stack.blocks[stop].register_forward_hook(finish))
            try:
                output = self._forward(batch)
            except _EndOfRun:
                output = None
        self.counters.block_forwards += len(live) * len(batch.input_ids)
        if stop is not None:
            return reached[0]
        self.counters.head_forwards += len(batch.input_ids)
        return output

    def _forward(self, batch: Batch) -> Tensor:
        inputs = batch.to(self.device)
        # A mask of ones would only take kernels off their fast path.
        masks = {} if inputs.attention_mask is None else {"attention_mask": inputs.attention_mask.long()}
        if masks and not batch.attention_mask[:, 0].all() and self._takes_positions:
            # Padding on the left: absolute positions count from the first real token, as in `generate`.
            masks["position_ids"] = (masks["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with evaluating(self.model):
            return self.model(input_ids=inputs.input_ids, use_cache=False, return_dict=True, **masks).logits

    def _learn_return_type(self) -> None:
        """Finds out once whether blocks return a tensor or a tuple, so that bypassed ones return the same."""
        if self._return_type is not None:
            return
        seen: list[Any] = []
        probe = Batch(torch.zeros(1, 2, dtype=torch.long), None)

        def finish(_module: nn.Module, _args: Any, output: Any) -> None:
            seen.append(output)
            raise _EndOfRun

        with torch.no_grad(), self._hooks() as hook:
            hook(self.stack.blocks[0].register_forward_hook(finish))
            with suppress(_EndOfRun):
                self._forward(probe)
        if not seen or not isinstance(hidden_of(seen[0]), Tensor):
            raise UnsupportedModelError(
                f"Model type '{self.model.config.model_type}': its forward does not run the blocks in "
                f"'{self.stack.path}' one after the other."
            )
        output = seen[0]
        self._return_type = (type(output), len(output) if isinstance(output, (tuple, list)) else 0)

    def _head_rows(self, batch: Batch) -> Iterator[slice]:
        windows, length = batch.input_ids.shape
        vocabulary = self.model.config.vocab_size
        step = max(1, _MAX_LOGITS // (length * vocabulary))
        return (slice(row, row + step) for row in range(0, windows, step))

    @contextmanager
    def _stand_ins(self, idle: set[int], start: BlockOutput | None) -> Iterator[None]:
        """Exchanges idle blocks in the model's list; the blocks themselves are not touched."""
        entries = self.stack.blocks._modules
        originals = dict(entries)
        try:
            for block in idle:
                if start is not None and block == start.block:
                    entries[str(block)] = Replay(originals[str(block)], start.value)
                else:
                    entries[str(block)] = Bypass(originals[str(block)], self._return_type)
            yield
        finally:
            entries.update(originals)

    @contextmanager
    def _hooks(self) -> Iterator[Callable[[Any], None]]:
        handles: list[Any] = []
        try:
            yield handles.append
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model in evaluation mode; afterwards each module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def token_nll(logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """Summed next-token NLL (nats, float64 scalar on the logits' device) and the number of predictions.

    Args:
        logits: [B, S, vocabulary].
        batch: The windows that gave them; predictions from or of padding are left out.
    """
    targets = batch.input_ids[:, 1:].to(logits.device)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none").double()
    if batch.attention_mask is None:
        return losses.sum(), losses.numel()
    scored = (batch.attention_mask[:, 1:] & batch.attention_mask[:, :-1]).flatten()
    # Not multiplied by the mask: a padded position may hold NaN.
    return losses[scored.to(losses.device)].sum(), int(scored.sum())


def perplexity_of(loss: float) -> float:
    """exp(mean NLL), infinite instead of an overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def _visitor(index: int, visit: Callable[[int, Tensor], None]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        visit(index + 1, hidden_of(output))

    return hook


def _rows_of(value: Any, rows: slice, windows: int) -> Any:
    """The given windows of a stored output; tensors without a window dimension are passed on whole."""
    return map_tensors(value, lambda tensor: tensor[rows] if tensor.shape[:1] == (windows,) else tensor)
