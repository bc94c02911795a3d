# SPDX-License-Identifier: Apache-2.0
"""The model card: valid metadata, and nothing in it that was not measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from optimum_blockprune import PruningPlan, PruningReport
from optimum_blockprune.card import model_card


SIZES = {
    "blocks_before": 30,
    "blocks_after": 28,
    "parameters_before": 134_515_008,
    "parameters_after": 127_435_392,
    "blocks_removed": 1 / 15,
}
DENSE = {"label": "dense", "source": "wikitext2 (test)", "tokens": 123_456, "perplexity": 17.128, "kl": None}
PRUNED = {"label": "pruned", "source": "wikitext2 (test)", "tokens": 123_456, "perplexity": 1234.5}


def plan(base_model: str | None = "me/dense", strategy: str = "sleb") -> PruningPlan:
    return PruningPlan.from_removed("llama", 30, [11, 3], base_model=base_model, strategy=strategy)


def loaded(tmp_path: Path, made: PruningPlan, report: PruningReport) -> ModelCard:
    """Writes the card and reads it as the Hub does."""
    path = tmp_path / "README.md"
    path.write_text(str(model_card(made, report, title="smaller")), encoding="utf-8")
    return ModelCard.load(path)


def test_metadata_and_text(tmp_path: Path) -> None:
    card = loaded(tmp_path, plan(), PruningReport(achieved=SIZES))
    data = card.data.to_dict()
    assert data["base_model"] == "me/dense" and data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["pruned", "block-pruning", "depth-pruning", "optimum", "sleb"]
    lines = card.text.splitlines()
    assert "# smaller" in lines
    assert "`me/dense` with 2 of its 30 transformer blocks removed by" in lines
    assert "Strategy `sleb`; removed blocks, in order: 11, 3." in lines
    assert "| blocks | 30 | 28 |" in lines and "| parameters | 134,515,008 | 127,435,392 |" in lines


@pytest.mark.parametrize(
    ("base_model", "is_repo"),
    [
        ("HuggingFaceTB/SmolLM2-135M", True),
        ("me/a.b_c-d", True),
        (None, False),
        ("gpt2", False),
        ("/home/me/dense", False),
        ("./dense", False),
        ("../dense", False),
        ("~/dense", False),
        ("a/b/c", False),
        ("C:\\models/dense", False),
        ("me/", False),
        ("my models/dense", False),
    ],
)
def test_base_model_is_metadata_only_if_it_is_a_repository(base_model: str | None, is_repo: bool, tmp_path) -> None:
    card = loaded(tmp_path, plan(base_model), PruningReport())
    assert card.data.base_model == (base_model if is_repo else None)
    start = f"`{base_model}` with 2 of" if base_model else "A model with 2 of"
    assert f"\n{start}" in card.text


def test_a_folder_that_is_spelled_like_a_repository_is_none(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "models" / "dense").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert loaded(tmp_path, plan("models/dense"), PruningReport()).data.base_model is None
    assert loaded(tmp_path, plan("models/other"), PruningReport()).data.base_model == "models/other"


def test_nothing_measured_is_said_to_be_so(tmp_path: Path) -> None:
    text = loaded(tmp_path, plan(), PruningReport()).text
    assert "## Measured quality\n\nNot evaluated.\n" in text
    assert "perplexity" not in text and "| blocks |" not in text and "None" not in text


@pytest.mark.parametrize("evaluations", [[DENSE, PRUNED], [PRUNED]])
def test_evaluations_are_a_table(evaluations: list[dict[str, Any]], tmp_path: Path) -> None:
    text = loaded(tmp_path, plan(), PruningReport(evaluations=evaluations)).text
    rows = {
        "dense": "| dense | wikitext2 (test) | 123,456 | 17.13 |",
        "pruned": "| pruned | wikitext2 (test) | 123,456 | 1234.50 |",
    }
    table = "\n".join(["| model | text | tokens | perplexity |", "|---|---|---:|---:|"])
    assert "\n".join([table, *(rows[entry["label"]] for entry in evaluations)]) in text
    assert "Not evaluated." not in text and ("| dense |" in text) == (DENSE in evaluations)


def test_a_strategy_with_an_odd_name_is_still_valid_yaml(tmp_path: Path) -> None:
    for name in ("my: strategy", "yes", "- x", "'quoted'"):
        assert loaded(tmp_path, plan(strategy=name), PruningReport()).data.tags[-1] == name
