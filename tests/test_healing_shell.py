# SPDX-License-Identifier: Apache-2.0
"""`optimum-cli blockprune heal`: from a pruned folder to a healed one, with all that the first said of itself."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from command_line import output, refusal, run
from families import plain_logits, random_ids
from lessons import cycles
from toys import TEXTS, files_below, toy_folder
from transformers import AutoModelForCausalLM

from optimum_blockprune import BlockPruningConfig, PruningPlan, PruningReport, training


QUICK = ["--steps", "12", "--learning-rate", "2e-2", "--seqlen", "16", "--num-samples", "40", "--rank", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heal")
    toy_folder(folder / "dense")
    (folder / "text.txt").write_text(cycles()[0])
    (folder / "calibration.jsonl").write_text("\n".join(json.dumps({"text": each}) for each in TEXTS))
    search = ["--strategy", "shortgpt", "--num-blocks", "2", "--num-samples", "4", "--seqlen", "16"]
    data = ("--dataset", folder / "calibration.jsonl")
    run("run", "-m", folder / "dense", *search, *data, folder / "pruned")
    return folder


def heal(folder: Path, *more: object, source: str = "pruned") -> list[object]:
    return ["heal", "-m", folder / source, "--dataset", folder / "text.txt", *QUICK, *more]


def test_a_pruned_folder_becomes_a_healed_one(folder: Path, capsys) -> None:
    before = files_below(folder / "pruned")
    said = json.loads(output(capsys, *heal(folder, "--json", folder / "healed")))
    assert files_below(folder / "pruned") == before
    (entry,) = said["healing"]
    assert entry["kept"] and entry["perplexity_after"] < 0.8 * entry["perplexity_before"]
    assert said["output"] == str(folder / "healed")
    healed, pruned = (AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("healed", "pruned"))
    assert (plain_logits(healed, random_ids()) - plain_logits(pruned, random_ids())).abs().max() > 0.1
    # What the pruned folder said of itself is still said.
    assert PruningPlan.from_file(folder / "healed") == PruningPlan.from_file(folder / "pruned")
    plain = BlockPruningConfig.from_pretrained(folder / "pruned")
    assert BlockPruningConfig.from_pretrained(folder / "healed").recipe == plain.recipe
    old, new = (PruningReport.from_file(folder / name).to_dict() for name in ("pruned", "healed"))
    own = ("healing", "seconds", "verification", "peak_memory_bytes")
    assert {name: old[name] for name in old if name not in own} == {name: new[name] for name in new if name not in own}
    assert new["seconds"]["search"] == old["seconds"]["search"] and new["seconds"]["healing"] > 0
    assert not list(folder.glob(".*"))


def test_a_budget_that_was_spent_does_not_count_again(folder: Path, capsys) -> None:
    search = ["--strategy", "shortgpt", "--num-blocks", "4", "--protect-first", "0", "--protect-last", "0"]
    data = ["--dataset", folder / "calibration.jsonl", "--num-samples", "4", "--seqlen", "16"]
    run("run", "-m", folder / "dense", *search, *data, folder / "shallow")
    run(*heal(folder, folder / "shallow-healed", source="shallow"))
    assert PruningPlan.from_file(folder / "shallow-healed").num_removed == 4


def test_the_command_of_the_card_does_it_again(folder: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    output(capsys, *heal(folder, "--target-modules", "q_proj,v_proj", "--warmup", "2", folder / "first"))
    card = (folder / "first" / "README.md").read_text()
    command = re.search(r"optimum-cli blockprune heal.*?OUTPUT", card, re.DOTALL)[0].replace("\\\n", " ")
    words = [{"PRUNED_MODEL": "pruned", "OUTPUT": "second"}.get(word, word) for word in shlex.split(command)[2:]]
    monkeypatch.chdir(folder)
    output(capsys, *words)
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]


def test_people_read_what_came_of_it(folder: Path, capsys) -> None:
    text = output(capsys, *heal(folder, "--method", "distill", "--teacher", folder / "dense", folder / "distilled"))
    assert f"{folder / 'distilled'}: 12 steps of distill on 768 tokens of " in text
    assert re.search(r"perplexity on 4 held-out windows: [\d.]+ -> [\d.]+", text)
    card = (folder / "distilled" / "README.md").read_text()
    assert "to predict what the dense model does" in card


def test_a_run_that_was_broken_off_goes_on(folder: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = training.next_token_loss, []

    def counted(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training, "next_token_loss", counted)
    with pytest.raises(SystemExit) as caught:
        run(*heal(folder, "--save-steps", "3", folder / "resumed"))
    assert caught.value.code == 1 and "no result was written" in capsys.readouterr().err
    assert not (folder / "resumed").exists() and (folder / ".resumed.resume").is_dir()
    run(*heal(folder, "--save-steps", "3", folder / "resumed"))
    # Six of twelve steps were there.
    assert len(calls) == 8 + 6 and not (folder / ".resumed.resume").exists()


@pytest.mark.parametrize(
    ("more", "source", "message"),
    [
        (("--teacher", "x"), "pruned", "--teacher only counts together with --method distill"),
        (("--rank", "0"), "pruned", "rank=0 is too small"),
        ((), "dense", "nothing to heal yet"),
        ((), "nowhere", "no file or folder"),
        (("--target-modules", "qproj"), "pruned", "Did you mean 'q_proj'"),
        (("--num-samples", "4000"), "pruned", "too short"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    folder: Path, capsys, more: tuple[str, ...], source: str, message: str
) -> None:
    assert message in refusal(capsys, *heal(folder, *more, folder / "none", source=source))
    assert not (folder / "none").exists() and not list(folder.glob(".none*"))


def test_an_output_that_is_there_is_refused(folder: Path, capsys) -> None:
    assert "exists and is not empty" in refusal(capsys, *heal(folder, folder / "dense"))
