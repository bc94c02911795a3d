# SPDX-License-Identifier: Apache-2.0
"""Every constraint on small examples: what it allows, what it forbids, and what a search leaves alone for it."""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

import pytest

from optimum_blockprune.constraints import CONSTRAINTS, Situation, broken, protected, raise_if_broken, uncached
from optimum_blockprune.errors import UnsupportedModelError
from optimum_blockprune.table import Constraint


DEPTH = 6


def situation(
    model_type: str, stack: str = "decoder", *, root: dict[str, Any] | None = None, **fields: Any
) -> Situation:
    return Situation(model_type, stack, fields, DEPTH, {"model_type": model_type, **fields, **(root or {})})


def rule(name: str, kept: list[int], *, root: dict[str, Any] | None = None, values: Any = (), **fields: Any) -> Any:
    """What one rule says about the blocks `kept`; the first field is the one that its row names."""
    row = Constraint(
        name, "because", field=next(iter(fields), None), values=tuple(values), root_field=next(iter(root or {}), None)
    )
    return CONSTRAINTS[name](row, situation("some_type", root=root, **fields), kept)


# Rule, its fields, choices of kept blocks that it allows and that it forbids, and the message of the latter.
RULES = [
    ("refuse_period", {"every": 6}, [[0, 3], [5]], [], ""),
    ("refuse_period", {"every": 4}, [], [[0, 1, 2, 3, 4], [0]], "load it with every=0, which computes the same"),
    ("tail_only", {}, [[0], [0, 1, 2], [0, 1, 2, 3, 4]], [[1], [0, 2], [1, 2, 3, 4, 5]], r"from the end.*as 5\)"),
    ("keep_first", {}, [[0], [0, 5]], [[1, 2], [5]], "Keep block 0"),
    ("keep_last", {}, [[5], [0, 5]], [[0, 1, 2, 3, 4]], "Keep block 5"),
    ("not_below", {"other": 3}, [[0, 1, 2], [1, 3, 4, 5]], [[0, 1]], "Keep at least 3 blocks, or prune the dec"),
    ("keep_injected", {"root": {"indexes": [8, 16]}}, [[0, 1], [0, 1, 5]], [[0, 2, 3], [1]], r"Keep blocks \[0, 1"),
    (
        "last_is",
        {"kinds": list("sfssfs"), "values": "f"},
        [[0, 1], [2, 3, 4]],
        [[0, 1, 2], [5]],
        r"Keep the last of blocks \[1, 4\], or remove all blocks behind another one of them",
    ),
    # Numbers instead of kinds.
    ("keep_one", {"indices": [4, 1]}, [[0, 1], [4]], [[0, 2, 3, 5]], r"at least one of blocks \[1, 4\]"),
    ("keep_other", {"kinds": list("rraraa"), "values": "r"}, [[2], [0, 5]], [[0, 1, 3]], r"of blocks \[2, 4, 5\]"),
    # A cyclic pattern, and a model without any other kind.
    ("keep_other", {"kinds": list("rra"), "values": "r"}, [[2], [1, 5]], [[0, 1, 3, 4]], r"of blocks \[2, 5\]"),
    ("keep_other", {"kinds": list("rrrrrr"), "values": "r"}, [[0]], [], ""),
    ("same_groups", {"size": 2}, [[0, 1, 2, 3, 4]], [[0, 1, 2, 3], [0, 2, 3, 4, 5], [1, 2]], "Groups of 2"),
    ("same_groups", {"size": 4}, [[0, 1, 2, 3, 4]], [[0, 1, 2, 3], [0, 1, 2, 4, 5]], "Groups of 4"),
    ("producers", {"shared": 2}, [[0, 3, 5], [0, 1, 2], [3, 4, 5]], [[0, 1, 2, 4], [5]], "Keep block 3, or rem"),
    (
        "producers",
        {"shared": 2, "layer_types": list("sfsffs")},
        [[2, 3, 4, 5], [3, 4], [2, 5], [0, 1]],
        [[0, 1, 2, 4], [5]],
        "Keep block [23], or remove all blocks that read from it",
    ),
    (
        "nearest",
        {"kinds": list("fsfssf"), "values": "s"},
        [[0, 1], [2, 3], [2, 4, 5], [0, 2, 4]],
        [[1, 2], [0, 3], [0, 1, 4, 5]],
        "Keep block [02], which block [134] reads from",
    ),
]


@pytest.mark.parametrize(("name", "given", "allowed", "forbidden", "message"), RULES)
def test_rule(
    name: str, given: dict[str, Any], allowed: list[list[int]], forbidden: list[list[int]], message: str
) -> None:
    assert [kept for kept in allowed if rule(name, kept, **given) is not None] == []
    assert [kept for kept in forbidden if not re.search(message, rule(name, kept, **given) or "allowed")] == []


def test_refuse_allows_nothing() -> None:
    assert rule("refuse", [0, 1, 2, 3, 4]) == "No block can be removed exactly"


def test_every_rule_has_its_examples() -> None:
    assert {name for name, *_ in RULES} | {"refuse"} == set(CONSTRAINTS)
    assert all(allowed or forbidden for _, _, allowed, forbidden, _ in RULES)


# Rows that apply


def test_a_row_applies_by_type_stack_and_field() -> None:
    inner = [0, 2, 3, 4, 5]
    assert broken(situation("llama"), [1, 2]) is None
    assert "position biases" in broken(situation("t5"), [1, 2])
    assert "divides attention scores" in broken(situation("gpt2", scale_attn_by_inverse_layer_idx=True), inner)
    assert broken(situation("gpt2", scale_attn_by_inverse_layer_idx=False), inner) is None
    assert "staggered" in broken(situation("pegasus_x", "encoder", stagger_local_blocks=True), inner)
    assert broken(situation("pegasus_x", stagger_local_blocks=True), inner) is None
    assert "convolution" in broken(situation("deberta-v2", "encoder", conv_kernel_size=3), [1, 2])
    assert broken(situation("deberta-v2", "encoder", conv_kernel_size=0), [1, 2]) is None
    assert "sparse attention" in broken(situation("big_bird", "encoder", attention_type="block_sparse"), inner)
    assert broken(situation("big_bird", "encoder", attention_type="original_full"), inner) is None


def test_a_row_about_the_whole_model_applies_to_its_text_decoder() -> None:
    root = {"model_type": "qwen3_vl", "vision_config": {"deepstack_visual_indexes": [5, 11, 17]}}
    whole = situation("qwen3_vl_text", root=root)
    assert whole.at_root("vision_config.deepstack_visual_indexes") == [5, 11, 17]
    assert whole.at_root("vision_config.nothing") is whole.at_root("nothing.at.all") is None
    assert "Keep blocks [0, 1, 2]" in broken(whole, [0, 1, 3])
    assert broken(situation("qwen3_vl_text"), [1, 3]) is None
    assert "named by number" in broken(situation("some_text", root={"spatial_target_layers": [1]}), [0, 1])
    # The type of the whole model counts as well as that of its part.
    assert "another list" in broken(situation("some_text", root={"model_type": "idefics"}), [0, 1])


def test_what_is_broken_is_raised_with_the_reason_and_the_way_out() -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=r"^My model cannot lose these blocks exactly: the first block holds the position biases of all. Keep",
    ):
        raise_if_broken(situation("t5"), [1, 2], "My model")
    raise_if_broken(situation("t5"), [0, 2], "My model")
    raise_if_broken(situation("llama"), [1], "My model")


def test_types_whose_cache_is_not_exact() -> None:
    assert "dynamic mask" in uncached(situation("doge"))
    assert "indexer" in uncached(situation("some_text", index_topk=8))
    assert uncached(situation("some_text", index_topk=0)) is uncached(situation("llama")) is None


# What a search leaves alone


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (situation("llama"), []),
        # All blocks are of one kind as far as caches go, so that none of them is needed more than another.
        (situation("gemma2", layer_types=["sliding_attention", "full_attention"] * 3), []),
        (situation("t5"), [0]),
        (situation("gpt_neox_japanese"), [5]),
        (situation("modernbert", "encoder"), [0]),
        (situation("deberta-v2", "encoder", conv_kernel_size=3), [0]),
        (situation("bamba", attn_layer_indices=[1, 4]), [4]),
        (situation("recurrent_gemma", block_types=["recurrent", "recurrent", "attention"]), [5]),
        (situation("lfm2", layer_types=["conv", "full_attention", "conv", "full_attention", "conv", "conv"]), [3]),
        (situation("nemotron_h", layers_block_type=["mamba", "attention", "mlp", "mamba", "moe", "mlp"]), [1]),
        (situation("gemma4_text", layer_types=["sliding_attention", "full_attention"] * 3), [5]),
        (situation("gemma3n_text", num_kv_shared_layers=2, layer_types=list("sfsfsf")), [2, 3]),
        (situation("glm_moe_dsa", indexer_types=["full", "shared", "full", "shared", "shared", "full"]), [0, 2]),
        (situation("x", root={"vision_config": {"deepstack_visual_indexes": [7, 9]}}), [0, 1]),
    ],
    ids=lambda value: value.model_type if isinstance(value, Situation) else None,
)
def test_every_choice_among_the_other_blocks_is_allowed(given: Situation, expected: list[int]) -> None:
    found = protected(given)
    assert sorted(found) == expected
    assert all(found.values()), "without a reason"
    free = [block for block in range(DEPTH) if block not in found]
    for count in range(len(free) + (1 if found else 0)):
        for gone in combinations(free, count):
            kept = [block for block in range(DEPTH) if block not in gone]
            assert broken(given, kept) is None, gone
    # A protection that nothing needs would only cost choice.
    for block in found:
        assert any(
            broken(given, [b for b in range(DEPTH) if b not in (block, *gone)])
            for count in range(len(free) + 1)
            for gone in combinations(free, count)
            if count + 1 < DEPTH
        ), block
