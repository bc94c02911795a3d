# SPDX-License-Identifier: Apache-2.0
"""Whether vLLM and llama.cpp read a configuration as transformers does.

Both take some facts about blocks not from the lists that a checkpoint writes but from a period or from the number of
blocks, which removing blocks breaks in silence. What they assume is data (`runtimes.json`): model types that a runtime
reads as written, types that it does not read, and rules with the assumption of the rest. A rule is decided from the
final configuration alone, so it judges pruned and dense models alike, with pure functions over plain dictionaries.

Does not cover: the converters' demands on tokenizers, quantised weights, and types that nobody has checked; these
get the verdict `"unknown"`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal


Verdict = Literal["same", "differs", "unknown"]


@dataclass(frozen=True)
class RuntimeVerdict:
    """How one runtime reads a configuration.

    Attributes:
        runtime: Name of the runtime.
        verdict: `"same"` as transformers, `"differs"` (refusing to load included), or `"unknown"`.
        reason: Why, in words that end a sentence.
    """

    runtime: str
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class RuntimeRule:
    """One row of the table: what a runtime assumes about configurations of some model types.

    Attributes:
        model_types: The model types that it speaks of.
        assumes: Key of `_TESTS`.
        reason: What the runtime does when the assumption is wrong, in words that end a sentence.
        arguments: The other fields of the row, as the test takes them.
    """

    model_types: tuple[str, ...]
    assumes: str
    reason: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def holds(self, fields: Mapping[str, Any]) -> bool | None:
        """Whether the assumption is true of `fields`; `None` when they lack what it takes to say."""
        return _TESTS[self.assumes](fields, **self.arguments)


@dataclass(frozen=True)
class RuntimeFacts:
    """What is known of one runtime.

    Attributes:
        name: Its name.
        version: The version whose source the facts come from.
        as_written: Model types that it reads from the fields that transformers reads.
        unread: Model types that it does not read, with the reason.
        rules: Its assumptions about all other known types.
    """

    name: str
    version: str
    as_written: frozenset[str]
    unread: Mapping[str, str]
    rules: tuple[RuntimeRule, ...]

    def rules_for(self, model_type: str) -> tuple[RuntimeRule, ...]:
        """The rules that speak of `model_type`."""
        return tuple(rule for rule in self.rules if model_type in rule.model_types)


@cache
def runtime_facts() -> tuple[RuntimeFacts, ...]:
    """Reads `runtimes.json` once."""
    data = json.loads(files(__package__).joinpath("runtimes.json").read_text(encoding="utf-8"))
    return tuple(_facts(name, entry) for name, entry in data["runtimes"].items())


def read_alike(fields: Mapping[str, Any]) -> dict[str, RuntimeVerdict]:
    """Says for each runtime whether it reads a configuration as transformers does.

    Args:
        fields: `config.to_dict()` of the text decoder, pruned or dense.

    Returns:
        One verdict per runtime, by its name.
    """
    return {facts.name: _verdict(facts, fields) for facts in runtime_facts()}


def _facts(name: str, entry: Mapping[str, Any]) -> RuntimeFacts:
    return RuntimeFacts(
        name=name,
        version=entry["version"],
        as_written=frozenset(entry["as_written"]),
        unread=entry["unread"],
        rules=tuple(_rule(row) for row in entry["rules"]),
    )


def _rule(row: Mapping[str, Any]) -> RuntimeRule:
    own = ("model_types", "assumes", "reason")
    arguments = {key: value for key, value in row.items() if key not in own}
    return RuntimeRule(tuple(row["model_types"]), row["assumes"], row["reason"], arguments)


def _verdict(facts: RuntimeFacts, fields: Mapping[str, Any]) -> RuntimeVerdict:
    model_type = str(fields.get("model_type"))
    rules = facts.rules_for(model_type)
    if rules:
        return RuntimeVerdict(facts.name, *_judged(rules, fields))
    if model_type in facts.as_written:
        return RuntimeVerdict(facts.name, "same", "it reads the fields that transformers reads")
    reason = facts.unread.get(model_type, f"nobody has checked how it reads the type {model_type!r}")
    return RuntimeVerdict(facts.name, "unknown", reason)


def _judged(rules: Sequence[RuntimeRule], fields: Mapping[str, Any]) -> tuple[Verdict, str]:
    outcomes = [(rule, rule.holds(fields)) for rule in rules]
    broken = [rule.reason for rule, holds in outcomes if holds is False]
    if broken:
        return "differs", "; ".join(broken)
    if any(holds is None for _, holds in outcomes):
        return "unknown", "the configuration lacks a field that the answer depends on"
    return "same", "what it assumes is true of this configuration"


def _matches(fields: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    """Whether every field of `part` has its value in `fields`; a missing field counts as null."""
    return all(fields.get(name) == value for name, value in part.items())


def _follows_period(
    fields: Mapping[str, Any],
    *,
    field: str,
    phase: int,
    value: Any = True,
    period: int = 0,
    period_field: str = "",
    form: str = "list",
    when_set: str = "",
) -> bool | None:
    """Whether exactly the blocks `i` with `i % period == phase % period` have `value`, or are in a list of numbers."""
    if when_set and not fields.get(when_set):
        return True
    length = fields.get(period_field) if period_field else period
    written = _per_block(fields, field, form)
    if written is None or length is None:
        return None
    special = [length > 0 and block % length == phase % length for block in range(len(written))]
    return [entry == value for entry in written] == special


def _per_block(fields: Mapping[str, Any], name: str, form: str) -> Sequence[Any] | None:
    """One entry per block, where a list of block numbers (`form` "indices") becomes a list of flags."""
    written, depth = fields.get(name), fields.get("num_hidden_layers")
    if form == "list" or written is None:
        return written
    return None if depth is None else [block in written for block in range(depth)]


def _scaled_by_depth(fields: Mapping[str, Any], *, depth: int) -> bool | None:
    """Whether `query_pre_attn_scalar` is what the runtime derives from the number of blocks and the head sizes."""
    names = ("query_pre_attn_scalar", "num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim")
    if any(fields.get(name) is None for name in names):
        return None
    scalar, blocks, width, heads, head_dim = (fields[name] for name in names)
    return scalar == (width // heads if blocks == depth else head_dim)


def _is_one_of(fields: Mapping[str, Any], *, configs: Sequence[Mapping[str, Any]]) -> bool:
    return any(_matches(fields, part) for part in configs)


def _only_at(
    fields: Mapping[str, Any], *, field: str, test: str, at: Sequence[Mapping[str, Any]], value: Any = None
) -> bool | None:
    """Whether `test` is true of the field exactly when the configuration is one of `at`."""
    written = fields.get(field)
    if test == "is_null":
        outcome = written is None
    elif written is None:
        return None
    else:
        outcome = (value in written) == (test == "contains")
    return outcome == _is_one_of(fields, configs=at)


def _is_prefix(fields: Mapping[str, Any], *, field: str, value: Any) -> bool | None:
    """Whether all entries that are `value` come before all others."""
    written = fields.get(field)
    if written is None:
        return None
    count = sum(entry == value for entry in written)
    return all(entry == value for entry in written[:count])


def _is_uniform(fields: Mapping[str, Any], *, field: str) -> bool:
    # A list that is not written leaves nothing to mix.
    return len(set(fields.get(field) or ())) <= 1


def _is_absent(fields: Mapping[str, Any], *, field: str, value: Any) -> bool:
    return value not in (fields.get(field) or ())


def _has_no_window(fields: Mapping[str, Any], *, field: str) -> bool:
    """Whether no window is set, it is switched off, or no input is long enough to notice it."""
    window = fields.get(field)
    if not window or fields.get("use_sliding_window") is False:
        return True
    longest = fields.get("max_position_embeddings")
    return longest is not None and window >= longest


def _is_present(fields: Mapping[str, Any], *, field: str) -> bool:
    return fields.get(field) is not None


_TESTS: Mapping[str, Callable[..., bool | None]] = {
    "absent": _is_absent,
    "no_window": _has_no_window,
    "one_of": _is_one_of,
    "only_at": _only_at,
    "period": _follows_period,
    "prefix": _is_prefix,
    "present": _is_present,
    "scale_by_depth": _scaled_by_depth,
    "uniform": _is_uniform,
}
