# SPDX-License-Identifier: Apache-2.0
"""Searches by the loss on given completions: what is scored, that searches agree, and what is refused."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from command_line import run
from families import plain_logits, silenced, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from toys import TEXTS, config, text, toy_folder, word_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from zoo import other_stacks

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan
from optimum_blockprune.batches import CalibrationWindows
from optimum_blockprune.calibration import WindowSpec
from optimum_blockprune.card import model_card
from optimum_blockprune.completions import completion_windows
from optimum_blockprune.errors import CalibrationError, ConfigurationError, ResumeError, UnsupportedModelError
from optimum_blockprune.evaluation import EvaluationSpec
from optimum_blockprune.fingerprints import run_fingerprint
from optimum_blockprune.loading import load_model
from optimum_blockprune.page import page
from optimum_blockprune.picture_search import search_words
from optimum_blockprune.reproduce import command_for
from optimum_blockprune.runner import BlockRunner


# Words of prompt and completion: one token each, rows of different lengths.
LENGTHS = ((5, 3), (9, 1), (2, 6), (1, 4), (7, 5), (3, 2), (6, 6), (4, 3))
ROWS = [
    {"prompt": text(prompt, 2 * seed), "completion": " " + text(completion, 2 * seed + 1)}
    for seed, (prompt, completion) in enumerate(LENGTHS)
]
SEARCHES = ("naive", "exact", "race")


def read(rows: Any = ROWS, tokenizer: Any = None, **spec: Any) -> CalibrationWindows:
    return completion_windows(rows, tokenizer or word_tokenizer(), WindowSpec(**{"num_samples": len(rows), **spec}))


def pruner(family: str = "llama", **fields: Any) -> BlockPruner:
    fields = {"dataset": ROWS, "num_samples": 6, "seqlen": 16, "objective": "task", **fields}
    return BlockPruner(tiny_model(family, 6), config(**fields), word_tokenizer())


def by_hand(model: PreTrainedModel, rows: list[dict[str, str]]) -> tuple[float, int]:
    """Sum of -log p of the completions' tokens, one row at a time without padding, and their number."""
    tokenizer, summed, count = word_tokenizer(), 0.0, 0
    for row in rows:
        prompt, completion = (tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in row)
        logs = plain_logits(model, torch.tensor([prompt + completion])).double().log_softmax(-1)[0]
        for place, token in enumerate(completion, start=len(prompt)):
            summed -= logs[place - 1, token].item()
            count += 1
    return summed, count


# What is scored
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("off", [(), (2, 3)])
def test_the_loss_is_that_of_the_completions_alone(family: str, off: tuple[int, ...]) -> None:
    model = tiny_model(family, 6)
    wanted, tokens = by_hand(silenced(model, off) if off else model, ROWS)
    windows, runner = read(), BlockRunner(model)
    assert windows.attention_mask is not None and windows.seqlen == 12
    for size in (1, 3, len(ROWS)):
        found = [runner.nll(batch, off) for batch in windows.batches(size)]
        assert sum(loss.item() for loss, _ in found) == pytest.approx(wanted, rel=1e-5)
        assert sum(count for _, count in found) == tokens == sum(each for _, each in LENGTHS)


def test_prompts_count_for_nothing_but_what_they_say() -> None:
    """A label is the token after its position, and none is of a prompt."""
    windows = read([{"prompt": "w10 w11", "completion": " w12 w13"}, {"prompt": "w20", "completion": " w21"}])
    assert windows.input_ids.tolist() == [[10, 11, 12, 13], [20, 21, 0, 0]]
    assert windows.labels.tolist() == [[-100, 12, 13, -100], [21, -100, -100, -100]]
    assert windows.describe()["recipe"] == "task"
    others = read([{"prompt": "w10", "completion": " w11 w12 w13"}, {"prompt": "w20", "completion": " w21"}])
    assert others.input_ids.equal(windows.input_ids) and others.fingerprint != windows.fingerprint


def test_without_a_prompt_the_first_token_is_not_scored() -> None:
    windows = read([{"prompt": "", "completion": "w10 w11 w12"}])
    assert windows.labels.tolist() == [[11, 12, -100]]


def test_a_token_that_straddles_belongs_to_the_completion() -> None:
    vocabulary = {"<unk>": 0, "a": 4, "b": 5, "c": 6, "bc": 7}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("b", "c")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    windows = read([{"prompt": "ab", "completion": "ca"}], PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert windows.input_ids.tolist() == [[4, 7, 4]] and windows.labels.tolist() == [[7, 4, -100]]


def test_what_is_too_long_loses_the_beginning_of_its_prompt(caplog: pytest.LogCaptureFixture) -> None:
    row = {"prompt": "w10 w11 w12 w13", "completion": " w20 w21 w22"}
    for seqlen, ids, labels in (
        (7, [10, 11, 12, 13, 20, 21, 22], [-100, -100, -100, 20, 21, 22, -100]),
        (5, [12, 13, 20, 21, 22], [-100, 20, 21, 22, -100]),
        (4, [13, 20, 21, 22], [20, 21, 22, -100]),
    ):
        windows = read([row], seqlen=seqlen)
        assert windows.input_ids.tolist() == [ids] and windows.labels.tolist() == [labels]
    logger = logging.getLogger("optimum")
    logger.addHandler(caplog.handler)
    try:
        windows = read([row], seqlen=3)
    finally:
        logger.removeHandler(caplog.handler)
    assert windows.input_ids.tolist() == [[13, 20, 21]] and windows.labels.tolist() == [[20, 21, -100]]
    assert "1 of 1 completions are longer than seqlen=3 allows and lose their end" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_held_out_is_not_calibrated_on(stream: bool) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    rows = rows.to_iterable_dataset() if stream else rows
    spec = WindowSpec(5, 16)
    parts = [completion_windows(rows, word_tokenizer(), each) for each in (spec, replace(spec, beside=3))]
    seen = [{tuple(row[row > 0].tolist()) for row in part.input_ids} for part in parts]
    counts = [int((part.labels != -100).sum()) for part in parts]
    assert [part.num_windows for part in parts] == [5, 3] and sum(counts) == sum(each for _, each in LENGTHS)
    assert not seen[0] & seen[1]
    with pytest.raises(CalibrationError, match="9 are needed: 5 to calibrate on, 4 held out"):
        completion_windows(rows, word_tokenizer(), replace(spec, beside=4))


# The search
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("unit", ["block", "half_block"])
def test_searches_choose_alike(family: str, unit: str) -> None:
    plans = [pruner(family, unit=unit, strategy_options={"search": search}).make_plan() for search in SEARCHES]
    assert len({plan.removed_names for plan in plans}) == 1
    for plan in plans:
        assert plan.scores == pytest.approx(plans[0].scores, rel=1e-5)


def test_scores_are_mean_losses_of_the_completions() -> None:
    made = pruner(num_samples=len(ROWS))
    plan = made.make_plan()
    summed, tokens = by_hand(made.model, ROWS)
    assert plan.details["dense_loss"] == pytest.approx(summed / tokens, rel=1e-5)
    for block, score in plan.scores.items():
        assert score == pytest.approx(by_hand(silenced(made.model, (int(block),)), ROWS)[0] / tokens, rel=1e-5)


@pytest.mark.parametrize("search", ["exact", "race"])
def test_a_streamed_model_is_searched_alike(search: str, tmp_path: Path) -> None:
    folder = toy_folder(tmp_path / "dense")
    fields = config(dataset=ROWS, num_samples=6, seqlen=16, objective="task", strategy_options={"search": search})
    plan = BlockPruner(load_model(folder, stream=True), fields, word_tokenizer()).make_plan()
    held = BlockPruner(load_model(folder), fields, word_tokenizer()).make_plan()
    assert plan.removed_blocks == held.removed_blocks
    assert plan.scores == pytest.approx(held.scores, rel=1e-5)


def test_a_search_goes_on_where_it_was(tmp_path: Path) -> None:
    kept, plan = tmp_path / "kept", pruner().make_plan()
    first = pruner()

    def interrupt(*_args: Any) -> None:
        if list(kept.rglob("*.safetensors")):
            raise KeyboardInterrupt

    first.model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        first.make_plan(resume_dir=kept)
    with pytest.raises(ResumeError, match=r"recipe\.objective: task then, nll now"):
        pruner(objective=None, dataset=TEXTS).make_plan(resume_dir=kept)
    again = pruner()
    assert again.make_plan(resume_dir=kept).to_dict() == plan.to_dict()
    assert again.report.reused_measurements > 0


def test_search_knows_it() -> None:
    plan = pruner(strategy="search").make_plan()
    assert plan.details["objective"] == "task" and plan.num_removed == 2
    assert plan.details["loss"] <= plan.details["greedy_loss"]


def test_compensation_is_judged_on_the_completions() -> None:
    plan = pruner(num_samples=8, compensation="ridge").make_plan()
    assert plan.details["compensation"]["asked"] == "ridge" and plan.details["objective"] == "task"
    with pytest.raises(ConfigurationError, match=r"objective='task' is not what search measures with compensation"):
        pruner(strategy="search", compensation="ridge").make_plan()


@pytest.mark.parametrize("budget", ["max_ppl_increase", "max_kl"])
def test_budgets_of_quality_are_held_to_other_completions_or_to_text(budget: str) -> None:
    fields = {budget: 50.0, "num_samples": 5, "held_out_samples": 3}
    held = pruner(**fields).make_plan().details["budget"]["held_out"]
    assert held["recipe"] == "task" and held["windows"] == 3
    held = pruner(**fields, held_out_dataset=TEXTS).make_plan().details["budget"]["held_out"]
    assert held["recipe"] == "windows" and held["tokens"] == 3 * 16


def test_its_own_rows_are_evaluated_by_their_completions() -> None:
    made = pruner()
    summed, tokens = by_hand(made.model, ROWS)
    found = made.evaluate(spec=EvaluationSpec(decode_tokens=4))
    assert found["nll"] == pytest.approx(summed / tokens, rel=1e-5)
    assert made.evaluate(TEXTS, num_samples=2, spec=EvaluationSpec(decode_tokens=4))["tokens"] == 2 * 15


# What is said
def test_the_plan_and_the_command_say_it(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    made = pruner(dataset=str(file), num_samples=len(ROWS))
    made.prune()
    summed, tokens = by_hand(made.model, ROWS)
    plan = made.plan
    assert plan.details["objective"] == "task"
    assert plan.steps[-1]["loss"] == pytest.approx(summed / tokens, rel=1e-5)
    assert plan.steps[-1]["perplexity"] == pytest.approx(math.exp(plan.steps[-1]["loss"]))
    assert BlockPruningConfig.from_plan(plan).objective == "task"
    assert "--objective task" in command_for(plan, made.config)
    other = BlockPruningConfig.from_dict({**made.config.to_dict(), "objective": "nll"})
    assert "--objective" not in command_for(plan, other)
    made.config.save_pretrained(tmp_path)
    assert BlockPruningConfig.from_pretrained(tmp_path).objective == "task"
    again = PruningPlan.from_dict(plan.to_dict())
    assert again.details["objective"] == "task"
    assert "; the perplexity on the completions is " in search_words(made.report)
    assert "Figures of the search, on its completions;" in str(model_card(plan, made.report, title="smaller"))
    assert "perplexity on the completions" in page(made.report, title="smaller")


def test_the_fingerprint_of_a_run_knows_it() -> None:
    made = pruner()
    stack, windows = BlockRunner(made.model).stack, read()
    recipes = [replace(made.config.recipe, objective=each) for each in ("task", "nll")]
    prints = [run_fingerprint(stack, each, windows)["recipe"] for each in recipes]
    assert [each["objective"] for each in prints] == ["task", "nll"]
    bare = CalibrationWindows.from_tokens(windows.input_ids, windows.attention_mask, source="test")
    assert run_fingerprint(stack, recipes[0], windows) != run_fingerprint(stack, recipes[0], bare)


def test_the_flag(tmp_path: Path) -> None:
    dense, file = toy_folder(tmp_path / "dense"), tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    flags = ("--num-blocks", 2, "--num-samples", 6, "--seqlen", 16, "--dataset", file)
    run("plan", "-m", dense, "--objective", "task", *flags, "-o", tmp_path / "plan.json")
    plan = PruningPlan.from_file(tmp_path / "plan.json")
    assert plan.details["objective"] == "task" and plan.calibration["recipe"] == "task"
    assert plan.removed_blocks == pruner().make_plan().removed_blocks


# What is refused
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (TEXTS, r"'prompt' and 'completion'; row 0 .* \(it has no columns\)"),
        ([{"text": "w10"}] * 8, r"row 0 of in-memory texts is no such row \(its columns are: text\)"),
        ([*ROWS[:-1], {"prompt": "w10"}], r"row 7 .* \(its columns are: prompt\)"),
        ([{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}] * 8, "two columns of plain text"),
        (
            [*ROWS[:-1], {"prompt": "w10 w11", "completion": " "}],
            r"Row 7 .* its prompt has 2 tokens, its completion 0",
        ),
        ([*ROWS[:-1], {"prompt": "", "completion": "w11"}], r"Row 7 .* its prompt has 0 tokens, its completion 1"),
        (ROWS[:3], r"3 rows found, 8 needed. Lower num_samples .--num-samples. to 3"),
        ([], "is empty"),
    ],
)
def test_rows_that_are_no_task_are_refused(rows: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        pruner(dataset=rows, num_samples=8).make_plan()


def test_there_is_no_task_without_a_tokenizer() -> None:
    made = pruner()
    with pytest.raises(CalibrationError, match="needs a tokenizer"):
        BlockPruner(made.model, made.config).make_plan()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_chat_template": True}, "use_chat_template"),
        ({"calibration_recipe": "sleb", "dataset_text_field": "x"}, "dataset_text_field and calibration_recipe"),
    ],
)
def test_fields_that_would_be_ignored_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"leave {named} out"):
        pruner(dataset="missing.jsonl", **fields).make_plan()


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_models_that_do_not_continue_text_are_refused(family: str) -> None:
    fields = config(objective="task", dataset="missing.jsonl", num_blocks=1)
    with pytest.raises(UnsupportedModelError, match="does not continue text"):
        BlockPruner(other_stacks.tiny_model(family), fields, word_tokenizer()).make_plan()


def test_strategies_without_it_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"'shortgpt' has no objective 'task'.*\(sleb, search\)"):
        pruner(strategy="shortgpt", dataset="missing.jsonl").make_plan()
