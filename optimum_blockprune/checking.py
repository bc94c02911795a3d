# SPDX-License-Identifier: Apache-2.0
"""Says from a configuration alone what can be removed from a model, what has to stay, and who reads the result.

No weight is read and nothing is downloaded but the configuration: the models that are looked at are empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .architectures import Layout, descend, layout_for
from .blocks import BlockStack, find_blocks
from .errors import UnsupportedModelError
from .kinds import Kind, kind_of
from .plan import PruningPlan
from .runtimes import read_alike
from .template import make_template
from .units import find_units
from .widths import FAMILIES


# An empty model cannot be run, and halves are found by running blocks.
_TRIED = (
    "tried on the weights, before any text is read: attention and MLP must add to the residual stream one after the "
    "other"
)


@dataclass(frozen=True)
class Check:
    """What is known of one stack of a model before any weight is read.

    Attributes:
        model_type, class_name: Of the whole model.
        stack: `"decoder"` or `"encoder"`; `None` where there is nothing to prune.
        num_blocks: Number of blocks; `None` where it is not known.
        units: What can be removed: `"block"`, `"half_block"`, `"mlp"` (channels), `"attention"` (heads), each with
            `"yes"` or the reason why not; of half-blocks, the reason or that it is tried on the weights. Of width,
            what an ordinary checkpoint can hold; it is tried on the weights.
        search: Whether a search may choose blocks: `"yes"` or the reason why they have to be named.
        removable: Blocks that may go, one at a time or together.
        protected: Blocks that stay, with the reason.
        evidence: `"proven"` by the test suite, or `"gate"`: each result is held to the dense model before it is kept.
        cache: Why generation with a KV cache cannot be compared; `None` if it is.
        runtimes: For every runtime, how it reads the configuration as it is (or as the named blocks leave it), and
            which single blocks may go so that it goes on reading it like transformers.
        changes: The configuration fields that follow, if blocks were named.
    """

    model_type: str
    class_name: str | None
    stack: str | None = None
    num_blocks: int | None = None
    units: Mapping[str, str] = field(default_factory=dict)
    search: str | None = None
    removable: tuple[int, ...] = ()
    protected: Mapping[int, str] = field(default_factory=dict)
    evidence: str | None = None
    cache: str | None = None
    runtimes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prunable(self) -> bool:
        """Whether blocks (the named ones, if any were) can be removed."""
        return self.units.get("block") == "yes"

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON types."""
        values = {"prunable": self.prunable, **asdict(self)}
        values["protected"] = {str(block): reason for block, reason in self.protected.items()}
        return values


def check_config(
    config: PretrainedConfig,
    *,
    stack: str | None = None,
    removed: Iterable[int] | None = None,
    remote_code: bool = False,
) -> list[Check]:
    """Checks every stack of a model, or one.

    Args:
        config: The model's configuration.
        stack: `"decoder"` or `"encoder"`; all there are unless given.
        removed: Blocks to ask about; any single one unless given.
        remote_code: Whether code that came with the configuration may build the model.

    Raises:
        UnsupportedModelError: There is no such stack.
        PlanError: There is no such block.
    """
    kind = kind_of(config)
    if kind is None:
        try:
            layout_for(config)
        except UnsupportedModelError as error:
            return [Check(config.model_type, None, units={"block": str(error)})]
    wanted = kind.stacks if stack is None else (layout_for(config, stack).stack,)
    removed = None if removed is None else tuple(removed)
    return [_check_stack(config, kind, each, removed, remote_code) for each in wanted]


def _check_stack(
    config: PretrainedConfig, kind: Kind, stack: str, removed: tuple[int, ...] | None, remote_code: bool
) -> Check:
    known: dict[str, Any] = {"model_type": config.model_type, "class_name": kind.class_name, "stack": stack}
    units: dict[str, str] = {}
    try:
        layout = layout_for(config, stack)
        known |= {"num_blocks": layout.num_blocks, "evidence": "proven" if layout.proven else "gate"}
        blocks = find_blocks(_empty_model(config, kind, remote_code), stack)
        units |= {"half_block": _halves_of(blocks)}
        units |= {family: _width_of(blocks, family) for family in FAMILIES}
        if removed is not None:
            plan = PruningPlan.from_removed(layout.model_type, layout.num_blocks, removed, stack=stack)
            make_template(blocks, plan)
            return Check(
                **known,
                units={"block": "yes", **units},
                removable=removed,
                cache=layout.uncached(),
                changes=layout.changes(plan),
                runtimes=_runtimes(descend(layout.edited(plan), layout.place)),
            )
        allowed = {block: _why_not(blocks, block) for block in range(layout.num_blocks)}
    except UnsupportedModelError as error:
        return Check(**known, units={"block": str(error), "half_block": str(error), **units})
    return _summed_up(layout, known, units, allowed)


def _summed_up(layout: Layout, known: dict[str, Any], units: dict[str, str], allowed: dict[int, str | None]) -> Check:
    singles = tuple(block for block, problem in allowed.items() if problem is None)
    if not singles:
        return Check(**known, units={"block": next(iter(allowed.values())), **units})
    try:
        protected = layout.protected()
    except UnsupportedModelError as error:
        return _named_only(layout, known, units, singles, str(error))
    protected = {**{block: problem for block, problem in allowed.items() if problem is not None}, **protected}
    return Check(
        **known,
        units={"block": "yes", **units},
        search="yes",
        removable=tuple(block for block in singles if block not in protected),
        protected=dict(sorted(protected.items())),
        cache=layout.uncached(),
        runtimes=_runtimes_of_singles(layout, singles),
    )


def _named_only(
    layout: Layout, known: dict[str, Any], units: dict[str, str], singles: tuple[int, ...], reason: str
) -> Check:
    """Some blocks can go, but not any choice of them: the user has to name them."""
    return Check(
        **known,
        units={"block": "yes", **units},
        search=reason,
        removable=singles,
        cache=layout.uncached(),
        runtimes=_runtimes_of_singles(layout, singles),
    )


def _halves_of(blocks: BlockStack) -> str:
    """Why blocks have no halves, as far as an empty model tells; else that it is tried."""
    for number, block in enumerate(blocks.blocks):
        if any(True for _ in block.parameters(recurse=False)):
            return f"block {number} holds weights outside its modules, which belong to neither half"
        if len(list(block.children())) < 2:
            return f"block {number} is one module, not attention and MLP"
    return _TRIED


def _width_of(blocks: BlockStack, family: str) -> str:
    """Whether the configuration can say that there are fewer channels or heads."""
    reason = blocks.layout.whole_attention() if family == "attention" else None
    if reason is not None:
        return reason
    found, reasons = find_units(blocks, family)
    return "yes" if found else "; ".join(dict.fromkeys(reasons)) or "its configuration has no field for their number"


def _why_not(blocks: BlockStack, block: int) -> str | None:
    """Why one block alone cannot go; `None` if it can. The last one is also built, to see that the class allows it."""
    layout = blocks.layout
    try:
        plan = PruningPlan.from_removed(layout.model_type, layout.num_blocks, [block], stack=layout.stack)
        layout.check(plan)
        if not layout.proven or block in (0, 1, layout.num_blocks - 1):
            make_template(blocks, plan)
    except UnsupportedModelError as error:
        return str(error)
    return None


def _runtimes(config: PretrainedConfig) -> dict[str, dict[str, Any]]:
    found = {"transformers": {"verdict": "same", "reason": "every result is loaded and compared before it is kept"}}
    others = read_alike(config.to_dict())
    return found | {name: {"verdict": each.verdict, "reason": each.reason} for name, each in others.items()}


def _runtimes_of_singles(layout: Layout, singles: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """The verdicts on the model as it is, and the blocks without which they stay `"same"`."""
    found = _runtimes(layout.config)
    alike: dict[str, list[int]] = {name: [] for name in found}
    alike["transformers"] = list(singles)
    for block in singles:
        plan = PruningPlan.from_removed(layout.model_type, layout.num_blocks, [block], stack=layout.stack)
        for name, verdict in read_alike(descend(layout.edited(plan), layout.place).to_dict()).items():
            if verdict.verdict == "same":
                alike[name].append(block)
    return {name: {**verdict, "same_without": alike[name]} for name, verdict in found.items()}


def _empty_model(config: PretrainedConfig, kind: Kind, remote_code: bool) -> PreTrainedModel:
    with torch.device("meta"):
        if kind.class_name is None:
            return kind.auto_class.from_config(config, trust_remote_code=remote_code)
        return kind.auto_class(config)
