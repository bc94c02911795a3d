# SPDX-License-Identifier: Apache-2.0
"""From a recipe to a plan: protections, what a strategy may not do, windows that fit the model, early refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import datasets
import pytest
import torch
from families import random_ids, tiny_model
from toys import TEXTS, config, counting, text, toy_pruner, word_tokenizer

from optimum_blockprune import BlockPruner, PruningPlan, PruningStrategy
from optimum_blockprune import choosing as choosing_module
from optimum_blockprune.calibration import WindowSpec
from optimum_blockprune.choosing import choose, held_out_split, num_to_remove, window_spec, windows_for
from optimum_blockprune.errors import CalibrationError, PlanError, UnsupportedModelError
from optimum_blockprune.recipe import Recipe
from optimum_blockprune.report import PruningReport
from optimum_blockprune.strategies.base import SearchContext


@pytest.fixture
def installed(monkeypatch) -> Callable[..., list[SearchContext]]:
    """Puts a strategy in place of all others; returns the list of contexts that it is asked with."""

    def install(answer: Callable[[SearchContext], Any], **attributes: Any) -> list[SearchContext]:
        seen: list[SearchContext] = []

        class Toy(PruningStrategy):
            """A third party's strategy."""

            name: ClassVar[str] = "random"
            needs_data: ClassVar[bool] = False

            def select(self, context: SearchContext) -> Any:
                seen.append(context)
                return answer(context)

        for name, value in attributes.items():
            setattr(Toy, name, value)
        monkeypatch.setattr(choosing_module, "get_strategy", lambda name: Toy)
        return seen

    return install


def first_ones(context: SearchContext) -> PruningPlan:
    return context.plan(context.removable[: context.num_remove])


# Protections


@pytest.mark.parametrize(
    ("own", "given", "removable"),
    [
        ((0, 0), (None, None), (0, 1, 2, 3, 4, 5)),
        ((1, 1), (None, None), (1, 2, 3, 4)),
        ((1, 1), (0, 0), (0, 1, 2, 3, 4, 5)),
        ((1, 1), (2, None), (2, 3, 4)),
        ((0, 2), (3, None), (3,)),
        ((1, 1), (None, 0), (1, 2, 3, 4, 5)),
    ],
)
def test_protections_are_the_strategys_own_unless_given(own, given, removable, installed) -> None:
    seen = installed(first_ones, protect_first=own[0], protect_last=own[1])
    first, last = given
    toy_pruner(strategy="random", num_blocks=1, protect_first=first, protect_last=last).make_plan()
    (context,) = seen
    assert context.removable == removable and context.num_remove == 1


def test_sleb_may_remove_the_ends_only_if_told_to() -> None:
    pruner = toy_pruner(num_blocks=4)
    assert set(pruner.make_plan().removed_blocks) == {1, 2, 3, 4}
    plan = pruner.make_plan(config(num_blocks=4, protect_first=2, protect_last=0))
    assert set(plan.removed_blocks) == {2, 3, 4, 5}
    assert sorted(map(int, plan.scores)) == [2, 3, 4, 5]


# What a strategy sees, and may not do


def test_the_context_holds_what_the_recipe_says(installed) -> None:
    seen = installed(first_ones, needs_data=True)
    pruner = toy_pruner(strategy="random", seed=5, batch_size=3)
    report = PruningReport()
    plan = choose(pruner.model, pruner.config.recipe, pruner.tokenizer, report, base_model="me/dense")
    (context,) = seen
    assert (context.num_remove, context.batch_size, context.seed) == (2, 3, 5)
    assert context.windows.input_ids.shape == (4, 16) and context.runner.model is pruner.model
    assert plan.base_model == "me/dense" and plan.requested == {"num_blocks": 2} and plan.seed == 5
    assert plan.calibration == context.windows.describe() and plan.versions["optimum-blockprune"]
    assert report.tokens == 64 and report.block_forwards == 0 and report.seconds.keys() == {"calibration", "search"}


def test_without_data_nothing_is_read(installed) -> None:
    seen = installed(first_ones)
    plan = toy_pruner(strategy="random", dataset="no/such/file.txt").make_plan()
    assert seen[0].windows is None and plan.calibration is None
    with pytest.raises(CalibrationError, match="measures the model on text"):
        seen[0].require_windows()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda context: context.plan([1]), r"'random' chose \[1\]; it was asked for 2 of \[1, 2, 3, 4\]"),
        (lambda context: context.plan([1, 2, 3]), r"chose \[1, 2, 3\]; it was asked for 2"),
        (lambda context: context.plan([]), r"chose \[\]; it was asked for 2"),
        (lambda context: context.plan([0, 1]), r"chose \[0, 1\]; it was asked for 2 of \[1, 2, 3, 4\]"),
        (lambda context: context.plan([4, 5]), r"chose \[4, 5\]"),
        (lambda context: context.plan([1, 1]), "A block is removed twice"),
        (lambda context: context.plan([1, 6]), "Block 6 does not exist"),
        (lambda context: PruningPlan.from_removed("llama", 9, [1, 2]), "made for a 'llama' model of 9 blocks"),
        (lambda context: PruningPlan.from_removed("gpt2", 6, [1, 2]), "made for a 'gpt2' model"),
        (lambda context: [1, 2], "'random' returned list, not a PruningPlan"),
    ],
)
def test_a_strategy_that_errs_is_refused(answer, message: str, installed) -> None:
    installed(answer, protect_first=1, protect_last=1)
    pruner = toy_pruner(strategy="random")
    with pytest.raises(PlanError, match=message):
        pruner.prune()
    assert pruner.plan is None and len(pruner.model.model.layers) == 6


# Refusals before the search


def test_gpt2_that_scales_by_block_number_is_refused_before_the_search() -> None:
    model = tiny_model("gpt2", 6, scale_attn_by_inverse_layer_idx=True)
    pruner = BlockPruner(model, config(), word_tokenizer())
    with counting(model) as forwards, pytest.raises(UnsupportedModelError, match="'gpt2' with scale_attn_by_inverse"):
        pruner.make_plan()
    with counting(model) as more, pytest.raises(UnsupportedModelError, match="can only lose its last blocks"):
        pruner.prune(plan=PruningPlan.from_removed("gpt2", 6, [2]))
    assert not forwards and not more
    # What it can lose, it may: the last blocks, and a search among them alone.
    pruner.make_plan(config("random", num_blocks=1, protect_first=5))
    assert len(pruner.prune(plan=PruningPlan.from_blocks(model, [5, 4])).transformer.h) == 4


def test_the_budget_is_counted_for_this_model() -> None:
    model = tiny_model("llama", 10)
    assert num_to_remove(model, Recipe(strategy="random", sparsity=0.07)) == 1
    assert num_to_remove(model, Recipe(strategy="random", sparsity=0.3)) == 3
    assert num_to_remove(model, Recipe(strategy="random")) == 2


# Windows


def test_windows_are_no_longer_than_the_model_reads() -> None:
    long = [text(1000)]
    for family in ("llama", "gpt2", "opt"):
        windows = windows_for(tiny_model(family), long, word_tokenizer(), WindowSpec(num_samples=2, seqlen=2048))
        assert windows.seqlen == 128
    windows = windows_for(tiny_model("bloom"), long, word_tokenizer(), WindowSpec(num_samples=1, seqlen=500))
    assert windows.seqlen == 500  # no limit
    pruner = toy_pruner(dataset=long, num_samples=2, seqlen=2048)
    assert pruner.make_plan().calibration["seqlen"] == 128
    assert pruner.evaluate()["seqlen"] == 128


def test_a_token_outside_the_vocabulary_is_refused_before_the_search() -> None:
    ids = random_ids(4, 16)
    ids[2, 3] = 96
    rows = [{"input_ids": row.tolist()} for row in ids]
    for dataset, tokenizer in ((rows, None), ([text(60) + " w99"] * 4, word_tokenizer(100))):
        pruner = BlockPruner(tiny_model("llama"), config(dataset=dataset, num_samples=4), tokenizer)
        for work in (pruner.make_plan, pruner.evaluate):
            with counting(pruner.model) as forwards, pytest.raises(CalibrationError, match="outside the model's voc"):
                work()
            assert not forwards
    ids[2, 3] = 95
    rows = [{"input_ids": row.tolist()} for row in ids]
    assert torch.equal(windows_for(tiny_model("llama"), rows, None, WindowSpec(4, 16)).input_ids, ids)


def test_a_recipe_says_how_text_is_cut() -> None:
    recipe = Recipe(num_samples=3, seqlen=9, seed=4, dataset_text_field="body", calibration_recipe="sleb")
    spec = WindowSpec(num_samples=3, seqlen=9, seed=4, text_field="body", recipe="sleb", split="train")
    assert window_spec(recipe) == spec
    assert window_spec(recipe, recipe="windows", num_samples=None, split="test") == WindowSpec(
        num_samples=None, seqlen=9, seed=4, text_field="body", recipe="windows", split="test"
    )


@pytest.mark.parametrize(
    ("splits", "chosen"),
    [(("train", "validation", "test"), "test"), (("train", "validation"), "validation"), (("train",), "train")],
)
def test_held_out_text_is_taken_from_the_best_split(splits, chosen) -> None:
    given = {split: datasets.Dataset.from_dict({"text": [text(20, seed)] * 2}) for seed, split in enumerate(splits)}
    assert held_out_split(datasets.DatasetDict(given)) == chosen
    pruner = toy_pruner(dataset=datasets.DatasetDict(given))
    evaluated = pruner.evaluate(num_samples=1)["fingerprint"]
    assert evaluated == pruner.evaluate(given[chosen], num_samples=1)["fingerprint"]


def test_text_without_splits_is_taken_whole() -> None:
    for dataset in (TEXTS, "file.txt", datasets.Dataset.from_dict({"text": TEXTS})):
        assert held_out_split(dataset) == "test"
