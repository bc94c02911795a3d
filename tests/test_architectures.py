# SPDX-License-Identifier: Apache-2.0
"""Every rule on small examples, every row of the table in use, and every refusal."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from families import FAMILIES, tiny_config
from packaging.version import Version
from transformers import CONFIG_MAPPING, PretrainedConfig

from optimum_blockprune.architectures import _RULES, Following, layout_for, set_fields, table
from optimum_blockprune.errors import PlanError, UnsupportedModelError
from optimum_blockprune.plan import PruningPlan


KEPT = (0, 2, 3, 5)
newest = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="the table names fields of transformers 5.23"
)


def follow(rule: str, value: Any, kept: tuple[int, ...] = KEPT, num_blocks: int = 6, **more: Any) -> Any:
    return _RULES[rule](Following("field", value, kept, num_blocks, "some_type", **more))


def changes(model_type: str, removed: list[int], **fields: Any) -> dict[str, Any]:
    config = CONFIG_MAPPING[model_type](**fields)
    layout = layout_for(config)
    return layout.changes(PruningPlan.from_removed(layout.model_type, layout.num_blocks, removed))


# The rules


def test_slice() -> None:
    assert follow("slice", list("abcdef")) == list("acdf")
    with pytest.raises(UnsupportedModelError, match="'some_type': 'field' has 5 entries for 6 blocks"):
        follow("slice", list("abcde"))


@pytest.mark.parametrize(
    ("rule", "value", "expected"),
    [
        ("renumber", [0, 1, 4], [0]),
        ("renumber", [5, 2], [3, 1]),
        ("renumber", [1, 4], []),
        ("count_below", 3, 2),
        ("count_below", 4, 3),
        ("count_below", 99, 4),
        ("last_below", 5, 3),
        ("last_below", 4, 2),
        ("last_below", 0, 0),
        ("last_below", -1, -1),
        ("write_out", ["r", "r", "a"], ["r", "a", "r", "a"]),
        ("write_out", list("abcdef"), list("acdf")),
        ("rescale", 3.0, 3.0 * (4 / 6) ** 0.5),
    ],
)
def test_rule(rule: str, value: Any, expected: Any) -> None:
    assert follow(rule, value) == expected


def test_last_below_cannot_express_that_none_is_left() -> None:
    assert follow("last_below", 1, kept=(1, 2, 3)) == 0
    with pytest.raises(UnsupportedModelError, match="Keep one of blocks 0 to 1"):
        follow("last_below", 1, kept=(2, 3, 4))


def test_rescale_keeps_the_quotient() -> None:
    assert follow("rescale", 1.4) / 4**0.5 == pytest.approx(1.4 / 6**0.5)


@pytest.mark.parametrize(
    ("period", "phase", "kept", "fits"),
    [
        (2, 1, (0, 1, 4, 5), True),
        (2, 1, (0, 1, 2, 3, 4), True),
        (2, 1, (0, 2, 3, 4, 5), False),
        (2, 0, (2, 3, 4, 5), True),
        (2, 0, (1, 2, 3, 4), False),
        (3, 0, (0, 1, 2), True),
        (3, -1, (0, 4, 5), True),
        (3, -1, (0, 3, 4), False),
        (1, 0, (1, 5), True),
    ],
)
def test_must_match(period: int, phase: int, kept: tuple[int, ...], fits: bool) -> None:
    old = [(block + phase) % period == 0 for block in range(6)]
    assert ([old[block] for block in kept] == old[: len(kept)]) is fits, "the case itself is wrong"
    if fits:
        assert follow("must_match", period, kept, phase=phase) == period
    else:
        with pytest.raises(UnsupportedModelError, match=f"groups of {period} consecutive blocks"):
            follow("must_match", period, kept, phase=phase)


# The table


def test_families_are_those_that_the_suite_proves() -> None:
    assert table().families == set(FAMILIES)
    assert len(FAMILIES) == 16


def test_rows_name_known_rules_and_give_reasons() -> None:
    assert {row.rule for row in table().fields.values()} <= {*_RULES, "refuse", "tail_only"}
    assert {row.rule for row in table().model_types.values()} <= {"refuse", "tail_only"}
    assert {row.rule for row in table().fields.values()} >= set(_RULES), "a rule that no row uses"
    for row in (*table().fields.values(), *table().model_types.values()):
        assert bool(row.reason) == (row.rule in ("refuse", "tail_only")), row.name
        assert not row.reason.endswith("."), row.name
        assert (row.shift == 0 and row.offset_field is None) or row.rule == "must_match", row.name


@newest
def test_rows_name_registered_model_types() -> None:
    assert {*table().families, *table().model_types} <= set(CONFIG_MAPPING)


@newest
def test_rows_name_fields_of_installed_configurations() -> None:
    models = Path(inspect.getfile(transformers)).parent / "models"
    source = "\n".join(path.read_text(encoding="utf-8") for path in models.glob("*/configuration_*.py"))
    names = [name for row in table().fields.values() for name in (row.name, row.offset_field) if name]
    # A dataclass field, an argument, an assigned attribute or an entry of attribute_map.
    missing = [name for name in names if not re.search(rf'^\s+(self\.)?"?{name}"?\s*[:=]', source, re.MULTILINE)]
    assert not missing


@newest
@pytest.mark.parametrize("model_type", sorted(table().model_types))
def test_every_model_type_row_refuses_an_inner_block(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type]()
    with pytest.raises(UnsupportedModelError, match=f"'{model_type}'"):
        PruningPlan.from_blocks(config, [1])


# Fields that follow


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_of_the_families(family: str) -> None:
    config = tiny_config(family)
    before = config.to_dict()
    new = layout_for(config).changes(PruningPlan.from_removed(family, 5, [3, 1]))
    assert new.pop("num_hidden_layers") == 3
    expected = {}
    for name in ("layer_types", "no_rope_layers"):
        if before.get(name):
            expected[name] = [before[name][block] for block in (0, 2, 4)]
    if family in ("qwen2", "qwen3"):
        expected["max_window_layers"] = 1
    assert new == expected
    assert config.to_dict() == before


def test_edited_is_a_copy() -> None:
    config = tiny_config("gemma2")
    before = config.to_dict()
    edited = layout_for(config).edited(PruningPlan.from_removed("gemma2", 5, [0]))
    assert config.to_dict() == before
    assert edited.num_hidden_layers == 4
    assert edited.layer_types == before["layer_types"][1:]
    rest = {
        name: value for name, value in edited.to_dict().items() if name not in ("layer_types", "num_hidden_layers")
    }
    assert rest == {name: value for name, value in before.items() if name in rest}


def test_only_named_lists_are_cut() -> None:
    config = tiny_config("llama")
    config.five_of_something = [1, 2, 3, 4, 5]
    layout = layout_for(config)
    plan = PruningPlan.from_removed("llama", 5, [1])
    assert layout.changes(plan) == {"num_hidden_layers": 4}
    assert layout.edited(plan).five_of_something == [1, 2, 3, 4, 5]


def test_a_named_list_that_does_not_fit_is_refused() -> None:
    config = tiny_config("llama")
    config.layer_rope_theta = [1.0, 2.0]
    with pytest.raises(UnsupportedModelError, match="'layer_rope_theta' has 2 entries for 5 blocks"):
        layout_for(config).changes(PruningPlan.from_removed("llama", 5, [1]))


def test_a_count_that_ignores_its_setter_is_refused() -> None:
    class Stubborn(PretrainedConfig):
        model_type = "stubborn"

        @property
        def num_hidden_layers(self) -> int:
            return 5

        @num_hidden_layers.setter
        def num_hidden_layers(self, value: int) -> None: ...

    with pytest.raises(UnsupportedModelError, match="'stubborn' does not accept a new value for 'num_hidden_layers'"):
        set_fields(Stubborn(), {"num_hidden_layers": 4}, setattr)


@newest
def test_fields_of_other_types() -> None:
    assert changes("deepseek_v3", [1], num_hidden_layers=8)["first_k_dense_replace"] == 2
    assert changes("minicpm3", [1], num_hidden_layers=4, scale_depth=1.4)["scale_depth"] == pytest.approx(
        1.4 * (3 / 4) ** 0.5
    )
    moe = changes("qwen2_moe", [1], num_hidden_layers=6, mlp_only_layers=[1, 3, 5])
    assert moe["mlp_only_layers"] == [2, 4]
    hybrid = changes("recurrent_gemma", [1], num_hidden_layers=6)
    assert hybrid["block_types"] == ["recurrent", "attention", "recurrent", "recurrent", "attention"]
    assert changes("ernie4_5_moe", [1, 5], num_hidden_layers=6, moe_layer_end_index=4)["moe_layer_end_index"] == 3


# Refusals


@newest
@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("bert", "encoder-only"),
        ("vit", "not a decoder-only language model"),
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("whisper", "encoder-decoder"),
        ("llava", "not a decoder-only language model"),
        ("gemma3", "multimodal"),
        ("gemma3n", "multimodal"),
        ("llama4", "multimodal"),
        ("gemma3n_text", "keys and values of earlier ones"),
        ("gpt_neo", "attention pattern"),
        ("zamba2", "share weights by their position"),
        ("blt", "no number of blocks"),
    ],
)
def test_refused_kinds(model_type: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"'{model_type}'.*{message}"):
        PruningPlan.from_blocks(CONFIG_MAPPING[model_type](), [1])


def test_encoder_used_as_a_decoder_is_accepted() -> None:
    assert changes("bert", [1], is_decoder=True) == {"num_hidden_layers": 11}


def test_depth_dependent_constants_allow_the_tail_only() -> None:
    for model_type, fields in (
        ("gpt2", {"n_layer": 6, "scale_attn_by_inverse_layer_idx": True}),
        ("diffllama", {"num_hidden_layers": 6}),
    ):
        with pytest.raises(UnsupportedModelError, match=f"'{model_type}'.*only lose its last blocks.*such as 5"):
            changes(model_type, [2], **fields)
        with pytest.raises(UnsupportedModelError, match="only lose its last blocks"):
            changes(model_type, [5, 0], **fields)
        assert changes(model_type, [5, 4], **fields) == {"num_hidden_layers": 4}
    assert changes("gpt2", [2], n_layer=6) == {"num_hidden_layers": 5}


def test_periods_without_a_list_keep_whole_groups() -> None:
    fields = {"num_hidden_layers": 8, "decoder_sparse_step": 2}
    with pytest.raises(UnsupportedModelError, match="'qwen2_moe'.*'decoder_sparse_step=2'.*whole groups of 2 consec"):
        changes("qwen2_moe", [3], **fields)
    assert changes("qwen2_moe", [2, 3], **fields)["num_hidden_layers"] == 6
    assert changes("qwen2_moe", [7], **fields)["num_hidden_layers"] == 7
    with pytest.raises(UnsupportedModelError, match="'jamba'.*attn_layer_period"):
        changes("jamba", [1])
    assert changes("jamba", list(range(8, 16))) == {"num_hidden_layers": 24}


def test_plan_of_another_model_is_refused() -> None:
    layout = layout_for(tiny_config("llama"))
    layout.check(PruningPlan.from_removed("llama", 5, [1]))
    for plan in (PruningPlan.from_removed("mistral", 5, [1]), PruningPlan.from_removed("llama", 6, [1])):
        with pytest.raises(
            PlanError, match=f"'{plan.model_type}' model of {plan.num_blocks} blocks.*'llama' model of 5"
        ):
            layout.check(plan)


def test_layout_says_what_it_knows() -> None:
    config = tiny_config("qwen3")
    config._name_or_path = "org/model"
    layout = layout_for(config)
    assert (layout.model_type, layout.num_blocks, layout.base_model, layout.proven) == ("qwen3", 5, "org/model", True)
    assert not layout_for(CONFIG_MAPPING["stablelm"]()).proven
    assert layout_for(CONFIG_MAPPING["stablelm"]()).base_model is None
