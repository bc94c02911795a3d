# SPDX-License-Identifier: Apache-2.0
"""Reports that somebody edited: refused when they are read, or good for a card, a page and pictures."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from fuzzing import FUZZ, SCALARS, VALUES, mutated
from hypothesis import given, settings

from optimum_blockprune import PruningPlan, PruningReport
from optimum_blockprune.card import model_card
from optimum_blockprune.errors import CheckpointError
from optimum_blockprune.page import page
from optimum_blockprune.pictures import PICTURES, alt_texts, draw_pictures


PLAN = PruningPlan.from_removed("llama", 6, [4, 1], base_model="me/dense", strategy="sleb")
GENERATION = {"continuations": 4, "prompt_tokens": 8, "new_tokens": 16, "repetition": 0.2, "distinct_2": 0.6}
TEXT = {"source": "a.txt", "fingerprint": "2067cafe", "windows": 2, "seqlen": 128, "tokens": 254}
MEASURED = {**TEXT, "perplexity": 29.5, "nll": 3.4, "kl": 0.1, "blocks": 6, "parameters": 9000, "size_bytes": 99}
TASK = {"task": "arc_easy", "samples": 137, "metrics": {"acc": 0.6, "acc_stderr": 0.05}, "primary": "acc"}
GOOD: dict[str, Any] = PruningReport(
    requested={"num_blocks": 2},
    achieved={
        "blocks_before": 6,
        "blocks_after": 4,
        "parameters_removed": 0.1,
        "units": {"mlp": {"before": 9, "after": 6}},
    },
    strategy="sleb",
    removed_blocks=[4, 1],
    block_forwards=3136,
    naive_block_forwards=5900,
    tokens=256,
    calibration=dict(TEXT),
    seconds={"search": 67.61},
    peak_memory_bytes=1_154_752_512,
    device="cpu",
    strategy_details={"dense_loss": 2.8},
    verification={"mode": "logits", "passed": True},
    loader="AutoModelForCausalLM",
    task="text-generation",
    runtimes={"vllm": {"verdict": "same", "reason": "it reads the same fields"}},
    options={"search": "prefix"},
    seed=7,
    scores={"1": 2.9, "2": 3.1, "3": 3.4, "4": 2.85},
    steps=[
        {"block": 4, "loss": 2.85, "perplexity": 17.29, "candidates": {"1": 2.9, "2": 3.1, "4": 2.85}},
        {"block": 1, "loss": 2.95, "perplexity": 19.11, "candidates": {"1": 2.95, "2": 3.2}},
    ],
    widths={"mlp": {"units": 9, "kept": [6, None, 5, 6, None, 6]}},
    base={"model": "me/dense", "revision": "93efa2f", "license": "apache-2.0", "language": ["en"]},
    history=[{"strategy": "shortgpt", "removed_blocks": [3], "num_blocks": 7, "base_model": "me/denser"}],
    command="optimum-cli blockprune run -m me/dense out",
    depths=[{**MEASURED, "removed": count, "perplexity": 11.5 + count} for count in range(3)],
    evaluations=[{**MEASURED, "label": label, "generation": dict(GENERATION)} for label in ("dense", "pruned")],
    task_results=[{**TASK, "label": label} for label in ("dense", "pruned")],
    versions={"torch": "2.13.0"},
).to_dict()


def read(data: Any) -> PruningReport | None:
    """The report; `None` where it is refused."""
    try:
        return PruningReport.from_dict(data)
    except CheckpointError as error:
        assert "malformed" in str(error)
        return None


def test_the_good_report_is_read() -> None:
    assert PruningReport.from_dict(json.loads(json.dumps(GOOD))).to_dict() == GOOD


@given(mutated(GOOD, values=SCALARS) | mutated(GOOD, values=VALUES))
@settings(FUZZ, max_examples=400)
def test_words(data: Any) -> None:
    """The card and the words for pictures: what is read can be written."""
    report = read(data)
    if report is not None:
        card = str(model_card(PLAN, report, title="smaller", pictures=list(PICTURES)))
        assert card.encode() and alt_texts(report).keys() <= PICTURES.keys()


@given(mutated(GOOD, values=SCALARS))
@settings(FUZZ, max_examples=12)
def test_pictures_and_page(data: Any) -> None:
    report = read(data)
    if report is not None:
        with tempfile.TemporaryDirectory() as folder:
            assert {path.name for path in draw_pictures(report, folder)} <= PICTURES.keys()
            assert {path.name for path in Path(folder).iterdir()} <= PICTURES.keys()
        assert page(report, title="smaller").encode()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("achieved", "blocks_before"), 10**18, "block numbers are whole numbers from 0 to 65535"),
        (("removed_blocks", 0), -1, "block numbers"),
        (("scores", "²"), 1.0, "block numbers"),
        (("evaluations", 0, "perplexity"), "low", "'perplexity' of 'evaluations' must be a number or null"),
        (("evaluations", 0, "generation"), {"repetition": 0.1}, "'continuations' of 'generation' must be a number"),
        (("evaluations", 0, "perplexity"), 10**400, "'perplexity' of 'evaluations'"),
        (("task_results", 0), {"label": "dense"}, "'task' of 'task_results' must be a string"),
        (("runtimes", "vllm"), "same", "no object"),
        (("achieved", "units", "mlp"), {"after": 6}, "'before' of .units of 'mlp'"),
        (("steps", 0, "block"), [1], "'block' of 'steps'"),
    ],
)
def test_reports_that_were_read_before(path: tuple[Any, ...], value: Any, message: str) -> None:
    data = copy.deepcopy(GOOD)
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(CheckpointError, match=message):
        PruningReport.from_dict(data)
