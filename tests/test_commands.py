# SPDX-License-Identifier: Apache-2.0
"""The flags of `optimum-cli blockprune`, what becomes of them, and the exit codes; not what the commands do."""

from __future__ import annotations

import subprocess
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from types import SimpleNamespace

import pytest

import optimum_blockprune
from optimum_blockprune.commands import BlockPruneCommand
from optimum_blockprune.errors import ConfigurationError, PlanError
from optimum_blockprune.flags import flag_of, given_fields, model_arguments
from optimum_blockprune.recipe import BUDGET_FIELDS, Recipe


COMMANDS = {
    "run": ["run", "-m", "MODEL", "OUT"],
    "plan": ["plan", "-m", "MODEL", "--output", "plan.json"],
    "apply": ["apply", "-m", "MODEL", "--plan", "plan.json", "OUT"],
    "evaluate": ["evaluate", "-m", "MODEL"],
    "strategies": ["strategies"],
}
CHECK_LIGHT = """
import argparse, sys
from optimum_blockprune.commands import BlockPruneCommand
BlockPruneCommand(argparse.ArgumentParser().add_subparsers())
heavy = {"torch", "transformers", "numpy", "datasets", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""


def parse(*words: str) -> Namespace:
    """Parses a command line below `optimum-cli`."""
    parser = ArgumentParser("optimum-cli")
    BlockPruneCommand(parser.add_subparsers())
    return parser.parse_args(["blockprune", *words])


def words_for(typed: dict[str, object]) -> list[str]:
    """Spells names and values as flags."""
    return [word for name, value in typed.items() for word in ("--" + name.replace("_", "-"), str(value))]


def run(*words: str) -> None:
    """Parses and runs a command line as `optimum-cli` does."""
    args = parse(*words)
    args.func(args).run()


@pytest.fixture
def shell(monkeypatch) -> SimpleNamespace:
    """Stands in for the module that does the work; records the calls."""
    fake = SimpleNamespace(calls=[])
    for name in COMMANDS:
        setattr(fake, name, lambda args, name=name: fake.calls.append((name, args)))
    monkeypatch.setattr(optimum_blockprune, "shell", fake, raising=False)
    return fake


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_calls_the_function_of_its_name(name, shell) -> None:
    run(*COMMANDS[name], "--json")
    ((called, args),) = shell.calls
    assert called == name
    assert args.json is True


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_given_that_was_not_typed(name) -> None:
    args = parse(*COMMANDS[name])
    assert given_fields(args) == {}
    assert model_arguments(args) == {}
    assert args.json is False


@pytest.mark.parametrize("name", ["run", "plan"])
def test_every_field_has_a_flag_that_reads_its_type(name) -> None:
    typed = {
        "strategy": "random",
        "num_blocks": 3,
        "unit": "half_block",
        "objective": "kl",
        "stack": "encoder",
        "dataset": "c4",
        "dataset_text_field": "body",
        "num_samples": 4,
        "seqlen": 64,
        "batch_size": 2,
        "seed": 5,
        "calibration_recipe": "sleb",
        "protect_first": 1,
        "protect_last": 2,
        "compensation": "ridge",
        "generated_samples": 7,
        "layout": "padded",
        "align": 16,
        "held_out_dataset": "wikitext2",
        "held_out_samples": 9,
    }
    words = [*words_for(typed), "--use-chat-template", "--strategy-option", "a=1", "--strategy-option", "b=x=y"]
    expected = {**typed, "use_chat_template": True, "strategy_options": {"a": "1", "b": "x=y"}}
    assert given_fields(parse(*COMMANDS[name], *words)) == expected
    others = {field.name for field in fields(Recipe)} - set(expected)
    assert others == {*BUDGET_FIELDS} - {"num_blocks"}
    for field in ("target_size_gb", "max_ppl_increase", "max_kl", "target_speedup"):
        assert given_fields(parse(*COMMANDS[name], flag_of(field), "1.5")) == {field: 1.5}
    assert given_fields(parse(*COMMANDS[name], "--sparsity", "0.25")) == {"sparsity": 0.25}
    assert given_fields(parse(*COMMANDS[name], "--target-params", "1000")) == {"target_params": 1000}
    assert given_fields(parse(*COMMANDS[name], "--no-use-chat-template")) == {"use_chat_template": False}


def test_model_flags() -> None:
    typed = {
        "gguf_file": "a.gguf",
        "revision": "r",
        "subfolder": "s",
        "token": "t",
        "dtype": "float32",
        "device_map": "cpu",
    }
    args = parse(*COMMANDS["run"], *words_for(typed), "--trust-remote-code", "--tokenizer", "T")
    assert (args.model, args.output, args.tokenizer) == ("MODEL", "OUT", "T")
    assert model_arguments(args) == {**typed, "trust_remote_code": True}


def test_the_other_flags_of_run() -> None:
    args = parse(*COMMANDS["run"])
    assert (args.blocks, args.config, args.verify, args.overwrite) == (None, None, "logits", False)
    args = parse(*COMMANDS["run"], "--blocks", "3,7, 8", "--config", "c.json", "--verify", "off", "--overwrite")
    assert (args.blocks, args.config, args.verify, args.overwrite) == ((3, 7, 8), "c.json", "off", True)


@pytest.mark.parametrize("name", ["run", "plan"])
def test_where_measurements_are_kept(name: str, capsys) -> None:
    assert parse(*COMMANDS[name]).resume_dir is None
    assert parse(*COMMANDS[name], "--resume-dir", "there").resume_dir == "there"
    assert parse(*COMMANDS[name], "--no-resume").resume_dir is False
    with pytest.raises(SystemExit):
        parse(*COMMANDS[name], "--no-resume", "--resume-dir", "there")
    assert "not allowed with" in capsys.readouterr().err


def test_the_other_flags_of_plan_apply_and_evaluate() -> None:
    assert parse(*COMMANDS["plan"]).output == "plan.json"
    args = parse(*COMMANDS["apply"], "--verify", "keys")
    assert (args.plan, args.output, args.verify, args.overwrite) == ("plan.json", "OUT", "keys", False)
    args = parse(*COMMANDS["evaluate"])
    assert (args.baseline, args.kl, args.stride, args.prompt) == (None, False, None, None)
    words = ["--baseline", "B", "--kl", "--stride", "8", "--prompt", "Hi", "--dataset", "c4", "--seqlen", "16"]
    args = parse(*COMMANDS["evaluate"], *words)
    assert (args.baseline, args.kl, args.stride, args.prompt) == ("B", True, 8, "Hi")
    assert given_fields(args) == {"dataset": "c4", "seqlen": 16}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "OUT"], "required: -m/--model"),
        (["run", "-m", "M"], "required: OUTPUT"),
        (["plan", "-m", "M"], "required: -o/--output"),
        (["apply", "-m", "M", "OUT"], "required: --plan"),
        ([*COMMANDS["run"], "--sparsity", "0.2", "--num-blocks", "3"], "not allowed with argument --sparsity"),
        ([*COMMANDS["run"], "--sparsity", "0.2", "--blocks", "3"], "not allowed with argument --sparsity"),
        ([*COMMANDS["run"], "--blocks", "3;4"], "'3;4' is neither a block ('4') nor a half of one"),
        ([*COMMANDS["run"], "--strategy-option", "fast"], "expected key=value, not 'fast'"),
        ([*COMMANDS["run"], "--num-samples", "few"], "invalid int value: 'few'"),
        ([*COMMANDS["run"], "--calibration-recipe", "x"], "invalid choice: 'x'"),
        ([*COMMANDS["run"], "--verify", "maybe"], "invalid choice: 'maybe'"),
    ],
)
def test_a_wrong_command_line_exits_with_2(words, message, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_an_option_given_twice_is_refused() -> None:
    args = parse(*COMMANDS["run"], "--strategy-option", "a=1", "--strategy-option", "a=2")
    with pytest.raises(ConfigurationError, match="--strategy-option names an option twice: a, a"):
        given_fields(args)


def test_a_wrong_request_exits_with_2_and_one_paragraph(shell, capsys) -> None:
    def refuse(args) -> None:
        raise PlanError("The plan\n  is malformed.")

    shell.apply = refuse
    with pytest.raises(SystemExit) as caught:
        run(*COMMANDS["apply"])
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "error: The plan is malformed.\n")


def test_an_interruption_exits_with_1(shell, capsys) -> None:
    def interrupt(args) -> None:
        raise KeyboardInterrupt

    shell.run = interrupt
    with pytest.raises(SystemExit) as caught:
        run(*COMMANDS["run"])
    assert caught.value.code == 1
    assert capsys.readouterr().err == "interrupted; no result was written\n"


def test_other_errors_keep_their_traceback(shell) -> None:
    def fail(args) -> None:
        raise ZeroDivisionError

    shell.run = fail
    with pytest.raises(ZeroDivisionError):
        run(*COMMANDS["run"])


def test_help_shows_every_field_with_its_default(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "2000")
    with pytest.raises(SystemExit):
        parse("run", "--help")
    text = capsys.readouterr().out
    assert text.index("Required arguments:") < text.index("Optional arguments:")
    for field in fields(Recipe):
        default = "" if field.default is None else f" (default: {field.default})"
        assert field.metadata["help"] + default in text


def test_without_a_command_the_help_is_printed(capsys) -> None:
    run()
    assert "{run,plan,apply,mix,heal,evaluate,check,push,report,strategies}" in capsys.readouterr().out


def test_the_parser_is_built_without_heavy_libraries() -> None:
    subprocess.run([sys.executable, "-c", CHECK_LIGHT], check=True)
