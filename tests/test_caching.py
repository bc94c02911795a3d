# SPDX-License-Identifier: Apache-2.0
"""Generation with a cache is held to a pass without one, by logits, for every kind of model that generates."""

from __future__ import annotations

import math

import pytest
import torch
from families import block_list, tiny_model
from toys import assert_unchanged, snapshot
from transformers import PreTrainedModel
from zoo import multimodal, other_stacks

from optimum_blockprune.architectures import layout_for
from optimum_blockprune.caching import cache_error, relative_error
from optimum_blockprune.inputs import probe_batch


def error_of(model: PreTrainedModel, stack: str = "decoder") -> float:
    return cache_error(model, probe_batch(model, layout_for(model, stack)), stack)


def test_the_worst_position_counts_or_the_median_one() -> None:
    truth = torch.tensor([[[4.0, 0.0], [2.0, 0.0], [1.0, 0.0]]])
    actual = truth + torch.tensor([[[0.0, 0.0], [0.0, -2.0], [0.4, 0.0]]])
    assert relative_error(actual, truth) == pytest.approx(2.0 / 4.0)
    assert relative_error(actual, truth, typical=True) == pytest.approx(0.4 / 4.0)
    assert relative_error(truth, truth) == 0.0
    assert relative_error(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)) == 0.0


def test_what_cannot_be_compared_is_infinitely_far() -> None:
    truth = torch.ones(1, 3, 2)
    assert relative_error(truth[:, :2], truth) == math.inf
    for broken in (math.nan, math.inf):
        actual = truth.clone()
        actual[0, 1, 0] = broken
        assert relative_error(actual, truth) == math.inf


@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_encoder_decoders_generate_alike(name: str, stack: str) -> None:
    assert error_of(other_stacks.tiny_model(name), stack) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2"])
def test_decoders_generate_alike(family: str) -> None:
    assert error_of(tiny_model(family)) < 1e-5


def test_a_text_decoder_inside_another_model_generates_alike() -> None:
    assert error_of(multimodal.tiny_model("llava")) < 1e-5


def test_two_blocks_that_share_a_slot_are_seen() -> None:
    model = tiny_model("llama")
    block_list(model)[3].self_attn.layer_idx = 2
    assert error_of(model) > 1e-2
    seq2seq = other_stacks.tiny_model("bart")
    seq2seq.model.decoder.layers[3].self_attn.layer_idx = 2
    assert error_of(seq2seq) > 1e-2


def test_the_models_own_way_to_generate_has_no_say_and_stays() -> None:
    model = tiny_model("llama")
    own = model.generation_config
    own.num_beams, own.do_sample, own.repetition_penalty = 3, True, 5.0
    own.eos_token_id, own.max_new_tokens = list(range(96)), 1
    model.train()
    before = snapshot(model)
    assert error_of(model) < 1e-5
    assert model.generation_config is own
    assert_unchanged(model, before)


def test_the_models_own_way_to_generate_comes_back_after_a_failure() -> None:
    model = tiny_model("llama")
    own = model.generation_config
    batch = probe_batch(model, layout_for(model))

    def fail(*_args: object) -> None:
        raise KeyboardInterrupt

    handle = block_list(model)[2].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        cache_error(model, batch, "decoder")
    handle.remove()
    assert model.generation_config is own
