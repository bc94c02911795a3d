# SPDX-License-Identifier: Apache-2.0
"""Configurations of transformers by their type, and what a removal changes in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING

from optimum_blockprune.architectures import Layout, layout_for
from optimum_blockprune.plan import PruningPlan


newest = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="the table names fields of transformers 5.23"
)


def layout_of(model_type: str, stack: str | None = None, **fields: Any) -> Layout:
    """The layout of the class's default configuration with other `fields`."""
    return layout_for(CONFIG_MAPPING[model_type](**fields), stack)


def removal(layout: Layout, removed: Sequence[int]) -> PruningPlan:
    """The plan for it, not held to the architecture."""
    return PruningPlan.from_removed(layout.model_type, layout.num_blocks, removed, stack=layout.stack)


def changes(model_type: str, removed: Sequence[int], stack: str | None = None, **fields: Any) -> dict[str, Any]:
    """New values of the fields that follow; the depth among them."""
    layout = layout_of(model_type, stack, **fields)
    return layout.changes(removal(layout, removed))
