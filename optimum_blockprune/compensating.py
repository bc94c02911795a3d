# SPDX-License-Identifier: Apache-2.0
"""Compensation without training: weights in front of every cut learn, in closed form, to make up for what is gone.

A *cut* is where kept halves (or blocks) are no longer neighbours. In front of it stands a module that reads `a` and
writes to the residual stream (`writers`). With x the stream of the pruned model behind it, and z the stream of the
dense model where the next kept part begins, the change D of its weight is the minimum over tokens of

    |x + a D - z|^2 / |z|^2  +  s |D|^2

which is linear regression. (ReplaceMe, arXiv 2505.02819, fits a map of what the module writes, without weights and
shrunk towards zero. What it reads has more channels, and says more.) No tensor is added, no shape changes. A norm
behind the projection takes a factor for each channel, fitted to what it writes. Cuts are taken from front to back, on
the inputs that the pruned model has by then, so that a cut also makes up for what those before it left over.

`"reconstruct"` goes on behind a cut: what is left over there, the weights of the half-blocks that follow make up for,
one after the other and in the same way, each with the stream of the dense model behind it as z. (Layer by layer on the
inputs of the changed model: GPFQ, arXiv 2201.11113, for quantised weights.)

Ours: the weighting (a norm reads every token at its own scale), the shrinkage towards the weight that is there, the
first token of a window, which D is to leave alone (see `fitting`), text of the model's own (see `own_text`), and the
judge: some windows take no part in the regression, and a map is kept only if the KL divergence between the dense and
the pruned model falls on them. They also tell what strength of shrinkage and what weight of own text are best. Behind
a cut, fewer strengths are tried, own text weighs what it weighs at the cut, and what changes little is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from optimum.utils import logging
from torch import Tensor

from .batches import Batch, CalibrationWindows
from .branching import head_losses
from .errors import CalibrationError, NonFiniteError, UnsupportedModelError
from .fitting import STRENGTHS, Tokens, fitting_part, solved, weights_of
from .folding import Prepared
from .folds import CHANGE, DIAGONAL, MATRIX, Fold, Folds, digest_of
from .half import MLP, Unit
from .last_states import LastStates, can_go_on
from .losses import predicted
from .measures import fp64_zeros
from .own_text import SIDE_BY_SIDE, prompts_of
from .plan import PruningPlan
from .points import Point, block_before, cut_points, points_from, writer_before
from .recipe import Recipe
from .runner import BlockOutput, BlockRunner
from .stand_ins import hidden_of, hooks
from .strategies.base import SearchContext
from .streaming import lies_elsewhere
from .teacher import with_teacher
from .writers import Writer


logger = logging.get_logger("optimum.blockprune.compensating")

NONE, SCALE, RIDGE, AUTO, RECONSTRUCT = "none", "scale", "ridge", "auto", "reconstruct"
_KINDS = {SCALE: (DIAGONAL,), RIDGE: (CHANGE,), AUTO: (DIAGONAL, CHANGE), RECONSTRUCT: (CHANGE,)}
# What a token of the model's own text weighs beside one of the given text; tried at every cut, our choice.
SHARES = (0.0, 0.1, 0.3, 1.0)
# Tried behind a cut, and by what share the divergence must fall there: a map is a weight to store. Our choice.
BEHIND, _WORTH = (0.03, 0.3, 3.0), 1e-3
# One window in so many judges.
_JUDGES = 8
# A batch: of which windows it is, its first one, and how many it has.
Key = tuple[str, int, int]
_JUDGING = "judges"


def check_compensation(runner: BlockRunner, windows: CalibrationWindows | None, recipe: Recipe) -> None:
    """Says before a search what compensation cannot do.

    Raises:
        CalibrationError: Fewer than two windows.
        UnsupportedModelError: The weights are not where they could be changed.
    """
    if recipe.compensation == NONE:
        return
    if windows is None or windows.num_windows < 2:
        raise CalibrationError(
            "Compensation fits weights on some windows of text and judges them on others: give dataset=... with at "
            "least two windows, or compensation='none'."
        )
    if lies_elsewhere(runner.model):
        raise UnsupportedModelError(
            f"{runner.stack.layout.subject}: compensation changes weights, which are streamed or offloaded here. Load "
            "the model on a device, or set compensation='none'."
        )


def compensated(context: SearchContext, plan: PruningPlan, compensation: str) -> PruningPlan:
    """Returns the plan with maps at its cuts; see the module docstring.

    Args:
        context: Of the search that made the plan; the dense model, which is not changed, and the windows.
        plan: What is removed.
        compensation: `"scale"` (one factor per channel), `"ridge"` (any change of the weight), `"auto"` (the better
            one at each cut), or `"reconstruct"` (ridge there and in every half-block behind).

    Raises:
        NonFiniteError: Statistics are NaN or infinite.
    """
    plan = _Compensation(context, plan, compensation).plan()
    own = {"generated_samples": context.generated_samples} if context.generated_samples else {}
    details = {"asked": compensation, **own, **plan.details["compensation"]}
    return replace(plan, details={**plan.details, "compensation": details})


def _own_text(context: SearchContext, windows: CalibrationWindows) -> CalibrationWindows | None:
    """What the dense model writes, once for all numbers of blocks; `None` if nothing."""
    model = context.runner.model
    prompts = prompts_of(model, windows, context.generated_samples, context.seed)
    if prompts is None:
        return None
    if windows.fingerprint not in context.own_text:
        context = replace(context, batch_size=max(context.batch_size, SIDE_BY_SIDE))

        def measure(size: int) -> dict[str, Tensor]:
            rows = torch.zeros(len(prompts.seeds), prompts.length, dtype=torch.long)
            with context.progress(len(rows), "Writing text") as bar:
                for start, batch in context.batches(size, prompts.windows):
                    end = start + len(batch.input_ids)
                    rows[start:end] = prompts.written(model, start, batch.input_ids)
                    bar.update(end - start)
            return {"rows": rows}

        context.own_text[windows.fingerprint] = context.measured("own-text", measure)["rows"]
    return CalibrationWindows.from_tokens(context.own_text[windows.fingerprint], source="the dense model")


def _together(sums: dict[str, Tensor], kind: str, share: float) -> dict[str, Tensor]:
    """Sums over all tokens, those of the model's own text with a share of their weight."""
    parts = ("moments", "missing", "still")
    if not share:
        return {part: sums[f"{kind}-{part}"] for part in parts}
    return {part: sums[f"{kind}-{part}"] + share * sums[f"own-{kind}-{part}"] for part in parts}


@dataclass(frozen=True)
class _Grid:
    """What is tried at a place."""

    kinds: Sequence[str]
    shares: Sequence[float]
    strengths: Sequence[float]

    def all(self) -> list[tuple[str, float, float]]:
        """Kind, weight of own text and strength, in the order in which they are tried."""
        return list(product(self.kinds, self.shares, self.strengths))


class _Compensation:
    def __init__(self, context: SearchContext, plan: PruningPlan, compensation: str) -> None:
        self.context, self.runner, self._plan, self.kinds = context, context.runner, plan, _KINDS[compensation]
        self.points = points_from(plan, self.runner) if compensation == RECONSTRUCT else cut_points(plan)
        self.off: list[Unit] = list(plan.removed_units)
        self.fitted, judges = fitting_part(context.require_windows(), _JUDGES)
        self.own = _own_text(context, self.fitted)
        self.judges = with_teacher(self.runner, judges, context.batch_size)
        self.share: float | None = None if self.own is not None else 0.0
        self.entries: list[Fold] = []
        self.tensors: dict[str, Tensor] = {}
        held = can_go_on(self.runner, next(iter(self.fitted.batches(1))).beginning())
        self._dense, self._pruned = (LastStates(self.runner, held=held) for _ in range(2))

    def plan(self) -> PruningPlan:
        steps: list[dict[str, Any]] = []
        first = self._judged("0", None, [([], {})])[0]
        reached = first
        with self.context.progress(len(self.points), "Compensation") as bar:
            for number, point in enumerate(self.points, 1):
                step = {"after": str(point.before), **self._step(number, point, reached)}
                reached = step.get("kl", reached)
                steps.append(step)
                bar.update()
        cuts, behind = (
            [step for step, p in zip(steps, self.points, strict=True) if p.cut is cut] for cut in (True, False)
        )
        logger.info(
            f"Compensation: KL {first:.4f} -> {reached:.4f} nats per token on {self.judges.num_windows} windows that "
            f"judge ({len(self.entries)} of {len(self.points)} places)."
        )
        details = {
            "kl_before": first,
            "kl_after": reached,
            "windows": self.fitted.num_windows,
            **({} if self.own is None else {"own_windows": self.own.num_windows}),
            "judges": self.judges.num_windows,
            "cuts": cuts,
            **({"behind": behind} if behind else {}),
        }
        return replace(
            self._plan,
            folds=Folds(tuple(self.entries), digest_of(self.tensors), held=self.tensors),
            details={**self._plan.details, "compensation": details},
        )

    def _step(self, number: int, point: Point, reached: float) -> dict[str, Any]:
        """Fits and judges the maps of one place; keeps the best if it is better than none."""
        writer = writer_before(self.runner, point.before, point.off(self.off))
        name = f"{point.before.block}.{writer.module}" if writer is not None else ""
        if writer is None or name in self.tensors:
            logger.info(f"No weight of {point.before} can take a map; left as it is.")
            return {"kind": "none", "reason": "no module writes to the stream alone"}
        shares = SHARES if self.share is None or (point.cut and self.own is not None) else (self.share,)
        kinds = self.kinds if writer.kind == MATRIX else (DIAGONAL,)
        grid = _Grid(kinds, shares, STRENGTHS if point.cut else BEHIND)
        wanted = reached * (1 if point.cut else 1 - _WORTH)
        found = self.context.settled(
            f"compensation-{number}-map",
            lambda: self._fitted(number, point, writer, grid, wanted, name),
            [f"{prefix}compensation-{number}" for prefix in ("", "own-")],
        )
        tried = found["tried"].tolist()
        if "map" not in found:
            return {"kind": "none", "module": writer.module, "tried": tried}
        kind, share, strength = grid.all()[tried.index(min(tried))]
        self.share = share
        self.entries.append(writer.fold(point.before.block, kind, name))
        self.tensors[name] = found["map"]
        own = {} if self.own is None else {"own_share": share}
        return {"kind": kind, "module": writer.module, **own, "strength": strength, "kl": min(tried), "tried": tried}

    def _fitted(
        self, number: int, point: Point, writer: Writer, grid: _Grid, wanted: float, name: str
    ) -> dict[str, Tensor]:
        """The losses with all maps of a grid, and the best map if it is better than what is wanted."""
        sums = self._all_sums(number, point, writer, grid.kinds, own=any(grid.shares))
        best: Tensor | None = None
        tried: list[float] = []
        # Not all at once: each of them has a weight of its own while it is judged.
        for kind, share in product(grid.kinds, grid.shares):
            fold, found = writer.fold(point.before.block, kind, name), _together(sums, kind, share)
            tensors = [solved(found, kind, strength) for strength in grid.strengths]
            maps = [([fold], {name: tensor}) for tensor in tensors]
            for tensor, loss in zip(tensors, self._judged(f"{number}-{kind}-{share}", point, maps), strict=True):
                best = tensor if loss < min([wanted, *tried]) else best
                tried.append(loss)
        kept = {} if best is None else {"map": best}
        return {"tried": torch.tensor(tried, dtype=torch.float64), **kept}

    def _all_sums(
        self, number: int, point: Point, writer: Writer, kinds: Sequence[str], *, own: bool
    ) -> dict[str, Tensor]:
        """What `_sums` gives of the given windows, and, with `own-` in front of the names, of the model's own."""
        sums = {}
        for prefix, windows in (("", self.fitted), ("own-", self.own if own else None)):
            if windows is not None:
                measure = partial(self._sums, point, writer, kinds, prefix, windows)
                found = self.context.measured(f"{prefix}compensation-{number}", measure)
                sums |= {f"{prefix}{name}": each for name, each in found.items()}
        if not all(bool(torch.isfinite(each).all()) for each in sums.values()):
            raise NonFiniteError("NaN or infinity in the hidden states. Load the model in another dtype.")
        return sums

    def _sums(
        self,
        point: Point,
        writer: Writer,
        kinds: Sequence[str],
        prefix: str,
        windows: CalibrationWindows,
        size: int,
    ) -> dict[str, Tensor]:
        """a'a and a'(z - x) over this process's tokens, for factors y'y and y'(z - x), in fp64."""
        self._cut(size)
        module = self.runner.stack.blocks[point.before.block].get_submodule(writer.module)
        found: dict[str, Tensor] = {}
        folds = Prepared(self.runner.stack.blocks, self.entries, self.tensors)
        for start, batch in self.context.batches(size, windows):
            key = (prefix, start, len(batch.input_ids))
            tokens = Tokens.of(self.runner.positions(batch))
            seen: list[tuple[Tensor, Tensor]] = []
            with folds.on():
                state = self._in_front(key, batch, point)
                with hooks() as hook:
                    hook(
                        module.register_forward_hook(
                            lambda _module, args, output, seen=seen: seen.append((args[0], output))
                        )
                    )
                    pruned = self.runner.run_to(batch, point.before.block, point.off(self.off), state)
            z = tokens.fitted(self._wanted(key, batch, point))
            weights = weights_of(z)
            missing = (z - tokens.fitted(hidden_of(pruned.value)).to(z.device)) * weights
            for kind in kinds:
                states = seen[-1][0 if kind == CHANGE else 1]
                y = tokens.fitted(states).to(z.device) * writer.factor * weights
                still = tokens.first(states, weights) * writer.factor
                for name, part in (("moments", y.T @ y), ("missing", y.T @ missing), ("still", still.T @ still)):
                    total = found.setdefault(f"{kind}-{name}", fp64_zeros(part, *part.shape))
                    total += part.to(total.device).double()
        return {name: total.cpu() for name, total in found.items()}

    def _cut(self, size: int) -> None:
        for states in (self._dense, self._pruned):
            states.cut(size)

    def _in_front(self, key: Key, batch: Batch, point: Point) -> BlockOutput | None:
        """The state of the pruned model in front of the block of a place, with the maps that are on."""
        # The judges come back to a place, sums are made of it once.
        keep = key[0] == _JUDGING or point != self.points[-1]
        return self._pruned.at(key, batch, block_before(point.before.block, self.off), self.off, keep=keep)

    def _wanted(self, key: Key, batch: Batch, point: Point) -> Tensor:
        """The stream of the dense model where the next kept half begins."""
        after = point.after
        last = (self.runner.num_blocks if after is None else after.block) - 1
        state = self._dense.at(key, batch, last if last >= 0 else None, keep=point != self.points[-1])
        if after is not None and after.part == MLP:
            return hidden_of(self.runner.run_to(batch, after.block, [after], state).value)
        return hidden_of((state or self.runner.run_to(batch, last)).value)

    def _judged(
        self, name: str, point: Point | None, tried: Sequence[tuple[list[Fold], dict[str, Tensor]]]
    ) -> list[float]:
        """The KL divergence of each choice of maps for a place on the windows that judge, nats per token."""
        blocks = self.runner.stack.blocks
        before = Prepared(blocks, self.entries, self.tensors)
        prepared = [Prepared(blocks, entries, tensors) for entries, tensors in tried]

        def measure(size: int) -> dict[str, Tensor]:
            self._cut(size)
            sums = torch.zeros(len(tried), dtype=torch.float64)
            for start, batch in self.context.batches(size, self.judges):
                with before.on():
                    key = (_JUDGING, start, len(batch.input_ids))
                    state = None if point is None else self._in_front(key, batch, point)
                    for place, folds in enumerate(prepared):
                        with folds.on():
                            last = self.runner.run_to(batch, self.runner.last_block(self.off), self.off, state)
                            sums[place] += head_losses(self.runner, batch, last).sum().cpu()
            return {"losses": sums}

        found = self.context.measured(f"compensation-{name}-judged", measure)["losses"]
        tokens = _predictions(self.judges)
        means = [loss / tokens for loss in found.tolist()]
        return [mean if math.isfinite(mean) else math.inf for mean in means]


def _predictions(windows: CalibrationWindows) -> int:
    return sum(int(predicted(batch).sum()) for batch in windows.batches(windows.num_windows))
