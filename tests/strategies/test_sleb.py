# SPDX-License-Identifier: Apache-2.0
"""SLEB's prefix search gives what the published procedure gives, for about half of its block-forwards."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from families import FAMILIES, block_list, plain_logits, random_ids, silenced, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_blockprune.batches import CalibrationWindows
from optimum_blockprune.errors import CalibrationError, ConfigurationError, NonFiniteError, UnsupportedModelError
from optimum_blockprune.plan import PruningPlan
from optimum_blockprune.runner import BlockRunner
from optimum_blockprune.strategies import sleb
from optimum_blockprune.strategies.base import SearchContext
from optimum_blockprune.strategies.sleb import SLEB, SLEBOptions


LICENSE = Path(__file__).parents[2] / "LICENSE"


def context_for(
    model: PreTrainedModel, windows: CalibrationWindows | None, num_remove: int, search: str = "prefix", **changes: Any
) -> SearchContext:
    """A context in which all but the first and the last block may go."""
    context = SearchContext(
        runner=BlockRunner(model),
        windows=windows,
        options=SLEBOptions(search=search),
        num_remove=num_remove,
        removable=tuple(range(1, model.config.num_hidden_layers - 1)),
        batch_size=2,
        seed=0,
        progress=lambda total, desc: tqdm(total=total, desc=desc, disable=True),
        provenance={"model_type": model.config.model_type, "strategy": "sleb"},
    )
    return replace(context, **changes)


def search(*args: Any, **kwargs: Any) -> tuple[PruningPlan, BlockRunner]:
    context = context_for(*args, **kwargs)
    return SLEB().select(context), context.runner


def assert_same(plan: PruningPlan, other: PruningPlan) -> None:
    assert plan.removed_blocks == other.removed_blocks
    assert plan.details["dense_loss"] == pytest.approx(other.details["dense_loss"], rel=1e-5)
    for step, twin in zip(plan.steps, other.steps, strict=True):
        assert step["block"] == twin["block"]
        assert step["loss"] == pytest.approx(twin["loss"], rel=1e-5)
        assert step["candidates"] == pytest.approx(twin["candidates"], rel=1e-5)


def mean_nll(model: PreTrainedModel, ids: Tensor) -> float:
    logits = plain_logits(model, ids)[:, :-1].double()
    return -F.log_softmax(logits, dim=-1).gather(2, ids[:, 1:, None]).mean().item()


def naive_cost(num_blocks: int, removed: Sequence[int], removable: Sequence[int]) -> int:
    """Block-forwards a window of whole passes: all blocks once, then for every candidate all others that are left."""
    steps = range(len(removed))
    return num_blocks + sum((len(removable) - step) * (num_blocks - step - 1) for step in steps)


def prefix_cost(num_blocks: int, removed: Sequence[int], removable: Sequence[int]) -> int:
    """Per step the trunk up to the last candidate (in the first step to the end), and what follows each candidate."""
    total = 0
    for step in range(len(removed)):
        alive = [block for block in range(num_blocks) if block not in removed[:step]]
        positions = [alive.index(block) for block in removable if block in alive]
        trunk = max(positions) if step else num_blocks
        total += trunk + sum(len(alive) - 1 - position for position in positions)
    return total


def silence(model: PreTrainedModel, blocks: Sequence[int]) -> None:
    """Makes llama blocks no-ops by their weights: both halves add zero."""
    with torch.no_grad():
        for block in blocks:
            block_list(model)[block].self_attn.o_proj.weight.zero_()
            block_list(model)[block].mlp.down_proj.weight.zero_()


# The same as the published procedure


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_search_equals_naive_search(family: str, windows: CalibrationWindows) -> None:
    model = tiny_model(family, 6)
    fast, fast_runner = search(model, windows, 3)
    naive, naive_runner = search(model, windows, 3, "naive")
    assert_same(fast, naive)
    assert fast_runner.counters.block_forwards < naive_runner.counters.block_forwards
    assert len(block_list(model)) == 6


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_losses_are_those_of_silenced_models(family: str, windows: CalibrationWindows) -> None:
    model = tiny_model(family, 5)
    plan, _ = search(model, windows, 2)
    ids = windows.input_ids
    assert plan.details["dense_loss"] == pytest.approx(mean_nll(model, ids), rel=1e-5)
    removed: list[int] = []
    for step in plan.steps:
        left = [block for block in (1, 2, 3) if block not in removed]
        truth = {str(block): mean_nll(silenced(model, [*removed, block]), ids) for block in left}
        assert step["candidates"] == pytest.approx(truth, rel=1e-5)
        assert str(step["block"]) == min(truth, key=truth.__getitem__)
        assert step["loss"] == step["candidates"][str(step["block"])]
        assert step["perplexity"] == pytest.approx(math.exp(step["loss"]))
        removed.append(step["block"])
    assert plan.removed_blocks == tuple(removed)
    assert plan.scores == plan.steps[0]["candidates"]


def test_padded_windows() -> None:
    mask = torch.arange(16) < torch.tensor([[16], [9], [12], [16], [5]])
    windows = CalibrationWindows.from_tokens(random_ids(5, 16), mask, source="padded")
    model = tiny_model("llama", 6)
    fast, _ = search(model, windows, 3)
    assert_same(fast, search(model, windows, 3, "naive")[0])
    total = sum(
        mean_nll(model, ids[None, real]) * (int(real.sum()) - 1)
        for ids, real in zip(windows.input_ids, mask, strict=True)
    )
    assert fast.details["dense_loss"] == pytest.approx(total / int((mask.sum(1) - 1).sum()), rel=1e-5)


def test_batch_size_does_not_matter(windows: CalibrationWindows) -> None:
    model = tiny_model("qwen3", 6)
    plans = [search(model, windows, 2, batch_size=size)[0] for size in (1, 3, 4)]
    for plan in plans[1:]:
        assert_same(plan, plans[0])


def test_offloaded_model_makes_the_same_choice(windows: CalibrationWindows) -> None:
    plain, _ = search(tiny_model("llama", 6), windows, 2)
    model = tiny_model("llama", 6)
    cpu_offload(model, execution_device=torch.device("cpu"))
    offloaded, _ = search(model, windows, 2)
    assert_same(offloaded, plain)


# Cost


@pytest.mark.parametrize("removable", [(1, 2, 3, 4), (0, 1, 2, 3, 4, 5), (2, 5), (4,)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_cost_is_the_closed_formula(removable: tuple[int, ...], batch_size: int, windows: CalibrationWindows) -> None:
    num_remove = min(3, len(removable))
    changes = {"removable": removable, "batch_size": batch_size}
    plan, runner = search(tiny_model("llama", 6), windows, num_remove, **changes)
    naive, naive_runner = search(tiny_model("llama", 6), windows, num_remove, "naive", **changes)
    expected = 4 * naive_cost(6, plan.removed_blocks, removable)
    assert naive_runner.counters.block_forwards == expected
    assert plan.details["naive_block_forwards"] == naive.details["naive_block_forwards"] == expected
    assert runner.counters.block_forwards == 4 * prefix_cost(6, plan.removed_blocks, removable)
    heads = 4 * (1 + sum(len(removable) - step for step in range(num_remove)))
    assert naive_runner.counters.head_forwards == heads
    assert runner.counters.head_forwards == heads


def test_about_half_the_cost_on_a_deep_model() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    windows = CalibrationWindows.from_tokens(random_ids(16, 6), source="random")
    plan, runner = search(tiny_model("llama", 30, **sizes), windows, 7, batch_size=16)
    assert runner.counters.block_forwards == 16 * prefix_cost(30, plan.removed_blocks, range(1, 29))
    assert plan.details["naive_block_forwards"] == 16 * naive_cost(30, plan.removed_blocks, range(1, 29))
    assert runner.counters.block_forwards <= 0.55 * plan.details["naive_block_forwards"]


def test_bar_counts_every_branch(windows: CalibrationWindows) -> None:
    bars: list[tqdm] = []

    def progress(total: int, description: str) -> tqdm:
        bars.append(tqdm(total=total, desc=description, disable=False, file=open("/dev/null", "w")))  # noqa: SIM115
        return bars[-1]

    search(tiny_model("llama", 6), windows, 2, progress=progress, batch_size=3)
    # Two batches; four candidates and the dense model, then three candidates.
    assert [(bar.n, bar.total) for bar in bars] == [(10, 10), (6, 6)]
    for bar in bars:
        bar.fp.close()


# Choices


@pytest.mark.parametrize("mode", ["prefix", "naive"])
def test_ties_go_to_the_lowest_block(mode: str, windows: CalibrationWindows) -> None:
    model = tiny_model("llama", 6)
    silence(model, (1, 2, 3, 4))
    plan, _ = search(model, windows, 3, mode)
    assert plan.removed_blocks == (1, 2, 3)
    for step in plan.steps:
        assert set(step["candidates"].values()) == {plan.details["dense_loss"]}


def test_a_block_that_does_nothing_ties_with_the_dense_model(windows: CalibrationWindows) -> None:
    model = tiny_model("llama", 6)
    silence(model, (2, 4))
    plan, _ = search(model, windows, 1)
    losses = plan.steps[0]["candidates"]
    assert losses["2"] == losses["4"] == plan.details["dense_loss"]
    assert losses["1"] != losses["3"] != losses["2"]


@pytest.mark.parametrize("removable", [(0, 1, 2, 3, 4, 5), (3, 4), (0, 5), (2,)])
def test_only_removable_blocks_go(removable: tuple[int, ...], windows: CalibrationWindows) -> None:
    plan, _ = search(tiny_model("llama", 6), windows, min(5, len(removable)), removable=removable)
    assert len(plan.removed_blocks) == min(5, len(removable))
    assert set(plan.removed_blocks) <= set(removable)
    for number, step in enumerate(plan.steps):
        assert set(step["candidates"]) == {
            str(block) for block in removable if block not in plan.removed_blocks[:number]
        }


def test_ends_are_protected_by_default() -> None:
    assert (SLEB.protect_first, SLEB.protect_last) == (1, 1)
    assert SLEB.needs_data and SLEB.needs_loss
    assert SLEB.name == "sleb"


def test_plan_says_how_it_was_made(windows: CalibrationWindows) -> None:
    plan, _ = search(tiny_model("llama", 5), windows, 2, seed=3)
    assert (plan.strategy, plan.seed, plan.options) == ("sleb", 3, {"search": "prefix"})
    assert plan.details["objective"] == "nll"
    assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


# Faults


def make_block_2_needed_by_block_3(model: PreTrainedModel) -> None:
    """Block 2 raises the stream, block 3 lowers it, and fails with NaN when it was not raised."""

    def up(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output + 1000

    def down(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0] - 1000
        return (hidden.where(hidden.mean() > -500, torch.nan), *args[1:])

    block_list(model)[2].register_forward_hook(up)
    block_list(model)[3].register_forward_pre_hook(down)


@pytest.mark.parametrize("mode", ["prefix", "naive"])
def test_candidates_without_a_finite_loss_are_passed_over(
    mode: str, windows: CalibrationWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(sleb.logger, "warning", said.append)
    model = tiny_model("llama", 5)
    make_block_2_needed_by_block_3(model)
    plan, _ = search(model, windows, 1, mode)
    assert set(plan.steps[0]["candidates"]) == {"1", "3"}
    assert plan.removed_blocks[0] in (1, 3)
    assert len(said) == 1
    assert "[2]" in said[0]


def test_no_candidate_with_a_finite_loss(windows: CalibrationWindows) -> None:
    model = tiny_model("llama", 5)
    make_block_2_needed_by_block_3(model)
    with pytest.raises(NonFiniteError):
        search(model, windows, 1, removable=(2,))


@pytest.mark.parametrize("mode", ["prefix", "naive"])
def test_model_with_nan_names_the_block(mode: str, windows: CalibrationWindows) -> None:
    model = tiny_model("llama", 5)
    with torch.no_grad():
        block_list(model)[3].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="output of block 3"):
        search(model, windows, 1, mode)


def test_overflow_in_the_head(windows: CalibrationWindows) -> None:
    model = tiny_model("llama", 5)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match="every block's output is finite.*head overflows"):
        search(model, windows, 1)


def test_blocks_that_share_more_than_their_output_are_refused_before_the_search(windows: CalibrationWindows) -> None:
    model = tiny_model("llama", 5)
    shared: dict[str, Tensor] = {}
    model.register_forward_pre_hook(lambda *_: shared.clear())
    block_list(model)[1].register_forward_hook(lambda _, __, output: shared.update(value=output))
    block_list(model)[2].register_forward_hook(lambda _, __, output: output + shared.get("value", 0))
    with pytest.raises(UnsupportedModelError, match="share more than their hidden states"):
        search(model, windows, 1)
    # Whole passes need no such thing.
    assert len(search(model, windows, 1, "naive")[0].removed_blocks) == 1


def test_needs_windows() -> None:
    with pytest.raises(CalibrationError, match="dataset="):
        search(tiny_model("llama", 5), None, 1)


def test_unknown_search() -> None:
    with pytest.raises(ConfigurationError, match="'prefx'.*Did you mean 'prefix'"):
        SLEBOptions(search="prefx")


# The real model


@pytest.fixture(scope="module")
def real(smollm2: Path) -> tuple[PreTrainedModel, Tensor]:
    """SmolLM2-135M and 512 tokens of English: the licence of this package."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokens = tokenizer(LICENSE.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0, :512]
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), tokens


@pytest.mark.slow
def test_smollm2_prefix_search_equals_naive_search(real: tuple[PreTrainedModel, Tensor]) -> None:
    model, tokens = real
    windows = CalibrationWindows.from_tokens(tokens[:384].view(4, 96), source="LICENSE")
    fast, runner = search(model, windows, 3, batch_size=4)
    naive, naive_runner = search(model, windows, 3, "naive", batch_size=4)
    assert_same(fast, naive)
    assert runner.counters.block_forwards <= 0.55 * naive_runner.counters.block_forwards
    assert not set(fast.removed_blocks) & {0, 1, 28, 29}


@pytest.mark.slow
def test_smollm2_needs_its_ends(real: tuple[PreTrainedModel, Tensor]) -> None:
    model, tokens = real
    windows = CalibrationWindows.from_tokens(tokens.view(4, 128), source="LICENSE")
    plan, _ = search(model, windows, 1, batch_size=4, removable=tuple(range(30)))
    losses = {int(block): loss for block, loss in plan.scores.items()}
    assert len(losses) == 30
    # Wide gaps, measured on other text: perplexity 61,707 without block 0, 26.8 without the cheapest one.
    cheapest = min(losses.values())
    assert all(losses[block] > cheapest + 0.5 for block in (0, 1, 28, 29))
    assert losses[0] == max(losses.values())
