# SPDX-License-Identifier: Apache-2.0
"""What a report is told of plan and origin, and how a finished folder takes later figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import tiny_model
from toys import NUM_BLOCKS, config, files_below, toy_folder, toy_pruner

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan, PruningReport
from optimum_blockprune.errors import CheckpointError, PlanError
from optimum_blockprune.records import update_records


CARD = "---\nlicense: mit\nlanguage:\n- de\n---\n# The dense model\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_pruner(num_blocks=1).prune(tmp_path / "out")
    return tmp_path / "out"


def test_the_search_is_in_the_report() -> None:
    pruner = toy_pruner(strategy="sleb", num_blocks=2, seed=3)
    pruner.prune()
    plan, report = pruner.plan, pruner.report
    assert report.scores == plan.scores and len(report.scores) == NUM_BLOCKS - 2
    assert [step["block"] for step in report.steps] == list(plan.removed_blocks)
    assert report.seed == 3 and report.options == plan.options
    assert report.widths == {} and report.history == []


def test_joined_plans_show_the_first_search() -> None:
    pruner = toy_pruner()
    pruner.prune(config=[config("sleb", num_blocks=1), config("magnitude", sparsity=0.4)])
    first = toy_pruner(num_blocks=1).make_plan()
    assert pruner.report.scores == first.scores and len(pruner.report.steps) == 1
    kept = pruner.report.widths["mlp"]["kept"]
    assert [block for block, number in enumerate(kept) if number is None] == list(first.removed_blocks)


def test_widths_have_one_number_for_each_block_of_the_dense_model() -> None:
    pruner = toy_pruner(
        strategy="magnitude", layout="per_layer", protect_last=1, strategy_options={"families": "both"}
    )
    pruner.prune()
    assert set(pruner.report.widths) == {"mlp", "attention"}
    for family, entry in pruner.report.widths.items():
        counts = pruner.plan.width.totals()[family]
        found = [(whole, part) for whole, part in zip(entry["units"], entry["kept"], strict=True) if part is not None]
        assert len(entry["kept"]) == NUM_BLOCKS
        assert (sum(whole for whole, _ in found), sum(part for _, part in found)) == (
            counts["before"],
            counts["after"],
        )


def test_where_the_model_came_from(tmp_path: Path) -> None:
    dense = toy_folder(tmp_path / "dense")
    (dense / "README.md").write_text(CARD)
    pruner = BlockPruner.from_pretrained(dense, BlockPruningConfig("random", num_blocks=2, seed=1))
    pruner.prune(tmp_path / "out")
    facts = PruningReport.from_file(tmp_path / "out").base
    assert facts["model"] == str(dense) and facts["license"] == "mit" and facts["language"] == ["de"]
    assert "--strategy random" in pruner.report.command and "--seed 1" in pruner.report.command
    # The same from the files, and once more from what was pruned.
    pruner.plan.apply_to_checkpoint(dense, tmp_path / "files")
    assert PruningReport.from_file(tmp_path / "files").base == facts
    again = BlockPruner.from_pretrained(tmp_path / "out", BlockPruningConfig("random", num_blocks=1))
    again.prune()
    assert again.report.base["license"] == "mit"
    assert [entry["removed_blocks"] for entry in again.report.history] == [list(pruner.plan.removed_blocks)]


def test_nothing_is_claimed_of_a_model_without_a_name() -> None:
    pruner = BlockPruner(tiny_model("llama"))
    pruner.prune(plan=PruningPlan.from_blocks(pruner.model, [1]))
    assert "license" not in pruner.report.base and "BASE_MODEL" in pruner.report.command


def test_figures_are_added_and_the_card_follows(folder: Path) -> None:
    before = files_below(folder)
    entry = {"label": "pruned", "task": "piqa", "samples": 7, "metrics": {"acc": 0.4321}, "primary": "acc"}
    update_records(folder, lambda report: report.task_results.append(entry))
    after = files_below(folder)
    assert PruningReport.from_file(folder).task_results == [entry]
    assert b"0.432" in after["README.md"] and b"0.432" not in before["README.md"]
    assert {name for name in after if after[name] != before[name]} == {"README.md", "pruning_report.json"}


def test_without_a_change_nothing_changes(folder: Path) -> None:
    before = files_below(folder)
    update_records(folder)
    assert files_below(folder) == before


def test_a_renamed_folder_keeps_its_card(folder: Path) -> None:
    moved = folder.rename(folder.parent / "other")
    before = files_below(moved)
    update_records(moved)
    assert files_below(moved) == before and b"# out" in before["README.md"]


def test_folders_that_are_not_ours(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(PlanError):
        update_records(tmp_path)
    (folder / "pruning_report.json").unlink()
    with pytest.raises(CheckpointError, match="pruning_report.json"):
        update_records(folder)
