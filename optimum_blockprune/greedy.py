# SPDX-License-Identifier: Apache-2.0
"""A greedy walk: the removal with the smallest loss, again and again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optimum.utils import logging

from .half import Removal, name_of
from .losses import perplexity_of
from .racing import CELL
from .steps import RACE, Steps
from .teacher import tail_mass


logger = logging.get_logger("optimum.blockprune.greedy")


class Walk:
    """Removes step by step what costs least.

    Args:
        measured: Measures the candidates of a step.
        title: Name of the search, for people.

    Attributes:
        removed: What is gone, in order.
        steps: One JSON object for each removal.
        scores: Loss of every candidate of the first step.
        loss: Of the model as it is: nats per prediction.
        dense: The loss of the dense model.
    """

    def __init__(self, measured: Steps, title: str) -> None:
        self.measured, self.title = measured, title
        self.objective = measured.context.objective or "nll"
        self.removed: list[Removal] = []
        self.steps: list[dict[str, Any]] = []
        self.scores: dict[Removal, float] = {}
        self.dense: float | None = None
        self.loss = 0.0

    def go(self) -> None:
        """Removes as much as the context asks for, or as its budget allows."""
        count = self.measured.context.num_remove
        for number in range(1, count + 1):
            title = f"{self.title} {number}/{count}"
            losses, dropped = self.measured.step(self.removed, title, with_dense=self.dense is None)
            self.dense = losses.pop(None, self.dense)
            self.scores = self.scores or losses
            # min() keeps the first of equals and the candidates ascend: a tie goes to the lowest index.
            best = min(losses, key=losses.__getitem__)
            self.removed.append(best)
            self.loss = losses[best]
            self.steps.append(self.line(best, losses, dropped))
            logger.info(f"{title}: removed block {name_of(best)}; {self.words(self.loss)}")
            if not self.measured.context.go_on(self.removed):
                break

    def line(self, best: Removal, losses: Mapping[Removal, float], dropped: Mapping[Removal, int]) -> dict[str, Any]:
        """What a plan says of a step."""
        step = {"block": name_of(best), "loss": losses[best], "candidates": named(losses)}
        if self.objective != "kl":
            step["perplexity"] = perplexity_of(losses[best])
        return {**step, "dropped": named(dropped)} if self.measured.looks else step

    def words(self, loss: float) -> str:
        """A loss in words."""
        if self.objective == "kl":
            return f"KL(dense || pruned) {loss:.4f} nats per token"
        dense = perplexity_of(self.dense or 0.0)
        return f"loss {loss:.4f}, perplexity {perplexity_of(loss):.2f} (dense {dense:.2f})"

    def details(self) -> dict[str, Any]:
        """What a plan says of the walk besides its steps."""
        windows, found = self.measured.windows, {"objective": self.objective, "dense_loss": self.dense}
        if windows.teacher is not None:
            found |= {"k": windows.teacher.k, "tail_mass": tail_mass(windows)}
        if self.measured.how == RACE:
            found["race"] = {"looks": list(self.measured.looks), "windows": windows.num_windows, "cell": CELL}
        return found


def named(values: Mapping[Any, Any]) -> dict[str, Any]:
    """By name: JSON objects have string keys."""
    return {str(name_of(removal)): value for removal, value in values.items()}
