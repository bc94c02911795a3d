# SPDX-License-Identifier: Apache-2.0
"""Which class loads a configuration and which stacks it has: by the class it names, else by transformers' mappings."""

from __future__ import annotations

import pytest
import transformers
from configs import newest
from families import FAMILIES, tiny_config
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from optimum_blockprune.kinds import DECODER, ENCODER, STACKS, Kind, kind_of


def config(model_type: str, named: str | None = None, **fields: object) -> PretrainedConfig:
    made = CONFIG_MAPPING[model_type](**fields)
    made.architectures = None if named is None else [named]
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_text_decoders(family: str) -> None:
    kind = kind_of(tiny_config(family))
    assert kind.stacks == (DECODER,)
    assert kind.is_text_decoder
    assert kind.class_name == type(AutoModelForCausalLM.from_config(tiny_config(family, 1))).__name__


@newest
@pytest.mark.parametrize(
    ("model_type", "class_name", "stacks"),
    [
        ("bert", "BertForMaskedLM", (ENCODER,)),
        ("modernbert", "ModernBertForMaskedLM", (ENCODER,)),
        ("t5", "T5ForConditionalGeneration", STACKS),
        ("bart", "BartForConditionalGeneration", STACKS),
        ("whisper", "WhisperForConditionalGeneration", STACKS),
        ("t5gemma", "T5GemmaForConditionalGeneration", STACKS),
        ("encoder-decoder", "EncoderDecoderModel", STACKS),
        ("llava", "LlavaForConditionalGeneration", (DECODER,)),
        ("gemma3", "Gemma3ForConditionalGeneration", (DECODER,)),
        ("qwen2_audio", "Qwen2AudioForConditionalGeneration", (DECODER,)),
        ("idefics", "IdeficsForVisionText2Text", (DECODER,)),
        ("bert-generation", "BertGenerationDecoder", (DECODER,)),
    ],
)
def test_without_a_named_class_the_mappings_say(model_type: str, class_name: str, stacks: tuple[str, ...]) -> None:
    kind = kind_of(config(model_type))
    assert kind == Kind(class_name, stacks)
    assert kind.auto_class is getattr(transformers, class_name)
    assert kind.is_text_decoder is (stacks == (DECODER,))


@pytest.mark.parametrize("model_type", ["vit", "clip", "wav2vec2", "resnet"])
def test_what_has_no_blocks_over_tokens_is_no_kind(model_type: str) -> None:
    assert kind_of(config(model_type)) is None


@pytest.mark.parametrize(
    ("model_type", "named", "expected"),
    [
        ("bert", "BertForSequenceClassification", Kind("BertForSequenceClassification", (ENCODER,))),
        # An encoder that was saved without a head has no weights for one; a decoder's head is tied or wanted.
        ("bert", "BertModel", Kind("BertModel", (ENCODER,))),
        ("llama", "LlamaModel", Kind("LlamaForCausalLM", (DECODER,))),
        ("t5", "T5Model", Kind("T5ForConditionalGeneration", STACKS)),
        ("bart", "BartForCausalLM", Kind("BartForCausalLM", (DECODER,))),
        ("llava", "LlavaForConditionalGeneration", Kind("LlavaForConditionalGeneration", (DECODER,))),
        ("llama", "LlamaForSequenceClassification", None),
        ("t5", "T5ForSequenceClassification", None),
        ("bert", "NobodysModel", None),
    ],
)
def test_the_named_class_decides(model_type: str, named: str, expected: Kind | None) -> None:
    assert kind_of(config(model_type, named)) == expected


def test_an_encoder_that_is_a_decoder() -> None:
    assert kind_of(config("bert", is_decoder=True)) == Kind("BertLMHeadModel", (DECODER,))
    assert kind_of(config("bert", "BertModel", is_decoder=True)) == Kind("BertLMHeadModel", (DECODER,))


def test_the_class_of_a_live_model_decides() -> None:
    # The bare decoder predicts nothing, although its configuration would load with a head.
    assert kind_of(config("llama"), "LlamaModel") is None
    assert kind_of(config("llama", "LlamaModel"), "LlamaForCausalLM") == Kind("LlamaForCausalLM", (DECODER,))
    assert kind_of(config("bert"), "BertModel") == Kind("BertModel", (ENCODER,))
    assert kind_of(config("t5", is_encoder_decoder=False), "T5EncoderModel") == Kind("T5EncoderModel", (ENCODER,))


def test_code_of_a_repository_is_taken_for_a_decoder() -> None:
    remote = config("llama", "OrgForCausalLM")
    assert kind_of(remote) is None
    remote.auto_map = {"AutoModelForSequenceClassification": "modeling.Org"}
    assert kind_of(remote) is None
    remote.auto_map = {"AutoModelForCausalLM": "modeling.OrgForCausalLM"}
    kind = kind_of(remote)
    assert kind == kind_of(config("llama"), "OrgForCausalLM") == Kind(None, (DECODER,))
    assert kind.auto_class is AutoModelForCausalLM


@newest
@pytest.mark.parametrize(
    ("model_type", "named", "task", "loader"),
    [
        ("llama", None, "text-generation", "AutoModelForCausalLM"),
        ("bert", None, "fill-mask", "BertForMaskedLM"),
        ("bert", "BertModel", "feature-extraction", "BertModel"),
        ("t5", None, "text2text-generation", "T5ForConditionalGeneration"),
        ("whisper", None, "automatic-speech-recognition", "WhisperForConditionalGeneration"),
        ("llava", None, "image-text-to-text", "LlavaForConditionalGeneration"),
    ],
)
def test_what_a_person_loads_it_with_and_for(model_type: str, named: str | None, task: str, loader: str) -> None:
    kind = kind_of(config(model_type, named))
    assert (kind.task, kind.loader) == (task, loader)
    assert hasattr(transformers, loader)


def test_code_of_a_repository_is_loaded_as_a_decoder() -> None:
    assert (Kind(None, (DECODER,)).task, Kind(None, (DECODER,)).loader) == ("text-generation", "AutoModelForCausalLM")


def test_the_decoder_is_pruned_unless_the_encoder_is_asked_for() -> None:
    both, decoder, encoder = Kind("x", STACKS), Kind("x", (DECODER,)), Kind("x", (ENCODER,))
    assert [kind.choose(None) for kind in (both, decoder, encoder)] == [DECODER, DECODER, ENCODER]
    assert [kind.choose(ENCODER) for kind in (both, decoder, encoder)] == [ENCODER, None, ENCODER]
    assert both.choose("middle") is None
