# SPDX-License-Identifier: Apache-2.0
"""Names that stand for several fields of a recipe. A configuration keeps the fields, not the name.

What `auto` means may change with evidence (see `benchmarks/quality.py`); a saved configuration does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .recipe import Recipe


AUTO = "auto"


def spelt_out(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with what `strategy="auto"` stands for.

    That is `search`, and ridge compensation where none is named.

    Args:
        values: Fields of a recipe by name.
    """
    if values.get("strategy") != AUTO:
        return dict(values)
    asked = values.get("compensation", Recipe.compensation)
    compensation = "ridge" if asked == Recipe.compensation else asked
    return {**values, "strategy": "search", "compensation": compensation}
