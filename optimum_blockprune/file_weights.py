# SPDX-License-Identifier: Apache-2.0
"""Where the tensors of a model lie in its safetensors files, and how one of them is read.

Files are read, not mapped into memory: a limit on memory sees what is read and nothing else. Names in files may lack
what the model's class puts before them, or have more of it; whatever else differs (tensors that are joined, split or
renamed while loading) is not looked for.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .blocks import BlockStack
from .errors import CheckpointError
from .tensors import StoredTensor, StoredWeights


# How the format spells the dtypes that torch has too.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# Tensors from this size on lie in pages of their own (our choice).
_OWN_PAGES = 2**16
# Windows knows only one kind.
_PRIVATE = {"flags": mmap.MAP_PRIVATE} if hasattr(mmap, "MAP_PRIVATE") else {}

# By the name in the model: what is stored, and the dtype that it becomes.
Homes = dict[str, tuple[StoredTensor, torch.dtype]]


class FileWeights(Mapping[str, Tensor]):
    """Tensors that are read from their files when they are asked for, and not kept.

    Args:
        homes: By the name in the model: what is stored, and the dtype that it becomes.
    """

    def __init__(self, homes: Mapping[str, tuple[StoredTensor, torch.dtype]]) -> None:
        self._homes = homes

    def __getitem__(self, name: str) -> Tensor:
        stored, dtype = self._homes[name]
        values = read_tensor(stored)
        return values if values.dtype == dtype else _room(stored.shape, dtype).copy_(values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def __deepcopy__(self, _memo: Any) -> FileWeights:
        return self  # never changes, and copies of modules carry it with their hooks


def read_tensor(stored: StoredTensor) -> Tensor:
    """Reads a tensor into memory of its own.

    Raises:
        CheckpointError: The file is gone or became shorter.
    """
    values = _room(stored.shape, DTYPES[stored.dtype])
    if not stored.num_bytes:
        return values
    target = memoryview(values.view(-1).view(torch.uint8).numpy())
    try:
        with stored.file.open("rb", buffering=0) as source:
            # One chunk: the buffer is the tensor itself.
            for _ in stored.chunks(source, target):
                pass
    except OSError as error:
        raise CheckpointError(f"'{stored.file}' cannot be read while the model streams: {error}") from error
    return values


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in pages of its own, which the system gets back as soon as it goes.

    The C library would keep them: blocks come and go between tensors that stay, and its heap grows with each.
    """
    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes >= _OWN_PAGES:
        with suppress(OSError):  # no memory: torch says so in the words that callers know
            return torch.frombuffer(mmap.mmap(-1, num_bytes, **_PRIVATE), dtype=dtype).view(shape)
    return torch.empty(shape, dtype=dtype)


def find_homes(model: PreTrainedModel, stacks: Sequence[BlockStack], weights: StoredWeights) -> Homes | None:
    """Where each tensor of the model is stored, as it is; `None` where one is not, or in another form.

    Of tensors that share their memory, one is looked for.
    """
    prefixes = _prefixes(model, stacks, weights)
    if prefixes is None:
        return None
    stored, homes = weights.tensors, Homes()
    for names, tensor in tensors_of(model):
        spelled = (spelling for name in names for spelling in _spellings(name, model, prefixes))
        found = next((stored[spelling] for spelling in spelled if spelling in stored), None)
        if found is None or found.shape != tuple(tensor.shape) or found.dtype not in DTYPES:
            return None
        homes |= dict.fromkeys(names, (found, tensor.dtype))
    return homes


def tensors_of(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """All tensors that belong into a checkpoint, each with its names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name in model.state_dict(keep_vars=True):
        tensor = parameters[name] if name in parameters else buffers.get(name)
        if tensor is not None:
            found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


def _prefixes(
    model: PreTrainedModel, stacks: Sequence[BlockStack], weights: StoredWeights
) -> list[tuple[str, str]] | None:
    """Pairs of what names begin with in the model and in the files, as the names of the blocks show."""
    found = []
    for stack in stacks:
        ends = [f".0.{name}" for name, _ in stack.blocks[0].named_parameters()]
        starts = {name.removesuffix(end) for name in weights.tensors for end in ends if name.endswith(end)}
        common = [(_shared_end(stack.path, start), start) for start in starts]
        shared, start = max(common, default=(0, ""))
        if not shared:
            return None
        found.append((stack.path[: len(stack.path) - shared], start[: len(start) - shared]))
    return found


def _shared_end(one: str, other: str) -> int:
    """Number of characters that two dotted names have in common at the end, in whole parts."""
    length = 0
    for left, right in zip(reversed(one.split(".")), reversed(other.split(".")), strict=False):
        if left != right:
            break
        length += len(left) + 1
    return min(length, len(one), len(other))


def _spellings(name: str, model: PreTrainedModel, prefixes: Sequence[tuple[str, str]]) -> Iterator[str]:
    """How a tensor may be called in the files: a base model's files lack its prefix, or have one more."""
    yield name
    base = f"{model.base_model_prefix}."
    yield name.removeprefix(base)
    yield base + name
    for built, stored in prefixes:
        if name.startswith(built):
            yield stored + name[len(built) :]
