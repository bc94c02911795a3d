# SPDX-License-Identifier: Apache-2.0
"""A batch becomes the arguments of each kind of model, and probes are made up without data."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from configs import layout_of
from families import plain_logits, random_ids, tiny_model
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from zoo import multimodal, other_stacks

from optimum_blockprune.architectures import Layout, layout_for
from optimum_blockprune.batches import Batch
from optimum_blockprune.errors import UnsupportedModelError
from optimum_blockprune.inputs import (
    GENERATED,
    PROBE_LENGTH,
    PROBE_WINDOWS,
    Caller,
    decoder_start,
    ordinary_tokens,
    probe_batch,
    vocabulary_of,
)


CPU = torch.device("cpu")


def recorded(module: nn.Module) -> list[dict[str, Any]]:
    """The keyword arguments of every call."""
    calls: list[dict[str, Any]] = []
    module.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


def call(model: PreTrainedModel, batch: Batch, stack: str | None = None) -> Tensor:
    with torch.no_grad():
        return Caller(model, layout_for(model, stack))(batch, CPU)


# Calls


def test_a_decoder_is_called_without_a_mask_where_nothing_is_padded(ids: Tensor) -> None:
    model = tiny_model("llama")
    calls = recorded(model)
    assert torch.equal(call(model, Batch(ids)), plain_logits(model, ids))
    assert set(calls[0]) == {"input_ids", "use_cache", "return_dict"}
    assert calls[0]["use_cache"] is False


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_count_from_the_first_real_token(side: str, ids: Tensor) -> None:
    model = tiny_model("gpt2")
    mask = torch.ones_like(ids).bool()
    mask[1, slice(3) if side == "left" else slice(9, None)] = False
    calls = recorded(model)
    logits = call(model, Batch(ids, mask))
    assert torch.equal(calls[0]["attention_mask"], mask.long())
    assert ("position_ids" in calls[0]) is (side == "left")
    torch.testing.assert_close(logits[0], plain_logits(model, ids[:1])[0], atol=1e-5, rtol=1e-5)
    real = plain_logits(model, ids[1:, mask[1]])[0]
    torch.testing.assert_close(logits[1, mask[1]], real, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "bert#bare", "distilbert", "fnet"])
def test_an_encoder_gets_only_what_it_knows(name: str) -> None:
    """Some know no cache, some not even a mask; a bare one gives its hidden states."""
    model = other_stacks.tiny_model(name)
    inputs = other_stacks.inputs(name, model)
    assert torch.equal(call(model, Batch(inputs["input_ids"])), other_stacks.plain_logits(model, inputs))


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_an_encoder_decoder_gets_both_sides(name: str, stack: str) -> None:
    model = other_stacks.tiny_model(name)
    inputs = other_stacks.inputs(name, model)
    batch = Batch(inputs.pop("decoder_input_ids"), extra=inputs)
    truth = other_stacks.plain_logits(model, {**inputs, "decoder_input_ids": batch.input_ids})
    torch.testing.assert_close(call(model, batch, stack), truth, atol=1e-6, rtol=1e-6)


def test_the_encoder_runs_once_per_batch_while_the_decoder_is_looked_at() -> None:
    model = other_stacks.tiny_model("bart")
    caller = Caller(model, layout_for(model, "decoder"))
    calls = recorded(model.get_encoder())
    first, second = (Batch(random_ids(seed=seed), extra={"input_ids": random_ids(seed=9)}) for seed in (1, 2))
    with torch.no_grad():
        logits = [caller(batch, CPU) for batch in (first, first, second, first)]
    assert len(calls) == 3
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[3])
    caller.forget()
    with torch.no_grad():
        caller(first, CPU)
        Caller(model, layout_for(model, "encoder"))(first, CPU)
        Caller(model, layout_for(model, "encoder"))(first, CPU)
    assert len(calls) == 6


def test_further_inputs_are_handed_on() -> None:
    model = multimodal.tiny_model("llava")
    inputs = multimodal.image_inputs("llava", model)
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    assert "pixel_values" in rest
    truth = multimodal.plain_logits(model, inputs)
    assert torch.equal(call(model, Batch(inputs["input_ids"], extra=rest)), truth)


# Probes


@pytest.mark.parametrize("name", ["bert", "bart", "t5", "whisper", "speecht5"])
def test_a_probe_is_the_same_at_every_call_and_runs(name: str) -> None:
    model = other_stacks.tiny_model(name)
    for stack in other_stacks.stacks(name):
        layout = layout_for(model, stack)
        batch, again = (probe_batch(model, layout) for _ in range(2))
        assert torch.equal(batch.input_ids, again.input_ids)
        assert [torch.equal(batch.extra[key], again.extra[key]) for key in batch.extra] == [True] * len(batch.extra)
        assert batch.input_ids.shape == (PROBE_WINDOWS, PROBE_LENGTH)
        assert batch.attention_mask is None
        assert torch.isfinite(call(model, batch, stack)).all()
        if len(layout.kind.stacks) > 1:
            assert batch.input_ids[:, 0].tolist() == [decoder_start(model)] * PROBE_WINDOWS
            assert set(batch.extra) == {model.main_input_name}
        else:
            assert not batch.extra


def test_a_probe_fits_the_model() -> None:
    model = tiny_model("llama", max_position_embeddings=PROBE_LENGTH + 2)
    batch = probe_batch(model, layout_for(model))
    # Room to generate behind it.
    assert batch.input_ids.shape == (2, PROBE_LENGTH + 2 - GENERATED)
    assert probe_batch(model, layout_for(model), windows=1, length=2).input_ids.shape == (1, 2)
    assert len(batch.input_ids.unique()) > 2


def test_a_probe_has_no_special_tokens() -> None:
    layout = layout_of("llava", image_token_index=40, text_config={"vocab_size": 50, "eos_token_id": [3, 4]})
    tokens = ordinary_tokens(layout).tolist()
    assert vocabulary_of(layout) == 50
    assert not {40, 3, 4, layout.config.bos_token_id} & set(tokens)
    assert set(range(5, 40)) < set(tokens) and max(tokens) == 49
    model = multimodal.tiny_model("llava")
    placeholder = layout_for(model).root.image_token_index
    long = probe_batch(model, layout_for(model), windows=30, length=100)
    assert placeholder not in long.input_ids


def test_the_vocabulary_of_the_stack_comes_before_that_of_the_model() -> None:
    assert vocabulary_of(layout_of("llama")) == 32000
    assert vocabulary_of(layout_of("gemma3", text_config={"vocab_size": 77})) == 77
    assert vocabulary_of(layout_of("t5")) == 32128


def test_an_input_that_cannot_be_made_up_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = other_stacks.tiny_model("bart")
    monkeypatch.setattr(type(model), "main_input_name", "pixel_values")
    layout: Layout = layout_for(model)
    with pytest.raises(
        UnsupportedModelError, match="'bart' .decoder. reads 'pixel_values', for which no probe can be"
    ):
        probe_batch(model, layout)


def test_where_an_output_begins() -> None:
    model = other_stacks.tiny_model("bart")
    model.generation_config.decoder_start_token_id = 11
    model.config.decoder_start_token_id = 12
    assert decoder_start(model) == 11
    model.generation_config.decoder_start_token_id = model.generation_config.bos_token_id = None
    assert decoder_start(model) == 12
    model.config.decoder_start_token_id = None
    model.config.bos_token_id = 13
    assert decoder_start(model) == 13
    # Nothing says so: a model without any of these fields.
    assert decoder_start(SimpleNamespace(config=PretrainedConfig())) == 0
