# SPDX-License-Identifier: Apache-2.0
"""Blocks of different widths: written as an ordinary folder, loaded with the plan in it, refused a second plan."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import block_list, plain_logits, random_ids, tiny_model
from safetensors.torch import load_file, save_file
from toys import assert_same_weights, assert_unchanged, files_below, snapshot
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan
from optimum_blockprune.errors import (
    BlockPruningError,
    CheckpointError,
    ConfigurationError,
    PlanError,
    UnsupportedModelError,
)
from optimum_blockprune.gate import expect, prove_folder
from optimum_blockprune.loading import load_model
from optimum_blockprune.per_layer import as_plain, has_own_widths, narrowed_class, refuse_own_widths
from optimum_blockprune.widths import Width


pytestmark = pytest.mark.usefixtures("no_pictures")

ADVICE = r"Prune the dense model once, with a list of configurations: prune\(config=\[first, second\]\)"
# Of 48 channels and of 2 KV groups, block by block.
CHANNELS = (tuple(range(0, 48, 2)), (5, 7, 11), tuple(range(48)), (47,))
GROUPS = ((1,), (0, 1), (0,), (0, 1))


def uneven_plan(family: str = "llama", *, removed: tuple[int, ...] = ()) -> PruningPlan:
    """Every block with its own widths."""
    model = tiny_model(family, 4)
    options = {"families": "both"}
    config = BlockPruningConfig("magnitude", sparsity=0.5, layout="per_layer", strategy_options=options)
    plan = BlockPruner(model, config).make_plan()
    narrowed = tuple(
        replace(each, kept=(CHANNELS, GROUPS)[plan.width.groups[each.group].family == "attention"][each.block])
        for each in plan.width.narrowed
        if each.block not in removed
    )
    width = Width("per_layer", plan.width.groups, narrowed)
    return PruningPlan.from_removed(plan.model_type, 4, removed, width=width, strategy="manual")


def other_plan(family: str, depth: int) -> PruningPlan:
    """The plan of another model, whose channels are as many."""
    fields = {"n_inner": 48} if family == "gpt2" else {}
    config = BlockPruningConfig("magnitude", sparsity=0.5, layout="per_layer")
    return BlockPruner(tiny_model(family, depth, **fields), config).make_plan()


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A folder, and the live model that was saved there."""
    folder = tmp_path_factory.mktemp("per_layer") / "pruned"
    model = tiny_model("llama", 4)
    BlockPruner(model).prune(save_dir=folder, plan=uneven_plan())
    return folder, model


def shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    return [(block.mlp.down_proj.in_features, block.self_attn.o_proj.in_features) for block in block_list(model)]


# The folder


def test_the_folder_is_an_ordinary_one_with_a_plan(pruned: tuple[Path, PreTrainedModel]) -> None:
    folder, model = pruned
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    # No field can say how wide the blocks are: those of the dense model stay.
    assert (config["intermediate_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (48, 4, 2)
    entry = config["block_pruning"]
    assert entry["layout"] == "per_layer" and "previous" not in entry
    assert entry["units"] == {"mlp": {"before": 192, "after": 76}, "attention": {"before": 8, "after": 6}}
    weights = load_file(folder / "model.safetensors")
    assert [weights[f"model.layers.{n}.mlp.up_proj.weight"].shape[0] for n in range(4)] == [24, 3, 48, 1]
    assert [weights[f"model.layers.{n}.self_attn.k_proj.weight"].shape[0] for n in range(4)] == [8, 16, 8, 16]
    dense = tiny_model("llama", 4).state_dict()
    assert torch.equal(
        weights["model.layers.1.mlp.up_proj.weight"], dense["model.layers.1.mlp.up_proj.weight"][[5, 7, 11]]
    )
    assert PruningPlan.from_file(folder) == uneven_plan()


@pytest.mark.parametrize("load", [BlockPruner.load_pruned, load_model])
def test_loading(load: Any, pruned: tuple[Path, PreTrainedModel]) -> None:
    folder, model = pruned
    loaded = load(folder)
    assert type(loaded) is LlamaForCausalLM and not loaded.training
    assert_same_weights(loaded.state_dict(), model.state_dict())
    assert shapes(loaded) == [(24, 16), (3, 32), (48, 16), (1, 32)] == shapes(model)
    assert [block.mlp.intermediate_size for block in block_list(loaded)] == [24, 3, 48, 1]
    ids = random_ids()
    assert torch.equal(plain_logits(loaded, ids), plain_logits(model, ids))
    assert loaded.config.block_pruning == model.config.block_pruning


def test_a_loaded_model_generates(pruned: tuple[Path, PreTrainedModel]) -> None:
    loaded, ids = load_model(pruned[0]), random_ids()
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        loaded.generate(ids, use_cache=True, **settings), loaded.generate(ids, use_cache=False, **settings)
    )


def test_a_loaded_model_is_saved_and_loaded_again(pruned: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    folder, model = pruned
    loaded = load_model(folder)
    loaded.save_pretrained(tmp_path)
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path))
    assert after == before
    with pytest.raises(PlanError, match="There is no plan at"):
        load_model(tmp_path)
    shutil.copy(folder / "pruning_plan.json", tmp_path)
    assert_same_weights(load_model(tmp_path).state_dict(), model.state_dict())


def test_from_pretrained_of_the_pruner(pruned: tuple[Path, PreTrainedModel]) -> None:
    pruner = BlockPruner.from_pretrained(pruned[0])
    assert shapes(pruner.model) == shapes(pruned[1]) and type(pruner.model) is LlamaForCausalLM


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64])
def test_dtype(dtype: Any, pruned: tuple[Path, PreTrainedModel]) -> None:
    folder, model = pruned
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    loaded = load_model(folder, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {wanted}
    state = model.state_dict()
    assert_same_weights(loaded.state_dict(), {name: tensor.to(wanted) for name, tensor in state.items()})


def test_shards(tmp_path: Path) -> None:
    model = tiny_model("llama", 4)
    pruner = BlockPruner(model)
    pruner.prune(plan=uneven_plan())
    pruner.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert_same_weights(load_model(tmp_path / "out").state_dict(), model.state_dict())


def test_a_subfolder(pruned: tuple[Path, PreTrainedModel]) -> None:
    folder, model = pruned
    assert_same_weights(load_model(folder.parent, subfolder=folder.name).state_dict(), model.state_dict())


def test_blocks_that_are_gone_have_no_number(tmp_path: Path) -> None:
    model = tiny_model("llama", 4)
    dense = copy.deepcopy(model)
    BlockPruner(model).prune(save_dir=tmp_path / "out", plan=uneven_plan(removed=(2, 0)))
    loaded = load_model(tmp_path / "out")
    assert shapes(loaded) == [(3, 32), (1, 32)] == shapes(model)
    assert loaded.config.block_pruning["removed_blocks"] == [2, 0]
    assert_same_weights(loaded.state_dict(), model.state_dict())
    plan = uneven_plan(removed=(2, 0))
    dense.save_pretrained(tmp_path / "dense")
    plan.apply_to_checkpoint(tmp_path / "dense", tmp_path / "files", verify="logits")
    assert_same_weights(load_model(tmp_path / "files").state_dict(), model.state_dict())


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_families_whose_modules_look_their_heads_up(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, 2)
    options = {"unit": "width", "families": "attention"}
    config = BlockPruningConfig("random", sparsity=0.5, layout="per_layer", strategy_options=options)
    BlockPruner(model, config).prune(save_dir=tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert type(loaded) is type(tiny_model(family, 2))
    assert torch.equal(plain_logits(loaded, random_ids()), plain_logits(model, random_ids()))


# Verification


@pytest.mark.parametrize("verify", ["keys", "logits", "off"])
def test_every_way_to_verify(verify: str, pruned: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    model = tiny_model("llama", 4)
    pruner = BlockPruner(model)
    pruner.prune(save_dir=tmp_path / "out", plan=uneven_plan(), verify=verify)
    assert pruner.report.verification == {"mode": verify, "passed": verify != "off"}
    written = files_below(tmp_path / "out")
    assert written["model.safetensors"] == files_below(pruned[0])["model.safetensors"]


@pytest.mark.parametrize("verify", ["keys", "logits"])
def test_another_width_in_the_file_is_seen(verify: str, pruned: tuple[Path, PreTrainedModel]) -> None:
    folder, model = pruned
    plan = uneven_plan()
    kept = {0: (3, 4), 2: (0,)}
    other = replace(
        plan,
        width=replace(
            plan.width,
            narrowed=tuple(
                replace(each, kept=kept[each.block]) if each.block in kept and each.group == 0 else each
                for each in plan.width.narrowed
            ),
        ),
    )
    expected = expect(tiny_model("llama", 4), plan)
    prove_folder(folder, model, expected, verify, plan=plan)
    with pytest.raises(BlockPruningError, match="does not load|mismatched"):
        prove_folder(folder, model, expected, verify, plan=other)


# What does not load it


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, LlamaForCausalLM])
def test_transformers_alone_fails_loudly(kind: Any, pruned: tuple[Path, PreTrainedModel]) -> None:
    with pytest.raises(RuntimeError, match="mismatch"):
        kind.from_pretrained(pruned[0])


@pytest.mark.parametrize("load", [BlockPruner.load_pruned, BlockPruner.from_pretrained])
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "There is no plan at"), ("{", "is not a JSON file"), ("{}", "format_version None")],
)
def test_a_plan_that_is_missing_or_broken(
    content: str | None, message: str, load: Any, pruned: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    folder = shutil.copytree(pruned[0], tmp_path / "copy")
    (folder / "pruning_plan.json").unlink()
    if content is not None:
        (folder / "pruning_plan.json").write_text(content)
    with pytest.raises(PlanError, match=message):
        load(folder)


def test_the_plan_of_other_blocks(pruned: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    folder = shutil.copytree(pruned[0], tmp_path / "copy")
    uneven_plan(removed=(1,)).save(folder)
    with pytest.raises(PlanError, match="belongs to another model: it keeps 3 blocks, there are 4"):
        load_model(folder)


@pytest.mark.parametrize(("family", "depth"), [("llama", 6), ("llama", 3), ("gpt2", 4), ("phi3", 4)])
def test_the_plan_of_another_model(
    family: str, depth: int, pruned: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    folder = shutil.copytree(pruned[0], tmp_path / "copy")
    other_plan(family, depth).save(folder)
    with pytest.raises(PlanError):
        load_model(folder)


def test_a_plan_of_dense_blocks_does_not_fit_the_files(pruned: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    folder = shutil.copytree(pruned[0], tmp_path / "copy")
    PruningPlan.from_removed("llama", 4, []).save(folder)
    with pytest.raises(ConfigurationError, match="cannot be loaded as a model"):
        load_model(folder)


def test_incomplete_files(pruned: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    folder = shutil.copytree(pruned[0], tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="lacks 1 tensors that the model needs"):
        load_model(folder)


# One plan says all of it


def test_a_second_pruning_is_refused_with_advice(pruned: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    folder, _ = pruned
    model = load_model(folder)
    before, files = snapshot(model), files_below(folder.parent)
    pruner = BlockPruner(model, BlockPruningConfig("random", num_blocks=1))
    depth = PruningPlan.from_removed("llama", 4, [1])
    width = BlockPruningConfig("magnitude", sparsity=0.5)
    works = {
        "prune": lambda: pruner.prune(save_dir=tmp_path / "out"),
        "prune by plan": lambda: pruner.prune(save_dir=tmp_path / "out", plan=depth),
        "prune width": lambda: pruner.prune(config=width),
        "prune a list": lambda: pruner.prune(config=[BlockPruningConfig("random", num_blocks=1), width]),
        "plan": pruner.make_plan,
        "plan a list": lambda: pruner.make_plan([width, width]),
        "score": lambda: pruner.score(width),
        "apply": lambda: depth.apply(model),
        "files": lambda: depth.apply_to_checkpoint(folder, tmp_path / "out"),
        "files, by logits": lambda: depth.apply_to_checkpoint(folder, tmp_path / "out", verify="logits"),
    }
    for work in works.values():
        with pytest.raises(UnsupportedModelError, match=f"'llama' model was pruned with layout='per_layer'.*{ADVICE}"):
            work()
    assert_unchanged(model, before)
    assert files_below(folder.parent) == files and not list(tmp_path.iterdir())


def test_the_same_plan_is_refused_with_advice(pruned: tuple[Path, PreTrainedModel]) -> None:
    model = load_model(pruned[0])
    before = snapshot(model)
    for work in (lambda: uneven_plan().apply(model), lambda: BlockPruner(model).prune(plan=uneven_plan())):
        with pytest.raises(UnsupportedModelError, match=ADVICE):
            work()
    assert_unchanged(model, before)


def test_the_advice_works(tmp_path: Path) -> None:
    options = {"unit": "width", "families": "both"}
    width = BlockPruningConfig("random", sparsity=0.5, layout="per_layer", strategy_options=options)
    depth = BlockPruningConfig("random", num_blocks=1)
    model = BlockPruner(tiny_model("llama", 4)).prune(save_dir=tmp_path / "out", config=[width, depth])
    loaded = load_model(tmp_path / "out")
    assert len(block_list(loaded)) == 3 and "previous" not in loaded.config.block_pruning
    assert_same_weights(loaded.state_dict(), model.state_dict())


def test_which_models_have_widths_of_their_own(pruned: tuple[Path, PreTrainedModel]) -> None:
    config = AutoConfig.from_pretrained(pruned[0])
    assert has_own_widths(config)
    dense = tiny_model("llama", 2).config
    for entry in (None, {}, {"layout": "uniform"}, {"layout": "padded"}, "per_layer", ["per_layer"]):
        dense.block_pruning = entry
        assert not has_own_widths(dense)
        refuse_own_widths(dense)
    del dense.block_pruning
    assert not has_own_widths(dense)
    with pytest.raises(UnsupportedModelError, match=ADVICE):
        refuse_own_widths(config)


# The class that builds it


def test_other_models_are_built_as_ever(pruned: tuple[Path, PreTrainedModel]) -> None:
    folder, model = pruned
    config = AutoConfig.from_pretrained(folder)
    fields = copy.deepcopy(config.to_dict())
    kind = narrowed_class(LlamaForCausalLM, uneven_plan())
    with torch.device("meta"):
        empty = kind(config)
        again = kind(config)
        dense = LlamaForCausalLM(config)
    assert shapes(empty) == shapes(again) == shapes(model) and shapes(dense) == [(48, 32)] * 4
    assert config.to_dict() == fields
    assert kind.__name__ == kind.__qualname__ == "LlamaForCausalLM" and kind.__module__ == LlamaForCausalLM.__module__
    assert kind is not LlamaForCausalLM and isinstance(empty, LlamaForCausalLM)
    plain = as_plain(empty, LlamaForCausalLM)
    assert plain is empty and type(plain) is LlamaForCausalLM


def test_configurations_are_not_shared() -> None:
    """Phi-3 counts its KV heads in the configuration while it runs: narrow blocks have one of their own."""
    plan = BlockPruner(
        tiny_model("phi3", 2),
        BlockPruningConfig(
            "random", sparsity=0.5, layout="per_layer", strategy_options={"unit": "width", "families": "attention"}
        ),
    ).make_plan()
    config = tiny_model("phi3", 2).config
    before = config.to_dict()
    model = narrowed_class(type(tiny_model("phi3", 2)), plan)(config)
    assert config.to_dict() == before and model.config.num_attention_heads == 4
    for block in block_list(model):
        assert block.self_attn.config is not model.config and block.self_attn.config.num_attention_heads == 2


def test_a_uniform_or_padded_folder_needs_no_plan(tmp_path: Path) -> None:
    for layout in ("uniform", "padded"):
        model = tiny_model("llama", 2)
        config = BlockPruningConfig("magnitude", sparsity=0.5, layout=layout)
        BlockPruner(model, config).prune(save_dir=tmp_path / layout)
        (tmp_path / layout / "pruning_plan.json").unlink()
        for loaded in (load_model(tmp_path / layout), AutoModelForCausalLM.from_pretrained(tmp_path / layout)):
            assert_same_weights(loaded.state_dict(), model.state_dict())
        # A second pruning into another folder is no problem.
        BlockPruner(load_model(tmp_path / layout)).prune(plan=PruningPlan.from_removed("llama", 2, [1]))


def test_files_give_what_memory_gives(pruned: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    tiny_model("llama", 4).save_pretrained(tmp_path / "dense")
    for verify in ("keys", "logits"):
        uneven_plan().apply_to_checkpoint(tmp_path / "dense", tmp_path / verify, verify=verify)
        one, other = (json.loads((place / "config.json").read_text()) for place in (pruned[0], tmp_path / verify))
        assert one == other
        assert_same_weights(load_model(tmp_path / verify).state_dict(), pruned[1].state_dict())
    with pytest.raises(CheckpointError):
        uneven_plan().apply_to_checkpoint(tmp_path / "nowhere", tmp_path / "out")
