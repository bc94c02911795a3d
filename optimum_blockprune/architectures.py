# SPDX-License-Identifier: Apache-2.0
"""How a configuration describes its blocks, and what must change in it when some of them go.

A model has one or two stacks of blocks. The stack's configuration may be the model's own (Llama, BART) or nested in
it (the text decoder of LLaVA, the two halves of T5Gemma); only that one is edited. A list is never sliced merely
because its length equals the depth: only fields of the table are touched, and a model type that the table does not
name as proven is accepted only if the gate proves the result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from .constraints import Situation, protected, raise_if_broken, uncached, uncopied, whole_attention
from .errors import PlanError, UnsupportedModelError
from .half import ATTENTION, MLP
from .kinds import DECODER, ENCODER, STACKS, Kind, kind_of
from .plan import PruningPlan
from .rules import RULES, Following, exceptions_written_out, is_set
from .table import FieldRule, table


# Where a flat configuration of two stacks says how deep each is.
_COUNTS = {
    DECODER: ("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers"),
    ENCODER: ("encoder_layers", "num_encoder_layers", "encoder_num_hidden_layers"),
}
# Names of nested configurations, from the outside in.
_NESTED = {
    DECODER: ("decoder", "decoder_config", "generator", "text_config"),
    ENCODER: ("encoder", "encoder_config", "text_encoder", "text_config"),
}


@dataclass(frozen=True)
class Layout:
    """How one stack of a model is described.

    Attributes:
        root: The model's own configuration (never changed here).
        place: Attributes that lead from `root` to the configuration of the stack; empty if it is `root` itself.
        kind: What kind of model it is.
        stack: `"decoder"` or `"encoder"`.
        count_field: The field that holds the number of blocks.
        num_blocks: Number of blocks now.
        base_model: Name or path it was loaded from, if known.
    """

    root: PretrainedConfig
    place: tuple[str, ...]
    kind: Kind
    stack: str
    count_field: str
    num_blocks: int
    base_model: str | None

    @property
    def config(self) -> PretrainedConfig:
        """The configuration that describes the stack."""
        return descend(self.root, self.place)

    @property
    def model_type(self) -> str:
        """Type of that configuration."""
        return self.config.model_type

    @property
    def proven(self) -> bool:
        """Whether the test suite proves this type; otherwise only the gate's logits can accept it."""
        return {self.root.model_type, self.model_type} <= table().families

    @property
    def subject(self) -> str:
        """The model, in words that begin a message."""
        if self.place:
            return f"Model type '{self.root.model_type}' ({self.stack} '{self.model_type}')"
        side = f" ({self.stack})" if len(self.kind.stacks) > 1 else ""
        return f"Model type '{self.model_type}'{side}"

    def check(self, plan: PruningPlan) -> None:
        """Raises when `plan` is for another model or cannot be expressed by this architecture."""
        theirs = (plan.model_type, plan.stack, plan.num_blocks)
        if theirs != (self.model_type, self.stack, self.num_blocks):
            raise PlanError(
                f"This plan is for the {plan.stack} of a '{plan.model_type}' model with {plan.num_blocks} blocks, "
                f"not for the {self.stack} of a '{self.model_type}' model with {self.num_blocks}."
            )
        self.changes(plan)

    def uncached(self) -> str | None:
        """Why this architecture's own cache is not exact; `None` if it is, as far as the table knows."""
        return uncached(self._situation())

    def uncopied(self) -> str | None:
        """Why files of this architecture cannot be pruned without building the model; `None` if they can."""
        return uncopied(self._situation())

    def whole_attention(self) -> str | None:
        """Why attention heads of this architecture cannot go alone; `None` if they can, as far as the table knows."""
        return whole_attention(self._situation())

    def protected(self, candidates: Iterable[int] | None = None) -> dict[int, str]:
        """Blocks that no search may remove, each with the reason; the others may go one by one, in any choice.

        Args:
            candidates: Blocks that are asked about; all unless given.

        Raises:
            UnsupportedModelError: Blocks cannot be chosen one by one: none may go, only the last ones, or only whole
                periods, which the user has to name (`PruningPlan.from_blocks`, `--blocks`).
        """
        found = protected(self._situation())
        candidates = range(self.num_blocks) if candidates is None else candidates
        for block in candidates if self.num_blocks > 1 else ():
            if block not in found:
                self.changes(PruningPlan.from_removed(self.model_type, self.num_blocks, [block], stack=self.stack))
        return found

    def changes(self, plan: PruningPlan) -> dict[str, Any]:
        """Returns the new value of every configuration field that the plan changes, block count and widths included.

        Raises:
            UnsupportedModelError: A field cannot follow the plan; the message names it and what is allowed.
        """
        sources = {ATTENTION: plan.kept_blocks, MLP: tuple(source.mlp for source in plan.blocks)}
        for kept in dict.fromkeys(sources.values()):
            raise_if_broken(self._situation(), kept, self.subject)
        stored = self._stored()
        new: dict[str, Any] = {}
        for rule in table().fields.values():
            value = stored.get(rule.name)
            if is_set(value) and self._applies(rule):
                field = self._following(rule, value, sources[rule.half])
                new[rule.name] = RULES[rule.rule](field)
                if rule.list_field is not None and new[rule.name] != value:
                    new[rule.list_field] = exceptions_written_out(field)
        new[self.count_field] = len(plan.kept_blocks)
        new |= plan.width.fields()
        return {name: value for name, value in new.items() if value != value_of(self.config, name)}

    def edited(self, plan: PruningPlan) -> PretrainedConfig:
        """Returns a copy of the model's configuration with the plan's changes."""
        root = copy.deepcopy(self.root)
        set_fields(descend(root, self.place), self.changes(plan), setattr)
        return root

    def _following(self, rule: FieldRule, value: Any, kept: tuple[int, ...]) -> Following:
        offset = getattr(self.config, rule.offset_field) if rule.offset_field else 0
        exceptions = getattr(self.config, rule.list_field, None) if rule.list_field else None
        exceptions = None if exceptions is None else tuple(exceptions)
        return Following(
            rule.name, value, kept, self.num_blocks, self.subject, rule.base, rule.shift - offset, exceptions
        )

    def _applies(self, rule: FieldRule) -> bool:
        """A flat configuration of two stacks holds fields of both."""
        if rule.model_types and self.model_type not in rule.model_types:
            return False
        if rule.unless is not None and rule.unless in self.config.to_dict():
            return False
        flat = any(getattr(self.config, name, None) is not None for name in _COUNTS[DECODER])
        return not flat or len(self.kind.stacks) == 1 or rule.stack == self.stack

    def _stored(self) -> dict[str, Any]:
        # Only stored fields: computed properties (Jamba's layers_block_type) cannot be set and follow by themselves.
        return {name: value_of(self.config, name) for name in self.config.to_dict()}

    def _situation(self) -> Situation:
        return Situation(self.model_type, self.stack, self._stored(), self.num_blocks, self.root.to_dict())


def layout_for(model_or_config: Any, stack: str | None = None) -> Layout:
    """Returns the layout of one stack of a model.

    Args:
        model_or_config: A loaded model, or a configuration (whose `architectures` then say which class it is).
        stack: `"decoder"` or `"encoder"`; by default the decoder of an encoder-decoder, else the only one.

    Raises:
        UnsupportedModelError: Not a model with a stack of transformer blocks over text, or not with this stack.
    """
    config, class_name = model_or_config, None
    if not isinstance(model_or_config, PretrainedConfig):
        config, class_name = model_or_config.config, type(model_or_config).__name__
    model_type = getattr(config, "model_type", None) or type(config).__name__
    kind = kind_of(config, class_name)
    if kind is None:
        named = class_name or next(iter(getattr(config, "architectures", None) or ()), "no class")
        raise UnsupportedModelError(
            f"Model type '{model_type}' ({named}) is neither a language model (causal, masked, encoder-decoder) nor "
            "one with a text decoder; load it with a class that has a language-model head, such as "
            "AutoModelForCausalLM."
        )
    chosen = kind.choose(stack)
    if chosen is None:
        raise UnsupportedModelError(
            f"Model type '{model_type}' has no {stack!r} stack to prune; possible: {', '.join(kind.stacks)}."
            if stack in STACKS
            else f"Unknown stack {stack!r}; possible: {', '.join(STACKS)}."
        )
    place = _place(config, kind, chosen)
    count_field = _count_field(descend(config, place), kind, chosen)
    count = getattr(descend(config, place), count_field, None)
    if not isinstance(count, int) or count < 1:
        raise UnsupportedModelError(f"Model type '{model_type}' has no number of blocks ('{count_field}').")
    base_model = getattr(config, "_name_or_path", None) or None
    return Layout(config, place, kind, chosen, count_field, count, base_model)


def descend(config: PretrainedConfig, place: tuple[str, ...]) -> PretrainedConfig:
    """Follows attributes into nested configurations."""
    for name in place:
        config = getattr(config, name)
    return config


def value_of(config: PretrainedConfig, name: str) -> Any:
    """The value of a field, as plain data.

    Some are kept in one form and stored in another (Dory's layer types); some cannot be read while they differ
    between blocks (`per_layer_config`), and are what is stored.
    """
    if name == "per_layer_config" or name in (getattr(config, "per_layer_attributes", None) or ()):
        return config.to_dict().get(name)
    return getattr(config, name, None)


def set_fields(config: PretrainedConfig, changes: Mapping[str, Any], assign: Callable[[Any, str, Any], None]) -> None:
    """Assigns `changes` to `config` through `assign(config, name, value)` and checks that each one took effect.

    Some configuration classes derive the count from another field and silently ignore a new value.
    """
    for name, value in changes.items():
        assign(config, name, value)
    for name, value in changes.items():
        if value_of(config, name) != value:
            raise UnsupportedModelError(
                f"Model type '{config.model_type}' does not accept a new value for '{name}': it is derived from "
                "another field that the architecture table does not know."
            )


def _place(config: PretrainedConfig, kind: Kind, stack: str) -> tuple[str, ...]:
    """Leads to the configuration of the stack."""
    if len(kind.stacks) == 1:
        text = config.get_text_config(decoder=True) if stack == DECODER else config.get_text_config()
        return next((path for path, nested in _nested(config, ()) if nested is text), ())
    place: tuple[str, ...] = ()
    while True:
        here = descend(config, place)
        inner = [name for name in _NESTED[stack] if isinstance(getattr(here, name, None), PretrainedConfig)]
        if not inner:
            return place
        place = (*place, inner[0])


def _nested(config: PretrainedConfig, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], PretrainedConfig]]:
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _nested(value, (*path, name))


def _count_field(config: PretrainedConfig, kind: Kind, stack: str) -> str:
    """The field with the number of blocks; where one configuration describes two stacks, each has its own."""
    special = table().counts.get(config.model_type, {}).get(stack)
    if special is not None:
        return special
    stored = config.to_dict()
    own = [name for name in _COUNTS[stack] if isinstance(stored.get(name), int)]
    return own[0] if own else "num_hidden_layers"
