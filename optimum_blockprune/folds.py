# SPDX-License-Identifier: Apache-2.0
"""What a plan puts into weights that stay, as plain values: maps of modules that write to the residual stream.

A module of a kept block reads `a` and adds `y` to the stream; folded, it adds `y T`, or `y + a D`. `T` and `D` are too
large for a JSON file, so that the plan names them and a file beside the plan holds them: safetensors under another
ending, since loaders take every `*.safetensors` of a folder for weights of the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import PlanError
from .json_values import misfit


FOLDS_SUFFIX = ".folds"
DIAGONAL, MATRIX, CHANGE = KINDS = "diagonal", "matrix", "change"


@dataclass(frozen=True)
class Fold:
    """One map and the module that it goes into.

    Attributes:
        block: Original number of the block.
        module: Name of the module in it, such as `mlp.down_proj`.
        kind: `"matrix"`, T of `[d, d]`; `"diagonal"`, its diagonal of `[d]`; or `"change"`, D of `[inputs, d]`.
        axis: The axis of the module's weight along which its outputs lie: 0 of `[out, in]`, 1 of `[in, out]`.
        offset: What the module adds to its weight before it multiplies: 1 of norms that scale by `1 + weight`.
        tensor: Name of T or D in the file.
    """

    block: int
    module: str
    kind: str
    axis: int
    offset: float
    tensor: str


@dataclass(frozen=True)
class Folds:
    """All maps of a plan, in the order in which they go into the weights.

    Attributes:
        entries: See `Fold`.
        digest: SHA-256 (hex) of all T and D; empty where there is none.
        file: Where they are read from when they are needed.
        held: The tensors themselves, fp32 on the CPU, where they were measured in this process.

    Raises:
        PlanError: An entry is impossible.
    """

    entries: tuple[Fold, ...] = ()
    digest: str = ""
    file: Path | None = field(default=None, compare=False, repr=False)
    held: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for each in self.entries:
            if each.kind not in KINDS or each.axis not in (0, 1) or each.block < 0:
                raise PlanError(f"The plan folds a map of kind {each.kind!r} into block {each.block}; there is none.")

    def __bool__(self) -> bool:
        return bool(self.entries)

    @property
    def num_bytes(self) -> int:
        """Size of the file beside the plan; 0 as long as it is not there."""
        if self.held is not None:
            return sum(tensor.nbytes for tensor in self.held.values())
        return self.file.stat().st_size if self.file is not None and self.file.is_file() else 0

    def of_block(self, block: int) -> tuple[Fold, ...]:
        """The maps that go into a block."""
        return tuple(each for each in self.entries if each.block == block)

    def tensors(self) -> Mapping[str, Any]:
        """All T and D by name, fp32 on the CPU.

        Raises:
            PlanError: The file is not there, or is another one.
        """
        if self.held is not None or not self.entries:
            return self.held or {}
        from safetensors import SafetensorError  # a plan is read without it
        from safetensors.torch import load_file

        if self.file is None or not self.file.is_file():
            where = "a file beside the plan" if self.file is None else f"'{self.file}'"
            raise PlanError(
                f"The plan folds statistics into weights, which {where} holds, and it is not there. Copy it beside "
                "the plan, or choose again."
            )
        try:
            found = load_file(self.file)
        except (SafetensorError, OSError, ValueError) as error:
            raise PlanError(f"'{self.file}' is not the file of this plan: {error}.") from error
        if digest_of(found) != self.digest:
            raise PlanError(f"'{self.file}' is not the file of this plan: its statistics are other ones.")
        return found

    def fetch(self, repo_id: str, token: str | bool | None = None) -> None:
        """Downloads the file that lies beside a downloaded plan, of the same commit; nothing where there are no maps.

        Args:
            repo_id: Where the plan came from; `file` lies beside it in the cache of huggingface_hub.
            token: As for the plan.

        Raises:
            PlanError: The repository lacks the file, or holds another one.
        """
        if not self.entries:
            return
        from huggingface_hub import hf_hub_download  # see above
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        commit = self.file.parent.name  # a branch may move on between two downloads; the cache is by commit
        try:
            hf_hub_download(repo_id, self.file.name, revision=commit, token=token)
        except LocalEntryNotFoundError:  # offline, or no connection: its own words say so
            raise
        except EntryNotFoundError as error:
            raise PlanError(
                f"The plan of '{repo_id}' folds statistics into weights, which '{self.file.name}' holds, and the "
                f"repository lacks it at {commit[:12]}. Push the whole pruned folder again (optimum-cli blockprune "
                "push), or choose again."
            ) from error
        self.tensors()

    def save(self, plan_file: Path) -> None:
        """Writes the tensors beside a plan's file; nothing where there are none."""
        target = plan_file.with_suffix(FOLDS_SUFFIX)
        if not self.entries:
            target.unlink(missing_ok=True)  # of an earlier plan of this name
            return
        from safetensors.torch import save_file  # see above

        save_file(dict(self.tensors()), target)

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {"entries": [asdict(each) for each in self.entries], "digest": self.digest}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Folds:
        """Reads what `to_dict` wrote.

        Raises:
            PlanError: It is impossible.
            LookupError, TypeError, ValueError: It is malformed.
        """
        entries = tuple(Fold(**each) for each in data["entries"])
        folds = cls(entries, data["digest"])
        fault = misfit(folds) or next(filter(None, map(misfit, entries)), None)
        if fault or set(data) != {"entries", "digest"}:
            raise PlanError(f"The folds of the plan are malformed: {fault or 'unknown fields'}.")
        return folds


def joined_folds(
    first: Folds,
    second: Folds,
    old_place: Callable[[int, str], int],
    stays: Callable[[int, str], bool],
    whole: Callable[[Any, int, str], Any],
) -> Folds:
    """The maps of two plans, one after the other.

    Args:
        first: Of the first plan.
        second: Of a plan for what the first leaves.
        old_place: Gives the original block of a module, by the block that the first plan leaves and its name.
        stays: Tells whether a module of an original block is there after both plans; maps of others go with them.
        whole: Gives a D for all inputs of a module, by one for those that the first plan leaves, the original block
            and the name of the module.
    """
    entries = [each for each in first.entries if stays(each.block, each.module)]
    if not second and len(entries) == len(first.entries):
        return first
    earlier, later = first.tensors() if entries else {}, second.tensors()
    held = {each.tensor: earlier[each.tensor] for each in entries}
    for each in second.entries:
        number = len(entries)
        while f"{each.tensor}+{number}" in held:  # of a map before those that went
            number += 1
        name = f"{each.tensor}+{number}"
        block, tensor = old_place(each.block, each.module), later[each.tensor]
        entries.append(replace(each, block=block, tensor=name))
        held[name] = whole(tensor, block, each.module) if each.kind == CHANGE else tensor
    return Folds(tuple(entries), digest_of(held), held=held)


def digest_of(tensors: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of names, shapes and values; empty for none."""
    if not tensors:
        return ""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
