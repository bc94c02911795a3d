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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from optimum.utils import logging
from torch import Tensor

from .errors import NonFiniteError
from .ica import Control, effective_components, leading_maps, rotated_maps, standardised, whitened
from .layer_stream import LayerStream, TextGroup
from .runner import BlockRunner
from .signals import ACT_UP, Capture, Signals, find_signals
from .widths import UnitGroup, spelled


logger = logging.get_logger("optimum.blockprune.functional_network")

# Block and writer.
Key = tuple[int, str]


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


class NetworkScores:
    """Scores the units of some blocks.

    Args:
        runner: Runs the model.
        stream: The text, not yet run.
        units: Groups of MLP channels by block.
        settings: How maps are made.
    """

    def __init__(
        self,
        runner: BlockRunner,
        stream: LayerStream,
        units: Mapping[int, Sequence[UnitGroup]],
        settings: MapSettings,
    ) -> None:
        self._runner, self._stream, self._units, self._settings = runner, stream, units, settings
        self._best: dict[Key, Tensor] = {}
        self._signals: dict[Key, Signals] = {}
        self._stored = self._converged = 0
        self._contrasts: Counter[str] = Counter()
        self._skipped: list[list[int]] = []
        self._constant: list[list[int]] = []

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
        for block in sorted(self._units):
            for number, texts in enumerate(self._stream.groups):
                captures = self._captured(block, texts)
                for key in list(captures):
                    self._add(key, self._peaks(block, number, captures.pop(key)))
                step()
            self._require_fits(block)
        return {key: best.tolist() for key, best in self._best.items()}

    def details(self) -> dict[str, Any]:
        """Figures for the plan."""
        tokens = [texts.tokens for texts in self._stream.groups]
        return {
            "signals": self._settings.signals,
            "writer_input_blocks": self._stand_ins(),
            "control": self._settings.control,
            "tokens": tokens,
            "components": [effective_components(self._settings.components, each) for each in tokens],
            "restarts": self._settings.restarts,
            "fits": sum(self._contrasts.values()),
            "converged": self._converged,
            "contrasts": dict(sorted(self._contrasts.items())),
            "skipped": self._skipped,
            "constant": self._constant,
            "stored_values": self._stored,
        }

    def _captured(self, block: int, texts: TextGroup) -> dict[Key, Capture]:
        """Runs one group of texts to the end of the block and returns its signals."""
        captures = {
            (block, group.writer): Capture(self._signals[block, group.writer], texts.tokens)
            for group in self._units[block]
        }

        def begin(mask: Tensor) -> None:
            for capture in captures.values():
                capture.begin(mask)

        visits = {module: visit for capture in captures.values() for module, visit in capture.visits.items()}
        self._stream.advance(texts, block, visits, begin)
        scores = sum(best.numel() for best in self._best.values())
        held = sum(capture.stored_values for capture in captures.values())
        self._stored = max(self._stored, self._stream.stored_values + held + scores)
        return captures

    def _peaks(self, block: int, number: int, capture: Capture) -> Tensor | None:
        """The largest |z| per unit in one group of texts; `None` if no fit was finite."""
        settings, texts = self._settings, self._stream.groups[number]
        try:
            # The signals are let go of as soon as they are standardised.
            u = leading_maps(standardised(capture.take()), effective_components(settings.components, texts.tokens))
        except NonFiniteError as error:
            for batch in texts.batches:
                self._runner.diagnose(batch)
            raise NonFiniteError(f"In the MLP of block {block}: {error}") from error
        y = whitened(u)
        if not len(y):
            # No channel varies, so that none belongs to a network.
            self._constant.append([block, number])
            return capture.signals.per_unit(torch.zeros(len(u), dtype=torch.float64))
        seed_parts = (settings.seed, block, number)
        maps = rotated_maps(y, restarts=settings.restarts, seed_parts=seed_parts, control=settings.control)
        if maps is None:
            logger.warning(f"No ICA of block {block} and group {number} of the text came out finite; it is skipped.")
            self._skipped.append([block, number])
            return None
        self._contrasts[maps.log.contrast] += 1
        self._converged += maps.log.converged
        return capture.signals.per_unit(maps.peak.cpu())

    def _add(self, key: Key, peaks: Tensor | None) -> None:
        if peaks is not None:
            self._best[key] = torch.maximum(self._best[key], peaks) if key in self._best else peaks

    def _require_fits(self, block: int) -> None:
        lost = [group.writer for group in self._units[block] if (block, group.writer) not in self._best]
        if lost:
            raise NonFiniteError(
                f"No ICA of the channels before {lost[0]} of block {block} came out finite, in any group of texts. "
                "Give other or more text, or use control='leverage_only', which needs no ICA."
            )

    def _stand_ins(self) -> list[int]:
        return sorted({block for (block, _), signals in self._signals.items() if signals.stands_in})

    def _warn_of_stand_ins(self) -> None:
        if self._stand_ins():
            logger.warning(
                f"The activation in the MLP of blocks {spelled(self._stand_ins())} was not seen; what goes into the "
                "writer stands in for the outputs of activation and up projection."
            )
