# SPDX-License-Identifier: Apache-2.0
"""The flags that several commands share.

A flag that was not given leaves no trace in the parsed arguments, so that a saved configuration (`--config`) is
overridden by what was typed and by nothing else; `given_fields` and `model_arguments` collect what was.
"""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Sequence
from dataclasses import Field, fields
from typing import Any

from .errors import ConfigurationError, PlanError
from .half import read_units
from .healing_spec import HealingSpec
from .recipe import BUDGET_FIELDS, Recipe


VERIFY_CHOICES = ("logits", "keys", "off")
TEXT_FIELDS = ("dataset", "dataset_text_field", "num_samples", "seqlen", "batch_size", "seed", "use_chat_template")

# Where a field means something else to `evaluate` than to a search.
EVALUATE_HELP = {"num_samples": "Number of windows of text (default: all of them)."}

RECIPE = {field.name: field for field in fields(Recipe)}
_TYPES = {"int": int, "float": float}

# Flags that are passed on when a model is loaded; their names are the keyword arguments of `from_pretrained`.
MODEL_FLAGS: dict[str, dict[str, Any]] = {
    "gguf_file": {"metavar": "FILE", "help": "Name of a GGUF file inside the folder or repository MODEL."},
    "revision": {"help": "Branch, tag or commit of the repository."},
    "subfolder": {"help": "Folder of the repository that holds the model."},
    "token": {"help": "Token for private repositories; by default the one that `hf auth login` stored."},
    "dtype": {"help": "Data type to load the weights in, such as float32 or bfloat16; by default that of the files."},
    "device_map": {"help": "Where to put the weights: cpu, cuda, auto, ..."},
    "stream": {
        "action": "store_true",
        "help": "Leave the blocks in their safetensors files, read one at a time: for models larger than memory.",
    },
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
    given = {name: getattr(args, name) for name in RECIPE if hasattr(args, name)}
    if "strategy_options" in given:
        given["strategy_options"] = named_options("--strategy-option", given["strategy_options"])
    return given


def named_options(flag: str, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Options by name.

    Raises:
        ConfigurationError: One was given twice.
    """
    options = dict(pairs)
    if len(options) < len(pairs):
        raise ConfigurationError(f"{flag} names an option twice: {', '.join(key for key, _ in pairs)}.")
    return options


def given_settings(args: Namespace) -> dict[str, Any]:
    """Returns the settings of healing that were typed, by name."""
    return {each.name: getattr(args, each.name) for each in fields(HealingSpec) if hasattr(args, each.name)}


def model_arguments(args: Namespace) -> dict[str, Any]:
    """Returns the typed keyword arguments of `from_pretrained`, by name."""
    return {name: getattr(args, name) for name in MODEL_FLAGS if hasattr(args, name)}


def groups(parser: ArgumentParser) -> tuple[Any, Any]:
    """Returns the two groups of flags that every Optimum command has."""
    return parser.add_argument_group("Required arguments"), parser.add_argument_group("Optional arguments")


def add_model(group: Any) -> None:
    """Declares the model."""
    group.add_argument("-m", "--model", required=True, help="Repository on the Hub, local folder, or .gguf file.")


def add_output(group: Any) -> None:
    """Declares the output folder."""
    group.add_argument("output", metavar="OUTPUT", help="Folder for the pruned model.")


def add_loading(group: Any) -> None:
    """Declares how the model is loaded."""
    for name, settings in MODEL_FLAGS.items():
        group.add_argument(flag_of(name), default=argparse.SUPPRESS, **settings)
    group.add_argument(
        "--tokenizer", metavar="MODEL", help="Repository or folder of the tokenizer (default: that of the model)."
    )


def add_writing(group: Any, *, verify: str = "logits") -> None:
    """Declares how the output folder is checked and written."""
    group.add_argument(
        "--verify",
        choices=VERIFY_CHOICES,
        default=verify,
        help="Proof before the folder appears: 'logits' reloads the result and compares it with the dense model, "
        "'keys' checks names and shapes only, for models too large to load twice (default: %(default)s).",
    )
    group.add_argument("--overwrite", action="store_true", help="Replace an output folder that is not empty.")


def add_width(group: Any) -> None:
    """Declares what a split between depth and width needs besides the configuration of the depth."""
    group.add_argument(
        "--width-strategy",
        default="bip",
        metavar="NAME",
        help="Strategy that removes channels or heads, on the same text; --layout and --align are for it (default: "
        "%(default)s).",
    )
    group.add_argument(
        "--width-option",
        action="append",
        type=_option,
        metavar="KEY=VALUE",
        help="Option of the width strategy (default, of bip: families=mlp reduction=l2).",
    )
    group.add_argument(
        "--counts",
        type=number_list,
        metavar="N,M,...",
        help="Numbers of removed blocks to try (default: up to five, from none to as many as reach the target alone).",
    )


def add_resuming(group: Any) -> None:
    """Declares where finished measurements are kept."""
    choice = group.add_mutually_exclusive_group()
    choice.add_argument(
        "--resume-dir",
        metavar="DIR",
        help="Folder where finished measurements are kept until the result is there (default: .OUTPUT.resume, beside "
        "OUTPUT). After a crash, the same command goes on from there.",
    )
    choice.add_argument(
        "--no-resume",
        action="store_const",
        const=False,
        dest="resume_dir",
        help="Keep nothing, and use nothing that an interrupted run has left.",
    )


def add_healing(group: Any) -> None:
    """Declares the text and one flag for every setting of healing."""
    for setting in fields(HealingSpec):
        if setting.name == "target_modules":
            group.add_argument(
                "--target-modules",
                type=_name_list,
                default=argparse.SUPPRESS,
                metavar="NAME,...",
                help=setting.metadata["help"],
            )
        else:
            add_field(group, setting)
    group.add_argument(
        "--teacher",
        metavar="MODEL",
        help="The dense model that --method distill learns from (default: the one that was pruned, if it is at hand).",
    )


def add_tasks(group: Any) -> None:
    """Declares benchmark tasks; needs the extra `eval`."""
    group.add_argument(
        "--tasks",
        type=_name_list,
        metavar="TASK,...",
        help="Benchmark tasks: names of lm-eval, or files and folders of ready log-likelihood requests, which need no "
        "network. Needs: pip install 'optimum-blockprune[eval]'.",
    )
    group.add_argument("--limit", type=int, metavar="N", help="Questions of each task (default: all).")
    group.add_argument(
        "--num-fewshot", type=int, metavar="N", help="Solved examples before each question (default: the task's own)."
    )


def add_json(group: Any) -> None:
    """Declares output for programs."""
    group.add_argument("--json", action="store_true", help="Print the result as JSON on stdout.")


def add_budgets(group: Any) -> Any:
    """Declares the budgets and returns their group, of which one flag may be given."""
    budgets = group.add_mutually_exclusive_group()
    for name in BUDGET_FIELDS:
        add_field(budgets, RECIPE[name])
    return budgets


def add_recipe(group: Any) -> None:
    """Declares the saved configuration and one flag for every field that is no budget."""
    for name, field in RECIPE.items():
        if name not in BUDGET_FIELDS:
            add_field(group, field)
    group.add_argument(
        "--config", metavar="FILE", help="Saved configuration (file, folder or repository); flags override its fields."
    )


def add_field(group: Any, field: Field[Any], *, text: str | None = None) -> None:
    """Declares the flag of one configuration field; `text` replaces its help."""
    flag, settings = flag_of(field.name), {"type": _TYPES.get(field.type.removesuffix(" | None"), str)}
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


def flag_of(name: str) -> str:
    """Spells a field as a flag."""
    return "--" + name.replace("_", "-")


def number_list(text: str) -> tuple[int, ...]:
    """Reads `3,7,8`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 3,7,8, not {text!r}") from None


def unit_list(text: str) -> tuple[int | str, ...]:
    """Reads `3,7,8`, or `3,4.mlp,5.attention`."""
    try:
        return tuple(unit if isinstance(unit, int) else str(unit) for unit in read_units(text.split(",")))
    except PlanError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _option(text: str) -> tuple[str, str]:
    """Reads `key=value`."""
    key, separator, value = text.partition("=")
    if not (key and separator):
        raise argparse.ArgumentTypeError(f"expected key=value, not {text!r}")
    return key, value


def _name_list(text: str) -> tuple[str, ...]:
    """Reads `arc_easy,piqa`."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
