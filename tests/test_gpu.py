# SPDX-License-Identifier: Apache-2.0
"""On a GPU: exact as on the CPU, surgery allocates nothing of a block's size, nothing comes back to the host."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, block_list, plain_logits, random_ids, silenced, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_blockprune.batches import Batch, CalibrationWindows
from optimum_blockprune.errors import VerificationError
from optimum_blockprune.gate import apply_proven, expect, prove_folder
from optimum_blockprune.plan import PruningPlan
from optimum_blockprune.runner import BlockRunner
from optimum_blockprune.strategies.base import SearchContext
from optimum_blockprune.strategies.sleb import SLEB, SLEBOptions
from optimum_blockprune.surgery import apply_plan


DEVICE = torch.device("cuda", 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (CUDA)"),
    # Which kernels warn depends on the device and on the versions.
    pytest.mark.filterwarnings("default"),
]
each_family = pytest.mark.parametrize("family", FAMILIES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
Load = Callable[..., PreTrainedModel]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads a tiny model as a user does: weights in the wanted precision, buffers as the model wants them."""

    def load(family: str, dtype: torch.dtype, device_map: Any = None, **fields: Any) -> PreTrainedModel:
        folder = tmp_path / family
        tiny_model(family, **fields).save_pretrained(folder)
        places = device_map or {"": DEVICE}
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=places).eval()

    return load


@pytest.fixture
def ids() -> Tensor:
    """Two windows of twelve random tokens, on the host as calibration windows are."""
    return random_ids()


def devices(model: PreTrainedModel) -> set[str]:
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}


class Crossings(TorchDispatchMode):
    """Records the size of every tensor that an operation brings from the GPU to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given, made = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (args, output))
        if any(tensor.device.type == "cuda" for tensor in given):
            self.sizes += [tensor.numel() for tensor in made if tensor.device.type == "cpu"]
        return output


# Exactness


@each_family
@each_dtype
def test_runner_is_exact(family: str, dtype: torch.dtype, ids: Tensor, load: Load) -> None:
    model = load(family, dtype)
    runner, batch, there = BlockRunner(model), Batch(ids), ids.to(DEVICE)
    assert runner.device == DEVICE
    assert torch.equal(runner.logits(batch), plain_logits(model, there))
    for off in ((1,), (3, 1), (0,), (4,)):
        truth = plain_logits(silenced(model, off), there)
        assert torch.equal(runner.logits(batch, off), truth), off
    state = None
    whole = runner.nll(batch, (3,))[0]
    for block in range(3):
        state = runner.run_to(batch, block, start=state)
        assert runner.nll(batch, (3,), state)[0].item() == whole.item()
    runner.check_replay(batch)
    assert devices(model) == {"cuda"}


@each_family
@each_dtype
@pytest.mark.parametrize("removed", [(3, 1), (0,)], ids=str)
def test_surgery_and_gate(
    family: str, dtype: torch.dtype, removed: tuple[int, ...], ids: Tensor, load: Load, tmp_path: Path
) -> None:
    model = load(family, dtype)
    truth = plain_logits(silenced(model, removed), ids.to(DEVICE))
    pointers = {id(parameter): parameter.data_ptr() for parameter in model.parameters()}
    plan = PruningPlan.from_blocks(model, removed)
    expected = expect(model, plan)
    apply_proven(model, plan, expected)
    assert torch.equal(plain_logits(model, ids.to(DEVICE)), truth)
    assert all(parameter.data_ptr() == pointers[id(parameter)] for parameter in model.parameters())
    assert devices(model) == {"cuda"}
    assert model.dtype == dtype
    model.save_pretrained(tmp_path / "pruned")
    prove_folder(tmp_path / "pruned", model, expected)
    prove_folder(tmp_path / "pruned", model, None, "keys")


def test_gate_sees_a_wrong_block_in_half_precision(load: Load) -> None:
    model = load("llama", torch.bfloat16)
    plan = PruningPlan.from_blocks(model, [1])
    other = expect(model, PruningPlan.from_blocks(model, [2]))
    with pytest.raises(VerificationError, match="logits differ"):
        apply_proven(model, plan, other)
    assert len(block_list(model)) == 5
    apply_proven(model, plan)


@each_dtype
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom", "mixtral"])
def test_sleb_prefix_equals_naive(family: str, dtype: torch.dtype, load: Load) -> None:
    model = load(family, dtype, num_blocks=6)

    def search(mode: str) -> PruningPlan:
        context = SearchContext(
            runner=BlockRunner(model),
            windows=CalibrationWindows.from_tokens(random_ids(4, 16), source="random"),
            options=SLEBOptions(search=mode),
            num_remove=3,
            removable=(1, 2, 3, 4),
            batch_size=2,
            seed=0,
            progress=lambda total, desc: tqdm(total=total, desc=desc, disable=True),
            provenance={"model_type": family, "strategy": "sleb"},
        )
        return SLEB().select(context)

    fast, naive = search("prefix"), search("naive")
    assert fast.removed_blocks == naive.removed_blocks
    for step, twin in zip(fast.steps, naive.steps, strict=True):
        assert step["candidates"] == pytest.approx(twin["candidates"], rel=1e-5)


# Memory and transfers


@pytest.fixture
def large(load: Load) -> Iterator[tuple[PreTrainedModel, int]]:
    """A llama whose blocks have some megabytes each, and the bytes of one block."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = load("llama", torch.float32, **sizes)
    yield model, sum(parameter.nbytes for parameter in block_list(model)[0].parameters())


def test_surgery_allocates_nothing_of_a_blocks_size(large: tuple[PreTrainedModel, int]) -> None:
    model, block_bytes = large
    assert block_bytes > 10_000_000
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with Crossings() as crossings:
        journal = apply_plan(model, PruningPlan.from_blocks(model, [1, 3]))
    assert torch.cuda.max_memory_allocated() - before < block_bytes
    assert crossings.sizes == []
    # The removed blocks live as long as the surgery can be taken back.
    assert torch.cuda.memory_allocated() >= before
    journal.rollback()
    assert len(block_list(model)) == 5
    journal = apply_plan(model, PruningPlan.from_blocks(model, [1, 3]))
    del journal
    gc.collect()
    assert before - torch.cuda.memory_allocated() >= 2 * block_bytes
    assert devices(model) == {"cuda"}


def test_search_brings_nothing_of_hidden_size_to_the_host(large: tuple[PreTrainedModel, int], ids: Tensor) -> None:
    model, _ = large
    runner, batch = BlockRunner(model), Batch(ids)
    runner.nll(batch)
    with Crossings() as crossings:
        state = runner.run_to(batch, 1)
        total, predictions = runner.nll(batch, (2,), state)
        positions: list[tuple[int, torch.device]] = []
        runner.stream(batch, lambda position, hidden: positions.append((position, hidden.device)))
    assert predictions == 22
    assert total.device == state.value.device == DEVICE
    assert positions == [(position, DEVICE) for position in range(6)]
    assert max(crossings.sizes, default=0) < model.config.hidden_size
    assert devices(model) == {"cuda"}


def test_blocks_of_memory_are_given_back_after_a_run(large: tuple[PreTrainedModel, int], ids: Tensor) -> None:
    model, _ = large
    runner = BlockRunner(model)
    runner.nll(Batch(ids), (1,))
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        runner.nll(Batch(ids), (1,), runner.run_to(Batch(ids), 0))
        runner.stream(Batch(ids), lambda *_: None)
    gc.collect()
    assert torch.cuda.memory_allocated() == before


# Several places


@each_dtype
def test_blocks_offloaded_to_the_host(dtype: torch.dtype, ids: Tensor, load: Load, tmp_path: Path) -> None:
    plain = BlockRunner(load("llama", dtype))
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), 0)
    layers = {f"model.layers.{block}": "cpu" if block % 2 else 0 for block in range(5)}
    model = load("llama", dtype, device_map={**rest, **layers})
    runner = BlockRunner(model)
    assert torch.equal(runner.logits(Batch(ids), (2,)), plain.logits(Batch(ids), (2,)))
    state = runner.run_to(Batch(ids), 1)
    assert runner.nll(Batch(ids), (2,), state)[0].item() == plain.nll(Batch(ids), (2,))[0].item()
    plan = PruningPlan.from_blocks(model, [1])
    expected = expect(model, plan)
    apply_proven(model, plan, expected)
    places = [str(model.hf_device_map[f"model.layers.{block}"]) for block in range(4)]
    assert places == ["0", "0", "cpu", "0"]
    assert torch.equal(BlockRunner(model).logits(Batch(ids)), plain.logits(Batch(ids), (1,)))
    model.save_pretrained(tmp_path / "pruned")
    prove_folder(tmp_path / "pruned", model, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_blocks_on_two_gpus(ids: Tensor, load: Load) -> None:
    plain = BlockRunner(load("llama", torch.float32))
    rest = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    layers = {f"model.layers.{block}": int(block > 2) for block in range(5)}
    model = load("llama", torch.float32, device_map={**rest, **layers})
    runner = BlockRunner(model)
    for off in ((), (2,), (3, 4)):
        assert torch.equal(runner.logits(Batch(ids), off).to(DEVICE), plain.logits(Batch(ids), off))
    PruningPlan.from_blocks(model, [2]).apply(model)
    assert [model.hf_device_map[f"model.layers.{block}"] for block in range(4)] == [0, 0, 1, 1]
