# SPDX-License-Identifier: Apache-2.0
"""From the scores of units to the units that stay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import ConfigurationError, NonFiniteError, nearest
from .base import Place, WidthTask


RANKINGS = ("uniform", "global")
FAMILY_CHOICES = {"mlp": ("mlp",), "attention": ("attention",), "both": ("mlp", "attention")}

# Share of a block's channels that a global ranking always leaves (arXiv 2508.05239: none went below 43 %; our choice).
FLOOR = 0.1

Scores = Mapping[Place, Sequence[float]]


def check_choice(strategy: str, name: str, value: str, known: Iterable[str]) -> None:
    """Raises `ConfigurationError` for an option that is none of the known ones."""
    if value not in known:
        raise ConfigurationError(f"Unknown {name} {value!r} for {strategy}.{nearest(str(value), known)}")


def check_ranking(task: WidthTask, ranking: str) -> None:
    """Raises `ConfigurationError` where blocks would get widths that the layout does not have."""
    if ranking == "global" and task.layout == "uniform":
        raise ConfigurationError(
            "ranking='global' gives every block its own width, which layout='uniform' does not have: use "
            "layout='padded' or 'per_layer' (--layout), or ranking='uniform'."
        )
    for places in _by_family(task).values() if ranking == "global" else ():
        floors, units = sum(_floor(task, place) for place in places), sum(place.units for place in places)
        if floors > sum(place.keep for place in places):
            largest = math.floor((1 - floors / units) * 10_000) / 10_000
            raise ConfigurationError(
                f"ranking='global' keeps a tenth of the channels of every block, {floors} of {units}, which is more "
                f"than this budget leaves. The largest possible sparsity is {largest}."
            )


def _by_family(task: WidthTask) -> dict[str, list[Place]]:
    """The free places of every family that has some."""
    found: dict[str, list[Place]] = {}
    for place in task.free:
        found.setdefault(task.group_of(place).family, []).append(place)
    return found


def kept_units(task: WidthTask, scores: Scores, ranking: str) -> tuple[dict[Place, tuple[int, ...]], dict[str, Any]]:
    """Returns the units that stay in every free place, those with the highest scores, and figures for the report.

    `"uniform"` keeps `place.keep` units of each place. `"global"` keeps as many in all, family by family, wherever
    their scores are highest: a count in one total order (score, block, unit) takes the place of a threshold, which is
    reported. Each place keeps at least a tenth of its channels, or one head; kept channels are a multiple of
    `task.align`, which leaves the larger remainders the next multiple.

    Raises:
        NonFiniteError: A score is NaN.
    """
    check_ranking(task, ranking)
    for place, each in scores.items():
        if any(score != score for score in each):
            raise NonFiniteError(f"The scores of the units in block {place.block} are not numbers.")
    if ranking == "uniform":
        return {place: _best(scores[place], place.keep) for place in task.free}, {}
    kept: dict[Place, tuple[int, ...]] = {}
    thresholds: dict[str, float] = {}
    for family, places in _by_family(task).items():
        counts = _global_counts(task, places, scores)
        kept |= {place: _best(scores[place], counts[place]) for place in places}
        removed = [
            score for place in places for unit, score in enumerate(scores[place]) if unit not in set(kept[place])
        ]
        if removed:
            thresholds[family] = max(removed)
    return kept, {"thresholds": thresholds}


def _best(scores: Sequence[float], count: int) -> tuple[int, ...]:
    """The `count` units with the highest scores, ascending; of equal ones the later go first."""
    order = sorted(range(len(scores)), key=lambda unit: (-scores[unit], unit))
    return tuple(sorted(order[:count]))


def _global_counts(task: WidthTask, places: Sequence[Place], scores: Scores) -> dict[Place, int]:
    counts = {place: place.units for place in places}
    floors = {place: _floor(task, place) for place in places}
    excess = sum(place.units - place.keep for place in places)
    order = sorted(
        (scores[place][unit], place.block, place.group, unit, place) for place in places for unit in range(place.units)
    )
    for *_, place in order:
        if not excess:
            break
        if counts[place] > floors[place]:
            counts[place] -= 1
            excess -= 1
    return _aligned(task, counts)


def _floor(task: WidthTask, place: Place) -> int:
    if task.group_of(place).family != "mlp":
        return 1
    least = max(1, math.ceil(FLOOR * place.units))
    return min(place.units, -(-least // task.align) * task.align)


def _aligned(task: WidthTask, counts: Mapping[Place, int]) -> dict[Place, int]:
    """Rounds to multiples so that no more units stay than before."""
    step = {place: task.align if task.group_of(place).family == "mlp" else 1 for place in counts}
    # A place that keeps everything keeps its odd width.
    free = [place for place, count in counts.items() if count < place.units]
    rounded = {
        place: count // step[place] * step[place] if place in free else count for place, count in counts.items()
    }
    spare = sum(counts.values()) - sum(rounded.values())
    for place in sorted(free, key=lambda place: (-(counts[place] % step[place]), place.block, place.group)):
        if spare >= step[place] and counts[place] % step[place] and rounded[place] + step[place] <= place.units:
            rounded[place] += step[place]
            spare -= step[place]
    return rounded
