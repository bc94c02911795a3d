# SPDX-License-Identifier: Apache-2.0
"""From a recipe to a plan: protections, what a strategy may not do, windows that fit the model, early refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import datasets
import pytest
import torch
from families import random_ids, tiny_model
from toys import TEXTS, assert_unchanged, config, counting, snapshot, text, toy_pruner, word_tokenizer
from zoo import other_stacks

from optimum_blockprune import BlockPruner, PruningPlan, PruningStrategy
from optimum_blockprune import choosing as choosing_module
from optimum_blockprune.asked import num_to_remove
from optimum_blockprune.blocks import find_blocks
from optimum_blockprune.calibration import WindowSpec
from optimum_blockprune.choosing import choose
from optimum_blockprune.errors import CalibrationError, ConfigurationError, PlanError, UnsupportedModelError
from optimum_blockprune.reading import held_out_split, window_spec, windows_for
from optimum_blockprune.recipe import Recipe
from optimum_blockprune.report import PruningReport
from optimum_blockprune.runner import BlockRunner
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
        (
            lambda context: PruningPlan.from_removed("llama", 9, [1, 2]),
            "for the decoder of a 'llama' model with 9 blocks",
        ),
        (lambda context: PruningPlan.from_removed("gpt2", 6, [1, 2]), "for the decoder of a 'gpt2' model"),
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
    with (
        counting(model) as forwards,
        pytest.raises(UnsupportedModelError, match="'gpt2' cannot lose .* by the block n"),
    ):
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
        windows = windows_for(
            find_blocks(tiny_model(family)), long, word_tokenizer(), WindowSpec(num_samples=2, seqlen=2048)
        )
        assert windows.seqlen == 128
    windows = windows_for(
        find_blocks(tiny_model("bloom")), long, word_tokenizer(), WindowSpec(num_samples=1, seqlen=500)
    )
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
    assert torch.equal(windows_for(find_blocks(tiny_model("llama")), rows, None, WindowSpec(4, 16)).input_ids, ids)


def test_encoders_lose_the_positions_that_count_from_the_padding_token() -> None:
    long = [text(1000)]
    spec = WindowSpec(num_samples=2, seqlen=2048)
    # 128 positions; BERT's padding token is 0, RoBERTa's first position is one behind its padding token.
    for name, expected in (("bert", 127), ("roberta", 128 - other_stacks.tiny_config("roberta").pad_token_id - 1)):
        model = other_stacks.tiny_model(name)
        windows = windows_for(find_blocks(model), long, word_tokenizer(), spec)
        assert windows.seqlen == expected
        assert torch.isfinite(BlockRunner(model).logits(next(windows.batches(2)))).all()


# Stacks


@pytest.mark.parametrize("strategy", ["sleb", "mi_prun", "shortgpt", "angular", "random"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_search_is_about_one_stack(strategy: str, stack: str) -> None:
    model = other_stacks.tiny_model("bart", 5, 6)
    before = snapshot(model)
    pruner = BlockPruner(model, config(strategy, stack=stack), word_tokenizer())
    plan = pruner.make_plan()
    depth = {"encoder": 5, "decoder": 6}
    assert (plan.model_type, plan.stack, plan.num_blocks) == ("bart", stack, depth[stack])
    assert len(plan.removed_blocks) == 2
    assert_unchanged(model, before)
    pruner.prune(plan=plan)
    depth[stack] -= 2
    assert {each: len(find_blocks(model, each)) for each in depth} == depth


def test_blocks_that_have_to_stay_are_not_searched() -> None:
    model = other_stacks.tiny_model("t5", 5, 5)
    recipe = Recipe("random", num_blocks=4, stack="decoder", protect_first=0)
    assert num_to_remove(model, recipe) == 4
    assert sorted(choose(model, recipe, None, PruningReport()).removed_blocks) == [1, 2, 3, 4]
    with pytest.raises(ConfigurationError, match="num_blocks=5 asks to remove 5 of 5 blocks, but only 4 may go"):
        num_to_remove(model, Recipe("random", num_blocks=5, stack="decoder", protect_first=0))


def test_an_encoder_without_a_mask_token_is_pruned_by_its_hidden_states() -> None:
    model = other_stacks.tiny_model("bert")
    pruner = BlockPruner(model, config("sleb"), word_tokenizer())
    with counting(model) as forwards, pytest.raises(CalibrationError, match="'bert' has no mask token"):
        pruner.make_plan()
    assert not forwards
    assert pruner.make_plan(config("shortgpt")).stack == "encoder"
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "w9"})
    assert BlockPruner(model, config("sleb"), tokenizer).make_plan().scores


def test_a_stack_that_is_not_there_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="'llama' has no 'encoder' stack"):
        toy_pruner(stack="encoder")


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


@pytest.mark.parametrize("field", [{"layout": "padded"}, {"align": 64}], ids=str)
def test_fields_of_width_are_refused_where_blocks_go(field: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="only count for strategies that remove channels and heads; 'sleb'"):
        toy_pruner(**field).make_plan()
