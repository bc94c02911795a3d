# SPDX-License-Identifier: Apache-2.0
"""Settings of healing are checked before anything is done."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from optimum_blockprune.errors import ConfigurationError
from optimum_blockprune.healing_spec import HealingSpec


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lorra"}, "Unknown method 'lorra' of healing. Did you mean 'lora'"),
        ({"steps": 0}, "steps=0 is too small"),
        ({"steps": 2.0}, "steps must be a whole number"),
        ({"rank": True}, "rank must be a whole number"),
        ({"batch_size": 0}, "batch_size=0 is too small"),
        ({"seqlen": 1}, "seqlen=1 is too small"),
        ({"num_samples": 1}, "num_samples=1 is too small"),
        ({"learning_rate": 0}, "learning_rate must be a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number above 0"),
        ({"alpha": "2"}, "alpha must be a number above 0"),
        ({"held_out": 1}, "held_out must be a number above 0 and below 1"),
        ({"dropout": 1.0}, "dropout must be a number from 0 to below 1"),
        ({"steps": 5, "warmup": 6}, "warmup=6 is more than the 5 steps"),
        ({"target_modules": "q_proj"}, "target_modules must be a list of names"),
        ({"target_modules": []}, "target_modules must be a list of names"),
        ({"dataset_text_field": ""}, "dataset_text_field must be the name of a column"),
        ({"use_chat_template": 1}, "use_chat_template must be True or False"),
        ({"learning_rat": 1e-3}, "no setting 'learning_rat'. Did you mean 'learning_rate'"),
    ],
)
def test_what_is_impossible_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        HealingSpec.of(settings)


def test_every_setting_and_its_default_is_described() -> None:
    page = (Path(__file__).parents[1] / "docs" / "healing.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| `")]
    said = {
        name: value.strip()
        for names, values in rows
        for name, value in zip(re.findall("`(\\w+)`", names), values.split(", "), strict=False)
    }
    assert {each.name for each in fields(HealingSpec)} - {"method"} <= said.keys() | {"use_chat_template"}
    for each in fields(HealingSpec):
        if isinstance(each.default, (int, float)) and not isinstance(each.default, bool):
            assert float(said[each.name]) == each.default, each.name


def test_every_setting_has_a_help_text_and_what_was_changed_is_known() -> None:
    assert all(len(each.metadata["help"]) > 10 for each in fields(HealingSpec))
    assert HealingSpec().changed == {}
    spec = HealingSpec(steps=40, warmup=0, target_modules=("q_proj",))
    assert spec.changed == {"steps": 40, "warmup": 0, "target_modules": ("q_proj",)}
    assert spec.warmup_steps == 0 and HealingSpec(steps=40).warmup_steps == 2
