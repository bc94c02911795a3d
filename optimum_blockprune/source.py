# SPDX-License-Identifier: Apache-2.0
"""The dense checkpoint of the file-to-file path: found or fetched, and checked against the plan.

Everything that a source can be refused for is found here, before `checkpoint` writes anything. Nothing is loaded but
headers and names, except for `verify="logits"`, which needs the dense model itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from optimum.utils import logging
from transformers import AutoModelForCausalLM, PreTrainedModel

from .architectures import Layout, layout_for
from .blocks import BlockStack, find_blocks
from .cuts import Cut
from .errors import BlockPruningError, CheckpointError, ConfigurationError, OutputError, UnsupportedModelError
from .gate import Expectation, expect, require_proof
from .loading import class_for, load_config, load_model
from .names import renumber_key
from .per_layer import refuse_own_widths
from .plan import PruningPlan
from .skeleton import load_skeleton, model_dtype
from .template import Template, make_template
from .tensors import INDEX_FILE, WEIGHTS_FILE, StoredTensor, StoredWeights, read_weights, shard_names


logger = logging.get_logger("optimum.blockprune.source")

_ADAPTER_FILE = "adapter_config.json"

# What lies beside the weights and stays true: tokenizer, chat templates, code, licence.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")
TEMPLATES = "additional_chat_templates"

# Arguments that say which files to fetch.
_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "revision", "token")


@dataclass(frozen=True)
class Source:
    """The dense checkpoint: its folder, its weights as byte ranges, and the model that they belong to.

    Attributes:
        folder: Where the files lie.
        weights: What is stored.
        model: The dense model on the meta device.
        lists: The name of the block list in the files, and its name in the model.
        unknown: Stored tensors that the model's class does not use.
    """

    folder: Path
    weights: StoredWeights
    model: PreTrainedModel
    lists: tuple[str, str]
    unknown: tuple[str, ...]

    def new_name(self, name: str, plan: PruningPlan) -> str | None:
        """Returns a tensor's name after pruning; `None` if it belongs to a removed block."""
        # transformers reports a tensor by its name in the file, or by that in the model.
        stored, built = (renumber_key(name, blocks, plan) for blocks in self.lists)
        return built if stored == name else stored

    def cut(self, name: str, plan: PruningPlan) -> Cut | None:
        """Returns what is kept of a stored tensor that stays; `None` for all of it."""
        for stored_list in self.lists:
            if not name.startswith(f"{stored_list}."):
                continue
            block, _, inside = name[len(stored_list) + 1 :].partition(".")
            for group, narrowing in plan.width.of_block(int(block)):
                for cut in group.tensors:
                    if cut.name == inside:
                        stored = plan.width.stored(narrowing)
                        return Cut(cut.axis, cut.indices(narrowing.kept, group.units, stored))
        return None

    def kept(self, plan: PruningPlan, changed: Mapping[str, StoredTensor] | None = None) -> StoredWeights:
        """Returns what is stored after pruning, still as byte ranges of the dense files.

        Args:
            plan: What stays.
            changed: Tensors to take from elsewhere, by their stored name.
        """
        weights = self.weights.exchanged(changed or {})
        return weights.renamed(lambda name: self.new_name(name, plan), lambda name: self.cut(name, plan))


def locate(src: str | Path, hub: dict[str, Any]) -> tuple[Path, bool]:
    """Returns the folder with the files, fetched where `src` is a repo id, and whether its code may run."""
    remote_code, subfolder = bool(hub.pop("trust_remote_code", False)), hub.pop("subfolder", "")
    useless = sorted(set(hub) - set(_DOWNLOAD))
    if useless:
        raise ConfigurationError(
            f"{', '.join(useless)} cannot be used here: the files are copied as they are, and no model is loaded. To "
            "load and convert one, use BlockPruner.from_pretrained (optimum-cli blockprune run)."
        )
    path = Path(src)
    if path.is_file():
        hint = "; load GGUF files with BlockPruner or `run`" if path.suffix == ".gguf" else ""
        raise CheckpointError(f"'{src}' is a file; give the folder of a safetensors checkpoint{hint}.")
    if not path.is_dir():
        if isinstance(src, Path):
            raise CheckpointError(f"There is no folder '{src}'.")
        path = _fetch(src, subfolder, hub)
    if not (path / subfolder).is_dir():
        raise CheckpointError(f"'{src}' has no folder '{subfolder}'.")
    return path / subfolder, remote_code


def _fetch(repo_id: str, subfolder: str, hub: dict[str, Any]) -> Path:
    """Downloads the small files, then the weights that the index names: a repository may hold other ones as well."""

    def download(names: Iterable[str]) -> Path:
        patterns = [f"{subfolder}/{name}" if subfolder else name for name in names]
        return Path(snapshot_download(repo_id, allow_patterns=patterns, **hub))

    try:
        path = download([*COMPANIONS, f"{TEMPLATES}/*", WEIGHTS_FILE])
        index = path / subfolder / INDEX_FILE
        if index.is_file() and not (path / subfolder / WEIGHTS_FILE).is_file():
            path = download(shard_names(index))
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"'{repo_id}' is neither a folder nor a readable repository: {reason}") from error
    return path


def refuse_overlap(folder: Path, dst: Path) -> None:
    """An output that replaces the source, or a folder around it, would delete the dense model."""
    source, target = folder.resolve(), dst.resolve()
    if source == target or target in source.parents:
        raise OutputError(f"The output '{dst}' would replace the source '{folder}'; choose another folder.")


def open_source(folder: Path, plan: PruningPlan, verify: str, remote_code: bool) -> Source:
    """Reads configuration and headers and checks the plan against them."""
    if (folder / _ADAPTER_FILE).is_file():
        raise CheckpointError(f"'{folder}' holds a PEFT adapter; merge it into its model and save the result.")
    weights = read_weights(folder)
    try:
        config = load_config(folder, trust_remote_code=remote_code, local_files_only=True)
    except BlockPruningError:
        raise
    except Exception as error:  # configuration classes check their fields in many ways
        raise CheckpointError(f"The config.json of '{folder}' is malformed: {error}") from error
    refuse_own_widths(config)
    layout = layout_for(config, plan.stack)
    layout.check(plan)
    require_proof(config, verify)
    model, unknown = _on_meta(folder, config, class_for(config, remote_code=remote_code), remote_code)
    stack = find_blocks(model, plan.stack)
    _refuse_cuts(make_template(stack, plan), layout)
    lists = _block_prefix(weights.tensors, stack), stack.path
    _refuse_unstored(plan, weights, lists, layout)
    if unknown:
        logger.warning(
            f"{len(unknown)} tensors are not used by {type(model).__name__}, such as '{unknown[0]}'; they are kept."
        )
    return Source(folder, weights, model, lists, unknown)


def _refuse_cuts(template: Template, layout: Layout) -> None:
    """Files are copied tensor by tensor: none is cut, and all numbers are those of the blocks."""
    slices = (f"'{name}' has a slice for every block, which is not cut while copying" for name, _ in template.sliced())
    reason = layout.uncopied() or next(slices, None)
    if reason is not None:
        raise UnsupportedModelError(
            f"{layout.subject}: its files cannot be pruned as they are, since {reason}. Prune it in memory, with "
            "BlockPruner.prune(plan=...) or `optimum-cli blockprune run --blocks ...`."
        )


def _refuse_unstored(plan: PruningPlan, weights: StoredWeights, lists: tuple[str, str], layout: Layout) -> None:
    """Some files hold a tensor in pieces or under another name than the model, which joins them when it is loaded."""
    stored = weights.tensors
    for name in stored if plan.removed_halves else ():
        block = next((name[len(path) + 1 :] for path in lists if name.startswith(f"{path}.")), "")
        module = block.partition(".")[2].partition(".")[0]
        if module and module not in plan.halves:
            raise UnsupportedModelError(
                f"{layout.subject}: its files name modules otherwise than the model ('{module}'), so that nothing "
                "tells which half of a block they belong to. Prune it in memory, with BlockPruner.prune(plan=...)."
            )
    for each in plan.width.narrowed:
        if each.means:
            raise UnsupportedModelError(
                f"{layout.subject}: the plan makes up for removed units by biases, which are not computed while files "
                "are copied. Prune it in memory, with BlockPruner.prune(plan=...)."
            )
        for cut in plan.width.groups[each.group].tensors:
            names = [f"{path}.{each.block}.{cut.name}" for path in lists]
            if not any(name in stored for name in names):
                raise UnsupportedModelError(
                    f"{layout.subject}: its files have no tensor '{names[0]}' to cut units from. Prune it in memory, "
                    "with BlockPruner.prune(plan=...)."
                )


def _on_meta(folder: Path, config: Any, kind: Any, remote_code: bool) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Builds the dense model without its weights; also returns the stored tensors that it does not use."""
    try:
        if kind is AutoModelForCausalLM:
            with torch.device("meta"):
                kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=remote_code))
        model, info = load_skeleton(kind, folder, config, dtype=model_dtype(config))
    except Exception as error:  # transformers, safetensors and huggingface_hub have no common base class
        raise CheckpointError(f"'{folder}' does not load as {kind.__name__}: {error}") from error
    missing = sorted(map(str, info.get("missing_keys") or ()))
    if missing:
        raise CheckpointError(
            f"'{folder}' lacks {len(missing)} tensors that {type(model).__name__} needs, such as {missing[:3]}; they "
            "would be random. Get the complete checkpoint."
        )
    return model, tuple(sorted(map(str, info.get("unexpected_keys") or ())))


def _block_prefix(names: Iterable[str], stack: BlockStack) -> str:
    """Returns the name of the block list in the files.

    Files of a bare base model lack its prefix (`h.0` for `transformer.h.0`), and transformers accepts both.

    Raises:
        UnsupportedModelError: The files number other blocks than those of the model.
    """
    model, kind = stack.model, stack.layout.subject
    blocks = set(range(len(stack)))
    candidates = dict.fromkeys((stack.path, stack.path.removeprefix(f"{model.base_model_prefix}.")))
    found = {prefix: _numbered(names, prefix) for prefix in candidates}
    found = {prefix: numbered for prefix, numbered in found.items() if numbered} or _other_prefixes(names, stack)
    if len(found) != 1:
        which = f"under {' and '.join(found)} at once" if found else f"nowhere under {' or '.join(candidates)}"
        raise UnsupportedModelError(f"{kind}: the files hold the blocks {which}, so they cannot be renumbered.")
    [(prefix, numbered)] = found.items()
    beyond = sorted(set(numbered) - blocks)
    if beyond:
        raise UnsupportedModelError(
            f"{kind} has {len(stack)} blocks, but the files also hold block {', '.join(map(str, beyond))} (such as "
            f"'{numbered[beyond[0]]}'; multi-token prediction?). Such blocks cannot be renumbered: load and save the "
            "model once, which leaves them out."
        )
    absent = sorted(blocks - set(numbered))
    if absent:
        raise UnsupportedModelError(f"{kind} has {len(stack)} blocks, but the files hold no tensors of {absent}.")
    return prefix


def _other_prefixes(names: Iterable[str], stack: BlockStack) -> dict[str, dict[int, str]]:
    """Names under which older versions saved the blocks: as many, with the same tensors in each."""
    ends = [f".0.{name}" for name, _ in stack.blocks[0].named_parameters()]
    starts = {name.removesuffix(end) for name in names for end in ends if name.endswith(end)}
    found = {start: _numbered(names, start) for start in starts}
    return {start: numbered for start, numbered in found.items() if set(numbered) == set(range(len(stack)))}


def _numbered(names: Iterable[str], prefix: str) -> dict[int, str]:
    """The block numbers under `prefix`, each with one of its tensors."""
    parts = ((name, name[len(prefix) + 1 :].partition(".")[0]) for name in names if name.startswith(f"{prefix}."))
    return {int(number): name for name, number in parts if number.isascii() and number.isdigit()}


def expectation(source: Source, plan: PruningPlan, remote_code: bool) -> Expectation:
    """Loads the dense model on the CPU and asks it for the logits that the pruned one must have."""
    dense = load_model(source.folder, dtype="auto", trust_remote_code=remote_code, local_files_only=True)
    return expect(dense, plan)
