# SPDX-License-Identifier: Apache-2.0
"""What `BlockPruner` refuses: type and message, no forward pass where that can be known before, and no trace after."""

from __future__ import annotations

import errno
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import block_list, tiny_config, tiny_model
from torch import nn
from toys import (
    TEXTS,
    assert_unchanged,
    config,
    counting,
    files_below,
    snapshot,
    toy_pruner,
    word_tokenizer,
)
from transformers import AutoModel, ViTConfig, ViTModel

from optimum_blockprune import BlockPruner, BlockPruningConfig, BlockPruningError, PruningPlan
from optimum_blockprune.errors import (
    CalibrationError,
    ConfigurationError,
    NonFiniteError,
    OutputError,
    PlanError,
    UnknownStrategyError,
    UnsupportedModelError,
)
from optimum_blockprune.evaluation import EvaluationSpec


with warnings.catch_warnings():
    # Reads attributes of transformers that are deprecated, at import.
    warnings.simplefilter("ignore")
    from peft import LoraConfig, get_peft_model


# The configuration, refused at birth


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"strategy": "slep"}, UnknownStrategyError, "no strategy 'slep'. Did you mean 'sleb'"),
        ({"sparsty": 0.2}, ConfigurationError, "Unknown field 'sparsty'.*Did you mean 'sparsity'"),
        ({"strategy_options": {"serch": "naive"}}, ConfigurationError, "no option 'serch'. Did you mean 'search'"),
        ({"strategy_options": {"search": "naiv"}}, ConfigurationError, "search 'naiv' for sleb. Did you mean 'naive'"),
        ({"sparsity": 0.2, "num_blocks": 2}, ConfigurationError, "one budget, not 2: sparsity=0.2 and num_blocks=2"),
        ({"sparsity": 1.0}, ConfigurationError, "sparsity=1.0 is not between 0 and 1"),
        ({"sparsity": 0.0}, ConfigurationError, "sparsity=0.0 is not between 0 and 1"),
        ({"num_blocks": 0}, ConfigurationError, "num_blocks=0 is too small"),
    ],
)
def test_a_wrong_configuration_is_never_made(fields: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        BlockPruningConfig(**fields)
    assert isinstance(caught.value, BlockPruningError) and isinstance(caught.value, ValueError)


# What fits no model or no text, refused before the first forward pass


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"num_blocks": 5}, ConfigurationError, "remove 5 of 6 blocks, but only 4 may go: the first 1, the last 1"),
        ({"sparsity": 0.9}, ConfigurationError, "only 4 may go.*largest possible sparsity is 0.66"),
        ({"protect_first": 4, "protect_last": 2}, ConfigurationError, r"all 6 are protected \(protect_first"),
        ({"strategy": "random", "num_blocks": 6}, ConfigurationError, "only 5 may go: one block must stay"),
        ({"target_params": 10**9}, ConfigurationError, "leaves nothing to remove"),
        ({"target_params": 1}, ConfigurationError, "target_params=1 cannot be reached"),
        (
            {"dataset": None},
            CalibrationError,
            r"Strategy 'sleb' measures the model on text: give dataset=... \(--data",
        ),
        ({"dataset": []}, CalibrationError, "in-memory texts is empty"),
        ({"dataset": [""]}, CalibrationError, "holds no text: not one token was found"),
        ({"dataset": TEXTS[:1]}, CalibrationError, "too short: 40 tokens found, 64 needed.*Lower num_samples.* to 2"),
        ({"dataset": "wikitxt2"}, CalibrationError, "neither an existing path nor a known name. Did you mean 'wikite"),
        ({"dataset": "no/such.txt"}, CalibrationError, "neither an existing path nor a known name"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_forward(
    fields: dict[str, Any], kind: type, message: str, tmp_path: Path
) -> None:
    pruner = toy_pruner()
    before = snapshot(pruner.model)
    for work in (pruner.make_plan, lambda wanted: pruner.prune(tmp_path / "out", wanted)):
        with counting(pruner.model) as forwards, pytest.raises(kind, match=message):
            work(config(**fields))
        assert not forwards
    assert_unchanged(pruner.model, before)
    assert pruner.plan is None and not list(tmp_path.iterdir())


def test_text_without_a_tokenizer_is_refused() -> None:
    pruner = BlockPruner(tiny_model("llama"), config())
    for work in (pruner.make_plan, pruner.evaluate):
        with (
            counting(pruner.model) as forwards,
            pytest.raises(CalibrationError, match="needs a tokenizer: give token"),
        ):
            work()
        assert not forwards
    with pytest.raises(CalibrationError, match=r"no text to evaluate on: give dataset=... \(--dataset PATH\)"):
        BlockPruner(tiny_model("llama")).evaluate()


def test_tokenised_rows_need_no_tokenizer() -> None:
    rows = [{"input_ids": word_tokenizer()(text).input_ids} for text in TEXTS]
    pruner = BlockPruner(tiny_model("llama"), config(dataset=rows))
    pruner.prune()
    assert pruner.report.calibration["recipe"] == "tokenised"


def test_a_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    pruner = toy_pruner()
    for plan in (PruningPlan.from_removed("llama", 40, range(30)), PruningPlan.from_removed("gpt2", 6, [1])):
        with (
            counting(pruner.model) as forwards,
            pytest.raises(PlanError, match="not for the decoder of a 'llama' model with 6"),
        ):
            pruner.prune(tmp_path / "out", plan=plan)
        assert not forwards and not list(tmp_path.iterdir())
    with pytest.raises(PlanError, match="Block 6 does not exist: this model has blocks 0 to 5"):
        PruningPlan.from_blocks(pruner.model, [6])


# The output, refused before the search


def test_an_output_that_cannot_be_written_is_refused_before_the_search(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    pruner = toy_pruner()
    cases = [
        ({"save_dir": file}, OutputError, "is a file; give a folder"),
        ({"save_dir": file / "out"}, OutputError, "May not write"),
        ({"save_dir": tmp_path}, OutputError, r"exists and is not empty; pass overwrite=True \(--overwrite\)"),
        ({"save_dir": tmp_path / "out", "verify": "logit"}, ConfigurationError, "'logit'. Did you mean 'logits'"),
        ({"verify": "logit"}, ConfigurationError, "Unknown verify='logit'"),
    ]
    for arguments, kind, message in cases:
        with counting(pruner.model) as forwards, pytest.raises(kind, match=message):
            pruner.prune(**arguments)
        assert not forwards
    pruner.model.generation_config.temperature = 0.5  # without do_sample: transformers refuses to save that
    with (
        counting(pruner.model) as forwards,
        pytest.raises(ConfigurationError, match="generation_config cannot be sav"),
    ):
        pruner.prune(tmp_path / "out")
    assert not forwards and files_below(tmp_path) == {"file": b"mine"}


def test_a_disk_without_room_is_refused_before_the_search(tmp_path: Path, monkeypatch) -> None:
    pruner = toy_pruner()
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with counting(pruner.model) as forwards, pytest.raises(OutputError, match="0.00 GB free, the result needs"):
        pruner.prune(tmp_path / "out")
    assert not forwards and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "The disk filled up while writing"),
        (PermissionError(errno.EACCES, "Permission denied"), "May not write"),
        (OSError(errno.EROFS, "Read-only file system"), "May not write"),
    ],
)
def test_a_disk_that_fails_while_writing_leaves_nothing(error: OSError, message: str, tmp_path, monkeypatch) -> None:
    pruner = toy_pruner(strategy="random")
    before = snapshot(pruner.model)

    def fail(folder: Path, **_kwargs: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(pruner.model, "save_pretrained", fail)
    with pytest.raises(OutputError, match=message):
        pruner.prune(tmp_path / "out")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    assert_unchanged(pruner.model, before)
    with pytest.raises(PlanError, match="nothing to save yet"):
        pruner.save_pretrained(tmp_path / "out")
    pruner.prune(tmp_path / "out", plan=pruner.plan)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 10_000


# Models


# peft 0.21 reads a property that transformers 5 calls deprecated.
peft_warns = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@peft_warns
def test_loaded_models_that_cannot_be_pruned_are_refused_with_what_to_do() -> None:
    vit = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    quantised = tiny_model("llama")
    quantised.is_quantized, quantised.quantization_method = True, "gptq"
    for model, message in (
        (ViTModel(ViTConfig(**vit, image_size=8, patch_size=4)), r"'vit' \(ViTModel\) is neither a language model"),
        (AutoModel.from_config(tiny_config("llama")), r"\(LlamaModel\).* head, such as AutoModelForCausalLM"),
        (get_peft_model(tiny_model("llama"), lora), r"'llama' model carries PEFT layers.*model.merge_and_unload\(\)"),
        (quantised, r"'llama' model is quantised \(gptq\).*model.dequantize\(\)"),
        (nn.Linear(2, 2), "PreTrainedModel"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            BlockPruner.from_pretrained(model)


@peft_warns
def test_an_adapter_that_is_merged_is_no_hindrance() -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    merged = get_peft_model(tiny_model("llama"), lora).merge_and_unload()
    pruned = BlockPruner(merged, config("random")).prune()
    assert pruned is merged and len(block_list(merged)) == 3


# NaN and infinity name the block


def _poison(model: nn.Module, block: int) -> None:
    with torch.no_grad():
        block_list(model)[block].mlp.down_proj.weight[0, 0] = float("nan")


@pytest.mark.parametrize("strategy", ["sleb", "mi_prun", "shortgpt", "angular", "random"])
def test_a_broken_model_is_refused_and_the_block_named(strategy: str, tmp_path: Path) -> None:
    pruner = toy_pruner(strategy=strategy)
    _poison(pruner.model, 3)
    with pytest.raises(NonFiniteError, match="first appears in the output of block 3"):
        pruner.prune(tmp_path / "out", plan=PruningPlan.from_blocks(pruner.model, [1]))
    with pytest.raises(NonFiniteError, match="first appears in the output of block 3"):
        pruner.evaluate(spec=EvaluationSpec(speed=False))
    if strategy != "random":  # which looks at nothing, and may remove just this block
        with pytest.raises(NonFiniteError, match="first appears in the output of block 3"):
            pruner.prune(tmp_path / "out")
    assert not list(tmp_path.iterdir()) and len(block_list(pruner.model)) == 6


def test_an_overflow_behind_the_blocks_is_refused_as_well() -> None:
    pruner = toy_pruner()
    with torch.no_grad():
        pruner.model.model.norm.weight[0] = float("inf")
    with pytest.raises(NonFiniteError, match="every block's output is finite.*norm or the head overflows"):
        pruner.prune()
    with pytest.raises(NonFiniteError, match="every block's output is finite"):
        pruner.evaluate()
    with pytest.raises(NonFiniteError, match="every block's output is finite"):
        pruner.prune(plan=PruningPlan.from_blocks(pruner.model, [1]))


def test_a_broken_block_that_goes_is_no_hindrance(tmp_path: Path) -> None:
    pruner = toy_pruner(strategy="random")
    _poison(pruner.model, 3)
    pruner.prune(tmp_path / "out", plan=PruningPlan.from_blocks(pruner.model, [3]))
    assert json.loads((tmp_path / "out" / "pruning_report.json").read_text())["removed_blocks"] == [3]
