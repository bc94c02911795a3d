# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math
import random

import pytest

from optimum_blockprune.errors import ConfigurationError, NonFiniteError
from optimum_blockprune.strategies.selection import (
    Run,
    RunScore,
    Selection,
    best_disjoint_runs,
    fast_block_select,
    maximal_runs,
)


def random_table(generator: random.Random, blocks: int) -> dict[Run, float]:
    """A score for every run; nothing relates one to another."""
    runs = (Run(start, length) for start in range(blocks) for length in range(1, blocks - start + 1))
    return {run: generator.uniform(-1, 1) for run in runs}


def lookup(table: dict[Run, float]) -> RunScore:
    return lambda start, length: table[Run(start, length)]


def total(table: dict[Run, float], runs: tuple[Run, ...]) -> float:
    return math.fsum(table[run] for run in runs)


def disjoint(runs: tuple[Run, ...]) -> bool:
    return len({block for run in runs for block in run.blocks}) == sum(run.length for run in runs)


# --- Fast-Block-Select -----------------------------------------------------------------------------------------------


def figure_2() -> tuple[list[float], dict[Run, float]]:
    """The ranking of the paper's worked example (Llama-2-7B, N = 5), and run scores that fit its outcome."""
    ranking = [27, 26, 24, 28, 23, 25, 22, 29, 21, 20]
    singles = [0.0] * 32
    for place, block in enumerate(ranking):
        singles[block] = 10.0 - place
    table = {Run(start, length): 0.0 for length in range(1, 6) for start in range(33 - length)}
    table |= {Run(23, 2): 3.0, Run(24, 2): 4.0, Run(26, 3): 5.0, Run(24, 5): 6.0, Run(22, 5): 5.5}
    return singles, table


def test_worked_example_of_figure_2() -> None:
    singles, table = figure_2()
    asked: list[Run] = []

    def score(start: int, length: int) -> float:
        asked.append(Run(start, length))
        return table[asked[-1]]

    result = fast_block_select(singles, score, removable=range(32), num_remove=5, k=5)
    first, second = result.iterations
    assert first["runs"] == [[23, 2], [26, 3]]
    assert first["candidates"] == [5, 6]
    assert first["selected"] == [[24, 2], [26, 3]]
    assert first["score"] == 9.0
    assert second["runs"] == second["selected"] == [[24, 5]]
    assert result.runs == (Run(24, 5),)
    assert result.order == (24, 25, 26, 27, 28)
    # The pool is frozen: the paper's window 22..26 needs block 23, which left the choice in the first round.
    assert Run(22, 5) in asked
    assert all(set(run.blocks) <= set(range(20, 30)) for run in asked)
    assert len(asked) == len(set(asked)) == result.evaluations == second["evaluations"]


def test_paper_counts_five_windows_in_round_two_but_its_formula_gives_six() -> None:
    singles, table = figure_2()
    result = fast_block_select(singles, lookup(table), removable=range(32), num_remove=5, k=5)
    assert result.iterations[1]["candidates"] == [min(int(math.log(5)) + 5, 6)] == [6]


def test_six_isolated_blocks_are_placed_although_k_offers_five_windows() -> None:
    singles = [1.0 if block % 2 == 0 else 0.0 for block in range(12)]
    result = fast_block_select(singles, lambda start, length: singles[start], removable=range(12), num_remove=6, k=5)
    assert result.order == (0, 2, 4, 6, 8, 10)
    assert len(result.iterations) == 1


def test_keeps_the_current_choice_on_a_tie() -> None:
    result = fast_block_select([0, 0, 1, 0, 0], lambda start, length: 1.0, removable=range(5), num_remove=1, k=5)
    assert result.order == (2,)


def test_a_tie_between_better_windows_takes_the_lowest_start() -> None:
    singles = [3.0, 4.0, 5.0, 6.0, 9.0, 8.0]
    table = {Run(start, 2): score for start, score in enumerate([0.0, 0.0, 2.0, 2.0, 1.0])}
    result = fast_block_select(singles, lookup(table), removable=range(6), num_remove=2, k=5)
    assert result.runs == (Run(2, 2),)


def test_pool_holds_removable_blocks_only() -> None:
    singles = [9.0, 8.0, 1.0, 2.0, 3.0, 7.0]
    result = fast_block_select(singles, lambda start, length: start, removable=(1, 2, 3, 4), num_remove=2, k=5)
    assert set(result.order) <= {1, 2, 3, 4}


def reference_round(groups: list[Run], pool: set[int], singles: list[float], table: dict[Run, float], k: int) -> float:
    """The best total over the plain product of the candidates of all groups."""
    choices = []
    for group in groups:
        length = group.length
        windows = [Run(start, length) for start in sorted(pool) if pool.issuperset(range(start, start + length))]
        windows.sort(key=lambda run: -sum(singles[block] for block in run.blocks))
        choices.append({*windows[: min(math.floor(math.log(length)) + k, len(windows))], group})
    return max(total(table, runs) for runs in itertools.product(*choices) if disjoint(runs))


@pytest.mark.parametrize("seed", range(60))
def test_every_round_is_the_best_of_all_combinations_of_candidates(seed: int) -> None:
    generator = random.Random(seed)
    blocks = generator.randint(6, 16)
    num_remove, k = generator.randint(1, min(6, blocks - 1)), generator.randint(1, 4)
    table = random_table(generator, blocks)
    singles = [table[Run(block, 1)] for block in range(blocks)]
    ranking = sorted(range(blocks), key=lambda block: -singles[block])
    pool = set(ranking[: num_remove + min(num_remove, blocks - num_remove)])
    result = fast_block_select(singles, lookup(table), removable=range(blocks), num_remove=num_remove, k=k)
    assert [Run(*run) for run in result.iterations[0]["runs"]] == list(maximal_runs(ranking[:num_remove]))
    for entry in result.iterations:
        groups = [Run(*run) for run in entry["runs"]]
        assert entry["score"] == pytest.approx(reference_round(groups, pool, singles, table, k), abs=1e-12)
        assert sorted(run[1] for run in entry["selected"]) == sorted(run.length for run in groups)


@pytest.mark.parametrize("seed", range(20))
def test_single_run_with_all_windows_as_candidates_gives_the_best_window(seed: int) -> None:
    generator = random.Random(seed)
    table = random_table(generator, 12)
    singles = [10.0 - abs(block - 6) for block in range(12)]
    result = fast_block_select(singles, lookup(table), removable=range(12), num_remove=4, k=100)
    pool = range(2, 10)
    assert result.runs == (max((Run(start, 4) for start in pool[:5]), key=table.__getitem__),)


@pytest.mark.parametrize("seed", range(150))
def test_ends_with_the_right_number_of_blocks_and_never_splits_a_run(seed: int) -> None:
    generator = random.Random(1000 + seed)
    blocks = generator.randint(2, 40)
    removable = sorted(generator.sample(range(blocks), generator.randint(2, blocks)))
    num_remove = generator.randint(1, len(removable) - 1)
    table = random_table(generator, blocks)
    if seed % 3 == 0:  # ties everywhere
        table = {run: float(round(score)) for run, score in table.items()}
    singles = [table[Run(block, 1)] for block in range(blocks)]
    seen: list[dict] = []
    result = fast_block_select(
        singles,
        lookup(table),
        removable=removable,
        num_remove=num_remove,
        k=generator.randint(1, 6),
        on_iteration=seen.append,
    )
    assert tuple(seen) == result.iterations
    assert len(result.order) == len(set(result.order)) == num_remove
    assert set(result.order) <= set(removable)
    counts = [len(entry["runs"]) for entry in result.iterations]
    assert counts == sorted(counts, reverse=True)
    assert result.scores == tuple(table[run] for run in result.runs)
    assert maximal_runs(result.order) == result.runs


def test_many_isolated_blocks_take_no_time() -> None:
    """Trying assignments one by one would need 2**63 steps here."""
    blocks = 126
    singles = [float(block % 2) for block in range(blocks)]
    result = fast_block_select(
        singles, lambda start, length: singles[start] / length, removable=range(blocks), num_remove=63, k=5
    )
    assert len(result.order) == 63


# --- the exact optimum -----------------------------------------------------------------------------------------------


def brute_force(table: dict[Run, float], removable: list[int], num_remove: int) -> float:
    return max(total(table, maximal_runs(blocks)) for blocks in itertools.combinations(removable, num_remove))


@pytest.mark.parametrize("seed", range(25))
def test_dynamic_programming_equals_brute_force(seed: int) -> None:
    generator = random.Random(seed)
    blocks = generator.randint(1, 12)
    removable = sorted(generator.sample(range(blocks), generator.randint(1, blocks)))
    table = random_table(generator, blocks)
    for num_remove in range(1, len(removable) + 1):
        found = best_disjoint_runs(lookup(table), removable=removable, num_remove=num_remove)
        assert list(found) == list(range(1, num_remove + 1))
        result = found[num_remove]
        assert math.fsum(result.scores) == pytest.approx(brute_force(table, removable, num_remove), abs=1e-12)
        assert maximal_runs(result.order) == result.runs
        assert set(result.order) <= set(removable)
        assert len(result.order) == num_remove


def test_adjacent_runs_are_scored_as_the_one_run_that_they_are() -> None:
    table = {Run(0, 1): 5.0, Run(1, 1): 5.0, Run(2, 1): 1.0, Run(0, 2): 0.0, Run(1, 2): 0.0}
    result = best_disjoint_runs(lookup(table), removable=range(3), num_remove=2)[2]
    assert result.runs == (Run(0, 1), Run(2, 1))


def test_ties_take_the_lowest_blocks() -> None:
    result = best_disjoint_runs(lambda start, length: 0.0, removable=range(6), num_remove=3)[3]
    assert result.order == (0, 1, 2)


def test_forbidden_runs_are_avoided() -> None:
    result = best_disjoint_runs(
        lambda start, length: -math.inf if length > 1 else -start, removable=range(5), num_remove=2
    )[2]
    assert result.order == (0, 2)


@pytest.mark.parametrize("seed", range(5))
def test_one_table_holds_every_smaller_number(seed: int) -> None:
    table = random_table(random.Random(seed), 9)
    found = best_disjoint_runs(lookup(table), removable=range(9), num_remove=6)
    for count, result in found.items():
        alone = best_disjoint_runs(lookup(table), removable=range(9), num_remove=count)[count]
        assert (result.runs, result.scores) == (alone.runs, alone.scores)


def test_smaller_numbers_without_a_choice_are_missing() -> None:
    found = best_disjoint_runs(
        lambda start, length: 0.0 if length == 2 else -math.inf, removable=range(4), num_remove=2
    )
    assert list(found) == [2]


def test_only_forbidden_runs_left() -> None:
    with pytest.raises(ConfigurationError, match="No choice of 2 blocks"):
        best_disjoint_runs(lambda start, length: -math.inf, removable=range(5), num_remove=2)


# --- both ------------------------------------------------------------------------------------------------------------


def both(run_score, removable, num_remove) -> list:
    return [
        lambda: fast_block_select([0.0] * 8, run_score, removable=removable, num_remove=num_remove, k=5),
        lambda: best_disjoint_runs(run_score, removable=removable, num_remove=num_remove),
    ]


@pytest.mark.parametrize("num_remove", [0, 4])
@pytest.mark.parametrize("search", [0, 1])
def test_number_of_blocks_must_fit(search: int, num_remove: int) -> None:
    with pytest.raises(ConfigurationError, match=f"Cannot remove {num_remove} blocks: 3 are removable"):
        both(lambda start, length: 0.0, (1, 3, 5), num_remove)[search]()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("search", [0, 1])
def test_scores_must_be_numbers(search: int, bad: float) -> None:
    with pytest.raises(NonFiniteError, match="removing blocks"):
        both(lambda start, length: bad, range(8), 2)[search]()


def test_k_must_be_positive() -> None:
    with pytest.raises(ConfigurationError, match="k must be at least 1, not 0"):
        fast_block_select([0.0, 1.0], lambda start, length: 0.0, removable=range(2), num_remove=1, k=0)


def test_order_is_best_run_first() -> None:
    selection = Selection((Run(1, 2), Run(5, 1), Run(8, 1)), (0.5, 2.0, 0.5), evaluations=3)
    assert selection.order == (5, 1, 2, 8)


def test_maximal_runs() -> None:
    assert maximal_runs([7, 2, 3, 5, 1]) == (Run(1, 3), Run(5, 1), Run(7, 1))
    assert maximal_runs([]) == ()


# --- halves of blocks ------------------------------------------------------------------------------------------------


def halves_table(generator: random.Random, blocks: int) -> dict[Run, float]:
    """A score for every run of an even number of halves."""
    return {run: score for run, score in random_table(generator, 2 * blocks).items() if run.length % 2 == 0}


def sets_of_halves(allowed: list[int], pairs: int) -> list[tuple[Run, ...]]:
    """All that can go so that the halves that are left alternate, as its longest runs."""
    found = (maximal_runs(halves) for halves in itertools.combinations(allowed, 2 * pairs))
    return [runs for runs in found if all(run.length % 2 == 0 for run in runs)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gap", [(), (4, 5), (0, 1, 6, 7)])
def test_best_disjoint_runs_of_halves_are_the_best_of_all(seed: int, gap: tuple[int, ...]) -> None:
    table = halves_table(random.Random(seed), 5)
    allowed = [half for half in range(10) if half not in gap]
    most = len(allowed) // 2
    found = best_disjoint_runs(lookup(table), removable=allowed, num_remove=most, step=2)
    assert list(found) == list(range(1, most + 1))
    for count, selection in found.items():
        best = max(total(table, runs) for runs in sets_of_halves(allowed, count))
        assert total(table, selection.runs) == pytest.approx(best, abs=1e-12)
        assert len(selection.order) == 2 * count and maximal_runs(selection.order) == selection.runs


@pytest.mark.parametrize("seed", range(6))
def test_fast_select_of_halves_begins_with_the_best_pairs(seed: int) -> None:
    table = halves_table(random.Random(seed), 6)
    pairs = [table[Run(start, 2)] for start in range(11)]
    allowed = list(range(2, 12))
    for count in range(1, 6):
        found = fast_block_select(pairs, lookup(table), removable=allowed, num_remove=count, k=3, step=2)
        first = [Run(*run) for run in found.iterations[0]["runs"]]
        sums = [
            sum(pairs[start] for run in runs for start in run.blocks[::2]) for runs in sets_of_halves(allowed, count)
        ]
        assert sum(pairs[start] for run in first for start in run.blocks[::2]) == pytest.approx(max(sums), abs=1e-12)
        assert found.iterations[0]["score"] >= total(table, tuple(first)) - 1e-12
        assert sum(run.length for run in found.runs) == 2 * count and disjoint(found.runs)
        assert all(run.length % 2 == 0 for run in found.runs)
        assert {half for run in found.runs for half in run.blocks} <= set(allowed)


def test_a_block_is_two_halves() -> None:
    """Scores that rank whole blocks alone give the choice of blocks."""
    table = random_table(random.Random(3), 8)
    halves = {
        run: table[Run(run.start // 2, run.length // 2)] if run.start % 2 == 0 else -9.0 * run.length
        for run in halves_table(random.Random(0), 8)
    }
    for count in range(1, 8):
        blocks = best_disjoint_runs(lookup(table), removable=range(8), num_remove=count)[count]
        twice = best_disjoint_runs(lookup(halves), removable=range(16), num_remove=count, step=2)[count]
        assert twice.order == tuple(half for block in blocks.order for half in (2 * block, 2 * block + 1))


def test_pairs_without_a_score() -> None:
    with pytest.raises(NonFiniteError, match="pair of halves"):
        fast_block_select([0.1, math.nan, 0.2], lambda *_: 0.0, removable=range(4), num_remove=1, k=1, step=2)


def test_more_pairs_than_there_are() -> None:
    with pytest.raises(ConfigurationError, match="Cannot remove 3 blocks: 2 are removable"):
        best_disjoint_runs(lambda *_: 0.0, removable=range(4), num_remove=3, step=2)
