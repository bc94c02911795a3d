# SPDX-License-Identifier: Apache-2.0
"""What a pruned folder says of itself: plan, configuration, report and card, the same whoever wrote the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .architectures import layout_for
from .blocks import find_blocks
from .card import model_card
from .config import BlockPruningConfig, save_config_of
from .environment import peak_memory, versions
from .evaluation import size_of
from .plan import PruningPlan
from .report import PruningReport
from .runtimes import read_alike
from .width_task import unit_cost


def record(report: PruningReport, plan: PruningPlan, before: dict[str, int], model: PreTrainedModel) -> None:
    """Writes into the report what was asked for and what came of it.

    Args:
        report: Is changed.
        plan: What was applied.
        before: `evaluation.size_of` the dense model.
        model: The pruned model.
    """
    after = size_of(model, plan.stack)
    report.requested = dict(plan.requested)
    report.strategy = plan.strategy
    report.removed_blocks = list(plan.removed_blocks)
    report.calibration = dict(plan.calibration) if plan.calibration else None
    report.strategy_details = dict(plan.details)
    for name in ("blocks", "parameters"):
        report.achieved[f"{name}_before"] = before[name]
        report.achieved[f"{name}_after"] = after[name]
        report.achieved[f"{name}_removed"] = 1 - after[name] / before[name]
    if plan.width:
        report.achieved |= _widths(plan, find_blocks(model, plan.stack).blocks)
    layout = layout_for(model, plan.stack)
    report.loader, report.task = layout.kind.loader, layout.kind.task
    alike = read_alike(layout.config.to_dict())
    report.runtimes = {name: {"verdict": each.verdict, "reason": each.reason} for name, each in alike.items()}
    if not plan.width.loads_anywhere:
        reason = "every block has its own width, which only this package loads"
        report.runtimes = {name: {"verdict": "differs", "reason": reason} for name in ("transformers", *alike)}
    report.dtype = str(model.dtype).removeprefix("torch.")
    report.peak_memory_bytes = peak_memory(model)
    report.versions = versions()


def _widths(plan: PruningPlan, blocks: nn.ModuleList) -> dict[str, Any]:
    """Units before and after, and what filling up with zeros costs."""
    width = plan.width
    units = {
        family: {**counts, "removed": 1 - counts["after"] / counts["before"]}
        for family, counts in width.totals().items()
    }
    found: dict[str, Any] = {"layout": width.layout, "units": units}
    if width.layout == "padded":
        found["padding_parameters"] = sum(
            (width.stored(each) - len(each.kept))
            * unit_cost(blocks[plan.kept_blocks.index(each.block)], width.groups[each.group])
            for each in width.narrowed
        )
    return found


def write_records(
    folder: Path, plan: PruningPlan, report: PruningReport, *, title: str, config: BlockPruningConfig | None = None
) -> None:
    """Writes plan, configuration, report and model card into a finished folder.

    Args:
        folder: Holds the checkpoint already.
        plan: What was applied.
        report: What was measured.
        title: Heading of the card.
        config: Is written if the plan was made with it; otherwise what the plan knows of its own.
    """
    if config is not None and plan.strategy == config.strategy and dict(plan.requested) == config.recipe.requested:
        config.save_pretrained(folder)
    else:
        save_config_of(plan, folder)
    plan.save(folder)
    report.save(folder)
    (folder / "README.md").write_text(str(model_card(plan, report, title=title)), encoding="utf-8")
