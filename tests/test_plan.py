# SPDX-License-Identifier: Apache-2.0
"""A plan is checked at birth, does not change, and survives JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from families import tiny_config, tiny_model
from zoo import multimodal, other_stacks

from optimum_blockprune.errors import BlockPruningError, PlanError, UnsupportedModelError
from optimum_blockprune.plan import FORMAT_VERSION, PLAN_FILE, BlockSource, PruningPlan


@pytest.fixture
def plan() -> PruningPlan:
    """A plan with every field set."""
    return PruningPlan.from_removed(
        "llama",
        5,
        [3, 1],
        strategy="sleb",
        base_model="org/model",
        requested={"sparsity": 0.4},
        scores={"1": 2.5, "3": 2.25},
        steps=({"block": 3, "loss": 2.25, "candidates": {"1": 2.5, "3": 2.25}}, {"block": 1, "loss": 2.75}),
        details={"dense_loss": 2.0, "text": "größer"},
        calibration={"source": "x", "windows": 4},
        options={"search": "prefix"},
        seed=7,
        versions={"torch": "2.13"},
    )


def blocks(*numbers: int) -> tuple[BlockSource, ...]:
    return tuple(BlockSource(number, number) for number in numbers)


def changed(plan: PruningPlan, **fields: Any) -> dict[str, Any]:
    return {**plan.to_dict(), **fields}


# What is in a plan


def test_kept_and_removed(plan: PruningPlan) -> None:
    assert plan.removed_blocks == (3, 1)
    assert plan.kept_blocks == (0, 2, 4)
    assert plan.blocks == blocks(0, 2, 4)
    assert plan.num_blocks == 5
    assert plan.format_version == FORMAT_VERSION == 1


def test_any_iterable_of_blocks() -> None:
    assert PruningPlan.from_removed("llama", 5, {2}).removed_blocks == (2,)
    assert PruningPlan.from_removed("llama", 5, iter([4, 0])).kept_blocks == (1, 2, 3)
    assert PruningPlan.from_removed("llama", 5, ()).kept_blocks == (0, 1, 2, 3, 4)


def test_defaults_say_that_the_user_chose() -> None:
    plan = PruningPlan.from_removed("llama", 5, [1])
    assert plan.strategy == "manual"
    assert plan.calibration is None
    assert (plan.steps, plan.scores, plan.details, plan.options) == ((), {}, {}, {})


def test_a_plan_does_not_change(plan: PruningPlan) -> None:
    for name in ("removed_blocks", "blocks", "strategy", "details"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(plan, name, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.blocks[0].attention = 1


def test_with_provenance_copies(plan: PruningPlan) -> None:
    other = plan.with_provenance(strategy="other", seed=1)
    assert (other.strategy, other.seed) == ("other", 1)
    assert (plan.strategy, plan.seed) == ("sleb", 7)
    assert other.blocks == plan.blocks
    with pytest.raises(PlanError):
        plan.with_provenance(removed_blocks=(1,))


# Validation


@pytest.mark.parametrize("block", [5, -1, 99, 1.0, "1", None, True])
def test_blocks_that_do_not_exist(block: Any) -> None:
    with pytest.raises(PlanError, match=f"Block {block!r} does not exist: this model has blocks 0 to 4"):
        PruningPlan.from_removed("llama", 5, [0, block])


def test_a_block_named_twice() -> None:
    with pytest.raises(PlanError, match=r"removed twice: \[1, 3, 1\]"):
        PruningPlan.from_removed("llama", 5, [1, 3, 1])


def test_all_blocks_removed() -> None:
    with pytest.raises(PlanError, match="removes every block"):
        PruningPlan.from_removed("llama", 3, [0, 2, 1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blocks": blocks(0, 1, 2, 4)}, r"Kept blocks \[0, 1, 2, 4\] and removed blocks \[3, 1\]"),
        ({"blocks": blocks(0, 4, 2)}, "in order"),
        ({"blocks": blocks(0, 2)}, "do not make up blocks 0 to 4"),
        ({"blocks": blocks(0, 2, 2, 4)}, "do not make up"),
        ({"removed_blocks": (3, 1, 7)}, r"removed blocks \[3, 1, 7\] do not make up"),
        ({"num_blocks": 6}, "blocks 0 to 5"),
        ({"num_blocks": "5"}, "must be integers"),
        ({"num_blocks": True}, "must be integers"),
        ({"removed_blocks": (3.0, 1)}, "must be integers"),
        ({"blocks": (BlockSource("0", 0), *blocks(2, 4))}, "must be integers"),
        ({"blocks": (BlockSource(0, 2), *blocks(2, 4))}, "whole blocks.*attention=0, mlp=2"),
        ({"blocks": ()}, "removes every block"),
        ({"model_type": ""}, "model type"),
        ({"model_type": None}, "model type"),
        ({"stack": "middle"}, "for the 'decoder' or the 'encoder' of a model, not for 'middle'"),
        ({"stack": None}, "not for None"),
    ],
)
def test_parts_that_contradict_each_other(plan: PruningPlan, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        dataclasses.replace(plan, **fields)


def test_errors_are_value_errors() -> None:
    assert issubclass(PlanError, BlockPruningError)
    assert issubclass(BlockPruningError, ValueError)


# From a model


def test_from_a_model_or_its_configuration() -> None:
    config = tiny_config("gemma2")
    config._name_or_path = "org/gemma"
    plan = PruningPlan.from_blocks(config, [2])
    assert (plan.model_type, plan.num_blocks, plan.base_model) == ("gemma2", 5, "org/gemma")
    assert PruningPlan.from_blocks(tiny_model("gemma2"), [2]).kept_blocks == plan.kept_blocks == (0, 1, 3, 4)


def test_from_one_stack_of_a_model() -> None:
    model = other_stacks.tiny_model("bart", 4, 6)
    for stack, depth in (("encoder", 4), ("decoder", 6), (None, 6)):
        plan = PruningPlan.from_blocks(model, [2], stack=stack)
        assert (plan.model_type, plan.stack, plan.num_blocks) == ("bart", stack or "decoder", depth)
        assert PruningPlan.from_dict(plan.to_dict()) == plan
    assert PruningPlan.from_blocks(other_stacks.tiny_config("bert"), [2]).stack == "encoder"
    inner = PruningPlan.from_blocks(multimodal.tiny_config("llava"), [2])
    assert (inner.model_type, inner.stack) == ("llama", "decoder")
    with pytest.raises(PlanError, match="Block 4 does not exist: this model has blocks 0 to 3"):
        PruningPlan.from_blocks(model, [4], stack="encoder")
    with pytest.raises(UnsupportedModelError, match="'llama' has no 'encoder' stack"):
        PruningPlan.from_blocks(tiny_config("llama"), [1], stack="encoder")


def test_from_a_model_that_cannot_lose_blocks() -> None:
    with pytest.raises(UnsupportedModelError, match="'gpt2'"):
        PruningPlan.from_blocks(tiny_config("gpt2", scale_attn_by_inverse_layer_idx=True), [1])
    with pytest.raises(PlanError, match="Block 5"):
        PruningPlan.from_blocks(tiny_config("llama"), [5])


# JSON


def test_round_trip(plan: PruningPlan, tmp_path: Path) -> None:
    data = plan.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert PruningPlan.from_dict(data) == plan
    assert data["blocks"][1] == {"attention": 2, "mlp": 2}
    assert set(data) == {field.name for field in dataclasses.fields(PruningPlan)}
    for target in (tmp_path, tmp_path / "mine.json"):
        path = plan.save(target)
        assert PruningPlan.from_file(path) == PruningPlan.from_file(str(target)) == plan
    assert (tmp_path / PLAN_FILE).read_text(encoding="utf-8") == (tmp_path / "mine.json").read_text(encoding="utf-8")
    assert (tmp_path / PLAN_FILE).read_bytes().endswith(b"}\n")


def test_what_is_not_said_has_a_default(plan: PruningPlan) -> None:
    data = plan.to_dict()
    needed = ("model_type", "num_blocks", "blocks", "removed_blocks", "format_version")
    short = PruningPlan.from_dict({name: data[name] for name in needed})
    assert short == PruningPlan.from_removed("llama", 5, [3, 1])
    for name in needed:
        with pytest.raises(PlanError, match=name):
            PruningPlan.from_dict({key: value for key, value in data.items() if key != name})


def test_changes_to_the_dict_do_not_reach_the_plan(plan: PruningPlan) -> None:
    data = plan.to_dict()
    data["details"]["dense_loss"] = 0
    data["steps"][0]["candidates"].clear()
    assert plan.details["dense_loss"] == 2.0
    assert plan.steps[0]["candidates"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"surprise": 1, "other": 2}, "Unknown fields in the plan: other, surprise"),
        ({"format_version": 2}, "format_version 2; this version of the tool reads 1"),
        ({"format_version": "1"}, "format_version '1'"),
        ({"format_version": None}, "format_version None"),
        ({"blocks": [0, 2, 4]}, "malformed"),
        ({"blocks": None}, "malformed"),
        ({"blocks": [{"attention": 0}]}, "malformed.*mlp"),
        ({"blocks": [{"attention": 0, "mlp": 0, "more": 0}]}, "malformed.*more"),
        ({"removed_blocks": 3}, "malformed"),
        ({"removed_blocks": "31"}, "must be integers"),
        ({"removed_blocks": [3, 1, 1]}, "removed twice"),
        ({"steps": 5}, "malformed"),
        ({"num_blocks": None}, "must be integers"),
    ],
)
def test_malformed_plans(plan: PruningPlan, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PruningPlan.from_dict(changed(plan, **fields))


@pytest.mark.parametrize("data", [[], "plan", None, 3])
def test_a_plan_is_an_object(data: Any) -> None:
    with pytest.raises(PlanError, match=f"A plan is a JSON object, not {type(data).__name__}"):
        PruningPlan.from_dict(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not a JSON file"),
        (b"", "is not a JSON file"),
        (b"\xff\xfe{}", "is not a JSON file"),
        (b"[1]", "not list"),
        (b"{}", "format_version None"),
    ],
)
def test_unreadable_files(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(text)
    with pytest.raises(PlanError, match=message):
        PruningPlan.from_file(path)


def test_missing_files(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(PlanError, match="There is no plan at"):
            PruningPlan.from_file(path)


def test_from_the_hub(plan: PruningPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(repo_id: str, file: str, **options: Any) -> str:
        asked.append((repo_id, file, options))
        return str(plan.save(tmp_path))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert PruningPlan.from_hub("me/model", revision="main", token="t") == plan
    assert asked == [("me/model", PLAN_FILE, {"revision": "main", "token": "t"})]
