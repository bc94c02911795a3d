# SPDX-License-Identifier: Apache-2.0
"""Which values the entries of a report have, so that a card, a page or a picture can be made of any report read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .json_values import fits, misfit, spelled_type


# Our choice, far above any model: pictures and tables have a place for every block.
MAX_BLOCKS = 2**16

_FIGURE, _TEXT = float | None, str | None
_LANGUAGES = list[str] | str | None


def _all(hint: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), hint)


# What is known of each field's entries; names that are not here are shown as they are.
_GENERATION = _all(float, "continuations prompt_tokens new_tokens repetition distinct_2")
_GENERATION_MORE = _all(_FIGURE, "distinct_1 distinct_3 tokens")
_TEXTS = {"source": str, "fingerprint": _TEXT, "tokens": float}
_CALIBRATION = _TEXTS | {"recipe": _TEXT} | _all(_FIGURE, "windows seqlen")
_EVALUATION = (
    _TEXTS
    | {"label": _TEXT}
    | _all(_FIGURE, "windows seqlen stride nll perplexity kl blocks parameters size_bytes removed")
    | _all(_FIGURE, "prefill_tokens_per_second decode_tokens_per_second")
    | {"generation": Mapping[str, Any] | None}
)
_UNITS, _COUNTS = Mapping[str, Mapping[str, float]], _all(float, "before after")
_ACHIEVED = _all(_FIGURE, "blocks_before blocks_after blocks_removed padding_parameters") | {"units": _UNITS}
_ACHIEVED |= _all(_FIGURE, "parameters_before parameters_after parameters_removed") | {"layout": _TEXT}
_ACHIEVED |= _all(_FIGURE, "size_bytes_before size_bytes_after size_bytes_removed")
_BASE = _all(_TEXT, "model revision license_name license_link card gguf_file subfolder")
_BASE |= {"license": _LANGUAGES, "language": _LANGUAGES}
_TASK = {"task": str} | _all(_TEXT, "label primary source dataset") | _all(_FIGURE, "samples num_fewshot")
_HISTORY = _all(_TEXT, "strategy base_model") | {"removed_blocks": list[int] | None, "num_blocks": _FIGURE}
_HISTORY |= {"versions": Mapping[str, Any] | None, "units": _UNITS | None}
_HEALING = {"method": str, "kept": bool, "source": str, "steps": float}
_HEALING |= _all(_FIGURE, "tokens seconds perplexity_before perplexity_after held_out_windows windows seqlen")
_HEALING |= _all(_TEXT, "fingerprint teacher command") | {"settings": Mapping[str, Any] | None}
_STEP = _all(_FIGURE, "loss perplexity") | {"block": int | str | None}
_WIDTH = {"units": list[int | None] | float | None, "kept": list[int | None] | None}

_OBJECTS = {"achieved": _ACHIEVED, "calibration": _CALIBRATION, "base": _BASE, "verification": _all(_TEXT, "mode")}
_LISTS = {"evaluations": _EVALUATION, "depths": _EVALUATION, "history": _HISTORY, "steps": _STEP}
_LISTS |= {"healing": _HEALING}
_LISTS |= {"task_results": {**_TASK, "metrics": Mapping[str, float | None]}}
_NEEDED = {"task_results": ("task",), "healing": ("method", "kept", "source", "steps")}
_MAPPINGS = {"runtimes": _all(_TEXT, "verdict reason"), "widths": _WIDTH}


def report_fault(report: Any) -> str | None:
    """Names the first value of a `PruningReport` that is not of the documented type; `None` if all are."""
    return misfit(report) or next(_faults(report), None)


def _faults(report: Any) -> Iterator[str]:
    for field, hints in _OBJECTS.items():
        yield from _misfits(getattr(report, field) or {}, hints, field)
    for field, hints in _LISTS.items():
        for entry in getattr(report, field):
            yield from _misfits(entry, hints, field, _NEEDED.get(field, ()))
    for units in (each.get("units") or {} for each in (report.achieved, *report.history)):
        for family, counts in units.items():
            yield from _misfits(counts, _COUNTS, f"units of {family!r}", tuple(_COUNTS))
    for field, hints in _MAPPINGS.items():
        for name, entry in getattr(report, field).items():
            yield from _misfits(entry, hints, f"{field} {name!r}")
    for entry in (*report.evaluations, *report.depths):
        if entry.get("generation"):
            yield from _misfits(entry["generation"], _GENERATION_MORE, "generation")
            yield from _misfits(entry["generation"], _GENERATION, "generation", tuple(_GENERATION))
    numbers = [*report.removed_blocks, *(report.achieved.get(f"blocks_{when}") or 0 for when in ("before", "after"))]
    halves = [name.partition(".")[0] for name in report.removed_halves]
    if not all(block.isdigit() and _numbers_a_block(block) for block in halves):
        yield "half-blocks are named '4.attention' or '4.mlp'"
    candidates = [step["candidates"] for step in report.steps if isinstance(step.get("candidates"), Mapping)]
    names = [name for scores in (report.scores, *candidates) for name in scores if name.isdigit()]
    if not all(0 <= number < MAX_BLOCKS for number in numbers) or not all(map(_numbers_a_block, names)):
        yield f"block numbers are whole numbers from 0 to {MAX_BLOCKS - 1}"


def _misfits(entry: Any, hints: Mapping[str, Any], place: str, needed: tuple[str, ...] = ()) -> Iterator[str]:
    """The known values of one entry that are of another type, or missing though they are needed."""
    if not isinstance(entry, Mapping):
        yield f"an entry of '{place}' is no object"
        return
    for name, hint in hints.items():
        if (name in entry or name in needed) and not fits(entry.get(name), hint):
            yield f"'{name}' of '{place}' must be {spelled_type(hint)}"


def _numbers_a_block(name: str) -> bool:
    return name.isascii() and len(name) <= len(str(MAX_BLOCKS)) and int(name) < MAX_BLOCKS
