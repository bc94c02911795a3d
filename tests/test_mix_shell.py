# SPDX-License-Identifier: Apache-2.0
"""`optimum-cli blockprune mix`: a target from the command line, split and carried out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import output, refusal
from families import plain_logits, random_ids
from toys import TEXTS, files_below, toy_folder
from transformers import AutoModelForCausalLM

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan
from optimum_blockprune.evaluation import size_of


SEARCH = ["--strategy", "sleb", "--num-samples", "4", "--seqlen", "16", "--batch-size", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix")
    toy_folder(folder / "dense")
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": each}) for each in TEXTS))
    return folder


def target(folder: Path) -> int:
    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    return size_of(model)["parameters"] - int(1.5 * sum(each.numel() for each in model.model.layers[0].parameters()))


def mix(folder: Path, *more: object) -> list[object]:
    text = ("--dataset", folder / "text.jsonl")
    return ["mix", "-m", folder / "dense", "--target-params", target(folder), *SEARCH, *text, *more]


def test_the_command_does_what_the_method_does(folder: Path, capsys) -> None:
    options = ("--width-strategy", "magnitude", "--width-option", "families=mlp", "--align", "16", "--counts", "0,1")
    said = json.loads(output(capsys, *mix(folder, *options, "--json", folder / "out")))
    text = {"dataset": str(folder / "text.jsonl"), "num_samples": 4, "seqlen": 16, "batch_size": 2}
    pruner = BlockPruner.from_pretrained(folder / "dense", BlockPruningConfig("sleb", **text))
    width = BlockPruningConfig("magnitude", strategy_options={"families": "mlp"}, align=16, **text)
    plan = pruner.mix(target(folder), width=width, counts=(0, 1))
    written = PruningPlan.from_file(folder / "out")
    assert (written.removed_blocks, written.width) == (plan.removed_blocks, plan.width)
    assert said["strategy_details"]["mix"] == written.details["mix"] == plan.details["mix"]
    again = AutoModelForCausalLM.from_pretrained(folder / "out")
    assert size_of(again)["parameters"] == said["achieved"]["parameters_after"] <= target(folder)
    expected = plain_logits(plan.apply(AutoModelForCausalLM.from_pretrained(folder / "dense")), random_ids())
    assert plain_logits(again, random_ids()).equal(expected)
    assert not list(folder.glob(".*"))


def test_people_see_what_was_tried(folder: Path, capsys) -> None:
    said = output(capsys, *mix(folder, "--counts", "1,2", folder / "shown"))
    assert "held-out KL" in said and "parameters" in said and str(folder / "shown") in said
    plan = PruningPlan.from_file(folder / "shown")
    for split in plan.details["mix"]["trail"]:
        assert f"{split['kl']:.4f}" in said and f"{split['parameters']:,}" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--counts", "9"], "num_blocks=9"),
        (["--width-strategy", "sleb"], "'width' must remove channels or heads"),
        (["--width-option", "a=1", "--width-option", "a=2"], "--width-option names an option twice"),
        (["--layout", "padded"], "layout='padded'"),
        (["--width-option", "nonsense=1"], "nonsense"),
    ],
)
def test_what_does_not_fit_is_one_line(folder: Path, capsys, flags: list[str], message: str) -> None:
    before = files_below(folder / "dense")
    assert message in refusal(capsys, *mix(folder, *flags, folder / "never"))
    assert not (folder / "never").exists() and files_below(folder / "dense") == before
