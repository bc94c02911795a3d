# SPDX-License-Identifier: Apache-2.0
"""Healing: a short training of adapters after pruning, merged into the weights, kept only where it helped.

A part of the windows is not trained on, and the model is measured on it before and after. What comes out is the same
model object with the same parameters, which hold other values.
"""

from __future__ import annotations

import copy
import shutil
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from optimum.utils import logging
from transformers import PreTrainedModel

from .adapters import Merge, adapted, merged_weights, require_peft, target_layers
from .batches import CalibrationWindows
from .blocks import BlockStack, find_blocks
from .calibration import WindowSpec
from .environment import versions
from .errors import CalibrationError, ConfigurationError, NonFiniteError, PlanError, UnsupportedModelError
from .evaluation import EvaluationSpec, evaluate_model
from .expectation import expect_itself
from .fingerprints import model_fingerprint
from .healing_spec import HealingSpec
from .inputs import Caller, vocabulary_of
from .ledger import Ledger
from .loading import load_model, records_beside
from .losses import perplexity_of
from .own_text import prompts_of, with_own_text, written_alone
from .plan import PruningPlan
from .processes import launched
from .publishing import Publishing
from .reading import windows_for
from .report import PruningReport
from .reproduce import healing_command
from .resuming import Resumption, resumption
from .runner import BlockRunner
from .surgery import Journal
from .team import Team


logger = logging.get_logger("optimum.blockprune.healing")

Teacher = PreTrainedModel | str | Path | None
_CHECKPOINTS = "checkpoints"
# What figures of the model before healing are called afterwards.
_BEFORE = "before healing"


@dataclass(frozen=True)
class _Lesson:
    """What one healing works on."""

    stack: BlockStack
    spec: HealingSpec
    training: CalibrationWindows
    held_out: CalibrationWindows
    teacher: PreTrainedModel | None


class Healing(Publishing):
    """Healing of `BlockPruner`."""

    def heal(
        self,
        dataset: Any = None,
        method: str = "lora",
        *,
        teacher: Teacher = None,
        resume_dir: str | Path | bool | Resumption | None = None,
        **settings: Any,
    ) -> PreTrainedModel:
        """Trains the pruned model a little, in place; needs `pip install 'optimum-blockprune[heal]'`.

        LoRA adapters on the linear layers of the blocks are trained and merged into the weights. If the model is not
        better on held-out windows afterwards, it is left as it was, with a warning. `report.healing` says what came
        of it.

        Args:
            dataset: Text, as for `BlockPruningConfig.dataset`, of which the training split is read; without it the
                configuration's own.
            method: `"lora"`: the next token of the text; `"distill"`: the dense model's predictions on it, whose KL
                divergence is the loss.
            teacher: The dense model of `"distill"`: a model, or where to load it from. By default the one that was
                pruned, loaded again; it is not downloaded, unless this pruner was loaded from there.
            resume_dir: Folder for checkpoints of the adapters; the same call goes on from the last one after a crash,
                and it is deleted at the end.
            **settings: See `HealingSpec`: `steps`, `learning_rate`, `rank`, `batch_size`, `seqlen`, ...

        Returns:
            The model: the same object.

        Raises:
            BlockPruningError: Whatever is wrong. The model is then as it was, also after Ctrl-C.
        """
        spec = HealingSpec.of({"method": method, **settings})
        require_peft()
        if teacher is not None and spec.method != "distill":
            raise ConfigurationError("teacher only counts together with method='distill'.")
        # Trainer would wait for processes that a launcher has started, joined or not.
        if max(Team.current().size, launched()) > 1:
            raise ConfigurationError("Healing trains in one process: start it without torchrun or accelerate launch.")
        plan, report = self._pruned_before()
        lesson = self._lesson(dataset, spec, plan, report, teacher)
        before, journal, merge = (self.plan, self.report, self._expected), Journal(), Merge()
        self.plan, self.report = plan, report
        try:
            with report.timed("healing"), resumption(resume_dir) as kept:
                entry = _healed(lesson, merge, kept)
            entry["command"] = healing_command(spec, self._healing_text(dataset), entry.get("teacher"))
            report.healing.append(entry)
            if entry["kept"]:
                _relabel(report)
                journal.set(self.model.config, "block_pruning", _provenance(self.model.config, entry))
            if entry["kept"] or self._expected is None:
                self._expected = expect_itself(self.model, plan)
        except BaseException:
            merge.undo()
            journal.rollback()
            self.plan, self.report, self._expected = before
            raise
        return self.model

    def _healing_text(self, dataset: Any) -> Any:
        dataset = self.config.dataset if dataset is None else dataset
        if dataset is None:
            raise CalibrationError("There is no text to train on: give dataset=... (--dataset PATH).")
        return dataset

    def _pruned_before(self) -> tuple[PruningPlan, PruningReport]:
        """Plan and report (a copy) of the pruning, from the folder that the model was loaded from if need be."""
        if not getattr(self.model.config, "block_pruning", None):
            raise PlanError("There is nothing to heal yet: call prune() first, or load a pruned model.")
        plan, report = self.plan, copy.deepcopy(self.report)
        if self._expected is None and self._source is not None:
            plan, found = records_beside(self._source, self._loading)
            if found is not None:
                found.evaluations += report.evaluations
                found.task_results += report.task_results
                report = found
        if plan is None or len(plan.blocks) != len(find_blocks(self.model, plan.stack)):
            raise PlanError(
                "The plan of this pruned model is not known: set pruner.plan = PruningPlan.from_file(...), or load "
                "the pruned folder with BlockPruner.from_pretrained."
            )
        return plan, report

    def _lesson(
        self, dataset: Any, spec: HealingSpec, plan: PruningPlan, report: PruningReport, teacher: Teacher
    ) -> _Lesson:
        """Everything that training needs, once nothing speaks against it."""
        stack = find_blocks(self.model, plan.stack)
        if not stack.layout.kind.is_text_decoder:
            raise UnsupportedModelError(
                f"{stack.layout.subject}: healing predicts the next token, which needs a model whose blocks do."
            )
        if plan.width and plan.width.layout == "padded":
            raise UnsupportedModelError(
                "Layout 'padded' fills blocks up with zeros, which training would not leave zero. Prune with layout "
                "'uniform' or 'per_layer' to heal."
            )
        target_layers(stack, spec.target_modules)
        cut = WindowSpec(spec.num_samples, spec.seqlen, spec.seed, spec.dataset_text_field, spec.use_chat_template)
        windows = windows_for(stack, self._healing_text(dataset), self.tokenizer, cut)
        if windows.extra or windows.labels is not None:
            raise ConfigurationError("Healing trains on text alone; these rows hold other inputs or labels.")
        count = windows.num_windows
        held = max(1, round(spec.held_out * count))
        if held >= count:
            raise CalibrationError(f"{count} windows are too few: one at least is held out. Give more text.")
        parts = windows.part(range(count - held)), windows.part(range(count - held, count))
        return _Lesson(stack, spec, *parts, self._teacher(teacher, plan, report) if spec.method == "distill" else None)

    def _teacher(self, teacher: Teacher, plan: PruningPlan, report: PruningReport) -> PreTrainedModel:
        model, like = self.model, {"dtype": self.model.dtype, "device_map": {"": self.model.device}}
        if teacher is None:
            place, loading = self._dense_source(plan, report)
            if not place:
                raise ConfigurationError("Which model was pruned is not known: give teacher=... (--teacher MODEL).")
            try:
                teacher = load_model(place, **{**loading, **like})
            except (ConfigurationError, UnsupportedModelError) as error:
                advice = "Give it as teacher=... (--teacher MODEL)."
                raise type(error)(f"The dense model cannot be loaded: {error} {advice}") from error
        elif isinstance(teacher, (str, Path)):
            teacher = load_model(teacher, **like)
        if teacher is model:
            raise ConfigurationError("The teacher is the model itself; give the dense model.")
        theirs, ours = find_blocks(teacher).layout, find_blocks(model, plan.stack).layout
        if not theirs.kind.is_text_decoder or vocabulary_of(theirs) != vocabulary_of(ours):
            raise ConfigurationError(
                f"The teacher must predict the same tokens: it is a '{theirs.model_type}' with a vocabulary of "
                f"{vocabulary_of(theirs)}, the pruned model one with {vocabulary_of(ours)}."
            )
        return teacher

    def _dense_source(self, plan: PruningPlan, report: PruningReport) -> tuple[str | None, dict[str, Any]]:
        """Where the dense model is and how it is loaded; from the network only what came from there before."""
        place = report.base.get("model") or plan.base_model
        if place == self._source:
            return place, {name: each for name, each in self._loading.items() if name != "tokenizer"}
        known = {name: report.base[name] for name in ("revision", "gguf_file", "subfolder") if name in report.base}
        return place, {**known, "local_files_only": True}


def _healed(lesson: _Lesson, merge: Merge, kept: Resumption) -> dict[str, Any]:
    """Trains, merges and measures; returns the entry of the report. What was merged stays where it helped."""
    begin, spec = time.perf_counter(), lesson.spec
    ledger = kept.ledger(1, "heal", _fingerprint(lesson))
    checkpoints = None if ledger is None else ledger.folder / _CHECKPOINTS
    try:
        before = _held_out_before(lesson, ledger)
        tokens = _trained(lesson, merge, checkpoints)
        after = _held_out(lesson)
    except NonFiniteError:
        _delete(checkpoints)
        raise
    better = after < before
    if not better:
        merge.undo()
        logger.warning(
            f"Healing did not help: the perplexity on {lesson.held_out.num_windows} held-out windows went from "
            f"{perplexity_of(before):.2f} to {perplexity_of(after):.2f}. The model stays as it was. Try more steps, a "
            "lower learning_rate, or more text."
        )
    _delete(checkpoints)
    text = lesson.training.describe()
    return {
        "method": spec.method,
        "steps": spec.steps,
        "tokens": tokens,
        "seconds": time.perf_counter() - begin,
        "perplexity_before": perplexity_of(before),
        "perplexity_after": perplexity_of(after),
        "held_out_windows": lesson.held_out.num_windows,
        "kept": better,
        **{name: text[name] for name in ("source", "fingerprint", "windows", "seqlen")},
        **({} if lesson.teacher is None else {"teacher": str(lesson.teacher.config._name_or_path)}),
        "settings": _settings(spec),
        "versions": {**versions(), "peft": version("peft"), "accelerate": version("accelerate")},
    }


def _trained(lesson: _Lesson, merge: Merge, checkpoints: Path | None) -> int:
    """Trains adapters and merges them; returns the number of tokens seen."""
    # Brings transformers' Trainer, which takes a while to import.
    from .training import Student, distillation_loss, next_token_loss, own_randomness, train

    stack, spec, model = lesson.stack, lesson.spec, lesson.stack.model
    # Before the adapters are in, with which no runner would have the model.
    runner = BlockRunner(model, stack.layout.stack)
    loss = next_token_loss if lesson.teacher is None else distillation_loss(BlockRunner(lesson.teacher))
    targets, windows = target_layers(stack, spec.target_modules), _and_own_text(lesson)
    with own_randomness(model, spec.seed), adapted(stack, targets, spec) as layers, torch.enable_grad():
        student = Student(Caller(model, stack.layout), layers, runner.device)
        if hasattr(model, "hf_device_map"):
            student.hf_device_map = model.hf_device_map  # keeps the adapters where their layers are
        tokens = train(student, windows, loss, spec, checkpoints=checkpoints)
        values = merged_weights(layers)
    merge.put(values)
    return tokens


def _and_own_text(lesson: _Lesson) -> CalibrationWindows:
    """What is trained on: the given windows, and those that the dense model writes."""
    spec, windows = lesson.spec, lesson.training
    if lesson.teacher is None:
        return windows
    prompts = prompts_of(lesson.teacher, windows, spec.generated_samples, spec.seed)
    return (
        windows if prompts is None else with_own_text(windows, written_alone(lesson.teacher, prompts, spec.batch_size))
    )


def _held_out_before(lesson: _Lesson, ledger: Ledger | None) -> float:
    """Measured once, however often the run goes on: what the ledger keeps besides the checkpoints."""
    found = None if ledger is None else ledger.read("held_out")
    if found is not None:
        return float(found["nll"])
    nll = _held_out(lesson)
    if ledger is not None:
        ledger.write("held_out", {"nll": torch.tensor(nll, dtype=torch.float64)})
    return nll


def _held_out(lesson: _Lesson) -> float:
    """Mean NLL of the held-out windows in nats."""
    spec = EvaluationSpec(batch_size=lesson.spec.batch_size, speed=False, continuations=0)
    return evaluate_model(lesson.stack.model, lesson.held_out, spec)["nll"]


def _fingerprint(lesson: _Lesson) -> dict[str, Any]:
    """What makes two healings the same; how often it is saved is no part of it."""
    settings = {name: value for name, value in asdict(lesson.spec).items() if name != "save_steps"}
    teacher = None if lesson.teacher is None else model_fingerprint(find_blocks(lesson.teacher))
    return {
        "model": model_fingerprint(lesson.stack),
        "teacher": teacher,
        "data": {name: value for name, value in lesson.training.describe().items() if name != "source"},
        "healing": settings,
        "versions": {**versions(), "peft": version("peft"), "accelerate": version("accelerate")},
    }


def _settings(spec: HealingSpec) -> dict[str, Any]:
    """All but what the entry says anyway."""
    values = {**asdict(spec), "warmup": spec.warmup_steps}
    values["target_modules"] = None if spec.target_modules is None else list(spec.target_modules)
    left_out = ("method", "steps", "seqlen", "save_steps")
    return {name: value for name, value in values.items() if name not in left_out and value is not None}


def _provenance(config: Any, entry: dict[str, Any]) -> dict[str, Any]:
    """The inert entry of `config.json`, which says that weights were trained."""
    mine = {name: entry[name] for name in ("method", "steps", "tokens", "fingerprint")}
    earlier = config.block_pruning
    return {**earlier, "healing": [*earlier.get("healing", ()), mine]}


def _relabel(report: PruningReport) -> None:
    """Figures that were measured of the pruned model are not those of the healed one."""
    for entries in (report.evaluations, report.task_results):
        for each in entries:
            if each.get("label") == "pruned":
                each["label"] = _BEFORE
    report.verification = None


def _delete(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
