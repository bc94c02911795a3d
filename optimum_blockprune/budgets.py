# SPDX-License-Identifier: Apache-2.0
"""Budgets that only measuring turns into a number of blocks: quality on held-out text, and speed.

Quality: the model without 1, 2, ... blocks is measured on text that nothing was chosen on, up to the first number that
breaks the budget; the plan is that of the number before it. Only the order in which a strategy removes is followed: a
larger number further on that would keep the budget again is not looked for. Three kinds of strategies:

    greedy   ask after every step whether to go on (`SearchContext.go_on`); the one that breaks it is the last.
    one-pass choose once as many blocks as may go; their plans know every smaller choice (`PruningPlan.truncate`).
    others   choose anew for every number of blocks.

With compensation, maps are fitted to every number of blocks, and what is measured is the model with them.

All of it is measured through `SearchContext.measured`, so that several processes decide the same, and a resumed run
does not measure again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from optimum.utils import logging
from torch import Tensor

from .asked import any_choice
from .batches import Batch, CalibrationWindows
from .compensating import NONE, compensated
from .errors import ConfigurationError, NonFiniteError, PlanError
from .folding import Prepared
from .folds import Folds
from .half import Removal, Unit, blocks_off
from .inputs import vocabulary_of
from .ledger import Ledger
from .losses import head_rows, kl_of, perplexity_of, predicted, token_nll
from .plan import PruningPlan
from .recipe import Recipe
from .runner import BlockOutput, BlockRunner
from .speedup import fewest_blocks, speedups_of, timed_in_turns
from .stand_ins import rows_of
from .strategies.base import PruningStrategy, SearchContext


logger = logging.get_logger("optimum.blockprune.budgets")

# Raises where a strategy did not keep to what its context asked for.
Check = Callable[[PruningPlan, SearchContext], None]
# Our choice: rows of logits that are compared at a time.
_ROWS = 1024


def plan_within(
    recipe: Recipe,
    strategy: PruningStrategy,
    context: SearchContext,
    held_out: CalibrationWindows | None,
    check: Check,
) -> PruningPlan:
    """Lets a strategy choose as much as the recipe's budget says.

    Args:
        recipe: What is wanted.
        strategy: Chooses.
        context: What it may look at; of an open budget, `num_remove` is the largest number of blocks.
        held_out: Text that a budget of quality is held to.
        check: Looks at every plan that the strategy makes.

    Raises:
        ConfigurationError: Not one block can go within the budget, or too few to reach it.
        NonFiniteError: The dense model has no finite loss on the held-out text.
    """
    if held_out is not None:
        return _QualitySearch(recipe, strategy, context, held_out, check).plan()
    figures = None
    if recipe.budget == "target_speedup":
        count, figures = fewest_blocks(context.num_remove, recipe.target_speedup, _speed_trial(context))
        context = replace(context, num_remove=count)
    plan = strategy.select(context)
    check(plan, context)
    return plan if figures is None else plan.with_provenance(details={**plan.details, "budget": figures})


def _speed_trial(context: SearchContext) -> Callable[[int], dict[str, float]]:
    """Measures the model without a number of blocks; of several processes, the first one does so for all."""
    runner = context.runner

    def measure(count: int) -> dict[str, float]:
        plan = any_choice(runner.stack.layout, context.removable, count)
        first = context.team.is_first
        found = context.measured(
            f"speed-{count}", lambda _: {"seconds": timed_in_turns(runner.model, plan)} if first else {}
        )
        return speedups_of(found["seconds"])

    return measure


class _QualitySearch:
    """Removes as much as a budget of quality allows; see the module.

    Attributes:
        trail: What was measured for each number of blocks, ascending, the one that breaks the budget last.
    """

    def __init__(
        self,
        recipe: Recipe,
        strategy: PruningStrategy,
        context: SearchContext,
        held_out: CalibrationWindows,
        check: Check,
    ) -> None:
        self.recipe, self.strategy, self.context, self.held_out, self.check = (
            recipe,
            strategy,
            context,
            held_out,
            check,
        )
        self.name, self.limit = recipe.budget, recipe.requested[recipe.budget]
        self.trail: list[dict[str, Any]] = []
        self._kept: PruningPlan | None = None
        self._first: tuple[Unit, ...] = ()
        self._spent = 0
        self._dense = self._dense_loss()

    def plan(self) -> PruningPlan:
        """The plan of the largest number of blocks up to which the budget is kept."""
        plan = self._widest()
        if not self.trail:
            plan = self._walk(plan)
        if self._kept is None:
            raise self._nothing_can_go()
        kept = self._kept.num_removed
        if self.trail[-1]["within"]:
            logger.info(f"{self.name}={self.limit} allows for all {kept} blocks that may go.")
        if plan.num_removed > kept:
            plan = plan.truncate(kept)
        last = next(entry for entry in self.trail if entry["removed"] == kept)
        figures = {name: value for name, value in last.items() if name not in ("removed", "within")}
        budget = {"perplexity_dense": perplexity_of(self._dense), **figures, "held_out": self.held_out.describe()}
        budget |= {"block_forwards": self._spent, "trail": self.trail}
        details = {name: value for name, value in plan.details.items() if name != "truncated_from"}
        if self.recipe.compensation != NONE:
            plan = replace(plan, folds=self._kept.folds)
            details["compensation"] = self._kept.details["compensation"]
        if "naive_block_forwards" in details:
            # What is held out costs the same in whatever way is searched.
            details["naive_block_forwards"] += self._spent
        requested = dict(self.context.provenance["requested"])
        return plan.with_provenance(requested=requested, details={**details, "budget": budget})

    def _widest(self) -> PruningPlan:
        """The plan of a strategy that stops by itself, or that of the largest number of blocks that it can choose."""
        count = self.context.num_remove
        while True:
            asked = replace(self.context, num_remove=count, go_on=self._goes_on)
            try:
                plan = self.strategy.select(asked)
            except ConfigurationError:
                # Some choose fewer only: blocks that lie side by side, for example.
                if count == 1 or self.trail:
                    raise
                count -= 1
                continue
            self.check(plan, replace(asked, num_remove=self.trail[-1]["removed"]) if self.trail else asked)
            return plan

    def _walk(self, widest: PruningPlan) -> PruningPlan:
        """Tries the depths of a strategy that did not ask; returns the last plan within the budget."""
        best = widest
        for count in range(1, widest.num_removed + 1):
            plan = of_depth(self.strategy, part_of(self.context, count), widest, self.check)
            if not self._tried(plan):
                break
            best = plan
        return best

    def _goes_on(self, removed: Sequence[Removal]) -> bool:
        """What a greedy search asks."""
        return self._tried(self.context.plan(removed)) and len(removed) < self.context.num_remove

    def _tried(self, plan: PruningPlan) -> bool:
        """Measures the model that a plan leaves; says whether that is within the budget."""
        off, count = plan.removed_units, plan.num_removed
        if self.recipe.compensation != NONE:
            plan = compensated(part_of(self.context, count), plan, self.recipe.compensation)
        found = self._measured(off, plan.folds)
        loss, kl = (found[name] / found["tokens"] if name in found else None for name in ("nll", "kl"))
        finite = math.isfinite(loss)
        increase = math.expm1(min(loss - self._dense, 700.0)) if finite else None
        decisive = increase if self.name == "max_ppl_increase" else kl
        within = decisive is not None and math.isfinite(decisive) and decisive <= self.limit
        figures = {"perplexity": perplexity_of(loss), "increase": increase, "kl": kl}
        known = {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}
        self.trail.append({"removed": count, "within": within, **known})
        self._first = self._first or tuple(off)
        if within:
            self._kept = plan
        shown = ", ".join(f"{name} {value:.4f}" for name, value in known.items()) or "no finite loss"
        logger.info(
            f"Held out, without {count}: {shown}; {self.name}={self.limit} is {'kept' if within else 'broken'}."
        )
        return within

    def _dense_loss(self) -> float:
        found = self._measured((), Folds())
        loss = found["nll"] / found["tokens"]
        if not math.isfinite(loss):
            for batch in self.held_out.batches(self.context.batch_size):
                self.context.runner.diagnose(batch)
            raise NonFiniteError(
                "The loss on the held-out text is NaN or infinite although every block's output is finite: the final "
                "norm or the head overflows. Load the model in another dtype."
            )
        return loss

    def _measured(self, off: Sequence[Unit], folds: Folds) -> dict[str, float]:
        """Sums over the held-out text: `nll`, `tokens`, and `kl` where the budget needs it."""
        runner = self.context.runner
        compare = _compared if off and self.name == "max_kl" else _alone
        maps = Prepared(runner.stack.blocks, folds.entries, folds.tensors())

        def measure(size: int) -> dict[str, Tensor]:
            sums: dict[str, Tensor] = {}
            for _, batch in self.context.batches(size, self.held_out):
                for name, value in compare(runner, batch, off, maps).items():
                    sums[name] = sums[name] + value if name in sums else value
            return sums

        names = "+".join(map(str, off)) or "nothing"
        found = self.context.measured(f"held-out, without {names}{folds.digest and ' with '}{folds.digest}", measure)
        # Of all processes, and also where it was read back; of the dense model and the other one where both run.
        live = runner.num_blocks - len(blocks_off(off)) + (runner.num_blocks if compare is _compared else 0)
        self._spent += live * self.held_out.num_windows
        return {name: value.item() for name, value in found.items()}

    def _nothing_can_go(self) -> ConfigurationError:
        """Says what the best single removal costs."""
        names = " and ".join(map(str, self._first))
        figures = self.trail[0]
        reached = figures.get("increase" if self.name == "max_ppl_increase" else "kl")
        start = (
            f"{self.name}={self.limit} allows for no removal: without {names}, which '{self.recipe.strategy}' removes"
        )
        if reached is None:
            return ConfigurationError(f"{start} first, the loss on the held-out text is not finite.")
        costs = f"the mean KL on the held-out text is {reached:.4g} nats per token"
        if self.name == "max_ppl_increase":
            costs = (
                f"the held-out perplexity is {figures['perplexity']:.4g} instead of {perplexity_of(self._dense):.4g}, "
                f"{100 * reached:.4g} % more"
            )
        smallest = math.ceil(reached * 10_000) / 10_000
        return ConfigurationError(
            f"{start} first, {costs}. The smallest {self.name} that removes a block is {smallest}."
        )


def of_depth(strategy: PruningStrategy, context: SearchContext, widest: PruningPlan, check: Check) -> PruningPlan:
    """The plan of `context.num_remove` blocks: a larger one cut short or, where that does not know its smaller
    choices, a choice of its own."""
    try:
        return widest.truncate(context.num_remove)
    except PlanError:
        plan = strategy.select(context)
        check(plan, context)
        return plan


def part_of(context: SearchContext, num_remove: int) -> SearchContext:
    """The context of one number of blocks among several, whose measurements are kept apart."""
    ledger = None if context.ledger is None else _Part(context.ledger, f"{num_remove} blocks: ")
    return replace(context, num_remove=num_remove, ledger=ledger)


class _Part:
    """What a ledger holds of one search among several, under names of their own."""

    def __init__(self, ledger: Ledger, prefix: str) -> None:
        self._ledger, self._prefix = ledger, prefix

    def read(self, key: str) -> dict[str, Tensor] | None:
        """See `Ledger.read`."""
        return self._ledger.read(self._prefix + key)

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """See `Ledger.write`."""
        self._ledger.write(self._prefix + key, tensors)

    def forget(self, keys: Iterable[str]) -> None:
        """See `Ledger.forget`."""
        self._ledger.forget(self._prefix + key for key in keys)


def _alone(runner: BlockRunner, batch: Batch, off: Sequence[Unit], maps: Prepared) -> dict[str, Tensor]:
    """Summed loss of a batch, and the number of predictions."""
    with maps.on():
        loss, count = runner.nll(batch, off)
    return {"nll": loss.cpu(), "tokens": torch.tensor(count)}


@torch.no_grad()
def _compared(runner: BlockRunner, batch: Batch, off: Sequence[Unit], maps: Prepared) -> dict[str, Tensor]:
    """Summed loss and KL(dense || without `off`); logits are there for a few windows at a time."""
    sums = {"nll": torch.zeros((), dtype=torch.float64), "kl": torch.zeros((), dtype=torch.float64)}
    ends = [runner.run_to(batch, runner.last_block(())).value]
    with maps.on():
        ends.append(runner.run_to(batch, runner.last_block(off), off).value)
    tokens = 0
    for rows, part in head_rows(batch, vocabulary_of(runner.stack.layout)):
        states = [BlockOutput(runner.num_blocks - 1, rows_of(end, rows, len(batch.input_ids))) for end in ends]
        truth, logits = (runner.logits(part, start=state) for state in states)
        loss, count = token_nll(logits, part)
        sums["nll"], tokens = sums["nll"] + loss.cpu(), tokens + count
        there = predicted(part).to(logits.device)
        pairs = zip(truth.to(logits.device)[there].split(_ROWS), logits[there].split(_ROWS), strict=True)
        for ours, theirs in pairs:
            sums["kl"] = sums["kl"] + kl_of(ours.float(), theirs.float())
    return {**sums, "tokens": torch.tensor(tokens)}
