# SPDX-License-Identifier: Apache-2.0
"""Text becomes what a kind of model is measured on: windows, masked tokens, or halves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import random_ids, tiny_model
from transformers import PreTrainedModel
from zoo import multimodal, other_stacks

from optimum_blockprune.architectures import layout_for
from optimum_blockprune.batches import CalibrationWindows
from optimum_blockprune.errors import CalibrationError
from optimum_blockprune.inputs import decoder_start
from optimum_blockprune.tasks import fitted, row_inputs


MASK = 95
TOKENIZER = SimpleNamespace(mask_token_id=MASK)


def text(length: int = 20, mask: torch.Tensor | None = None) -> CalibrationWindows:
    return CalibrationWindows.from_tokens(random_ids(4, length) % 90, mask, source="text", recipe="windows")


def padded() -> CalibrationWindows:
    mask = torch.ones(4, 20, dtype=torch.bool)
    mask[1, 4:] = mask[2, :19] = False
    return text(mask=mask)


def fit(model: PreTrainedModel, windows: CalibrationWindows, stack: str | None = None, **more: Any) -> Any:
    settings = {"tokenizer": TOKENIZER, "masked": True, "seed": 0, **more}
    return fitted(windows, model, layout_for(model, stack), settings.pop("tokenizer"), **settings)


# A decoder


@pytest.mark.parametrize("model", [tiny_model("llama", 1), multimodal.tiny_model("llava", 2)], ids=["llama", "llava"])
def test_a_decoder_reads_the_windows_as_they_are(model: PreTrainedModel) -> None:
    windows = text()
    assert fit(model, windows) is windows


# An encoder


def test_an_encoder_predicts_masked_tokens() -> None:
    model = other_stacks.tiny_model("bert")
    windows = text()
    made = fit(model, windows)
    chosen = made.labels != -100
    # 15 % of each window, all of them replaced, and nothing else.
    assert chosen.sum(1).tolist() == [3] * 4
    assert torch.equal(made.labels[chosen], windows.input_ids[chosen])
    assert bool((made.input_ids[chosen] == MASK).all())
    assert torch.equal(made.input_ids[~chosen], windows.input_ids[~chosen])
    assert (made.source, made.recipe, made.num_tokens) == ("text", "windows", windows.num_tokens)
    assert len({tuple(row) for row in chosen.tolist()}) > 1


def test_the_seed_chooses_the_masked_tokens() -> None:
    model = other_stacks.tiny_model("bert")
    first, again, other = (fit(model, text(), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.labels, again.labels) and first.fingerprint == again.fingerprint
    assert not torch.equal(first.labels, other.labels) and first.fingerprint != other.fingerprint


def test_padding_is_never_masked() -> None:
    windows = padded()
    made = fit(other_stacks.tiny_model("bert"), windows)
    chosen = made.labels != -100
    assert not bool((chosen & ~windows.attention_mask).any())
    # A window with fewer real tokens than are to be masked loses all it has.
    assert chosen.sum(1).tolist() == [3, 3, 1, 3]


def test_hidden_states_need_no_masks() -> None:
    windows = text()
    assert fit(other_stacks.tiny_model("bert"), windows, masked=False, tokenizer=None) is windows


@pytest.mark.parametrize(
    ("name", "tokenizer", "message"),
    [
        ("bert", None, "'bert' has no mask token: give its tokenizer"),
        ("bert", SimpleNamespace(mask_token_id=None), "'bert' has no mask token"),
        ("bert#bare", TOKENIZER, "'bert' has no masked-LM head.*mi_prun, shortgpt, angular"),
    ],
)
def test_an_encoder_without_a_loss_is_refused(name: str, tokenizer: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        fit(other_stacks.tiny_model(name), text(), tokenizer=tokenizer)


# An encoder-decoder


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("length", [20, 21])
def test_an_encoder_reads_the_first_half_and_a_decoder_says_the_second(stack: str, length: int) -> None:
    model = other_stacks.tiny_model("t5")
    windows = text(length)
    made = fit(model, windows, stack)
    batch = next(made.batches(4))
    assert torch.equal(batch.extra["input_ids"], windows.input_ids[:, :10])
    assert torch.equal(batch.input_ids[:, 1:], windows.input_ids[:, 10:])
    assert batch.input_ids[:, 0].tolist() == [decoder_start(model)] * 4
    assert batch.attention_mask is None and set(batch.extra) == {"input_ids"} and batch.labels is None
    assert (made.source, made.recipe) == ("text", "windows")


def test_both_halves_keep_their_padding() -> None:
    windows = padded()
    batch = next(fit(other_stacks.tiny_model("bart"), windows).batches(4))
    assert torch.equal(batch.extra["attention_mask"], windows.attention_mask[:, :10].long())
    assert torch.equal(batch.attention_mask[:, 1:], windows.attention_mask[:, 10:])
    assert bool(batch.attention_mask[:, 0].all())


def test_a_window_has_to_have_two_halves() -> None:
    with pytest.raises(CalibrationError, match="seqlen of at least 4"):
        fit(other_stacks.tiny_model("bart"), text(3))
    assert fit(other_stacks.tiny_model("bart"), text(4)).seqlen == 3


def test_a_model_that_reads_no_text_says_what_it_reads() -> None:
    with pytest.raises(CalibrationError) as caught:
        fit(other_stacks.tiny_model("whisper"), text())
    assert "'whisper' (decoder) reads 'input_features', not text" in str(caught.value)
    assert "dataset=[{'input_features': ..., 'labels': ...}, ...], one dict per example" in str(caught.value)


# Rows of the model's own


def test_what_a_row_brings_stays_as_it_is() -> None:
    model = other_stacks.tiny_model("bart")
    extra = {"input_ids": tuple(random_ids(2, 5).split(1))}
    rows = CalibrationWindows.from_tokens(random_ids(2, 6), source="rows", extra=extra)
    assert fit(model, rows) is rows
    labelled = CalibrationWindows.from_tokens(random_ids(2, 6), source="rows", labels=random_ids(2, 6))
    assert fit(other_stacks.tiny_model("bert"), labelled) is labelled


def test_what_rows_may_bring() -> None:
    text_model = tiny_model("llama", 1)
    found = row_inputs(text_model, layout_for(text_model))
    assert (found.names, found.two_stacks) == (frozenset(), False)
    images = multimodal.tiny_model("llava")
    assert "pixel_values" in row_inputs(images, layout_for(images)).names
    assert "input_ids" not in row_inputs(images, layout_for(images)).names
    bart = other_stacks.tiny_model("bart")
    found = row_inputs(bart, layout_for(bart))
    assert found.two_stacks and found.start == decoder_start(bart)
    assert found.names == {"input_ids", "attention_mask"}
    whisper = other_stacks.tiny_model("whisper")
    assert "input_features" in row_inputs(whisper, layout_for(whisper)).names
