# SPDX-License-Identifier: Apache-2.0
"""Functional-network pruning: MLP channels that belong to no functional network go (arXiv 2508.05239).

Only the abstract of the paper and the authors' code could be read. From the code: signals, standardisation, leading
singular vectors, FastICA with the cube, |z| of the maps as the score, its maximum over groups of texts, and the first
three and last two blocks whole. Our choice: a count in place of the hand-set threshold, the first token of each window
left out, fp64, three starts with tanh as the second contrast, at most one component per twenty tokens, and the
controls. Attention is left alone, as in the authors' notebooks. The variant for whole blocks is ours altogether.

What is not covered: the authors' numbers; and their bias where a class of models has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import CalibrationError, ConfigurationError, NonFiniteError
from ..half import name_of
from ..half_choice import choose_halves
from ..ica import choose_blocks, effective_components, set_loss
from ..joint_networks import BLOCK_SIGNALS, UPDATE, VARIANCE, WEIGHTS, BlockUpdates, joint_networks
from ..layer_stream import LayerStream, counted_tokens
from ..mean_inputs import mean_inputs
from ..measures import raise_non_finite, real_tokens
from ..network_scores import CONTRASTS, MapSettings, NetworkScores
from ..passes import stream
from ..plan import PruningPlan
from ..signals import ACT_UP, SIGNALS
from ..widths import UnitGroup
from .base import BLOCK, HALF_BLOCK, Place, PruningStrategy, SearchContext
from .ranking import RANKINGS, Scores, check_choice, check_ranking, kept_units


NAME = "functional_network"
CONTROLS = ("none", "leverage_only", "random_rotation")
# Fewer carry less than two components.
LEAST_TOKENS = 40
# Options that only one of the units knows.
_ONLY = {
    "width": ("groups", "signals", "ranking", "compensate"),
    "block": ("block_signals", "weights", "quantile", "contiguous"),
}


@dataclass(frozen=True)
class FunctionalNetworkOptions:
    """Options of functional-network pruning.

    Attributes:
        unit: `"width"` removes MLP channels, as published; `"block"` whole blocks (ours).
        components: Networks of a block in a group of texts, or of all blocks (the authors: 128); at most one per
            twenty tokens.
        restarts: Random starts of each ICA; the sparsest maps that converged count.
        control: What takes the place of ICA, to show what it adds: `"leverage_only"` no rotation of the maps at all,
            `"random_rotation"` a random one.
        keep_first: Let the first token of each window count, with its massive activations, as the authors do.
        max_tokens: Most tokens to measure on (width: in each group), evenly spaced ones of more. Time grows with
            their third power; the authors have some 7,500 in each group.
        groups: Width: groups of texts, each with maps of its own; a channel's highest score in any of them counts.
        signals: Width: `"act_up"`, outputs of activation and up projection, as published; `"product"` (ours), the
            hidden unit itself.
        ranking: Width: `"uniform"` keeps the same share in every block; `"global"` one order over all blocks, as
            published (not with layout `uniform`).
        compensate: Width: the bias of the projection behind the channels makes up for what the removed ones give on
            average, in models that have one there (their `down_proj`, `c_proj`, `fc2`); one pass more.
        block_signals: Block: `"update"`, what the block adds over the size of what comes in, of which the first
            block often has nearly all; `"standardised"`, that with each coordinate scaled to deviation 1.
        weights: Block: a network counts by the `"variance"` of its time course, or all alike (`"uniform"`).
        quantile: Block: share of the channels that belong to no network.
        contiguous: Block: remove neighbours only.
    """

    unit: str = "width"
    components: int = 128
    restarts: int = 3
    control: str = "none"
    keep_first: bool = False
    max_tokens: int = 4096
    groups: int = 8
    signals: str = ACT_UP
    ranking: str = "uniform"
    compensate: bool = False
    block_signals: str = UPDATE
    weights: str = VARIANCE
    quantile: float = 0.9
    contiguous: bool = False

    def __post_init__(self) -> None:
        choices = {
            "unit": tuple(_ONLY),
            "control": CONTROLS,
            "signals": SIGNALS,
            "ranking": RANKINGS,
            "block_signals": BLOCK_SIGNALS,
            "weights": WEIGHTS,
        }
        for name, known in choices.items():
            check_choice(NAME, name, getattr(self, name), known)
        for name, least in {"components": 1, "restarts": 1, "groups": 1, "max_tokens": LEAST_TOKENS}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigurationError(f"{name}={value!r} of {NAME} must be a whole number of at least {least}.")
        for name in ("keep_first", "contiguous", "compensate"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"{name}={getattr(self, name)!r} of {NAME} must be true or false.")
        quantile = self.quantile
        if isinstance(quantile, bool) or not isinstance(quantile, (int, float)) or not 0 <= quantile < 1:
            raise ConfigurationError(f"quantile={quantile!r} of {NAME} must be at least 0 and less than 1.")
        defaults = {field.name: field.default for field in fields(self)}
        for unit, names in _ONLY.items():
            given = [name for name in names if unit != self.unit and getattr(self, name) != defaults[name]]
            if given:
                raise ConfigurationError(f"{', '.join(given)} of {NAME} can only be set with unit='{unit}'.")


class FunctionalNetwork(PruningStrategy):
    """Removes the MLP channels that belong least to any functional network of the model (arXiv 2508.05239).

    Unit `"width"`, block by block, so that only one block's signals are held:

    1. Signals X [T, 2f] of each group of texts: outputs of the activation and of the up projection.
    2. Z: each channel standardised over the tokens. U: the leading singular vectors of Z over the channels.
    3. Spatial ICA: U is whitened and rotated by symmetric FastICA (cube, fp64), each map standardised to z.
    4. Score of a unit: the largest |z| over maps, groups and its two channels. The highest stay; the threshold that
       this implies is in the plan.

    Unit `"block"` (ours): one ICA over what all blocks add to the stream; a block takes part by its share of the
    strong channels of each network. Blocks go so that no network is emptied: a set loss, convex in these shares, is
    lowered greedily, then by exchanges. See `optimum_blockprune.joint_networks`. With half-blocks, the updates are
    those of halves, and pairs go by the same loss; see `optimum_blockprune.half_choice`.

    The first three and last two blocks stay as they are, except with layout `uniform`, which protects none.

    Memory, unit `"width"`: the residual stream of all windows, T x 2f signals of one group (and up to three fp64
    copies of them at work), and one score per unit of the model. `"block"`: the stream at `max_tokens` tokens before
    and after every block, and `max_tokens`^2 in fp64. `stored_values` in the plan counts without the copies.
    """

    name: ClassVar[str] = NAME
    unit: ClassVar[str] = "width"
    Options: ClassVar[type] = FunctionalNetworkOptions
    units: ClassVar[tuple[str, ...]] = (BLOCK, HALF_BLOCK)
    protect_first: ClassVar[int] = 3
    protect_last: ClassVar[int] = 2

    @classmethod
    def unit_of(cls, options: FunctionalNetworkOptions) -> str:
        """See `PruningStrategy.unit_of`."""
        return options.unit

    def select(self, context: SearchContext) -> PruningPlan:
        """See the class.

        Raises:
            CalibrationError: There are too few tokens.
            ConfigurationError: `ranking="global"` with layout `uniform`.
            NonFiniteError: A signal is NaN or infinite, or no ICA of a block came out finite.
            UnsupportedModelError: The blocks cannot be run one after the other, or signals cannot be captured.
        """
        return _fewer_blocks(context) if context.width is None else _narrower(context)


def _narrower(context: SearchContext) -> PruningPlan:
    """Unit `"width"`."""
    options, task = context.options, context.width
    check_ranking(task, options.ranking)
    if options.compensate:
        _require_biases(context)

    def stream_for(size: int) -> LayerStream:
        return LayerStream(
            context.runner,
            context.require_windows(),
            groups=options.groups,
            batch_size=size,
            keep_first=options.keep_first,
            max_tokens=options.max_tokens,
        )

    texts = stream_for(context.batch_size).groups
    fewest = min(each.tokens for each in texts)
    if fewest < LEAST_TOKENS:
        raise _too_few(fewest, f"one of {len(texts)} groups of texts", "fewer groups, more text")
    units: dict[int, list[UnitGroup]] = {}
    for place in task.free:
        units.setdefault(place.block, []).append(task.group_of(place))
    settings = MapSettings(options.components, options.restarts, context.seed, options.control, options.signals)
    search = NetworkScores(context, stream_for, units, settings)
    with context.progress(search.steps, "Functional networks") as bar:
        found = search.run(bar.update)
    scores = {place: found[place.block, task.group_of(place).writer] for place in task.free}
    kept, figures = kept_units(task, scores, options.ranking)
    if "thresholds" not in figures:
        figures = {"thresholds": _threshold(scores, kept)}
    means = _means(context) if options.compensate else None
    return context.width_plan(kept, scores=scores, means=means, details={**search.details(), **figures})


def _require_biases(context: SearchContext) -> None:
    for place in context.width.free:
        if context.writer(place).bias is None:
            raise ConfigurationError(
                f"compensate=True of {NAME} needs a bias to put the means into, and "
                f"'{context.width.group_of(place).writer}' of block {place.block} has none: this class of model has "
                "no place for one. Leave compensate out."
            )


def _means(context: SearchContext) -> dict[Place, Sequence[float]]:
    """Mean of every channel's value, of the dense model."""
    windows = context.require_windows()
    writers = {place: context.writer(place) for place in context.width.free}
    with context.progress(windows.num_windows, "Means") as bar:
        found = mean_inputs(context, writers, bar.update)
    return {place: mean.tolist() for place, mean in found.items()}


def _threshold(scores: Scores, kept: Mapping[Place, Sequence[int]]) -> dict[str, float]:
    """The highest score of a removed unit; empty where none is removed."""
    removed = [scores[place][unit] for place in kept for unit in set(range(place.units)) - set(kept[place])]
    return {"mlp": max(removed)} if removed else {}


def _fewer_blocks(context: SearchContext) -> PruningPlan:
    """Unit `"block"`."""
    options, row = context.options, context.row
    found = context.measured("networks", partial(_participation, context))
    pieces = found["blocks"].tolist()
    # What takes part is additive: a pair of halves takes part by the sum.
    scores = row.scores([sum(each) for each in zip(*(pieces[part:] for part in range(row.per_block)), strict=False)])
    choose_set = choose_halves if context.unit == HALF_BLOCK else choose_blocks
    chosen = choose_set(
        found["shares"], found["weights"], context.removable, context.num_remove, contiguous=options.contiguous
    )
    # Of equal ones the later go first.
    order = sorted(reversed(row.removals(chosen)), key=scores.__getitem__)
    details = {
        "block_signals": options.block_signals,
        "weights": options.weights,
        "control": options.control,
        "tokens": int(found["tokens"]),
        "components": int(found["components"]),
        "converged": bool(found["converged"]),
        "contrast": CONTRASTS[int(found["contrast"])],
        "map_weights": found["weights"].tolist(),
        "set_loss": set_loss(found["shares"], found["weights"], chosen),
        "stored_values": int(found["stored_values"]),
    }
    steps = [{"block": name_of(each), "participation": scores[each]} for each in order]
    return context.plan(order, scores=scores, steps=steps, details=details)


def _participation(context: SearchContext, size: int) -> dict[str, Tensor]:
    """How much each block (or half) takes part; one process measures all, as one ICA looks at all of them."""
    if not context.team.is_first:
        return {}
    options, runner = context.options, context.runner
    updates, tokens = _block_updates(context, size)
    try:
        networks = joint_networks(
            lambda block: updates.of(block, options.block_signals),
            context.row.pieces,
            components=effective_components(options.components, tokens),
            restarts=options.restarts,
            seed=context.seed,
            control=options.control,
        )
    except NonFiniteError:
        raise_non_finite(runner.diagnose, context.require_windows().batches(size))
    if networks is None:
        raise NonFiniteError(
            "No functional networks were found: no block adds anything that varies from token to token, or no ICA "
            "came out finite. Give other or more text, or use control='leverage_only', which needs no ICA."
        )
    found = networks.participation(options.quantile, options.weights)
    log = networks.maps.log
    counts = {
        "tokens": tokens,
        "components": len(networks.maps.z),
        "converged": int(log.converged),
        "contrast": CONTRASTS.index(log.contrast),
        "stored_values": updates.stored_values + tokens**2 + 2 * networks.maps.z.numel(),
    }
    return {
        "blocks": torch.tensor(found.blocks, dtype=torch.float64),
        "shares": found.shares.double(),
        "weights": found.weights.double(),
        **{name: torch.tensor(count) for name, count in counts.items()},
    }


def _block_updates(context: SearchContext, size: int) -> tuple[BlockUpdates, int]:
    """One pass over the text; returns what blocks, or halves, add, and at how many tokens."""
    options, runner, windows = context.options, context.runner, context.require_windows()
    batches = windows.batches(size)
    chosen = counted_tokens(runner, batches, options.keep_first, options.max_tokens)
    tokens = sum(int(mask.sum()) for mask in chosen)
    if tokens < LEAST_TOKENS:
        raise _too_few(tokens, "the text", "more text")
    updates, row = BlockUpdates(context.row.pieces, tokens), context.row
    with context.progress(windows.num_windows, "Functional networks") as bar:
        numbered = zip(chosen, windows.batches(size), strict=True)
        settings = {"copies": 0, "done": bar.update, "per_block": row.per_block}
        stream(runner, numbered, lambda mask, _: updates.watch(real_tokens(mask)), **settings)
    return updates, tokens


def _too_few(tokens: int, where: str, remedy: str) -> CalibrationError:
    return CalibrationError(
        f"{NAME} found {tokens} usable tokens in {where} and needs {LEAST_TOKENS}: padding does not count, nor the "
        f"first token of each window unless keep_first is set. Use {remedy} or a longer seqlen."
    )
