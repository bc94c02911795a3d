# SPDX-License-Identifier: Apache-2.0
"""Good sets of runs, and which runs can be in one, against all sets there are."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest

from optimum_blockprune.near_best import Run, fewest_runs, near_best
from optimum_blockprune.strategies.selection import best_disjoint_runs


def sets_of(costs: dict[Run, float], step: int, most: int) -> dict[int, list[tuple[Run, ...]]]:
    """All sets of runs that are no neighbours, by the number of blocks in all."""
    found: dict[int, list[tuple[Run, ...]]] = {}
    for size in range(1, most + 1):
        for runs in combinations(sorted(costs), size):
            total = sum(count for _, count in runs)
            apart = all(one + count * step < two for (one, count), (two, _) in zip(runs, runs[1:], strict=False))
            if apart and total <= most:
                found.setdefault(total, []).append(runs)
    return found


def costs_of(seed: int, pieces: int, step: int, most: int, first: int = 0) -> dict[Run, float]:
    numbers = random.Random(seed)
    return {
        (start, count): numbers.random() * count
        for count in range(1, most + 1)
        for start in range(first, pieces - count * step + 1)
    }


@pytest.mark.parametrize("slack", [1.0, 1.2, 2.0])
@pytest.mark.parametrize(("pieces", "step", "most", "first"), [(6, 1, 3, 0), (7, 1, 4, 2), (9, 2, 3, 1), (3, 1, 3, 0)])
@pytest.mark.parametrize("seed", range(3))
def test_they_are_those_of_all_good_sets(
    seed: int, pieces: int, step: int, most: int, first: int, slack: float
) -> None:
    costs = costs_of(seed, pieces, step, most, first)
    expected: set[Run] = set()
    for sets in sets_of(costs, step, most).values():
        sums = {runs: sum(map(costs.__getitem__, runs)) for runs in sets}
        bound = slack * min(sums.values()) + 1e-12
        expected.update(run for runs, total in sums.items() if total <= bound for run in runs)
    assert set(near_best(costs, most, step=step, slack=slack + 1e-12)) == expected


def test_the_best_sets_are_among_them_and_hopeless_runs_are_not() -> None:
    costs = costs_of(7, 12, 1, 5)
    costs[4, 2], costs[2, 1] = math.inf, math.inf
    left = near_best(costs, 5, step=1, slack=1.2)
    assert len(left) < len(costs) and (4, 2) not in left and (2, 1) not in left
    every, few = (
        best_disjoint_runs(
            lambda start, length, known=known: (
                -costs.get((start, length), math.inf) if (start, length) in known else -math.inf
            ),
            removable=range(12),
            num_remove=5,
        )
        for known in (costs, left)
    )
    assert every.keys() == few.keys() == set(range(1, 6))
    for count in every:
        assert every[count].runs == few[count].runs


def test_numbers_of_blocks_that_cannot_be_chosen_keep_nothing() -> None:
    # Of three pieces in a row, two blocks can only go as one run here, and that one must not.
    costs = {(0, 1): 1.0, (1, 1): 1.0, (0, 2): math.inf}
    assert near_best(costs, 2, step=1, slack=1.0) == [(0, 1), (1, 1)]


# Few runs


@pytest.mark.parametrize("slack", [1.0, 1.1, 1.5])
@pytest.mark.parametrize(("pieces", "step", "most", "first"), [(6, 1, 3, 0), (8, 1, 4, 1), (9, 2, 3, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_the_fewest_runs_of_all_good_sets(
    seed: int, pieces: int, step: int, most: int, first: int, slack: float
) -> None:
    costs = costs_of(seed, pieces, step, most, first)
    found = fewest_runs(costs, most, step=step, slack=slack + 1e-12)
    sets = sets_of(costs, step, most)
    assert found.keys() == sets.keys()
    for total, every in sets.items():
        sums = {runs: sum(map(costs.__getitem__, runs)) for runs in every}
        good = [runs for runs, value in sums.items() if value <= slack * min(sums.values()) + 1e-12]
        fewest = min(map(len, good))
        assert tuple(found[total]) == min((runs for runs in good if len(runs) == fewest), key=sums.__getitem__)


def test_a_run_takes_the_place_of_two_that_are_hardly_better() -> None:
    costs = {(0, 1): 1.0, (2, 1): 1.0, (4, 1): 5.0, (0, 2): 9.0, (2, 2): 2.05, (1, 1): 9.0, (3, 1): 9.0}
    assert fewest_runs(costs, 2, step=1, slack=1.0) == {1: [(0, 1)], 2: [(0, 1), (2, 1)]}
    assert fewest_runs(costs, 2, step=1, slack=1.05) == {1: [(0, 1)], 2: [(2, 2)]}


def test_numbers_without_a_finite_set_are_missing() -> None:
    costs = {(0, 1): 1.0, (1, 1): 1.0, (0, 2): math.inf}
    assert fewest_runs(costs, 2, step=1, slack=1.2) == {1: [(0, 1)]}


def test_of_equal_sums_the_lowest_blocks_go() -> None:
    costs = dict.fromkeys(costs_of(0, 8, 1, 3), 0.0)
    assert fewest_runs(costs, 3, step=1, slack=1.0)[3] == [(0, 3)]
