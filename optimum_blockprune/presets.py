# SPDX-License-Identifier: Apache-2.0
"""Names that stand for several fields of a recipe. A configuration keeps the fields, not the name.

What `auto` means may change with evidence (see `benchmarks/quality.py`); a saved configuration does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .recipe import Recipe


AUTO = "auto"
# Tokens of text from which on none is written, and windows that are for each given one. Our choice.
_ENOUGH, _MOST_WRITTEN = 2**15, 3


def spelt_out(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with what `strategy="auto"` stands for.

    That is `search`, and ridge compensation where none is named, fitted on text of the model's own as well where there
    is little.

    Args:
        values: Fields of a recipe by name.
    """
    if values.get("strategy") != AUTO:
        return dict(values)
    asked = values.get("compensation", Recipe.compensation)
    compensation = "ridge" if asked == Recipe.compensation else asked
    generated = values.get("generated_samples")
    if generated is None:
        generated = _lacking(*(values.get(name, getattr(Recipe, name)) for name in ("num_samples", "seqlen")))
    return {**values, "strategy": "search", "compensation": compensation, "generated_samples": generated}


def _lacking(num_samples: Any, seqlen: Any) -> int | None:
    """Windows that are to be written beside those that are given, if any; what is no number is refused elsewhere."""
    if not all(isinstance(value, int) and value > 0 for value in (num_samples, seqlen)):
        return None
    return max(0, min(_MOST_WRITTEN * num_samples, -(-_ENOUGH // seqlen) - num_samples)) or None
