# SPDX-License-Identifier: Apache-2.0
"""What transformers would build from the pruned configuration is read off it, and what does not fit it is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from configs import newest, removal
from families import FAMILIES, block_list, tiny_model
from toys import assert_unchanged, snapshot
from transformers import PretrainedConfig, PreTrainedModel
from zoo import causal, other_stacks

from optimum_blockprune import template as template_module
from optimum_blockprune.blocks import find_blocks
from optimum_blockprune.errors import UnsupportedModelError
from optimum_blockprune.surgery import check_plan
from optimum_blockprune.table import table
from optimum_blockprune.template import Template, make_template, merged_attributes, plain


def template_of(model: PreTrainedModel, removed: list[int], stack: str | None = None) -> Template:
    blocks = find_blocks(model, stack)
    return make_template(blocks, removal(blocks.layout, removed))


def merged(live: Any, before: Any, after: Any) -> dict[str, Any]:
    return dict(merged_attributes(live, before, after))


# Attributes


def test_attributes_that_differ_between_the_two_are_followed() -> None:
    before = {"layer_idx": 3, "window": None, "kinds": ["a", "b"], "scale": 0.5, "width": 32}
    after = {"layer_idx": 2, "window": 4, "kinds": ["b"], "scale": 0.25, "width": 32}
    changed = {name: value for name, value in after.items() if name != "width"}
    assert merged(dict(before), before, after) == changed
    # The list is not the template's own.
    assert merged(dict(before), before, after)["kinds"] is not after["kinds"]


def test_what_the_user_set_is_left_alone() -> None:
    before, after = {"layer_idx": 3, "window": 4}, {"layer_idx": 2, "window": 8}
    assert merged({"layer_idx": 3, "window": 7}, before, after) == {"layer_idx": 2}
    # `True` and 1.0 are not 1, NaN is NaN, and a type that changes is a change.
    assert merged({"flag": 1}, {"flag": True}, {"flag": False}) == {}
    assert merged({"size": 1.0}, {"size": 1}, {"size": 2}) == {}
    nan = float("nan")
    assert merged({"limit": nan}, {"limit": nan}, {"limit": nan}) == {}
    assert merged({"limit": nan}, {"limit": nan}, {"limit": 3.0}) == {"limit": 3.0}
    assert merged({"every": 1}, {"every": 1}, {"every": True}) == {"every": True}


def test_attributes_that_only_one_of_them_has_or_that_are_settings_are_left_alone() -> None:
    assert merged({"a": 1}, {"a": 1}, {}) == merged({}, {"a": 1}, {"a": 2}) == merged({"a": 1}, {}, {"a": 2}) == {}
    assert merged({"training": False}, {"training": False}, {"training": True}) == {}
    assert merged({"f": len}, {"f": len}, {"f": max}) == {}


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, True), (True, True), (1, True), (0.5, True), ("x", True), ([1, ("a", None)], True), ((), True)]
    + [(torch.zeros(1), False), ({"a": 1}, False), ([torch.zeros(1)], False), (len, False)],
)
def test_plain_values_can_be_compared_and_copied(value: Any, expected: bool) -> None:
    assert plain(value) is expected


# Templates


@pytest.mark.parametrize("family", FAMILIES)
def test_both_are_empty_models_of_the_class(family: str) -> None:
    model = tiny_model(family)
    model.train()
    before = snapshot(model)
    made = template_of(model, [1, 3])
    assert type(made.before) is type(made.after) is type(model)
    assert {parameter.device.type for each in (made.before, made.after) for parameter in each.parameters()} == {"meta"}
    assert [len(find_blocks(each)) for each in (made.before, made.after)] == [5, 3]
    assert made.before.config.to_dict() == model.config.to_dict()
    assert made.before.config is not model.config
    assert_unchanged(model, before)


def test_modules_are_paired_with_their_new_places() -> None:
    model = tiny_model("llama")
    made = template_of(model, [1, 3])
    paired = {id(live): (before, after) for live, before, after in made.pairs(model)}
    old, new = (find_blocks(each).blocks for each in (made.before, made.after))
    for block, place in ((0, 0), (2, 1), (4, 2)):
        before, after = paired[id(block_list(model)[block].self_attn)]
        assert before is old[block].self_attn and after is new[place].self_attn
        assert (before.layer_idx, after.layer_idx) == (block, place)
    assert id(block_list(model)[1]) not in paired
    assert paired[id(model)] == (made.before, made.after)
    assert paired[id(model.model.norm)][1] is made.after.model.norm


@newest
def test_weights_with_a_slice_per_block_are_found() -> None:
    found = []
    for model in (causal.tiny_model("gemma3n_text"), other_stacks.tiny_model("esm")):
        made = template_of(model, [0])
        blocks = len(find_blocks(made.before))
        for name, row in made.sliced():
            old, new = (each.get_submodule(name) for each in (made.before, made.after))
            assert name.endswith(row.module)
            assert new.weight.shape[row.axis] * blocks == old.weight.shape[row.axis] * (blocks - 1)
            assert getattr(new, row.attribute) == new.weight.shape[row.axis]
            found.append(row)
    assert len(found) == len(table().tensors)
    assert set(found) == set(table().tensors), "a row that nothing reaches"
    assert template_of(tiny_model("llama"), [0]).sliced() == []


# Refusals, before any work


def refusal(model: PreTrainedModel, removed: list[int], stack: str | None = None) -> str:
    blocks = find_blocks(model, stack)
    plan = removal(blocks.layout, removed)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError) as caught:
        check_plan(model, plan)
    assert not calls and len(find_blocks(model, stack)) == len(blocks)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return str(caught.value)


class ByPosition(transformers.LlamaForCausalLM):
    """A model whose second block is another one than the others."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        second = self.model.layers[1]
        second.extra = torch.nn.Linear(2, 2)


def test_a_block_that_is_special_by_its_place_is_refused() -> None:
    model = ByPosition(tiny_model("llama").config)
    assert "the kept blocks do not have" in (said := refusal(model, [1]))
    assert "asks for a tensor 'model.layers.1.extra.bias'" in said
    assert "have a tensor 'model.layers.0.extra.bias' for which the pruned configuration has no pl" in refusal(
        model, [0]
    )
    template_of(model, [3])


def test_a_block_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wider(ByPosition):
        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            for index, block in enumerate(self.model.layers):
                block.extra = torch.nn.Linear(2, index + 1, bias=False)

    model = Wider(tiny_model("llama").config)
    said = refusal(model, [1])
    assert "tensor 'model.layers.1.extra.weight' has shape [3, 2], the pruned configuration asks for [2, 2]" in said
    assert "'llama' cannot lose these blocks exactly" in said
    template_of(model, [4])


def test_a_list_outside_the_blocks_that_follows_from_them_is_refused() -> None:
    class WithList(transformers.LlamaForCausalLM):
        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.every_two = torch.nn.ModuleList(torch.nn.Identity() for _ in range(config.num_hidden_layers // 2))

    model = WithList(tiny_model("llama").config)
    assert "'every_two' has 2 entries that follow from the blocks, and would have 1" in refusal(model, [1, 2])
    template_of(model, [1])


def test_a_configuration_that_its_own_class_does_not_read_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma2")
    read = type(model.config).from_dict

    def forced(fields: dict[str, Any], **settings: Any) -> PretrainedConfig:
        config = read(copy.deepcopy(fields), **settings)
        config.layer_types[-1] = "full_attention"
        return config

    monkeypatch.setattr(type(model.config), "from_dict", forced)
    said = refusal(model, [4])
    assert "'layer_types' would be ['sliding_attention', 'full_attention', 'sliding_attention', 'sliding_att" in said
    assert "Keep other blocks" in said
    template_of(model, [1])
    monkeypatch.setattr(type(model.config), "from_dict", lambda *_, **__: 1 / 0)
    assert "its configuration class says: division by zero" in refusal(model, [1])


def test_a_class_that_cannot_be_built_without_these_blocks_is_refused() -> None:
    class Stubborn(transformers.LlamaForCausalLM):
        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            if config.num_hidden_layers < 4:
                raise ValueError("\n four blocks\n at least \n please")

    model = Stubborn(tiny_model("llama").config)
    template_of(model, [1])
    assert "Stubborn cannot be built without these blocks: four blocks at least" in refusal(model, [1, 2])


@newest
def test_the_lost_embedding_of_a_padding_token_is_refused() -> None:
    model = causal.tiny_model("youtu")
    embedding = model.get_input_embeddings()
    assert model.config.model_type in table().zero_padding
    # Without such a token nothing is lost.
    template_of(model, [1])
    embedding.padding_idx = 7
    assert "loses the embedding of its padding token (7) whenever it is loaded" in refusal(model, [1])
    with torch.no_grad():
        embedding.weight[7] = 0
    template_of(model, [1])
    other = tiny_model("llama")
    assert bool(other.get_input_embeddings().weight[other.get_input_embeddings().padding_idx].any())
    template_of(other, [1])


def test_trial_configurations_are_no_news() -> None:
    level = transformers.utils.logging.get_verbosity()
    with template_module.quiet():
        assert transformers.utils.logging.get_verbosity() == transformers.utils.logging.ERROR
    with pytest.raises(KeyError), template_module.quiet():
        raise KeyError
    assert transformers.utils.logging.get_verbosity() == level
