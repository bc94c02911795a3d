# SPDX-License-Identifier: Apache-2.0
"""A search context without a pruner around it."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from optimum_blockprune.batches import CalibrationWindows
from optimum_blockprune.runner import BlockRunner
from optimum_blockprune.strategies.base import NoOptions, SearchContext


def context_of(model: PreTrainedModel, windows: CalibrationWindows, **changes: Any) -> SearchContext:
    """One block may go, any of them; two windows at a time."""
    runner = BlockRunner(model)
    values = {
        "options": NoOptions(),
        "num_remove": 1,
        "removable": tuple(range(runner.num_blocks)),
        "batch_size": 2,
        "seed": 0,
        "progress": lambda total, description: tqdm(total=total, desc=description, disable=True),
        "provenance": {"model_type": model.config.model_type, "strategy": "test"},
    }
    return SearchContext(runner=runner, windows=windows, **{**values, **changes})
