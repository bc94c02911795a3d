# SPDX-License-Identifier: Apache-2.0
"""What a card says of measurements: quality side by side, benchmark tasks, generated text, depths, what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .card_text import ABSENT, code, counted, figure, megabytes, paragraphs, percent, plain, table, text_name
from .repetition import collapsed
from .report import PruningReport


NOTHING = "Not evaluated."

_Entries = Sequence[Mapping[str, Any]]
_SETTING = ("source", "fingerprint", "windows", "seqlen", "stride", "tokens")
_READ, _WRITTEN = "prefill_tokens_per_second", "decode_tokens_per_second"
_ROWS = {
    "perplexity": ("perplexity (lower is better)", figure),
    "nll": ("loss, nats per token", lambda value: figure(value, 4)),
    "kl": ("KL divergence from the dense model, nats per token", lambda value: figure(value, 4)),
    "tokens": ("tokens scored", figure),
    "blocks": ("blocks", figure),
    "parameters": ("parameters", figure),
    "size_bytes": ("weights, MB", megabytes),
    _READ: ("reading speed, tokens per second", lambda value: figure(value, 1)),
    _WRITTEN: ("writing speed, tokens per second", lambda value: figure(value, 1)),
}
_DEPTH_COLUMNS = {
    "removed": ("blocks removed", figure),
    "blocks": ("blocks left", figure),
    "parameters": ("parameters", figure),
    "size_bytes": ("weights, MB", megabytes),
    "perplexity": ("perplexity", figure),
    "nll": ("loss, nats per token", lambda value: figure(value, 4)),
    _READ: ("read, tokens/s", lambda value: figure(value, 1)),
    _WRITTEN: ("written, tokens/s", lambda value: figure(value, 1)),
}


def degeneration(report: PruningReport) -> str | None:
    """A warning if what the pruned model writes has degenerated."""
    reason = collapsed(report.evaluations)
    return f"> **Warning:** the text that this model writes has degenerated: {plain(reason)}." if reason else None


def quality(report: PruningReport) -> str:
    """Dense and pruned side by side, one table for each text and way of measuring."""
    settings = dict.fromkeys(tuple(each.get(name) for name in _SETTING) for each in report.evaluations)
    if not settings:
        return "Measured at every depth, see below." if _depths_measured(report) else NOTHING
    meaning = (
        "Perplexity tells between about how many next words the model wavers at each place of a text, so lower is "
        "better; it can be compared within one table only."
    )
    parts = [meaning]
    for setting in settings:
        alike = [each for each in report.evaluations if tuple(each.get(name) for name in _SETTING) == setting]
        parts += _on_one_text(alike)
    if any(_READ in each for each in report.evaluations):
        parts.append(f"Speeds are of one run, one text at a time{_machine(report)}; they differ between machines.")
    return paragraphs(*parts)


def _on_one_text(entries: _Entries) -> Iterator[str]:
    """The table of one text; measured twice, the last figures count."""
    models = _by_label(entries)
    yield f"Measured on {_text(entries[0])}."
    rows = [
        (title, *(spell(each.get(name)) for each in models.values()))
        for name, (title, spell) in _ROWS.items()
        if any(each.get(name) is not None for each in models.values())
    ]
    yield table(("", *map(plain, models)), rows)
    dense, pruned = (models.get(label, {}).get("perplexity") for label in ("dense", "pruned"))
    if dense and pruned:
        yield f"The pruned model's perplexity is {figure(pruned / dense)} times that of the dense model."
    missing = [label for label in ("dense", "pruned") if label not in models]
    if missing:
        yield f"The {' and the '.join(missing)} model was not evaluated on this text."


def _by_label(entries: _Entries) -> dict[str, Mapping[str, Any]]:
    found = {str(each.get("label", "unnamed")): each for each in entries}
    first = [label for label in ("dense", "pruned") if label in found]
    return {label: found[label] for label in dict.fromkeys([*first, *found])}


def _text(entry: Mapping[str, Any]) -> str:
    """Which text, and how it was cut."""
    cut = []
    if entry.get("windows") is not None:
        cut.append(counted(entry["windows"], "window"))
    if entry.get("seqlen") is not None:
        cut.append(f"{figure(entry['seqlen'])} tokens each")
    if entry.get("stride") is not None:
        cut.append(f"stride {figure(entry['stride'])}")
    if entry.get("fingerprint"):
        cut.append(f"fingerprint {code(str(entry['fingerprint'])[:12])}…")
    return code(text_name(str(entry.get("source", "unnamed text")))) + (f" ({', '.join(cut)})" if cut else "")


def _machine(report: PruningReport) -> str:
    known = [each for each in (report.device, report.dtype) if each]
    return f" ({', '.join(map(plain, known))})" if known else ""


def tasks(report: PruningReport) -> str:
    """Every metric of every task with its standard error, the models side by side."""
    if not report.task_results:
        return NOTHING
    labels = list(_by_label(report.task_results))
    found: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for each in report.task_results:
        same = tuple(each.get(name) for name in ("task", "samples", "num_fewshot", "source"))
        found.setdefault(same, {})[str(each.get("label", "unnamed"))] = each
    rows = [row for (task, *how), models in found.items() for row in _task_rows(task, how, models, labels)]
    note = (
        "± is one standard error. Two scores that differ by less than about two of them are not told apart by so few "
        "questions."
    )
    head = ("task", "metric", "measured with", "questions", "solved examples", *map(plain, labels))
    return paragraphs(table(head, rows, left=3), note)


def _task_rows(
    task: Any, how: Sequence[Any], models: Mapping[str, Mapping[str, Any]], labels: Iterable[str]
) -> Iterator[tuple[str, ...]]:
    """One row per metric, the one to quote first."""
    samples, shots, source = how
    primary = next(iter(models.values())).get("primary")
    names = [name for each in models.values() for name in each.get("metrics", {}) if not name.endswith("_stderr")]
    source = plain(text_name(source)) if source else ABSENT
    for name in sorted(dict.fromkeys(names), key=lambda name: name != primary):
        cells = (_score(models.get(label, {}).get("metrics", {}), name) for label in labels)
        yield (plain(task), plain(name), source, figure(samples), figure(shots), *cells)


def _score(metrics: Mapping[str, Any], name: str) -> str:
    error = metrics.get(f"{name}_stderr")
    return figure(metrics.get(name), 3) + ("" if error is None else f" ± {figure(error, 3)}")


def generation(report: PruningReport) -> str:
    """How much the models repeat themselves when they read their own words."""
    models = _by_label([each for each in report.evaluations if each.get("generation")])
    if not models:
        return NOTHING
    said = {label: each["generation"] for label, each in models.items()}
    shape = next(reversed(said.values()))
    titles = {"repetition": "repeated 4-grams", **{f"distinct_{n}": f"distinct {n}-grams" for n in (1, 2, 3)}}
    rows = [
        (title, *(percent(each[name]) if each.get(name) is not None else ABSENT for each in said.values()))
        for name, title in titles.items()
        if any(each.get(name) is not None for each in said.values())
    ]
    if any("tokens" in each for each in said.values()):
        rows.append(("tokens written", *(figure(each.get("tokens")) for each in said.values())))
    how = (
        f"{counted(shape['continuations'], 'text')} of the evaluation, continued greedily by up to "
        f"{counted(shape['new_tokens'], 'token')} after {counted(shape['prompt_tokens'], 'token')}. An n-gram is n "
        "tokens in a row. This finds loops, not nonsense."
    )
    return paragraphs(how, table(("", *map(plain, said)), rows))


def depths(report: PruningReport) -> str | None:
    """One row per measured depth, that of this checkpoint in bold; columns that nobody measured are left out."""
    if not report.depths:
        return None
    columns = {name: each for name, each in _DEPTH_COLUMNS.items() if any(name in row for row in report.depths)}
    # What was trained since is at no depth.
    here = None if report.healings else len(report.removed_units)
    rows = [_depth_row(each, columns, here) for each in report.depths]
    measured = next((each for each in report.depths if "perplexity" in each), None)
    text = f", measured on {_text(measured)}: {figure(measured.get('tokens'))} tokens scored" if measured else ""
    mine = "The row of this model is bold." if here is not None else "All of them are from before the training."
    intro = f"The same search at other depths{text}. {mine}"
    return paragraphs(intro, table([title for title, _ in columns.values()], rows, left=0))


def _depth_row(entry: Mapping[str, Any], columns: Mapping[str, Any], here: int | None) -> list[str]:
    cells = [spell(entry.get(name)) for name, (_, spell) in columns.items()]
    return [f"**{cell}**" for cell in cells] if entry.get("removed") == here else cells


def missing(report: PruningReport) -> list[str]:
    """What was not measured of the pruned model, in words."""
    mine = [each for each in report.evaluations if each.get("label") == "pruned"]
    here = [each for each in report.depths if each.get("removed") == len(report.removed_units) and not report.healings]
    measured = {
        "perplexity": any("perplexity" in each for each in (*mine, *here)),
        "KL divergence from the dense model": any(each.get("kl") is not None for each in mine),
        "speed": any(each.get(name) is not None for each in (*mine, *here) for name in (_READ, _WRITTEN)),
        "repetition in generated text": any(each.get("generation") for each in mine),
        "benchmark tasks": any(each.get("label") == "pruned" for each in report.task_results),
    }
    return [name for name, known in measured.items() if not known]


def _depths_measured(report: PruningReport) -> bool:
    return any("perplexity" in each for each in report.depths)
