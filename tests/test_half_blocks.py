# SPDX-License-Identifier: Apache-2.0
"""Half-blocks: found by running a block, removed exactly, chosen or named, refused where there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, block_list, plain_logits, random_ids, tiny_model
from tiers import often
from torch import Tensor, nn
from toys import toy_folder, toy_pruner
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan, PruningReport
from optimum_blockprune.batches import Batch
from optimum_blockprune.errors import ConfigurationError, PlanError, UnsupportedModelError
from optimum_blockprune.half import Half, removals
from optimum_blockprune.runner import BlockRunner


pytestmark = pytest.mark.usefixtures("no_pictures")


# The module whose output a half adds to the residual stream, written down by hand.
ENDS = {
    "gpt2": ("attn", "mlp"),
    "opt": ("self_attn", "fc2"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
WHOLE_ONLY = ("gpt_neox", "falcon", "bloom")
SEQUENTIAL = [family for family in FAMILIES if family not in WHOLE_ONLY]
# Their files name modules otherwise than the model does.
RENAMED = ("mixtral",)
# Built like others that stay; slow tests here.
LIKE_LLAMA = ("mistral", "qwen2", "smollm3", "granite")
# Block 3 goes whole, the others leave a block of two.
REMOVED = ("1.mlp", "2.attention", "3.attention", "3.mlp")


def silenced_halves(model: PreTrainedModel, family: str, names: tuple[str, ...], ids: Tensor) -> Tensor:
    """The logits when the named halves add zeros, by plain hooks."""
    ends = ENDS.get(family, ("self_attn", "mlp"))
    handles = []
    for name in names:
        block, _, part = name.partition(".")
        module = block_list(model)[int(block)].get_submodule(ends[part == "mlp"])
        handles.append(module.register_forward_hook(_zeros))
    logits = plain_logits(model, ids)
    for handle in handles:
        handle.remove()
    return logits


def _zeros(_module: nn.Module, _args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


# What they are


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_switched_off_halves_are_silent_ones(family: str) -> None:
    model, ids = tiny_model(family, 5), random_ids()
    runner = BlockRunner(model)
    truth = silenced_halves(model, family, REMOVED, ids)
    logits = runner.logits(Batch(ids), [Half.read(name) for name in REMOVED])
    assert torch.equal(logits, truth)
    # Nothing of it stays behind.
    assert torch.equal(runner.logits(Batch(ids)), plain_logits(model, ids))


@pytest.mark.parametrize("family", WHOLE_ONLY)
def test_blocks_without_halves_are_refused(family: str) -> None:
    model = tiny_model(family, 5)
    with pytest.raises(UnsupportedModelError, match=f"'{family}'.*block 0 has no halves.*whole blocks"):
        PruningPlan.from_blocks(model, ["1.mlp", "2.attention"])
    with pytest.raises(UnsupportedModelError, match="has no halves"):
        toy_pruner(family, unit="half_block").make_plan()


def test_what_may_go_are_neighbours() -> None:
    a, m = (lambda block: Half(block, "attention")), (lambda block: Half(block, "mlp"))
    assert removals(4, [], (1, 2)) == [1, (m(1), a(2)), 2]
    assert removals(4, [m(1), a(2)], (1, 2)) == [(a(1), m(2))]
    assert removals(5, [2], (1, 2, 3)) == [1, (m(1), a(3)), 3]


# Surgery


@pytest.mark.parametrize("family", often(SEQUENTIAL, kept=lambda family: family not in LIKE_LLAMA))
def test_pruned_in_memory_reloaded_and_on_files(family: str, tmp_path: Path) -> None:
    model, ids = tiny_model(family, 5), random_ids()
    model.save_pretrained(tmp_path / "dense")
    places = ("pruned",) if family in RENAMED else ("pruned", "copied")
    truth = silenced_halves(model, family, REMOVED, ids)
    plan = PruningPlan.from_blocks(model, REMOVED)
    assert plan.removed_blocks == (3,) and plan.num_removed == 2
    BlockPruner(model).prune(tmp_path / "pruned", plan=plan)
    if family in RENAMED:
        with pytest.raises(UnsupportedModelError, match="'block_sparse_moe'.*Prune it in memory"):
            plan.apply_to_checkpoint(tmp_path / "dense", tmp_path / "copied", verify="keys")
    else:
        plan.apply_to_checkpoint(tmp_path / "dense", tmp_path / "copied", verify="logits")
    for each in (model, *(AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in places)):
        assert len(block_list(each)) == 3
        assert torch.equal(plain_logits(each, ids), truth)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == sum(p.numel() for p in tiny_model(family, 3).parameters())


def test_the_model_comes_back(tmp_path: Path) -> None:
    model, ids = tiny_model("llama", 5), random_ids()
    before, children = plain_logits(model, ids), [dict(block._modules) for block in block_list(model)]
    pruner = BlockPruner(model)
    pruner.plan = PruningPlan.from_blocks(model, REMOVED)
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "file").write_text("mine")
    with pytest.raises(Exception, match="exists"):
        pruner.prune(tmp_path / "pruned", plan=pruner.plan)
    assert torch.equal(plain_logits(model, ids), before)
    assert [dict(block._modules) for block in block_list(model)] == children


# Plans


def test_plans_of_halves_are_json_and_can_be_cut_short() -> None:
    plan = PruningPlan.from_blocks(tiny_model("llama", 5), REMOVED)
    again = PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert plan.truncate(1).removed_names == REMOVED[:2]
    assert plan.truncate(0).removed_names == ()
    assert [(source.attention, source.mlp) for source in plan.blocks] == [(0, 0), (1, 2), (4, 4)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("1.mlp",), "must alternate"),
        (("1.mlp", "1.mlp"), "twice"),
        (("1.mlp", "3.attention"), "must alternate"),
        (("7.mlp", "8.attention"), "does not exist"),
        (("1.norm",), "neither a block"),
        (("x",), "neither a block"),
    ],
)
def test_what_is_left_must_make_up_blocks(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PruningPlan.from_blocks(tiny_model("llama", 5), names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"removed_halves": ["1.mlp", "2.attention"]}, "do not make up the halves"),
        ({"removed_halves": ["1.mlp", "2.attention", "3.attention", "3.x"]}, "malformed"),
        ({"removed_blocks": []}, "lost both halves"),
        ({"halves": {"self_attn": "attention"}}, "which modules"),
        ({"halves": {}}, "which modules"),
        ({"blocks": [{"attention": 0, "mlp": 0}, {"attention": 2, "mlp": 1}, {"attention": 4, "mlp": 4}]}, "halves"),
    ],
)
def test_halves_that_contradict_each_other(change: dict[str, Any], message: str) -> None:
    data = PruningPlan.from_blocks(tiny_model("llama", 5), REMOVED).to_dict()
    with pytest.raises(PlanError, match=message):
        PruningPlan.from_dict({**data, **change})


def test_a_configuration_does_not_tell_halves() -> None:
    with pytest.raises(PlanError, match="give the loaded"):
        PruningPlan.from_blocks(tiny_model("llama", 5).config, REMOVED)


# Search


def silent_pair(model: PreTrainedModel) -> PreTrainedModel:
    """A model in which the MLP of block 2 and the attention of block 3 do nothing, and no whole block does."""
    with torch.no_grad():
        block_list(model)[2].mlp.down_proj.weight.zero_()
        block_list(model)[3].self_attn.o_proj.weight.zero_()
    return model


@pytest.mark.parametrize("search", ["exact", "naive", "race"])
def test_sleb_finds_halves_that_do_nothing(search: str) -> None:
    pruner = toy_pruner(unit="half_block", num_blocks=1, num_samples=8, strategy_options={"search": search})
    pruner.model = silent_pair(pruner.model)
    plan = pruner.make_plan()
    assert plan.removed_names == ("2.mlp", "3.attention")
    assert plan.steps[0]["block"] == "2.mlp+3.attention"
    assert plan.steps[0]["loss"] == pytest.approx(plan.details["dense_loss"], rel=1e-6)
    assert plan.nested is True


def test_exact_search_over_halves_equals_naive_search() -> None:
    exact, naive = (
        toy_pruner(unit="half_block", num_blocks=3, strategy_options={"search": search})
        for search in ("exact", "naive")
    )
    plans = [pruner.make_plan() for pruner in (exact, naive)]
    assert plans[0].removed_names == plans[1].removed_names
    for step, twin in zip(plans[0].steps, plans[1].steps, strict=True):
        assert step["candidates"] == pytest.approx(twin["candidates"], rel=1e-5)
    # Six blocks, the first and the last protected: seven neighbours, then five, then three.
    assert [len(step["candidates"]) for step in plans[0].steps] == [7, 5, 3]
    assert exact.report.block_forwards < naive.report.block_forwards
    assert naive.report.block_forwards == naive.report.naive_block_forwards


def test_blocks_are_among_the_choices() -> None:
    """With the same text, the first step over halves is never worse than over blocks."""
    whole, halves = (toy_pruner(unit=unit, num_blocks=1).make_plan() for unit in ("block", "half_block"))
    assert halves.steps[0]["loss"] <= whole.steps[0]["loss"]
    assert whole.steps[0]["candidates"].items() <= halves.steps[0]["candidates"].items()


def test_a_streamed_model_makes_the_same_choice(tmp_path: Path) -> None:
    folder = toy_folder(tmp_path / "dense")
    fields = {"unit": "half_block", "num_blocks": 2}
    resident, streamed = toy_pruner(**fields), toy_pruner(**fields)
    streamed.model = BlockPruner.from_pretrained(folder, stream=True).model
    assert streamed.make_plan().removed_names == resident.make_plan().removed_names


def test_the_configuration_of_a_plan_removes_halves() -> None:
    pruner = toy_pruner(unit="half_block", num_blocks=2)
    pruner.model = silent_pair(pruner.model)
    assert BlockPruningConfig.from_plan(pruner.make_plan()).unit == "half_block"
    manual = BlockPruningConfig.from_plan(PruningPlan.from_blocks(pruner.model, REMOVED))
    assert (manual.num_blocks, manual.strategy_options) == (2, {"blocks": ",".join(REMOVED)})


def test_random_and_manual_choose_halves() -> None:
    plan = toy_pruner(strategy="random", unit="half_block", num_blocks=3, dataset=None, seed=5).make_plan()
    assert plan.num_removed == 3
    options = {"blocks": "2.mlp, 3.attention"}
    plan = toy_pruner(strategy="manual", num_blocks=1, dataset=None, strategy_options=options).make_plan()
    assert plan.removed_names == ("2.mlp", "3.attention")


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'half_block'"):
        toy_pruner(unit="half")


# What is said


@pytest.mark.usefixtures("pictures")
def test_report_card_and_page_name_the_halves(tmp_path: Path) -> None:
    pruner = toy_pruner()
    pruner.prune(tmp_path / "out", plan=PruningPlan.from_blocks(pruner.model, REMOVED))
    report = PruningReport.from_file(tmp_path / "out")
    assert report.removed_halves == list(REMOVED)
    assert report.removed_units == ["1.mlp+2.attention", 3]
    assert report.achieved["blocks_after"] == 4
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2 of its 6 transformer blocks (as half-blocks)" in card
    assert "1.mlp, 2.attention, 3.attention, 3.mlp" in card
    assert "--blocks 1.mlp,2.attention,3.attention,3.mlp" in card
    assert (tmp_path / "out" / "pruning_depth.png").stat().st_size > 1000
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.block_pruning["removed_halves"] == list(REMOVED)
