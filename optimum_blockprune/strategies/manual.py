# SPDX-License-Identifier: Apache-2.0
"""The blocks that the user names, as a strategy: so that a plan made by hand has a configuration that repeats it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigurationError, PlanError
from ..half import Unit, read_units, sorted_halves
from ..plan import PruningPlan
from .base import BLOCK, HALF_BLOCK, PruningStrategy, SearchContext


@dataclass(frozen=True)
class ManualOptions:
    """Options of the manual choice.

    Attributes:
        blocks: Numbers of the blocks to remove, in the order of removal, such as `"3,7,8"`; halves of blocks are
            named like `"3.mlp,4.attention"`, and what is left of them must make up blocks.
    """

    blocks: str = ""

    def __post_init__(self) -> None:
        try:
            self.units()
        except PlanError:
            raise ConfigurationError(
                f"blocks={self.blocks!r} of manual must be numbers such as '3,7,8', or halves such as "
                "'3.mlp,4.attention'."
            ) from None

    def units(self) -> tuple[Unit, ...]:
        """The blocks and halves."""
        return read_units(self.blocks.split(","))


class Manual(PruningStrategy):
    """Removes the blocks that the option `blocks` names; needs no data."""

    name: ClassVar[str] = "manual"
    Options: ClassVar[type] = ManualOptions
    needs_data: ClassVar[bool] = False
    units: ClassVar[tuple[str, ...]] = (BLOCK, HALF_BLOCK)

    def select(self, context: SearchContext) -> PruningPlan:
        """See the class. Raises `ConfigurationError` when their number is not the budget."""
        named = context.options.units()
        count = len(sorted_halves(named)) / 2
        if count != context.num_remove:
            raise ConfigurationError(
                f"The budget is {context.num_remove} blocks, but blocks={context.options.blocks!r} names "
                f"{count:g}: set num_blocks={count:g}."
            )
        return context.plan(named, nested=True)
