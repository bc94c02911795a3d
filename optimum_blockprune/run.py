# SPDX-License-Identifier: Apache-2.0
"""`python -m optimum_blockprune.run`: the same as `optimum-cli blockprune run`, for launchers that start a module.

    accelerate launch --num_processes 4 -m optimum_blockprune.run -m MODEL --strategy sleb ... OUTPUT
    torchrun --nproc_per_node 4 -m optimum_blockprune.run -m MODEL --strategy sleb ... OUTPUT

Output and exit codes are those of the command; of several processes only the first writes and prints results.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from .commands import RunCommand, run_guarded
from .processes import silence_others


def main(words: Sequence[str] | None = None) -> None:
    """Parses the words of a command line (by default those of this process) and runs them."""
    parser = ArgumentParser("python -m optimum_blockprune.run", description=RunCommand.__doc__)
    RunCommand.parse_args(parser)
    with silence_others():
        args = parser.parse_args(words)
    run_guarded("run", args)


if __name__ == "__main__":
    main()
