# SPDX-License-Identifier: Apache-2.0
"""What a strategy is: a name, a unit, an options dataclass and one method that turns a context into a plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import CalibrationError
from ..half import Half, Removal, Row, Unit, name_of, names_of, removals, sorted_halves
from ..plan import PruningPlan
from ..width_places import Place, WidthTask
from ..widths import Narrowing, Width


if TYPE_CHECKING:
    from torch import Tensor, nn
    from tqdm.auto import tqdm

    from ..batches import Batch, CalibrationWindows
    from ..ledger import Ledger
    from ..memory import BatchSize
    from ..runner import BlockRunner
    from ..team import Team


# What is removed: whole blocks, or pairs of half-blocks that are neighbours among those that are left.
BLOCK, HALF_BLOCK = "block", "half_block"


@dataclass(frozen=True)
class NoOptions:
    """The options dataclass of a strategy that has none."""


def _always(_removed: Sequence[Removal]) -> bool:
    return True


@dataclass(frozen=True)
class SearchContext:
    """All that a strategy may look at.

    Attributes:
        runner: Runs the model with blocks switched off or replayed; counts what it spends.
        windows: Calibration windows; `None` where the strategy needs no data.
        options: Instance of the strategy's own options dataclass.
        num_remove: Number of blocks to remove, at least 1 and at most `len(removable)`.
        removable: Original indices of the blocks that may go, ascending; protected blocks are not among them.
        batch_size: Calibration windows per forward pass.
        seed: Seed for every random choice.
        progress: `progress(total, description)` returns a `tqdm` bar.
        provenance: Descriptive fields of the plan that the strategy need not know about.
        width: The task of a strategy that removes units of width; `None` for one that removes blocks.
        unit_scores: Filled by `width_plan`: the score of every unit, by place.
        unit: `"block"`, or `"half_block"` where the strategy knows half-blocks and was asked for them.
        objective: What the loss on the windows is: `"nll"`, `"kl"` where they have a teacher, or `"task"` where
            their labels are completions; `None` where the strategy has no objectives.
        compensation: What will be fitted in front of the cuts of the plan: `"none"`, `"scale"`, `"ridge"`, `"auto"` or
            `"reconstruct"`.
        generated_samples: Windows that the dense model writes for that.
        own_text: Filled by compensation: what the model wrote, by the fingerprint of what it continued.
        team: The processes that share the measuring; one alone by default.
        ledger: Where finished measurements are kept, so that a run that was killed goes on from there.
        go_on: Whether to take another step after `removed`. A greedy search asks after each step; where the answer is
            no, it returns a nested plan of what it has removed so far.
    """

    runner: BlockRunner
    windows: CalibrationWindows | None
    options: Any
    num_remove: int
    removable: tuple[int, ...]
    batch_size: int
    seed: int
    progress: Callable[[int, str], tqdm]
    provenance: Mapping[str, Any]
    width: WidthTask | None = None
    unit_scores: dict[Place, list[float]] = field(default_factory=dict)
    unit: str = BLOCK
    objective: str | None = None
    compensation: str = "none"
    generated_samples: int | None = None
    own_text: dict[str, Tensor] = field(default_factory=dict)
    team: Team = field(default_factory=lambda: _alone())
    ledger: Ledger | None = None
    go_on: Callable[[Sequence[Removal]], bool] = _always
    _size: BatchSize = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        from ..memory import BatchSize  # torch comes with a search, not with the contract of strategies

        object.__setattr__(self, "_size", BatchSize(self.batch_size))

    @property
    def row(self) -> Row:
        """The blocks as pieces in a row, halves where these may go."""
        return Row(self.runner.num_blocks, 2 if self.unit == HALF_BLOCK else 1)

    @property
    def stepwise(self) -> bool:
        """Whether a budget decides after every step if there is another one."""
        return self.go_on is not _always

    def measured(self, key: str, measure: Callable[[int], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Sums over the windows, by all processes together; every expensive measurement goes through here.

        What the ledger holds is not measured again. Where memory runs out, `measure` is called anew with half the
        batch size. A failure here makes the other processes fail, too, instead of waiting.

        Args:
            key: Name of the measurement, unique in the search.
            measure: Called with a batch size; returns the sums over this process's share (see `batches`), float64 or
                whole numbers. What is no sum is one once each process fills its own rows of a tensor of zeros.

        Returns:
            The sums over all shares, on the CPU: the same in every process, and the same after a resume.
        """
        ledger = self.ledger
        found = self.team.from_first(lambda: None if ledger is None else ledger.read(key))
        if found is None:
            with self.team.together():
                share = self._size.run(measure)
            found = self.team.summed(share)
            if ledger is not None and self.team.is_first:
                ledger.write(key, found)
        return found

    def settled(
        self, key: str, make: Callable[[], dict[str, Tensor]], measurements: Sequence[str]
    ) -> dict[str, Tensor]:
        """What was made of measurements, kept in their place where it is far smaller.

        Args:
            key: Its name, unique in the search.
            make: Measures, and gives the same in every process.
            measurements: Keys of what is of no use afterwards.
        """
        ledger = self.ledger
        found = self.team.from_first(lambda: None if ledger is None else ledger.read(key))
        if found is None:
            found = make()
            if ledger is not None and self.team.is_first:
                ledger.write(key, found)
        if ledger is not None and self.team.is_first:
            ledger.forget(measurements)  # also those that a run which was killed just now left
        return found

    def batches(self, size: int, windows: CalibrationWindows | None = None) -> Iterator[tuple[int, Batch]]:
        """This process's share of the windows.

        Args:
            size: Windows per batch, at most. Shares do not depend on it.
            windows: By default all of them.

        Yields:
            The number of a batch's first window, and the batch.
        """
        windows = self.require_windows() if windows is None else windows
        for number, start in enumerate(range(0, windows.num_windows, self.batch_size)):
            if self.team.takes(number):
                rows = range(start, min(start + self.batch_size, windows.num_windows))
                for batch in windows.part(rows).batches(size):
                    yield start, batch
                    start += len(batch.input_ids)

    def writer(self, place: Place) -> nn.Module:
        """The module of the live model that the units of a place end in; its inputs are theirs, side by side."""
        return self.runner.stack.blocks[place.block].get_submodule(self.width.group_of(place).writer)

    def width_plan(
        self,
        kept: Mapping[Place, Iterable[int]],
        *,
        scores: Mapping[Place, Sequence[float]] | None = None,
        means: Mapping[Place, Sequence[float]] | None = None,
        steps: Sequence[Mapping[str, Any]] = (),
        details: Mapping[str, Any] | None = None,
    ) -> PruningPlan:
        """Builds the plan that keeps `kept`, and all units of the places that it does not name.

        Args:
            kept: The units that stay.
            scores: Score of every unit of a place, on the dense model; too many for the plan, which gets the highest
                score of a removed unit and the lowest of a kept one.
            means: Mean of every input of a place's writer; its bias then makes up for those that go.
            steps: One JSON object per decision; by default one per place.
            details: Further figures for the report.
        """
        task = self.width
        entries = {place: tuple(sorted(kept.get(place, range(place.units)))) for place in task.places}
        if scores is not None:
            self.unit_scores.update({place: [float(score) for score in each] for place, each in scores.items()})
        made = tuple(
            Narrowing(place.block, place.group, units, self._lost(place, units, (means or {}).get(place)))
            for place, units in entries.items()
        )
        width = Width(task.layout, task.groups, made)
        if task.layout == "padded":
            room = tuple(task.room(number, width.width_of(number)) for number in range(len(task.groups)))
            width = Width(task.layout, task.groups, made, room)
        lines = [self._step(place, set(units)) for place, units in entries.items() if place.free]
        return PruningPlan.from_removed(
            num_blocks=self.runner.num_blocks,
            removed=(),
            width=width,
            steps=tuple(steps or lines),
            details={"align": task.align, **(details or {})},
            options=asdict(self.options),
            seed=self.seed,
            **self.provenance,
        )

    def _lost(self, place: Place, kept: Sequence[int], means: Sequence[float] | None) -> tuple[float, ...]:
        """The means of the inputs that go."""
        if means is None:
            return ()
        size = self.width.group_of(place).inputs_per_unit
        gone = sorted(set(range(place.units)) - set(kept))
        return tuple(float(mean) for unit in gone for mean in means[unit * size : (unit + 1) * size])

    def _step(self, place: Place, kept: set[int]) -> dict[str, Any]:
        scores = self.unit_scores.get(place)
        line = {"block": place.block, "writer": self.width.group_of(place).writer, "kept": len(kept)}
        if scores is None or not 0 < len(kept) < place.units:
            return line
        removed = max(score for unit, score in enumerate(scores) if unit not in kept)
        return {**line, "highest_removed": removed, "lowest_kept": min(scores[unit] for unit in kept)}

    def removals(self, gone: Sequence[Unit] = ()) -> list[Removal]:
        """What may go next, in order: a block, or two neighbouring halves.

        Args:
            gone: What went before.
        """
        if self.unit == HALF_BLOCK:
            return removals(self.runner.num_blocks, gone, self.removable)
        return [block for block in self.removable if block not in gone]

    def require_windows(self) -> CalibrationWindows:
        """Returns the calibration windows, or raises `CalibrationError` when there are none."""
        if self.windows is None:
            raise CalibrationError("This strategy measures the model on text: give dataset=... (--dataset PATH).")
        return self.windows

    def plan(
        self,
        removed: Iterable[Removal | Half],
        *,
        scores: Mapping[Removal, float] | None = None,
        steps: Sequence[Mapping[str, Any]] = (),
        details: Mapping[str, Any] | None = None,
        nested: bool | None = None,
        smaller: Mapping[int, Iterable[Removal]] | None = None,
    ) -> PruningPlan:
        """Builds the plan that removes `removed` (original indices, in the order of removal).

        Args:
            removed: The chosen blocks, or pairs of halves.
            scores: Score of every block, measured on the dense model.
            steps: One JSON object per decision.
            details: Further figures for the report.
            nested: Whether a smaller budget would have removed a prefix of `removed`; see `PruningPlan.truncate`.
            smaller: If not: what it would have removed, by number of blocks.
        """
        removed, smaller = list(removed), {str(count): list(each) for count, each in (smaller or {}).items()}
        fields = {
            "num_blocks": self.runner.num_blocks,
            "nested": nested,
            "scores": {str(name_of(each)): score for each, score in (scores or {}).items()},
            "steps": tuple(steps),
            # Also where only whole blocks were chosen among the halves.
            "details": {
                **({"unit": self.unit} if self.unit != BLOCK else {}),
                **({"objective": self.objective} if self.objective else {}),
                **(details or {}),
            },
            "options": asdict(self.options),
            "seed": self.seed,
            "smaller": {count: tuple(names_of(each)) for count, each in smaller.items()},
            **self.provenance,
        }
        if not _whole([*removed, *chain(*smaller.values())]):
            fields["halves"] = self.runner.halves.names()
        if _whole(removed):
            return PruningPlan.from_removed(removed=removed, **fields)
        return PruningPlan.from_halves(removed=sorted_halves(removed), **fields)


def _whole(removed: Iterable[Removal | Half]) -> bool:
    return all(isinstance(each, int) for each in removed)


def _alone() -> Team:
    from ..team import SOLO  # see above

    return SOLO


class PruningStrategy(ABC):
    """Base class of all strategies, built-in and third-party.

    Class attributes:
        name: The entry-point name.
        unit: What is removed: `"block"`, or `"width"` (channels and heads).
        units: Of a strategy that removes blocks: what it can remove, `"block"` and perhaps `"half_block"`.
        objectives: What the strategy can minimise on the windows (`"nll"`, `"kl"`, `"task"`), its default first; empty
            where it does not look at the loss of the whole model.
        Options: A frozen dataclass; its fields are what `strategy_options` may hold. `__post_init__` may raise
            `ConfigurationError` for impossible values.
        needs_data: Whether calibration windows must be given.
        needs_loss: Whether the model's loss is measured; strategies that look at hidden states only leave it False.
        protect_first, protect_last: Blocks at either end that are never removed unless the user says otherwise.
    """

    name: ClassVar[str]
    unit: ClassVar[str] = BLOCK
    units: ClassVar[tuple[str, ...]] = (BLOCK,)
    objectives: ClassVar[tuple[str, ...]] = ()
    Options: ClassVar[type] = NoOptions
    needs_data: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = False
    protect_first: ClassVar[int] = 0
    protect_last: ClassVar[int] = 0

    @classmethod
    def unit_of(cls, options: Any) -> str:
        """What is removed with these options; `unit` unless they decide."""
        return cls.unit

    @classmethod
    def families_of(cls, options: Any) -> tuple[str, ...]:
        """The families of units that a strategy of unit `"width"` removes: `"mlp"`, `"attention"` or both."""
        return ("mlp",)

    @abstractmethod
    def select(self, context: SearchContext) -> PruningPlan:
        """Chooses `context.num_remove` blocks among `context.removable`, or what `context.width` asks for.

        Changes no weight.
        """
