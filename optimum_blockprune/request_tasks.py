# SPDX-License-Identifier: Apache-2.0
"""Benchmark questions in a file: reads ready requests without the Hub, and makes a task of lm-eval of them.

The format is the one of the requests that OLMES ships: one JSON object a line,

    {"request_type": "loglikelihood", "request": {"context": "Question: ...", "continuation": " a dog"},
     "idx": 0, "doc_id": 0, "label": 1, "task_name": "arc_easy", ...}

where lines with one `doc_id` are the choices of one question, `idx` numbers them and `label` is the right one. A
question with a single line asks for that continuation (LAMBADA). Lines with `doc_id` of a million and more repeat the
choices without the question, for a metric that is not computed here; they are passed over. A `config.json` beside the
file may say which split it is, which metric to look at and how many examples the contexts hold.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from optimum.utils import logging

from .errors import ConfigurationError


logger = logging.get_logger("optimum.blockprune.request_tasks")

REQUESTS = ("requests.jsonl.gz", "requests.jsonl")
SUFFIXES = (".jsonl", ".jsonl.gz")
_UNCONDITIONAL = 1_000_000
# What the files call the metrics that are computed here.
_METRICS = {"acc": "acc", "acc_raw": "acc", "acc_norm": "acc_norm", "acc_per_char": "acc_norm"}
_METRICS["perplexity"] = "perplexity"
# exp() of more nats than this overflows.
_MAX_NATS = 700


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        contexts: What the model reads, one for each choice (usually the same one).
        continuations: The choices, each with its leading space.
        gold: Number of the right choice; `None` if there is only one.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int | None


@dataclass(frozen=True)
class RequestFile:
    """A file of questions, checked.

    Attributes:
        path: The file itself.
        task: Its `task_name`.
        questions: All of them, in the order of the file.
        settings: `primary_metric`, `split` and `num_shots` where a `config.json` says them.
    """

    path: Path
    task: str
    questions: tuple[Question, ...]
    settings: Mapping[str, Any]

    @property
    def metrics(self) -> tuple[str, ...]:
        """What can be computed.

        `acc`: the choice with the highest summed log-likelihood is the right one; of a question with one
        continuation, every token of it is the model's first choice. `acc_norm`: the same after division by the
        length of the continuation in characters, without its leading space, as lm-eval does; absent where all
        choices of a question are one text after different contexts (WinoGrande), which have one length.
        `perplexity`: exp of the mean negative log-likelihood of a whole continuation.
        """
        if self.questions[0].gold is None:
            return ("acc", "perplexity")
        partial = all(len(set(question.continuations)) == 1 for question in self.questions)
        return ("acc",) if partial else ("acc", "acc_norm")

    @property
    def primary(self) -> str:
        """The metric that the file wants looked at; `acc` where it names none that is computed here."""
        wanted = self.settings.get("primary_metric")
        known = _METRICS.get(wanted, wanted)
        if wanted is None or known in self.metrics:
            return known or "acc"
        logger.warning(f"'{self.path}' prefers the metric '{wanted}', which is not computed; 'acc' stands for it.")
        return "acc"

    def describe(self) -> dict[str, Any]:
        """What a report says about the file, as JSON values: its name, not where it lies."""
        return {
            "source": self.path.name,
            **({"variant": self.path.parent.name} if self.path.name in REQUESTS else {}),
            **({"split": self.settings["split"]} if self.settings.get("split") else {}),
        }


def find_requests(path: str | Path) -> Path:
    """Returns the file that `path` means: itself, or the requests in the folder.

    Raises:
        ConfigurationError: There is none, or it is of another kind.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = next((path / name for name in REQUESTS if (path / name).is_file()), None)
        if found is None:
            below = sorted({file.parent.name for name in REQUESTS for file in path.glob(f"*/{name}")})
            hint = f" Name one of its folders: {', '.join(below)}." if below else ""
            raise ConfigurationError(f"The folder '{path}' holds no {' or '.join(REQUESTS)}.{hint}")
        return found
    if not path.name.endswith(SUFFIXES):
        raise ConfigurationError(
            f"'{path}' is not a file of questions: name one that ends in {' or '.join(SUFFIXES)}, a folder with "
            f"{REQUESTS[0]}, or a task of lm-eval."
        )
    if not path.is_file():
        raise ConfigurationError(f"There is no file '{path}'.")
    return path


def read_requests(path: str | Path) -> RequestFile:
    """Reads and checks a whole file.

    Args:
        path: The file, plain or gzipped, or a folder that holds `requests.jsonl.gz`.

    Raises:
        ConfigurationError: The file is missing or malformed; the message names the line.
    """
    path = find_requests(path)
    rows: dict[int, dict[int, Mapping[str, Any]]] = {}
    places: dict[int, str] = {}
    name: str | None = None
    for place, row in _rows(path):
        if row["doc_id"] >= _UNCONDITIONAL:
            continue
        name = name or row["task_name"]
        if row["task_name"] != name:
            raise ConfigurationError(f"{place}: task_name is '{row['task_name']}', but the file began with '{name}'.")
        choices = rows.setdefault(row["doc_id"], {})
        places.setdefault(row["doc_id"], place)
        if row["idx"] in choices:
            raise ConfigurationError(f"{place}: question {row['doc_id']} has two lines with idx {row['idx']}.")
        choices[row["idx"]] = row
    if not rows:
        raise ConfigurationError(f"'{path}' holds no questions.")
    questions = tuple(_question(choices, places[number]) for number, choices in rows.items())
    _check_alike(questions, list(places.values()))
    return RequestFile(path, name, questions, _settings(path.parent / "config.json"))


def fingerprint(parts: Iterable[Any]) -> str:
    """SHA-256 (hex) of what was asked and what counts as right."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, ensure_ascii=False, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def as_task(file: RequestFile) -> Any:
    """Returns the file as an `lm_eval.api.task.Task`, which lm-eval's own `evaluate` runs."""
    from lm_eval.api.task import Task

    return type("RequestTask", (_RequestMethods, Task), {})(file)


class _RequestMethods:
    """What lm-eval asks a task; goes before its `Task` in the bases, so that lm-eval is imported on use only."""

    VERSION = 1

    def __init__(self, file: RequestFile) -> None:
        from lm_eval.config.task import TaskConfig

        super().__init__()
        self.file = file
        self.OUTPUT_TYPE = "loglikelihood" if file.questions[0].gold is None else "multiple_choice"
        # The examples are part of the contexts; 0 keeps lm-eval from adding any.
        self._config = TaskConfig(task=file.task, output_type=self.OUTPUT_TYPE, num_fewshot=0)

    def download(self, *_args: Any, **_kwargs: Any) -> None:
        self.dataset = None

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[Question]:
        return list(self.file.questions)

    def fewshot_context(self, doc: Question, *_args: Any, **_kwargs: Any) -> str:
        return self.doc_to_text(doc)

    def doc_to_text(self, doc: Question) -> str:
        return doc.contexts[0]

    def doc_to_target(self, doc: Question) -> int | str:
        return doc.continuations[0] if doc.gold is None else doc.gold

    def construct_requests(self, doc: Question, ctx: str, *, metadata: Any, **_kwargs: Any) -> list[Any]:
        from lm_eval.api.instance import Instance

        pairs = zip(doc.contexts, doc.continuations, strict=True)
        return [Instance("loglikelihood", doc, pair, index, metadata) for index, pair in enumerate(pairs)]

    def process_results(self, doc: Question, results: list[tuple[float, bool]]) -> dict[str, float]:
        if doc.gold is None:
            ((likelihood, greedy),) = results
            return {"acc": float(greedy), "perplexity": likelihood}
        sums = [likelihood for likelihood, _ in results]
        lengths = [len(text.removeprefix(" ")) for text in doc.continuations]
        scores = {"acc": sums, "acc_norm": [each / length for each, length in zip(sums, lengths, strict=True)]}
        return {name: float(np.argmax(scores[name]) == doc.gold) for name in self.file.metrics}

    def aggregation(self) -> dict[str, Any]:
        from lm_eval.api.metrics import mean, perplexity

        likelihoods = [likelihood for instance in self.instances for likelihood, _ in instance.resps]
        # A long continuation has no perplexity that a float could hold.
        whole = perplexity if min(likelihoods) > -_MAX_NATS else _no_figure
        return {name: whole if name == "perplexity" else mean for name in self.file.metrics}

    def higher_is_better(self) -> dict[str, bool]:
        return {name: name != "perplexity" for name in self.file.metrics}


def _no_figure(_items: list[float]) -> float:
    return float("nan")


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the lines, each checked, with the file and the line number in words."""
    opened = gzip.open if path.name.endswith(".gz") else open
    place = f"'{path}'"
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                place = f"'{path}', line {number}"
                if line.strip():
                    yield place, _checked(json.loads(line), place)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{place} is not JSON: {error}.") from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ConfigurationError(f"{place}: what follows cannot be read: {error}. Copy the file again.") from error


def _checked(row: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise ConfigurationError(f"{place} is not a JSON object but {type(row).__name__}.")
    needed = ("request_type", "request", "idx", "doc_id", "label", "task_name")
    missing = [name for name in needed if name not in row]
    if missing:
        raise ConfigurationError(f"{place} has no {', '.join(map(repr, missing))}.")
    if row["request_type"] != "loglikelihood":
        raise ConfigurationError(
            f"{place}: request_type is {row['request_type']!r}; only 'loglikelihood' requests are scored."
        )
    for name in ("idx", "doc_id"):
        if isinstance(row[name], bool) or not isinstance(row[name], int) or row[name] < 0:
            raise ConfigurationError(f"{place}: {name} must be a whole number from 0 on, not {row[name]!r}.")
    if not isinstance(row["task_name"], str) or not row["task_name"]:
        raise ConfigurationError(f"{place}: task_name must be a text, not {row['task_name']!r}.")
    request = row["request"] if isinstance(row["request"], dict) else {}
    if not all(isinstance(request.get(name), str) for name in ("context", "continuation")):
        raise ConfigurationError(f"{place}: 'request' must hold the texts 'context' and 'continuation'.")
    if not request["continuation"].strip():
        raise ConfigurationError(f"{place}: the continuation is empty.")
    return row


def _question(choices: Mapping[int, Mapping[str, Any]], place: str) -> Question:
    """One question of its lines; `place` is the first of them."""
    number = choices[next(iter(choices))]["doc_id"]
    if set(choices) != set(range(len(choices))):
        raise ConfigurationError(
            f"{place}: question {number} has lines with idx {', '.join(map(str, sorted(choices)))}; they must count "
            "from 0 without a gap."
        )
    ordered = [choices[index] for index in range(len(choices))]
    texts = [[row["request"][name] for row in ordered] for name in ("context", "continuation")]
    if len(ordered) == 1:
        return Question(tuple(texts[0]), tuple(texts[1]), None)
    labels = {json.dumps(row["label"]) for row in ordered}
    label = ordered[0]["label"]
    if len(labels) > 1:
        raise ConfigurationError(f"{place}: the lines of question {number} have different labels.")
    if isinstance(label, bool) or not isinstance(label, int):
        raise ConfigurationError(f"{place}: question {number} has the label {label!r}, not the number of a choice.")
    if not 0 <= label < len(ordered):
        raise ConfigurationError(f"{place}: question {number} has {len(ordered)} choices, but the label {label}.")
    return Question(tuple(texts[0]), tuple(texts[1]), label)


def _check_alike(questions: tuple[Question, ...], places: list[str]) -> None:
    """Questions with choices and questions without have no metric in common."""
    for question, place in zip(questions, places, strict=True):
        if (question.gold is None) != (questions[0].gold is None):
            kinds = ("one continuation", "several choices")
            mine, first = kinds[question.gold is not None], kinds[questions[0].gold is not None]
            raise ConfigurationError(f"{place}: this question has {mine}, the first one {first}; split the file.")


def _settings(path: Path) -> dict[str, Any]:
    """What a `config.json` beside the requests says about them; another kind of `config.json` says nothing."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"'{path}' cannot be read: {error}.") from error
    stated = data.get("task_config") if isinstance(data, dict) else None
    names = ("primary_metric", "split", "num_shots")
    return {name: stated[name] for name in names if name in stated} if isinstance(stated, dict) else {}
