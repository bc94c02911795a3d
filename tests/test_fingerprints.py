# SPDX-License-Identifier: Apache-2.0
"""Fingerprints: whatever changes what is measured changes them, and nothing else does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import random_ids, tiny_model
from safetensors.torch import load_file, save_file
from toys import toy_folder
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_blockprune import environment, fingerprints
from optimum_blockprune.batches import CalibrationWindows
from optimum_blockprune.blocks import find_blocks
from optimum_blockprune.fingerprints import run_fingerprint
from optimum_blockprune.loading import load_model
from optimum_blockprune.recipe import BUDGET_FIELDS, Recipe


TEXT = CalibrationWindows.from_tokens(random_ids(4, 16), source="/somewhere/text.txt")


def fingerprint(
    model: PreTrainedModel | None = None, windows: CalibrationWindows | None = TEXT, **fields: Any
) -> dict[str, Any]:
    recipe = Recipe(**{"strategy": "sleb", "num_blocks": 2, **fields})
    return run_fingerprint(find_blocks(tiny_model("llama", 4) if model is None else model), recipe, windows)


def differences(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    ours, theirs = flat(one), flat(other)
    return {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}


def flat(values: dict[str, Any], start: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found.update(flat(value, f"{start}{name}.") if isinstance(value, dict) and value else {start + name: value})
    return found


def changed(change: Callable[[PreTrainedModel], Any]) -> PreTrainedModel:
    model = tiny_model("llama", 4)
    with torch.no_grad():
        change(model)
    return model


def test_a_fingerprint_is_json_and_the_same_again() -> None:
    found = fingerprint()
    assert json.loads(json.dumps(found)) == found == fingerprint()
    assert found["versions"] == environment.versions()
    assert found["recipe"]["num_blocks"] == 2 and found["data"]["windows"] == 4


# The model


def test_where_a_model_lies_does_not_matter(tmp_path: Path) -> None:
    first = toy_folder(tmp_path / "first", num_blocks=4)
    second = shutil.copytree(first, tmp_path / "elsewhere" / "second", copy_function=shutil.copyfile)
    loaded = [fingerprint(AutoModelForCausalLM.from_pretrained(folder)) for folder in (first, second)]
    assert loaded[0] == loaded[1] == fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.model.layers[3].mlp.up_proj.weight.add_(0.01),
        lambda model: model.model.layers[0].input_layernorm.weight[0].mul_(1.001),
        lambda model: model.lm_head.weight.neg_(),
        lambda model: model.model.layers[1].mlp.load_state_dict(model.model.layers[2].mlp.state_dict()),
    ],
    ids=["one matrix", "one value of a norm", "the head", "two blocks alike"],
)
def test_other_weights_are_told(change: Callable[[PreTrainedModel], Any]) -> None:
    assert differences(fingerprint(), fingerprint(changed(change))) == {"model.weights"}


def test_the_same_values_in_another_order_or_dtype_are_told() -> None:
    turned = changed(lambda model: model.model.layers[0].self_attn.q_proj.weight.copy_(
        model.model.layers[0].self_attn.q_proj.weight.T.clone()
    ))  # fmt: skip
    assert differences(fingerprint(), fingerprint(turned)) == {"model.weights"}
    half = fingerprint(tiny_model("llama", 4).to(torch.bfloat16))
    assert differences(fingerprint(), half) == {"model.weights", "model.dtypes"}
    assert half["model"]["dtypes"] == "bfloat16"


def test_another_configuration_or_depth_is_told() -> None:
    model = tiny_model("llama", 4)
    model.config.rms_norm_eps *= 2
    assert differences(fingerprint(), fingerprint(model)) == {"model.config"}
    deeper = differences(fingerprint(), fingerprint(tiny_model("llama", 5)))
    assert deeper == {"model.config", "model.weights", "model.blocks"}
    other = fingerprint(tiny_model("qwen3", 4))
    assert other["model"]["type"] != fingerprint()["model"]["type"]


def test_memory_layout_does_not_matter() -> None:
    def turn(model: PreTrainedModel) -> None:
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.data = weight.data.T.contiguous().T

    assert fingerprint(changed(turn)) == fingerprint()


def test_whether_weights_are_offloaded_does_not_matter(tmp_path: Path) -> None:
    folder = toy_folder(tmp_path / "model", num_blocks=4)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    for place in ("disk", "cpu"):
        blocks = {f"model.layers.{block}": place if block > 1 else "cpu" for block in range(4)}
        model = AutoModelForCausalLM.from_pretrained(
            folder, device_map={**places, **blocks}, offload_folder=tmp_path / "offload"
        )
        assert model.model.layers[3].mlp.up_proj.weight.is_meta == (place == "disk")
        assert fingerprint(model) == fingerprint()


def test_a_streamed_model_is_told_by_its_files(tmp_path: Path) -> None:
    def streamed(folder: Path) -> dict[str, Any]:
        return fingerprint(load_model(folder, stream=True))

    folder = toy_folder(tmp_path / "model", num_blocks=4)
    first = streamed(folder)
    moved = shutil.copytree(folder, tmp_path / "moved", copy_function=shutil.copyfile)
    assert streamed(moved) == first
    assert differences(first, fingerprint()) == {"model.streamed", "model.weights"}
    weights = load_file(moved / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] *= 1.01
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    assert differences(streamed(moved), first) == {"model.weights"}


def test_empty_and_scalar_tensors_have_a_fingerprint() -> None:
    def with_buffers(value: float) -> PreTrainedModel:
        model = tiny_model("llama", 4)
        model.register_buffer("empty", torch.empty(0, 3))
        model.register_buffer("scalar", torch.tensor(value))
        model.register_buffer("small", torch.ones(3, dtype=torch.float8_e4m3fn))
        return model

    assert differences(fingerprint(with_buffers(1.0)), fingerprint(with_buffers(2.0))) == {"model.weights"}


# The text


def test_other_text_is_told_and_its_source_is_not() -> None:
    moved = CalibrationWindows.from_tokens(TEXT.input_ids, source="elsewhere.txt")
    assert fingerprint(windows=moved) == fingerprint()
    other = CalibrationWindows.from_tokens(random_ids(4, 16, seed=9), source="/somewhere/text.txt")
    assert differences(fingerprint(), fingerprint(windows=other)) == {"data.fingerprint"}
    assert differences(fingerprint(), fingerprint(windows=TEXT.first(3))) == {
        "data.fingerprint",
        "data.windows",
        "data.tokens",
    }
    assert fingerprint(windows=None)["data"] is None


# The recipe


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"num_blocks": 3}, {"num_blocks"}),
        ({"num_blocks": None, "sparsity": 0.5}, {"num_blocks", "sparsity"}),
        ({"seed": 1}, {"seed"}),
        ({"protect_first": 2}, {"protect_first"}),
        ({"protect_last": 0}, {"protect_last"}),
        ({"strategy_options": {"search": "race"}}, {"strategy_options.search", "strategy_options.confidence"}),
        ({"align": 4}, {"align"}),
        ({"layout": "padded"}, {"layout"}),
    ],
)
def test_what_changes_the_result_is_told(fields: dict[str, Any], names: set[str]) -> None:
    assert differences(fingerprint(), fingerprint(**fields)) == {f"recipe.{name}" for name in names}


def test_another_strategy_is_told() -> None:
    found = differences(fingerprint(), fingerprint(strategy="shortgpt"))
    assert "recipe.strategy" in found


@pytest.mark.parametrize(
    "fields",
    [
        {"batch_size": 4},
        {"dataset": "somewhere/else.txt"},
        {"dataset": ["text in memory"]},
        {"dataset_text_field": "content"},
        {"num_samples": 7, "seqlen": 5, "use_chat_template": True, "calibration_recipe": "sleb"},
        {"protect_first": 1, "protect_last": 1},
        {"stack": "decoder"},
        {"strategy_options": {"search": "exact"}},
        {"strategy_options": {"search": "exact", "confidence": None}},
    ],
    ids=str,
)
def test_what_does_not_change_the_result_is_not(fields: dict[str, Any]) -> None:
    """Text counts by its tokens; defaults may be spelled out."""
    assert fingerprint(**fields) == fingerprint()


def test_every_field_of_the_recipe_is_accounted_for() -> None:
    """A new field is part of the fingerprint unless somebody says why it is not."""
    left_out = {*fingerprints._BY_DATA, *fingerprints._BY_ROUNDING, *BUDGET_FIELDS} - {"num_blocks"}
    assert set(fingerprint()["recipe"]) == set(vars(Recipe())) - left_out


# Versions


def test_other_versions_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint()
    monkeypatch.setattr(fingerprints, "versions", lambda: {**environment.versions(), "torch": "2.0"})
    assert differences(before, fingerprint()) == {"versions.torch"}
