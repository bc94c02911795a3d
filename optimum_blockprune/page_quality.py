# SPDX-License-Identifier: Apache-2.0
"""The measured quality in the page: perplexity and repetition, benchmark tasks, and every measured depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .card_text import ABSENT, counted, megabytes, percent, text_name
from .page_parts import Html, number, paragraph, table, tag, text
from .picture_style import finite
from .repetition import degenerated
from .report import PruningReport


def compared(report: PruningReport) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """The last evaluation of the pruned model and that of the dense one on the same text; `None` where there is none.

    Without evaluations, the measured depths of this model and of the dense one.
    """
    pruned = next((entry for entry in reversed(report.evaluations) if entry.get("label") == "pruned"), None)
    others = [entry for entry in report.evaluations if entry.get("label") == "dense"]
    if pruned is None and report.removed_units:
        here = len(report.removed_units)
        pruned = next((each for each in report.depths if each.get("removed") == here and "perplexity" in each), None)
        others = [each for each in report.depths if each.get("removed") == 0 and "perplexity" in each]
    dense = next(
        (each for each in reversed(others) if pruned is not None and _setting(each) == _setting(pruned)), None
    )
    return dense, pruned


def _setting(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(entry.get(name) for name in ("source", "fingerprint", "windows", "seqlen", "stride", "tokens"))


def verdict(report: PruningReport) -> Iterator[Html]:
    """Quality in one sentence, and a warning where generated text degenerated."""
    dense, pruned = compared(report)
    if pruned is None:
        yield paragraph("The quality of the result was not measured.", kind="lead")
        return
    where = text_name(str(pruned["source"])) if pruned.get("source") else "the text"
    words = f"Its perplexity on {where} is {number(pruned.get('perplexity'))}"
    if dense is not None:
        words += f"; that of the dense model is {number(dense.get('perplexity'))}"
    else:
        words += "; the dense model was not measured on it"
    yield paragraph(f"{words}. Lower is better.", kind="lead")
    reason = _collapse(pruned, dense)
    if reason:
        yield paragraph(tag("strong", "The text that it writes has degenerated: "), f"{reason}.", kind="warning")


def _collapse(pruned: Mapping[str, Any], dense: Mapping[str, Any] | None) -> str | None:
    mine, theirs = pruned.get("generation"), (dense or {}).get("generation")
    return degenerated(mine, theirs) if mine else None


def quality(report: PruningReport) -> Iterator[Html]:
    """The table of evaluations with what its words mean."""
    if not report.evaluations:
        yield paragraph("Not measured." if not report.depths else "Measured at several depths; see below.")
        return
    columns = {
        "model": lambda each: each.get("label", ABSENT),
        "text": lambda each: text_name(str(each["source"])) if each.get("source") else ABSENT,
        "tokens scored": lambda each: number(each.get("tokens")),
        "loss (nats)": lambda each: number(each.get("nll"), 3),
        "perplexity": lambda each: number(each.get("perplexity")),
        "KL to dense": lambda each: number(each.get("kl"), 4) if "kl" in each else "",
        "MB": lambda each: megabytes(each["size_bytes"]) if "size_bytes" in each else "",
        "tokens/s read": lambda each: _speed(each, "prefill"),
        "tokens/s written": lambda each: _speed(each, "decode"),
        "repeated 4-grams": lambda each: _repetition(each),
    }
    rows = [[spell(each) for spell in columns.values()] for each in report.evaluations]
    shown = [place for place in range(len(columns)) if place < 2 or any(row[place] for row in rows)]
    head = list(columns)
    yield table([head[place] for place in shown], [[row[place] for place in shown] for row in rows], left=2)
    yield paragraph(
        "Perplexity says how surprised a model is by the words of a text that it has not seen: 1 would be never, and "
        "lower is better. Only figures for the same text can be compared."
        + (
            " KL is how far the predictions moved from the dense model's; 0 is not at all."
            if any("kl" in each for each in report.evaluations)
            else ""
        )
        + _generation_note(report),
        kind="note",
    )
    fingerprints = {each["fingerprint"] for each in report.evaluations if each.get("fingerprint")}
    for mark in sorted(fingerprints):
        yield paragraph("Fingerprint of the text: ", tag("code", mark), kind="note")


def _generation_note(report: PruningReport) -> str:
    each = next((entry["generation"] for entry in report.evaluations if entry.get("generation")), None)
    if each is None:
        return ""
    return (
        f" Repeated 4-grams: of {counted(each.get('continuations', 0), 'text')} of "
        f"{number(each.get('new_tokens'))} tokens that the model wrote, the share of sequences of four tokens that "
        "were there before."
    )


def _speed(entry: Mapping[str, Any], kind: str) -> str:
    value = entry.get(f"{kind}_tokens_per_second")
    return "" if value is None else number(value, 1)


def _repetition(entry: Mapping[str, Any]) -> str:
    share = finite((entry.get("generation") or {}).get("repetition"))
    return "" if share is None else percent(share)


def tasks(report: PruningReport) -> Iterator[Html]:
    """One row for each task and metric, one column for each model, with standard errors."""
    if not report.task_results:
        return
    labels = list(dict.fromkeys(entry.get("label", ABSENT) for entry in report.task_results))
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for entry in report.task_results:
        metrics = entry.get("metrics", {})
        for name in sorted(metrics, key=lambda name: (name != entry.get("primary"), name)):
            if not name.endswith("_stderr"):
                shots = number(entry.get("num_fewshot"))
                key = (str(entry.get("task")), name, shots, number(entry.get("samples")))
                rows.setdefault(key, {})[entry.get("label", ABSENT)] = _score(metrics, name)
    lines = [(*key, *(found.get(label, ABSENT) for label in labels)) for key, found in rows.items()]
    yield table(("task", "metric", "examples shown", "questions", *labels), lines, left=2)
    sources = dict.fromkeys(text_name(str(entry["source"])) for entry in report.task_results if entry.get("source"))
    yield paragraph(
        "After ± stands the standard error: a difference of less than about two of them may be chance. "
        + (f"Scored by: {', '.join(sources)}." if sources else ""),
        kind="note",
    )


def _score(metrics: Mapping[str, Any], name: str) -> str:
    error = finite(metrics.get(f"{name}_stderr"))
    return number(metrics[name], 3) + (f" ± {error:.3f}" if error is not None else "")


def depths(report: PruningReport) -> Iterator[Html]:
    """The table of depths, with this model's row marked."""
    if not report.depths:
        return
    rows = [_depth(entry) for entry in report.depths]
    head = ("blocks removed", "blocks left", "parameters", "MB", "perplexity", "tokens/s written", "repeated 4-grams")
    shown = [place for place in range(len(head)) if any(row[place] for row in rows)]
    here = [entry.get("removed") for entry in report.depths]
    mine = len(report.removed_units)
    marked = here.index(mine) if mine in here and not report.healings else None
    yield table(
        [head[place] for place in shown], [[row[place] for place in shown] for row in rows], left=0, marked=marked
    )
    sources = dict.fromkeys(text_name(str(entry["source"])) for entry in report.depths if entry.get("source"))
    words = "The highlighted row is this model. " if marked is not None else ""
    words += f"Measured on {', '.join(sources)}." if sources else ""
    if words:
        yield paragraph(text(words), kind="note")


def _depth(entry: Mapping[str, Any]) -> list[str]:
    plain = [number(entry[name]) if name in entry else "" for name in ("removed", "blocks", "parameters")]
    size = megabytes(entry["size_bytes"]) if "size_bytes" in entry else ""
    perplexity = number(entry["perplexity"]) if "perplexity" in entry else ""
    return [*plain, size, perplexity, _speed(entry, "decode"), _repetition(entry)]
