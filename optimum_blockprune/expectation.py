# SPDX-License-Identifier: Apache-2.0
"""What a result is held to: the logits of a fixed random probe, computed before there is a result."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from optimum.utils import logging
from torch import Tensor
from transformers import PreTrainedModel

from .architectures import Layout, layout_for
from .batches import Batch
from .caching import cache_error
from .errors import NonFiniteError, UnsupportedModelError
from .folding import Prepared
from .inputs import probe_batch
from .narrowing import width_off
from .per_layer import refuse_own_widths
from .plan import PruningPlan
from .runner import BlockRunner


logger = logging.get_logger("optimum.blockprune.expectation")

# Largest difference of logits, relative to the largest logit. Half precision differs between kernels (cached or not,
# one device or another) by a few of its own rounding steps.
_TOLERANCE = {torch.float64: 2e-4, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Expectation:
    """What the dense model computes with the plan's blocks switched off.

    Attributes:
        plan: The plan.
        batch: The probe.
        logits: Its logits, on the CPU.
        caches: Whether the dense model generates with a cache what it computes without one.
        of: What computed the logits, in words; by default the dense model with the plan's blocks switched off.
    """

    plan: PruningPlan
    batch: Batch
    logits: Tensor
    caches: bool = True
    of: str = ""


def expect(model: PreTrainedModel, plan: PruningPlan) -> Expectation:
    """Runs the dense model on a fixed random probe with the plan's blocks switched off; `model` is not changed."""
    refuse_own_widths(model.config)
    layout = layout_for(model, plan.stack)
    layout.check(plan)
    batch = probe_batch(model, layout)
    runner = BlockRunner(model, plan.stack)
    folds = Prepared(runner.stack.blocks, plan.folds.entries, plan.folds.tensors())
    try:
        with folds.on(), width_off(runner.stack.blocks, plan.width):
            logits = runner.logits(batch, off=plan.removed_units).float().cpu()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{layout.subject} does not run on made-up inputs, so that nothing can be proven: "
            f"{' '.join(str(error).split())}"
        ) from error
    if not torch.isfinite(logits).all():
        runner.diagnose(batch, off=plan.removed_units)
        raise NonFiniteError("NaN or infinity in the logits although every block's output is finite.")
    return Expectation(plan, batch, logits, _generates(model, layout, batch))


def expect_itself(model: PreTrainedModel, plan: PruningPlan) -> Expectation:
    """What a pruned model computes that was trained since: the saved folder is held to the model in memory alone."""
    layout = layout_for(model, plan.stack)
    batch = probe_batch(model, layout)
    runner = BlockRunner(model, plan.stack)
    logits = runner.logits(batch).float().cpu()
    if not torch.isfinite(logits).all():
        runner.diagnose(batch)
        raise NonFiniteError("NaN or infinity in the logits although every block's output is finite.")
    return Expectation(plan, batch, logits, _generates(model, layout, batch), "the healed model in memory")


def _generates(model: PreTrainedModel, layout: Layout, batch: Batch) -> bool:
    """Whether there is a cache to hold against: the table knows some that are not exact, a trial tells of the rest."""
    if not model.can_generate():
        return False
    reason = layout.uncached()
    if reason is not None:
        logger.info(f"{layout.subject}: generation with a KV cache is not compared, since {reason}, pruned or not.")
        return False
    try:
        error = cache_error(model, batch, layout.stack, typical=is_half(model))
    except (IndexError, RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as failure:
        logger.info(f"{layout.subject} does not generate with a KV cache before pruning either: {failure}")
        return False
    if error > tolerance(model):
        logger.info(f"{layout.subject} generates differently with a KV cache before pruning as well; not compared.")
    return error <= tolerance(model)


def tolerance(model: PreTrainedModel) -> float:
    """How far the logits of two runs of a model of this dtype may differ, by the largest logit."""
    return _TOLERANCE.get(model.dtype, 2e-4)


def is_half(model: PreTrainedModel) -> bool:
    """Whether two kernels that compute the same may differ by so much that a token goes to another expert."""
    return model.dtype in (torch.float16, torch.bfloat16)
