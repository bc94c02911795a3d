# SPDX-License-Identifier: Apache-2.0
"""LLM-BIP against the printed formulas, evaluated here in full: every matrix, every token, own hooks, own tables."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import block_list, plain_logits, random_ids, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F
from toys import assert_unchanged, snapshot
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum_blockprune import BlockPruner, BlockPruningConfig
from optimum_blockprune.choosing import score_units
from optimum_blockprune.errors import (
    CalibrationError,
    ConfigurationError,
    NonFiniteError,
    UnsupportedModelError,
)
from optimum_blockprune.registry import get_strategy
from optimum_blockprune.strategies.bip import BIP, BIPOptions


IDS = random_ids(6, 16, seed=3)
TANH = partial(F.gelu, approximate="tanh")


@dataclass(frozen=True)
class Family:
    """What the truth is told about a model; the package has to find it out."""

    up: str = "mlp.up_proj"
    gate: str | None = "mlp.gate_proj"
    down: str = "mlp.down_proj"
    out: str = "self_attn.o_proj"
    norm: str = "post_attention_layernorm"
    units: int = 2
    activation: Any = F.silu
    posts: tuple[str, str] | None = None
    gemma: bool = False
    parallel: bool = False
    layout: str = "uniform"


FAMILIES = {
    "llama": Family(),
    "gemma2": Family(
        norm="pre_feedforward_layernorm",
        activation=TANH,
        posts=("post_attention_layernorm", "post_feedforward_layernorm"),
        gemma=True,
    ),
    "phi3": Family(up="mlp.gate_up_proj", gate="mlp.gate_up_proj"),
    "gpt2": Family("mlp.c_fc", None, "mlp.c_proj", "attn.c_proj", "ln_2", 4, TANH, layout="per_layer"),
    "phi": Family("mlp.fc1", None, "mlp.fc2", "self_attn.dense", "input_layernorm", activation=TANH, parallel=True),
    "gpt_neox": Family(
        "mlp.dense_h_to_4h",
        None,
        "mlp.dense_4h_to_h",
        "attention.dense",
        "input_layernorm",
        4,
        parallel=True,
        layout="per_layer",
    ),
}


def config(ids: Tensor | list[dict[str, list[int]]] = IDS, **fields: Any) -> BlockPruningConfig:
    """Half of the units by all rows of `ids`; `fields` are options where the recipe has no such field."""
    rows = [{"input_ids": row} for row in ids.tolist()] if isinstance(ids, Tensor) else ids
    recipe = {"sparsity": 0.5, "num_samples": len(rows), "seqlen": len(rows[0]["input_ids"]), "batch_size": 4}
    for name in ("layout", "sparsity", "batch_size", "protect_first", "protect_last"):
        if name in fields:
            recipe[name] = fields.pop(name)
    return BlockPruningConfig(strategy="bip", strategy_options=fields, dataset=rows, **recipe)


def scores_of(model: PreTrainedModel, recipe: BlockPruningConfig) -> dict[int, dict[str, list[float]]]:
    return score_units(model, recipe.recipe, None)


# --- the truth -------------------------------------------------------------------------------------------------------


@contextmanager
def seen(block: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Input and output of every module of a block, flattened to [N, channels], fp64."""
    records: dict[str, tuple[Tensor, Tensor]] = {}

    def keeper(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            values = (args[0] if args else next(iter(kwargs.values())), output)
            values = tuple(value[0] if isinstance(value, tuple) else value for value in values)
            records[name] = tuple(value.flatten(0, -2).double() for value in values)

        return hook

    handles = [
        module.register_forward_hook(keeper(name), with_kwargs=True)
        for name, module in block.named_modules()
        if not isinstance(module, nn.Dropout)
    ]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def matrix(block: nn.Module, name: str) -> Tensor:
    """|W|, inputs x outputs."""
    module = block.get_submodule(name)
    weight = module.weight.detach().double().abs()
    return weight if isinstance(module, Conv1D) else weight.T


def gain(family: Family, norm: nn.Module) -> Tensor:
    return (norm.weight.detach().double() + family.gemma).abs()


def denominator(norm: nn.Module, x: Tensor) -> Tensor:
    """[N, 1], from the definition."""
    if isinstance(norm, nn.LayerNorm):
        return (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return (x.square().mean(-1, keepdim=True) + eps).sqrt()


def halves(family: Family, values: Tensor) -> tuple[Tensor, Tensor]:
    """What gate and up are of a tensor with outputs last."""
    return values.chunk(2, -1) if family.up == family.gate else (values, values)


def slope(activation: Any, at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    return torch.autograd.grad(activation(at).sum(), at)[0]


def readers(family: Family, block: nn.Module, records: dict[str, tuple[Tensor, Tensor]], propagate: str) -> Tensor:
    """R of I + R |W_D|, d x m."""
    up = halves(family, matrix(block, family.up))[1]
    if propagate == "paper":
        return up
    norm = block.get_submodule(family.norm)
    inverse = 1 / denominator(norm, records[family.norm][0])
    u = halves(family, records[family.up][1])[1]
    g = None if family.gate is None else halves(family, records[family.gate][1])[0]
    if g is None:
        return gain(family, norm)[:, None] * up * (slope(family.activation, u) * inverse).abs().mean(0)
    gate = halves(family, matrix(block, family.gate))[0]
    bracket = gate * (slope(family.activation, g) * u * inverse).abs().mean(0)
    bracket = bracket + up * (family.activation(g) * inverse).abs().mean(0)
    return gain(family, norm)[:, None] * bracket


def behind(family: Family, block: nn.Module, records: dict[str, tuple[Tensor, Tensor]], place: int) -> Tensor | float:
    """What a writer's columns are multiplied with: 1, or |gamma_post| E[1 / rms_post]."""
    if family.posts is None:
        return 1.0
    name = family.posts[place]
    norm = block.get_submodule(name)
    return gain(family, norm) * (1 / denominator(norm, records[name][0])).mean()


def truth(
    family: Family, block: nn.Module, records: dict[str, tuple[Tensor, Tensor]], reduction: str, propagate: str
) -> dict[str, list[float]]:
    """Scores of section 1.3, every entry of every matrix: tokens x hidden coordinates."""

    def scalar(column: Tensor, row: Tensor) -> float:
        product = column.abs()[:, None] * row[None]
        return float(product.sum() if reduction == "l1" else product.square().sum().sqrt())

    down = matrix(block, family.down) * behind(family, block, records, 1)
    out = matrix(block, family.out) * behind(family, block, records, 0)
    reach = torch.eye(down.shape[1], dtype=torch.float64)
    if propagate != "none" and not family.parallel:
        reach = reach + readers(family, block, records, propagate) @ down
    channels, heads = records[family.down][0], records[family.out][0]
    per_channel = [scalar(heads[:, j], out[j] @ reach) for j in range(len(out))]
    size = len(out) // family.units
    return {
        family.down: [scalar(channels[:, j], down[j]) for j in range(len(down))],
        family.out: [sum(per_channel[unit * size : (unit + 1) * size]) for unit in range(family.units)],
    }


@pytest.mark.parametrize("propagate", ["none", "paper", "local"])
@pytest.mark.parametrize("reduction", ["l1", "l2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_the_printed_formulas(name: str, reduction: str, propagate: str) -> None:
    family, model = FAMILIES[name], tiny_model(name, 2)
    recipe = config(reduction=reduction, propagate=propagate, layout=family.layout)
    found = scores_of(model, recipe)
    for number, block in enumerate(block_list(model)):
        with seen(block) as records:
            plain_logits(model, IDS)
        expected = truth(family, block, records, reduction, propagate)
        assert found[number].keys() == expected.keys()
        for writer, scores in expected.items():
            assert found[number][writer] == pytest.approx(scores, rel=1e-6), (number, writer)


@pytest.mark.parametrize("families", ["mlp", "attention"])
def test_one_family_has_the_scores_of_both(families: str) -> None:
    """The FFN behind attention is found although its channels are not asked for."""
    model = tiny_model("phi3", 2)
    both, one = (scores_of(model, config(propagate="local", families=each)) for each in ("both", families))
    for block, writers in one.items():
        assert len(writers) == 1
        for writer, scores in writers.items():
            assert scores == pytest.approx(both[block][writer], rel=1e-12)


# --- exactness -------------------------------------------------------------------------------------------------------


def outputs_without(model: PreTrainedModel, number: int, writer: str, channels: slice, ids: Tensor = IDS) -> Tensor:
    """Output of a block [B, S, d] whose writer reads zeros from some inputs."""

    def silence(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        values = args[0].clone()
        values[..., channels] = 0
        return (values, *args[1:])

    block, caught = block_list(model)[number], []
    handles = [
        block.get_submodule(writer).register_forward_pre_hook(silence),
        block.register_forward_hook(lambda _module, _args, output: caught.append(output)),
    ]
    plain_logits(model, ids)
    for handle in handles:
        handle.remove()
    return (caught[0][0] if isinstance(caught[0], tuple) else caught[0]).double()


def measured(change: Tensor, reduction: str) -> float:
    return float(change.abs().sum() if reduction == "l1" else change.square().sum().sqrt())


NOTHING = slice(0, 0)


@pytest.mark.parametrize("reduction", ["l1", "l2"])
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_the_score_of_a_channel_is_exactly_what_its_removal_changes(name: str, reduction: str) -> None:
    model, family = tiny_model(name, 2), FAMILIES[name]
    found = scores_of(model, config(reduction=reduction, families="mlp"))
    for number in range(2):
        dense = outputs_without(model, number, family.down, NOTHING)
        for channel in (0, 17, 47):
            change = outputs_without(model, number, family.down, slice(channel, channel + 1)) - dense
            assert found[number][family.down][channel] == pytest.approx(measured(change, reduction), rel=1e-4)


@pytest.mark.parametrize("reduction", ["l1", "l2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_exact_is_what_the_removal_of_a_head_changes(name: str, reduction: str) -> None:
    family, model = FAMILIES[name], tiny_model(name, 3)
    recipe = config(propagate="exact", reduction=reduction, exact_samples=3, batch_size=2, layout=family.layout)
    found = scores_of(model, recipe)
    for number in range(3):
        dense = outputs_without(model, number, family.out, NOTHING, IDS[:3])
        size = len(matrix(block_list(model)[number], family.out)) // family.units
        units = (slice(unit * size, (unit + 1) * size) for unit in range(family.units))
        without = (outputs_without(model, number, family.out, unit, IDS[:3]) for unit in units)
        expected = [measured(each - dense, reduction) for each in without]
        assert found[number][family.out] == pytest.approx(expected, rel=1e-5)


def test_exact_leaves_channels_as_they_are() -> None:
    model = tiny_model("llama", 2)
    paper, exact = scores_of(model, config()), scores_of(model, config(propagate="exact"))
    assert [exact[block]["mlp.down_proj"] for block in (0, 1)] == [paper[block]["mlp.down_proj"] for block in (0, 1)]


def test_the_bound_of_a_head_is_one_where_nothing_lies_behind_it() -> None:
    """Parallel residual: |x_H| |W_O| bounds what the removal of a head changes."""
    model = tiny_model("phi", 2)
    bound, exact = scores_of(model, config()), scores_of(model, config(propagate="exact"))
    for block in (0, 1):
        pairs = zip(exact[block]["self_attn.dense"], bound[block]["self_attn.dense"], strict=True)
        assert all(true <= most * (1 + 1e-6) for true, most in pairs)


# --- what is counted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("propagate", ["paper", "local", "exact"])
def test_padding_does_not_count(propagate: str, left: bool) -> None:
    model, short, filling = tiny_model("gemma2", 2), IDS[:3, :9].tolist(), [5] * 4
    masked = [
        {
            "input_ids": filling + row if left else row + filling,
            "attention_mask": [0] * 4 + [1] * 9 if left else [1] * 9 + [0] * 4,
        }
        for row in short
    ]
    one, other = (scores_of(model, config(ids, propagate=propagate)) for ids in (IDS[:3, :9], masked))
    for block, writers in one.items():
        for writer, scores in writers.items():
            assert other[block][writer] == pytest.approx(scores, rel=1e-5)


@pytest.mark.parametrize("propagate", ["paper", "local", "exact"])
def test_the_batch_size_does_not_matter(propagate: str) -> None:
    model = tiny_model("gemma2", 2)
    runs = [scores_of(model, config(propagate=propagate, batch_size=size)) for size in (1, 4, 6)]
    for other in runs[1:]:
        for block, writers in runs[0].items():
            for writer, scores in writers.items():
                assert other[block][writer] == pytest.approx(scores, rel=1e-5)


def test_the_first_token_can_be_left_out() -> None:
    family, model = FAMILIES["llama"], tiny_model("llama", 2)
    found = scores_of(model, config(skip_first=True, reduction="l2"))
    block = block_list(model)[1]
    with seen(block) as records:
        plain_logits(model, IDS)
    rest = {name: tuple(x.view(6, 16, -1)[:, 1:].flatten(0, 1) for x in pair) for name, pair in records.items()}
    for writer, scores in truth(family, block, rest, "l2", "paper").items():
        assert found[1][writer] == pytest.approx(scores, rel=1e-6)


def test_one_pass_and_no_stored_activation() -> None:
    for ids, propagate in ((IDS[:2], "local"), (IDS, "local"), (IDS, "paper")):
        pruner = BlockPruner(tiny_model("llama", 3), config(ids, propagate=propagate))
        plan = pruner.make_plan()
        assert pruner.report.block_forwards == 3 * len(ids)
        assert pruner.report.head_forwards == 0
        assert plan.details["tokens"] == 16 * len(ids)
        # Per block: inputs of o_proj and down_proj, and two slopes per channel; however many windows.
        assert plan.details["stored_values"] == 3 * (32 + 48 + (2 * 48 if propagate == "local" else 0))


def test_exact_runs_each_block_once_and_once_per_unit() -> None:
    pruner = BlockPruner(tiny_model("llama", 3), config(families="attention", propagate="exact", exact_samples=4))
    plan = pruner.make_plan()
    assert pruner.report.block_forwards == 3 * (1 + 2) * 4
    assert plan.details["exact_tokens"] == 4 * 16


def test_the_model_is_left_alone() -> None:
    model = tiny_model("gemma2", 2).train()
    before = snapshot(model)
    for propagate in ("local", "exact"):
        BlockPruner(model, config(propagate=propagate)).make_plan()
    assert_unchanged(model, before)


# --- what the plan says ----------------------------------------------------------------------------------------------


def test_the_mean_of_v_is_reported() -> None:
    model = tiny_model("llama", 2)
    plan = BlockPruner(model, config()).make_plan()
    for number, block in enumerate(block_list(model)):
        v = 1 + matrix(block, "mlp.up_proj") @ matrix(block, "mlp.down_proj").sum(1)
        assert plan.details["v_means"][str(number)] == pytest.approx(float(v.mean()))
    assert plan.details["up"] == ["up"]
    assert plan.details["parallel_blocks"] == plan.details["unpropagated_blocks"] == []


@pytest.mark.parametrize("name", ["phi", "cohere"])
def test_parallel_residual_has_no_reach(name: str) -> None:
    details = BlockPruner(tiny_model(name, 2), config()).make_plan().details
    assert details["parallel_blocks"] == [0, 1]
    assert details["v_means"] == {"0": 1.0, "1": 1.0}


def test_experts_leave_attention_unpropagated() -> None:
    model = tiny_model("mixtral", 2)
    plan = BlockPruner(model, config(families="attention")).make_plan()
    assert plan.details["unpropagated_blocks"] == [0, 1]
    none = scores_of(model, config(families="attention", propagate="none"))
    assert scores_of(model, config(families="attention")) == none


def test_uniform_keeps_the_highest_scores_of_every_block() -> None:
    model = tiny_model("llama", 3)
    found = scores_of(model, config())
    plan = BlockPruner(model, config()).make_plan()
    for each in plan.width.narrowed:
        scores = found[each.block][plan.width.groups[each.group].writer]
        best = sorted(range(len(scores)), key=lambda unit: -scores[unit])[: len(scores) // 2]
        assert list(each.kept) == sorted(best)


@pytest.mark.parametrize("propagate", ["paper", "exact"])
@pytest.mark.parametrize("reduction", ["l1", "l2"])
def test_global_divides_by_the_output_and_the_cost(reduction: str, propagate: str) -> None:
    model = tiny_model("llama", 3)
    options = {"reduction": reduction, "propagate": propagate, "layout": "per_layer"}
    raw, ranked = scores_of(model, config(**options)), scores_of(model, config(**options, ranking="global"))
    # gate, up and down; q of two heads, k, v, and o of two heads, of size 8.
    cost = {"mlp.down_proj": 3 * 32, "self_attn.o_proj": 6 * 8 * 32}
    for number in range(3):
        size = measured(outputs_without(model, number, "mlp.down_proj", NOTHING), reduction)
        for writer, scores in raw[number].items():
            expected = [score / size / cost[writer] for score in scores]
            assert ranked[number][writer] == pytest.approx(expected, rel=1e-5)


def test_global_gives_blocks_their_own_width() -> None:
    plan = BlockPruner(
        tiny_model("llama", 4), config(ranking="global", layout="per_layer", families="mlp")
    ).make_plan()
    counts = [len(each.kept) for each in plan.width.narrowed]
    assert sum(counts) == 4 * 24
    assert plan.details["thresholds"]["mlp"] > 0


def test_protected_blocks_are_not_measured() -> None:
    recipe = config(layout="per_layer", protect_first=1, protect_last=1)
    found = scores_of(tiny_model("llama", 4), recipe)
    assert sorted(found) == [1, 2]


# --- options and refusals --------------------------------------------------------------------------------------------


def test_defaults_are_the_paper() -> None:
    assert vars(BIPOptions()) == {
        "reduction": "l1",
        "propagate": "paper",
        "families": "both",
        "ranking": "uniform",
        "skip_first": False,
        "exact_samples": 8,
    }
    assert get_strategy("bip") is BIP
    assert (BIP.protect_first, BIP.protect_last) == (0, 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reduction": "l3"}, "Unknown reduction 'l3' for bip.*Available: l1, l2"),
        ({"propagate": "papers"}, "Did you mean 'paper'.*exact, local, none, paper"),
        ({"families": "heads"}, "Unknown families 'heads'.*attention, both, mlp"),
        ({"ranking": "local"}, "Unknown ranking 'local'.*global, uniform"),
        ({"skip_first": 1}, "skip_first=1 of bip must be true or false"),
        ({"exact_samples": 0}, "exact_samples=0 of bip must be a whole number of at least 1"),
        ({"exact_samples": True}, "exact_samples=True of bip"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        BIPOptions(**options)


def test_global_needs_a_layout_for_it() -> None:
    pruner = BlockPruner(tiny_model("llama", 2), config(ranking="global"))
    with pytest.raises(ConfigurationError, match="layout='uniform' does not have"):
        pruner.make_plan()
    assert pruner.report.block_forwards in (None, 0)


def test_text_is_needed() -> None:
    with pytest.raises(CalibrationError, match="dataset"):
        BlockPruner(tiny_model("llama", 2), BlockPruningConfig(strategy="bip", sparsity=0.5)).make_plan()


@pytest.mark.parametrize("propagate", ["paper", "exact"])
def test_an_overflow_is_named(propagate: str) -> None:
    model = tiny_model("llama", 3)
    with torch.no_grad():
        model.get_input_embeddings().weight[1] = math.inf
    ids = IDS.clone()
    ids[2, 5] = 1  # a special token, which made-up inputs do not have
    with pytest.raises(NonFiniteError, match="block 0"):
        scores_of(model, config(ids, propagate=propagate, families="attention"))


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_local_says_what_it_cannot_see() -> None:
    model = tiny_model("llama", 2)
    block = block_list(model)[1]
    block.post_attention_layernorm = nn.Sequential(block.post_attention_layernorm, Twice())
    with pytest.raises(UnsupportedModelError, match="block 1, but the norm before it.*propagate='paper' or 'exact'"):
        scores_of(model, config(propagate="local", families="attention"))
    assert scores_of(model, config(propagate="paper", families="attention"))


# --- end to end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("propagate", ["paper", "exact"])
def test_the_saved_model_is_the_one_in_memory(propagate: str, tmp_path: Path) -> None:
    tiny_model("llama", 3).save_pretrained(tmp_path / "dense")
    pruner = BlockPruner.from_pretrained(tmp_path / "dense", config(propagate=propagate))
    pruned = pruner.prune(save_dir=tmp_path / "pruned")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert reloaded.config.intermediate_size == 24 and reloaded.config.num_key_value_heads == 1
    assert reloaded.config.num_attention_heads == 2 and reloaded.config.head_dim == 8
    assert torch.equal(plain_logits(reloaded, IDS), plain_logits(pruned, IDS))
