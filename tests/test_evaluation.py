# SPDX-License-Identifier: Apache-2.0
"""Perplexity, KL, speed and size against computations that are written another way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import plain_logits, random_ids, tiny_model
from torch import Tensor
from torch.nn import functional as F
from toys import assert_unchanged, snapshot
from transformers import GenerationMixin, PreTrainedModel
from zoo import other_stacks

from optimum_blockprune import evaluation as evaluation_module
from optimum_blockprune.batches import CalibrationWindows
from optimum_blockprune.errors import ConfigurationError, NonFiniteError, UnsupportedModelError
from optimum_blockprune.evaluation import EvaluationSpec, evaluate_model, size_of, speed_of
from optimum_blockprune.generation import check_generation


NO_SPEED = EvaluationSpec(speed=False, continuations=0)


def measure(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, baseline=None, **spec) -> dict:
    windows = CalibrationWindows.from_tokens(ids, mask, source="random")
    return evaluate_model(model, windows, EvaluationSpec(speed=False, continuations=0, **spec), baseline=baseline)


def token_losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """NLL of every token but the first, of one row, in float64."""
    logs = plain_logits(model, ids[None])[0, :-1].double().log_softmax(-1)
    return -logs.gather(1, ids[1:, None])[:, 0]


# Perplexity


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom"])
def test_windows_that_do_not_overlap_give_the_models_own_loss(family: str) -> None:
    model, ids = tiny_model(family), random_ids(5, 16)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    result = measure(model, ids)
    assert result["nll"] == pytest.approx(loss, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5) == math.exp(result["nll"])
    assert (result["tokens"], result["windows"], result["seqlen"], result["stride"]) == (75, 5, 16, 16)


@pytest.mark.parametrize("stride", [1, 3, 5, 11, 12])
def test_with_a_stride_every_token_is_scored_once_with_the_context_it_is_due(stride: int) -> None:
    model, ids, length = tiny_model("llama"), random_ids(4, 12), 12
    text, losses = ids.flatten(), {}
    # Independent of the code: for every token, the first window that contains it and a token before it.
    starts = range(0, len(text), stride)
    for token in range(1, len(text)):
        if stride == length and token % length == 0:
            continue  # the first token of a window that does not overlap has no context
        start = next(start for start in starts if start < token < start + length)
        losses[token] = token_losses(model, text[start : token + 1])[-1].item()
    result = measure(model, ids, stride=stride)
    assert result["tokens"] == len(losses) and result["stride"] == stride
    assert result["nll"] == pytest.approx(sum(losses.values()) / len(losses), rel=1e-5)


def test_more_context_is_what_a_stride_buys() -> None:
    ids = random_ids(4, 12)
    results = {stride: measure(tiny_model("llama"), ids, stride=stride) for stride in (12, 11, 6, 1)}
    assert [result["tokens"] for result in results.values()] == [44, 47, 47, 47]
    assert len({result["fingerprint"] for result in results.values()}) == 1
    assert len({result["nll"] for result in results.values()}) == 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out_on_either_side(family: str, side: str) -> None:
    model, lengths = tiny_model(family), (10, 7, 2, 5)
    rows = [random_ids(1, length, seed=length)[0] for length in lengths]
    losses = torch.cat([token_losses(model, row) for row in rows])
    ids, mask = torch.zeros(4, 10, dtype=torch.long), torch.zeros(4, 10, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(10 - len(row), 10) if side == "left" else slice(0, len(row))
        ids[number, place], mask[number, place] = row, True
    result = measure(model, ids, mask, batch_size=2)
    assert result["tokens"] == len(losses) == 20
    assert result["nll"] == pytest.approx(losses.mean().item(), rel=1e-4)
    with pytest.raises(ConfigurationError, match="A stride needs running text; tokenised rows with padding have none"):
        measure(model, ids, mask, stride=3)


@pytest.mark.parametrize("stride", [None, 5])
def test_the_batch_size_does_not_matter(stride: int | None) -> None:
    model, baseline, ids = tiny_model("llama"), tiny_model("llama", 3), random_ids(7, 12)
    results = [measure(model, ids, baseline=baseline, stride=stride, batch_size=size) for size in (1, 2, 3, 100)]
    for result in results[1:]:
        assert result["tokens"] == results[0]["tokens"]
        assert result["nll"] == pytest.approx(results[0]["nll"], rel=1e-6)
        assert result["kl"] == pytest.approx(results[0]["kl"], rel=1e-5)


def test_evaluating_changes_nothing() -> None:
    model, baseline = tiny_model("llama", attention_dropout=0.5).train(), tiny_model("llama").train()
    before, other, state = snapshot(model), snapshot(baseline), torch.get_rng_state()
    windows = CalibrationWindows.from_tokens(random_ids(), source="random")
    first = evaluate_model(model, windows, EvaluationSpec(decode_tokens=4), baseline=baseline)
    second = evaluate_model(model, windows, EvaluationSpec(decode_tokens=4), baseline=baseline)
    assert first["nll"] == second["nll"] and first["kl"] == second["kl"] == 0
    assert_unchanged(model, before)
    assert_unchanged(baseline, other)
    assert torch.equal(torch.get_rng_state(), state)


# KL


def test_kl_is_the_mean_over_tokens_of_the_definition() -> None:
    model, baseline, ids = tiny_model("llama", 3), tiny_model("llama", 5), random_ids(5, 12)
    with torch.no_grad():
        model.lm_head.weight *= 4  # surer of itself than the baseline: the two directions differ
    truth = plain_logits(baseline, ids)[:, :-1].double().softmax(-1)
    guess = plain_logits(model, ids)[:, :-1].double().softmax(-1)
    expected = (truth * (truth.log() - guess.log())).sum(-1).mean().item()
    result = measure(model, ids, baseline=baseline)
    assert result["kl"] == pytest.approx(expected, rel=1e-4) and expected > 0
    assert measure(baseline, ids, baseline=model)["kl"] != pytest.approx(expected, rel=0.1)
    # Cross entropy decomposes only into the baseline's own entropy and the KL.
    cross = F.cross_entropy(guess.log().flatten(0, 1), truth.flatten(0, 1)).item()
    entropy = -(truth * truth.log()).sum(-1).mean().item()
    assert result["kl"] == pytest.approx(cross - entropy, rel=1e-4)


@pytest.mark.parametrize("stride", [None, 4])
def test_kl_to_itself_is_exactly_zero(stride: int | None) -> None:
    model = tiny_model("llama")
    result = measure(model, random_ids(3, 12), baseline=tiny_model("llama"), stride=stride)
    assert result["kl"] == 0.0
    assert "kl" not in measure(model, random_ids())


def test_kl_leaves_padding_out() -> None:
    model, baseline, row = tiny_model("llama", 3), tiny_model("llama", 5), random_ids(1, 7)
    ids, mask = F.pad(row, (0, 5)), F.pad(torch.ones_like(row), (0, 5)).bool()
    padded = measure(model, torch.cat([ids, random_ids(1, 12)]), torch.cat([mask, mask | True]), baseline=baseline)
    alone = [measure(model, each, baseline=baseline) for each in (row, random_ids(1, 12))]
    assert [each["tokens"] for each in alone] == [6, 11] and padded["tokens"] == 17
    expected = sum(each["kl"] * each["tokens"] for each in alone) / 17
    assert padded["kl"] == pytest.approx(expected, rel=1e-4)


def test_kl_needs_one_vocabulary() -> None:
    with pytest.raises(ConfigurationError, match="KL needs one vocabulary: the baseline has 128 tokens, the model 96"):
        measure(tiny_model("llama"), random_ids(), baseline=tiny_model("llama", vocab_size=128))


def test_a_baseline_that_is_no_language_model_is_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"\(LlamaModel\) is neither a language model .* language-model head"
    ):
        measure(tiny_model("llama"), random_ids(), baseline=tiny_model("llama").model)


# Other kinds of models


def test_an_encoder_is_measured_on_its_masked_tokens() -> None:
    model = other_stacks.tiny_model("bert")
    ids = other_stacks.inputs("bert", model)["input_ids"]
    labels = torch.where(torch.arange(ids.shape[1]) % 5 == 2, ids, -100)
    windows = CalibrationWindows.from_tokens(ids, source="random", labels=labels)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels).loss.item()
    for size in (1, 2):
        result = evaluate_model(model, windows, EvaluationSpec(batch_size=size), baseline=model)
        assert result["nll"] == pytest.approx(loss, rel=1e-5)
        assert result["kl"] == pytest.approx(0.0, abs=1e-9)
        assert result["tokens"] == int((labels != -100).sum())
        # It does not generate.
        assert result["prefill_tokens_per_second"] > 0 and "decode_tokens_per_second" not in result


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_an_encoder_decoder_is_measured_on_what_it_says(name: str) -> None:
    model = other_stacks.tiny_model(name)
    inputs = other_stacks.inputs(name, model)
    said = inputs.pop("decoder_input_ids")
    extra = {key: value.split(1) for key, value in inputs.items()}
    windows = CalibrationWindows.from_tokens(said, source="random", extra=extra)
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=said, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), said[:, 1:].flatten()).item()
    result = evaluate_model(model, windows, EvaluationSpec(decode_tokens=4))
    assert result["nll"] == pytest.approx(loss, rel=1e-5)
    assert result["blocks"] == other_stacks.depth(name, "decoder")
    assert result["prefill_tokens_per_second"] > 0 and result["decode_tokens_per_second"] > 0


def test_size_counts_the_blocks_of_one_stack() -> None:
    model = other_stacks.tiny_model("bart", 4, 6)
    encoder, decoder, default = (size_of(model, stack) for stack in ("encoder", "decoder", None))
    assert (encoder["blocks"], decoder["blocks"]) == (4, 6)
    assert decoder == default and encoder["parameters"] == decoder["parameters"]


def test_a_stride_needs_running_text() -> None:
    model = other_stacks.tiny_model("bert")
    ids = random_ids(2, 12)
    windows = CalibrationWindows.from_tokens(ids, source="random", labels=ids)
    with pytest.raises(ConfigurationError, match="A stride needs running text"):
        evaluate_model(model, windows, EvaluationSpec(stride=4, speed=False))


# Settings and broken models


@pytest.mark.parametrize("name", ["stride", "batch_size", "decode_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_impossible_settings_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} must be a whole number of at least 1, not {value!r}"):
        EvaluationSpec(**{name: value})


def test_a_stride_longer_than_a_window_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"stride=13 is longer than a window \(seqlen=12\)"):
        measure(tiny_model("llama"), random_ids(), stride=13)


@pytest.mark.parametrize("stride", [None, 4])
def test_a_broken_model_is_named_by_its_first_broken_block(stride: int | None) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[:] = float("inf")
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(NonFiniteError, match="first appears in the output of block 2. Check the weights"):
        measure(model, random_ids(50), stride=stride)
    assert len(calls) < 10  # not all fifty windows first
    with torch.no_grad():
        model = tiny_model("llama")
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(NonFiniteError, match="although every block's output is finite: the final norm or the head"):
        measure(model, random_ids())


# Speed and size


def test_speed_is_tokens_by_seconds(monkeypatch) -> None:
    model = tiny_model("llama")
    ticks = iter((0.0, 2.0, 10.0, 14.0))
    generated: list[int] = []
    monkeypatch.setattr(evaluation_module.time, "perf_counter", lambda: next(ticks))
    generate = GenerationMixin.generate

    def recording(model, **kwargs):
        output = generate(model, **kwargs)
        generated.append(output.shape[1] - kwargs["input_ids"].shape[1])
        return output

    # Not the model's own attribute: some models wrap `generate` in one that cuts and joins their inputs.
    monkeypatch.setattr(GenerationMixin, "generate", recording)
    windows = CalibrationWindows.from_tokens(random_ids(2, 12), source="random")
    speed = speed_of(model, windows, decode_tokens=20)
    assert speed == {"prefill_tokens_per_second": 12 / 2, "decode_tokens_per_second": 20 / 4}
    assert generated == [4, 20]  # a warm-up, and exactly what was asked for


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_speed_is_measured_whatever_the_model_generates_by_default(family: str) -> None:
    model = tiny_model(family, max_position_embeddings=24) if family == "llama" else tiny_model(family, n_positions=24)
    model.generation_config.num_beams = 3
    model.generation_config.do_sample = True
    model.generation_config.eos_token_id = list(range(96))
    before = snapshot(model)
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    windows = CalibrationWindows.from_tokens(random_ids(2, 12), source="random")
    result = evaluate_model(model, windows, EvaluationSpec(decode_tokens=100, continuations=0))
    assert result["prefill_tokens_per_second"] > 0 and result["decode_tokens_per_second"] > 0
    assert set(seen) == {1}  # no beams
    model._forward_pre_hooks.clear()
    assert_unchanged(model, before)


def test_speed_is_absent_unless_asked_for() -> None:
    result = measure(tiny_model("llama"), random_ids())
    assert not {"prefill_tokens_per_second", "decode_tokens_per_second", "kl"} & result.keys()


def test_size_counts_shared_weights_once() -> None:
    tied, untied = (tiny_model("llama", tie_word_embeddings=tie) for tie in (True, False))
    embedding = 96 * 32
    assert size_of(untied)["parameters"] - size_of(tied)["parameters"] == embedding
    per_block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32
    assert size_of(tied) == {
        "blocks": 5,
        "parameters": embedding + 5 * per_block + 32,
        "size_bytes": 4 * (embedding + 5 * per_block + 32),
    }
    half = size_of(tied.to(torch.bfloat16))
    assert half["size_bytes"] == 2 * half["parameters"]


def test_continuations_are_checked_unless_left_out() -> None:
    windows = CalibrationWindows.from_tokens(random_ids(3, 12), source="random")
    result = evaluate_model(tiny_model("llama"), windows, EvaluationSpec(speed=False))
    assert result["generation"] == check_generation(tiny_model("llama"), windows)
    assert result["generation"]["continuations"] == 3
    assert "generation" not in evaluate_model(
        tiny_model("llama"), windows, EvaluationSpec(speed=False, continuations=0)
    )


@pytest.mark.parametrize("count", [-1, True, 1.5])
def test_wrong_numbers_of_continuations(count: Any) -> None:
    with pytest.raises(ConfigurationError, match="continuations must be a whole number from 0 on"):
        EvaluationSpec(continuations=count)
