# SPDX-License-Identifier: Apache-2.0
"""An output folder appears whole or not at all, and what was there before stays until then."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from families import tiny_model
from safetensors import SafetensorError

from optimum_blockprune.errors import OutputError
from optimum_blockprune.saving import atomic_folder, check_output


NOBODY = 65534


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@contextmanager
def unprivileged(folder: Path) -> Iterator[None]:
    """`folder` may not be written; root, who may write everywhere, becomes nobody for a while."""
    root = os.geteuid() == 0
    closed = [parent for parent in folder.parents if root and not parent.stat().st_mode & 0o001]
    for parent in closed:
        parent.chmod(parent.stat().st_mode | 0o001)
    folder.chmod(0o555)
    try:
        if root:
            os.seteuid(NOBODY)
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        for parent in closed:
            parent.chmod(parent.stat().st_mode & ~0o001)


# Success


def test_folder_appears_when_the_body_ends(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with atomic_folder(out) as folder:
        assert folder.parent == out.parent
        assert folder.name.startswith(".out-")
        write(folder, x="1")
        write(folder / "sub", y="2")
        assert not out.exists()
    assert contents(tmp_path) == {"a/b/out/x": "1", "a/b/out/sub/y": "2"}


def test_folder_is_an_ordinary_one(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out"):
        pass
    (tmp_path / "twin").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "twin").stat().st_mode


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with atomic_folder(str(out)) as folder:
        write(folder, x="1")
    assert contents(tmp_path) == {"out/x": "1"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["out", "./out", "sub/../out", "."])
def test_relative_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    if name == ".":
        (home / "sub").rmdir()
    monkeypatch.chdir(home)
    with atomic_folder(name) as folder:
        write(folder, x="1")
    assert contents(tmp_path) == {"home/x" if name == "." else "home/out/x": "1"}


def test_old_folder_is_replaced_whole_and_only_at_the_end(tmp_path: Path) -> None:
    out = write(tmp_path / "out", old="1", both="old")
    with atomic_folder(out, overwrite=True) as folder:
        assert contents(folder) == {}
        write(folder, new="2", both="new")
        assert contents(out) == {"old": "1", "both": "old"}
    assert contents(out) == {"new": "2", "both": "new"}
    assert os.listdir(tmp_path) == ["out"]


# Refusals before any work


def test_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    out = write(tmp_path / "out", old="1")
    with pytest.raises(OutputError, match=r"exists and is not empty; pass overwrite=True \(--overwrite\)"):
        check_output(out)
    with pytest.raises(OutputError, match="not empty"), atomic_folder(out):
        pytest.fail("the body ran")
    assert contents(tmp_path) == {"out/old": "1"}
    assert check_output(out, overwrite=True) == out


@pytest.mark.parametrize("overwrite", [False, True])
def test_file_is_refused(tmp_path: Path, overwrite: bool) -> None:
    write(tmp_path, file="1")
    with pytest.raises(OutputError, match="is a file; give a folder"):
        check_output(tmp_path / "file", overwrite=overwrite)
    with pytest.raises(OutputError, match="May not write.*Not a directory"):
        check_output(tmp_path / "file" / "out", overwrite=overwrite)
    assert contents(tmp_path) == {"file": "1"}


def test_mount_point_is_refused() -> None:
    with pytest.raises(OutputError, match="mount point"):
        check_output("/proc", overwrite=True)


def test_disk_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"GB free, the result needs 1000000000\.00 GB"):
        check_output(tmp_path / "out", needed_bytes=10**18)
    assert os.listdir(tmp_path) == []
    check_output(tmp_path / "out", needed_bytes=1)


def test_check_leaves_no_trace(tmp_path: Path) -> None:
    assert check_output(tmp_path / "a" / "out") == tmp_path / "a" / "out"
    assert os.listdir(tmp_path) == []


def test_forbidden_folder_is_refused(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    with unprivileged(locked):
        for out in (locked / "out", locked / "a" / "out"):
            with pytest.raises(OutputError, match="May not write.*Permission denied.*Choose a folder that you may"):
                check_output(out)
    assert os.listdir(locked) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder that this user may not even look into")
def test_invisible_folder_is_refused(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    with unprivileged(tmp_path):
        os.seteuid(0)
        hidden.chmod(0o700)
        os.seteuid(NOBODY)
        with pytest.raises(OutputError, match="May not write.*Permission denied"):
            check_output(hidden / "out")


# Failures while writing


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1), OSError(errno.EIO, "broken")])
@pytest.mark.parametrize("old", [{}, {"old": "1"}])
def test_failure_leaves_what_was_there(error: BaseException, old: dict[str, str], tmp_path: Path) -> None:
    out = write(tmp_path / "out", **old)
    with pytest.raises(type(error)) as caught, atomic_folder(out, overwrite=True) as folder:
        write(folder, new="2")
        raise error
    assert caught.value is error
    assert contents(tmp_path) == {f"out/{name}": text for name, text in old.items()}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "The disk filled up"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "The disk filled up"),
        (OSError(errno.EFBIG, "File too large"), "The disk filled up"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "The disk filled up"),
        (SafetensorError("I/O error: File too large (os error 27)"), "The disk filled up"),
        (RuntimeError("write failed: No space left on device"), "The disk filled up"),
        (Exception("No space left on device (os error 28)"), "The disk filled up"),
        (OSError(errno.EACCES, "Permission denied"), "May not write"),
        (OSError(errno.EPERM, "Operation not permitted"), "May not write"),
        (OSError(errno.EROFS, "Read-only file system"), "May not write"),
        (SafetensorError("I/O error: Read-only file system (os error 30)"), "May not write"),
    ],
    ids=str,
)
def test_full_and_forbidden_disks_are_explained(error: Exception, message: str, tmp_path: Path) -> None:
    out = write(tmp_path / "out", old="1")
    with pytest.raises(OutputError, match=f"{message}.*{out}") as caught, atomic_folder(out, overwrite=True) as folder:
        write(folder, new="2")
        raise error
    assert caught.value.__cause__ is error
    assert contents(tmp_path) == {"out/old": "1"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [SafetensorError("header too large"), RuntimeError("mat1 and mat2"), OSError("?")])
def test_other_errors_pass_as_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, atomic_folder(tmp_path / "out"):
        raise error
    assert caught.value is error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(errno.EBUSY, "busy"), KeyboardInterrupt()])
def test_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(tmp_path / "out", old="1")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if contents(self).get("new"):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(type(error)), atomic_folder(out, overwrite=True) as folder:
        write(folder, new="2")
    assert contents(tmp_path) == {"out/old": "1"}
    assert os.listdir(tmp_path) == ["out"]


def test_old_folder_that_cannot_be_moved_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write(tmp_path / "out", old="1")

    def fail(*_args: Path) -> None:
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="busy"), atomic_folder(out, overwrite=True) as folder:
        write(folder, new="2")
    assert contents(tmp_path) == {"out/old": "1"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a process's files")
def test_real_write_that_does_not_fit(tmp_path: Path) -> None:
    """`save_pretrained` runs into the system's own limit on the size of a file."""
    import resource

    out = write(tmp_path / "out", old="1")
    model = tiny_model("llama")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OutputError, match=f"The disk filled up while writing '{out}'"):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
            with atomic_folder(out, overwrite=True) as folder:
                model.save_pretrained(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == {"out/old": "1"}
    assert os.listdir(tmp_path) == ["out"]
