# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed at any moment and started again end as if nothing had happened, and measure nothing twice.

Commands run in processes of their own, which get SIGKILL. They are forked from one process that has imported the
package, because importing takes longer than pruning a toy.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refusal, run
from toys import TEXTS, assert_same_weights, config, counting, files_below, text, toy_folder, toy_pruner

from optimum_blockprune import BlockPruner, PruningPlan, PruningReport
from optimum_blockprune.errors import ConfigurationError, ResumeError
from optimum_blockprune.ledger import MANIFEST, Ledger
from optimum_blockprune.resuming import default_folder


STRATEGIES: dict[str, list[str]] = {
    "sleb": ["sleb"],
    "race": ["sleb", "--strategy-option", "search=race"],
    "mi_prun": ["mi_prun"],
    "shortgpt": ["shortgpt"],
    "angular": ["angular"],
    "bip": ["bip"],
    "functional_network": ["functional_network", "--strategy-option", "groups=1"],
}
WIDTH = ("bip", "functional_network")
_WINDOWS = ["--num-samples", "8", "--seqlen", "16", "--batch-size", "2"]

_SERVER = """
import json, os, signal, sys, time, traceback
from argparse import ArgumentParser
from pathlib import Path
from optimum_blockprune.commands import BlockPruneCommand
from optimum_blockprune import run_costs, shell
from optimum_blockprune.ledger import Ledger

def run(words):
    parser = ArgumentParser("optimum-cli")
    BlockPruneCommand(parser.add_subparsers())
    args = parser.parse_args(["blockprune", *words])
    args.func(args).run()

def killed_at(number, kept):
    write, done = Ledger.write, []
    def counted(ledger, key, tensors):
        done.append(key)
        if len(done) < number or kept:
            write(ledger, key, tensors)
        if len(done) == number:
            os.kill(os.getpid(), signal.SIGKILL)
    Ledger.write = counted

def child(request):
    if request["at_write"] is not None:
        killed_at(*request["at_write"])
    if request["max_bytes"] is not None:
        run_costs._MAX_BYTES = request["max_bytes"]
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        run(request["words"])
    except SystemExit as error:
        return error.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0

def supervised(request):
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os._exit(child(request))
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        seconds = time.monotonic() - begin
        if ended:
            return {"code": os.waitstatus_to_exitcode(status), "seconds": seconds}
        late = request["kill_after"] is not None and seconds >= request["kill_after"]
        if late or (request["kill_at"] and any(Path(request["kill_at"]).rglob("*.safetensors"))):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)

for line in sys.stdin:
    print(json.dumps(supervised(json.loads(line))), flush=True)
"""


@dataclass
class Ended:
    """How a command ended."""

    code: int
    seconds: float
    log: str


class Server:
    """Runs commands, each in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "log.txt"
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self,
        *words: object,
        kill_after: float | None = None,
        kill_at: Path | None = None,
        at_write: tuple[int, bool] | None = None,
        max_bytes: int | None = None,
    ) -> Ended:
        """Runs a command, and kills it where told to.

        Args:
            words: The command line.
            kill_after: After so many seconds.
            kill_at: Once something is kept in this folder.
            at_write: With its measurement of this number, and whether that one is kept.
            max_bytes: What the sums of runs with maps may take together, so that they come in several groups.
        """
        request = {"words": list(map(str, words)), "kill_after": kill_after, "log": str(self._log)}
        request |= {"kill_at": None if kill_at is None else str(kill_at), "at_write": at_write, "max_bytes": max_bytes}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()), log=self._log.read_text(errors="replace"))

    def close(self) -> None:
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(text(400, seed=5))
    return path


def flags(dense: Path, data: Path, name: str, budget: int | None = 3) -> list[str]:
    wanted = ["--sparsity", "0.4"] if name in WIDTH else ["--num-blocks", str(budget)]
    return ["-m", str(dense), "--strategy", *STRATEGIES[name], *wanted, "--dataset", str(data), *_WINDOWS]


def ledgers(folder: Path) -> dict[str, int]:
    """The measurements that are kept, with the time of their writing."""
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def finished(server: Server, words: list[str], seed: int, seconds: float, check: Callable[[], None]) -> list[Ended]:
    """Starts a command again and again, killed at random moments, until one ends by itself.

    Moments come later from try to try, for a machine that becomes slower.
    """
    generator, ends = random.Random(seed), []
    while len(ends) < 60:
        ends.append(server.run(*words, kill_after=generator.uniform(0, (1.2 + len(ends) / 5) * seconds)))
        check()
        if ends[-1].code != -signal.SIGKILL:
            return ends
    raise AssertionError("it never ended")


# Killed


@pytest.mark.parametrize("name", ["sleb", pytest.param("mi_prun", marks=pytest.mark.slow)])
def test_a_plan_survives_kills(name: str, server: Server, dense: Path, data: Path, tmp_path: Path) -> None:
    words = ["plan", *flags(dense, data, name), "--output"]
    undisturbed = server.run(*words, tmp_path / "undisturbed.json")
    assert undisturbed.code == 0, undisturbed.log
    folder, output, kept = default_folder(tmp_path / "plan.json"), tmp_path / "plan.json", dict[str, int]()

    def check() -> None:
        now = ledgers(folder)
        if folder.exists():
            assert kept.items() <= now.items(), "a finished measurement is gone or was made again"
            kept.update(now)

    ends = finished(server, [*words, str(output)], 1, undisturbed.seconds, check)
    assert ends[-1].code == 0, ends[-1].log
    assert output.read_bytes() == (tmp_path / "undisturbed.json").read_bytes()
    assert not folder.exists() and {path.name for path in tmp_path.iterdir()} == {"undisturbed.json", "plan.json"}


@pytest.mark.parametrize("name", ["sleb", pytest.param("functional_network", marks=pytest.mark.slow)])
def test_a_run_survives_kills(name: str, server: Server, dense: Path, data: Path, tmp_path: Path) -> None:
    words = ["run", *flags(dense, data, name)]
    undisturbed = server.run(*words, tmp_path / "undisturbed")
    assert undisturbed.code == 0, undisturbed.log

    def check() -> None:
        if (tmp_path / "out").exists():
            assert (tmp_path / "out" / "pruning_plan.json").is_file() and (tmp_path / "out" / "README.md").is_file()

    # Later kills hit proving and saving.
    ends = finished(server, [*words, str(tmp_path / "out")], 2, undisturbed.seconds, check)
    if ends[-1].code == 2:  # killed after the folder had got its name
        assert "exists and is not empty" in ends[-1].log
    for file in ("pruning_plan.json", "model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "undisturbed" / file).read_bytes()


def test_a_killed_run_leaves_its_measurements_and_a_whole_one_nothing(
    server: Server, dense: Path, data: Path, tmp_path: Path
) -> None:
    words = ["run", *flags(dense, data, "sleb"), tmp_path / "out"]
    ended = server.run(*words, kill_at=tmp_path / ".out.resume")
    assert ended.code == -signal.SIGKILL and not (tmp_path / "out").exists()
    number = len(ledgers(tmp_path / ".out.resume" / "1-sleb"))
    assert number == len(ledgers(tmp_path)) > 0
    ended = server.run(*words)
    assert ended.code == 0, ended.log
    assert f"holds {number} finished measurements" in ended.log
    assert f"{number} measurements were read from" in ended.log
    assert {path.name for path in tmp_path.iterdir() if path.name[0] != "."} == {"out"}
    assert not (tmp_path / ".out.resume").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 9))
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_plan_survives_kills_at_many_moments(
    name: str, seed: int, server: Server, dense: Path, data: Path, tmp_path: Path
) -> None:
    words = ["plan", *flags(dense, data, name), "--output"]
    undisturbed = server.run(*words, tmp_path / "undisturbed.json")
    ends = finished(server, [*words, str(tmp_path / "plan.json")], seed, undisturbed.seconds, lambda: None)
    assert ends[-1].code == 0, ends[-1].log
    assert (tmp_path / "plan.json").read_bytes() == (tmp_path / "undisturbed.json").read_bytes()


@pytest.mark.slow
def test_a_command_of_its_own_survives_a_kill(dense: Path, data: Path, tmp_path: Path) -> None:
    """Nothing is forked here: the command as a shell starts it, killed once something has been measured."""
    words = [sys.executable, "-m", "optimum_blockprune.run", *flags(dense, data, "sleb", budget=4), tmp_path / "out"]
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not ledgers(tmp_path) and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = ledgers(tmp_path)
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{len(kept)} measurements were read" in done.stderr
    assert len(PruningPlan.from_file(tmp_path / "out").removed_blocks) == 4


# What is measured again


def interrupted(folder: Path, steps: int, **fields: Any) -> None:
    """Lets Ctrl-C hit a search once so many of its steps are kept."""
    pruner = toy_pruner(**fields)

    def interrupt(*_args: Any) -> None:
        if len(ledgers(folder)) == steps:
            raise KeyboardInterrupt

    pruner.model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        pruner.make_plan(resume_dir=folder)


@pytest.mark.parametrize("search", ["exact", "race", "naive"])
def test_finished_steps_are_not_run_again(search: str, tmp_path: Path) -> None:
    fields = {"num_blocks": 3, "strategy_options": {"search": search}}
    undisturbed = toy_pruner(**fields)
    plan = undisturbed.make_plan()
    spent = []
    for steps in (1, 2):
        interrupted(tmp_path / "kept", steps, **fields)
        pruner = toy_pruner(**fields)
        assert pruner.make_plan(resume_dir=tmp_path / "kept").to_dict() == plan.to_dict()
        assert not (tmp_path / "kept").exists()
        # Beside a part of the search, what all of it would have cost says nothing.
        assert pruner.report.naive_block_forwards is None and pruner.report.reused_measurements > 0
        assert pruner.plan.details["naive_block_forwards"] == undisturbed.report.naive_block_forwards
        spent.append(pruner.report.block_forwards)
    assert undisturbed.report.block_forwards > spent[0] > spent[1] > 0
    if search == "naive":  # 4, 3 and 2 candidates of 5, 4 and 3 blocks, the dense model of 6; 4 windows
        assert [undisturbed.report.block_forwards, *spent] == [4 * 44, 4 * 18, 4 * 6]


@pytest.mark.parametrize("strategy", ["sleb", "mi_prun", "shortgpt", "angular", "bip", "functional_network"])
def test_a_search_that_was_finished_is_not_measured_again(strategy: str, tmp_path: Path) -> None:
    """The ledger of a whole search, as it is if the kill comes while the result is saved."""
    kept = tmp_path / "kept"
    first = toy_pruner(strategy=strategy)
    with pytest.raises(ZeroDivisionError):
        _prune_and_fail(first, kept)
    assert ledgers(kept)
    second = toy_pruner(strategy=strategy)
    second.prune(resume_dir=kept)
    assert second.plan.to_dict() == first.plan.to_dict()
    assert second.report.block_forwards < first.report.block_forwards
    first.prune(plan=first.plan)
    assert_same_weights(second.model.state_dict(), first.model.state_dict())
    assert not kept.exists()


def _prune_and_fail(pruner: BlockPruner, kept: Path) -> None:
    def fail(*_args: Any) -> None:
        raise ZeroDivisionError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("optimum_blockprune.pruner.apply_in_order", fail)
        pruner.prune(resume_dir=kept)


def test_only_what_is_damaged_is_measured_again(tmp_path: Path) -> None:
    undisturbed = toy_pruner(num_blocks=3)
    plan = undisturbed.make_plan()
    kept = tmp_path / "kept"
    with pytest.raises(ZeroDivisionError):
        _prune_and_fail(toy_pruner(num_blocks=3), kept)
    files = sorted(kept.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 3
    spent = []
    for damaged in (files[:0], files[1:2], files[:1], files):
        contents = {path: path.read_bytes() for path in files}
        for path in damaged:
            path.write_bytes(contents[path][:-9])
        pruner = toy_pruner(num_blocks=3)
        with pytest.raises(ZeroDivisionError):
            _prune_and_fail(pruner, kept)
        assert pruner.plan.to_dict() == plan.to_dict()
        spent.append(pruner.report.block_forwards)
        for path, content in contents.items():
            path.write_bytes(content)
    assert spent[0] == 0 < spent[1] < spent[2] < spent[3] == undisturbed.report.block_forwards


def test_several_configurations_have_a_folder_each(tmp_path: Path) -> None:
    configs = [config("sleb"), config("bip")]
    undisturbed = toy_pruner()
    undisturbed.prune(config=configs)
    kept, first = tmp_path / "kept", toy_pruner()
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("optimum_blockprune.pruner.record", _interrupt)
        first.prune(tmp_path / "out", configs, resume_dir=kept)
    assert sorted(path.name for path in kept.iterdir()) == ["1-sleb", "2-bip"]
    assert not (tmp_path / "out").exists()
    second = toy_pruner()
    second.prune(tmp_path / "out", configs, resume_dir=kept)
    assert second.plan.to_dict() == undisturbed.plan.to_dict()
    assert second.report.block_forwards < undisturbed.report.block_forwards
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _interrupt(*_args: Any, **_kwargs: Any) -> None:
    raise KeyboardInterrupt


# Refused


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """What an interrupted search has left."""
    interrupted(tmp_path / "kept", 1)
    assert len(ledgers(tmp_path / "kept")) == 1
    return tmp_path / "kept"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_blocks": 3}, "recipe.num_blocks: 2 then, 3 now"),
        ({"strategy": "shortgpt"}, "recipe.strategy: sleb then, shortgpt now"),
        ({"seed": 1}, "recipe.seed: 0 then, 1 now"),
        ({"strategy_options": {"search": "naive"}}, "recipe.strategy_options.search: exact then, naive now"),
        ({"num_samples": 3}, "data.windows: 4 then, 3 now"),
        ({"dataset": TEXTS[1:]}, "data.fingerprint: "),
        ({"family": "mistral"}, "model.type: LlamaForCausalLM then, MistralForCausalLM now"),
        ({"depth": 7}, "model.blocks: 6 then, 7 now"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_run_is_refused_by_naming_what_differs(fields: dict[str, Any], named: str, begun: Path) -> None:
    before = files_below(begun)
    with pytest.raises(ResumeError) as caught:
        toy_pruner(**fields).make_plan(resume_dir=begun)
    assert named in str(caught.value) and f"'{begun}" in str(caught.value)
    assert files_below(begun) == before
    toy_pruner().make_plan(resume_dir=begun)


def test_other_weights_dtypes_and_versions_are_refused(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruner = toy_pruner()
    with torch.no_grad():
        pruner.model.lm_head.weight.mul_(1.01)
    with pytest.raises(ResumeError, match=r"differs in model.weights: \w{16}... then, \w{16}... now. Delete"):
        pruner.make_plan(resume_dir=begun)
    pruner = toy_pruner()
    pruner.model.to(torch.bfloat16)
    with pytest.raises(ResumeError, match="model.dtypes: float32 then, bfloat16 now"):
        pruner.make_plan(resume_dir=begun)
    monkeypatch.setattr("optimum_blockprune.fingerprints.versions", lambda: {"torch": "9.9"})
    with pytest.raises(ResumeError, match=r"versions.torch: .* then, 9.9 now"):
        toy_pruner().make_plan(resume_dir=begun)


def test_another_number_of_searches_is_refused(begun: Path) -> None:
    with pytest.raises(ResumeError, match="searches: 1 then, 2 now"):
        toy_pruner().make_plan([config(), config("bip")], resume_dir=begun)


def test_another_batch_size_and_data_that_moved_are_not(begun: Path) -> None:
    pruner = toy_pruner(batch_size=1, dataset=list(TEXTS))
    assert pruner.make_plan(resume_dir=begun).removed_blocks == toy_pruner().make_plan().removed_blocks
    assert not begun.exists()


def test_the_shell_refuses_another_run(
    server: Server, dense: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "kept"
    words = ["plan", *flags(dense, data, "sleb"), "--resume-dir", folder, "--output", tmp_path / "plan.json"]
    server.run(*words, kill_at=folder)
    line = refusal(capsys, *words, "--seed", "3", "--num-samples", "7")
    for part in ("recipe.seed: 0 then, 3 now", "data.windows: 8 then, 7 now", str(folder), "Delete this folder"):
        assert part in line
    assert not (tmp_path / "plan.json").exists()
    run(*words)
    assert not folder.exists() and (tmp_path / "plan.json").exists()


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "kept" / "1-sleb", {})
    with pytest.raises(ResumeError, match=f"in use by another run .process {os.getpid()}"):
        toy_pruner().make_plan(resume_dir=tmp_path / "kept")
    ledger.close()


# Where things are kept


def test_nothing_is_kept_unless_there_is_an_output_or_a_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    pruner = toy_pruner()
    pruner.make_plan()
    pruner.prune()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("resume_dir", "folder"), [(None, ".out.resume"), (True, ".out.resume"), (False, None), ("mine", "mine")]
)
def test_measurements_are_kept_until_the_result_is_there(
    resume_dir: Any, folder: str | None, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("optimum_blockprune.pruner.record", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            toy_pruner().prune("out", resume_dir=resume_dir)
    assert [path.name for path in tmp_path.iterdir()] == ([] if folder is None else [folder])
    assert len(ledgers(tmp_path)) == (0 if folder is None else 2)
    pruner = toy_pruner()
    pruner.prune("out", resume_dir=resume_dir)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (pruner.report.block_forwards == 0) == (folder is not None)


def test_folders_that_were_made_for_nothing_go(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        toy_pruner().make_plan(config(num_blocks=99), resume_dir=tmp_path / "a" / "b")
    pruner = toy_pruner()
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("optimum_blockprune.strategies.sleb.SLEB.select", _interrupt)
        pruner.make_plan(resume_dir=tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_a_strategy_that_measures_nothing_keeps_nothing(tmp_path: Path) -> None:
    toy_pruner(strategy="random").prune(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    logger, messages, handler = logging.getLogger("optimum.blockprune.resuming"), [], logging.Handler()
    handler.emit = lambda record: messages.append(f"{record.levelname} {record.getMessage()}")
    monkeypatch.setattr(logger, "handlers", [handler])
    yield messages


def test_a_folder_that_has_no_effect_is_said_so(tmp_path: Path, log: list[str]) -> None:
    toy_pruner(strategy="random").make_plan(resume_dir=tmp_path / "kept")
    assert log == [f"WARNING Nothing was measured; resume_dir={str(tmp_path / 'kept')!r} had no effect."]


def test_the_default_folder_may_fail_and_a_named_one_may_not(tmp_path: Path, log: list[str]) -> None:
    (tmp_path / ".out.resume").write_text("somebody's file")
    toy_pruner().prune(tmp_path / "out")
    assert len(log) == 1 and "WARNING" in log[0] and "The run goes on" in log[0]
    with pytest.raises(ConfigurationError.__mro__[1], match="cannot be kept"):
        toy_pruner().make_plan(resume_dir=tmp_path / ".out.resume")
    assert (tmp_path / ".out.resume").read_text() == "somebody's file"


@pytest.mark.parametrize("resume_dir", [True, "", 3, ["kept"]], ids=repr)
def test_what_is_no_folder_is_refused(resume_dir: Any) -> None:
    with pytest.raises(ConfigurationError, match="resume_dir"):
        toy_pruner().make_plan(resume_dir=resume_dir)


def test_a_folder_without_a_search_is_refused(tmp_path: Path, dense: Path, capsys) -> None:
    pruner = toy_pruner()
    plan = PruningPlan.from_blocks(pruner.model, [1])
    with pytest.raises(ConfigurationError, match="nothing is measured"):
        pruner.prune(plan=plan, resume_dir=tmp_path / "kept")
    for words in (["--resume-dir", tmp_path / "kept"], ["--no-resume"]):
        line = refusal(capsys, "run", "-m", dense, "--blocks", "1", *words, tmp_path / "out")
        assert "resume_dir would have no effect" in line
    assert not list(tmp_path.iterdir())


def test_the_shell_keeps_nothing_if_asked(server: Server, dense: Path, data: Path, tmp_path: Path) -> None:
    words = ["plan", *flags(dense, data, "sleb"), "--no-resume", "--output", tmp_path / "plan.json"]
    for seconds in (0.3, 0.5):
        server.run(*words, kill_after=seconds)
        assert not list(tmp_path.rglob(MANIFEST))
    ended = server.run(*words)
    assert ended.code == 0 and "finished measurements" not in ended.log


def test_every_depth_of_one_search_survives_a_kill(server: Server, dense: Path, data: Path, tmp_path: Path) -> None:
    words = ["run", *flags(dense, data, "sleb"), "--export", "1,2", tmp_path / "out"]
    server.run(*words, kill_at=tmp_path / ".out.resume")
    ended = server.run(*words)
    assert ended.code == 0 and "measurements were read from" in ended.log
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["removed-1", "removed-2"]
    assert not (tmp_path / ".out.resume").exists()


def test_what_was_spent_is_what_this_process_spent(tmp_path: Path, monkeypatch) -> None:
    """The figure in the report is honest: nothing is counted that was read."""
    with monkeypatch.context() as patched:
        patched.setattr("optimum_blockprune.pruner.record", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            toy_pruner().prune(tmp_path / "out")
    pruner = toy_pruner()
    with counting(pruner.model) as calls:
        plan = pruner.make_plan(resume_dir=tmp_path / ".out.resume")
    report: Mapping[str, Any] = PruningReport.from_dict(pruner.report.to_dict()).to_dict()
    assert report["block_forwards"] == 0
    assert len(calls) < 20 and plan.details["naive_block_forwards"] > 0
