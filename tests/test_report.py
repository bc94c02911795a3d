# SPDX-License-Identifier: Apache-2.0
"""The report holds what was measured and is silent about the rest."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from optimum_blockprune import report as report_module
from optimum_blockprune.errors import CheckpointError
from optimum_blockprune.report import REPORT_FILE, PruningReport


FULL = {
    "requested": {"num_blocks": 2},
    "achieved": {"blocks_before": 5, "blocks_after": 3, "blocks_removed": 0.4},
    "strategy": "sleb",
    "removed_halves": ["1.attention", "1.mlp"],
    "removed_blocks": [3, 1],
    "block_forwards": 100,
    "naive_block_forwards": 200,
    "reused_measurements": 2,
    "head_forwards": 10,
    "tokens": 64,
    "calibration": {"source": "x"},
    "seconds": {"search": 1.5},
    "peak_memory_bytes": 1 << 30,
    "device": "cpu",
    "dtype": "float32",
    "strategy_details": {"dense_loss": 2.0},
    "verification": {"mode": "logits"},
    "loader": "AutoModelForCausalLM",
    "task": "text-generation",
    "runtimes": {"vllm": {"verdict": "same", "reason": None}},
    "options": {"order": "greedy"},
    "seed": 0,
    "scores": {"1": 2.5},
    "steps": [{"block": 1, "loss": 2.5}],
    "widths": {"mlp": {"units": [16, 16], "kept": [8, None]}},
    "base": {"model": "org/name", "license": "mit"},
    "history": [{"strategy": "random", "removed_blocks": [0]}],
    "command": "optimum-cli blockprune run -m org/name --num-blocks 1 OUTPUT",
    "healing": [{"method": "lora", "kept": True, "source": "x", "steps": 3}],
    "depths": [{"removed": 0, "blocks": 2}],
    "evaluations": [{"perplexity": 3.0, "tokens": 9}],
    "task_results": [{"label": "dense", "task": "piqa", "metrics": {"acc": 0.5}}],
    "versions": {"torch": "2.13"},
}


def test_what_was_not_measured_is_absent() -> None:
    assert PruningReport().to_dict() == {}
    assert PruningReport(strategy="sleb", seconds={}).to_dict() == {"strategy": "sleb"}


@pytest.mark.parametrize("field", ["block_forwards", "head_forwards", "tokens", "peak_memory_bytes"])
def test_a_measured_zero_is_said(field: str) -> None:
    assert PruningReport(**{field: 0}).to_dict() == {field: 0}


def test_round_trip(tmp_path: Path) -> None:
    assert set(FULL) == {field.name for field in dataclasses.fields(PruningReport)}
    report = PruningReport(**FULL)
    assert report.to_dict() == FULL
    assert PruningReport.from_dict(FULL) == report
    assert PruningReport.from_dict({}) == PruningReport()
    for target in (tmp_path, tmp_path / "mine.json"):
        path = report.save(target)
        assert json.loads(path.read_text(encoding="utf-8")) == FULL
        assert PruningReport.from_file(target) == PruningReport.from_file(str(path)) == report
    assert (tmp_path / REPORT_FILE).is_file()


def test_fields_of_newer_versions_are_ignored() -> None:
    assert PruningReport.from_dict({"strategy": "sleb", "watts": 300}) == PruningReport(strategy="sleb")


def test_reports_do_not_share_their_dicts() -> None:
    one, other = PruningReport(), PruningReport()
    one.seconds["load"] = 1.0
    one.evaluations.append({})
    assert other == PruningReport()


def test_dict_is_a_copy() -> None:
    report = PruningReport(requested={"sparsity": 0.5})
    report.to_dict()["requested"]["sparsity"] = 1
    assert report.requested == {"sparsity": 0.5}


def test_phases_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 3.0, 10.0, 10.5, 20.0, 24.0])
    monkeypatch.setattr(report_module.time, "perf_counter", lambda: next(clock))
    report = PruningReport()
    with report.timed("search"):
        pass
    with pytest.raises(KeyError), report.timed("search"):
        raise KeyError
    with report.timed("save"):
        pass
    assert report.seconds == {"search": 2.5, "save": 4.0}


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_what_is_no_report_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / REPORT_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="no readable pruning report"):
        PruningReport.from_file(tmp_path)
