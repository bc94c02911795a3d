# SPDX-License-Identifier: Apache-2.0
"""The common families the user's way, on both ends of the supported range of transformers (`make test-min`)."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from families import plain_logits, random_ids, silenced, tiny_model
from tiers import often
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_blockprune import BlockPruner, PruningPlan


pytestmark = pytest.mark.usefixtures("no_pictures")

COMMON = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2"),
    *("opt", "gpt_neox", "phi3", "olmo2", "falcon", "smollm3"),
)
REMOVALS = ((1,), (3, 1), (4,), (0, 2))


def greedy(model: PreTrainedModel, use_cache: bool) -> torch.Tensor:
    ids = random_ids()
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
    )


@pytest.mark.parametrize(
    ("family", "removed"),
    often(product(COMMON, REMOVALS), kept=lambda case: case[1] == (3, 1) or case[0] in ("llama", "gpt2")),
    ids=str,
)
def test_pruned_in_memory_and_reloaded(family: str, removed: tuple[int, ...], tmp_path: Path) -> None:
    model = tiny_model(family)
    ids = random_ids()
    truth = plain_logits(silenced(model, removed), ids)
    plan = PruningPlan.from_blocks(model, removed)
    assert BlockPruner(model).prune(plan=plan, save_dir=tmp_path / "pruned") is model
    assert torch.equal(plain_logits(model, ids), truth)
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(plain_logits(reloaded, ids), truth)
    assert torch.equal(greedy(reloaded, use_cache=True), greedy(reloaded, use_cache=False))


@pytest.mark.parametrize("family", COMMON)
def test_pruned_files(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    ids = random_ids()
    model.save_pretrained(tmp_path / "dense")
    plan = PruningPlan.from_blocks(model, [3, 1])
    plan.apply_to_checkpoint(tmp_path / "dense", tmp_path / "pruned", verify="logits")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert torch.equal(plain_logits(reloaded, ids), plain_logits(silenced(model, (1, 3)), ids))
