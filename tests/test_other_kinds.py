# SPDX-License-Identifier: Apache-2.0
"""Encoders, encoder-decoders and models with images, the user's way: folders, strategies, processors, the shell."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import command_line
import pytest
import torch
from tiers import often
from toys import TEXTS, word_tokenizer
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoProcessor, PreTrainedModel
from zoo import multimodal, other_stacks

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan
from optimum_blockprune.errors import CalibrationError


pytestmark = pytest.mark.usefixtures("no_pictures")

ONE_PASS = ("shortgpt", "angular", "mi_prun")
# What must not change: every tensor outside the text decoder.
TOWERS = ("vision", "projector", "connector", "visual", "image")


def mask_tokenizer() -> Any:
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "w95"})
    return tokenizer


def config(strategy: str, **fields: Any) -> BlockPruningConfig:
    defaults = {"dataset": TEXTS, "num_samples": 4, "seqlen": 16, "num_blocks": 1, "batch_size": 2}
    return BlockPruningConfig(strategy=strategy, **{**defaults, **fields})


def recordings(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Four recordings with transcripts of different lengths."""
    features = other_stacks.inputs("whisper", model)["input_features"]
    labels = [torch.arange(10, 17 + row)[None] for row in range(4)]
    return [{"input_features": features[row % 2 : row % 2 + 1] + row, "labels": labels[row]} for row in range(4)]


@pytest.mark.parametrize(
    ("name", "strategy"),
    often(
        product(["bert", "roberta", "distilbert", "deberta-v2", "modernbert"], ["sleb", *ONE_PASS]),
        kept=lambda case: case[0] == "bert" or case[1] == "sleb",
    ),
)
def test_encoders(name: str, strategy: str, tmp_path: Path) -> None:
    other_stacks.tiny_model(name).save_pretrained(tmp_path / "dense")
    mask_tokenizer().save_pretrained(tmp_path / "dense")
    pruner = BlockPruner.from_pretrained(tmp_path / "dense", config(strategy))
    dense = pruner.evaluate()
    pruner.prune(save_dir=tmp_path / "pruned")
    assert pruner.plan.stack == "encoder"
    assert len(pruner.plan.removed_blocks) == 1
    assert pruner.evaluate()["blocks"] == dense["blocks"] - 1
    # Each masked token is a prediction: 15 % of the 16 tokens of a window.
    assert dense["tokens"] == 2 * dense["windows"]
    reloaded, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    inputs = other_stacks.inputs(name, reloaded)
    assert torch.equal(other_stacks.plain_logits(reloaded, inputs), other_stacks.plain_logits(pruner.model, inputs))
    assert json.loads((tmp_path / "pruned" / "pruning_plan.json").read_text())["stack"] == "encoder"
    assert "fill-mask" in (tmp_path / "pruned" / "README.md").read_text()


def test_a_bare_encoder_has_hidden_states_and_no_loss() -> None:
    model = other_stacks.tiny_model("bert#bare")
    pruner = BlockPruner(model, config("shortgpt"), mask_tokenizer())
    pruner.prune()
    assert model.config.num_hidden_layers == 4
    with pytest.raises(CalibrationError, match="no masked-LM head.*hidden states only"):
        BlockPruner(other_stacks.tiny_model("bert#bare"), config("sleb"), mask_tokenizer()).make_plan()
    with pytest.raises(CalibrationError, match="no mask token: give its tokenizer"):
        BlockPruner(other_stacks.tiny_model("bert"), config("sleb"), word_tokenizer()).make_plan()


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize(
    ("name", "strategy"),
    often(
        product(["bart", "t5", "t5gemma"], ["sleb", *ONE_PASS]),
        kept=lambda case: case[1] == "sleb" or case == ("t5", ONE_PASS[0]),
    ),
)
def test_encoder_decoders_on_text(name: str, stack: str, strategy: str, tmp_path: Path) -> None:
    other_stacks.tiny_model(name).save_pretrained(tmp_path / "dense")
    word_tokenizer().save_pretrained(tmp_path / "dense")
    pruner = BlockPruner.from_pretrained(tmp_path / "dense", config(strategy, stack=stack))
    depth = {each: len(other_stacks.block_list(name, pruner.model, each)) for each in ("encoder", "decoder")}
    pruner.prune(save_dir=tmp_path / "pruned")
    assert pruner.plan.stack == stack
    reloaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "pruned")
    depth[stack] -= 1
    assert {each: len(other_stacks.block_list(name, reloaded, each)) for each in depth} == depth
    inputs = other_stacks.inputs(name, reloaded)
    assert torch.equal(other_stacks.plain_logits(reloaded, inputs), other_stacks.plain_logits(pruner.model, inputs))


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("strategy", ["sleb", *ONE_PASS])
def test_whisper_on_recordings(stack: str, strategy: str) -> None:
    model = other_stacks.tiny_model("whisper")
    pruner = BlockPruner(model, config(strategy, stack=stack, dataset=recordings(model)))
    dense = pruner.evaluate()
    # Transcripts of 7 to 10 tokens; each token is predicted from the start token and those before it.
    assert dense["tokens"] == 7 + 8 + 9 + 10
    pruner.prune()
    assert len(other_stacks.block_list("whisper", model, stack)) == {"encoder": 4, "decoder": 5}[stack]


def test_whisper_reads_no_text() -> None:
    with pytest.raises(CalibrationError, match="'whisper'.*reads 'input_features', not text.*'labels'"):
        BlockPruner(other_stacks.tiny_model("whisper"), config("sleb"), word_tokenizer()).make_plan()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "smolvlm", "mistral3"])
def test_images_choose_blocks_and_reach_the_pruned_model(name: str, tmp_path: Path) -> None:
    model = multimodal.tiny_model(name)
    towers = {key: value.clone() for key, value in model.state_dict().items() if any(word in key for word in TOWERS)}
    seen = [multimodal.image_inputs(name, model, seed) for seed in (0, 1)]
    truth = [multimodal.plain_logits(multimodal.silenced(name, model, (4,)), each) for each in seen]
    plan = PruningPlan.from_blocks(model, [4])
    BlockPruner(model).prune(plan=plan, save_dir=tmp_path / "pruned")
    reloaded = type(model).from_pretrained(tmp_path / "pruned")
    for pruned in (model, reloaded):
        for each, expected in zip(seen, truth, strict=True):
            torch.testing.assert_close(multimodal.plain_logits(pruned, each), expected, rtol=0, atol=1e-5)
        assert towers and all(torch.equal(pruned.state_dict()[key], value) for key, value in towers.items())
    assert not torch.equal(truth[0], truth[1])
    assert "image-text-to-text" in (tmp_path / "pruned" / "README.md").read_text()


def test_rows_with_images_are_what_a_search_looks_at() -> None:
    model = multimodal.tiny_model("llava")
    batch = [multimodal.image_inputs("llava", model, seed) for seed in range(2)]
    rows = [{key: value[row : row + 1] for key, value in each.items()} for each in batch for row in range(2)]
    wanted = config("sleb", dataset=rows, seqlen=32)
    with_images = BlockPruner(model, wanted).make_plan()
    assert with_images.calibration["windows"] == 4
    other = [{**row, "pixel_values": torch.zeros_like(row["pixel_values"])} for row in rows]
    without = BlockPruner(model, config("sleb", dataset=other, seqlen=32)).make_plan()
    assert with_images.calibration["fingerprint"] != without.calibration["fingerprint"]
    assert with_images.steps[0]["candidates"] != without.steps[0]["candidates"]


def test_the_processor_travels_along(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = LlavaProcessor(images, tokenizer, patch_size=4, vision_feature_select_strategy="default")
    multimodal.tiny_model("llava").save_pretrained(tmp_path / "dense")
    processor.save_pretrained(tmp_path / "dense")
    plan = PruningPlan.from_blocks(multimodal.tiny_model("llava"), [2])
    BlockPruner.from_pretrained(tmp_path / "dense").prune(plan=plan, save_dir=tmp_path / "pruned")
    plan.apply_to_checkpoint(tmp_path / "dense", tmp_path / "files")
    for folder in ("pruned", "files"):
        assert AutoProcessor.from_pretrained(tmp_path / folder).to_dict() == processor.to_dict(), folder


def test_the_shell_prunes_a_stack_and_checks_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other_stacks.tiny_model("bart").save_pretrained(tmp_path / "dense")
    run = ("run", "-m", tmp_path / "dense", "--blocks", "1,3", "--stack", "encoder", "--json", tmp_path / "pruned")
    ran = _shell(capsys, *run)
    assert ran["achieved"]["blocks_after"] == 3
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "pruned").config.encoder_layers == 3
    checks = _shell(capsys, "check", "-m", tmp_path / "pruned", "--json")["checks"]
    assert {check["stack"]: check["num_blocks"] for check in checks} == {"encoder": 3, "decoder": 6}
    assert all(check["prunable"] for check in checks)
    check = ("check", "-m", tmp_path / "dense", "--stack", "decoder", "--blocks", "2", "--json")
    assert _shell(capsys, *check)["checks"][0]["changes"] == {"decoder_layers": 5}


def _shell(capsys: pytest.CaptureFixture, *words: object) -> dict[str, Any]:
    return json.loads(command_line.output(capsys, *words))
