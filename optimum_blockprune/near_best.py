# SPDX-License-Identifier: Apache-2.0
"""Good sets of runs by the sum of their costs, and which runs can be part of one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


# First piece, and the number of blocks that a run is worth.
Run = tuple[int, int]
Table = list[list[float]]


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


def fewest_runs(costs: Mapping[Run, float], num_remove: int, *, step: int, slack: float) -> dict[int, list[Run]]:
    """The sets of as few runs as possible whose sum of costs is at most `slack` times the smallest one.

    Each level of the dynamic program allows for one run more, O(T N^2) each; there are as many as the runs of the
    result. Of sets of equally many runs the one with the smallest sum is taken, and of these the lowest blocks.

    Args:
        costs: See `near_best`, as for the next two.
        num_remove: N.
        step: Pieces that one block is worth.
        slack: 1 for the smallest sums.

    Returns:
        Runs in order by the number of blocks, 1 to N; without those that no set of finite costs has.
    """
    end = max(start + count * step for start, count in costs)
    best = _smallest(costs, end, num_remove, step)[0]
    wanted = {total for total in range(1, num_remove + 1) if math.isfinite(best[total])}
    levels = [[[0.0] + [math.inf] * num_remove for _ in range(end + 2)]]
    found: dict[int, list[Run]] = {}
    while wanted - set(found):
        levels.append(_smallest(costs, end, num_remove, step, levels[-1]))
        for total in wanted - set(found):
            if levels[-1][0][total] <= slack * best[total]:
                found[total] = _read_back(costs, levels, total, step)
    return {total: found[total] for total in sorted(found)}


def _read_back(costs: Mapping[Run, float], levels: Sequence[Table], total: int, step: int) -> list[Run]:
    """The runs behind the first entry of the last level."""
    runs: list[Run] = []
    start, level = 0, len(levels) - 1
    while total:
        for count in range(total, 0, -1):
            rest = start + count * step + 1
            if (start, count) in costs and levels[level][start][total] == (
                costs[start, count] + levels[level - 1][rest][total - count]
            ):
                runs.append((start, count))
                start, total, level = rest, total - count, level - 1
                break
        else:
            start += 1
    return runs


def _smallest(costs: Mapping[Run, float], end: int, num_remove: int, step: int, after: Table | None = None) -> Table:
    """The smallest sum [start, number of blocks] of runs that begin at `start` or later.

    Args:
        costs: By run.
        end: The piece behind all runs.
        num_remove: The largest number of blocks.
        step: Pieces that one block is worth.
        after: What the runs after the first one may cost; by default the table itself, for any number of runs.
    """
    table = [[0.0] + [math.inf] * num_remove for _ in range(end + 2)]
    for start in reversed(range(end)):
        for total in range(1, num_remove + 1):
            table[start][total] = min(
                [table[start + 1][total]]
                + [
                    costs[start, count] + (after or table)[start + count * step + 1][total - count]
                    for count in range(1, total + 1)
                    if (start, count) in costs
                ]
            )
    return table
