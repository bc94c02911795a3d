# SPDX-License-Identifier: Apache-2.0
"""What a strategy is: a name, a unit, an options dataclass and one method that turns a context into a plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import CalibrationError
from ..plan import PruningPlan


if TYPE_CHECKING:
    from tqdm.auto import tqdm

    from ..batches import CalibrationWindows
    from ..runner import BlockRunner


@dataclass(frozen=True)
class NoOptions:
    """The options dataclass of a strategy that has none."""


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

    def require_windows(self) -> CalibrationWindows:
        """Returns the calibration windows, or raises `CalibrationError` when there are none."""
        if self.windows is None:
            raise CalibrationError("This strategy measures the model on text: give dataset=... (--dataset PATH).")
        return self.windows

    def plan(
        self,
        removed: Iterable[int],
        *,
        scores: Mapping[int, float] | None = None,
        steps: Sequence[Mapping[str, Any]] = (),
        details: Mapping[str, Any] | None = None,
    ) -> PruningPlan:
        """Builds the plan that removes `removed` (original indices, in the order of removal).

        Args:
            removed: The chosen blocks.
            scores: Score of every block, measured on the dense model.
            steps: One JSON object per decision.
            details: Further figures for the report.
        """
        return PruningPlan.from_removed(
            num_blocks=self.runner.num_blocks,
            removed=removed,
            scores={str(block): score for block, score in (scores or {}).items()},
            steps=tuple(steps),
            details=dict(details or {}),
            options=asdict(self.options),
            seed=self.seed,
            **self.provenance,
        )


class PruningStrategy(ABC):
    """Base class of all strategies, built-in and third-party.

    Class attributes:
        name: The entry-point name.
        unit: What is removed: `"block"` in this version.
        Options: A frozen dataclass; its fields are what `strategy_options` may hold. `__post_init__` may raise
            `ConfigurationError` for impossible values.
        needs_data: Whether calibration windows must be given.
        needs_loss: Whether the model's loss is measured; strategies that look at hidden states only leave it False.
        protect_first, protect_last: Blocks at either end that are never removed unless the user says otherwise.
    """

    name: ClassVar[str]
    unit: ClassVar[str] = "block"
    Options: ClassVar[type] = NoOptions
    needs_data: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = False
    protect_first: ClassVar[int] = 0
    protect_last: ClassVar[int] = 0

    @abstractmethod
    def select(self, context: SearchContext) -> PruningPlan:
        """Chooses `context.num_remove` blocks among `context.removable`; changes no weight."""
