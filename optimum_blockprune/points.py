# SPDX-License-Identifier: Apache-2.0
"""Where compensation puts maps: in front of every cut, and, if asked, into every half-block behind the first one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from .errors import UnsupportedModelError
from .half import ATTENTION, MLP, PARTS, Half, Unit, blocks_off, halves_of, single_halves
from .halves import half_off
from .plan import PruningPlan
from .runner import BlockRunner
from .stand_ins import hidden_of, incoming_hidden
from .writers import Writer, find_writer


@dataclass(frozen=True)
class Point:
    """Two kept halves one after the other, the first of which takes a map.

    Attributes:
        before: The half that takes it.
        after: The next kept half; `None` at the end of the stack. The stream of the dense model in front of it is what
            that of the pruned model behind `before` is to be.
        cut: Whether something is gone between them.
    """

    before: Half
    after: Half | None
    cut: bool

    def off(self, off: Collection[Unit]) -> list[Unit]:
        """What is off while the stream right behind `before` is looked at; `off` is what is gone."""
        rest = Half(self.before.block, MLP)
        within = self.before.part == ATTENTION and rest not in halves_of(off)
        return [*off, *([rest] if within else [])]


def cut_points(plan: PruningPlan) -> list[Point]:
    """All cuts of a plan, front to back; what goes before the first kept half leaves nothing to put a map into."""
    return [point for point in _points(plan) if point.cut]


def points_from(plan: PruningPlan, runner: BlockRunner) -> list[Point]:
    """All cuts, and every kept half behind the first thing that is gone, front to back.

    Blocks without halves (see `halves`) take a map where they end only.
    """
    first = min((half.place for half in halves_of(plan.removed_units)), default=None)
    if first is None:
        return []
    return [
        point
        for point in _points(plan)
        if point.cut or (point.before.place > first and (point.before.part == MLP or _halved(runner, point.before)))
    ]


def _points(plan: PruningPlan) -> list[Point]:
    gone = halves_of(plan.removed_units)
    halves = [Half(block, part) for block in range(plan.num_blocks) for part in PARTS]
    kept = [half for half in halves if half not in gone]
    ends = [half.place for half in kept[1:]] + [len(halves)]
    return [
        Point(before, after, before.place + 1 != end)
        for before, after, end in zip(kept, [*kept[1:], None], ends, strict=True)
    ]


def _halved(runner: BlockRunner, half: Half) -> bool:
    try:
        runner.halves.of(half.block)
    except UnsupportedModelError:
        return False
    return True


def block_before(block: int, off: Collection[Unit]) -> int | None:
    """The last block in front of another one of which something is on; `None` if there is none."""
    gone = blocks_off(off)
    return max((each for each in range(block) if each not in gone), default=None)


def writer_before(runner: BlockRunner, before: Half, off: Collection[Unit]) -> Writer | None:
    """What writes to the stream last in front of a place.

    Args:
        runner: Runs the dense model.
        before: The last half in front of it that is on.
        off: What is off; the block is looked at as far as it is on.
    """
    number, block = before.block, runner.stack.blocks[before.block]
    args, kwargs = runner.arguments_of(number)
    part = single_halves(off).get(number)
    hidden = incoming_hidden(args, kwargs)

    def run() -> Tensor:
        # Blocks may write into what they are given.
        given = hidden.clone()
        taken, named = ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})
        if part is None:
            return hidden_of(block(*taken, **named))
        with half_off(block, runner.halves.of(number), part):
            return hidden_of(block(*taken, **named))

    return find_writer(block, run)
