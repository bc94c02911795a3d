# SPDX-License-Identifier: Apache-2.0
"""Pruned checkpoints survive the trip through GGUF, and where they do not, the limit is shown.

The file is written by the small exporter beside this test and read back by transformers; llama.cpp reads it too where
llama-cpp-python is installed, and llama.cpp's own converter writes it where `LLAMA_CPP_DIR` names a source tree.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, plain_logits, random_ids, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan


gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
write_gguf = pytest.importorskip("gguf_export").write_gguf

SLIDING, FULL = "sliding_attention", "full_attention"
# What GGUF has no place for is switched off: the windows of Mistral and Qwen3. Gemma's attention scale has no place
# either: transformers assumes 256, llama.cpp the head size, so the head size is 256 as in the published models.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen3": {"use_sliding_window": False},
    "gemma3_text": {"head_dim": 256},
}
# Six blocks of which the second and fifth go; transformers and llama.cpp assume that every sixth block is full.
ALL_SLIDING = [SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING]
NOT_PERIODIC = [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL]
# Eight blocks of which six stay: one whole period.
ONE_PERIOD = [SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL]
# Runs llama.cpp's converter; a test tokenizer has no fingerprint that it knows, and no sentencepiece file.
CONVERTER = """
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
from conversion.base import TextModel
def missing(self, *args, **kwargs):
    raise FileNotFoundError("the test tokenizer has no tokenizer.model")
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
TextModel._set_vocab_sentencepiece = TextModel._set_vocab_llama_hf = missing
sys.argv[0] = sys.path[0] + "/convert_hf_to_gguf.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def pruned(folder: Path, family: str, num_blocks: int = 6, **overrides: Any) -> PreTrainedModel:
    """A pruned tiny model, saved in `folder`."""
    model = tiny_model(family, num_blocks, **{**FAMILIES[family], **overrides})
    PruningPlan.from_blocks(model, removed=[1, 4]).apply(model)
    model.save_pretrained(folder)
    return model


def read_back(file: Path) -> PreTrainedModel:
    """The model that transformers makes of the file alone."""
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model.eval()


def distance(got: Tensor, truth: Tensor) -> float:
    """Largest difference of the logits, relative to the largest logit."""
    return float((got - truth).abs().max() / truth.abs().max())


def layer_types(model: PreTrainedModel) -> list[str]:
    """The kept pattern."""
    return list(model.config.layer_types)


@pytest.mark.parametrize("family", FAMILIES)
def test_reloads_with_equal_logits(family: str, tmp_path: Path) -> None:
    model = pruned(tmp_path, family)
    back = read_back(write_gguf(tmp_path, tmp_path / "model.gguf"))
    assert back.config.num_hidden_layers == 4
    assert distance(plain_logits(back, random_ids()), plain_logits(model, random_ids())) <= 1e-4


def narrowed(folder: Path, family: str) -> PreTrainedModel:
    """A tiny model with half of its KV groups and two thirds of its MLP channels, saved in `folder`."""
    options = {"unit": "width", "families": "both"}
    config = BlockPruningConfig("random", sparsity=0.4, strategy_options=options)
    kinds = {"layer_types": [SLIDING] * 4} if family == "gemma3_text" else {}
    model = BlockPruner(tiny_model(family, 4, **FAMILIES[family], **kinds)).prune(config=config)
    assert (model.config.intermediate_size, model.config.num_key_value_heads) == (32, 1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrower_model_reloads_with_equal_logits(family: str, tmp_path: Path) -> None:
    model = narrowed(tmp_path, family)
    back = read_back(write_gguf(tmp_path, tmp_path / "model.gguf"))
    assert distance(plain_logits(back, random_ids()), plain_logits(model, random_ids())) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_checkpoint_is_in_the_file(family: str, tmp_path: Path) -> None:
    model = pruned(tmp_path, family)
    reader = gguf.GGUFReader(write_gguf(tmp_path, tmp_path / "model.gguf"))
    tied = model.config.tie_word_embeddings
    assert len(reader.tensors) == len(model.state_dict()) - int(tied)
    assert {tensor.name.split(".")[1] for tensor in reader.tensors if tensor.name.startswith("blk.")} == set("0123")


def test_mistral_is_read_back_as_a_llama(tmp_path: Path) -> None:
    pruned(tmp_path, "mistral")
    assert read_back(write_gguf(tmp_path, tmp_path / "model.gguf")).config.model_type == "llama"


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("mistral", {"sliding_window": 4}), ("qwen3", {"use_sliding_window": True})],
    ids=["mistral", "qwen3"],
)
def test_limit_windows_of_mistral_and_qwen3_are_lost(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    model = pruned(tmp_path, family, **overrides)
    back = read_back(write_gguf(tmp_path, tmp_path / "model.gguf"))
    short, long = random_ids(length=4), random_ids(length=12)
    assert distance(plain_logits(back, short), plain_logits(model, short)) <= 1e-4
    assert distance(plain_logits(back, long), plain_logits(model, long)) > 1e-2


@pytest.mark.parametrize(
    ("kinds", "kept"),
    [(ALL_SLIDING, [SLIDING] * 4), (NOT_PERIODIC, [SLIDING, FULL, SLIDING, FULL])],
    ids=["all_sliding", "not_periodic"],
)
def test_gemma_pattern_is_written(kinds: list[str], kept: list[str], tmp_path: Path) -> None:
    model = pruned(tmp_path, "gemma3_text", layer_types=kinds)
    reader = gguf.GGUFReader(write_gguf(tmp_path, tmp_path / "model.gguf"))
    field = reader.fields["gemma3.attention.sliding_window_pattern"]
    assert layer_types(model) == kept
    assert field.contents() == [kind == SLIDING for kind in kept]


@pytest.mark.parametrize(
    "kinds", [ALL_SLIDING, pytest.param(ONE_PERIOD, id="one_period")], ids=lambda kinds: f"{len(kinds)}_blocks"
)
def test_gemma_patterns_that_transformers_reads(kinds: list[str], tmp_path: Path) -> None:
    model = pruned(tmp_path, "gemma3_text", len(kinds), layer_types=kinds)
    back = read_back(write_gguf(tmp_path, tmp_path / "model.gguf"))
    assert layer_types(back) == layer_types(model)
    assert distance(plain_logits(back, random_ids()), plain_logits(model, random_ids())) <= 1e-4


def test_limit_transformers_ignores_a_pattern_without_period(tmp_path: Path) -> None:
    model = pruned(tmp_path, "gemma3_text", layer_types=NOT_PERIODIC)
    back = read_back(write_gguf(tmp_path, tmp_path / "model.gguf"))
    assert layer_types(back) == [SLIDING] * 4
    assert distance(plain_logits(back, random_ids()), plain_logits(model, random_ids())) > 1e-2
    # The weights are all there: with the kept pattern handed over beside the file, the logits are equal.
    back = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, layer_types=layer_types(model)
    ).eval()
    assert distance(plain_logits(back, random_ids()), plain_logits(model, random_ids())) <= 1e-4


def llama_cpp_logits(file: Path, ids: Tensor) -> Tensor:
    """Logits of every position by llama.cpp, with a cache in float32; skips where llama-cpp-python is missing."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    rows = []
    for row in ids.tolist():
        with_float32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        model = llama_cpp.Llama(str(file), n_ctx=64, n_threads=1, logits_all=True, verbose=False, **with_float32)
        model.eval(row)
        rows.append(torch.tensor(model.scores[: len(row)]))
        model.close()
    return torch.stack(rows)


def tolerance(family: str) -> float:
    """llama.cpp looks GELU up in a table in half precision, so Gemma agrees to three digits only."""
    return 2e-3 if family == "gemma3_text" else 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_equal_logits(family: str, tmp_path: Path) -> None:
    model = pruned(tmp_path, family)
    got = llama_cpp_logits(write_gguf(tmp_path, tmp_path / "model.gguf"), random_ids())
    assert distance(got, plain_logits(model, random_ids())) <= tolerance(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_equal_logits_of_a_narrower_model(family: str, tmp_path: Path) -> None:
    model = narrowed(tmp_path, family)
    got = llama_cpp_logits(write_gguf(tmp_path, tmp_path / "model.gguf"), random_ids())
    assert distance(got, plain_logits(model, random_ids())) <= tolerance(family)


def test_llama_cpp_follows_a_written_gemma_pattern_without_period(tmp_path: Path) -> None:
    model = pruned(tmp_path, "gemma3_text", layer_types=NOT_PERIODIC)
    got = llama_cpp_logits(write_gguf(tmp_path, tmp_path / "model.gguf"), random_ids())
    assert distance(got, plain_logits(model, random_ids())) <= tolerance("gemma3_text")


def converted(folder: Path) -> Path:
    """The file that llama.cpp's own converter writes; skips where there is no source tree of llama.cpp."""
    tree = os.environ.get("LLAMA_CPP_DIR")
    if not tree or not (Path(tree) / "convert_hf_to_gguf.py").is_file():
        pytest.skip("LLAMA_CPP_DIR names no llama.cpp source tree with convert_hf_to_gguf.py and conversion/")
    save_tokenizer(folder)
    target = folder / "converted.gguf"
    command = [sys.executable, "-c", CONVERTER, tree, str(folder), "--outtype", "f32", "--outfile", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return target


def save_tokenizer(folder: Path) -> None:
    """A byte-pair tokenizer with as many tokens as the embedding table; the converter insists on one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    first: Sequence[str] = ("<unk>", "<s>", "</s>", "a", "b", "ab")
    words = [*first, *(f"t{token}" for token in range(len(first), VOCABULARY))]
    pairs = models.BPE(vocab={word: token for token, word in enumerate(words)}, merges=[("a", "b")], unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(pairs), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_file_of_the_converter_reloads_with_equal_logits(family: str, tmp_path: Path) -> None:
    model = pruned(tmp_path, family)
    back = read_back(converted(tmp_path))
    assert distance(plain_logits(back, random_ids()), plain_logits(model, random_ids())) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_converter_reads_a_narrower_model(family: str, tmp_path: Path) -> None:
    model = narrowed(tmp_path, family)
    file = converted(tmp_path)
    assert distance(plain_logits(read_back(file), random_ids()), plain_logits(model, random_ids())) <= 1e-4
    assert distance(llama_cpp_logits(file, random_ids()), plain_logits(model, random_ids())) <= tolerance(family)


def test_limit_the_converter_does_not_write_the_gemma_pattern(tmp_path: Path) -> None:
    model = pruned(tmp_path, "gemma3_text", layer_types=NOT_PERIODIC)
    file = converted(tmp_path)
    assert "gemma3.attention.sliding_window_pattern" not in gguf.GGUFReader(file).fields
    assert distance(llama_cpp_logits(file, random_ids()), plain_logits(model, random_ids())) > 1e-2
