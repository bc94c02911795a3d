# SPDX-License-Identifier: Apache-2.0
"""`optimum-cli blockprune`: the flags, and nothing that is slow to import.

Optimum imports this module at each start of `optimum-cli`. The work is in `shell`, which is imported when a command
runs. A flag that was not given leaves no trace in the parsed arguments, so that a saved configuration (`--config`) is
overridden by what was typed and by nothing else; `given_fields` and `model_arguments` collect what was.
"""

from __future__ import annotations

import argparse
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import Field, fields
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .errors import BlockPruningError, ConfigurationError
from .recipe import BUDGET_FIELDS, Recipe


VERIFY_CHOICES = ("logits", "keys", "off")
_TEXT_FIELDS = ("dataset", "dataset_text_field", "num_samples", "seqlen", "batch_size", "seed", "use_chat_template")

# Where a field means something else to `evaluate` than to a search.
_EVALUATE_HELP = {"num_samples": "Number of windows of text (default: all of them)."}

_RECIPE = {field.name: field for field in fields(Recipe)}
_TYPES = {"int": int, "float": float}

# Flags that are passed on when a model is loaded; their names are the keyword arguments of `from_pretrained`.
_MODEL_FLAGS: dict[str, dict[str, Any]] = {
    "gguf_file": {"metavar": "FILE", "help": "Name of a GGUF file inside the folder or repository MODEL."},
    "revision": {"help": "Branch, tag or commit of the repository."},
    "subfolder": {"help": "Folder of the repository that holds the model."},
    "token": {"help": "Token for private repositories; by default the one that `hf auth login` stored."},
    "dtype": {"help": "Data type to load the weights in, such as float32 or bfloat16; by default that of the files."},
    "device_map": {"help": "Where to put the weights: cpu, cuda, auto, ..."},
    "trust_remote_code": {
        "action": "store_true",
        "help": "Run model code that comes with the repository. Read it first.",
    },
}


def given_fields(args: Namespace) -> dict[str, Any]:
    """Returns the configuration fields that were typed, by name.

    Raises:
        ConfigurationError: A strategy option was given twice.
    """
    given = {name: getattr(args, name) for name in _RECIPE if hasattr(args, name)}
    if "strategy_options" in given:
        pairs = given["strategy_options"]
        given["strategy_options"] = dict(pairs)
        if len(given["strategy_options"]) < len(pairs):
            raise ConfigurationError(f"--strategy-option names an option twice: {', '.join(key for key, _ in pairs)}.")
    return given


def model_arguments(args: Namespace) -> dict[str, Any]:
    """Returns the typed keyword arguments of `from_pretrained`, by name."""
    return {name: getattr(args, name) for name in _MODEL_FLAGS if hasattr(args, name)}


def run_guarded(command: str, args: Namespace) -> None:
    """Runs the function `command` of `shell` and turns its outcome into an exit code.

    0: done; 2: the request is wrong, one paragraph on stderr says why; 1: interrupted, or a traceback.
    """
    try:
        from . import shell  # brings torch and transformers

        getattr(shell, command)(args)
    except BlockPruningError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing was written\n")
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
        required, optional = _groups(parser)
        _add_model(required)
        _add_output(required)
        _add_budgets(optional).add_argument(
            "--blocks",
            type=_block_list,
            metavar="I,J,...",
            help="Remove exactly these blocks, counted from 0, without data and without a search.",
        )
        _add_recipe(optional)
        _add_loading(optional)
        _add_writing(optional)
        optional.add_argument(
            "--eval-dataset",
            metavar="DATASET",
            help="Held-out text (as for --dataset): measure the model on it before and after, for report and card.",
        )
        _add_json(optional)


class PlanCommand(ShellCommand):
    """Chooses blocks and writes the plan; changes no model."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declares the flags."""
        required, optional = _groups(parser)
        _add_model(required)
        required.add_argument("-o", "--output", required=True, metavar="FILE", help="Where to write the plan (JSON).")
        _add_budgets(optional)
        _add_recipe(optional)
        _add_loading(optional)
        _add_json(optional)


class ApplyCommand(ShellCommand):
    """Applies a saved plan to the files of a model; needs no data and never holds the whole model in memory."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declares the flags."""
        required, optional = _groups(parser)
        _add_model(required)
        required.add_argument(
            "--plan", required=True, metavar="PLAN", help="Plan file, or folder that holds pruning_plan.json."
        )
        _add_output(required)
        _add_loading(optional)
        _add_writing(optional, verify="keys")
        _add_json(optional)


class EvaluateCommand(ShellCommand):
    """Measures perplexity, size and speed of a model, alone or beside the dense one."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declares the flags."""
        required, optional = _groups(parser)
        _add_model(required)
        optional.add_argument("--baseline", metavar="MODEL", help="Model to compare with, usually the dense one.")
        optional.add_argument(
            "--kl", action="store_true", help="Also measure the mean KL divergence from the baseline, token by token."
        )
        for name in _TEXT_FIELDS:
            _add_field(optional, _RECIPE[name], text=_EVALUATE_HELP.get(name))
        optional.add_argument(
            "--stride", type=int, metavar="N", help="Tokens between the starts of two windows (default: seqlen)."
        )
        optional.add_argument("--prompt", help="Also show what the model writes after this text.")
        _add_loading(optional)
        _add_json(optional)


class CheckCommand(ShellCommand):
    """Says what can be removed from a model and which runtimes read the result alike, from the configuration alone."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declares the flags."""
        required, optional = _groups(parser)
        _add_model(required)
        _add_field(optional, _RECIPE["stack"])
        optional.add_argument(
            "--blocks", type=_block_list, metavar="I,J,...", help="Ask about removing exactly these blocks."
        )
        for name in ("revision", "subfolder", "token", "trust_remote_code"):
            optional.add_argument(_flag(name), default=argparse.SUPPRESS, **_MODEL_FLAGS[name])
        _add_json(optional)


class StrategiesCommand(ShellCommand):
    """Lists the installed strategies, one line each."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declares the flags."""
        _add_json(parser.add_argument_group("Optional arguments"))


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
        _info("evaluate", EvaluateCommand),
        _info("check", CheckCommand),
        _info("strategies", StrategiesCommand),
    )


def _groups(parser: ArgumentParser) -> tuple[Any, Any]:
    """Returns the two groups of flags that every Optimum command has."""
    return parser.add_argument_group("Required arguments"), parser.add_argument_group("Optional arguments")


def _add_model(group: Any) -> None:
    """Declares the model."""
    group.add_argument("-m", "--model", required=True, help="Repository on the Hub, local folder, or .gguf file.")


def _add_output(group: Any) -> None:
    """Declares the output folder."""
    group.add_argument("output", metavar="OUTPUT", help="Folder for the pruned model.")


def _add_loading(group: Any) -> None:
    """Declares how the model is loaded."""
    for name, settings in _MODEL_FLAGS.items():
        group.add_argument(_flag(name), default=argparse.SUPPRESS, **settings)
    group.add_argument(
        "--tokenizer", metavar="MODEL", help="Repository or folder of the tokenizer (default: that of the model)."
    )


def _add_writing(group: Any, *, verify: str = "logits") -> None:
    """Declares how the output folder is checked and written."""
    group.add_argument(
        "--verify",
        choices=VERIFY_CHOICES,
        default=verify,
        help="Proof before the folder appears: 'logits' reloads the result and compares it with the dense model, "
        "'keys' checks names and shapes only, for models too large to load twice (default: %(default)s).",
    )
    group.add_argument("--overwrite", action="store_true", help="Replace an output folder that is not empty.")


def _add_json(group: Any) -> None:
    """Declares output for programs."""
    group.add_argument("--json", action="store_true", help="Print the result as JSON on stdout.")


def _add_budgets(group: Any) -> Any:
    """Declares the budgets and returns their group, of which one flag may be given."""
    budgets = group.add_mutually_exclusive_group()
    for name in BUDGET_FIELDS:
        _add_field(budgets, _RECIPE[name])
    return budgets


def _add_recipe(group: Any) -> None:
    """Declares the saved configuration and one flag for every field that is no budget."""
    for name, field in _RECIPE.items():
        if name not in BUDGET_FIELDS:
            _add_field(group, field)
    group.add_argument(
        "--config", metavar="FILE", help="Saved configuration (file, folder or repository); flags override its fields."
    )


def _add_field(group: Any, field: Field[Any], *, text: str | None = None) -> None:
    """Declares the flag of one configuration field; `text` replaces its help."""
    flag, settings = _flag(field.name), {"type": _TYPES.get(field.type.removesuffix(" | None"), str)}
    if field.type == "bool":
        settings = {"action": BooleanOptionalAction}  # --no-... switches off what a saved configuration switches on
    elif field.name == "strategy_options":
        flag, settings = "--strategy-option", {"action": "append", "type": _option, "metavar": "KEY=VALUE"}
    elif "choices" in field.metadata:
        settings["choices"] = field.metadata["choices"]
    if text is None:
        default = "" if field.default is None else f" (default: {field.default})"
        text = field.metadata["help"] + default
    # argparse reads a percent sign as the start of a placeholder
    group.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **settings)


def _flag(name: str) -> str:
    """Spells a field as a flag."""
    return "--" + name.replace("_", "-")


def _block_list(text: str) -> tuple[int, ...]:
    """Reads `3,7,8`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected block numbers such as 3,7,8, not {text!r}") from None


def _option(text: str) -> tuple[str, str]:
    """Reads `key=value`."""
    key, separator, value = text.partition("=")
    if not (key and separator):
        raise argparse.ArgumentTypeError(f"expected key=value, not {text!r}")
    return key, value
