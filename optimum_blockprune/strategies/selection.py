# SPDX-License-Identifier: Apache-2.0
"""Chooses runs of blocks from a table of run scores: Fast-Block-Select, and the exact optimum beside it.

A run is a stretch of consecutive blocks; its score says how well the model does without it (higher: rather remove
it). Both searches maximise a *sum* of run scores, and neither looks at the model again.

* `fast_block_select` is the search of MI-PRUN (arXiv 2601.07212, Section 3 and Algorithm 1). It starts from the best
  single blocks and moves whole runs inside a fixed pool; a run can slide and merge but never split, so the result is a
  local optimum by design.
* `best_disjoint_runs` is the exact optimum over all sets of disjoint runs (ours). It may choose any number of runs:
  with scores that do not become worse when a run is cut in two (mutual information is such a score) it breaks the
  removal into many short runs. Give it scores that add up, such as a negated damage.

With `step=2` both speak of halves of blocks (ours): indices are those of the row A0 M0 A1 M1 ..., a run has an even
number of halves, since what is left must alternate, and lengths count two halves as one block. Where single blocks are
ranked, pairs of neighbours are; these overlap, so that "the best N blocks" become the N disjoint pairs with the
largest sum of scores, found exactly. The pool holds their halves and those of the N + M best pairs; a window's sum is
that of the pairs that tile it. Every run of whole blocks is among the runs.

What is not covered: whether the scores predict the damage that removal does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from ..errors import ConfigurationError, NonFiniteError


class Run(NamedTuple):
    """The blocks (or halves) `start` to `start + length - 1`."""

    start: int
    length: int

    @property
    def blocks(self) -> range:
        """Indices of its blocks (or halves), ascending."""
        return range(self.start, self.start + self.length)


RunScore = Callable[[int, int], float]
"""`score(start, length)` of removing a run; higher means rather remove it; `-inf` forbids the run."""


@dataclass(frozen=True)
class Selection:
    """What a search chose.

    Attributes:
        runs: The chosen runs, no two of them adjacent, by ascending start.
        scores: The score of each of them.
        evaluations: Number of different runs whose exact score was asked for.
        iterations: One entry per round of the search.
    """

    runs: tuple[Run, ...]
    scores: tuple[float, ...]
    evaluations: int
    iterations: tuple[Mapping[str, Any], ...] = ()

    @property
    def order(self) -> tuple[int, ...]:
        """The chosen blocks (or halves), best run first, ascending inside a run (our choice: the paper has none)."""
        ranked = sorted(zip(self.runs, self.scores, strict=True), key=lambda item: -item[1])
        return tuple(block for run, _ in ranked for block in run.blocks)


def fast_block_select(
    block_scores: Sequence[float],
    run_score: RunScore,
    *,
    removable: Iterable[int],
    num_remove: int,
    k: int,
    step: int = 1,
    on_iteration: Callable[[Mapping[str, Any]], None] | None = None,
) -> Selection:
    """Fast-Block-Select (MI-PRUN, Algorithm 1 and Steps 1 to 6).

    1. Rank the removable blocks by their own score (equal ones by index); the best N are the current choice P.
    2. The pool is P and the next M = min(N, T - N) blocks (Eq. 5). It stays as it is: the only reading that gives the
       windows of the paper's Figure 2.
    3. Cut P into maximal runs. For each length L among them, list the windows of L blocks inside the pool by the sum
       of their single-block scores and keep the first K = min(floor(ln L) + k, number of windows) (Eq. 6; ln is ours).
    4. Score these windows exactly, and the current runs, which stay candidates (ours; else 5 can have no solution).
    5. Choose one window per run, pairwise disjoint, of maximal total score; back to 3 until P stays. On a tie P stays,
       else the lowest starts win (ours).

    It ends: P changes only for a strictly higher total. Adjacent windows merge and runs never split, so the number of
    runs never rises; while it stays, the lengths stay too, and the total rises over finitely many choices. Totals are
    compared by `math.fsum`, which no order of terms changes.

    Args:
        block_scores: Score of each of the T blocks alone; of halves, of each pair by its first half.
        run_score: Exact score of a run; asked once per run.
        removable: Blocks (or halves) that may be chosen.
        num_remove: N, at least 1 and at most the number of removable blocks.
        k: Extra candidates per length, at least 1.
        step: 1 for blocks, 2 for halves.
        on_iteration: Receives the log entry of each round.

    Raises:
        ConfigurationError: N or k does not fit.
        NonFiniteError: A score is NaN or infinitely good.
    """
    allowed = _checked(removable, num_remove, step)
    if k < 1:
        raise ConfigurationError(f"k must be at least 1, not {k}.")
    more = num_remove + min(num_remove, -(-len(block_scores) // step) - num_remove)
    chosen, pool = (_best(block_scores, allowed, count, step) for count in (num_remove, more))
    pool |= chosen
    score = _Scores(run_score)
    candidates = partial(_candidates, pool=pool, block_scores=block_scores, k=k, step=step)
    iterations: list[Mapping[str, Any]] = []
    while True:
        groups = maximal_runs(chosen)
        windows = {length: candidates(length) for length in {run.length for run in groups}}
        selected = _conflict_free_select(groups, windows, score=score)
        iterations.append(
            {"iteration": len(iterations) + 1, **_entry(groups, windows, selected=selected, score=score)}
        )
        if on_iteration is not None:
            on_iteration(iterations[-1])
        previous, chosen = chosen, {block for run in selected for block in run.blocks}
        if chosen == previous:
            return Selection(groups, tuple(map(score, groups)), len(score), tuple(iterations))


def best_disjoint_runs(
    run_score: RunScore, *, removable: Iterable[int], num_remove: int, step: int = 1
) -> dict[int, Selection]:
    """The sets of runs with the highest sum of scores, exactly, for every number of blocks in all.

    Dynamic programming from the last block backwards, O(T N^2):

        f[t, n] = max( f[t+1, n],  max over L of  score(t, L) + f[t+L+1, n-L] )

    The block after a run stays, because two adjacent runs are in truth one longer run and must be scored as one.
    Runs hold removable blocks only. Ties take the lowest blocks.

    Args:
        run_score: Score of a run; asked once for every run that could be part of a solution.
        removable: Blocks (or halves) that may be chosen.
        num_remove: N, at least 1 and at most the number of removable blocks.
        step: 1 for blocks; 2 for halves, in runs of even length, two of which count as one.

    Returns:
        The best set by its number of blocks, 1 to N; one table holds them all. Numbers below N are missing where every
        solution holds a run that the scores forbid.

    Raises:
        ConfigurationError: N does not fit, or every solution for it holds a run that the scores forbid.
        NonFiniteError: A score is NaN or infinitely good.
    """
    allowed = _checked(removable, num_remove, step)
    end = allowed[-1] + 1
    score = _Scores(run_score)
    value = [[-math.inf] * (num_remove + 1) for _ in range(end + 2)]
    value[end][0] = value[end + 1][0] = 0.0
    length_at = [[0] * (num_remove + 1) for _ in range(end)]
    longest = _longest_runs(allowed, end)
    for start in reversed(range(end)):
        for count in range(num_remove + 1):
            value[start][count] = value[start + 1][count]
            # Equal sums: taking now beats waiting and the longer run beats the shorter, which gives the lowest blocks.
            for length in range(step, min(longest[start], step * count) + 1, step):
                total = score(Run(start, length)) + value[start + length + 1][count - length // step]
                if total >= value[start][count]:
                    value[start][count], length_at[start][count] = total, length
    if value[0][num_remove] == -math.inf:
        raise ConfigurationError(f"No choice of {num_remove} blocks among {allowed} avoids the forbidden runs.")
    evaluations = len(score)
    found = {
        count: _read_back(length_at, count, step) for count in range(1, num_remove + 1) if value[0][count] > -math.inf
    }
    return {count: Selection(runs, tuple(map(score, runs)), evaluations) for count, runs in found.items()}


def maximal_runs(blocks: Iterable[int]) -> tuple[Run, ...]:
    """Cuts a set of blocks into its longest runs of consecutive indices, ascending."""
    runs: list[Run] = []
    for block in sorted(blocks):
        if runs and sum(runs[-1]) == block:
            runs[-1] = Run(runs[-1].start, runs[-1].length + 1)
        else:
            runs.append(Run(block, 1))
    return tuple(runs)


class _Scores:
    """Run scores, each asked for once."""

    def __init__(self, run_score: RunScore) -> None:
        self._run_score = run_score
        self._known: dict[Run, float] = {}

    def __len__(self) -> int:
        return len(self._known)

    def __call__(self, run: Run) -> float:
        if run not in self._known:
            score = float(self._run_score(*run))
            if not score < math.inf:
                raise NonFiniteError(f"The score of removing blocks {run.start} to {run.blocks[-1]} is {score}.")
            self._known[run] = score
        return self._known[run]

    def total(self, runs: Iterable[Run]) -> float:
        """The sum over several runs, rounded once, so that it does not depend on their order."""
        return math.fsum(map(self, runs))


def _checked(removable: Iterable[int], num_remove: int, step: int) -> list[int]:
    allowed = sorted(set(removable))
    most = len(allowed) // step
    if not 1 <= num_remove <= most:
        raise ConfigurationError(
            f"Cannot remove {num_remove} blocks: {most} are removable. Ask for fewer blocks or protect fewer."
        )
    return allowed


def _entry(
    groups: Sequence[Run], windows: Mapping[int, Sequence[Run]], *, selected: Sequence[Run], score: _Scores
) -> dict[str, Any]:
    """What the log says about a round; `candidates` is K of each run, without the guard of step 4."""
    return {
        "runs": [list(run) for run in groups],
        "candidates": [len(windows[run.length]) for run in groups],
        "selected": [list(run) for run in selected],
        "score": score.total(selected),
        "evaluations": len(score),
    }


def _best(scores: Sequence[float], allowed: Sequence[int], count: int, step: int) -> set[int]:
    """The best single blocks, or the halves of the best disjoint pairs; fewer where fewer are removable."""
    if step == 1:
        return set(sorted(allowed, key=lambda block: (-scores[block], block))[:count])
    if any(score != score for score in scores):
        raise NonFiniteError("The score of a pair of halves is not a number.")
    free, end = set(allowed), allowed[-1] + 1
    count = min(count, len(allowed) // 2)
    # best[t][n]: the largest sum of n disjoint pairs that begin at half t or later.
    best = [[0.0, *[-math.inf] * count] for _ in range(end + 2)]
    for start in reversed(range(end)):
        for number in range(1, count + 1):
            taken = scores[start] + best[start + 2][number - 1] if {start, start + 1} <= free else -math.inf
            best[start][number] = max(best[start + 1][number], taken)
    chosen: set[int] = set()
    start = 0
    while count:
        pair = {start, start + 1}
        takes = pair <= free and best[start][count] == scores[start] + best[start + 2][count - 1]
        chosen, count, start = (chosen | pair, count - 1, start + 2) if takes else (chosen, count, start + 1)
    return chosen


def _candidates(length: int, *, pool: set[int], block_scores: Sequence[float], k: int, step: int) -> list[Run]:
    """The K most promising windows of one length inside the pool (Eq. 6), by the sum of single-block scores."""
    windows = [
        Run(run.start + offset, length) for run in maximal_runs(pool) for offset in range(run.length - length + 1)
    ]
    windows.sort(key=lambda run: (-math.fsum(block_scores[block] for block in run.blocks[::step]), run.start))
    return windows[: min(int(math.log(length // step)) + k, len(windows))]


def _conflict_free_select(
    groups: Sequence[Run], windows: Mapping[int, Sequence[Run]], *, score: _Scores
) -> tuple[Run, ...]:
    """One window per group, pairwise disjoint, of maximal total score; `groups` itself if nothing is better.

    Groups of one length share their candidates, and each current run belongs to one group, so a set of windows can be
    handed out to the groups exactly if it has the right number of windows of each length. Dynamic programming over
    positions therefore finds the optimum exactly, without trying assignments: `best[t]` maps the numbers of windows
    placed at or after block t to the best total and the windows.
    """
    needed = Counter(run.length for run in groups)
    lengths = sorted(needed)
    starting_at: dict[int, list[tuple[int, Run]]] = {}
    for run in {*groups, *(run for length in lengths for run in windows[length])}:
        starting_at.setdefault(run.start, []).append((lengths.index(run.length), run))
    end = max(sum(run) for runs in starting_at.values() for _, run in runs)
    nothing = (0,) * len(lengths)
    best: list[dict[tuple[int, ...], tuple[float, tuple[Run, ...]]]] = [{} for _ in range(end)]
    best.append({nothing: (0.0, ())})
    for start in reversed(range(end)):
        best[start] = dict(best[start + 1])
        for index, run in sorted(starting_at.get(start, [])):
            _place(best, run, index=index, limit=needed[run.length], gain=score(run))
    full = tuple(needed[length] for length in lengths)
    found = best[0][full][1]
    return found if score.total(found) > score.total(groups) else tuple(groups)


def _place(best: list[dict[Any, Any]], run: Run, *, index: int, limit: int, gain: float) -> None:
    """Puts `run` before everything placed after it; equal totals prefer it, which gives the lowest starts."""
    here = best[run.start]
    for counts, (total, placed) in best[sum(run)].items():
        if counts[index] == limit:
            continue
        key = (*counts[:index], counts[index] + 1, *counts[index + 1 :])
        if key not in here or gain + total >= here[key][0]:
            here[key] = (gain + total, (run, *placed))


def _longest_runs(allowed: Sequence[int], end: int) -> list[int]:
    """For every position, the number of consecutive allowed blocks that begin there."""
    longest = [0] * (end + 1)
    for block in reversed(allowed):
        longest[block] = longest[block + 1] + 1
    return longest


def _read_back(length_at: Sequence[Sequence[int]], num_remove: int, step: int) -> tuple[Run, ...]:
    runs: list[Run] = []
    start = 0
    while num_remove:
        length = length_at[start][num_remove]
        if length:
            runs.append(Run(start, length))
        num_remove -= length // step
        start += length + 1
    return tuple(runs)
