# SPDX-License-Identifier: Apache-2.0
"""What a pruner measures of its model: on text, on benchmark tasks, and at every depth of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from optimum.utils import logging
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .batches import CalibrationWindows
from .benchmark_tasks import evaluate_tasks
from .config import BlockPruningConfig
from .depths import checked_counts, pruned_to
from .errors import CalibrationError, PlanError
from .evaluation import EvaluationSpec, evaluate_model, size_of
from .loading import load_model
from .plan import PruningPlan
from .reading import held_out
from .report import PruningReport


logger = logging.get_logger("optimum.blockprune.measuring")


class Measuring:
    """The measurements of `BlockPruner`; every result is returned and kept in `report`."""

    model: PreTrainedModel
    config: BlockPruningConfig
    tokenizer: PreTrainedTokenizerBase | None
    plan: PruningPlan | None
    report: PruningReport

    def evaluate(
        self,
        dataset: Any = None,
        *,
        num_samples: int | None = None,
        spec: EvaluationSpec | None = None,
        baseline: PreTrainedModel | str | Path | None = None,
        label: str | None = None,
    ) -> dict[str, Any]:
        """Measures the model as it is now: perplexity on fixed windows, speed, size; KL where a baseline is given.

        Args:
            dataset: Held-out text, as for `BlockPruningConfig.dataset`; without it the configuration's own, which
                is what the blocks were chosen on.
            num_samples: Windows to score, of the configuration's `seqlen`; all full windows of the text unless given
                (of c4, which has no end, as many as the configuration says). Of a data set with splits: the test
                split, without one the validation split, else the training split.
            spec: Stride, batch size, speed, continuations; the configuration's `batch_size` unless given.
            baseline: The dense model, for the mean KL(dense || this) in nats per token.
            label: Name in the report; `"dense"` before and `"pruned"` after pruning unless given.

        Returns:
            See `evaluation.evaluate_model`; also appended to `report.evaluations`.
        """
        spec = spec or self._spec()
        text = self._text(dataset, num_samples, spec)
        if isinstance(baseline, (str, Path)):
            baseline = load_model(baseline, dtype=self.model.dtype, device_map={"": self.model.device})
        with self.report.timed("evaluation"):
            result = evaluate_model(self.model, text, spec, baseline=baseline)
        result = {"label": label or self._label(), **result}
        self.report.evaluations.append(result)
        return result

    def evaluate_tasks(
        self,
        tasks: str | Path | Sequence[str | Path],
        *,
        limit: int | None = None,
        num_fewshot: int | None = None,
        batch_size: int | None = None,
        label: str | None = None,
    ) -> list[dict[str, Any]]:
        """Scores the model as it is now on benchmark tasks; needs `pip install 'optimum-blockprune[eval]'`.

        Args:
            tasks: Names of lm-eval tasks, and files or folders of ready requests, which need no network; see
                `benchmark_tasks.evaluate_tasks`.
            limit: Questions of each task, from its first; all of them unless given.
            num_fewshot: Solved examples before each question; the task's own number unless given.
            batch_size: Sequences per forward pass; the configuration's unless given.
            label: See `evaluate`.

        Returns:
            One entry per task with its metrics and their standard errors; also appended to `report.task_results`.
        """
        recipe = self.config.recipe
        with self.report.timed("tasks"):
            found = evaluate_tasks(
                self.model,
                self.tokenizer,
                [tasks] if isinstance(tasks, (str, Path)) else list(tasks),
                limit=limit,
                batch_size=recipe.batch_size if batch_size is None else batch_size,
                num_fewshot=num_fewshot,
                seed=recipe.seed,
            )
        results = [{"label": label or self._label(), **each} for each in found]
        self.report.task_results.extend(results)
        return results

    def measure_depths(
        self,
        dataset: Any = None,
        counts: Iterable[int] | None = None,
        *,
        num_samples: int | None = None,
        spec: EvaluationSpec | None = None,
    ) -> list[dict[str, Any]]:
        """Measures quality against depth: the model with 0, 1, 2, ... blocks of its plan removed, one after the other.

        Each is cut in place, proven, measured and put back; nothing is searched and the model stays dense.

        Args:
            dataset: Held-out text, as for `evaluate`.
            counts: Numbers of removed blocks to measure; every one up to the plan's unless given. The dense model is
                always measured.
            num_samples: As for `evaluate`.
            spec: As for `evaluate`; the first and the last depth only are asked to continue text, which takes long.

        Returns:
            One entry per depth, the dense model first; see `PruningReport.depths`, where they are kept as well.

        Raises:
            PlanError: There is no plan, the model was pruned already, or the plan cannot be cut that short.
        """
        plan, spec = self._dense_plan(), spec or self._spec()
        counts = checked_counts(plan, range(plan.num_removed + 1) if counts is None else counts)
        text = self._text(dataset, num_samples, spec)
        found = []
        with self.report.timed("depths"):
            for count in tqdm(counts, desc="Depths", leave=False):
                with pruned_to(self.model, plan.truncate(count)):
                    writes = count in (counts[0], counts[-1])
                    found.append(measured_depth(self.model, plan.stack, count, text, spec, writes=writes))
        self.report.depths = found
        return found

    def _dense_plan(self) -> PruningPlan:
        """The plan of a model that is still the one it was made for."""
        if self.plan is None:
            raise PlanError("There is no plan yet: call make_plan() first.")
        here = size_of(self.model, self.plan.stack)["blocks"]
        if here != self.plan.num_blocks:
            raise PlanError(
                f"The model has {here} blocks; the plan was made for {self.plan.num_blocks}. Depths are measured and "
                "exported from the dense model: load it again."
            )
        return self.plan

    def _text(self, dataset: Any, num_samples: int | None, spec: EvaluationSpec) -> CalibrationWindows:
        dataset = self.config.dataset if dataset is None else dataset
        if dataset is None:
            raise CalibrationError("There is no text to evaluate on: give dataset=... (--dataset PATH).")
        return held_out(self.model, self.config.recipe, self.tokenizer, dataset, num_samples, spec.stride)

    def _spec(self) -> EvaluationSpec:
        return EvaluationSpec(batch_size=self.config.recipe.batch_size)

    def _label(self) -> str:
        return "pruned" if getattr(self.model.config, "block_pruning", None) else "dense"


def measured_depth(
    model: PreTrainedModel,
    stack: str,
    removed: int,
    text: CalibrationWindows | None,
    spec: EvaluationSpec,
    *,
    writes: bool,
) -> dict[str, Any]:
    """The entry of `PruningReport.depths` for a model as it is now; without `text` its size only.

    Args:
        model: Is measured.
        stack: Whose blocks are counted.
        removed: Number of blocks that are gone.
        text: Held-out text.
        spec: What to measure.
        writes: Whether the model also continues text, as `spec` says.
    """
    spec = spec if writes else replace(spec, continuations=0)
    measured = {} if text is None else evaluate_model(model, text, spec)
    return {"removed": removed, **measured, **size_of(model, stack)}
