# SPDX-License-Identifier: Apache-2.0
"""Holds a pruned specimen of the zoo to the dense one with silenced blocks: exact, refused before any work, or wrong.

The way is the user's: a plan for named blocks, `BlockPruner.prune` with a folder, the folder loaded by the specimen's
own class of transformers. The truth is the zoo's, which knows nothing of the package.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from zoo import causal, multimodal, other_stacks

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan
from optimum_blockprune.architectures import layout_for
from optimum_blockprune.errors import BlockPruningError, PlanError, UnsupportedModelError


TOLERANCE = 2e-4
EXACT, REFUSED, LATE, WRONG = "exact", "refused", "refused late", "wrong"


@dataclass(frozen=True)
class Subject:
    """One stack of one specimen.

    Attributes:
        group: `"causal"`, `"multimodal"`, `"encoder"` or `"encoder-decoder"`.
        name: The specimen.
        stack: The stack that loses blocks; `None` where there is only one.
    """

    group: str
    name: str
    stack: str | None = None

    def __str__(self) -> str:
        return self.name if self.stack is None else f"{self.name}:{self.stack}"

    @property
    def facts(self) -> dict[str, Any]:
        """The specimen as stored."""
        module = {"causal": causal, "multimodal": multimodal}.get(self.group, other_stacks)
        return module.SPECIMENS[self.name]

    @property
    def model_type(self) -> str:
        """The type of the whole model."""
        return self.facts["model_type"]

    @property
    def text_type(self) -> str:
        """The type of the configuration that describes the blocks."""
        return layout_for(self.model(), self.stack).model_type if self.accepted else self.model_type

    @property
    def accepted(self) -> bool:
        """Whether the package knows the stack at all."""
        try:
            layout_for(self.model(), self.stack)
        except UnsupportedModelError:
            return False
        return True

    def model(self) -> PreTrainedModel:
        """A fresh dense model."""
        module = {"causal": causal, "multimodal": multimodal}.get(self.group, other_stacks)
        return module.tiny_model(self.name)

    def depth(self, model: PreTrainedModel) -> int:
        """Number of blocks of the stack."""
        return len(self._list(model))

    def inputs(self, model: PreTrainedModel) -> list[dict[str, Tensor]]:
        """What the model is called with: text, and text with images where the zoo makes them."""
        if self.group == "causal":
            return [{"input_ids": causal.random_ids()}]
        if self.group == "multimodal":
            images = self.name in multimodal.WITH_IMAGES
            return [multimodal.text_inputs(self.name)] + (
                [multimodal.image_inputs(self.name, model)] if images else []
            )
        return [other_stacks.inputs(self.name, model)]

    def logits(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        """An ordinary pass."""
        inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        if self.group == "causal":
            return causal.plain_logits(model, inputs["input_ids"])
        module = multimodal if self.group == "multimodal" else other_stacks
        return module.plain_logits(model, inputs)

    def silenced(self, model: PreTrainedModel, off: Collection[int]) -> PreTrainedModel:
        """The truth."""
        if self.group in ("causal", "multimodal"):
            return (causal if self.group == "causal" else multimodal).silenced(self.name, model, off)
        return other_stacks.silenced(self.name, model, self.stack or "encoder", off)

    def kinds(self, depth: int) -> dict[str, tuple[int, ...]]:
        """For every kind of block that the specimen writes down: all blocks of it."""
        lists = self.facts.get("per_block", {})
        lists = lists.get(self.stack or "encoder", {}) if self.group.startswith("encoder") else lists
        found = {}
        for field, pattern in lists.items():
            for kind in {str(entry): entry for entry in pattern}.values():
                blocks = tuple(block for block in range(depth) if pattern[block % len(pattern)] == kind)
                if 0 < len(blocks) < depth:
                    found[f"{field}={kind}"] = blocks
        return found

    def reload(self, folder: str | Path, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Loads a folder with the model's own class."""
        reloaded, info = getattr(transformers, type(model).__name__).from_pretrained(folder, output_loading_info=True)
        return reloaded.eval(), info

    def _list(self, model: PreTrainedModel) -> Any:
        if self.group in ("causal", "multimodal"):
            return (causal if self.group == "causal" else multimodal).block_list(self.name, model)
        return other_stacks.block_list(self.name, model, self.stack or "encoder")


@dataclass(frozen=True)
class Verdict:
    """What came of one removal: `EXACT`, `REFUSED` (before any work), `LATE` or `WRONG`, with the reason."""

    status: str
    reason: str = ""


SUBJECTS: tuple[Subject, ...] = (
    *(Subject("causal", name) for name in causal.NAMES),
    *(Subject("multimodal", name) for name in multimodal.NAMES),
    *(Subject("encoder", name) for name in other_stacks.ENCODERS if other_stacks.stacks(name) == ("encoder",)),
    *(
        Subject("encoder-decoder", name, stack)
        for name in (*other_stacks.SEQ2SEQ, *other_stacks.ENCODERS)
        # The speech-to-text classes of Seamless have another encoder than the one that the configuration counts.
        if len(other_stacks.stacks(name)) == 2 and "#speech" not in name
        for stack in other_stacks.stacks(name)
    ),
)


def removals(subject: Subject, depth: int) -> dict[str, tuple[int, ...]]:
    """The first inner block, two that are not neighbours, the last one, the first one, random ones, all of a kind."""
    seed = sum(map(ord, str(subject)))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(depth, generator=generator).tolist()
    return {
        "inner": (1,),
        "apart": (3, 1),
        "last": (depth - 1,),
        "first": (0,),
        "random": tuple(order[: 2 + seed % (depth - 3)]),
        **subject.kinds(depth),
    }


def judge(subject: Subject, removed: tuple[int, ...]) -> Verdict:
    """Prunes a fresh specimen and compares it with the truth."""
    model = subject.model()
    config = BlockPruningConfig(stack=subject.stack)
    try:
        pruner = BlockPruner(model, config)
        plan = PruningPlan.from_blocks(model, list(removed), stack=subject.stack)
        calls = _forbid_forward(model)
        with tempfile.TemporaryDirectory() as folder:
            return _pruned(subject, pruner, plan, Path(folder) / "pruned", calls)
    except (UnsupportedModelError, PlanError) as error:
        return Verdict(REFUSED, str(error))


def judge_files(subject: Subject, removed: tuple[int, ...]) -> Verdict:
    """Prunes the files of a saved specimen without building it, and compares the result with the truth."""
    dense = subject.model()
    inputs = subject.inputs(dense)[0]
    try:
        plan = PruningPlan.from_blocks(dense, list(removed), stack=subject.stack)
        with tempfile.TemporaryDirectory() as place:
            dense.save_pretrained(Path(place) / "dense")
            plan.apply_to_checkpoint(Path(place) / "dense", Path(place) / "pruned")
            reloaded, info = subject.reload(Path(place) / "pruned", dense)
    except UnsupportedModelError as error:
        return Verdict(REFUSED, str(error))
    except BlockPruningError as error:
        return Verdict(LATE, f"{type(error).__name__}: {error}")
    faults = [key for key in ("missing_keys", "mismatched_keys") if info[key]]
    error = relative(subject.logits(reloaded, inputs), subject.logits(subject.silenced(dense, removed), inputs))
    exact = not faults and error <= TOLERANCE
    return Verdict(EXACT) if exact else Verdict(WRONG, f"{faults}, logits differ by {error:.1e}")


def _pruned(subject: Subject, pruner: BlockPruner, plan: PruningPlan, folder: Path, calls: list[int]) -> Verdict:
    model = pruner.model
    inputs = subject.inputs(model)
    dense = subject.model()
    try:
        pruner.prune(plan=plan, save_dir=folder)
    except UnsupportedModelError as error:
        return Verdict(LATE if calls else REFUSED, str(error))
    except Exception as error:  # whatever it is, it is no verdict that a user may see
        return Verdict(LATE, f"{type(error).__name__}: {error}")
    try:
        truths = [subject.logits(subject.silenced(dense, plan.removed_blocks), each) for each in inputs]
    except Exception as error:  # a truth that cannot be computed, and a pruned model that was accepted
        return Verdict(WRONG, f"the silenced dense model fails: {type(error).__name__}: {error}")
    reloaded, info = subject.reload(folder, model)
    faults = [key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]]
    if faults:
        return Verdict(WRONG, f"{faults} on loading: {[sorted(map(str, info[key]))[:3] for key in faults]}")
    for place, pruned in (("in memory", model), ("reloaded", reloaded)):
        for each, truth in zip(inputs, truths, strict=True):
            error = relative(subject.logits(pruned, each), truth)
            if not error <= TOLERANCE:
                return Verdict(WRONG, f"logits {place} differ by {error:.1e} on {sorted(each)}")
    return _same_cached(subject, dense, reloaded, inputs[0])


def _same_cached(
    subject: Subject, dense: PreTrainedModel, pruned: PreTrainedModel, inputs: dict[str, Tensor]
) -> Verdict:
    """Greedy generation with and without a cache, where they agree for the dense model."""
    if not dense.can_generate() or not subject.facts.get("generates", True):
        return Verdict(EXACT, "generation not compared: the specimen does not generate")
    try:
        agree = _agree(dense, inputs)
    except Exception as error:  # the dense model fails by itself
        return Verdict(EXACT, f"generation not compared: the dense model fails ({type(error).__name__})")
    if not agree:
        return Verdict(EXACT, "generation not compared: the dense model's cache changes its own tokens")
    try:
        if _agree(pruned, inputs):
            return Verdict(EXACT)
    except ValueError as error:
        # A random model may well write the placeholder of an image or a sound that is not there.
        return Verdict(EXACT, f"generation not compared: {' '.join(str(error).split())[:60]}")
    if not all(_agree(dense, other) for other in _rolled(inputs)):
        return Verdict(
            EXACT, "generation not compared: the dense model's cache changes its own tokens for other texts"
        )
    return Verdict(WRONG, "cached generation differs from uncached")


def _rolled(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The same inputs with their tokens in other orders."""
    tokens = inputs.get("input_ids")
    return [] if tokens is None else [{**inputs, "input_ids": tokens.roll(step, 1)} for step in range(1, 9)]


def _agree(model: PreTrainedModel, inputs: dict[str, Tensor]) -> bool:
    """Compares scores of every step; a token may flip where rounding decides between equals."""
    cached, uncached = (_generate(model, inputs, use_cache) for use_cache in (True, False))
    if not torch.equal(cached.sequences, uncached.sequences):
        first = next(step for step, pair in enumerate(zip(cached.logits, uncached.logits, strict=True)) if _far(*pair))
        return first == len(cached.logits)
    return not any(map(_far, cached.logits, uncached.logits))


def _far(one: Tensor, other: Tensor) -> bool:
    return not relative(one, other) <= TOLERANCE


def _generate(model: PreTrainedModel, inputs: dict[str, Tensor], use_cache: bool) -> Any:
    given = {name: tensor.clone() for name, tensor in inputs.items() if not name.startswith("decoder_")}
    if "input_ids" in given and "attention_mask" not in given:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": 1}
    return GenerationMixin.generate(
        model, **given, **settings, use_cache=use_cache, return_dict_in_generate=True, output_logits=True
    )


def _forbid_forward(model: PreTrainedModel) -> list[int]:
    """Counts finished forward passes: a refusal must come before the first one."""
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def relative(one: Tensor, truth: Tensor) -> float:
    """Largest difference by the largest value; infinite for other shapes and NaN."""
    if one.shape != truth.shape:
        return float("inf")
    error = ((one - truth).abs().max() / truth.abs().max().clamp_min(1e-9)).item()
    return error if error == error else float("inf")
