# SPDX-License-Identifier: Apache-2.0
"""The documentation says what is so: its links lead somewhere, its code runs, its commands and versions exist."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import fields
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from families import tiny_model
from toys import text, toy_folder

from optimum_blockprune import BlockPruner, PruningPlan, PruningReport, PruningStrategy, available_strategies
from optimum_blockprune.budget_rules import HELD_OUT_FIELDS, OPEN_BUDGETS
from optimum_blockprune.card import model_card, title_of
from optimum_blockprune.commands import BlockPruneCommand
from optimum_blockprune.pictures import PICTURES
from optimum_blockprune.recipe import BUDGET_FIELDS, Recipe
from optimum_blockprune.runner import BlockRunner
from optimum_blockprune.strategies.base import SearchContext


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "benchmarks" / "results" / "sleb_search.json"
WIDTH = ROOT / "benchmarks" / "results" / "width.json"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_compiles_and_names_public_things(page: Path) -> None:
    import optimum_blockprune

    for code in blocks(page, "python"):
        compile(code, str(page), "exec")
        for names in re.findall(r"from optimum_blockprune import (.*)", code):
            assert {name.strip() for name in names.split(",")} <= set(optimum_blockprune.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_commands_are_understood(page: Path, capsys) -> None:
    for code in blocks(page, "shell"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] != ["optimum-cli", "blockprune"]:
                continue
            parser = ArgumentParser("optimum-cli")
            BlockPruneCommand(parser.add_subparsers())
            assert parser.parse_args(words[1:]).func


def test_the_strategy_of_the_guide_works(tmp_path: Path, monkeypatch) -> None:
    code, *_ = blocks(ROOT / "docs" / "writing-a-strategy.md", "python")
    (tmp_path / "strategy_of_the_guide.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    strategy = import_module("strategy_of_the_guide").LastFirst
    assert issubclass(strategy, PruningStrategy)
    context = SearchContext(
        runner=BlockRunner(tiny_model("llama", 5)),
        windows=None,
        options=strategy.Options(),
        num_remove=2,
        removable=(0, 1, 2, 3),
        batch_size=1,
        seed=0,
        progress=lambda total, text: None,
        provenance={"model_type": "llama", "strategy": "last_first"},
    )
    assert strategy().select(context).removed_blocks == (3, 2)


def test_the_sharing_guide_runs(hub: Any, tmp_path: Path, monkeypatch) -> None:
    share, load, *_ = blocks(ROOT / "docs" / "sharing.md", "python")
    monkeypatch.chdir(tmp_path)
    dense = toy_folder(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(text(300))
    (tmp_path / "held_out.txt").write_text(text(100, seed=1))
    for published, ours in (
        ('"HuggingFaceTB/SmolLM2-135M"', repr(str(dense))),
        ('"wikitext2", num_samples=16', '"text.txt", num_samples=4, seqlen=16'),
    ):
        assert published in share
        share = share.replace(published, ours)
    names: dict[str, Any] = {}
    exec(compile(share, "sharing.md", "exec"), names)
    exec(compile(load, "sharing.md", "exec"), names)
    assert names["model"].config.num_hidden_layers == 2
    assert [entry["removed"] for entry in names["pruner"].report.depths] == [0, 1, 2, 3, 4]
    assert [entry["label"] for entry in names["pruner"].report.evaluations] == ["dense", "pruned"]


def test_the_example_is_what_its_report_gives() -> None:
    folder = ROOT / "docs" / "example"
    plan, report = PruningPlan.from_file(folder), PruningReport.from_file(folder)
    card = (folder / "README.md").read_text(encoding="utf-8")
    pictures = [name for name in PICTURES if (folder / name).is_file()]
    assert len(pictures) == 3
    assert card == str(model_card(plan, report, title=title_of(card), pictures=pictures))
    assert all(f"({name})" in card for name in pictures)
    assert report.strategy == plan.strategy and plan.removed_blocks == tuple(report.removed_blocks)


def test_every_strategy_and_every_method_is_described() -> None:
    page = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    built_in = {name for name, info in available_strategies().items() if info.distribution == "optimum-blockprune"}
    assert {heading for heading in re.findall(r"^## `(\w+)`", page, re.MULTILINE)} == built_in
    for name in ("quickstart.md", "sharing.md", "evaluation.md"):
        called = set(re.findall(r"pruner\.(\w+)\(", (ROOT / "docs" / name).read_text(encoding="utf-8")))
        assert called and all(callable(getattr(BlockPruner, name)) for name in called)


def test_budgets_are_described() -> None:
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    names = {field.name for field in fields(Recipe)}
    assert {"sparsity", "num_blocks", "target_params", "protect_first", "calibration_recipe"} <= names
    assert all(f"`{name}`" in page for name in (*BUDGET_FIELDS, "protect_first"))
    measured = (ROOT / "docs" / "budgets.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in measured for name in (*OPEN_BUDGETS, *HELD_OUT_FIELDS))


def test_the_changelog_is_about_this_version() -> None:
    latest = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert latest and latest[1] == version("optimum-blockprune")


def test_quoted_figures_are_those_of_the_benchmark() -> None:
    result, page = json.loads(RESULTS.read_text()), (ROOT / "README.md").read_text(encoding="utf-8")
    for search in ("naive", "exact", "race"):
        row = result[search]
        figures = (f"{row['block_forwards']:,}", f"{row['head_forwards']:,}", f"{row['seconds']:.1f}")
        assert all(figure in page for figure in (*figures, f"{row['seconds_ratio']:.3f}"))
        assert row["same_blocks"] and row["removed"] == result["naive"]["removed"]


def test_the_table_of_claims_is_that_of_the_benchmarks() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "table.py"], capture_output=True, text=True, check=True
    )
    quoted = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = done.stdout.splitlines()
    assert len(rows) >= 12
    # The machine is said once.
    assert {row.split("; AMD")[0].rstrip() for row in rows} <= {line.rstrip() for line in quoted}


def quality_rows(name: str) -> list[str]:
    command = [sys.executable, ROOT / "benchmarks" / "quality_table.py", ROOT / "benchmarks" / "results" / name]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_tables_of_quality_are_those_of_the_benchmark() -> None:
    rows = quality_rows("quality.json")
    small = [row for name in ("small", "articles", "news") for row in quality_rows(f"quality_{name}.json")]
    page = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) >= 30 and len(small) >= 20 and {*rows, *small} <= set(page)
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(set(rows) & set(readme)) >= 8
    # In brackets, changes: nothing of that shape that is not in a table.
    for lines, known in ((readme, rows), (page, [*rows, *small])):
        assert {line for line in lines if re.search(r"\([+-]\d+%\)", line)} <= set(known)


def test_the_table_of_pairs_is_that_of_the_benchmark() -> None:
    command = [
        sys.executable,
        ROOT / "benchmarks" / "pairs.py",
        "--show",
        ROOT / "benchmarks" / "results" / "pairs.json",
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(printed.splitlines()) >= 8
    assert f"```\n{printed}```" in (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")


def test_quoted_figures_of_width_are_those_of_the_benchmark() -> None:
    result, page = json.loads(WIDTH.read_text()), (ROOT / "docs" / "width.md").read_text(encoding="utf-8")
    lines = [line.split() for line in page.splitlines()]
    assert len(result["results"]) >= 14
    for row in [{"perplexity": result["dense"]["perplexity"]}, *result["results"]]:
        quoted = [f"{value:,.2f}" for value in row["perplexity"].values()]
        assert any(set(quoted) <= set(line) for line in lines), row
