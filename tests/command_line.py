# SPDX-License-Identifier: Apache-2.0
"""Runs command lines as `optimum-cli` does."""

from __future__ import annotations

from argparse import ArgumentParser

import pytest

from optimum_blockprune.commands import BlockPruneCommand


def run(*words: object) -> None:
    """Parses and runs a command line as `optimum-cli` does."""
    parser = ArgumentParser("optimum-cli")
    BlockPruneCommand(parser.add_subparsers())
    args = parser.parse_args(["blockprune", *map(str, words)])
    args.func(args).run()


def output(capsys: pytest.CaptureFixture, *words: object) -> str:
    """What a command prints on stdout."""
    capsys.readouterr()
    run(*words)
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture, *words: object) -> str:
    """The one line with which a command is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(*words)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and "Traceback" not in err
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    return line
