# SPDX-License-Identifier: Apache-2.0
"""Puts what a plan folds into weights into copies of stored tensors, one at a time.

The tensors of a checkpoint are copied as bytes; those few that change are computed as in memory, written into files of
their own, and copied from there.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from .errors import UnsupportedModelError
from .folding import folded, touches
from .plan import PruningPlan
from .source import Source
from .tensors import StoredTensor, read_file


def refuse_unfolded(source: Source, plan: PruningPlan) -> None:
    """Raises `UnsupportedModelError` where the files have no tensor of the name that a map goes into."""
    for each in plan.folds.entries:
        if _stored(source, each.block, f"{each.module}.weight") is None:
            raise UnsupportedModelError(
                f"{source.model.config.model_type}: its files have no tensor '{each.module}.weight' of block "
                f"{each.block} to fold statistics into. Prune it in memory, with BlockPruner.prune(plan=...)."
            )


def folded_tensors(source: Source, plan: PruningPlan, folder: Path) -> dict[str, StoredTensor]:
    """Writes the tensors that change into `folder`, an existing one, and returns them by their stored name."""
    maps, found = plan.folds.tensors(), {}
    for number, each in enumerate(plan.folds.entries):
        for name in ("weight", "bias"):
            stored = _stored(source, each.block, f"{each.module}.{name}")
            if stored is None or not touches(each, name):
                continue
            before = found.get(stored.name, stored)
            with safe_open(before.file, framework="pt") as file:
                value = folded(file.get_tensor(stored.name), each, maps[each.tensor], name)
            target = folder / f"{number}-{name}"
            save_file({stored.name: value}, target)
            found[stored.name] = read_file(target).tensors[0]
    return found


def _stored(source: Source, block: int, name: str) -> StoredTensor | None:
    names = (f"{path}.{block}.{name}" for path in source.lists)
    return next((source.weights.tensors[each] for each in names if each in source.weights.tensors), None)
