# SPDX-License-Identifier: Apache-2.0
"""Pruned toys to be healed, and text from which even a toy learns within a few steps."""

from __future__ import annotations

from typing import Any

import torch
from toys import toy_pruner
from transformers import PreTrainedModel

from optimum_blockprune import BlockPruner, PruningPlan


# Quick on a toy, whose weights are random.
QUICK = {"steps": 12, "learning_rate": 2e-2, "seqlen": 16, "num_samples": 40, "batch_size": 4, "rank": 4}


def cycles(words: int = 700, first: int = 11) -> list[str]:
    """Text of eleven words from `first` on in which every word tells the next one."""
    return [" ".join(f"w{first + n % 11}" for n in range(words))]


def pruned_toy(family: str = "llama", **fields: Any) -> BlockPruner:
    """A pruner whose toy has lost blocks 2 and 3 of 6."""
    pruner = toy_pruner(family, **fields)
    pruner.prune(plan=PruningPlan.from_blocks(pruner.model, [2, 3]))
    return pruner


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A copy of all weights."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
