# SPDX-License-Identifier: Apache-2.0
"""The baseline that every method must beat: blocks drawn at random."""

from __future__ import annotations

import random
from typing import ClassVar

from ..plan import PruningPlan
from .base import PruningStrategy, SearchContext


class Random(PruningStrategy):
    """Draws the blocks uniformly, without replacement, from the removable ones; needs no data.

    The draw has its own generator, seeded by the configuration: no other use of random numbers changes it.
    """

    name: ClassVar[str] = "random"
    needs_data: ClassVar[bool] = False

    def select(self, context: SearchContext) -> PruningPlan:
        """See the class."""
        return context.plan(random.Random(context.seed).sample(context.removable, context.num_remove))
