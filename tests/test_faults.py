# SPDX-License-Identifier: Apache-2.0
"""What goes wrong outside of us: signals, disks and caches that refuse, broken shards, NaN in one batch.

Signals hit real processes. They are forked from one that has imported the package, because importing takes longer
than pruning a toy; it runs with a cache folder (HF_HOME) that cannot be written.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refusal
from families import block_list, tiny_model
from tiers import often
from toys import config, files_below, text, toy_folder, toy_pruner, word_tokenizer
from transformers import AutoModelForCausalLM

from optimum_blockprune import BlockPruner, PruningPlan, available_strategies, get_strategy
from optimum_blockprune.errors import BlockPruningError, NonFiniteError, OutputError


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the processes that it ends")

SIGNALS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM}
# Where each phase of a run can be met: a function, and which of its calls.
PHASES = {
    "loading": ("optimum_blockprune.pruner.load_model", 1),
    "calibration": ("optimum_blockprune.reading.windows_for", 1),
    "search, first pass": ("optimum_blockprune.runner.BlockRunner._forward", 3),
    "search, later": ("optimum_blockprune.runner.BlockRunner._forward", 9),
    "surgery": ("optimum_blockprune.surgery._cut_list", 1),
    "proof in memory": ("optimum_blockprune.gate._prove_logits", 1),
    "saving": ("transformers.PreTrainedModel.save_pretrained", 1),
    "saving, later": ("transformers.PreTrainedTokenizerBase.save_pretrained", 1),
    "proof of the folder": ("optimum_blockprune.gate.reload", 1),
    "renaming": ("optimum_blockprune.saving._move_into_place", 1),
}
APPLY_PHASES = {
    "reading": ("optimum_blockprune.checkpoint.open_source", 1),
    "copying": ("optimum_blockprune.weight_writing._write_shard", 1),
    "proof": ("optimum_blockprune.checkpoint.prove_folder", 1),
    "renaming": ("optimum_blockprune.saving._move_into_place", 1),
}
# A folder that not even root may write; elsewhere one that is a file.
READ_ONLY = "/proc/1/blockprune" if Path("/proc/1").is_dir() else "/dev/null/blockprune"

_SERVER = """
import importlib, json, os, signal, sys, threading, time, traceback
from argparse import ArgumentParser
from optimum_blockprune import shell, checkpoint
from optimum_blockprune.commands import BlockPruneCommand

def run(words):
    parser = ArgumentParser("optimum-cli")
    BlockPruneCommand(parser.add_subparsers())
    args = parser.parse_args(["blockprune", *words])
    args.func(args).run()

def tripwire(name, call, number):
    # The signal arrives while the function runs.
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:length]))
            break
        except ImportError:
            pass
    for part in parts[length:-1]:
        owner = getattr(owner, part)
    original, calls = getattr(owner, parts[-1]), []
    def function(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)
    setattr(owner, parts[-1], function)

def child(request):
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1); os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["place"]:
        tripwire(*request["place"], request["signal"])
    code = 1
    try:
        run(request["words"])
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)

for line in sys.stdin:
    request = json.loads(line)
    begin = time.monotonic()
    process = os.fork()
    if not process:
        child(request)
    timer = threading.Timer(request["delay"] or 0, os.kill, (process, request["signal"]))
    if request["delay"] is not None:
        timer.start()
    _, status = os.waitpid(process, 0)
    timer.cancel()
    print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - begin]), flush=True)
"""


@dataclass
class Ended:
    """How a process ended.

    Attributes:
        code: Exit code; minus the signal that it died from.
        seconds: How long it ran.
        said: What it printed.
    """

    code: int
    seconds: float
    said: str


Runner = Callable[..., Ended]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """Runs a command in a process of its own, which may be met by a signal: at a place, or after some seconds."""
    log = tmp_path_factory.mktemp("log") / "log"
    caches = {name: READ_ONLY for name in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE")}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path), **caches}
    command = [sys.executable, "-W", "ignore", "-c", _SERVER]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def ask(
        *words: object, meet: int = signal.SIGTERM, place: tuple[str, int] | None = None, delay: float | None = None
    ) -> Ended:
        request = {
            "words": list(map(str, words)),
            "log": str(log),
            "signal": int(meet),
            "place": place,
            "delay": delay,
        }
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        code, seconds = json.loads(process.stdout.readline())
        return Ended(code, seconds, log.read_text())

    with process:
        yield ask
        process.stdin.close()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("dense") / "toy")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in several shards."""
    folder = tmp_path_factory.mktemp("sharded") / "toy"
    tiny_model("llama", 6).save_pretrained(folder, max_shard_size="100KB")
    word_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def words(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A whole run, but for its output."""
    data = tmp_path_factory.mktemp("data") / "text.txt"
    data.write_text(text(300, seed=5))
    windows = ["--num-samples", "4", "--seqlen", "16", "--batch-size", "2"]
    return ["run", "-m", str(dense), "--strategy", "sleb", "--num-blocks", "2", "--dataset", str(data), *windows]


def whole(folder: Path, blocks: int = 4) -> bool:
    """Whether a folder holds a complete result."""
    return PruningPlan.from_file(folder).num_blocks == 6 and len(block_list(loaded(folder))) == blocks


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def left_over(folder: Path) -> set[str]:
    """What lies there but should not: what a search keeps for the next one is documented."""
    return {path.name for path in folder.iterdir()} - {".out.resume"}


# --- signals -------------------------------------------------------------------------------------------------------


def test_the_commands_work_where_the_cache_cannot_be_written(server: Runner, words: list[str], tmp_path: Path) -> None:
    ended = server(*words, tmp_path / "out")
    assert ended.code == 0, ended.said
    assert whole(tmp_path / "out") and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("phase", "name"),
    often(
        product(PHASES, SIGNALS), kept=lambda case: case[1] == "SIGTERM" or case[0] in ("search, later", "renaming")
    ),
)
def test_a_signal_in_any_phase_of_a_run(
    phase: str, name: str, server: Runner, words: list[str], tmp_path: Path
) -> None:
    ended = server(*words, tmp_path / "out", meet=SIGNALS[name], place=PHASES[phase])
    assert ended.code == 1 and "interrupted; no result was written" in ended.said, ended.said
    assert "Traceback" not in ended.said
    assert not left_over(tmp_path)


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("phase", APPLY_PHASES)
def test_a_signal_in_any_phase_of_apply(phase: str, name: str, server: Runner, dense: Path, tmp_path: Path) -> None:
    plan = PruningPlan.from_blocks(tiny_model("llama", 6), [1, 4]).save(tmp_path / "plan.json")
    line = ["apply", "-m", dense, "--plan", plan, tmp_path / "out"]
    ended = server(*line, meet=SIGNALS[name], place=APPLY_PHASES[phase])
    assert ended.code == 1 and "interrupted; no result was written" in ended.said, ended.said
    assert left_over(tmp_path) == {"plan.json"}


@pytest.mark.parametrize("name", often(SIGNALS, kept=lambda name: name == "SIGTERM"))
def test_a_signal_before_the_renaming_leaves_the_old_result(
    name: str, server: Runner, words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("the old result")
    for phase in ("saving", "renaming"):
        ended = server(*words, "--overwrite", tmp_path / "out", meet=SIGNALS[name], place=PHASES[phase])
        assert ended.code == 1 and left_over(tmp_path) == {"out"}
        assert files_below(tmp_path / "out") == {"old.txt": b"the old result"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_at_random_moments(name: str, server: Runner, words: list[str], tmp_path: Path) -> None:
    """Either nothing is there or everything, and the next run is as whole as one that nothing happened to."""
    seconds = server(*words, tmp_path / "first").seconds
    chance = random.Random(name)
    for trial in range(8):
        folder = tmp_path / str(trial)
        folder.mkdir()
        ended = server(*words, folder / "out", meet=SIGNALS[name], delay=chance.uniform(0.1, 1.1) * seconds)
        if "out" in left_over(folder):
            assert whole(folder / "out"), ended.said
        else:
            assert ended.code == 1 or ended.code == -SIGNALS[name], ended.said
        assert left_over(folder) <= {"out"}, ended.said
    assert server(*words, folder / "again").code == 0
    assert PruningPlan.from_file(folder / "again").to_dict() == PruningPlan.from_file(tmp_path / "first").to_dict()


# --- shards --------------------------------------------------------------------------------------------------------


def _shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def _garble(file: Path) -> None:
    """The header's length and its first letters."""
    file.write_bytes(b"\xff" * 24 + file.read_bytes()[24:])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _forget(file: Path) -> None:
    """The file is gone, the index still names it."""
    file.unlink()


def _misplace(file: Path) -> None:
    """The index says that a tensor lies in another shard."""
    index = file.parent / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    others = sorted(set(content["weight_map"].values()) - {file.name})
    name = next(name for name, home in content["weight_map"].items() if home == file.name)
    content["weight_map"][name] = others[0]
    index.write_text(json.dumps(content))


def _drop_from_index(file: Path) -> None:
    """The index knows nothing of a shard."""
    index = file.parent / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {name: home for name, home in content["weight_map"].items() if home != file.name}
    index.write_text(json.dumps(content))


BROKEN = {
    "truncated": _shorten,
    "garbled": _garble,
    "empty": _empty,
    "absent": _forget,
    "not in the index": _drop_from_index,
}


@pytest.fixture
def broken(sharded: Path, tmp_path: Path) -> Path:
    """A copy of the sharded checkpoint whose second file may be broken."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in sharded.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_shard_is_refused_and_nothing_written(
    fault: str, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shard = sorted(broken.glob("*.safetensors"))[1]
    BROKEN[fault](shard)
    before = files_below(broken)
    line = refusal(capsys, "run", "-m", broken, "--blocks", "1", tmp_path / "out")
    assert shard.name in line or "missing" in line or str(broken) in line
    plan = PruningPlan.from_blocks(tiny_model("llama", 6), [1]).save(tmp_path / "plan.json")
    line = refusal(capsys, "apply", "-m", broken, "--plan", plan, tmp_path / "out")
    assert shard.name in line or "missing" in line or str(broken) in line
    assert left_over(tmp_path) == {"broken", "plan.json"} and files_below(broken) == before


def test_an_index_that_misplaces_a_tensor(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """transformers finds it all the same; copying files by that index would not."""
    _misplace(sorted(broken.glob("*.safetensors"))[1])
    plan = PruningPlan.from_blocks(tiny_model("llama", 6), [1]).save(tmp_path / "plan.json")
    line = refusal(capsys, "apply", "-m", broken, "--plan", plan, tmp_path / "out")
    assert "The index of" in line and "does not hold it" in line
    assert left_over(tmp_path) == {"broken", "plan.json"}


# --- NaN in one batch ----------------------------------------------------------------------------------------------

ONE_PASS = [
    name
    for name, info in available_strategies().items()
    if info.distribution == "optimum-blockprune" and get_strategy(name).needs_data
]


@pytest.mark.parametrize("strategy", ONE_PASS)
def test_nan_in_one_batch_is_refused_and_the_block_named(strategy: str, tmp_path: Path) -> None:
    """Block 2 fails on one token only, which one window of the text holds."""
    fields = {"dataset": [text(40, seed) for seed in range(3)] + ["w21 " + text(39, 3)], "num_samples": 8}
    pruner = toy_pruner(strategy=strategy, **fields)
    marker = _mark(pruner, "w21")

    def spoil(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hit = (args[0] if args else kwargs["hidden_states"])[..., 0] > marker / 2
        hidden[hit] = torch.nan
        return output

    block_list(pruner.model)[2].register_forward_hook(spoil, with_kwargs=True)
    with pytest.raises(NonFiniteError, match=r"block 2"):
        pruner.prune(tmp_path / "out")
    assert not left_over(tmp_path) and len(block_list(pruner.model)) == 6 and pruner.plan is None


def _mark(pruner: BlockPruner, word: str) -> float:
    """Makes the first coordinate of a word's embedding stand out; returns it."""
    marker = 1e4
    with torch.no_grad():
        pruner.model.get_input_embeddings().weight[pruner.tokenizer.convert_tokens_to_ids(word), 0] = marker
    return marker


# --- the disk ------------------------------------------------------------------------------------------------------

_LIMITED = """
import resource, signal, sys
from optimum_blockprune import PruningPlan
from optimum_blockprune.errors import BlockPruningError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)
try:
    PruningPlan.from_file(sys.argv[1]).apply_to_checkpoint(sys.argv[2], sys.argv[3])
except BlockPruningError as error:
    print(type(error).__name__, error)
"""


def test_a_disk_that_takes_no_more_bytes(dense: Path, tmp_path: Path) -> None:
    """The system itself ends the writing in the middle of the weights, where it copies and where we do."""
    plan = PruningPlan.from_blocks(tiny_model("llama", 6), [1]).save(tmp_path / "plan.json")
    size = (dense / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", _LIMITED, plan, dense, tmp_path / "out", size // 2]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("OutputError The disk filled up while writing"), done.stdout + done.stderr
    assert left_over(tmp_path) == {"plan.json"}


def test_a_full_disk_while_a_run_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full takes no byte."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    pruner = toy_pruner(strategy="random")
    save = type(pruner.tokenizer).save_pretrained

    def fill(tokenizer: Any, folder: str, *args: Any, **kwargs: Any) -> Any:
        (Path(folder) / "tokenizer.json").symlink_to("/dev/full")
        return save(tokenizer, folder, *args, **kwargs)

    monkeypatch.setattr(type(pruner.tokenizer), "save_pretrained", fill)
    with pytest.raises((OutputError, BlockPruningError), match="disk filled up"):
        pruner.prune(tmp_path / "out")
    assert not left_over(tmp_path) and len(block_list(pruner.model)) == 6
    monkeypatch.undo()
    pruner.prune(tmp_path / "out", config("random"))
    assert whole(tmp_path / "out")
