# SPDX-License-Identifier: Apache-2.0
"""Whether the files of a checkpoint are whole, found out without reading a weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .json_values import read_json


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# The library reads no longer header, and file systems have no longer names.
_MAX_HEADER, _MAX_NAME = 100_000_000, 255


def json_object(path: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Raises:
        CheckpointError: It does not.
    """
    found = read_json(path, CheckpointError, "")
    if not isinstance(found, dict):
        raise CheckpointError(f"'{path}' holds no JSON object.")
    return found


def read_index(file: Path) -> dict[str, Any]:
    """Reads an index of weights: `weight_map`, the file of every tensor, and `metadata`, which may be missing.

    Raises:
        CheckpointError: It is malformed, or names anything but safetensors files beside it.
    """
    index = read_json(file, CheckpointError)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"'{file}' has no 'weight_map' that says which file holds which tensor.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            raise CheckpointError(
                f"'{file}' places tensor '{name}' in {shard!r}; only safetensors files in the same folder are read."
            )
    if not isinstance(index.get("metadata") or {}, dict):
        raise CheckpointError(f"The 'metadata' of '{file}' is no JSON object; get the complete checkpoint.")
    return index


def _is_plain(shard: str) -> bool:
    """A name that leaves the folder would read files that belong to no checkpoint; some are no names at all."""
    plain = shard.endswith(".safetensors") and shard.isprintable() and not set(shard) & set("/\\:")
    return plain and len(shard.encode()) <= _MAX_NAME


def check_weights(folder: Path) -> None:
    """Refuses a folder that lacks weights, or holds a file that was cut short.

    Raises:
        CheckpointError: See above.
    """
    for path in _weight_files(folder):
        _check_size(path)


def _weight_files(folder: Path) -> list[Path]:
    """The one file of weights, or all that the index names."""
    names = [WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(read_index(folder / INDEX)["weight_map"].values()))
        except CheckpointError as error:
            raise CheckpointError(
                f"'{folder}' is not whole: it lacks the weights that its index should name ({error}). Prune again, or "
                "copy the folder again."
            ) from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"'{folder}' is not whole: it lacks the weights {', '.join(missing)}. Prune again, or copy the folder "
            "again."
        )
    return [folder / name for name in names]


def _check_size(path: Path) -> None:
    """Compares the size of a safetensors file with what its header says: a copy or a write may have been cut short."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= min(size, _MAX_HEADER) else None
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        whole = size == 8 + length + max(ends, default=0)
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(f"'{path}' is not whole: its size does not fit its header. Prune again, or copy again.")
