# SPDX-License-Identifier: Apache-2.0
"""A budget split between depth and width: what is tried, what decides, and that the model comes back as it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import plain_logits, random_ids
from tiers import often
from toys import TEXTS, assert_unchanged, snapshot, text, toy_folder, wide, word_tokenizer
from transformers import AutoModelForCausalLM

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan
from optimum_blockprune import choosing as choosing_module
from optimum_blockprune import mixing as mixing_module
from optimum_blockprune.errors import (
    CalibrationError,
    ConfigurationError,
    NonFiniteError,
    PlanError,
    ResumeError,
    UnsupportedModelError,
)
from optimum_blockprune.evaluation import size_of


pytestmark = pytest.mark.usefixtures("no_pictures")

TEXT = {"dataset": TEXTS, "num_samples": 4, "seqlen": 16, "batch_size": 2}


def depth(strategy: str = "sleb", **fields: Any) -> BlockPruningConfig:
    return BlockPruningConfig(strategy, **{**TEXT, **fields})


def width(strategy: str = "bip", families: str = "mlp", **fields: Any) -> BlockPruningConfig:
    return BlockPruningConfig(strategy, strategy_options={"families": families}, **{**TEXT, **fields})


def pruner_of(family: str = "llama", blocks: int = 6, **fields: Any) -> BlockPruner:
    return BlockPruner(wide(family, blocks), depth(**fields), word_tokenizer())


def block_size(pruner: BlockPruner) -> int:
    return sum(each.numel() for each in pruner.model.model.layers[0].parameters())


def target_of(pruner: BlockPruner, blocks: float) -> int:
    """What is left without so many blocks' worth of parameters."""
    return size_of(pruner.model)["parameters"] - int(blocks * block_size(pruner))


def trail_of(plan: PruningPlan) -> dict[int, dict[str, Any]]:
    return {each["removed"]: each for each in plan.details["mix"]["trail"]}


def divergence(dense: Any, pruned: Any, ids: torch.Tensor) -> float:
    """KL(dense || pruned) per prediction, from the logits."""
    ours, theirs = (plain_logits(model, ids)[:, :-1].double().log_softmax(-1) for model in (dense, pruned))
    return (ours.exp() * (ours - theirs)).sum(-1).mean().item()


@pytest.mark.parametrize(
    ("family", "gone"),
    often(
        [("llama", 1.5), ("qwen3", 0.3), ("phi3", 1.5), ("gemma2", 0.3), ("gpt2", 1.5)],
        kept=lambda case: case[0] in ("llama", "gemma2", "gpt2"),
    ),
)
def test_the_split_with_the_smallest_divergence_wins_and_loads_anywhere(
    family: str, gone: float, tmp_path: Path
) -> None:
    pruner = BlockPruner(wide(family, 6), depth(), word_tokenizer())
    total = size_of(pruner.model)["parameters"]
    blocks = pruner.model.transformer.h if family == "gpt2" else pruner.model.model.layers
    target = total - int(gone * sum(each.numel() for each in blocks[0].parameters()))
    before = snapshot(pruner.model)
    plan = pruner.mix(target, width=width())
    assert_unchanged(pruner.model, before)
    found = trail_of(plan)
    assert set(found) == set(range(math.ceil(gone) + 1)) and all(
        each["parameters"] <= target for each in found.values()
    )
    best = min(found.values(), key=lambda each: each["kl"])
    assert plan.details["mix"]["removed"] == best["removed"] == plan.num_removed and pruner.plan is plan
    model = pruner.prune(tmp_path / "out", plan=plan)
    assert size_of(model)["parameters"] == best["parameters"]
    ids = random_ids(2, 12)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(plain_logits(again, ids), plain_logits(model, ids))


def test_auto_chooses_the_depth_and_its_maps_stay_with_the_channels(tmp_path: Path) -> None:
    pruner = pruner_of(strategy="auto", dataset=[text(600)], num_samples=6, seqlen=24)
    plan = pruner.mix(target_of(pruner, 2.5), counts=(2,))
    assert plan.strategy == "search+bip" and plan.width and plan.folds
    model = pruner.prune(tmp_path / "out", plan=plan)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(plain_logits(again, random_ids()), plain_logits(model, random_ids()))


def test_the_figures_are_those_of_the_pruned_model_on_windows_of_other_text() -> None:
    pruner = pruner_of()
    ids = random_ids(3, 16, seed=9)
    rows = [{"input_ids": row} for row in ids.tolist()]
    plan = pruner.mix(target_of(pruner, 1.5), width=width(), counts=(1,), held_out_dataset=rows, held_out_samples=3)
    (split,) = plan.details["mix"]["trail"]
    assert plan.details["mix"]["held_out"]["windows"] == 3
    assert plan.details["mix"]["held_out"]["fingerprint"] != plan.calibration["fingerprint"]
    expected = divergence(wide("llama", 6), plan.apply(wide("llama", 6)), ids)
    assert expected > 0.05 and math.isclose(split["kl"], expected, rel_tol=1e-4)


def test_each_split_is_what_the_two_searches_choose_one_after_the_other() -> None:
    pruner = pruner_of()
    target = target_of(pruner, 2.3)
    plan = pruner.mix(target, depth(), width(), counts=(1,))
    one_by_one = pruner.make_plan([depth(num_blocks=1), width(target_params=target)])
    assert (plan.removed_blocks, plan.width) == (one_by_one.removed_blocks, one_by_one.width)
    alone = pruner.mix(target, depth(), width(), counts=(0,))
    assert not alone.num_removed and alone.width == pruner.make_plan(width(target_params=target)).width
    without = pruner.mix(target, depth(), width(), counts=(3,))
    assert not without.width and without.removed_blocks == pruner.make_plan(depth(num_blocks=3)).removed_blocks


def test_widths_of_every_block_and_attention() -> None:
    pruner = pruner_of()
    plan = pruner.mix(target_of(pruner, 2.5), width=width("magnitude", "both", layout="per_layer"), counts=(0, 1, 2))
    assert len(plan.details["mix"]["trail"]) == 3 and all(e["kl"] > 0 for e in plan.details["mix"]["trail"])


def test_a_search_that_does_not_know_its_smaller_choices_chooses_anew() -> None:
    """Maps are fitted to one depth: each split gets its own."""
    pruner = pruner_of(compensation="ridge")
    plan = pruner.mix(target_of(pruner, 2.2), width=width(), counts=(1, 2, 3))
    found = trail_of(plan)
    assert set(found) == {1, 2, 3}
    for count in (1, 3):
        again = pruner.mix(target_of(pruner, 2.2), width=width(), counts=(count,))
        assert trail_of(again)[count] == found[count]
    pruned = pruner.prune(plan=plan)
    assert size_of(pruned)["parameters"] <= plan.details["mix"]["target_params"]


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_half_blocks_and_channels_share_a_budget(layout: str, tmp_path: Path) -> None:
    pruner = pruner_of(unit="half_block", strategy="random", seed=3)
    plan = pruner.mix(target_of(pruner, 2.4), width=width(layout=layout, seed=3), counts=(2,))
    assert len(plan.removed_halves) == 4 and plan.num_removed == 2 and plan.width.layout == layout
    pruner.prune(tmp_path / "out", plan=plan)
    again = BlockPruner.load_pruned(tmp_path / "out")
    assert torch.equal(plain_logits(again, random_ids()), plain_logits(pruner.model, random_ids()))


def test_by_default_channels_go_by_bip_on_the_same_text() -> None:
    pruner = pruner_of()
    target = target_of(pruner, 1.5)
    plan = pruner.mix(target, counts=(1,))
    assert plan.strategy == "sleb+bip" and set(plan.width.totals()) == {"mlp"}
    options = {"families": "mlp", "reduction": "l2"}
    asked = BlockPruningConfig("bip", target_params=target, strategy_options=options, **TEXT)
    assert plan.width == pruner.make_plan([depth(num_blocks=1), asked]).width


def test_what_does_not_fit_is_refused_before_any_text_is_read(monkeypatch) -> None:
    pruner = pruner_of()
    for module in (mixing_module, choosing_module):
        monkeypatch.setattr(module, "calibration_of", _never)
        monkeypatch.setattr(module, "held_out_part", _never)
    before, target = snapshot(pruner.model), target_of(pruner, 1.5)
    total = size_of(pruner.model)["parameters"]
    wrong: list[tuple[str, type[Exception], dict[str, Any]]] = [
        ("leave num_blocks of 'depth' out", ConfigurationError, {"depth": depth(num_blocks=2)}),
        ("leave sparsity of 'width' out", ConfigurationError, {"width": width(sparsity=0.5)}),
        ("'depth' must remove blocks, which 'bip'", ConfigurationError, {"depth": width()}),
        ("'width' must remove channels or heads, which 'sleb'", ConfigurationError, {"width": depth()}),
        ("layout='padded'", ConfigurationError, {"width": width(layout="padded")}),
        ("counts must be a whole number", ConfigurationError, {"counts": (1, -1)}),
        ("counts must be a whole number", ConfigurationError, {"counts": (True,)}),
        ("different numbers", ConfigurationError, {"counts": (1, 1)}),
        ("different numbers", ConfigurationError, {"counts": ()}),
        ("num_blocks=9", ConfigurationError, {"counts": (9,)}),
        ("leaves nothing to remove", ConfigurationError, {"target_params": total}),
        ("cannot be reached", ConfigurationError, {"target_params": 10}),
        ("cannot be reached", ConfigurationError, {"target_params": target_of(pruner, 5), "counts": (1, 2)}),
        ("target_params must be a whole number", ConfigurationError, {"target_params": 1.5}),
        ("held_out_samples must be", ConfigurationError, {"held_out_samples": 0}),
        ("must be of one stack", ConfigurationError, {"width": width(stack="encoder")}),
        ("align=4096", ConfigurationError, {"width": width(align=4096)}),
        ("Held-out text decides", CalibrationError, {"depth": depth("random", dataset=None)}),
    ]
    for message, kind, given in wrong:
        with pytest.raises(kind, match=message):
            pruner.mix(**{"target_params": target, "width": width(), **given})
        assert_unchanged(pruner.model, before)
    assert pruner.plan is None


def test_prompts_with_completions_are_no_text_for_channels() -> None:
    pruner = pruner_of(objective="task")
    with pytest.raises(ConfigurationError, match="no strategy of width does"):
        pruner.mix(target_of(pruner, 1.5))
    rows = [{"prompt": each[:20], "completion": each[20:]} for each in TEXTS]
    deep = depth(dataset=rows, objective="task", num_samples=3)
    plan = pruner.mix(target_of(pruner, 1.5), deep, width(), counts=(1,), held_out_dataset=[TEXTS[0][::-1]] * 4)
    assert plan.details["mix"]["held_out"]["windows"] == 3 and plan.num_removed == 1 and plan.width


def test_a_strategy_that_keeps_too_much_is_caught(monkeypatch) -> None:
    pruner = pruner_of()
    before = snapshot(pruner.model)
    monkeypatch.setattr(mixing_module, "choose", lambda model, *args, **kwargs: PruningPlan.from_blocks(model, []))
    with pytest.raises(PlanError, match="'bip' did not keep to target_params"):
        pruner.mix(target_of(pruner, 1.5), width=width(), counts=(1,))
    assert_unchanged(pruner.model, before)


def _never(*args: Any) -> None:
    raise AssertionError("text is read")


def test_numbers_with_which_the_target_cannot_be_reached_are_left_out() -> None:
    pruner = pruner_of()
    plan = pruner.mix(target_of(pruner, 3.9), width=width())
    assert 0 not in trail_of(plan) and 4 in trail_of(plan)


def test_what_decides_was_not_calibrated_on() -> None:
    pruner = pruner_of()
    with pytest.raises(CalibrationError, match="windows of held_out_dataset are windows of dataset"):
        pruner.mix(target_of(pruner, 1.5), width=width(), counts=(1,), held_out_dataset=TEXTS)
    # Nor by the other part: its windows are all of the text.
    with pytest.raises(CalibrationError, match="'width' calibrates on windows that are held out from 'depth'"):
        pruner.mix(target_of(pruner, 1.5), width=width(num_samples=16), counts=(1,))


@pytest.mark.filterwarnings("ignore")
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(monkeypatch) -> None:
    pruner = pruner_of()
    before, calls = snapshot(pruner.model), []

    def fails(*args: Any, **kwargs: Any) -> PruningPlan:
        calls.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(mixing_module, "choose", fails)
    with pytest.raises(KeyboardInterrupt):
        pruner.mix(target_of(pruner, 1.5), width=width(), counts=(1, 2))
    assert len(calls) == 1 and pruner.plan is None
    assert_unchanged(pruner.model, before)


def test_no_finite_figure_is_an_error(monkeypatch) -> None:
    pruner = pruner_of()
    monkeypatch.setattr(mixing_module._Mixing, "_divergence", lambda self: math.nan)
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        pruner.mix(target_of(pruner, 1.5), width=width(), counts=(1,))


def test_weights_that_lie_elsewhere_are_refused(tmp_path: Path) -> None:
    folder = toy_folder(tmp_path / "dense")
    pruner = BlockPruner.from_pretrained(folder, depth(), stream=True)
    with pytest.raises(UnsupportedModelError, match="streamed or offloaded"):
        pruner.mix(100_000, width=width())


def test_a_run_that_was_broken_off_goes_on(tmp_path: Path, monkeypatch) -> None:
    target = target_of(pruner_of(), 1.5)
    whole = pruner_of().mix(target, width=width(), counts=(1, 2))
    broken, divergence = pruner_of(), mixing_module._Mixing._divergence
    seen = []

    def second_fails(self: Any) -> float:
        seen.append(self)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return divergence(self)

    monkeypatch.setattr(mixing_module._Mixing, "_divergence", second_fails)
    with pytest.raises(KeyboardInterrupt):
        broken.mix(target, width=width(), counts=(1, 2), resume_dir=tmp_path / "kept")
    monkeypatch.undo()
    with pytest.raises(ResumeError):
        pruner_of(seed=1).mix(target, width=width(), counts=(1, 2), resume_dir=tmp_path / "kept")
    pruner = pruner_of()
    again = pruner.mix(target, width=width(), counts=(1, 2), resume_dir=tmp_path / "kept")
    assert again == whole and pruner.report.reused_measurements
    assert not (tmp_path / "kept").exists()


def test_the_report_counts_all_searches() -> None:
    spent = []
    for counts in ((2,), (1, 2)):
        pruner = pruner_of()
        pruner.mix(target_of(pruner, 2.5), width=width(), counts=counts)
        spent.append(pruner.report.block_forwards)
    # The same search of the depth, and one more of the width.
    pruner.make_plan([depth(num_blocks=1), width(target_params=target_of(pruner, 2.5))])
    both = pruner.report.block_forwards
    pruner.make_plan(depth(num_blocks=1))
    assert spent[1] - spent[0] == both - pruner.report.block_forwards > 0


def test_report_and_card_say_what_was_tried(tmp_path: Path) -> None:
    pruner = pruner_of()
    plan = pruner.mix(target_of(pruner, 1.5), width=width(), counts=(1,))
    pruner.prune(tmp_path / "out", plan=plan)
    assert pruner.report.strategy_details["mix"] == plan.details["mix"]
    assert pruner.report.block_forwards > 0 and pruner.report.seconds["held-out text"] > 0
    assert PruningPlan.from_file(tmp_path / "out") == plan
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{plan.details['mix']['target_params']:,}" in card
