# SPDX-License-Identifier: Apache-2.0
"""How a pruned model is healed: every setting, its default, its help text and its rules, in one place.

The command line takes its flags from here. Defaults are our choice unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from .errors import ConfigurationError, nearest


METHODS = ("lora", "distill")


def _setting(default: Any, help: str, **rules: Any) -> Any:
    return field(default=default, metadata={"help": help, **rules})


@dataclass(frozen=True)
class HealingSpec:
    """How to train; checked once, when it is made.

    Raises:
        ConfigurationError: A setting has an impossible value.
    """

    method: str = _setting(
        "lora",
        "What is learned: 'lora', the next token of the text; 'distill', the dense model's predictions on it.",
        choices=METHODS,
    )
    steps: int = _setting(200, "Steps of the optimizer.", minimum=1)
    learning_rate: float = _setting(5e-4, "Largest learning rate of AdamW; it falls to 0 in a straight line.")
    rank: int = _setting(16, "Rank of the adapters.", minimum=1)
    alpha: float = _setting(32.0, "Scale of the adapters: what they add is multiplied by alpha / rank.")
    dropout: float = _setting(0.0, "Share of the adapters' inputs that is dropped, from 0 to below 1.")
    batch_size: int = _setting(4, "Windows per forward pass.", minimum=1)
    gradient_accumulation: int = _setting(1, "Forward passes per step.", minimum=1)
    warmup: int | None = _setting(
        None, "Steps in which the learning rate rises from 0; if not given, a twentieth of all.", minimum=0
    )
    seqlen: int = _setting(512, "Tokens per window, clipped to what the model can read.", minimum=2)
    num_samples: int | None = _setting(
        512, "Number of windows of text, those held out among them; in Python None for all of it.", minimum=2
    )
    generated_samples: int = _setting(
        0,
        "Windows of text that the dense model writes itself, from beginnings out of the others, to be trained on, "
        "too, where there is little text; for 'distill'.",
        minimum=0,
    )
    held_out: float = _setting(
        0.1, "Share of the windows, at the end, that is not trained on but tells whether healing helped."
    )
    seed: int = _setting(0, "Seed of every random choice.", minimum=0)
    target_modules: tuple[str, ...] | None = _setting(
        None, "Names of the linear layers inside a block that get adapters, such as q_proj; if not given, all of them."
    )
    dataset_text_field: str | None = _setting(
        None, "Column of the dataset that holds the text; found by itself if not given."
    )
    use_chat_template: bool = _setting(False, "Format conversations with the chat template of the tokenizer.")
    save_steps: int = _setting(50, "Steps between two checkpoints, where any are kept.", minimum=1)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigurationError(f"Unknown method {self.method!r} of healing.{nearest(str(self.method), METHODS)}")
        for each in fields(self):
            if "minimum" in each.metadata:
                _check_count(each, getattr(self, each.name))
        for name, least, most in (("learning_rate", 0, math.inf), ("alpha", 0, math.inf), ("held_out", 0, 1)):
            if not _number(value := getattr(self, name)) or not least < value < most:
                raise ConfigurationError(f"{name} must be a number above {least} and below {most}, not {value!r}.")
        if not _number(self.dropout) or not 0 <= self.dropout < 1:
            raise ConfigurationError(f"dropout must be a number from 0 to below 1, not {self.dropout!r}.")
        if self.generated_samples and self.method != "distill":
            raise ConfigurationError(
                f"generated_samples={self.generated_samples} is text of the dense model: it needs method='distill'."
            )
        if self.warmup is not None and self.warmup > self.steps:
            raise ConfigurationError(f"warmup={self.warmup} is more than the {self.steps} steps.")
        _check_words(self)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> HealingSpec:
        """Makes a specification of keyword arguments.

        Raises:
            ConfigurationError: A name is unknown, or a value impossible.
        """
        known = [each.name for each in fields(cls)]
        for name in settings:
            if name not in known:
                raise ConfigurationError(f"Healing has no setting {name!r}.{nearest(name, known)}")
        return cls(**settings)

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up."""
        return self.steps // 20 if self.warmup is None else self.warmup

    @property
    def changed(self) -> dict[str, Any]:
        """The settings that differ from their defaults."""
        named = {each.name: (getattr(self, each.name), each.default) for each in fields(self)}
        return {name: value for name, (value, default) in named.items() if value != default}


def _number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)


def _check_count(count: Field[Any], value: Any) -> None:
    """Allows an `int` that is not too small; `True` and `3.0` are no counts."""
    if value is None and count.type.endswith("| None"):
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigurationError(f"{count.name} must be a whole number, not {value!r}.")
    if value < count.metadata["minimum"]:
        least = count.metadata["minimum"]
        raise ConfigurationError(f"{count.name}={value} is too small; the smallest value is {least}.")


def _check_words(spec: HealingSpec) -> None:
    names = spec.target_modules
    if names is not None and (
        not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) and name for name in names)
    ):
        raise ConfigurationError(f"target_modules must be a list of names of modules, not {names!r}.")
    column = spec.dataset_text_field
    if column is not None and (not isinstance(column, str) or not column):
        raise ConfigurationError(f"dataset_text_field must be the name of a column, not {column!r}.")
    if not isinstance(spec.use_chat_template, bool):
        raise ConfigurationError(f"use_chat_template must be True or False, not {spec.use_chat_template!r}.")
