# SPDX-License-Identifier: Apache-2.0
"""Several configurations in a row: one plan, one entry, one report, and all of it or nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import block_list, plain_logits, random_ids, silenced, tiny_model
from toys import assert_same_weights, assert_unchanged, config, files_below, snapshot, toy_pruner
from transformers import AutoModelForCausalLM

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan, PruningReport
from optimum_blockprune import gate as gate_module
from optimum_blockprune import pruner as pruner_module
from optimum_blockprune import publishing as publishing_module
from optimum_blockprune import sequence as sequence_module
from optimum_blockprune.errors import ConfigurationError, UnsupportedModelError, VerificationError
from optimum_blockprune.gate import prove_live
from optimum_blockprune.sequence import apply_in_order


pytestmark = pytest.mark.usefixtures("no_pictures")


def depth(num_blocks: int = 1, **fields: Any) -> BlockPruningConfig:
    return BlockPruningConfig("random", num_blocks=num_blocks, **fields)


def width(families: str = "mlp", sparsity: float = 0.5, **fields: Any) -> BlockPruningConfig:
    options = {"unit": "width", "families": families}
    return BlockPruningConfig("random", sparsity=sparsity, strategy_options=options, **fields)


def ids_of(model: Any) -> dict[str, int]:
    return {name: id(parameter) for name, parameter in model.named_parameters()}


# One plan and one result


@pytest.mark.parametrize("layout", ["uniform", "padded", "per_layer"])
def test_a_list_is_one_plan(layout: str) -> None:
    configs = [depth(2), width("both", layout=layout)]
    pruner = BlockPruner(tiny_model("llama", 6))
    model = pruner.prune(config=configs)
    plan = pruner.plan
    assert plan.strategy == "random+random" and plan.num_blocks == 6 and len(plan.removed_blocks) == 2
    assert {each.block for each in plan.width.narrowed} == set(plan.kept_blocks)
    assert plan.width.totals() == {"mlp": {"before": 192, "after": 96}, "attention": {"before": 8, "after": 4}}
    assert [part["requested"] for part in plan.parts()] == [{"num_blocks": 2}, {"sparsity": 0.5}]
    assert [part["options"]["unit"] for part in plan.parts()] == ["block", "width"]
    entry = model.config.block_pruning
    assert "previous" not in entry and entry["strategy"] == "random+random" and entry["num_blocks"] == 6
    assert entry["removed_blocks"] == list(plan.removed_blocks)
    assert entry["layout"] == layout and entry["units"] == plan.width.totals()


def test_each_step_is_chosen_on_what_the_one_before_left() -> None:
    """One after the other by hand, in memory."""
    configs = [depth(2, seed=3), width("mlp", seed=4), depth(1, seed=5)]
    pruner = BlockPruner(tiny_model("llama", 6))
    model = pruner.prune(config=configs)
    twin, plans = tiny_model("llama", 6), []
    for each in configs:
        step = BlockPruner(twin, each)
        step.prune()
        plans.append(step.plan)
    assert_same_weights(model.state_dict(), twin.state_dict())
    first, second, third = plans
    joined = first.then(second).then(third)
    assert pruner.plan.to_dict() == joined.to_dict()
    ours, theirs = model.config.to_dict(), twin.config.to_dict()
    assert ours.pop("block_pruning") != theirs.pop("block_pruning") and ours == theirs


def test_a_list_of_depth_is_exact() -> None:
    model = tiny_model("gemma2", 6)
    dense = copy.deepcopy(model)
    pruner = BlockPruner(model)
    pruner.prune(config=(depth(2, seed=1), depth(1, seed=2)))
    truth = silenced(dense, pruner.plan.removed_blocks)
    assert torch.equal(plain_logits(model, random_ids()), plain_logits(truth, random_ids()))
    assert len(block_list(model)) == 3 and not pruner.plan.width


def test_the_joined_plan_gives_the_same_at_once() -> None:
    pruner = BlockPruner(tiny_model("llama", 6))
    model = pruner.prune(config=[width("attention"), depth(2), width("mlp")])
    again = BlockPruner(tiny_model("llama", 6)).prune(plan=PruningPlan.from_dict(pruner.plan.to_dict()))
    assert_same_weights(again.state_dict(), model.state_dict())
    assert again.config.to_dict() == model.config.to_dict()


def test_a_list_of_one_is_no_list() -> None:
    one, other = BlockPruner(tiny_model("llama", 4)), BlockPruner(tiny_model("llama", 4))
    first, second = one.prune(config=[width()]), other.prune(config=width())
    assert_same_weights(first.state_dict(), second.state_dict())
    assert one.plan == other.plan and "parts" not in one.plan.details
    assert first.config.to_dict() == second.config.to_dict() and one.config is not None


def test_the_last_configuration_is_kept() -> None:
    pruner, last = BlockPruner(tiny_model("llama", 4)), width()
    pruner.make_plan([depth(), last])
    assert pruner.config is last


@pytest.mark.parametrize("nothing", [[], ()])
def test_an_empty_list_is_refused(nothing: Any, tmp_path: Path) -> None:
    model = tiny_model("llama", 4)
    before, pruner = snapshot(model), BlockPruner(model, depth())
    for work in (lambda: pruner.prune(save_dir=tmp_path / "out", config=nothing), lambda: pruner.make_plan(nothing)):
        with pytest.raises(ConfigurationError, match="The list of configurations is empty."):
            work()
    assert_unchanged(model, before)
    assert not list(tmp_path.iterdir()) and pruner.plan is None


# A plan leaves the model alone


@pytest.mark.parametrize("layout", ["uniform", "padded", "per_layer"])
def test_a_plan_leaves_no_trace(layout: str) -> None:
    model = tiny_model("phi3", 4).train()
    model.hf_device_map = {"": "cpu"}
    before, parameters = snapshot(model), ids_of(model)
    pruner = BlockPruner(model)
    second = [width("both", layout=layout)]
    if layout != "padded":
        second = [width("mlp", layout=layout), width("attention", layout=layout)]
    configs = [second[0], depth(2), *second[1:]]
    plan = pruner.make_plan(configs)
    assert len(plan.parts()) == len(configs) and plan.width and len(plan.removed_blocks) == 2
    assert_unchanged(model, before)
    assert ids_of(model) == parameters and not hasattr(model.config, "block_pruning")
    # It is the plan that prune() would carry out.
    pruner.prune(plan=plan)
    again = BlockPruner(tiny_model("phi3", 4))
    again.prune(config=configs)
    assert again.plan.to_dict() == plan.to_dict()
    assert_same_weights(again.model.state_dict(), model.state_dict())


def test_layouts_that_cannot_be_joined_leave_no_trace() -> None:
    for first, second in (("padded", "padded"), ("uniform", "per_layer")):
        model = tiny_model("llama", 2)
        before = snapshot(model)
        with pytest.raises(ConfigurationError, match=f"of layouts {first}, {second} cannot be joined in one plan"):
            BlockPruner(model).prune(config=[width("mlp", layout=first), width("attention", layout=second)])
        assert_unchanged(model, before)


def test_an_earlier_entry_comes_back() -> None:
    model = tiny_model("llama", 5)
    BlockPruner(model, depth()).prune()
    before = copy.deepcopy(model.config.block_pruning)
    pruner = BlockPruner(model)
    pruner.make_plan([depth(), width()])
    assert model.config.block_pruning == before
    pruner.prune(config=[depth(), width()])
    assert model.config.block_pruning["previous"] == before


# All or nothing


def failing_at(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, call: int, error: BaseException) -> list[int]:
    """Lets a function fail at its n-th call; returns the list of calls."""
    original, calls = getattr(place, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, counted)
    return calls


@pytest.mark.parametrize(
    ("place", "name", "call", "error", "layout"),
    [
        (pruner_module, "choose", 2, UnsupportedModelError("no"), "uniform"),
        (pruner_module, "choose", 2, KeyboardInterrupt(), "uniform"),
        (sequence_module, "expect", 2, MemoryError(), "uniform"),
        (sequence_module, "apply_proven", 2, VerificationError("no"), "padded"),
        (gate_module, "prove_live", 2, VerificationError("no"), "uniform"),
        (gate_module, "prove_live", 2, KeyboardInterrupt(), "per_layer"),
        (sequence_module, "provenance", 1, KeyboardInterrupt(), "per_layer"),
        (pruner_module, "record", 1, RuntimeError("no"), "uniform"),
        (publishing_module, "prove_folder", 1, VerificationError("no"), "per_layer"),
        (publishing_module, "write_records", 1, KeyboardInterrupt(), "uniform"),
    ],
)
def test_a_failure_takes_all_steps_back(
    place: Any, name: str, call: int, error: BaseException, layout: str, tmp_path: Path, monkeypatch
) -> None:
    model = tiny_model("llama", 3)
    before, parameters = snapshot(model), ids_of(model)
    pruner = BlockPruner(model)
    report = pruner.report.to_dict()
    calls = failing_at(monkeypatch, place, name, call, error)
    with pytest.raises(type(error)):
        pruner.prune(save_dir=tmp_path / "out", config=[depth(), width(layout=layout)])
    assert len(calls) == call
    assert_unchanged(model, before)
    assert ids_of(model) == parameters and not hasattr(model.config, "block_pruning")
    assert not list(tmp_path.iterdir())
    assert {**pruner.report.to_dict(), "seconds": None} == {**report, "seconds": None}


def test_after_a_failure_it_works(monkeypatch) -> None:
    model, configs = tiny_model("llama", 3), [depth(), width("both")]
    pruner = BlockPruner(model)
    failing_at(monkeypatch, sequence_module, "provenance", 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        pruner.prune(config=configs)
    monkeypatch.undo()
    pruner.prune(config=configs)
    fresh = BlockPruner(tiny_model("llama", 3)).prune(config=configs)
    assert_same_weights(model.state_dict(), fresh.state_dict())
    assert model.config.to_dict() == fresh.config.to_dict()


def test_a_plan_that_fails_leaves_the_model_alone(monkeypatch) -> None:
    model = tiny_model("llama", 5)
    before = snapshot(model)
    failing_at(monkeypatch, pruner_module, "choose", 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        BlockPruner(model).make_plan([depth(), width(), depth()])
    assert_unchanged(model, before)


def test_the_second_step_is_refused_for_what_the_first_left() -> None:
    """Four blocks of five are too many of the three that are left."""
    model = tiny_model("llama", 5)
    before = snapshot(model)
    with pytest.raises(ConfigurationError, match="num_blocks=4 asks to remove 4 of 3 blocks"):
        BlockPruner(model).prune(config=[depth(2), depth(4, protect_first=0)])
    assert_unchanged(model, before)


def test_a_wrong_result_of_the_second_step_is_seen(monkeypatch) -> None:
    """The gate stands between the steps: a weight that changes in the second one is noticed there."""
    model = tiny_model("llama", 5)
    before = snapshot(model)
    seen: list[int] = []

    def spoiled(live: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(len(block_list(live)))
        if len(seen) < 2:
            return prove_live(live, *args, **kwargs)
        weight = block_list(live)[0].mlp.down_proj.weight
        weight.data, dense = weight.data * 1.5, weight.data
        try:
            return prove_live(live, *args, **kwargs)
        finally:
            weight.data = dense

    monkeypatch.setattr(gate_module, "prove_live", spoiled)
    with pytest.raises(VerificationError, match="logits differ"):
        BlockPruner(model).prune(config=[depth(), width()])
    assert seen == [4, 4]
    assert_unchanged(model, before)


def test_apply_in_order_returns_one_journal() -> None:
    model = tiny_model("llama", 5)
    before, parameters = snapshot(model), ids_of(model)
    first = PruningPlan.from_removed("llama", 5, [1])
    seen: list[int] = []

    def second() -> PruningPlan:
        seen.append(len(block_list(model)))
        return PruningPlan.from_removed("llama", 4, [2, 0])

    report = PruningReport()
    makers: list[Callable[[], PruningPlan]] = [lambda: first, second]
    plan, expected, journal = apply_in_order(model, makers, report)
    assert seen == [4]  # asked for when the first step is done
    assert plan.removed_blocks == (1, 3, 0) and expected.plan is plan
    assert model.config.block_pruning["removed_blocks"] == [1, 3, 0] and len(block_list(model)) == 2
    assert torch.equal(expected.logits, plain_logits(model, expected.batch.input_ids))
    assert report.seconds.keys() == {"surgery"}
    journal.rollback()
    assert_unchanged(model, before)
    assert ids_of(model) == parameters


# What it cost


def test_costs_of_all_steps_are_summed() -> None:
    configs = [config("sleb", num_blocks=1), config("shortgpt", num_blocks=1), width()]
    pruner = toy_pruner("llama", 5)
    pruner.prune(config=configs)
    twin, reports = toy_pruner("llama", 5), []
    for each in configs:
        step = BlockPruner(twin.model, each, twin.tokenizer)
        step.prune()
        reports.append(step.report)
    report = pruner.report
    assert report.tokens == 128  # width at random reads nothing
    for name in ("block_forwards", "head_forwards", "naive_block_forwards"):
        costs = [getattr(each, name) for each in reports if getattr(each, name) is not None]
        assert costs and getattr(report, name) == sum(costs), name
    assert report.seconds.keys() >= {"search", "surgery", "calibration"}
    assert report.strategy == "sleb+shortgpt+random" and report.requested == {}
    assert report.removed_blocks == list(pruner.plan.removed_blocks)
    assert report.achieved["blocks_before"] == 5 and report.achieved["blocks_after"] == 3
    dense = tiny_model("llama", 5).num_parameters()
    assert (report.achieved["parameters_before"], report.achieved["parameters_after"]) == (
        dense,
        pruner.model.num_parameters(),
    )
    assert report.achieved["units"] == {"mlp": {"before": 144, "after": 72, "removed": 0.5}}


# Folders


def test_the_folder_of_a_list(tmp_path: Path) -> None:
    configs = [depth(2), width("both")]
    pruner = BlockPruner(tiny_model("llama", 5))
    model = pruner.prune(save_dir=tmp_path / "out", config=configs)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_weights(loaded.state_dict(), model.state_dict())
    assert "previous" not in loaded.config.block_pruning
    assert PruningPlan.from_file(tmp_path / "out") == pruner.plan
    report = json.loads((tmp_path / "out" / "pruning_report.json").read_text())
    assert report["strategy"] == "random+random" and report["verification"] == {"mode": "logits", "passed": True}
    # No one configuration says what was done.
    assert "block_pruning_config.json" not in files_below(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    units = "50.0 % of its MLP channels and 50.0 % of its KV groups or heads"
    assert f"with 2 of its 5 transformer blocks, {units} removed" in card


def test_twice_through_folders_remembers_both(tmp_path: Path) -> None:
    configs = [depth(2), width("both")]
    tiny_model("llama", 5).save_pretrained(tmp_path / "dense")
    for number, (source, target) in enumerate((("dense", "one"), ("one", "two"))):
        pruner = BlockPruner.from_pretrained(tmp_path / source)
        pruner.prune(save_dir=tmp_path / target, config=configs[number])
    at_once = BlockPruner(tiny_model("llama", 5)).prune(config=configs)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert_same_weights(loaded.state_dict(), at_once.state_dict())
    entry = loaded.config.block_pruning
    assert entry["previous"]["removed_blocks"] == at_once.config.block_pruning["removed_blocks"]
    assert (entry["removed_blocks"], entry["num_blocks"], entry["layout"]) == ([], 3, "uniform")
    assert "previous" not in at_once.config.block_pruning
    # The plan in the second folder is about the second step.
    assert PruningPlan.from_file(tmp_path / "two").num_blocks == 3
    assert PruningPlan.from_file(tmp_path / "two").base_model == str(tmp_path / "one")


def test_the_joined_plan_rewrites_files(tmp_path: Path) -> None:
    tiny_model("llama", 5).save_pretrained(tmp_path / "dense")
    pruner = BlockPruner.from_pretrained(tmp_path / "dense")
    model = pruner.prune(config=[width("mlp"), depth(2), width("attention")])
    assert pruner.plan.base_model == str(tmp_path / "dense")
    pruner.plan.apply_to_checkpoint(tmp_path / "dense", tmp_path / "files", verify="logits")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "files")
    assert_same_weights(loaded.state_dict(), model.state_dict())
    assert loaded.config.block_pruning == model.config.block_pruning
