# SPDX-License-Identifier: Apache-2.0
"""Commands around a finished folder: several depths, reports, later measurements, pushing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import output, refusal
from optimum.utils import logging
from toys import files_below, text, toy_folder

from optimum_blockprune import PruningPlan, PruningReport


SLEB = ["--strategy", "sleb", "--num-samples", "4", "--seqlen", "16", "--batch-size", "2"]
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(text(300, seed=5))
    return path


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "held_out.txt"
    path.write_text(text(100, seed=6))
    return path


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four questions with two answers each, as ready requests."""
    rows = [
        {
            "request_type": "loglikelihood",
            "task_name": "words",
            "doc_id": number,
            "idx": idx,
            "label": number % 2,
            "request": {"context": f"w{5 + number} w{9 + number}", "continuation": f" w{20 + 3 * idx + number}"},
        }
        for number in range(4)
        for idx in range(2)
    ]
    path = tmp_path_factory.mktemp("tasks") / "words.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def finished(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned folder; tests work on copies."""
    from command_line import run

    folder = tmp_path_factory.mktemp("finished") / "out"
    run("run", "-m", dense, "--blocks", "4,1", folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "mine"))


@pytest.fixture(autouse=True)
def verbosity() -> Iterator[None]:
    """The commands turn the logs on."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


# Several depths


def test_export_writes_depths_of_one_search(dense: Path, data: Path, held_out: Path, tmp_path: Path, capsys) -> None:
    flags = [*SLEB, "--dataset", data, "--eval-dataset", held_out, "--export", "3,1"]
    printed = output(capsys, "run", "-m", dense, *flags, tmp_path / "out")
    plans = {count: PruningPlan.from_file(tmp_path / "out" / f"removed-{count}") for count in (1, 3)}
    assert plans[1].removed_blocks == plans[3].removed_blocks[:1] and len(plans[3].removed_blocks) == 3
    lines = printed.splitlines()
    assert lines[0] == f"{tmp_path / 'out' / 'removed-1'}: {plans[1].removed_blocks[0]} removed"
    assert lines[2].split()[:4] == ["removed", "blocks", "parameters", "perplexity"]
    assert [line.split()[:2] for line in lines[3:]] == [["0", "6"], ["1", "5"], ["3", "3"]]
    output(capsys, "run", "-m", dense, *SLEB, "--num-blocks", 1, "--dataset", data, tmp_path / "own")
    assert PruningPlan.from_file(tmp_path / "own").removed_blocks == plans[1].removed_blocks


def test_export_of_named_blocks_as_json(dense: Path, tmp_path: Path, capsys) -> None:
    flags = ["--blocks", "4,1,2", "--export", "2", "--json"]
    result = json.loads(output(capsys, "run", "-m", dense, *flags, tmp_path / "out"))
    assert result["folders"] == {"2": str(tmp_path / "out" / "removed-2")}
    assert [entry["removed"] for entry in result["depths"]] == [0, 2]
    assert PruningPlan.from_file(tmp_path / "out" / "removed-2").removed_blocks == (4, 1)


def test_curve_measures_every_depth(dense: Path, held_out: Path, tmp_path: Path, capsys) -> None:
    flags = ["--blocks", "4,1", "--curve", "--eval-dataset", held_out, "--seqlen", "16"]
    printed = output(capsys, "run", "-m", dense, *flags, tmp_path / "out")
    report = PruningReport.from_file(tmp_path / "out")
    assert [entry["removed"] for entry in report.depths] == [0, 1, 2]
    assert report.depths[2]["perplexity"] == report.evaluations[1]["perplexity"]
    assert [line.split()[:2] for line in printed.splitlines()[-3:]] == [["0", "6"], ["1", "5"], ["2", "4"]]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--blocks", "1", "--curve"], "--eval-dataset"),
        (["--blocks", "1,2", "--export", "3"], "the search removes 2 blocks"),
        (["--blocks", "1,2", "--export", "0"], "any number from 1 to 2"),
        (["--strategy", "sleb", "--num-blocks", "1", "--export", "2"], "the search removes 1 blocks"),
        (["--strategy", "magnitude", "--export", "2"], "channels and heads"),
        (["--blocks", "1", "--limit", "3"], "together with --tasks"),
        (["--blocks", "1", "--export", "1", "--tasks", "piqa"], "without --export"),
    ],
)
def test_what_export_and_curve_cannot_do(dense: Path, flags: list[str], words: str, tmp_path: Path, capsys) -> None:
    assert words in refusal(capsys, "run", "-m", dense, *flags, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Tasks and later measurements


def test_run_scores_tasks_before_and_after(dense: Path, requests: Path, tmp_path: Path, capsys) -> None:
    printed = output(capsys, "run", "-m", dense, "--blocks", "4,1", "--tasks", requests, tmp_path / "out")
    report = PruningReport.from_file(tmp_path / "out")
    assert [(entry["label"], entry["samples"]) for entry in report.task_results] == [("dense", 4), ("pruned", 4)]
    assert "dense model on words: acc " in printed and "pruned model on words: acc " in printed


def test_evaluate_adds_to_a_folder(
    dense: Path, folder: Path, held_out: Path, requests: Path, capsys: pytest.CaptureFixture
) -> None:
    before = files_below(folder)
    flags = ["--baseline", dense, "--dataset", held_out, "--seqlen", "16", "--tasks", requests, "--limit", "3"]
    printed = output(capsys, "evaluate", "-m", folder, *flags, "--write-report")
    assert "words" in printed and "repeated 4-grams" in printed
    after, report = files_below(folder), PruningReport.from_file(folder)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed >= {"README.md", "pruning_report.json"}
    assert changed <= {"README.md", "pruning_report.json", *(name for name in after if name.endswith(".png"))}
    assert [entry["label"] for entry in report.evaluations] == ["dense", "pruned"]
    assert [(entry["label"], entry["samples"]) for entry in report.task_results] == [("dense", 3), ("pruned", 3)]
    assert f"{report.evaluations[1]['perplexity']:,.2f}" in after["README.md"].decode()
    again = output(capsys, "evaluate", "-m", folder, "--dataset", held_out, "--seqlen", "16", "--write-report")
    assert again and len(PruningReport.from_file(folder).evaluations) == 2


def test_tasks_alone_need_no_text(folder: Path, requests: Path, capsys) -> None:
    result = json.loads(output(capsys, "evaluate", "-m", folder, "--tasks", requests, "--json"))["model"]
    assert result["tasks"][0]["task"] == "words" and "perplexity" not in result


def test_what_is_measured_on_text_needs_text(dense: Path, folder: Path, requests: Path, capsys) -> None:
    flags = ["--tasks", requests, "--baseline", dense, "--kl"]
    assert "--kl is measured on text" in refusal(capsys, "evaluate", "-m", folder, *flags)
    assert "--stride is measured on text" in refusal(
        capsys, "evaluate", "-m", folder, "--tasks", requests, "--stride", 8
    )


def test_an_edited_card_stays(folder: Path, held_out: Path, capsys) -> None:
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    edited = card.read_text()
    output(capsys, "evaluate", "-m", folder, "--dataset", held_out, "--seqlen", "16", "--write-report")
    assert card.read_text() == edited and PruningReport.from_file(folder).evaluations
    card.unlink()
    output(capsys, "report", folder)
    assert "perplexity" in card.read_text()


def test_reports_are_added_to_pruned_folders_only(dense: Path, held_out: Path, capsys) -> None:
    before = files_below(dense)
    assert "pruning_report.json" in refusal(capsys, "evaluate", "-m", dense, "--dataset", held_out, "--write-report")
    assert files_below(dense) == before


# Pictures and page


def test_report_needs_the_report_alone(folder: Path, tmp_path: Path, capsys) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / "pruning_report.json", alone)
    printed = output(capsys, "report", alone)
    assert (alone / "pruning_report.html").read_text().lower().startswith("<!doctype html>")
    assert (alone / "pruning_depth.png").read_bytes().startswith(PNG)
    assert {Path(line).name for line in printed.splitlines()} == {path.name for path in alone.iterdir()} - {
        "pruning_report.json"
    }
    result = json.loads(output(capsys, "report", alone, "--output", tmp_path / "there", "--json"))
    assert result["files"] == sorted(str(path) for path in (tmp_path / "there").iterdir())


def test_no_report_is_refused(tmp_path: Path, capsys) -> None:
    assert "pruning_report.json" in refusal(capsys, "report", tmp_path)
    assert list(tmp_path.iterdir()) == []


# Push


def test_push_prints_where_it_went(folder: Path, hub: Any, capsys) -> None:
    printed = output(capsys, "push", folder, "me/small", "--commit-message", "Smaller").strip()
    assert "/me/small/commit/" in printed
    assert PruningPlan.from_hub("me/small") == PruningPlan.from_file(folder)
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMore.\n")
    result = json.loads(output(capsys, "push", folder, "me/small", "--create-pr", "--json"))
    assert result["repo_id"] == "me/small" and result["pr_url"]


def test_what_is_no_pruned_folder_is_not_pushed(dense: Path, hub: Any, capsys) -> None:
    assert "pruning_plan.json" in refusal(capsys, "push", dense, "me/small")
