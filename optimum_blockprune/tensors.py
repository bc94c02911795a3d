# SPDX-License-Identifier: Apache-2.0
"""Safetensors files as byte ranges: read what lies where, rename, cut, copy. No tensor is ever built.

`save_file` of the library takes a whole file's tensors in memory, which is what a checkpoint larger than the memory
does not allow; so `weight_writing` copies byte ranges. Reading trusts the library: `safe_open` checks the header
(offsets, sizes, dtypes, length of the file) before a byte range is taken from it.

Covers `model.safetensors` and `model.safetensors.index.json` with its shards, the two layouts that transformers loads
without further arguments. Does not cover variants (`model.fp16.safetensors`) or any other format of weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from .copying import append_range
from .cuts import Cut
from .errors import CheckpointError
from .weight_files import read_index


WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Formats that are recognised in order to say what to do with them.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt")

# Fits a core's cache: copies through 16 MiB take five times as long.
BUFFER_BYTES = 512 * 2**10


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its name, and the byte range that holds it.

    Attributes:
        name: Its name.
        dtype: As the header spells it (`BF16`).
        shape: After the cut, if there is one.
        file: The file.
        start: Where the range begins in the file.
        num_bytes: Size of the tensor, after the cut.
        cut: Which part of the range makes up the tensor; `None` for all of it.
        stored_shape: The shape in the file, where `cut` has changed it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    num_bytes: int
    cut: Cut | None = None
    stored_shape: tuple[int, ...] | None = None

    @property
    def element_bits(self) -> int:
        """Size of an element; 0 for a tensor without elements."""
        count = prod(self.shape)
        return self.num_bytes * 8 // count if count else 0

    def cut_to(self, cut: Cut) -> StoredTensor:
        """Returns the part of the tensor that `cut` keeps.

        Raises:
            CheckpointError: The cut does not fit, the tensor was cut before, or its elements cannot be told apart.
        """
        if self.cut is not None:
            raise CheckpointError(f"Tensor '{self.name}' was cut already; make one cut of the two.")
        cut.check(self.shape, self.name)
        shape = cut.shape(self.shape)
        if self.element_bits % 8:
            raise CheckpointError(
                f"Tensor '{self.name}' cannot be cut: its {self.dtype} elements share bytes ({self.element_bits} bits "
                "each)."
            )
        if prod(shape) and not self.element_bits:
            raise CheckpointError(f"Tensor '{self.name}' of shape {list(self.shape)} has no elements to cut from.")
        num_bytes = prod(shape) * self.element_bits // 8
        return replace(self, shape=shape, num_bytes=num_bytes, cut=cut, stored_shape=self.shape)

    def copy(self, source: BinaryIO, target: BinaryIO, buffer: memoryview) -> None:
        """Appends the tensor's bytes to `target`."""
        begin = append_range(source, target, self.start, self.num_bytes) if self.cut is None else 0
        for chunk in self.chunks(source, buffer, begin):
            target.write(chunk)

    def chunks(self, source: BinaryIO, buffer: memoryview, begin: int = 0) -> Iterator[memoryview]:
        """Reads the tensor's bytes from its open file through `buffer`; each chunk is valid until the next.

        Args:
            source: The file.
            buffer: Where chunks lie.
            begin: Bytes to leave out, of a tensor that is not cut.
        """
        read = partial(self._read, source)
        if self.cut is not None and self.stored_shape is not None:
            yield from self.cut.chunks(self.stored_shape, self.element_bits // 8, read=read, buffer=buffer)
            return
        for offset in range(begin, self.num_bytes, len(buffer)):
            chunk = buffer[: self.num_bytes - offset]
            read(offset, chunk)
            yield chunk

    def _read(self, source: BinaryIO, offset: int, target: memoryview) -> None:
        """Fills `target` with the bytes of the range from `offset` on."""
        source.seek(self.start + offset)
        while target:
            count = source.readinto(target)
            if not count:
                raise CheckpointError(f"'{self.file}' ends inside tensor '{self.name}': it changed while being read.")
            target = target[count:]


@dataclass(frozen=True)
class Shard:
    """One file: its tensors, and the strings under `__metadata__` (`{"format": "pt"}`)."""

    tensors: tuple[StoredTensor, ...]
    metadata: dict[str, str]


@dataclass(frozen=True)
class StoredWeights:
    """All weights of a checkpoint.

    Attributes:
        shards: The files, in the order of their names.
        index: The `metadata` of the index; `None` for a single `model.safetensors`.
    """

    shards: tuple[Shard, ...]
    index: dict[str, Any] | None

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by its name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def exchanged(self, others: Mapping[str, StoredTensor]) -> StoredWeights:
        """Returns the same tensors, some of them from elsewhere, by name."""
        shards = (
            Shard(tuple(others.get(tensor.name, tensor) for tensor in shard.tensors), shard.metadata)
            for shard in self.shards
        )
        return StoredWeights(tuple(shards), self.index)

    def renamed(
        self, rename: Callable[[str], str | None], cut: Callable[[str], Cut | None] = lambda name: None
    ) -> StoredWeights:
        """Returns the same byte ranges, or parts of them, under new names.

        Args:
            rename: The new name for an old one; `None` drops the tensor, and a file that is left empty goes.
            cut: What is kept of the tensor with this old name; `None` leaves it as it is.

        Raises:
            CheckpointError: A cut does not fit its tensor; see `StoredTensor.cut_to`.
        """
        shards = []
        for shard in self.shards:
            kept = []
            for tensor in shard.tensors:
                name = rename(tensor.name)
                if name is not None:
                    part = cut(tensor.name)
                    # Cut under its old name: an error names what the user finds in the file.
                    kept.append(replace(tensor if part is None else tensor.cut_to(part), name=name))
            if kept:
                shards.append(Shard(tuple(kept), shard.metadata))
        return StoredWeights(tuple(shards), self.index)


def read_weights(folder: Path) -> StoredWeights:
    """Reads the headers of a checkpoint's files, and nothing else of them.

    Raises:
        CheckpointError: The weights are in another format, incomplete or malformed.
    """
    # In this order transformers looks for them, too.
    if (folder / WEIGHTS_FILE).is_file():
        return StoredWeights((read_file(folder / WEIGHTS_FILE),), None)
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(_no_weights(folder))
    index = read_index(folder / INDEX_FILE)
    files = sorted(set(index["weight_map"].values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(f"'{folder}' lacks {', '.join(missing)} of its index; get the complete checkpoint.")
    shards = {file: read_file(folder / file) for file in files}
    _check_index(index["weight_map"], shards, folder)
    return StoredWeights(tuple(shards.values()), index.get("metadata") or {})


def shard_names(index: Path) -> list[str]:
    """Returns the files that an index names; for the errors see `read_weights`."""
    return sorted(set(read_index(index)["weight_map"].values()))


def difference(one: StoredWeights, other: StoredWeights) -> str | None:
    """Compares all tensors byte for byte; returns the name of one that differs or is missing, `None` if all agree."""
    left, right = one.tensors, other.tensors
    unmatched = sorted(left.keys() ^ right.keys())
    if unmatched:
        return unmatched[0]
    buffers = memoryview(bytearray(BUFFER_BYTES)), memoryview(bytearray(BUFFER_BYTES))
    return next((name for name in left if not _same(left[name], right[name], buffers)), None)


def _same(one: StoredTensor, other: StoredTensor, buffers: tuple[memoryview, memoryview]) -> bool:
    if (one.dtype, one.shape, one.num_bytes) != (other.dtype, other.shape, other.num_bytes):
        return False
    with one.file.open("rb") as left, other.file.open("rb") as right:
        return _same_bytes(one.chunks(left, buffers[0]), other.chunks(right, buffers[1]))


def _same_bytes(left: Iterator[memoryview], right: Iterator[memoryview]) -> bool:
    """Whether two streams agree, wherever each is split: a cut tensor has other chunks than its copy."""
    one = other = memoryview(b"")
    while True:
        one, other = one or next(left, one), other or next(right, other)
        count = min(len(one), len(other))
        if not count:
            return not one and not other
        if one[:count] != other[:count]:
            return False
        one, other = one[count:], other[count:]


def read_file(file: Path) -> Shard:
    """Reads the header of one file; see `read_weights`."""
    try:
        with safe_open(file, framework="pt"):
            pass
        with file.open("rb") as source:
            size = int.from_bytes(source.read(8), "little")
            header = json.loads(source.read(size))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"'{file}' is not a whole safetensors file: {error}. Get it again.") from error
    metadata = header.pop("__metadata__", None) or {}
    tensors = []
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        tensors.append(StoredTensor(name, entry["dtype"], shape, file, 8 + size + begin, end - begin))
    return Shard(tuple(sorted(tensors, key=lambda tensor: tensor.start)), metadata)


def _check_index(weight_map: dict[str, str], shards: dict[str, Shard], folder: Path) -> None:
    """The index must be true. A tensor that it forgets is kept: transformers loads that one as well."""
    homes: dict[str, str] = {}
    for file, shard in shards.items():
        for tensor in shard.tensors:
            if tensor.name in homes:
                raise CheckpointError(
                    f"'{folder}' holds tensor '{tensor.name}' twice, in {homes[tensor.name]} and in {file}."
                )
            homes[tensor.name] = file
    wrong = [name for name, file in weight_map.items() if homes.get(name) != file]
    if wrong:
        raise CheckpointError(
            f"The index of '{folder}' places '{wrong[0]}' in {weight_map[wrong[0]]}, which does not hold it "
            f"({len(wrong)} such tensors); get the complete checkpoint."
        )


def _no_weights(folder: Path) -> str:
    """Says which weights there are instead, and how to go on."""
    found = sorted(file.name for file in folder.iterdir() if file.is_file())
    gguf = [name for name in found if name.endswith(".gguf")]
    variants = [name for name in found if name.endswith(".safetensors")]
    others = [name for name in found if name.endswith(_OTHER_WEIGHTS)]
    start = f"'{folder}' has no {WEIGHTS_FILE} and no {INDEX_FILE}"
    if gguf:
        return (
            f"{start} but {gguf[0]}. GGUF files are not rewritten: load them, with BlockPruner.from_pretrained(..., "
            "gguf_file=...) or `optimum-cli blockprune run`."
        )
    if variants:
        return f"{start} but {', '.join(variants[:3])}. Variants are not supported: save it under the plain name."
    if others:
        return (
            f"{start} but {others[0]}, a format that this tool does not open. Save the model again as safetensors: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
        )
    return f"{start}, so there are no weights to copy."
