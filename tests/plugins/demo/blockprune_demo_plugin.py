# SPDX-License-Identifier: Apache-2.0
"""A third party's strategy, complete: it needs no data and has one option."""

from __future__ import annotations

from dataclasses import dataclass

from optimum_blockprune import PruningPlan, PruningStrategy


@dataclass(frozen=True)
class LastFirstOptions:
    """Options of `last_first`.

    Attributes:
        skip: Blocks at the output end to leave alone.
    """

    skip: int = 0


class LastFirst(PruningStrategy):
    """Removes the last removable blocks, the last one first."""

    name = "last_first"
    Options = LastFirstOptions
    needs_data = False

    def select(self, context) -> PruningPlan:
        """Chooses from the output end, without running the model."""
        candidates = context.removable[::-1][context.options.skip :]
        return context.plan(candidates[: context.num_remove])
