# SPDX-License-Identifier: Apache-2.0
"""Finished measurements on disk, so that a run that was killed at any moment goes on where it was.

A ledger is a folder: `ledger.json` says which run it belongs to, every measurement is one safetensors file beside it,
`ledger.lock` keeps a second process out. Each file appears whole (temporary name, fsync, rename) and proves itself
when it is read: its metadata hold a SHA-256 over the run, the key and all tensors. What does not is measured again.

What is not covered: where the system has no `fcntl` (Windows), or the file system no locks, nothing keeps two
processes out of one folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from optimum.utils import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import BlockPruningError, OutputError, ResumeError
from .json_values import read_json


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.get_logger("optimum.blockprune.ledger")

FORMAT = 1
MANIFEST, LOCK = "ledger.json", "ledger.lock"
_MEASUREMENT = re.compile(r"[\w.-]*-[0-9a-f]{12}\.safetensors", re.ASCII)
_TEMPORARY = re.compile(r"\.[\w.-]+\.\d+\.tmp", re.ASCII)
# Our choice: an error names so many differences, and so much of each value.
_SHOWN, _LETTERS = 12, 40
_ATTEMPTS = 100
# How reading a damaged file fails: the system, safetensors, and numbers that fit no tensor.
_READ_ERRORS = (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)


class Ledger:
    """The finished measurements of one search, by key. Made by `open`; one process has it at a time.

    Attributes:
        folder: Where they are.
        found: Number of measurements that were there at the beginning.
        reused: Number of measurements that were read instead of being measured again.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], lock: BinaryIO | None) -> None:
        self.folder = folder
        self.found = len(self._ours(_MEASUREMENT))
        self.reused = 0
        self._run = _digest_of(fingerprint)
        # Also when nobody closes it: the lock goes with the object.
        self._release = weakref.finalize(self, lock.close) if lock is not None else weakref.finalize(self, bool)
        self._complained = False

    @classmethod
    def open(cls, folder: str | Path, fingerprint: Mapping[str, Any]) -> Ledger:
        """Opens a ledger, or begins one where there is none.

        Args:
            folder: A folder of its own; made if needed.
            fingerprint: JSON values that tell runs apart, nested as one likes. Runs with equal ones share results.

        Raises:
            ResumeError: It belongs to another run, another process has it, or it is no ledger.
            OutputError: It cannot be made.
        """
        folder = Path(os.path.abspath(folder))
        fingerprint = json.loads(json.dumps({"format": FORMAT, **fingerprint}))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _refuse_foreign(folder)
            lock = _locked(folder)
            try:
                ledger = cls(folder, fingerprint, lock)
                ledger._begin(fingerprint)
            except BaseException:
                if lock is not None:
                    lock.close()
                raise
        except OSError as error:
            raise OutputError(
                f"What is needed for resuming cannot be kept in '{folder}': {error}. Give another folder "
                "(resume_dir=, --resume-dir), or keep nothing (resume_dir=False, --no-resume)."
            ) from error
        return ledger

    def read(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of a measurement, on the CPU; `None` where there is none, or only a damaged one."""
        path = self._path(key)
        try:
            if not path.is_file():
                return None
            tensors, metadata = _load(path)
            fault = self._fault(key, tensors, metadata)
        except _READ_ERRORS as error:
            fault = f"{type(error).__name__}: {error}"
        if fault is not None:
            logger.warning(f"'{path}' is not used ({fault}); this part is measured again.")
            return None
        self.reused += 1
        return tensors

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps a measurement. Where the disk refuses, a warning says so once, and the run goes on without.

        Args:
            key: Any text; the same one replaces what was there.
            tensors: By name, on any device.
        """
        plain = _plain(tensors)
        metadata = {"key": key, "run": self._run, "sha256": _digest_of([self._run, key], plain)}
        try:
            # Not `save_file`: it goes through a temporary file of its own name, which a killed process would leave.
            _write_whole(self._path(key), lambda path: path.write_bytes(save(plain, metadata)))
        except (OSError, SafetensorError) as error:
            if not self._complained:
                logger.warning(
                    f"'{key}' could not be kept in '{self.folder}' ({error}). The run goes on; what is not kept has "
                    "to be measured again if it is interrupted."
                )
            self._complained = True

    def forget(self, keys: Iterable[str]) -> None:
        """Deletes measurements that are not needed any more, if they are there; what the disk refuses stays."""
        for key in keys:
            with suppress(OSError):
                self._path(key).unlink(missing_ok=True)

    def close(self) -> None:
        """Lets other processes have the folder, which goes if nothing was kept in it."""
        if not self._release.alive:
            return
        try:
            if not self._ours(_MEASUREMENT):
                self._delete()
        except OSError as error:
            logger.debug(f"'{self.folder}' stays: {error}.")
        self._release()

    def remove(self) -> None:
        """Deletes the folder, unless somebody has put other files into it: these stay. Closed ledgers stay as well."""
        if not self._release.alive:
            return
        try:
            self._delete()
        except OSError as error:
            logger.warning(f"'{self.folder}' is no longer needed but cannot be deleted: {error}.")
        self._release()

    def _begin(self, fingerprint: dict[str, Any]) -> None:
        """Clears up after a killed process, and holds the fingerprint against the one that is there."""
        for path in self._ours(_TEMPORARY):
            path.unlink(missing_ok=True)
        path = self.folder / MANIFEST
        if path.exists():
            try:
                earlier = _read_manifest(path)
            except BlockPruningError as error:
                logger.warning(f"{error} It is written anew; measurements that prove to be of this run are used.")
            else:
                _refuse_mismatch(self.folder, earlier, fingerprint)
                return
        manifest = {"fingerprint": fingerprint, "sha256": _digest_of(fingerprint)}
        text = json.dumps(manifest, indent=2) + "\n"
        _write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def _fault(self, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str | None:
        """Why these are not the tensors that were written under this key in this run; `None` if they are."""
        for name, value in (("key", key), ("run", self._run)):
            if metadata.get(name) != value:
                return f"it is of another {name}"
        whole = metadata.get("sha256") == _digest_of([self._run, key], tensors)
        return None if whole else "its checksum is wrong"

    def _path(self, key: str) -> Path:
        """The file of a key. Names need not be told apart by more than the hash, which also keeps them legal."""
        readable = re.sub(r"[^\w.-]+", "-", key, flags=re.ASCII)[:60].lstrip(".")
        return self.folder / f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"

    def _ours(self, pattern: re.Pattern[str]) -> list[Path]:
        return [path for path in self.folder.iterdir() if pattern.fullmatch(path.name) and not path.is_dir()]

    def _delete(self) -> None:
        """The manifest goes last but for the lock: a run killed here leaves a ledger that is merely emptier."""
        for path in (*self._ours(_TEMPORARY), *self._ours(_MEASUREMENT)):
            path.unlink(missing_ok=True)
        for name in (MANIFEST, LOCK):
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # somebody's files are in it, or another process has begun anew
            self.folder.rmdir()


def _refuse_foreign(folder: Path) -> None:
    """A folder that was never a ledger but holds something is somebody's."""
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if not _TEMPORARY.fullmatch(name)]
    if foreign and MANIFEST not in names and LOCK not in names:
        raise ResumeError(
            f"'{folder}' holds other files ({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}) and is not "
            "used for resuming. Give a folder of its own (resume_dir=, --resume-dir)."
        )


def _refuse_mismatch(folder: Path, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Names every entry in which two runs differ."""
    then, here = _entries(earlier), _entries(now)
    names = [name for name in dict.fromkeys((*then, *here)) if then.get(name, _ABSENT) != here.get(name, _ABSENT)]
    if not names:
        return
    lines = [f"{name}: {_shown(then, name)} then, {_shown(here, name)} now" for name in names[:_SHOWN]]
    more = f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise ResumeError(
        f"'{folder}' keeps the measurements of another run, which differs in {'; '.join(lines)}{more}. Delete this "
        "folder to begin anew, give another one (resume_dir=, --resume-dir), or run with what it was begun with."
    )


_ABSENT = object()


def _entries(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, `{"versions.torch": "2.9.0"}`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, Mapping) and value
        found.update(_entries(value, f"{prefix}{name}.") if inner else {prefix + name: value})
    return found


def _shown(entries: Mapping[str, Any], name: str) -> str:
    if name not in entries:
        return "absent"
    value = entries[name]
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= _LETTERS else f"{text[:16]}..."


def _read_manifest(path: Path) -> dict[str, Any]:
    """The fingerprint of a ledger.

    Raises:
        ResumeError: The file is damaged.
    """
    found = read_json(path, ResumeError)
    fingerprint = found.get("fingerprint") if isinstance(found, dict) else None
    if not isinstance(fingerprint, dict) or found.get("sha256") != _digest_of(fingerprint):
        raise ResumeError(f"'{path}' is damaged: its checksum is wrong.")
    return fingerprint


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file; copies, so that the file can go while they are used."""
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: dense, on the CPU, each with storage of its own."""
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.numel() and plain.untyped_storage().data_ptr() in storages:
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        found[name] = plain
    return found


def _digest_of(value: Any, tensors: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256 (hex) of a JSON value, whatever the order of its names, and of names, types, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode())
    for name, tensor in sorted((tensors or {}).items()):
        digest.update(json.dumps([name, str(tensor.dtype), tuple(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _locked(folder: Path) -> BinaryIO | None:
    """Takes the lock of a folder; the system lets it go when the process ends, however it does.

    Raises:
        ResumeError: Another process has it.
    """
    if fcntl is None:
        return None
    path = folder / LOCK
    for _ in range(_ATTEMPTS):
        folder.mkdir(exist_ok=True)
        try:
            file = path.open("a+b")
        except FileNotFoundError:  # the process that had it has just deleted the folder
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read(20).decode("ascii", "replace").strip()
            file.close()
            raise ResumeError(
                f"'{folder}' is in use by another run (process {owner or 'unknown'}). Wait for it, or give another "
                "folder (resume_dir=, --resume-dir)."
            ) from error
        except OSError as error:  # a file system without locks
            logger.warning(f"'{folder}' cannot be locked ({error}): let no other run use it.")
        # It may also have done so between opening and locking.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"{os.getpid()}\n".encode())
                file.flush()
                return file
        file.close()
    raise ResumeError(f"'{folder}' cannot be locked: its '{LOCK}' does not stay. Give another folder (--resume-dir).")


def _write_whole(path: Path, fill: Callable[[Path], Any]) -> None:
    """Lets `fill` write a temporary file beside `path`, which takes its name once it is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        fill(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not every system lets folders be opened and synchronised
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
