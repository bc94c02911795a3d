# SPDX-License-Identifier: Apache-2.0
"""Every strategy on models whose weights lie elsewhere: streamed, offloaded, spread by a device map. Same plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from families import block_list, plain_logits, random_ids, silenced
from tiers import often
from toys import NUM_BLOCKS, config, toy_folder, word_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_blockprune import BlockPruner, PruningPlan, UnsupportedModelError
from optimum_blockprune.loading import load_model


REST = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")


def streamed(folder: Path) -> PreTrainedModel:
    return load_model(folder, stream=True)


def on_host(folder: Path) -> PreTrainedModel:
    model = load_model(folder)
    cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def on_disk(folder: Path) -> PreTrainedModel:
    model = load_model(folder)
    disk_offload(model, str(folder / "offload"), execution_device=torch.device("cpu"))
    return model


def spread(folder: Path) -> PreTrainedModel:
    """By a device map: every second block on disk."""
    devices = {f"model.layers.{block}": "disk" if block % 2 else "cpu" for block in range(NUM_BLOCKS)}
    return load_model(folder, device_map={**devices, **dict.fromkeys(REST, "cpu")}, offload_folder=folder / "parts")


LOADS = (streamed, on_host, on_disk, spread)
STRATEGIES = [
    ("shortgpt", {}),
    ("angular", {}),
    ("angular", {"tokens": "all"}),
    ("mi_prun", {"chunk_tokens": 32}),
    ("mi_prun", {"estimator": "identity_decoder", "select": "dp"}),
    ("sleb", {}),
    ("sleb", {"search": "race"}),
    ("random", {}),
    ("bip", {}),
    ("bip", {"propagate": "local", "reduction": "l2"}),
    ("bip", {"propagate": "exact"}),
    ("magnitude", {"families": "both"}),
    ("functional_network", {"groups": 1, "restarts": 1}),
    ("functional_network", {"unit": "block", "restarts": 1}),
]


def planned(model: PreTrainedModel, strategy: str, options: dict[str, Any]) -> PruningPlan:
    blocks = {"num_blocks": 1} if options.get("unit") == "block" else {}
    settings = config(strategy, strategy_options=options, **blocks)
    return BlockPruner(model, settings, word_tokenizer()).make_plan()


def without_sizes(plan: PruningPlan) -> dict[str, Any]:
    """All of a plan but how many values were held, which differs where batches take turns."""
    entries = plan.to_dict()
    entries["details"] = {name: value for name, value in entries["details"].items() if name != "stored_values"}
    return entries


# Every strategy on a streamed model; one of each kind on what accelerate offloads.
CASES = [(streamed, *each) for each in STRATEGIES] + [
    (load, strategy, {}) for load in LOADS[1:] for strategy in ("shortgpt", "mi_prun", "sleb", "bip")
]


@pytest.mark.parametrize(
    ("load", "strategy", "options"),
    often(CASES, kept=lambda case: case[0] is streamed or case[1] in ("sleb", "mi_prun")),
)
def test_the_plan_is_that_of_the_model_in_memory(
    load: Callable[[Path], PreTrainedModel], strategy: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = toy_folder(tmp_path)
    truth = without_sizes(planned(load_model(folder), strategy, options))
    model = load(folder)
    places = {parameter.device.type for parameter in block_list(model)[1].parameters()}
    assert places == {"meta"}
    assert without_sizes(planned(model, strategy, options)) == truth
    assert {parameter.device.type for parameter in block_list(model)[1].parameters()} == {"meta"}


@pytest.mark.parametrize("load", LOADS)
def test_surgery_in_place(load: Callable[[Path], PreTrainedModel], tmp_path: Path) -> None:
    folder, ids = toy_folder(tmp_path), random_ids()
    truth = plain_logits(silenced(AutoModelForCausalLM.from_pretrained(folder), (1, 4)), ids)
    pruner = BlockPruner(load(folder))
    model = pruner.prune(plan=PruningPlan.from_blocks(pruner.model, removed=[1, 4]))
    assert len(block_list(model)) == NUM_BLOCKS - 2
    assert torch.equal(plain_logits(model, ids), truth)


@pytest.mark.parametrize("verify", ["logits", "keys"])
@pytest.mark.parametrize("load", [streamed, spread])
def test_saving(load: Callable[[Path], PreTrainedModel], verify: str, tmp_path: Path) -> None:
    folder, ids = toy_folder(tmp_path / "dense"), random_ids()
    truth = plain_logits(silenced(AutoModelForCausalLM.from_pretrained(folder), (1, 4)), ids)
    pruner = BlockPruner(load(folder), tokenizer=word_tokenizer())
    plan = PruningPlan.from_blocks(pruner.model, removed=[1, 4])
    model = pruner.prune(tmp_path / "pruned", plan=plan, verify=verify)
    assert torch.equal(plain_logits(model, ids), truth)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert torch.equal(plain_logits(saved, ids), truth)
    assert saved.generation_config.to_dict() == model.generation_config.to_dict()


def test_saving_in_another_dtype(tmp_path: Path) -> None:
    folder, ids = toy_folder(tmp_path / "dense"), random_ids()
    pruner = BlockPruner(load_model(folder, stream=True, dtype="float64"))
    model = pruner.prune(tmp_path / "pruned", plan=PruningPlan.from_blocks(pruner.model, removed=[2]))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto")
    assert saved.dtype == torch.float64
    assert len(list((tmp_path / "pruned").glob("*.safetensors"))) >= NUM_BLOCKS - 1
    assert torch.equal(plain_logits(saved, ids), plain_logits(model, ids))


def test_saving_what_was_pruned_twice(tmp_path: Path) -> None:
    folder, ids = toy_folder(tmp_path / "dense"), random_ids()
    pruner = BlockPruner(load_model(folder, stream=True))
    pruner.prune(plan=PruningPlan.from_blocks(pruner.model, removed=[2]))
    model = pruner.prune(tmp_path / "pruned", plan=PruningPlan.from_blocks(pruner.model, removed=[0]))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert len(block_list(saved)) == NUM_BLOCKS - 2
    assert torch.equal(plain_logits(saved, ids), plain_logits(model, ids))


@pytest.mark.parametrize("load", LOADS)
def test_width_is_not_cut_where_it_lies(load: Callable[[Path], PreTrainedModel], tmp_path: Path) -> None:
    folder = toy_folder(tmp_path)
    pruner = BlockPruner(load(folder), config("magnitude"))
    with pytest.raises(UnsupportedModelError, match="cannot be narrowed.*apply_to_checkpoint"):
        pruner.prune()
    plan = pruner.plan
    plan.apply_to_checkpoint(folder, tmp_path / "out", verify="logits")
    assert load_model(tmp_path / "out").config.intermediate_size < pruner.model.config.intermediate_size
