# SPDX-License-Identifier: Apache-2.0
"""Scores MLP channels by the functional networks of their block, block by block (arXiv 2508.05239).

For one block and one group of texts (see `optimum_blockprune.ica`):

    signals X [T, N] -> standardised -> U, leading singular vectors -> whitened -> FastICA -> z [C, N]

A unit's score is the largest |z| over maps, over the columns of X that are its own, and over the groups of texts.
Nothing else is kept of a group: one number per unit survives.

What is not covered: which networks recur from one group to the next; one that shows up once counts like all others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from optimum.utils import logging
from torch import Tensor

from .errors import NonFiniteError
from .ica import Control, effective_components, leading_maps, rotated_maps, standardised, whitened
from .layer_stream import LayerStream, TextGroup
from .offload import held
from .signals import ACT_UP, Capture, Signals, find_signals
from .widths import UnitGroup, spelled


if TYPE_CHECKING:
    from .strategies.base import SearchContext


logger = logging.get_logger("optimum.blockprune.functional_network")

# Block and writer.
Key = tuple[int, str]

# How a fit ended.
FITTED, SKIPPED, CONSTANT = 1, 2, 3
CONTRASTS = ("none", "cube", "tanh")


@dataclass(frozen=True)
class MapSettings:
    """How maps are made.

    Attributes:
        components, restarts, control: See `ica.spatial_maps`.
        seed: Seed of the random starts.
        signals: `signals.ACT_UP` or `signals.PRODUCT`.
    """

    components: int
    restarts: int
    seed: int
    control: Control = "none"
    signals: str = ACT_UP


@dataclass(frozen=True)
class _Fit:
    """The largest |z| per unit in one group of texts, and how they came about."""

    peaks: Tensor
    outcome: int
    converged: int = 0
    contrast: str = CONTRASTS[0]


class NetworkScores:
    """Scores the units of some blocks.

    Args:
        context: Runner, windows, and the processes among which the groups of texts are shared.
        stream_for: Makes the stream of the text, not yet run, for a batch size.
        units: Groups of MLP channels by block.
        settings: How maps are made.
    """

    def __init__(
        self,
        context: SearchContext,
        stream_for: Callable[[int], LayerStream],
        units: Mapping[int, Sequence[UnitGroup]],
        settings: MapSettings,
    ) -> None:
        self._context, self._runner = context, context.runner
        self._stream_for, self._units, self._settings = stream_for, units, settings
        self._size = context.batch_size
        self._stream = stream_for(self._size)
        self._signals: dict[Key, Signals] = {}
        self._figures: dict[int, dict[str, Tensor]] = {}
        self._stored = self._scored = 0

    @property
    def steps(self) -> int:
        """How often `run` calls `step`."""
        return len(self._units) * len(self._stream.groups)

    def run(self, step: Callable[[], Any]) -> dict[Key, list[float]]:
        """The scores by block and writer.

        Raises:
            NonFiniteError: A signal is NaN or infinite, or no ICA of a block came out finite.
            UnsupportedModelError: The blocks cannot be run one after the other, or signals cannot be captured.
        """
        self._stream.check()
        self._signals = find_signals(self._runner.stack, self._units, self._settings.signals)
        self._warn_of_stand_ins()
        best: dict[Key, list[float]] = {}
        for block, groups in sorted(self._units.items()):
            found = self._context.measured(f"networks-{block}", partial(self._measure, block, step))
            self._figures[block] = found
            self._scored += sum(group.units for group in groups)
            held = int(found["stream"]) + int(found["held"].max()) + self._scored
            self._stored = max(self._stored, held)
            for number, group in enumerate(groups):
                fitted = found["outcome"][number] != SKIPPED
                self._require_fits(block, group, bool(fitted.any()))
                best[block, group.writer] = found.pop(f"peaks-{number}")[fitted].amax(0).tolist()
        return best

    def _measure(self, block: int, step: Callable[[], Any], size: int) -> dict[str, Tensor]:
        """What this process's groups of texts say of a block; rows of the others are zero.

        Returns:
            `"peaks-N"` [texts, units] of group N of units; `"outcome"`, `"converged"` and `"contrast"` (number among
            `CONTRASTS`) [groups of units, texts]; `"held"` [texts] and `"stream"`, values held.
        """
        if size != self._size:
            self._stream, self._size = self._stream_for(size), size
        groups, texts = self._units[block], self._stream.groups
        sums = {f"peaks-{n}": torch.zeros(len(texts), group.units).double() for n, group in enumerate(groups)}
        for name in ("outcome", "converged", "contrast"):
            sums[name] = torch.zeros(len(groups), len(texts), dtype=torch.long)
        sums["held"] = torch.zeros(len(texts), dtype=torch.long)
        for number, captures in self._all_captured(block, texts):
            sums["held"][number] = sum(capture.stored_values for capture in captures)
            for n in range(len(groups)):
                fit = self._fit(block, number, captures.pop(0))
                sums[f"peaks-{n}"][number] = fit.peaks
                sums["outcome"][n, number], sums["converged"][n, number] = fit.outcome, fit.converged
                sums["contrast"][n, number] = CONTRASTS.index(fit.contrast)
            step()
        return {**sums, "stream": torch.tensor(self._stream.stored_values)}

    def details(self) -> dict[str, Any]:
        """Figures for the plan."""
        tokens = [texts.tokens for texts in self._stream.groups]
        fitted = [figures["outcome"] == FITTED for figures in self._figures.values()]
        names = [
            CONTRASTS[number]
            for figures, fits in zip(self._figures.values(), fitted, strict=True)
            for number in figures["contrast"][fits].tolist()
        ]
        return {
            "signals": self._settings.signals,
            "writer_input_blocks": self._stand_ins(),
            "control": self._settings.control,
            "tokens": tokens,
            "components": [effective_components(self._settings.components, each) for each in tokens],
            "restarts": self._settings.restarts,
            "fits": len(names),
            "converged": sum(int(figures["converged"].sum()) for figures in self._figures.values()),
            "contrasts": dict(sorted(Counter(names).items())),
            "skipped": self._with(SKIPPED),
            "constant": self._with(CONSTANT),
            "stored_values": self._stored,
        }

    def _with(self, outcome: int) -> list[list[int]]:
        """Block and text of every fit that ended so."""
        return [
            [block, text]
            for block, figures in self._figures.items()
            for text, _ in figures["outcome"].T.eq(outcome).nonzero().tolist()
        ]

    def _all_captured(self, block: int, texts: Sequence[TextGroup]) -> Iterator[tuple[int, list[Capture]]]:
        """The signals of this process's groups of texts; the weights of the block are fetched once."""
        with held(self._runner.stack.blocks[block]):
            for number in filter(self._context.team.takes, range(len(texts))):
                yield number, self._captured(block, texts[number])

    def _captured(self, block: int, texts: TextGroup) -> list[Capture]:
        """Runs one group of texts to the end of the block and returns the signals of each of its groups of units."""
        captures = [Capture(self._signals[block, group.writer], texts.tokens) for group in self._units[block]]

        def begin(mask: Tensor) -> None:
            for capture in captures:
                capture.begin(mask)

        visits = {module: visit for capture in captures for module, visit in capture.visits.items()}
        self._stream.advance(texts, block, visits, begin)
        return captures

    def _fit(self, block: int, number: int, capture: Capture) -> _Fit:
        """One group of texts."""
        settings, texts = self._settings, self._stream.groups[number]
        try:
            # The signals are let go of as soon as they are standardised.
            u = leading_maps(standardised(capture.take()), effective_components(settings.components, texts.tokens))
        except NonFiniteError as error:
            for batch in texts.batches:
                self._runner.diagnose(batch)
            raise NonFiniteError(f"In the MLP of block {block}: {error}") from error
        none = capture.signals.per_unit(torch.zeros(len(u), dtype=torch.float64))
        y = whitened(u)
        if not len(y):
            # No channel varies, so that none belongs to a network.
            return _Fit(none, CONSTANT)
        seed_parts = (settings.seed, block, number)
        maps = rotated_maps(y, restarts=settings.restarts, seed_parts=seed_parts, control=settings.control)
        if maps is None:
            logger.warning(f"No ICA of block {block} and group {number} of the text came out finite; it is skipped.")
            return _Fit(none, SKIPPED)
        return _Fit(capture.signals.per_unit(maps.peak.cpu()), FITTED, maps.log.converged, maps.log.contrast)

    def _require_fits(self, block: int, group: UnitGroup, fitted: bool) -> None:
        if not fitted:
            raise NonFiniteError(
                f"No ICA of the channels before {group.writer} of block {block} came out finite, in any group of "
                "texts. Give other or more text, or use control='leverage_only', which needs no ICA."
            )

    def _stand_ins(self) -> list[int]:
        return sorted({block for (block, _), signals in self._signals.items() if signals.stands_in})

    def _warn_of_stand_ins(self) -> None:
        if self._stand_ins():
            logger.warning(
                f"The activation in the MLP of blocks {spelled(self._stand_ins())} was not seen; what goes into the "
                "writer stands in for the outputs of activation and up projection."
            )
