# SPDX-License-Identifier: Apache-2.0
"""Which runs can be part of a good set of runs: where costs are not known well yet, the others need no more care."""

from __future__ import annotations

import math
from collections.abc import Mapping


# First piece, and the number of blocks that a run is worth.
Run = tuple[int, int]


def near_best(costs: Mapping[Run, float], num_remove: int, *, step: int, slack: float) -> list[Run]:
    """The runs of all sets whose sum of costs is at most `slack` times the smallest one of as many blocks.

    Sets are those of `best_disjoint_runs`: the piece after a run stays. The smallest sum with a given run in it is
    that of the run and of the best sets in front of and behind it, from two tables, O(T N^2) each (our choice).

    Args:
        costs: By run; infinite for one that must not go.
        num_remove: N; sets of 1 to N blocks count.
        step: Pieces that one block is worth: 1, or 2 for halves.
        slack: At least 1. Then the best sets are among them.
    """
    end = max(start + count * step for start, count in costs)
    behind = _smallest(costs, end, num_remove, step)
    # The same from the other end, for what lies in front of a run.
    mirrored = {(end - start - count * step, count): cost for (start, count), cost in costs.items()}
    ahead = _smallest(mirrored, end, num_remove, step)
    best = behind[0]

    def near(run: Run) -> bool:
        start, count = run
        left, right = ahead[end - start + 1], behind[start + count * step + 1]
        return any(
            costs[run] + min(left[few] + right[total - count - few] for few in range(total - count + 1))
            <= slack * best[total]
            for total in range(count, num_remove + 1)
            if math.isfinite(best[total])
        )

    return [run for run in costs if near(run)]


def _smallest(costs: Mapping[Run, float], end: int, num_remove: int, step: int) -> list[list[float]]:
    """The smallest sum [start, number of blocks] of runs that begin at `start` or later."""
    table = [[0.0] + [math.inf] * num_remove for _ in range(end + 2)]
    for start in reversed(range(end)):
        for total in range(1, num_remove + 1):
            table[start][total] = min(
                [table[start + 1][total]]
                + [
                    costs[start, count] + table[start + count * step + 1][total - count]
                    for count in range(1, total + 1)
                    if (start, count) in costs
                ]
            )
    return table
