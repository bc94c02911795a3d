# SPDX-License-Identifier: Apache-2.0
"""Writes a folder whole or not at all: into a sibling temporary folder, renamed when it is finished and proven."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import BlockPruningError, OutputError


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def check_output(path: str | Path, *, overwrite: bool = False, needed_bytes: int = 0) -> Path:
    """Refuses, before any work is done, an output folder that could not be written at the end.

    Args:
        path: The output folder.
        overwrite: Whether an existing non-empty folder may be replaced.
        needed_bytes: Size of the result; the disk must have room for it.

    Raises:
        OutputError: The folder exists, is a file, may not be written, or the disk is too full.
    """
    # Absolute, so that "." has a name and a parent.
    path = Path(os.path.abspath(path))
    with _explained(path):
        if path.exists() and not path.is_dir():
            raise OutputError(f"The output '{path}' is a file; give a folder.")
        if path.is_dir() and any(path.iterdir()) and not overwrite:
            raise OutputError(
                f"The output folder '{path}' exists and is not empty; pass overwrite=True (--overwrite)."
            )
        if path.is_mount():
            raise OutputError(f"The output '{path}' is a mount point, which cannot be replaced; give a folder inside.")
        parent = _existing_parent(path)
        with tempfile.TemporaryDirectory(prefix=".blockprune-", dir=parent):
            pass
        free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise OutputError(
            f"The disk of '{path}' has {free / 1e9:.2f} GB free, the result needs {needed_bytes / 1e9:.2f} GB. Free "
            "some space or choose another folder."
        )
    return path


@contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `path` that takes its name when the body ends, and vanishes if it fails.

    An existing folder is replaced only if `overwrite`, and only after the new one is complete.

    Raises:
        OutputError: From `check_output`, or when the disk fills up or refuses while the body writes.
    """
    path = check_output(path, overwrite=overwrite)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        # mkdtemp makes private folders; the result is an ordinary one.
        temporary.chmod(0o777 & ~_umask())
    try:
        with _explained(path):
            yield temporary
            _move_into_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _move_into_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent)) / path.name
    try:
        path.rename(old)
        temporary.rename(path)
    except BaseException:
        # Interrupted between the two: the old folder goes back.
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns 'disk full' and 'permission denied' into `OutputError`; other errors pass."""
    try:
        yield
    except Exception as error:  # tokenizers has no class of its own for what the system refuses
        if _is_one_of(_FULL, error):
            raise OutputError(
                f"The disk filled up while writing '{path}' ({error}); the partial output was removed. Free some "
                "space or choose another folder."
            ) from error
        if _is_one_of(_FORBIDDEN, error):
            raise OutputError(f"May not write '{path}': {error}. Choose a folder that you may write.") from error
        raise


def _is_one_of(codes: tuple[int, ...], error: Exception) -> bool:
    """Libraries that report an error of the system as their own keep its words only."""
    code = getattr(error, "errno", None)
    if code is not None or isinstance(error, BlockPruningError):
        return code in codes
    return any(os.strerror(code) in str(error) for code in codes)


def _existing_parent(path: Path) -> Path:
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def restored(config: Any) -> Iterator[None]:
    """Takes back what transformers notes in the live configuration when it saves (dtype, class, code files)."""
    before = dict(vars(config))
    try:
        yield
    finally:
        vars(config).clear()
        vars(config).update(before)
