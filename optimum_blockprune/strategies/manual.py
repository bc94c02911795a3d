# SPDX-License-Identifier: Apache-2.0
"""The blocks that the user names, as a strategy: so that a plan made by hand has a configuration that repeats it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigurationError
from ..plan import PruningPlan
from .base import PruningStrategy, SearchContext


@dataclass(frozen=True)
class ManualOptions:
    """Options of the manual choice.

    Attributes:
        blocks: Numbers of the blocks to remove, in the order of removal, such as `"3,7,8"`.
    """

    blocks: str = ""

    def __post_init__(self) -> None:
        try:
            self.numbers()
        except ValueError:
            raise ConfigurationError(f"blocks={self.blocks!r} of manual must be numbers such as '3,7,8'.") from None

    def numbers(self) -> tuple[int, ...]:
        """The block numbers."""
        return tuple(int(part) for part in self.blocks.split(",") if part.strip())


class Manual(PruningStrategy):
    """Removes the blocks that the option `blocks` names; needs no data."""

    name: ClassVar[str] = "manual"
    Options: ClassVar[type] = ManualOptions
    needs_data: ClassVar[bool] = False

    def select(self, context: SearchContext) -> PruningPlan:
        """See the class. Raises `ConfigurationError` when their number is not the budget."""
        blocks = context.options.numbers()
        if len(blocks) != context.num_remove:
            raise ConfigurationError(
                f"The budget is {context.num_remove} blocks, but blocks={context.options.blocks!r} names "
                f"{len(blocks)}: set num_blocks={len(blocks)}."
            )
        return context.plan(blocks, nested=True)
