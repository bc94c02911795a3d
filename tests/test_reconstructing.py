# SPDX-License-Identifier: Apache-2.0
"""`compensation="reconstruct"`: what maps in front of a cut leave over, those behind it make up for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, plain_logits, random_ids
from tiers import often
from torch import Tensor
from toys import assert_unchanged, config, snapshot, text, wide, word_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel
from zoo import other_stacks

from optimum_blockprune import (
    BlockPruner,
    BlockPruningConfig,
    PruningPlan,
    UnsupportedModelError,
    compensating,
    last_states,
)
from optimum_blockprune.calibration import WindowSpec, build_windows
from optimum_blockprune.compensating import BEHIND
from optimum_blockprune.folding import Prepared
from optimum_blockprune.folds import CHANGE, DIAGONAL


pytestmark = pytest.mark.usefixtures("no_pictures")

GONE = "2,3"
WHOLE_ONLY = ("gpt_neox", "falcon", "bloom")


def pruner_of(model: PreTrainedModel | None = None, **fields: Any) -> BlockPruner:
    """Blocks 2 and 3 of six go; seven windows of 24 tokens to fit on, one that judges."""
    options = {"strategy": "manual", "strategy_options": {"blocks": GONE}, "compensation": "reconstruct"}
    usual = {**options, "num_samples": 8, "seqlen": 24, "dataset": [text(400)]}
    return BlockPruner(model or wide("llama"), config(**{**usual, **fields}), word_tokenizer())


def steps_of(plan: PruningPlan) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    figures = plan.details["compensation"]
    return figures["cuts"], figures["behind"]


def test_it_begins_as_ridge_and_goes_on_behind() -> None:
    plan, ridge = pruner_of().make_plan(), pruner_of(compensation="ridge").make_plan()
    [cut], behind = steps_of(plan)
    assert [cut] == ridge.details["compensation"]["cuts"] and "behind" not in ridge.details["compensation"]
    assert [step["after"] for step in behind] == ["4.attention", "4.mlp", "5.attention", "5.mlp"]
    assert [step["module"] for step in behind] == ["self_attn.o_proj", "mlp.down_proj"] * 2
    reached, kept = cut["kl"], 1
    for step in behind:
        assert len(step["tried"]) == len(BEHIND)
        best = min(step["tried"])
        assert (step["kind"] == CHANGE) == (best < (1 - compensating._WORTH) * reached)
        if step["kind"] == CHANGE:
            assert step["kl"] == best
            reached, kept = best, kept + 1
    assert plan.details["compensation"]["kl_after"] == reached < 0.95 * cut["kl"]
    assert len(plan.folds.entries) == kept > 1
    assert plan.folds.entries[0] == ridge.folds.entries[0]


class Streams:
    """Of every block, what its attention and its MLP write, what the projections in them read, and the stream."""

    def __init__(self, model: PreTrainedModel, gone: set[int]) -> None:
        self.read: dict[str, Tensor] = {}
        self.stream: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        for number, layer in enumerate(model.model.layers):
            if number not in gone:
                watched = {"attention": layer.self_attn.o_proj, "mlp": layer.mlp.down_proj}
                for part, module in watched.items():
                    self._hooks.append(module.register_forward_hook(self._watch(f"{number}.{part}")))
                entered = layer.post_attention_layernorm
                self._hooks.append(entered.register_forward_pre_hook(self._enter(f"{number}.attention")))
                self._hooks.append(layer.register_forward_hook(self._left(f"{number}.mlp")))

    def _watch(self, name: str) -> Any:
        return lambda _module, args, _output: self.read.__setitem__(name, args[0])

    def _enter(self, name: str) -> Any:
        return lambda _module, args: self.stream.__setitem__(name, args[0])

    def _left(self, name: str) -> Any:
        return lambda _module, _args, output: self.stream.__setitem__(
            name, output if isinstance(output, Tensor) else output[0]
        )

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def test_maps_behind_a_cut_are_the_regression_that_they_are_said_to_be() -> None:
    """Against plain forwards of a model whose blocks are gone and whose weights are changed so far."""
    pruner = pruner_of()
    plan = pruner.make_plan()
    folds, tensors = plan.folds.entries, plan.folds.tensors()
    cuts, behind = steps_of(plan)
    strengths = {step["after"]: step["strength"] for step in [*cuts, *behind] if step["kind"] == CHANGE}
    ids = build_windows([text(400)], word_tokenizer(), WindowSpec(num_samples=8, seqlen=24, seed=0)).input_ids[:7]
    model = pruner.model
    dense = Streams(model, set())
    plain_logits(model, ids)
    dense.close()
    for number in range(1, len(folds)):
        fold = folds[number]
        place = f"{fold.block}.{'mlp' if 'mlp' in fold.module else 'attention'}"
        layers = model.model.layers
        with Prepared(layers, folds[:number], tensors).on():
            model.model.layers = torch.nn.ModuleList(each for index, each in enumerate(layers) if index not in (2, 3))
            now = Streams(model, set())
            plain_logits(model, ids)
            now.close()
            model.model.layers = layers
        here = f"{fold.block - 2}.{place.partition('.')[2]}"
        read, z, x = now.read[here], dense.stream[place], now.stream[here]
        weights = z.norm(dim=-1, keepdim=True).reciprocal()
        a, missing = ((each * weights)[:, 1:].flatten(0, 1).double() for each in (read, z - x))
        scale = weights[:, 1:].square().mean(1).sqrt()
        still = (read[:, 0] * scale).double()
        moments = a.T @ a
        shrinkage = strengths[place] * moments.diagonal().mean() * torch.eye(len(moments))
        change = torch.linalg.solve(moments + still.T @ still + shrinkage, a.T @ missing)
        torch.testing.assert_close(tensors[fold.tensor].double(), change, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", often(FAMILIES, kept=lambda name: name in ("llama", "gpt2", "gemma2", "mixtral")))
def test_memory_folder_and_files_agree_bit_for_bit(family: str, tmp_path: Path) -> None:
    wide(family).save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    pruner, before = pruner_of(dense), snapshot(dense)
    plan = pruner.make_plan()
    assert_unchanged(dense, before)
    cuts, behind = steps_of(plan)
    halves = 2 if family not in WHOLE_ONLY else 1
    assert len(behind) == 2 * halves
    if family not in ("mixtral",):
        assert plan.folds and len({each.tensor for each in plan.folds.entries}) == len(plan.folds.entries)
    allowed = {DIAGONAL} if family in ("gemma2", "gemma3_text", "olmo2") else {CHANGE}
    assert {each.kind for each in plan.folds.entries} <= allowed
    assert plan.details["compensation"]["kl_after"] <= plan.details["compensation"]["kl_before"]
    pruner.prune(save_dir=tmp_path / "pruned", plan=plan)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    ids = random_ids()
    assert torch.equal(plain_logits(loaded, ids), plain_logits(pruner.model, ids))
    read = PruningPlan.from_file(tmp_path / "pruned")
    assert read == plan and BlockPruningConfig.from_plan(read).compensation == "reconstruct"
    read.apply_to_checkpoint(tmp_path / "dense", tmp_path / "copied", verify="logits")
    copied = AutoModelForCausalLM.from_pretrained(tmp_path / "copied").state_dict()
    assert all(torch.equal(value, copied[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("gone", ["0,1", "1.mlp,2.attention", "4,5", "0,2"])
def test_wherever_something_is_gone(gone: str, tmp_path: Path) -> None:
    count = 1 if "mlp" in gone else 2
    pruner = pruner_of(strategy_options={"blocks": gone}, num_blocks=count)
    pruner.prune(save_dir=tmp_path / "pruned")
    figures = pruner.plan.details["compensation"]
    assert figures["kl_after"] <= figures["kl_before"]
    assert ("behind" in figures) == (gone != "4,5")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert torch.equal(plain_logits(loaded, random_ids()), plain_logits(pruner.model, random_ids()))


def test_models_that_cannot_start_in_the_middle_get_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = pruner_of()
    plan = usual.make_plan()

    def refuse(*_: Any) -> None:
        raise UnsupportedModelError("they share")

    monkeypatch.setattr(last_states, "prove", refuse)
    slow = pruner_of()
    assert slow.make_plan().folds.digest == plan.folds.digest
    assert slow.report.block_forwards > usual.report.block_forwards


@pytest.mark.parametrize("compensation", ["ridge", "reconstruct"])
def test_blocks_that_look_for_what_another_one_left_are_compensated(compensation: str) -> None:
    """No run may start behind block 0, which block 5 needs; `search`, whose runs must, says so."""
    model, left = wide("llama"), {}
    model.register_forward_pre_hook(lambda *_: left.clear())
    model.model.layers[0].register_forward_hook(lambda _module, _args, output: left.update(first=output))
    model.model.layers[5].register_forward_hook(lambda _module, _args, output: output + left["first"])
    figures = pruner_of(model, compensation=compensation).make_plan().details["compensation"]
    assert figures["kl_after"] < figures["kl_before"]
    with pytest.raises(UnsupportedModelError, match="share more than their hidden states"):
        pruner_of(model, strategy="search", strategy_options=None, compensation=compensation).make_plan()


def test_what_was_measured_is_kept_for_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"generated_samples": 6}
    whole = pruner_of(**fields).make_plan()
    step = compensating._Compensation._step

    def stop(self: Any, number: int, *rest: Any) -> Any:
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(compensating._Compensation, "_step", stop)
        with pytest.raises(KeyboardInterrupt):
            pruner_of(**fields).make_plan(resume_dir=tmp_path / "kept")
    # Of the two places that are done, the maps are kept, and not the far larger sums that they were made of.
    names = [path.name for path in (tmp_path / "kept").rglob("*.safetensors")]
    assert sum("-map-" in name for name in names) == 2
    assert not any(re.fullmatch(r"(own-)?compensation-\d-[0-9a-f]{12}.safetensors", name) for name in names)
    again = pruner_of(**fields)
    assert again.make_plan(resume_dir=tmp_path / "kept").folds.digest == whole.folds.digest
    assert again.report.reused_measurements > 2


def test_own_text_weighs_behind_a_cut_what_it_weighs_there() -> None:
    plan = pruner_of(generated_samples=10).make_plan()
    [cut], behind = steps_of(plan)
    kept = [step for step in behind if step["kind"] != "none"]
    assert kept and {step["own_share"] for step in kept} == {cut["own_share"]}
    assert all(len(step["tried"]) == len(BEHIND) for step in behind)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_text_that_weighs_nothing_is_not_read(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensating, "SHARES", (share,))
    seen = []
    sums = compensating._Compensation._sums

    def watched(self: Any, point: Any, *rest: Any) -> Any:
        seen.append((str(point.before), rest[2]))
        return sums(self, point, *rest)

    monkeypatch.setattr(compensating._Compensation, "_sums", watched)
    pruner_of(generated_samples=4, batch_size=8).make_plan()
    places = ["1.mlp", "4.attention", "4.mlp", "5.attention", "5.mlp"]
    own = [place for place, prefix in seen if prefix]
    assert [place for place, prefix in seen if not prefix] == places
    assert own == (places if share else [])


def test_encoders_are_reconstructed() -> None:
    model, tokenizer = other_stacks.tiny_model("bert"), word_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "w9"})
    given = config("shortgpt", num_blocks=1, compensation="reconstruct")
    figures = BlockPruner(model, given, tokenizer).make_plan().details["compensation"]
    assert figures["asked"] == "reconstruct" and figures["kl_after"] <= figures["kl_before"]


def test_budgets_are_met_with_it() -> None:
    fields = {"strategy": "sleb", "strategy_options": None, "max_kl": 0.3, "num_samples": 6}
    plan = pruner_of(**fields).make_plan()
    assert plan.details["compensation"]["asked"] == "reconstruct" and plan.details["budget"]["trail"]


@pytest.mark.slow
def test_a_real_model_keeps_more_than_with_ridge(smollm2: Path, articles: tuple[Path, Path]) -> None:
    calibration, _ = articles
    pruner = BlockPruner.from_pretrained(smollm2)
    given = {"dataset": str(calibration), "num_samples": 16, "seqlen": 256, "batch_size": 4}
    left = {}
    for compensation in ("ridge", "reconstruct"):
        made = BlockPruningConfig(
            "manual",
            num_blocks=7,
            compensation=compensation,
            strategy_options={"blocks": "12,13,14,15,16,17,18"},
            **given,
        )
        plan = pruner.make_plan(made)
        left[compensation] = plan.details["compensation"]["kl_after"]
    assert left["reconstruct"] < 0.95 * left["ridge"]
