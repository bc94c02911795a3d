# SPDX-License-Identifier: Apache-2.0
"""MI-PRUN: runs of blocks whose input and output share the most information (arXiv 2601.07212), in one pass.

The paper leaves open how mutual information is estimated, on which tokens and how many; what is used here is our
choice throughout (see `optimum_blockprune.estimators`). All T(T+1)/2 runs are scored at once, so the search looks
scores up instead of measuring; it is kept because it, too, is the published method.

What is not covered: the authors' numbers. They cannot be reproduced from the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from optimum.utils import logging
from torch import Tensor

from ..batches import Batch, CalibrationWindows
from ..errors import CalibrationError, ConfigurationError, nearest
from ..estimators import GaussianCopula, Histogram, IdentityDecoder, RunEstimator
from ..measures import content_mask, dpi_violation_rate, raise_non_finite
from ..passes import Visit, stream
from ..plan import PruningPlan
from .base import BLOCK, HALF_BLOCK, PruningStrategy, SearchContext
from .selection import RunScore, Selection, best_disjoint_runs, fast_block_select


logger = logging.get_logger("optimum.blockprune.mi_prun")

SEARCHES = ("fast", "dp")


@dataclass(frozen=True)
class MIPrunOptions:
    """Options of MI-PRUN.

    Attributes:
        estimator: `"gaussian_copula"`, `"histogram"` (the most literal reading), or `"identity_decoder"`, which sees
            sign, scale and shift and is ours; see `optimum_blockprune.estimators`.
        select: `"fast"` is the paper's Fast-Block-Select. `"dp"` is the exact optimum over disjoint runs: of the sum
            of run scores (with mutual information it breaks the removal into many short runs), or, with
            `"identity_decoder"`, of minus the damage D_add, whose terms add up over runs.
        k: Extra candidates per run length (Eq. 6); the paper gives no value, 5 fits its Figure 2.
        max_tokens: Tokens to measure on, an even share of every window, chosen by the seed.
        chunk_tokens: Tokens whose hidden states are held at once, and among which ranks are taken.
        bins: Bins per axis of `"histogram"`.
        coordinates: Hidden coordinates that `"histogram"` looks at, chosen by the seed.
    """

    estimator: str = "gaussian_copula"
    select: str = "fast"
    k: int = 5
    max_tokens: int = 32768
    chunk_tokens: int = 2048
    bins: int = 32
    coordinates: int = 64

    def __post_init__(self) -> None:
        for name, known in (("estimator", ESTIMATORS), ("select", SEARCHES)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigurationError(f"Unknown {name} {value!r} for mi_prun.{nearest(str(value), known)}")
        least = {"k": 1, "max_tokens": 2, "chunk_tokens": 2, "bins": 2, "coordinates": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ConfigurationError(f"{name}={value!r} of mi_prun must be a whole number of at least {minimum}.")


ESTIMATORS: dict[str, Callable[[MIPrunOptions, int], RunEstimator]] = {
    "gaussian_copula": lambda options, seed: GaussianCopula(),
    "histogram": lambda options, seed: Histogram(options.bins, options.coordinates, seed),
    "identity_decoder": lambda options, seed: IdentityDecoder(),
}


class MIPrun(PruningStrategy):
    """Removes runs of blocks whose output says most about their input (MI-PRUN).

    1. One forward pass: the residual stream before and after every block, at some tokens of every window. Padding and
       the first token of each window, with its massive activations, are left out (our choice).
    2. The estimator scores all runs: state before the run against state after it, same token.
    3. The search chooses runs with `num_remove` blocks in all. No block is protected, as in the paper.

    Nothing is measured again after a removal. The plan lists the blocks of the best run first, and says for every
    smaller number of blocks what the same scores would have chosen: the choices need not be nested.

    Half-blocks (our choice): the same over the 2T + 1 boundaries that the stream has with those between the halves of
    blocks; runs have an even number of halves, single blocks become pairs of neighbours (see `selection`). T is then
    twice the number of blocks in what follows, so that the sums take four times the memory. Runs in `steps` are given
    as [first half, number of halves], A0 being 0 and M0 1.

    Memory: (T + 1) x `chunk_tokens` x d hidden values in the model's own precision, and the estimator's sums, about
    d (T + 1)^2 in fp64 (`histogram`: `coordinates` x T (T + 1) / 2 x `bins`^2 counts); `stored_values` in the plan.
    """

    name: ClassVar[str] = "mi_prun"
    Options: ClassVar[type] = MIPrunOptions
    units: ClassVar[tuple[str, ...]] = (BLOCK, HALF_BLOCK)

    def select(self, context: SearchContext) -> PruningPlan:
        """See the class.

        Raises:
            CalibrationError: The windows hold fewer than 2 usable tokens.
            NonFiniteError: A hidden state is NaN or infinite.
        """
        options: MIPrunOptions = context.options
        estimator = ESTIMATORS[options.estimator](options, context.seed)
        totals = _measure(context, estimator)
        scores, row = estimator.all_runs(), context.row
        blocks = scores.diagonal(row.per_block).tolist()
        selections = _search(context, estimator, scores=scores, block_scores=blocks)
        selection = selections.pop(context.num_remove)
        details = {
            "estimator": options.estimator,
            "select": options.select,
            "runs": [
                {"start": row.name(run.start), "length": run.length // row.per_block, "score": score}
                for run, score in zip(selection.runs, selection.scores, strict=True)
            ],
            "evaluations": selection.evaluations,
            "dpi_violation_rate": dpi_violation_rate(scores),
            **totals,
        }
        return context.plan(
            row.removals(selection.order),
            scores=row.scores(blocks),
            steps=selection.iterations,
            details=details,
            nested=False,
            smaller={count: row.removals(smaller.order) for count, smaller in selections.items()},
        )


def _search(
    context: SearchContext, estimator: RunEstimator, *, scores: Tensor, block_scores: list[float]
) -> dict[int, Selection]:
    """What is chosen for every number of blocks up to the budget; all of them are lookups in the same scores."""
    asked = {"removable": context.row.free(context.removable), "step": context.row.per_block}
    if context.options.select == "dp":
        if not isinstance(estimator, IdentityDecoder):
            logger.warning(
                "select='dp' maximises a sum of mutual information, which favours many single blocks over runs that "
                "fit together. Use estimator='identity_decoder' with it, or select='fast'."
            )
        return best_disjoint_runs(_lookup(estimator.additive_runs()), num_remove=context.num_remove, **asked)
    select = partial(fast_block_select, block_scores, _lookup(scores), k=context.options.k, **asked)
    return {count: select(num_remove=count) for count in range(1, context.num_remove + 1)}


def _lookup(scores: Tensor) -> RunScore:
    table = scores.tolist()
    return lambda start, length: table[start][start + length]


def _measure(context: SearchContext, estimator: RunEstimator) -> dict[str, int]:
    """Streams the windows through the model and fills the estimator; returns totals for the plan."""
    windows, runner = context.require_windows(), context.runner
    make = ESTIMATORS[context.options.estimator]
    with context.progress(windows.num_windows, "MI-PRUN") as bar:

        def measure(size: int) -> dict[str, Tensor]:
            chunks = _Chunks(context, make(context.options, context.seed))
            # Offsets come from the first chunk of all, in every process.
            mine = (
                ((number, chosen), batch)
                for number, (batch, chosen) in _chunks(context, size)
                if number == 0 or context.team.takes(number)
            )
            settings = {"copies": chunks.share, "done": bar.update, "per_block": context.row.per_block}
            stream(runner, mine, lambda key, _: chunks.watch(*key), **settings)
            return chunks.sums()

        found = context.measured("mi_prun", measure)
    tokens = int(found.pop("tokens"))
    if tokens < 2:
        raise CalibrationError(
            f"mi_prun found {tokens} usable tokens in {windows.num_windows} windows: padding and the first "
            "token of each window do not count. Give more text or a longer seqlen."
        )
    if int(found.pop("broken")):
        raise_non_finite(runner.diagnose, windows.batches(context.batch_size))
    held = int(found.pop("held"))
    estimator.restore(found)
    return {"tokens": tokens, "stored_values": held + estimator.stored_values}


def _chunks(context: SearchContext, size: int) -> Iterator[tuple[int, tuple[Batch, Tensor]]]:
    """All batches with the flat positions of their chosen tokens, and the number of the chunk that they belong to."""
    windows = context.require_windows()
    sampler = _Sampler(windows, context.options, seed=context.seed)
    together = sampler.windows_per_chunk
    for number, start in enumerate(range(0, windows.num_windows, together)):
        part = windows.part(range(start, min(start + together, windows.num_windows)))
        for batch in part.batches(_power_of_two(min(size, together))):
            yield number, (batch, sampler.choose(context.runner.positions(batch)))


class _Sampler:
    """Chooses the tokens to measure on: an even share of each window, the same whatever the batch size.

    Attributes:
        share: The most tokens that one window gives.
        windows_per_chunk: A power of two, so that batches never straddle two chunks: what is ranked together depends
            on the recipe alone.
    """

    def __init__(self, windows: CalibrationWindows, options: MIPrunOptions, *, seed: int) -> None:
        self._num_windows = windows.num_windows
        self._max_tokens = options.max_tokens
        self._generator = torch.Generator().manual_seed(seed)
        self._next = 0
        self.share = min(-(-options.max_tokens // windows.num_windows), options.chunk_tokens, windows.seqlen)
        self.windows_per_chunk = _power_of_two(options.chunk_tokens // self.share)

    def choose(self, mask: Tensor) -> Tensor:
        """Flat positions in [B * S] of a batch's real tokens `mask`, ascending; the batches must come in order."""
        length = mask.shape[1]
        chosen = [row * length + self._choose_columns(columns) for row, columns in enumerate(content_mask(mask))]
        return torch.cat(chosen)

    def _choose_columns(self, mask: Tensor) -> Tensor:
        columns = mask.nonzero().squeeze(1)
        before, after = (number * self._max_tokens // self._num_windows for number in (self._next, self._next + 1))
        self._next += 1
        order = torch.randperm(len(columns), generator=self._generator)
        return columns[order[: min(after - before, self.share)]].sort().values


@dataclass
class _Chunk:
    """Hidden states of the chosen tokens of one chunk at every boundary, [T+1, capacity, d], filled batch by batch.

    Attributes:
        filled: Number of its tokens so far.
        waiting: Batches of it that are not yet through.
    """

    states: Tensor | None = None
    filled: int = 0
    waiting: int = 0


class _Chunks:
    """The chunks that are being filled: one, or several where batches take turns.

    Attributes:
        share: States held of a window, in units of all its states at one boundary.
    """

    def __init__(self, context: SearchContext, estimator: RunEstimator) -> None:
        windows = context.require_windows()
        sampler = _Sampler(windows, context.options, seed=context.seed)
        self._capacity = min(sampler.windows_per_chunk, windows.num_windows) * sampler.share
        self._boundaries = context.row.boundaries
        self.share = self._boundaries * sampler.share / windows.seqlen
        self._team, self._estimator = context.team, estimator
        self._coordinates: Tensor | None = None
        self._open: dict[int, _Chunk] = {}
        self._spare: list[Tensor] = []
        self._tokens = self._held = 0
        self._finite = torch.tensor(True)

    def watch(self, number: int, positions: Tensor) -> Visit:
        """Starts a batch of chunk `number`; chunks come in order.

        Args:
            number: The chunk.
            positions: Flat in the batch's [B * S].

        Returns:
            What takes its boundary states; batches may take turns.
        """
        self._close(number)
        chunk = self._open.setdefault(number, _Chunk())
        place = slice(chunk.filled, chunk.filled + len(positions))
        chunk.filled, chunk.waiting = place.stop, chunk.waiting + 1

        def visit(position: int, hidden: Tensor) -> None:
            self._copy(chunk, position, place, hidden.flatten(0, 1).index_select(0, positions.to(hidden.device)))
            if position == self._boundaries - 1:
                chunk.waiting -= 1
                self._close(max(self._open))

        return visit

    def _copy(self, chunk: _Chunk, position: int, place: slice, states: Tensor) -> None:
        # Ranks and bins would hide a NaN; the answer stays on the device until the end.
        self._finite = self._finite.to(states.device) & torch.isfinite(states).all()
        if chunk.states is None:
            chunk.states = self._room(states)
        if self._coordinates is not None:
            self._coordinates = self._coordinates.to(states.device)
            states = states.index_select(1, self._coordinates)
        chunk.states[position, place].copy_(states)

    def _room(self, states: Tensor) -> Tensor:
        """Room for a chunk, that of an earlier one where it is free."""
        if self._spare:
            return self._spare.pop()
        self._coordinates = self._estimator.coordinates(states.shape[-1])
        width = states.shape[-1] if self._coordinates is None else len(self._coordinates)
        room = states.new_empty(self._boundaries, self._capacity, width)
        self._held += room.numel()
        return room

    def sums(self) -> dict[str, Tensor]:
        """The estimator's sums and this process's part of the totals: tokens, broken states, values held."""
        self._close(max(self._open) + 1)
        sums = self._estimator.sums()
        if "offset" in sums and not self._team.is_first:
            sums["offset"] = torch.zeros_like(sums["offset"])
        held = self._held if self._team.is_first else 0
        totals = {"tokens": self._tokens, "broken": int(not self._finite), "held": held}
        return {**sums, **{name: torch.tensor(total) for name, total in totals.items()}}

    def _close(self, before: int) -> None:
        """Hands the chunks before that number to the estimator, in order, up to the first that is not full."""
        for number in [number for number in sorted(self._open) if number < before]:
            chunk = self._open[number]
            if chunk.waiting:
                return
            del self._open[number]
            if chunk.filled and self._team.takes(number):
                self._estimator.add(chunk.states[:, : chunk.filled])
                self._tokens += chunk.filled
            elif chunk.filled:
                self._estimator.begin(chunk.states[:, : chunk.filled])
            self._spare.append(chunk.states)


def _power_of_two(number: int) -> int:
    """The largest power of two up to `number`, which is at least 1."""
    return 1 << (number.bit_length() - 1)
