# SPDX-License-Identifier: Apache-2.0
"""Half-blocks and channels or heads in one plan: exact in memory, on files and read back, whatever goes first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from families import block_list, plain_logits, random_ids, tiny_model
from test_half_blocks import silenced_halves
from tiers import often
from torch import Tensor, nn
from toys import TEXTS, assert_same_weights, assert_unchanged, snapshot, toy_folder, wide, word_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan, PruningReport
from optimum_blockprune.checkpoint import apply_to_checkpoint
from optimum_blockprune.errors import ConfigurationError, PlanError, UnsupportedModelError
from optimum_blockprune.folds import KINDS, Fold, Folds, digest_of
from optimum_blockprune.half import Half
from optimum_blockprune.picture_depth import depth_words
from optimum_blockprune.sequence import apply_in_order
from optimum_blockprune.shell_text import summary


pytestmark = pytest.mark.usefixtures("no_pictures")


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
    names = plan.removed_halves or [
        f"{block}.{part}" for block in plan.removed_blocks for part in ("attention", "mlp")
    ]
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


@pytest.mark.parametrize(
    ("family", "layout"),
    often(
        product(UNITS, ["uniform", "per_layer"]),
        kept=lambda case: case[0] == "llama" or (case[1] == "uniform" and case[0] in ("gpt2", "gemma2", "phi3")),
    ),
)
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
    "units of what goes": [width("both"), named("1.mlp", "2.attention", "4")],
    "searched halves": [BlockPruningConfig("random", num_blocks=3, seed=5, unit="half_block"), width("both", seed=2)],
    "no units": [named("1.mlp", "2.attention"), named("1", "2.mlp", "3.attention")],
    # Blocks that differ in width of a family lose none of it again in this process, halves or not.
    "units twice": [width("both"), named("1.mlp", "2.attention"), width("mlp", 0.3)],
}
CASES = [(order, layout) for order in ORDERS for layout in ("uniform", "per_layer")][:-1]


@pytest.mark.parametrize(("order", "layout"), often(CASES, kept=lambda case: case in CASES[::3]))
def test_any_order(order: str, layout: str, tmp_path: Path) -> None:
    configs = [
        BlockPruningConfig.from_dict(each.to_dict(), layout=layout) if each.sparsity else each
        for each in ORDERS[order]
    ]
    dense, ids = tiny_model("gemma2", 7), random_ids()
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


# Maps that are folded into weights

# What writes to the stream in each half, and the axis of its outputs.
WRITERS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj", 0),
    "gpt2": ("attn.c_proj", "mlp.c_proj", 1),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm", 0),
}


def folding(model: PreTrainedModel, plan: PruningPlan, kind: str, *halves: str, seed: int = 0) -> PruningPlan:
    """The plan with maps near the identity in some halves."""
    generator, size = torch.Generator().manual_seed(seed), 32
    attention, mlp, axis = WRITERS[model.config.model_type]
    offset = 1.0 if "norm" in mlp else 0.0
    held: dict[str, Tensor] = {}
    entries = []
    for half in map(Half.read, halves):
        module = mlp if half.part == "mlp" else attention
        weight = block_list(model)[half.block].get_submodule(module).weight
        shape = {"matrix": (size, size), "diagonal": (size,), "change": (weight.numel() // size, size)}[kind]
        none = {"matrix": torch.eye(size), "diagonal": 1.0, "change": 0.0}[kind]
        held[str(half)] = none + 0.3 * torch.randn(shape, generator=generator)
        entries.append(Fold(half.block, module, kind, axis, offset, str(half)))
    return plan.with_provenance(folds=Folds(tuple(entries), digest_of(held), held=held))


def carried_out(model: PreTrainedModel, *makers: Callable[[PreTrainedModel], PruningPlan]) -> PruningPlan:
    """One plan after the other in place; returns the joined one."""
    plan, _, _ = apply_in_order(model, [partial(maker, model) for maker in makers], PruningReport())
    return plan


def halves_gone(model: PreTrainedModel) -> PruningPlan:
    return PruningPlan.from_blocks(model, ["1.mlp", "2.attention"])


def narrower(layout: str) -> Callable[[PreTrainedModel], PruningPlan]:
    return lambda model: BlockPruner(model, width(layout=layout)).make_plan()


@pytest.mark.parametrize("layout", often(["uniform", "per_layer"], kept=lambda layout: layout == "uniform"))
@pytest.mark.parametrize(
    ("family", "kind"),
    often(
        [*product(("llama", "gpt2"), KINDS), ("gemma2", "diagonal")],
        kept=lambda case: case in (("llama", "change"), ("gpt2", "matrix"), ("gemma2", "diagonal")),
    ),
)
def test_maps_go_in_before_units_go_out(family: str, kind: str, layout: str, tmp_path: Path) -> None:
    """Also those in the MLP half of block 2, which lies in block 1 when it loses channels."""
    dense, ids = tiny_model(family, 6), random_ids()
    dense.save_pretrained(tmp_path / "dense")
    model = copy.deepcopy(dense)
    maps = ("0.mlp", "1.attention", "2.mlp")
    plan = carried_out(model, lambda live: folding(live, halves_gone(live), kind, *maps), narrower(layout))
    assert [each.block for each in plan.folds.entries] == [0, 1, 2]
    assert {each.block for each in plan.width.narrowed} == {0, 2, 3, 4, 5}
    plan.save(tmp_path)
    again, logits = PruningPlan.from_file(tmp_path), plain_logits(model, ids)
    at_once = again.apply(copy.deepcopy(dense))
    assert_same_weights(at_once.state_dict(), model.state_dict())
    assert torch.equal(plain_logits(at_once, ids), logits)
    again.apply_to_checkpoint(tmp_path / "dense", tmp_path / "copied", verify="logits")
    copied = load(tmp_path / "copied", layout)
    assert_same_weights(copied.state_dict(), model.state_dict())
    assert torch.equal(plain_logits(copied, ids), logits)
    # They are in it: without them it is another model.
    assert relative(plain_logits(plan.with_provenance(folds=Folds()).apply(dense), ids), logits) > 1e-2


@pytest.mark.parametrize("kind", ["matrix", "change"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_maps_of_both_plans(family: str, kind: str) -> None:
    """The second ones are named in numbers of the first result; the order of the two is kept in one module."""
    dense, ids = tiny_model(family, 6), random_ids()
    model = copy.deepcopy(dense)
    plan = carried_out(
        model,
        lambda live: folding(live, halves_gone(live), kind, "1.attention", "2.mlp", "4.mlp"),
        narrower("uniform"),
        # In this model, block 1 is made of 1.attention and 2.mlp, and block 3 is block 4.
        lambda live: folding(live, PruningPlan.from_blocks(live, [3]), kind, "1.mlp", "1.attention", seed=1),
    )
    mlp, attention = WRITERS[family][1], WRITERS[family][0]
    assert [(each.block, each.module) for each in plan.folds.entries] == [
        (1, attention),
        (2, mlp),
        (2, mlp),
        (1, attention),
    ]
    assert len({each.tensor for each in plan.folds.entries}) == 4 == len(plan.folds.tensors())
    assert plan.removed_names == ("1.mlp", "2.attention", "4.attention", "4.mlp")
    at_once = plan.apply(copy.deepcopy(dense))
    # Channels that go first or last are the same ones, but products of other shapes are rounded otherwise.
    for name, tensor in model.state_dict().items():
        assert relative(at_once.state_dict()[name], tensor) < 1e-6
    assert relative(plain_logits(at_once, ids), plain_logits(model, ids)) < 1e-5


def test_a_fitted_map_and_channels(tmp_path: Path) -> None:
    """The way of the user: compensation, then width."""
    text = {"dataset": TEXTS, "num_samples": 8, "seqlen": 16, "batch_size": 2}
    first = BlockPruningConfig(
        "manual", num_blocks=1, compensation="ridge", strategy_options={"blocks": "3.attention,3.mlp"}, **text
    )
    dense = wide("llama")
    pruner = BlockPruner(copy.deepcopy(dense), first, word_tokenizer())
    model = pruner.prune(tmp_path / "out", config=[named("1.mlp", "2.attention"), first, width()])
    # In front of the block that went second, which is block 4 of the dense model.
    assert pruner.plan.removed_names[2:] == ("4.attention", "4.mlp")
    assert [(each.block, each.module) for each in pruner.plan.folds.entries] == [(3, "mlp.down_proj")]
    assert_same_weights(PruningPlan.from_file(tmp_path / "out").apply(dense).state_dict(), model.state_dict())


def test_maps_of_what_goes_later_go_with_it(tmp_path: Path) -> None:
    dense, ids = tiny_model("llama", 6), random_ids()
    model = copy.deepcopy(dense)
    plan = carried_out(
        model,
        lambda live: folding(live, PruningPlan.from_blocks(live, [3]), "matrix", "1.attention", "1.mlp", "2.mlp"),
        lambda live: folding(live, halves_gone(live), "matrix", "1.attention", seed=1),
        narrower("uniform"),
    )
    assert [(each.block, each.module) for each in plan.folds.entries] == [
        (1, "self_attn.o_proj"),
        (2, "mlp.down_proj"),
        (1, "self_attn.o_proj"),
    ]
    plan.save(tmp_path)
    at_once = PruningPlan.from_file(tmp_path).apply(dense)
    assert_same_weights(at_once.state_dict(), model.state_dict())
    assert torch.equal(plain_logits(at_once, ids), plain_logits(model, ids))


# Refused, with nothing changed


def test_layouts_that_cannot_be_joined() -> None:
    model = tiny_model("llama", 6)
    before, pruner = snapshot(model), BlockPruner(model)
    for first, second in (("padded", "padded"), ("uniform", "per_layer")):
        with pytest.raises(ConfigurationError, match=f"layouts {first}, {second} cannot be joined"):
            pruner.prune(config=[width("mlp", layout=first), named(*APART), width("attention", layout=second)])
    assert_unchanged(model, before)


def test_the_model_comes_back(tmp_path: Path) -> None:
    model = tiny_model("llama", 6)
    before, children = snapshot(model), [dict(block._modules) for block in block_list(model)]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    pruner, configs = BlockPruner(model), [named(*APART), width("both")]
    plan = pruner.make_plan(configs)
    for given in ({"config": configs}, {"plan": plan}):
        with pytest.raises(Exception, match="exists"):
            pruner.prune(tmp_path / "out", **given)
    assert_unchanged(model, before)
    assert [dict(block._modules) for block in block_list(model)] == children
    pruner.prune(plan=plan)
    again = BlockPruner(tiny_model("llama", 6))
    again.prune(config=configs)
    assert again.plan.to_dict() == plan.to_dict()
    assert_same_weights(model.state_dict(), again.model.state_dict())


def test_experts_stay_as_they_are() -> None:
    model = tiny_model("mixtral", 6)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="expert"):
        BlockPruner(model).prune(config=[named(*APART), width("mlp")])
    assert_unchanged(model, before)


# Plans that contradict themselves


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    """A joined plan as JSON: (0, 0), (1, 3), (4, 5) with the channels of 0, 3, 5 and the heads of 0, 1, 4."""
    return BlockPruner(tiny_model("llama", 6)).make_plan([named(*APART), width("both")]).to_dict()


def moved(data: dict[str, Any], family: str, block: int, to: int) -> dict[str, Any]:
    """The plan with one narrowing in another block."""
    data = copy.deepcopy(data)
    for each in data["width"]["narrowed"]:
        if data["width"]["groups"][each["group"]]["family"] == family and each["block"] == block:
            each["block"] = to
    return data


@pytest.mark.parametrize(
    ("family", "block", "to", "message"),
    [
        ("mlp", 3, 1, "narrows the mlp half of block 1, which it does not keep"),
        ("mlp", 5, 4, "narrows the mlp half of block 4, which it does not keep"),
        ("attention", 1, 3, "narrows the attention half of block 3, which it does not keep"),
        ("attention", 0, 2, "narrows the attention half of block 2, which it does not keep"),
        ("mlp", 0, 9, "narrows the mlp half of block 9, which it does not keep"),
        ("mlp", 0, 3, "narrows mlp.down_proj of block 3 twice"),
    ],
)
def test_units_of_a_half_that_is_gone(data: dict[str, Any], family: str, block: int, to: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PruningPlan.from_dict(moved(data, family, block, to))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"halves": {"self_attn": "attention"}}, "which modules"),
        ({"halves": {"self_attn": "mlp", "mlp": "attention"}}, "narrows the mlp half of block 1"),
        (
            {"halves": {"self_attn": "attention", "mlp": "attention", "norm": "mlp"}},
            "narrows the attention half of block 3",
        ),
        ({"halves": ["mlp"]}, "malformed"),
        ({"halves": {"self_attn": "attention", "mlp": ["mlp"]}}, "malformed"),
        ({"removed_halves": []}, "names halves of blocks"),
    ],
)
def test_halves_that_contradict_the_width(data: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PruningPlan.from_dict({**data, **change})


def test_units_of_two_halves(data: dict[str, Any]) -> None:
    spoilt = copy.deepcopy(data)
    group = next(each for each in spoilt["width"]["groups"] if each["family"] == "mlp")
    group["tensors"][1]["name"] = "self_attn.q_proj.weight"
    with pytest.raises(PlanError, match="units before 'mlp.down_proj' in the plan lie in both halves"):
        PruningPlan.from_dict(spoilt)


def test_a_map_in_a_half_that_is_gone(data: dict[str, Any]) -> None:
    fold = {"block": 1, "module": "mlp.down_proj", "kind": "matrix", "axis": 0, "offset": 0.0, "tensor": "x"}
    for block, module, kept in (
        (1, "mlp.down_proj", False),
        (3, "mlp.down_proj", True),
        (3, "self_attn.o_proj", False),
    ):
        folds = {"entries": [{**fold, "block": block, "module": module}], "digest": "0"}
        if kept:
            assert PruningPlan.from_dict({**data, "folds": folds}).folds
            continue
        with pytest.raises(
            PlanError, match=f"folds statistics into the .* half of block {block}, which it does not keep"
        ):
            PruningPlan.from_dict({**data, "folds": folds})


def test_a_plan_of_another_model_is_refused(data: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("llama", 6, intermediate_size=64)
    before, plan = snapshot(model), PruningPlan.from_dict(data)
    with pytest.raises(PlanError, match="made for another model"):
        BlockPruner(model).prune(tmp_path / "out", plan=plan)
    assert_unchanged(model, before)
    assert not list(tmp_path.iterdir())
    with pytest.raises(PlanError, match="cut short"):
        plan.truncate(1)


# What is said


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_report_card_and_picture_say_both(layout: str, tmp_path: Path) -> None:
    pruner = BlockPruner(tiny_model("llama", 6))
    model = pruner.prune(tmp_path / "out", config=[named(*APART), width("both", layout=layout)])
    report = PruningReport.from_file(tmp_path / "out")
    assert {**report.to_dict(), "seconds": 0} == {**pruner.report.to_dict(), "seconds": 0}
    assert report.removed_halves == list(APART) and report.removed_blocks == [2]
    assert report.removed_units == ["1.mlp+2.attention", "2.mlp+3.attention", "4.mlp+5.attention"]
    assert report.widths == {
        "mlp": {"units": [48, None, None, 48, None, 48], "kept": [24, None, None, 24, None, 24]},
        "attention": {"units": [2, 2, None, None, 2, None], "kept": [1, 1, None, None, 1, None]},
    }
    assert report.achieved["blocks_after"] == 3 and report.achieved["units"]["mlp"]["removed"] == 0.5
    card = (tmp_path / "out" / "README.md").read_text()
    assert "3 of its 6 transformer blocks (as half-blocks), 50.0 % of its MLP channels and 50.0 % of its KV" in card
    assert f"in order: {', '.join(APART)}" in card and "Width, layout" in card
    assert "blockprune apply" in card and "--plan pruning_plan.json" in card and "blockprune run" not in card
    assert "apply" in report.command
    assert (tmp_path / "out" / "pruning_depth.png").stat().st_size > 1000
    words = depth_words(report)
    assert "3 of 6 blocks as half-blocks" in words and "MLP channels" in words
    entry = model.config.block_pruning
    assert entry["removed_halves"] == list(APART) and entry["layout"] == layout
    assert entry["units"] == pruner.plan.width.totals() and "previous" not in entry
    summed = summary(report, pruner.plan, "out")
    assert f"removed by manual+random: {', '.join(APART)} of 6 blocks and 72 of 144 MLP channels" in summed


def test_the_command_line_applies_it(tmp_path: Path) -> None:
    toy_folder(tmp_path / "dense")
    pruner = BlockPruner.from_pretrained(tmp_path / "dense")
    pruner.prune(tmp_path / "out", config=[named(*APART), width()])
    report = apply_to_checkpoint(PruningPlan.from_file(tmp_path / "out"), tmp_path / "dense", tmp_path / "copied")
    one, other = (PruningReport.from_file(tmp_path / name) for name in ("out", "copied"))
    assert report == tmp_path / "copied" and one.widths == other.widths and one.removed_units == other.removed_units
    assert one.achieved == other.achieved
