# SPDX-License-Identifier: Apache-2.0
"""One-pass strategies over half-blocks: the stream in the middle of blocks, the choices, and what they leave."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from families import block_list, plain_logits, random_ids, tiny_model
from test_half_blocks import SEQUENTIAL, WHOLE_ONLY, silenced_halves
from tiers import often
from torch import Tensor, nn
from toys import toy_folder, toy_pruner
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_blockprune import BlockPruner, PruningPlan, PruningReport, passes
from optimum_blockprune.batches import Batch
from optimum_blockprune.blocks import find_blocks
from optimum_blockprune.choosing import choose
from optimum_blockprune.errors import ConfigurationError, PlanError, UnsupportedModelError
from optimum_blockprune.half import PARTS, Half, Row
from optimum_blockprune.ledger import Ledger
from optimum_blockprune.loading import load_model
from optimum_blockprune.measures import angular_distance, block_influence
from optimum_blockprune.reading import window_spec, windows_for
from optimum_blockprune.runner import BlockRunner


pytestmark = pytest.mark.usefixtures("no_pictures")

BLOCKS = 6
DP = {"estimator": "identity_decoder", "select": "dp"}
HISTOGRAM = {"estimator": "histogram", "bins": 4, "coordinates": 8}
# By name: a strategy and its options.
SEARCHES: dict[str, dict[str, Any]] = {
    "shortgpt": {"strategy": "shortgpt"},
    "angular": {"strategy": "angular"},
    "angular-all": {"strategy": "angular", "strategy_options": {"tokens": "all"}},
    "mi_prun": {"strategy": "mi_prun"},
    "mi_prun-histogram": {"strategy": "mi_prun", "strategy_options": HISTOGRAM},
    "mi_prun-dp": {"strategy": "mi_prun", "strategy_options": DP},
    "networks": {"strategy": "functional_network", "strategy_options": {"unit": "block"}},
}
each_search = pytest.mark.parametrize("name", SEARCHES)
EXACT = ("llama", "qwen3", "gemma2", "gpt2", "opt")


def pruner_of(name: str, family: str = "llama", unit: str | None = "half_block", **fields: Any) -> BlockPruner:
    return toy_pruner(family, **{"unit": unit, "protect_first": 1, "protect_last": 1, **SEARCHES[name], **fields})


def states_of(runner: BlockRunner, batch: Batch) -> list[Tensor]:
    """The stream at every boundary, those within blocks as well."""
    found: list[Tensor] = []

    def visit(position: int, hidden: Tensor) -> None:
        assert position == len(found)
        found.append(hidden.clone())

    passes.stream(runner, [(0, batch)], lambda *_: visit, per_block=2)
    return found


# The stream


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_the_stream_in_the_middle_is_the_output_without_the_mlp(family: str) -> None:
    model, batch = tiny_model(family, 5), Batch(random_ids())
    runner = BlockRunner(model)
    states = states_of(runner, batch)
    assert len(states) == 11
    whole: list[Tensor] = []
    runner.stream(batch, lambda _, hidden: whole.append(hidden.clone()))
    assert all(torch.equal(*pair) for pair in zip(states[::2], whole, strict=True))
    for block in range(5):
        before = None if block == 0 else runner.run_to(batch, block - 1)
        middle = runner.run_to(batch, block, [Half(block, "mlp")], before).value
        middle = middle[0] if isinstance(middle, tuple) else middle
        assert torch.equal(states[2 * block + 1], middle)
        assert not torch.equal(middle, states[2 * block]) and not torch.equal(middle, states[2 * block + 2])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_blocks_in_files_show_the_same_stream(family: str, tmp_path: Path) -> None:
    toy_folder(tmp_path, family)
    batch = Batch(random_ids())
    resident, streamed = (BlockRunner(load_model(tmp_path, stream=stream)) for stream in (False, True))
    assert passes.in_order_of_blocks(streamed) and not passes.in_order_of_blocks(resident)
    pairs = zip(states_of(resident, batch), states_of(streamed, batch), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert resident.counters == streamed.counters


class Scaling(nn.Module):
    """Attention half and MLP half, but the second one sees the stream scaled."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.mlp = block.self_attn, block.mlp
        self.input_layernorm, self.post_attention_layernorm = block.input_layernorm, block.post_attention_layernorm

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attention, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        middle = hidden_states + attention
        return middle + self.mlp(self.post_attention_layernorm(middle * 2))


def test_a_stream_that_no_module_takes_in_is_refused_before_text_is_read() -> None:
    pruner = pruner_of("shortgpt", dataset="/no/such/file.txt")
    block_list(pruner.model)[2] = Scaling(block_list(pruner.model)[2])
    with pytest.raises(UnsupportedModelError, match="block 2 no module takes in the stream.* Use sleb"):
        pruner.make_plan()
    # SLEB needs no look at it.
    sleb = toy_pruner(unit="half_block")
    block_list(sleb.model)[2] = Scaling(block_list(sleb.model)[2])
    assert sleb.make_plan().num_removed == 2


@each_search
@pytest.mark.parametrize("family", WHOLE_ONLY)
def test_models_without_halves_are_refused_before_text_is_read(name: str, family: str) -> None:
    with pytest.raises(UnsupportedModelError, match="has no halves"):
        pruner_of(name, family, dataset="/no/such/file.txt").make_plan()


# The choice


def silent_pair(model: PreTrainedModel) -> PreTrainedModel:
    """A model in which the MLP of block 2 and the attention of block 3 do nothing, and no whole block does."""
    with torch.no_grad():
        block_list(model)[2].mlp.down_proj.weight.zero_()
        block_list(model)[3].self_attn.o_proj.weight.zero_()
    return model


@each_search
def test_halves_that_do_nothing_go_first(name: str) -> None:
    pruner = pruner_of(name, num_blocks=1)
    pruner.model = silent_pair(pruner.model)
    plan = pruner.make_plan()
    assert plan.removed_names == ("2.mlp", "3.attention")
    assert plan.details["unit"] == "half_block"
    assert set(plan.scores) == {*map(str, range(BLOCKS)), *(f"{i}.mlp+{i + 1}.attention" for i in range(BLOCKS - 1))}


@each_search
@pytest.mark.parametrize("protect", [(0, 0), (2, 1)])
@pytest.mark.parametrize("count", often([1, 2, 3], kept=lambda count: count == 3))
def test_protected_blocks_lose_nothing(name: str, protect: tuple[int, int], count: int) -> None:
    first, last = protect
    plan = pruner_of(name, num_blocks=count, protect_first=first, protect_last=last).make_plan()
    assert plan.num_removed == count and len(plan.blocks) == BLOCKS - count
    halves = {half for half in plan.removed_halves} or {f"{b}.{part}" for b in plan.removed_blocks for part in PARTS}
    assert {Half.read(half).block for half in halves} <= set(range(first, BLOCKS - last))


@each_search
def test_all_that_may_go_can_go(name: str) -> None:
    plan = pruner_of(name, num_blocks=4).make_plan()
    assert sorted(plan.removed_blocks) == [1, 2, 3, 4] and plan.num_removed == 4


def middle_states(pruner: BlockPruner) -> tuple[list[Tensor], Tensor]:
    """States at all boundaries of the calibration windows, [tokens, d], and the last tokens of the windows."""
    recipe = pruner.config.recipe
    windows = windows_for(find_blocks(pruner.model), recipe.dataset, pruner.tokenizer, window_spec(recipe))
    states = states_of(BlockRunner(pruner.model), next(iter(windows.batches(windows.num_windows))))
    last = torch.arange(windows.num_windows) * windows.seqlen + windows.seqlen - 1
    return [each.flatten(0, 1) for each in states], last


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shortgpt_takes_the_pairs_with_the_smallest_sum(count: int) -> None:
    pruner = pruner_of("shortgpt", num_blocks=count)
    states, _ = middle_states(pruner)
    influence = [block_influence(*pair).double().mean().item() for pair in zip(states, states[2:], strict=False)]
    inner = range(2, 2 * BLOCKS - 3)
    sets = [
        each for each in combinations(inner, count) if all(b - a > 1 for a, b in zip(each, each[1:], strict=False))
    ]
    best = min(sets, key=lambda each: sum(influence[start] for start in each))
    plan = pruner.make_plan()
    row = Row(BLOCKS, 2)
    expected = {
        str(half)
        for start in best
        for half in (Half(start // 2, PARTS[start % 2]), Half((start + 1) // 2, PARTS[(start + 1) % 2]))
    }
    names = set(plan.removed_halves) or {f"{b}.{part}" for b in plan.removed_blocks for part in PARTS}
    assert names == expected
    scores = row.scores(influence)
    assert list(plan.scores.values()) == pytest.approx(list(scores.values()), rel=1e-5)
    steps = [step["block_influence"] for step in plan.steps]
    assert steps == sorted(steps) and sum(steps) == pytest.approx(sum(influence[s] for s in best), rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_angular_takes_the_run_with_the_closest_ends(count: int) -> None:
    pruner = pruner_of("angular", num_blocks=count)
    states, last = middle_states(pruner)
    gap = 2 * count
    distances = [
        angular_distance(a[last], b[last]).double().mean().item() for a, b in zip(states, states[gap:], strict=False)
    ]
    best = min(range(2, 2 * BLOCKS - 2 - gap + 1), key=distances.__getitem__)
    plan = pruner.make_plan()
    assert plan.steps[0]["start"] == Row(BLOCKS, 2).name(best)
    assert plan.details["distances"] == pytest.approx(distances, rel=1e-5)


def objective(name: str, plan: PruningPlan) -> float:
    """What a strategy minimises, where it finds the smallest one."""
    if name == "shortgpt":
        return sum(step["block_influence"] for step in plan.steps)
    if name.startswith("angular"):
        return plan.steps[0]["distance"]
    return -sum(run["score"] for run in plan.details["runs"])


@pytest.mark.parametrize("name", ["shortgpt", "angular", "angular-all", "mi_prun-dp"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("count", often([1, 2, 3], kept=lambda count: count == 2))
def test_never_worse_than_whole_blocks(name: str, family: str, count: int) -> None:
    whole, halves = (pruner_of(name, family, unit, num_blocks=count).make_plan() for unit in (None, "half_block"))
    assert objective(name, halves) <= objective(name, whole) * (1 + 1e-9)
    for block, score in whole.scores.items():
        assert halves.scores[block] == pytest.approx(score, rel=1e-9)


@pytest.mark.parametrize("name", ["shortgpt", "angular", "mi_prun", "mi_prun-dp"])
def test_a_plan_knows_the_choice_for_fewer(name: str) -> None:
    plan = pruner_of(name, num_blocks=3).make_plan()
    again = PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    for count in (0, 1, 2):
        short = plan.truncate(count)
        assert short.num_removed == count
        if count:
            assert short.removed_names == pruner_of(name, num_blocks=count).make_plan().removed_names
            assert short.truncate(count - 1).num_removed == count - 1


@pytest.mark.parametrize(
    "change",
    [
        {"smaller": {"1": ["2.mlp"]}},
        {"smaller": {"1": ["2.mlp", "4.attention"]}},
        {"smaller": {"1": ["2.mlp", 3]}},
        {"smaller": {"2": ["2.mlp", "3.attention"]}},
        {"smaller": {"1": ["2.mlp", "2.mlp"]}},
        {"smaller": {"1": ["8.mlp", "9.attention"]}},
    ],
)
def test_choices_for_fewer_that_are_none(change: dict[str, Any]) -> None:
    plan = pruner_of("shortgpt", num_blocks=3).make_plan()
    with pytest.raises(PlanError, match="choice for . blocks"):
        PruningPlan.from_dict({**plan.to_dict(), **change})


def test_smaller_choices_of_halves_need_the_halves() -> None:
    data = PruningPlan.from_blocks(tiny_model("llama", BLOCKS), [1, 2]).to_dict()
    smaller = {"smaller": {"1": ["2.mlp", "3.attention"]}}
    with pytest.raises(PlanError, match="which modules"):
        PruningPlan.from_dict({**data, **smaller})
    halves = BlockRunner(tiny_model("llama", BLOCKS)).halves.names()
    plan = PruningPlan.from_dict({**data, **smaller, "nested": False, "halves": halves})
    assert plan.truncate(1).removed_names == ("2.mlp", "3.attention")
    with pytest.raises(PlanError, match="removes whole blocks, but it names halves"):
        PruningPlan.from_dict({**data, "halves": halves})


# What it leaves


@pytest.mark.parametrize(
    ("family", "name"),
    often(product(EXACT, SEARCHES), kept=lambda case: case[0] == "gemma2" or case[1] in ("shortgpt", "mi_prun-dp")),
)
def test_what_is_left_is_exact(family: str, name: str, tmp_path: Path) -> None:
    pruner = pruner_of(name, family, num_blocks=2)
    ids = random_ids()
    dense = tiny_model(family, BLOCKS)
    pruner.prune(tmp_path / "out")
    plan = pruner.plan
    names = plan.removed_halves or tuple(f"{block}.{part}" for block in plan.removed_blocks for part in PARTS)
    truth = silenced_halves(dense, family, names, ids)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for model in (pruner.model, reloaded):
        assert torch.equal(plain_logits(model, ids), truth)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (reloaded.generate(ids, use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(cached, uncached)


@each_search
def test_models_in_files_make_the_same_plan(name: str, tmp_path: Path) -> None:
    folder = toy_folder(tmp_path / "dense")
    resident, streamed = pruner_of(name), pruner_of(name)
    streamed.model = BlockPruner.from_pretrained(folder, stream=True).model
    plans = [pruner.make_plan().to_dict() for pruner in (resident, streamed)]
    for plan in plans:
        plan["base_model"] = None
    assert plans[0] == plans[1]


@each_search
def test_what_was_measured_is_not_measured_again(name: str, tmp_path: Path) -> None:
    plans, calls = [], []
    for _ in range(2):
        pruner, report, ledgers = pruner_of(name), PruningReport(), list[Ledger]()

        def keep(fingerprint: Mapping[str, Any], ledgers: list[Ledger] = ledgers) -> Ledger:
            ledgers.append(Ledger.open(tmp_path / "kept", fingerprint))
            return ledgers[0]

        plans.append(choose(pruner.model, pruner.config.recipe, pruner.tokenizer, report, keep=keep))
        ledgers[0].close()
        calls.append(report.block_forwards)
    assert plans[0] == plans[1]
    assert calls[0] > 0 and calls[1] == 0


def test_scores_have_names() -> None:
    found = pruner_of("shortgpt").score()
    assert set(range(BLOCKS)) | {f"{i}.mlp+{i + 1}.attention" for i in range(BLOCKS - 1)} == set(found)


# Refusals


@pytest.mark.parametrize("strategy", ["bip", "magnitude", "functional_network"])
def test_strategies_of_width_say_that_they_rank_no_blocks(strategy: str) -> None:
    with pytest.raises(ConfigurationError, match=r"half_block.*channels and heads here, whose scores rank no blocks"):
        toy_pruner(strategy=strategy, unit="half_block").make_plan()


def test_more_than_may_go_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="largest possible num_blocks is 4"):
        pruner_of("angular", num_blocks=5).make_plan()
