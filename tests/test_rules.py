# SPDX-License-Identifier: Apache-2.0
"""Every rule of the table on small examples: the new value of a field, or why it has none."""

from __future__ import annotations

from typing import Any

import pytest

from optimum_blockprune.errors import UnsupportedModelError
from optimum_blockprune.rules import RULES, Following, exceptions_written_out, is_set


KEPT = (0, 2, 3, 5)


def field_of(value: Any, kept: tuple[int, ...] = KEPT, num_blocks: int = 6, **more: Any) -> Following:
    return Following("field", value, kept, num_blocks, "Model type 'some_type'", **more)


def follow(rule: str, value: Any, kept: tuple[int, ...] = KEPT, num_blocks: int = 6, **more: Any) -> Any:
    return RULES[rule](field_of(value, kept, num_blocks, **more))


@pytest.mark.parametrize(
    ("rule", "value", "expected"),
    [
        ("slice", list("abcdef"), list("acdf")),
        ("slice", ("a", "b", "c", "d", "e", "f"), list("acdf")),
        ("slice", 8, 8),
        ("slice_sources", [0, 0, 2, 2, 2, 5], [0, 1, 1, 3]),
        ("slice_sources", [0, 0, -1, None, 2, 5], [0, -1, None, 3]),
        ("renumber", [0, 1, 4], [0]),
        ("renumber", [5, 2], [3, 1]),
        ("renumber", [1, 4], []),
        ("sparse_keys", {"1": "a", "2": "b", "5": "c"}, {"1": "b", "3": "c"}),
        ("sparse_keys", {0: "a", 4: "b", 3: "c"}, {0: "a", 2: "c"}),
        ("sparse_keys", {"sliding_attention": "a", "4": "b"}, {"sliding_attention": "a"}),
        ("count_below", 3, 2),
        ("count_below", 4, 3),
        ("count_below", 99, 4),
        ("count_last", 1, 1),
        ("count_last", 2, 1),
        ("count_last", 3, 2),
        ("last_below", 5, 3),
        ("last_below", 4, 2),
        ("last_below", 0, 0),
        ("last_below", -1, -1),
        ("write_out", ["r", "r", "a"], ["r", "a", "r", "a"]),
        ("write_out", list("abcdef"), list("acdf")),
        ("write_pairs", [[["g", "l"], 3]], [[["g"], 1], [["g"], 1], [["l"], 1], [["l"], 1]]),
        ("write_pairs", [[["g"], 2], [["l"], 4]], [[["g"], 1], [["l"], 1], [["l"], 1], [["l"], 1]]),
        ("rescale", 3.0, 3.0 * (4 / 6) ** 0.5),
    ],
)
def test_rule(rule: str, value: Any, expected: Any) -> None:
    assert follow(rule, value) == expected


def test_a_list_of_another_length_is_refused() -> None:
    for rule in ("slice", "slice_sources"):
        with pytest.raises(UnsupportedModelError, match="'some_type': 'field' has 5 entries for 6 blocks"):
            follow(rule, [0, 1, 2, 3, 4])


def test_a_source_that_is_removed_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="of block 1, which is removed. Keep block 1, or remove its read"):
        follow("slice_sources", [0, 1, 2, 1, 4, 5])
    # Its only reader goes as well.
    assert follow("slice_sources", [0, 1, 2, 3, 1, 5]) == [0, 1, 2, 3]


def test_numbers_that_begin_at_one() -> None:
    assert follow("renumber", [1, 2, 6], base=1) == [1, 4]
    assert follow("renumber", [2, 5], base=1) == []


def test_a_section_that_begins_behind_another() -> None:
    # Blocks 2 to 4, of which 4 goes; the phase is the negative of the beginning.
    assert follow("count_between", 3, phase=-2) == 2
    assert follow("count_between", 1, phase=-1) == 0
    assert follow("count_between", 6, phase=0) == len(KEPT)


def test_last_below_cannot_express_that_none_is_left() -> None:
    assert follow("last_below", 1, kept=(1, 2, 3)) == 0
    with pytest.raises(UnsupportedModelError, match="Keep one of blocks 0 to 1"):
        follow("last_below", 1, kept=(2, 3, 4))


def test_rescale_keeps_the_quotient() -> None:
    assert follow("rescale", 1.4) / 4**0.5 == pytest.approx(1.4 / 6**0.5)


@pytest.mark.parametrize(
    ("period", "phase", "kept", "fits"),
    [
        (2, 1, (0, 1, 4, 5), True),
        (2, 1, (0, 1, 2, 3, 4), True),
        (2, 1, (0, 2, 3, 4, 5), False),
        (2, 0, (2, 3, 4, 5), True),
        (2, 0, (1, 2, 3, 4), False),
        (3, 0, (0, 1, 2), True),
        (3, -1, (0, 4, 5), True),
        (3, -1, (0, 3, 4), False),
        (1, 0, (1, 5), True),
    ],
)
def test_must_match(period: int, phase: int, kept: tuple[int, ...], fits: bool) -> None:
    old = [(block + phase) % period == 0 for block in range(6)]
    assert ([old[block] for block in kept] == old[: len(kept)]) is fits, "the case itself is wrong"
    if fits:
        # Where the pattern fits, the list of exceptions is not needed.
        assert follow("must_match", period, kept, phase=phase) == period
        assert follow("must_match", period, kept, phase=phase, exceptions=()) == period
        return
    with pytest.raises(UnsupportedModelError, match=f"groups of {period} consecutive blocks"):
        follow("must_match", period, kept, phase=phase)
    assert follow("must_match", period, kept, phase=phase, exceptions=()) == 1


@pytest.mark.parametrize(
    ("kept", "exceptions", "expected"),
    [
        # Blocks 1, 3 and 5 are in the pattern; of (0, 2, 3, 5) the first two are not.
        (KEPT, (), [0, 1]),
        (KEPT, (3,), [0, 1, 2]),
        (KEPT, (1,), [0, 1]),
        ((1, 3, 5), (), []),
        ((1, 3, 5), None, []),
        ((0, 4), (5,), [0, 1]),
    ],
)
def test_exceptions_are_every_kept_block_outside_the_pattern(
    kept: tuple[int, ...], exceptions: tuple[int, ...] | None, expected: list[int]
) -> None:
    field = field_of(2, kept, phase=1, exceptions=exceptions)
    assert exceptions_written_out(field) == expected
    # What the written list says of each new block is what the old pattern said of it.
    before = [block % 2 == 1 and block not in (exceptions or ()) for block in kept]
    assert [new not in expected for new in range(len(kept))] == before


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, False), (False, False), (0, False), (0.0, False), ([], False), ({}, False)]
    + [(True, True), (1, True), (-1, True), ([0], True), ({"0": None}, True), ("full", True)],
)
def test_is_set(value: Any, expected: bool) -> None:
    assert is_set(value) is expected


def test_a_field_knows_where_the_kept_blocks_go() -> None:
    assert field_of(None).position == {0: 0, 2: 1, 3: 2, 5: 3}
    assert [field_of(3, phase=1).in_pattern(block) for block in range(6)] == [False, False, True] * 2
