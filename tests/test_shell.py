# SPDX-License-Identifier: Apache-2.0
"""What the commands do: in this process for speed, and a few times as a shell would start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import output, refusal, run
from families import plain_logits, random_ids, silenced, tiny_model
from huggingface_hub import ModelCard
from optimum.utils import logging
from safetensors.torch import load_file
from toys import NUM_BLOCKS, assert_same_weights, config, files_below, text, toy_folder, toy_pruner
from transformers import AutoModelForCausalLM

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan, available_strategies


SLEB = ["--strategy", "sleb", "--num-blocks", "2", "--num-samples", "4", "--seqlen", "16", "--batch-size", "2"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(text(300, seed=5))
    return path


@pytest.fixture(autouse=True)
def verbosity() -> Iterator[None]:
    """The commands turn the logs on."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


# run


def test_run_chooses_prunes_and_saves(dense: Path, data: Path, tmp_path: Path, capsys) -> None:
    printed = output(capsys, "run", "-m", dense, *SLEB, "--dataset", data, tmp_path / "out")
    pruner = BlockPruner.from_pretrained(dense, config(dataset=data))
    pruner.prune()
    plan = PruningPlan.from_file(tmp_path / "out")
    assert plan.to_dict() == pruner.plan.to_dict()
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict(), pruner.model.state_dict())
    total, left = tiny_model("llama", NUM_BLOCKS).num_parameters(), pruner.model.num_parameters()
    assert printed.splitlines() == [
        f"{tmp_path / 'out'}: 4 of 6 blocks, {left:,} of {total:,} parameters",
        f"removed by sleb, in this order: {plan.removed_blocks[0]}, {plan.removed_blocks[1]}",
    ]
    assert BlockPruningConfig.from_pretrained(tmp_path / "out").dataset == str(data)


def test_run_takes_the_blocks_that_are_named(dense: Path, tmp_path: Path, capsys) -> None:
    result = json.loads(output(capsys, "run", "-m", dense, "--blocks", "4,1", "--json", tmp_path / "out"))
    assert result["output"] == str(tmp_path / "out") and result["removed_blocks"] == [4, 1]
    assert result["strategy"] == "manual" and "block_forwards" not in result
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    truth = silenced(tiny_model("llama", NUM_BLOCKS), [1, 4])
    assert torch.equal(plain_logits(reloaded, random_ids()), plain_logits(truth, random_ids()))


def test_run_measures_before_and_after_if_asked(dense: Path, data: Path, tmp_path: Path, capsys) -> None:
    flags = ["--strategy", "random", "--num-blocks", "1", "--seqlen", "16", "--eval-dataset", data]
    printed = output(capsys, "run", "-m", dense, *flags, tmp_path / "out")
    entries = json.loads((tmp_path / "out" / "pruning_report.json").read_text())["evaluations"]
    assert [(entry["label"], entry["seqlen"], entry["blocks"]) for entry in entries] == [
        ("dense", 16, 6),
        ("pruned", 16, 5),
    ]
    for entry in entries:
        line = f"perplexity of the {entry['label']} model on {data}: {entry['perplexity']:.2f} (270 tokens)"
        assert line in printed.splitlines()
    card = ModelCard.load(tmp_path / "out" / "README.md").text
    assert f"Measured on `{data.name}`" in card and "| tokens scored | 270 | 270 |" in card
    # Named blocks are measured on windows of the same length.
    measured = ["--seqlen", "16", "--batch-size", "1", "--eval-dataset", data]
    run("run", "-m", dense, "--blocks", "2", *measured, tmp_path / "named")
    named = json.loads((tmp_path / "named" / "pruning_report.json").read_text())["evaluations"]
    assert named[0]["nll"] == entries[0]["nll"]


def test_run_reads_a_saved_configuration_and_flags_override_it(dense: Path, tmp_path: Path, capsys) -> None:
    BlockPruningConfig("random", num_blocks=3, seed=7).save_pretrained(tmp_path / "saved")
    command = ["run", "-m", dense, "--config", tmp_path / "saved", "--json"]
    first = json.loads(output(capsys, *command, tmp_path / "first"))
    second = json.loads(output(capsys, *command, "--sparsity", "0.1", tmp_path / "second"))
    assert first["requested"] == {"num_blocks": 3} and second["requested"] == {"sparsity": 0.1}
    assert first["removed_blocks"] == list(
        toy_pruner(strategy="random", num_blocks=3, seed=7).make_plan().removed_blocks
    )
    assert PruningPlan.from_file(tmp_path / "second").seed == 7


def test_run_overwrites_only_if_asked(dense: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    run("run", "-m", dense, "--blocks", "1", "--overwrite", tmp_path / "out")
    files = files_below(tmp_path)
    assert "out/mine.txt" not in files
    monkeypatch.setattr(BlockPruner, "from_pretrained", None)  # not even loaded
    line = refusal(capsys, "run", "-m", dense, "--blocks", "1", tmp_path / "out")
    assert line.endswith("exists and is not empty; pass overwrite=True (--overwrite).")
    assert files_below(tmp_path) == files


# plan and apply


@pytest.mark.parametrize("verify", ["keys", "logits"])
def test_plan_and_apply_give_what_run_gives(verify: str, dense: Path, data: Path, tmp_path: Path, capsys) -> None:
    before = files_below(dense)
    run("run", "-m", dense, *SLEB, "--dataset", data, tmp_path / "run")
    plan_file = tmp_path / "plan.json"
    printed = output(capsys, "plan", "-m", dense, *SLEB, "--dataset", data, "--output", plan_file)
    plan = PruningPlan.from_file(plan_file)
    assert plan.to_dict() == PruningPlan.from_file(tmp_path / "run").to_dict()
    blocks = ", ".join(map(str, plan.removed_blocks))
    assert printed == f"{plan_file}: sleb removes {blocks} of 6 blocks\n"
    printed = output(capsys, "apply", "-m", dense, "--plan", plan_file, "--verify", verify, tmp_path / "apply")
    assert printed == f"{tmp_path / 'apply'}: 4 of 6 blocks, without {blocks}\n"
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("run", "apply")]
    assert sorted(weights[0]) == sorted(weights[1])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    settings = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("run", "apply")]
    assert settings[0] == settings[1]
    assert files_below(tmp_path / "apply").keys() >= {"tokenizer.json", "pruning_plan.json", "README.md"}
    assert files_below(dense) == before


def test_a_folder_holds_a_plan_as_well(dense: Path, tmp_path: Path, capsys) -> None:
    run("run", "-m", dense, "--blocks", "3", tmp_path / "run")
    result = json.loads(output(capsys, "apply", "-m", dense, "--plan", tmp_path / "run", "--json", tmp_path / "out"))
    assert result == {"output": str(tmp_path / "out"), "removed_blocks": [3]}
    result = output(capsys, "plan", "-m", dense, "--strategy", "random", "-o", tmp_path, "--json")
    assert json.loads(result) == {
        "output": str(tmp_path / "pruning_plan.json"),
        **PruningPlan.from_file(tmp_path).to_dict(),
    }


def test_a_plan_that_cannot_be_written_is_refused_before_the_search(dense: Path, tmp_path: Path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with monkeypatch.context() as patched:
        patched.setattr(BlockPruner, "from_pretrained", None)
        for place in (tmp_path / "nowhere" / "plan.json", tmp_path / "file" / "plan.json"):
            line = refusal(capsys, "plan", "-m", dense, "--strategy", "random", "-o", place)
            assert line.startswith(f"error: The plan cannot be written to '{place}': ")
    monkeypatch.setattr(Path, "write_text", lambda *_args, **_kwargs: os.stat("/no/such/place"))
    line = refusal(capsys, "plan", "-m", dense, "--strategy", "random", "-o", tmp_path / "plan.json")
    assert "The plan cannot be written" in line
    assert files_below(tmp_path) == {"file": b"mine"}


# evaluate and strategies


def test_evaluate_puts_two_models_side_by_side(dense: Path, data: Path, tmp_path: Path, capsys) -> None:
    run("run", "-m", dense, "--blocks", "1,2", tmp_path / "out")
    flags = ["--baseline", dense, "--kl", "--dataset", data, "--seqlen", "16", "--prompt", "w5 w6 w7"]
    results = json.loads(output(capsys, "evaluate", "-m", tmp_path / "out", *flags, "--json"))
    assert list(results) == ["baseline", "model"]
    pruner = BlockPruner.from_pretrained(tmp_path / "out", config())
    expected = pruner.evaluate(data, baseline=tiny_model("llama", NUM_BLOCKS))
    for name in ("nll", "kl", "tokens", "blocks", "parameters", "size_bytes", "fingerprint"):
        assert results["model"][name] == expected[name], name
    assert results["model"]["kl"] > 0 and "kl" not in results["baseline"]
    assert (results["baseline"]["blocks"], results["model"]["blocks"]) == (6, 4)
    for result in results.values():
        assert result["text"].startswith("w5 w6 w7") and result["decode_tokens_per_second"] > 0
    table = output(capsys, "evaluate", "-m", tmp_path / "out", *flags, "--stride", "8", "--num-samples", "4")
    rows = {line[:28].strip(): line[28:].split() for line in table.splitlines()}
    assert rows[""] == ["baseline", "model"] and rows["blocks"] == ["6", "4"]
    assert rows["KL to baseline (nats/token)"][0] == "-" and rows["scored tokens"] == ["63", "63"]


def test_evaluate_alone(dense: Path, data: Path, capsys) -> None:
    results = json.loads(output(capsys, "evaluate", "-m", dense, "--dataset", data, "--seqlen", "16", "--json"))
    assert list(results) == ["model"] and results["model"]["windows"] == 18 and "text" not in results["model"]


def test_help_of_evaluate_speaks_of_evaluation(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "2000")
    with pytest.raises(SystemExit):
        run("evaluate", "--help")
    shown = capsys.readouterr().out
    assert "Number of windows of text (default: all of them)." in shown and "128" not in shown


def test_strategies_are_listed(capsys) -> None:
    found = json.loads(output(capsys, "strategies", "--json"))
    assert found == {name: vars(info) for name, info in available_strategies().items()}
    assert found["sleb"]["available"] is True and found["sleb"]["distribution"] == "optimum-blockprune"
    lines = output(capsys, "strategies").splitlines()
    assert [line.split()[0] for line in lines] == sorted(found)
    assert all(found[line.split()[0]]["summary"] in line for line in lines)


# Refusals: one line, exit code 2, and nothing on disk


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--strategy", "slep"], "There is no strategy 'slep'. Did you mean 'sleb'"),
        (["--strategy-option", "serch=naive"], "Strategy 'sleb' has no option 'serch'. Did you mean 'search'"),
        (["--sparsity", "1.5"], "sparsity=1.5 is not between 0 and 1"),
        (["--num-blocks", "5", "--dataset", "DATA"], "num_blocks=5 asks to remove 5 of 6 blocks, but only 4 may go"),
        (["--num-blocks", "2"], "give dataset=... (--dataset PATH)"),
        (["--dataset", "wikitext"], "dataset='wikitext' is neither an existing path nor a known name. Did you mean"),
        (["--dataset", "DATA"], "is too short: 300 tokens found"),
        (["--blocks", "7"], "Block 7 does not exist: this model has blocks 0 to 5."),
        (["--blocks", "1,1"], "A block is removed twice"),
        (["--blocks", "1", "--strategy", "sleb"], "--blocks names the blocks itself; strategy would have no effect."),
        (["--blocks", "1", "--dataset", "DATA", "--seed", "3"], "; dataset, seed would have no effect."),
        (["--blocks", "1", "--seqlen", "16"], "; seqlen would have no effect."),
        (["--blocks", "1", "--config", "DATA"], "; config would have no effect."),
        (["--blocks", "1", "--num-samples", "3", "--eval-dataset", "DATA"], "; num_samples would have no effect."),
        (["--config", "no/such.json"], "There is no file 'no/such.json'."),
        (["--tokenizer", "no/such/place", "--blocks", "1"], "No tokenizer can be loaded from 'no/such/place'"),
        (["--dtype", "float99", "--blocks", "1"], "Unknown dtype 'float99'"),
    ],
)
def test_run_is_refused(flags: list[str], message: str, dense: Path, data: Path, tmp_path: Path, capsys) -> None:
    words = [str(data) if word == "DATA" else word for word in flags]
    assert message in refusal(capsys, "run", "-m", dense, *words, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_flags_that_search_are_refused_before_the_model_is_loaded(tmp_path: Path, capsys) -> None:
    line = refusal(capsys, "run", "-m", "no/such/model", "--blocks", "1", "--seed", "3", tmp_path / "out")
    assert line == "error: --blocks names the blocks itself; seed would have no effect."


def test_models_that_are_none_are_refused(dense: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "config.json").write_text(
        '{"model_type": "vit", "architectures": ["ViTForImageClassification"]}'
    )
    for model, message in (
        (tmp_path / "empty", "cannot be loaded as a model: Unrecognized model in"),
        (tmp_path / "absent", "There is no file or folder"),
        (dense / "config.json", "is a file; give a model folder, a repo id or a .gguf file."),
        (tmp_path / "images", "Model type 'vit' (ViTForImageClassification) is neither a language model"),
    ):
        assert message in refusal(capsys, "run", "-m", model, "--blocks", "1", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_broken_model_is_refused_by_its_block(data: Path, tmp_path: Path, capsys) -> None:
    model = tiny_model("llama", NUM_BLOCKS)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "dense")
    for command in (["run", "--blocks", "1", tmp_path / "out"], ["evaluate", "--dataset", data, "--seqlen", "16"]):
        name, *rest = command
        tokenizer = ["--tokenizer", toy_folder(tmp_path / "tokenizer")]
        line = refusal(capsys, name, "-m", tmp_path / "dense", *tokenizer, *rest)
        assert "NaN or infinity first appears in the output of block 2." in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "--kl"], "--kl compares with another model: give --baseline MODEL."),
        (["evaluate"], "There is no text to evaluate on: give dataset=... (--dataset PATH)."),
        (["evaluate", "--dataset", "DATA", "--seqlen", "16", "--stride", "17"], "stride=17 is longer than a window"),
        (["evaluate", "--dataset", "DATA", "--stride", "0"], "stride must be a whole number of at least 1, not 0."),
        (["apply", "--plan", "no.json", "OUT"], "There is no plan at 'no.json'."),
        (["apply", "--plan", "DATA", "OUT"], "is not a JSON file"),
        (
            ["apply", "--plan", "PLAN", "--dtype", "float32", "OUT"],
            "copies the files as they are; --dtype has no effe",
        ),
        (["apply", "--plan", "PLAN", "--device-map", "cpu", "OUT"], "--device-map has no effect."),
        (["apply", "--plan", "PLAN", "--tokenizer", "x", "OUT"], "--tokenizer has no effect."),
        (["apply", "--plan", "PLAN", "--gguf-file", "x.gguf", "OUT"], "prune a GGUF file with: run --blocks I,J,..."),
        (["apply", "--plan", "OTHER", "OUT"], "for the decoder of a 'llama' model with 9 blocks, not for"),
    ],
)
def test_the_other_commands_are_refused(words, message: str, dense: Path, data: Path, tmp_path: Path, capsys) -> None:
    PruningPlan.from_removed("llama", NUM_BLOCKS, [2]).save(tmp_path / "plan.json")
    PruningPlan.from_removed("llama", 9, [2]).save(tmp_path / "other.json")
    places = {"DATA": data, "PLAN": tmp_path / "plan.json", "OTHER": tmp_path / "other.json", "OUT": tmp_path / "out"}
    command, *rest = (places.get(word, word) for word in words)
    assert message in refusal(capsys, command, "-m", dense, *rest)
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "other.json"}


# As a shell starts them


def optimum_cli(*words: object, **environment: str) -> subprocess.CompletedProcess:
    program = Path(sys.executable).with_name("optimum-cli")
    line = [str(program), "blockprune", *map(str, words)]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(line, capture_output=True, text=True, env=settings, timeout=300)


def pure_json(done: subprocess.CompletedProcess) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_results_go_to_stdout_and_everything_else_to_stderr(dense: Path, data: Path, tmp_path: Path) -> None:
    done = optimum_cli("run", "-m", dense, *SLEB, "--dataset", data, "--json", tmp_path / "out")
    result = pure_json(done)
    assert result["achieved"]["blocks_after"] == 4 and (tmp_path / "out" / "model.safetensors").is_file()
    assert "SLEB 1/2: removed block" in done.stderr and "it/s" in done.stderr
    flags = ["--baseline", dense, "--kl", "--dataset", data, "--seqlen", "16", "--json"]
    assert pure_json(optimum_cli("evaluate", "-m", tmp_path / "out", *flags))["model"]["kl"] > 0


def test_a_repository_that_cannot_be_reached_is_a_refusal_in_a_line(tmp_path: Path) -> None:
    done = optimum_cli("run", "-m", "nobody/nothing", "--blocks", "1", tmp_path / "out", HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: 'nobody/nothing' cannot be loaded as a model: ") and "offline" in last.lower()
    assert not (tmp_path / "out").exists()
