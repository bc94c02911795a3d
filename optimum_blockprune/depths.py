# SPDX-License-Identifier: Apache-2.0
"""Several depths of one plan, one after the other, on one dense model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from .errors import ConfigurationError, PlanError
from .gate import Expectation, apply_proven, expect
from .plan import PruningPlan


def checked_counts(plan: PruningPlan, counts: Iterable[int]) -> list[int]:
    """Numbers of removed blocks in ascending order, the dense model (0) first.

    Raises:
        ConfigurationError: One is no whole number from 0 on, or there is none.
        PlanError: The plan cannot be cut that short; said before any of them is tried.
    """
    counts = list(counts)
    wrong = [count for count in counts if isinstance(count, bool) or not isinstance(count, int) or count < 0]
    if wrong or not counts:
        raise ConfigurationError(f"Give numbers of blocks to remove, such as [2, 4, 8], not {counts!r}.")
    if plan.width:
        raise PlanError("A plan that removes channels or heads has one size only: choose anew for each size.")
    for count in counts:
        plan.truncate(count)
    return sorted({0, *counts})


@contextmanager
def pruned_to(model: PreTrainedModel, plan: PruningPlan) -> Iterator[Expectation | None]:
    """Applies and proves a plan in place, and puts the model back when the body ends, however it ends.

    Yields:
        What the pruned model is held to; `None` for a plan that removes nothing, which leaves the model alone.
    """
    if not plan.num_removed:
        yield None
        return
    expected = expect(model, plan)
    journal = apply_proven(model, plan, expected)
    try:
        yield expected
    finally:
        journal.rollback()
