# SPDX-License-Identifier: Apache-2.0
"""The report: every number that was measured, and none that was not."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .half import pair_names
from .json_values import json_fault, read_json
from .report_rules import report_fault


REPORT_FILE = "pruning_report.json"


@dataclass
class PruningReport:
    """What a pruning run was asked for, did, spent and measured; `None` and empty entries are left out of the JSON.

    Attributes:
        requested: The budget as asked for.
        achieved: `blocks_before`, `blocks_after`, `blocks_removed` (fraction), the same for `parameters` and for
            `size_bytes`, the bytes of the weights in their dtype. Where units of width went: `layout`, `units`
            (`before`, `after`, `removed` by family, summed over blocks), and `padding_parameters`, the zeros that
            layout `"padded"` stores.
        block_forwards: Block executions of the search, per calibration window.
        reused_measurements: After a resume: measurements that an earlier try had finished; what the search spent on
            them is not counted here.
        naive_block_forwards: What whole forward passes per candidate would have spent, where the strategy knows.
        head_forwards: Executions of the language-model head, per calibration window.
        tokens: Tokens of the calibration set, padding not counted.
        calibration: Source and fingerprint of the calibration set.
        seconds: Wall time by phase (`load`, `calibration`, `search`, `surgery`, `save`).
        peak_memory_bytes: Largest allocation on the GPU, or the largest resident size of the process on the CPU.
        device, dtype: Where the model was and in which precision.
        strategy_details: Further figures of the strategy.
        removed_blocks: Original numbers of the blocks that are gone, in the order of removal.
        removed_halves: Where half-blocks were removed: all of them, such as `"4.mlp"`, in the order of removal.
        verification: Which parts of the gate the saved folder passed.
        loader, task: The class that loads the result, and what it does, in the Hub's words.
        runtimes: For other runtimes (vLLM, llama.cpp): whether they read the result as transformers does, and why not.
        options, seed: Of the strategy, as used.
        scores: Score of each block on the dense model, by block number as a string; see `PruningPlan.scores`.
        steps: One entry per decision of the search, in order; see `PruningPlan.steps`.
        widths: By family of units (`"mlp"`, `"attention"`): how many there are (`units`) and stay (`kept`), one number
            for each block of the dense model, `None` for a block that is gone or has none.
        base: What is known of the dense model: `model` (repo id or path), `revision` (commit), `license`,
            `license_name`, `license_link`, `language` (list of codes), `card` (where these were read).
        history: Earlier prunings of the dense model, oldest first: their `block_pruning` entries.
        command: The command line that makes the same checkpoint again.
        healing: One entry per training after pruning: `method`, `steps`, `tokens` (seen), `seconds`,
            `perplexity_before` and `perplexity_after` on `held_out_windows` windows, `kept` (whether the model got the
            trained weights), the text (`source`, `fingerprint`, `windows` trained on, `seqlen`), `teacher`,
            `settings`, `command`, `versions`.
        depths: One entry per measured depth of one order of removal, the dense model first: `removed`, `blocks`,
            `parameters`, `size_bytes` and, where text was given, what `evaluate` measures.
        evaluations: Every evaluation with its settings and token counts, in order.
        task_results: One entry per model (`label`) and benchmark task (`task`): `samples`, `metrics` with standard
            errors (`acc`, `acc_stderr`, ...), `primary` (name of the metric to quote), `num_fewshot`, `source`.
        versions: Package versions.
    """

    requested: dict[str, Any] = field(default_factory=dict)
    achieved: dict[str, Any] = field(default_factory=dict)
    strategy: str | None = None
    removed_blocks: list[int] = field(default_factory=list)
    removed_halves: list[str] = field(default_factory=list)
    block_forwards: int | None = None
    reused_measurements: int | None = None
    naive_block_forwards: int | None = None
    head_forwards: int | None = None
    tokens: int | None = None
    calibration: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    device: str | None = None
    dtype: str | None = None
    strategy_details: dict[str, Any] = field(default_factory=dict)
    verification: dict[str, Any] | None = None
    loader: str | None = None
    task: str | None = None
    runtimes: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    scores: dict[str, float] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    widths: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    command: str | None = None
    healing: list[dict[str, Any]] = field(default_factory=list)
    depths: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    task_results: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def removed_units(self) -> list[int | str]:
        """What went, one entry per block's worth, in the order of removal: 4, or `"4.mlp+5.attention"`."""
        return pair_names(self.removed_halves) or list(self.removed_blocks)

    @property
    def healings(self) -> list[dict[str, Any]]:
        """The trainings that the weights come from."""
        return [entry for entry in self.healing if entry.get("kept")]

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the wall time of the body to `seconds[phase]`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin

    def add_search(self, other: PruningReport) -> None:
        """Adds what another search cost to what this one did."""
        for phase, seconds in other.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        for name in ("block_forwards", "naive_block_forwards", "head_forwards", "reused_measurements", "tokens"):
            values = [value for value in (getattr(self, name), getattr(other, name)) if value is not None]
            setattr(self, name, sum(values) if values else None)

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON types; what was not measured is absent."""
        return {name: value for name, value in asdict(self).items() if value not in (None, {}, [])}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningReport:
        """Reads what `to_dict` wrote; fields of newer versions are ignored.

        Raises:
            CheckpointError: It is no object, or a value is of another type than documented.
        """
        if not isinstance(data, Mapping):
            raise CheckpointError(f"A pruning report is a JSON object, not {type(data).__name__}.")
        report = cls(**{name: value for name, value in data.items() if name in cls.__dataclass_fields__})
        fault = json_fault(data) or report_fault(report)
        if fault:
            raise CheckpointError(f"The pruning report is malformed: {fault}.")
        return report

    def save(self, path: str | Path) -> Path:
        """Writes JSON to `path` (a file, or a folder that gets `pruning_report.json`)."""
        path = Path(path)
        path = path / REPORT_FILE if path.is_dir() else path
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_file(cls, path: str | Path) -> PruningReport:
        """Reads a report from a JSON file, or from the folder that holds `pruning_report.json`.

        Raises:
            CheckpointError: There is no such file, or it holds something else.
        """
        path = Path(path)
        path = path / REPORT_FILE if path.is_dir() else path
        try:
            return cls.from_dict(read_json(path, CheckpointError))
        except CheckpointError as error:
            raise CheckpointError(f"'{path}' is no readable pruning report: {error}") from error

    @classmethod
    def from_hub(cls, repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> PruningReport:
        """Downloads `pruning_report.json` of a pruned model on the Hub and reads it."""
        from huggingface_hub import hf_hub_download

        return cls.from_file(hf_hub_download(repo_id, REPORT_FILE, revision=revision, token=token))
