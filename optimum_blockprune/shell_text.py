# SPDX-License-Identifier: Apache-2.0
"""What the commands print for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .card_text import FAMILIES
from .checking import Check
from .plan import PruningPlan
from .repetition import collapsed
from .report import PruningReport
from .widths import spelled


def summary(report: PruningReport, plan: PruningPlan, output: str) -> str:
    """What a run did and measured."""
    achieved = report.achieved
    lines = [
        f"{output}: {achieved['blocks_after']} of {achieved['blocks_before']} blocks, "
        f"{achieved['parameters_after']:,} of {achieved['parameters_before']:,} parameters",
    ]
    if plan.width:
        lines.append(f"removed by {plan.strategy}: {removed(plan)}")
    else:
        lines.append(f"removed by {plan.strategy}, in this order: {listed(plan.removed_names)}")
    lines += [
        f"perplexity of the {entry['label']} model on {entry['source']}: {entry['perplexity']:.2f} "
        f"({entry['tokens']:,} tokens)"
        for entry in report.evaluations
    ]
    lines += [f"{entry['label']} model on {entry['task']}: {_score(entry)}" for entry in report.task_results]
    reason = collapsed(report.evaluations)
    if reason:
        lines.append(f"warning: the text that the pruned model writes has degenerated: {reason}")
    return "\n".join([*lines, *([depth_table(report.depths)] if report.depths else [])])


def healed(report: PruningReport, output: str) -> str:
    """What a healing did."""
    entry = report.healing[-1]
    change = f"{entry['perplexity_before']:.2f} -> {entry['perplexity_after']:.2f}"
    fate = "" if entry["kept"] else "; it did not help, so the weights are those from before"
    own = " and of the dense model's own text" if (entry.get("settings") or {}).get("generated_samples") else ""
    text = f"{entry['source']}{own}"
    return (
        f"{output}: {entry['steps']} steps of {entry['method']} on {entry['tokens']:,} tokens of {text}\n"
        f"perplexity on {entry['held_out_windows']} held-out windows: {change}{fate}"
    )


def _score(entry: dict[str, Any]) -> str:
    """The metric to quote with its standard error."""
    name, metrics = entry.get("primary"), entry["metrics"]
    if name is None:
        return "no figure"
    error = metrics.get(f"{name}_stderr")
    return f"{name} {metrics[name]:.4f}" + ("" if error is None else f" +/- {error:.4f}")


_DEPTH_COLUMNS = (
    ("removed", "removed", "{:,}"),
    ("blocks", "blocks", "{:,}"),
    ("parameters", "parameters", "{:,}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("kl", "held-out KL", "{:.4f}"),
    ("prefill_tokens_per_second", "prefill tokens/s", "{:.1f}"),
    ("decode_tokens_per_second", "decode tokens/s", "{:.1f}"),
)


def depth_table(depths: list[dict[str, Any]]) -> str:
    """One row per depth; columns that were not measured are left out."""
    columns = [column for column in _DEPTH_COLUMNS if any(column[0] in entry for entry in depths)]
    rows = [[title for _, title, _ in columns]]
    rows += [[_cell(key, entry, form) for key, _, form in columns] for entry in depths]
    return "\n".join("".join(f"{cell:>18}" for cell in row) for row in rows)


_ROWS = (
    ("blocks", "blocks", "{:,}"),
    ("parameters", "parameters", "{:,}"),
    ("size_bytes", "weights (MB)", "{:,.1f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("tokens", "scored tokens", "{:,}"),
    ("kl", "KL to baseline (nats/token)", "{:.4f}"),
    ("prefill_tokens_per_second", "prefill tokens/s", "{:.1f}"),
    ("decode_tokens_per_second", "decode tokens/s", "{:.1f}"),
    ("repetition", "repeated 4-grams", "{:.1%}"),
    ("distinct_2", "distinct 2-grams", "{:.1%}"),
    ("text", "continuation", "{!r}"),
)


def table(results: dict[str, dict[str, Any]]) -> str:
    """One row per figure, one column per model; figures that were not measured have no row."""
    results = {label: _flat(result) for label, result in results.items()}
    lines = [" ".join([f"{'':<28}", *(f"{label:>24}" for label in results)])]
    tasks = dict.fromkeys(key for result in results.values() for key in result if isinstance(key, tuple))
    for key, title, form in (*_ROWS, *((key, key[0], "{}") for key in tasks)):
        if any(result.get(key) is not None for result in results.values()):
            cells = [_cell(key, result, form) for result in results.values()]
            lines.append(" ".join([f"{title:<28}", *(f"{cell:>24}" for cell in cells)]))
    return "\n".join(lines)


def _flat(result: dict[str, Any]) -> dict[Any, Any]:
    """The figures of one model beside each other; those of tasks under `(task,)`."""
    tasks = {(each["task"],): _score(each) for each in result.get("tasks", ())}
    written = {name: result["generation"][name] for name in ("repetition", "distinct_2") if "generation" in result}
    return {**result, **written, **tasks}


def _cell(key: Any, result: dict[str, Any], form: str) -> str:
    if result.get(key) is None:
        return "-"
    return form.format(result[key] / 1e6 if key == "size_bytes" else result[key])


def listed(blocks: tuple[int | str, ...]) -> str:
    """Blocks in a row."""
    return ", ".join(map(str, blocks)) if blocks else "nothing"


def removed(plan: PruningPlan) -> str:
    """What a plan removes, in one line."""
    of = f"of {plan.num_blocks} blocks"
    parts = [f"{listed(plan.removed_names)} {of}"] if plan.num_removed else []
    return " and ".join([*parts, *narrowed(plan)]) or "nothing"


def narrowed(plan: PruningPlan) -> list[str]:
    """What goes of each family of units."""
    return [
        f"{counts['before'] - counts['after']:,} of {counts['before']:,} {FAMILIES[family]}"
        for family, counts in plan.width.totals().items()
    ]


def described(check: Check) -> str:
    """One stack of a model, and what can be removed from it."""
    named = f"{check.model_type} ({check.class_name})" if check.class_name else check.model_type
    head = f"{named}, {check.stack} of {check.num_blocks} blocks" if check.num_blocks else named
    lines = [head, *(f"  {unit:<12} {answer}" for unit, answer in check.units.items())]
    if check.prunable:
        how = "proven by the test suite" if check.evidence == "proven" else "accepted if the result passes the gate"
        lines.append(f"  {'evidence':<12} {how}")
    if check.search not in (None, "yes"):
        lines.append(f"  {'search':<12} no: {check.search}")
        lines.append(f"  {'alone':<12} {_ranges(check.removable)}")
    reasons: dict[str, list[int]] = {}
    for block, reason in check.protected.items():
        reasons.setdefault(reason, []).append(block)
    lines += [f"  {'stay':<12} {_ranges(blocks)}: {reason}" for reason, blocks in reasons.items()]
    if check.cache is not None:
        lines.append(f"  {'cache':<12} not compared: {check.cache}")
    lines += [f"  {'sets':<12} {name} = {value}" for name, value in check.changes.items()]
    for runtime, verdict in check.runtimes.items():
        lines.append(f"  {runtime:<12} {verdict['verdict']}: {verdict['reason']}")
        if "same_without" in verdict and verdict["verdict"] == "same":
            some = _ranges(verdict["same_without"]) or "no single block"
            every = set(check.removable) <= set(verdict["same_without"])
            lines.append(f"  {'':<12} and without {'any one of the others' if every else 'one of ' + some}")
    return "\n".join(lines)


def _ranges(blocks: Iterable[int]) -> str:
    """Spells ascending numbers as `0-2, 7`."""
    return spelled(blocks).replace(",", ", ")
