# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace

from optimum_blockprune.plan import PruningPlan
from optimum_blockprune.strategies.base import NoOptions, SearchContext
from optimum_blockprune.strategies.random_blocks import Random


def draw(seed: int, removable: tuple[int, ...] = tuple(range(1, 9)), num_remove: int = 3) -> PruningPlan:
    context = SearchContext(
        runner=SimpleNamespace(num_blocks=10),
        windows=None,
        options=NoOptions(),
        num_remove=num_remove,
        removable=removable,
        batch_size=1,
        seed=seed,
        progress=lambda total, description: None,
        provenance={"model_type": "fake", "strategy": "random"},
    )
    return Random().select(context)


def test_draws_removable_blocks_without_data() -> None:
    assert not Random.needs_data and not Random.needs_loss
    for seed in range(50):
        removed = draw(seed).removed_blocks
        assert len(set(removed)) == 3
        assert set(removed) <= set(range(1, 9))


def test_the_seed_alone_decides() -> None:
    random.seed(1)
    first = draw(5)
    random.seed(2)
    assert draw(5) == first
    assert first.seed == 5
    assert len({draw(seed).removed_blocks for seed in range(20)}) > 10


def test_all_removable_blocks_may_go() -> None:
    assert sorted(draw(0, removable=(2, 4, 7)).removed_blocks) == [2, 4, 7]


def test_every_block_has_the_same_chance() -> None:
    counts = Counter(block for seed in range(800) for block in draw(seed).removed_blocks)
    assert set(counts) == set(range(1, 9))
    assert all(240 <= count <= 360 for count in counts.values())  # 300 expected, standard deviation 14
