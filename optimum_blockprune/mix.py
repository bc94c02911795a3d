# SPDX-License-Identifier: Apache-2.0
"""What is to be split between depth and width; `mixing` does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .asked import removes
from .completions import TASK
from .errors import CalibrationError, ConfigurationError
from .recipe import BUDGET_FIELDS, Recipe


# Of the width part, unless another is named; and what the width part takes over from the depth.
WIDTH = "bip"
_TEXT = (
    *("dataset", "dataset_text_field", "num_samples", "seqlen", "batch_size", "seed", "use_chat_template"),
    *("calibration_recipe", "stack"),
)


@dataclass(frozen=True)
class Mix:
    """What is to be split, and what the splits are held to.

    Attributes:
        target_params: Parameters that the result may have at most.
        depth: Chooses blocks or half-blocks; without a budget of its own.
        width: Chooses channels and heads; without a budget of its own.
        counts: Numbers of blocks to try; by default up to five, evenly spread from none to as many as reach the target
            alone.
        held_out_dataset: Text that decides, like `dataset` of a configuration; by default windows of the text of
            `depth` that are not calibrated on.
        held_out_samples: Windows of it; by default as many as `depth` calibrates on.

    Raises:
        ConfigurationError: These do not fit each other, whatever the model is.
    """

    target_params: int
    depth: Recipe
    width: Recipe
    counts: tuple[int, ...] | None = None
    held_out_dataset: Any = None
    held_out_samples: int | None = None

    def __post_init__(self) -> None:
        for name, recipe, kind in (("depth", self.depth, "block"), ("width", self.width, "width")):
            budgets = [field for field in BUDGET_FIELDS if getattr(recipe, field) is not None]
            if budgets:
                raise ConfigurationError(
                    f"target_params is the budget of both parts: leave {' and '.join(budgets)} of '{name}' out."
                )
            if removes(recipe) != kind:
                what = "blocks" if kind == "block" else "channels or heads"
                raise ConfigurationError(f"'{name}' must remove {what}, which '{recipe.strategy}' does not.")
        if (self.depth.stack or "decoder") != (self.width.stack or "decoder"):
            raise ConfigurationError(
                f"stack={self.depth.stack!r} and {self.width.stack!r}: both must be of one stack."
            )
        if self.depth.dataset is None and self.held_out_dataset is None:
            raise CalibrationError(
                "Held-out text decides between the splits: give dataset=... (--dataset PATH), of which a part is held "
                "out, or held_out_dataset=... (--held-out-dataset PATH)."
            )
        _check_number("target_params", self.target_params, 1)
        if self.held_out_samples is not None:
            _check_number("held_out_samples", self.held_out_samples, 1)
        for count in self.counts or ():
            _check_number("counts", count, 0)
        if self.counts is not None and (not self.counts or len(set(self.counts)) != len(self.counts)):
            raise ConfigurationError(f"counts={self.counts!r} must be different numbers of blocks, such as (0, 2, 4).")


def width_beside(depth: Recipe, strategy: str = WIDTH, options: dict[str, Any] | None = None, **shape: Any) -> Recipe:
    """The recipe of a width part that reads the text of a depth part.

    Args:
        depth: Of the blocks.
        strategy: Chooses channels or heads.
        options: Of the strategy; those of the default one are the best choice of MLP channels that we know.
        **shape: `layout` and `align`.

    Raises:
        ConfigurationError: The text is prompts with completions, which strategies of width do not read.
    """
    if depth.objective == TASK:
        raise ConfigurationError(
            "objective='task' reads prompts with completions, which no strategy of width does: give the width part a "
            "configuration with a text of its own, or another objective."
        )
    if options is None and strategy == WIDTH:
        options = {"families": "mlp", "reduction": "l2"}
    return Recipe(strategy, strategy_options=options, **{name: getattr(depth, name) for name in _TEXT}, **shape)


def _check_number(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name} must be a whole number from {least} on, not {value!r}.")
