# SPDX-License-Identifier: Apache-2.0
"""Ledgers: what was kept comes back whole or not at all, to the run that it belongs to, one process at a time."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from optimum_blockprune.errors import OutputError, ResumeError
from optimum_blockprune.ledger import LOCK, MANIFEST, Ledger


RUN = {"model": {"type": "llama", "weights": "a" * 64}, "recipe": {"num_blocks": 6}, "versions": {"torch": "2.12"}}
LOSSES = {"losses": torch.tensor([[1.5, -2.0]], dtype=torch.float64), "count": torch.tensor(7)}


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What ledgers warn of; Optimum's loggers do not pass their records on to pytest's handler."""
    logger, messages, handler = logging.getLogger("optimum.blockprune.ledger"), [], logging.Handler()
    handler.emit = lambda record: messages.append(f"{record.levelname} {record.getMessage()}")
    monkeypatch.setattr(logger, "handlers", [handler])
    yield messages


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def same(found: dict[str, Tensor] | None, expected: dict[str, Tensor]) -> bool:
    return (
        found is not None
        and found.keys() == expected.keys()
        and all(found[name].dtype == each.dtype and torch.equal(found[name], each) for name, each in expected.items())
    )


def filled(folder: Path, **measurements: dict[str, Tensor]) -> Path:
    """Begins a ledger, keeps these, and is gone."""
    ledger = Ledger.open(folder, RUN)
    for key, tensors in (measurements or {"step": LOSSES}).items():
        ledger.write(key, tensors)
    ledger.close()
    return folder


def in_a_process(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Python in a process of its own, with `Ledger`, `torch`, `RUN` and the folder."""
    head = f"import sys, time, torch\nfrom optimum_blockprune.ledger import Ledger\nRUN = {RUN!r}\n"
    words = [sys.executable, "-c", head + code, *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# Keeping


def test_what_was_written_is_read_by_the_next_process(tmp_path: Path) -> None:
    tensors = {
        **LOSSES,
        "none": torch.empty(0, 3),
        "bits": torch.tensor([True, False]),
        "half": torch.tensor([1.25, -3.0], dtype=torch.bfloat16),
        "turned": torch.arange(6.0).view(2, 3).T,
    }
    filled(tmp_path / "ledger", first=tensors, second={})
    ledger = Ledger.open(tmp_path / "ledger", RUN)
    assert ledger.found == 2 and ledger.reused == 0
    assert same(ledger.read("first"), tensors)
    assert ledger.read("second") == {} and ledger.read("third") is None
    assert ledger.reused == 2


def test_nothing_is_unpickled_and_each_key_has_a_file(tmp_path: Path) -> None:
    keys = ["step 1", "step/1", "STEP 1", "../../step", "", ".", "äöü 雪", "x" * 500, "con", "a\0b\n"]
    ledger = Ledger.open(tmp_path / "ledger", RUN)
    for number, key in enumerate(keys):
        ledger.write(key, {"number": torch.tensor(number)})
    assert [int(ledger.read(key)["number"]) for key in keys] == list(range(len(keys)))
    assert len(kept(tmp_path / "ledger")) == len(keys)
    assert {path.name for path in tmp_path.iterdir()} == {"ledger"}
    assert all(path.name.isascii() and len(path.name) < 100 for path in kept(tmp_path / "ledger"))


def test_the_last_write_of_a_key_counts(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, RUN)
    ledger.write("step", {"old": torch.zeros(3)})
    ledger.write("step", LOSSES)
    assert same(ledger.read("step"), LOSSES) and len(kept(tmp_path)) == 1


def test_what_is_forgotten_is_gone_and_the_rest_stays(tmp_path: Path) -> None:
    filled(tmp_path / "kept", first=LOSSES, second=LOSSES)
    ledger = Ledger.open(tmp_path / "kept", RUN)
    ledger.forget(["first", "never there"])
    assert ledger.read("first") is None and same(ledger.read("second"), LOSSES)
    assert len(kept(tmp_path / "kept")) == 1


def test_tensors_that_share_memory_are_kept(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    tensors = {"whole": whole, "again": whole, "part": whole[3:6], "turned": whole.view(3, 4).T}
    assert same(Ledger.open(filled(tmp_path, step=tensors), RUN).read("step"), tensors)


def test_what_is_read_outlives_the_folder(tmp_path: Path) -> None:
    ledger = Ledger.open(filled(tmp_path / "ledger"), RUN)
    found = ledger.read("step")
    ledger.remove()
    assert not (tmp_path / "ledger").exists() and same(found, LOSSES)
    found["losses"].zero_()


# Damage


def damaged(path: Path) -> Iterator[bytes]:
    """Contents that a file may have after an accident: cut short, one bit flipped, longer, of something else."""
    content = path.read_bytes()
    for length in range(0, len(content), 37):
        yield content[:length]
        yield content[:length].ljust(len(content), b"\0")
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        yield bytes(flipped)
    yield content + b"\0"
    yield content * 2
    yield bytes(len(content))
    yield b"\xff" * len(content)
    yield b"no tensors at all"


def test_a_damaged_measurement_is_absent_and_is_made_again(tmp_path: Path, log: list[str]) -> None:
    ledger = Ledger.open(filled(tmp_path, step=LOSSES, other=LOSSES), RUN)
    path = next(path for path in kept(tmp_path) if path.name.startswith("step"))
    size, refused = path.stat().st_size, 0
    for content in damaged(path):
        path.write_bytes(content)
        found = ledger.read("step")
        # Whatever a flipped bit of white space in the header is read as: never other tensors.
        assert found is None or same(found, LOSSES)
        refused += found is None
    assert refused > size and len(log) == refused
    assert f"'{path}' is not used" in log[-1] and "measured again" in log[-1]
    assert same(ledger.read("other"), LOSSES)
    ledger.write("step", LOSSES)
    assert same(ledger.read("step"), LOSSES)


def test_random_damage_never_gives_other_tensors(tmp_path: Path) -> None:
    ledger = Ledger.open(filled(tmp_path), RUN)
    (path,) = kept(tmp_path)
    whole, generator = path.read_bytes(), random.Random(0)
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            content[generator.randrange(len(whole))] = generator.randrange(256)
        path.write_bytes(content)
        found = ledger.read("step")
        assert found is None or same(found, LOSSES)


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape", "no metadata"])
def test_a_file_that_somebody_else_wrote_is_absent(change: str, tmp_path: Path, log: list[str]) -> None:
    ledger = Ledger.open(filled(tmp_path), RUN)
    (path,) = kept(tmp_path)
    metadata = json.loads(path.read_bytes()[8:].split(b"}}", 1)[0].split(b'"__metadata__":')[1].split(b"}")[0] + b"}")
    tensors = load_file(path)
    if change == "value":
        tensors["losses"] += 1
    elif change == "name":
        tensors["loss"] = tensors.pop("losses")
    elif change == "dtype":
        tensors["losses"] = tensors["losses"].view(torch.int64)
    elif change == "shape":
        tensors["losses"] = tensors["losses"].view(2, 1)
    save_file(tensors, path, None if change == "no metadata" else metadata)
    assert ledger.read("step") is None
    assert len(log) == 1


def test_a_file_under_another_key_or_of_another_run_is_absent(tmp_path: Path, log: list[str]) -> None:
    ledger = Ledger.open(filled(tmp_path / "ledger", one=LOSSES, two=LOSSES), RUN)
    one, two = kept(tmp_path / "ledger")
    two.write_bytes(one.read_bytes())
    assert ledger.read("two") is None and "it is of another key" in log[-1]
    other = Ledger.open(tmp_path / "other", {**RUN, "recipe": {"num_blocks": 7}})
    (tmp_path / "other" / one.name).write_bytes(one.read_bytes())
    assert other.read("one") is None and "it is of another run" in log[-1]


def test_leftovers_of_a_killed_writer_go(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / ".step-0123456789ab.safetensors.4711.tmp").write_bytes(b"half")
    (tmp_path / ".ledger.json.4711.tmp").write_bytes(b"{")
    ledger = Ledger.open(tmp_path, RUN)
    assert not list(tmp_path.glob(".*")) and same(ledger.read("step"), LOSSES)


def test_a_damaged_manifest_costs_no_measurement(tmp_path: Path, log: list[str]) -> None:
    manifest = filled(tmp_path) / MANIFEST
    for content in [*list(damaged(manifest))[::9], b"[1]", b"{}", b'{"fingerprint": {}, "sha256": 1}', b"[" * 100_000]:
        manifest.write_bytes(content)
        del log[:]
        ledger = Ledger.open(tmp_path, RUN)
        assert same(ledger.read("step"), LOSSES)
        ledger.close()
        # White space of another kind is no damage.
        assert len(log) == 1 or json.loads(content)["fingerprint"]["recipe"] == {"num_blocks": 6}
    Ledger.open(tmp_path, RUN).close()
    assert len(log) == 1  # written anew
    # Without it, those of another run are told by their own checksum.
    manifest.write_bytes(b"")
    assert Ledger.open(tmp_path, {**RUN, "recipe": {"num_blocks": 7}}).read("step") is None


# Of another run


def test_a_mismatch_names_what_differs_and_what_to_do(tmp_path: Path) -> None:
    filled(tmp_path)
    other = {
        "model": {"type": "llama", "weights": "b" * 64},
        "recipe": {"num_blocks": 7, "seed": 1},
        "data": {},
    }
    with pytest.raises(ResumeError) as caught:
        Ledger.open(tmp_path, other)
    message = str(caught.value)
    for part in (
        f"model.weights: {'a' * 16}... then, {'b' * 16}... now",
        "recipe.num_blocks: 6 then, 7 now",
        "recipe.seed: absent then, 1 now",
        "versions.torch: 2.12 then, absent now",
        "data: absent then, {} now",
        f"'{tmp_path}'",
        "Delete this folder",
        "--resume-dir",
        "what it was begun with",
    ):
        assert part in message
    assert "model.type" not in message
    # It is neither locked nor changed by the attempt.
    assert same(Ledger.open(tmp_path, RUN).read("step"), LOSSES)


def test_a_mismatch_in_everything_is_named_briefly(tmp_path: Path) -> None:
    Ledger.open(tmp_path, {f"entry{number}": "x" * 1000 for number in range(50)}).write("step", LOSSES)
    with pytest.raises(ResumeError, match="and 38 more") as caught:
        Ledger.open(tmp_path, {f"entry{number}": "y" * 1000 for number in range(50)})
    assert len(str(caught.value)) < 2000


def test_equal_values_are_no_mismatch(tmp_path: Path) -> None:
    Ledger.open(tmp_path, {"a": (1, 2), "b": {"c": 0.1, "d": None}}).write("step", LOSSES)
    assert same(Ledger.open(tmp_path, {"b": {"d": None, "c": 0.1}, "a": [1, 2]}).read("step"), LOSSES)


# Folders


def test_a_folder_of_somebody_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ResumeError, match=r"holds other files \(thesis.txt\)"):
        Ledger.open(tmp_path, RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_files_of_somebody_in_a_ledger_stay(tmp_path: Path) -> None:
    filled(tmp_path / "ledger")
    (tmp_path / "ledger" / "notes.txt").write_text("do not touch")
    (tmp_path / "ledger" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "ledger" / "more").mkdir()
    ledger = Ledger.open(tmp_path / "ledger", RUN)
    assert same(ledger.read("step"), LOSSES)
    ledger.remove()
    assert {path.name for path in (tmp_path / "ledger").iterdir()} == {"notes.txt", "model.safetensors", "more"}


def test_a_ledger_in_which_nothing_was_kept_goes_when_it_is_closed(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "ledger", RUN)
    assert (tmp_path / "ledger" / MANIFEST).is_file()
    ledger.close()
    ledger.close()
    assert not list(tmp_path.iterdir())
    filled(tmp_path / "ledger")
    assert len(kept(tmp_path / "ledger")) == 1


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "ledger"):
        with pytest.raises(OutputError, match="--no-resume"):
            Ledger.open(path, RUN)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot be kept"):
        Ledger.open(tmp_path / "locked" / "ledger", RUN)


def test_a_folder_that_vanishes_does_not_end_the_run(tmp_path: Path, log: list[str]) -> None:
    ledger = Ledger.open(tmp_path / "ledger", RUN)
    ledger.write("step", LOSSES)
    for path in (tmp_path / "ledger").iterdir():
        path.unlink()
    (tmp_path / "ledger").rmdir()
    assert ledger.read("step") is None
    ledger.write("one", LOSSES)
    ledger.write("two", LOSSES)
    assert len(log) == 1 and "The run goes on" in log[0]
    ledger.remove()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_does_not_end_the_run(tmp_path: Path) -> None:
    code = """
import resource
ledger = Ledger.open(sys.argv[1], RUN)
ledger.write("small", {"values": torch.arange(3)})
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for key in ("one", "two"):
    ledger.write(key, {"values": torch.zeros(50_000)})
    assert ledger.read(key) is None
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
ledger.write("late", {"values": torch.arange(3)})
"""
    process = in_a_process(code, tmp_path)
    _, err = process.communicate(timeout=120)
    # Raising a hard limit is refused, which is how the script ends.
    assert err.count("The run goes on") == 1 and "late" not in err.split("Traceback")[0]
    assert [path.name[:5] for path in kept(tmp_path)] == ["small"] and not list(tmp_path.glob(".*"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert torch.equal(Ledger.open(tmp_path, RUN).read("small")["values"], torch.arange(3))


# Processes


def test_a_second_ledger_waits_for_the_first(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "ledger", RUN)
    ledger.write("step", LOSSES)
    with pytest.raises(ResumeError, match=f"in use by another run .process {os.getpid()}"):
        Ledger.open(tmp_path / "ledger", RUN)
    ledger.close()
    again = Ledger.open(tmp_path / "ledger", RUN)
    ledger.remove()  # closed: no longer its own
    assert same(again.read("step"), LOSSES)
    again.remove()
    Ledger.open(tmp_path / "ledger", RUN).close()


def test_a_dead_process_locks_nothing(tmp_path: Path) -> None:
    process = in_a_process(
        "ledger = Ledger.open(sys.argv[1], RUN)\nprint('open', flush=True)\ntime.sleep(600)", tmp_path
    )
    assert process.stdout.readline() == "open\n"
    with pytest.raises(ResumeError, match=f"in use by another run .process {process.pid}"):
        Ledger.open(tmp_path, RUN)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / LOCK).exists()
    Ledger.open(tmp_path, RUN).close()


_KILLING = """
import os, random, signal
from pathlib import Path

folder, generator, seen, leftovers = Path(sys.argv[1]), random.Random(3), set(), 0
for _ in range(25):
    child = os.fork()
    if child == 0:
        ledger = Ledger.open(folder, RUN)
        for number in range(10**6):
            tensors = {"number": torch.tensor(number), "values": torch.full((30_000,), number)}
            ledger.write(f"key {number % 5}", tensors)
    time.sleep(generator.uniform(0.01, 0.2))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    leftovers += len(list(folder.glob(".*")))
    ledger = Ledger.open(folder, RUN)
    assert not list(folder.glob(".*")), "leftovers are cleared away"
    assert ledger.found == len(list(folder.glob("*.safetensors")))
    for key in range(5):
        found = ledger.read(f"key {key}")
        if found is not None:
            number = int(found["number"])
            assert number % 5 == key and torch.equal(found["values"], torch.full((30_000,), number))
            seen.add(number)
    assert ledger.reused == ledger.found, "what is there is whole"
    ledger.close()
print(len(seen), leftovers)
"""


def test_a_killed_writer_leaves_whole_measurements_only(tmp_path: Path) -> None:
    """SIGKILL in a loop of writes, at moments that a seed chooses; some of them in the middle of a file."""
    out, err = in_a_process(_KILLING, tmp_path).communicate(timeout=300)
    assert err == ""
    seen, leftovers = map(int, out.split())
    assert seen > 5 and leftovers > 0
