# SPDX-License-Identifier: Apache-2.0
"""The metadata of a card: what the Hub reads, and only what is known of this model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCardData

from .card_text import HUB, hub_id, hub_text, one_line, text_name
from .plan import PruningPlan
from .report import PruningReport


# What the Hub calls these metrics; others keep their name.
_METRICS = {"acc": "accuracy"}

# Types of texts that are no data set on the Hub: `dataset.type` must be there, and may not look like a repository.
LOCAL_TEXT, TEXT_IN_MEMORY = "local-text", "text-in-memory"
_NO_TYPE = re.compile(r"[^\w.-]+")

# What the Hub takes; a folder's card may say anything.
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?|code|multilingual")
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def card_data(plan: PruningPlan, report: PruningReport, *, title: str) -> ModelCardData:
    """Builds the metadata; see `card.model_card`."""
    base = known_base(plan, report)
    results = [*_perplexities(report), *_tasks(report)]
    return ModelCardData(
        base_model=base,
        # The Hub knows adapter, finetune, merge and quantized; the body says whether anything was trained.
        base_model_relation="finetune" if base else None,
        language=_languages(report) or None,
        **_licence(plan, report),
        library_name="transformers",
        pipeline_tag=report.task,
        tags=["pruned", *_kinds(plan), "optimum", *(one_line(name)[:100] for name in plan.strategy.split("+"))],
        datasets=_datasets(plan, report) or None,
        model_name=one_line(title) or "pruned model" if results else None,
        eval_results=results or None,
    )


def direct_base(plan: PruningPlan, report: PruningReport) -> str | None:
    """Name of the model that was pruned: repo id or path."""
    return report.base.get("model") or plan.base_model


def direct_repo(plan: PruningPlan, report: PruningReport) -> str | None:
    """The repository of the model that was pruned, if it came from one."""
    return hub_id(direct_base(plan, report), loaded="revision" in report.base)


def known_base(plan: PruningPlan, report: PruningReport) -> str | None:
    """The nearest ancestor that is a repository on the Hub."""
    earlier = [hub_id(entry.get("base_model")) for entry in reversed(report.history)]
    return next((repo for repo in (direct_repo(plan, report), *earlier) if repo), None)


def calibrations(plan: PruningPlan, report: PruningReport) -> list[Mapping[str, Any]]:
    """The calibration sets, one for each plan that was joined in this one; those alike once."""
    found: list[Mapping[str, Any]] = []
    for each in [*(part.get("calibration") for part in plan.parts()), plan.calibration, report.calibration]:
        if each and each not in found:
            found.append(each)
    return found


def _kinds(plan: PruningPlan) -> list[str]:
    depth = ["block-pruning", "depth-pruning"] if plan.num_removed or not plan.width else []
    return depth + (["structured-pruning", "width-pruning"] if plan.width else [])


def _languages(report: PruningReport) -> list[str]:
    stated = report.base.get("language") or []
    return [each for each in ([stated] if isinstance(stated, str) else stated) if _LANGUAGE.fullmatch(str(each))]


def _licence(plan: PruningPlan, report: PruningReport) -> dict[str, Any]:
    """What the base states. The Hub takes identifiers; a licence that is spelled in words is `other` with a name."""
    base = report.base
    stated, name = base.get("license") or None, base.get("license_name") or None
    if isinstance(stated, str):
        if not _IDENTIFIER.fullmatch(stated.lower()):
            name = name or stated
            stated = "other"
        stated = stated.lower()
    name = re.sub(r"[^a-z0-9.+-]+", "-", name.lower()).strip("-") or None if name else None
    return {"license": stated, "license_name": name, "license_link": licence_link(plan, report) if stated else None}


def licence_link(plan: PruningPlan, report: PruningReport) -> str | None:
    """Where the terms can be read: a file of the base's repository by its full address."""
    link, repo = report.base.get("license_link") or "", direct_repo(plan, report)
    if re.fullmatch(r"https?://\S+", link):
        return link
    if not link or repo is None or re.match(r"/|[a-zA-Z][\w+.-]*:", link):
        return None
    return f"{HUB}/{repo}/blob/{report.base.get('revision', 'main')}/{quote(link.removeprefix('./'))}"


def _datasets(plan: PruningPlan, report: PruningReport) -> list[str]:
    """What the model was pruned and trained on; what it was measured on is in the results."""
    texts = [*calibrations(plan, report), *report.healings]
    found = [hub_text(each["source"]) for each in texts if each.get("source")]
    return list(dict.fromkeys(each[0] for each in found if each))


def _perplexities(report: PruningReport) -> Iterator[EvalResult]:
    for entry in report.evaluations:
        value = entry.get("perplexity")
        if entry.get("label") != "pruned" or value is None or not math.isfinite(value):
            continue
        details = {name: entry.get(name) for name in ("tokens", "windows", "seqlen", "stride", "fingerprint")}
        yield EvalResult(
            task_type=report.task or "text-generation",
            **_text(entry.get("source", "unnamed text")),
            metric_type="perplexity",
            metric_name="perplexity" + (f" ({entry['tokens']:,} tokens scored)" if "tokens" in entry else ""),
            metric_value=round(value, 4),
            metric_args={name: number for name, number in details.items() if number is not None} or None,
        )


def _text(source: str) -> dict[str, Any]:
    known = hub_text(source)
    if known:
        repo, config, split = known
        return {"dataset_type": repo, "dataset_name": repo, "dataset_config": config, "dataset_split": split}
    kind = TEXT_IN_MEMORY if source.startswith("in-memory") else LOCAL_TEXT
    # The configuration keeps results on two texts apart, which would be joined by their type.
    name = one_line(text_name(source)) or "unnamed text"
    return {"dataset_type": kind, "dataset_name": name, "dataset_config": name}


def _tasks(report: PruningReport) -> Iterator[EvalResult]:
    for entry in report.task_results:
        primary = entry.get("primary")
        value = entry.get("metrics", {}).get(primary)
        if entry.get("label") != "pruned" or value is None or not math.isfinite(value):
            continue
        error = entry["metrics"].get(f"{primary}_stderr")
        details = {"stderr": error, **{name: entry.get(name) for name in ("samples", "num_fewshot")}}
        if entry.get("source"):
            details["source"] = text_name(entry["source"])
        yield EvalResult(
            task_type=report.task or "text-generation",
            dataset_type=_benchmark(entry),
            dataset_name=one_line(entry["task"]),
            metric_type=_METRICS.get(primary, primary),
            metric_name=f"{primary} ± {error:.3f} (standard error)" if _finite(error) else primary,
            metric_value=round(value, 4),
            metric_args={name: each for name, each in details.items() if each is not None} or None,
        )


def _benchmark(entry: Mapping[str, Any]) -> str:
    """The repository of a task's questions; of two parts nobody can tell whether the second one is a configuration."""
    parts = str(entry.get("dataset", "")).split("/")
    repo = hub_id("/".join(parts[:2])) if len(parts) == 3 else None
    return repo or _NO_TYPE.sub("-", entry["task"]).strip("-.") or "task"


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
