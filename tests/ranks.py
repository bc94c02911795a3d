# SPDX-License-Identifier: Apache-2.0
"""Scenarios of several processes that form a group, as a launcher starts them but without its supervision.

Starting Python with torch and transformers takes seconds; so one process, which computes nothing itself, imports them
once and forks the processes of all scenarios.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


PATIENCE = 120  # seconds; a process that takes longer hangs


@dataclass(frozen=True)
class Scenario:
    """What the processes of one group do.

    Attributes:
        program: Name of a function in `rank_programs`.
        arguments: Its keyword arguments, in JSON values.
        size: Number of processes.
    """

    program: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    size: int = 2


@dataclass(frozen=True)
class Outcome:
    """How one process ended; `code` is `None` for one that was hanging, negative for one that a signal ended."""

    code: int | None
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines in which the command says why it failed."""
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]


def play(scenarios: Mapping[str, Scenario], folder: Path) -> dict[str, list[Outcome]]:
    """Plays scenarios one after the other; returns how the processes of each ended, by rank."""
    (folder / "scenarios.json").write_text(json.dumps({name: asdict(each) for name, each in scenarios.items()}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(folder)], env=environment, check=True)
    codes = json.loads((folder / "codes.json").read_text())
    texts = {path.name: path.read_text() for path in folder.glob("*.std*")}
    return {
        name: [Outcome(code, texts[f"{name}-{n}.stdout"], texts[f"{name}-{n}.stderr"]) for n, code in enumerate(each)]
        for name, each in codes.items()
    }


def group_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher tells a process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _rank(name: str, scenario: Scenario, rank: int, port: int, folder: Path) -> None:
    """Runs in a process of its own."""
    import rank_programs

    os.environ.update(group_environment(rank, scenario.size, port))
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / f"{name}-{rank}.{stream}", os.O_WRONLY | os.O_CREAT), number)
    getattr(rank_programs, scenario.program)(**scenario.arguments)


def _codes(name: str, scenario: Scenario, folder: Path) -> Sequence[int | None]:
    context, port = multiprocessing.get_context("fork"), free_port()
    started = [
        context.Process(target=_rank, args=(name, scenario, rank, port, folder)) for rank in range(scenario.size)
    ]
    for process in started:
        process.start()
    deadline = time.monotonic() + PATIENCE
    for process in started:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return codes


if __name__ == "__main__":
    import rank_programs  # noqa: F401  # once for all

    place = Path(sys.argv[1])
    loaded = {name: Scenario(**each) for name, each in json.loads((place / "scenarios.json").read_text()).items()}
    found = {name: _codes(name, each, place) for name, each in loaded.items()}
    (place / "codes.json").write_text(json.dumps(found))
