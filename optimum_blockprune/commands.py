# SPDX-License-Identifier: Apache-2.0
"""`optimum-cli blockprune`: the commands, and nothing that is slow to import.

Optimum imports this module at each start of `optimum-cli`. The work is in `shell`, which is imported when a command
runs.
"""

from __future__ import annotations

import argparse
import sys
from argparse import ArgumentParser, Namespace

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .errors import BlockPruningError, DistributedError
from .flags import (
    EVALUATE_HELP,
    MODEL_FLAGS,
    RECIPE,
    TEXT_FIELDS,
    add_budgets,
    add_field,
    add_healing,
    add_json,
    add_loading,
    add_model,
    add_output,
    add_recipe,
    add_resuming,
    add_tasks,
    add_width,
    add_writing,
    flag_of,
    groups,
    number_list,
    unit_list,
)
from .interrupts import terminable
from .processes import first_says_the_same, run_with_others


# Commands whose work the processes of a launcher share; of the others the first process does all.
_SHARED = ("mix", "plan", "run")


def run_guarded(command: str, args: Namespace) -> None:
    """Runs the function `command` of `shell` and turns its outcome into an exit code.

    0: done; 2: the request is wrong, one paragraph on stderr says why; 1: interrupted, another process failed, or a
    traceback.
    """

    def work() -> None:
        from . import shell  # brings torch and transformers

        getattr(shell, command)(args)

    try:
        with terminable():
            run_with_others(work, args, shared=command in _SHARED)
    except BlockPruningError as error:
        if not first_says_the_same(error):
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(1 if isinstance(error, DistributedError) else 2) from error
    except KeyboardInterrupt as error:
        sys.stderr.write(f"{str(error) or 'interrupted'}; no result was written\n")
        raise SystemExit(1) from None


class ShellCommand(BaseOptimumCLICommand):
    """A command whose work is the function of the same name in `shell`."""

    def run(self) -> None:
        """Runs the command."""
        run_guarded(self.COMMAND.name, self.args)


class RunCommand(ShellCommand):
    """Chooses blocks, removes them and writes the pruned model."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declares the flags."""
        required, optional = groups(parser)
        add_model(required)
        add_output(required)
        add_budgets(optional).add_argument(
            "--blocks",
            type=unit_list,
            metavar="I,J,...",
            help="Remove exactly these blocks, counted from 0, without data and without a search; 4.mlp,5.attention "
            "are halves of blocks, and what is left must make up blocks.",
        )
        add_recipe(optional)
        add_resuming(optional)
        add_loading(optional)
        add_writing(optional)
        optional.add_argument(
            "--eval-dataset",
            metavar="DATASET",
            help="Held-out text (as for --dataset): measure the model on it before and after, for report and card.",
        )
        optional.add_argument(
            "--eval-samples", type=int, metavar="N", help="Windows of --eval-dataset to score (default: all of them)."
        )
        add_tasks(optional)
        optional.add_argument(
            "--export",
            type=number_list,
            metavar="N,M,...",
            help="Write one checkpoint for each of these numbers of removed blocks, OUTPUT/removed-N, from one search "
            "(whose budget is the largest of them unless another one is given).",
        )
        optional.add_argument(
            "--curve",
            action="store_true",
            help="Measure every depth on --eval-dataset, from dense to pruned, for table and picture.",
        )
        add_json(optional)


class PlanCommand(ShellCommand):
    """Chooses blocks and writes the plan; changes no model."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declares the flags."""
        required, optional = groups(parser)
        add_model(required)
        required.add_argument("-o", "--output", required=True, metavar="FILE", help="Where to write the plan (JSON).")
        add_budgets(optional)
        add_recipe(optional)
        add_resuming(optional)
        add_loading(optional)
        add_json(optional)


class ApplyCommand(ShellCommand):
    """Applies a saved plan to the files of a model; needs no data and never holds the whole model in memory."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declares the flags."""
        required, optional = groups(parser)
        add_model(required)
        required.add_argument(
            "--plan", required=True, metavar="PLAN", help="Plan file, or folder that holds pruning_plan.json."
        )
        add_output(required)
        add_loading(optional)
        add_writing(optional, verify="keys")
        add_json(optional)


class MixCommand(ShellCommand):
    """Splits a budget between depth and width by what held-out text says, and writes the pruned model."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declares the flags."""
        required, optional = groups(parser)
        add_model(required)
        required.add_argument(
            "--target-params", type=int, required=True, metavar="N", help=RECIPE["target_params"].metadata["help"]
        )
        add_output(required)
        add_recipe(optional)
        add_width(optional)
        add_resuming(optional)
        add_loading(optional)
        add_writing(optional)
        add_json(optional)


class HealCommand(ShellCommand):
    """Trains a pruned model a little, so that some of its quality returns, and writes the result."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declares the flags."""
        required, optional = groups(parser)
        add_model(required)
        required.add_argument(
            "--dataset",
            required=True,
            metavar="DATASET",
            help="Text to train on: wikitext2, c4, alpaca, or the path of a .txt, .jsonl or .parquet file.",
        )
        add_output(required)
        add_healing(optional)
        add_resuming(optional)
        add_loading(optional)
        add_writing(optional)
        add_json(optional)


class EvaluateCommand(ShellCommand):
    """Measures perplexity, size and speed of a model, alone or beside the dense one."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declares the flags."""
        required, optional = groups(parser)
        add_model(required)
        optional.add_argument("--baseline", metavar="MODEL", help="Model to compare with, usually the dense one.")
        optional.add_argument(
            "--kl", action="store_true", help="Also measure the mean KL divergence from the baseline, token by token."
        )
        for name in TEXT_FIELDS:
            add_field(optional, RECIPE[name], text=EVALUATE_HELP.get(name))
        optional.add_argument(
            "--stride", type=int, metavar="N", help="Tokens between the starts of two windows (default: seqlen)."
        )
        optional.add_argument(
            "--continuations",
            type=int,
            default=20,
            metavar="N",
            help="Windows of the text to continue greedily, to see whether the model repeats itself; 0 for none "
            "(default: %(default)s).",
        )
        add_tasks(optional)
        optional.add_argument("--prompt", help="Also show what the model writes after this text.")
        optional.add_argument(
            "--write-report",
            action="store_true",
            help="Add the figures to report, card and pictures of MODEL, a pruned folder; those of --baseline as the "
            "dense model's.",
        )
        add_loading(optional)
        add_json(optional)


class CheckCommand(ShellCommand):
    """Says what can be removed from a model and which runtimes read the result alike, from the configuration alone."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declares the flags."""
        required, optional = groups(parser)
        add_model(required)
        add_field(optional, RECIPE["stack"])
        optional.add_argument(
            "--blocks", type=number_list, metavar="I,J,...", help="Ask about removing exactly these blocks."
        )
        for name in ("revision", "subfolder", "token", "trust_remote_code"):
            optional.add_argument(flag_of(name), default=argparse.SUPPRESS, **MODEL_FLAGS[name])
        add_json(optional)


class PushCommand(ShellCommand):
    """Uploads a pruned folder to the Hub, in one commit."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declares the flags."""
        required, optional = groups(parser)
        required.add_argument("folder", metavar="FOLDER", help="Output folder of a pruning run.")
        required.add_argument("repo_id", metavar="REPO_ID", help="Repository, as name or owner/name; made if needed.")
        optional.add_argument(
            "--private", action="store_true", default=None, help="Make a new repository visible to its owner only."
        )
        optional.add_argument("--create-pr", action="store_true", help="Open a pull request instead of committing.")
        optional.add_argument("--revision", help="Branch to commit to; made if needed.")
        optional.add_argument("--commit-message", metavar="TEXT", help="First line of the commit.")
        optional.add_argument("--commit-description", metavar="TEXT", help="Further lines of the commit.")
        optional.add_argument("--token", help=MODEL_FLAGS["token"]["help"])
        optional.add_argument(
            "--overwrite", action="store_true", help="Replace what is there, even a model of another base."
        )
        add_json(optional)


class ReportCommand(ShellCommand):
    """Draws the pictures of a pruned folder and writes its report as one HTML page, from its report alone."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declares the flags."""
        required, optional = groups(parser)
        required.add_argument("folder", metavar="FOLDER", help="Folder with pruning_report.json, or that file.")
        optional.add_argument(
            "-o",
            "--output",
            metavar="FOLDER",
            help="Where to write (default: beside the report, where an unedited card follows as well).",
        )
        add_json(optional)


class StrategiesCommand(ShellCommand):
    """Lists the installed strategies, one line each."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declares the flags."""
        add_json(parser.add_argument_group("Optional arguments"))


def _info(name: str, command: type[ShellCommand]) -> CommandInfo:
    """Describes a command by its docstring."""
    return CommandInfo(name=name, help=command.__doc__, subcommand_class=command)


class BlockPruneCommand(BaseOptimumCLICommand):
    """Removes transformer blocks from models."""

    COMMAND = CommandInfo(name="blockprune", help=__doc__)
    SUBCOMMANDS = (
        _info("run", RunCommand),
        _info("plan", PlanCommand),
        _info("apply", ApplyCommand),
        _info("mix", MixCommand),
        _info("heal", HealCommand),
        _info("evaluate", EvaluateCommand),
        _info("check", CheckCommand),
        _info("push", PushCommand),
        _info("report", ReportCommand),
        _info("strategies", StrategiesCommand),
    )
