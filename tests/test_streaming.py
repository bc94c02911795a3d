# SPDX-License-Identifier: Apache-2.0
"""`stream=True`: the model that `from_pretrained` gives, with its blocks in their files, under memory limits."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, block_list, plain_logits, tiny_model
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import config, files_below, toy_folder, word_tokenizer
from transformers import PreTrainedModel
from zoo import multimodal, other_stacks

from optimum_blockprune import BlockPruner, streaming
from optimum_blockprune.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from optimum_blockprune.file_weights import FileWeights, read_tensor
from optimum_blockprune.loading import load_model
from optimum_blockprune.offload import held, is_offloaded
from optimum_blockprune.streaming import source_of
from optimum_blockprune.tensors import read_weights


RESIDENT = Path(__file__).parent / "resident_memory.py"


@pytest.fixture
def by_transformers(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The checkpoints that were left to transformers, since it changes their tensors."""
    folders: list[Path] = []
    load = streaming._offloaded

    def noted(folder: Path, *arguments: Any) -> Any:
        folders.append(folder)
        return load(folder, *arguments)

    monkeypatch.setattr(streaming, "_offloaded", noted)
    return folders


def assert_same_model(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Everything but where the weights lie."""
    buffers = dict(plain.named_buffers())
    assert dict(model.named_buffers()).keys() == buffers.keys()
    assert [name for name, buffer in model.named_buffers() if not torch.equal(buffer, buffers[name])] == []
    assert {name: p.dtype for name, p in model.named_parameters()} == {n: p.dtype for n, p in plain.named_parameters()}
    assert model.config.to_dict() == plain.config.to_dict()
    assert model.generation_config.to_dict() == plain.generation_config.to_dict()
    assert not model.training and model.name_or_path == plain.name_or_path


# What is loaded


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path, ids: Tensor, by_transformers: list[Path]) -> None:
    folder = toy_folder(tmp_path, family)
    plain, model = load_model(folder), load_model(folder, stream=True)
    assert_same_model(model, plain)
    assert torch.equal(plain_logits(model, ids), plain_logits(plain, ids))
    inside = {id(parameter) for parameter in block_list(model).parameters()}
    assert all(parameter.is_meta == (id(parameter) in inside) for parameter in model.parameters())
    for block, truth in zip(block_list(model), block_list(plain), strict=True):
        with held(block):
            assert all(torch.equal(*pair) for pair in zip(block.parameters(), truth.parameters(), strict=True))
    # Nothing is copied where transformers keeps tensors as they are.
    assert by_transformers == [] or family in ("mixtral", "gpt_neox")
    assert source_of(model).folder == folder and source_of(model).exact and source_of(plain) is None


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64, "auto", None])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: Any, stored: torch.dtype, tmp_path: Path, ids: Tensor) -> None:
    tiny_model("llama").to(stored).save_pretrained(tmp_path)
    arguments = {} if dtype is None else {"dtype": dtype}
    plain, model = load_model(tmp_path, **arguments), load_model(tmp_path, stream=True, **arguments)
    assert model.dtype == plain.dtype
    assert_same_model(model, plain)
    assert torch.equal(plain_logits(model, ids), plain_logits(plain, ids))
    assert source_of(model).exact == (plain.dtype == stored)


@pytest.mark.parametrize("name", ["bert", "t5", "whisper"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_kinds(name: str, dtype: str, tmp_path: Path) -> None:
    other_stacks.tiny_model(name).save_pretrained(tmp_path)
    plain, model = load_model(tmp_path, dtype=dtype), load_model(tmp_path, stream=True, dtype=dtype)
    for stack in other_stacks.stacks(name):
        blocks = other_stacks.block_list(name, model, stack)
        assert all(parameter.is_meta for parameter in blocks.parameters())
    inputs = {
        key: value.to(plain.dtype) if value.is_floating_point() else value
        for key, value in other_stacks.inputs(name, plain).items()
    }
    assert torch.equal(other_stacks.plain_logits(model, inputs), other_stacks.plain_logits(plain, inputs))


@pytest.mark.parametrize("name", ["llava", "paligemma"])
def test_models_with_images(name: str, tmp_path: Path) -> None:
    multimodal.tiny_model(name).save_pretrained(tmp_path)
    plain, model = load_model(tmp_path), load_model(tmp_path, stream=True)
    inputs = multimodal.image_inputs(name, plain)
    assert all(parameter.is_meta for parameter in multimodal.block_list(name, model).parameters())
    assert torch.equal(multimodal.plain_logits(model, inputs), multimodal.plain_logits(plain, inputs))


def test_shards_and_a_bare_base_model(tmp_path: Path, ids: Tensor) -> None:
    dense = tiny_model("llama", tie_word_embeddings=True)
    dense.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    dense.model.save_pretrained(tmp_path / "base")
    settings = json.loads((tmp_path / "shards/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(settings))
    for folder in ("shards", "base"):
        model = load_model(tmp_path / folder, stream=True)
        assert torch.equal(plain_logits(model, ids), plain_logits(dense, ids))
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_repository(hub: HubServer, tmp_path: Path, ids: Tensor) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    word_tokenizer().save_pretrained(tmp_path / "dense")
    hub.hub.put("me/dense", {**files_below(tmp_path / "dense"), "pytorch_model.bin": b"not wanted"})
    revision = hub.hub.repos["me/dense"].at("main").oid
    pruner = BlockPruner.from_pretrained(
        "me/dense", config("shortgpt"), stream=True, revision=revision, token="hf_write"
    )
    assert is_offloaded(block_list(pruner.model))
    assert pruner.tokenizer is not None
    assert torch.equal(plain_logits(pruner.model, ids), plain_logits(tiny_model("llama"), ids))
    assert pruner.make_plan().num_blocks == 5
    assert not hub.requests(r"pytorch_model\.bin")


def test_attention_and_one_device(tmp_path: Path) -> None:
    folder = toy_folder(tmp_path)
    for devices in (None, "cpu", {"": "cpu"}, torch.device("cpu")):
        model = load_model(folder, stream=True, attn_implementation="eager", device_map=devices)
        assert model.config._attn_implementation == "eager"
        assert set(model.hf_device_map.values()) == {"cpu", "disk"}


# What transformers changes while loading


def test_temporary_copies_go_with_the_model(
    tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch, by_transformers: list[Path]
) -> None:
    """Mixtral's experts are joined since transformers 5; a misnamed tensor is not ours to understand before."""
    folder = toy_folder(tmp_path / "dense", "mixtral")
    monkeypatch.setattr(streaming, "find_homes", lambda *_: None)
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setattr(streaming.tempfile, "tempdir", str(place))
    model = load_model(folder, stream=True)
    assert by_transformers == [folder]
    assert len(list(place.iterdir())) == 1
    assert torch.equal(plain_logits(model, ids), plain_logits(load_model(folder), ids))
    del model
    gc.collect()
    assert list(place.iterdir()) == []


def test_a_folder_for_copies_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: Tensor) -> None:
    folder = toy_folder(tmp_path / "dense")
    monkeypatch.setattr(streaming, "find_homes", lambda *_: None)
    (tmp_path / "mine").mkdir()
    model = load_model(folder, stream=True, offload_folder=tmp_path / "mine")
    assert torch.equal(plain_logits(model, ids), plain_logits(load_model(folder), ids))
    del model
    gc.collect()
    assert (tmp_path / "mine").is_dir()


# What is refused


def test_other_formats_are_refused(tmp_path: Path) -> None:
    folder = toy_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"stream=True reads model.safetensors .*pytorch_model.bin.*save it"):
        load_model(folder, stream=True)
    with pytest.raises(UnsupportedModelError, match="model.gguf is none"):
        streaming._local(str(folder), {"gguf_file": "model.gguf"})
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="PEFT adapter"):
        load_model(folder, stream=True)


def test_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    folder = toy_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"lacks 1 tensors.*layers.3.mlp.up_proj"):
        load_model(folder, stream=True)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_model(folder, stream=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device_map": "auto"}, "device_map='auto' does not go with stream=True"),
        ({"device_map": {"model": "cpu", "lm_head": "cpu"}}, "does not go with stream=True"),
        ({"max_memory": {0: "1GB"}}, "max_memory cannot be used with stream=True"),
        ({"stream": "yes"}, "stream='yes' must be True or False"),
        ({"dtype": "float99"}, "Unknown dtype"),
    ],
)
def test_arguments_that_do_not_go_with_it(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_model(toy_folder(tmp_path), **{"stream": True, **arguments})


def test_widths_of_their_own_are_refused(tmp_path: Path) -> None:
    pruner = BlockPruner.from_pretrained(toy_folder(tmp_path / "dense"), config("magnitude", layout="per_layer"))
    pruner.prune(save_dir=tmp_path / "narrow")
    with pytest.raises(UnsupportedModelError, match="per_layer.*does not read"):
        load_model(tmp_path / "narrow", stream=True)


def test_a_file_that_changes_is_noticed(tmp_path: Path, ids: Tensor) -> None:
    model = load_model(toy_folder(tmp_path), stream=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match="it changed while being read"):
        plain_logits(model, ids)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read while the model streams"):
        plain_logits(model, ids)


# How files are read


def test_every_dtype_is_read_as_it_is(tmp_path: Path) -> None:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8)
    tensors = {str(kind): torch.arange(-40, 40).to(kind).view(8, 10) for kind in kinds}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "bool": torch.tensor([True, False])}
    tensors["large"] = torch.randn(300, 300)
    save_file(tensors, tmp_path / "model.safetensors")
    stored = read_weights(tmp_path).tensors
    for name, tensor in tensors.items():
        found = read_tensor(stored[name])
        assert found.dtype == tensor.dtype and found.shape == tensor.shape and torch.equal(found, tensor)
    weights = FileWeights({"large": (stored["large"], torch.bfloat16), "scalar": (stored["scalar"], torch.float64)})
    assert list(weights) == ["large", "scalar"] and len(weights) == 2
    assert torch.equal(weights["large"], tensors["large"].bfloat16())
    assert weights["scalar"].item() == 3.5


# Memory, seen from outside


def planned(folder: Path, *, stream: bool) -> dict[str, Any]:
    """What plans of a process of their own remove, and the resident memory that it took beyond what an idle one has.

    Address space would say less: what a model without weights once had stays reserved now and then, never touched.
    """
    command = [sys.executable, str(RESIDENT), str(folder), str(int(stream))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_plans_in_a_third_of_the_memory(tmp_path: Path) -> None:
    dense = tiny_model(
        "llama", 40, hidden_size=512, intermediate_size=1100, num_attention_heads=8, num_key_value_heads=4
    )
    size = sum(parameter.numel() * parameter.element_size() for parameter in dense.parameters())
    dense.save_pretrained(tmp_path, max_shard_size="20MB")
    word_tokenizer().save_pretrained(tmp_path)
    del dense
    assert size > 300 * 2**20
    plain, streamed = (planned(tmp_path, stream=stream) for stream in (False, True))
    assert plain["removed"] == streamed["removed"]
    # Measured: 398 to 403 and 36 to 52 MiB, of 378 of weights.
    assert streamed["bytes"] < 110 * 2**20 < size <= plain["bytes"]
