# SPDX-License-Identifier: Apache-2.0
"""Holds a narrowed specimen to the dense one with inputs of its writers set to zero: exact, refused, or wrong.

The way is the user's: `BlockPruner.prune` with a configuration or a plan and a folder, the folder loaded again. Of the
plan, the truth takes the names of the writers and the numbers of the kept units; what a number means is counted here.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import transformers
from exactness import EXACT, LATE, REFUSED, WRONG, Subject, Verdict, _agree, _same_cached, relative
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from zoo import causal

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan
from optimum_blockprune.errors import UnsupportedModelError
from optimum_blockprune.loading import load_model


TOLERANCE = 1e-5
FAMILIES = ("mlp", "attention")
LAYOUTS = ("uniform", "padded", "per_layer")

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")


@dataclass(frozen=True)
class Case(Subject):
    """A specimen with other fields.

    Attributes:
        label: Tells it from others of the same specimen.
        blocks: Number of blocks; the specimen's own if `None`.
        fields: Further fields of its configuration.
    """

    label: str = ""
    blocks: int | None = None
    fields: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{super().__str__()}{self.label and '-'}{self.label}"

    def model(self) -> PreTrainedModel:
        """See `Subject.model`."""
        if self.group != "causal":
            return super().model()
        return causal.tiny_model(self.name, self.blocks, **dict(self.fields))

    def block_list(self, model: PreTrainedModel) -> nn.ModuleList:
        """The blocks, by the path that the specimen writes down."""
        return self._list(model)


def case(name: str, label: str = "", blocks: int | None = 3, **fields: Any) -> Case:
    """A causal specimen."""
    return Case("causal", name, None, label, blocks, tuple(fields.items()))


def width_config(family: str, layout: str, *, align: int = 1, **fields: Any) -> BlockPruningConfig:
    """Two fifths of the channels or heads, drawn at random."""
    options = {"unit": "width", "families": family}
    given = {"sparsity": 0.4, "align": align, "layout": layout, "strategy_options": options, **fields}
    return BlockPruningConfig(strategy="random", **given)


def uneven(plan: PruningPlan) -> PruningPlan:
    """The plan with another number of units in every block."""
    width = plan.width
    generator = random.Random(0)
    shares = cycle((0.5, 1.0, 0.75, 0.3))
    # Two KV heads, of which one stays, leave nothing to differ in: then blocks are padded to both.
    room = tuple(max(2, each) for each in width.padded_to) or tuple(group.units for group in width.groups)
    narrowed = []
    for each in width.narrowed:
        count = max(1, int(room[each.group] * next(shares)))
        kept = generator.sample(range(width.groups[each.group].units), count)
        narrowed.append(replace(each, kept=tuple(sorted(kept))))
    return replace(
        plan, width=replace(width, narrowed=tuple(narrowed), padded_to=room if width.layout == "padded" else ())
    )


# --- the truth ---------------------------------------------------------------------------------------------------


def heads_of(subject: Subject, model: PreTrainedModel) -> tuple[int, int]:
    """Query heads and KV heads by the configuration of the dense model."""
    config, stack = model.config, subject.stack or "decoder"
    places = subject.facts.get("text_config") or "text_config"
    for part in (stack, *places.split(".")):
        nested = getattr(config, part, None)
        config = nested if isinstance(nested, PretrainedConfig) else config
    stored = config.to_dict()
    found = [
        next((stored[name] for name in names if isinstance(stored.get(name), int)), None)
        for names in ((f"{stack}_attention_heads", *_HEADS), _KV_HEADS)
    ]
    return found[0], found[1] or found[0]


def inputs_per_unit(subject: Subject, model: PreTrainedModel, unit: str, inputs: int) -> int:
    """How many inputs of a writer belong to one unit."""
    if unit == "channel":
        return 1
    heads, kv_heads = heads_of(subject, model)
    assert inputs % heads == 0, f"{inputs} inputs of {heads} heads"
    return inputs // heads * (heads // kv_heads if unit == "kv_group" else 1)


def inputs_of(writer: nn.Module) -> int:
    """Inputs of a projection, by its weight."""
    assert isinstance(writer, nn.Linear) or type(writer).__name__ == "Conv1D", type(writer).__name__
    return writer.weight.shape[1] if isinstance(writer, nn.Linear) else writer.weight.shape[0]


def masked(subject: Case, model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """The truth: a deep copy whose writers read zeros from the removed units."""
    twin = copy.deepcopy(model)
    blocks = subject.block_list(twin)
    for each in plan.width.narrowed:
        group = plan.width.groups[each.group]
        writer = blocks[each.block].get_submodule(group.writer)
        size = inputs_per_unit(subject, model, group.unit, inputs_of(writer))
        assert group.units * size == inputs_of(writer), f"{group.units} units of {size} in {group.writer}"
        off = torch.ones(inputs_of(writer), dtype=torch.bool)
        for unit in each.kept:
            off[unit * size : (unit + 1) * size] = False
        writer.register_forward_pre_hook(lambda _module, args, off=off: (args[0].masked_fill(off, 0), *args[1:]))
    return twin


# --- the verdict ---------------------------------------------------------------------------------------------------


def judge(subject: Case, family: str, layout: str, *, align: int = 1) -> Verdict:
    """Narrows a fresh specimen and compares it with the truth."""
    model = subject.model()
    dense = copy.deepcopy(model)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    config = width_config(family, layout, align=align, stack=subject.stack)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "pruned"
        try:
            pruner = BlockPruner(model, config)
            # The random strategy keeps as many in every block.
            plan = None if layout == "uniform" else uneven(pruner.make_plan())
            pruner.prune(save_dir=folder, plan=plan)
        except UnsupportedModelError as error:
            early = same_model(model, dense) and not folder.exists()
            return Verdict(REFUSED if early else LATE, f"{len(calls)} passes, {error}")
        except Exception as error:  # whatever it is, it is no verdict that a user may see
            return Verdict(LATE, f"{type(error).__name__}: {error}")
        return _compared(subject, dense, model, pruner.plan, folder)


def rounding(subject: Case, model: PreTrainedModel, inputs: dict[str, Tensor]) -> float:
    """What one step in the last place of every weight changes: some models make more of it than others."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1 + 6e-8 * torch.randn(parameter.shape, generator=generator).sign())
    return relative(subject.logits(twin, inputs), subject.logits(model, inputs))


def same_model(model: PreTrainedModel, dense: PreTrainedModel) -> bool:
    """Whether nothing is left of a pruning: every bit and every field."""
    live, before = model.state_dict(), dense.state_dict()
    same = live.keys() == before.keys() and all(torch.equal(live[name], before[name]) for name in before)
    return same and model.config.to_dict() == dense.config.to_dict() and str(model) == str(dense)


def _compared(
    subject: Case, dense: PreTrainedModel, model: PreTrainedModel, plan: PruningPlan, folder: Path
) -> Verdict:
    faults = list(_sizes(subject, dense, model, plan))
    if plan.width.layout == "per_layer":
        reloaded = load_model(folder)
        faults += _loads(subject, folder, model)
    else:
        reloaded, info = subject.reload(folder, model)
        faults += [key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]]
    truth = masked(subject, dense, plan)
    for each in subject.inputs(dense):
        wanted = subject.logits(truth, each)
        if relative(wanted, subject.logits(dense, each)) < 1e-3:
            faults.append(f"nothing changes on {sorted(each)}")
        for place, pruned in (("in memory", model), ("reloaded", reloaded)):
            error = relative(subject.logits(pruned, each), wanted)
            if not (error <= TOLERANCE or error <= 4 * rounding(subject, truth, each) < 1e-3):
                faults.append(f"logits {place} differ by {error:.1e} on {sorted(each)}")
    if faults:
        return Verdict(WRONG, "; ".join(faults))
    return _generated(subject, dense, reloaded)


def _generated(subject: Case, dense: PreTrainedModel, pruned: PreTrainedModel) -> Verdict:
    """Generation with a cache equals generation without one, or the dense model has no such either."""
    inputs = subject.inputs(dense)[0]
    try:
        if dense.can_generate() and _agree(pruned, inputs):
            return Verdict(EXACT)
    except Exception:  # what is to be made of it depends on the dense model
        pass
    return _same_cached(subject, dense, pruned, inputs)


def _sizes(subject: Case, dense: PreTrainedModel, model: PreTrainedModel, plan: PruningPlan) -> Iterator[str]:
    """A unit is gone, not only off."""
    width = plan.width
    for each in width.narrowed:
        group = width.groups[each.group]
        before, after = (subject.block_list(one)[each.block].get_submodule(group.writer) for one in (dense, model))
        size = inputs_per_unit(subject, dense, group.unit, inputs_of(before))
        units = width.padded_to[each.group] if width.layout == "padded" else len(each.kept)
        if inputs_of(after) != units * size or getattr(after, "in_features", inputs_of(after)) != inputs_of(after):
            yield f"{group.writer} of block {each.block} has {inputs_of(after)} inputs, not {units * size}"


def _loads(subject: Case, folder: Path, model: PreTrainedModel) -> Sequence[str]:
    """Stock classes must fail on blocks of different widths."""
    try:
        getattr(transformers, type(model).__name__).from_pretrained(folder)
    except RuntimeError as error:
        # Of files that are converted while they are read, it is the conversion that fails.
        loud = "mismatch" in str(error) or "conversion" in str(error)
        return [] if loud else [f"stock loading fails otherwise: {error}"]
    return ["stock classes load it without a word"]
