# SPDX-License-Identifier: Apache-2.0
"""The sweep over half-blocks: each causal model of the zoo loses an MLP and the next attention exactly or is refused.

The truth is the dense model in which the last module of both halves returns zeros.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import SUBJECTS, TOLERANCE, Subject, relative
from torch import Tensor, nn
from transformers import PreTrainedModel
from zoo import causal

from optimum_blockprune import BlockPruner, PruningPlan
from optimum_blockprune.blocks import find_blocks
from optimum_blockprune.errors import UnsupportedModelError
from optimum_blockprune.half import Half
from optimum_blockprune.runner import BlockRunner


pytestmark = pytest.mark.usefixtures("no_pictures")

CAUSAL = [subject for subject in SUBJECTS if subject.group == "causal"]
# One of each way in which attention and MLP come together, or do not.
REDUCED = ("afmoe", "deepseek_v3", "gpt2", "gpt_neo", "llama4_text", "lfm2", "qwen3_moe#sparse_step_2")
REDUCED += ("minimax", "modernbert-decoder")
REFUSED = ("cohere2", "dbrx", "doge", "falcon_h1", "gemma3n_text", "gpt_neox", "mamba")
# Their residual stream goes through the norm in front of a half: off is what hands its input on, norm and all.
NORMED = ("minimax",)
PAIRS = ((1, 2), (3, 4))


def silenced(model: PreTrainedModel, gone: tuple[Half, Half], subject: Subject, inputs: dict[str, Tensor]) -> Tensor:
    """The logits when the last module of both halves adds zeros, by plain hooks."""
    blocks, known = find_blocks(model).blocks, BlockRunner(model).halves
    handles = []
    for block, part in gone:
        first, *_, last = (blocks[block].get_submodule(child.name) for child in known.of(block).of(part))
        handles.append(last.register_forward_hook(_zeros))
        if subject.name in NORMED:
            handles.append(first.register_forward_hook(lambda _module, args, _output: args[0]))
    logits = subject.logits(model, inputs)
    for handle in handles:
        handle.remove()
    return logits


def _zeros(_module: nn.Module, _args: Any, output: Any) -> Any:
    if isinstance(output, (tuple, list)):
        return type(output)((torch.zeros_like(output[0]), *output[1:]))
    return torch.zeros_like(output)


def judge(subject: Subject, first: int, second: int, folder: Path) -> str | None:
    """`None` for an exact result, or the refusal; fails for anything else."""
    model = subject.model()
    inputs = subject.inputs(model)[0]
    gone = (Half(first, "mlp"), Half(second, "attention"))
    try:
        plan = PruningPlan.from_blocks(model, [*map(str, gone)])
        pruner = BlockPruner(model)
        truth = silenced(subject.model(), gone, subject, inputs)
        pruner.prune(folder, plan=plan)
    except UnsupportedModelError as error:
        return str(error)
    reloaded, info = subject.reload(folder, model)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for each in (model, reloaded):
        assert relative(subject.logits(each, inputs), truth) <= TOLERANCE
    return None


def _judge_all(subject: Subject, tmp_path: Path) -> list[str | None]:
    found = [
        judge(subject, *pair, tmp_path / f"out-{pair[0]}")
        for pair in PAIRS
        if pair[1] < causal.default_blocks(subject.name)
    ]
    for reason in found:
        assert reason is None or ("odel type '" in reason and len(reason) > 60), reason
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("subject", [each for each in CAUSAL if each.name in REDUCED], ids=str)
def test_reduced_sweep(subject: Subject, tmp_path: Path) -> None:
    assert None in _judge_all(subject, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("subject", [each for each in CAUSAL if each.name in REFUSED], ids=str)
def test_models_without_halves_are_refused(subject: Subject, tmp_path: Path) -> None:
    assert None not in _judge_all(subject, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("subject", [each for each in CAUSAL if each.name not in REDUCED + REFUSED], ids=str)
def test_whole_sweep(subject: Subject, tmp_path: Path) -> None:
    _judge_all(subject, tmp_path)
