# SPDX-License-Identifier: Apache-2.0
"""The right columns in the right order: every signal is held to what plain hooks or the weights themselves give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import block_list, random_ids, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from optimum_blockprune.batches import Batch
from optimum_blockprune.errors import UnsupportedModelError
from optimum_blockprune.measures import content_mask
from optimum_blockprune.runner import BlockRunner
from optimum_blockprune.signals import ACT_UP, PRODUCT, Capture, Channel, Signals, find_signals
from optimum_blockprune.trial import usable_units
from optimum_blockprune.widths import UnitGroup


BLOCK = 1


def group_of(runner: BlockRunner) -> UnitGroup:
    (group,), _ = usable_units(runner.stack, ("mlp",))
    return group


def captured(model: PreTrainedModel, kind: str, batches: list[Batch]) -> tuple[Tensor, Signals]:
    """Signals of one block, captured batch by batch, all tokens but the first of each window."""
    runner = BlockRunner(model)
    group = group_of(runner)
    signals = find_signals(runner.stack, {BLOCK: (group,)}, kind)[BLOCK, group.writer]
    masks = [content_mask(runner.positions(batch)) for batch in batches]
    capture = Capture(signals, sum(int(mask.sum()) for mask in masks))
    for batch, mask in zip(batches, masks, strict=True):
        capture.begin(mask)
        runner.observe(batch, capture.visits, stop=BLOCK)
    return capture.take(), signals


def hooked(model: PreTrainedModel, module: nn.Module, read: Callable[[Any, Any], Tensor], ids: Tensor) -> Tensor:
    """What a plain hook sees, for all tokens but the first of each window."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, args, output: seen.append(read(args[0], output).clone()))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    (values,) = seen
    values = values.reshape(*ids.shape, -1)
    return values[:, 1:].flatten(0, 1)


def halves(ids: Tensor) -> list[Batch]:
    """Two batches of different size."""
    return [Batch(ids[:1]), Batch(ids[1:])]


IDS = random_ids(3, 12)


def test_gated_halves_in_order() -> None:
    model = tiny_model("llama")
    values, signals = captured(model, ACT_UP, halves(IDS))
    mlp = block_list(model)[BLOCK].mlp
    a = hooked(model, mlp.act_fn, lambda _, output: output, IDS)
    u = hooked(model, mlp.up_proj, lambda _, output: output, IDS)
    torch.testing.assert_close(values, torch.cat([a, u], dim=1), rtol=1e-5, atol=1e-6)
    assert not signals.stands_in


def test_fused_halves() -> None:
    """The gate comes first in the signals wherever it lies in the fused projection."""
    model = tiny_model("phi3")
    values, _ = captured(model, ACT_UP, halves(IDS))
    mlp = block_list(model)[BLOCK].mlp
    fused = hooked(model, mlp.gate_up_proj, lambda _, output: output, IDS)
    gate, up = fused.chunk(2, dim=1)
    torch.testing.assert_close(values, torch.cat([F.silu(gate), up], dim=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("family", "writer"), [("gpt2", "mlp.c_proj"), ("opt", "fc2"), ("gpt_neox", None)])
def test_one_reader_gives_the_input_of_the_writer(family: str, writer: str | None) -> None:
    model = tiny_model(family)
    values, signals = captured(model, ACT_UP, halves(IDS))
    block = block_list(model)[BLOCK]
    truth = hooked(model, block.get_submodule(writer or "mlp.dense_4h_to_h"), lambda given, _: given, IDS)
    torch.testing.assert_close(values, truth, rtol=1e-5, atol=1e-6)
    assert not signals.stands_in
    assert len(signals.channels) == 1


def test_product_is_the_input_of_the_writer() -> None:
    model = tiny_model("llama")
    values, signals = captured(model, PRODUCT, halves(IDS))
    truth = hooked(model, block_list(model)[BLOCK].mlp.down_proj, lambda given, _: given, IDS)
    torch.testing.assert_close(values, truth, rtol=1e-5, atol=1e-6)
    assert not signals.stands_in


def test_an_activation_that_is_no_module() -> None:
    """A usual function is recognised by what it does; another one is not, and the writer's input stands in."""
    model = tiny_model("llama")
    before, _ = captured(model, ACT_UP, halves(IDS))
    for block in block_list(model):
        del block.mlp.act_fn
        block.mlp.act_fn = F.silu
    after, signals = captured(model, ACT_UP, halves(IDS))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert not signals.stands_in
    for block in block_list(model):
        block.mlp.act_fn = lambda gate: torch.sin(3 * gate) + 0.3 * gate
    odd, signals = captured(model, ACT_UP, halves(IDS))
    assert signals.stands_in
    truth = hooked(model, block_list(model)[BLOCK].mlp.down_proj, lambda given, _: given, IDS)
    torch.testing.assert_close(odd, truth, rtol=1e-5, atol=1e-6)


def test_padding_does_not_count() -> None:
    model = tiny_model("llama")
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[0, 8:] = False
    values, _ = captured(model, ACT_UP, [Batch(IDS.masked_fill(~mask, 0), mask)])
    whole, _ = captured(model, ACT_UP, [Batch(IDS)])
    keep = mask[:, 1:].flatten()
    assert len(values) == int(keep.sum()) < len(whole)
    torch.testing.assert_close(values, whole[keep], rtol=1e-4, atol=1e-5)


def test_the_largest_of_a_units_columns() -> None:
    signals = Signals(3, (Channel(nn.Identity(), None, None),) * 2)
    assert signals.per_unit(torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0, 6.0])).tolist() == [4.0, 5.0, 6.0]


def test_half_precision_stays_as_it_is() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    values, _ = captured(model, ACT_UP, halves(IDS))
    assert values.dtype == torch.bfloat16


def identity(units: int, module: nn.Module) -> Signals:
    return Signals(units, (Channel(module, lambda incoming, _: incoming, lambda rows: rows),))


def test_a_module_that_sees_other_rows_is_refused() -> None:
    module = nn.Identity()
    capture = Capture(identity(4, module), 6)
    capture.begin(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(UnsupportedModelError, match="sees 5 rows where the batch has 6"):
        capture.visits[module](torch.ones(5, 4), None)


@pytest.mark.parametrize("runs", [0, 2])
def test_a_module_that_does_not_run_once_is_refused(runs: int) -> None:
    module = nn.Identity()
    capture = Capture(identity(4, module), 6)
    capture.begin(torch.ones(2, 3, dtype=torch.bool))
    for _ in range(runs):
        capture.visits[module](torch.ones(2, 3, 4), None)
    with pytest.raises(UnsupportedModelError, match="do not run once per pass"):
        capture.take()


def test_what_is_taken_is_held_no_longer() -> None:
    module = nn.Identity()
    capture = Capture(identity(4, module), 6)
    capture.begin(torch.ones(2, 3, dtype=torch.bool))
    values = torch.arange(24.0).view(2, 3, 4)
    capture.visits[module](values, None)
    assert capture.stored_values == 24
    taken = capture.take()
    values.zero_()
    assert torch.equal(taken, torch.arange(24.0).view(6, 4))
    assert capture.stored_values == 0
