# SPDX-License-Identifier: Apache-2.0
"""Compensation: fitted in closed form, judged on other windows, folded into weights exactly, reproduced from files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refusal
from families import FAMILIES, block_list, plain_logits, random_ids, tiny_model
from tiers import often
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan
from optimum_blockprune.batches import Batch
from optimum_blockprune.errors import (
    CalibrationError,
    ConfigurationError,
    OutputError,
    PlanError,
    UnsupportedModelError,
)
from optimum_blockprune.folding import Prepared, fold_into
from optimum_blockprune.folds import CHANGE, DIAGONAL, KINDS, MATRIX, Fold, Folds, digest_of
from optimum_blockprune.half import Half
from optimum_blockprune.points import cut_points
from optimum_blockprune.runner import BlockRunner
from optimum_blockprune.stand_ins import hidden_of
from optimum_blockprune.writers import find_writer


pytestmark = pytest.mark.usefixtures("no_pictures")


# Norms behind the writers: only a factor for each channel can go in.
SANDWICH = ("gemma2", "gemma3_text", "olmo2")
WHOLE_ONLY = ("gpt_neox", "falcon", "bloom")
# Where the MLP ends in one projection.
PLAIN = [family for family in FAMILIES if family not in (*SANDWICH, "mixtral")]


def rows(count: int = 12, length: int = 24, seed: int = 3) -> list[dict[str, Any]]:
    """Tokens that a tiny model can read."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(5, 90, (length,), generator=generator).tolist()} for _ in range(count)]


def config(blocks: str, compensation: str = "auto", **fields: Any) -> BlockPruningConfig:
    """Named blocks, compensated."""
    settings = {"dataset": rows(), "num_samples": 12, "seqlen": 24, **fields}
    options = {"blocks": blocks}
    count = blocks.count("mlp") or blocks.count(",") + 1
    return BlockPruningConfig(
        "manual", num_blocks=count, compensation=compensation, strategy_options=options, **settings
    )


def made(family: str, blocks: str, compensation: str = "auto", **fields: Any) -> tuple[BlockPruner, PruningPlan]:
    """A pruner of a dense model, and the plan."""
    pruner = BlockPruner(tiny_model(family), config(blocks, compensation, **fields))
    return pruner, pruner.make_plan()


def forced(model: PreTrainedModel, family: str, blocks: tuple[int, ...], kind: str) -> PruningPlan:
    """A plan with a made-up map in front of its cut, whatever a judge would say of it."""
    plan = PruningPlan.from_blocks(model, blocks)
    [point] = cut_points(plan)
    writer = _writer(model, point.before.block, family)
    weight = block_list(model)[point.before.block].get_submodule(writer.module).weight
    generator, width = torch.Generator().manual_seed(5), model.config.hidden_size
    if kind == CHANGE:
        tensor = 0.1 * torch.rand(weight.shape if writer.axis else weight.T.shape, generator=generator)
    else:
        shape = (width,) if kind == DIAGONAL else (width, width)
        tensor = torch.rand(shape, generator=generator) + (1 if kind == DIAGONAL else torch.eye(width))
    held = {"map": tensor}
    folds = Folds((writer.fold(point.before.block, kind, "map"),), digest_of(held), held=held)
    return plan.with_provenance(folds=folds)


def _writer(model: PreTrainedModel, block: int, family: str) -> Any:
    runner = BlockRunner(model)

    def run() -> torch.Tensor:
        args, kwargs = runner.arguments_of(block)
        return hidden_of(runner.stack.blocks[block](*args, **kwargs))

    return find_writer(runner.stack.blocks[block], run)


# The module that writes to the stream


@pytest.mark.parametrize("family", PLAIN)
def test_the_last_projection_of_a_block_writes_to_the_stream(family: str) -> None:
    model = tiny_model(family)
    writer = _writer(model, 1, family)
    names = {"gpt2": "mlp.c_proj", "opt": "fc2"}
    long = "mlp.dense_4h_to_h" if family in WHOLE_ONLY else "mlp.down_proj"
    assert writer.module == names.get(family, long)
    assert writer.kind == MATRIX and writer.axis == (1 if family == "gpt2" else 0)
    expected = model.config.residual_multiplier if family == "granite" else 1.0
    assert writer.factor == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", SANDWICH)
def test_a_norm_behind_the_projection_takes_factors_only(family: str) -> None:
    writer = _writer(tiny_model(family), 1, family)
    assert (writer.module, writer.kind) == ("post_feedforward_layernorm", DIAGONAL)
    assert writer.offset == (0.0 if family == "olmo2" else 1.0)


def test_experts_take_no_map() -> None:
    assert _writer(tiny_model("mixtral"), 1, "mixtral") is None


# Folding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", PLAIN)
def test_a_folded_map_acts_on_the_output(family: str, kind: str) -> None:
    """Weights with the map in them give what a hook behind the module gives."""
    model = tiny_model(family)
    plan = forced(model, family, (2,), kind)
    [fold], tensor = plan.folds.entries, plan.folds.tensors()["map"]
    module, ids = block_list(model)[fold.block].get_submodule(fold.module), random_ids()
    acts = {
        DIAGONAL: lambda _given, output: output * tensor,
        MATRIX: lambda _given, output: output @ tensor,
        CHANGE: lambda given, output: output + given @ tensor,
    }[kind]
    handle = module.register_forward_hook(lambda _module, args, output: acts(args[0], output))
    wanted = plain_logits(model, ids)
    handle.remove()
    before = plain_logits(model, ids)
    with Prepared(block_list(model), plan.folds.entries, plan.folds.tensors()).on():
        got = plain_logits(model, ids)
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert (before - wanted).abs().max() > 1e-2 * wanted.abs().max()
    assert torch.equal(plain_logits(model, ids), before)


@pytest.mark.parametrize(
    ("family", "kind"),
    often(
        [
            (family, kind)
            for family in FAMILIES
            if family != "mixtral"
            for kind in ((DIAGONAL,) if family in SANDWICH else (CHANGE, MATRIX))
        ],
        kept=lambda case: case[0] in ("llama", "gpt2", "opt", "gemma2", "phi3"),
    ),
)
def test_memory_folder_and_files_agree_bit_for_bit(family: str, kind: str, tmp_path: Path) -> None:
    """A plan with maps, applied in memory, saved, loaded by stock classes, and applied to files."""
    tiny_model(family).save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    plan = forced(dense, family, (2,), kind)
    shapes = {
        name: value.shape
        for name, value in PruningPlan.from_blocks(dense, [2])
        .apply(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
        .state_dict()
        .items()
    }
    pruner = BlockPruner(dense)
    pruner.prune(save_dir=tmp_path / "pruned", plan=plan)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert {name: value.shape for name, value in loaded.state_dict().items()} == shapes
    ids = random_ids()
    assert torch.equal(plain_logits(loaded, ids), plain_logits(pruner.model, ids))
    read = PruningPlan.from_file(tmp_path / "pruned")
    assert read == plan
    read.apply_to_checkpoint(tmp_path / "dense", tmp_path / "copied", verify="logits")
    copied = AutoModelForCausalLM.from_pretrained(tmp_path / "copied").state_dict()
    assert all(torch.equal(value, copied[name]) for name, value in loaded.state_dict().items())
    assert not any(path.is_dir() for path in (tmp_path / "copied").iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_leaves_the_weights(kind: str) -> None:
    model = tiny_model("llama")
    plan = forced(model, "llama", (2,), kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    narrow = plan.with_provenance(
        folds=Folds(plan.folds.entries, digest_of({"map": torch.eye(3)}), held={"map": torch.eye(3)})
    )
    with pytest.raises(PlanError, match="made for another model"):
        narrow.apply(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_module_that_is_not_there_is_named() -> None:
    fold = Fold(1, "mlp.nowhere", MATRIX, 0, 0.0, "map")
    with pytest.raises(PlanError, match="mlp.nowhere"):
        fold_into(block_list(tiny_model("llama"))[1], fold, torch.eye(4), setattr)


@pytest.mark.parametrize(("module", "kind"), [("input_layernorm", CHANGE), ("mlp.down_proj", DIAGONAL)])
def test_a_tensor_that_fits_no_weight_is_refused(module: str, kind: str) -> None:
    fold, block = Fold(1, module, kind, 0, 0.0, "map"), block_list(tiny_model("llama"))[1]
    for shape in ((), (3,), (3, 3)):
        with pytest.raises(PlanError, match="made for another model"):
            fold_into(block, fold, torch.ones(shape), setattr)


# The plan's second file


def test_the_statistics_must_lie_beside_the_plan(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plan = forced(model, "llama", (2,), MATRIX)
    plan.save(tmp_path / "plan.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.folds", "plan.json"]
    (tmp_path / "plan.folds").rename(tmp_path / "elsewhere")
    lost = PruningPlan.from_file(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="Copy it beside the plan"):
        lost.apply(model)
    Folds(plan.folds.entries, held={"map": torch.zeros(4)}).save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="other ones"):
        PruningPlan.from_file(tmp_path / "plan.json").apply(model)
    (tmp_path / "plan.folds").write_bytes(b"no tensors")
    with pytest.raises(PlanError, match="not the file of this plan"):
        PruningPlan.from_file(tmp_path / "plan.json").apply(model)


def test_room_for_the_statistics_is_asked_for_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "dense")
    plan = forced(model, "llama", (2,), MATRIX)
    result = plan.apply_to_checkpoint(tmp_path / "dense", tmp_path / "pruned")
    weights = sum(each.nbytes for each in AutoModelForCausalLM.from_pretrained(result).parameters())
    usage = type("Usage", (), {"free": weights + 100})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="GB free"):
        plan.apply_to_checkpoint(tmp_path / "dense", tmp_path / "again")
    with pytest.raises(OutputError, match="GB free"):
        BlockPruner(model, None).check_save(tmp_path / "again", plan=plan)
    assert not (tmp_path / "again").exists()
    usage.free = 2 * weights
    BlockPruner(model, None).check_save(tmp_path / "again", plan=plan)
    plan.apply_to_checkpoint(tmp_path / "dense", tmp_path / "again")


@pytest.mark.parametrize(
    "change", [{"kind": "cubic"}, {"axis": 2}, {"block": -1}, {"block": 2}, {"module": 3}, {"more": 1}]
)
def test_impossible_entries_are_refused(change: dict[str, Any]) -> None:
    data = forced(tiny_model("llama"), "llama", (2,), MATRIX).to_dict()
    data["folds"]["entries"][0] |= change
    with pytest.raises(PlanError):
        PruningPlan.from_dict(json.loads(json.dumps(data)))


def test_a_compensated_plan_is_not_cut_short() -> None:
    model = tiny_model("llama")
    plan = PruningPlan.from_blocks(model, [2, 3])
    held = {"map": torch.eye(model.config.hidden_size)}
    folds = Folds((Fold(1, "mlp.down_proj", MATRIX, 0, 0.0, "map"),), digest_of(held), held=held)
    with pytest.raises(PlanError, match="num_blocks=1"):
        plan.with_provenance(folds=folds).truncate(1)


# Fitting


def test_cuts_lie_behind_what_is_kept() -> None:
    model = tiny_model("llama")
    count = model.config.num_hidden_layers
    assert count >= 4
    plan = PruningPlan.from_blocks(model, ["0", "1.mlp", "2.attention", str(count - 1)])
    points = [(str(point.before), point.after and str(point.after)) for point in cut_points(plan)]
    assert points == [("1.attention", "2.mlp"), (f"{count - 2}.mlp", None)]


@pytest.mark.parametrize("family", PLAIN)
def test_a_change_makes_up_for_most_of_what_goes(family: str) -> None:
    """Random models lose a third of the divergence on the windows that judge, and much on tokens that nothing saw."""
    pruner, plan = made(family, "2" if family in WHOLE_ONLY else "1.mlp,2.attention", "ridge")
    figures = plan.details["compensation"]
    assert figures["kl_after"] < 0.7 * figures["kl_before"]
    before, after = (_divergence(pruner.model, each) for each in (plan.with_provenance(folds=Folds()), plan))
    assert after < 0.9 * before


def _divergence(model: PreTrainedModel, plan: PruningPlan) -> float:
    """KL(dense || pruned) on other tokens, nats per position, from whole logits."""
    ids = torch.tensor([row["input_ids"] for row in rows(8, seed=17)])
    dense = plain_logits(model, ids).log_softmax(-1)
    runner = BlockRunner(model)
    with Prepared(block_list(model), plan.folds.entries, plan.folds.tensors()).on():
        pruned = runner.logits(Batch(ids), plan.removed_units).log_softmax(-1)
    return (dense.exp() * (dense - pruned)).sum(-1).mean().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_of_half_precision_keeps_it_and_gains_as_much(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model(family).to(dtype).save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    pruner = BlockPruner(dense, config("1.mlp,2.attention", "ridge"))
    pruner.prune(save_dir=tmp_path / "pruned")
    figures = pruner.plan.details["compensation"]
    assert figures["kl_after"] < 0.7 * figures["kl_before"]
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned"), random_ids()
    assert {value.dtype for value in loaded.state_dict().values()} == {dtype}
    assert torch.equal(plain_logits(loaded, ids), plain_logits(pruner.model, ids))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon"])
def test_no_choice_is_worse_than_none_for_its_judges(family: str) -> None:
    blocks = "2" if family in WHOLE_ONLY else "1.mlp,2.attention"
    _, plan = made(family, blocks)
    figures = plan.details["compensation"]
    assert figures["kl_after"] <= figures["kl_before"]
    assert bool(plan.folds) == (figures["kl_after"] < figures["kl_before"])
    kept = [step for step in figures["cuts"] if step["kind"] != "none"]
    assert len(kept) == len(plan.folds.entries)
    for step in kept:
        assert step["kl"] == min(step["tried"])


def test_a_plan_leaves_the_model_alone() -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    BlockPruner(model, config("1.mlp,2.attention")).make_plan()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameters[name] is value for name, value in model.named_parameters())


def test_a_finished_fit_is_not_made_again(tmp_path: Path) -> None:
    pruner = BlockPruner(tiny_model("llama"), config("1.mlp,2.attention"))
    first = pruner.make_plan(resume_dir=tmp_path)
    assert first == BlockPruner(tiny_model("llama"), config("1.mlp,2.attention")).make_plan(resume_dir=tmp_path)


def test_configuration_and_plan_name_it() -> None:
    _, plan = made("llama", "1.mlp,2.attention", "scale")
    assert BlockPruningConfig.from_plan(plan).compensation == "scale"
    assert Half.read(plan.details["compensation"]["cuts"][0]["after"]) == Half(1, "attention")


# Refusals


def test_without_text_there_is_no_fit() -> None:
    with pytest.raises(CalibrationError, match="Compensation"):
        made("llama", "2", dataset=None)


def test_one_window_cannot_judge_itself() -> None:
    with pytest.raises(CalibrationError, match="two windows"):
        made("llama", "2", dataset=rows(1), num_samples=1)


def test_strategies_of_width_take_none() -> None:
    fields = {"dataset": rows(), "num_samples": 4, "seqlen": 24, "compensation": "ridge"}
    pruner = BlockPruner(tiny_model("llama"), BlockPruningConfig("magnitude", sparsity=0.5, **fields))
    options = pruner.config.strategy_options
    assert options is None or "unit" not in options
    with pytest.raises(ConfigurationError, match="remove blocks"):
        pruner.make_plan()


def test_unknown_ways_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="ridge"):
        BlockPruningConfig(compensation="rigde")


def test_streamed_models_are_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    pruner = BlockPruner.from_pretrained(tmp_path, config("2"), stream=True)
    with pytest.raises(UnsupportedModelError, match="streamed"):
        pruner.make_plan()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--num-blocks", "2", "--strategy", "sleb", "--dataset", "text.txt", "--export", "1,2"], "one depth"),
        (["--blocks", "2"], "compensation would have no effect"),
    ],
)
def test_the_command_ignores_nothing(
    words: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is searched: depths are not fitted, and named blocks have no text to fit on."""
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    given = ["run", "-m", tmp_path / "dense", "--compensation", "ridge", *words, tmp_path / "out"]
    assert reason in refusal(capsys, *given)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_map_helps_where_massive_activations_are_written(smollm2: Path, articles: tuple[Path, Path]) -> None:
    """What block 11 of this model adds to the first token is 800 times what it adds to others."""
    text, _ = articles
    pruner = BlockPruner.from_pretrained(smollm2)
    gone = "12,13,14,15,16,17,18"
    plan = pruner.make_plan(config(gone, "ridge", dataset=str(text), num_samples=16, seqlen=256, batch_size=4))
    figures = plan.details["compensation"]
    assert figures["kl_after"] < 0.7 * figures["kl_before"]
    # What it does to the others does not leak into the first token, however strong the shrinkage is.
    assert max(figures["cuts"][0]["tried"]) < figures["kl_before"]
