# SPDX-License-Identifier: Apache-2.0
"""Hostile JSON for the fuzz tests: any value at all, or a good file with a few places changed for the worse."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


# The same examples on every machine, and nothing is kept between runs.
FUZZ = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

NUMBERS = st.sampled_from([-1, 0, 1, 2, -(2**31), 2**31, 2**63, 10**18, 10**300, math.nan, math.inf, -math.inf, 0.5])
NAMES = st.sampled_from(
    ["", "../secret", "/etc/passwd", "a/../../b", "\0", "\ud800", "self", "__class__", "strategy", "x" * 300, "-1"]
    + ["0-999999999999", "9" * 4000, "5-2", "\n\x1b[31m", "NaN", "<script>", "..\\x", "C:\\x.safetensors"]
)
SCALARS = st.none() | st.booleans() | NUMBERS | NAMES | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def nested(depth: int, kind: str = "list") -> Any:
    """A value so many levels deep."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


DEEP = st.builds(nested, st.sampled_from([63, 70, 150]), st.sampled_from(["list", "dict"]))
HOSTILE = st.one_of(VALUES, VALUES, VALUES, DEEP)


def places(value: Any, *here: Any) -> list[tuple[Any, ...]]:
    """The path of everything inside a JSON value, a dozen levels deep at most."""
    if len(here) > 12:
        return []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, each in inner for path in [(*here, key), *places(each, *here, key)]]


@st.composite
def mutated(draw: st.DrawFn, good: Any, values: st.SearchStrategy[Any] = HOSTILE) -> Any:
    """A good JSON object with one to three places replaced, removed, repeated, negated or added."""
    data = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        found = places(data)
        if not found:
            break
        *path, last = draw(st.sampled_from(found))
        parent = data
        for key in path:
            parent = parent[key]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "repeat", "negate", "add"]))
        if kind == "remove":
            del parent[last]
        elif kind == "repeat" and isinstance(parent, list):
            parent.insert(last, parent[last])
        elif kind == "negate" and isinstance(parent[last], (int, float)):
            parent[last] = -parent[last] - 1
        elif kind == "add" and isinstance(parent, dict):
            parent[draw(NAMES)] = draw(values)
        else:
            parent[last] = draw(values)
    return data


def spoiled(text: bytes) -> st.SearchStrategy[bytes]:
    """A file cut short, with bytes that are no UTF-8, with numbers or nesting that `json` itself gives up on."""
    cut = st.integers(0, len(text) - 1).map(lambda end: text[:end])
    broken = st.integers(0, len(text) - 1).map(lambda at: text[:at] + b"\xff\xfe\0" + text[at:])
    fixed = [b"", b"\0", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000, b"NaN", b'"\\ud800"']
    return st.one_of(cut, broken, st.sampled_from(fixed), st.binary(max_size=20))


def written(value: Any) -> bytes:
    """A value as the bytes of a file; deeper than `json.dumps` goes, too."""
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 3000 + b"]" * 3000
