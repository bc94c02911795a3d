# SPDX-License-Identifier: Apache-2.0
"""The model card of a pruned checkpoint: written from plan and report, so that it says only what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .plan import PruningPlan
from .report import PruningReport


_BODY = """
# {title}

{base}with {removed} of its {dense} transformer blocks removed by
[`optimum-blockprune`](https://pypi.org/project/optimum-blockprune/); nothing was retrained.

```python
from transformers import {loader}, {companion}

model = {loader}.from_pretrained("path/or/repo")
{variable} = {companion}.from_pretrained("path/or/repo")
```

## What was removed

Strategy `{strategy}`; removed blocks, in order: {order}.

| | before | after |
|---|---:|---:|
{sizes}

## Measured quality

{quality}

## Other runtimes

{runtimes}

## Reproduce

`pruning_plan.json` in this folder holds the blocks, the scores and the calibration set's fingerprint:

```shell
optimum-cli blockprune apply -m BASE_MODEL --plan pruning_plan.json OUTPUT
```
"""


# Tasks that need no more than a tokenizer.
_TEXT_TASKS = (None, "text-generation", "text2text-generation", "fill-mask", "feature-extraction")


def model_card(plan: PruningPlan, report: PruningReport, *, title: str) -> ModelCard:
    """Returns the card as `huggingface_hub.ModelCard`.

    Args:
        plan: What was removed.
        report: What was measured; evaluations that are not in it are said to be missing.
        title: Heading, usually the folder's name.
    """
    data = ModelCardData(
        base_model=_repo_id(plan.base_model),
        library_name="transformers",
        pipeline_tag=report.task or "text-generation",
        tags=["pruned", "block-pruning", "depth-pruning", "optimum", plan.strategy],
    )
    prepares = "Tokenizer" if report.task in _TEXT_TASKS else "Processor"
    body = _BODY.format(
        title=title,
        base=f"`{plan.base_model}` " if plan.base_model else "A model ",
        removed=len(plan.removed_blocks),
        dense=plan.num_blocks,
        strategy=plan.strategy,
        order=", ".join(map(str, plan.removed_blocks)) or "none",
        sizes=_sizes(report.achieved),
        quality=_quality(report.evaluations),
        runtimes=_runtimes(report.runtimes),
        loader=report.loader or "AutoModelForCausalLM",
        companion=f"Auto{prepares}",
        variable=prepares.lower(),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")


def _repo_id(base_model: str | None) -> str | None:
    """The base model as metadata: only what looks like a repository on the Hub, not a local path."""
    if base_model is None or "/" not in base_model or Path(base_model).exists():
        return None
    try:
        validate_repo_id(base_model)
    except HFValidationError:
        return None
    return base_model


def _sizes(achieved: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {achieved[f'{name}_before']:,} | {achieved[f'{name}_after']:,} |"
        for name in ("blocks", "parameters")
        if f"{name}_before" in achieved
    ]
    return "\n".join(rows)


def _runtimes(runtimes: dict[str, Any]) -> str:
    if not runtimes:
        return "Not looked at."
    says = {
        "same": "reads this checkpoint as transformers does",
        "differs": "reads it differently",
        "unknown": "unknown",
    }
    return "\n".join(f"- {name}: {says[entry['verdict']]} ({entry['reason']})" for name, entry in runtimes.items())


def _quality(evaluations: list[dict[str, Any]]) -> str:
    if not evaluations:
        return "Not evaluated."
    rows = ["| model | text | tokens | perplexity |", "|---|---|---:|---:|"]
    for entry in evaluations:
        rows.append(f"| {entry['label']} | {entry['source']} | {entry['tokens']:,} | {entry['perplexity']:.2f} |")
    return "\n".join(rows)
