# SPDX-License-Identifier: Apache-2.0
"""Functional-network pruning from text to checkpoint; the numbers are tested where they are made."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from families import block_list, plain_logits, random_ids, tiny_model
from toys import assert_unchanged, snapshot
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_blockprune import BlockPruner, BlockPruningConfig
from optimum_blockprune.errors import CalibrationError, ConfigurationError, NonFiniteError
from optimum_blockprune.plan import PruningPlan
from optimum_blockprune.strategies.functional_network import FunctionalNetwork, FunctionalNetworkOptions


DATA = [{"input_ids": random_ids(1, 32, seed=seed)[0].tolist()} for seed in range(8)]
UNITS, KEEP = 48, 32


def pruner_of(model: PreTrainedModel, fields: dict[str, Any] | None = None, **options: Any) -> BlockPruner:
    """Two groups of 124 tokens, four components; `fields` are those of the configuration."""
    block = options.get("unit") == "block"
    defaults = {"components": 4, **({} if block else {"groups": 2})}
    settings = {"sparsity": 0.3, "dataset": DATA, "num_samples": 8, "seqlen": 32, "batch_size": 4, **(fields or {})}
    if block:
        settings = {"protect_first": 0, "protect_last": 0, **settings}
    config = BlockPruningConfig(strategy="functional_network", strategy_options={**defaults, **options}, **settings)
    return BlockPruner(model, config)


def plan_of(model: PreTrainedModel, fields: dict[str, Any] | None = None, **options: Any) -> PruningPlan:
    return pruner_of(model, fields, **options).make_plan()


def kept(plan: PruningPlan) -> list[tuple[int, ...]]:
    return [each.kept for each in plan.width.narrowed]


# --- width -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_uniform_keeps_the_same_number_everywhere(family: str) -> None:
    model = tiny_model(family)
    before = snapshot(model)
    plan = plan_of(model)
    assert_unchanged(model, before)
    assert {len(each) for each in kept(plan)} == {88 if family == "gpt2" else KEEP}
    assert len(kept(plan)) == 5
    assert plan.removed_blocks == ()
    for step in plan.steps:
        assert step["highest_removed"] <= step["lowest_kept"]
    assert plan.details["thresholds"] == {"mlp": max(step["highest_removed"] for step in plan.steps)}
    assert plan.details["fits"] == 10
    assert plan.details["writer_input_blocks"] == []


def test_memory_figure_is_the_bound_of_the_docstring() -> None:
    streams, signals, scores = 8 * 32 * 32, 124 * 2 * UNITS, 5 * UNITS
    assert plan_of(tiny_model("llama")).details["stored_values"] == streams + signals + scores


def test_global_counts_units_over_all_free_blocks() -> None:
    model = tiny_model("llama", 8)
    plan = plan_of(model, {"layout": "per_layer", "align": 1}, ranking="global")
    widths = [len(each) for each in kept(plan)]
    assert widths[:3] == [UNITS] * 3
    assert widths[-2:] == [UNITS] * 2
    excess = 3 * UNITS - sum(widths[3:6])
    assert excess == 3 * (UNITS - round(0.7 * UNITS))
    assert len(set(widths[3:6])) > 1
    assert min(widths) >= 5
    assert plan.details["fits"] == 6
    assert set(plan.details["thresholds"]) == {"mlp"}


def test_global_needs_a_layout_with_several_widths() -> None:
    with pytest.raises(ConfigurationError, match="ranking='global' gives every block its own width"):
        plan_of(tiny_model("llama"), ranking="global")


def test_planted_dead_channels_go() -> None:
    model, dead = tiny_model("llama"), [3, 17, 40]
    with torch.no_grad():
        for block in block_list(model):
            block.mlp.gate_proj.weight[dead] = 0.0
            block.mlp.up_proj.weight[dead] = 0.0
    for each in kept(plan_of(model)):
        assert not set(dead) & set(each)


def test_controls_change_the_choice_but_not_the_counts() -> None:
    model = tiny_model("llama")
    choices = {control: kept(plan_of(model, control=control)) for control in ("none", "leverage_only")}
    choices["random_rotation"] = kept(plan_of(model, control="random_rotation"))
    assert {len(each) for choice in choices.values() for each in choice} == {KEEP}
    assert len({str(choice) for choice in choices.values()}) == 3


def test_signals_and_first_tokens_matter() -> None:
    model = tiny_model("llama")
    plain, product, first = plan_of(model), plan_of(model, signals="product"), plan_of(model, keep_first=True)
    assert len({str(kept(plan)) for plan in (plain, product, first)}) == 3
    assert (plain.details["tokens"], first.details["tokens"]) == ([124, 124], [128, 128])


def test_plans_repeat_and_leave_the_global_generators_alone() -> None:
    model = tiny_model("llama")
    state = torch.get_rng_state()
    plan = plan_of(model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert kept(plan_of(model)) == kept(plan)
    assert plan_of(model).details == plan.details
    assert kept(plan_of(model, {"batch_size": 1})) == kept(plan)


def test_tokens_are_limited_group_by_group() -> None:
    assert plan_of(tiny_model("llama"), max_tokens=50).details["tokens"] == [50, 50]


def test_groups_are_at_most_the_windows() -> None:
    data = [{"input_ids": random_ids(1, 64, seed=seed)[0].tolist()} for seed in range(3)]
    plan = plan_of(tiny_model("llama"), {"dataset": data, "num_samples": 3, "seqlen": 64}, groups=8)
    assert plan.details["tokens"] == [63, 63, 63]


def test_too_little_text_is_refused_before_anything_runs() -> None:
    pruner = pruner_of(tiny_model("llama"), groups=8)
    with pytest.raises(CalibrationError, match="found 31 usable tokens in one of 8 groups.*needs 40.*fewer groups"):
        pruner.make_plan()


def test_pruned_models_reload_with_stock_transformers(tmp_path: Path) -> None:
    model = tiny_model("llama")
    pruner = pruner_of(model)
    result = pruner.prune()
    pruner.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.intermediate_size == KEEP
    ids = random_ids()
    torch.testing.assert_close(plain_logits(again, ids), plain_logits(pruner.model, ids), rtol=1e-4, atol=1e-4)
    assert result is not None


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("idle", [0, 2, 4])
@pytest.mark.parametrize("signals", ["update", "standardised"])
@pytest.mark.parametrize("control", ["none", "leverage_only", "random_rotation"])
def test_a_block_that_adds_nothing_goes_first(idle: int, signals: str, control: str) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        block_list(model)[idle].self_attn.o_proj.weight.zero_()
        block_list(model)[idle].mlp.down_proj.weight.zero_()
    before = snapshot(model)
    options = {"block_signals": signals, "control": control, "components": 8, "quantile": 0.3}
    plan = plan_of(model, {"sparsity": None, "num_blocks": 2}, unit="block", **options)
    assert_unchanged(model, before)
    assert plan.scores[str(idle)] == min(plan.scores.values()) < 0.01
    assert plan.removed_blocks[0] == idle
    assert len(plan.removed_blocks) == 2


def test_block_figures() -> None:
    plan = plan_of(tiny_model("llama"), unit="block", quantile=0.5)
    details = plan.details
    assert sum(plan.scores.values()) == pytest.approx(1.0)
    assert sum(details["map_weights"]) == pytest.approx(1.0)
    assert details["tokens"] == 8 * 31
    assert details["stored_values"] == 6 * 248 * 32 + 248**2 + 2 * 4 * 5 * 32
    participation = [step["participation"] for step in plan.steps]
    assert participation == sorted(participation)
    assert [step["block"] for step in plan.steps] == list(plan.removed_blocks)
    assert details["set_loss"] > 0


def test_one_pass_whatever_the_batches() -> None:
    model = tiny_model("llama")
    options = {"unit": "block", "quantile": 0.5, "max_tokens": 100}
    plan, other = plan_of(model, **options), plan_of(model, {"batch_size": 3}, **options)
    assert plan.details["tokens"] == 100
    assert plan.removed_blocks == other.removed_blocks
    assert plan.scores == pytest.approx(other.scores, rel=1e-3, abs=1e-4)


def test_blocks_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pruner = pruner_of(tiny_model("llama"), unit="block")
    calls: Counter[int] = Counter()
    for number, block in enumerate(block_list(pruner.model)):
        block.register_forward_hook(lambda _, args, output, number=number: calls.update({number: len(args[0])}))
    selected: list[Counter[int]] = []
    original = FunctionalNetwork.select

    def select(self: FunctionalNetwork, context: Any) -> PruningPlan:
        context.runner._learn_form()
        calls.clear()
        plan = original(self, context)
        selected.append(Counter(calls))
        return plan

    monkeypatch.setattr(FunctionalNetwork, "select", select)
    pruner.make_plan()
    assert selected == [Counter(dict.fromkeys(range(5), 8))]


def test_neighbours_on_demand() -> None:
    plan = plan_of(
        tiny_model("llama", 6), {"sparsity": None, "num_blocks": 3}, unit="block", contiguous=True, quantile=0.3
    )
    blocks = sorted(plan.removed_blocks)
    assert blocks == list(range(blocks[0], blocks[0] + 3))


def test_ends_are_protected_by_default() -> None:
    fields = {"sparsity": None, "num_blocks": 1, "protect_first": None, "protect_last": None}
    assert plan_of(tiny_model("llama", 6), fields, unit="block").removed_blocks == (3,)


def test_blocks_need_tokens_as_well() -> None:
    fields = {"dataset": DATA[:1], "num_samples": 1}
    with pytest.raises(CalibrationError, match="found 31 usable tokens in the text"):
        plan_of(tiny_model("llama"), fields, unit="block")


def test_blocks_that_all_add_nothing_are_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for block in block_list(model):
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    with pytest.raises(NonFiniteError, match="no block adds anything that varies"):
        plan_of(model, unit="block")


def test_broken_weights_are_named() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        block_list(model)[2].mlp.down_proj.weight[0] = torch.nan
    with pytest.raises(NonFiniteError, match="first appears in the output of block 2"):
        plan_of(model, unit="block")


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "channel"}, "Unknown unit 'channel' for functional_network"),
        ({"control": "leverage"}, "Unknown control 'leverage'.*leverage_only"),
        ({"signals": "gate"}, "Unknown signals"),
        ({"ranking": "local"}, "Unknown ranking"),
        ({"weights": "equal"}, "Unknown weights"),
        ({"block_signals": "updates"}, "Unknown block_signals 'updates'.*update"),
        ({"components": 0}, "components=0 of functional_network must be a whole number of at least 1"),
        ({"groups": 1.5}, "groups=1.5"),
        ({"restarts": True}, "restarts=True"),
        ({"max_tokens": 39}, "max_tokens=39 .*at least 40"),
        ({"keep_first": 1}, "keep_first=1 of functional_network must be true or false"),
        ({"unit": "block", "contiguous": "yes"}, "contiguous='yes'"),
        ({"unit": "block", "quantile": 1.0}, "quantile=1.0"),
        ({"unit": "block", "quantile": "high"}, "quantile='high'"),
        ({"unit": "block", "ranking": "global"}, "ranking of functional_network can only be set with unit='width'"),
        ({"quantile": 0.5, "contiguous": True}, "quantile, contiguous of .* can only be set with unit='block'"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FunctionalNetworkOptions(**options)


def test_units() -> None:
    assert FunctionalNetwork.unit_of(FunctionalNetworkOptions()) == "width"
    assert FunctionalNetwork.unit_of(FunctionalNetworkOptions(unit="block")) == "block"
    assert FunctionalNetwork.families_of(FunctionalNetworkOptions()) == ("mlp",)
