# SPDX-License-Identifier: Apache-2.0
"""The configuration as Optimum knows it: a `Recipe` that can be saved, loaded and pushed to the Hub.

Fields, defaults and rules are those of `Recipe`. The base class is used for reading files and repositories only:
what it would add to the file, drop from the arguments or compare is replaced here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from optimum.configuration_utils import BaseConfig
from optimum.utils import logging
from optimum.version import __version__ as optimum_version
from transformers import __version__ as transformers_version

from . import __version__
from .budget_rules import HELD_OUT_FIELDS
from .errors import ConfigurationError, OutputError, nearest
from .hub import check_repo_id, push_file
from .json_values import json_fault
from .plan import PruningPlan
from .presets import spelt_out
from .recipe import BUDGET_FIELDS, Recipe
from .registry import build_options, get_strategy


logger = logging.get_logger("optimum.blockprune.config")

CONFIG_FILE = "block_pruning_config.json"
FIELD_NAMES = tuple(field.name for field in fields(Recipe))

# What a file holds beside the fields: who wrote it, and a key that the base class adds to every file.
_NO_FIELDS = frozenset({"block_pruning_version", "optimum_version", "transformers_version", "output_attentions"})

_HUB_ARGUMENTS = ("private", "token", "revision", "create_pr", "commit_message", "commit_description")


class BlockPruningConfig(BaseConfig):
    """What to remove, how to choose it, and on which text.

    The fields are those of `Recipe`, which documents each of them. At most one budget (`sparsity`, `num_blocks`,
    `target_params`, `target_size_gb`, `max_ppl_increase`, `max_kl`, `target_speedup`) may be given; without one, a
    fifth of the blocks goes. Everything is checked on construction, and again where `recipe` is read, since attributes
    of a configuration can be set.

    `strategy="auto"` stands for what `benchmarks/quality.py` shows to keep most: see `presets`.

    Raises:
        ConfigurationError: A field is unknown or has an impossible value, or the strategy has no such option.
        UnknownStrategyError: The strategy is not installed.
    """

    CONFIG_NAME = CONFIG_FILE
    FULL_CONFIGURATION_FILE = CONFIG_FILE

    def __init__(
        self,
        strategy: str = Recipe.strategy,
        sparsity: float | None = Recipe.sparsity,
        *,
        num_blocks: int | None = Recipe.num_blocks,
        target_params: int | None = Recipe.target_params,
        target_size_gb: float | None = Recipe.target_size_gb,
        max_ppl_increase: float | None = Recipe.max_ppl_increase,
        max_kl: float | None = Recipe.max_kl,
        target_speedup: float | None = Recipe.target_speedup,
        held_out_dataset: Any = Recipe.held_out_dataset,
        held_out_samples: int | None = Recipe.held_out_samples,
        unit: str | None = Recipe.unit,
        objective: str | None = Recipe.objective,
        stack: str | None = Recipe.stack,
        dataset: Any = Recipe.dataset,
        dataset_text_field: str | None = Recipe.dataset_text_field,
        num_samples: int = Recipe.num_samples,
        seqlen: int = Recipe.seqlen,
        batch_size: int = Recipe.batch_size,
        seed: int = Recipe.seed,
        use_chat_template: bool = Recipe.use_chat_template,
        calibration_recipe: str = Recipe.calibration_recipe,
        protect_first: int | None = Recipe.protect_first,
        protect_last: int | None = Recipe.protect_last,
        compensation: str = Recipe.compensation,
        generated_samples: int | None = Recipe.generated_samples,
        layout: str = Recipe.layout,
        align: int = Recipe.align,
        strategy_options: dict[str, Any] | None = Recipe.strategy_options,
        **unknown: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in FIELD_NAMES}
        # The base class drops unknown names that mean something in text generation, such as `top_k`, and keeps others.
        _refuse_unknown(unknown)
        super().__init__()
        for name, value in spelt_out(given).items():
            setattr(self, name, value)
        self.strategy_options = _checked_options(self.recipe)

    @property
    def recipe(self) -> Recipe:
        """The fields as a frozen, checked value."""
        return Recipe(**_values(self))

    def __eq__(self, other: object) -> bool:
        # The base class compares its own fields only, and would call any two of these equal.
        return isinstance(other, BlockPruningConfig) and _values(self) == _values(other)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields and the versions that wrote them as JSON types; a dataset in memory becomes `None`.

        The plan keeps the fingerprint of such a dataset.
        """
        values = _values(self)
        texts = {name: values.pop(name) for name in ("dataset", "held_out_dataset")}
        return {
            **deepcopy(values),
            **{
                name: os.fspath(each) if isinstance(each, (str, os.PathLike)) else None for name, each in texts.items()
            },
            "block_pruning_version": __version__,
            "optimum_version": optimum_version,
            "transformers_version": transformers_version,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns `to_dict()`: a saved configuration states every field, so that later defaults cannot change it."""
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Builds a configuration from what `to_dict` returned.

        Args:
            config_dict: Fields by name.
            **kwargs: Fields that replace those in `config_dict`. A budget replaces any other budget, another strategy
                the options of the first one. With `return_unused_kwargs=True` names that are no fields are returned.

        Raises:
            ConfigurationError: A name is unknown, or the fields do not fit.
        """
        if not isinstance(config_dict, Mapping):
            raise ConfigurationError(f"A configuration is a JSON object, not {type(config_dict).__name__}.")
        unused = None
        if kwargs.pop("return_unused_kwargs", False):
            unused = {name: kwargs.pop(name) for name in list(kwargs) if name not in FIELD_NAMES}
        values = {name: value for name, value in config_dict.items() if name not in _NO_FIELDS}
        _refuse_unknown({name: value for name, value in values.items() if name not in FIELD_NAMES})
        fault = json_fault(values)
        if fault:
            raise ConfigurationError(f"The configuration is malformed: {fault}.")
        config = cls(**_without_replaced(values, kwargs), **kwargs)
        return config if unused is None else (config, unused)

    @classmethod
    def from_plan(cls, plan: PruningPlan) -> BlockPruningConfig:
        """Builds the configuration that a plan was made with, as far as the plan knows it (the dataset is not in it).

        Raises:
            ConfigurationError: The plan removes nothing, joins several searches, or its strategy is not installed.
        """
        if not plan.num_removed and not plan.width:
            raise ConfigurationError("A plan that removes nothing has no configuration: every budget removes a block.")
        if len(plan.parts()) > 1:
            raise ConfigurationError(
                f"Several searches ({plan.strategy}) are no one configuration; the plan has it all."
            )
        stack = None if plan.stack == "decoder" else plan.stack
        fitted = plan.details.get("compensation", {})
        asked = {"compensation": fitted.get("asked"), "generated_samples": fitted.get("generated_samples")}
        compensation = {name: value for name, value in asked.items() if value is not None}
        if plan.strategy == "manual":
            named = {"blocks": ",".join(plan.removed_names)}
            return cls("manual", num_blocks=plan.num_removed, stack=stack, strategy_options=named, **compensation)
        options = dict(plan.options) or None
        width = {"layout": plan.width.layout, "align": plan.details.get("align", 1)} if plan.width else {}
        no_budget = set(plan.requested) - set(BUDGET_FIELDS)
        if no_budget:
            raise ConfigurationError(f"The plan was asked for by {min(no_budget)!r}, which is no budget.")
        unit = {"unit": plan.details["unit"]} if "unit" in plan.details else {}
        objectives = get_strategy(plan.strategy).objectives
        # The strategy's own default is left to it, as it was most likely not asked for.
        objective = {"objective": plan.details["objective"]} if plan.details.get("objective") in objectives[1:] else {}
        fields = {
            "stack": stack,
            "strategy_options": options,
            "seed": plan.seed,
            **width,
            **unit,
            **objective,
            **compensation,
        }
        return cls(plan.strategy, **plan.requested, **fields)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Reads a configuration from a folder, a file or a repository on the Hub.

        Args:
            pretrained_model_name_or_path: Folder with `block_pruning_config.json`, path of a file, or repo id.
            **kwargs: `revision`, `token`, `cache_dir` and the like; all other names replace fields, see `from_dict`.

        Raises:
            ConfigurationError: There is no such file, it is no JSON, or its fields do not fit.
        """
        source = Path(pretrained_model_name_or_path)
        if source.suffix == ".json" and not source.is_file():  # else it would be looked for on the Hub
            raise ConfigurationError(f"There is no file '{source}'.")
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            raise ConfigurationError(
                f"No {CONFIG_FILE} can be read from '{pretrained_model_name_or_path}': {error}"
            ) from error

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """Reads the one file; the base class would go on to any other that the key `configuration_files` names."""
        return cls._get_config_dict(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        try:
            found = super()._dict_from_json_file(json_file)
        except (RecursionError, ValueError) as error:
            raise ConfigurationError(f"'{json_file}' is not a valid JSON file: {error}.") from error
        if not isinstance(found, dict):
            raise ConfigurationError(f"A configuration is a JSON object, not {type(found).__name__}: '{json_file}'.")
        return found

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **hub_kwargs: Any
    ) -> None:
        """Writes `block_pruning_config.json` into a folder.

        Args:
            save_directory: The folder; made if it does not exist.
            push_to_hub: Also upload the file.
            **hub_kwargs: Arguments of `push_to_hub`; `repo_id` defaults to the name of the folder.

        Raises:
            ConfigurationError: The attributes were changed to values that do not fit, or an argument is unknown.
            OutputError: `save_directory` is a file.
            HubError: The upload failed; the file stays.
        """
        if hub_kwargs and not push_to_hub:
            raise ConfigurationError(f"{', '.join(sorted(hub_kwargs))} only count together with push_to_hub=True.")
        repo_id = hub_kwargs.pop("repo_id", Path(save_directory).resolve().name)
        _check_hub_arguments(hub_kwargs)
        if push_to_hub:
            check_repo_id(repo_id)
        _checked_options(self.recipe)
        folder = Path(save_directory)
        if folder.is_file():
            raise OutputError(f"'{folder}' is a file; give a folder for {CONFIG_FILE}.")
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / CONFIG_FILE)
        if push_to_hub:
            push_file(folder / CONFIG_FILE, repo_id, **hub_kwargs)

    def push_to_hub(self, repo_id: str, **hub_kwargs: Any) -> Any:
        """Uploads `block_pruning_config.json`, and only this file, to a repository, which is made if needed.

        Args:
            repo_id: `name` or `owner/name` on the Hub.
            **hub_kwargs: `private`, `token`, `revision`, `create_pr`, `commit_message` and `commit_description`, as
                for `BlockPruner.push_to_hub`.

        Returns:
            The `CommitInfo` of the upload.

        Raises:
            ConfigurationError: An argument is unknown.
            HubError: The name is malformed, or the upload failed.
        """
        _check_hub_arguments(hub_kwargs)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_file(Path(folder) / CONFIG_FILE, repo_id, **hub_kwargs)


def save_config_of(plan: PruningPlan, folder: Path) -> None:
    """Writes the configuration of `plan` into `folder`; none where there is none, which the plan makes up for."""
    try:
        config = BlockPruningConfig.from_plan(plan)
    except ConfigurationError as error:
        logger.info(f"No {CONFIG_FILE} is written: {error}")
        return
    config.save_pretrained(folder)


def _check_hub_arguments(given: Mapping[str, Any]) -> None:
    for name in set(given) - set(_HUB_ARGUMENTS):
        raise ConfigurationError(f"Unknown argument {name!r} for an upload.{nearest(name, _HUB_ARGUMENTS)}")


def _values(config: BlockPruningConfig) -> dict[str, Any]:
    """Returns the fields of a configuration as they are now."""
    return {name: getattr(config, name) for name in FIELD_NAMES}


def _refuse_unknown(unknown: Mapping[str, Any]) -> None:
    """Raises for the first name that is no field."""
    for name in unknown:
        raise ConfigurationError(f"Unknown field {name!r} in the configuration.{nearest(name, FIELD_NAMES)}")


def _checked_options(recipe: Recipe) -> dict[str, Any] | None:
    """Returns the options that were given, with the types that the strategy declares."""
    strategy = get_strategy(recipe.strategy)
    options = build_options(strategy, recipe.strategy_options or {})
    if recipe.strategy_options is None:
        return None
    return {name: getattr(options, name) for name in recipe.strategy_options}


def _without_replaced(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that the overrides leave in force."""
    replaced = set(overrides)
    if any(overrides.get(name) is not None for name in BUDGET_FIELDS):
        replaced.update((*BUDGET_FIELDS, *HELD_OUT_FIELDS))
    if overrides.get("strategy", values.get("strategy")) != values.get("strategy"):
        replaced.add("strategy_options")
    return {name: value for name, value in values.items() if name not in replaced}
