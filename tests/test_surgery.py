# SPDX-License-Identifier: Apache-2.0
"""The pruned model in memory equals the dense one with silenced blocks, nothing was copied, and all can be undone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from families import FAMILIES, block_list, plain_logits, random_ids, silenced, tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from optimum_blockprune import surgery
from optimum_blockprune.errors import PlanError, UnsupportedModelError
from optimum_blockprune.names import renumber_key
from optimum_blockprune.plan import PruningPlan
from optimum_blockprune.surgery import Journal, apply_plan, block_traits, provenance


pytestmark = pytest.mark.usefixtures("no_pictures")

each_family = pytest.mark.parametrize("family", FAMILIES)
REMOVALS = ((1,), (3, 1), (4,), (0,))


def plan_for(model: PreTrainedModel, removed: tuple[int, ...], **provenance: Any) -> PruningPlan:
    config = model.config
    return PruningPlan.from_removed(config.model_type, config.num_hidden_layers, removed, **provenance)


def generated(model: PreTrainedModel, ids: Tensor, use_cache: bool) -> Tensor:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
    )


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """All that surgery may change, by value, and the identity of what it must not replace."""
    return {
        "config": model.config.to_dict(),
        "blocks": [id(block) for block in block_list(model)],
        "traits": dict(block_traits(block_list(model))),
        "counts": {
            f"{name}.{attribute}": value
            for name, module in model.named_modules()
            for attribute, value in vars(module).items()
            if isinstance(value, (int, str, list))
        },
        "device_map": getattr(model, "hf_device_map", None),
        "generation": model.generation_config.to_dict(),
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
    }


# Exactness


@each_family
@pytest.mark.parametrize("removed", REMOVALS, ids=str)
def test_equals_the_silenced_model(family: str, removed: tuple[int, ...], ids: Tensor) -> None:
    model = tiny_model(family)
    truth = plain_logits(silenced(model, removed), ids)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    masked_truth = plain_logits(silenced(model, removed), ids, mask)
    kept = [block for index, block in enumerate(block_list(model)) if index not in removed]
    pointers = {id(parameter): parameter.data_ptr() for parameter in model.parameters()}
    modules = block_list(model)

    apply_plan(model, plan_for(model, removed))

    assert torch.equal(plain_logits(model, ids), truth)
    assert torch.equal(plain_logits(model, ids, mask)[mask.bool()], masked_truth[mask.bool()])
    assert torch.equal(generated(model, ids, use_cache=True), generated(model, ids, use_cache=False))
    assert block_list(model) is modules
    assert all(ours is theirs for ours, theirs in zip(modules, kept, strict=True))
    assert list(modules._modules) == [str(index) for index in range(len(kept))]
    assert all(parameter.data_ptr() == pointers[id(parameter)] for parameter in model.parameters())


@each_family
def test_every_number_and_field_follows(family: str) -> None:
    model = tiny_model(family)
    fresh = tiny_model(family, 3, **follower_fields(family, (0, 2, 4)))
    apply_plan(model, plan_for(model, (3, 1)))
    assert len(block_list(model)) == model.config.num_hidden_layers == 3
    # A model that stock transformers builds from the pruned configuration has the same attributes everywhere.
    assert dict(block_traits(block_list(model))) == dict(block_traits(block_list(fresh)))
    ours, theirs = model.config.to_dict(), fresh.config.to_dict()
    assert ours.pop("block_pruning")["removed_blocks"] == [3, 1]
    assert {name for name in ours | theirs if ours.get(name) != theirs.get(name)} <= {"dtype", "architectures"}
    assert len(DynamicCache(config=model.config).layers) == 3


def follower_fields(family: str, kept: tuple[int, ...]) -> dict[str, Any]:
    """What the configuration must say after all but `kept` of five blocks went, worked out by hand."""
    dense = tiny_config(family).to_dict()
    fields = {
        name: [dense[name][block] for block in kept] for name in ("layer_types", "no_rope_layers") if dense.get(name)
    }
    return {**fields, "max_window_layers": 1} if family in ("qwen2", "qwen3") else fields


@each_family
def test_stock_classes_reload_the_same_model(family: str, ids: Tensor, tmp_path: Path) -> None:
    model = tiny_model(family)
    truth = plain_logits(silenced(model, (0, 3)), ids)
    apply_plan(model, plan_for(model, (3, 0)))
    model.save_pretrained(tmp_path)
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(plain_logits(reloaded, ids), truth)
    assert torch.equal(generated(reloaded, ids, use_cache=True), generated(model, ids, use_cache=True))
    assert reloaded.config.block_pruning == model.config.block_pruning


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom"])
def test_pruning_twice_equals_pruning_once(family: str, ids: Tensor) -> None:
    model = tiny_model(family)
    truth = plain_logits(silenced(model, (1, 2, 4)), ids)
    apply_plan(model, plan_for(model, (2,), strategy="first", base_model="org/dense"))
    once = dict(model.config.block_pruning)
    apply_plan(model, plan_for(model, (1, 3), strategy="second"))
    assert torch.equal(plain_logits(model, ids), truth)
    assert torch.equal(generated(model, ids, use_cache=True), generated(model, ids, use_cache=False))
    assert once["removed_blocks"] == [2]
    assert once["num_blocks"] == 5
    assert "previous" not in once
    assert model.config.block_pruning == {**provenance(plan_for(tiny_model(family, 4), (1, 3)), None)} | {
        "strategy": "second",
        "previous": once,
    }


def test_one_block_may_be_all_that_is_left(ids: Tensor) -> None:
    model = tiny_model("qwen3")
    truth = plain_logits(silenced(model, (0, 1, 3, 4)), ids)
    apply_plan(model, plan_for(model, (4, 0, 1, 3)))
    assert torch.equal(plain_logits(model, ids), truth)
    assert block_list(model)[0].self_attn.layer_idx == 0
    assert torch.equal(generated(model, ids, use_cache=True), generated(model, ids, use_cache=False))


def test_a_plan_that_removes_nothing_changes_nothing_but_the_provenance(ids: Tensor) -> None:
    model = tiny_model("gemma2")
    before, truth = state_of(model), plain_logits(model, ids)
    apply_plan(model, plan_for(model, ()))
    after = state_of(model)
    assert after["config"].pop("block_pruning")["removed_blocks"] == []
    assert after == before
    assert torch.equal(plain_logits(model, ids), truth)


def test_training_flags_hooks_and_gradients_stay(ids: Tensor) -> None:
    model = tiny_model("llama").train()
    calls: list[int] = []
    block_list(model)[4].eval().register_forward_hook(lambda *_: calls.append(1))
    block_list(model)[4].self_attn.q_proj.weight.requires_grad_(False)
    apply_plan(model, plan_for(model, (1,)))
    assert model.training
    assert [block.training for block in block_list(model)] == [True, True, True, False]
    assert not block_list(model)[3].self_attn.q_proj.weight.requires_grad
    model(ids).logits.sum().backward()
    assert calls == [1]
    assert block_list(model)[0].mlp.up_proj.weight.grad is not None


# Undoing


@each_family
def test_rollback_restores_everything(family: str, ids: Tensor) -> None:
    model = tiny_model(family)
    model.hf_device_map = {"": "cpu"}
    model.generation_config.assistant_early_exit = 4
    before, truth = state_of(model), plain_logits(model, ids)
    journal = apply_plan(model, plan_for(model, (3, 1)))
    assert state_of(model) != before
    journal.rollback()
    assert state_of(model) == before
    assert not hasattr(model.config, "block_pruning")
    assert torch.equal(plain_logits(model, ids), truth)
    model.generation_config.assistant_early_exit = None
    assert torch.equal(generated(model, ids, True), generated(tiny_model(family), ids, True))


@pytest.mark.parametrize(
    "step",
    [
        "_follow_attributes",
        "_follow_configs",
        "_cut_list",
        "_renumber_device_map",
        "_follow_generation_config",
        "provenance",
    ],
)
def test_a_failing_step_undoes_the_others(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma2")
    before = state_of(model)

    def interrupt(*_args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(surgery, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        apply_plan(model, plan_for(model, (1,)))
    assert state_of(model) == before


def test_journal_undoes_in_reverse_order() -> None:
    class Thing:
        old = 1

    thing, journal = Thing(), Journal()
    thing.here = 1
    for name, value in (("here", 2), ("here", 3), ("new", 4), ("new", 5)):
        journal.set(thing, name, value)
    assert vars(thing) == {"here": 3, "new": 5}
    journal.rollback()
    assert vars(thing) == {"here": 1}


def test_refusals_leave_the_model_alone() -> None:
    model = tiny_model("llama")
    before = state_of(model)
    with pytest.raises(PlanError, match="'llama' model with 6 blocks"):
        apply_plan(model, PruningPlan.from_removed("llama", 6, [1]))
    model.config.num_kv_shared_layers = 2
    with pytest.raises(UnsupportedModelError, match="Keep block 2, or remove all blocks that read from it"):
        apply_plan(model, plan_for(model, (2,)))
    del model.config.num_kv_shared_layers
    assert state_of(model) == before


# What surrounds the blocks


def test_device_map_is_renumbered() -> None:
    model = tiny_model("llama")
    devices = {f"model.layers.{block}": block for block in range(5)}
    rest = {"model.embed_tokens": 0, "model.norm": 4, "lm_head": 4}
    fine = {"model.layers.4.mlp": "disk", "model.layers.40": "cpu"}
    model.hf_device_map = {**devices, **rest, **fine}
    apply_plan(model, plan_for(model, (1, 3)))
    layers = {"model.layers.0": 0, "model.layers.1": 2, "model.layers.2": 4, "model.layers.2.mlp": "disk"}
    # No such block exists; nobody writes such a map, and it must not be mistaken for block 4.
    assert {**layers, **rest}.items() <= model.hf_device_map.items()
    assert len(model.hf_device_map) == 7


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.layers.2.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("model.layers.10.norm", "model.layers.9.norm"),
        ("model.layers.1.norm", None),
        ("model.layers.1", None),
        ("model.layers.11", "model.layers.10"),
        ("model.layers", "model.layers"),
        ("model.layers_norm.2", "model.layers_norm.2"),
        ("xmodel.layers.2", "xmodel.layers.2"),
        ("model_layers.2.weight", "model_layers.2.weight"),
        ("model.layers.2x.weight", "model.layers.2x.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_renumber_key(name: str, expected: str | None) -> None:
    plan = PruningPlan.from_removed("llama", 12, [1])
    assert renumber_key(name, "model.layers", plan) == expected


@pytest.mark.parametrize(("removed", "expected"), [((1,), 2), ((4,), 3), ((0, 1, 2), None), ((3,), 3)])
def test_early_exit_of_the_generation_config(removed: tuple[int, ...], expected: int | None) -> None:
    model = tiny_model("llama")
    model.generation_config.assistant_early_exit = 3
    apply_plan(model, plan_for(model, removed))
    assert model.generation_config.assistant_early_exit == expected


# Attributes that follow


@each_family
def test_every_block_knows_its_new_number(family: str) -> None:
    model = tiny_model(family)
    apply_plan(model, plan_for(model, (1, 3)))
    attention = {"gpt2": "attn", "gpt_neox": "attention", "falcon": "self_attention", "bloom": "self_attention"}
    name = attention.get(family, "self_attn")
    assert [block.get_submodule(name).layer_idx for block in block_list(model)] == [0, 1, 2]


def test_the_users_own_attributes_stay() -> None:
    model = tiny_model("gemma2")
    for index, block in enumerate(block_list(model)):
        block.width, block.note, block.flag = 3, index, bool(index)
    # Another window than the one that the constructor gave this block.
    block_list(model)[2].self_attn.sliding_window = 7
    model.model.num_layers = 5
    apply_plan(model, plan_for(model, (1,)))
    last = block_list(model)[3]
    assert (last.note, last.width, last.flag, last.self_attn.layer_idx) == (4, 3, True, 3)
    assert block_list(model)[1].self_attn.sliding_window == 7
    assert model.model.num_layers == 5


def test_traits_are_what_a_block_is_and_not_how_it_is_run() -> None:
    model = tiny_model("gemma2")
    traits = dict(block_traits(block_list(model)))
    assert traits["2.self_attn.layer_idx"] == 2
    assert traits["0.self_attn.sliding_window"] == 4
    assert traits["1.self_attn.sliding_window"] is None
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    assert dict(block_traits(block_list(model))) == traits


# Offloaded weights


# transformers 4 takes the place of offloaded weights for that of the model.
@pytest.mark.filterwarnings("ignore:You are calling .generate")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_offloaded_model(family: str, offload: Callable[..., Any], ids: Tensor, tmp_path: Path) -> None:
    model = tiny_model(family)
    truth = plain_logits(silenced(model, (3, 1)), ids)
    place = () if offload is cpu_offload else (str(tmp_path),)
    offload(model, *place, execution_device=torch.device("cpu"))
    apply_plan(model, plan_for(model, (3, 1)))
    assert torch.equal(plain_logits(model, ids), truth)
    assert torch.equal(generated(model, ids, use_cache=True), generated(model, ids, use_cache=False))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_model_dispatched_over_cpu_and_disk(tmp_path: Path, ids: Tensor) -> None:
    dense = tiny_model("llama")
    truth = plain_logits(silenced(dense, (1,)), ids)
    dense.save_pretrained(tmp_path / "dense")
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    devices = {f"model.layers.{block}": "disk" if block % 2 else "cpu" for block in range(5)}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", device_map={**devices, **rest}, offload_folder=tmp_path / "offload"
    )
    apply_plan(model, plan_for(model, (1,)))
    places = {name: str(device) for name, device in model.hf_device_map.items() if "layers" in name}
    assert places == {f"model.layers.{block}": "disk" if block == 2 else "cpu" for block in range(4)}
    assert torch.equal(plain_logits(model, ids), truth)
    # transformers fetches the offloaded weights by the names of the device map.
    model.save_pretrained(tmp_path / "pruned")
    assert torch.equal(plain_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned"), ids), truth)


def test_many_windows_and_positions_beyond_the_sliding_window() -> None:
    model = tiny_model("mistral")
    ids = random_ids(3, 40)
    truth = plain_logits(silenced(model, (2,)), ids)
    apply_plan(model, plan_for(model, (2,)))
    assert torch.equal(plain_logits(model, ids), truth)
    assert torch.equal(generated(model, ids, use_cache=True), generated(model, ids, use_cache=False))
