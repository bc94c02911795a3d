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
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm.auto import tqdm

from .errors import VerificationError
from .evaluation import size_of
from .file_folds import bytes_beside, folded_tensors, refuse_unfolded
from .gate import check_mode, prove_folder
from .plan import PLAN_FILE, PruningPlan
from .records import record, write_records
from .report import REPORT_FILE, PruningReport
from .saving import atomic_folder, check_output
from .source import COMPANIONS, TEMPLATES, Source, expectation, locate, open_source, refuse_overlap
from .surgery import apply_plan
from .tensors import StoredWeights, difference, read_weights
from .weight_files import json_object
from .weight_writing import write_weights


_GENERATION_FILE = "generation_config.json"

# Not copied: written anew, or true of the dense model only.
_STALE = ("config.json", _GENERATION_FILE, "params.json", "*.index.json", "*_results.json", "trainer_state.json")
_OWN = (PLAN_FILE, REPORT_FILE, "block_pruning_config.json")


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
        folder, remote_code = locate(src, {name: value for name, value in hub.items() if value is not None})
        refuse_overlap(folder, Path(dst))
        source = open_source(folder, plan, verify, remote_code)
        refuse_unfolded(source, plan)
        kept = source.kept(plan)
        check_output(dst, overwrite=overwrite, needed_bytes=kept.num_bytes + bytes_beside(source, plan))
        expected = expectation(source, plan, remote_code) if verify == "logits" else None
    extra = {source.new_name(name, plan) for name in source.unknown} - {None}
    before = size_of(source.model, plan.stack)
    # From here on source.model is the pruned model, as it should come back from the folder.
    apply_plan(source.model, plan)
    with atomic_folder(dst, overwrite=overwrite) as temporary, TemporaryDirectory(dir=temporary) as beside:
        with report.timed("save"):
            if plan.folds:
                kept = source.kept(plan, folded_tensors(source, plan, Path(beside)))
            _write(source, kept, temporary)
        with report.timed("verification"):
            prove_folder(temporary, source.model, expected, verify, plan=plan, extra=extra)
            if verify == "logits":
                _prove_bytes(temporary, kept)
        report.verification = {"mode": verify, "passed": verify != "off"}
        record(report, plan, before, source.model, source=src, loading=hub)
        write_records(temporary, plan, report, title=Path(dst).name)
    return Path(dst)


# --- the result ----------------------------------------------------------------------------------------------------


def _write(source: Source, kept: StoredWeights, folder: Path) -> None:
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
    named = {file for pattern in COMPANIONS for file in folder.glob(pattern)}
    stale = {file for pattern in (*_STALE, *_OWN) for file in folder.glob(pattern)}
    return sorted(file for file in (named - stale) | set(folder.glob(f"{TEMPLATES}/*.jinja")) if file.is_file())


def _write_generation_config(source: Source, folder: Path) -> None:
    """Copies the file as it is, unless it holds the number of a block; transformers refuses to save some old ones."""
    generation, old = getattr(source.model, "generation_config", None), source.folder / _GENERATION_FILE
    if not old.is_file():
        if generation is not None:
            generation.save_pretrained(folder)
        return
    shutil.copyfile(old, folder / _GENERATION_FILE)
    settings = json_object(old)
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
