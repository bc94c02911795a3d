# SPDX-License-Identifier: Apache-2.0
"""Plans on files: equal to the same plan in memory, byte for byte, in little memory, or nothing at all."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, block_path, plain_logits, random_ids, silenced, tiny_config, tiny_model
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiers import often
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_blockprune import BlockPruningConfig, checkpoint, source, tensors, weight_writing
from optimum_blockprune.blocks import find_blocks
from optimum_blockprune.checkpoint import apply_to_checkpoint
from optimum_blockprune.errors import (
    BlockPruningError,
    CheckpointError,
    ConfigurationError,
    OutputError,
    PlanError,
    UnsupportedModelError,
    VerificationError,
)
from optimum_blockprune.plan import PruningPlan


DEPTH, REMOVED = 5, (3, 1)
KEPT = (0, 2, 4)
INDEX = "model.safetensors.index.json"


def plan_of(model_type: str = "llama", removed: tuple[int, ...] = REMOVED) -> PruningPlan:
    return PruningPlan.from_removed(model_type, DEPTH, removed)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


def raw(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor in a folder's safetensors files, read without the package."""
    found = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = (entry["dtype"], tuple(entry["shape"]), data[start + begin : start + end])
    return found


def renamed(stored: dict, blocks: str) -> dict:
    """What `raw` should find after pruning; `blocks` is the name of the block list."""
    result = {}
    for name, tensor in stored.items():
        match = re.match(rf"{re.escape(blocks)}\.(\d+)\.(.*)", name)
        if match is None:
            result[name] = tensor
        elif int(match[1]) in KEPT:
            result[f"{blocks}.{KEPT.index(int(match[1]))}.{match[2]}"] = tensor
    return result


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A llama in one file."""
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A llama in many files."""
    tiny_model("llama").save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    return tmp_path / "dense"


def refused(error: type[BaseException], message: str, src: Path, *, plan: PruningPlan | None = None, **kwargs) -> None:
    """Applying the plan raises, and leaves nothing beside the source."""
    work = src.parent
    before = sorted(path.name for path in work.iterdir())
    with pytest.raises(error, match=message):
        apply_to_checkpoint(plan or plan_of(), src, work / "pruned", **kwargs)
    assert sorted(path.name for path in work.iterdir()) == before


def edit_json(file: Path, **changes: object) -> None:
    data = json.loads(file.read_text())
    data.update(changes)
    file.write_text(json.dumps(data))


# --- equal to the result in memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "shard_size"),
    often(
        [(family, size) for family in FAMILIES for size in ("5GB", "20KB")],
        kept=lambda case: case[1] == "20KB" or case[0] in ("llama", "gpt2"),
    ),
)
def test_equals_the_result_in_memory(family: str, shard_size: str, tmp_path: Path) -> None:
    dense = tiny_model(family, DEPTH)
    dense.save_pretrained(tmp_path / "dense", max_shard_size=shard_size)
    plan = PruningPlan.from_blocks(dense, REMOVED)
    plan.apply(load(tmp_path / "dense")).save_pretrained(tmp_path / "memory")

    assert plan.apply_to_checkpoint(tmp_path / "dense", tmp_path / "files") == tmp_path / "files"

    memory, files = load(tmp_path / "memory"), load(tmp_path / "files")
    expected, actual = memory.state_dict(), files.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert raw(tmp_path / "files") == raw(tmp_path / "memory") == renamed(raw(tmp_path / "dense"), block_path(family))
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "files" / name).read_text() == (tmp_path / "memory" / name).read_text()
    ids = random_ids()
    assert torch.equal(plain_logits(files, ids), plain_logits(memory, ids))
    assert torch.allclose(plain_logits(files, ids), plain_logits(silenced(dense, REMOVED), ids), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kept_tensors_are_byte_identical(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model("llama").to(dtype).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    apply_to_checkpoint(plan_of(), tmp_path / "dense", tmp_path / "pruned")
    assert raw(tmp_path / "pruned") == renamed(raw(tmp_path / "dense"), "model.layers")
    assert load(tmp_path / "pruned").dtype == dtype


def test_verifies_logits_and_bytes(sharded: Path, tmp_path: Path) -> None:
    apply_to_checkpoint(plan_of(), sharded, tmp_path / "pruned", verify="logits")
    assert raw(tmp_path / "pruned") == renamed(raw(sharded), "model.layers")


def test_files_may_leave_out_the_base_model_prefix(tmp_path: Path) -> None:
    """As the oldest GPT-2 files on the Hub do, with attention masks that no class reads any more."""
    tiny_model("gpt2").save_pretrained(tmp_path / "dense")
    weights = tmp_path / "dense" / "model.safetensors"
    stored = {name.removeprefix("transformer."): tensor for name, tensor in load_file(weights).items()}
    stored.update((f"h.{block}.attn.bias", torch.ones(1, 1, 8, 8).tril()) for block in range(DEPTH))
    save_file(stored, weights, metadata={"format": "pt"})

    apply_to_checkpoint(plan_of("gpt2"), tmp_path / "dense", tmp_path / "pruned", verify="logits")

    assert raw(tmp_path / "pruned") == renamed(raw(tmp_path / "dense"), "h")
    expected = plan_of("gpt2").apply(load(tmp_path / "dense")).state_dict()
    actual = load(tmp_path / "pruned").state_dict()
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("nothing_proven")
def test_an_unproven_architecture_needs_logits(tmp_path: Path) -> None:
    tiny_model("stablelm").save_pretrained(tmp_path / "dense")
    refused(UnsupportedModelError, "verify='logits'", tmp_path / "dense", plan=plan_of("stablelm"))
    apply_to_checkpoint(plan_of("stablelm"), tmp_path / "dense", tmp_path / "pruned", verify="logits")
    assert load(tmp_path / "pruned").config.num_hidden_layers == len(KEPT)


# --- what else is kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [False, True], ids=["stored_once", "stored_twice"])
def test_tied_weights_stay_as_they_are_stored(copies: bool, tmp_path: Path) -> None:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    weights = tmp_path / "dense" / "model.safetensors"
    if copies:
        stored = load_file(weights)
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
        save_file(stored, weights, metadata={"format": "pt"})
    apply_to_checkpoint(plan_of(), tmp_path / "dense", tmp_path / "pruned", verify="logits")
    assert raw(tmp_path / "pruned") == renamed(raw(tmp_path / "dense"), "model.layers")
    model = load(tmp_path / "pruned")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_tensors_that_no_class_reads_are_kept(llama: Path, tmp_path: Path) -> None:
    stored = load_file(llama / "model.safetensors")
    stored["v_head.summary.weight"] = torch.ones(1, 32)
    stored["empty"] = torch.ones(0, 3)
    stored["mask"] = torch.ones(3, dtype=torch.bool)  # three bytes: what follows must stay aligned
    for block in range(DEPTH):
        stored[f"model.layers.{block}.probe.weight"] = torch.full((3,), block, dtype=torch.float64)
    save_file(stored, llama / "model.safetensors", metadata={"format": "pt", "by": "someone"})

    apply_to_checkpoint(plan_of(), llama, tmp_path / "pruned")

    assert raw(tmp_path / "pruned") == renamed(raw(llama), "model.layers")
    with safe_open(tmp_path / "pruned" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "by": "someone"}
        assert file.get_tensor("model.layers.2.probe.weight").tolist() == [4.0, 4.0, 4.0]


def test_companions_are_copied_and_stale_files_are_not(llama: Path, tmp_path: Path) -> None:
    (llama / "block_pruning_config.json").write_text('{"strategy": "of the dense model"}')
    kept = ["tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt", "LICENSE", "modeling_x.py"]
    kept += ["special_tokens_map.json", "additional_chat_templates/tools.jinja"]
    stale = ["pytorch_model.bin", "model.gguf", "tf_model.h5", "consolidated.safetensors", "onnx/model.onnx"]
    stale += ["params.json", "pytorch_model.bin.index.json", "picture.png", "notes.md"]
    for name in [*kept, *stale]:
        (llama / name).parent.mkdir(exist_ok=True)
        (llama / name).write_text("{}")
    (llama / "README.md").write_text("My own dense model.")
    (llama / "pruning_report.json").write_text('{"tokens": 5}')

    apply_to_checkpoint(plan_of(), llama, tmp_path / "pruned")

    pruned = tmp_path / "pruned"
    written = {str(path.relative_to(pruned)) for path in pruned.rglob("*") if path.is_file()}
    own = {"config.json", "generation_config.json", "model.safetensors", "README.md", "pruning_depth.png"}
    assert written == {*kept, *own, "pruning_plan.json", "pruning_report.json", "block_pruning_config.json"}
    assert BlockPruningConfig.from_pretrained(pruned).strategy == "manual"
    assert "My own dense model" not in (pruned / "README.md").read_text()
    assert (pruned / "generation_config.json").read_bytes() == (llama / "generation_config.json").read_bytes()


def test_plan_report_and_provenance_are_written(llama: Path, tmp_path: Path) -> None:
    plan = plan_of().with_provenance(strategy="sleb", requested={"num_blocks": 2}, base_model="someone/llama")
    apply_to_checkpoint(plan, llama, tmp_path / "pruned")
    assert PruningPlan.from_file(tmp_path / "pruned") == plan
    provenance = json.loads((tmp_path / "pruned" / "config.json").read_text())["block_pruning"]
    assert (provenance["removed_blocks"], provenance["base_model"]) == ([3, 1], "someone/llama")
    report = json.loads((tmp_path / "pruned" / "pruning_report.json").read_text())
    before, after = (sum(p.numel() for p in load(folder).parameters()) for folder in (llama, tmp_path / "pruned"))
    assert report["achieved"] == {
        "blocks_before": 5,
        "blocks_after": 3,
        "blocks_removed": pytest.approx(0.4),
        "parameters_before": before,
        "parameters_after": after,
        "parameters_removed": pytest.approx(1 - after / before),
        "size_bytes_before": 4 * before,
        "size_bytes_after": 4 * after,
        "size_bytes_removed": pytest.approx(1 - after / before),
    }
    assert report["verification"] == {"mode": "keys", "passed": True}
    assert (report["strategy"], report["requested"]) == ("sleb", {"num_blocks": 2})


@pytest.mark.parametrize(("block", "follows"), [(4, 3), (1, 1), (2, 1)])
def test_early_exit_follows_the_blocks(block: int, follows: int, llama: Path, tmp_path: Path) -> None:
    edit_json(llama / "generation_config.json", assistant_early_exit=block, max_length=40)
    apply_to_checkpoint(plan_of(removed=(1,)), llama, tmp_path / "pruned")
    settings = json.loads((tmp_path / "pruned" / "generation_config.json").read_text())
    assert (settings["assistant_early_exit"], settings["max_length"]) == (follows, 40)


def test_a_missing_generation_config_is_written(llama: Path, tmp_path: Path) -> None:
    (llama / "generation_config.json").unlink()
    apply_to_checkpoint(plan_of(), llama, tmp_path / "pruned")
    assert json.loads((tmp_path / "pruned" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_a_pruned_checkpoint_can_be_pruned_again(sharded: Path, tmp_path: Path) -> None:
    apply_to_checkpoint(plan_of(), sharded, tmp_path / "once")
    apply_to_checkpoint(PruningPlan.from_removed("llama", 3, [0]), tmp_path / "once", tmp_path / "twice")
    history = json.loads((tmp_path / "twice" / "config.json").read_text())["block_pruning"]
    assert history["removed_blocks"] == [0] and history["previous"]["removed_blocks"] == [3, 1]
    dense, twice = raw(sharded), raw(tmp_path / "twice")
    assert twice["model.layers.1.mlp.up_proj.weight"] == dense["model.layers.4.mlp.up_proj.weight"]


# --- sources that are refused --------------------------------------------------------------------------------------


def test_malformed_files_are_refused(sharded: Path) -> None:
    """`test_tensors.py` knows more ways to be malformed."""
    shard = next(sharded.glob("model-00002*"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    refused(CheckpointError, "is not a whole safetensors file", sharded)
    shard.unlink()
    refused(CheckpointError, "lacks model-00002-of-", sharded)
    (sharded / INDEX).write_text('{"weight_map": {"lm_head.weight": "../secret.safetensors"}}')
    refused(CheckpointError, "only safetensors files in the same folder", sharded)
    (sharded / INDEX).unlink()
    refused(CheckpointError, "Variants are not supported", sharded)


def test_a_pickle_is_never_opened(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    refused(CheckpointError, "Save the model again as safetensors", llama)


def test_an_adapter_is_refused(llama: Path) -> None:
    (llama / "adapter_config.json").write_text("{}")
    refused(CheckpointError, "PEFT adapter", llama)


def test_a_quantised_checkpoint_is_refused(llama: Path) -> None:
    edit_json(llama / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refused(UnsupportedModelError, "quantised", llama)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "wide"}, "is malformed|cannot be loaded"),
        ({"num_attention_heads": 3}, "is malformed|cannot be loaded"),
        ({"layer_types": ["full_attention"]}, "is malformed|cannot be loaded"),
        ({"intermediate_size": 49}, "does not load as LlamaForCausalLM"),
        ({"hidden_act": "unheard of"}, "does not load as LlamaForCausalLM"),
    ],
)
def test_a_configuration_that_does_not_fit(fields: dict[str, object], message: str, llama: Path) -> None:
    edit_json(llama / "config.json", **fields)
    refused(BlockPruningError, message, llama)


def test_a_plan_for_another_model_is_refused(llama: Path) -> None:
    refused(PlanError, "is for the decoder of a 'mistral' model with 5 blocks", llama, plan=plan_of("mistral"))
    refused(PlanError, "with 7 blocks", llama, plan=PruningPlan.from_removed("llama", 7, [1]))


def test_numbered_tensors_beyond_the_blocks_are_refused(llama: Path) -> None:
    stored = load_file(llama / "model.safetensors")
    stored[f"model.layers.{DEPTH}.eh_proj.weight"] = torch.ones(2)
    save_file(stored, llama / "model.safetensors", metadata={"format": "pt"})
    refused(UnsupportedModelError, rf"also hold block 5 \(such as 'model.layers.{DEPTH}.eh_proj.weight'", llama)


def test_an_incomplete_source_is_refused(llama: Path) -> None:
    stored = load_file(llama / "model.safetensors")
    del stored["model.norm.weight"]
    save_file(stored, llama / "model.safetensors", metadata={"format": "pt"})
    refused(CheckpointError, "lacks 1 tensors that LlamaForCausalLM needs, such as .'model.norm.weight'", llama)


def test_blocks_under_an_unknown_name_are_refused(llama: Path) -> None:
    # Without its tensors being found the model would be incomplete, which is said first; this asks the finder.
    stack = find_blocks(load(llama))
    with pytest.raises(UnsupportedModelError, match="nowhere under model.layers or layers"):
        source._block_prefix(["blocks.0.weight"], stack)
    with pytest.raises(UnsupportedModelError, match="under model.layers and layers at once"):
        source._block_prefix(["layers.0.weight", "model.layers.1.weight"], stack)
    with pytest.raises(UnsupportedModelError, match=r"no tensors of \[1, 3, 4\]"):
        source._block_prefix(["layers.0.weight", "layers.2.weight"], stack)


def test_places_that_are_no_checkpoint(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "snapshot_download", lambda *_, **__: pytest.fail("went to the network"))
    refused(CheckpointError, "There is no folder", llama.parent / "absent")
    refused(CheckpointError, "is a file; give the folder", llama / "model.safetensors")
    refused(CheckpointError, "has no folder 'sub'", llama, subfolder="sub")
    (llama / "config.json").unlink()
    refused(ConfigurationError, "cannot be loaded as a model", llama)


@pytest.mark.parametrize("name", ["dtype", "device_map", "gguf_file", "max_shard_size"])
def test_arguments_without_effect_are_refused(name: str, llama: Path) -> None:
    refused(ConfigurationError, f"{name} cannot be used here", llama, **{name: "x"})
    refused(ConfigurationError, "Unknown verify='key'", llama, verify="key")


# --- outputs -------------------------------------------------------------------------------------------------------


def test_an_existing_output_needs_overwrite(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "old").write_text("old")
    refused(OutputError, "is not empty", llama)
    assert (tmp_path / "pruned" / "old").read_text() == "old"
    apply_to_checkpoint(plan_of(), llama, tmp_path / "pruned", overwrite=True)
    assert not (tmp_path / "pruned" / "old").exists()


def test_the_source_is_never_replaced(llama: Path, tmp_path: Path) -> None:
    before = raw(llama)
    for target in (llama, tmp_path, tmp_path / "elsewhere" / ".." / "dense"):
        with pytest.raises(OutputError, match="would replace the source"):
            apply_to_checkpoint(plan_of(), llama, target, overwrite=True)
    assert raw(llama) == before
    apply_to_checkpoint(plan_of(), llama, llama / "pruned")
    assert raw(llama) == before


def test_a_full_disk_is_found_before_work(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(OutputError, "GB free", llama)


# --- the gate ------------------------------------------------------------------------------------------------------


def drop_a_tensor(weights: tensors.StoredWeights, folder: Path) -> tensors.StoredWeights:
    return weights.renamed(lambda name: None if name == "model.layers.1.mlp.up_proj.weight" else name)


def keep_the_old_length(weights: tensors.StoredWeights, folder: Path) -> tensors.StoredWeights:
    edit_json(folder / "config.json", num_hidden_layers=DEPTH)
    return weights


def change_a_field(weights: tensors.StoredWeights, folder: Path) -> tensors.StoredWeights:
    edit_json(folder / "config.json", rms_norm_eps=0.5)
    return weights


def leave_a_removed_block(weights: tensors.StoredWeights, folder: Path) -> tensors.StoredWeights:
    return weights.renamed(lambda name: name.replace("layers.2", "layers.3"))


def swap_blocks(weights: tensors.StoredWeights, folder: Path) -> tensors.StoredWeights:
    swap = {"0": "1", "1": "0"}
    return weights.renamed(lambda name: re.sub(r"(?<=layers\.)[01]", lambda match: swap[match[0]], name))


def swap_norms(weights: tensors.StoredWeights, folder: Path) -> tensors.StoredWeights:
    """Of the same block, and of the same shape."""
    names = {f"model.layers.0.{a}_layernorm.weight": f"model.layers.0.{b}_layernorm.weight" for a, b in PAIRS}
    return weights.renamed(lambda name: names.get(name, name))


PAIRS = [("input", "post_attention"), ("post_attention", "input")]


@pytest.mark.parametrize(
    ("sabotage", "verify", "message"),
    [
        (drop_a_tensor, "keys", "missing keys"),
        (keep_the_old_length, "keys", "missing keys"),
        (change_a_field, "keys", "config field 'rms_norm_eps' is 0.5"),
        (leave_a_removed_block, "keys", "missing keys|unexpected keys"),
        (swap_blocks, "logits", "logits differ"),
        (swap_norms, "logits", "logits differ"),
    ],
)
def test_a_failed_gate_leaves_nothing(
    sabotage, verify: str, message: str, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(weights: tensors.StoredWeights, folder: Path, **kwargs) -> None:
        weight_writing.write_weights(sabotage(weights, folder), folder, **kwargs)

    monkeypatch.setattr(checkpoint, "write_weights", write)
    refused(VerificationError, message, sharded, verify=verify)


def test_the_gate_sees_a_byte_that_no_logit_shows(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Extra tensors have no part in the logits, and few rows of the embedding have."""
    stored = load_file(llama / "model.safetensors")
    save_file({**stored, "extra": torch.ones(3)}, llama / "model.safetensors", metadata={"format": "pt"})

    def write(weights: tensors.StoredWeights, folder: Path, **kwargs) -> None:
        weight_writing.write_weights(weights, folder, **kwargs)
        written = load_file(folder / "model.safetensors")
        save_file({**written, "extra": torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(checkpoint, "write_weights", write)
    refused(VerificationError, "tensor 'extra' is not the dense one's", llama, verify="logits")


def test_an_extra_tensor_must_have_been_in_the_source(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = load_file(llama / "model.safetensors")
    save_file({**stored, "extra": torch.ones(3)}, llama / "model.safetensors", metadata={"format": "pt"})

    def write(weights: tensors.StoredWeights, folder: Path, **kwargs) -> None:
        weight_writing.write_weights(weights.renamed(lambda name: name.replace("extra", "other")), folder, **kwargs)

    monkeypatch.setattr(checkpoint, "write_weights", write)
    refused(VerificationError, "unexpected keys on loading: .'other'", llama)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing(error, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(weights: tensors.StoredWeights, folder: Path, **kwargs) -> None:
        weight_writing.write_weights(weights, folder, **kwargs)
        raise error

    monkeypatch.setattr(checkpoint, "write_weights", write)
    refused(KeyboardInterrupt if error is KeyboardInterrupt else OutputError, "^$|disk filled up", llama)


def test_verify_off_proves_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(weights: tensors.StoredWeights, folder: Path, **kwargs) -> None:
        weight_writing.write_weights(swap_blocks(weights, folder), folder, **kwargs)

    monkeypatch.setattr(checkpoint, "write_weights", write)
    apply_to_checkpoint(plan_of(), llama, tmp_path / "pruned", verify="off")
    report = json.loads((tmp_path / "pruned" / "pruning_report.json").read_text())
    assert report["verification"] == {"mode": "off", "passed": False}


# --- the Hub -------------------------------------------------------------------------------------------------------


def test_a_repository_is_fetched_without_other_weights(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model.fp16.safetensors", "tokenizer.json"):
        (sharded / name).write_text("{}")
    calls = []

    def download(repo_id: str, *, allow_patterns: list[str], **kwargs) -> str:
        calls.append((repo_id, kwargs))
        (tmp_path / "cache").mkdir(exist_ok=True)
        for name in filter_repo_objects([path.name for path in sharded.iterdir()], allow_patterns=allow_patterns):
            shutil.copy(sharded / name, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setattr(source, "snapshot_download", download)
    apply_to_checkpoint(plan_of(), "someone/llama", tmp_path / "pruned", revision="v1", token=None)
    assert calls == [("someone/llama", {"revision": "v1"})] * 2
    assert raw(tmp_path / "pruned") == renamed(raw(tmp_path / "cache"), "model.layers")
    fetched = {path.name for path in (tmp_path / "cache").iterdir()}
    assert "tokenizer.json" in fetched and not fetched & {"consolidated.safetensors", "pytorch_model.bin"}


def test_a_repository_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a readable repository"):
        apply_to_checkpoint(plan_of(), "someone/absent", tmp_path / "pruned", local_files_only=True)
    with pytest.raises(CheckpointError, match="neither a folder nor a readable repository"):
        apply_to_checkpoint(plan_of(), "no/such/folder", tmp_path / "pruned")


def test_a_subfolder(llama: Path, tmp_path: Path) -> None:
    apply_to_checkpoint(plan_of(), tmp_path, tmp_path / "out" / "pruned", subfolder="dense")
    assert raw(tmp_path / "out" / "pruned") == renamed(raw(llama), "model.layers")


# --- memory --------------------------------------------------------------------------------------------------------

_MEASURE = """
import re, sys
from optimum_blockprune.checkpoint import apply_to_checkpoint
from optimum_blockprune.plan import PruningPlan

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

before = peak()
for depth, removed in ((2, [1]), (4, [1, 3])):
    plan = PruningPlan.from_removed("llama", depth, removed)
    apply_to_checkpoint(plan, f"{sys.argv[1]}/{depth}", f"{sys.argv[1]}/pruned-{depth}")
    print(peak() - before)
"""


def write_hollow(folder: Path, depth: int) -> int:
    """Writes a llama of 112 MiB per block whose zeros take no room on the disk; returns its size."""
    wide = {"hidden_size": 1024, "intermediate_size": 8192, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = tiny_config("llama", depth, **wide, dtype="float32")
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    header, end = {}, 0
    for name, tensor in state.items():
        begin, end = end, end + tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_stays_below_the_bound_and_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    bound = 1024 * 8192 * 4 + 300 * 2**20
    assert write_hollow(tmp_path / "2", 2) < write_hollow(tmp_path / "4", 4)
    assert bound < (tmp_path / "4" / "model.safetensors").stat().st_size
    done = subprocess.run([sys.executable, "-c", _MEASURE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split())
    assert large < bound
    # The model is held as names and shapes, the weights as one buffer: a larger checkpoint costs nothing more.
    assert small < 100 * 2**20 and large - small < 20 * 2**20
