# SPDX-License-Identifier: Apache-2.0
"""Further inputs and labels go with their windows, through batches, choices and fingerprints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import random_ids

from optimum_blockprune.batches import Batch, CalibrationWindows


def windows(**changes: Any) -> CalibrationWindows:
    """Three windows; the second one has two images."""
    ids = random_ids(3, 4)
    given: dict[str, Any] = {
        "extra": {"pixels": tuple(torch.full((count, 2), float(count)) for count in (1, 2, 1))},
        "labels": torch.where(torch.arange(4) == 2, ids, -100),
        **changes,
    }
    return CalibrationWindows.from_tokens(ids, source="rows", **given)


def test_a_batch_joins_what_goes_with_its_windows() -> None:
    first, second = windows().batches(2)
    assert first.extra["pixels"].tolist() == [[1, 1], [2, 2], [2, 2]]
    assert second.extra["pixels"].tolist() == [[1, 1]]
    assert torch.equal(torch.cat([first.labels, second.labels]), windows().labels)


def test_a_choice_of_windows_takes_along_what_is_theirs() -> None:
    few = windows().first(2)
    assert few.num_windows == 2 and len(few.extra["pixels"]) == len(few.labels) == 2
    assert few.fingerprint != windows().fingerprint
    assert windows().first(3).fingerprint == windows().fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": None},
        {"labels": torch.full((3, 4), -100)},
        {"extra": None},
        {"extra": {"pixels": tuple(torch.full((count, 2), 9.0) for count in (1, 2, 1))}},
        {"attention_mask": torch.tensor([[True] * 4, [True] * 4, [True, True, False, False]])},
    ],
)
def test_whatever_the_model_reads_changes_the_fingerprint(changes: dict[str, Any]) -> None:
    assert windows(**changes).fingerprint != windows().fingerprint == windows().fingerprint


def test_half_precision_has_a_fingerprint() -> None:
    pixels = (torch.ones(1, 2, dtype=torch.bfloat16),) * 3
    assert windows(extra={"pixels": pixels}).fingerprint == windows(extra={"pixels": pixels}).fingerprint


def test_rows_of_a_batch() -> None:
    ids = random_ids(3, 4)
    mask = torch.arange(12).view(3, 4) > 1
    shared = torch.ones(1, 5)
    batch = Batch(ids, mask, {"states": torch.arange(3.0), "shared": shared}, labels=ids)
    part = batch.rows(slice(1, 3))
    assert torch.equal(part.input_ids, ids[1:]) and torch.equal(part.attention_mask, mask[1:])
    assert part.extra["states"].tolist() == [1.0, 2.0] and part.extra["shared"] is shared
    assert torch.equal(part.labels, ids[1:])
    assert Batch(ids).rows(slice(0, 1)).attention_mask is Batch(ids).rows(slice(0, 1)).labels is None


def test_all_of_a_batch_goes_to_the_device() -> None:
    ids = random_ids(2, 4)
    batch = Batch(ids, ids > 0, {"pixels": torch.ones(2)}, labels=ids)
    there = batch.to("meta")
    tensors = (there.input_ids, there.attention_mask, there.extra["pixels"], there.labels)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert batch.input_ids.device.type == batch.extra["pixels"].device.type == "cpu"
    assert Batch(ids).to("meta").attention_mask is None
