# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a stack are of one kind, so that what holds for one of them holds for all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def kinds_of(blocks: nn.ModuleList) -> list[list[int]]:
    """Blocks that are alike in all but their numbers and weights: shapes, windows, kinds, thresholds."""
    traits = [dict(_traits(block)) for block in blocks]
    # What equals the block's number in every block is its number; the same value in some is chance.
    said_by_some = {
        name
        for number, each in enumerate(traits)
        for name, value in each.items()
        if type(value) is not int or value != number
    }
    kinds: dict[Any, list[int]] = {}
    for number, block in enumerate(blocks):
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in block.named_parameters())
        said = tuple((name, value) for name, value in traits[number].items() if name in said_by_some)
        kinds.setdefault((shapes, said), []).append(number)
    return list(kinds.values())


def _traits(block: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in block.named_modules():
        for name, value in vars(module).items():
            if type(value) in (bool, int, float, str) and not name.startswith("_"):
                yield f"{path}.{name}", value
