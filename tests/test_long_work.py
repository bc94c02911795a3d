# SPDX-License-Identifier: Apache-2.0
"""Long work shows itself, and can be broken off at any point: model, report and disk are then as they were."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tqdm.auto
from families import block_list
from toys import assert_unchanged, config, files_below, snapshot, toy_pruner
from transformers import AutoModelForCausalLM

from optimum_blockprune import BlockPruner, PruningPlan, available_strategies, get_strategy
from optimum_blockprune import calibration as calibration_module
from optimum_blockprune import checkpoint as checkpoint_module
from optimum_blockprune import choosing as choosing_module
from optimum_blockprune import evaluation as evaluation_module
from optimum_blockprune.errors import VerificationError
from optimum_blockprune.evaluation import EvaluationSpec


SEARCHING = [
    name
    for name, info in available_strategies().items()
    if info.distribution == "optimum-blockprune" and get_strategy(name).needs_data
]
# Where prune(save_dir) can be broken off: names that are looked up at that moment.
STAGES = {
    "expectation": "optimum_blockprune.sequence.expect",
    "surgery": "optimum_blockprune.surgery._cut_list",
    "device map": "optimum_blockprune.surgery._renumber_device_map",
    "proof in memory": "optimum_blockprune.gate._prove_logits",
    "proof of the cache": "optimum_blockprune.gate._prove_cache",
    "writing": "transformers.PreTrainedModel.save_pretrained",
    "tokenizer": "transformers.PreTrainedTokenizerBase.save_pretrained",
    "reloading": "optimum_blockprune.gate.reload",
    "proof of the folder": "optimum_blockprune.publishing.prove_folder",
    "card": "optimum_blockprune.records.model_card",
    "renaming": "optimum_blockprune.saving._move_into_place",
}
GATE = ("proof in memory", "reloading", "proof of the folder")


def break_off(error: BaseException) -> Any:
    """A function that only raises."""

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise error

    return fail


def interrupted_at(pruner: BlockPruner, forward: int) -> None:
    """Lets the model's forward pass number `forward` be hit by Ctrl-C, in the middle of the blocks."""
    calls: list[int] = []

    def count(*_args: Any) -> None:
        calls.append(1)
        if len(calls) == forward:
            raise KeyboardInterrupt

    pruner.model.get_submodule("model.layers.3").register_forward_hook(count)


# Breaking off


@pytest.mark.parametrize("forward", [1, 2, 9, 15])
def test_ctrl_c_in_the_search_leaves_no_trace(forward: int, tmp_path: Path) -> None:
    pruner = toy_pruner()
    pruner.model.train()
    block_list(pruner.model)[4].eval()
    interrupted_at(pruner, forward)
    before = snapshot(pruner.model)
    with pytest.raises(KeyboardInterrupt):
        pruner.prune(tmp_path / "out")
    assert_unchanged(pruner.model, before)
    # What was measured stays for the next try.
    assert {path.name for path in tmp_path.iterdir()} <= {".out.resume"}
    assert pruner.plan is None and pruner.report.achieved == {}
    # The hook has fired; the same pruner goes on as if nothing had happened.
    other = toy_pruner()
    other.prune()
    pruner.prune(tmp_path / "out")
    assert pruner.plan.to_dict() == other.plan.to_dict()


@pytest.mark.parametrize("strategy", SEARCHING)
def test_ctrl_c_in_any_search_leaves_no_trace(strategy: str) -> None:
    pruner = toy_pruner(strategy=strategy)
    interrupted_at(pruner, 2)
    before = snapshot(pruner.model)
    with pytest.raises(KeyboardInterrupt):
        pruner.make_plan()
    assert_unchanged(pruner.model, before)
    assert pruner.plan is None


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_after_the_search_puts_model_and_disk_back(stage: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("the old result")
    pruner = toy_pruner(strategy="random")
    before, files = snapshot(pruner.model), files_below(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(STAGES[stage], break_off(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            pruner.prune(tmp_path / "out", overwrite=True)
    assert_unchanged(pruner.model, before)
    assert files_below(tmp_path) == files and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert pruner.report.achieved == {} and pruner.report.verification is None
    assert pruner.report.seconds.keys() - {"surgery"} == {"search"}  # the search is paid for and stays on the bill
    pruner.prune(tmp_path / "out", plan=pruner.plan, overwrite=True)
    assert len(block_list(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))) == 4


@pytest.mark.parametrize("stage", GATE)
def test_a_failing_gate_rolls_back_and_keeps_the_plan(stage: str, tmp_path: Path, monkeypatch) -> None:
    pruner = toy_pruner()
    pruner.evaluate(spec=EvaluationSpec(speed=False))
    before, measured = snapshot(pruner.model), list(pruner.report.evaluations)
    with monkeypatch.context() as patched:
        patched.setattr(STAGES[stage], break_off(VerificationError("not the same")))
        with pytest.raises(VerificationError, match="not the same"):
            pruner.prune(tmp_path / "out")
    assert_unchanged(pruner.model, before)
    # What was measured stays for the next try.
    assert {path.name for path in tmp_path.iterdir()} <= {".out.resume"}
    assert pruner.report.achieved == {} and pruner.report.evaluations == measured
    plan = pruner.plan
    assert plan.strategy == "sleb" and len(plan.removed_blocks) == 2
    pruner.prune(tmp_path / "out", plan=plan)
    assert PruningPlan.from_file(tmp_path / "out").to_dict() == plan.to_dict()


def test_a_second_pruning_that_fails_leaves_the_first_one(tmp_path: Path, monkeypatch) -> None:
    pruner = toy_pruner(strategy="random")
    pruner.prune()
    first, before = pruner.plan, snapshot(pruner.model)
    report = pruner.report.to_dict()
    with monkeypatch.context() as patched:
        patched.setattr(STAGES["proof of the folder"], break_off(VerificationError("no")))
        with pytest.raises(VerificationError):
            pruner.prune(tmp_path / "out", plan=PruningPlan.from_blocks(pruner.model, [0]))
    assert_unchanged(pruner.model, before)
    assert {**pruner.report.to_dict(), "seconds": report["seconds"]} == report
    pruner.save_pretrained(tmp_path / "out")
    assert PruningPlan.from_file(tmp_path / "out").to_dict() == first.to_dict()


def test_ctrl_c_in_an_evaluation_leaves_no_trace() -> None:
    pruner = toy_pruner()
    pruner.model.train()
    interrupted_at(pruner, 2)
    before = snapshot(pruner.model)
    with pytest.raises(KeyboardInterrupt):
        pruner.evaluate()
    assert_unchanged(pruner.model, before)
    assert pruner.report.evaluations == []


# Showing itself


class Bars:
    """Stands in for `tqdm`: makes real bars and remembers them."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.made.append(tqdm.auto.tqdm(*args, **kwargs))
        return self.made[-1]


@pytest.fixture
def bars(monkeypatch) -> Bars:
    bars = Bars()
    monkeypatch.setattr(choosing_module, "tqdm", bars)
    return bars


@pytest.mark.parametrize(
    "module", [calibration_module, checkpoint_module, choosing_module, evaluation_module], ids=lambda m: m.__name__
)
def test_bars_are_those_of_tqdm_auto(module: Any) -> None:
    assert module.tqdm is tqdm.auto.tqdm


@pytest.mark.parametrize("strategy", SEARCHING)
def test_every_search_shows_a_bar_that_is_filled_and_closed(strategy: str, bars: Bars) -> None:
    toy_pruner(strategy=strategy).make_plan()
    assert bars.made
    for bar in bars.made:
        assert bar.n == bar.total > 0 and bar.desc
        assert bar not in tqdm.auto.tqdm._instances  # closed


def test_sleb_shows_one_bar_per_removal(bars: Bars) -> None:
    toy_pruner(num_blocks=3).make_plan()
    assert [bar.desc for bar in bars.made] == ["SLEB 1/3", "SLEB 2/3", "SLEB 3/3"]
    # Two batches; four, three and two candidates, and the dense model in the first step.
    assert [bar.total for bar in bars.made] == [2 * 5, 2 * 3, 2 * 2]


def test_a_bar_is_closed_after_ctrl_c(bars: Bars) -> None:
    pruner = toy_pruner()
    interrupted_at(pruner, 15)
    with pytest.raises(KeyboardInterrupt):
        pruner.make_plan()
    assert bars.made[-1].n < bars.made[-1].total
    assert not set(bars.made) & set(tqdm.auto.tqdm._instances)


@pytest.fixture
def log(monkeypatch) -> Iterator[list[str]]:
    """INFO messages of SLEB; Optimum's loggers do not pass their records on to pytest's handler."""
    logger, messages, handler = logging.getLogger("optimum.blockprune.greedy"), [], logging.Handler()
    handler.emit = lambda record: messages.append(f"{record.levelname} {record.getMessage()}")
    monkeypatch.setattr(logger, "handlers", [handler])
    logger.setLevel(logging.INFO)
    yield messages
    logger.setLevel(logging.NOTSET)


def test_sleb_logs_every_removal_with_loss_and_perplexity(log: list[str]) -> None:
    plan = toy_pruner(num_blocks=3).make_plan()
    dense = math.exp(plan.details["dense_loss"])
    assert log == [
        f"INFO SLEB {number}/3: removed block {step['block']}; loss {step['loss']:.4f}, perplexity "
        f"{math.exp(step['loss']):.2f} (dense {dense:.2f})"
        for number, step in enumerate(plan.steps, start=1)
    ]
    assert [step["block"] for step in plan.steps] == list(plan.removed_blocks)


def test_the_library_is_quiet_unless_asked(capfd) -> None:
    pruner = toy_pruner(strategy="random")
    capfd.readouterr()
    pruner.prune(config=config("random"))
    out, err = capfd.readouterr()
    assert out == "" and "INFO" not in err
