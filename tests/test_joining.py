# SPDX-License-Identifier: Apache-2.0
"""Half-blocks and width in one plan: what a second plan says of joined blocks is true of the dense model's halves."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from families import plain_logits, random_ids, tiny_model
from tiers import often
from toys import TEXTS, assert_same_weights, word_tokenizer
from transformers import AutoModelForCausalLM

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan
from optimum_blockprune.errors import PlanError
from optimum_blockprune.half import Half
from optimum_blockprune.joining import all_inputs
from optimum_blockprune.widths import CutTensor, Narrowing, UnitGroup, Width


pytestmark = pytest.mark.usefixtures("no_pictures")

LAYOUTS = ("uniform", "padded", "per_layer")
FAMILIES = ("llama", "qwen3", "phi3", "gemma2", "gpt2", "olmo2", "mistral")
# Of these, heads cannot go in an ordinary checkpoint, or not exactly.
MLP_ONLY = ("gpt2", "olmo2")
TEXT = {"dataset": TEXTS, "num_samples": 4, "seqlen": 16, "batch_size": 2}
# Between the halves that stay lies more than one block.
GONE = "1.mlp,2.attention,2.mlp,3.attention"


def halves(names: str = GONE, **fields: Any) -> BlockPruningConfig:
    count = names.count("mlp") or 1
    return BlockPruningConfig("manual", num_blocks=count, strategy_options={"blocks": names}, **fields)


def width(family: str, layout: str = "uniform", sparsity: float = 0.5) -> BlockPruningConfig:
    families = "mlp" if family in MLP_ONLY else "both"
    options = {"families": families}
    return BlockPruningConfig("magnitude", sparsity=sparsity, layout=layout, strategy_options=options)


def pruned(family: str, *configs: BlockPruningConfig, folder: Path | None = None) -> BlockPruner:
    pruner = BlockPruner(tiny_model(family, 6), tokenizer=word_tokenizer())
    pruner.prune(folder, config=list(configs))
    return pruner


def loaded(folder: Path, layout: str) -> Any:
    return BlockPruner.load_pruned(folder) if layout == "per_layer" else AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "layout"),
    often(
        product(FAMILIES, LAYOUTS),
        kept=lambda case: case[0] == "llama" or case in (("gpt2", "padded"), ("gemma2", "uniform")),
    ),
)
def test_memory_folder_and_files_agree_bit_for_bit(family: str, layout: str, tmp_path: Path) -> None:
    pruner = pruned(family, halves(), width(family, layout), folder=tmp_path / "out")
    plan, ids = PruningPlan.from_file(tmp_path / "out"), random_ids(2, 12)
    assert plan == pruner.plan and plan.width and plan.removed_halves == tuple(GONE.split(","))
    truth = plain_logits(pruner.model, ids)
    again = loaded(tmp_path / "out", layout).eval()
    assert torch.equal(plain_logits(again, ids), truth)
    tokens = {
        cache: again.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    }
    assert torch.equal(tokens[True], tokens[False])
    fresh = plan.apply(tiny_model(family, 6))
    assert_same_weights(dict(fresh.state_dict()), dict(pruner.model.state_dict()))
    assert torch.equal(plain_logits(fresh, ids), truth)
    tiny_model(family, 6).save_pretrained(tmp_path / "dense")
    plan.apply_to_checkpoint(tmp_path / "dense", tmp_path / "files", verify="logits")
    assert torch.equal(plain_logits(loaded(tmp_path / "files", layout).eval(), ids), truth)


def test_units_belong_to_the_block_that_their_half_comes_from() -> None:
    plan = pruned("llama", halves(), width("llama")).plan
    assert [(each.attention, each.mlp) for each in plan.blocks] == [(0, 0), (1, 3), (4, 4), (5, 5)]
    places = {(plan.width.groups[each.group].family, each.block) for each in plan.width.narrowed}
    assert places == {("mlp", block) for block in (0, 3, 4, 5)} | {("attention", block) for block in (0, 1, 4, 5)}


@pytest.mark.parametrize("second", ["1", "1.mlp,2.attention", "0.attention,0.mlp"])
def test_what_goes_later_is_named_by_the_dense_model(second: str) -> None:
    """Against the same three steps in three models, each applied to what the one before left."""
    ids = random_ids(2, 12)
    pruner = pruned("llama", halves(), width("llama"), halves(second))
    model = tiny_model("llama", 6)
    for step in (halves(), width("llama"), halves(second)):
        model = BlockPruner(model).prune(config=step)
    assert torch.equal(plain_logits(pruner.model, ids), plain_logits(model, ids))
    fresh = pruner.plan.apply(tiny_model("llama", 6))
    assert torch.equal(plain_logits(fresh, ids), plain_logits(model, ids))
    assert pruner.plan.num_removed == 3 and len(pruner.plan.removed_halves) == 6


def test_half_blocks_after_width() -> None:
    ids = random_ids(2, 12)
    pruner = pruned("llama", width("llama"), halves())
    assert torch.equal(plain_logits(pruner.plan.apply(tiny_model("llama", 6)), ids), plain_logits(pruner.model, ids))
    places = {(pruner.plan.width.groups[each.group].family, each.block) for each in pruner.plan.width.narrowed}
    assert ("mlp", 1) not in places and ("attention", 1) in places and ("mlp", 3) in places


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_maps_are_folded_before_units_go(layout: str, tmp_path: Path) -> None:
    ids = random_ids(2, 12)
    first = halves("1.mlp,2.attention", compensation="ridge", **{**TEXT, "num_samples": 8})
    pruner = pruned("llama", first, width("llama", layout), folder=tmp_path / "out")
    plan = PruningPlan.from_file(tmp_path / "out")
    assert plan.folds.entries and plan.width
    truth = plain_logits(pruner.model, ids)
    assert torch.equal(plain_logits(plan.apply(tiny_model("llama", 6)), ids), truth)
    tiny_model("llama", 6).save_pretrained(tmp_path / "dense")
    plan.apply_to_checkpoint(tmp_path / "dense", tmp_path / "files")
    assert torch.equal(plain_logits(loaded(tmp_path / "files", layout).eval(), ids), truth)


@pytest.mark.parametrize(("family", "block"), [("mlp", 1), ("attention", 3), ("attention", 2)])
def test_units_of_a_half_that_goes_are_refused(family: str, block: int) -> None:
    plan = pruned("llama", halves(), width("llama")).plan
    numbers = [number for number, group in enumerate(plan.width.groups) if group.family == family]
    moved = next(each for each in plan.width.narrowed if each.group == numbers[0])
    narrowed = [replace(each, block=block) if each is moved else each for each in plan.width.narrowed]
    with pytest.raises(PlanError, match=f"narrows the {family} half of block {block}, which it does not keep"):
        plan.with_provenance(width=replace(plan.width, narrowed=tuple(narrowed)))


def test_the_records_say_both(tmp_path: Path) -> None:
    pruned("llama", halves(), width("llama"), folder=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "as half-blocks" in card and "MLP channels" in card
    report = (tmp_path / "out" / "pruning_report.json").read_text()
    assert '"1.mlp"' in report and '"widths"' in report


def test_two_plans_of_half_blocks_are_one() -> None:
    first = PruningPlan.from_blocks(tiny_model("llama", 6), ["1.mlp", "2.attention"])
    second = PruningPlan.from_blocks(first.apply(tiny_model("llama", 6)), ["1.mlp", "2.attention"])
    both = first.then(second)
    assert [str(Half.read(name)) for name in both.removed_halves] == ["1.mlp", "2.attention", "2.mlp", "3.attention"]


def test_a_change_of_a_narrowed_module_is_zero_where_inputs_are_gone() -> None:
    group = UnitGroup("attention", "head", "o_proj", units=4, tensors=(CutTensor("o_proj.weight", 1, (2,), rest=1),))
    change = torch.arange(1.0, 11.0).reshape(5, 2)
    for layout, more in (("per_layer", 0), ("padded", 2)):
        # Padded, one unit of zeros lies behind those that are kept.
        width = Width(layout, (group,), (Narrowing(3, 0, (1, 3)),), (3,) if more else ())
        given = torch.cat([change[:4], torch.zeros(more, 2), change[4:]])
        whole = all_inputs(width, given, 3, "o_proj")
        assert whole.shape == (9, 2)
        assert torch.equal(whole[[2, 3, 6, 7, 8]], change)
        assert not whole[[0, 1, 4, 5]].any()
        for block, module in ((2, "o_proj"), (3, "down_proj")):
            assert all_inputs(width, given, block, module) is given


@pytest.mark.parametrize(
    ("family", "layout"),
    often(product(["llama", "gpt2"], LAYOUTS), kept=lambda case: case[0] == "llama" or case[1] == "per_layer"),
)
def test_a_change_that_was_fitted_to_a_narrowed_model(family: str, layout: str, tmp_path: Path) -> None:
    """Width first, then blocks with compensation: the saved plan makes the same model of the dense one."""
    depth = BlockPruningConfig(
        "manual", num_blocks=1, compensation="ridge", strategy_options={"blocks": "3"}, **{**TEXT, "num_samples": 8}
    )
    pruner = pruned(family, width(family, layout), depth, folder=tmp_path / "out")
    plan, ids = PruningPlan.from_file(tmp_path / "out"), random_ids(2, 12)
    assert [(each.block, each.kind) for each in plan.folds.entries] == [(2, "change")]
    again = plan.apply(tiny_model(family, 6))
    assert_same_weights(again.state_dict(), pruner.model.state_dict())
    assert torch.equal(plain_logits(again, ids), plain_logits(pruner.model, ids))
