# SPDX-License-Identifier: Apache-2.0
"""The baseline that every method must beat: blocks, or channels and heads, drawn at random."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from ..half import Removal, sorted_halves
from ..plan import PruningPlan
from .base import BLOCK, HALF_BLOCK, PruningStrategy, SearchContext
from .ranking import FAMILY_CHOICES, check_choice


@dataclass(frozen=True)
class RandomOptions:
    """Options of the random baseline.

    Attributes:
        unit: `"block"` draws blocks, `"width"` channels and heads.
        families: With unit `"width"`: `"mlp"` channels, `"attention"` heads (whole KV groups), or `"both"`.
    """

    unit: str = "block"
    families: str = "mlp"

    def __post_init__(self) -> None:
        check_choice("random", "unit", self.unit, ("block", "width"))
        check_choice("random", "families", self.families, FAMILY_CHOICES)


class Random(PruningStrategy):
    """Draws the blocks (or channels) uniformly, without replacement, from the removable ones; needs no data.

    The draw has its own generator, seeded by the configuration: no other use of random numbers changes it.
    """

    name: ClassVar[str] = "random"
    Options: ClassVar[type] = RandomOptions
    needs_data: ClassVar[bool] = False
    units: ClassVar[tuple[str, ...]] = (BLOCK, HALF_BLOCK)

    @classmethod
    def unit_of(cls, options: RandomOptions) -> str:
        """See `PruningStrategy.unit_of`."""
        return options.unit

    @classmethod
    def families_of(cls, options: RandomOptions) -> tuple[str, ...]:
        """See `PruningStrategy.families_of`."""
        return FAMILY_CHOICES[options.families]

    def select(self, context: SearchContext) -> PruningPlan:
        """See the class."""
        generator = random.Random(context.seed)
        if context.width is None:
            return _blocks(context, generator)
        kept = {place: generator.sample(range(place.units), place.keep) for place in context.width.free}
        return context.width_plan(kept)


def _blocks(context: SearchContext, generator: random.Random) -> PruningPlan:
    if context.unit == BLOCK:
        # Shuffled whole: a smaller budget takes a prefix of the same order.
        order = generator.sample(context.removable, len(context.removable))
        return context.plan(order[: context.num_remove], nested=True)
    removed: list[Removal] = []
    for _ in range(context.num_remove):
        removed.append(generator.choice(context.removals(sorted_halves(removed))))
    return context.plan(removed, nested=True)
