# SPDX-License-Identifier: Apache-2.0
"""Blocks that the user names, as a strategy and as the configuration of a manual plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import tiny_model

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan
from optimum_blockprune.errors import ConfigurationError, PlanError


def test_named_blocks_go_in_the_order_given() -> None:
    config = BlockPruningConfig("manual", num_blocks=2, strategy_options={"blocks": "3, 1"})
    pruner = BlockPruner(tiny_model("llama"), config)
    assert pruner.make_plan().removed_blocks == (3, 1)


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [("1", ConfigurationError, "names 1: set num_blocks=1"), ("1,9", PlanError, "Block 9 does not exist")],
)
def test_what_does_not_fit_is_refused(blocks: str, error: type[Exception], message: str) -> None:
    config = BlockPruningConfig("manual", num_blocks=2, strategy_options={"blocks": blocks})
    with pytest.raises(error, match=message):
        BlockPruner(tiny_model("llama"), config).make_plan()


def test_what_is_no_number_is_refused_at_once() -> None:
    with pytest.raises(ConfigurationError, match="must be numbers such as '3,7,8'"):
        BlockPruningConfig("manual", num_blocks=2, strategy_options={"blocks": "one"})


def test_the_configuration_beside_a_manual_plan_repeats_it(tmp_path: Path) -> None:
    pruner = BlockPruner(tiny_model("llama"))
    pruner.prune(tmp_path / "out", plan=PruningPlan.from_blocks(pruner.model, [3, 1]))
    again = BlockPruner(tiny_model("llama"), BlockPruningConfig.from_pretrained(tmp_path / "out"))
    assert again.make_plan().removed_blocks == (3, 1)


def test_a_plan_that_removes_nothing_has_no_configuration(tmp_path: Path) -> None:
    pruner = BlockPruner(tiny_model("llama"))
    pruner.prune(tmp_path / "out", plan=PruningPlan.from_blocks(pruner.model, []))
    assert (tmp_path / "out" / "config.json").is_file()
    assert not (tmp_path / "out" / "block_pruning_config.json").exists()
