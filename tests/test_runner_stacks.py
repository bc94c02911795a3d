# SPDX-License-Identifier: Apache-2.0
"""The runner on encoders, encoder-decoders and models with images: one stack is looked at, the rest runs as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from zoo import causal, multimodal, other_stacks

from optimum_blockprune.batches import Batch
from optimum_blockprune.errors import UnsupportedModelError
from optimum_blockprune.losses import token_nll
from optimum_blockprune.runner import BlockRunner, Counters


# t5 carries position biases beside the hidden states, switch_transformers returns router states, whisper reads sound.
NAMES = ("bert", "modernbert", "distilbert", "bart", "t5", "t5gemma", "switch_transformers", "whisper")
each_stack = pytest.mark.parametrize(
    ("name", "stack"), [(name, stack) for name in NAMES for stack in other_stacks.stacks(name)]
)


def batch_of(name: str, model: PreTrainedModel) -> Batch:
    inputs = other_stacks.inputs(name, model)
    ids = inputs.pop("decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids")
    return Batch(ids, extra=inputs)


def truth(name: str, model: PreTrainedModel, stack: str, off: tuple[int, ...]) -> Tensor:
    silent = other_stacks.silenced(name, model, stack, off)
    return other_stacks.plain_logits(silent, other_stacks.inputs(name, model))


@each_stack
def test_off_equals_silenced_blocks(name: str, stack: str) -> None:
    model = other_stacks.tiny_model(name)
    runner, batch = BlockRunner(model, stack), batch_of(name, model)
    dense = truth(name, model, stack, ())
    torch.testing.assert_close(runner.logits(batch), dense, atol=1e-5, rtol=1e-5)
    for off in ((1,), (3, 1), (runner.num_blocks - 1,)):
        logits = runner.logits(batch, off)
        torch.testing.assert_close(logits, truth(name, model, stack, off), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(logits, dense, atol=1e-3), off


@each_stack
def test_a_run_goes_on_after_every_block(name: str, stack: str) -> None:
    model = other_stacks.tiny_model(name)
    runner, batch = BlockRunner(model, stack), batch_of(name, model)
    runner.check_replay(batch)
    whole, count = runner.nll(batch, (2,))
    state = None
    for block in range(2):
        state = runner.run_to(batch, block, start=state)
        assert runner.nll(batch, (2,), state)[0].item() == pytest.approx(whole.item(), rel=1e-6)
    assert count == len(batch.input_ids) * (batch.input_ids.shape[1] - 1)


@each_stack
def test_the_stream_has_the_shape_of_the_positions(name: str, stack: str) -> None:
    model = other_stacks.tiny_model(name)
    runner, batch = BlockRunner(model, stack), batch_of(name, model)
    seen: list[tuple[int, tuple[int, ...]]] = []
    runner.stream(batch, lambda position, hidden: seen.append((position, tuple(hidden.shape[:2]))))
    positions = runner.positions(batch)
    assert positions.dtype == torch.bool and positions.device.type == "cpu" and bool(positions.all())
    assert seen == [(position, tuple(positions.shape)) for position in range(runner.num_blocks + 1)]


def test_blocks_and_heads_are_counted_for_one_stack() -> None:
    model = other_stacks.tiny_model("bart", 4, 6)
    for stack, blocks in (("encoder", 4), ("decoder", 6)):
        runner = BlockRunner(model, stack)
        runner.logits(batch_of("bart", model))
        assert runner.counters == Counters(2 * blocks, 2)


# Which positions are real


def test_positions_of_text_are_those_of_its_mask() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    ids = torch.tensor([[3, 4, 5], [6, 0, 0]])
    runner = BlockRunner(other_stacks.tiny_model("bert"))
    assert torch.equal(runner.positions(Batch(ids, mask)), mask)
    assert bool(runner.positions(Batch(ids)).all())
    assert runner.counters == Counters(), "nothing has to run for it"


def test_each_side_of_an_encoder_decoder_has_its_own_mask() -> None:
    model = other_stacks.tiny_model("bart")
    read = torch.ones(2, 5, dtype=torch.long)
    read[1, 3:] = 0
    said = torch.tensor([[True] * 3, [True, True, False]])
    tokens = torch.full((2, 5), 7)
    batch = Batch(tokens[:, :3], said, {"input_ids": tokens, "attention_mask": read})
    assert torch.equal(BlockRunner(model, "encoder").positions(batch), read.bool())
    assert torch.equal(BlockRunner(model, "decoder").positions(batch), said)


def test_images_in_the_text_count_as_positions() -> None:
    model = multimodal.tiny_model("llava")
    inputs = multimodal.image_inputs("llava", model)
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask").bool()
    mask[0, -2:] = False
    runner = BlockRunner(model)
    assert torch.equal(runner.positions(Batch(ids, mask, inputs)), mask)
    assert bool(runner.positions(Batch(ids, None, inputs)).all())
    assert torch.isfinite(runner.logits(Batch(ids, mask, inputs), (1,))).all()


# Losses


def test_labels_are_predicted_at_their_own_positions() -> None:
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 3, -100, 1], [5, -100, -100, -100]])
    total, count = token_nll(logits, Batch(torch.zeros(2, 4, dtype=torch.long), labels=labels))
    scores = logits.double().log_softmax(-1)
    assert count == 3
    assert total.item() == pytest.approx(-(scores[0, 1, 3] + scores[0, 3, 1] + scores[1, 0, 5]).item())


def test_an_encoder_is_scored_on_its_labels_whole_or_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = other_stacks.tiny_model("bert")
    ids = other_stacks.inputs("bert", model)["input_ids"]
    labels = torch.where(torch.arange(ids.shape[1]) % 4 == 1, ids, -100)
    batch = Batch(ids, labels=labels)
    runner = BlockRunner(model)
    total, count = runner.nll(batch, (1,))
    expected, same = token_nll(truth("bert", model, "encoder", (1,)), batch)
    assert count == same == int((labels != -100).sum())
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    # One window per call of the head.
    monkeypatch.setattr("optimum_blockprune.losses._MAX_LOGITS", 1)
    assert runner.nll(batch, (1,))[0].item() == pytest.approx(total.item(), rel=1e-6)


def test_a_model_that_loops_has_no_one_stream() -> None:
    runner = BlockRunner(causal.tiny_model("dory"))
    with pytest.raises(UnsupportedModelError, match="'dory' runs some blocks several times"):
        runner.stream(Batch(causal.random_ids()), lambda position, hidden: None)
