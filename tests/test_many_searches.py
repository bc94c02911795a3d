# SPDX-License-Identifier: Apache-2.0
"""Several processes search with and without maps as one does: the same plan everywhere, and failures end all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_programs import clock, mixed, wide_pruner
from ranks import Outcome, Scenario, play
from toys import text, toy_pruner

from optimum_blockprune import PruningPlan


# Of 6 windows, one judges the runs and one the cuts (of 9: two and one); batches have 1 window unless told otherwise.
AUTO = {
    "strategy": "search",
    "compensation": "ridge",
    "num_samples": 6,
    "seqlen": 24,
    "batch_size": 1,
    "dataset": [text(600)],
}
WIDE: dict[str, dict[str, Any]] = {
    "auto": {**AUTO, "num_samples": 9},
    "auto-pairs": {**AUTO, "num_samples": 9, "batch_size": 2},
    "auto-halves": {**AUTO, "unit": "half_block", "strategy_options": {"time_budget": 1e6}},
    "auto-gpt2": {**AUTO, "family": "gpt2"},
    # Both fits and both judgements are one batch each: all but the first process have nothing to do.
    "auto-empty": {**AUTO, "batch_size": 6},
    "auto-two-windows": {**AUTO, "num_samples": 2},
    "sleb-auto": {**AUTO, "strategy": "sleb", "compensation": "auto"},
    "random-scale": {**AUTO, "strategy": "random", "compensation": "scale"},
    "auto-reconstruct": {**AUTO, "num_samples": 9, "compensation": "reconstruct", "generated_samples": 4},
    "gemma2": {**AUTO, "family": "gemma2", "batch_size": 2},
}
MIXED: dict[str, dict[str, Any]] = {
    "mix-auto": AUTO,
    "mix-halves": {**AUTO, "strategy": "sleb", "compensation": "none", "unit": "half_block", "batch_size": 2},
}
SEARCH = {"strategy": "search", "num_blocks": 3}
PLAIN: dict[str, dict[str, Any]] = {
    "search": {**SEARCH, "num_samples": 12, "batch_size": 1},
    "search-uneven": {**SEARCH, "num_samples": 3},
    "search-empty": {**SEARCH, "num_samples": 1, "seqlen": 120, "dataset": [text(400)]},
    "search-halves": {**SEARCH, "num_blocks": 2, "num_samples": 4, "unit": "half_block"},
    "search-in-time": {**SEARCH, "strategy_options": {"time_budget": 1e6}},
}
# Looked at before the search, before the first exchange and before the second.
LATE = {**SEARCH, "num_samples": 4, "strategy_options": {"time_budget": 1.5}}
SIZES = (2, 3)
# Minutes on two cores; by default, `test_many_processes` has a search, and `test_budgets` has maps.
pytestmark = pytest.mark.slow
Played = Callable[[str], list[Outcome]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for size in (2, 3):
        (folder / str(size)).mkdir()
    return folder


def scenarios(folder: Path, size: int) -> dict[str, Scenario]:
    """All that so many processes are asked for."""
    place = str(folder / str(size))
    found = {
        f"wide-{size}": Scenario("wide_plans", {"cases": list(WIDE.items()), "folder": place}, size),
        f"plain-{size}": Scenario("plans", {"cases": list(PLAIN.items()), "folder": place}, size),
        f"mix-{size}": Scenario("mixes", {"cases": list(MIXED.items()), "folder": place}, size),
        f"failing-{size}": Scenario("failing_maps", {"fields": AUTO}, size),
        f"late-{size}": Scenario("out_of_time", {"fields": LATE, "ticking": [0]}, size),
    }
    if size == 2:
        found["memory-2"] = Scenario("short_of_memory", {"fields": WIDE["auto-pairs"], "folder": place})
        found["others-late-2"] = Scenario("out_of_time", {"fields": LATE, "ticking": [1]})
    return found


@pytest.fixture(scope="module")
def played(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """What came of a scenario; those of one size are played together when the first of them is asked for."""
    outcomes: dict[str, list[Outcome]] = {}

    def outcome(name: str) -> list[Outcome]:
        if name not in outcomes:
            asked = scenarios(folder, int(name.rsplit("-")[-1]))
            outcomes.update(play(asked, tmp_path_factory.mktemp("played")))
        return outcomes[name]

    return outcome


@pytest.fixture(scope="module")
def of_one() -> dict[str, PruningPlan]:
    """The plans that one process makes."""
    plans = {name: wide_pruner(**fields).make_plan() for name, fields in WIDE.items()}
    plans |= {name: mixed(wide_pruner(**fields)) for name, fields in MIXED.items()}
    return plans | {name: toy_pruner(**fields).make_plan() for name, fields in PLAIN.items()}


def found(folder: Path, name: str, size: int) -> list[PruningPlan]:
    return [PruningPlan.from_file(folder / str(size) / f"{name}-{rank}.json") for rank in range(size)]


# The same plan


def assert_close(one: Any, other: Any, where: str = "plan") -> None:
    """Compares JSON values: all the same but for the last digits of numbers."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one.keys() - {"digest"}:
            assert_close(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_close(*pair, f"{where}[{number}]")
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-7), where
    else:
        assert one == other, where


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", WIDE)
def test_maps_are_those_of_one_process(
    name: str, size: int, folder: Path, played: Played, of_one: dict[str, PruningPlan]
) -> None:
    assert [outcome.code for outcome in played(f"wide-{size}")] == [0] * size, played(f"wide-{size}")[0].err[-2000:]
    first, *others = found(folder, name, size)
    for other in others:
        assert other.to_dict() == first.to_dict()
    assert first.removed_names == of_one[name].removed_names
    assert_close(of_one[name].to_dict(), first.to_dict())
    expected, tensors = of_one[name].folds.tensors(), first.folds.tensors()  # these are held against the digest
    assert expected.keys() == tensors.keys()
    for key, tensor in expected.items():
        assert (tensors[key] - tensor).norm() <= 1e-4 * tensor.norm()
    for other in others:
        assert all(torch.equal(each, tensors[key]) for key, each in other.folds.tensors().items())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MIXED)
def test_splits_are_those_of_one_process(
    name: str, size: int, folder: Path, played: Played, of_one: dict[str, PruningPlan]
) -> None:
    assert [outcome.code for outcome in played(f"mix-{size}")] == [0] * size, played(f"mix-{size}")[0].err[-2000:]
    first, *others = found(folder, name, size)
    assert all(other.to_dict() == first.to_dict() for other in others)
    assert_close(of_one[name].to_dict(), first.to_dict())
    assert [each["removed"] for each in first.details["mix"]["trail"]] == [1, 2]


def test_there_are_maps_to_compare(of_one: dict[str, PruningPlan]) -> None:
    assert all(of_one[name].folds for name in ("auto", "auto-halves", "auto-empty", "sleb-auto"))
    assert any(each.kind == "diagonal" for name in WIDE for each in of_one[name].folds.entries)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PLAIN)
def test_exchanges_are_those_of_one_process(
    name: str, size: int, folder: Path, played: Played, of_one: dict[str, PruningPlan]
) -> None:
    assert [outcome.code for outcome in played(f"plain-{size}")] == [0] * size, played(f"plain-{size}")[0].err[-2000:]
    for plan in found(folder, name, size):
        assert plan.to_dict() == of_one[name].to_dict()


def test_maps_are_shared_work(played: Played) -> None:
    pruner = wide_pruner(**WIDE["auto"])
    pruner.make_plan()
    shares = []
    for outcome in played("wide-2"):
        lines = [json.loads(line) for line in outcome.out.splitlines()]
        shares.append(next(line["block_forwards"] for line in lines if line["name"] == "auto"))
    assert max(shares) < pruner.report.block_forwards


def test_one_process_may_be_short_of_memory(folder: Path, played: Played, of_one: dict[str, PruningPlan]) -> None:
    assert [outcome.code for outcome in played("memory-2")] == [0, 0], played("memory-2")[1].err[-2000:]
    halved = [json.loads(outcome.out)["halved"] for outcome in played("memory-2")]
    assert halved == [[], ["_Part._sums", "_Part._losses"]]
    first, second = found(folder, "memory", 2)
    assert first.to_dict() == second.to_dict()
    assert_close(of_one["auto-pairs"].to_dict(), first.to_dict())


# Time


@pytest.mark.parametrize("name", ["late-2", "late-3", "others-late-2"])
def test_the_clock_of_the_first_process_counts(name: str, played: Played) -> None:
    assert {outcome.code for outcome in played(name)} == {0}, played(name)[0].err[-2000:]
    plans = [json.loads(outcome.out)["plan"] for outcome in played(name)]
    with clock(0.0 if name == "others-late-2" else 1.0):
        expected = toy_pruner(**LATE).make_plan().to_dict()
    assert plans == [expected] * len(plans)
    assert expected["details"]["out_of_time"] == (name != "others-late-2")


# Failures


@pytest.mark.parametrize("size", SIZES)
def test_where_one_fails_all_end(size: int, played: Played) -> None:
    outcomes = played(f"failing-{size}")
    assert [outcome.code for outcome in outcomes] == [0] * size, outcomes[0].err[-2000:]
    said = [json.loads(outcome.out) for outcome in outcomes]
    assert len(said[0]["errors"]) == 6 * size
    for rank, each in enumerate(said):
        assert each["alive"] == sum(range(size))
        for place, error in each["errors"].items():
            broken = int(place.split()[-1])
            own, others = (
                "ArithmeticError",
                f"DistributedError: Process {broken + 1} of {size} failed: ArithmeticError",
            )
            assert error == f"{own if rank == broken else others}: this device is broken", place
