# SPDX-License-Identifier: Apache-2.0
"""Width as values: where units lie, what a plan may say of them, and how two plans become one."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from optimum_blockprune.errors import PlanError
from optimum_blockprune.plan import PruningPlan
from optimum_blockprune.widths import (
    LAYOUTS,
    ZEROS,
    CutAttribute,
    CutTensor,
    Narrowing,
    UnitGroup,
    Width,
    read_ranges,
    spelled,
)


def group(
    writer: str = "down", units: int = 4, family: str = "mlp", unit: str = "channel", **fields: Any
) -> UnitGroup:
    """Channels, unless told otherwise."""
    fields = {"fields": {f"{writer}_size": 1}, "tensors": (CutTensor(f"{writer}.weight", 1, (1,)),), **fields}
    return UnitGroup(family, unit, writer, units, **fields)


def heads(units: int = 4) -> UnitGroup:
    """KV groups of two query heads of size 8."""
    return UnitGroup(
        "attention",
        "kv_group",
        "attn.o",
        units,
        {"heads": 2, "kv_heads": 1},
        {"head_dim": 8},
        (CutTensor("attn.o.weight", 1, (16,)), CutTensor("attn.qkv.weight", 0, (16, 8, 8))),
        (CutAttribute("attn", "split", 16), CutAttribute("attn.qkv", "out_features", 32, 5)),
        True,
    )


def width(*kept: tuple[int, ...], layout: str = "uniform", units: int = 4, **fields: Any) -> Width:
    """One group, one entry for every block."""
    made = tuple(Narrowing(block, 0, units_) for block, units_ in enumerate(kept))
    return Width(layout, (group(units=units),), made, **fields)


def depth_plan(num_blocks: int, removed: list[int], **fields: Any) -> PruningPlan:
    return PruningPlan.from_removed("llama", num_blocks, removed, **fields)


def width_plan(made: Width, num_blocks: int, **fields: Any) -> PruningPlan:
    return depth_plan(num_blocks, [], width=made, **fields)


# Where the entries of units lie


def by_tensors(
    parts: tuple[int, ...], rest: int, kept: list[int], units: int, filled: int | None = None
) -> tuple[int, ...]:
    """The kept entries by cutting up a row of numbers: split into stretches, a row for every unit, choose rows."""
    numbers = torch.arange(units * sum(parts) + rest)
    *stretches, shared = numbers.split([units * size for size in parts] + [rest])
    room = 0 if filled is None else filled - len(kept)
    chosen = [
        pad(stretch.view(units, size)[kept], (0, 0, 0, room), value=-1).flatten()
        for stretch, size in zip(stretches, parts, strict=True)
    ]
    return tuple(torch.cat([*chosen, shared]).tolist())


@pytest.mark.parametrize(
    ("parts", "rest", "kept", "filled", "expected"),
    [
        ((1,), 0, (0, 2), None, (0, 2)),
        ((1,), 0, (), None, ()),
        ((1,), 0, (0, 1, 2, 3), None, (0, 1, 2, 3)),
        ((1, 1), 0, (1, 3), None, (1, 3, 5, 7)),
        ((2,), 0, (1, 3), None, (2, 3, 6, 7)),
        ((3, 2, 1), 0, (1,), None, (3, 4, 5, 14, 15, 21)),
        ((2,), 3, (0, 3), None, (0, 1, 6, 7, 8, 9, 10)),
        ((1,), 0, (0, 2), 3, (0, 2, ZEROS)),
        ((1, 1), 0, (2,), 3, (2, ZEROS, ZEROS, 6, ZEROS, ZEROS)),
        ((2,), 2, (1,), 2, (2, 3, ZEROS, ZEROS, 8, 9)),
        ((1,), 0, (0, 2), 2, (0, 2)),
    ],
)
def test_indices_of_four_units(parts, rest: int, kept, filled: int | None, expected) -> None:
    assert CutTensor("w", 0, parts, rest).indices(kept, 4, filled) == expected


@pytest.mark.parametrize("parts", [(1,), (1, 1), (2,), (3,), (1, 1, 1), (8, 4, 4), (16, 8, 8), (2, 5)])
@pytest.mark.parametrize("rest", [0, 1, 6])
def test_indices_against_brute_force(parts: tuple[int, ...], rest: int) -> None:
    cut, draw = CutTensor("w", 0, parts, rest), random.Random(f"{parts} {rest}")
    for _ in range(20):
        units = draw.randint(1, 9)
        kept = sorted(draw.sample(range(units), draw.randint(1, units)))
        room = draw.choice([None, *range(len(kept), units + 1)])
        found = cut.indices(kept, units, room)
        assert found == by_tensors(parts, rest, kept, units, room)
        assert len(found) == cut.size(len(kept) if room is None else room)
        assert cut.indices(range(units), units) == tuple(range(cut.size(units)))


def test_what_a_group_says() -> None:
    made = heads()
    assert made.inputs_per_unit == 16 and group().inputs_per_unit == 1
    assert made.values(3) == {"heads": 6, "kv_heads": 3, "head_dim": 8}
    assert UnitGroup.from_dict(json.loads(json.dumps(dataclasses.asdict(made)))) == made
    with pytest.raises(TypeError, match="surprise"):
        UnitGroup.from_dict({**dataclasses.asdict(made), "surprise": 1})


# How kept units are written


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((), ""),
        ((0,), "0"),
        ((7,), "7"),
        ((0, 1), "0-1"),
        ((0, 1, 2, 7), "0-2,7"),
        ((1, 3, 5), "1,3,5"),
        ((0, 2, 3, 9, 10, 11, 13), "0,2-3,9-11,13"),
        (tuple(range(1000)), "0-999"),
    ],
)
def test_ranges(numbers: tuple[int, ...], text: str) -> None:
    assert spelled(numbers) == text
    assert read_ranges(text) == numbers


def test_random_sets_survive_spelling() -> None:
    draw = random.Random(1)
    for size in (1, 2, 5, 30, 300):
        for share in (0.05, 0.5, 0.95):
            kept = tuple(number for number in range(size) if draw.random() < share)
            assert read_ranges(spelled(kept)) == kept
            assert read_ranges(spelled(iter(kept))) == kept


# What contradicts itself


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layout": "Uniform"}, "Unknown layout 'Uniform' of a plan; possible: uniform, padded, per_layer."),
        ({"narrowed": (Narrowing(0, 1, (0,)),)}, "The plan has no group 1 of units."),
        ({"narrowed": (Narrowing(0, -1, (0,)),)}, "The plan has no group -1 of units."),
        ({"narrowed": (Narrowing(3, 0, (0,)), Narrowing(3, 0, (0,)))}, "The plan narrows down of block 3 twice."),
        ({"narrowed": (Narrowing(2, 0, ()),)}, "removes every unit before down of block 2; at least one must stay."),
        ({"narrowed": (Narrowing(2, 0, (1, 0)),)}, "before down of block 2 must be ascending numbers from 0 to 3."),
        ({"narrowed": (Narrowing(2, 0, (1, 1)),)}, "must be ascending numbers from 0 to 3."),
        ({"narrowed": (Narrowing(2, 0, (-1, 0)),)}, "must be ascending numbers from 0 to 3."),
        ({"narrowed": (Narrowing(2, 0, (3, 4)),)}, "must be ascending numbers from 0 to 3."),
        (
            {"groups": (group(), group("other")), "narrowed": (Narrowing(0, 0, (0,)),)},
            "No block of the plan has the units of group 1.",
        ),
        ({"groups": (group(),), "narrowed": ()}, "No block of the plan has the units of group 0."),
        ({"padded_to": (4,)}, "Only layout 'padded' has a number of units that blocks are padded to"),
        ({"layout": "per_layer", "padded_to": (4,)}, "Only layout 'padded'"),
        ({"layout": "padded", "padded_to": (4, 4)}, "one for every group."),
        ({"layout": "padded", "padded_to": (1,)}, "Block 0 keeps 2 units, but is padded to 1."),
        ({"layout": "padded", "padded_to": (5,)}, "Block 0 keeps 2 units, but is padded to 5."),
        (
            {"narrowed": (Narrowing(0, 0, (0, 1)), Narrowing(1, 0, (0,)), Narrowing(2, 0, (0, 1, 2)))},
            "Layout 'uniform' keeps the same number of units in every block, but down keeps 1 in one and 3 in "
            "another; use layout 'padded' or 'per_layer'.",
        ),
    ],
)
def test_contradictions(fields: dict[str, Any], message: str) -> None:
    good = {"layout": "uniform", "groups": (group(),), "narrowed": (Narrowing(0, 0, (0, 1)),)}
    assert Width(**good)
    with pytest.raises(PlanError, match=re.escape(message)):
        Width(**{**good, **fields})


def test_every_group_has_its_own_count() -> None:
    made = Width(
        "uniform", (group(), heads()), (Narrowing(0, 0, (0,)), Narrowing(0, 1, (1, 2)), Narrowing(1, 0, (3,)))
    )
    assert [made.width_of(number) for number in (0, 1)] == [1, 2]


def test_a_plan_narrows_no_block_that_goes() -> None:
    made = width((0, 1), (0, 1), (0, 1))
    assert width_plan(made, 3).width is made
    with pytest.raises(PlanError, match="The plan narrows block 1, which it does not keep."):
        depth_plan(3, [1], width=made)
    with pytest.raises(PlanError, match="narrows block 2, which it does not keep"):
        width_plan(made, 2)


# What the rest of the package reads off


def test_nothing_is_narrowed_by_default() -> None:
    empty = Width()
    assert not empty and empty.loads_anywhere and empty.fields() == {} and empty.totals() == {}
    assert Width.from_dict(json.loads(json.dumps(empty.to_dict()))) == empty
    assert width((0,), (1,))


def test_a_uniform_width_is_in_the_configuration() -> None:
    made = Width(
        "uniform", (group(), heads()), (Narrowing(0, 0, (0, 3)), Narrowing(1, 0, (1, 2)), Narrowing(1, 1, (1,)))
    )
    assert made.fields() == {"down_size": 2, "heads": 2, "kv_heads": 1, "head_dim": 8}
    assert made.loads_anywhere and [made.stored(each) for each in made.narrowed] == [2, 2, 1]
    assert made.totals() == {"mlp": {"before": 8, "after": 4}, "attention": {"before": 4, "after": 1}}
    assert made.of_block(1) == [(made.groups[0], made.narrowed[1]), (made.groups[1], made.narrowed[2])]
    assert made.of_block(0) == [(made.groups[0], made.narrowed[0])] and made.of_block(2) == []


def test_a_padded_width_is_as_wide_as_the_widest_block_or_wider() -> None:
    kept = (0,), (0, 2, 3), (1, 2)
    made = width(*kept, layout="padded")
    assert made.width_of(0) == 3 and made.fields() == {"down_size": 3}
    assert [made.stored(each) for each in made.narrowed] == [3, 3, 3]
    wider = width(*kept, layout="padded", padded_to=(4,))
    assert wider.width_of(0) == 4 and wider.fields() == {"down_size": 4} and wider.stored(wider.narrowed[0]) == 4
    assert wider.loads_anywhere and wider.totals() == made.totals() == {"mlp": {"before": 12, "after": 6}}


def test_widths_of_their_own_are_in_no_configuration() -> None:
    made = width((0,), (0, 2, 3), layout="per_layer")
    assert made.fields() == {} and not made.loads_anywhere
    assert [made.stored(each) for each in made.narrowed] == [1, 3]


def test_families_are_summed_over_groups() -> None:
    groups = group("dense", 4), group("shared", 6), heads(2)
    narrowed = (Narrowing(0, 0, (0,)), Narrowing(1, 1, (0, 5)), Narrowing(2, 1, (1, 2)), Narrowing(1, 2, (0, 1)))
    assert Width("uniform", groups, narrowed).totals() == {
        "mlp": {"before": 16, "after": 5},
        "attention": {"before": 2, "after": 2},
    }


# JSON


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(layout: str) -> None:
    room = {"padded_to": (3, 4)} if layout == "padded" else {}
    narrowed = (Narrowing(0, 0, (0, 1, 3)), Narrowing(2, 0, (1, 2, 3)), Narrowing(2, 1, (0, 3)))
    made = Width(layout, (group(), heads()), narrowed, **room)
    data = json.loads(json.dumps(made.to_dict()))
    assert Width.from_dict(data) == made
    assert [each["kept"] for each in data["narrowed"]] == ["0-1,3", "1-3", "0,3"]
    plan = depth_plan(4, [3], width=made, details={"align": 8})
    assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_files_of_before_have_no_width(tmp_path) -> None:
    plan = depth_plan(3, [1])
    data = plan.to_dict()
    del data["width"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert PruningPlan.from_file(tmp_path / "plan.json") == plan and not plan.width
    del data["blocks"][0]["mlp"]
    with pytest.raises(PlanError, match="malformed"):
        PruningPlan.from_dict(data)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("layout",), "wide", "Unknown layout 'wide'"),
        (("groups",), None, "malformed"),
        (("groups", 0, "tensors", 0, "parts"), 1, "malformed"),
        (("groups", 0, "units"), 2, "must be ascending numbers from 0 to 1"),
        (("narrowed", 0, "kept"), "0-4", "must be ascending numbers from 0 to 3"),
        (("narrowed", 0, "kept"), "", "removes every unit"),
        (("narrowed", 0, "kept"), [0, 1], "malformed"),
        (("narrowed", 0, "block"), 3, "narrows block 3, which it does not keep"),
        (("narrowed", 0, "more"), 3, "malformed"),
        ((), None, "malformed"),
        ((), {}, "malformed.*groups"),
    ],
)
def test_malformed_widths(place: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PruningPlan.from_dict(replaced(width_plan(width((0, 1), (2, 3)), 2).to_dict(), ("width", *place), value))


def replaced(data: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """`data` with another value at a place deep inside."""
    *parents, last = place
    target = data
    for name in parents:
        target = target[name]
    target[last] = value
    return data


@pytest.mark.parametrize("kept", ["x", "1-x", "-1", "1,,x"])
def test_malformed_ranges(kept: str) -> None:
    with pytest.raises(PlanError, match="malformed"):
        PruningPlan.from_dict(replaced(width_plan(width((0, 1)), 1).to_dict(), ("width", "narrowed", 0, "kept"), kept))


# Two in a row


def test_depth_then_width() -> None:
    second = width((0, 1), (1, 2), (2, 3))
    joined = depth_plan(5, [1, 3]).then(width_plan(second, 3))
    assert joined.num_blocks == 5 and joined.removed_blocks == (1, 3) and joined.kept_blocks == (0, 2, 4)
    assert joined.width.groups == second.groups and joined.width.layout == "uniform"
    assert joined.width.narrowed == (Narrowing(0, 0, (0, 1)), Narrowing(2, 0, (1, 2)), Narrowing(4, 0, (2, 3)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_width_then_depth(layout: str) -> None:
    room = {"padded_to": (3,)} if layout == "padded" else {}
    first = width((0, 1), (1, 2), (2, 3), layout=layout, **room)
    joined = width_plan(first, 3).then(depth_plan(3, [1]))
    assert joined.removed_blocks == (1,)
    assert joined.width == dataclasses.replace(first, narrowed=(first.narrowed[0], first.narrowed[2]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_goes_with_a_plan_that_comes_second(layout: str) -> None:
    second = width((0, 1), (1, 2), layout=layout, **({"padded_to": (3,)} if layout == "padded" else {}))
    joined = depth_plan(3, [0]).then(width_plan(second, 2))
    assert (joined.width.layout, joined.width.padded_to) == (layout, second.padded_to)
    assert [each.block for each in joined.width.narrowed] == [1, 2]


def test_the_blocks_of_one_kind_may_all_go() -> None:
    """The one dense block of a model of experts, say."""
    groups = group("dense"), group("shared", 6), heads()
    narrowed = (Narrowing(0, 0, (0, 1)), Narrowing(1, 1, (0,)), Narrowing(2, 1, (1,)), Narrowing(1, 2, (3,)))
    joined = width_plan(Width("uniform", groups, narrowed), 3).then(depth_plan(3, [0]))
    assert joined.width.groups == groups[1:]
    assert joined.width.narrowed == (Narrowing(1, 0, (0,)), Narrowing(2, 0, (1,)), Narrowing(1, 1, (3,)))
    padded = Width("padded", groups, narrowed, (3, 4, 2))
    assert width_plan(padded, 3).then(depth_plan(3, [0])).width.padded_to == (4, 2)
    # All that were narrowed go.
    dense = Width("uniform", groups[:1], narrowed[:1])
    assert width_plan(dense, 3).then(depth_plan(3, [0])).width == Width()


def test_width_then_width_counts_in_units_of_the_dense_model() -> None:
    first = width((1, 3, 5, 7), (0, 2, 4, 6), units=8)
    joined = width_plan(first, 2).then(width_plan(width((0, 3), (1, 2)), 2)).width
    assert joined.groups == first.groups
    assert [each.kept for each in joined.narrowed] == [(1, 7), (2, 4)]
    assert joined.fields() == {"down_size": 2}


def test_another_family_is_added() -> None:
    first, second = width((0, 1), (1, 2)), Width("uniform", (heads(),), tuple(Narrowing(n, 0, (n,)) for n in (0, 1)))
    joined = width_plan(first, 2).then(width_plan(second, 2)).width
    assert joined.groups == (*first.groups, *second.groups)
    assert {(each.block, each.group): each.kept for each in joined.narrowed} == {
        (0, 0): (0, 1),
        (1, 0): (1, 2),
        (0, 1): (0,),
        (1, 1): (1,),
    }
    assert width_plan(second, 2).then(width_plan(first, 2)).width.totals() == joined.totals()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("uniform", "per_layer"),
        ("per_layer", "uniform"),
        ("uniform", "padded"),
        ("padded", "uniform"),
        ("padded",) * 2,
    ],
)
def test_layouts_that_are_no_one_layout(first: str, second: str) -> None:
    with pytest.raises(PlanError, match=f"of layout '{first}' and '{second}' cannot be joined in one plan"):
        width_plan(width((0, 1), (1, 2), layout=first), 2).then(
            width_plan(width((0,), (1,), layout=second, units=2), 2)
        )


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            width((0,), (1,), units=3),
            "leaves 2 units of kind 'channel' before 'down' of block 0, the second one is for 3",
        ),
        (
            Width("uniform", (group(units=2, unit="head"),), (Narrowing(0, 0, (0,)),)),
            "of kind 'channel' before 'down' of block 0, the second one is for 2 of kind 'head'",
        ),
    ],
)
def test_units_that_are_others(second: Width, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        width_plan(width((0, 1), (1, 2)), 2).then(width_plan(second, 2))


def test_a_second_plan_is_for_what_the_first_leaves() -> None:
    first = depth_plan(4, [1], stack="encoder")
    for second in (
        depth_plan(4, [1], stack="encoder"),
        depth_plan(3, [1]),
        PruningPlan.from_removed("gpt2", 3, [1], stack="encoder"),
    ):
        message = (
            f"The second plan is for {second.num_blocks} blocks of '{second.model_type}' ({second.stack}); the first "
            "leaves 3 of 'llama' (encoder)."
        )
        with pytest.raises(PlanError, match=re.escape(message)):
            first.then(second)
    assert first.then(depth_plan(3, [1], stack="encoder")).stack == "encoder"


def test_what_each_plan_says_stays_apart() -> None:
    said = {"requested": {"sparsity": 0.4}, "scores": {"1": 2.5}, "steps": ({"block": 1},), "options": {"x": 1}}
    first = depth_plan(
        3, [1], strategy="sleb", base_model="org/dense", details={"loss": 2.0}, calibration={"source": "x"}, **said
    )
    second = width_plan(width((0, 1), (0, 1)), 2, strategy="magnitude", base_model="org/other", seed=3)
    third = depth_plan(2, [0], strategy="random", versions={"torch": "2"}, calibration={"source": "y"})
    joined = first.then(second).then(third)
    assert joined.strategy == "sleb+magnitude+random" and joined.base_model == "org/dense"
    assert joined.requested == {} and joined.scores == {} and joined.steps == () and joined.options == {}
    assert joined.calibration == {"source": "x"} and joined.versions == {"torch": "2"}
    parts = joined.parts()
    assert parts == joined.details["parts"]
    assert [part["strategy"] for part in parts] == ["sleb", "magnitude", "random"]
    assert parts[0]["requested"] == {"sparsity": 0.4} and parts[0]["steps"] == [{"block": 1}]
    assert (
        parts[0]["details"] == {"loss": 2.0} and parts[1]["seed"] == 3 and parts[2]["calibration"] == {"source": "y"}
    )
    names = {"strategy", "requested", "options", "scores", "steps", "details", "calibration", "seed"}
    assert all(part.keys() == names for part in parts)
    assert first.parts() == parts[:1] and first.details == {"loss": 2.0}
    parts.clear()
    assert len(joined.parts()) == 3


# Any number in a row, against carrying them out one by one

State = list[tuple[int, dict[str, tuple[int, ...]]]]


def carried_out(state: State, plan: PruningPlan) -> State:
    """What is left of blocks and units, in numbers of the first model, after one more plan."""
    left: State = []
    for number, (block, units) in enumerate(state):
        if number not in plan.kept_blocks:
            continue
        now = dict(units)
        for kind, narrowing in plan.width.of_block(number):
            before = now.get(kind.writer, tuple(range(kind.units)))
            now[kind.writer] = tuple(before[unit] for unit in narrowing.kept)
        left.append((block, now))
    return left


def drawn_plans(draw: random.Random, layout: str) -> list[PruningPlan]:
    """Four plans in a row for seven blocks, of depth or of one or two families of units."""
    units = {"up": [6] * 7, "o": [4] * 7}
    plans = []
    for step in range(4):
        blocks = len(units["up"])
        removed = draw.sample(range(blocks), draw.randint(1, 2)) if blocks > 3 and draw.random() < 0.5 else []
        groups: list[UnitGroup] = []
        narrowed = []
        for writer in [] if removed else draw.sample(sorted(units), draw.randint(1, 2)):
            count = max(1, min(units[writer]) - draw.randint(0, 2))
            for block, own in enumerate(units[writer]):
                kind = group(writer, own)
                if kind not in groups:
                    groups.append(kind)
                keep = count if layout == "uniform" else draw.randint(1, own)
                narrowed.append(Narrowing(block, groups.index(kind), tuple(sorted(draw.sample(range(own), keep)))))
                units[writer][block] = keep
        units = {writer: [own[n] for n in range(blocks) if n not in removed] for writer, own in units.items()}
        made = Width(layout, tuple(groups), tuple(narrowed)) if narrowed else Width()
        plans.append(depth_plan(blocks, removed, width=made, strategy=f"step{step}"))
    return plans


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_joined_plans_are_what_they_were_one_by_one(layout: str) -> None:
    draw, dense = random.Random(layout), [(block, {}) for block in range(7)]
    for _ in range(50):
        plans = drawn_plans(draw, layout)
        state, joined = carried_out(dense, plans[0]), plans[0]
        for plan in plans[1:]:
            state, joined = carried_out(state, plan), joined.then(plan)
            assert carried_out(dense, joined) == state
            assert joined.kept_blocks == tuple(block for block, _ in state)
        assert len(joined.removed_blocks) == sum(len(plan.removed_blocks) for plan in plans)
        assert [part["strategy"] for part in joined.parts()] == ["step0", "step1", "step2", "step3"]
        assert PruningPlan.from_dict(json.loads(json.dumps(joined.to_dict()))) == joined


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_it_does_not_matter_which_are_joined_first(layout: str) -> None:
    draw = random.Random(layout)
    for _ in range(50):
        one, two, three, four = drawn_plans(draw, layout)
        joined = one.then(two).then(three).then(four)
        assert one.then(two.then(three.then(four))) == one.then(two).then(three.then(four)) == joined


def test_blocks_go_in_the_order_of_the_plans() -> None:
    joined = depth_plan(6, [4, 1]).then(depth_plan(4, [2, 0])).then(depth_plan(2, [1]))
    assert joined.removed_blocks == (4, 1, 3, 0, 5) and joined.kept_blocks == (2,)
