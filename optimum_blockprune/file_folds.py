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
from .folds import Fold
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


def bytes_beside(source: Source, plan: PruningPlan) -> int:
    """What the maps of a plan take on the disk beside the weights: the maps, and copies of the tensors that change."""
    changed = (_stored(source, each.block, f"{each.module}.{name}") for each, name in _changes(plan))
    return plan.folds.num_bytes + sum(stored.num_bytes for stored in changed if stored is not None)


def folded_tensors(source: Source, plan: PruningPlan, folder: Path) -> dict[str, StoredTensor]:
    """Writes the tensors that change into `folder`, an existing one, and returns them by their stored name."""
    maps, found = plan.folds.tensors(), {}
    for number, (each, name) in enumerate(_changes(plan)):
        stored = _stored(source, each.block, f"{each.module}.{name}")
        if stored is None:
            continue
        before = found.get(stored.name, stored)
        with safe_open(before.file, framework="pt") as file:
            value = folded(file.get_tensor(stored.name), each, maps[each.tensor], name)
        target = folder / str(number)
        save_file({stored.name: value}, target)
        found[stored.name] = read_file(target).tensors[0]
    return found


def _changes(plan: PruningPlan) -> list[tuple[Fold, str]]:
    """Maps in their order, each with what it changes of its module."""
    return [(each, name) for each in plan.folds.entries for name in ("weight", "bias") if touches(each, name)]


def _stored(source: Source, block: int, name: str) -> StoredTensor | None:
    names = (f"{path}.{block}.{name}" for path in source.lists)
    return next((source.weights.tensors[each] for each in names if each in source.weights.tensors), None)
