# SPDX-License-Identifier: Apache-2.0
"""Several prunings in a row, each chosen on what the one before left, as one plan and one result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from .gate import Expectation, apply_proven, expect
from .plan import PruningPlan
from .report import PruningReport
from .surgery import Journal, provenance


def apply_in_order(
    model: PreTrainedModel, makers: Sequence[Callable[[], PruningPlan]], report: PruningReport
) -> tuple[PruningPlan, Expectation, Journal]:
    """Makes, applies and proves one plan after the other, in place.

    Each step is proven against the model that it starts from, so that all of them together are against the dense one.

    Args:
        model: The dense model.
        makers: Each returns the plan for the model as it is when it is called.
        report: Gets the seconds of the surgery.

    Returns:
        The one plan for all steps, what the result is held to, and the journal that takes everything back.

    Raises:
        BlockPruningError: Whatever is wrong; the model is then as it was.
    """
    journal, whole, expected = Journal(), None, None
    earlier = getattr(model.config, "block_pruning", None)
    try:
        for make in makers:
            plan = make()
            with report.timed("surgery"):
                expected = expect(model, plan)
                journal.extend(apply_proven(model, plan, expected))
            whole = plan if whole is None else whole.then(plan)
            if len(makers) > 1:
                # One entry for all, at the end; what one step says of itself must not keep the next from it.
                journal.set(model.config, "block_pruning", earlier)
        if len(makers) > 1:
            journal.set(model.config, "block_pruning", provenance(whole, earlier))
    except BaseException:
        journal.rollback()
        raise
    return whole, replace(expected, plan=whole), journal
