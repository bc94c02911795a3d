# SPDX-License-Identifier: Apache-2.0
"""From a budget to numbers of units: rounding, limits that are true, and parameters that are really saved."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
from families import tiny_model
from toys import assert_unchanged, snapshot
from transformers import PreTrainedModel
from zoo import causal

from optimum_blockprune import BlockPruner, BlockPruningConfig
from optimum_blockprune.blocks import find_blocks
from optimum_blockprune.errors import ConfigurationError, UnsupportedModelError
from optimum_blockprune.recipe import Recipe
from optimum_blockprune.strategies.base import WidthTask
from optimum_blockprune.strategies.magnitude import Magnitude, MagnitudeOptions
from optimum_blockprune.width_task import _nearest, unit_cost, width_task


def task_for(model: PreTrainedModel, families: str = "mlp", strategy: type = Magnitude, **fields: Any) -> WidthTask:
    recipe = Recipe("magnitude", **fields)
    return width_task(find_blocks(model), recipe, strategy, MagnitudeOptions(families))


def kept(model: PreTrainedModel, families: str = "mlp", **fields: Any) -> list[int]:
    """Units that each free place of a group keeps, group by group."""
    task = task_for(model, families, **fields)
    counts = [{place.keep for place in task.free if place.group == number} for number in range(len(task.groups))]
    assert all(len(each) == 1 for each in counts)
    return [each.pop() for each in counts]


def refusal(model: PreTrainedModel, families: str = "mlp", **fields: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        task_for(model, families, **fields)
    return str(caught.value)


def number_in(message: str, pattern: str) -> float:
    return float(re.search(pattern, message).group(1).replace(",", ""))


def size_after(model: PreTrainedModel, families: str, **fields: Any) -> int:
    """Parameters of the pruned model, by pruning it."""
    config = BlockPruningConfig("magnitude", strategy_options={"families": families}, **fields)
    return BlockPruner(model, config).prune().num_parameters()


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    """48 channels and 2 KV groups in each of 2 blocks; is not changed."""
    return tiny_model("llama", 2)


@pytest.fixture(scope="module")
def heads() -> PreTrainedModel:
    """8 heads of their own."""
    return tiny_model("llama", 2, num_attention_heads=8, num_key_value_heads=8, head_dim=4)


# Sparsity


@pytest.mark.parametrize(
    ("sparsity", "align", "expected"),
    [
        (0.5, 8, 24),
        (0.4, 8, 32),  # 28.8
        (0.3, 8, 32),  # 33.6
        (0.25, 8, 40),  # 36 is as far from 32: the larger one
        (0.26, 8, 32),
        (0.9, 8, 8),
        (0.4, 1, 29),
        (0.4, 16, 32),
        (0.5, 16, 32),  # 24
        (0.51, 16, 16),
        (0.5, 20, 20),  # 20, 40 and 48 are possible
        (0.08, 20, 48),
        (0.09, 20, 40),
        (0.5, 24, 24),
    ],
)
def test_the_nearest_multiple_of_align(sparsity: float, align: int, expected: int, llama: PreTrainedModel) -> None:
    if expected == 48:
        assert "removes nothing" in refusal(llama, sparsity=sparsity, align=align)
    else:
        assert kept(llama, sparsity=sparsity, align=align) == [expected]


def test_every_sparsity_against_enumeration() -> None:
    for align in (1, 7, 8, 16):
        choices = (*range(align, 48, align), 48)
        for percent in range(1, 100):
            wanted = 48 * (1 - Fraction(percent, 100))
            best = min(abs(count - wanted) for count in (0, *choices))
            expected = max(count for count in (0, *choices) if abs(count - wanted) == best)
            assert _nearest(48, Fraction(percent, 100), choices) == expected


def test_the_decimal_that_was_typed() -> None:
    """0.35 of 20 is 7 exactly, and 13 stay; in binary it is a little less."""
    model = tiny_model("llama", 1, intermediate_size=20)
    assert kept(model, sparsity=0.35, align=1) == [13]
    # 20 * (1 - 0.1) = 18 lies between 16 and 20: the larger one.
    assert "removes nothing" in refusal(model, sparsity=0.1, align=4)


@pytest.mark.parametrize(
    ("families", "fields", "align", "asked"),
    [
        ("mlp", {}, 8, 0.95),
        ("mlp", {}, 1, 0.999),
        ("mlp", {}, 16, 0.9),
        ("mlp", {"intermediate_size": 56}, 8, 0.99),
        ("attention", {}, 8, 0.9),
        ("attention", {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4}, 8, 0.95),
        ("both", {}, 8, 0.95),
        ("both", {}, 1, 0.8),
    ],
)
def test_the_largest_sparsity_is_the_largest(families: str, fields: dict[str, Any], align: int, asked: float) -> None:
    model = tiny_model("llama", 2, **fields)
    message = refusal(model, families, sparsity=asked, align=align)
    assert f"sparsity={asked} would leave less than" in message
    largest = number_in(message, r"The largest possible sparsity is ([\d.]+)\.$")
    assert largest < asked
    assert min(kept(model, families, sparsity=largest, align=align)) >= 1
    more = round(largest + 0.0001, 4)
    assert f"The largest possible sparsity is {largest}." in refusal(model, families, sparsity=more, align=align)


@pytest.mark.parametrize(
    ("families", "fields", "align", "asked"),
    [
        ("mlp", {}, 8, 0.01),
        ("mlp", {"intermediate_size": 32}, 8, 0.05),  # the step is at 0.125 exactly
        ("mlp", {}, 20, 0.01),
        ("mlp", {"intermediate_size": 20}, 16, 0.05),  # at 0.1 exactly
        ("attention", {}, 8, 0.1),  # at 0.25 exactly
        ("attention", {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4}, 8, 0.1),
        ("both", {}, 8, 0.01),
    ],
)
def test_the_smallest_sparsity_is_the_smallest(
    families: str, fields: dict[str, Any], align: int, asked: float
) -> None:
    model = tiny_model("llama", 2, **fields)
    message = refusal(model, families, sparsity=asked, align=align)
    assert f"sparsity={asked} removes nothing: kept units are rounded to" in message
    smallest = number_in(message, r"The smallest sparsity that [a-z ]+ is ([\d.]+)\.$")
    full = [place.units for place in task_for(model, families, sparsity=0.5, align=align).places if place.block == 0]
    assert kept(model, families, sparsity=smallest, align=align) != full
    less = round(smallest - 0.0001, 4)
    assert f"is {smallest}." in refusal(model, families, sparsity=less, align=align)


def test_one_family_that_loses_nothing_is_no_refusal(llama: PreTrainedModel) -> None:
    """A fifth of two KV groups is none, of 48 channels it is some."""
    assert kept(llama, "both", sparsity=0.2) == [40, 2]


@pytest.mark.parametrize("budget", [{"sparsity": 0.5}, {"sparsity": 0.6}, {"sparsity": 0.01}, {"target_params": 9000}])
@pytest.mark.parametrize("align", [48, 64])
def test_an_align_that_leaves_no_choice(align: int, budget: dict[str, Any], llama: PreTrainedModel) -> None:
    message = refusal(llama, align=align, **budget)
    assert f"align={align}" in message and "48" in message and message == message.strip()
    assert "possible" not in message and "smallest" not in message


def test_heads_go_where_channels_cannot(llama: PreTrainedModel) -> None:
    assert kept(llama, "both", sparsity=0.5, align=64) == [48, 1]


def test_a_number_of_blocks_is_no_number_of_channels(llama: PreTrainedModel) -> None:
    for layout in ("uniform", "padded", "per_layer"):
        message = refusal(llama, num_blocks=2, layout=layout)
        assert message == (
            "num_blocks=2 counts blocks, but strategy 'magnitude' removes channels and heads: use sparsity or "
            "target_params."
        )


# Heads that a configuration can have


@pytest.mark.parametrize(
    ("shape", "uniform"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 4}, (1, 2, 4)),
        ({"num_attention_heads": 8, "num_key_value_heads": 8}, (1, 2, 4, 8)),
        ({"num_attention_heads": 8, "num_key_value_heads": 4}, (1, 2, 4)),
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, (1, 2)),
        ({"num_attention_heads": 4, "num_key_value_heads": 1}, (1, 2, 4)),
        ({"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6}, (1, 2, 3, 4, 6)),
    ],
)
def test_numbers_of_heads_that_the_class_accepts(shape: dict[str, int], uniform: tuple[int, ...]) -> None:
    """Llama wants the hidden size to be a multiple of the number of heads."""
    model = tiny_model("llama", 2, **shape)
    assert task_for(model, "attention", sparsity=0.5).allowed == (uniform,)
    assert task_for(model, "attention", sparsity=0.5, layout="padded").allowed == (uniform,)
    every = tuple(range(1, uniform[-1] + 1))
    assert task_for(model, "attention", sparsity=0.5, layout="per_layer").allowed == (every,)


def test_only_accepted_numbers_are_asked_for(heads: PreTrainedModel) -> None:
    assert kept(heads, "attention", sparsity=0.3) == [4]  # 5.6 of 4 and 8
    assert kept(heads, "attention", sparsity=0.3, layout="per_layer") == [6]
    assert kept(heads, "attention", sparsity=0.35, layout="per_layer") == [5]
    assert kept(heads, "attention", sparsity=0.7) == [2]


def test_units_without_a_field_have_every_number() -> None:
    model = tiny_model("gpt2", 2)
    task = task_for(model, "attention", sparsity=0.25, layout="padded")
    assert task.allowed == ((1, 2, 3, 4),) and {place.keep for place in task.places} == {3}
    assert task.room(0, 3) == 4  # no configuration says three
    with pytest.raises(UnsupportedModelError, match="'gpt2': its attention heads cannot be cut exactly"):
        task_for(model, "attention", sparsity=0.25)


def test_blocks_are_padded_to_what_a_configuration_can_say(heads: PreTrainedModel) -> None:
    task = task_for(heads, "both", sparsity=0.5, layout="padded", align=16)
    assert [task.room(1, widest) for widest in (1, 2, 3, 4, 5, 8)] == [1, 2, 4, 4, 8, 8]
    assert [task.room(0, widest) for widest in (1, 16, 17, 40, 48)] == [16, 16, 32, 48, 48]


# Target


@pytest.mark.parametrize(
    ("families", "layout", "align", "fields"),
    [
        ("mlp", "uniform", 8, {}),
        ("mlp", "per_layer", 3, {}),
        ("both", "uniform", 8, {}),
        ("both", "uniform", 5, {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4}),
        ("attention", "per_layer", 8, {"num_attention_heads": 8, "num_key_value_heads": 4}),
    ],
)
def test_the_smallest_share_that_reaches_the_target(
    families: str, layout: str, align: int, fields: dict[str, Any]
) -> None:
    """Against all shares: the same one in every family, rounded to the nearest possible number, the smaller of two."""
    model = tiny_model("llama", 3, **fields)
    protect = {} if layout == "uniform" else {"protect_first": 1}
    common = {"layout": layout, "align": align, **protect}
    task = task_for(model, families, sparsity=0.6, **common)
    costs = [sum(place.cost for place in task.free if place.group == group) for group in range(len(task.groups))]
    units = [choices[-1] for choices in task.allowed]
    total = model.num_parameters()

    def counts(share: Fraction) -> list[int]:
        return [
            min(choices, key=lambda count, wanted=full * (1 - share): (abs(count - wanted), count))
            for full, choices in zip(units, task.allowed, strict=True)
        ]

    def size(numbers: list[int]) -> int:
        return total - sum(cost * (full - n) for cost, full, n in zip(costs, units, numbers, strict=True))

    fine = [Fraction(step, 960) for step in range(960)]
    reached = [(size(counts(share)), counts(share)) for share in fine]
    assert [each for each, _ in reached] == sorted((each for each, _ in reached), reverse=True)
    for target in {each + offset for each, _ in reached for offset in (-1, 0, 1)}:
        enough = [numbers for found, numbers in reached if found <= target]
        if target >= total or not enough:
            continue
        assert kept(model, families, target_params=target, **common) == enough[0], target


def test_a_target_is_reached(llama: PreTrainedModel) -> None:
    total = llama.num_parameters()
    for families, share in product(("mlp", "both"), (0.95, 0.85, 0.75)):
        target = int(total * share)
        assert size_after(tiny_model("llama", 2), families, target_params=target) <= target


@pytest.mark.parametrize("families", ["mlp", "attention", "both"])
def test_the_smallest_target_is_the_smallest(families: str) -> None:
    model = tiny_model("llama", 2)
    message = refusal(model, families, target_params=100)
    assert message.startswith("target_params=100 cannot be reached by removing units of width: the least that can be")
    smallest = int(number_in(message, r"The smallest possible target_params is ([\d,]+)\.$"))
    assert f"The smallest possible target_params is {smallest:,}." in refusal(
        model, families, target_params=smallest - 1
    )
    assert size_after(model, families, target_params=smallest) == smallest


def test_a_target_that_leaves_nothing_to_remove(llama: PreTrainedModel) -> None:
    total = llama.num_parameters()
    for target in (total, total + 1):
        assert refusal(llama, target_params=target) == (
            f"target_params={target:,} leaves nothing to remove: the model has {total:,} parameters."
        )
    assert kept(llama, target_params=total - 1) == [40]


def test_a_target_promises_nothing_of_padding(llama: PreTrainedModel) -> None:
    message = refusal(llama, target_params=llama.num_parameters() - 1000, layout="padded")
    assert message.startswith("target_params cannot be promised with layout='padded'")
    assert "'uniform' or 'per_layer'" in message


def test_protected_blocks_do_not_count_towards_a_target() -> None:
    model = tiny_model("llama", 4)
    free = task_for(model, target_params=model.num_parameters() - 3000, layout="per_layer")
    fewer = task_for(model, target_params=model.num_parameters() - 3000, layout="per_layer", protect_last=2)
    assert {place.keep for place in free.places} == {40}  # 4 * 8 * 96 = 3072
    assert [place.keep for place in fewer.places] == [32, 32, 48, 48]


# Protections


@pytest.mark.parametrize(
    "protect", [{"protect_first": 1}, {"protect_last": 2}, {"protect_first": 1, "protect_last": 0}]
)
def test_one_width_for_all_protects_none(protect: dict[str, int], llama: PreTrainedModel) -> None:
    message = refusal(llama, sparsity=0.5, **protect)
    assert message.startswith("layout='uniform' gives all blocks the same width, so that none can be protected")
    assert kept(llama, sparsity=0.5, protect_first=0, protect_last=0) == [24]


@pytest.mark.parametrize("layout", ["padded", "per_layer"])
@pytest.mark.parametrize(
    ("own", "given", "free"),
    [
        ((0, 0), (None, None), [0, 1, 2, 3]),
        ((1, 1), (None, None), [1, 2]),
        ((1, 1), (0, 0), [0, 1, 2, 3]),
        ((1, 1), (2, None), [2]),
        ((0, 0), (0, 1), [0, 1, 2]),
        ((3, 0), (None, 0), [3]),
    ],
)
def test_protected_blocks_keep_their_width(own, given, free: list[int], layout: str) -> None:
    class Careful(Magnitude):
        protect_first, protect_last = own

    first, last = given
    budget = {"sparsity": 0.5, "layout": layout, "protect_first": first, "protect_last": last}
    task = task_for(tiny_model("llama", 4), "both", Careful, **budget)
    assert sorted({place.block for place in task.free}) == free
    assert [place.keep for place in task.places if place.group == 0] == [24 if n in free else 48 for n in range(4)]
    assert [place.keep for place in task.places if place.group == 1] == [1 if n in free else 2 for n in range(4)]


def test_the_strategys_own_protections_do_not_count_where_all_are_alike() -> None:
    class Careful(Magnitude):
        protect_first, protect_last = 1, 1

    assert all(place.free for place in task_for(tiny_model("llama", 3), strategy=Careful, sparsity=0.5).places)


def test_all_protected(llama: PreTrainedModel) -> None:
    for first, last in ((2, 0), (0, 2), (1, 1), (5, 5)):
        message = refusal(llama, sparsity=0.5, layout="per_layer", protect_first=first, protect_last=last)
        assert message == "Every block with such units is protected (protect_first, protect_last)."


# What goes with a unit


@pytest.mark.parametrize(
    ("family", "families", "fields", "cost"),
    [
        ("llama", "mlp", {}, 3 * 32),
        ("llama", "mlp", {"mlp_bias": True}, 3 * 32 + 2),
        ("llama", "attention", {}, 32 * (16 + 16 + 8 + 8)),
        ("llama", "attention", {"attention_bias": True}, 32 * (16 + 16 + 8 + 8) + 16 + 8 + 8),
        ("llama", "attention", {"num_key_value_heads": 1}, 32 * (8 + 8)),
        ("phi3", "mlp", {}, 3 * 32),
        ("phi3", "attention", {}, 32 * (16 + 32)),
        ("phi3", "attention", {"num_key_value_heads": 1}, 32 * (8 + 8)),
        ("gpt2", "mlp", {}, 2 * 32 + 1),
        ("falcon", "mlp", {"bias": True}, 2 * 32 + 1),
    ],
)
def test_cost_is_what_is_saved(family: str, families: str, fields: dict[str, Any], cost: int) -> None:
    model = tiny_model(family, 2, **fields)
    before = model.num_parameters()
    task = task_for(model, families, sparsity=0.5)
    assert [place.cost for place in task.places] == [cost, cost]
    gone = sum(place.units - place.keep for place in task.places)
    assert gone > 0 and size_after(model, families, sparsity=0.5) == before - gone * cost


@pytest.mark.parametrize(
    ("family", "cost"), [("gpt2", 8 * (4 * 32 + 3)), ("falcon", 8 * 2 * 32), ("gpt_neox", 8 * (4 * 32 + 3))]
)
def test_cost_of_heads_without_a_field(family: str, cost: int) -> None:
    model = tiny_model(family, 2)
    before = model.num_parameters()
    (group,) = task_for(model, "attention", sparsity=0.5, layout="per_layer").groups
    assert unit_cost(find_blocks(model).blocks[1], group) == cost
    assert size_after(model, "attention", sparsity=0.5, layout="per_layer") == before - 2 * 2 * cost


def test_places_of_blocks_with_other_units() -> None:
    task = task_for(causal.tiny_model("qwen2_moe", 4, shared_expert_intermediate_size=32), "both", sparsity=0.5)
    rows = {(task.group_of(place).writer, place.block): (place.units, place.keep) for place in task.places}
    assert rows == {
        ("mlp.down_proj", 1): (48, 24),
        **{("mlp.shared_expert.down_proj", block): (32, 16) for block in (0, 2, 3)},
        **{("self_attn.o_proj", block): (2, 1) for block in range(4)},
    }
    assert (task.layout, task.align) == ("uniform", 8)


# The same from the outside


@pytest.mark.parametrize("fields", [{"num_blocks": 1}, {"sparsity": 0.99}, {"sparsity": 0.001}, {"target_params": 5}])
def test_a_refusal_changes_nothing(fields: dict[str, Any], llama: PreTrainedModel) -> None:
    before = snapshot(llama)
    pruner = BlockPruner(llama, BlockPruningConfig("magnitude", **fields))
    for work in (pruner.prune, pruner.make_plan, pruner.score):
        with pytest.raises(ConfigurationError):
            work()
    assert_unchanged(llama, before)
    assert pruner.plan is None and pruner.report.achieved == {}


def test_shares_are_exact_fractions() -> None:
    """A third of 12 channels by a target: 8 stay, and not 9 by a rounding error."""
    model = tiny_model("llama", 1, intermediate_size=12)
    target = model.num_parameters() - 4 * 96
    assert kept(model, target_params=target, align=1) == [8]
