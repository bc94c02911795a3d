# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from families import random_ids, tiny_model
from torch import Tensor, nn

from optimum_blockprune.batches import Batch
from optimum_blockprune.channel_sums import INPUT, OUTPUT, TokenSums, magnitudes
from optimum_blockprune.errors import UnsupportedModelError
from optimum_blockprune.runner import BlockRunner


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def everything(*rows: Tensor) -> Tensor:
    return rows[0]


@pytest.mark.parametrize("flat", [False, True])
def test_sums_leave_padding_out(flat: bool) -> None:
    sums, module, x = TokenSums(), nn.Identity(), normal(2, 3, 4)
    sums.watch("x", [(module, INPUT)], everything)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    sums.begin(mask)
    sums.visits[module](x.flatten(0, 1) if flat else x, None)
    assert sums.tokens == 4
    torch.testing.assert_close(sums.total("x"), x[mask].double().sum(0))
    torch.testing.assert_close(sums.mean("x"), x[mask].double().mean(0))


def test_sums_do_not_depend_on_the_batches() -> None:
    x, totals = normal(6, 3, 4), []
    for size in (1, 4, 6):
        sums, module = TokenSums(), nn.Identity()
        sums.watch("x", [(module, INPUT)], everything)
        for part in x.split(size):
            sums.begin(torch.ones(part.shape[:2], dtype=torch.bool))
            sums.visits[module](part, None)
        totals.append(sums.total("x"))
        assert (sums.tokens, sums.stored_values) == (18, 4)
    assert all(torch.allclose(total, totals[0], rtol=1e-15) for total in totals)


def test_several_sources_wait_for_the_last_and_keep_copies() -> None:
    sums, first, second = TokenSums(), nn.Identity(), nn.Identity()
    sums.watch("product", [(first, INPUT), (first, OUTPUT), (second, OUTPUT)], lambda a, b, c: a * b * c)
    sums.watch("input", [(first, INPUT)], everything)
    sums.begin(torch.ones(1, 3, dtype=torch.bool))
    a, b, c = (normal(1, 3, 4, seed=seed) for seed in range(3))
    expected = (a * b * c)[0].double().sum(0)
    sums.visits[first](a, (b, "cache"))
    assert sums.stored_values == 4 + 2 * 12
    a.zero_(), b.zero_()  # the model changes them in place
    sums.visits[second](c, c)
    torch.testing.assert_close(sums.total("product"), expected)
    assert sums.stored_values == 2 * 4


def test_a_new_batch_drops_what_was_left() -> None:
    sums, first, second = TokenSums(), nn.Identity(), nn.Identity()
    sums.watch("sum", [(first, INPUT), (second, INPUT)], lambda a, b: a + b)
    for _ in range(2):
        sums.begin(torch.ones(1, 2, dtype=torch.bool))
        sums.visits[first](normal(1, 2, 4), None)
    assert sums.stored_values == 2 * 4


def test_rows_must_be_the_tokens() -> None:
    sums, module = TokenSums(), nn.Identity()
    sums.watch("x", [(module, INPUT)], everything)
    sums.begin(torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(UnsupportedModelError, match="sees 2 rows where the batch has 3 tokens"):
        sums.visits[module](normal(2, 4), None)


def test_infinity_is_seen() -> None:
    sums, module = TokenSums(), nn.Identity()
    sums.watch("x", [(module, INPUT)], everything)
    for value, finite in ((1.0, True), (float("nan"), False)):
        sums.begin(torch.ones(1, 1, dtype=torch.bool))
        sums.visits[module](torch.full((1, 1, 2), value), None)
        assert sums.finite is finite


def test_magnitudes_are_wide() -> None:
    x = torch.tensor([-300.0, 2.0], dtype=torch.float16)
    assert magnitudes(x, "l1").tolist() == [300.0, 2.0]
    assert magnitudes(x, "l2").tolist() == [90000.0, 4.0]  # more than float16 holds
    assert magnitudes(x.double(), "l2").dtype == torch.float64


def test_with_the_runner() -> None:
    model, sums = tiny_model("llama", 2), TokenSums()
    writer = model.model.layers[1].mlp.down_proj
    sums.watch("x", [(writer, INPUT)], lambda x: magnitudes(x, "l1"))
    runner, caught = BlockRunner(model), []
    handle = writer.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    batch = Batch(random_ids())
    sums.begin(runner.positions(batch))
    runner.observe(batch, sums.visits, stop=1)
    handle.remove()
    torch.testing.assert_close(sums.total("x"), caught[-1].double().abs().sum((0, 1)))
