# SPDX-License-Identifier: Apache-2.0
"""lm-eval, as tasks are run by it: its index, its tasks, its wrapper around a live model, its `evaluate`.

It is imported on use only. What it changes outside itself is put back: the model (it ties weights and switches to
evaluation mode), the tokenizer (it adds padding), random states, the environment; what it prints goes to stderr.
"""

from __future__ import annotations

import copy
import difflib
import os
import random
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from optimum.utils import logging
from packaging.version import Version
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import ConfigurationError, NonFiniteError


logger = logging.get_logger("optimum.blockprune.harness")

# Our choice: a standard error that is itself known to 2 %.
_RESAMPLES = 1000
# The first with `TaskManager.load`.
_OLDEST = "0.4.12"


def check_installed() -> None:
    """Refuses to go on without lm-eval.

    Raises:
        ConfigurationError: It is missing or too old.
    """
    found = version("lm_eval") if find_spec("lm_eval") else None
    if found is None or Version(found) < Version(_OLDEST):
        raise ConfigurationError(
            f"Tasks are scored by lm-eval {_OLDEST} or later; installed is {found or 'none'}: "
            "pip install 'optimum-blockprune[eval]'"
        )


@cache
def task_manager() -> Any:
    """Returns lm-eval's index of tasks, which takes ten seconds to build."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager()


def check_known(names: list[str]) -> None:
    """Refuses names that lm-eval does not have.

    Raises:
        ConfigurationError: For the first of them, with the names that are near.
    """
    for name in names:
        known = task_manager().task_index
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
            hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ConfigurationError(
                f"lm-eval {version('lm_eval')} has no task '{name}'.{hint} `lm_eval ls tasks` shows all of them; a "
                f"file or a folder is named with a slash, as ./{name}."
            )


def load_tasks(names: list[str]) -> dict[str, dict[str, Any]]:
    """Builds lm-eval's tasks with their data.

    Returns:
        `tasks` and `groups` by name, and under `names` what each of `names` stands for: itself, or the groups with a
        figure of their own and the members.

    Raises:
        ConfigurationError: A name is unknown, or the data of a task cannot be had.
    """
    check_known(names)
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "names": {}}
    for name in names:
        try:
            part = task_manager().load([name])
        except Exception as error:  # data sets fail in as many ways as there are hosts and formats
            raise ConfigurationError(
                f"The task '{name}' cannot be loaded: {' '.join(str(error).split())} ({type(error).__name__}). Where "
                "its data cannot be fetched, name a file of its questions instead (.jsonl or .jsonl.gz)."
            ) from error
        loaded["tasks"] |= part["tasks"]
        loaded["groups"] |= part.get("groups", {})
        joined = [group.name for group in part.get("groups", {}).values() if group.has_aggregation]
        loaded["names"][name] = [*joined, *part["tasks"]]
    return loaded


def prepare(tasks: Mapping[str, Any], ready: Collection[str], num_fewshot: int | None, seed: int) -> None:
    """Refuses tasks that must not or cannot run here, and sets the number of examples as lm-eval's command does.

    Args:
        tasks: Changed in place.
        ready: Names of those that hold their examples already.
        num_fewshot, seed: How many examples, and which; each task's own number if `None`.
    """
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigurationError(f"The task '{name}' runs code that the model writes; score it by `lm_eval run`.")
        if getattr(task, "MULTIMODAL", False):
            raise ConfigurationError(f"The task '{name}' shows more than text; score it by `lm_eval run`.")
        stated = task.get_config("num_fewshot")
        if name not in ready and num_fewshot and stated == 0:
            logger.warning(f"The task '{name}' is defined without examples and stays so.")
        elif name not in ready:
            task.set_config("num_fewshot", (stated or 0) if num_fewshot is None else num_fewshot)
        task.set_fewshot_seed(seed)


def wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, backend: str, batch_size: int) -> Any:
    """Returns the model as lm-eval's `HFLM`; `backend` is `"causal"` or `"seq2seq"`."""
    from lm_eval.models.huggingface import HFLM

    with quiet(), _not_tied(model):
        return HFLM(
            pretrained=model,
            # A copy: lm-eval gives it a padding token, a new one if need be.
            tokenizer=copy.deepcopy(tokenizer),
            backend=backend,
            batch_size=batch_size,
            softmax_dtype="float32",
        )


def run(wrapped: Any, tasks: Mapping[str, Any], groups: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    """Returns what `lm_eval.evaluate` does.

    Raises:
        ConfigurationError: lm-eval cannot run a task with this model and these settings.
        NonFiniteError: A log-likelihood is not a number, so that nothing is known of the answer.
    """
    from lm_eval import evaluate

    together = {"tasks": dict(tasks), "groups": dict(groups)}
    try:
        results = evaluate(wrapped, together, limit=limit, bootstrap_iters=_RESAMPLES, log_samples=False)
    except (AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())
        reason = reason or "a continuation has no tokens of its own, or more than the model has positions"
        names = ", ".join(task.config.task for task in tasks.values())
        raise ConfigurationError(f"lm-eval stopped ({names}): {reason}.") from error
    _check_finite(tasks)
    return results


def _check_finite(tasks: Mapping[str, Any]) -> None:
    answers = ((task, answer) for task in tasks.values() for each in task.instances for answer in each.resps)
    for task, answer in answers:
        figure = answer[0] if isinstance(answer, tuple) else answer
        # Minus infinity is a token that the model never writes; anything else that is not finite is damage.
        if isinstance(figure, float) and not figure < float("inf"):
            raise NonFiniteError(
                f"A log-likelihood is {figure} (task '{task.config.task}'). Load the model in another dtype, or "
                "measure its perplexity, which names the block where that begins."
            )


@contextmanager
def own_process(seed: int) -> Iterator[None]:
    """Seeds everything, as lm-eval's command does, and puts back what is changed outside lm-eval itself."""
    python, numpy = random.getstate(), np.random.get_state()
    variable = os.environ.get("DISABLE_MULTIPROC")
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), redirect_stdout(sys.stderr):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        # No processes for resampling: a fork of one with threads may hang.
        os.environ["DISABLE_MULTIPROC"] = "1"
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            del os.environ["DISABLE_MULTIPROC"]
            if variable is not None:
                os.environ["DISABLE_MULTIPROC"] = variable


@contextmanager
def quiet() -> Iterator[None]:
    """Holds back lm-eval's warnings about its own index, a live model, and tasks that come without its settings."""
    lm_eval = logging.logging.getLogger("lm_eval")
    level = lm_eval.level
    lm_eval.setLevel("ERROR")
    try:
        yield
    finally:
        lm_eval.setLevel(level)


@contextmanager
def _not_tied(model: PreTrainedModel) -> Iterator[None]:
    """Keeps lm-eval from tying weights again: those of a live model are as they should be."""
    model.tie_weights = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        del model.tie_weights
