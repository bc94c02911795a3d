# SPDX-License-Identifier: Apache-2.0
"""The command in a card: parsed by the real parser it is the configuration, and run it makes the same checkpoint."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import TEXTS, assert_same_weights, config, text, toy_folder, toy_pruner
from transformers import AutoModelForCausalLM

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan
from optimum_blockprune.commands import BlockPruneCommand
from optimum_blockprune.flags import given_fields, model_arguments
from optimum_blockprune.recipe import Recipe
from optimum_blockprune.reproduce import PLACEHOLDER, apply_command, command_for


COMMIT = "93efa2f097d58c2a74874c7e644dbc9b0cee75a2"


def words_of(command: str) -> list[str]:
    """The words that a shell makes of a line."""
    return shlex.split(command.replace("\\\n", " "))


def parsed(command: str) -> Namespace:
    program, *words = words_of(command)
    assert program == "optimum-cli" and all(len(line) <= 100 for line in command.splitlines())
    parser = ArgumentParser("optimum-cli")
    BlockPruneCommand(parser.add_subparsers())
    return parser.parse_args(words)


def made_with(given: BlockPruningConfig, **changed: Any) -> PruningPlan:
    """A plan that says of itself that it was made with a configuration."""
    recipe = given.recipe
    source = {"wikitext2": "wikitext2 (Salesforce/wikitext, wikitext-2-raw-v1, train)"}.get(
        recipe.dataset, str(recipe.dataset)
    )
    calibration = {"source": source, "seqlen": min(recipe.seqlen, 512), "recipe": recipe.calibration_recipe}
    own = {"generated_samples": recipe.generated_samples} if recipe.generated_samples else {}
    fitted = {"asked": recipe.compensation, **own}
    known = {
        "strategy": recipe.strategy,
        "requested": recipe.requested,
        "options": dict(recipe.strategy_options or {}),
        "seed": recipe.seed,
        "stack": recipe.stack or "decoder",
        "calibration": calibration if recipe.dataset else None,
        "base_model": "org/dense",
        "details": {
            **({"unit": recipe.unit} if recipe.unit == "half_block" else {}),
            **({"objective": recipe.objective} if recipe.objective else {}),
            **({"compensation": fitted} if recipe.compensation != "none" else {}),
        },
    }
    return PruningPlan.from_removed("llama", 6, [4, 1], **{**known, **changed})


FIELDS: dict[str, list[dict[str, Any]]] = {
    "strategy": [{"strategy": "shortgpt"}],
    "sparsity": [{"sparsity": 0.07}, {"sparsity": 1e-05}],
    "num_blocks": [{"num_blocks": 3}],
    "target_params": [{"target_params": 100_000_000}],
    "target_size_gb": [{"target_size_gb": 0.25}, {"target_size_gb": 1e-05}],
    "max_ppl_increase": [{"max_ppl_increase": 0.1}],
    "max_kl": [{"max_kl": 0.05}],
    "target_speedup": [{"target_speedup": 1.25}],
    "held_out_dataset": [
        {"max_kl": 0.05, "held_out_dataset": "my texts/it's.txt"},
        {"max_ppl_increase": 0.05, "held_out_dataset": "wikitext2", "held_out_samples": 400},
    ],
    "held_out_samples": [{"max_ppl_increase": 0.1, "held_out_samples": 9}],
    "unit": [{"unit": "half_block"}, {"unit": "block"}],
    "objective": [{"objective": "kl"}, {"objective": "nll"}],
    "stack": [{"stack": "encoder"}, {"stack": "decoder"}],
    "dataset": [{"dataset": "wikitext2"}, {"dataset": "my texts/it's.txt"}, {"dataset": "-odd.txt"}],
    "dataset_text_field": [{"dataset_text_field": "my column"}, {"dataset_text_field": "--text"}],
    "num_samples": [{"num_samples": 7}],
    "seqlen": [{"seqlen": 77}],
    "batch_size": [{"batch_size": 8}],
    "seed": [{"seed": 5}],
    "use_chat_template": [{"use_chat_template": True}],
    "calibration_recipe": [{"calibration_recipe": "sleb"}],
    "protect_first": [{"protect_first": 0}, {"protect_first": 2}],
    "protect_last": [{"protect_last": 0}],
    "compensation": [{"compensation": "ridge"}, {"compensation": "auto"}],
    "generated_samples": [{"compensation": "ridge", "generated_samples": 5}],
    "layout": [{"strategy": "magnitude", "layout": "padded"}],
    "align": [{"strategy": "magnitude", "align": 16}],
    "strategy_options": [
        {"strategy": "mi_prun", "strategy_options": {}},
        {"strategy": "bip", "strategy_options": {"families": "mlp"}},
        {"strategy": "manual", "num_blocks": 2, "strategy_options": {"blocks": "4,1"}},
    ],
}


def test_every_field_is_tried() -> None:
    assert list(FIELDS) == [field.name for field in fields(Recipe)]


@pytest.mark.parametrize("given", [each for some in FIELDS.values() for each in some], ids=str)
def test_the_line_is_the_configuration(given: dict[str, Any]) -> None:
    wanted = BlockPruningConfig(**given)
    command = command_for(made_with(wanted), wanted)
    args = parsed(command)
    if wanted.strategy == "manual":
        assert args.blocks == (4, 1) and given_fields(args) == {}
        return
    budget = wanted.recipe.requested
    again = BlockPruningConfig(**given_fields(args))
    assert again.recipe.requested == budget
    ((name, value),) = budget.items()
    setattr(wanted, name, value)  # a line states the default budget
    wanted.strategy_options = wanted.strategy_options or None
    assert again == wanted and args.model == "org/dense" and args.output == "OUTPUT"


def test_all_fields_in_one_line() -> None:
    given = BlockPruningConfig(
        "shortgpt",
        sparsity=0.3,
        stack="decoder",
        dataset="a b.jsonl",
        dataset_text_field="$(rm)",
        num_samples=3,
        seqlen=99,
        batch_size=2,
        seed=11,
        use_chat_template=True,
        calibration_recipe="sleb",
        protect_first=1,
        protect_last=0,
    )
    loading = {
        "revision": "main",
        "subfolder": "my model",
        "dtype": torch.bfloat16,
        "trust_remote_code": True,
        "tokenizer": "org/words",
        "token": "hf_secret",
        "device_map": "auto",
    }
    command = command_for(made_with(given), given, revision=COMMIT, loading=loading)
    args = parsed(command)
    assert BlockPruningConfig(**given_fields(args)) == given and args.tokenizer == "org/words"
    assert model_arguments(args) == {
        "revision": COMMIT,
        "subfolder": "my model",
        "dtype": "bfloat16",
        "trust_remote_code": True,
    }
    assert "secret" not in command and len(command.splitlines()) > 2


@pytest.mark.parametrize("strategy", ["sleb", "shortgpt", "mi_prun", "angular", "random", "magnitude", "bip"])
def test_every_strategy(strategy: str) -> None:
    pruner = toy_pruner()
    given = config(strategy)
    plan = pruner.make_plan(given)
    assert words_of(command_for(plan, given))[2] == "apply"  # its text is in memory
    given.dataset = "texts.txt"
    if plan.calibration is not None:
        plan = plan.with_provenance(calibration={**plan.calibration, "source": "texts.txt"})
    assert BlockPruningConfig(**given_fields(parsed(command_for(plan, given)))) == given


# What the line cannot say


def test_a_configuration_of_another_plan_is_not_said() -> None:
    given = BlockPruningConfig("sleb", num_blocks=2, dataset="texts.txt", seed=3)
    plan = made_with(given)
    assert words_of(command_for(plan, given))[2] == "run"
    others = (
        None,
        BlockPruningConfig("sleb", num_blocks=2),
        BlockPruningConfig("sleb", num_blocks=2, dataset="texts.txt"),
        BlockPruningConfig("sleb", num_blocks=2, dataset="others.txt", seed=3),
        BlockPruningConfig("sleb", num_blocks=2, dataset="wikitext2", seed=3),
        BlockPruningConfig("sleb", num_blocks=2, dataset="texts.txt", seed=3, seqlen=100),
        BlockPruningConfig("sleb", num_blocks=2, dataset="texts.txt", seed=3, calibration_recipe="sleb"),
        BlockPruningConfig("sleb", num_blocks=3, dataset="texts.txt", seed=3),
        BlockPruningConfig("shortgpt", num_blocks=2, dataset="texts.txt", seed=3),
        BlockPruningConfig("sleb", num_blocks=2, dataset="texts.txt", seed=3, stack="encoder"),
    )
    for other in others:
        assert words_of(command_for(plan, other))[2] == "apply", other


def test_data_in_memory_joined_plans_and_odd_options_are_applied() -> None:
    pruner = toy_pruner()
    joined = pruner.make_plan([config("random"), config("magnitude")])
    assert words_of(command_for(joined, config("random")))[2] == "apply"
    given = BlockPruningConfig("sleb", num_blocks=2, dataset="texts.txt")
    given.strategy_options = {"search": ["prefix"]}
    assert words_of(command_for(made_with(given, options={"search": ["prefix"]}), given))[2] == "apply"
    manual = PruningPlan.from_removed("llama", 6, [1])
    later = PruningPlan.from_removed("llama", 5, [1])
    assert words_of(command_for(manual.then(later)))[2] == "apply"


def test_nothing_removed_has_no_command() -> None:
    assert command_for(PruningPlan.from_removed("llama", 6, [])) is None


def test_a_gguf_file_is_run_but_not_applied() -> None:
    plan = PruningPlan.from_removed("llama", 6, [4, 1], base_model="org/dense")
    loading = {"gguf_file": "dense.gguf"}
    args = parsed(command_for(plan, loading=loading))
    assert model_arguments(args) == loading and args.blocks == (4, 1)
    assert apply_command(plan, loading=loading) is None
    file = plan.with_provenance(base_model="/home/me/dense.gguf")
    assert apply_command(file) is None and parsed(command_for(file)).model == PLACEHOLDER
    assert command_for(plan.with_provenance(strategy="sleb"), loading=loading) is None


def test_folders_of_the_author_are_not_shown(tmp_path: Path) -> None:
    given = BlockPruningConfig("sleb", num_blocks=2, dataset=tmp_path / "texts.txt")
    plan = made_with(given, base_model=str(tmp_path / "dense"))
    args = parsed(command_for(plan, given, revision=COMMIT))
    assert (args.model, args.dataset) == (PLACEHOLDER, "texts.txt") and not hasattr(args, "revision")
    near = BlockPruningConfig("sleb", num_blocks=2, dataset="data/texts.txt")
    assert parsed(command_for(made_with(near), near)).dataset == "data/texts.txt"
    away = BlockPruningConfig("sleb", num_blocks=2, dataset="../me/texts.txt")
    assert parsed(command_for(made_with(away), away)).dataset == "texts.txt"


def test_an_encoder_is_named() -> None:
    plan = PruningPlan.from_removed("t5", 6, [2], stack="encoder", base_model="org/dense")
    assert parsed(command_for(plan)).stack == "encoder"


# What the line does


def run(command: str, dense: Path, folder: Path) -> None:
    words = words_of(command.replace(PLACEHOLDER, shlex.quote(str(dense))).replace("OUTPUT", shlex.quote(str(folder))))
    parser = ArgumentParser("optimum-cli")
    BlockPruneCommand(parser.add_subparsers())
    args = parser.parse_args(words[1:])
    args.func(args).run()


@pytest.mark.parametrize("number", [1, 2])
def test_run_and_apply_make_the_same_checkpoint(number: int, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("\n".join([*TEXTS, text(200, 9)]), encoding="utf-8")
    dense = toy_folder(tmp_path / "dense")
    pruner = BlockPruner.from_pretrained(dense, config(dataset="texts.txt"))
    plan = pruner.make_plan().truncate(number)
    pruner.prune(tmp_path / "out", plan=plan)
    assert words_of(pruner.report.command)[2] == "run"
    run(pruner.report.command, dense, tmp_path / "again")
    monkeypatch.chdir(tmp_path / "out")
    run(apply_command(plan), dense, tmp_path / "applied")
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name in ("again", "applied"):
        assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict(), weights)
    assert PruningPlan.from_file(tmp_path / "again").removed_blocks == plan.removed_blocks
