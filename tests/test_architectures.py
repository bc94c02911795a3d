# SPDX-License-Identifier: Apache-2.0
"""Where a model's blocks are described, what changes there when some go, and every refusal."""

from __future__ import annotations

import re
from typing import Any

import pytest
from configs import changes, layout_of, newest, removal
from families import FAMILIES, tiny_config, tiny_model
from transformers import CONFIG_MAPPING, PretrainedConfig

from optimum_blockprune.architectures import descend, layout_for, set_fields, value_of
from optimum_blockprune.errors import PlanError, UnsupportedModelError
from optimum_blockprune.plan import PruningPlan


# Where the blocks are described


@newest
@pytest.mark.parametrize(
    ("model_type", "stack", "place", "inner", "count_field"),
    [
        ("llama", "decoder", (), "llama", "num_hidden_layers"),
        ("bert", "encoder", (), "bert", "num_hidden_layers"),
        ("longcat_flash", "decoder", (), "longcat_flash", "num_layers"),
        ("t5", "decoder", (), "t5", "num_decoder_layers"),
        ("t5", "encoder", (), "t5", "num_hidden_layers"),
        ("bart", "decoder", (), "bart", "decoder_layers"),
        ("bart", "encoder", (), "bart", "encoder_layers"),
        ("whisper", "decoder", (), "whisper", "decoder_layers"),
        ("t5gemma", "encoder", ("encoder",), "t5_gemma_module", "num_hidden_layers"),
        ("t5gemma", "decoder", ("decoder",), "t5_gemma_module", "num_hidden_layers"),
        ("encoder-decoder", "decoder", ("decoder",), "bert", "num_hidden_layers"),
        ("llava", "decoder", ("text_config",), "llama", "num_hidden_layers"),
        ("gemma3", "decoder", ("text_config",), "gemma3_text", "num_hidden_layers"),
        ("qwen2_5_vl", "decoder", ("text_config",), "qwen2_5_vl_text", "num_hidden_layers"),
    ],
)
def test_the_configuration_of_the_stack_is_found(
    model_type: str, stack: str, place: tuple[str, ...], inner: str, count_field: str
) -> None:
    fields = {name: CONFIG_MAPPING["bert"]().to_dict() for name in ("encoder", "decoder")}
    layout = layout_of(model_type, stack, **(fields if model_type == "encoder-decoder" else {}))
    assert (layout.stack, layout.place, layout.model_type, layout.count_field) == (stack, place, inner, count_field)
    assert layout.config is descend(layout.root, place)
    assert layout.num_blocks == getattr(layout.config, count_field) > 1
    # One block less, and nothing else moves in the whole configuration.
    plan = removal(layout, [layout.num_blocks - 1])
    before = layout.root.to_dict()
    if (model_type, stack) != ("t5", "encoder"):  # see the test of its cache
        edited = layout.edited(plan)
        assert layout.root.to_dict() == before
        assert getattr(descend(edited, place), count_field) == layout.num_blocks - 1
        follows = {count_field, "layer_types"} & set(layout.changes(plan))
        changed = {name for name, value in edited.to_dict().items() if value != before[name]}
        assert changed == (set(place) or follows)


def test_a_live_model_and_its_configuration_have_one_layout() -> None:
    model = tiny_model("gemma2")
    live, read = layout_for(model), layout_for(model.config)
    assert live.config is read.config is model.config
    assert (live.kind, live.place, live.count_field) == (read.kind, read.place, read.count_field)


def test_layout_says_what_it_knows() -> None:
    config = tiny_config("qwen3")
    config._name_or_path = "org/model"
    layout = layout_for(config)
    assert (layout.model_type, layout.num_blocks, layout.base_model, layout.proven) == ("qwen3", 5, "org/model", True)
    # A proven decoder inside a model that is not.
    assert layout_of("gemma3n").model_type == "gemma3n_text"
    assert not layout_of("gemma3n").proven
    assert layout_of("gemma3n").base_model is None
    assert layout_of("llava").model_type == "llama"
    assert layout_of("llava").proven


def test_messages_say_which_part_of_which_model() -> None:
    assert layout_of("llama").subject == "Model type 'llama'"
    assert layout_of("bart", "encoder").subject == "Model type 'bart' (encoder)"
    assert layout_of("llava").subject == "Model type 'llava' (decoder 'llama')"


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


def test_fields_of_the_other_stack_stay() -> None:
    """One flat configuration describes both: the encoder's windows do not follow the decoder's blocks."""
    fields = {"encoder_layers": 6, "decoder_layers": 6, "attention_window": [2, 4, 6, 8, 10, 12]}
    assert changes("led", [1], "decoder", **fields) == {"decoder_layers": 5}
    expected = {"encoder_layers": 5, "attention_window": [2, 6, 8, 10, 12]}
    assert changes("led", [1], "encoder", **fields) == expected


def test_rows_with_types_are_about_those_only() -> None:
    assert changes("albert", [1], num_hidden_layers=6, num_hidden_groups=6)["num_hidden_groups"] == 5
    assert changes("bert", [1], num_hidden_layers=6, num_hidden_groups=6) == {"num_hidden_layers": 5}


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
def test_values_that_differ_between_blocks_are_read_as_stored() -> None:
    config = layout_of("gemma4_text", num_hidden_layers=6).config
    assert value_of(config, "per_layer_config") == config.to_dict()["per_layer_config"] != {}
    assert value_of(config, "num_hidden_layers") == 6
    assert value_of(config, "no_such_field") is None


# Refusals


@newest
@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("vit", "no class.* is neither a language model .* AutoModelForCausalLM"),
        ("clip", "neither a language model"),
        ("blt", "no number of blocks"),
        ("xlm", "no block modules"),
        ("flaubert", "no block modules"),
        ("zamba2", "share weights by their position"),
        ("hrm_text", "run several times over"),
        ("reformer", "residual stream"),
        ("idefics", "layers of another list"),
    ],
)
def test_refused_kinds(model_type: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"'{model_type}'.*{message}"):
        PruningPlan.from_blocks(CONFIG_MAPPING[model_type](), [1])


def test_a_decoder_without_its_head_is_refused() -> None:
    model = tiny_model("llama").model
    with pytest.raises(UnsupportedModelError, match=r"'llama' \(LlamaModel\) is neither .* language-model head"):
        layout_for(model)
    # From its configuration alone it would load with one.
    assert layout_for(model.config).num_blocks == 5


@newest
@pytest.mark.parametrize("model_type", ["bert", "bart", "whisper", "t5", "llava", "gemma3", "gemma3n", "llama4"])
def test_kinds_that_were_refused_once_are_accepted(model_type: str) -> None:
    layout = layout_of(model_type)
    plan = PruningPlan.from_blocks(layout.root, [1])
    assert (plan.model_type, plan.stack, plan.removed_blocks) == (layout.model_type, layout.stack, (1,))


def test_a_stack_that_is_not_there_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="'llama' has no 'encoder' stack to prune; possible: decoder"):
        layout_of("llama", "encoder")
    with pytest.raises(UnsupportedModelError, match="'bert' has no 'decoder' stack to prune; possible: encoder"):
        layout_of("bert", "decoder")
    with pytest.raises(UnsupportedModelError, match="Unknown stack 'middle'; possible: encoder, decoder"):
        layout_of("t5", "middle")


def test_encoder_used_as_a_decoder_is_accepted() -> None:
    assert changes("bert", [1], is_decoder=True) == {"num_hidden_layers": 11}
    assert layout_of("bert", is_decoder=True).stack == "decoder"


def test_depth_dependent_constants_allow_the_tail_only() -> None:
    for model_type, fields in (
        ("gpt2", {"n_layer": 6, "scale_attn_by_inverse_layer_idx": True}),
        ("diffllama", {"num_hidden_layers": 6}),
    ):
        for removed in ([2], [5, 0]):
            with pytest.raises(UnsupportedModelError, match=f"'{model_type}'.*only lose its last blocks.*such as 5"):
                changes(model_type, removed, **fields)
        assert changes(model_type, [5, 4], **fields) == {"num_hidden_layers": 4}
        with pytest.raises(UnsupportedModelError, match="only lose its last blocks"):
            layout_of(model_type, **fields).protected()
    assert changes("gpt2", [2], n_layer=6) == {"num_hidden_layers": 5}


def test_a_period_with_a_list_is_written_out() -> None:
    fields = {"num_hidden_layers": 8, "decoder_sparse_step": 2}
    new = changes("qwen2_moe", [3], **fields)
    # Blocks 1, 5 and 7 of the kept ones are sparse: 1, 4 and 6 by now.
    assert (new["decoder_sparse_step"], new["mlp_only_layers"]) == (1, [0, 2, 3, 5])
    for removed in ([2, 3], [7]):
        assert not {"decoder_sparse_step", "mlp_only_layers"} & set(changes("qwen2_moe", removed, **fields))
    new = changes("qwen3_moe", [3], num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[1])
    assert (new["decoder_sparse_step"], new["mlp_only_layers"]) == (1, [0, 1, 2, 3])


@newest
def test_periods_without_a_list_keep_whole_groups() -> None:
    with pytest.raises(UnsupportedModelError, match="'jamba'.*attn_layer_period=8.*whole groups of 8 consecutive"):
        changes("jamba", [1])
    with pytest.raises(UnsupportedModelError, match="whole groups"):
        layout_of("jamba").protected()
    assert changes("jamba", list(range(8, 16))) == {"num_hidden_layers": 24}


def test_encoder_blocks_that_size_the_decoders_cache() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'t5' \(encoder\).*Keep at least 6 blocks, or prune the decoder"):
        changes("t5", [1], "encoder")
    assert changes("t5", [1], "encoder", num_decoder_layers=5) == {"num_hidden_layers": 5}


# Protections


def test_protected_blocks_come_with_a_reason_and_the_others_can_go() -> None:
    assert layout_of("llama").protected() == {}
    layout = layout_of("t5", "decoder")
    found = layout.protected()
    assert list(found) == [0]
    assert "position biases" in found[0]
    layout.check(removal(layout, range(1, layout.num_blocks)))
    assert layout_of("llama", num_hidden_layers=1).protected() == {}


def test_a_plan_of_another_model_is_refused() -> None:
    layout = layout_for(tiny_config("llama"))
    layout.check(PruningPlan.from_removed("llama", 5, [1]))
    given: dict[str, Any] = {"model_type": "llama", "num_blocks": 5, "removed": [1], "stack": "decoder"}
    for other in ({"model_type": "mistral"}, {"num_blocks": 6}, {"stack": "encoder"}):
        plan = PruningPlan.from_removed(**{**given, **other})
        message = f"for the {plan.stack} of a '{plan.model_type}' model with {plan.num_blocks} blocks, not for the dec"
        with pytest.raises(PlanError, match=f"{re.escape(message)}.*'llama' model with 5"):
            layout.check(plan)
