# SPDX-License-Identifier: Apache-2.0
"""`strategy="auto"` is spelt out where a configuration is made, so that what is saved says what was done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optimum_blockprune import BlockPruningConfig
from optimum_blockprune.presets import spelt_out


@pytest.mark.parametrize(
    ("fields", "compensation"),
    [
        ({"num_blocks": 2}, "ridge"),
        ({"sparsity": 0.2, "compensation": "scale"}, "scale"),
        ({"target_speedup": 1.2}, "ridge"),
        ({"max_kl": 0.3}, "ridge"),
    ],
)
def test_auto_is_search_with_ridge_unless_another_is_named(fields: dict[str, Any], compensation: str) -> None:
    config = BlockPruningConfig("auto", dataset="wikitext2", **fields)
    assert (config.strategy, config.compensation) == ("search", compensation)
    spelt = {**fields, "compensation": compensation}
    assert config == BlockPruningConfig("search", dataset="wikitext2", **spelt)


@pytest.mark.parametrize(
    ("fields", "written"),
    [
        ({}, None),
        ({"num_samples": 8, "seqlen": 256}, 24),
        ({"num_samples": 32, "seqlen": 256}, 96),
        ({"num_samples": 100, "seqlen": 256}, 28),
        ({"num_samples": 16}, None),
        ({"num_samples": 32, "seqlen": 256, "generated_samples": 0}, 0),
        ({"num_samples": 128, "seqlen": 2048, "generated_samples": 5}, 5),
    ],
    ids=str,
)
def test_auto_fills_up_little_text(fields: dict[str, int], written: int | None) -> None:
    assert BlockPruningConfig("auto", **fields).generated_samples == written
    assert BlockPruningConfig("search", **{"compensation": "ridge", **fields}).generated_samples == fields.get(
        "generated_samples"
    )


def test_other_strategies_are_left_alone() -> None:
    assert spelt_out({"strategy": "sleb", "seed": 3}) == {"strategy": "sleb", "seed": 3}
    assert BlockPruningConfig("sleb").compensation == "none"


def test_options_of_auto_are_those_of_search() -> None:
    given = {"compensated": "true"}
    assert BlockPruningConfig("auto", strategy_options=given).strategy_options == {"compensated": True}


def test_what_is_saved_is_spelt_out(tmp_path: Path) -> None:
    BlockPruningConfig("auto", num_blocks=3).save_pretrained(tmp_path)
    saved = BlockPruningConfig.from_pretrained(tmp_path)
    assert (saved.strategy, saved.compensation, saved.num_blocks) == ("search", "ridge", 3)
    assert BlockPruningConfig.from_pretrained(tmp_path, strategy="auto", compensation="scale").compensation == "scale"
