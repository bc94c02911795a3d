# SPDX-License-Identifier: Apache-2.0
"""Scores a live model on benchmark tasks: lm-eval's by name, and questions in local files.

One path for both: lm-eval computes the log-likelihoods, the metrics and their standard errors (see `harness`). Two
settings differ from its command line: the log-softmax is taken in float32 whatever the model's dtype, and standard
errors that have no formula (of perplexity) come from 1,000 resamples, not 100,000.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .architectures import layout_for
from .errors import ConfigurationError, UnsupportedModelError
from .harness import check_installed, load_tasks, own_process, prepare, quiet, run, wrap
from .inputs import evaluating
from .request_tasks import SUFFIXES, RequestFile, as_task, find_requests, fingerprint, read_requests


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: Sequence[str | Path] | str | Path,
    *,
    limit: int | None = None,
    batch_size: int = 1,
    num_fewshot: int | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Scores `model` on tasks.

    Args:
        model: A decoder, or an encoder-decoder of text; not changed, and scored where it lies.
        tokenizer: Its tokenizer; not changed.
        tasks: Names of lm-eval, of a task, a group or a tag, and files of questions (see `request_tasks`). A `Path`,
            and text that holds a slash or ends in `.jsonl` or `.jsonl.gz`, is a file or a folder.
        limit: Only the first questions of each task, this many; the figures are then for trying out.
        batch_size: Requests for one forward pass; changes the speed, and figures by rounding only.
        num_fewshot: Examples before each question, for tasks of lm-eval; each task's own number unless given.
        seed: Which examples are taken; also for tasks that sample. As lm-eval's `--seed`.

    Returns:
        One entry for each task, in the order asked for, of JSON types: `task`, `samples` (questions), `metrics` (with
        `..._stderr` where there is one), `primary` (the metric to look at: what a file says, else the task's first),
        `higher_is_better` (of that metric), `num_fewshot`, `source`, `sha256` of the questions asked; of a task of
        lm-eval its `version`, `dataset` and `split`; of a file what it says about itself. A group gives its members
        and, where lm-eval defines one, an entry of its own with `members` and, under `aggregate`, how their figures
        were joined. A tag gives its members only: lm-eval has no figure for one, and none is made up.

    Raises:
        ConfigurationError: A task is unknown, a file malformed, the data not to be had, or lm-eval not installed:
            before the model runs. Or lm-eval cannot run a task with this model.
        UnsupportedModelError: The model gives no probabilities to continuations.
        NonFiniteError: A log-likelihood is not a number.
    """
    tasks = _listed(tasks)
    _check_counts(limit=limit, batch_size=batch_size, num_fewshot=num_fewshot)
    backend = _backend(model, tokenizer)
    files = {task: read_requests(task) for task in tasks if _is_file(task)}
    _check_fewshot(files.values(), num_fewshot)
    keys = {task: _key(file) for task, file in files.items()}
    with own_process(seed), evaluating(model):
        loaded = load_tasks([task for task in tasks if task not in files])
        with quiet():
            loaded["tasks"] |= {keys[task]: as_task(file) for task, file in files.items()}
        prepare(loaded["tasks"], keys.values(), num_fewshot, seed)
        wrapped = wrap(model, tokenizer, backend=backend, batch_size=batch_size)
        results = run(wrapped, loaded["tasks"], loaded["groups"], limit)
    entries = {keys[task]: _file_entry(results, loaded, file) for task, file in files.items()}
    named = [name for task in tasks for name in ([keys[task]] if task in keys else loaded["names"][task])]
    return [entries.get(name) or _entry(results, loaded, name) for name in dict.fromkeys(named)]


# What was asked for


def _listed(tasks: Sequence[str | Path] | str | Path) -> list[str | Path]:
    listed = [tasks] if isinstance(tasks, (str, Path)) else list(tasks)
    if not listed or not all(isinstance(task, (str, Path)) and str(task).strip() for task in listed):
        raise ConfigurationError(f"tasks must name at least one task or file, not {tasks!r}.")
    check_installed()
    # Two spellings of one path are one task.
    names = [str(find_requests(task).resolve()) if _is_file(task) else task for task in listed]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigurationError(f"Named twice: {', '.join(twice)}. Name each task once.")
    return listed


def _is_file(task: str | Path) -> bool:
    """Whether a task is a file or a folder, and not a name of lm-eval."""
    return isinstance(task, Path) or task.endswith(SUFFIXES) or "/" in task or os.sep in task


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        least = 0 if name == "num_fewshot" else 1
        if value is None and name != "batch_size":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigurationError(f"{name} must be a whole number of at least {least}, not {value!r}.")


def _check_fewshot(files: Sequence[RequestFile], num_fewshot: int | None) -> None:
    for file in files:
        if num_fewshot is not None and num_fewshot != file.settings.get("num_shots"):
            raise ConfigurationError(
                f"num_fewshot={num_fewshot} does not go with '{file.path}', whose questions hold their examples "
                "already. Leave it out, or score the file in a call of its own."
            )


def _backend(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """How lm-eval calls the model; not left to lm-eval, which goes by the model type and not by the class."""
    if not isinstance(tokenizer, (PreTrainedTokenizer, PreTrainedTokenizerFast)):
        raise ConfigurationError(
            f"Tasks need the model's tokenizer, one of transformers' own, not {type(tokenizer).__name__}."
        )
    layout = layout_for(model)
    if layout.kind.is_text_decoder:
        return "causal"
    if len(layout.kind.stacks) > 1 and model.main_input_name == "input_ids":
        return "seq2seq"
    raise UnsupportedModelError(
        f"{layout.subject} gives no probabilities to continuations of a text, by which tasks are scored. Compare it "
        "by its perplexity on held-out data."
    )


# Results


def _key(file: RequestFile) -> str:
    """What lm-eval calls a file: not its task, which may be one of lm-eval's, too."""
    return str(file.path.resolve())


def _file_entry(results: Mapping[str, Any], loaded: Mapping[str, Any], file: RequestFile) -> dict[str, Any]:
    entry = _entry(results, loaded, _key(file))
    common = {name: entry[name] for name in ("samples", "metrics", "sha256")}
    primary = file.primary if file.primary in entry["metrics"] else "acc"  # a perplexity may be too large for a number
    shots = file.settings.get("num_shots")
    return {
        "task": file.task,
        **common,
        "primary": primary,
        "higher_is_better": primary != "perplexity",
        **({"num_fewshot": shots} if isinstance(shots, int) else {}),
        **file.describe(),
        "scored_by": entry["source"],
    }


def _entry(results: Mapping[str, Any], loaded: Mapping[str, Any], name: str) -> dict[str, Any]:
    figures = results["results"][name]
    metrics = _metrics(figures)
    primary = next((metric for metric in metrics if "_stderr" not in metric), None)
    release = results["versions"].get(name)
    entry = {
        "task": name,
        "samples": int(figures["sample_len"]),
        "metrics": metrics,
        "primary": primary,
        "higher_is_better": results["higher_is_better"].get(name, {}).get(str(primary).split(",")[0]),
        "num_fewshot": results["n-shot"].get(name),
        "source": f"lm-eval {version('lm_eval')}",
        "version": release if isinstance(release, (str, int, float)) and release != "N/A" else None,
    }
    more = _of_group(loaded["groups"][name]) if name in loaded["groups"] else _of_task(loaded["tasks"][name])
    return {field: value for field, value in (entry | more).items() if value is not None}


def _metrics(figures: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's `metric,filter` as `metric` where there is one filter; what is not a finite number is left out.

    The standard error of `metric,filter` is `metric,filter_stderr`, not `metric_stderr,filter` as there.
    """
    numbers = {
        tuple(name.split(",", 1)): float(value)
        for name, value in figures.items()
        if "," in name and isinstance(value, (int, float, np.number)) and np.isfinite(value)
    }
    several = len({chosen for _, chosen in numbers}) > 1
    named = {}
    for (name, chosen), value in numbers.items():
        metric, ending = name.removesuffix("_stderr"), "_stderr" if name.endswith("_stderr") else ""
        named[f"{metric},{chosen}{ending}" if several else name] = value
    return named


def _of_task(task: Any) -> dict[str, Any]:
    asked = ([each.doc_id, each.idx, each.args, task.doc_to_target(each.doc)] for each in task.instances)
    dataset = [part for part in (task.DATASET_PATH, task.DATASET_NAME) if part]
    return {
        "sha256": fingerprint(asked),
        "dataset": "/".join(dataset) or None,
        "split": task.config.test_split or task.config.validation_split,
    }


def _of_group(group: Any) -> dict[str, Any]:
    ways = {True: "mean over the questions of all members", False: "mean over members"}
    weighted = {each.weight_by_size for each in group.aggregate_metric_list}
    return {
        "members": [task.task_name for task in group.get_all_tasks()],
        "aggregate": " or ".join(ways[each] for each in sorted(weighted)),
    }
