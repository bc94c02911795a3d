# SPDX-License-Identifier: Apache-2.0
"""The rules of a recipe, in the words of its errors, and the arithmetic of the budgets."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest

from optimum_blockprune.errors import ConfigurationError
from optimum_blockprune.recipe import Recipe


def blocks(recipe: Recipe, num_blocks: int, removable: range | None = None) -> int:
    """Asks for the budget on a model with blocks of 100 parameters and 1,000 more around them."""
    return recipe.budget_blocks(
        num_blocks,
        range(num_blocks) if removable is None else removable,
        block_params=[100] * num_blocks,
        total_params=1000 + 100 * num_blocks,
    )


def test_defaults_are_those_of_the_contract() -> None:
    recipe = Recipe()
    assert (recipe.strategy, recipe.num_samples, recipe.seqlen, recipe.batch_size, recipe.seed) == (
        "sleb",
        128,
        2048,
        1,
        0,
    )
    assert recipe.requested == {"sparsity": 0.2}
    assert recipe.calibration_recipe == "windows"


@pytest.mark.parametrize("field", fields(Recipe), ids=lambda field: field.name)
def test_every_field_has_a_help_text(field) -> None:
    assert field.metadata["help"].endswith(".")


def test_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Recipe().seed = 1


@pytest.mark.parametrize("budget", [{"sparsity": 0.3}, {"num_blocks": 4}, {"target_params": 10**6}])
def test_requested_is_the_budget_as_given(budget) -> None:
    assert Recipe(**budget).requested == budget


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": 0.2, "num_blocks": 3}, r"one budget, not 2: sparsity=0\.2 and num_blocks=3"),
        ({"num_blocks": 3, "target_params": 9}, "num_blocks=3 and target_params=9"),
        ({"sparsity": 0.0}, "not between 0 and 1"),
        ({"sparsity": 1}, "not between 0 and 1"),
        ({"sparsity": 25}, "For a count of blocks use num_blocks"),
        ({"sparsity": -0.1}, "not between 0 and 1"),
        ({"sparsity": float("nan")}, "not between 0 and 1"),
        ({"sparsity": "0.2"}, "sparsity must be a number between 0 and 1, not '0.2'"),
        ({"sparsity": True}, "sparsity must be a number"),
        ({"num_blocks": 0}, "num_blocks=0 is too small; the smallest value is 1"),
        ({"num_blocks": 2.0}, "num_blocks must be a whole number, not 2.0"),
        ({"num_blocks": True}, "num_blocks must be a whole number, not True"),
        ({"target_params": 0}, "target_params=0 is too small"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"num_samples": None}, "num_samples must be a whole number, not None"),
        ({"seqlen": 1}, "seqlen=1 is too small; the smallest value is 2"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": False}, "batch_size must be a whole number"),
        ({"seed": -1}, "seed=-1"),
        ({"protect_first": -1}, "protect_first=-1"),
        ({"protect_last": -1}, "protect_last=-1"),
        ({"calibration_recipe": "window"}, "Unknown calibration_recipe 'window'. Did you mean 'windows'?"),
        ({"calibration_recipe": None}, "Available: sleb, windows"),
        ({"strategy": ""}, "strategy must be the name of a strategy"),
        ({"strategy": None}, "strategy must be the name of a strategy, not None"),
        ({"stack": "middle"}, "stack must be 'decoder' or 'encoder', not 'middle'"),
        ({"stack": ""}, "stack must be 'decoder' or 'encoder', not ''"),
        ({"dataset": ""}, "dataset is an empty string"),
        ({"dataset_text_field": ""}, "dataset_text_field must be the name of a column"),
        ({"use_chat_template": 1}, "use_chat_template must be True or False, not 1"),
        ({"strategy_options": ["a=1"]}, "--strategy-option key=value"),
        ({"strategy_options": {1: 2}}, "must be a dict of option names"),
    ],
)
def test_refuses_impossible_values(given, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Recipe(**given)


@pytest.mark.parametrize("dataset", [None, "wikitext2", Path("a.txt"), ["one", "two"], [{"input_ids": [1]}], object()])
def test_a_dataset_may_be_anything(dataset) -> None:
    assert Recipe(dataset=dataset).dataset is dataset


@pytest.mark.parametrize(
    ("sparsity", "num_blocks", "expected"),
    [(0.1, 30, 3), (0.07, 100, 7), (0.2, 30, 6), (0.25, 30, 8), (0.29, 100, 29), (1e-5, 30, 1), (0.5, 3, 2)],
)
def test_sparsity_counts_the_decimal_that_was_typed(sparsity, num_blocks, expected) -> None:
    assert blocks(Recipe(sparsity=sparsity), num_blocks) == expected


def test_num_blocks_is_taken_as_it_is() -> None:
    assert blocks(Recipe(num_blocks=7), 30) == 7


@pytest.mark.parametrize(("target", "expected"), [(3999, 1), (3900, 1), (3899, 2), (3500, 5), (1100, 29)])
def test_target_params_of_equal_blocks(target, expected) -> None:
    assert blocks(Recipe(target_params=target), 30) == expected


def test_target_params_is_reached_by_every_choice() -> None:
    sizes = [500, 100, 300, 200, 500]
    count = Recipe(target_params=1400).budget_blocks(5, [1, 2, 3], block_params=sizes, total_params=1900)
    assert count == 3  # the two smallest, 100 + 200, would not do; 500 may not go at all


def test_a_changed_copy_is_checked_too() -> None:
    with pytest.raises(ConfigurationError, match="one budget"):
        replace(Recipe(sparsity=0.2), num_blocks=2)


@pytest.mark.parametrize(
    ("budget", "removable", "message"),
    [
        (
            {"num_blocks": 28},
            range(2, 29),
            "num_blocks=28 asks to remove 28 of 30 blocks, but only 27 may go: the first 2, the last 1 are protected "
            r"\(protect_first, protect_last\). The largest possible num_blocks is 27.",
        ),
        ({"sparsity": 0.95}, range(2, 29), "asks to remove 29 of 30 .* largest possible sparsity is 0.9."),
        ({"sparsity": 0.99}, range(30), "one block must stay. The largest possible sparsity is 0.9666."),
        ({"num_blocks": 1}, range(0), "all 30 are protected .* No block may go."),
        ({"num_blocks": 3}, [4, 9], "the first 4, the last 20 and 4 in between are protected"),
        ({"target_params": 1000}, range(2, 29), "target_params=1,000 cannot be reached: .* reaches is 1,300."),
        ({"target_params": 4000}, range(30), "leaves nothing to remove: the model has 4,000 parameters"),
    ],
)
def test_refuses_a_budget_beyond_the_model(budget, removable, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        blocks(Recipe(**budget), 30, removable)


@pytest.mark.parametrize(("num_blocks", "protected"), [(30, 3), (7, 2), (12, 0)])
def test_the_largest_sparsity_of_the_message_works(num_blocks, protected) -> None:
    removable = range(protected, num_blocks)
    with pytest.raises(ConfigurationError) as caught:
        blocks(Recipe(sparsity=0.9999), num_blocks, removable)
    largest = float(str(caught.value).rstrip(".").rsplit(" ", 1)[1])
    assert blocks(Recipe(sparsity=largest), num_blocks, removable) == min(len(removable), num_blocks - 1)
