# SPDX-License-Identifier: Apache-2.0
"""`BlockPruningConfig` as a `PretrainedConfig`: files, repositories, overrides, and what its base would spoil."""

from __future__ import annotations

import inspect
import json
import pickle
from copy import deepcopy
from dataclasses import fields
from pathlib import Path

import pytest
from optimum.configuration_utils import BaseConfig
from transformers import PretrainedConfig

from optimum_blockprune.config import CONFIG_FILE, FIELD_NAMES, BlockPruningConfig
from optimum_blockprune.errors import ConfigurationError, OutputError, UnknownStrategyError
from optimum_blockprune.plan import PruningPlan
from optimum_blockprune.recipe import Recipe


def full_config() -> BlockPruningConfig:
    """Every field differs from its default, one budget aside."""
    return BlockPruningConfig(
        strategy="random",
        num_blocks=3,
        dataset="c4",
        dataset_text_field="body",
        num_samples=4,
        seqlen=64,
        batch_size=2,
        seed=5,
        use_chat_template=True,
        calibration_recipe="sleb",
        protect_first=1,
        protect_last=2,
        strategy_options={},
    )


def test_signature_is_that_of_the_recipe() -> None:
    parameters = list(inspect.signature(BlockPruningConfig).parameters.values())
    assert parameters.pop().kind is inspect.Parameter.VAR_KEYWORD
    assert [(p.name, p.default, p.annotation) for p in parameters] == [
        (field.name, field.default, field.type) for field in fields(Recipe)
    ]


def test_is_a_pretrained_config() -> None:
    assert isinstance(BlockPruningConfig(), PretrainedConfig)


def test_strategy_and_sparsity_may_be_positional() -> None:
    config = BlockPruningConfig("random", 0.3)
    assert (config.strategy, config.recipe.requested) == ("random", {"sparsity": 0.3})


@pytest.mark.parametrize("config", [BlockPruningConfig(strategy="random"), full_config()], ids=["default", "full"])
def test_round_trip(config, tmp_path) -> None:
    config.save_pretrained(tmp_path)
    again = BlockPruningConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again == config
    assert again.recipe == config.recipe
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG_FILE]


def test_dict_holds_the_fields_and_the_versions_only() -> None:
    versions = {"block_pruning_version", "optimum_version", "transformers_version"}
    assert set(BlockPruningConfig("random").to_dict()) == {*FIELD_NAMES, *versions}


def test_repr_shows_the_fields() -> None:
    assert '"seqlen": 64' in repr(full_config())


def test_equality_compares_the_fields() -> None:
    assert BlockPruningConfig("random", 0.3) == BlockPruningConfig("random", 0.3)
    assert BlockPruningConfig("random", 0.3) != BlockPruningConfig("random", 0.4)
    assert BlockPruningConfig("random") != PretrainedConfig()


@pytest.mark.parametrize("dataset", [["some", "text"], [{"input_ids": [1, 2]}], object()])
def test_a_dataset_in_memory_is_written_as_null(dataset, tmp_path) -> None:
    config = BlockPruningConfig("random", dataset=dataset)
    assert config.dataset is dataset
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["dataset"] is None


def test_a_path_is_written_as_text() -> None:
    assert BlockPruningConfig("random", dataset=Path("a/b.txt")).to_dict()["dataset"] == str(Path("a/b.txt"))


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("sparsitty", "Did you mean 'sparsity'"), ("num_sample", "'num_samples'"), ("top_k", "Available: align")],
)
def test_unknown_fields_raise(name, suggestion) -> None:
    for build in (lambda: BlockPruningConfig(**{name: 1}), lambda: BlockPruningConfig.from_dict({name: 1})):
        with pytest.raises(ConfigurationError, match=f"Unknown field '{name}'.*{suggestion}"):
            build()


@pytest.mark.parametrize("name", ["temperature", "num_beams", "output_attentions", "num_hidden_layers", "num_labels"])
def test_fields_of_the_base_class_are_no_fields(name) -> None:
    with pytest.raises(ConfigurationError, match="Unknown field"):
        BlockPruningConfig("random", **{name: 1})


def test_unknown_strategy_raises() -> None:
    with pytest.raises(UnknownStrategyError, match="no strategy 'rndom'. Did you mean 'random'"):
        BlockPruningConfig("rndom")


def test_unknown_strategy_option_raises() -> None:
    with pytest.raises(ConfigurationError, match="'random' has no option 'depth'"):
        BlockPruningConfig("random", strategy_options={"depth": 1})


def test_reads_what_the_base_class_writes(tmp_path) -> None:
    config = full_config()
    written = {**BaseConfig.to_diff_dict(config), **PretrainedConfig.to_diff_dict(config), "output_attentions": False}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(written))
    assert BlockPruningConfig.from_pretrained(tmp_path) == config


def test_can_be_copied() -> None:
    config = full_config()
    assert deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_overrides_on_reading(tmp_path) -> None:
    full_config().save_pretrained(tmp_path)
    config = BlockPruningConfig.from_pretrained(tmp_path / CONFIG_FILE, seqlen=32, sparsity=0.5)
    assert (config.seqlen, config.num_samples, config.recipe.requested) == (32, 4, {"sparsity": 0.5})
    with pytest.raises(ConfigurationError, match="Unknown field 'seqlenn'"):
        BlockPruningConfig.from_pretrained(tmp_path, seqlenn=32)


def test_another_strategy_starts_with_its_own_options() -> None:
    written = {"strategy": "other", "strategy_options": {"depth": 1}}
    assert BlockPruningConfig.from_dict(written, strategy="random").strategy_options is None


def test_unused_names_are_returned_on_demand() -> None:
    config, unused = BlockPruningConfig.from_dict({"strategy": "random"}, seed=3, foo=1, return_unused_kwargs=True)
    assert (config.seed, unused) == (3, {"foo": 1})


def test_attributes_are_checked_where_they_are_used(tmp_path) -> None:
    config = BlockPruningConfig("random", 0.2)
    config.num_blocks = 3
    with pytest.raises(ConfigurationError, match="one budget"):
        _ = config.recipe
    with pytest.raises(ConfigurationError, match="one budget"):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "There is no file"), ("{", "not a valid JSON"), ("[1]", "is a JSON object, not list")],
)
def test_unreadable_files(content, message, tmp_path) -> None:
    path = tmp_path / "my.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        BlockPruningConfig.from_pretrained(path)


def test_a_folder_without_the_file(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match=f"No {CONFIG_FILE} can be read"):
        BlockPruningConfig.from_pretrained(tmp_path)


def test_save_refuses_a_file_and_idle_arguments(tmp_path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(OutputError, match="is a file"):
        BlockPruningConfig("random").save_pretrained(tmp_path / "taken")
    with pytest.raises(ConfigurationError, match="repo_id only count"):
        BlockPruningConfig("random").save_pretrained(tmp_path, repo_id="x")


@pytest.mark.parametrize("stack", ["decoder", "encoder"])
def test_a_plan_says_which_stack_it_is_about(stack: str) -> None:
    named = PruningPlan.from_removed("bart", 6, [3, 1], stack=stack)
    found = {"strategy": "random", "requested": {"sparsity": 0.4}, "seed": 3, "stack": stack}
    # The decoder is what is pruned where nothing is said.
    said = None if stack == "decoder" else stack
    config = BlockPruningConfig.from_plan(named)
    assert (config.strategy, config.num_blocks, config.stack) == ("manual", 2, said)
    assert config.strategy_options == {"blocks": "3,1"}
    config = BlockPruningConfig.from_plan(PruningPlan.from_removed("bart", 6, [3, 1], **found))
    assert (config.strategy, config.sparsity, config.seed, config.stack) == ("random", 0.4, 3, said)
    assert BlockPruningConfig.from_dict(config.to_dict()).stack == said
    with pytest.raises(ConfigurationError, match=r"Several searches \(random\+random\)"):
        BlockPruningConfig.from_plan(
            PruningPlan.from_removed("bart", 6, [3], **found).then(PruningPlan.from_removed("bart", 5, [1], **found))
        )
