# SPDX-License-Identifier: Apache-2.0
"""`docs/architectures.md`, the stored sweep and the architecture table say the same."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from optimum_blockprune.table import table


ROOT = Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "architectures.json").read_text(encoding="utf-8"))
TABLE = json.loads((ROOT / "optimum_blockprune" / "architectures.json").read_text(encoding="utf-8"))


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch):
    """The module that renders the page."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import architectures_page

    yield architectures_page
    sys.modules.pop("architectures_page", None)


def test_the_page_is_the_one_that_results_and_table_give(page) -> None:
    written = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert written == page.render(RESULTS, TABLE), "run: python benchmarks/architectures.py --page"


def test_a_change_of_the_table_changes_the_page(page) -> None:
    changed = {**TABLE, "constraints": TABLE["constraints"][1:]}
    assert page.render(RESULTS, changed) != page.render(RESULTS, TABLE)


def test_the_proven_families_are_those_of_the_sweep(page) -> None:
    assert table().families == page.families(RESULTS)


def test_nothing_is_wrong_and_enough_is_exact() -> None:
    verdicts = Counter(verdict[0] for entry in RESULTS["subjects"].values() for verdict in entry["removals"].values())
    assert set(verdicts) == {"exact", "refused"}
    exact = {
        entry["model_type"]
        for name, entry in RESULTS["subjects"].items()
        if name.startswith("causal/") and entry["removals"]["inner"][0] == "exact"
    }
    assert len(exact) >= 173


def test_every_refusal_names_the_type_and_says_what_to_do() -> None:
    for name, entry in RESULTS["subjects"].items():
        for status, _, reason in entry["removals"].values():
            if status == "refused":
                assert "odel type '" in reason and len(reason) > 60, (name, reason)
