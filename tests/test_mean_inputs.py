# SPDX-License-Identifier: Apache-2.0
"""Means of what goes into a module, over real tokens, however windows are batched."""

from __future__ import annotations

import pytest
import torch
from contexts import context_of
from families import random_ids, tiny_model

from optimum_blockprune.batches import CalibrationWindows
from optimum_blockprune.errors import NonFiniteError
from optimum_blockprune.mean_inputs import mean_inputs


def seen_by_hand(model: torch.nn.Module, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """Inputs of every block's last MLP projection, [tokens, channels]."""
    seen: dict[int, list[torch.Tensor]] = {}
    handles = [
        block.mlp.c_proj.register_forward_pre_hook(
            lambda _module, args, number=number: seen.setdefault(number, []).append(args[0].flatten(0, 1))
        )
        for number, block in enumerate(model.transformer.h)
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return {number: torch.cat(rows) for number, rows in seen.items()}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_mean_of_every_input(batch_size: int) -> None:
    model, ids = tiny_model("gpt2", 3), random_ids(4, 10)
    windows = CalibrationWindows.from_tokens(ids, source="random")
    modules = {number: block.mlp.c_proj for number, block in enumerate(model.transformer.h)}
    done: list[int] = []
    means = mean_inputs(context_of(model, windows, batch_size=batch_size), modules, done.append)
    assert sum(done) == 4
    for number, rows in seen_by_hand(model, ids).items():
        torch.testing.assert_close(means[number], rows.double().mean(0), rtol=1e-6, atol=1e-7)


def test_padding_does_not_count() -> None:
    model, ids = tiny_model("gpt2", 2), random_ids(2, 10)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 6:] = False
    padded = CalibrationWindows.from_tokens(ids, mask, source="padded")
    short = CalibrationWindows.from_tokens(ids[:, :6], source="short")
    modules = {0: model.transformer.h[1].mlp.c_proj}
    found = [mean_inputs(context_of(model, each), modules)[0] for each in (padded, short)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_infinite_inputs_are_refused() -> None:
    model = tiny_model("gpt2", 2)
    model.transformer.h[1].mlp.c_fc.bias.data[0] = float("inf")
    windows = CalibrationWindows.from_tokens(random_ids(1, 8), source="random")
    with pytest.raises(NonFiniteError, match="block 1"):
        mean_inputs(context_of(model, windows), {0: model.transformer.h[1].mlp.c_proj})
