# SPDX-License-Identifier: Apache-2.0
"""What single processes of a group do in tests; every function runs in all processes of a scenario of `ranks`."""

from __future__ import annotations

import errno
import functools
import inspect
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import command_line
import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_pre_hook
from toys import assert_unchanged, config, seconds_by_blocks, snapshot, toy_pruner, wide, word_tokenizer
from transformers import PreTrainedModel

from optimum_blockprune import BlockPruner, PruningPlan, run, run_costs, speedup
from optimum_blockprune.compensating import _Compensation
from optimum_blockprune.errors import BlockPruningError, ConfigurationError
from optimum_blockprune.memory import OUT_OF_MEMORY
from optimum_blockprune.strategies import search
from optimum_blockprune.team import Team, alone


def _join() -> Team:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    return Team.current()


def _say(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def _error_of(work: Callable[[], Any]) -> str:
    """The error, or that there is none."""
    try:
        work()
    except BaseException as error:  # interruptions are tried, too
        return f"{type(error).__name__}: {error}"
    return "none"


# Exchanges


def sums() -> None:
    """Sums of all that may be summed; the last process has an empty share."""
    team, share = _join(), {}
    if team.rank < team.size - 1:
        numbers = torch.arange(6, dtype=torch.float64).view(2, 3).T + 0.1 * team.rank
        share = {"matrix": numbers, "count": torch.tensor(2**60 + 1), "nothing": torch.zeros(0, 2).double()}
        share["whole"] = torch.tensor([team.rank, -1], dtype=torch.int32)
    if team.rank == 0:
        share["own"] = torch.tensor([7.0], dtype=torch.float64)
    found = team.summed(share)
    _say(**{name: [str(value.dtype), list(value.shape), value.tolist()] for name, value in found.items()})


def gifts() -> None:
    """What the first process gives to the others."""
    team = _join()
    made = {
        "half": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
        "mask": torch.tensor([[True], [False]]),
        "scalar": torch.tensor(float("inf")),
        "empty": torch.zeros(0, 3, dtype=torch.int16),
    }
    found = team.from_first(lambda: made)
    same = all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in made.items())
    _say(same=same, names=list(found), none=team.from_first(lambda: None), takes=[team.takes(n) for n in range(4)])
    _say(by_first=team.by_first(lambda: [team.rank, Team.current().size]), size=Team.current().size)


def failures() -> None:
    """All kinds of failures that the others are told of, one after the other: each leaves the processes in step."""
    team = _join()

    def fail(error: BaseException, *ranks: int) -> None:
        with team.together(), team.together():
            if team.rank in ranks:
                raise error

    def fail_and_wrap() -> None:
        with team.together():
            try:
                fail(KeyError("inner"), 1)
            except KeyError as error:
                raise ConfigurationError("outer") from error

    def fail_again() -> None:
        try:
            fail(ConfigurationError("first"), 1)
        except BlockPruningError:
            fail(ConfigurationError("second"), 1)

    def interrupted() -> dict[str, torch.Tensor]:
        raise KeyboardInterrupt

    doubles = torch.zeros(2 + team.rank, dtype=torch.float64)
    found = {
        "reason": _error_of(lambda: fail(ConfigurationError("wrong\n  'thing' " + "x" * 3000), 1)),
        "strange": _error_of(lambda: fail(ZeroDivisionError("by zero"), 1)),
        "both": _error_of(lambda: fail(ConfigurationError("all of us"), 0, 1)),
        "wrapped": _error_of(fail_and_wrap),
        "again": _error_of(fail_again),
        "interrupted": _error_of(lambda: team.from_first(interrupted)),
        "shapes": _error_of(lambda: team.summed({"matrix": doubles})),
        "dtype": _error_of(lambda: team.summed({"matrix": torch.zeros(2)})),
        "same": _error_of(lambda: team.check_same("the text", "a" * 500)),
        "differs": _error_of(lambda: team.check_same("the text", "a" * 500 + str(team.rank))),
        "steps": _error_of(lambda: team.summed({}) if team.rank else team.from_first(lambda: None)),
        "by_first": _error_of(lambda: team.by_first(lambda: fail(ConfigurationError("disk"), 0))),
    }
    found["alive"] = team.summed({"ranks": torch.tensor(team.rank)})["ranks"].item()
    _say(**found)


def lost() -> None:
    """The last process is killed; the others are told at their next exchange."""
    team = _join()
    team.summed({})
    if team.rank == team.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    _say(error=_error_of(lambda: team.summed({})))


# Pruning


def plans(cases: list[tuple[str, Mapping[str, Any]]], folder: str) -> None:
    """Chooses what toys lose; writes `NAME-RANK.json`, and says what it cost this process, in passes of a block.

    The first process takes a second for each block; the others do not look at the clock.
    """
    team = _join()
    speedup.request_seconds = seconds_by_blocks if team.is_first else None
    for name, fields in cases:
        pruner = toy_pruner(**fields)
        pruner.make_plan().save(Path(folder) / f"{name}-{team.rank}.json")
        _say(name=name, block_forwards=pruner.report.block_forwards)


def wide_plans(cases: list[tuple[str, Mapping[str, Any]]], folder: str) -> None:
    """As `plans`, of models whose blocks do much, so that maps help; none of them is changed."""
    team = _join()
    for name, fields in cases:
        pruner = wide_pruner(**fields)
        before = snapshot(pruner.model)
        pruner.make_plan().save(Path(folder) / f"{name}-{team.rank}.json")
        assert_unchanged(pruner.model, before)
        _say(name=name, block_forwards=pruner.report.block_forwards)


def mixes(cases: list[tuple[str, Mapping[str, Any]]], folder: str) -> None:
    """As `wide_plans`, of a number of parameters that is split between depth and width."""
    team = _join()
    for name, fields in cases:
        pruner = wide_pruner(**fields)
        before = snapshot(pruner.model)
        mixed(pruner).save(Path(folder) / f"{name}-{team.rank}.json")
        assert_unchanged(pruner.model, before)
        _say(name=name, block_forwards=pruner.report.block_forwards)


def mixed(pruner: BlockPruner) -> PruningPlan:
    """The best of two splits of two blocks' worth of parameters."""
    gone = 2 * sum(each.numel() for each in pruner.model.model.layers[0].parameters())
    pruner.config.num_blocks = None
    return pruner.mix(sum(each.numel() for each in pruner.model.parameters()) - gone, counts=(1, 2))


def wide_pruner(family: str = "llama", **fields: Any) -> BlockPruner:
    """A pruner of such a model; `fields` are those of `config`."""
    return BlockPruner(wide(family), config(**fields), word_tokenizer())


def failing_maps(fields: Mapping[str, Any]) -> None:
    """One process after the other fails at each of the places where maps are fitted and judged."""
    team = _join()
    places = [(run_costs, "_start"), (run_costs._Part, "_sums"), (run_costs._Part, "_losses")]
    places += [(_Compensation, each) for each in ("_sums", "_wanted", "_step")]
    found = {}
    for kind, name in places:
        for rank in range(team.size):
            with _broken(kind, name, team.rank == rank):
                found[f"{kind.__name__}.{name} in {rank}"] = _error_of(wide_pruner(**fields).make_plan)
    _say(errors=found, alive=team.summed({"ranks": torch.tensor(team.rank)})["ranks"].item())


@contextmanager
def _broken(kind: Any, name: str, broken: bool) -> Any:
    """A method or a function that fails where it is broken."""

    def fail(*_args: Any) -> None:
        raise ArithmeticError("this device is broken")

    before = getattr(kind, name)
    if broken:
        setattr(kind, name, fail)
    try:
        yield
    finally:
        setattr(kind, name, before)


def short_of_memory(fields: Mapping[str, Any], folder: str) -> None:
    """The last process has memory for one window only, where the costs of runs are measured."""
    team, halved = _join(), []
    for name in ("_sums", "_losses"):
        if team.rank == team.size - 1:
            setattr(run_costs._Part, name, _of_one_window(getattr(run_costs._Part, name), halved))
    wide_pruner(**fields).make_plan().save(Path(folder) / f"memory-{team.rank}.json")
    _say(halved=halved)


def _of_one_window(method: Callable[..., Any], halved: list[str]) -> Callable[..., Any]:
    """The method, where memory runs out with more than one window at a time."""
    place = list(inspect.signature(method).parameters).index("size")

    @functools.wraps(method)
    def call(*args: Any) -> Any:
        if args[place] > 1:
            halved.append(method.__qualname__)
            raise OUT_OF_MEMORY("out of memory")
        return method(*args)

    return call


def out_of_time(fields: Mapping[str, Any], ticking: list[int]) -> None:
    """A search whose time is up; the clocks of the other processes than those in `ticking` stand still."""
    team = _join()
    with clock(1.0 if team.rank in ticking else 0.0):
        plan = toy_pruner(**fields).make_plan()
    _say(plan=plan.to_dict())


@contextmanager
def clock(step: float) -> Any:
    """The clock of the search, which goes on by `step` seconds each time it is looked at."""
    seconds = itertools.count(0.0, step)
    before, search.time = search.time, SimpleNamespace(monotonic=lambda: next(seconds))
    try:
        yield
    finally:
        search.time = before


def by_itself(folder: str) -> None:
    """One process after the other prunes, while the others wait somewhere else; the first one saves."""
    team = _join()
    for rank in range(team.size):
        if team.rank == rank:
            with alone():
                pruner = toy_pruner()
                pruner.prune(Path(folder) / "out" if team.is_first else None)
        dist.barrier()
    _say(removed=pruner.plan.removed_blocks, files=sorted(path.name for path in Path(folder).iterdir()))


def different_text() -> None:
    """The processes were given different text."""
    team = _join()
    _say(error=_error_of(lambda: toy_pruner(seed=team.rank, dataset=[f"w{team.rank + 9} " * 90]).make_plan()))


def failing_save(folder: str) -> None:
    """The disk fills up while the first process saves: the models of all are put back."""
    team = _join()
    pruner = toy_pruner()
    before = snapshot(pruner.model)
    with _full_disk():
        error = _error_of(lambda: pruner.prune(Path(folder) / "out"))
    assert_unchanged(pruner.model, before)
    again = _error_of(lambda: pruner.prune(Path(folder) / "out"))
    _say(error=error, again=again, rank=team.rank, blocks=len(pruner.model.model.layers))


@contextmanager
def _full_disk() -> Any:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = PreTrainedModel.save_pretrained
    PreTrainedModel.save_pretrained = fail
    try:
        yield
    finally:
        PreTrainedModel.save_pretrained = before


def command(words: list[str], fault: str | None = None, rank: int = 1, beside: str | None = None) -> None:
    """Runs `python -m optimum_blockprune.run`.

    Args:
        words: The command line.
        fault: What happens to process `rank` in the fifth pass through a block: `"error"`, or the name of a signal.
        beside: Folder of the output: it happens only after a measurement is kept there.
    """
    passes = 0

    def happen(module: torch.nn.Module, _: Any) -> None:
        nonlocal passes
        passes += type(module).__name__.endswith("DecoderLayer")
        if passes < 5 or (beside is not None and not list(Path(beside).rglob("*.safetensors"))):
            return
        handle.remove()
        if fault == "error":
            raise ArithmeticError("this device is broken")
        os.kill(os.getpid(), signal.Signals[fault])

    if fault is not None and os.environ["RANK"] == str(rank):
        handle = register_module_forward_pre_hook(happen)
    run.main(words)


def cli(words: list[str]) -> None:
    """Runs `optimum-cli blockprune`."""
    command_line.run(*words)


if __name__ == "__main__":  # under a launcher
    command(**json.loads(sys.argv[1]))
