# SPDX-License-Identifier: Apache-2.0
"""What it costs to remove each run of blocks (or halves) if a map in front of the gap makes up for it.

One pass over most of the windows gives, for every start, the map of every length in closed form (see `compensating`):
with y what is written to the stream s in front of the gap, T is the minimum over tokens of

    |y (T - I) - (s_end - s_start)|^2 / |s_start|^2  +  a |T - I|^2

(A map of what the module writes; compensation fits what it reads, which here would be several times the work.)

The other windows judge: the KL divergence from the dense model of the model without that run alone, with T in its
weights. That is done a few times, with other windows that judge each time; after each, what clearly belongs to no good
set of runs is left out. All of it is our choice; so is what it is for: such costs nearly add up over runs that are no
neighbours, so that the best set of runs is a matter of dynamic programming. Those of removals without maps add up far
less well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .batches import Batch, CalibrationWindows
from .branching import head_losses
from .compensating import SCALE
from .errors import CalibrationError, NonFiniteError
from .fitting import Tokens, crossed_parts, solved, weights_of
from .folding import Prepared
from .folds import DIAGONAL, MATRIX, Fold
from .half import MLP, PARTS, Half, units_of
from .losses import predicted
from .measures import fp64_zeros
from .near_best import Run, near_best
from .passes import prove
from .points import writer_before
from .runner import BlockOutput
from .stand_ins import hooks
from .strategies.base import SearchContext
from .teacher import with_teacher
from .writers import Writer


# So many parts, tokens that judge in all of them, and tokens that are fitted on in each, at most.
ROUNDS, JUDGING, FITTING = 4, 2048, 32_768
# A run goes on to the next part if it is in a set of runs that costs at most so many times as much as the best one.
SLACK = 1.2
STRENGTH = 0.3
# What the sums of the starts that one pass serves may take.
_MAX_BYTES = 2**30

Costs = dict[Run, float]
Maps = dict[Run, Tensor]


@dataclass(frozen=True)
class RunCosts:
    """KL divergences, nats per token, of the model without each run alone, with its map; infinite where not finite.

    Attributes:
        first: Of all runs, on the first part of the windows that judge.
        whole: Of those that could be in a good set of runs by what was known before the last part, on all parts.
    """

    first: Costs
    whole: Costs


def run_costs(context: SearchContext, compensation: str, over: Callable[[], bool] = lambda: False) -> RunCosts:
    """What runs cost; see the module docstring.

    2,048 tokens judge (or four windows, if these are more), in four parts; maps are fitted on the other windows of a
    part, up to 32,768 tokens. For each part that is one pass of the dense model (more where the sums of all starts
    together exceed 1 GiB) and, per run, the blocks behind its start on the windows that judge.

    Args:
        context: Of the search; runs hold up to `num_remove` blocks, and removable ones only.
        compensation: `"scale"`, `"ridge"`, or another one, which here is as `"ridge"`.
        over: Asked before every part but the first, whether to do without it.

    Raises:
        CalibrationError: Fewer than two windows.
        NonFiniteError: Statistics are NaN or infinite.
        UnsupportedModelError: Runs cannot start behind a block; see `BlockRunner.check_replay`.
    """
    windows, row = context.require_windows(), context.row
    if windows.num_windows < 2:
        raise CalibrationError(
            "Maps are fitted on some windows of text and judged on others: give at least two windows."
        )
    prove(context.runner, next(iter(windows.batches(1))).beginning())
    runs = [
        (start, count) for count in range(1, context.num_remove + 1) for start in row.starts(context.removable, count)
    ]
    starts = [_start(context, piece) for piece in sorted({piece for piece, _ in runs})]
    first, costs, sums, tokens = {}, {}, {}, 0
    parts = crossed_parts(windows, ROUNDS, judging=JUDGING, fitting=FITTING)
    # Kept nowhere: sums of all starts are far larger than what comes of them.
    fitting = replace(context, ledger=None)
    # Judges are few: every process takes some of them.
    share = -(-max(judges.num_windows for _, judges in parts) // context.team.size)
    judging = replace(context, batch_size=min(context.batch_size, share))
    for number, (fitted, judges) in enumerate(parts, 1):
        if costs:
            if over():
                break
            runs = near_best(costs, context.num_remove, step=row.per_block, slack=SLACK)
        part = _Part(fitting, judging, compensation, number, fitted, judges)
        losses = part.losses([start.of(runs) for start in starts])
        sums = {run: sums.get(run, 0.0) + loss for run, loss in losses.items()}
        tokens += part.predictions
        costs = {run: total / tokens if math.isfinite(total) else math.inf for run, total in sums.items()}
        first = first or costs
    return RunCosts(first, costs)


@dataclass(frozen=True)
class _Start:
    """Where runs begin.

    Attributes:
        piece: The first one that goes.
        before: The half that writes in front of it; `None` in front of the first block.
        writer: What can take a map there, if anything.
        counts: Numbers of blocks that may go from here on.
    """

    piece: int
    before: Half | None
    writer: Writer | None
    counts: tuple[int, ...] = ()

    def of(self, runs: Iterable[Run]) -> _Start:
        """With the numbers of blocks of those runs that begin here."""
        return replace(self, counts=tuple(sorted(count for piece, count in runs if piece == self.piece)))


def _start(context: SearchContext, piece: int) -> _Start:
    if piece == 0:
        return _Start(piece, None, None)
    per_block = context.row.per_block
    block, part = divmod(piece - 1, per_block)
    before = Half(block, PARTS[part] if per_block > 1 else MLP)
    # The half behind it goes, too, where the gap begins within a block.
    off = [] if before.part == MLP else [Half(block, MLP)]
    return _Start(piece, before, writer_before(context.runner, before, off))


class _Part:
    """Fits maps on some windows and judges them on others.

    Attributes:
        predictions: Number of predictions that judge.
    """

    def __init__(
        self,
        fitting: SearchContext,
        judging: SearchContext,
        compensation: str,
        number: int,
        fitted: CalibrationWindows,
        judges: CalibrationWindows,
    ) -> None:
        self.fitting, self.judging, self.runner, self.row = fitting, judging, judging.runner, judging.row
        self.compensation, self.number, self.fitted = compensation, number, fitted
        self.judges = with_teacher(self.runner, judges, judging.batch_size)
        self.predictions = sum(int(predicted(batch).sum()) for batch in self.judges.batches(self.judges.num_windows))

    def losses(self, starts: Sequence[_Start]) -> Costs:
        """The KL divergence of every run, summed over the predictions that judge."""
        starts, found = [start for start in starts if start.counts], {}
        # Counted in windows of one run each: fractions of runs would not add up to whole ones.
        total = self.judges.num_windows * sum(len(start.counts) for start in starts)
        with self.judging.progress(total, f"Runs with maps, part {self.number}") as bar:
            for group in self._groups(starts):
                end = bar.n + self.judges.num_windows * sum(len(start.counts) for start in group)
                losses = self._judged(group, bar.update)
                for start, row in zip(group, losses.tolist(), strict=True):
                    found |= {(start.piece, count): row[count - 1] for count in start.counts}
                # What was read back, or measured by another process, counts as done.
                bar.update(max(0, end - bar.n))
        return found

    def _groups(self, starts: Sequence[_Start]) -> list[Sequence[_Start]]:
        """The starts, in groups whose sums fit into memory together."""
        width = self.runner.first_hidden(next(iter(self.fitted.batches(1))).beginning()).shape[-1]
        size = max(1, _MAX_BYTES // (8 * width * width * (self.judging.num_remove + 1)))
        return [starts[begin : begin + size] for begin in range(0, len(starts), size)]

    def _judged(self, group: Sequence[_Start], update: Callable[[int], object]) -> Tensor:
        """Summed KL [starts, counts] on the windows that judge."""
        maps: Maps = {}

        def measure(size: int) -> dict[str, Tensor]:
            # Only here: what was measured before needs no maps.
            if not maps:
                maps.update(self._maps(group))
            return {"losses": self._losses(group, maps, size, update)}

        most = self.judging.num_remove
        name = f"runs-{self.compensation}-{most}-{self.number}-{group[0].piece}-{len(group)}"
        return self.judging.measured(name, measure)["losses"]

    def _maps(self, group: Sequence[_Start]) -> Maps:
        """T of every run that begins in the group, by its first piece and its number of blocks."""
        able = [start for start in group if start.writer is not None]
        if not able:
            return {}
        sums = self.fitting.measured("maps", lambda size: self._sums(able, size))
        maps = {}
        for start in able:
            kind = self._kind(start.writer)
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
        for _, batch in self.fitting.batches(size, self.fitted):
            tokens = Tokens.of(self.runner.positions(batch))
            watch = _Watch(starts, self.row.per_block, tokens, sums)
            with hooks() as hook:
                for start in starts:
                    module = self._module(start)
                    hook(module.register_forward_hook(watch.written(start)))
                self.runner.stream(batch, watch.reached, per_block=self.row.per_block)
        return sums

    def _kind(self, writer: Writer) -> str:
        """The widest map of what it writes that a writer takes and that was asked for."""
        return MATRIX if writer.kind == MATRIX and self.compensation != SCALE else DIAGONAL

    def _module(self, start: _Start) -> nn.Module:
        return self.runner.stack.blocks[start.before.block].get_submodule(start.writer.module)

    def _losses(
        self,
        group: Sequence[_Start],
        maps: Maps,
        size: int,
        update: Callable[[int], object],
    ) -> Tensor:
        """Summed KL [starts, counts] of this process's windows."""
        shape, losses = (len(group), self.judging.num_remove), None
        trunk: dict[int, BlockOutput | None] = {}
        for number, start in enumerate(group):
            prepared = {count: self._prepared(start, count, maps) for count in start.counts}
            for place, batch in self.judging.batches(size, self.judges):
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
                    update(len(batch.input_ids))
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
        fold: Fold = start.writer.fold(start.before.block, self._kind(start.writer), "map")
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
