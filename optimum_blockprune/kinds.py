# SPDX-License-Identifier: Apache-2.0
"""What kind of model a configuration describes: which class loads it, and which stacks of blocks it has.

Decided by the class that the configuration names (`architectures`), by transformers' own mappings where it names
none or one without a head. Nothing is imported or loaded to find out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto


DECODER, ENCODER = "decoder", "encoder"
STACKS = (ENCODER, DECODER)


def _names(mapping: str) -> dict[str, Any]:
    """One of transformers' mappings from model type to class names; empty where this version has none."""
    return dict(getattr(modeling_auto, f"MODEL_{mapping}_NAMES", {}))


_CAUSAL = _names("FOR_CAUSAL_LM_MAPPING")
_MASKED = _names("FOR_MASKED_LM_MAPPING")
_SEQ2SEQ = _names("FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING")
_SPEECH = _names("FOR_SPEECH_SEQ_2_SEQ_MAPPING")
_MULTIMODAL = {**_names("FOR_MULTIMODAL_LM_MAPPING"), **_names("FOR_IMAGE_TEXT_TO_TEXT_MAPPING")}
_HEADLESS = _names("MAPPING")


# The first one that has the class counts.
_TASKS = (
    (_names("FOR_IMAGE_TEXT_TO_TEXT_MAPPING"), "image-text-to-text"),
    (_CAUSAL, "text-generation"),
    (_SPEECH, "automatic-speech-recognition"),
    (_SEQ2SEQ, "text2text-generation"),
    (_MASKED, "fill-mask"),
)


@dataclass(frozen=True)
class Kind:
    """How a model is loaded and which of its stacks can be pruned.

    Attributes:
        class_name: Class of transformers; `None` for code that comes with the repository.
        stacks: `("decoder",)`, `("encoder",)` or `("encoder", "decoder")`.
    """

    class_name: str | None
    stacks: tuple[str, ...]

    @property
    def auto_class(self) -> type:
        """What `from_pretrained` is called on."""
        return transformers.AutoModelForCausalLM if self.class_name is None else getattr(transformers, self.class_name)

    @property
    def is_text_decoder(self) -> bool:
        """Whether blocks predict the next token of their own input."""
        return self.stacks == (DECODER,)

    @property
    def task(self) -> str:
        """The Hub's name of what the model does (`pipeline_tag`)."""
        for mapping, task in _TASKS:
            if self.class_name in map(_first, mapping.values()):
                return task
        return "text-generation" if self.class_name is None else "feature-extraction"

    @property
    def loader(self) -> str:
        """The class of transformers that a person would load the model with."""
        return "AutoModelForCausalLM" if self.task == "text-generation" else self.class_name

    def choose(self, stack: str | None) -> str | None:
        """Returns the stack to prune: the one that was asked for, else the decoder, else the only one.

        `None` if there is no such stack.
        """
        wanted = stack or self.stacks[-1]
        return wanted if wanted in self.stacks else None


def kind_of(config: PretrainedConfig, class_name: str | None = None) -> Kind | None:
    """Returns the kind of a model; `None` for what has no stack of transformer blocks over tokens.

    Args:
        config: Its configuration.
        class_name: The class of a loaded model; by default the one that the configuration asks for.
    """
    name = class_name or _wanted_class(config)
    if not hasattr(transformers, name or ""):
        remote = class_name is not None or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
        return Kind(None, (DECODER,)) if remote else None
    return Kind(name, _stacks(config, name)) if _stacks(config, name) else None


def _wanted_class(config: PretrainedConfig) -> str | None:
    """The class that the configuration names, if it has a head; else what the mappings have for its type."""
    named = next(iter(getattr(config, "architectures", None) or ()), None)
    kind = config.model_type
    if named is not None and named != _first(_HEADLESS.get(kind)):
        return named
    if getattr(config, "is_encoder_decoder", False):
        with_head = {**_MULTIMODAL, **_SPEECH, **_SEQ2SEQ}
    elif kind in _CAUSAL and (kind not in _MASKED or getattr(config, "is_decoder", False)):
        with_head = _CAUSAL
    elif named is not None and kind in _MASKED:
        return named  # an encoder that was saved without a head has no weights for one
    else:
        with_head = {**_MASKED, **_SEQ2SEQ, **_SPEECH, **_MULTIMODAL}
    return _first(with_head.get(kind)) or named or _first(_HEADLESS.get(kind))


def _stacks(config: PretrainedConfig, name: str) -> tuple[str, ...]:
    kind = config.model_type
    if name == _first(_CAUSAL.get(kind)):
        return (DECODER,)
    if getattr(config, "is_encoder_decoder", False):
        both = {_first(mapping.get(kind)) for mapping in (_SEQ2SEQ, _SPEECH, _MULTIMODAL)}
        return STACKS if name in both or name.endswith("ForConditionalGeneration") else ()
    decoders = {_first(mapping.get(kind)) for mapping in (_MULTIMODAL, _SPEECH, _SEQ2SEQ)}
    if name in decoders or name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return (DECODER,)
    encoder = kind in _MASKED or name.endswith(("EncoderModel", "ForMaskedLM"))
    return (ENCODER,) if encoder and not getattr(config, "is_decoder", False) else ()


def _first(names: Any) -> str | None:
    return names[0] if isinstance(names, (tuple, list)) else names
