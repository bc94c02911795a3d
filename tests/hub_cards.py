# SPDX-License-Identifier: Apache-2.0
"""What the Hub says of the metadata in a model card, for the server of the tests: the rules that concern models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml


_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?\n)---[ \t]*(\r?\n|\Z)", re.DOTALL)
_REPO = re.compile(r"(\w[\w.-]*/)?\w[\w.-]{0,95}\Z")
_LANGUAGE = re.compile(r"([a-z]{2,3}(-[A-Za-z]{2,4})?|code|multilingual)\Z")
_LINK = re.compile(r"https?://\S+\Z|LICEN[CS]E(\.\w+)?\Z")
_RELATIONS = {"adapter", "finetune", "merge", "quantized"}
_LICENCES_TEXT = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsl-1.0 cc cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
cc-by-nc-4.0 cc-by-nc-nd-4.0 cc-by-nc-sa-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 creativeml-openrail-m
deepfloyd-if-license ecl-2.0 epl-2.0 eupl-1.1 gemma gpl gpl-2.0 gpl-3.0 grok2-community intel-research isc lgpl
lgpl-3.0 llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 mit mpl-2.0 ms-pl ncsa odc-by ofl-1.1 openmdw-1.0 openrail
openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
_LICENCES = set(_LICENCES_TEXT.split())
_TASKS_TEXT = """
any-to-any audio-classification audio-text-to-text automatic-speech-recognition feature-extraction fill-mask
image-classification image-feature-extraction image-text-to-text image-to-text other question-answering
sentence-similarity summarization table-question-answering text-classification text-generation text-ranking
text-to-audio text-to-speech text2text-generation token-classification translation video-text-to-text
visual-question-answering zero-shot-classification
"""
_TASKS = set(_TASKS_TEXT.split())


def problems(text: str) -> tuple[list[str], list[str]]:
    """Returns errors and warnings for the text of a card."""
    match = _FRONT.match(text)
    if match is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"yaml: {error}"], []
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"], []
    return list(_errors(data)), []


def _errors(data: dict[str, Any]) -> Iterator[str]:
    yield from _each(data, "base_model", _REPO, "Use a model id from https://hf.co/models.")
    yield from _each(data, "datasets", _REPO, "Use a dataset id from https://hf.co/datasets.")
    yield from _each(data, "language", _LANGUAGE, "Use an ISO 639 code.")
    yield from _each(data, "tags", re.compile(r".{1,100}\Z"), "Use a text.")
    yield from _each(data, "license", re.compile("|".join(map(re.escape, _LICENCES)) + r"\Z"), "Use a known id.")
    yield from _each(data, "license_link", _LINK, "Use an address or the name of a file.")
    for name in ("license_name", "library_name", "model_name"):
        yield from _each(data, name, re.compile(r".+\Z"), "Use a text.", several=False)
    for name, allowed in (("base_model_relation", _RELATIONS), ("pipeline_tag", _TASKS)):
        if name in data and data[name] not in allowed:
            yield f'"{name}" must be one of {", ".join(sorted(allowed))}'
    if "license_link" in data and data.get("license") not in ("other", None, *_LICENCES):
        yield '"license_link" needs a license'
    if "model-index" in data:
        yield from _index_errors(data["model-index"])


def _each(
    data: dict[str, Any], name: str, pattern: re.Pattern[str], advice: str, several: bool = True
) -> Iterator[str]:
    if name not in data:
        return
    values = data[name] if several and isinstance(data[name], list) else [data[name]]
    for value in values:
        if not isinstance(value, str) or not pattern.match(value):
            yield f'"{name}" with value "{value}" is not valid. {advice}'


def _index_errors(index: Any) -> Iterator[str]:
    if not isinstance(index, list) or not index:
        yield '"model-index" must be a list'
        return
    for number, model in enumerate(index):
        place = f"model-index[{number}]"
        yield from _texts(model, place, "name")
        for each, result in _items(model, "results"):
            where = f"{place}.results[{each}]"
            yield from _texts(_part(result, "task"), f"{where}.task", "type")
            yield from _texts(_part(result, "dataset"), f"{where}.dataset", "type", "name")
            metrics = list(_items(result, "metrics"))
            if not metrics:
                yield f'"{where}.metrics" must be a list that is not empty'
            for place_of_metric, metric in metrics:
                yield from _metric(metric, f"{where}.metrics[{place_of_metric}]")
            if "source" in _part(result, None):
                yield from _texts(_part(result, "source"), f"{where}.source", "url")


def _metric(metric: Any, place: str) -> Iterator[str]:
    yield from _texts(metric, place, "type")
    value = _part(metric, None).get("value")
    if value is None or isinstance(value, float) and value != value:
        yield f'"{place}.value" is required'


def _items(value: Any, name: str) -> Iterator[tuple[int, Any]]:
    found = _part(value, None).get(name)
    return enumerate(found) if isinstance(found, list) else iter(())


def _part(value: Any, name: str | None) -> dict[str, Any]:
    part = value if name is None else _part(value, None).get(name)
    return part if isinstance(part, dict) else {}


def _texts(value: Any, place: str, *names: str) -> Iterator[str]:
    for name in names:
        found = _part(value, None).get(name)
        if not isinstance(found, str) or not found:
            yield f'"{place}.{name}" is required and must be a text'
