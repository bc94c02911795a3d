# SPDX-License-Identifier: Apache-2.0
"""Which units stay by their scores: as many as were asked for, the best ones, and no more by rounding."""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any

import pytest

from optimum_blockprune.errors import ConfigurationError, NonFiniteError
from optimum_blockprune.strategies.base import Place, WidthTask
from optimum_blockprune.strategies.ranking import FAMILY_CHOICES, check_choice, check_ranking, kept_units
from optimum_blockprune.widths import CutTensor, UnitGroup


def group(writer: str, units: int, family: str) -> UnitGroup:
    return UnitGroup(family, "channel", writer, units, {"size": 1}, tensors=(CutTensor(f"{writer}.weight", 1, (1,)),))


def task(
    units: int = 10,
    keep: int = 6,
    blocks: int = 3,
    *,
    heads: tuple[int, int] | None = None,
    layout: str = "per_layer",
    align: int = 1,
    protected: tuple[int, ...] = (),
) -> WidthTask:
    """Channels, and KV heads (units, keep) if asked for."""
    groups = [group("down", units, "mlp"), *([group("o", heads[0], "attention")] if heads else [])]
    sizes = [(units, keep), *([heads] if heads else [])]
    places = tuple(
        Place(block, number, full, full if block in protected else left, 1, block not in protected)
        for number, (full, left) in enumerate(sizes)
        for block in range(blocks)
    )
    allowed = tuple(tuple(range(1, each.units + 1)) for each in groups)
    return WidthTask(tuple(groups), places, layout, align, allowed)


def drawn(made: WidthTask, seed: object, values: int = 1000) -> dict[Place, list[float]]:
    """Random scores; few values make ties."""
    draw = random.Random(str(seed))
    return {place: [draw.randrange(values) / 8 for _ in range(place.units)] for place in made.free}


def counts(kept: dict[Place, tuple[int, ...]]) -> list[int]:
    return [len(units) for units in kept.values()]


def lost(made: WidthTask, scores: Any, kept: dict[Place, tuple[int, ...]]) -> list[float]:
    return sorted(scores[place][unit] for place in made.free for unit in range(place.units) if unit not in kept[place])


# As many in every place


def test_the_best_of_each_place_by_hand() -> None:
    made = task(units=5, keep=2, blocks=2, layout="uniform")
    one, two = made.places
    kept, details = kept_units(made, {one: [3.0, 1.0, 5.0, 4.0, 2.0], two: [9.0, 0.0, -1.0, 0.5, -7.0]}, "uniform")
    assert kept == {one: (2, 3), two: (0, 3)} and details == {}


@pytest.mark.parametrize("seed", range(8))
def test_no_other_choice_of_as_many_is_better(seed: int) -> None:
    made = task(units=6, keep=1 + seed % 6, blocks=2, layout="uniform")
    scores = drawn(made, seed)
    kept, _ = kept_units(made, scores, "uniform")
    for place in made.free:
        best = max(sum(scores[place][unit] for unit in each) for each in combinations(range(6), place.keep))
        assert sum(scores[place][unit] for unit in kept[place]) == best
        assert list(kept[place]) == sorted(set(kept[place])) and len(kept[place]) == place.keep


@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_of_equal_units_the_later_go(ranking: str) -> None:
    made = task(units=6, keep=3, blocks=1)
    (place,) = made.places
    assert kept_units(made, {place: [1.0] * 6}, ranking)[0] == {place: (0, 1, 2)}
    assert kept_units(made, {place: [1.0, 2.0, 1.0, 2.0, 1.0, 1.0]}, ranking)[0] == {place: (0, 1, 3)}


@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_protected_places_are_not_looked_at(ranking: str) -> None:
    made = task(protected=(0, 2))
    scores = drawn(made, 1)
    kept, _ = kept_units(made, scores, ranking)
    assert [place.block for place in kept] == [1] and counts(kept) == [6]


# In all


@pytest.mark.parametrize("seed", range(12))
def test_the_worst_of_all_go(seed: int) -> None:
    """Without floors and multiples, the places do not matter."""
    made = task(units=8, keep=5, blocks=4)
    scores = drawn(made, seed)
    kept, details = kept_units(made, scores, "global")
    order = sorted(score for place in made.free for score in scores[place])
    if min(counts(kept)) > 1:
        assert lost(made, scores, kept) == order[:12]
        assert details == {"thresholds": {"mlp": order[11]}}
    assert sum(counts(kept)) == 20


def test_no_place_loses_all() -> None:
    """The scores of block 0 are the lowest of all; a tenth of it stays, and the others make up for that."""
    made = task(units=20, keep=12, blocks=3)
    low, mid, high = made.places
    scores = {low: [float(unit) for unit in range(20)], mid: [100.0 + unit for unit in range(20)], high: [500.0] * 20}
    kept, details = kept_units(made, scores, "global")
    assert kept[low] == (18, 19)
    assert kept[mid] == tuple(range(6, 20)) and kept[high] == tuple(range(20))
    assert details == {"thresholds": {"mlp": 105.0}}


def test_the_floor_is_a_multiple() -> None:
    made = task(units=30, keep=16, blocks=2, align=4)
    low, high = made.places
    kept, _ = kept_units(made, {low: [0.0] * 30, high: [1.0] * 30}, "global")
    assert kept == {low: (0, 1, 2, 3), high: tuple(range(28))}  # a tenth of 30 is 3


@pytest.mark.parametrize(("keep", "expected"), [(11, [2, 20]), (10, [1, 19]), (1, [1, 1])])
def test_one_head_stays(keep: int, expected: list[int]) -> None:
    """Of channels it would be two of twenty."""
    made = task(heads=(20, keep), blocks=2)
    scores = {place: [float(place.block)] * place.units for place in made.places}
    kept, details = kept_units(made, scores, "global")
    assert [len(kept[place]) for place in made.places if place.group == 1] == expected
    assert details["thresholds"].keys() == {"mlp", "attention"}


@pytest.mark.parametrize("seed", range(10))
def test_families_are_ranked_apart(seed: int) -> None:
    made = task(units=12, keep=8, blocks=3, heads=(4, 3))
    scores = drawn(made, seed)
    # Scores of heads are of another size.
    scores |= {place: [1e6 + score for score in scores[place]] for place in made.places if place.group == 1}
    kept, details = kept_units(made, scores, "global")
    for number, total in ((0, 24), (1, 9)):
        places = [place for place in made.places if place.group == number]
        assert sum(len(kept[place]) for place in places) == total
        alone = task(units=12, keep=8, blocks=3) if number == 0 else None
        if alone:
            assert kept_units(alone, scores, "global")[0] == {place: kept[place] for place in places}
    assert details["thresholds"]["mlp"] < 1e6 < details["thresholds"]["attention"]


def test_several_groups_of_one_family_are_one_ranking() -> None:
    """Dense and shared channels, say."""
    groups = group("dense", 4, "mlp"), group("shared", 6, "mlp")
    places = Place(0, 0, 4, 2, 1), Place(1, 1, 6, 3, 1)
    made = WidthTask(groups, places, "per_layer", 1, ((1, 2, 3, 4), (1, 2, 3, 4, 5, 6)))
    kept, details = kept_units(made, {places[0]: [1.0, 2.0, 3.0, 4.0], places[1]: [5.0] * 6}, "global")
    assert kept == {places[0]: (3,), places[1]: (0, 1, 2, 3)}
    assert details == {"thresholds": {"mlp": 5.0}}


@pytest.mark.parametrize("align", [2, 4, 8])
@pytest.mark.parametrize("values", [1000, 3])
def test_multiples_keep_no_more_than_asked(align: int, values: int) -> None:
    for seed in range(60):
        draw = random.Random(f"{seed} {align}")
        units = draw.choice([16, 30, 48, 50])
        keep = draw.choice([*range(align, units, align)])
        made = task(units, keep, draw.randint(1, 6), align=align, protected=draw.choice([(), (0,)]))
        if not made.free:
            continue
        scores = drawn(made, seed, values)
        # Some blocks matter more.
        scores = {place: [score * (1 + place.block) for score in each] for place, each in scores.items()}
        floor = -(-max(1, -(-units // 10)) // align) * align
        if keep < floor:
            continue
        kept, details = kept_units(made, scores, "global")
        asked = sum(place.keep for place in made.free)
        assert sum(counts(kept)) <= asked
        # No block is left out for more than a multiple.
        assert sum(counts(kept)) > asked - align
        assert all(count % align == 0 or count == units for count in counts(kept))
        assert all(count >= floor for count in counts(kept))
        for place in made.free:
            out = [scores[place][unit] for unit in range(units) if unit not in kept[place]]
            assert not out or max(out) <= min(scores[place][unit] for unit in kept[place])
        assert details["thresholds"]["mlp"] == max(lost(made, scores, kept))


def test_the_larger_remainders_get_the_next_multiple() -> None:
    """13, 10 and 7 of 16 channels stay by their scores; in fours: 12 and two more fours for 10 and 7."""
    made = task(units=16, keep=10, blocks=3, align=4)
    low = {0: 3, 1: 6, 2: 9}
    scores = {place: [0.0] * low[place.block] + [1.0] * (16 - low[place.block]) for place in made.places}
    assert sum(low.values()) == 18
    kept, _ = kept_units(made, scores, "global")
    # Rounded down 12, 8, 4 are 24 of 30: one more four, for the larger remainder (3 of block 2).
    assert [len(kept[place]) for place in made.places] == [12, 8, 8]


def test_of_equal_remainders_the_first_block_gets_it() -> None:
    made = task(units=16, keep=6, blocks=2, align=4)
    scores = {place: [0.0] * 10 + [1.0] * 6 for place in made.places}
    kept, _ = kept_units(made, scores, "global")
    assert [len(kept[place]) for place in made.places] == [8, 4]


def test_a_place_that_keeps_all_keeps_its_odd_width() -> None:
    made = task(units=30, keep=24, blocks=2, align=8)
    kept, _ = kept_units(made, {place: [9.0 - 5 * place.block] * 30 for place in made.places}, "global")
    assert [len(kept[place]) for place in made.places] == [30, 16]


def test_nothing_to_remove_has_no_threshold() -> None:
    made = task(units=4, keep=4, blocks=2)
    kept, details = kept_units(made, drawn(made, 0), "global")
    assert counts(kept) == [4, 4] and details == {"thresholds": {}}
    protected = task(blocks=2, protected=(0, 1))
    assert kept_units(protected, {}, "global") == ({}, {"thresholds": {}})


def test_ranking_is_not_changed_by_the_order_of_places() -> None:
    made = task(units=9, keep=5, blocks=4)
    scores = drawn(made, 3, values=4)
    other = WidthTask(made.groups, made.places[::-1], made.layout, made.align, made.allowed)
    assert kept_units(other, scores, "global") == kept_units(made, scores, "global")


# Refusals


@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_nan_is_no_score(ranking: str) -> None:
    made = task()
    scores = drawn(made, 0)
    scores[made.places[1]][3] = float("nan")
    with pytest.raises(NonFiniteError, match="The scores of the units in block 1 are not numbers."):
        kept_units(made, scores, ranking)


@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_infinity_is_a_score(ranking: str) -> None:
    made = task(units=4, keep=2, blocks=1)
    (place,) = made.places
    kept, _ = kept_units(made, {place: [float("-inf"), 1.0, float("inf"), 2.0]}, ranking)
    assert kept == {place: (2, 3)}


def test_widths_of_their_own_need_a_layout_for_them() -> None:
    made = task(layout="uniform")
    with pytest.raises(ConfigurationError, match="ranking='global' gives every block its own width, which layout='un"):
        check_ranking(made, "global")
    with pytest.raises(ConfigurationError, match="use layout='padded' or 'per_layer'"):
        kept_units(made, drawn(made, 0), "global")
    for layout in ("padded", "per_layer"):
        check_ranking(task(layout=layout), "global")
    check_ranking(made, "uniform")


def test_unknown_choices_are_named() -> None:
    check_choice("x", "families", "both", FAMILY_CHOICES)
    with pytest.raises(ConfigurationError, match="Unknown families 'mpl' for x. Did you mean 'mlp'"):
        check_choice("x", "families", "mpl", FAMILY_CHOICES)


def test_a_floor_that_is_more_than_was_asked_for_is_refused() -> None:
    """Eight of 512 channels are asked for, but a tenth of them always stays."""
    made = task(units=512, keep=8, blocks=2, align=8)
    with pytest.raises(ConfigurationError):
        kept_units(made, drawn(made, 0), "global")
