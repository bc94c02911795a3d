# SPDX-License-Identifier: Apache-2.0
"""Half-blocks and channels or heads in one plan: exact in memory, on files and read back, whatever goes first."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import block_list, plain_logits, random_ids, tiny_model
from test_half_blocks import silenced_halves
from torch import Tensor, nn
from toys import TEXTS, assert_same_weights, assert_unchanged, snapshot, wide, word_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan, PruningReport
from optimum_blockprune.errors import ConfigurationError, PlanError, UnsupportedModelError
from optimum_blockprune.half import Half


# The MLP that follows the attention of block 1 is that of block 3; block 4 gets that of block 5.
APART = ("1.mlp", "2.attention", "2.mlp", "3.attention", "4.mlp", "5.attention")
# What the families can lose besides: norms over all heads together, and experts in one tensor, keep some of it.
UNITS = {
    "llama": "both",
    "qwen3": "both",
    "gemma2": "both",
    "gemma3_text": "both",
    "phi3": "both",
    "smollm3": "both",
    "gpt2": "mlp",
    "opt": "mlp",
    "olmo2": "mlp",
    "mixtral": "attention",
}
RENAMED = ("mixtral",)


def named(*names: str) -> BlockPruningConfig:
    """Half-blocks (and blocks) by name."""
    count = sum(2 - ("." in name) for name in names) // 2
    return BlockPruningConfig("manual", num_blocks=count, strategy_options={"blocks": ",".join(names)})


def width(families: str = "mlp", sparsity: float = 0.5, **fields: Any) -> BlockPruningConfig:
    options = {"unit": "width", "families": families}
    return BlockPruningConfig("random", sparsity=sparsity, strategy_options=options, **fields)


def relative(one: Tensor, truth: Tensor) -> float:
    return ((one - truth).abs().max() / truth.abs().max()).item()


def switched_off(model: PreTrainedModel, plan: PruningPlan, ids: Tensor) -> Tensor:
    """The truth: logits of the dense model whose halves add zeros and whose writers read zeros, by plain hooks."""
    twin = copy.deepcopy(model)
    for each in plan.width.narrowed:
        group = plan.width.groups[each.group]
        _zero_inputs(block_list(twin)[each.block].get_submodule(group.writer), group.units, each.kept)
    names = plan.removed_halves or [f"{block}.{part}" for block in plan.removed_blocks for part in ("attention", "mlp")]
    return silenced_halves(twin, twin.config.model_type, tuple(names), ids)


def _zero_inputs(writer: nn.Module, units: int, kept: tuple[int, ...]) -> None:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        off = torch.ones(units, dtype=torch.bool)
        off[list(kept)] = False
        each = args[0].shape[-1] // units
        return (args[0].masked_fill(off.repeat_interleave(each), 0.0), *args[1:])

    writer.register_forward_pre_hook(hook)


def same_generation(model: PreTrainedModel) -> bool:
    """Whether a cache changes no token."""
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = random_ids(1, 8)
    cached, uncached = (model.generate(ids, use_cache=use, **settings) for use in (True, False))
    return torch.equal(cached, uncached)


def load(folder: Path, layout: str) -> PreTrainedModel:
    """By transformers alone wherever that can be."""
    kind = BlockPruner.load_pruned if layout == "per_layer" else AutoModelForCausalLM.from_pretrained
    return kind(folder)


# Exact


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("family", UNITS)
def test_halves_and_then_units(family: str, layout: str, tmp_path: Path) -> None:
    dense, ids = tiny_model(family, 6), random_ids()
    dense.save_pretrained(tmp_path / "dense")
    model = copy.deepcopy(dense)
    pruner = BlockPruner(model)
    pruner.prune(tmp_path / "out", config=[named(*APART), width(UNITS[family], layout=layout)])
    plan, logits = pruner.plan, plain_logits(model, ids)
    assert [(source.attention, source.mlp) for source in plan.blocks] == [(0, 0), (1, 3), (4, 5)]
    assert plan.removed_names == APART and plan.removed_blocks == (2,) and plan.width.layout == layout
    writers = {each.writer for each in plan.width.groups}
    places = {"mlp": {0, 3, 5}, "attention": {0, 1, 4}}
    for kind in ("mlp", "attention") if UNITS[family] == "both" else (UNITS[family],):
        numbers = {each.block for each in plan.width.narrowed if plan.width.groups[each.group].family == kind}
        assert numbers == places[kind], writers
    assert relative(logits, switched_off(dense, plan, ids)) < 1e-5
    assert relative(logits, plain_logits(dense, ids)) > 1e-2
    reloaded = load(tmp_path / "out", layout)
    assert torch.equal(plain_logits(reloaded, ids), logits) and same_generation(reloaded)
    # The joined plan, read back and applied at once.
    again = PruningPlan.from_file(tmp_path / "out")
    assert again == plan
    at_once = again.apply(copy.deepcopy(dense))
    assert_same_weights(at_once.state_dict(), model.state_dict())
    assert torch.equal(plain_logits(at_once, ids), logits)
    assert at_once.config.to_dict() == model.config.to_dict()
    if family in RENAMED:
        with pytest.raises(UnsupportedModelError, match="Prune it in memory"):
            again.apply_to_checkpoint(tmp_path / "dense", tmp_path / "copied")
        return
    again.apply_to_checkpoint(tmp_path / "dense", tmp_path / "copied", verify="logits")
    copied = load(tmp_path / "copied", layout)
    assert_same_weights(copied.state_dict(), reloaded.state_dict())
    assert torch.equal(plain_logits(copied, ids), logits)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_zeros_fill_up_joined_blocks(family: str, tmp_path: Path) -> None:
    dense, ids = tiny_model(family, 6), random_ids()
    options = {"unit": "width", "families": "mlp"}
    padded = BlockPruningConfig("random", sparsity=0.5, layout="padded", protect_last=1, strategy_options=options)
    pruner = BlockPruner(copy.deepcopy(dense))
    model = pruner.prune(tmp_path / "out", config=[named(*APART), padded])
    assert pruner.report.achieved["padding_parameters"] > 0
    logits = plain_logits(model, ids)
    assert relative(logits, switched_off(dense, pruner.plan, ids)) < 1e-5
    assert torch.equal(plain_logits(load(tmp_path / "out", "padded"), ids), logits)
    at_once = PruningPlan.from_file(tmp_path / "out").apply(copy.deepcopy(dense))
    assert_same_weights(at_once.state_dict(), model.state_dict())


ORDERS = {
    "halves of joined blocks": [named("1.mlp", "2.attention"), named("1.mlp", "2.attention"), width("both")],
    "a joined block": [named("1.mlp", "2.attention"), named("1"), width("both")],
    "blocks, then halves": [named("2"), named("1.mlp", "2.attention"), width("both")],
    "units before halves": [width("attention"), named(*APART), width("mlp")],
    "units of what goes": [width("both"), named("1.mlp", "2.attention", "4"), width("mlp", 0.3)],
    "searched halves": [BlockPruningConfig("random", num_blocks=3, seed=5, unit="half_block"), width("both", seed=2)],
    "no units": [named("1.mlp", "2.attention"), named("1", "2.mlp", "3.attention")],
}


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_any_order(family: str, order: str, layout: str, tmp_path: Path) -> None:
    configs = [
        BlockPruningConfig.from_dict(each.to_dict(), layout=layout) if each.sparsity else each
        for each in ORDERS[order]
    ]
    if order == "units of what goes" and layout == "per_layer":
        configs = configs[:2]  # one family twice is no layout of blocks that differ
    dense, ids = tiny_model(family, 7), random_ids()
    dense.save_pretrained(tmp_path / "dense")
    pruner = BlockPruner(copy.deepcopy(dense))
    model = pruner.prune(tmp_path / "out", config=configs)
    plan, logits = PruningPlan.from_file(tmp_path / "out"), plain_logits(model, ids)
    assert plan.removed_halves and plan == pruner.plan and len(plan.blocks) == len(block_list(model))
    layout = layout if plan.width else "uniform"
    assert relative(logits, switched_off(dense, plan, ids)) < 1e-5
    assert torch.equal(plain_logits(load(tmp_path / "out", layout), ids), logits) and same_generation(model)
    at_once = plan.apply(copy.deepcopy(dense))
    assert_same_weights(at_once.state_dict(), model.state_dict())
    assert at_once.config.to_dict() == model.config.to_dict()
    plan.apply_to_checkpoint(tmp_path / "dense", tmp_path / "copied", verify="logits")
    assert_same_weights(load(tmp_path / "copied", layout).state_dict(), model.state_dict())


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("kind", ["ridge", "scale"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_maps_go_in_before_units_go_out(family: str, kind: str, layout: str, tmp_path: Path) -> None:
    text = {"dataset": TEXTS, "num_samples": 8, "seqlen": 16, "batch_size": 2}
    options = {"blocks": "1.mlp,2.attention"}
    first = BlockPruningConfig("manual", num_blocks=1, compensation=kind, strategy_options=options, **text)
    dense, ids = wide(family), random_ids()
    dense.save_pretrained(tmp_path / "dense")
    pruner = BlockPruner(copy.deepcopy(dense), first, word_tokenizer())
    model = pruner.prune(tmp_path / "out", config=[first, width(layout=layout)])
    # The map goes into the attention half that stays of block 1, whose MLP half is that of block 2 now.
    assert [each.block for each in pruner.plan.folds.entries] == [1]
    assert {each.block for each in pruner.plan.width.narrowed} == {0, 2, 3, 4, 5}
    plan, logits = PruningPlan.from_file(tmp_path / "out"), plain_logits(model, ids)
    assert torch.equal(plain_logits(load(tmp_path / "out", layout), ids), logits)
    assert_same_weights(plan.apply(copy.deepcopy(dense)).state_dict(), model.state_dict())
    plan.apply_to_checkpoint(tmp_path / "dense", tmp_path / "copied", verify="logits")
    assert_same_weights(load(tmp_path / "copied", layout).state_dict(), model.state_dict())
