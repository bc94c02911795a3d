# SPDX-License-Identifier: Apache-2.0
"""The oldest score of a unit: how large its weights are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..offload import held
from ..plan import PruningPlan
from .base import Place, PruningStrategy, SearchContext
from .ranking import FAMILY_CHOICES, check_choice, kept_units


@dataclass(frozen=True)
class MagnitudeOptions:
    """Options of the magnitude baseline.

    Attributes:
        families: `"mlp"` channels, `"attention"` heads (whole KV groups), or `"both"`.
    """

    families: str = "mlp"

    def __post_init__(self) -> None:
        check_choice("magnitude", "families", self.families, FAMILY_CHOICES)


class Magnitude(PruningStrategy):
    """Removes the channels or heads with the smallest weights; needs no data.

    The score of a unit is the Euclidean norm of all its weights, the writer's and the readers' (the usual baseline,
    whose details are our choice).
    """

    name: ClassVar[str] = "magnitude"
    unit: ClassVar[str] = "width"
    Options: ClassVar[type] = MagnitudeOptions
    needs_data: ClassVar[bool] = False

    @classmethod
    def families_of(cls, options: MagnitudeOptions) -> tuple[str, ...]:
        """See `PruningStrategy.families_of`."""
        return FAMILY_CHOICES[options.families]

    def select(self, context: SearchContext) -> PruningPlan:
        """See the class."""
        task = context.width
        scores = {place: _norms(context, place) for place in task.free}
        kept, details = kept_units(task, scores, "uniform")
        return context.width_plan(kept, scores=scores, details=details)


@torch.no_grad()
def _norms(context: SearchContext, place: Place) -> list[float]:
    group, block = context.width.group_of(place), context.runner.stack.blocks[place.block]
    total = torch.zeros(place.units, dtype=torch.float64)
    with held(block):
        squares = [_squares(block.get_parameter(cut.name).movedim(cut.axis, 0)) for cut in group.tensors]
    for cut, each in zip(group.tensors, squares, strict=True):
        start = 0
        for size in cut.parts:
            total += each[start : start + place.units * size].view(place.units, size).sum(1)
            start += place.units * size
    return total.sqrt().tolist()


def _squares(weights: torch.Tensor) -> torch.Tensor:
    """Summed squares of each row."""
    return weights.float().square().reshape(len(weights), -1).sum(1).double().cpu()
