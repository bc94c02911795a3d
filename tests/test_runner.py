# SPDX-License-Identifier: Apache-2.0
"""The runner equals the model's own forward, bit for bit, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from families import FAMILIES, block_list, plain_logits, random_ids, silenced, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from optimum_blockprune import losses
from optimum_blockprune.batches import Batch
from optimum_blockprune.errors import NonFiniteError, UnsupportedModelError
from optimum_blockprune.losses import perplexity_of, token_nll
from optimum_blockprune.runner import BlockOutput, BlockRunner, Counters


each_family = pytest.mark.parametrize("family", FAMILIES)
OFF = ((1,), (3, 1), (0,), (4,), (2, 3, 4), (0, 1, 2, 3))


def mean_free_nll(logits: Tensor, ids: Tensor) -> float:
    """Summed next-token NLL, written another way than the runner's."""
    chosen = F.log_softmax(logits[:, :-1].double(), dim=-1).gather(2, ids[:, 1:, None])
    return -chosen.sum().item()


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """All that a run could leave behind: blocks, hooks, flags, weights."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "blocks": [id(block) for block in block_list(model)],
        "hooks": sum(len(getattr(module, name)) for module in model.modules() for name in hooks),
        "training": [module.training for module in model.modules()],
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def assert_untouched(model: PreTrainedModel, before: dict[str, Any]) -> None:
    after = fingerprint(model)
    old, new = before.pop("weights"), after.pop("weights")
    assert after == before
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


# Equality with the model's own forward


@each_family
def test_nothing_off_is_the_plain_forward(family: str, ids: Tensor) -> None:
    model = tiny_model(family)
    assert torch.equal(BlockRunner(model).logits(Batch(ids)), plain_logits(model, ids))


@each_family
def test_off_equals_silenced_blocks(family: str, ids: Tensor) -> None:
    model = tiny_model(family)
    runner = BlockRunner(model)
    dense = plain_logits(model, ids)
    for off in OFF:
        logits = runner.logits(Batch(ids), off)
        assert torch.equal(logits, plain_logits(silenced(model, off), ids)), off
        assert not torch.allclose(logits, dense, atol=1e-3), off


@each_family
def test_replay_after_every_block_is_the_plain_forward(family: str, ids: Tensor) -> None:
    model = tiny_model(family)
    runner = BlockRunner(model)
    batch = Batch(ids)
    whole, predictions = runner.nll(batch)
    state = None
    for block in range(5):
        state = runner.run_to(batch, block, start=state)
        assert state.block == block
        loss, count = runner.nll(batch, start=state)
        assert (loss.item(), count) == (whole.item(), predictions)
    assert whole.item() == pytest.approx(mean_free_nll(plain_logits(model, ids), ids), rel=1e-5)
    runner.check_replay(batch)


@each_family
@pytest.mark.parametrize("off", [(1,), (3, 1), (3, 4)])
def test_nll_from_a_prefix_equals_the_whole_run(family: str, off: tuple[int, ...], ids: Tensor) -> None:
    runner = BlockRunner(tiny_model(family))
    batch = Batch(ids)
    whole, _ = runner.nll(batch, off)
    for block in range(min(off)):
        assert runner.nll(batch, off, runner.run_to(batch, block))[0].item() == whole.item()


def test_start_past_the_last_live_block(ids: Tensor) -> None:
    runner = BlockRunner(tiny_model("llama"))
    batch = Batch(ids)
    state = runner.run_to(batch, 4, off=(3, 4))
    assert runner.nll(batch, (3, 4), state)[0].item() == runner.nll(batch, (3, 4))[0].item()


def test_stored_state_is_not_changed_by_later_runs(ids: Tensor) -> None:
    model = tiny_model("llama")
    runner = BlockRunner(model)
    state = runner.run_to(Batch(ids), 1)
    kept = state.value.clone()

    def double(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].mul_(2)

    block_list(model)[2].register_forward_pre_hook(double)
    first = runner.nll(Batch(ids), start=state)[0].item()
    assert torch.equal(state.value, kept)
    assert runner.nll(Batch(ids), start=state)[0].item() == first


def test_a_run_needs_a_live_block(ids: Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match="at least one block"):
        BlockRunner(tiny_model("llama")).nll(Batch(ids), range(5))


# Padding


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(family: str, side: str, ids: Tensor) -> None:
    runner = BlockRunner(tiny_model(family))
    bare = runner.nll(Batch(ids[:1]))[0] + runner.nll(Batch(ids[1:, :9]))[0]
    short, lack = ids[1:, :9], torch.full((1, 3), 5)
    row = torch.cat([lack, short] if side == "left" else [short, lack], dim=1)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, : 3 if side == "left" else None] = False
    if side == "right":
        mask[1] = torch.arange(12) < 9
    loss, predictions = runner.nll(Batch(torch.cat([ids[:1], row]), mask))
    assert predictions == 11 + 8
    assert loss.item() == pytest.approx(bare.item(), rel=1e-5)


def test_masked_logits_may_be_nan() -> None:
    logits = torch.zeros(1, 4, 3)
    logits[0, 3] = torch.nan
    mask = torch.tensor([[True, True, True, False]])
    loss, predictions = token_nll(logits, Batch(torch.zeros(1, 4, dtype=torch.long), mask))
    assert predictions == 2
    assert loss.item() == pytest.approx(2 * torch.log(torch.tensor(3.0)).item())
    assert loss.dtype == torch.float64


def test_a_gap_in_the_mask_breaks_the_chain() -> None:
    mask = torch.tensor([[True, True, False, True, True]])
    _, predictions = token_nll(torch.zeros(1, 5, 3), Batch(torch.zeros(1, 5, dtype=torch.long), mask))
    assert predictions == 2


def test_perplexity() -> None:
    assert perplexity_of(0.0) == 1.0
    assert perplexity_of(1e6) == float("inf")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "falcon"])
def test_head_in_row_chunks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = BlockRunner(tiny_model(family))
    mask = torch.arange(12) < torch.tensor([[12], [9], [12], [7], [12]])
    batch = Batch(random_ids(5), mask)
    whole = runner.nll(batch)
    calls: list[int] = []
    forward = runner._forward
    monkeypatch.setattr(runner, "_forward", lambda part: calls.append(len(part.input_ids)) or forward(part))
    for limit, sizes in ((2 * 12 * 96, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr(losses, "_MAX_LOGITS", limit)
        calls.clear()
        loss, predictions = runner.nll(batch)
        assert calls == [5, *sizes]
        assert predictions == whole[1]
        assert loss.item() == pytest.approx(whole[0].item(), rel=1e-6)


# The stream


@each_family
def test_stream_shows_every_boundary(family: str, ids: Tensor) -> None:
    model = tiny_model(family)
    runner = BlockRunner(model)
    seen: list[tuple[int, Tensor]] = []
    runner.stream(Batch(ids), lambda position, hidden: seen.append((position, hidden.clone())))
    assert [position for position, _ in seen] == list(range(6))
    outputs: list[Tensor] = []
    last = block_list(model)[-1]
    hook = last.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        hidden = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    hook.remove()
    assert len(hidden) == 6
    for (_, ours), theirs in zip(seen, (*hidden[:5], *outputs), strict=True):
        assert torch.equal(ours, theirs)


def test_stream_never_runs_the_head(ids: Tensor) -> None:
    model = tiny_model("llama")
    runner = BlockRunner(model)
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    runner.stream(Batch(ids), lambda *_: None)
    assert runner.counters == Counters(block_forwards=5 * 2, head_forwards=0)


# Counters


@pytest.mark.parametrize("family", ["llama", "falcon", "gpt_neox"])
def test_counters_are_what_hooks_count(family: str) -> None:
    model = tiny_model(family)
    runner = BlockRunner(model)
    runner._learn_form()
    blocks, heads = [0], [0]
    for block in block_list(model):
        block.register_forward_hook(lambda _, args, __: blocks.__setitem__(0, blocks[0] + len(args[0])))
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, args, __: heads.__setitem__(0, heads[0] + len(args[0])))
    batch = Batch(random_ids(3))
    state = runner.run_to(batch, 1)
    for action in (
        lambda: runner.logits(batch),
        lambda: runner.logits(batch, (0, 3)),
        lambda: runner.run_to(batch, 3, (2,)),
        lambda: runner.run_to(batch, 3, start=state),
        lambda: runner.run_to(batch, 2, (2,)),
        lambda: runner.nll(batch),
        lambda: runner.nll(batch, (4, 2), state),
        lambda: runner.stream(batch, lambda *_: None),
        lambda: runner.check_replay(batch),
        lambda: runner.diagnose(batch, (1,)),
    ):
        action()
        assert runner.counters == Counters(blocks[0], heads[0])
    assert runner.counters.block_forwards == 3 * (2 + 5 + 3 + 3 + 2 + 2 + 5 + 1 + 5 + (5 + 5 + 10) + 4)
    assert runner.counters.head_forwards == 3 * (0 + 1 + 1 + 0 + 0 + 0 + 1 + 1 + 0 + 6 + 0)


def test_counters_do_not_depend_on_the_batch_size() -> None:
    ids = random_ids(4)
    spent = []
    for size in (1, 2, 4):
        runner = BlockRunner(tiny_model("llama"))
        for rows in ids.split(size):
            runner.nll(Batch(rows), (1,), runner.run_to(Batch(rows), 0))
        spent.append(runner.counters)
    assert spent == [Counters(4 * 4, 4)] * 3


# No trace


def mixed_training(model: PreTrainedModel) -> None:
    model.train()
    block_list(model)[1].eval()
    block_list(model)[3].eval()
    block_list(model)[3].get_submodule("mlp").train()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bloom"])
@pytest.mark.parametrize("prepare", [lambda model: model.train(), mixed_training], ids=["train", "mixed"])
def test_model_is_untouched(family: str, prepare: Callable[[PreTrainedModel], Any], ids: Tensor) -> None:
    model = tiny_model(family, **({"resid_pdrop": 0.5} if family == "gpt2" else {}))
    truth = plain_logits(model, ids)
    prepare(model)
    before = fingerprint(model)
    runner = BlockRunner(model)
    batch = Batch(ids)
    assert torch.equal(runner.logits(batch), truth)
    runner.nll(batch, (1, 2), runner.run_to(batch, 0))
    runner.stream(batch, lambda *_: None)
    runner.check_replay(batch)
    runner.diagnose(batch)
    assert_untouched(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_model_is_untouched_after_an_exception(error: type[BaseException], ids: Tensor) -> None:
    model = tiny_model("llama")
    mixed_training(model)
    runner = BlockRunner(model)
    runner.logits(Batch(ids))  # an error of its first pass is explained, see below

    def fail(*_args: Any) -> None:
        raise error

    handle = block_list(model)[2].register_forward_hook(fail)
    before = fingerprint(model)
    for action in (
        lambda: runner.logits(Batch(ids), (1,)),
        lambda: runner.nll(Batch(ids), (3,), BlockOutput(0, torch.zeros(2, 12, 32))),
        lambda: runner.stream(Batch(ids), lambda *_: None),
    ):
        with pytest.raises(error):
            action()
    assert_untouched(model, before)
    handle.remove()
    with pytest.raises(error):
        runner.stream(Batch(ids), fail)
    assert torch.equal(runner.logits(Batch(ids)), plain_logits(model.eval(), ids))


def test_no_gradient_and_no_cache(ids: Tensor) -> None:
    model = tiny_model("llama")
    caches: list[Any] = []
    block_list(model)[0].register_forward_hook(
        lambda _, __, kwargs, ___: caches.append(kwargs.get("past_key_values")), with_kwargs=True
    )
    logits = BlockRunner(model).logits(Batch(ids))
    assert not logits.requires_grad
    assert set(caches) == {None}


# Faults of models


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_diagnose_names_the_first_block_that_is_not_finite(family: str, ids: Tensor) -> None:
    model = tiny_model(family)
    runner = BlockRunner(model)
    runner.diagnose(Batch(ids))
    with torch.no_grad():
        for parameter in block_list(model)[3].parameters():
            parameter[0] = torch.nan
    with pytest.raises(NonFiniteError, match="output of block 3"):
        runner.diagnose(Batch(ids))
    runner.diagnose(Batch(ids), off=(3,))


def test_diagnose_ignores_padding(ids: Tensor) -> None:
    model = tiny_model("llama")

    def spoil(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[1, -1] = torch.inf
        return output

    # Further on, attention would spread it: 0 times infinity is NaN.
    block_list(model)[4].register_forward_hook(spoil)
    mask = torch.ones(2, 12, dtype=torch.bool)
    runner = BlockRunner(model)
    with pytest.raises(NonFiniteError, match="block 4"):
        runner.diagnose(Batch(ids, mask))
    mask[1, -1] = False
    runner.diagnose(Batch(ids, mask))


def share_by_attribute(model: PreTrainedModel) -> None:
    """Every block adds what the block before it left in a common place."""
    channel: dict[str, Tensor] = {}

    def swap(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        received = channel.get("last", torch.zeros(()))
        channel["last"] = output
        return output + received if received.shape == output.shape else output

    for block in block_list(model):
        block.register_forward_hook(swap)
    model.register_forward_pre_hook(lambda *_: channel.clear())


def share_by_argument(model: PreTrainedModel) -> None:
    """The model hands all blocks one dict per call; block 1 stores there what block 3 reads."""
    state: dict[str, Tensor] = {}
    model.register_forward_pre_hook(lambda *_: state.clear())
    block_list(model)[1].register_forward_hook(lambda _, __, output: state.update(shared=output))
    block_list(model)[3].register_forward_hook(lambda _, __, output: output + state.get("shared", 0))


def share_by_name(model: PreTrainedModel) -> None:
    """The same, looked up where block 1 alone has put it: without block 1 there is nothing to be found."""
    state: dict[str, Tensor] = {}
    model.register_forward_pre_hook(lambda *_: state.clear())
    block_list(model)[1].register_forward_hook(lambda _, __, output: state.update(shared=output))
    block_list(model)[3].register_forward_hook(lambda _, __, output: output + state["shared"])


@pytest.mark.parametrize("share", [share_by_attribute, share_by_argument, share_by_name])
def test_blocks_that_share_more_than_their_output_are_refused(
    share: Callable[[PreTrainedModel], None], ids: Tensor
) -> None:
    model = tiny_model("llama")
    share(model)
    with pytest.raises(UnsupportedModelError, match="'llama'.*share more than their hidden states"):
        BlockRunner(model).check_replay(Batch(ids))


def test_model_that_skips_its_own_blocks_is_refused(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    embed = model.model.embed_tokens

    def forward(input_ids: Tensor, **_settings: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=embed(input_ids))

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(UnsupportedModelError, match="does not run the blocks"):
        BlockRunner(model).logits(Batch(ids))


def test_model_that_does_not_run_on_made_up_tokens_is_refused(ids: Tensor) -> None:
    model = tiny_model("llama")

    def fail(*_args: Any) -> None:
        raise RuntimeError("no tokens\n without an image")

    handle = block_list(model)[1].register_forward_hook(fail)
    before = fingerprint(model)
    with pytest.raises(
        UnsupportedModelError, match="'llama': its forward .* measured or proven: no tokens without an"
    ):
        BlockRunner(model).logits(Batch(ids))
    assert_untouched(model, before)
    handle.remove()
    assert torch.equal(BlockRunner(model).logits(Batch(ids)), plain_logits(model, ids))


# Where and in which precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, ids: Tensor) -> None:
    model = tiny_model("llama").to(dtype)
    runner = BlockRunner(model)
    logits = runner.logits(Batch(ids), (1, 3))
    assert logits.dtype == dtype
    assert torch.equal(logits, plain_logits(silenced(model, (1, 3)), ids))
    whole = runner.nll(Batch(ids), (2,))[0]
    assert whole.dtype == torch.float64
    assert runner.nll(Batch(ids), (2,), runner.run_to(Batch(ids), 1))[0].item() == whole.item()
    runner.check_replay(Batch(ids))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_offloaded_weights(family: str, kind: str, ids: Tensor, tmp_path: Path) -> None:
    plain = BlockRunner(tiny_model(family))
    model = tiny_model(family)
    if kind == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    runner = BlockRunner(model)
    assert runner.device == torch.device("cpu")
    batch = Batch(ids)
    assert torch.equal(runner.logits(batch, (1, 3)), plain.logits(batch, (1, 3)))
    prefix = runner.run_to(batch, 1)
    assert runner.nll(batch, (3,), prefix)[0].item() == plain.nll(batch, (3,))[0].item()
    runner.check_replay(batch)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
