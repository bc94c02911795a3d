# SPDX-License-Identifier: Apache-2.0
"""Where maps go: in front of what is gone, and behind it in every half that is seen to be one."""

from __future__ import annotations

import pytest
from families import tiny_model

from optimum_blockprune import PruningPlan
from optimum_blockprune.half import Half
from optimum_blockprune.points import Point, block_before, cut_points, points_from
from optimum_blockprune.runner import BlockRunner


def places(family: str, removed: list[int | str]) -> list[tuple[str, str | None, bool]]:
    """All of a model of five blocks: the half, the next one, and whether something is gone between them."""
    model = tiny_model(family)
    points = points_from(PruningPlan.from_blocks(model, removed), BlockRunner(model))
    return [(str(point.before), point.after and str(point.after), point.cut) for point in points]


def test_behind_a_block_come_all_halves() -> None:
    assert places("llama", ["3"]) == [
        ("2.mlp", "4.attention", True),
        ("4.attention", "4.mlp", False),
        ("4.mlp", None, False),
    ]


def test_cuts_and_what_lies_behind_the_first_stay_in_order() -> None:
    assert places("llama", ["1.mlp", "2.attention", "4"]) == [
        ("1.attention", "2.mlp", True),
        ("2.mlp", "3.attention", False),
        ("3.attention", "3.mlp", False),
        ("3.mlp", None, True),
    ]


def test_without_the_first_block_all_others_lie_behind() -> None:
    found = places("llama", ["0", "1", "2"])
    assert [before for before, _, _ in found] == ["3.attention", "3.mlp", "4.attention", "4.mlp"]
    assert not any(cut for _, _, cut in found)


def test_blocks_without_halves_take_a_map_at_their_end() -> None:
    assert places("falcon", [2]) == [
        ("1.mlp", "3.attention", True),
        ("3.mlp", "4.attention", False),
        ("4.mlp", None, False),
    ]


def test_where_nothing_is_gone_there_is_no_place() -> None:
    assert places("llama", []) == []


@pytest.mark.parametrize("removed", [["2"], ["1.mlp", "2.attention", "4"], ["0", "2"]])
def test_cuts_are_among_them(removed: list[str]) -> None:
    model = tiny_model("llama")
    plan = PruningPlan.from_blocks(model, removed)
    assert [point for point in points_from(plan, BlockRunner(model)) if point.cut] == cut_points(plan)


@pytest.mark.parametrize(
    ("before", "gone", "off"),
    [
        (Half(3, "mlp"), [2], [2]),
        (Half(3, "attention"), [2], [2, Half(3, "mlp")]),
        (Half(3, "attention"), [2, Half(3, "mlp")], [2, Half(3, "mlp")]),
        (Half(1, "attention"), [2, 1], [2, 1]),
    ],
    ids=str,
)
def test_behind_an_attention_half_the_mlp_half_is_off(before: Half, gone: list, off: list) -> None:
    assert Point(before, None, False).off(gone) == off


def test_the_block_in_front_is_one_that_is_left() -> None:
    assert block_before(4, [3, Half(2, "mlp")]) == 2
    assert block_before(2, [0, 1]) is block_before(0, []) is None
