# SPDX-License-Identifier: Apache-2.0
"""A report as one HTML page for readers who know nothing of pruning: one file, no script, nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .card_text import FAMILIES, HUB, counted, healing_words, hub_id, last_part, megabytes, percent, text_name
from .page_parts import (
    Html,
    folded,
    joined,
    number,
    pairs,
    paragraph,
    picture,
    section,
    table,
    tag,
    text,
    whole_page,
)
from .page_quality import depths, quality, tasks, verdict
from .picture_depth import kept_shares
from .picture_style import block_count, by_divergence, finite, png, scored_text
from .pictures import DEPTH_FILE, QUALITY_FILE, SEARCH_FILE, alt_texts, can_draw, figures_of
from .report import PruningReport


PAGE_FILE = "pruning_report.html"

_NOTES = {
    DEPTH_FILE: "Each column is one block of the model before pruning.",
    SEARCH_FILE: "How the search went: every removal that it tried, step by step.",
    QUALITY_FILE: "Every depth was measured on the same text; the model before pruning is at the left.",
}
_VERDICTS = {"same": "reads it as transformers does", "differs": "reads it differently", "unknown": "not known"}


def write_page(report: PruningReport, path: str | Path, *, title: str) -> Path:
    """Writes the page, with the pictures inside it where matplotlib is installed.

    Args:
        report: Of a pruning run.
        path: The file; an existing one is replaced.
        title: Heading, usually the folder's name.
    """
    path = Path(path)
    path.write_text(page(report, title=title), encoding="utf-8", errors="xmlcharrefreplace")
    return path


def page(report: PruningReport, *, title: str) -> str:
    """The page as a string; the same report and title give the same page."""
    shown = _pictures(report)
    body = joined(
        tag("header", tag("h1", title), joined(*_lead(report))),
        section("What was removed", _removal(report), shown.get(DEPTH_FILE), _sizes(report), _blocks(report)),
        section("Quality", *quality(report)),
        section("Benchmark tasks", *tasks(report)),
        section("Quality against depth", shown.get(QUALITY_FILE), *depths(report)),
        section("The search", shown.get(SEARCH_FILE), *_search(report)),
        section("Make it again", *_again(report)),
        section("Where it runs", _runtimes(report)),
        section("Where it comes from", *_origin(report)),
        section("All data", _everything(report)),
    )
    return whole_page(title, body)


def _pictures(report: PruningReport) -> dict[str, Html]:
    if not can_draw():
        return {}
    words = alt_texts(report)
    return {name: picture(png(figure), words[name], _NOTES[name]) for name, figure in figures_of(report).items()}


def _lead(report: PruningReport) -> Iterator[Html]:
    """What came of it, in sentences."""
    base = _base(report)
    lead = [text("This is "), base, text(f" with {_missing(report)} removed")]
    saved = finite(report.achieved.get("parameters_removed"))
    if saved is not None:
        lead.append(text(f": {percent(saved)} of its parameters are gone"))
    yield paragraph(*lead, ".", *_chooser(report.strategy), kind="lead")
    yield from verdict(report)
    yield paragraph(
        "A language model is a stack of similar layers, called blocks, that text passes one after the other. Pruning "
        "takes out whole blocks, or parts of each (its width), so that the model gets smaller and faster and usually "
        "somewhat worse. “Dense” is the model before pruning."
        + ("" if report.healing else " Nothing was trained afterwards."),
        kind="note",
    )
    if report.healing:
        yield paragraph(f"{'. '.join(map(healing_words, report.healing))}.")
    if not can_draw():
        hint = tag("code", "pip install 'optimum-blockprune[report]'")
        yield paragraph("There are no pictures because matplotlib is not installed: ", hint, kind="note")


def _chooser(strategy: str | None) -> tuple[Any, ...]:
    if strategy is None:
        return ()
    if strategy == "manual":
        return (" A person named them; nothing was searched.",)
    return (" They were chosen by the strategy ", tag("code", strategy), ".")


def _base(report: PruningReport) -> Html:
    name = report.base.get("model")
    if not name:
        return text("a model of unknown name")
    repo = hub_id(name, loaded="revision" in report.base)
    return tag("a", repo, href=f"{HUB}/{repo}") if repo else tag("code", last_part(name))


def _missing(report: PruningReport) -> str:
    units = report.achieved.get("units", {})
    parts = [
        f"{percent(share)} of its {_family(family)}"
        for family, counts in units.items()
        if (share := finite(counts.get("removed"))) is not None
    ]
    if report.removed_units or not parts:
        total = block_count(report)
        of = f"{len(report.removed_units)} of its {total:,} blocks" if total else "no blocks"
        parts.insert(0, of)
    return " and ".join(parts)


def _family(name: str) -> str:
    return FAMILIES.get(name, name)


def _removal(report: PruningReport) -> Html | None:
    if not report.removed_units:
        return None
    order, kind = ", ".join(map(str, report.removed_units)), "half-blocks" if report.removed_halves else "blocks"
    return paragraph(
        f"Removed {kind}, in the order of removal: {order}. Blocks are numbered as in the dense model, from 0 on."
    )


def _sizes(report: PruningReport) -> Html | None:
    achieved, rows = report.achieved, []
    for name, title in (("blocks", "blocks"), ("parameters", "parameters"), ("size_bytes", "bytes of the weights")):
        if f"{name}_before" in achieved:
            rows.append((title, *_change(achieved[f"{name}_before"], achieved.get(f"{name}_after"))))
    for family, counts in achieved.get("units", {}).items():
        rows.append((f"{_family(family)}, all blocks", *_change(counts.get("before"), counts.get("after"))))
    if achieved.get("padding_parameters"):
        filled = number(achieved["padding_parameters"])
        rows.append(("of the parameters: zeros that fill up narrower blocks", "0", filled, ""))
    asked = ", ".join(f"{name} {number(value)}" for name, value in report.requested.items())
    note = paragraph(f"Asked for: {asked}.", kind="note") if asked else None
    return joined(table(("", "dense", "pruned", "change"), rows), note) if rows else note


def _change(before: Any, after: Any) -> tuple[str, str, str]:
    known = finite(before) and finite(after) is not None
    return number(before), number(after), percent(after / before - 1).replace("-", "−") if known else ""


def _blocks(report: PruningReport) -> Html | None:
    """The depth map as a table."""
    total = block_count(report)
    order = {block: place for place, block in enumerate(report.removed_blocks, 1)}
    shares = {name: kept for name, entry in report.widths.items() if (kept := kept_shares(entry, total))}
    if not total or not (order or report.scores or shares):
        return None
    head = ["block", "fate", *(["score"] if report.scores else []), *(f"{_family(name)} kept" for name in shares)]
    rows = []
    for block in range(total):
        row = [str(block), f"removed as number {order[block]}" if block in order else "kept"]
        if report.scores:
            row.append(number(report.scores.get(str(block)), 4))
        row += ["" if kept[block] is None else percent(kept[block]) for kept in shares.values()]
        rows.append(row)
    return folded("Block by block, as a table", table(head, rows, left=2))


def _search(report: PruningReport) -> Iterator[Html | None]:
    spent, naive = report.block_forwards, report.naive_block_forwards
    if spent is not None:
        words = f"The search ran single blocks {number(spent)} times"
        if naive and naive > spent:
            words += f"; trying every candidate with a whole pass would have taken {number(naive)} runs"
        yield paragraph(words + ".")
    whole = report.strategy_details.get("truncated_from")
    if whole is not None:
        yield paragraph(f"The search went on to {counted(whole, 'block')}; these are the costs of all of it.")
    facts = (
        ("language-model head runs", number(report.head_forwards) if report.head_forwards is not None else None),
        ("tokens of calibration text", number(report.tokens) if report.tokens is not None else None),
        ("peak memory", f"{megabytes(report.peak_memory_bytes)} MB" if report.peak_memory_bytes else None),
        ("device and precision", ", ".join(filter(None, (report.device, report.dtype))) or None),
    )
    yield pairs(facts)
    if report.seconds:
        rows = [(phase, number(seconds)) for phase, seconds in report.seconds.items()]
        yield table(("phase", "seconds"), rows)
    steps = [step for step in report.steps if "loss" in step and "block" in step]
    if steps:
        left = any("perplexity" in step for step in steps)
        rows = [
            (
                str(place),
                number(step["block"]),
                number(step["loss"], 4),
                *([number(step.get("perplexity"))] if left else []),
            )
            for place, step in enumerate(steps, 1)
        ]
        loss = "KL (nats per token)" if by_divergence(report) else "loss, nats per token"
        head = ("step", "block removed", loss, *([f"perplexity on the {scored_text(report)}"] if left else []))
        yield folded("Step by step, as a table", table(head, rows))


def _listed(value: Any) -> list[str]:
    """One text or several."""
    return [str(each) for each in (value if isinstance(value, list) else [value]) if each]


def _again(report: PruningReport) -> Iterator[Html | None]:
    if report.command:
        before = " as it was before the training" if report.healings else ""
        yield paragraph(f"This command makes the same checkpoint again{before}:")
        yield tag("pre", tag("code", report.command), class_="wrap")
    else:
        yield paragraph("The plan in this folder, applied to the dense model in memory, gives the same again:")
        yield tag("pre", tag("code", "PruningPlan.from_file('pruning_plan.json').apply(model)"))
    for command in (entry.get("command") for entry in report.healings):
        yield paragraph("This command trains it alike:" if command else "It was trained on text in memory.")
        yield tag("pre", tag("code", command), class_="wrap") if command else None
    chosen = report.calibration or {}
    source = chosen.get("source")
    options = ", ".join(f"{name}={value}" for name, value in report.options.items() if value is not None)
    count = chosen.get("windows")
    windows = (
        f"{counted(count, 'window')} of {number(chosen.get('seqlen'))} tokens" if isinstance(count, int) else None
    )
    yield pairs(
        (
            ("calibration text", text_name(str(source)) if source else "none" if not chosen else None),
            ("its fingerprint", tag("code", chosen["fingerprint"]) if chosen.get("fingerprint") else None),
            ("read as", windows),
            ("options", options or None),
            ("seed", number(report.seed) if report.seed is not None else None),
            ("loads with", tag("code", report.loader) if report.loader else None),
            ("proof after writing", _proof(report.verification)),
        )
    )


def _proof(verification: Mapping[str, Any] | None) -> str | None:
    if verification is None:
        return None
    if not verification.get("passed"):
        return "not made"
    return f"passed ({verification.get('mode', 'unknown mode')})"


def _runtimes(report: PruningReport) -> Html | None:
    rows = [
        (name, _VERDICTS.get(entry.get("verdict"), str(entry.get("verdict"))), entry.get("reason", ""))
        for name, entry in report.runtimes.items()
    ]
    return table(("program", "this checkpoint", "because"), rows, left=3) if rows else None


def _origin(report: PruningReport) -> Iterator[Html | None]:
    base = report.base
    languages = base.get("language")
    yield pairs(
        (
            ("dense model", _base(report) if base.get("model") else None),
            ("its commit", tag("code", base["revision"]) if base.get("revision") else None),
            ("its licence", ", ".join(_listed(base.get("license_name") or base.get("license"))) or None),
            ("language", ", ".join(languages) if isinstance(languages, list) else languages),
            *((f"{name} version", version) for name, version in report.versions.items()),
        )
    )
    for entry in report.history:
        blocks = ", ".join(map(str, entry.get("removed_blocks") or ()))
        gone = f"blocks {blocks}" if blocks else "some of the width"
        name = entry.get("base_model")
        source = f" of {last_part(str(name)) if not hub_id(name) else name}" if name else ""
        yield paragraph(f"The dense model was pruned before, by {entry.get('strategy')}: {gone}{source}.")


def _everything(report: PruningReport) -> Html:
    whole = json.dumps(report.to_dict(), indent=1, ensure_ascii=False, default=str)
    return folded("The report itself (pruning_report.json)", tag("pre", tag("code", whole)))
