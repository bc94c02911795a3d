# SPDX-License-Identifier: Apache-2.0
"""Writes safetensors files from byte ranges of others; see `tensors`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .copying import PAGE_BYTES
from .tensors import BUFFER_BYTES, INDEX_FILE, WEIGHTS_FILE, Shard, StoredTensor, StoredWeights


# Files written at a time (our choice): one thread does not fill a fast disk.
_WRITERS = 2


def write_weights(
    weights: StoredWeights, folder: Path, *, num_parameters: int, advance: Callable[[], Any] = lambda: None
) -> None:
    """Copies the byte ranges of `weights` into new files in `folder`, one file for every shard.

    Args:
        weights: From `read_weights` and `renamed`.
        folder: An existing folder.
        num_parameters: Replaces this number in the index, where the source says one.
        advance: Called after every tensor.
    """
    if weights.index is None:
        _write_shard(folder / WEIGHTS_FILE, weights.shards[0], advance)
        return
    count = len(weights.shards)
    files = {f"model-{number:05d}-of-{count:05d}.safetensors": each for number, each in enumerate(weights.shards, 1)}
    _write_shards({folder / file: shard for file, shard in files.items()}, advance)
    weight_map = {tensor.name: file for file, shard in files.items() for tensor in shard.tensors}
    metadata = {**weights.index, "total_size": weights.num_bytes}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = num_parameters
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shards(shards: dict[Path, Shard], advance: Callable[[], Any]) -> None:
    """Writes some files at a time; after an error in one of them, or Ctrl-C, the others end after their tensor."""
    stop = threading.Event()

    def step() -> None:
        if stop.is_set():
            raise CancelledError
        advance()

    with ThreadPoolExecutor(_WRITERS) as pool:
        written = [pool.submit(_write_shard, file, shard, step) for file, shard in shards.items()]
        try:
            for each in as_completed(written):
                each.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write_shard(file: Path, shard: Shard, advance: Callable[[], Any]) -> None:
    # Wide elements first, as the library does: every tensor then begins at a multiple of its element's size.
    tensors = sorted(shard.tensors, key=lambda tensor: (-tensor.element_bits, tensor.start))
    buffer = memoryview(bytearray(BUFFER_BYTES))
    with file.open("wb") as target, ExitStack() as opened:
        sources = {path: opened.enter_context(path.open("rb")) for path in {tensor.file for tensor in tensors}}
        target.write(_header(tensors, shard.metadata, tensors[0].start))
        for tensor in tensors:
            tensor.copy(sources[tensor.file], target, buffer)
            advance()


def _header(tensors: list[StoredTensor], metadata: dict[str, str], like: int) -> bytes:
    """The header of a file whose tensors begin at the same place within a page as byte `like` (see `copying`)."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The format asks for spaces up to a multiple of 8; a cut tensor may come from anywhere.
    text += b" " * ((like - 8 - len(text)) % PAGE_BYTES if like % 8 == 0 else -len(text) % 8)
    return len(text).to_bytes(8, "little") + text
