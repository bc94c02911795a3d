# SPDX-License-Identifier: Apache-2.0
"""What one-pass strategies choose, as other beginnings of a search than the greedy walk."""

from __future__ import annotations

from dataclasses import replace

from optimum.utils import logging

from .errors import ConfigurationError
from .half import Removal, sorted_halves
from .registry import get_strategy
from .strategies.base import HALF_BLOCK, SearchContext


logger = logging.get_logger("optimum.blockprune.search")

SEEDS = ("shortgpt", "angular")


def one_pass_choices(context: SearchContext) -> dict[str, list[Removal]]:
    """The choices of one-pass strategies by name, without one that cannot remove so much.

    Each costs one pass of the dense model, which no ledger keeps. Half-blocks are chosen exactly (see `ShortGPT`).

    Raises:
        NonFiniteError: A hidden state is NaN or infinite.
    """
    found: dict[str, list[Removal]] = {}
    for name in SEEDS:
        kind = get_strategy(name)
        try:
            plan = kind().select(replace(context, options=kind.Options(), objective=None, ledger=None))
        except ConfigurationError as error:
            logger.info(f"The search does not begin with the choice of '{name}': {error}")
            continue
        found[name] = list(plan.removed_blocks)
        if context.unit == HALF_BLOCK:
            pieces = sorted(half.place for half in sorted_halves(plan.removed_units))
            found[name] = context.row.removals(pieces)
    return found
