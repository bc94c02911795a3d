# SPDX-License-Identifier: Apache-2.0
"""Commands under `torchrun`, `accelerate launch` or `mpirun`: joins the processes, and lets the first speak for all.

The processes exchange sums through "gloo", on the CPU, whatever the model runs on: what they exchange is small beside
the measuring, several processes may share a GPU, and a lost process is noticed at once. Nothing heavy is imported
before the command runs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from .errors import DistributedError


# torchrun and accelerate; Intel MPI and MPICH; Open MPI; MVAPICH.
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_SIZE = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
_LOCAL_SIZE = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
# Values of --device-map that spread one model over all GPUs that a process sees.
_SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")
# How long a process waits for the others, in hours: the first one may be reading text, or proving what it saved.
PATIENCE = 24


def run_with_others(work: Callable[[], None], args: Namespace, *, shared: bool) -> None:
    """Runs a command in this process, as one of those that a launcher started, or alone.

    Args:
        work: The command.
        args: Its arguments; `device_map` is filled in where each process has its own GPU.
        shared: Whether the processes share its work. If not, the first does all of it and the others do nothing.

    Raises:
        DistributedError: Another process failed or was lost.
    """
    rank, size = _number(_RANK, 0), _number(_SIZE, 1)
    if size < 2:
        _warn_of_lonely_launch()
        work()
    elif shared:
        with _silenced(rank), _terminable(rank, size), _joined(args) as team, team.together():
            work()
    elif rank == 0:
        work()


def launched() -> int:
    """How many processes a launcher started along with this one, itself among them."""
    return _number(_SIZE, 1)


def first_says_the_same(error: BaseException) -> bool:
    """Whether this is not the first process, and the first one failed with the same words, which it prints."""
    failures: dict[int, str] = getattr(error, "blockprune_failures", {})
    rank = _number(_RANK, 0)
    return rank > 0 and 0 in failures and failures[0] == failures.get(rank)


@contextmanager
def silence_others() -> Iterator[None]:
    """Keeps usage and help texts of a command line to the first process."""
    if _number(_SIZE, 1) < 2 or _number(_RANK, 0) == 0:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as void, redirect_stdout(void), redirect_stderr(void):
        yield


def share_of_devices(devices: list[str], rank: int, size: int) -> list[str]:
    """The GPUs of one of `size` processes on a machine, as many for each; all where there are too few."""
    each = len(devices) // size
    return devices[rank * each : (rank + 1) * each] or devices


@contextmanager
def _joined(args: Namespace) -> Iterator[Any]:
    """Joins the processes to a group, and leaves it in the end."""
    from datetime import timedelta

    _choose_device(args)  # before anything counts the GPUs for good
    import torch.distributed as dist
    from accelerate import PartialState
    from optimum.utils import logging

    from .team import Team

    PartialState(cpu=True, backend="gloo", timeout=timedelta(hours=PATIENCE))
    team = Team.current()
    if team.is_first:
        logging.set_verbosity_info()  # as the commands do, a little later
        where = getattr(args, "device_map", "cpu")
        logging.get_logger("optimum.blockprune.processes").info(f"{team.size} processes; the first one on {where}")
    try:
        yield team
    finally:
        dist.destroy_process_group()


def _choose_device(args: Namespace) -> None:
    """Gives each process on this machine its own GPU, or its own share of them where the model is to be spread."""
    import torch

    rank, size = _number(_LOCAL_RANK, 0), _number(_LOCAL_SIZE, 1)
    asked = getattr(args, "device_map", None)
    count = torch.cuda.device_count()
    if count == 0 or (asked is None and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")):
        return
    if asked is None:
        args.device_map = f"cuda:{rank % count}"
    elif asked in _SPREADING:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else list(map(str, range(count)))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(share_of_devices(devices, rank, size))


@contextmanager
def _silenced(rank: int) -> Iterator[None]:
    """Results, progress and notes come from the first process only; errors from all."""
    if rank == 0:
        yield
        return
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    from optimum.utils import logging
    from transformers.utils import logging as transformers_logging

    logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    with open(os.devnull, "w", encoding="utf-8") as void, redirect_stdout(void):
        yield


@contextmanager
def _terminable(rank: int, size: int) -> Iterator[None]:
    """Makes a launcher's SIGTERM, which follows the failure of another process, end this one as Ctrl-C does."""

    def end(*_: Any) -> None:
        if not isinstance(sys.exc_info()[1], DistributedError):  # else it is ending, and knows why
            raise KeyboardInterrupt(
                f"process {rank + 1} of {size} was told to end: another one failed, or the job was stopped"
            )

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _warn_of_lonely_launch() -> None:
    """Without MPI, `accelerate launch --cpu --num_processes N` starts one process, and says nothing."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ and "LOCAL_RANK" not in os.environ:
        sys.stderr.write(
            "warning: accelerate was asked for several processes and started one, which does all the work: on CPUs it "
            "needs MPI. Use: torchrun --nproc_per_node N -m optimum_blockprune.run ...\n"
        )


def _number(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)
