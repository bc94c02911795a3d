# SPDX-License-Identifier: Apache-2.0
"""The architecture table: which configuration fields depend on the blocks, and how each follows a plan.

The facts are data (`architectures.json`): families whose exactness the test suite proves, fields with a rule each,
and model types that are refused or constrained. The rules themselves are the small functions below. Adding a family
is adding a row. A list is never sliced merely because its length equals the depth: only fields named in the table
are touched, and a model type that is not a proven family is accepted only if the gate proves the result.

Does not cover: weights outside the blocks that have a slice per block, encoder-decoders, encoders and multimodal
wrappers; all of these are refused by name.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .errors import PlanError, UnsupportedModelError
from .plan import PruningPlan


@dataclass(frozen=True)
class FieldRule:
    """One row of the table: what happens to a configuration field when blocks go.

    Attributes:
        name: The configuration field, or the model type for rows about a whole type.
        rule: Key of `_RULES`, or `"refuse"` / `"tail_only"`.
        shift: For `must_match`: block i belongs to the pattern when `(i + shift - offset) % period == 0`.
        offset_field: For `must_match`: the field that holds `offset`; 0 without one.
        reason: For `refuse` and `tail_only`: why, in words that end a sentence.
    """

    name: str
    rule: str
    shift: int = 0
    offset_field: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Table:
    """The whole of `architectures.json`, typed."""

    families: frozenset[str]
    fields: Mapping[str, FieldRule]
    model_types: Mapping[str, FieldRule]


@cache
def table() -> Table:
    """Reads `architectures.json` once."""
    data = json.loads(files(__package__).joinpath("architectures.json").read_text(encoding="utf-8"))
    return Table(
        families=frozenset(data["families"]),
        fields={name: FieldRule(name, **row) for name, row in data["fields"].items()},
        model_types={name: FieldRule(name, **row) for name, row in data["model_types"].items()},
    )


@dataclass(frozen=True)
class Layout:
    """How one model's configuration describes its blocks.

    Attributes:
        config: The live configuration (never changed here).
        model_type: Its `model_type`.
        num_blocks: Number of blocks now.
        base_model: Name or path it was loaded from, if known.
        proven: Whether the type is a family of the table; otherwise only the gate's logits can accept it.
    """

    config: PretrainedConfig
    model_type: str
    num_blocks: int
    base_model: str | None
    proven: bool

    def check(self, plan: PruningPlan) -> None:
        """Raises when `plan` is for another model or cannot be expressed by this architecture."""
        if plan.model_type != self.model_type or plan.num_blocks != self.num_blocks:
            raise PlanError(
                f"The plan was made for a '{plan.model_type}' model of {plan.num_blocks} blocks; this is a "
                f"'{self.model_type}' model of {self.num_blocks}."
            )
        self.changes(plan)

    def changes(self, plan: PruningPlan) -> dict[str, Any]:
        """Returns the new value of every configuration field that the plan changes, the block count included.

        Raises:
            UnsupportedModelError: A field cannot follow the plan; the message names it and what is allowed.
        """
        kept = plan.kept_blocks
        row = table().model_types.get(self.model_type)
        if row is not None:
            self._constrain(row, kept, f"Model type '{self.model_type}'")
        # Only stored fields: computed properties (Jamba's layers_block_type) cannot be set and follow by themselves.
        stored = self.config.to_dict()
        new: dict[str, Any] = {}
        for rule in table().fields.values():
            value = stored.get(rule.name)
            if not _is_set(value):
                continue
            if rule.rule in ("refuse", "tail_only"):
                self._constrain(rule, kept, f"Model type '{self.model_type}' with {rule.name}={value!r}")
            else:
                new[rule.name] = self._follow(rule, value, kept)
        new["num_hidden_layers"] = len(kept)
        return {name: value for name, value in new.items() if value != getattr(self.config, name)}

    def edited(self, plan: PruningPlan) -> PretrainedConfig:
        """Returns a copy of the configuration with the plan's changes."""
        config = copy.deepcopy(self.config)
        set_fields(config, self.changes(plan), setattr)
        return config

    def _follow(self, rule: FieldRule, value: Any, kept: tuple[int, ...]) -> Any:
        offset = getattr(self.config, rule.offset_field) if rule.offset_field else 0
        return _RULES[rule.rule](
            Following(rule.name, value, kept, self.num_blocks, self.model_type, rule.shift - offset)
        )

    def _constrain(self, rule: FieldRule, kept: tuple[int, ...], subject: str) -> None:
        if rule.rule == "refuse":
            raise UnsupportedModelError(f"{subject} cannot lose blocks exactly in this version: {rule.reason}.")
        if kept != tuple(range(len(kept))):
            raise UnsupportedModelError(
                f"{subject} can only lose its last blocks: {rule.reason}. "
                f"Remove blocks from the end only (such as {self.num_blocks - 1})."
            )


def set_fields(config: PretrainedConfig, changes: Mapping[str, Any], assign: Callable[[Any, str, Any], None]) -> None:
    """Assigns `changes` to `config` through `assign(config, name, value)` and checks that each one took effect.

    Some configuration classes derive the count from another field and silently ignore a new value.
    """
    for name, value in changes.items():
        assign(config, name, value)
        if getattr(config, name) != value:
            raise UnsupportedModelError(
                f"Model type '{config.model_type}' does not accept a new value for '{name}': it is derived from "
                "another field that the architecture table does not know."
            )


def layout_for(config: PretrainedConfig) -> Layout:
    """Returns the layout of a decoder-only causal language model's configuration.

    Raises:
        UnsupportedModelError: Not a causal language model, an encoder, an encoder-decoder, a multimodal wrapper, or
            a configuration without a block count.
    """
    model_type = getattr(config, "model_type", None) or type(config).__name__
    _refuse_other_kinds(config, model_type)
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        raise UnsupportedModelError(f"Model type '{model_type}' has no number of blocks ('num_hidden_layers').")
    return Layout(
        config=config,
        model_type=model_type,
        num_blocks=count,
        base_model=getattr(config, "_name_or_path", None) or None,
        proven=model_type in table().families,
    )


def _refuse_other_kinds(config: PretrainedConfig, model_type: str) -> None:
    architectures = getattr(config, "architectures", None) or []
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"Model type '{model_type}' is an encoder-decoder; this version prunes decoder-only language models."
        )
    names_decoder = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    masked = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or names_decoder or remote
    if (masked and not names_decoder) or not causal:
        raise UnsupportedModelError(
            f"Model type '{model_type}' is not a decoder-only language model (encoder-only or another kind); this "
            "version prunes models that AutoModelForCausalLM loads as decoders."
        )
    if config.get_text_config() is not config:
        raise UnsupportedModelError(
            f"Model type '{model_type}' wraps a text decoder in a multimodal model; this version prunes text-only "
            "models. Load the text decoder by its own class if there is one."
        )


def _is_set(value: Any) -> bool:
    """False for absent, empty, zero and False: fields that say nothing about the blocks."""
    return value is not None and value is not False and value != 0 and value != [] and value != {}


# --- rules: the new value of one field, given the kept blocks ------------------------------------------------------


@dataclass(frozen=True)
class Following:
    """What a rule sees: field name and value, kept original indices, old depth, model type, phase of a pattern."""

    name: str
    value: Any
    kept: tuple[int, ...]
    num_blocks: int
    model_type: str
    phase: int = 0


def _slice(field: Following) -> list[Any]:
    if len(field.value) != field.num_blocks:
        raise UnsupportedModelError(
            f"Model type '{field.model_type}': '{field.name}' has {len(field.value)} entries for {field.num_blocks} "
            "blocks, so they cannot be matched to each other."
        )
    return [field.value[block] for block in field.kept]


def _renumber(field: Following) -> list[int]:
    position = {block: index for index, block in enumerate(field.kept)}
    return [position[block] for block in field.value if block in position]


def _count_below(field: Following) -> int:
    return sum(block < field.value for block in field.kept)


def _last_below(field: Following) -> int:
    """An inclusive upper end; -1 ("to the last block") stays."""
    if field.value < 0:
        return field.value
    last = sum(block <= field.value for block in field.kept) - 1
    if last < 0:
        raise UnsupportedModelError(
            f"Model type '{field.model_type}': '{field.name}={field.value}' cannot say that none of the blocks up to "
            f"it is left. Keep one of blocks 0 to {field.value}."
        )
    return last


def _write_out(field: Following) -> list[Any]:
    """A cyclic pattern, written out in full for the kept blocks."""
    return [field.value[block % len(field.value)] for block in field.kept]


def _must_match(field: Following) -> Any:
    """A period with no list behind it: accepted only when the pattern recomputed on load equals the kept one."""

    def in_pattern(block: int) -> bool:
        return (block + field.phase) % field.value == 0

    if any(in_pattern(old) != in_pattern(new) for new, old in enumerate(field.kept)):
        raise UnsupportedModelError(
            f"Model type '{field.model_type}' repeats its block kinds with '{field.name}={field.value}', and no list "
            "can say otherwise: after this removal it would load as another pattern. Remove blocks so that the "
            f"rest keeps the period, for example whole groups of {field.value} consecutive blocks."
        )
    return field.value


def _rescale(field: Following) -> float:
    """MiniCPM3 multiplies residuals by `scale_depth / sqrt(depth)`; this keeps the quotient."""
    return field.value * (len(field.kept) / field.num_blocks) ** 0.5


_RULES: Mapping[str, Callable[[Following], Any]] = {
    "slice": _slice,
    "renumber": _renumber,
    "count_below": _count_below,
    "last_below": _last_below,
    "write_out": _write_out,
    "must_match": _must_match,
    "rescale": _rescale,
}
