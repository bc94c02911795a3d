# SPDX-License-Identifier: Apache-2.0
"""What it costs to remove each run of blocks (or halves) if a map in front of the gap makes up for it.

One pass over most of the windows gives, for every start, the map of every length in closed form (see `compensating`):
with y what is written to the stream s in front of the gap, T is the minimum over tokens of

    |y (T - I) - (s_end - s_start)|^2 / |s_start|^2  +  a |T - I|^2

The other windows judge: the KL divergence from the dense model of the model without that run alone, with T in its
weights. All of it is our choice; so is what it is for: such costs nearly add up over runs that are no neighbours, so
that the best set of runs is a matter of dynamic programming. Those of removals without maps add up far less well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .batches import Batch
from .branching import head_losses
from .compensating import widest, writer_before
from .errors import NonFiniteError
from .fitting import Tokens, fitting_part, solved, weights_of
from .folding import Prepared
from .folds import Fold
from .half import MLP, PARTS, Half, units_of
from .losses import predicted
from .measures import fp64_zeros
from .runner import BlockOutput
from .stand_ins import hooks
from .strategies.base import SearchContext
from .teacher import with_teacher
from .writers import Writer


# One window in so many judges; fewer where that is more than so many tokens.
JUDGES, ENOUGH_TOKENS = 4, 1024
STRENGTH = 0.3
# What the sums of the starts that one pass serves may take.
_MAX_BYTES = 2**30

# A run: its first piece and the number of blocks that it is worth.
Costs = dict[tuple[int, int], float]
Maps = dict[tuple[int, int], Tensor]


def run_costs(context: SearchContext, compensation: str) -> Costs:
    """The KL divergence, nats per token, of the model without each run alone, with its map; see the module docstring.

    Costs one pass of the dense model over most windows (more where the sums of all starts together exceed 1 GiB), and,
    per run, the blocks behind its start on the others: a quarter of the windows, or 1,024 tokens if that is less.

    Args:
        context: Of the search; runs hold up to `num_remove` blocks, and removable ones only.
        compensation: `"scale"`, `"ridge"` or `"auto"`, which here is as `"ridge"`.

    Raises:
        NonFiniteError: Statistics are NaN or infinite.
    """
    return _RunCosts(context, compensation).measured()


@dataclass(frozen=True)
class _Start:
    """Where runs begin.

    Attributes:
        piece: The first one that goes.
        counts: Numbers of blocks that may go from here on.
        before: The half that writes in front of it; `None` in front of the first block.
        writer: What can take a map there, if anything.
    """

    piece: int
    counts: tuple[int, ...]
    before: Half | None
    writer: Writer | None


class _RunCosts:
    def __init__(self, context: SearchContext, compensation: str) -> None:
        self.context, self.runner, self.row = context, context.runner, context.row
        self.compensation = compensation
        windows = context.require_windows()
        self.fitted, judges = fitting_part(windows, max(JUDGES, windows.num_tokens // ENOUGH_TOKENS))
        self.judges = with_teacher(self.runner, judges, context.batch_size)
        self.starts = [self._start(piece, counts) for piece, counts in self._counts().items()]

    def measured(self) -> Costs:
        found: Costs = {}
        with self.context.progress(sum(len(start.counts) for start in self.starts), "Runs with maps") as bar:
            for group in self._groups():
                end = bar.n + sum(len(start.counts) for start in group)
                losses = self._judged(group, bar.update)
                for start, row in zip(group, losses.tolist(), strict=True):
                    found |= {(start.piece, count): row[count - 1] for count in start.counts}
                # What was read back, or measured by another process, counts as done.
                bar.update(max(0, end - bar.n))
        return {run: cost if math.isfinite(cost) else math.inf for run, cost in found.items()}

    def _counts(self) -> dict[int, tuple[int, ...]]:
        """For every piece that runs may begin with, how many blocks they may be worth."""
        found: dict[int, list[int]] = {}
        for count in range(1, self.context.num_remove + 1):
            for piece in self.row.starts(self.context.removable, count):
                found.setdefault(piece, []).append(count)
        return {piece: tuple(found[piece]) for piece in sorted(found)}

    def _start(self, piece: int, counts: tuple[int, ...]) -> _Start:
        if piece == 0:
            return _Start(piece, counts, None, None)
        block, part = divmod(piece - 1, self.row.per_block)
        before = Half(block, PARTS[part] if self.row.per_block > 1 else MLP)
        # The half behind it goes, too, where the gap begins within a block.
        off = [] if before.part == MLP else [Half(block, MLP)]
        return _Start(piece, counts, before, writer_before(self.runner, before, off))

    def _groups(self) -> list[list[_Start]]:
        """The starts, in groups whose sums fit into memory together."""
        width = self.runner.first_hidden(next(iter(self.fitted.batches(1))).beginning()).shape[-1]
        size = max(1, _MAX_BYTES // (8 * width * width * (self.context.num_remove + 1)))
        return [self.starts[begin : begin + size] for begin in range(0, len(self.starts), size)]

    def _judged(self, group: Sequence[_Start], update: Callable[[float], object]) -> Tensor:
        """Nats per token [starts, counts] on the windows that judge."""
        maps: Maps = {}

        def measure(size: int) -> dict[str, Tensor]:
            # Only here: what was measured before needs no maps.
            if not maps:
                maps.update(self._maps(group))
            return {"losses": self._losses(group, maps, size, update)}

        found = self.context.measured(f"runs-{self.compensation}-{group[0].piece}-{len(group)}", measure)["losses"]
        tokens = sum(int(predicted(batch).sum()) for batch in self.judges.batches(self.judges.num_windows))
        return found / tokens

    def _maps(self, group: Sequence[_Start]) -> Maps:
        """T of every run that begins in the group, by its first piece and its number of blocks."""
        able = [start for start in group if start.writer is not None]
        if not able:
            return {}
        # Kept nowhere: sums of all starts are far larger than what comes of them.
        sums = replace(self.context, ledger=None).measured("maps", lambda size: self._sums(able, size))
        maps = {}
        for start in able:
            kind = widest(start.writer, self.compensation)
            fixed = {name: sums[f"{name}-{start.piece}"] for name in ("moments", "still")}
            for count in start.counts:
                found = {**fixed, "missing": sums[f"missing-{start.piece}-{count}"]}
                if not all(bool(torch.isfinite(each).all()) for each in found.values()):
                    raise NonFiniteError("NaN or infinity in the hidden states. Load the model in another dtype.")
                maps[start.piece, count] = solved(found, kind, STRENGTH)
        return maps

    def _sums(self, starts: Sequence[_Start], size: int) -> dict[str, Tensor]:
        """y'y by start, first tokens apart, and y'(s_end - s_start) by run, over this process's tokens, in fp64."""
        sums: dict[str, Tensor] = {}
        for _, batch in self.context.batches(size, self.fitted):
            tokens = Tokens.of(self.runner.positions(batch))
            watch = _Watch(starts, self.row.per_block, tokens, sums)
            with hooks() as hook:
                for start in starts:
                    module = self._module(start)
                    hook(module.register_forward_hook(watch.written(start)))
                self.runner.stream(batch, watch.reached, per_block=self.row.per_block)
        return sums

    def _module(self, start: _Start) -> nn.Module:
        return self.runner.stack.blocks[start.before.block].get_submodule(start.writer.module)

    def _losses(
        self,
        group: Sequence[_Start],
        maps: Maps,
        size: int,
        update: Callable[[float], object],
    ) -> Tensor:
        """Summed KL [starts, counts] of this process's windows."""
        shape, losses = (len(group), self.context.num_remove), None
        trunk: dict[int, BlockOutput | None] = {}
        for number, start in enumerate(group):
            prepared = {count: self._prepared(start, count, maps) for count in start.counts}
            for place, batch in self.context.batches(size, self.judges):
                state = trunk[place] = self._trunk(batch, start, trunk.get(place))
                for count, folds in prepared.items():
                    pieces = range(start.piece, start.piece + count * self.row.per_block)
                    off = [unit for each in self.row.removals(pieces) for unit in units_of(each)]
                    with folds.on():
                        last = self.runner.run_to(batch, self.runner.last_block(off), off, state)
                        found = head_losses(self.runner, batch, last).sum()
                    # On the device of the losses: reading a value after each run would stall a GPU.
                    losses = found.new_zeros(shape) if losses is None else losses
                    losses[number, count - 1] += found
                    update(len(batch.input_ids) / self.judges.num_windows)
        return torch.zeros(shape, dtype=torch.float64) if losses is None else losses

    def _trunk(self, batch: Batch, start: _Start, state: BlockOutput | None) -> BlockOutput | None:
        """The dense model's output in front of the block that takes the map, from the last state on."""
        stop = -1 if start.before is None else start.before.block - 1
        if stop < 0 or (state is not None and state.block >= stop):
            return state
        return self.runner.run_to(batch, stop, (), state)

    def _prepared(self, start: _Start, count: int, maps: Maps) -> Prepared:
        tensor = maps.get((start.piece, count))
        if tensor is None:
            return Prepared(self.runner.stack.blocks, [], {})
        fold: Fold = start.writer.fold(start.before.block, widest(start.writer, self.compensation), "map")
        return Prepared(self.runner.stack.blocks, [fold], {"map": tensor})


class _Watch:
    """Adds up what is seen of one batch; holds the stream at as many starts as a run may be long."""

    def __init__(self, starts: Sequence[_Start], per_block: int, tokens: Tokens, sums: dict[str, Tensor]) -> None:
        self._starts, self._per_block, self._tokens, self.sums = starts, per_block, tokens, sums
        self._written: dict[int, Tensor] = {}
        self._begun: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def written(self, start: _Start) -> Callable[[nn.Module, object, Tensor], None]:
        """A forward hook of the module that writes in front of `start`."""

        def keep(_module: nn.Module, _args: object, output: Tensor) -> None:
            self._written[start.piece] = output

        return keep

    def reached(self, position: int, hidden: Tensor) -> None:
        """The stream at a boundary."""
        state = self._tokens.fitted(hidden)
        for start in self._starts:
            count, rest = divmod(position - start.piece, self._per_block)
            if position == start.piece:
                weights, written = weights_of(state), self._written.pop(position)
                factor = start.writer.factor
                added = self._tokens.fitted(written).to(state.device) * factor * weights
                still = self._tokens.first(written, weights) * factor
                self._begun[position] = state, weights, added
                self._add(f"moments-{position}", added.T @ added)
                self._add(f"still-{position}", still.T @ still)
            elif rest == 0 and count in start.counts:
                before, weights, added = self._begun[start.piece]
                missing = (state.to(before.device) - before) * weights
                self._add(f"missing-{start.piece}-{count}", added.T @ missing)
                if count == start.counts[-1]:
                    del self._begun[start.piece]

    def _add(self, name: str, product: Tensor) -> None:
        total = self.sums.setdefault(name, fp64_zeros(product, *product.shape))
        total += product.to(total.device).double()
