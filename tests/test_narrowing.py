# SPDX-License-Identifier: Apache-2.0
"""A block without units computes what the whole one computes with them switched off; nothing else of it changes."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import tiny_config
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optimum_blockprune.narrowing import narrow, units_off, width_off, writer_mask
from optimum_blockprune.surgery import Journal
from optimum_blockprune.widths import CutAttribute, CutTensor, Narrowing, UnitGroup, Width


UNITS, HIDDEN = 5, 4


class Gated(nn.Module):
    """Gate and up in one tensor, in halves or taking turns, with biases; Linear or GPT-2's Conv1D."""

    def __init__(self, *, conv: bool = False, turns: bool = False, size: int = 1) -> None:
        super().__init__()
        inner = UNITS * size
        self.gate_up = Conv1D(2 * inner, HIDDEN) if conv else nn.Linear(HIDDEN, 2 * inner)
        self.down = Conv1D(HIDDEN, inner) if conv else nn.Linear(inner, HIDDEN)
        self.turns, self.width, self.size = turns, UNITS, size
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, hidden: Tensor) -> Tensor:
        both = self.gate_up(hidden)
        if self.turns:
            both = both.unflatten(-1, (-1, 2, self.size)).transpose(-3, -2).flatten(-3)
        gate, up = both.chunk(2, dim=-1)
        return self.down(torch.tanh(gate) * up)


def group_of(block: Gated) -> UnitGroup:
    conv, size = isinstance(block.down, Conv1D), block.size
    parts = (2 * size,) if block.turns else (size, size)
    names = ("nx", "nf") if conv else ("in_features", "out_features")
    return UnitGroup(
        "mlp",
        "channel",
        "down",
        UNITS,
        tensors=(
            CutTensor("down.weight", 0 if conv else 1, (size,)),
            CutTensor("gate_up.weight", 1 if conv else 0, parts),
            CutTensor("gate_up.bias", 0, parts),
        ),
        attributes=(
            CutAttribute("", "width", 1),
            CutAttribute("down", names[0], size),
            CutAttribute("gate_up", names[1], 2 * size),
        ),
    )


def inputs(windows: int = 3) -> Tensor:
    return torch.randn(windows, 2, HIDDEN, generator=torch.Generator().manual_seed(9))


def narrowed(block: nn.Module, kept: tuple[int, ...], width: int | None = None, **options: Any) -> nn.Module:
    twin = copy.deepcopy(block)
    narrow(twin, group_of(block), kept, len(kept) if width is None else width, setattr, **options)
    return twin


each_form = pytest.mark.parametrize(
    "form",
    [{"conv": conv, "turns": turns, "size": size} for conv in (0, 1) for turns in (0, 1) for size in (1, 3)],
    ids=str,
)


# Cutting out is switching off


@each_form
@pytest.mark.parametrize("kept", [(0,), (4,), (1, 2), (0, 2, 4), (0, 1, 2, 3), (0, 1, 2, 3, 4)], ids=str)
def test_narrow_is_exact(form: dict[str, Any], kept: tuple[int, ...]) -> None:
    block = Gated(**form)
    with units_off(block, [(group_of(block), kept)]), torch.no_grad():
        truth = block(inputs())
    for width in range(len(kept), UNITS + 1):
        twin = narrowed(block, kept, width)
        torch.testing.assert_close(twin(inputs()), truth, rtol=0, atol=1e-5)
        inner = width * form["size"]
        assert sum(parameter.numel() for parameter in twin.parameters()) == inner * (3 * HIDDEN + 2) + HIDDEN
        names = ("nx", "nf") if form["conv"] else ("in_features", "out_features")
        assert (twin.width, getattr(twin.down, names[0]), getattr(twin.gate_up, names[1])) == (width, inner, 2 * inner)
    with torch.no_grad():
        different = not torch.allclose(block(inputs()), truth)
    assert different == (len(kept) < UNITS)


def test_narrow_takes_the_rows_of_the_kept_units() -> None:
    block = Gated()
    twin = narrowed(block, (1, 4))
    assert torch.equal(twin.down.weight, block.down.weight[:, [1, 4]])
    assert torch.equal(twin.gate_up.weight, block.gate_up.weight[[1, 4, 6, 9]])
    assert torch.equal(twin.gate_up.bias, block.gate_up.bias[[1, 4, 6, 9]])
    assert torch.equal(twin.down.bias, block.down.bias)


def test_padding_is_of_zeros_without_a_sign() -> None:
    block = Gated()
    with torch.no_grad():
        block.gate_up.weight[0], block.gate_up.bias[0], block.down.weight[:, 0] = -1.0, float("nan"), float("-inf")
    twin = narrowed(block, (1, 3), 4)
    for tensor, places in (
        (twin.down.weight[:, 2:], (4, 2)),
        (twin.gate_up.weight[[2, 3, 6, 7]], (4, 4)),
        (twin.gate_up.bias[[2, 3, 6, 7]], (4,)),
    ):
        assert tensor.shape == places
        assert torch.equal(tensor, torch.zeros(places)) and not torch.signbit(tensor).any()
    assert torch.equal(twin.gate_up.weight[[0, 1, 4, 5]], block.gate_up.weight[[1, 3, 6, 8]])
    assert twin.down.weight[:, :2].abs().min() > 0


def test_the_same_number_of_units_is_a_copy() -> None:
    block = Gated()
    twin = narrowed(block, tuple(range(UNITS)))
    for name, parameter in block.named_parameters():
        assert torch.equal(twin.get_parameter(name), parameter)


def test_what_all_units_share_stays() -> None:
    """Q of each head, then K and V of all."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o = nn.Linear(HIDDEN, 3 * 2 + 4), nn.Linear(6, HIDDEN)

    block = Shared()
    tensors = CutTensor("o.weight", 1, (2,)), CutTensor("qkv.weight", 0, (2,), 4), CutTensor("qkv.bias", 0, (2,), 4)
    group = UnitGroup(
        "attention", "head", "o", 3, tensors=tensors, attributes=(CutAttribute("qkv", "out_features", 2, 4),)
    )
    before = copy.deepcopy(block)
    narrow(block, group, (0, 2), 2, setattr)
    rows = [0, 1, 4, 5, 6, 7, 8, 9]
    assert torch.equal(block.qkv.weight, before.qkv.weight[rows]) and torch.equal(
        block.qkv.bias, before.qkv.bias[rows]
    )
    assert torch.equal(block.o.weight, before.o.weight[:, [0, 1, 4, 5]]) and block.qkv.out_features == 8


# What tensors are


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_and_gradients_stay(dtype: torch.dtype) -> None:
    block = Gated().to(dtype)
    block.gate_up.weight.requires_grad_(False)
    twin = narrowed(block, (0, 3), 3)
    for name, parameter in twin.named_parameters():
        assert isinstance(parameter, nn.Parameter) and parameter.dtype == dtype and parameter.is_leaf
        assert parameter.requires_grad == (name != "gate_up.weight")
        assert parameter.is_contiguous()


def test_buffers_stay_buffers() -> None:
    block = Gated()
    bias = block.gate_up.bias.detach().clone()
    del block.gate_up.bias
    block.gate_up.register_buffer("bias", bias)
    twin = narrowed(block, (0, 3))
    assert dict(twin.named_buffers()).keys() == {"gate_up.bias"} and "gate_up.bias" not in dict(
        twin.named_parameters()
    )
    assert torch.equal(twin.gate_up.bias, bias[[0, 3, 5, 8]])


def test_meta_tensors_have_shapes() -> None:
    block = Gated().to("meta")
    twin = narrowed(block, (0, 2, 3), 4)
    assert twin.down.weight.device.type == "meta"
    assert twin.gate_up.weight.shape == (8, HIDDEN) and twin.down.weight.shape == (HIDDEN, 4)


def test_the_dense_tensors_are_not_written_to() -> None:
    block = Gated()
    before = {name: (parameter, parameter.clone()) for name, parameter in block.named_parameters()}
    narrow(block, group_of(block), (0, 3), 4, setattr)
    for dense, copied in before.values():
        assert torch.equal(dense, copied)
    assert block.down.weight is not before["down.weight"][0] and block.down.bias is before["down.bias"][0]


def test_a_journal_takes_it_back() -> None:
    block, journal = Gated(), Journal()
    block.config = tiny_config("llama")
    before = dict(vars(block)), {name: id(parameter) for name, parameter in block.named_parameters()}
    features = block.down.in_features, block.gate_up.out_features
    narrow(block, replace(group_of(block), reads_config=True), (0, 3), 2, journal.set, own_config=True)
    assert block.width == 2
    journal.rollback()
    assert (dict(vars(block)), {name: id(parameter) for name, parameter in block.named_parameters()}) == before
    assert (block.down.in_features, block.gate_up.out_features) == features


# Configurations of their own


class Attention(nn.Module):
    """Looks its heads up while it runs."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.o = config, nn.Linear(UNITS, HIDDEN)


class Block(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.attn, self.mlp = config, Attention(config), Attention(config)


def reading_group(reads: bool = True) -> UnitGroup:
    return UnitGroup(
        "attention",
        "head",
        "attn.o",
        UNITS,
        {"num_attention_heads": 2},
        {"head_dim": 8},
        (CutTensor("attn.o.weight", 1, (1,)),),
        reads_config=reads,
    )


def test_modules_around_the_tensors_get_their_own_configuration() -> None:
    config = tiny_config("llama")
    before, block = config.to_dict(), Block(config)
    narrow(block, reading_group(), (0, 4), 2, setattr, own_config=True)
    assert block.attn.config is not config
    assert (block.attn.config.num_attention_heads, block.attn.config.head_dim) == (4, 8)
    assert block.attn.config.hidden_size == config.hidden_size
    # The model's describes other blocks as well, and other modules.
    assert block.config is config and block.mlp.config is config and config.to_dict() == before


@pytest.mark.parametrize(("reads", "own"), [(False, True), (True, False), (False, False)])
def test_others_keep_the_models(reads: bool, own: bool) -> None:
    config = tiny_config("llama")
    block = Block(config)
    narrow(block, reading_group(reads), (0, 4), 2, setattr, own_config=own)
    assert block.attn.config is config and block.attn.o.weight.shape == (HIDDEN, 2)


def test_something_else_called_config_is_left_alone() -> None:
    config = SimpleNamespace(num_attention_heads=4)
    block = Block(config)
    narrow(block, reading_group(), (0,), 1, setattr, own_config=True)
    assert block.attn.config is config and config.num_attention_heads == 4


# Switching off


@pytest.mark.parametrize(
    ("parts", "kept", "expected"),
    [
        ((1,), (0, 3), [1, 0, 0, 1, 0]),
        ((2,), (1, 4), [0, 0, 1, 1, 0, 0, 0, 0, 1, 1]),
        ((1,), (), [0] * 5),
        ((1,), range(5), [1] * 5),
    ],
)
def test_writer_mask(parts: tuple[int, ...], kept: Any, expected: list[int]) -> None:
    group = UnitGroup("mlp", "channel", "down", UNITS, tensors=(CutTensor("down.weight", 1, parts),))
    mask = writer_mask(group, tuple(kept), torch.device("cpu"))
    assert mask.dtype == torch.bool and mask.tolist() == [bool(each) for each in expected]


@pytest.mark.parametrize("conv", [False, True])
def test_the_writer_reads_zeros(conv: bool) -> None:
    block, seen = Gated(conv=conv), []
    block.down.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    with torch.no_grad():
        block(inputs())
        with units_off(block, [(group_of(block), (1, 4))]):
            block(inputs())
    whole, masked = seen
    assert torch.equal(masked[..., [1, 4]], whole[..., [1, 4]]) and whole[..., [0, 2, 3]].abs().min() > 0
    assert torch.equal(masked[..., [0, 2, 3]], torch.zeros(3, 2, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_off_does_not_leak(value: float) -> None:
    block = Gated()
    with torch.no_grad():
        block.gate_up.bias[UNITS + 2] = value  # up of unit 2
        assert not torch.isfinite(block(inputs())).any()
        with units_off(block, [(group_of(block), (0, 1, 3, 4))]):
            output = block(inputs())
        assert torch.isfinite(output).all()
        torch.testing.assert_close(output, narrowed(block, (0, 1, 3, 4))(inputs()), rtol=0, atol=1e-5)
        with units_off(block, [(group_of(block), (1, 2))]):
            assert not torch.isfinite(block(inputs())).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_masked_input_keeps_its_dtype(dtype: torch.dtype) -> None:
    block = Gated().to(dtype)
    with units_off(block, [(group_of(block), (0,))]), torch.no_grad():
        assert block(inputs().to(dtype)).dtype == dtype


def hooks_of(module: nn.Module) -> int:
    return sum(len(each._forward_pre_hooks) + len(each._forward_hooks) for each in module.modules())


def test_units_are_on_again_afterwards() -> None:
    block = Gated()
    with torch.no_grad():
        before = block(inputs())
        with pytest.raises(KeyboardInterrupt), units_off(block, [(group_of(block), (0,)), (group_of(block), (0, 1))]):
            assert hooks_of(block) == 2
            raise KeyboardInterrupt
        assert hooks_of(block) == 0 and torch.equal(block(inputs()), before)


def test_no_hook_stays_where_one_cannot_be_set() -> None:
    block = Gated()
    nowhere = UnitGroup("mlp", "channel", "absent", UNITS, tensors=(CutTensor("absent.weight", 1, (1,)),))
    with pytest.raises(AttributeError), units_off(block, [(group_of(block), (0,)), (nowhere, (0,))]):
        raise KeyboardInterrupt
    assert hooks_of(block) == 0


def test_width_off_is_about_each_block() -> None:
    blocks = nn.ModuleList(Gated(turns=bool(number % 2)) for number in range(3))
    groups = group_of(blocks[0]), group_of(blocks[1])
    width = Width("per_layer", groups, (Narrowing(0, 0, (1, 2)), Narrowing(1, 1, (0, 4))))
    with torch.no_grad():
        dense = [block(inputs()) for block in blocks]
        with width_off(blocks, width):
            off = [block(inputs()) for block in blocks]
        for number, kept in enumerate([(1, 2), (0, 4)]):
            torch.testing.assert_close(off[number], narrowed(blocks[number], kept)(inputs()), rtol=0, atol=1e-5)
            assert not torch.allclose(off[number], dense[number])
        assert torch.equal(off[2], dense[2])
        assert [torch.equal(block(inputs()), was) for block, was in zip(blocks, dense, strict=True)] == [True] * 3
    assert hooks_of(blocks) == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_width_off_is_undone_after_an_error(error: type[BaseException]) -> None:
    blocks = nn.ModuleList(Gated() for _ in range(3))
    width = Width("uniform", (group_of(blocks[0]),), tuple(Narrowing(number, 0, (1,)) for number in range(3)))
    with pytest.raises(error), width_off(blocks, width):
        assert hooks_of(blocks) == 3
        raise error
    assert hooks_of(blocks) == 0
    # Also where it does not come about: the last block has no such writer.
    blocks[2].down, blocks[2].other = nn.Identity(), blocks[2].down
    del blocks[2].down
    with pytest.raises(AttributeError), width_off(blocks, width):
        raise KeyboardInterrupt
    assert hooks_of(blocks) == 0


def test_random_blocks_are_exact() -> None:
    draw = random.Random(4)
    for _ in range(30):
        block = Gated(conv=draw.random() < 0.5, turns=draw.random() < 0.5, size=draw.randint(1, 4))
        kept = tuple(sorted(draw.sample(range(UNITS), draw.randint(1, UNITS))))
        with torch.no_grad(), units_off(block, [(group_of(block), kept)]):
            truth = block(inputs())
        with torch.no_grad():
            output = narrowed(block, kept, draw.randint(len(kept), UNITS))(inputs())
        torch.testing.assert_close(output, truth, rtol=0, atol=1e-5)
