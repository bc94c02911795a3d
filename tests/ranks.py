# SPDX-License-Identifier: Apache-2.0
"""Runs a Python program as several processes of one group, as `torchrun` does but without its supervision."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


TESTS = Path(__file__).parent
PATIENCE = 240  # seconds; what hangs fails


@dataclass(frozen=True)
class Outcome:
    """How one process ended."""

    code: int
    out: str
    err: str


def group_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher tells a process."""
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in group.items()}}


def run_ranks(size: int, *words: object) -> list[Outcome]:
    """Runs `python *words` as `size` processes and waits for all of them.

    Raises:
        subprocess.TimeoutExpired: One of them hangs; all are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *map(str, words)]
    started = [subprocess.Popen(command, env=group_environment(n, size, port), **pipes) for n in range(size)]
    try:
        with ThreadPoolExecutor(size) as pool:
            said = list(pool.map(lambda process: process.communicate(timeout=PATIENCE), started))
    finally:
        for process in started:
            process.kill()
    return [Outcome(process.returncode, *each) for process, each in zip(started, said, strict=True)]
