# SPDX-License-Identifier: Apache-2.0
"""How much of a target goes in depth and how much in width: a few splits are made, and held-out text decides.

Each split removes a number of blocks (or as many pairs of half-blocks), and then channels or heads of what is left,
until the target is reached; it is applied in place, measured, and taken back. The smallest KL divergence from the
dense model on text that neither search saw wins. That splits are tried rather than predicted is our choice, after the
finding of MultiPruner and 2SSP that neither depth nor width alone is best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from optimum.utils import logging
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .asked import any_choice, asked_for
from .batches import CalibrationWindows, refuse_shared
from .blocks import find_blocks
from .budget_rules import fewest_within
from .choosing import Keep, Search, choose
from .errors import CalibrationError, ConfigurationError, NonFiniteError, PlanError, UnsupportedModelError
from .evaluation import size_of
from .memory import BatchSize
from .mix import Mix
from .plan import PruningPlan
from .reading import calibration_of, held_out_part
from .recipe import Recipe
from .registry import build_options, get_strategy
from .report import PruningReport
from .runner import BlockRunner
from .sequence import apply_in_order
from .streaming import lies_elsewhere
from .surgery import apply_plan
from .teacher import with_teacher
from .team import Team


logger = logging.get_logger("optimum.blockprune.mixing")

# Our choice: splits that are tried unless they are named.
SPLITS = 5
# From the number of a search, counted from 1, and its strategy to what opens its ledger.
Ledgers = Callable[[int, str], Keep]


@dataclass(frozen=True)
class Split:
    """What came of one split.

    Attributes:
        removed: Number of blocks that go.
        parameters: What is left.
        kl: KL(dense || this one) on the held-out text, nats per token; `None` if it is not finite.
    """

    removed: int
    parameters: int
    kl: float | None


def mixed(
    model: PreTrainedModel,
    mix: Mix,
    tokenizer: PreTrainedTokenizerBase | None,
    report: PruningReport,
    *,
    base_model: str | None = None,
    ledgers: Ledgers,
) -> PruningPlan:
    """Returns the plan of the best split; the model is as it was.

    Its `details["mix"]` have the figures of all splits.

    Args:
        model: The dense model.
        mix: What is wanted.
        tokenizer: For text.
        report: Gets what all searches cost.
        base_model: Name of the dense model for the plan.
        ledgers: Opens what earlier runs have measured.

    Raises:
        ConfigurationError: A recipe or a number of blocks does not fit the model, or the target cannot be reached;
            before any text is read.
        CalibrationError: Text is missing or too short, or what is held out was calibrated on.
        UnsupportedModelError: The model cannot be pruned so, or its weights are not where they can be changed.
        NonFiniteError: No split has a finite divergence.
    """
    return _Mixing(model, mix, tokenizer, report, base_model, ledgers).plan()


class _Mixing:
    def __init__(
        self,
        model: PreTrainedModel,
        mix: Mix,
        tokenizer: PreTrainedTokenizerBase | None,
        report: PruningReport,
        base_model: str | None,
        ledgers: Ledgers,
    ) -> None:
        self.model, self.mix, self.tokenizer, self.report = model, mix, tokenizer, report
        self.base_model, self.ledgers = base_model, ledgers
        self.stack = find_blocks(model, mix.depth.stack)
        if lies_elsewhere(model):
            raise UnsupportedModelError(
                f"{self.stack.layout.subject}: splits are tried on the model, whose weights are streamed or offloaded "
                "here. Load it on a device."
            )
        self.counts = self._counts()
        # Of its own: each plan of the depth says anew what the search has cost by then.
        self._depth_report = PruningReport()
        self.depth = self._depth_search()
        self.held_out = self._held_out()

    def plan(self) -> PruningPlan:
        """Tries all splits."""
        found: list[tuple[Split, PruningPlan]] = []
        with tqdm(total=len(self.counts), desc="Splits", leave=False) as bar:
            for number, count in enumerate(self.counts, 1):
                found.append(self._tried(number, count))
                bar.update()
        self.report.add_search(self._depth_report)
        finite = [each for each in found if each[0].kl is not None]
        if not finite:
            raise NonFiniteError("The loss without what each split removes is NaN or infinite; choose other recipes.")
        best, plan = min(finite, key=lambda each: each[0].kl)
        logger.info(f"The best split removes {best.removed} blocks: KL {best.kl:.4f} nats per token on held-out text.")
        details = {
            "target_params": self.mix.target_params,
            "removed": best.removed,
            "held_out": self.held_out.describe(),
            "trail": [asdict(split) for split, _ in found],
        }
        return plan.with_provenance(details={**plan.details, "mix": details})

    def _counts(self) -> tuple[int, ...]:
        """Numbers of blocks with which the target can be reached, as far as that can be told without a search."""
        total, target = size_of(self.model)["parameters"], self.mix.target_params
        if target >= total:
            raise ConfigurationError(
                f"target_params={target:,} leaves nothing to remove: the model has {total:,} parameters."
            )
        removable = _asked(self.mix.depth.with_num_blocks(1), self.stack)
        sizes = sorted(sum(each.numel() for each in self.stack.blocks[block].parameters()) for block in removable)
        sizes = sizes[: len(self.stack) - 1]
        alone, _ = fewest_within(sizes, total, target)
        most = alone or len(sizes)
        even = {round(most * number / (SPLITS - 1)) for number in range(SPLITS)}
        wanted, refused = self.mix.counts or tuple(sorted(even)), {}
        if max(wanted) > 0:
            _asked(self.mix.depth.with_num_blocks(max(wanted)), self.stack)
        for count in wanted:
            if alone is None or count < alone:
                try:
                    self._try_width(any_choice(self.stack.layout, removable, count))
                except ConfigurationError as error:
                    refused[count] = error
                    logger.info(f"With {count} blocks less: {error}")
        possible = tuple(count for count in wanted if count not in refused)
        if refused and (self.mix.counts or all(alone is not None and count >= alone for count in possible)):
            raise next(iter(refused.values()))
        return possible

    def _try_width(self, plan: PruningPlan) -> None:
        """Raises what the width part would raise on a model without some blocks."""
        journal = apply_plan(self.model, plan)
        try:
            _asked(self._narrower, find_blocks(self.model, self.mix.width.stack))
        finally:
            journal.rollback()

    @property
    def _narrower(self) -> Recipe:
        return replace(self.mix.width, target_params=self.mix.target_params)

    def _depth_search(self) -> Search | None:
        most = max(self.counts)
        if not most:
            return None
        recipe, report = self.mix.depth.with_num_blocks(most), self._depth_report
        keep = self.ledgers(1, recipe.strategy)
        return Search(self.model, recipe, self.tokenizer, report, base_model=self.base_model, keep=keep)

    def _held_out(self) -> CalibrationWindows:
        """Windows that neither part sees, with what the dense model predicts there."""
        mix, recipe = self.mix, self.mix.depth
        seen = self.depth.windows if self.depth is not None else None
        found = held_out_part(self.stack, recipe, self.tokenizer, seen, mix.held_out_dataset, mix.held_out_samples)
        strategy = get_strategy(mix.width.strategy)()
        if mix.width.dataset is not None:
            others = calibration_of(self.stack, mix.width, strategy, self.tokenizer, PruningReport())
            try:
                refuse_shared(others, found)
            except CalibrationError as error:
                if mix.held_out_dataset is not None:
                    raise
                raise CalibrationError(
                    "'width' calibrates on windows that are held out from 'depth': give both the same num_samples, "
                    "seqlen and seed, or give held_out_dataset=... (--held-out-dataset PATH)."
                ) from error
        with self.report.timed("held-out text"), Team.current().together():
            return with_teacher(BlockRunner(self.model, recipe.stack), found, recipe.batch_size)

    def _tried(self, number: int, count: int) -> tuple[Split, PruningPlan]:
        """Makes, applies, measures and takes back one split."""
        makers: list[Callable[[], PruningPlan]] = []
        made, reached = PruningReport(), False
        if count:
            shallower = self.depth.plan(count)
            makers.append(lambda: shallower)
            reached = self._reaches(shallower)
        if not reached:
            keep = self.ledgers(1 + number, self.mix.width.strategy)
            makers.append(
                lambda: choose(self.model, self._narrower, self.tokenizer, made, base_model=self.base_model, keep=keep)
            )
        found = self._measured(makers)
        self.report.add_search(made)
        return found

    def _reaches(self, plan: PruningPlan) -> bool:
        """Whether what a plan leaves needs no width to go."""
        journal = apply_plan(self.model, plan)
        try:
            return size_of(self.model)["parameters"] <= self.mix.target_params
        finally:
            journal.rollback()

    def _measured(self, makers: Sequence[Callable[[], PruningPlan]]) -> tuple[Split, PruningPlan]:
        """What these steps leave, and their one plan."""
        plan, _, journal = apply_in_order(self.model, makers, self.report)
        try:
            parameters = size_of(self.model)["parameters"]
            if parameters > self.mix.target_params:  # a third party's strategy may err
                raise PlanError(
                    f"Strategy '{self.mix.width.strategy}' did not keep to target_params={self.mix.target_params:,}: "
                    f"{parameters:,} are left."
                )
            with self.report.timed("held-out text"):
                kl = self._divergence()
        finally:
            journal.rollback()
        split = Split(plan.num_removed, parameters, kl if math.isfinite(kl) else None)
        logger.info(f"{plan.num_removed} blocks less, {parameters:,} parameters: KL {kl:.4f} on held-out text.")
        return split, plan

    def _divergence(self) -> float:
        """Of the model as it is now, nats per token; measured by the first process for all."""
        runner = BlockRunner(self.model, self.mix.depth.stack)

        def measure(size: int) -> dict[str, Tensor]:
            total, count = torch.zeros((), dtype=torch.float64), 0
            for batch in self.held_out.batches(size):
                loss, tokens = runner.nll(batch)
                total, count = total + loss.cpu(), count + tokens
            return {"kl": total / count}

        size = BatchSize(self.mix.depth.batch_size)
        return Team.current().from_first(lambda: size.run(measure))["kl"].item()


def _asked(recipe: Recipe, stack: Any) -> tuple[int, ...]:
    """The blocks that may go; raises whatever speaks against a recipe."""
    strategy = get_strategy(recipe.strategy)()
    options = build_options(type(strategy), recipe.strategy_options or {})
    return asked_for(recipe, strategy, options, stack)[1]
