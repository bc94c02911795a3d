# SPDX-License-Identifier: Apache-2.0
"""Passes of many batches over a model, in the order that suits where its weights lie.

Weights in memory: batch after batch, each through all blocks. Weights that must be fetched (see `offload`): block
after block. A block is fetched once, and everything goes through it while it is held: every batch, and every
candidate of a search. Only hidden states wait in between, `STATE_BYTES` of them at most; where those of all batches
are more, the batches go in several groups, each of which fetches the weights once.

Both orders run the same blocks on the same inputs, and add up in the same order: they give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from optimum.utils import logging
from torch import Tensor, nn

from .batches import Batch
from .channel_sums import TokenSums
from .errors import UnsupportedModelError
from .half import Removal, Unit, blocks_off, first_block, units_of
from .halves import BlockHalves, middle_watched
from .inputs import probe_batch
from .kinds import DECODER
from .offload import held, is_offloaded
from .runner import BlockOutput, BlockRunner
from .stand_ins import hidden_of, hooks, incoming_hidden


logger = logging.get_logger("optimum.blockprune.passes")

# Our choice: what the hidden states may take that wait between two blocks.
STATE_BYTES = 2**30

# Sees the residual stream of one batch at every boundary; see `BlockRunner.stream`.
Visit = Callable[[int, Tensor], None]
Done = Callable[[int], Any]
Key = TypeVar("Key")

_PROVEN: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def prove(runner: BlockRunner, batch: Batch | None = None) -> None:
    """Proves that blocks can be run one by one; only once for a model whose weights must be fetched for it.

    Args:
        runner: Runs the model; its counters do not count this.
        batch: A few tokens; made-up ones unless given.

    Raises:
        UnsupportedModelError: See `BlockRunner.check_replay`.
    """
    stack = runner.stack.layout.stack
    proven = _PROVEN.setdefault(runner.model, set())
    if stack in proven:
        return
    # A runner of its own: these few tokens are no calibration window and do not count as one.
    BlockRunner(runner.model, stack).check_replay(batch or probe_batch(runner.model, runner.stack.layout))
    if in_order_of_blocks(runner):
        proven.add(stack)


def in_order_of_blocks(runner: BlockRunner) -> bool:
    """Whether a pass goes block by block, since the weights of blocks are to be fetched."""
    return is_offloaded(runner.stack.blocks)


def stream(
    runner: BlockRunner,
    batches: Iterable[tuple[Key, Batch]],
    watch: Callable[[Key, Batch], Visit],
    *,
    copies: float = 1.0,
    done: Done = lambda windows: None,
    per_block: int = 1,
) -> None:
    """Shows the residual stream of all batches at every boundary, without the head.

    Args:
        runner: Runs the model.
        batches: The batches, each with whatever tells it apart.
        watch: Called once for each batch, in order, before it runs; returns what `BlockRunner.stream` would call.
        copies: Hidden states of a batch that are held at a time by what `watch` returns, in units of all its states.
        done: Called with a number of windows whenever so many are through.
        per_block: See `BlockRunner.stream`.

    Raises:
        UnsupportedModelError: Blocks share more than their return value; see `BlockRunner.check_replay`. Or see
            `BlockRunner.stream`.
    """
    if not in_order_of_blocks(runner):
        for key, batch in batches:
            runner.stream(batch, watch(key, batch), per_block=per_block)
            done(len(batch.input_ids))
        return
    halves = runner.halves.shown() if per_block > 1 else ()
    for group in _groups(runner, batches, lanes=1 + copies):
        lanes = [_Lane(batch, watch(key, batch), halves) for key, batch in group]
        for block in _blocks(runner, range(runner.num_blocks), sum(len(lane.batch.input_ids) for lane in lanes), done):
            for lane in lanes:
                lane.advance(runner, block)


def sum_tokens(
    runner: BlockRunner,
    batches: Iterable[tuple[Any, Batch]],
    sums: TokenSums,
    mask_of: Callable[[Batch], Tensor],
    *,
    stop: int | None = None,
    done: Done = lambda windows: None,
) -> None:
    """Adds all batches to `sums`.

    Args:
        runner: Runs the model.
        batches: The batches; what comes with them is ignored.
        sums: Watches modules of blocks.
        mask_of: Says which tokens of a batch count, [B, S].
        stop: The last block to run; the last one of all unless given.
        done: See `stream`.

    Raises:
        UnsupportedModelError: See `stream`.
    """
    visits, last = sums.visits, runner.num_blocks - 1 if stop is None else stop
    if not in_order_of_blocks(runner):
        for _, batch in batches:
            sums.begin(mask_of(batch))
            runner.observe(batch, visits, stop=last)
            done(len(batch.input_ids))
        return
    for group in _groups(runner, batches):
        masks = [mask_of(batch) for _, batch in group]
        states: list[BlockOutput | None] = [None] * len(group)
        for block in _blocks(runner, range(last + 1), sum(len(batch.input_ids) for _, batch in group), done):
            inside = set(runner.stack.blocks[block].modules())
            here = {module: visit for module, visit in visits.items() if module in inside}
            for number, (_, batch) in enumerate(group):
                sums.begin(masks[number], again=block > 0)
                states[number] = runner.observe(batch, here, start=states[number], stop=block)


def branches(
    runner: BlockRunner,
    batches: Iterable[tuple[Key, Batch]],
    off: Collection[Unit],
    wanted: Sequence[Removal | None],
) -> Iterator[tuple[Key, Batch, Removal | None, BlockOutput]]:
    """What comes out of the last block without one more block (or two halves), for all candidates and batches.

    Args:
        runner: Runs the model.
        batches: The batches, each with whatever tells it apart.
        off: What is gone.
        wanted: Candidates; `None` is the model as it is.

    Yields:
        A batch with its key, a candidate, and the output of the last block that is on.

    Raises:
        UnsupportedModelError: See `stream`.
    """
    for group, some in _groups_of_candidates(runner, batches, wanted):
        lanes = [(key, _Branches(batch, off, some)) for key, batch in group]
        gone = blocks_off(off)
        alive = [block for block in range(runner.num_blocks) if block not in gone]
        for block in _blocks(runner, alive, 0, lambda windows: None):
            for _, lane in lanes:
                lane.advance(runner, block)
        for key, lane in lanes:
            for candidate in some:
                reached = lane.ends.pop(candidate)
                if reached is None:
                    raise UnsupportedModelError("A run needs at least one block that is not switched off.")
                yield key, lane.batch, candidate, reached


@dataclass
class _Lane:
    """A batch on its way through the blocks, and who looks at it.

    Attributes:
        halves: The halves of all blocks where it is looked at between them; else empty.
    """

    batch: Batch
    visit: Visit
    halves: Sequence[BlockHalves] = ()
    state: BlockOutput | None = None

    def advance(self, runner: BlockRunner, block: int) -> None:
        live, per_block = runner.stack.blocks[block], 2 if self.halves else 1
        with ExitStack() as watched, hooks() as hook:
            if block == 0:
                enter = live.register_forward_pre_hook
                hook(enter(lambda _, args, kwargs: self.visit(0, incoming_hidden(args, kwargs)), with_kwargs=True))
            if self.halves:
                middle = partial(self.visit, per_block * block + 1)
                watched.enter_context(middle_watched(live, self.halves[block], middle))
            self.state = runner.run_to(self.batch, block, start=self.state)
        self.visit(per_block * (block + 1), hidden_of(self.state.value))


@dataclass
class _Branches:
    """A batch on its way through the blocks: the trunk, and a branch that leaves it at every candidate.

    Attributes:
        ends: How far the model without a candidate has come; `None` before its first block.
    """

    batch: Batch
    off: Collection[Unit]
    wanted: Sequence[Removal | None]
    trunk: BlockOutput | None = None
    ends: dict[Removal | None, BlockOutput | None] = field(default_factory=dict)

    def advance(self, runner: BlockRunner, block: int) -> None:
        candidates = [candidate for candidate in self.wanted if candidate is not None]
        self.ends |= {candidate: self.trunk for candidate in candidates if first_block(candidate) == block}
        for candidate in candidates:
            off = [*self.off, *units_of(candidate)]
            if candidate in self.ends and block not in blocks_off(off):
                self.ends[candidate] = runner.run_to(self.batch, block, off, self.ends[candidate])
        if None in self.wanted or any(first_block(other) > block for other in candidates):
            self.trunk = runner.run_to(self.batch, block, self.off, self.trunk)
        else:
            self.trunk = None
        if None in self.wanted:
            self.ends[None] = self.trunk


def _blocks(runner: BlockRunner, blocks: Sequence[int], windows: int, done: Done) -> Iterator[int]:
    """Holds one block after the other; says of every share of the windows that it is done."""
    told = 0
    for count, block in enumerate(blocks, 1):
        with held(runner.stack.blocks[block]):
            yield block
        reached = windows * count // len(blocks)
        done(reached - told)
        told = reached


def _groups(
    runner: BlockRunner, batches: Iterable[tuple[Key, Batch]], lanes: float = 1.0
) -> Iterator[list[tuple[Key, Batch]]]:
    """As many batches at a time as have room for `lanes` times their hidden states."""
    prove(runner)
    layout = runner.stack.layout
    # The encoder's output is kept for one batch: with more of them it would run again at every block.
    alone = len(layout.kind.stacks) > 1 and layout.stack == DECODER
    group: list[tuple[Key, Batch]] = []
    room: float = STATE_BYTES
    for key, batch in batches:
        needed = runner.first_hidden(batch).nbytes * lanes
        if group and (alone or needed > room):
            if not alone:
                _say(group, "windows")
            yield group
            group, room = [], STATE_BYTES
        group.append((key, batch))
        room -= needed
    if group:
        yield group


def _groups_of_candidates(
    runner: BlockRunner, batches: Iterable[tuple[Key, Batch]], wanted: Sequence[Removal | None]
) -> Iterator[tuple[list[tuple[Key, Batch]], Sequence[Removal | None]]]:
    """Batches with all candidates; a batch with some of them at a time where one batch has no room for all."""
    for group in _groups(runner, batches, lanes=1 + len(wanted)):
        fit = max(1, STATE_BYTES // max(1, runner.first_hidden(group[0][1]).nbytes) - 1)
        if fit < len(wanted):
            _say(wanted[:fit], "candidates")
        for start in range(0, len(wanted), fit):
            yield group, wanted[start : start + fit]


def _say(some: Sequence[Any], what: str) -> None:
    count = sum(len(batch.input_ids) for _, batch in some) if what == "windows" else len(some)
    logger.info(
        f"The hidden states would take more than {STATE_BYTES / 2**30:g} GiB; the weights of all blocks are fetched "
        f"for {count} {what} at a time."
    )
