# SPDX-License-Identifier: Apache-2.0
"""Files of questions are read whole or refused by line; their scores are those of lm-eval and of plain logits."""

from __future__ import annotations

import copy
import gzip
import json
import math
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from families import plain_logits, tiny_model
from toys import text, word_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from optimum_blockprune import request_tasks
from optimum_blockprune.benchmark_tasks import evaluate_tasks
from optimum_blockprune.errors import ConfigurationError
from optimum_blockprune.harness import run, wrap
from optimum_blockprune.request_tasks import as_task, find_requests, read_requests


QUESTIONS = 24
Row = dict[str, Any]


def line(doc_id: int, idx: int, context: str, continuation: str, label: Any, **more: Any) -> Row:
    return {
        "request_type": "loglikelihood",
        "doc": {"anything": True},
        "request": {"context": context, "continuation": continuation},
        "idx": idx,
        "task_name": "toy",
        "doc_id": doc_id,
        "native_id": None,
        "label": label,
        **more,
    }


def choices() -> list[Row]:
    """Two to four choices of one to three words: lengths in characters differ."""
    rows = []
    for question in range(QUESTIONS):
        count = 2 + question % 3
        for choice in range(count):
            continuation = f" {text(1 + choice % 3, 1000 + 10 * question + choice)}"
            rows.append(line(question, choice, text(3 + question % 5, question), continuation, question % count))
    return rows


def contexts() -> list[Row]:
    """As WinoGrande: two contexts, one continuation."""
    return [
        line(question, choice, f"{text(5, question)} w{4 + choice}", f" {text(3, 500 + question)}", question % 2)
        for question in range(QUESTIONS)
        for choice in range(2)
    ]


def endings() -> list[Row]:
    """As LAMBADA: one continuation; every third is what the model would write."""
    rows = []
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    for question in range(QUESTIONS):
        context = text(6, question)
        first = plain_logits(model, tokenizer(context, return_tensors="pt").input_ids)[0, -1].argmax()
        word = tokenizer.decode([first]) if question % 3 == 0 else text(1 + question % 2, 900 + question)
        rows.append(line(question, 0, context, f" {word}", f" {word}"))
    return rows


KINDS: dict[str, Callable[[], list[Row]]] = {"choices": choices, "contexts": contexts, "endings": endings}


def written(folder: Path, rows: Sequence[Row | str], name: str = "requests.jsonl.gz") -> Path:
    opened = gzip.open if name.endswith(".gz") else open
    with opened(folder / name, "wt", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return folder / name


def by_question(rows: list[Row]) -> list[list[Row]]:
    return [list(group) for _, group in groupby(rows, key=lambda row: row["doc_id"])]


# Scores


def likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, request: dict[str, str]
) -> tuple[float, bool]:
    """The summed log-likelihood of the continuation, and whether it is what greedy decoding writes."""
    before = tokenizer(request["context"]).input_ids
    ids = tokenizer(request["context"] + request["continuation"], return_tensors="pt").input_ids
    logits = plain_logits(model, ids)[0, len(before) - 1 : -1].double()
    target = ids[0, len(before) :]
    likelihoods = logits.log_softmax(-1).gather(1, target[:, None])
    return likelihoods.sum().item(), bool((logits.argmax(-1) == target).all())


def by_hand(model: PreTrainedModel, rows: list[Row]) -> dict[str, float]:
    """acc, acc_norm and perplexity from logits, with nothing of lm-eval or the package."""
    tokenizer, hits, normed, sums = word_tokenizer(), [], [], []
    for question in by_question(rows):
        answers = [likelihood(model, tokenizer, row["request"]) for row in question]
        lengths = [len(row["request"]["continuation"].strip()) for row in question]
        values = [value for value, _ in answers]
        if len(question) == 1:
            hits.append(answers[0][1])
            sums += values
            continue
        hits.append(values.index(max(values)) == question[0]["label"])
        shares = [value / length for value, length in zip(values, lengths, strict=True)]
        normed.append(shares.index(max(shares)) == question[0]["label"])
    found = {"acc": sum(hits) / len(hits)}
    if normed and len({row["request"]["continuation"] for row in by_question(rows)[0]}) > 1:
        found["acc_norm"] = sum(normed) / len(normed)
    return found | ({"perplexity": math.exp(-sum(sums) / len(sums))} if sums else {})


def of_lm_eval(model: PreTrainedModel, rows: list[Row], kind: str, folder: Path) -> dict[str, float]:
    """The same questions as a task of lm-eval's own, from a local data set, by its own `evaluate`."""
    from lm_eval import evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    docs = [
        {
            "contexts": [row["request"]["context"] for row in question],
            "endings": [row["request"]["continuation"].removeprefix(" ") for row in question],
            "gold": question[0]["label"],
        }
        for question in by_question(rows)
    ]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    metrics = {"choices": ("acc", "acc_norm"), "contexts": ("acc",), "endings": ("perplexity", "acc")}[kind]
    of_kind = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_text": lambda doc: doc["contexts"][0],
            "doc_to_choice": lambda doc: doc["endings"],
            "doc_to_target": lambda doc: doc["gold"],
        },
        "contexts": {
            "output_type": "multiple_choice",
            "doc_to_text": lambda doc: doc["gold"],
            "doc_to_choice": lambda doc: doc["contexts"],
            "doc_to_target": lambda doc: doc["endings"][0],
        },
        "endings": {
            "output_type": "loglikelihood",
            "doc_to_text": lambda doc: doc["contexts"][0],
            "doc_to_target": lambda doc: f" {doc['endings'][0]}",
        },
    }[kind]
    task = ConfigurableTask(
        config={
            "task": "theirs",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "num_fewshot": 0,
            "metric_list": [{"metric": metric} for metric in metrics],
            **of_kind,
        }
    )
    wrapped = HFLM(pretrained=copy.deepcopy(model), tokenizer=word_tokenizer(), batch_size=1, softmax_dtype="float32")
    figures = evaluate(wrapped, {"tasks": {"theirs": task}, "groups": {}}, bootstrap_iters=1000)["results"]["theirs"]
    return {name.split(",")[0]: value for name, value in figures.items() if name.endswith(",none")}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_lm_eval_and_of_plain_logits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # for lm-eval's own resampling here
    model, rows = tiny_model("llama"), KINDS[kind]()
    (found,) = evaluate_tasks(model, word_tokenizer(), written(tmp_path, rows))
    assert found["metrics"] == of_lm_eval(model, rows, kind, tmp_path)
    hand = by_hand(model, rows)
    assert set(found["metrics"]) == {*hand, *(f"{name}_stderr" for name in hand)}
    assert {name: found["metrics"][name] for name in hand} == pytest.approx(hand, rel=1e-5)
    assert 0 < hand["acc"] < 1
    assert found["metrics"]["acc_stderr"] == pytest.approx(
        math.sqrt(hand["acc"] * (1 - hand["acc"]) / (QUESTIONS - 1))
    )


def test_likelihoods_of_half_precision_are_taken_in_single(tmp_path: Path) -> None:
    model, rows = tiny_model("llama").bfloat16(), endings()
    (found,) = evaluate_tasks(model, word_tokenizer(), written(tmp_path, rows))
    assert found["metrics"]["perplexity"] == pytest.approx(by_hand(model, rows)["perplexity"], rel=1e-4)
    assert model.dtype == torch.bfloat16


def test_every_likelihood_is_that_of_plain_logits(tmp_path: Path) -> None:
    model, tokenizer, rows = tiny_model("llama"), word_tokenizer(), choices()
    task = as_task(read_requests(written(tmp_path, rows)))
    wrapped = wrap(model, tokenizer, backend="causal", batch_size=4)
    run(wrapped, {"toy": task}, {}, None)
    found = [each.resps[0] for each in task.instances]
    truth = [likelihood(model, tokenizer, row["request"]) for row in rows]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in truth], abs=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in truth]


def test_a_perplexity_beyond_numbers_is_left_out(tmp_path: Path) -> None:
    rows = [line(0, 0, "w5", f" {text(120)}", "x", task_name="long"), line(1, 0, "w5", " w6", "x", task_name="long")]
    (tmp_path / "config.json").write_text(json.dumps({"task_config": {"primary_metric": "perplexity"}}))
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    (found,) = evaluate_tasks(model, word_tokenizer(), written(tmp_path, rows))
    assert set(found["metrics"]) == {"acc", "acc_stderr"}
    assert (found["primary"], found["higher_is_better"]) == ("acc", True)


# Reading


def test_a_file_is_read_with_its_settings(tmp_path: Path) -> None:
    folder = tmp_path / "rc_5shot"
    folder.mkdir()
    config = {"primary_metric": "acc_per_char", "split": "validation", "num_shots": 5, "version": 0}
    (folder / "config.json").write_text(json.dumps({"task_config": config}))
    unconditional = [line(1_000_000 + row["doc_id"], row["idx"], "Answer:", " w9", row["label"]) for row in choices()]
    file = read_requests(written(folder, [*choices(), *unconditional]))
    assert (file.task, len(file.questions), file.primary) == ("toy", QUESTIONS, "acc_norm")
    assert file.metrics == ("acc", "acc_norm")
    assert file.settings["num_shots"] == 5
    assert file.describe() == {"source": "requests.jsonl.gz", "variant": "rc_5shot", "split": "validation"}
    question = file.questions[1]
    assert len(question.contexts) == len(question.continuations) == 3
    assert question.gold == 1


@pytest.mark.parametrize("name", ["requests.jsonl", "requests.jsonl.gz", "mine.jsonl", "mine.jsonl.gz"])
def test_plain_and_packed_files_read_alike(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, [*choices(), "", "   "], name)
    assert read_requests(path).questions == read_requests(written(tmp_path, choices(), "other.jsonl")).questions
    assert "variant" not in read_requests(path).describe() or name.startswith("requests")


def test_lines_may_come_in_any_order(tmp_path: Path) -> None:
    rows = choices()
    mixed = read_requests(written(tmp_path, sorted(rows, key=lambda row: -row["idx"]), "mixed.jsonl"))
    ordered = read_requests(written(tmp_path, rows, "ordered.jsonl"))
    assert set(mixed.questions) == set(ordered.questions)


@pytest.mark.parametrize(
    ("kind", "wanted", "primary"),
    [
        ("choices", None, "acc"),
        ("choices", "acc_raw", "acc"),
        ("choices", "acc_per_char", "acc_norm"),
        ("choices", "acc_norm", "acc_norm"),
        ("contexts", "acc_raw", "acc"),
        ("endings", None, "acc"),
        ("endings", "perplexity", "perplexity"),
    ],
)
def test_the_metric_of_a_file_is_mapped(tmp_path: Path, kind: str, wanted: str | None, primary: str) -> None:
    settings = {} if wanted is None else {"primary_metric": wanted}
    (tmp_path / "config.json").write_text(json.dumps({"task_config": settings}))
    assert read_requests(written(tmp_path, KINDS[kind]())).primary == primary


@pytest.mark.parametrize(
    ("kind", "wanted"), [("choices", "acc_uncond"), ("contexts", "acc_per_char"), ("endings", "bpb")]
)
def test_a_metric_that_is_not_computed_is_replaced_in_the_open(
    tmp_path: Path, kind: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"task_config": {"primary_metric": wanted}}))
    said: list[str] = []
    monkeypatch.setattr(request_tasks.logger, "warning", said.append)
    assert read_requests(written(tmp_path, KINDS[kind]())).primary == "acc"
    assert len(said) == 1 and f"'{wanted}', which is not computed" in said[0]


@pytest.mark.parametrize("content", ["[]", "{}", '{"model_type": "llama"}', '{"task_config": 3}'])
def test_another_kind_of_config_says_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert read_requests(written(tmp_path, choices())).settings == {}


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigurationError, match="config.json' cannot be read"):
        read_requests(written(tmp_path, choices()))


GOOD = [line(0, 0, "w5", " w6", 0), line(0, 1, "w5", " w7", 0)]


def without(name: str) -> Row:
    return {key: value for key, value in GOOD[1].items() if key != name}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([GOOD[0], "{not json"], "line 2 is not JSON"),
        ([GOOD[0], "[1, 2]"], "line 2 is not a JSON object but list"),
        *(
            ([GOOD[0], without(name)], f"line 2 has no '{name}'")
            for name in ("request_type", "request", "idx", "doc_id", "label", "task_name")
        ),
        ([GOOD[0], GOOD[1] | {"request_type": "generate_until"}], "line 2: request_type is 'generate_until'"),
        ([GOOD[0], GOOD[1] | {"idx": -1}], "line 2: idx must be a whole number from 0 on, not -1"),
        ([GOOD[0], GOOD[1] | {"idx": "1"}], "line 2: idx must be"),
        ([GOOD[0], GOOD[1] | {"doc_id": True}], "line 2: doc_id must be"),
        ([GOOD[0], GOOD[1] | {"task_name": ""}], "line 2: task_name must be a text"),
        ([GOOD[0], GOOD[1] | {"task_name": "other"}], "line 2: task_name is 'other', but the file began with 'toy'"),
        ([GOOD[0], GOOD[1] | {"request": "w5 w6"}], "line 2: 'request' must hold the texts"),
        ([GOOD[0], GOOD[1] | {"request": {"context": "w5"}}], "line 2: 'request' must hold the texts"),
        ([GOOD[0], line(0, 1, "w5", "  ", 0)], "line 2: the continuation is empty"),
        ([GOOD[0], GOOD[0]], "line 2: question 0 has two lines with idx 0"),
        ([GOOD[0], GOOD[1] | {"idx": 2}], "line 1: question 0 has lines with idx 0, 2; they must count from 0"),
        ([row | {"doc_id": 4, "idx": row["idx"] + 1} for row in GOOD], "line 1: question 4 has lines with idx 1, 2"),
        ([GOOD[0], GOOD[1] | {"label": 1}], "line 1: the lines of question 0 have different labels"),
        ([row | {"label": 2} for row in GOOD], "line 1: question 0 has 2 choices, but the label 2"),
        ([row | {"label": -1} for row in GOOD], "line 1: question 0 has 2 choices, but the label -1"),
        ([row | {"label": "0"} for row in GOOD], "line 1: question 0 has the label '0', not the number"),
        ([row | {"label": True} for row in GOOD], "line 1: question 0 has the label True, not the number"),
        ([*GOOD, line(1, 0, "w5", " w6", 0)], "line 3: this question has one continuation, the first one several"),
        ([line(1, 0, "w5", " w6", 0), *GOOD], "line 2: this question has several choices, the first one one"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_line(tmp_path: Path, rows: list[Row | str], said: str) -> None:
    path = written(tmp_path, rows)
    with pytest.raises(ConfigurationError, match=re.escape(said)) as caught:
        read_requests(path)
    assert f"'{path}'" in str(caught.value)


@pytest.mark.parametrize("rows", [[], [""], [row | {"doc_id": 1_000_000} for row in GOOD]])
def test_a_file_without_questions_is_refused(tmp_path: Path, rows: list[Row | str]) -> None:
    path = written(tmp_path, rows)
    with pytest.raises(ConfigurationError, match=re.escape(f"'{path}' holds no questions")):
        read_requests(path)


def damaged(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:60] + bytes(40) + data[100:],
        lambda data: b"plain text\n",
        lambda data: gzip.compress(json.dumps(GOOD[0]).encode() + b"\n\xff\xfe"),
    ],
    ids=["truncated", "overwritten", "not gzip", "not utf-8"],
)
def test_a_damaged_file_is_named(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path = damaged(written(tmp_path, choices()), change)
    with pytest.raises(ConfigurationError, match=re.escape(f"'{path}'")):
        read_requests(path)


def test_a_truncated_file_says_how_far_it_could_be_read(tmp_path: Path) -> None:
    path = written(tmp_path, choices())
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole, 0)[: len(whole) // 2])
    with pytest.raises(ConfigurationError, match=r"line \d+: what follows cannot be read: Compressed file ended"):
        read_requests(path)


def test_paths_are_found_or_named(tmp_path: Path) -> None:
    for variant in ("rc_0shot", "rc_5shot"):
        (tmp_path / "arc" / variant).mkdir(parents=True)
        written(tmp_path / "arc" / variant, choices())
    found = find_requests(tmp_path / "arc" / "rc_0shot")
    assert found == tmp_path / "arc" / "rc_0shot" / "requests.jsonl.gz" == find_requests(str(found))
    with pytest.raises(ConfigurationError, match=re.escape("Name one of its folders: rc_0shot, rc_5shot.")):
        find_requests(tmp_path / "arc")
    with pytest.raises(ConfigurationError, match="There is no file"):
        find_requests(tmp_path / "none.jsonl")
    with pytest.raises(ConfigurationError, match="is not a file of questions"):
        find_requests(tmp_path / "arc.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match=re.escape("holds no requests.jsonl.gz or requests.jsonl.") + "$"):
        find_requests(tmp_path / "empty")
