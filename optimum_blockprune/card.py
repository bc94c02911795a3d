# SPDX-License-Identifier: Apache-2.0
"""The model card of a pruned checkpoint: written from plan and report, so that it says only what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard

from .card_data import card_data, direct_base, direct_repo
from .card_origin import again, origin
from .card_quality import degeneration, depths, generation, missing, quality, tasks
from .card_text import (
    FAMILIES,
    code,
    counted,
    fenced,
    figure,
    healing_words,
    megabytes,
    model_name,
    paragraphs,
    percent,
    picture,
    plain,
    table,
    unescaped,
)
from .picture_style import by_divergence, scored_text
from .pictures import DEPTH_FILE, PICTURES, QUALITY_FILE, SEARCH_FILE, alt_texts
from .plan import PruningPlan
from .report import PruningReport


_TOOL = "[`optimum-blockprune`](https://pypi.org/project/optimum-blockprune/)"
_UNTITLED = "Pruned model"

# Tasks that need no more than a tokenizer.
_TEXT_TASKS = (None, "text-generation", "text2text-generation", "fill-mask", "feature-extraction")

_LAYOUTS = {
    "uniform": "every block keeps the same number of them",
    "padded": "zeros fill the narrower blocks up to the widest one",
    "per_layer": "every block has its own width",
}
_VERDICTS = {
    "same": "reads this checkpoint as transformers does",
    "differs": "reads it differently",
    "unknown": "unknown",
}


def model_card(plan: PruningPlan, report: PruningReport, *, title: str, pictures: Sequence[str] = ()) -> ModelCard:
    """Writes the card; the same arguments give the same text.

    Args:
        plan: What was removed.
        report: What was measured; what is not in it is said to be missing.
        title: Heading, usually the folder's name.
        pictures: Names of those of `pictures.PICTURES` that lie beside the card.

    Returns:
        The card, whose metadata the Hub accepts; `str()` of it is the content of `README.md`.
    """
    words = alt_texts(report)
    shown = {name: picture(name, words.get(name, PICTURES[name])) for name in PICTURES if name in pictures}
    searched = SEARCH_FILE in shown or report.block_forwards is not None
    sections = {
        "How to load it": _loading(plan, report),
        "What was removed": paragraphs(shown.get(DEPTH_FILE), *_removal(plan, report)),
        "Quality": quality(report),
        "Benchmark tasks": tasks(report),
        "Generation": generation(report),
        "Quality against depth": paragraphs(shown.get(QUALITY_FILE), depths(report)),
        "The search" if searched else "Cost": paragraphs(shown.get(SEARCH_FILE), *_costs(report)),
        "Reproduce": paragraphs(*again(plan, report)),
        "Other runtimes": _runtimes(report.runtimes),
        "Where it comes from": paragraphs(*origin(plan, report)),
        "Limits": _limits(report),
    }
    body = paragraphs(
        f"# {plain(title) or _UNTITLED}",
        *_lead(plan, report),
        *(f"## {name}\n\n{text}" for name, text in sections.items() if text),
    )
    return ModelCard(f"---\n{card_data(plan, report, title=title).to_yaml()}\n---\n\n{body}\n")


def title_of(text: str) -> str | None:
    """The title that a card was written with, read from its text; `None` if it has no heading."""
    lines = text.split("\n---\n", 1)[-1].splitlines()
    return next((unescaped(line[2:]) for line in lines if line.startswith("# ")), None)


def _lead(plan: PruningPlan, report: PruningReport) -> Iterator[str | None]:
    """What it is, and a warning where the model's own text degenerated."""
    base = model_name(direct_base(plan, report), loaded=direct_repo(plan, report) is not None)
    saved = report.achieved.get("parameters_removed")
    size = f", so that it has {percent(saved)} fewer parameters" if saved is not None else ""
    trained = "Its weights were trained afterwards." if report.healings else "Nothing was trained afterwards."
    yield f"This is {base} with {_removed(plan)} removed by {_TOOL}{size}. {trained} “Dense” is the model before that."
    if report.healing:
        yield plain(f"{'. '.join(map(healing_words, report.healing))}.")
    yield degeneration(report)


def _removed(plan: PruningPlan) -> str:
    """What is missing, in words that follow "with"."""
    worth = " (as half-blocks)" if plan.removed_halves else ""
    parts = [f"{plan.num_removed} of its {plan.num_blocks} transformer blocks{worth}"]
    if plan.width and not plan.num_removed:
        parts = []
    for family, counts in plan.width.totals().items():
        share = 1 - counts["after"] / counts["before"]
        parts.append(f"{percent(share)} of its {_family(family)}")
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _family(name: str) -> str:
    return FAMILIES.get(name, plain(name))


def _loading(plan: PruningPlan, report: PruningReport) -> str:
    """Three lines with transformers alone, unless blocks differ in width."""
    companion = "AutoTokenizer" if report.task in _TEXT_TASKS else "AutoProcessor"
    place = '"path/or/repo"' + (", trust_remote_code=True" if report.base.get("remote_code") else "")
    lines = []
    if plan.width.loads_anywhere:
        loader = report.loader or "AutoModelForCausalLM"
        lines = [f"from transformers import {loader}, {companion}", f"model = {loader}.from_pretrained({place})"]
        said = "with `transformers` alone"
    else:
        lines = [
            f"from optimum_blockprune import BlockPruner\nfrom transformers import {companion}",
            f"model = BlockPruner.load_pruned({place})",
        ]
        said = "after `pip install optimum-blockprune`: its blocks differ in width, which `transformers` alone refuses"
    lines.append(f"{companion.removeprefix('Auto').lower()} = {companion}.from_pretrained({place})")
    code_note = " It runs code from the repository; read that first." if report.base.get("remote_code") else ""
    return paragraphs(
        f"It loads {said}. Replace `path/or/repo` by this folder or repository.{code_note}",
        fenced("\n".join(lines), "python"),
    )


def _removal(plan: PruningPlan, report: PruningReport) -> Iterator[str | None]:
    yield (
        "A language model is a stack of blocks that text passes one after the other. "
        + (_order(plan) if plan.num_removed or not plan.width else "All blocks stay; each has become narrower.")
    )
    if plan.width:
        kinds = " A KV group is a key-value head with its query heads." if "attention" in plan.width.totals() else ""
        yield f"Width, layout {code(plan.width.layout)}: {_LAYOUTS[plan.width.layout]}.{kinds}"
    yield _chooser(plan)
    sizes = list(_sizes(report.achieved))
    if sizes:
        yield table(("", "dense", "pruned"), sizes)
    yield _blocks(report)
    yield _kept(report)


def _order(plan: PruningPlan) -> str:
    of = " of the encoder" if plan.stack == "encoder" else ""
    order = ", ".join(plan.removed_names) or "none"
    if plan.removed_halves:
        return (
            f"A block has two halves, attention and MLP. Removed half-blocks{of}, in order: {order} (numbered as in "
            "the dense model, from 0); what is left alternates, so that two halves make up an ordinary block again."
        )
    return f"Removed blocks{of}, in order: {order} (numbered as in the dense model, from 0)."


def _chooser(plan: PruningPlan) -> str:
    if plan.strategy == "manual":
        return "A person named them; nothing was searched."
    names = [code(name) for name in plan.strategy.split("+")]
    if len(names) > 1:
        return f"Chosen by the strategies {', then '.join(names)}, each on what the one before left."
    return f"Chosen by the strategy {names[0]}."


def _sizes(achieved: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name in ("blocks", "parameters"):
        if f"{name}_before" in achieved:
            yield name, figure(achieved[f"{name}_before"]), figure(achieved.get(f"{name}_after"))
    for family, counts in achieved.get("units", {}).items():
        yield f"{_family(family)}, all blocks", figure(counts["before"]), figure(counts["after"])
    if achieved.get("padding_parameters"):
        yield "of the parameters, zeros that fill up blocks", "0", figure(achieved["padding_parameters"])


def _blocks(report: PruningReport) -> str | None:
    """What the search knew of each removed block: its score, and the loss after it."""
    after = {step["block"]: step for step in report.steps if "block" in step and "loss" in step}
    loss = "KL (nats per token)" if by_divergence(report) else "loss"
    columns = {
        "score on the dense model": lambda block: report.scores.get(str(block)),
        f"{loss} after removal": lambda block: after.get(block, {}).get("loss"),
        "perplexity after removal": lambda block: after.get(block, {}).get("perplexity"),
    }
    gone = report.removed_units
    known = {title: value for title, value in columns.items() if any(value(block) is not None for block in gone)}
    if not known:
        return None
    rows = [
        (str(place), str(block), *(figure(value(block), 4) for value in known.values()))
        for place, block in enumerate(gone, 1)
    ]
    note = f"Figures of the search, on its {scored_text(report)}; those of all blocks are in `pruning_report.json`."
    return paragraphs(table(("removed as", "block", *known), rows, left=0), note)


def _kept(report: PruningReport) -> str | None:
    """How much of each block stays, where blocks differ."""
    rows = []
    for family, entry in report.widths.items():
        kept = [number for number in entry.get("kept", ()) if number is not None]
        if len(set(kept)) > 1:
            rows.append((_family(family), figure(min(kept)), figure(max(kept))))
    return table(("kept in one block", "fewest", "most"), rows) if rows else None


def _costs(report: PruningReport) -> Iterator[str | None]:
    """What it took to choose and to prune."""
    spent, naive = report.block_forwards, report.naive_block_forwards
    rows = [
        ("runs of single blocks", figure(spent), spent),
        ("the same by whole passes for every candidate", figure(naive), naive),
        ("runs of the language-model head", figure(report.head_forwards), report.head_forwards),
        ("tokens of calibration text", figure(report.tokens), report.tokens),
        ("peak memory, MB", megabytes(report.peak_memory_bytes), report.peak_memory_bytes),
        *((f"seconds: {plain(phase)}", figure(each, 1), each) for phase, each in report.seconds.items()),
    ]
    known = [(title, spelled) for title, spelled, value in rows if value is not None]
    if known:
        where = [each for each in (report.device, report.dtype) if each]
        yield "What it cost" + (f" ({plain(', '.join(where))}):" if where else ":")
        yield table(("", "number"), known)
        whole = report.strategy_details.get("truncated_from")
        if whole is not None:
            yield f"The search went on to {counted(whole, 'block')}; these are the costs of all of it."


def _runtimes(runtimes: Mapping[str, Any]) -> str:
    if not runtimes:
        return "Not looked at."
    said = {name: _VERDICTS.get(entry.get("verdict"), "unknown") for name, entry in runtimes.items()}
    return "\n".join(f"- {plain(name)}: {said[name]} ({plain(runtimes[name].get('reason'))})" for name in said)


def _limits(report: PruningReport) -> str:
    trained = "with a short training" if report.healings else "without any training"
    lines = [
        f"Pruning made the model smaller {trained} to make up for it; expect it to be worse than the dense model, "
        "also where it was not measured.",
        *(f"Not evaluated: {name}." for name in [", ".join(missing(report))] if name),
        "Not evaluated: facts, reasoning, long texts, languages, safety and bias, beyond the figures above.",
        "Limits and intended use of the dense model hold for this one as well.",
    ]
    return "\n".join(f"- {line}" for line in lines)
