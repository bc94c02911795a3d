# SPDX-License-Identifier: Apache-2.0
"""`objective="task"`: prompts with completions, of which only the completions are scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import plain_logits, tiny_model
from toys import toy_pruner, word_tokenizer
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from optimum_blockprune import BlockPruner, BlockPruningConfig
from optimum_blockprune.calibration import WindowSpec
from optimum_blockprune.completions import completion_windows
from optimum_blockprune.errors import CalibrationError, ConfigurationError, UnsupportedModelError
from optimum_blockprune.losses import predicted
from optimum_blockprune.reproduce import command_for
from optimum_blockprune.runner import BlockRunner


ROWS = [{"prompt": f"w{a} w{a + 1} w{a + 2} " * (a % 3 + 1), "completion": f"w{a + 3} w{a + 4}"} for a in range(1, 9)]


def windows_of(rows: Any, **fields: Any) -> Any:
    return completion_windows(rows, word_tokenizer(), WindowSpec(**{"num_samples": None, "seqlen": 32, **fields}))


def config(strategy: str = "sleb", **fields: Any) -> BlockPruningConfig:
    settings = {"dataset": ROWS, "num_samples": 8, "seqlen": 32, "num_blocks": 2, "objective": "task", **fields}
    return BlockPruningConfig(strategy, **settings)


def by_hand(model: PreTrainedModel) -> float:
    """Mean NLL of the tokens of all completions, one row at a time, with plain transformers."""
    tokenizer, total, count = word_tokenizer(), 0.0, 0
    for row in ROWS:
        prompt, whole = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (row["prompt"], row["prompt"] + row["completion"])
        )
        logs = plain_logits(model, torch.tensor([whole]))[0].log_softmax(-1)
        for place in range(len(prompt), len(whole)):
            total, count = total - logs[place - 1, whole[place]].item(), count + 1
    return total / count


def test_only_tokens_of_completions_are_scored() -> None:
    windows = windows_of(ROWS)
    tokenizer = word_tokenizer()
    for row, batch in zip(ROWS, windows.batches(1), strict=True):
        scored = predicted(batch)[0]
        assert batch.labels[0][scored].tolist() == tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        first = int(scored.nonzero()[0])
        assert first == len(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]) - 1
        # A position predicts what comes next, and padding nothing.
        assert batch.input_ids[0, 1:][scored[:-1]].tolist() == batch.labels[0][scored].tolist()
    assert windows.attention_mask is not None


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_the_loss_is_that_of_plain_transformers(family: str, batch_size: int) -> None:
    model = tiny_model(family)
    runner, total, count = BlockRunner(model), 0.0, 0
    for batch in windows_of(ROWS).batches(batch_size):
        loss, predictions = runner.nll(batch)
        total, count = total + loss.item(), count + predictions
    assert count == 16
    assert total / count == pytest.approx(by_hand(model), rel=1e-5)


@pytest.mark.parametrize("search", ["exact", "naive", "race"])
def test_every_search_minimises_it(search: str) -> None:
    options = {"search": search}
    model = tiny_model("llama", 6)
    plan = BlockPruner(model, config(strategy_options=options, num_blocks=1), tokenizer=word_tokenizer()).make_plan()
    assert plan.details["objective"] == "task" and plan.calibration["recipe"] == "task"
    assert plan.details["dense_loss"] == pytest.approx(by_hand(model), rel=1e-5)
    pruner = BlockPruner(tiny_model("llama", 6), config(num_blocks=1), tokenizer=word_tokenizer())
    pruner.prune(plan=plan)
    assert plan.steps[0]["loss"] == pytest.approx(by_hand(pruner.model), rel=1e-5)
    assert plan.steps[0]["loss"] == min(plan.steps[0]["candidates"].values())


@pytest.mark.parametrize("strategy", ["search", "sleb"])
def test_strategies_and_compensation_take_it(strategy: str) -> None:
    compensation = "ridge" if strategy == "sleb" else "none"
    pruner = BlockPruner(tiny_model("llama", 6), config(strategy, compensation=compensation), word_tokenizer())
    plan = pruner.make_plan()
    assert plan.details["objective"] == "task" and plan.num_removed == 2
    assert ("compensation" in plan.details) == (strategy == "sleb")


def test_what_does_not_fit_is_cut_from_the_front_of_the_prompt() -> None:
    [row] = [{"prompt": "w1 w2 w3 w4 w5 w6 ", "completion": "w7 w8 w9"}]
    short, whole = windows_of([row], seqlen=5), windows_of([row])
    assert short.input_ids.tolist() == whole.input_ids[:, -5:].tolist()
    assert short.labels[0][short.labels[0] >= 0].tolist() == whole.labels[0][whole.labels[0] >= 0].tolist()
    # One token of the prompt stays, so that the first one of the completion is predicted.
    tiny = windows_of([row], seqlen=2)
    assert tiny.input_ids.tolist() == [whole.input_ids[0, 5:7].tolist()]
    assert tiny.labels.tolist() == [[whole.input_ids[0, 6].item(), -100]]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "w1 w2"}], "'prompt' and 'completion'"),
        (["w1 w2"], "has no columns"),
        ([{"prompt": "w1", "completion": ["w2"]}], "plain text"),
        ([{"prompt": "w1 w2", "completion": ""}], "no token of a completion"),
        ([{"prompt": "", "completion": "w1"}], "no token of a completion"),
        ([], "0 rows"),
    ],
)
def test_other_rows_are_refused(rows: Any, said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        windows_of(rows)


@pytest.mark.parametrize("wrong", [{"use_chat_template": True}, {"recipe": "sleb"}])
def test_what_would_be_ignored_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match="leave"):
        windows_of(ROWS, **wrong)


def test_too_few_rows_and_no_tokenizer_are_refused() -> None:
    with pytest.raises(CalibrationError, match="8 rows, 9 are needed"):
        windows_of(ROWS, num_samples=9)
    with pytest.raises(CalibrationError, match="tokenizer"):
        BlockPruner(tiny_model("llama", 6), config()).make_plan()


def test_what_it_does_not_go_with_is_refused() -> None:
    pruner = toy_pruner()
    with pytest.raises(ConfigurationError, match="no objective 'task'"):
        pruner.make_plan(config("shortgpt"))
    with pytest.raises(ConfigurationError, match="held_out_dataset"):
        pruner.make_plan(config(num_blocks=None, max_kl=1.0))
    with pytest.raises(ConfigurationError, match="objective='task'"):
        pruner.make_plan(config("search", compensation="ridge"))


def test_models_that_do_not_continue_text_are_refused() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 48}
    model = BertForMaskedLM(BertConfig(vocab_size=96, **sizes)).eval()
    with pytest.raises(UnsupportedModelError, match="does not continue text"):
        BlockPruner(model, config(), word_tokenizer()).make_plan()


def test_a_file_of_rows_is_read_and_said_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    pruner = BlockPruner(tiny_model("llama", 6), config(dataset=str(path)), word_tokenizer())
    plan = pruner.make_plan(resume_dir=tmp_path / "kept")
    other = BlockPruner(tiny_model("llama", 6), config(), word_tokenizer()).make_plan()
    assert plan.removed_blocks == other.removed_blocks
    assert plan.calibration["fingerprint"] == other.calibration["fingerprint"]
    again = BlockPruningConfig.from_plan(plan)
    assert (again.objective, again.strategy) == ("task", "sleb")
    assert "--objective task" in command_for(plan, config(dataset=str(path)))
