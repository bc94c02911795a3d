# SPDX-License-Identifier: Apache-2.0
"""Loads models whose blocks have different widths, which no configuration of transformers describes.

The folder is an ordinary one in every other way. transformers builds the model at its dense width, the plan in the
folder narrows its empty blocks, and transformers reads the weights into them: devices, dtypes, shards and checks are
those of `from_pretrained`.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .blocks import find_blocks
from .errors import PlanError, UnsupportedModelError
from .narrowing import narrow
from .plan import PruningPlan


def has_own_widths(config: PretrainedConfig) -> bool:
    """Whether a checkpoint needs `narrowed_class` to be loaded."""
    entry = getattr(config, "block_pruning", None)
    return isinstance(entry, dict) and entry.get("layout") == "per_layer"


def refuse_own_widths(config: PretrainedConfig) -> None:
    """Raises for a model that was narrowed block by block: a second plan could not be told from the first."""
    if has_own_widths(config):
        raise UnsupportedModelError(
            f"This '{config.model_type}' model was pruned with layout='per_layer' before, and one plan must say "
            "all of it. Prune the dense model once, with a list of configurations: prune(config=[first, second])."
        )


def narrowed_class(kind: type[PreTrainedModel], plan: PruningPlan) -> type[PreTrainedModel]:
    """A class that builds the pruned model: `kind` with the widths of `plan`; see `as_plain`.

    Args:
        kind: The model's class.
        plan: What was pruned; its blocks are renumbered already in the configuration.
    """

    class Narrowed(kind):  # type: ignore[misc, valid-type]
        def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            blocks = find_blocks(self, plan.stack).blocks
            _require_fit(plan, blocks)
            for each in plan.width.narrowed:
                group = plan.width.groups[each.group]
                block = blocks[plan.new_place(each.block, group.writer)]
                narrow(block, group, each.kept, len(each.kept), setattr, own_config=True)

    Narrowed.__name__, Narrowed.__qualname__, Narrowed.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Narrowed


def _require_fit(plan: PruningPlan, blocks: nn.ModuleList) -> None:
    """Raises for a plan that came into the folder from elsewhere."""
    problem = (
        None if len(blocks) == len(plan.blocks) else f"it keeps {len(plan.blocks)} blocks, there are {len(blocks)}"
    )
    for each in plan.width.narrowed if problem is None else ():
        group = plan.width.groups[each.group]
        block = blocks[plan.new_place(each.block, group.writer)]
        shapes = {name: parameter.shape for name, parameter in block.named_parameters()}
        for cut in group.tensors:
            if cut.name not in shapes or shapes[cut.name][cut.axis] != cut.size(group.units):
                problem = problem or f"it cuts '{cut.name}' into {group.units} units, which does not fit"
    if problem is not None:
        raise PlanError(
            f"The plan in the folder belongs to another model: {problem}. Restore the pruning_plan.json that was "
            "written with it."
        )


def as_plain(model: PreTrainedModel, kind: type[PreTrainedModel]) -> PreTrainedModel:
    """Gives a loaded model back its own class, by whose name it is saved."""
    model.__class__ = kind
    return model
