# SPDX-License-Identifier: Apache-2.0
"""The losses are what they are called, padding counts for nothing, and checkpoints hold adapters only."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from families import plain_logits, random_ids, tiny_model
from safetensors.torch import load_file
from torch.nn import functional as F

from optimum_blockprune import training
from optimum_blockprune.adapters import adapted, target_layers
from optimum_blockprune.batches import Batch, CalibrationWindows
from optimum_blockprune.blocks import find_blocks
from optimum_blockprune.errors import OutputError
from optimum_blockprune.healing_spec import HealingSpec
from optimum_blockprune.inputs import Caller
from optimum_blockprune.runner import BlockRunner
from optimum_blockprune.training import Student, distillation_loss, last_checkpoint, next_token_loss, train


SPEC = HealingSpec(steps=4, batch_size=2, gradient_accumulation=2, rank=2, save_steps=1)


def trained(windows: CalibrationWindows, spec: HealingSpec = SPEC, checkpoints: Path | None = None) -> int:
    stack = find_blocks(tiny_model("llama"))
    device = torch.device("cpu")
    with adapted(stack, target_layers(stack), spec) as layers:
        student = Student(Caller(stack.model, stack.layout), layers, device)
        return train(student, windows, next_token_loss, spec, checkpoints=checkpoints)


def test_the_next_token_loss_is_that_of_transformers() -> None:
    ids, logits = random_ids(3, 10), torch.randn(3, 10, 96)
    direct = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(next_token_loss(Batch(ids), logits), direct)


def test_distillation_is_the_divergence_from_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, ids = tiny_model("llama", 6), random_ids(3, 10)
    logits = torch.randn(3, 10, 96, requires_grad=True)
    truth = plain_logits(teacher, ids)[:, :-1].log_softmax(-1)
    direct = (truth.exp() * (truth - logits[:, :-1].log_softmax(-1))).sum(-1).mean()
    loss = distillation_loss(BlockRunner(teacher))
    whole = loss(Batch(ids), logits)
    assert torch.allclose(whole, direct, atol=1e-5)
    assert loss(Batch(ids), plain_logits(teacher, ids)).abs() < 1e-5
    # However little of it is looked at at one time.
    monkeypatch.setattr("optimum_blockprune.losses._MAX_LOGITS", 96)
    monkeypatch.setattr(training, "_POSITIONS", 4)
    calls: list[int] = []
    handle = teacher.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    parts = loss(Batch(ids), logits)
    handle.remove()
    assert calls == [1, 1, 1] and torch.allclose(parts, whole, atol=1e-6)
    parts.backward()
    assert logits.grad.abs().sum() > 0 and all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("method", ["lora", "distill"])
def test_padding_counts_for_nothing(method: str) -> None:
    teacher = tiny_model("llama", 6)
    loss = next_token_loss if method == "lora" else distillation_loss(BlockRunner(teacher))
    ids, mask = random_ids(2, 10), torch.ones(2, 10, dtype=torch.bool)
    mask[1, 6:] = False
    logits = torch.randn(2, 10, 96)
    value = loss(Batch(ids.masked_fill(~mask, 0), mask), logits)
    junk = logits.masked_fill(~mask[..., None], 1e4)
    assert torch.equal(loss(Batch(ids.masked_fill(~mask, 9), mask), junk), value)
    rows = [(ids[:1], logits[:1], 9), (ids[1:, :6], logits[1:, :6], 5)]
    apart = sum(loss(Batch(row), each) * count for row, each, count in rows) / 14
    assert torch.allclose(value, apart, atol=1e-5)


def test_the_tokens_seen_are_counted_without_padding() -> None:
    ids = random_ids(2, 8)
    mask = torch.ones(2, 8, dtype=torch.bool)
    assert trained(CalibrationWindows.from_tokens(ids, source="x")) == 16 * 8
    mask[1, 5:] = False
    # Two windows, each seen eight times.
    assert trained(CalibrationWindows.from_tokens(ids, mask, source="x")) == 8 * 8 + 8 * 5


def test_every_window_is_seen_before_one_is_seen_again() -> None:
    order = training._order(5, HealingSpec(steps=3, batch_size=4))
    assert len(order) == 12 and sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert order != training._order(5, HealingSpec(steps=3, batch_size=4, seed=1))


def test_a_checkpoint_holds_the_adapters_and_what_the_optimizer_needs(tmp_path: Path, windows) -> None:
    trained(windows, checkpoints=tmp_path)
    found = last_checkpoint(tmp_path)
    assert found.name == "checkpoint-4" and len(list(tmp_path.glob("checkpoint-*"))) == 2
    stored = load_file(found / "model.safetensors")
    stack = find_blocks(tiny_model("llama"))
    assert len(stored) == 2 * len(target_layers(stack)) and all(2 in tensor.shape for tensor in stored.values())
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= {path.name for path in found.iterdir()}
    # What was not written to its end does not count.
    (found / "trainer_state.json").write_text('{"global_step": 4')
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    (tmp_path / "checkpoint-x").mkdir()
    assert last_checkpoint(tmp_path / "none") is None


def test_a_checkpoint_that_cannot_be_written_is_explained(tmp_path: Path, windows) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="checkpoint cannot be written or read"):
        trained(windows, checkpoints=tmp_path / "file")


def test_the_global_generators_are_left_as_they_were() -> None:
    model = tiny_model("llama").train()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with training.own_randomness(model, 3):
        first = torch.rand(1)
        assert not model.training
        random.seed(1), np.random.seed(1)
    with training.own_randomness(model, 3):
        assert torch.equal(torch.rand(1), first)
    assert model.training and torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
