# SPDX-License-Identifier: Apache-2.0
"""Continuations are greedy whatever the model's settings, are counted rightly, and leave the model as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import VOCABULARY, plain_logits, random_ids, tiny_model
from toys import assert_unchanged, snapshot
from transformers import GenerationConfig, PreTrainedModel
from zoo import other_stacks

from optimum_blockprune.batches import CalibrationWindows
from optimum_blockprune.errors import ConfigurationError
from optimum_blockprune.generation import check_generation
from optimum_blockprune.repetition import distinct, repetition_rate


NEW = 10
ODD = {
    "sampling": {"do_sample": True, "temperature": 5.0, "top_k": 3, "top_p": 0.5},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 9.0},
    "penalties": {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "encoder_repetition_penalty": 3.0},
    "lengths": {"min_length": 30, "max_length": 2, "max_time": 0.0},
    "forced": {"forced_eos_token_id": 5, "bad_words_ids": [[n] for n in range(3, 90)], "suppress_tokens": [4, 6]},
    "outputs": {"return_dict_in_generate": True, "output_scores": True, "use_cache": False},
}


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


def text(rows: int = 4, length: int = 16) -> CalibrationWindows:
    return CalibrationWindows.from_tokens(random_ids(rows, length, seed=7), source="random")


def reference(
    model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, ends: tuple[int, ...]
) -> list[list[int]]:
    """One forward pass for each token, without a cache, each row alone."""
    written = []
    for row in prompts:
        tokens = row.tolist()
        while len(tokens) < len(row) + new_tokens:
            token = int(plain_logits(model, torch.tensor([tokens]))[0, -1].argmax())
            if token in ends:
                break
            tokens.append(token)
        written.append(tokens[len(row) :])
    return written


def expected(written: list[list[int]], prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    return {
        "continuations": len(written),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "tokens": sum(map(len, written)),
        "repetition": pytest.approx(sum(map(repetition_rate, written)) / len(written)),
        **{f"distinct_{n}": pytest.approx(distinct(written, n)) for n in (1, 2, 3)},
    }


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom"])
def test_figures_are_those_of_greedy_text(family: str) -> None:
    model, windows = tiny_model(family), text()
    truth = reference(model, windows.input_ids[:, :8], NEW, (2,))
    found = check_generation(model, windows, prompt_tokens=8, new_tokens=NEW)
    assert found == expected(truth, 8, NEW)
    assert found["tokens"] > 0


@pytest.mark.parametrize("name", ODD)
def test_the_models_own_settings_are_set_aside(model: PreTrainedModel, name: str) -> None:
    plain = check_generation(model, text(), prompt_tokens=8, new_tokens=NEW)
    model.generation_config = GenerationConfig(eos_token_id=2, **ODD[name])
    assert check_generation(model, text(), prompt_tokens=8, new_tokens=NEW) == plain


def test_settings_in_the_configuration_itself_are_set_aside(model: PreTrainedModel) -> None:
    """As old checkpoints have them."""
    plain = check_generation(model, text(), prompt_tokens=8, new_tokens=NEW)
    model.config.do_sample, model.config.temperature, model.config.num_beams = True, 7.0, 4
    assert check_generation(model, text(), prompt_tokens=8, new_tokens=NEW) == plain


def test_a_generate_of_the_models_own_is_passed_over(model: PreTrainedModel) -> None:
    plain = check_generation(model, text(), prompt_tokens=8, new_tokens=NEW)
    model.generate = lambda *_args, **_kwargs: pytest.fail("its own generate was called")
    assert check_generation(model, text(), prompt_tokens=8, new_tokens=NEW) == plain


def test_an_end_ends_a_continuation_and_is_not_counted(model: PreTrainedModel) -> None:
    windows = text()
    whole = reference(model, windows.input_ids[:, :8], NEW, ())
    ends = [whole[0][3], whole[1][1]]
    for setting in (ends, ends[0]):
        model.generation_config.eos_token_id = setting
        cut = reference(model, windows.input_ids[:, :8], NEW, tuple(torch.tensor(setting).reshape(-1).tolist()))
        assert len(cut[0]) <= 3
        assert check_generation(model, windows, prompt_tokens=8, new_tokens=NEW) == expected(cut, 8, NEW)


def test_a_model_that_ends_at_once_writes_nothing(model: PreTrainedModel) -> None:
    model.generation_config.eos_token_id = list(range(VOCABULARY))
    found = check_generation(model, text(), prompt_tokens=8, new_tokens=NEW)
    assert (found["tokens"], found["repetition"], found["distinct_1"]) == (0, 0.0, 0.0)


def test_nothing_of_the_model_changes(model: PreTrainedModel) -> None:
    model.train()
    model.generation_config = GenerationConfig(do_sample=True, temperature=3.0, num_beams=2)
    own, before, random = model.generation_config, snapshot(model), torch.random.get_rng_state()
    check_generation(model, text(), prompt_tokens=4, new_tokens=4)
    assert model.generation_config is own
    assert torch.equal(torch.random.get_rng_state(), random)
    assert_unchanged(model, before)


def test_the_models_settings_come_back_after_an_error(model: PreTrainedModel) -> None:
    own = model.generation_config
    model.forward = None
    with pytest.raises(TypeError):
        check_generation(model, text(), prompt_tokens=4, new_tokens=4)
    assert model.generation_config is own


def test_the_first_windows_are_continued_as_many_as_there_are(model: PreTrainedModel) -> None:
    few = check_generation(model, text(), continuations=2, prompt_tokens=8, new_tokens=NEW)
    assert few == check_generation(model, text().first(2), prompt_tokens=8, new_tokens=NEW)
    assert check_generation(model, text(), continuations=99, prompt_tokens=8, new_tokens=4)["continuations"] == 4


def test_short_windows_give_half_their_tokens(model: PreTrainedModel) -> None:
    assert check_generation(model, text(length=16), new_tokens=4)["prompt_tokens"] == 8
    assert check_generation(model, text(length=80), new_tokens=4)["prompt_tokens"] == 32


def test_a_model_with_few_positions_reads_and_writes_less() -> None:
    found = check_generation(tiny_model("gpt2", n_positions=20), text(length=64), new_tokens=64)
    assert (found["prompt_tokens"], found["new_tokens"]) == (10, 10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_part_of_a_prompt(model: PreTrainedModel, side: str) -> None:
    ids = random_ids(3, 16, seed=7)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, slice(0, 4) if side == "left" else slice(12, 16)] = False
    mask[2, :12] = False  # four tokens are left, too few
    windows = CalibrationWindows.from_tokens(ids, mask, source="padded")
    prompts = torch.stack([ids[0, :8], ids[1, 4:12] if side == "left" else ids[1, :8]])
    truth = reference(model, prompts, NEW, (2,))
    assert check_generation(model, windows, prompt_tokens=8, new_tokens=NEW) == expected(truth, 8, NEW)
    only = CalibrationWindows.from_tokens(ids[2:], mask[2:], source="padded")
    assert check_generation(model, only, prompt_tokens=8, new_tokens=NEW) is None


def test_models_and_windows_without_running_text_give_nothing(model: PreTrainedModel) -> None:
    ids = random_ids(2, 16)
    reading = CalibrationWindows.from_tokens(ids, source="pairs", extra={"input_ids": (ids[:1], ids[1:])})
    masked = CalibrationWindows.from_tokens(ids, source="masked", labels=ids)
    assert check_generation(other_stacks.tiny_model("bert"), text()) is None
    assert check_generation(other_stacks.tiny_model("t5"), reading) is None
    assert check_generation(model, reading) is None
    assert check_generation(model, masked) is None


@pytest.mark.parametrize("name", ["continuations", "prompt_tokens", "new_tokens"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4"])
def test_counts_are_checked(model: PreTrainedModel, name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} must be a whole number of at least 1"):
        check_generation(model, text(), **{name: value})


def test_a_copy_gives_the_same_figures(model: PreTrainedModel) -> None:
    twin = copy.deepcopy(model)
    assert check_generation(model, text(), new_tokens=NEW) == check_generation(twin, text(), new_tokens=NEW)
