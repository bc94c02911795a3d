# SPDX-License-Identifier: Apache-2.0
"""Where text comes from: three named data sets, local files, lists and `datasets` objects, read as documents.

`open_rows` finds the rows, `documents` turns rows into strings, `chunks` joins the strings by blank lines. Only the
names in `HUB_DATASETS` reach the network; any other string is a path or an error. `datasets` is imported when needed.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import CalibrationError, nearest


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class HubDataset:
    """A data set on the Hub that has a short name here.

    Attributes:
        repo: Repository id.
        config: Name of the configuration, if the repository has several.
        splits: Splits that can be asked for.
        files: Data file of each split; where given, only that file is streamed instead of the whole set downloaded.
        columns: The columns to keep; empty for all.
    """

    repo: str
    config: str | None = None
    splits: tuple[str, ...] = ("train",)
    files: Mapping[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] = ()


HUB_DATASETS: Mapping[str, HubDataset] = {
    "wikitext2": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", ("train", "validation", "test")),
    "c4": HubDataset(
        "allenai/c4",
        splits=("train", "validation"),
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    # Its column "text" repeats the other three in a fixed wording, which would hide them from the chat template.
    "alpaca": HubDataset("tatsu-lab/alpaca", columns=("instruction", "input", "output")),
}
TEXT_FIELDS = ("text", "content", "messages")
FILE_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
DOCUMENT_SEPARATOR = "\n\n"

_PROBE_SECONDS = 10.0
_SHUFFLE_BUFFER = 10_000
_LOCAL_ADVICE = "Give a local file instead: dataset=PATH (--dataset PATH), a .txt, .jsonl, .json or .parquet file."


def open_rows(dataset: Any, split: str) -> tuple[str, Any]:
    """Finds the rows of a data set; nothing is tokenised.

    Args:
        dataset: A name of `HUB_DATASETS`, a path, a list of strings or dicts, or a `datasets` object.
        split: Split to take of a named data set or of a `datasets.DatasetDict`; ignored otherwise.

    Returns:
        What to call the source, and its rows: a list, a `datasets.Dataset` or a `datasets.IterableDataset`.

    Raises:
        CalibrationError: When there is no such data set or split, or it cannot be read.
    """
    if isinstance(dataset, str) and dataset in HUB_DATASETS:
        return _open_hub(dataset, split)
    if isinstance(dataset, (str, Path)):
        return _open_file(dataset)
    if isinstance(dataset, (list, tuple)):
        tokenised = bool(dataset) and isinstance(dataset[0], Mapping) and "input_ids" in dataset[0]
        return "in-memory tokens" if tokenised else "in-memory texts", list(dataset)
    return _open_object(dataset, split)


def _open_hub(name: str, split: str) -> tuple[str, Any]:
    entry = HUB_DATASETS[name]
    if split not in entry.splits:
        raise CalibrationError(f"Data set {name!r} has no split {split!r}; it has: {', '.join(entry.splits)}.")
    try:
        rows = _load_from_hub(entry, split)
    except _load_errors() as error:
        raise CalibrationError(
            f"Data set {name!r} could not be loaded: it is not in the local cache, and the Hugging Face Hub could not"
            f" be reached (offline?). {_LOCAL_ADVICE} ({_first_line(error)})"
        ) from error
    return f"{name} ({entry.repo}, {entry.config or entry.files.get(split, 'default')}, {split})", rows


def _load_from_hub(entry: HubDataset, split: str) -> Any:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    prepared = Path(datasets.config.HF_DATASETS_CACHE, entry.repo.replace("/", "___"))
    if not (datasets.config.HF_HUB_OFFLINE or prepared.exists()):
        # Without a connection `load_dataset` retries for half a minute or more before it gives up; one small request
        # knows at once. Where the server answers at all, even with an error, `load_dataset` is the judge.
        with contextlib.suppress(HfHubHTTPError):
            HfApi().dataset_info(entry.repo, timeout=_PROBE_SECONDS, expand=["sha"])
    if entry.files:
        return datasets.load_dataset(entry.repo, data_files={split: entry.files[split]}, split=split, streaming=True)
    rows = datasets.load_dataset(entry.repo, entry.config, split=split)
    return rows.select_columns(list(entry.columns)) if entry.columns else rows


def _open_file(dataset: str | Path) -> tuple[str, Any]:
    path = Path(dataset).expanduser()
    # `os.path` answers False, and does not raise, for a string that is too long or too odd to be a path.
    if not os.path.exists(path):
        shown = repr(str(dataset)) if len(str(dataset)) <= 80 else repr(str(dataset)[:80]) + "..."
        raise CalibrationError(
            f"dataset={shown} is neither an existing path nor a known name."
            f"{nearest(str(dataset)[:80], HUB_DATASETS)} Also possible: a path to a .txt, .jsonl, .json or .parquet"
            " file, a list of strings, a list of dicts with 'input_ids', or a datasets.Dataset."
        )
    if path.suffix.lower() not in FILE_FORMATS or path.is_dir():
        kind = "a folder" if path.is_dir() else f"a {path.suffix or 'suffixless'} file"
        raise CalibrationError(f"dataset={str(path)!r} is {kind}; readable are: {', '.join(FILE_FORMATS)} files.")
    return str(path), _read_file(path)


def _read_file(path: Path) -> Any:
    import datasets

    try:
        if path.stat().st_size == 0:  # `load_dataset` leaks a StopIteration for such a file
            return []
        file_format = FILE_FORMATS[path.suffix.lower()]
        if file_format == "text":
            return [path.read_text(encoding="utf-8-sig")]
        # `data_files` is a glob pattern: brackets in a file name would otherwise match something else.
        return datasets.load_dataset(file_format, data_files=glob.escape(str(path)), split="train")
    except _load_errors() as error:
        raise CalibrationError(
            f"dataset={str(path)!r} cannot be read as {path.suffix} (UTF-8): {error.__cause__ or error}"
        ) from error


def _open_object(dataset: Any, split: str) -> tuple[str, Any]:
    import datasets

    if isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if split not in dataset:
            raise CalibrationError(f"The given {type(dataset).__name__} has no split {split!r}; it has: {[*dataset]}.")
        dataset = dataset[split]
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise CalibrationError(
            f"dataset is of type {type(dataset).__name__}; possible are the names {', '.join(HUB_DATASETS)}, a path,"
            " a list of strings, a list of dicts with 'input_ids', or a datasets.Dataset."
        )
    return f"in-memory datasets.{type(dataset).__name__}", dataset


def _load_errors() -> tuple[type[Exception], ...]:
    """The ways in which reading a data set fails; `ValueError` covers pyarrow, encodings and half-filled caches."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    # A connection that fails raises the HTTP library's own base error, which is `httpx`, `httpx2` or `requests`
    # depending on the version of huggingface_hub; it is always a base of the Hub's error.
    return (OSError, ValueError, DatasetsError, *HfHubHTTPError.__bases__)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no details'])[0]}"


def iterate(rows: Any, source: str) -> Iterator[Any]:
    """Yields the rows in order; a stream that breaks off raises `CalibrationError` naming `source`."""
    if isinstance(rows, list):
        yield from rows
        return
    try:
        yield from rows
    except _load_errors() as error:
        raise CalibrationError(f"Reading {source} broke off ({_first_line(error)}). {_LOCAL_ADVICE}") from error


def shuffled(rows: Any, *, seed: int, count: int | None) -> Any:
    """Returns the first `count` rows (`None`: all) in the order of `datasets.Dataset.shuffle(seed)`, for any rows.

    A stream has no length: it is shuffled in a buffer of 10,000 rows, as `datasets` does.
    """
    if not hasattr(rows, "__len__"):
        stream = rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        return stream if count is None else stream.take(count)
    # The same permutation as `Dataset.shuffle`, but it also serves lists and writes no cache file.
    order = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [rows[int(index)] for index in order]


def documents(
    rows: Iterable[Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_field: str | None = None,
    use_chat_template: bool = False,
) -> Iterator[str]:
    """Yields one string per row.

    Args:
        rows: Strings, lists of messages, or dicts.
        tokenizer: Renders messages through its chat template.
        text_field: Field of a dict that holds the text or the messages; `None`: the first of `TEXT_FIELDS`, else
            `instruction` / `input` / `output` as one prompt with its answer.
        use_chat_template: Renders plain text as one user message. Messages are always rendered.

    Raises:
        CalibrationError: Names the row, what was found there and what is possible.
    """
    for number, row in enumerate(rows):
        if isinstance(row, Mapping):
            value = _field_value(row, number, text_field=text_field, as_messages=use_chat_template)
        else:
            value = row
        if isinstance(value, str) and use_chat_template:
            value = [{"role": "user", "content": value}]
        yield value if isinstance(value, str) else _render_messages(value, number, tokenizer)


def _field_value(row: Mapping[str, Any], number: int, *, text_field: str | None, as_messages: bool) -> Any:
    names = TEXT_FIELDS if text_field is None else (text_field,)
    for name in names:
        if name in row:
            return row[name]
    if text_field is None and "instruction" in row and "output" in row:
        return _instruction(row, as_messages)
    wanted = f"a field {text_field!r}" if text_field else f"any of the fields {', '.join(TEXT_FIELDS)}"
    raise CalibrationError(
        f"Row {number} does not have {wanted}; its columns are: {', '.join(map(str, row))}."
        " Name the one with the text: dataset_text_field=... (--dataset-text-field)."
    )


def _instruction(row: Mapping[str, Any], as_messages: bool) -> str | list[dict[str, str]]:
    instruction, context, output = row["instruction"], row.get("input") or "", row["output"]
    if as_messages:
        question = f"{instruction}{DOCUMENT_SEPARATOR}{context}" if context else instruction
        return [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    sections = [("Instruction", instruction), ("Input", context), ("Response", output)]
    return DOCUMENT_SEPARATOR.join(f"### {title}:\n{text}" for title, text in sections if text)


def _render_messages(value: Any, number: int, tokenizer: PreTrainedTokenizerBase) -> str:
    if not _are_messages(value):
        raise CalibrationError(
            f"Row {number} holds a {type(value).__name__} where text is expected: possible are a string, or a"
            " non-empty list of messages, each a dict with 'role' and 'content'."
        )
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(
            "The tokenizer has no chat template: leave use_chat_template (--use-chat-template) off and give plain"
            " text instead of messages, or set tokenizer.chat_template."
        )
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template([dict(message) for message in value], tokenize=False)
    except TemplateError as error:
        raise CalibrationError(f"The chat template refuses the messages of row {number}: {error}") from error


def _are_messages(value: Any) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        return False
    return all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value)


def chunks(texts: Iterable[str], size: int) -> Iterator[str]:
    """Joins `texts` by blank lines and yields the result in pieces of at most `size` characters.

    Cut behind the last line break that fits, so that no line is torn unless it is longer than a piece.
    Nothing is added or lost: the pieces concatenate to `"\\n\\n".join(texts)`.
    """
    parts: list[str] = []
    length = 0
    for number, text in enumerate(texts):
        parts.append(DOCUMENT_SEPARATOR + text if number else text)
        length += len(parts[-1])
        if length <= size:
            continue
        joined, start = "".join(parts), 0
        while len(joined) - start > size:
            end = joined.rfind("\n", start, start + size) + 1 or start + size
            yield joined[start:end]
            start = end
        parts = [joined[start:]]
        length = len(parts[0])
    if length:
        yield "".join(parts)
