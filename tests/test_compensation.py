# SPDX-License-Identifier: Apache-2.0
"""Removed channels leave their mean behind, in the bias of the projection that they went into."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import plain_logits, random_ids, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan
from optimum_blockprune.errors import ConfigurationError, PlanError, UnsupportedModelError


ROWS = [{"input_ids": random_ids(1, 48, seed=seed)[0].tolist()} for seed in range(4)]


def config(compensate: bool = True, layout: str = "uniform") -> BlockPruningConfig:
    return BlockPruningConfig(
        "functional_network",
        sparsity=0.4,
        dataset=ROWS,
        num_samples=4,
        seqlen=48,
        layout=layout,
        protect_first=0,
        protect_last=0,
        strategy_options={"groups": 1, "components": 4, "compensate": compensate},
    )


def first_mlp_mean(model: PreTrainedModel) -> torch.Tensor:
    """Mean output of the first block's MLP over the calibration tokens."""
    seen = []
    handle = model.transformer.h[0].mlp.register_forward_hook(lambda _module, _args, output: seen.append(output))
    plain_logits(model, torch.tensor([row["input_ids"] for row in ROWS]))
    handle.remove()
    return seen[0].double().mean((0, 1))


@pytest.mark.parametrize("layout", ["uniform", "padded", "per_layer"])
def test_the_mean_output_stays(layout: str) -> None:
    dense = tiny_model("gpt2", 4)
    with_bias, without = (BlockPruner(copy.deepcopy(dense)) for _ in range(2))
    with_bias.prune(config=config(layout=layout))
    without.prune(config=config(compensate=False, layout=layout))
    assert [each.kept for each in with_bias.plan.width.narrowed] == [each.kept for each in without.plan.width.narrowed]
    truth = first_mlp_mean(dense)
    torch.testing.assert_close(first_mlp_mean(with_bias.model), truth, rtol=1e-5, atol=1e-6)
    assert (first_mlp_mean(without.model) - truth).abs().max() > 0.01


def test_a_folder_holds_the_bias_and_a_plan_repeats_it(tmp_path: Path) -> None:
    pruner = BlockPruner(tiny_model("gpt2", 3))
    pruner.prune(tmp_path / "out", config=config())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = random_ids()
    assert torch.equal(plain_logits(reloaded, ids), plain_logits(pruner.model, ids))
    replayed = tiny_model("gpt2", 3)
    PruningPlan.from_file(tmp_path / "out").apply(replayed)
    assert torch.equal(plain_logits(replayed, ids), plain_logits(pruner.model, ids))


def test_two_compensated_plans_are_one() -> None:
    dense = tiny_model("gpt2", 3)
    pruner = BlockPruner(copy.deepcopy(dense))
    pruner.prune(config=[config(), config()])
    assert pruner.plan.width.totals() == {"mlp": {"before": 384, "after": 144}}
    pruner.plan.apply(dense)
    torch.testing.assert_close(plain_logits(dense, random_ids()), plain_logits(pruner.model, random_ids()))


def test_classes_without_such_a_bias_are_refused() -> None:
    pruner = BlockPruner(tiny_model("llama", 3))
    with pytest.raises(ConfigurationError, match=r"needs a bias .* 'mlp.down_proj' of block 0 has none"):
        pruner.make_plan(config())
    plan = pruner.make_plan(config(compensate=False))
    first, *others = plan.width.narrowed
    means = (0.5,) * (48 - len(first.kept))
    wrong = replace(plan, width=replace(plan.width, narrowed=(replace(first, means=means), *others)))
    with pytest.raises(PlanError, match="which has none"):
        wrong.apply(pruner.model)
    with pytest.raises(PlanError, match="1 means for the 16 inputs"):
        replace(plan.width, narrowed=(replace(first, means=(0.5,)), *others))


def test_files_are_not_compensated(tmp_path: Path) -> None:
    model = tiny_model("gpt2", 3)
    model.save_pretrained(tmp_path / "dense")
    plan = BlockPruner(model).make_plan(config())
    with pytest.raises(UnsupportedModelError, match="'gpt2': the plan makes up for removed units by biases"):
        plan.apply_to_checkpoint(tmp_path / "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()
