# SPDX-License-Identifier: Apache-2.0
"""Names of modules and tensors inside the block list, before and after pruning."""

from __future__ import annotations

import re

from .plan import PruningPlan


def renumber_key(name: str, path: str, plan: PruningPlan) -> str | None:
    """Returns a module or tensor name after pruning; None if it belongs to a removed block.

    Args:
        name: Such as `model.layers.7.mlp.up_proj.weight`.
        path: Of the block list, such as `model.layers`.
        plan: The plan that renumbers.
    """
    match = re.match(rf"{re.escape(path)}\.(\d+)(?=\.|$)", name)
    if match is None:
        return name
    place = plan.new_place(int(match[1]), name[match.end() + 1 :])
    return None if place is None else f"{path}.{place}{name[match.end() :]}"
