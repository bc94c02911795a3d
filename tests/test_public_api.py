# SPDX-License-Identifier: Apache-2.0
"""The public names: what they are, that they are documented, and that importing them is light."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import optimum_blockprune


PUBLIC = [
    "BlockPruner",
    "BlockPruningConfig",
    "BlockPruningError",
    "PruningPlan",
    "PruningReport",
    "PruningStrategy",
    "UnsupportedModelError",
    "available_strategies",
    "get_strategy",
]
CHECK_LIGHT = """
import sys
import optimum_blockprune
from optimum_blockprune import PruningPlan, PruningStrategy, available_strategies
heavy = {"torch", "transformers", "numpy", "datasets", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""


def test_all_is_the_sorted_list_of_public_names() -> None:
    assert optimum_blockprune.__all__ == sorted(optimum_blockprune.__all__) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_and_documented(name) -> None:
    assert getattr(optimum_blockprune, name).__doc__


def test_dir_lists_names_that_are_not_loaded_yet() -> None:
    assert {*PUBLIC, "__version__"} <= set(dir(optimum_blockprune))


def test_unknown_names_raise_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'optimum_blockprune' has no attribute 'BlockPrunner'"):
        _ = optimum_blockprune.BlockPrunner


def test_version_is_that_of_the_distribution() -> None:
    assert optimum_blockprune.__version__ == version("optimum-blockprune")


def test_importing_starts_no_heavy_library() -> None:
    subprocess.run([sys.executable, "-c", CHECK_LIGHT], check=True)
