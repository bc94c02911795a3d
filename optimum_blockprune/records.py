# SPDX-License-Identifier: Apache-2.0
"""What a pruned folder says of itself: plan, configuration, report and card, the same whoever wrote the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from optimum.utils import logging
from torch import nn
from transformers import PreTrainedModel

from .architectures import layout_for
from .base_card import CARD_FILE, base_facts
from .blocks import find_blocks
from .card import model_card, title_of
from .config import BlockPruningConfig, save_config_of
from .environment import peak_memory, versions
from .evaluation import size_of
from .pictures import PICTURES, can_draw, draw_pictures
from .plan import PruningPlan
from .report import PruningReport
from .reproduce import command_for
from .runtimes import read_alike
from .width_task import unit_cost


logger = logging.get_logger("optimum.blockprune.records")


def record(
    report: PruningReport,
    plan: PruningPlan,
    before: Mapping[str, int],
    model: PreTrainedModel,
    *,
    config: BlockPruningConfig | None = None,
    source: str | Path | None = None,
    loading: Mapping[str, Any] | None = None,
) -> None:
    """Writes into the report what was asked for, what came of it, and where the model came from.

    Args:
        report: Is changed.
        plan: What was applied.
        before: `evaluation.size_of` the dense model.
        model: The pruned model.
        config: What the plan was made with; ignored where it is that of another plan.
        source: Where the dense model was loaded from; `None` for a model that was given.
        loading: The arguments that it was loaded with.
    """
    after = size_of(model, plan.stack)
    _record_plan(report, plan)
    _record_origin(report, model, source, dict(loading or {}))
    named = plan.with_provenance(base_model=report.base.get("model") or plan.base_model)
    report.command = command_for(named, config, revision=report.base.get("revision"), loading=loading)
    for name in ("blocks", "parameters", "size_bytes"):
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


def _record_plan(report: PruningReport, plan: PruningPlan) -> None:
    """What the plan says of itself; of joined plans the first part, whose numbers are those of the dense model."""
    first = plan.parts()[0]
    report.requested = dict(plan.requested)
    report.strategy = plan.strategy
    report.removed_blocks, report.removed_halves = list(plan.removed_blocks), list(plan.removed_halves)
    report.calibration = dict(plan.calibration) if plan.calibration else None
    report.strategy_details = dict(plan.details)
    report.options, report.seed = dict(plan.options), plan.seed
    report.scores, report.steps = dict(first.get("scores", {})), [dict(step) for step in first.get("steps", ())]
    report.widths = _widths_by_block(plan)


def _record_origin(
    report: PruningReport, model: PreTrainedModel, source: str | Path | None, loading: dict[str, Any]
) -> None:
    """The dense model's own facts, looked up once, and what was pruned from it before."""
    place = source or getattr(model.config, "_name_or_path", None)
    loading.pop("tokenizer", None)
    if not report.base and place:
        # The network is asked only if the model itself came from there in this process.
        report.base = base_facts(place, config=model.config, network=source is not None, **loading)
    entry = getattr(model.config, "block_pruning", None)
    entry = entry.get("previous") if isinstance(entry, Mapping) else None
    report.history = []
    while isinstance(entry, Mapping):
        report.history.insert(0, {name: value for name, value in entry.items() if name != "previous"})
        entry = entry.get("previous")


def _widths_by_block(plan: PruningPlan) -> dict[str, Any]:
    """Units by family and block of the dense model; see `PruningReport.widths`."""
    found: dict[str, Any] = {}
    for each in plan.width.narrowed:
        group = plan.width.groups[each.group]
        entry = found.setdefault(group.family, {name: [None] * plan.num_blocks for name in ("units", "kept")})
        for name, number in (("units", group.units), ("kept", len(each.kept))):
            entry[name][each.block] = number + (entry[name][each.block] or 0)
    return found


def _widths(plan: PruningPlan, blocks: nn.ModuleList) -> dict[str, Any]:
    """Units before and after, and what filling up with zeros costs."""
    width = plan.width
    units = {
        family: {**counts, "removed": 1 - counts["after"] / counts["before"]}
        for family, counts in width.totals().items()
    }
    found: dict[str, Any] = {"layout": width.layout, "units": units}
    if width.layout == "padded":
        narrowed = ((each, width.groups[each.group]) for each in width.narrowed)
        found["padding_parameters"] = sum(
            (width.stored(each) - len(each.kept)) * unit_cost(blocks[plan.new_place(each.block, group.writer)], group)
            for each, group in narrowed
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
    (folder / CARD_FILE).write_text(_card(folder, plan, report, title), encoding="utf-8")


def _card(folder: Path, plan: PruningPlan, report: PruningReport, title: str) -> str:
    """Draws the pictures into the folder and writes the card around them; without matplotlib it has none."""
    if not can_draw():
        logger.info("The card gets no pictures without matplotlib: pip install 'optimum-blockprune[report]'")
    pictures = draw_pictures(report, folder) if can_draw() else []
    return str(model_card(plan, report, title=title, pictures=[path.name for path in pictures]))


def update_records(folder: Path, change: Callable[[PruningReport], None] | None = None) -> PruningReport:
    """Changes the report of a finished folder; its pictures, and a card that nobody edited, follow.

    Args:
        folder: The output folder of a pruning run.
        change: Changes the report that it is given; without it pictures and card are made anew from what is there.

    Raises:
        CheckpointError: The folder has no report.
        PlanError: The folder has no plan.
    """
    plan, report = PruningPlan.from_file(folder), PruningReport.from_file(folder)
    card = folder / CARD_FILE
    title = (title_of(card.read_text(encoding="utf-8")) if card.is_file() else None) or folder.resolve().name
    had = [name for name in PICTURES if (folder / name).is_file()]
    ours = not card.is_file() or card.read_text(encoding="utf-8") == str(
        model_card(plan, report, title=title, pictures=had)
    )
    if change is not None:
        change(report)
        report.save(folder)
    text = _card(folder, plan, report, title)
    if ours:
        card.write_text(text, encoding="utf-8")
    else:
        logger.warning(
            f"'{card}' was edited, or written by another version, and stays as it is; delete it and write the report "
            "again to have it made anew."
        )
    return report
