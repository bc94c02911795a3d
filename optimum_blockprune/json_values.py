# SPDX-License-Identifier: Apache-2.0
"""JSON that somebody else wrote: read with our errors, and held against the types that a dataclass declares.

`json` itself raises `RecursionError` for deep nesting and `ValueError` for numbers of thousands of digits; whatever it
lets through, any value may stand where a field expects another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from reprlib import repr as shortened
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from .errors import BlockPruningError


# Our choice: the files of this package are less than ten levels deep, and code that copies a value level by level
# (`dataclasses.asdict`, `copy.deepcopy`) gives up at some hundreds.
MAX_DEPTH = 64
_TOO_DEEP = f"it is nested more than {MAX_DEPTH} levels deep"

_WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", NoneType: "null"}


def read_json(path: Path, error: type[BlockPruningError], remedy: str = "") -> Any:
    """Reads a JSON file.

    Args:
        path: The file.
        error: What to raise.
        remedy: Ends the message.

    Raises:
        BlockPruningError: As `error`: the file cannot be read, is no JSON, or nested too deeply.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        fault = json_fault(found)
    except RecursionError:
        fault = _TOO_DEEP
    except (OSError, ValueError) as cause:
        raise error(f"'{path}' is not a JSON file: {cause}.{remedy}") from cause
    if fault is not None:
        raise error(f"'{path}' is not a JSON file that this tool reads: {fault}.{remedy}")
    return found


def json_fault(value: Any) -> str | None:
    """Says why a value cannot be copied and written again (depth, half a character); `None` if it can."""
    level = [value]
    for _ in range(MAX_DEPTH):
        if any(isinstance(each, str) and not _is_text(each) for each in level):
            return "a string in it holds half of a character (a lone surrogate), which no file can hold"
        level = [each for outer in level if isinstance(outer, (dict, list, tuple)) for each in _inner(outer)]
        if not level:
            return None
    return _TOO_DEEP


def _inner(outer: Any) -> Iterator[Any]:
    if isinstance(outer, dict):
        yield from outer.keys()
        yield from outer.values()
    else:
        yield from outer


def _is_text(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def misfit(instance: Any) -> str | None:
    """Names the first field of a dataclass whose value is not of the declared type; `None` if all are.

    A list will do for a tuple and a whole number for a number, as JSON has it; `True` is no number.
    """
    hints = _hints(type(instance))
    for each in fields(instance):
        value = getattr(instance, each.name)
        if not fits(value, hints[each.name]):
            return f"'{each.name}' must be {spelled_type(hints[each.name])}, not {shortened(value)}"
    return None


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a declared type, containers with all that is in them."""
    if hint is Any:
        return True
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if kind in (tuple, list):
        return isinstance(value, (tuple, list)) and all(fits(each, inner[0]) for each in value)
    if kind in (dict, Mapping):
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return finite([value])  # an int may be larger than any float
    if hint in (int, float):
        return isinstance(value, hint) and not isinstance(value, bool)
    return isinstance(value, hint)


def spelled_type(hint: Any) -> str:
    """A declared type in words, as JSON calls it."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(map(spelled_type, inner))
    if kind in (tuple, list, dict, Mapping):
        whole, part = ("a list", inner[0]) if kind in (tuple, list) else ("an object", inner[1])
        return whole if part is Any else f"{whole} ({spelled_type(part)} each)"
    return _WORDS.get(hint, "an object")


def finite(values: Any) -> bool:
    """Whether all of some numbers are finite ones that a float can hold."""
    try:
        return all(map(math.isfinite, values))
    except OverflowError:
        return False


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
