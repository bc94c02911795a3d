# SPDX-License-Identifier: Apache-2.0
"""LLM-BIP: channels and heads by the most that they can change the output of their block (arXiv 2412.06419).

The paper gives the scores of sections 1.3-1.7 below as matrices, tokens x hidden coordinates, and its objective, the
change of the block's output. Everything else here is our choice: the scalar that a matrix becomes, the sum over a
head's channels, what `W_U` is in a gated FFN, norms behind a writer, the ranking and the calibration text. No number
of the paper is claimed to be reproduced.

    FFN channel j         s = |x_j| |W_D^j|                          (alone, exactly the change of the output)
    attention channel j   s = |x_j| |W_O^j| (I + |W_U| |W_D|)        (through the residual path and through the FFN)

What is not covered: FFNs that are mixtures of experts, and blocks that norm after the residual sum. There, attention
is scored without the FFN behind it (`propagate="none"`), which the plan says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from optimum.utils import logging
from torch import Tensor

from ..batches import Batch, CalibrationWindows
from ..block_parts import PARALLEL, UNKNOWN, BlockParts, find_parts
from ..errors import ConfigurationError
from ..measures import content_mask, raise_non_finite
from ..offload import held
from ..output_bounds import LOCAL, NONE, PAPER, OutputBounds
from ..passes import prove, sum_tokens
from ..plan import PruningPlan
from ..unit_effects import UnitEffects
from ..widths import UnitGroup, spelled
from .base import Place, PruningStrategy, SearchContext
from .ranking import FAMILY_CHOICES, RANKINGS, check_choice, check_ranking, kept_units


logger = logging.get_logger("optimum.blockprune.bip")

REDUCTIONS = ("l1", "l2")
EXACT = "exact"
PROPAGATIONS = (PAPER, LOCAL, EXACT, NONE)


@dataclass(frozen=True)
class BIPOptions:
    """Options of LLM-BIP. The defaults are the paper taken literally.

    Better in our spot check (one small model): `reduction="l2"` for channels, `propagate="exact"` or `"local"` for
    heads.

    Attributes:
        reduction: `"l1"` is the sum of all entries of the bound; `"l2"` its Frobenius norm.
        propagate: What lies between a head and the block's output. `"paper"`: the residual path and |W_U| |W_D|, with
            the up projection as W_U, without norm and gate. `"local"`: the slopes of norm, gate and activation as they
            are on the text (ours). `"exact"`: no bound; the block runs without each head, and the change of its output
            counts (ours; one run of the block per KV group). `"none"`: the residual path only. Channels of the FFN
            have nothing behind them: their score is the same with each.
        families: `"mlp"` channels, `"attention"` heads (whole KV groups), or `"both"`.
        ranking: `"uniform"` keeps the same share in every block. `"global"` compares blocks: scores over the size of
            the block's output, over the parameters of a unit, family by family (ours; not with layout `uniform`).
        skip_first: Leave the first token of each window out, whose activations are massive (ours).
        exact_samples: Windows that `"exact"` looks at, the first ones.
    """

    reduction: str = "l1"
    propagate: str = PAPER
    families: str = "both"
    ranking: str = "uniform"
    skip_first: bool = False
    exact_samples: int = 8

    def __post_init__(self) -> None:
        choices = {
            "reduction": REDUCTIONS,
            "propagate": PROPAGATIONS,
            "families": tuple(FAMILY_CHOICES),
            "ranking": RANKINGS,
        }
        for name, known in choices.items():
            check_choice("bip", name, getattr(self, name), known)
        if not isinstance(self.skip_first, bool):
            raise ConfigurationError(f"skip_first={self.skip_first!r} of bip must be true or false.")
        count = self.exact_samples
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigurationError(f"exact_samples={count!r} of bip must be a whole number of at least 1.")


class BIP(PruningStrategy):
    """Removes the channels and KV groups that can change their block's output least (LLM-BIP, arXiv 2412.06419).

    1. One forward pass of the dense model: per input channel of every writer, the sum of |x| (`l2`: of x^2) over all
       tokens that are not padding, in fp64. No activation is stored.
    2. FFN channel j: sum_t |x_tj| times sum_k |W_D[j,k]|. Attention channel j: sum_t |x_tj| times |W_O^j| v, with
       v = 1 + |W_U| (|W_D| 1), without any d x d product; v = 1 where attention does not feed the FFN of its own
       block (parallel residual). `l2`: the product of the norms. A KV group: the sum over its channels.
    3. Keep the units with the highest scores, the same share of them in every block and family (`ranking`).

    What the modules are to each other is seen on made-up tokens first, which are not counted. With `ranking="global"`,
    the scores of the plan are the compared ones (see the options), and protecting the first tenth and the last
    twentieth of the blocks helped in our check (`protect_first`, `protect_last`; 0 by default).

    The plan's figures: `tokens`; `stored_values`, the numbers held between batches; `up`, which weights stand for W_U;
    `parallel_blocks`; `unpropagated_blocks`, where nothing is known of the FFN; `v_means`, the mean of v by block.
    """

    name: ClassVar[str] = "bip"
    unit: ClassVar[str] = "width"
    Options: ClassVar[type] = BIPOptions

    @classmethod
    def families_of(cls, options: BIPOptions) -> tuple[str, ...]:
        """See `PruningStrategy.families_of`."""
        return FAMILY_CHOICES[options.families]

    def select(self, context: SearchContext) -> PruningPlan:
        """See the class.

        Raises:
            ConfigurationError: `ranking="global"` with layout `uniform`.
            NonFiniteError: An activation is NaN or infinite.
            UnsupportedModelError: `propagate="local"` needs what cannot be seen in this model.
        """
        options: BIPOptions = context.options
        check_ranking(context.width, options.ranking)
        search = _Search(context)
        scores, details = search.bounds()
        changes, figures = search.effects()
        scores, details = scores | changes, details | figures
        scores = {place: scores[place] for place in context.width.free}
        kept, ranked = kept_units(context.width, scores, options.ranking)
        return context.width_plan(kept, scores=scores, details={**details, **ranked})


_Scores = tuple[dict[Place, list[float]], dict[str, Any]]


class _Search:
    """Measures the units of the free places."""

    def __init__(self, context: SearchContext) -> None:
        self._context, self._options, self._task = context, context.options, context.width
        self._windows = context.require_windows()
        free = self._task.free
        exact = self._options.propagate == EXACT
        self._tried = [place for place in free if exact and self._family(place) == "attention"]
        self._bounded = [place for place in free if place not in self._tried]

    def bounds(self) -> _Scores:
        """The places whose score is a bound, and figures for the plan."""
        options, runner = self._options, self._context.runner
        details = {"reduction": options.reduction, "propagate": options.propagate}
        if not self._bounded:
            return {}, details
        propagate = NONE if options.propagate == EXACT else options.propagate
        reaches = propagate != NONE and any(self._family(place) == "attention" for place in self._bounded)
        parts = find_parts(runner.stack, self._groups(self._bounded), flow=reaches)
        bounds = OutputBounds(runner.stack.blocks, parts, reduction=options.reduction, propagate=propagate)
        for place in self._bounded:
            bounds.watch(place.block, self._task.group_of(place))
            if options.ranking == "global":
                bounds.watch_output(place.block)
        self._stream(bounds)
        scores: dict[Place, list[float]] = {}
        for place in self._bounded:
            with held(runner.stack.blocks[place.block]):
                scores[place] = bounds.scores(place.block, self._task.group_of(place))
        if options.ranking == "global":
            scores = {place: _comparable(each, bounds, place) for place, each in scores.items()}
        details |= {"tokens": bounds.sums.tokens, "stored_values": bounds.sums.stored_values}
        if reaches:
            attention = {place.block for place in self._bounded if self._family(place) == "attention"}
            details |= _reach_figures({block: parts[block] for block in sorted(attention)}, bounds)
        return scores, details

    def effects(self) -> _Scores:
        """The places whose units are tried one by one, and figures for the plan."""
        if not self._tried:
            return {}, {}
        options, context = self._options, self._context
        windows = self._windows.first(min(options.exact_samples, self._windows.num_windows))
        self._check_replay()
        groups: dict[int, list[UnitGroup]] = {}
        for place in self._tried:
            groups.setdefault(place.block, []).append(self._task.group_of(place))
        effects = UnitEffects(context.runner, groups, options.reduction)
        batches = math.ceil(windows.num_windows / context.batch_size)
        with context.progress(batches * effects.runs, "BIP exact") as bar:

            def measure(size: int) -> dict[str, Tensor]:
                effects.clear()
                for _, batch in context.batches(size, windows):
                    effects.add(batch, self._mask(batch), bar.update)
                return effects.sums()

            effects.restore(context.measured("bip-exact", measure))
        self._require(effects.finite, windows)
        scores = {place: effects.effects(place.block, self._task.group_of(place)) for place in self._tried}
        if options.ranking == "global":
            scores = {place: _comparable(each, effects, place) for place, each in scores.items()}
        return scores, {"exact_tokens": effects.tokens, "exact_windows": windows.num_windows}

    def _family(self, place: Place) -> str:
        return self._task.group_of(place).family

    def _groups(self, places: Iterable[Place]) -> dict[int, list[UnitGroup]]:
        """All groups of the blocks of some places."""
        found: dict[int, list[UnitGroup]] = {place.block: [] for place in places}
        for place in self._task.places:
            if place.block in found:
                found[place.block].append(self._task.group_of(place))
        return found

    def _stream(self, bounds: OutputBounds) -> None:
        context, last = self._context, max(place.block for place in self._bounded)
        sums = bounds.sums
        with context.progress(self._windows.num_windows, "BIP") as bar:

            def measure(size: int) -> dict[str, Tensor]:
                sums.clear()
                sum_tokens(context.runner, context.batches(size), sums, self._mask, stop=last, done=bar.update)
                return sums.sums()

            sums.restore(context.measured("bip", measure))
        self._require(sums.finite, self._windows)

    def _mask(self, batch: Batch) -> Any:
        mask = self._context.runner.positions(batch)
        return content_mask(mask) if self._options.skip_first else mask

    def _require(self, finite: bool, windows: CalibrationWindows) -> None:
        if not finite:
            raise_non_finite(self._context.runner.diagnose, windows.batches(self._context.batch_size))

    def _check_replay(self) -> None:
        """Blocks are run from stored outputs, which must be all that they share."""
        prove(self._context.runner, next(iter(self._windows.batches(1))).beginning())


def _comparable(scores: list[float], measured: OutputBounds | UnitEffects, place: Place) -> list[float]:
    """Scores over the size of the block's output and over the parameters of a unit."""
    divisor = measured.output_size(place.block) * place.cost
    return [score / divisor if divisor else score for score in scores]


def _reach_figures(parts: dict[int, BlockParts], bounds: OutputBounds) -> dict[str, Any]:
    unknown = [block for block, each in parts.items() if each.flow == UNKNOWN]
    if unknown:
        logger.warning(
            f"bip: attention of blocks {spelled(unknown)} is scored with propagate='none': no FFN was found behind it "
            "(a mixture of experts?), or the block norms after its residual sum."
        )
    readings = {ffn.reading for each in parts.values() if each.flow not in (UNKNOWN, PARALLEL) for ffn in each.ffns}
    return {
        "up": sorted(readings),
        "parallel_blocks": [block for block, each in parts.items() if each.flow == PARALLEL],
        "unpropagated_blocks": unknown,
        "v_means": {str(block): mean for block, mean in sorted(bounds.vector_means.items())},
    }
