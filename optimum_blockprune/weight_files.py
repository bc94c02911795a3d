# SPDX-License-Identifier: Apache-2.0
"""Whether the files of a checkpoint are whole, found out without reading a weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import CheckpointError


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def json_object(path: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Raises:
        CheckpointError: It does not.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"'{path}' is not a JSON file: {error}. Prune again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"'{path}' holds no JSON object. Prune again.")
    return found


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
        names = sorted(set(json_object(folder / INDEX).get("weight_map", {}).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise CheckpointError(
            f"'{folder}' is not whole: it lacks the weights {', '.join(missing or ['that its index should name'])}. "
            "Prune again, or copy the folder again."
        )
    return [folder / name for name in names]


def _check_size(path: Path) -> None:
    """Compares the size of a safetensors file with what its header says: a copy or a write may have been cut short."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= size else None
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        whole = size == 8 + length + max(ends, default=0)
    except (ValueError, AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(f"'{path}' is not whole: its size does not fit its header. Prune again, or copy again.")
