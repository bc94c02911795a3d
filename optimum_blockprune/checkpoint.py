# SPDX-License-Identifier: Apache-2.0
"""Executes a plan on files: copies the kept tensors under their new names, without ever holding the model.

The model exists only on the meta device, as names and shapes. It tells where the blocks lie, its configuration
follows the plan by the same surgery as a live model's, and the gate compares the written folder with it. The tensors
are copied as bytes, so they keep their dtype and every bit; memory does not grow with the size of the checkpoint.

`verify="logits"` is the exception: it loads the dense model, and then the pruned one, on the CPU.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from optimum.utils import logging
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from .architectures import Layout, layout_for
from .blocks import BlockStack, find_blocks
from .errors import (
    BlockPruningError,
    CheckpointError,
    ConfigurationError,
    OutputError,
    UnsupportedModelError,
    VerificationError,
)
from .evaluation import size_of
from .gate import Expectation, check_mode, expect, prove_folder, require_proof
from .loading import class_for, load_config, load_model
from .names import renumber_key
from .plan import PLAN_FILE, PruningPlan
from .records import record, write_records
from .report import REPORT_FILE, PruningReport
from .saving import atomic_folder, check_output
from .skeleton import load_skeleton, model_dtype
from .surgery import apply_plan
from .template import Template, make_template
from .tensors import INDEX_FILE, WEIGHTS_FILE, StoredWeights, difference, read_weights, shard_names, write_weights


logger = logging.get_logger("optimum.blockprune.checkpoint")

_GENERATION_FILE = "generation_config.json"
_ADAPTER_FILE = "adapter_config.json"

# What lies beside the weights and stays true: tokenizer, chat templates, code, licence.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")
_TEMPLATES = "additional_chat_templates"
# Written anew, or true of the dense model only.
_STALE = ("config.json", _GENERATION_FILE, "params.json", "*.index.json", "*_results.json", "trainer_state.json")
_OWN = (PLAN_FILE, REPORT_FILE, "block_pruning_config.json")

# Arguments that say which files to fetch.
_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "revision", "token")


@dataclass(frozen=True)
class _Source:
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


def apply_to_checkpoint(
    plan: PruningPlan, src: str | Path, dst: str | Path, *, overwrite: bool = False, verify: str = "keys", **hub: Any
) -> Path:
    """Writes the pruned checkpoint `dst` from the safetensors files of `src`, and returns `dst`.

    1. Read the configuration and the headers of the files; refuse what does not fit, before anything is written.
    2. Build the dense model on the meta device, find its blocks and their name in the files, apply the plan to it.
    3. Copy the kept tensors under their new names, with the tokenizer and the other files that stay true.
    4. Prove the folder; it appears under its name only then.

    Args:
        plan: What to keep.
        src: Folder of the dense model, or repo id on the Hub. The network is used for a repo id only.
        dst: The output folder.
        overwrite: Whether an existing folder may be replaced.
        verify: `"keys"` proves names, shapes, configuration and block attributes on the meta device. `"logits"` also
            compares all kept bytes, and logits with those of the dense model, which it loads on the CPU. `"off"`
            proves nothing.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, `subfolder`, and
            `trust_remote_code` (False unless given).

    Raises:
        CheckpointError: The files are missing, incomplete, malformed or not safetensors.
        ConfigurationError: An argument is wrong.
        PlanError: The plan belongs to another model.
        UnsupportedModelError: The model cannot be pruned exactly, or is quantised, or its files name blocks in a way
            that cannot be renumbered.
        OutputError: The folder exists, holds the source, may not be written, or the disk is full.
        VerificationError: The result failed the gate; nothing is left of it.
    """
    check_mode(verify)
    check_output(dst, overwrite=overwrite)  # before anything is fetched; its size is known later
    report = PruningReport()
    with report.timed("load"):
        folder, remote_code = _locate(src, {name: value for name, value in hub.items() if value is not None})
        _refuse_overlap(folder, Path(dst))
        source = _open_source(folder, plan, verify, remote_code)
        kept = source.weights.renamed(lambda name: source.new_name(name, plan))
        check_output(dst, overwrite=overwrite, needed_bytes=kept.num_bytes)
        expected = _expectation(source, plan, remote_code) if verify == "logits" else None
    extra = {source.new_name(name, plan) for name in source.unknown} - {None}
    before = size_of(source.model, plan.stack)
    # From here on source.model is the pruned model, as it should come back from the folder.
    apply_plan(source.model, plan)
    with atomic_folder(dst, overwrite=overwrite) as temporary:
        with report.timed("save"):
            _write(source, kept, temporary)
        with report.timed("verification"):
            prove_folder(temporary, source.model, expected, verify, stack=plan.stack, extra=extra)
            if verify == "logits":
                _prove_bytes(temporary, kept)
        report.verification = {"mode": verify, "passed": verify != "off"}
        record(report, plan, before, source.model)
        write_records(temporary, plan, report, title=Path(dst).name)
    return Path(dst)


# --- the source ----------------------------------------------------------------------------------------------------


def _locate(src: str | Path, hub: dict[str, Any]) -> tuple[Path, bool]:
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
        path = download([*_COMPANIONS, f"{_TEMPLATES}/*", WEIGHTS_FILE])
        index = path / subfolder / INDEX_FILE
        if index.is_file() and not (path / subfolder / WEIGHTS_FILE).is_file():
            path = download(shard_names(index))
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"'{repo_id}' is neither a folder nor a readable repository: {reason}") from error
    return path


def _refuse_overlap(folder: Path, dst: Path) -> None:
    """An output that replaces the source, or a folder around it, would delete the dense model."""
    source, target = folder.resolve(), dst.resolve()
    if source == target or target in source.parents:
        raise OutputError(f"The output '{dst}' would replace the source '{folder}'; choose another folder.")


def _open_source(folder: Path, plan: PruningPlan, verify: str, remote_code: bool) -> _Source:
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
    layout = layout_for(config, plan.stack)
    layout.check(plan)
    require_proof(config, verify)
    model, unknown = _on_meta(folder, config, class_for(config, remote_code=remote_code), remote_code)
    stack = find_blocks(model, plan.stack)
    _refuse_cuts(make_template(stack, plan), layout)
    lists = _block_prefix(weights.tensors, stack), stack.path
    if unknown:
        logger.warning(
            f"{len(unknown)} tensors are not used by {type(model).__name__}, such as '{unknown[0]}'; they are kept."
        )
    return _Source(folder, weights, model, lists, unknown)


def _refuse_cuts(template: Template, layout: Layout) -> None:
    """Files are copied tensor by tensor: none is cut, and all numbers are those of the blocks."""
    slices = (f"'{name}' has a slice for every block, which is not cut while copying" for name, _ in template.sliced())
    reason = layout.uncopied() or next(slices, None)
    if reason is not None:
        raise UnsupportedModelError(
            f"{layout.subject}: its files cannot be pruned as they are, since {reason}. Prune it in memory, with "
            "BlockPruner.prune(plan=...) or `optimum-cli blockprune run --blocks ...`."
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


def _expectation(source: _Source, plan: PruningPlan, remote_code: bool) -> Expectation:
    dense = load_model(source.folder, dtype="auto", trust_remote_code=remote_code, local_files_only=True)
    return expect(dense, plan)


# --- the result ----------------------------------------------------------------------------------------------------


def _write(source: _Source, kept: StoredWeights, folder: Path) -> None:
    """Fills `folder` with configuration, companions and weights; `source.model` is the pruned model by now."""
    source.model.config.save_pretrained(folder)
    _write_generation_config(source, folder)
    for file in _companions(source.folder):
        target = folder / file.relative_to(source.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    parameters = sum(parameter.numel() for parameter in source.model.parameters())
    with tqdm(total=len(kept.tensors), desc="Writing", unit=" tensors", leave=False) as bar:
        write_weights(kept, folder, num_parameters=parameters, advance=bar.update)


def _companions(folder: Path) -> list[Path]:
    """The files beside the weights that are as true of the pruned model as of the dense one."""
    named = {file for pattern in _COMPANIONS for file in folder.glob(pattern)}
    stale = {file for pattern in (*_STALE, *_OWN) for file in folder.glob(pattern)}
    return sorted(file for file in (named - stale) | set(folder.glob(f"{_TEMPLATES}/*.jinja")) if file.is_file())


def _write_generation_config(source: _Source, folder: Path) -> None:
    """Copies the file as it is, unless it holds the number of a block; transformers refuses to save some old ones."""
    generation, old = getattr(source.model, "generation_config", None), source.folder / _GENERATION_FILE
    if not old.is_file():
        if generation is not None:
            generation.save_pretrained(folder)
        return
    shutil.copyfile(old, folder / _GENERATION_FILE)
    try:
        settings = json.loads(old.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"'{old}' is not a JSON file: {error}.") from error
    early_exit = getattr(generation, "assistant_early_exit", None)
    if settings.get("assistant_early_exit") != early_exit:
        settings["assistant_early_exit"] = early_exit
        (folder / _GENERATION_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _prove_bytes(folder: Path, kept: StoredWeights) -> None:
    """Completes `verify="logits"`: a probe does not read every row of an embedding."""
    different = difference(kept, read_weights(folder))
    if different is not None:
        raise VerificationError(
            f"The pruned result failed the gate: tensor '{different}' is not the dense one's. Nothing was kept of it."
        )
