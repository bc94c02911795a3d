# SPDX-License-Identifier: Apache-2.0
"""Several processes that measure one model together, through `torch.distributed`.

Every process runs the same program on its share of the windows. What they measured is summed, so that all of them see
the same numbers and decide the same. An exchange begins with one row of every process, which says how it is doing:
where one has failed, the others raise instead of waiting for it. Nothing is pickled; what a process receives from the
others are tensors and texts.

Not covered: a process that neither fails nor goes on. The others wait for it as long as the timeout of the process
group allows.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import BlockPruningError, DistributedError


P = ParamSpec("P")
T = TypeVar("T")

_ROW_BYTES = 1024
_ALONE: ContextVar[bool] = ContextVar("alone", default=False)
_SUMMABLE = ("float64", "int64", "int32")
# Attribute of an exception that the other processes know of: reasons by rank.
_FAILURES = "blockprune_failures"


@dataclass(frozen=True)
class Team:
    """The processes that share the work, seen from one of them. All of them call the same methods in the same order.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        device: Where tensors lie while they are exchanged.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default=torch.device("cpu"), compare=False)

    @classmethod
    def current(cls) -> Team:
        """The processes of the default group of `torch.distributed`; this one where there is none, or in `alone`."""
        if _ALONE.get() or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return SOLO
        # A group of "nccl" alone moves tensors of a GPU only.
        on_cpu = "cpu:" in dist.get_backend_config() or not torch.cuda.is_available()
        device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reads and writes files for all."""
        return self.rank == 0

    def takes(self, number: int) -> bool:
        """Whether item `number` of the work (a batch, say) belongs to this process."""
        return number % self.size == self.rank

    def summed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the processes, name by name.

        Args:
            tensors: Sums over this process's share, float64, int64 or int32, on any device. A process whose share is
                empty may leave names out. Not to be used afterwards: the result may lie in the same memory.

        Returns:
            The sums, on the CPU, bit for bit the same in every process.

        Raises:
            TypeError: A tensor of another dtype, whose sums would depend on the number of processes.
            DistributedError: The processes disagree on the shape or dtype of a tensor, or another one failed.
        """
        own = {name: [str(tensor.dtype).removeprefix("torch."), *tensor.shape] for name, tensor in tensors.items()}
        if self.size == 1:
            return {name: tensors[name].detach().cpu() for name in _agreed([own])}
        with self._exchange():
            kinds = _agreed([json.loads(text) for text in self._texts("summed", json.dumps(own))])
            return {name: self._sum(tensors.get(name), *kind) for name, kind in kinds.items()}

    def from_first(self, make: Callable[[], dict[str, Tensor] | None]) -> dict[str, Tensor] | None:
        """What `make` returns in the first process, given to all of them; the others do not call it.

        Args:
            make: Returns tensors of any dtype, or `None`.

        Raises:
            DistributedError: In the others, when `make` failed in the first.
        """
        if self.size == 1:
            return make()
        with self._announced():
            found = make() if self.is_first else None
        with self._exchange():
            kinds = None if found is None else {name: [str(t.dtype)[6:], *t.shape] for name, t in found.items()}
            kinds = json.loads(self._texts("from_first", json.dumps(kinds))[0])
            if kinds is None:
                return None
            return {name: self._broadcast((found or {}).get(name), *kind) for name, kind in kinds.items()}

    @contextmanager
    def together(self) -> Iterator[None]:
        """The body ends well in all processes or in none: where it fails in one, the others raise.

        They do so at their next exchange, at the end of the body at the latest. Blocks may be nested.

        Raises:
            DistributedError: The body, or whatever another process does instead, failed in another process.
        """
        with self._announced():
            yield
        if self.size > 1:
            with self._exchange():
                self._rows("together")

    def by_first(self, work: Callable[[], T]) -> T | None:
        """Lets the first process do something for all (write a file, say); the others wait.

        Args:
            work: Called in the first process only, which works `alone` meanwhile.

        Returns:
            What `work` returns; `None` in the others.

        Raises:
            DistributedError: In the others, when `work` failed in the first.
        """
        with self.together():
            if not self.is_first:
                return None
            with alone():
                return work()

    def check_same(self, name: str, value: str) -> None:
        """Raises in every process when `value` is not the same in all of them.

        Args:
            name: What it is, for the message: "the calibration windows".
            value: A fingerprint, for example.

        Raises:
            DistributedError: They differ.
        """
        if self.size == 1:
            return
        with self._exchange():
            values = self._texts("check_same", value)
        other = next((rank for rank, each in enumerate(values) if each != values[0]), None)
        if other is not None:
            begin = max(0, len(os.path.commonprefix([values[0], values[other]])) - 40)  # long ones differ late
            raise DistributedError(
                f"The processes do not work on the same thing: {name} of process 1 is {values[0][begin:]:.120}, of "
                f"process {other + 1} {values[other][begin:]:.120}. Give all of them the same arguments, files and "
                "versions."
            )

    @contextmanager
    def _announced(self) -> Iterator[None]:
        """Tells the other processes of a failure of the body, unless they know of it."""
        handled = sys.exc_info()[1]  # by the caller, for example one that tries again: it is no part of a new failure
        try:
            yield
        except BaseException as error:
            if self.size > 1 and not _known(error, handled):
                with suppress(DistributedError), self._exchange():  # what failed first is the one to report
                    self._rows("failed", reason=_reason(error), error=error)
            raise

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Explains a lost connection; an exchange that was broken off is not followed by another one."""
        try:
            yield
        except RuntimeError as error:  # of the backend
            raise DistributedError(
                f"Process {self.rank + 1} of {self.size} lost the connection to the others: one of them was killed, "
                f"or did not take part in time ({_cause(error)}). See what that one says; then start all again."
            ) from error
        except BaseException as error:  # Ctrl-C between two steps of the exchange
            setattr(error, _FAILURES, getattr(error, _FAILURES, {}))
            raise

    def _rows(self, step: str, length: int = 0, *, reason: str = "", error: BaseException | None = None) -> list[int]:
        """Exchanges how the processes are doing; raises if another one failed or is at another step.

        Args:
            step: What this process is about to do.
            length: A number that the others need for it.
            reason: Why this process failed.
            error: The failure itself, which gets to know the others; then nothing is raised.

        Returns:
            The numbers of all processes.
        """
        row = torch.zeros(_ROW_BYTES, dtype=torch.uint8)
        text = f"{step}\n{length}\n{reason}".encode()[:_ROW_BYTES]
        row[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        rows = [_text(each).split("\n", 2) for each in self._gathered(row)]
        failures = {rank: said for rank, (at, _, said) in enumerate(rows) if at == "failed"}
        if error is not None:
            setattr(error, _FAILURES, failures)
            return []
        if failures:
            rank, said = next(iter(failures.items()))
            raise DistributedError(f"Process {rank + 1} of {self.size} failed: {said}")
        steps = [at for at, _, _ in rows]
        if len(set(steps)) > 1:
            raise DistributedError(
                f"The processes are out of step: {', '.join(f'{n} is at {at!r}' for n, at in enumerate(steps, 1))}. "
                "A strategy must measure and decide the same in all of them, whatever its share is."
            )
        return [int(number) for _, number, _ in rows]

    def _texts(self, step: str, text: str) -> list[str]:
        """The texts of all processes."""
        own = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        row = torch.zeros(max(self._rows(step, len(own))), dtype=torch.uint8)
        row[: len(own)] = own
        return [_text(each) for each in self._gathered(row)]

    def _gathered(self, row: Tensor) -> list[Tensor]:
        row = row.to(self.device)
        rows = [torch.empty_like(row) for _ in range(self.size)]
        dist.all_gather(rows, row)
        return [each.cpu() for each in rows]

    def _sum(self, tensor: Tensor | None, dtype: str, *shape: int) -> Tensor:
        if tensor is None:
            tensor = torch.zeros(shape, dtype=getattr(torch, dtype))
        tensor = tensor.detach().to(self.device).contiguous()
        dist.all_reduce(tensor)
        return tensor.cpu()

    def _broadcast(self, tensor: Tensor | None, dtype: str, *shape: int) -> Tensor:
        if tensor is None:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        tensor = tensor.detach().cpu().contiguous()
        there = tensor.view(-1).view(torch.uint8).to(self.device)  # bytes: no backend knows every dtype
        dist.broadcast(there, src=0)
        return there.cpu().view(tensor.dtype).view(shape)


SOLO = Team()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works by itself, whatever group it is in; the others need not take part."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def in_step(method: Callable[P, T]) -> Callable[P, T]:
    """Decorates what all processes call: where it fails in one it fails in all, and none returns before the others."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with Team.current().together():
            return method(*args, **kwargs)

    return call


def failures_of(error: BaseException) -> dict[int, str]:
    """Which processes failed at the same time as this error was announced, and why; by rank."""
    return getattr(error, _FAILURES, {})


def _agreed(kinds: Sequence[Mapping[str, list[Any]]]) -> dict[str, list[Any]]:
    """Dtype and shape of every tensor that one of the processes has; they all come to the same result or error."""
    found: dict[str, list[Any]] = {}
    for rank, each in enumerate(kinds):
        for name, kind in each.items():
            if kind[0] not in _SUMMABLE:
                raise TypeError(f"'{name}' is {kind[0]}; sums over processes are {', '.join(_SUMMABLE)}.")
            if found.setdefault(name, kind) != kind:
                raise DistributedError(
                    f"The processes disagree on '{name}': process {rank + 1} has {kind}, another one {found[name]}. "
                    "A strategy must return sums of the same shape whatever its share is."
                )
    return found


def _known(error: BaseException | None, handled: BaseException | None) -> bool:
    """Whether the other processes know of a failure, or of what caused it."""
    while error is not None and error is not handled:
        if isinstance(error, DistributedError) or hasattr(error, _FAILURES):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reason(error: BaseException) -> str:
    """The failure in one line."""
    said = " ".join(str(error).split())
    return said if isinstance(error, BlockPruningError) else f"{type(error).__name__}: {said}".rstrip(": ")


def _cause(error: RuntimeError) -> str:
    """The first sentence of an error of the backend, without the place in its source."""
    return str(error).split("] ", 1)[-1].split(". ", 1)[0].strip()[:200]


def _text(row: Tensor) -> str:
    """Text from its bytes, which zeros follow."""
    return bytes(row.numpy()).rstrip(b"\0").decode(errors="ignore")
