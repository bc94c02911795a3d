# SPDX-License-Identifier: Apache-2.0
"""Rules of the budgets that are no number of blocks or parameters: quality, size and speed.

`recipe` uses this module; the recipes that come here are values that it made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import Field
from fractions import Fraction
from typing import Any

from .errors import ConfigurationError


# What may be lost on held-out text, and all budgets whose number of blocks only measuring tells.
QUALITY_BUDGETS = ("max_ppl_increase", "max_kl")
OPEN_BUDGETS = (*QUALITY_BUDGETS, "target_speedup")
HELD_OUT_FIELDS = ("held_out_dataset", "held_out_samples")


def fewest_within(sizes: Sequence[int], total: int, bound: float | Fraction) -> tuple[int | None, int]:
    """How many blocks have to go until at most `bound` is left, and what is left then.

    Counting the smallest ones makes every choice of that many blocks reach the target.

    Args:
        sizes: Of the blocks that may go, ascending.
        total: Size of the whole model.
        bound: Less than `total`.

    Returns:
        The number, `None` where all of them are too few; and the rest without that many, or without all.
    """
    rest = total
    for count, size in enumerate(sizes, start=1):
        rest -= size
        if rest <= bound:
            return count, rest
    return None, rest


def blocks_for_size(target: float, sizes: Sequence[int], total_bytes: int) -> int:
    """Counts the blocks, smallest first, that bring weights of `total_bytes` down to `target` gigabytes.

    Args:
        target: Gigabytes, 1e9 bytes.
        sizes: Bytes of the blocks that may go, ascending.
        total_bytes: Bytes of all weights.

    Raises:
        ConfigurationError: The weights are small enough already, or cannot become so.
    """
    # The decimal that the user typed, not its binary neighbour.
    bound = Fraction(str(target)) * 10**9
    if bound >= total_bytes:
        raise ConfigurationError(
            f"target_size_gb={target} leaves nothing to remove: the weights of the model take {total_bytes / 1e9:.6g} "
            "GB (1e9 bytes)."
        )
    count, rest = fewest_within(sizes, total_bytes, bound)
    if count is not None:
        return count
    raise ConfigurationError(
        f"target_size_gb={target} cannot be reached: removing the {len(sizes)} blocks that may go leaves "
        f"{rest / 1e9} of {total_bytes / 1e9} GB. The smallest target_size_gb that every choice of blocks reaches is "
        f"{rest / 1e9}."
    )


def check_number(number: Field[Any], value: Any) -> None:
    """Allows a finite number that is large enough."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigurationError(f"{number.name} must be a number, not {value!r}.")
    if value <= number.metadata["above"]:
        raise ConfigurationError(f"{number.name}={value} is too small; it must be above {number.metadata['above']}.")


def check_held_out(recipe: Any) -> None:
    """Fields of held-out text count for the budgets that are held to it; by default it is a part of the dataset."""
    given = [name for name in HELD_OUT_FIELDS if getattr(recipe, name) is not None]
    if given and recipe.budget not in QUALITY_BUDGETS:
        raise ConfigurationError(
            f"{' and '.join(given)} only count for {' and '.join(QUALITY_BUDGETS)}; the budget is {recipe.budget}. "
            "Leave them out."
        )
    if isinstance(recipe.held_out_dataset, str) and not recipe.held_out_dataset:
        raise ConfigurationError("held_out_dataset is an empty string; give a name or a path, or leave it out.")
    most = 3 * recipe.num_samples  # a choice is made among four times as many windows
    if recipe.held_out_dataset is None and (recipe.held_out_samples or 0) > most:
        raise ConfigurationError(
            f"held_out_samples={recipe.held_out_samples} is too large: beside num_samples={recipe.num_samples} "
            f"windows at most {most} are held out. Raise num_samples, or give a held_out_dataset."
        )


def blocks_for_target(target: int, sizes: Sequence[int], total_params: int) -> int:
    """Counts the blocks, smallest first, that bring a model of `total_params` down to `target`."""
    if target >= total_params:
        raise ConfigurationError(
            f"target_params={target:,} leaves nothing to remove: the model has {total_params:,} parameters."
        )
    count, rest = fewest_within(sizes, total_params, target)
    if count is not None:
        return count
    raise ConfigurationError(
        f"target_params={target:,} cannot be reached: removing the {len(sizes)} blocks that may go leaves {rest:,} of "
        f"{total_params:,} parameters. The smallest target_params that every choice of blocks reaches is {rest:,}."
    )


def why_blocks_stay(num_blocks: int, removable: Sequence[int]) -> str:
    """Says which blocks are protected, in the words of the two fields that protect them."""
    if not removable:
        return f"all {num_blocks} are protected (protect_first, protect_last)"
    first, last = removable[0], num_blocks - 1 - removable[-1]
    between = num_blocks - len(removable) - first - last
    if not first + last + between:
        return "one block must stay"
    inner = f" and {between} in between" if between else ""
    return f"the first {first}, the last {last}{inner} are protected (protect_first, protect_last)"
