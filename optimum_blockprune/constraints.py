# SPDX-License-Identifier: Apache-2.0
"""The constraints of the architecture table: blocks that must stay so that the rest can be expressed exactly."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import UnsupportedModelError
from .rules import is_set
from .table import Constraint, table


@dataclass(frozen=True)
class Situation:
    """What a constraint sees.

    Attributes:
        model_type: Type of the configuration that describes the blocks.
        stack: The stack that loses blocks.
        fields: The stored fields of that configuration.
        num_blocks: Blocks before.
        root: The stored fields of the whole model's configuration.
    """

    model_type: str
    stack: str
    fields: Mapping[str, Any]
    num_blocks: int
    root: Mapping[str, Any]

    def at_root(self, path: str) -> Any:
        """A value of the whole model's configuration by its dotted path; `None` if there is none."""
        value: Any = self.root
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value


def broken(situation: Situation, kept: Sequence[int]) -> str | None:
    """Says which constraint the blocks `kept` break and what would be allowed; `None` if they break none."""
    for row in _rows(situation):
        problem = CONSTRAINTS[row.rule](row, situation, kept)
        if problem is not None:
            return f"{row.reason}. {problem}"
    return None


def protected(situation: Situation) -> dict[int, str]:
    """Blocks that stay whatever a search chooses, with the reason; any choice among the others is expressible.

    Where one block of a kind has to stay, the last of that kind is taken (our choice).
    """
    found: dict[int, str] = {}
    for row in _rows(situation):
        for block in _PROTECTED.get(row.rule, lambda *_: ())(row, situation):
            found.setdefault(block, row.reason)
    return found


def uncached(situation: Situation) -> str | None:
    """Why models of this type give other logits with a cache than without, pruned or not; `None` if they do not."""
    return next((row.reason for row in table().uncached if _applies(row, situation)), None)


def uncopied(situation: Situation) -> str | None:
    """Why files of this type cannot be renumbered; `None` if they can."""
    return next((row.reason for row in table().uncopied if _applies(row, situation)), None)


def whole_attention(situation: Situation) -> str | None:
    """Why the heads of this type cannot go alone, whatever the layout; `None` if they may."""
    return next((row.reason for row in table().whole_attention if _applies(row, situation)), None)


def _rows(situation: Situation) -> list[Constraint]:
    return [row for row in table().constraints if _applies(row, situation)]


def _applies(row: Constraint, situation: Situation) -> bool:
    return bool(
        (not row.model_types or {situation.model_type, situation.root.get("model_type")} & set(row.model_types))
        and (row.field is None or is_set(situation.fields.get(row.field)))
        and (row.unset is None or not is_set(situation.fields.get(row.unset)))
        and (row.root_field is None or is_set(situation.at_root(row.root_field)))
        and (row.rule != "refuse" or not row.values or situation.fields.get(row.field) in row.values)
        and (row.stack is None or row.stack == situation.stack)
    )


# --- what a choice of blocks must keep -----------------------------------------------------------------------------


def _refuse(_row: Constraint, _situation: Situation, _kept: Collection[int]) -> str:
    return "No block can be removed exactly"


def _refuse_period(row: Constraint, situation: Situation, _kept: Collection[int]) -> str | None:
    """What happens every so many blocks does not happen in a model that has no more of them."""
    period = situation.fields[row.field]
    if situation.num_blocks <= period:
        return None
    return f"No block can be removed exactly; load it with {row.field}=0, which computes the same in higher precision"


def _tail_only(_row: Constraint, situation: Situation, kept: Sequence[int]) -> str | None:
    if tuple(kept) == tuple(range(len(kept))):
        return None
    return f"It can only lose its last blocks: remove them from the end (such as {situation.num_blocks - 1})"


def _keep_first(_row: Constraint, _situation: Situation, kept: Sequence[int]) -> str | None:
    return None if kept[0] == 0 else "Keep block 0"


def _keep_injected(row: Constraint, situation: Situation, kept: Sequence[int]) -> str | None:
    """Features enter after the first blocks, one set each."""
    blocks = _injected(row, situation)
    return None if list(kept[: len(blocks)]) == blocks else f"Keep blocks {blocks}"


def _shallower(row: Constraint, situation: Situation, kept: Sequence[int]) -> str | None:
    """The other stack must not become deeper than this one."""
    other = situation.fields[row.field]
    return None if len(kept) >= other else f"Keep at least {other} blocks, or prune the decoder first"


def _keep_last(_row: Constraint, situation: Situation, kept: Sequence[int]) -> str | None:
    last = situation.num_blocks - 1
    return None if kept[-1] == last else f"Keep block {last}"


def _last_is(row: Constraint, situation: Situation, kept: Sequence[int]) -> str | None:
    """The last block of the result must be of a certain kind."""
    kinds = situation.fields[row.field]
    if kinds[kept[-1]] in row.values:
        return None
    return f"Keep the last of blocks {_of_kind(row, situation)}, or remove all blocks behind another one of them"


def _keep_one(row: Constraint, situation: Situation, kept: Sequence[int]) -> str | None:
    of_kind = _of_kind(row, situation)
    if not of_kind or set(of_kind) & set(kept):
        return None
    return f"Keep at least one of blocks {of_kind}"


def _keep_other(row: Constraint, situation: Situation, kept: Sequence[int]) -> str | None:
    """At least one block of a kind that is not among the row's values must stay, if there is any."""
    others = _of_other_kinds(row, situation)
    return None if not others or set(others) & set(kept) else f"Keep at least one of blocks {others}"


def _same_groups(row: Constraint, situation: Situation, kept: Sequence[int]) -> str | None:
    """Every group of consecutive blocks must stay one, at its place; the last one may become shorter."""
    size = situation.fields[row.field]
    same = all(new // size == old // size for new, old in enumerate(kept))
    if same and -(-len(kept) // size) == -(-situation.num_blocks // size):
        return None
    return f"Groups of {size} consecutive blocks have to stay whole; only the last group may lose its last blocks"


def _producers(row: Constraint, situation: Situation, kept: Sequence[int]) -> str | None:
    """Every kind among the kept sharing blocks must keep the block that its keys and values come from."""
    sources = _sources(row, situation)
    lost = sorted({sources[block] for block in kept if block in sources} - set(kept))
    return f"Keep block {lost[0]}, or remove all blocks that read from it" if lost else None


def _nearest(row: Constraint, situation: Situation, kept: Sequence[int]) -> str | None:
    kinds = situation.fields[row.field]
    source: dict[int, int | None] = {}
    last = None
    for block in range(situation.num_blocks):
        last = last if kinds[block] in row.values else block
        source[block] = last
    kept_source = None
    for block in kept:
        kept_source = kept_source if kinds[block] in row.values else block
        if kept_source != source[block]:
            return f"Keep block {source[block]}, which block {block} reads from"
    return None


def _injected(row: Constraint, situation: Situation) -> list[int]:
    return list(range(min(len(situation.at_root(row.root_field)), situation.num_blocks)))


def _of_kind(row: Constraint, situation: Situation) -> list[int]:
    """Blocks whose entry in a list of kinds is among the row's values, or that a list of numbers names."""
    entries = situation.fields[row.field]
    if not row.values:
        return sorted(entries)
    return [block for block in range(situation.num_blocks) if entries[block % len(entries)] in row.values]


def _of_other_kinds(row: Constraint, situation: Situation) -> list[int]:
    """Empty where there are no blocks of the row's kinds at all: then there is nothing to keep them apart from."""
    of_kind = set(_of_kind(row, situation))
    return [block for block in range(situation.num_blocks) if block not in of_kind] if of_kind else []


def _sources(row: Constraint, situation: Situation) -> dict[int, int]:
    """For every block that shares keys and values: the last block of its kind before the sharing ones."""
    kinds = situation.fields.get("layer_types") or [""] * situation.num_blocks
    first = situation.num_blocks - situation.fields[row.field]
    last_of = {kinds[block]: block for block in range(first)}
    return {block: last_of[kinds[block]] for block in range(first, situation.num_blocks) if kinds[block] in last_of}


CONSTRAINTS: Mapping[str, Callable[[Constraint, Situation, Sequence[int]], str | None]] = {
    "refuse": _refuse,
    "refuse_period": _refuse_period,
    "tail_only": _tail_only,
    "keep_first": _keep_first,
    "keep_injected": _keep_injected,
    "not_below": _shallower,
    "keep_last": _keep_last,
    "last_is": _last_is,
    "keep_one": _keep_one,
    "keep_other": _keep_other,
    "same_groups": _same_groups,
    "producers": _producers,
    "nearest": _nearest,
}


# --- what a search must leave alone --------------------------------------------------------------------------------


def _read_from(row: Constraint, situation: Situation) -> list[int]:
    """Blocks that block behind them reads from: 'full' ones that a 'shared' one follows."""
    kinds = situation.fields[row.field]
    return [
        block
        for block in range(situation.num_blocks - 1)
        if kinds[block] not in row.values and kinds[block + 1] in row.values
    ]


_PROTECTED: Mapping[str, Callable[[Constraint, Situation], Collection[int]]] = {
    "keep_first": lambda _row, _situation: [0],
    "keep_injected": _injected,
    "keep_last": lambda _row, situation: [situation.num_blocks - 1],
    "last_is": lambda row, situation: _of_kind(row, situation)[-1:],
    "keep_one": lambda row, situation: _of_kind(row, situation)[-1:],
    "keep_other": lambda row, situation: _of_other_kinds(row, situation)[-1:],
    "producers": lambda row, situation: sorted(set(_sources(row, situation).values())),
    "nearest": _read_from,
}


def raise_if_broken(situation: Situation, kept: Sequence[int], subject: str) -> None:
    """Raises `UnsupportedModelError` when the blocks `kept` break a constraint."""
    problem = broken(situation, kept)
    if problem is not None:
        raise UnsupportedModelError(f"{subject} cannot lose these blocks exactly: {problem}.")
