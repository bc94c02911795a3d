# SPDX-License-Identifier: Apache-2.0
"""Plans of blocks, half-blocks and units, any number in a row, against carrying them out one by one; values alone."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

import pytest

from optimum_blockprune import PruningPlan
from optimum_blockprune.errors import PlanError
from optimum_blockprune.folds import Fold, Folds
from optimum_blockprune.half import Half
from optimum_blockprune.widths import CutTensor, Narrowing, UnitGroup, Width


HALVES = {"attn": "attention", "ffn": "mlp"}
WRITERS = {"attention": "attn.out", "mlp": "ffn.down"}
UNITS = {"attention": 4, "mlp": 6}


@dataclass(frozen=True)
class Part:
    """One half of a block of the model in some state.

    Attributes:
        half: Which half of the dense model it is.
        units: The units that it has left, in numbers of the dense model.
        maps: What was folded into it, in order.
    """

    half: Half
    units: tuple[int, ...]
    maps: tuple[str, ...] = ()


State = list[dict[str, Part]]


def dense(blocks: int) -> State:
    return [{part: Part(Half(block, part), tuple(range(UNITS[part]))) for part in UNITS} for block in range(blocks)]


def carried_out(state: State, plan: PruningPlan) -> State:
    """What one more plan leaves: blocks of two halves, which need not come from one block."""
    left = [{part: state[getattr(source, part)][part] for part in UNITS} for source in plan.blocks]
    for place, source in enumerate(plan.blocks):
        for part, before in left[place].items():
            block = getattr(source, part)
            kept = before.units
            for kind, narrowing in plan.width.of_block(block):
                if kind.writer == WRITERS[part]:
                    kept = tuple(before.units[unit] for unit in narrowing.kept)
            mine = [each for each in plan.folds.of_block(block) if each.module == WRITERS[part]]
            maps = (*before.maps, *(each.tensor.partition("+")[0] for each in mine))
            left[place][part] = Part(before.half, kept, maps)
    return left


def group(part: str, units: int) -> UnitGroup:
    writer = WRITERS[part]
    return UnitGroup(part, "channel", writer, units, {}, {}, (CutTensor(f"{writer}.weight", 1, (1,)),))


def removing(blocks: int, names: list[Half] | list[int], **fields: Any) -> PruningPlan:
    if names and isinstance(names[0], Half):
        return PruningPlan.from_halves("llama", blocks, names, HALVES, **fields)
    return PruningPlan.from_removed("llama", blocks, names, **fields)


def drawn(draw: random.Random, state: State, layout: str, step: int) -> PruningPlan:
    """A plan for what is left: blocks, a run of halves, or units of one family or both; sometimes with maps."""
    blocks = len(state)
    kind = draw.choice(["blocks", "halves", "units"] if blocks > 2 else ["units"])
    names: list[Any] = []
    width = Width()
    if kind == "blocks":
        names = draw.sample(range(blocks), draw.randint(1, 2))
    elif kind == "halves":
        length = 2 * draw.randint(1, 2)
        start = draw.randint(0, 2 * blocks - length)
        names = [Half(place // 2, ("attention", "mlp")[place % 2]) for place in range(start, start + length)]
    else:
        width = drawn_width(draw, state, layout)
    plan = removing(blocks, names, width=width, strategy=f"step{step}")
    maps: list[Fold] = []
    for source in plan.blocks if draw.random() < 0.4 else ():
        part = draw.choice(sorted(UNITS))
        name = f"{step}.{len(maps)}"
        maps.append(Fold(getattr(source, part), WRITERS[part], "diagonal", 0, 0.0, name))
    held = {each.tensor: _Value() for each in maps}
    return plan.with_provenance(folds=Folds(tuple(maps), "digest" if maps else "", held=held))


def drawn_width(draw: random.Random, state: State, layout: str) -> Width:
    groups: list[UnitGroup] = []
    narrowed: list[Narrowing] = []
    for part in draw.sample(sorted(UNITS), draw.randint(1, 2)):
        fewest = min(len(each[part].units) for each in state)
        count = max(1, fewest - draw.randint(0, 2))
        for block, each in enumerate(state):
            own = len(each[part].units)
            kind = group(part, own)
            if kind not in groups:
                groups.append(kind)
            keep = count if layout == "uniform" else draw.randint(1, own)
            kept = tuple(sorted(draw.sample(range(own), keep)))
            narrowed.append(Narrowing(block, groups.index(kind), kept))
    return Width(layout, tuple(groups), tuple(narrowed))


class _Value:
    """In the place of a tensor, whose values do not matter here."""


@pytest.fixture(autouse=True)
def no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum_blockprune.folds.digest_of", lambda held: "digest" if held else "")


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_joined_plans_are_what_they_were_one_by_one(layout: str) -> None:
    draw, seen = random.Random(layout), set()
    for _ in range(150):
        state, joined, whole = dense(8), None, []
        for step in range(5):
            plan = drawn(draw, state, layout, step)
            state = carried_out(state, plan)
            joined = plan if joined is None else joined.then(plan)
            whole.append(plan)
            assert carried_out(dense(8), joined) == state
            assert set(joined.folds.tensors()) == {each.tensor for each in joined.folds.entries}
        assert len(joined.folds.entries) == len(joined.folds.tensors())
        assert PruningPlan.from_dict(json.loads(json.dumps(joined.to_dict()))) == joined
        halved, split = any(plan.removed_halves for plan in whole), [abs(s.mlp - s.attention) for s in joined.blocks]
        assert bool(joined.removed_halves) == halved
        seen.add((bool(joined.width), halved, max(split) > 1, bool(joined.folds)))
    # Among them those that matter here.
    assert (True, True, True, True) in seen and (True, False, False, True) in seen


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_it_does_not_matter_which_are_joined_first(layout: str) -> None:
    draw = random.Random(layout)
    for _ in range(100):
        state, plans = dense(8), []
        for step in range(3):
            plans.append(drawn(draw, state, layout, step).with_provenance(folds=Folds()))
            state = carried_out(state, plans[-1])
        one, two, three = plans
        assert in_order(one.then(two.then(three))) == in_order(one.then(two).then(three))


def in_order(plan: PruningPlan) -> PruningPlan:
    """The plan with its units listed block by block: where halves moved, their order may be another."""
    width = plan.width
    narrowed = tuple(sorted(width.narrowed, key=lambda each: (each.block, each.group)))
    return plan.with_provenance(width=Width(width.layout, width.groups, narrowed))


def test_halves_of_joined_blocks() -> None:
    """Block 1 of the first result is 1.attention and 3.mlp."""
    names = ["1.mlp", "2.attention", "2.mlp", "3.attention"]
    first = removing(6, list(map(Half.read, names)))
    assert [(each.attention, each.mlp) for each in first.blocks] == [(0, 0), (1, 3), (4, 4), (5, 5)]
    whole = first.then(removing(4, [1]))
    assert whole.removed_names == (*names, "1.attention", "3.mlp") and whole.removed_blocks == (2, 1, 3)
    half = first.then(removing(4, [Half(1, "mlp"), Half(2, "attention")]))
    assert half.removed_names == (*names, "3.mlp", "4.attention") and half.removed_blocks == (2, 3)
    assert [(each.attention, each.mlp) for each in half.blocks] == [(0, 0), (1, 4), (5, 5)]
    before = removing(7, [3]).then(first)
    assert before.removed_names == ("3.attention", "3.mlp", "1.mlp", "2.attention", "2.mlp", "4.attention")
    assert first.old_place(1, "ffn.down") == 3 and first.old_place(1, "attn.out") == first.old_place(1, "") == 1
    assert first.new_place(3, "ffn.down") == 1 and first.new_place(3, "attn.out") is None


def test_halves_of_other_modules_are_refused() -> None:
    first = PruningPlan.from_halves("llama", 6, [Half(1, "mlp"), Half(2, "attention")], HALVES)
    names = {"attn": "mlp", "ffn": "attention"}
    second = PruningPlan.from_halves("llama", 5, [Half(1, "mlp"), Half(2, "attention")], names)
    with pytest.raises(PlanError, match=r"'attn' belongs to the attention half .* first plan .* two folders"):
        first.then(second)
    more = PruningPlan.from_halves("llama", 5, [Half(1, "mlp"), Half(2, "attention")], {**HALVES, "norm": "mlp"})
    assert first.then(more).halves == {**HALVES, "norm": "mlp"}
