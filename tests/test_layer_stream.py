# SPDX-License-Identifier: Apache-2.0
"""The stream arrives where an ordinary pass does, every block runs once, and groups do not depend on batches."""

from __future__ import annotations

import pytest
import torch
from families import block_list, random_ids, tiny_model
from torch import Tensor
from toys import TextPositions

from optimum_blockprune.batches import Batch, CalibrationWindows
from optimum_blockprune.layer_stream import LayerStream, counted_tokens
from optimum_blockprune.runner import BlockRunner


def windows_of(count: int, length: int = 12, mask: Tensor | None = None) -> CalibrationWindows:
    return CalibrationWindows.from_tokens(random_ids(count, length), mask, source="test")


def stream_of(runner: BlockRunner, windows: CalibrationWindows, **changes: object) -> LayerStream:
    settings = {"groups": 2, "batch_size": 2, "keep_first": False, "max_tokens": 4096}
    return LayerStream(runner, windows, **{**settings, **changes})


def test_blocks_run_once_and_give_what_the_model_gives() -> None:
    model, windows = tiny_model("llama"), windows_of(5)
    runner = BlockRunner(model)
    stream = stream_of(runner, windows)
    truth: list[Tensor] = []
    handle = block_list(model)[3].mlp.register_forward_hook(lambda _, args, output: truth.append(output))
    with torch.no_grad():
        model(windows.input_ids, use_cache=False)
    handle.remove()
    seen: list[Tensor] = []

    def see(_incoming: Tensor, outgoing: Tensor) -> None:
        seen.append(outgoing.clone())

    for block in (0, 1, 3):  # block 2 runs on the way
        for group in stream.groups:
            stream.advance(group, block, {block_list(model)[block].mlp: see}, lambda mask: None)
    torch.testing.assert_close(torch.cat(seen[-len(seen) // 3 :]), truth[0], rtol=1e-4, atol=1e-5)
    assert runner.counters.block_forwards == 4 * 5
    assert runner.counters.head_forwards == 0
    assert stream.stored_values == 5 * 12 * 32


def test_masks_come_with_their_batches() -> None:
    mask = torch.ones(5, 12, dtype=torch.bool)
    mask[1, 7:] = False
    runner, windows = BlockRunner(tiny_model("llama")), windows_of(5, mask=mask)
    stream = stream_of(runner, windows)
    seen: list[Tensor] = []
    for group in stream.groups:
        stream.advance(group, 0, {}, seen.append)
    assert torch.equal(torch.cat(seen), mask & (torch.arange(12) > 0))
    assert [group.tokens for group in stream.groups] == [11 + 6, 33]


@pytest.mark.parametrize("batch_size", [1, 2, 7])
@pytest.mark.parametrize(("groups", "sizes"), [(1, [7]), (2, [3, 4]), (4, [1, 2, 2, 2]), (9, [1] * 7)])
def test_groups_are_the_same_whatever_the_batches(batch_size: int, groups: int, sizes: list[int]) -> None:
    windows = windows_of(7)
    stream = stream_of(TextPositions(), windows, groups=groups, batch_size=batch_size)
    found = [torch.cat([batch.input_ids for batch in group.batches]) for group in stream.groups]
    assert [len(each) for each in found] == sizes
    assert torch.equal(torch.cat(found), windows.input_ids)
    assert max(len(batch.input_ids) for group in stream.groups for batch in group.batches) <= batch_size


def test_what_comes_with_the_windows_is_split_as_well() -> None:
    ids = random_ids(3, 4)
    extra = {"pixels": tuple(torch.full((1, 2), float(number)) for number in range(3))}
    windows = CalibrationWindows.from_tokens(ids, source="test", extra=extra, labels=ids)
    stream = stream_of(TextPositions(), windows, groups=3)
    assert [group.batches[0].extra["pixels"].tolist() for group in stream.groups] == [
        [[n, n]] for n in (0.0, 1.0, 2.0)
    ]
    assert torch.equal(torch.cat([group.batches[0].labels for group in stream.groups]), ids)


def test_the_check_counts_nothing() -> None:
    runner = BlockRunner(tiny_model("llama", 3))
    stream_of(runner, windows_of(2)).check()
    assert runner.counters.block_forwards == 0


# --- which tokens count ----------------------------------------------------------------------------------------------


def test_first_tokens_count_on_demand() -> None:
    batch = Batch(random_ids(2, 5))
    without, whole = (counted_tokens(TextPositions(), [batch], keep, 100)[0] for keep in (False, True))
    assert without.sum(1).tolist() == [4, 4]
    assert not without[:, 0].any()
    assert whole.all()


@pytest.mark.parametrize("most", [1, 7, 10, 31, 32, 33])
def test_the_most_are_spread_evenly(most: int) -> None:
    ids = random_ids(4, 9)
    whole = torch.cat(counted_tokens(TextPositions(), [Batch(ids)], False, most))
    parts = torch.cat(counted_tokens(TextPositions(), [Batch(ids[:1]), Batch(ids[1:])], False, most))
    assert torch.equal(whole, parts)
    chosen = whole[:, 1:].flatten().nonzero().squeeze(1)
    assert len(chosen) == min(most, 32) == int(whole.sum())
    gaps = chosen.diff()
    assert not len(gaps) or int(gaps.max() - gaps.min()) <= 1


def test_no_tokens_at_all() -> None:
    assert not torch.cat(counted_tokens(TextPositions(), [Batch(random_ids(3, 1))], False, 5)).any()
