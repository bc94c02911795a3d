# SPDX-License-Identifier: Apache-2.0
"""Where the searches of one run keep what they have measured, and when that goes.

One folder for the run, a ledger for each search below it (`1-sleb`, `2-bip`, ...). It stays when the run is broken
off or fails with something measured, and goes when the run has brought its result to an end.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optimum.utils import logging

from .errors import ConfigurationError, NonFiniteError, OutputError
from .ledger import MANIFEST, Ledger


logger = logging.get_logger("optimum.blockprune.resuming")


class Resumption:
    """The ledgers of one run.

    Args:
        folder: Where they are; `None` to keep nothing.
        named: Whether the user named the folder: it is then an error if it cannot be made, and otherwise a warning.
    """

    def __init__(self, folder: Path | None = None, *, named: bool = False) -> None:
        self.folder = folder
        self.named = named
        self._ledgers: list[Ledger] = []
        self._made: list[Path] = []
        self._useless = False

    def ledger(self, number: int, strategy: str, fingerprint: Mapping[str, Any]) -> Ledger | None:
        """Opens the ledger of search `number`, counted from 1; `None` where nothing is kept.

        One that an earlier run has under this number is opened whatever its strategy, so that a difference is noticed.

        Raises:
            ResumeError: It belongs to another run, or another process has it.
            OutputError: The folder that the user named cannot be made.
        """
        if self.folder is None or self._useless:
            return None
        folder = self._place(number, strategy)
        try:
            ledger = Ledger.open(folder, fingerprint)
        except OutputError as error:
            if self.named:
                raise
            logger.warning(f"{error} The run goes on; if it is interrupted, it has to begin anew.")
            self._useless = True
            return None
        self._ledgers.append(ledger)
        if ledger.found:
            logger.info(f"Going on from '{folder}', which holds {ledger.found} finished measurements.")
        return ledger

    @property
    def used(self) -> bool:
        """Whether a search asked for its ledger and got it."""
        return bool(self._ledgers)

    def close(self) -> None:
        """Ends a run that was broken off: what was measured stays, for another one to go on from."""
        for ledger in self._ledgers:
            ledger.close()
        self._clear()
        if self.used and self.folder.exists():
            logger.info(f"What was measured is kept in '{self.folder}'; the same command goes on from there.")

    def remove(self) -> None:
        """Ends a run that has succeeded: nothing stays."""
        for ledger in self._ledgers:
            ledger.remove()
        self._clear()

    def _place(self, number: int, strategy: str) -> Path:
        if not self._made:
            self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()] or [self.folder]
        name = f"{number}-{re.sub(r'[^A-Za-z0-9_.-]', '-', strategy)}"
        earlier = sorted(self.folder.glob(f"{number}-*/{MANIFEST}"))
        return earlier[0].parent if earlier else self.folder / name

    def _clear(self) -> None:
        """Takes empty folders away: that of the run, and those above it that had to be made."""
        for path in self._made:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def resumption(
    resume_dir: str | Path | bool | Resumption | None, output: str | Path | None = None
) -> Iterator[Resumption]:
    """Yields where a run keeps its measurements; they go when the body succeeds or met NaN, and stay when it fails.

    Args:
        resume_dir: A folder; `False` for none; `None` for the default, a hidden folder beside `output`, or none
            without an output; `True` for that default, which must then exist. A `Resumption` is handed on as it is:
            its run goes on after the body.
        output: What the run writes.

    Raises:
        ConfigurationError: `resume_dir` is something else, or `True` without an output.
    """
    if isinstance(resume_dir, Resumption):
        yield resume_dir
        return
    made = Resumption(_folder(resume_dir, output), named=isinstance(resume_dir, (str, Path)))
    try:
        yield made
    except NonFiniteError:
        made.remove()  # what was measured is of no use, and the model has to change
        raise
    except BaseException:
        made.close()
        raise
    made.remove()
    if made.named and not made.used:
        logger.warning(f"Nothing was measured; resume_dir={str(resume_dir)!r} had no effect.")


def default_folder(output: str | Path) -> Path:
    """`.NAME.resume` beside an output of this name."""
    path = Path(os.path.abspath(output))
    return path.with_name(f".{path.name}.resume")


def _folder(resume_dir: str | Path | bool | None, output: str | Path | None) -> Path | None:
    if resume_dir is None or isinstance(resume_dir, bool):
        if resume_dir and output is None:
            raise ConfigurationError("resume_dir=True means a folder beside the output, and there is none: name it.")
        return None if output is None or resume_dir is False else default_folder(output)
    if not isinstance(resume_dir, (str, Path)) or not str(resume_dir):
        raise ConfigurationError(f"resume_dir must be the path of a folder, True or False, not {resume_dir!r}.")
    return Path(os.path.abspath(Path(resume_dir).expanduser()))
