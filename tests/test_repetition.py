# SPDX-License-Identifier: Apache-2.0
"""Repetition is counted as published, and collapsed text is told from fair text on measured figures."""

from __future__ import annotations

from typing import Any

import pytest

from optimum_blockprune.repetition import degenerated, distinct, repetition_rate


# Measured: SmolLM2-135M-Instruct, 20 continuations of WikiText-2, 64 tokens each, so many blocks less.
MEASURED = {
    "dense": (0.469, 0.346, 1242),
    "1 by sleb": (0.523, 0.306, 1270),
    "3 by sleb": (0.61, 0.227, 1280),
    "6 by sleb": (0.838, 0.116, 1280),
    "8 by sleb": (0.775, 0.11, 1280),
    "10 by sleb": (0.793, 0.096, 1280),
    "12 by sleb": (0.784, 0.12, 1280),
    "15 by sleb": (0.246, 0.549, 1280),
    "the last 3": (0.506, 0.137, 1280),
    "block 11": (0.87, 0.102, 1280),
    "6 at random": (0.485, 0.287, 1280),
    "the last 6": (0.905, 0.026, 1280),
}


def figures(name: str) -> dict[str, Any]:
    return dict(zip(("repetition", "distinct_2", "tokens"), MEASURED[name], strict=True))


@pytest.mark.parametrize(
    ("tokens", "n", "rate"),
    [
        ([1, 2, 3, 4, 5], 4, 0.0),
        ([1] * 64, 4, 60 / 61),
        ([1, 2, 1, 2, 1, 2, 1, 2], 4, 3 / 5),
        ([1, 2, 1], 1, 1 / 3),
        ([1, 2, 3], 4, 0.0),
        ([], 4, 0.0),
        (["a", "b", "a", "b"], 2, 1 / 3),
    ],
)
def test_repetition_is_the_share_of_repeated_n_grams(tokens: list[Any], n: int, rate: float) -> None:
    assert repetition_rate(tokens, n) == pytest.approx(rate, abs=1e-12)


def test_four_grams_unless_told_otherwise() -> None:
    tokens = [1, 2, 3, 9, 1, 2, 3, 8]
    assert repetition_rate(tokens) == repetition_rate(tokens, 4) == 0
    assert repetition_rate(tokens, 3) == pytest.approx(1 / 6)


def test_distinct_counts_over_all_continuations_and_none_across_two() -> None:
    assert distinct([[1, 2], [1, 2]], 1) == 0.5
    assert distinct([[1, 2], [2, 3]], 2) == 1.0  # (2, 2) would be a third
    assert distinct([[1, 2, 3], [1, 2, 4]], 2) == 0.75
    assert distinct([[1], []], 2) == distinct([], 1) == 0.0


@pytest.mark.parametrize("name", ["dense", "1 by sleb", "3 by sleb"])
def test_fair_text_is_not_called_collapsed(name: str) -> None:
    assert degenerated(figures(name), figures("dense")) is None
    assert degenerated(figures(name)) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("6 by sleb", "84% of the 4-grams that it writes are repeats (the dense model: 47%)"),
        ("8 by sleb", "78% of the 4-grams"),
        ("10 by sleb", "79% of the 4-grams"),
        ("12 by sleb", "78% of the 4-grams"),
        ("block 11", "87% of the 4-grams"),
        ("the last 6", "90% of the 4-grams"),
        ("the last 3", "14% of the 2-grams that it writes are distinct (the dense model: 35%)"),
        (
            "15 by sleb",
            "55% of the 2-grams that it writes are distinct (the dense model: 35%), as of words in no order",
        ),
    ],
)
def test_collapsed_text_is_named_beside_the_dense_model(name: str, said: str) -> None:
    assert degenerated(figures(name), figures("dense")).startswith(said)


@pytest.mark.parametrize("name", ["6 by sleb", "8 by sleb", "10 by sleb", "12 by sleb", "block 11", "the last 6"])
def test_loops_are_seen_without_the_dense_model(name: str) -> None:
    assert "4-grams that it writes are repeats" in degenerated(figures(name))


def test_nonsense_that_repeats_itself_as_the_dense_model_does_is_not_seen() -> None:
    """Its perplexity is 1,756; the docstring says so."""
    assert degenerated(figures("6 at random"), figures("dense")) is None


def test_a_model_that_ends_at_once_is_named() -> None:
    ended = {"repetition": 0.0, "distinct_2": 0.0, "tokens": 20}
    assert degenerated(ended, figures("dense")) == "it writes 20 tokens and ends (the dense model: 1,242)"
    # Reports of others may not count tokens.
    untold = {name: value for name, value in figures("3 by sleb").items() if name != "tokens"}
    assert degenerated(untold, figures("dense")) is None
    assert degenerated(figures("3 by sleb"), untold) is None
