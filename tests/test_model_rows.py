# SPDX-License-Identifier: Apache-2.0
"""Rows that hold a model's own inputs become windows, one each, with nothing cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from optimum_blockprune.batches import CalibrationWindows
from optimum_blockprune.errors import CalibrationError
from optimum_blockprune.model_rows import RowInputs, is_model_row, windows_from_rows


IMAGES = RowInputs(frozenset({"pixel_values", "token_type_ids"}))
SOUND = RowInputs(frozenset({"input_features"}), two_stacks=True, start=7)
PAIRS = RowInputs(frozenset({"input_ids", "attention_mask"}), two_stacks=True, start=7)


def windows(rows: list[dict[str, Any]], inputs: RowInputs, seqlen: int = 16) -> CalibrationWindows:
    return windows_from_rows(rows, inputs, source="rows", seqlen=seqlen)


def ids(*tokens: int) -> Tensor:
    return torch.tensor([tokens])


@pytest.mark.parametrize(
    ("row", "inputs", "expected"),
    [
        ({"input_ids": [1, 2], "pixel_values": 0}, IMAGES, True),
        ({"input_ids": [1, 2]}, IMAGES, False),
        ({"pixel_values": 0}, IMAGES, False),
        ({"input_ids": [1, 2], "labels": [3]}, IMAGES, False),
        ({"input_features": 0, "labels": [3]}, SOUND, True),
        ({"input_features": 0}, SOUND, False),
        ({"input_ids": [1], "decoder_input_ids": [3]}, PAIRS, True),
        ({"input_ids": [1], "attention_mask": [1]}, PAIRS, False),
    ],
)
def test_which_rows_are_the_models_own(row: dict[str, Any], inputs: RowInputs, expected: bool) -> None:
    assert is_model_row(row, inputs) is expected


def test_images_go_with_their_tokens() -> None:
    pixels = [torch.full((1, 3, 2, 2), float(number)) for number in range(3)]
    rows = [
        {"input_ids": ids(5, 6, 8), "pixel_values": pixels[0]},
        {"input_ids": ids(5, 6, 8, 9, 10), "pixel_values": torch.cat(pixels[1:])},
    ]
    made = windows(rows, IMAGES)
    assert made.input_ids.tolist() == [[5, 6, 8, 0, 0], [5, 6, 8, 9, 10]]
    assert made.attention_mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert (made.source, made.num_tokens, set(made.extra)) == ("rows", 8, {"pixel_values"})
    # A batch joins the pixels; a window may have several images.
    first, second = made.batches(1)
    assert torch.equal(first.extra["pixel_values"], pixels[0])
    assert torch.equal(second.extra["pixel_values"], torch.cat(pixels[1:]))
    assert torch.equal(next(made.batches(2)).extra["pixel_values"], torch.cat(pixels))
    other = windows([{**rows[0], "pixel_values": pixels[2]}, rows[1]], IMAGES)
    assert torch.equal(other.input_ids, made.input_ids) and other.fingerprint != made.fingerprint


def test_inputs_with_an_entry_per_token_are_filled_up() -> None:
    pixels = torch.zeros(1, 1)
    rows = [
        {"input_ids": ids(*tokens), "pixel_values": pixels, "token_type_ids": torch.ones(1, len(tokens))}
        for tokens in ((3, 4), (3, 4, 5, 6))
    ]
    made = windows(rows, IMAGES)
    assert [tensor.tolist() for tensor in made.extra["token_type_ids"]] == [[[1, 1, 0, 0]], [[1, 1, 1, 1]]]
    assert [tensor.shape for tensor in made.extra["pixel_values"]] == [(1, 1), (1, 1)]


def test_shorter_rows_are_filled_up() -> None:
    rows = [{"input_ids": [3, 4, 5], "pixel_values": [[0.0]]}, {"input_ids": [3, 4], "pixel_values": [[0.0]]}]
    made = windows(rows, IMAGES)
    assert made.input_ids.tolist() == [[3, 4, 5], [3, 4, 0]]
    assert made.attention_mask.tolist() == [[True] * 3, [True, True, False]]


def test_sound_and_its_transcript() -> None:
    features = [torch.randn(1, 4, 6) for _ in range(2)]
    rows = [
        {"input_features": features[0], "labels": ids(20, 21, -100)},
        {"input_features": features[1], "decoder_input_ids": ids(7, 30)},
    ]
    made = windows(rows, SOUND)
    assert made.input_ids.tolist() == [[7, 20, 21], [7, 30, 0]]
    assert torch.equal(next(made.batches(2)).extra["input_features"], torch.cat(features))


def test_a_text_and_its_answer() -> None:
    rows = [
        {"input_ids": [11, 12, 13], "labels": [20, 21]},
        {"input_ids": [14], "labels": [22], "attention_mask": [1]},
    ]
    made = windows(rows, PAIRS)
    batch = next(made.batches(2))
    assert batch.input_ids.tolist() == [[7, 20, 21], [7, 22, 0]]
    assert batch.extra["input_ids"].tolist() == [[11, 12, 13], [14, 0, 0]]
    assert batch.extra["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    # Without padding there is nothing to mask.
    assert set(windows([rows[0], rows[0]], PAIRS).extra) == {"input_ids"}


@pytest.mark.parametrize(
    ("row", "inputs", "message"),
    [
        (
            {"input_ids": list(range(3, 20)), "pixel_values": [[0.0]]},
            IMAGES,
            r"Row 1 has 17 tokens; 2 to 16 \(seqlen\)",
        ),
        ({"input_ids": [3], "pixel_values": [[0.0]]}, IMAGES, "Row 1 has 1 tokens"),
        ({"input_ids": [3, 4]}, IMAGES, "Row 1 has no 'pixel_values', but rows before it have"),
        ({"pixel_values": [[0.0]]}, IMAGES, "Row 1 has no 'input_ids'"),
        ({"input_ids": [3, 4], "pixel_values": "a.png"}, IMAGES, "Row 1: 'pixel_values' is not a tensor"),
    ],
)
def test_rows_that_do_not_fit_are_refused(row: dict[str, Any], inputs: RowInputs, message: str) -> None:
    good = {"input_ids": [3, 4, 5], "pixel_values": [[0.0]]}
    with pytest.raises(CalibrationError, match=message):
        windows([good, row], inputs)


def test_an_answer_that_is_missing_or_empty_is_refused() -> None:
    good = {"input_ids": [3, 4], "labels": [5]}
    with pytest.raises(CalibrationError, match="Row 1 has no 'labels'"):
        windows([good, {"input_ids": [3, 4]}], PAIRS)
    with pytest.raises(CalibrationError, match="Row 1 has 1 tokens"):
        windows([good, {"input_ids": [3, 4], "labels": [-100]}], PAIRS)
