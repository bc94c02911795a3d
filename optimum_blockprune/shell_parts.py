# SPDX-License-Identifier: Apache-2.0
"""What several commands of the shell do alike: loading, showing progress, writing, printing."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optimum.utils import logging

from .config import BlockPruningConfig
from .errors import OutputError
from .flags import model_arguments
from .pruner import BlockPruner
from .team import Team


def load_pruner(args: Namespace, config: BlockPruningConfig) -> BlockPruner:
    """The model that a command names, as it says to load it."""
    return BlockPruner.from_pretrained(args.model, config, args.tokenizer, **model_arguments(args))


@contextmanager
def writing(path: str | Path, what: str = "The plan") -> Iterator[None]:
    """Explains why something cannot be written."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{what} cannot be written to '{path}': {error}.") from error


def show_progress() -> None:
    """The command line shows what the library only logs; the handler writes to stderr."""
    if Team.current().is_first:
        logging.set_verbosity_info()


def print_result(args: Namespace, result: dict[str, Any], text: str) -> None:
    """Prints a result for people, or with `--json` for programs."""
    sys.stdout.write((json.dumps(result, indent=2) if args.json else text) + "\n")
