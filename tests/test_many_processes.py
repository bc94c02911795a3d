# SPDX-License-Identifier: Apache-2.0
"""Several processes find the same plan as one, write once, and fail together; really several of them, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import Outcome, Scenario, free_port, play
from toys import TEXTS, text, toy_folder, toy_pruner

from optimum_blockprune import PruningPlan
from optimum_blockprune.processes import share_of_devices


# What is searched, by name. Batches have two windows.
EVEN = {"num_samples": 4}
SEARCHES: dict[str, dict[str, Any]] = {
    "sleb": EVEN,
    "race": {"num_samples": 12, "batch_size": 1, "strategy_options": {"search": "race"}},
    "naive": {**EVEN, "strategy_options": {"search": "naive"}},
    "kl": {**EVEN, "objective": "kl"},
    "mi_prun": {**EVEN, "strategy": "mi_prun"},
    "shortgpt": {**EVEN, "strategy": "shortgpt"},
    "angular": {**EVEN, "strategy": "angular"},
    "bip": {**EVEN, "strategy": "bip"},
    "functional_network": {**EVEN, "strategy": "functional_network"},
}
ONE_PASS = {"shortgpt": {}, "angular": {"tokens": "all"}, "mi_prun": {}, "functional_network": {"unit": "block"}}
SEARCHES |= {
    f"{name}-halves": {**EVEN, "strategy": name, "unit": "half_block", "strategy_options": options, "protect_first": 1}
    for name, options in ONE_PASS.items()
}
UNEVEN = {f"{name}-uneven": {**fields, "num_samples": 3} for name, fields in SEARCHES.items() if name != "race"}
# One window of several cells of predictions: the second process has nothing to measure.
LONG = {"num_samples": 1, "seqlen": 120, "dataset": [text(400)]}
EMPTY = {f"{name}-empty": {**fields, **LONG} for name, fields in SEARCHES.items() if name != "race"}
ROWS = [{"prompt": text(4 + row, row), "completion": " " + text(2 + row % 3, 9 + row)} for row in range(4)]
TASK = {"task": {**EVEN, "objective": "task", "dataset": ROWS}}
SEARCH = {"search": {**EVEN, "strategy": "search", "num_blocks": 3}}
EVERY = {**SEARCHES, **UNEVEN, **EMPTY, **TASK, **SEARCH}
# Together they take minutes on two cores: of those that are like others, a few run by default.
_FEW = ("angular", "shortgpt", "naive", "shortgpt-halves", "angular-halves-uneven")
_LIKE = ("kl-uneven", "kl-empty", "bip-empty", "mi_prun-empty", "functional_network-uneven")
MORE = {
    name: fields
    for name, fields in EVERY.items()
    if name in _LIKE or (name not in _FEW and ("halves" in name or name.startswith(("angular", "shortgpt", "naive"))))
}
CASES = {name: fields for name, fields in EVERY.items() if name not in MORE}
THREE = {name: CASES[name] for name in ("sleb-uneven", "race", "mi_prun-uneven", "bip-uneven")}

FAULTS = ("error", "SIGKILL", "SIGTERM")


def words(folder: Path, output: str, *more: object) -> list[str]:
    """A command line that prunes the toy beside the text."""
    recipe = ("--strategy", "sleb", "--num-blocks", 2, "--num-samples", 3, "--seqlen", 16, "--batch-size", 1)
    target = ("--output", folder / output) if output.endswith(".json") else (folder / output,)
    places = ("-m", folder / "toy", "--dataset", folder / "text.jsonl")
    return [str(word) for word in (*places, *recipe, *target, *more)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for name in ("plans", "three", "save", "alone"):
        (folder / name).mkdir()
    toy_folder(folder / "toy")
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": each}) for each in TEXTS))
    return folder


@pytest.fixture(scope="module")
def played(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    (folder / "full").mkdir()
    (folder / "full" / "old.txt").write_text("old")
    scenarios = {
        "plans": Scenario("plans", {"cases": list(CASES.items()), "folder": str(folder / "plans")}),
        "command": Scenario("command", {"words": words(folder, "out", "--json")}),
        "refusal": Scenario("command", {"words": words(folder, "full")}),
        "misspelt": Scenario("command", {"words": words(folder, "none", "--strategy-option", "serch=race")}),
        "save": Scenario("failing_save", {"folder": str(folder / "save")}),
        "alone": Scenario("by_itself", {"folder": str(folder / "alone")}),
        "text": Scenario("different_text"),
        "plan": Scenario("cli", {"words": ["plan", *words(folder, "plan.json")]}),
        "strategies": Scenario("cli", {"words": ["strategies"]}),
    }
    for fault in FAULTS:
        scenarios[fault] = Scenario("command", {"words": words(folder, f"out-{fault}"), "fault": fault})
    first = scenarios["SIGKILL"]
    scenarios["first"] = replace(first, arguments={**first.arguments, "words": words(folder, "out-first"), "rank": 0})
    (folder / "late").mkdir()
    late = {"words": words(folder, "late/out"), "fault": "SIGKILL", "beside": str(folder / "late")}
    scenarios |= {"late": Scenario("command", late), "resumed": Scenario("command", {"words": late["words"]}, size=3)}
    return play(scenarios, tmp_path_factory.mktemp("played"))


@pytest.fixture(scope="module")
def played_more(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    scenarios = {
        "plans": Scenario("plans", {"cases": list(MORE.items()), "folder": str(folder / "plans")}),
        "three": Scenario("plans", {"cases": list(THREE.items()), "folder": str(folder / "three")}, size=3),
        "SIGINT": Scenario("command", {"words": words(folder, "out-SIGINT"), "fault": "SIGINT"}),
    }
    return play(scenarios, tmp_path_factory.mktemp("more"))


def of_one(name: str) -> PruningPlan:
    """The plan that one process makes."""
    return toy_pruner(**EVERY[name]).make_plan()


# The same plan


@pytest.mark.parametrize("name", CASES)
def test_two_processes_find_the_plan_of_one(name: str, folder: Path, played: dict[str, list[Outcome]]) -> None:
    assert_plan_of_one(name, folder, played["plans"])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_two_processes_find_more_plans_of_one(name: str, folder: Path, played_more: dict[str, list[Outcome]]) -> None:
    assert_plan_of_one(name, folder, played_more["plans"])


def assert_plan_of_one(name: str, folder: Path, outcomes: list[Outcome]) -> None:
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].err[-2000:]
    expected = of_one(name).to_dict()
    for rank in range(2):
        assert PruningPlan.from_file(folder / "plans" / f"{name}-{rank}.json").to_dict() == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", THREE)
def test_three_processes_find_the_plan_of_one(name: str, folder: Path, played_more: dict[str, list[Outcome]]) -> None:
    assert [outcome.code for outcome in played_more["three"]] == [0, 0, 0]
    expected = of_one(name)
    for rank in range(3):
        plan = PruningPlan.from_file(folder / "three" / f"{name}-{rank}.json")
        assert plan.removed_blocks == expected.removed_blocks
        assert plan.scores == pytest.approx(expected.scores, rel=1e-9)


@pytest.mark.parametrize("name", ["sleb", "naive", "shortgpt", "angular", "bip"])
def test_the_work_is_shared(name: str, played: dict[str, list[Outcome]]) -> None:
    pruner = toy_pruner(**CASES[name])
    pruner.make_plan()
    shares = []
    for outcome in played["plans"]:
        lines = [json.loads(line) for line in outcome.out.splitlines()]
        shares.append(next(line["block_forwards"] for line in lines if line["name"] == name))
    assert shares == [pruner.report.block_forwards / 2] * 2


# The command


def test_the_first_process_speaks_and_writes_for_all(folder: Path, played: dict[str, list[Outcome]]) -> None:
    first, second = played["command"]
    assert (first.code, second.code) == (0, 0), first.err[-2000:]
    assert json.loads(first.out)["output"] == str(folder / "out")
    assert second.out == "" and "removed block" in first.err and "removed block" not in second.err
    pruner = toy_pruner(num_samples=3, batch_size=1)
    assert PruningPlan.from_file(folder / "out").removed_blocks == pruner.make_plan().removed_blocks


def test_a_plan_is_written_once(folder: Path, played: dict[str, list[Outcome]]) -> None:
    first, second = played["plan"]
    assert (first.code, second.code) == (0, 0), first.err[-2000:]
    assert "sleb removes" in first.out and second.out == ""
    plan = PruningPlan.from_file(folder / "plan.json")
    assert plan.removed_blocks == toy_pruner(num_samples=3, batch_size=1).make_plan().removed_blocks


def test_other_commands_run_in_the_first_process(played: dict[str, list[Outcome]]) -> None:
    first, second = played["strategies"]
    assert (first.code, second.code) == (0, 0)
    assert "functional_network" in first.out and second.out == second.err == ""


def test_what_is_refused_is_said_once(folder: Path, played: dict[str, list[Outcome]]) -> None:
    first, second = played["misspelt"]
    assert (first.code, second.code) == (2, 2)
    assert len(first.errors) == 1 and "search" in first.errors[0] and second.errors == []


def test_only_the_first_process_looks_at_the_output(folder: Path, played: dict[str, list[Outcome]]) -> None:
    first, second = played["refusal"]
    assert (first.code, second.code) == (2, 1)
    assert "exists and is not empty" in first.errors[0]
    assert second.errors == [f"Process 1 of 2 failed: {first.errors[0]}"]
    assert [path.name for path in (folder / "full").iterdir()] == ["old.txt"]


@pytest.mark.parametrize(
    "fault, code, reason",
    [
        ("error", 1, "Process 2 of 2 failed: ArithmeticError: this device is broken"),
        ("SIGTERM", 1, "Process 2 of 2 failed: KeyboardInterrupt: process 2 of 2 was told to end"),
        ("SIGKILL", -9, "Process 1 of 2 lost the connection to the others"),
    ],
)
def test_a_process_that_ends_early_ends_all(
    fault: str, code: int, reason: str, folder: Path, played: dict[str, list[Outcome]]
) -> None:
    assert_all_ended(folder / f"out-{fault}", code, reason, played[fault])


@pytest.mark.slow
def test_ctrl_c_in_one_process_ends_all(folder: Path, played_more: dict[str, list[Outcome]]) -> None:
    assert_all_ended(folder / "out-SIGINT", 1, "Process 2 of 2 failed: KeyboardInterrupt", played_more["SIGINT"])


def assert_all_ended(output: Path, code: int, reason: str, outcomes: list[Outcome]) -> None:
    first, second = outcomes
    assert (first.code, second.code) == (1, code)
    (error,) = first.errors
    assert error.startswith(reason)
    assert not output.exists() and first.out == second.out == ""


def test_the_first_process_may_be_the_one_that_is_lost(folder: Path, played: dict[str, list[Outcome]]) -> None:
    first, second = played["first"]
    assert (first.code, second.code) == (-9, 1)
    assert second.errors[0].startswith("Process 2 of 2 lost the connection") and not (folder / "out-first").exists()


def test_a_run_goes_on_with_another_number_of_processes(folder: Path, played: dict[str, list[Outcome]]) -> None:
    assert [outcome.code for outcome in played["late"]] == [1, -9]
    assert [outcome.code for outcome in played["resumed"]] == [0, 0, 0], played["resumed"][0].err[-2000:]
    assert "holds 1 finished measurement" in played["resumed"][0].err
    expected = toy_pruner(num_samples=3, batch_size=1).make_plan()
    assert PruningPlan.from_file(folder / "late" / "out").removed_blocks == expected.removed_blocks
    assert [path.name for path in (folder / "late").iterdir()] == ["out"]


# The API


def test_a_failing_save_puts_all_models_back(folder: Path, played: dict[str, list[Outcome]]) -> None:
    assert [outcome.code for outcome in played["save"]] == [0, 0], played["save"][1].err[-2000:]
    first, second = (json.loads(outcome.out) for outcome in played["save"])
    assert first["error"].startswith("OutputError: The disk filled up")
    assert second["error"].startswith("DistributedError: Process 1 of 2 failed: The disk filled up")
    assert [each["again"] for each in (first, second)] == ["none", "none"]
    assert [each["blocks"] for each in (first, second)] == [4, 4]
    assert (folder / "save" / "out" / "config.json").is_file()


def test_one_process_may_prune_by_itself(played: dict[str, list[Outcome]]) -> None:
    for outcome in played["alone"]:
        assert outcome.code == 0, outcome.err[-2000:]
        assert json.loads(outcome.out) == {"removed": list(of_one("sleb").removed_blocks), "files": ["out"]}


def test_processes_with_different_text_are_refused(played: dict[str, list[Outcome]]) -> None:
    for outcome in played["text"]:
        error = json.loads(outcome.out)["error"]
        assert error.startswith("DistributedError: The processes do not work on the same thing: data of process 1")


# Launchers


def launched(launcher: list[str], folder: Path, output: str) -> subprocess.CompletedProcess[str]:
    """Runs the command under a launcher."""
    command = [*launcher, "-m", "optimum_blockprune.run", *words(folder, output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc_per_node", "2"],
        # Without --cpu, with which accelerate starts several processes through MPI only.
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    ],
    ids=lambda launcher: launcher[0],
)
def test_launchers(launcher: list[str], folder: Path) -> None:
    port = ["--master_port" if launcher[0].startswith("torch") else "--main_process_port", str(free_port())]
    done = launched([sys.executable, "-m", *launcher, *port], folder, f"out-{launcher[0]}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("4 of 6 blocks") == 1 and "2 processes" in done.stderr
    assert done.stderr.count("SLEB 1/2: removed block") == 1


@pytest.mark.slow
def test_a_process_killed_under_a_launcher_ends_the_job(folder: Path) -> None:
    fault = {"words": words(folder, "out-killed"), "fault": "SIGKILL"}
    launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    command = [sys.executable, "-m", *launcher, str(Path(__file__).with_name("rank_programs.py")), json.dumps(fault)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and done.stdout == ""
    assert "Process 1 of 2 lost the connection" in done.stderr or "process 1 of 2 was told to end" in done.stderr
    assert not (folder / "out-killed").exists()


@pytest.mark.slow
def test_a_launcher_that_starts_one_process_only(folder: Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = launched(launcher, folder, "out-lonely")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "warning: accelerate was asked for several processes and started one" in done.stderr


def test_gpus_are_divided() -> None:
    devices = ["4", "5", "6", "7", "9"]
    assert [share_of_devices(devices, rank, 2) for rank in range(2)] == [["4", "5"], ["6", "7"]]
    assert [share_of_devices(devices[:1], rank, 2) for rank in range(2)] == [["4"], ["4"]]
