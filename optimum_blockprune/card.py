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

{base}with {removed} removed by
[`optimum-blockprune`](https://pypi.org/project/optimum-blockprune/); nothing was retrained.

```python
{usage}
```

## What was removed

Strategy `{strategy}`; {order}.

| | before | after |
|---|---:|---:|
{sizes}

## Measured quality

{quality}

## Other runtimes

{runtimes}

## Reproduce

`pruning_plan.json` in this folder holds what is kept, the scores and the calibration set's fingerprint:

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
        tags=["pruned", *_kinds(plan), "optimum", *plan.strategy.split("+")],
    )
    prepares = "Tokenizer" if report.task in _TEXT_TASKS else "Processor"
    body = _BODY.format(
        title=title,
        base=f"`{plan.base_model}` " if plan.base_model else "A model ",
        removed=_removed(plan),
        strategy=plan.strategy,
        order=_order(plan),
        sizes=_sizes(report.achieved),
        quality=_quality(report.evaluations),
        runtimes=_runtimes(report.runtimes),
        usage=_usage(plan, report, prepares),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")


def _kinds(plan: PruningPlan) -> list[str]:
    depth = ["block-pruning", "depth-pruning"] if plan.removed_blocks or not plan.width else []
    return depth + (["structured-pruning", "width-pruning"] if plan.width else [])


def _removed(plan: PruningPlan) -> str:
    """What is missing, in words that follow "with"."""
    parts = [f"{len(plan.removed_blocks)} of its {plan.num_blocks} transformer blocks"]
    if plan.width and not plan.removed_blocks:
        parts = []
    for family, counts in plan.width.totals().items():
        share = 1 - counts["after"] / counts["before"]
        parts.append(f"{share:.1%} of its {_FAMILIES[family]}")
    return " and ".join(parts)


_FAMILIES = {"mlp": "MLP channels", "attention": "attention heads (in whole KV groups)"}


def _order(plan: PruningPlan) -> str:
    blocks = f"removed blocks, in order: {', '.join(map(str, plan.removed_blocks)) or 'none'}"
    if not plan.width:
        return blocks
    layouts = {
        "uniform": "every block keeps the same number of them",
        "padded": "zeros fill the narrower blocks up to the widest one",
        "per_layer": "every block has its own width",
    }
    width = f"layout `{plan.width.layout}`: {layouts[plan.width.layout]}"
    return f"{blocks}; {width}" if plan.removed_blocks else width


def _usage(plan: PruningPlan, report: PruningReport, prepares: str) -> str:
    """How to load it: with transformers alone, unless blocks differ in width."""
    companion = f"Auto{prepares}"
    tail = f'{prepares.lower()} = {companion}.from_pretrained("path/or/repo")'
    if not plan.width.loads_anywhere:
        lines = [
            "from optimum_blockprune import BlockPruner  # transformers alone refuses this folder",
            f"from transformers import {companion}",
            "",
            'model = BlockPruner.load_pruned("path/or/repo")',
        ]
    else:
        loader = report.loader or "AutoModelForCausalLM"
        lines = [
            f"from transformers import {loader}, {companion}",
            "",
            f'model = {loader}.from_pretrained("path/or/repo")',
        ]
    return "\n".join([*lines, tail])


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
    for family, counts in achieved.get("units", {}).items():
        rows.append(f"| {_FAMILIES[family]}, all blocks | {counts['before']:,} | {counts['after']:,} |")
    if achieved.get("padding_parameters"):
        rows.append(f"| of the parameters, zeros that fill up blocks | 0 | {achieved['padding_parameters']:,} |")
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
