# SPDX-License-Identifier: Apache-2.0
"""Several depths as folders, and pushing what was pruned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import plain_logits, random_ids, silenced, tiny_model
from huggingface_hub import ModelCard
from toys import NUM_BLOCKS, TEXTS, assert_unchanged, config, files_below, snapshot, toy_pruner
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_blockprune import BlockPruner, PruningPlan, PruningReport
from optimum_blockprune.errors import ConfigurationError, HubError, OutputError, PlanError
from optimum_blockprune.evaluation import EvaluationSpec


FAST = EvaluationSpec(speed=False, continuations=0)


# Several depths from one search


@pytest.mark.parametrize("strategy", ["sleb", "mi_prun"])
def test_each_exported_folder_is_the_result_of_its_own_search(strategy: str, tmp_path: Path) -> None:
    pruner = toy_pruner(strategy=strategy, num_blocks=3)
    pruner.make_plan()
    before = snapshot(pruner.model)
    folders = pruner.export(tmp_path / "out", [3, 1], dataset=TEXTS[:3], spec=FAST)
    assert_unchanged(pruner.model, before)
    assert folders == {1: tmp_path / "out" / "removed-1", 3: tmp_path / "out" / "removed-3"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["removed-1", "removed-3"]
    for count, folder in folders.items():
        own = toy_pruner(strategy=strategy, num_blocks=count)
        own.prune()
        assert PruningPlan.from_file(folder).removed_blocks == own.plan.removed_blocks
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(plain_logits(model, random_ids()), plain_logits(own.model, random_ids()))
        AutoTokenizer.from_pretrained(folder)
        report = PruningReport.from_file(folder)
        assert report.removed_blocks == list(own.plan.removed_blocks)
        assert report.verification == {"mode": "logits", "passed": True}
        assert report.achieved["blocks_after"] == NUM_BLOCKS - count
        assert [entry["removed"] for entry in report.depths] == [0, 1, 3]
        assert [entry["label"] for entry in report.evaluations] == ["dense", "pruned"]
        assert report.evaluations[1]["perplexity"] == {e["removed"]: e for e in report.depths}[count]["perplexity"]
        assert ("The search went on to 3 blocks" in (folder / "README.md").read_text()) == (count == 1)
        assert f"--num-blocks {count}" in report.command or "apply" in report.command
        card = ModelCard.load(folder / "README.md")
        assert f"{count} of its 6 " in card.text or f"{count} of 6 " in card.text


def test_every_depth_may_be_measured_and_some_written(tmp_path: Path) -> None:
    pruner = toy_pruner(num_blocks=3)
    pruner.make_plan()
    (folder,) = pruner.export(tmp_path / "out", [2], dataset=TEXTS[:3], every_depth=True).values()
    depths = PruningReport.from_file(folder).depths
    assert [(entry["removed"], "generation" in entry) for entry in depths] == [(0, True), (1, False), (2, True)]


def test_without_text_the_depths_have_sizes_only(tmp_path: Path) -> None:
    pruner = BlockPruner(tiny_model("llama", NUM_BLOCKS))
    pruner.plan = PruningPlan.from_blocks(pruner.model, [4, 1])
    (folder,) = pruner.export(tmp_path / "out", [1]).values()
    report = PruningReport.from_file(folder)
    assert [set(entry) for entry in report.depths] == [{"removed", "blocks", "parameters", "size_bytes"}] * 2
    assert report.evaluations == [] and "--blocks 4 " in report.command
    truth = silenced(tiny_model("llama", NUM_BLOCKS), [4])
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(plain_logits(model, random_ids()), plain_logits(truth, random_ids()))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"counts": [0]}, ConfigurationError, "the dense model"),
        ({"counts": [3]}, PlanError, "removes 2 blocks"),
        ({"counts": [1], "every_depth": True}, ConfigurationError, "needs text"),
        ({"counts": [1], "verify": "maybe"}, ConfigurationError, "verify='maybe'"),
    ],
)
def test_refused_exports_write_nothing(
    arguments: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    pruner = toy_pruner(num_blocks=2)
    pruner.make_plan()
    before = snapshot(pruner.model)
    with pytest.raises(error, match=words):
        pruner.export(tmp_path / "out", **arguments)
    assert_unchanged(pruner.model, before)
    assert list(tmp_path.iterdir()) == []


def test_an_export_replaces_a_folder_only_when_told(tmp_path: Path) -> None:
    pruner = toy_pruner(num_blocks=2)
    pruner.make_plan()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="overwrite"):
        pruner.export(tmp_path / "out", [1])
    assert files_below(tmp_path) == {"out/mine.txt": b"mine"}
    pruner.export(tmp_path / "out", [1], overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["removed-1"]


# Pushing


def test_push_saves_proves_and_uploads(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    pruner = toy_pruner()
    pruner.prune()
    commit = pruner.push_to_hub("me/small", private=True)
    assert commit.commit_url.endswith(commit.oid) and "me/small" in commit.commit_url
    assert list(tmp_path.iterdir()) == []
    model = AutoModelForCausalLM.from_pretrained("me/small", cache_dir=tmp_path / "cache")
    assert torch.equal(plain_logits(model, random_ids()), plain_logits(pruner.model, random_ids()))
    assert PruningPlan.from_hub("me/small") == pruner.plan


def test_save_and_push(hub: Any, tmp_path: Path) -> None:
    pruner = toy_pruner()
    pruner.prune()
    pruner.save_pretrained(tmp_path / "small", push_to_hub=True, repo_id="me/other", commit_message="Smaller")
    assert PruningPlan.from_hub("me/other") == PruningPlan.from_file(tmp_path / "small")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"repo_id": "me/x"}, ConfigurationError, "only count together with push_to_hub=True"),
        ({"safe_serialization": True}, ConfigurationError, "safe_serialization"),
        ({"push_to_hub": True, "repo_id": "not a name"}, HubError, "not a name"),
    ],
)
def test_arguments_of_a_push_are_checked_before_anything_is_written(
    arguments: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    pruner = toy_pruner()
    pruner.prune()
    with pytest.raises(error, match=words):
        pruner.save_pretrained(tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_push() -> None:
    with pytest.raises(PlanError, match="prune"):
        toy_pruner().push_to_hub("me/x")


def test_history_is_kept_over_two_prunings(tmp_path: Path) -> None:
    first = toy_pruner(num_blocks=1)
    first.prune(tmp_path / "first")
    second = BlockPruner.from_pretrained(tmp_path / "first", config(strategy="random", num_blocks=1))
    second.prune(tmp_path / "second")
    report = json.loads((tmp_path / "second" / "pruning_report.json").read_text())
    (entry,) = report["history"]
    assert entry["strategy"] == "sleb" and entry["removed_blocks"] == list(first.plan.removed_blocks)
    assert "previous" not in entry
    assert report["seed"] == 0 and report["base"]["model"] == str(tmp_path / "first")
