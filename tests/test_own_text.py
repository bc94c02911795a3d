# SPDX-License-Identifier: Apache-2.0
"""What a model writes itself is drawn from its own predictions, repeats itself by seed, and never judges."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import plain_logits, random_ids, tiny_model
from lessons import QUICK, cycles, pruned_toy
from toys import assert_same_weights, assert_unchanged, config, snapshot, toy_pruner, wide, word_tokenizer
from transformers import AutoModelForCausalLM
from zoo import other_stacks

from optimum_blockprune import BlockPruner, BlockPruningConfig, compensating, own_text
from optimum_blockprune.batches import CalibrationWindows
from optimum_blockprune.compensating import SHARES
from optimum_blockprune.errors import ConfigurationError
from optimum_blockprune.fitting import STRENGTHS
from optimum_blockprune.generation import ends_of
from optimum_blockprune.own_text import SIDE_BY_SIDE, Prompts, _Drawn, prompts_of, with_own_text, written_alone


def windows(rows: int = 3, length: int = 24, mask: torch.Tensor | None = None) -> CalibrationWindows:
    return CalibrationWindows.from_tokens(random_ids(rows, length, seed=7), mask, source="random")


# What is written


def test_windows_go_on_from_places_spread_over_the_given_ones() -> None:
    model, given = tiny_model("llama"), windows()
    before = snapshot(model)
    prompts = prompts_of(model, given, 8, seed=0)
    written = written_alone(model, prompts, batch_size=3)
    assert_unchanged(model, before)
    assert written.shape == (8, 24) and prompts.windows.seqlen == 6
    places = [0, 0, 0, 9, 9, 9, 18, 18]
    for number, (row, place) in enumerate(zip(written, places, strict=True)):
        assert torch.equal(row[:6], given.input_ids[number % 3, place : place + 6])
    assert not set(written[:, 6:].flatten().tolist()) & ends_of(model)
    assert len({tuple(row[6:].tolist()) for row in written}) == 8


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_each_token_is_drawn_from_what_the_model_predicts(family: str) -> None:
    """The largest of all logits with the noise of its row, for logits of a plain forward pass without a cache."""
    model, given = tiny_model(family), windows(2, 16)
    prompts = prompts_of(model, given, 2, seed=5)
    for number, row in enumerate(written_alone(model, prompts, batch_size=2)):
        drawn = _Drawn(prompts.seeds[number : number + 1], ends_of(model))
        for place in range(4, 16):
            logits = plain_logits(model, row[None, :place])[:, -1]
            assert drawn(row[None, :place], logits).argmax() == row[place], place


def test_draws_follow_the_probabilities() -> None:
    chances = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    drawn = _Drawn(range(4000), ends=())
    counts = drawn(torch.zeros(4000, 1), chances.log().expand(4000, -1)).argmax(1).bincount(minlength=5)
    # Five standard deviations.
    assert ((counts / 4000 - chances).abs() <= 5 * (chances * (1 - chances) / 4000).sqrt()).all()


def test_a_seed_decides_and_a_batch_does_not() -> None:
    model, given = tiny_model("llama"), windows()
    first, again, other = (
        written_alone(model, prompts_of(model, given, 7, seed), size) for seed, size in ((0, 4), (0, 1), (1, 4))
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_bar_that_is_switched_off_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = tiny_model("llama"), windows()
    prompts = prompts_of(model, given, 2 * SIDE_BY_SIDE + 3, seed=0)
    shown = written_alone(model, prompts, batch_size=1)
    monkeypatch.setattr(own_text, "tqdm", partial(own_text.tqdm, disable=True))
    assert torch.equal(written_alone(model, prompts, batch_size=1), shown)


def test_padding_is_not_continued() -> None:
    mask = torch.ones(3, 24, dtype=torch.bool)
    mask[0, 12:], mask[1, 5:] = False, False  # the second is shorter than a beginning
    model, given = tiny_model("llama"), windows(mask=mask)
    prompts = prompts_of(model, given, 4, seed=0)
    rows, places = (0, 2, 0, 2), (0, 0, 6, 18)
    for begun, row, place in zip(prompts.windows.input_ids, rows, places, strict=True):
        assert torch.equal(begun, given.input_ids[row, place : place + 6])
    joined = with_own_text(given, written_alone(model, prompts, 4))
    assert joined.num_windows == 7 and torch.equal(joined.attention_mask[:3], mask)
    assert bool(joined.attention_mask[3:].all())


def test_where_there_is_nothing_to_continue_nothing_is_written(caplog: pytest.LogCaptureFixture) -> None:
    assert (
        prompts_of(tiny_model("llama"), windows(), 0, 0) is prompts_of(tiny_model("llama"), windows(), None, 0) is None
    )
    assert not caplog.records
    assert prompts_of(other_stacks.tiny_model("bert"), windows(), 4, seed=0) is None
    assert prompts_of(other_stacks.tiny_model("t5"), windows(), 4, seed=0) is None
    assert caplog.text.count("generated_samples=4 has no effect") == 2


# Compensation


FITTED: dict[str, Any] = {"strategy": "manual", "strategy_options": {"blocks": "2,3"}, "compensation": "ridge"}


def wide_pruner(**fields: Any) -> BlockPruner:
    given = config(**{**FITTED, "num_samples": 8, "seqlen": 24, **fields})
    return BlockPruner(wide("llama"), given, word_tokenizer())


@pytest.mark.parametrize("compensation", ["ridge", "scale"])
def test_at_full_weight_it_is_text_like_any_other(compensation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensating, "SHARES", (1.0,))
    ours = wide_pruner(compensation=compensation, generated_samples=10).make_plan()
    part = compensating.fitting_part

    def joined(all_windows: CalibrationWindows, share: int) -> tuple[CalibrationWindows, CalibrationWindows]:
        given, judges = part(all_windows, share)
        model = wide("llama")
        return with_own_text(given, written_alone(model, prompts_of(model, given, 10, seed=0), 2)), judges

    monkeypatch.setattr(compensating, "fitting_part", joined)
    theirs = wide_pruner(compensation=compensation).make_plan()
    assert theirs.details["compensation"]["windows"] == 17
    [(name, tensor)] = ours.folds.tensors().items()
    torch.testing.assert_close(tensor, theirs.folds.tensors()[name], rtol=1e-3, atol=1e-5)


def test_maps_are_fitted_on_it_and_judged_on_given_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, pruner = wide_pruner().make_plan(), wide_pruner(generated_samples=10)
    before, seen = snapshot(pruner.model), []
    write = Prompts.written

    def watched(prompts: Prompts, model: Any, first: int, beginnings: torch.Tensor) -> torch.Tensor:
        seen.append((first, len(beginnings), prompts.length))
        return write(prompts, model, first, beginnings)

    monkeypatch.setattr(Prompts, "written", watched)
    plan = pruner.make_plan()
    assert_unchanged(pruner.model, before)
    assert seen == [(0, 10, 24)]
    fitted, before = plan.details["compensation"], plain.details["compensation"]
    assert fitted["generated_samples"] == fitted["own_windows"] == 10
    assert not {"generated_samples", "own_windows"} & before.keys()
    for name in ("windows", "judges", "kl_before"):
        assert fitted[name] == before[name], name
    # What the given text alone gives is among what is tried: the judge can only win.
    [cut], [old] = fitted["cuts"], before["cuts"]
    assert cut["tried"][: len(STRENGTHS)] == old["tried"] and len(cut["tried"]) == len(SHARES) * len(STRENGTHS)
    assert cut["kl"] == min(cut["tried"]) <= old["kl"] and cut["own_share"] in SHARES
    assert plan.calibration == plain.calibration
    # The same again, in memory and as a folder.
    model = pruner.prune(tmp_path / "pruned")
    assert pruner.plan.folds.digest == plan.folds.digest
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert torch.equal(plain_logits(reloaded, random_ids()), plain_logits(model, random_ids()))
    assert BlockPruningConfig.from_plan(plan).generated_samples == 10
    assert BlockPruningConfig.from_pretrained(tmp_path / "pruned").generated_samples == 10


def test_it_is_written_once_for_all_numbers_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    write = Prompts.written
    monkeypatch.setattr(Prompts, "written", lambda *args: (calls.append(args[2]), write(*args))[1])
    plan = toy_pruner(max_kl=0.2, num_samples=4, compensation="ridge", generated_samples=6).make_plan()
    assert len(plan.details["budget"]["trail"]) > 1 and calls == [0]


def test_what_was_written_is_kept_for_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = wide_pruner(generated_samples=6).make_plan()

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compensating._Compensation, "_all_sums", stop)
        with pytest.raises(KeyboardInterrupt):
            wide_pruner(generated_samples=6).make_plan(resume_dir=tmp_path / "kept")
    monkeypatch.setattr(Prompts, "written", stop)
    pruner = wide_pruner(generated_samples=6)
    assert pruner.make_plan(resume_dir=tmp_path / "kept").folds.digest == whole.folds.digest
    assert pruner.report.reused_measurements == 2  # the text, and what its judges say without maps


def test_encoders_are_compensated_without_it(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = other_stacks.tiny_model("bert"), word_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "w9"})
    given = config("shortgpt", num_blocks=1, compensation="scale", generated_samples=4)
    plan = BlockPruner(model, given, tokenizer).make_plan()
    assert plan.details["compensation"]["windows"] == 3 and "own_windows" not in plan.details["compensation"]
    assert "generated_samples=4 has no effect" in caplog.text


def test_it_needs_a_compensation() -> None:
    with pytest.raises(ConfigurationError, match="generated_samples=3 is text for compensation"):
        BlockPruningConfig("sleb", generated_samples=3)
    with pytest.raises(ConfigurationError, match="generated_samples=-1 is too small"):
        BlockPruningConfig("sleb", compensation="ridge", generated_samples=-1)
    assert BlockPruningConfig("sleb", generated_samples=0).generated_samples == 0


# Healing


def test_healing_trains_on_it(tmp_path: Path) -> None:
    teacher = tiny_model("llama", 7)
    plain, more = pruned_toy(), pruned_toy()
    plain.heal(cycles(), "distill", teacher=teacher, **QUICK)
    before = snapshot(teacher)
    more.heal(cycles(), "distill", teacher=teacher, generated_samples=20, **QUICK)
    assert_unchanged(teacher, before)
    ours, theirs = more.report.healing[0], plain.report.healing[0]
    assert ours["settings"]["generated_samples"] == 20 and theirs["settings"]["generated_samples"] == 0
    for name in ("windows", "held_out_windows", "fingerprint", "perplexity_before", "tokens"):
        assert ours[name] == theirs[name], name
    again = pruned_toy()
    again.heal(cycles(), "distill", teacher=teacher, generated_samples=20, resume_dir=tmp_path / "kept", **QUICK)
    assert_same_weights(again.model.state_dict(), more.model.state_dict())
    assert any(not torch.equal(a, b) for a, b in zip(plain.model.parameters(), more.model.parameters(), strict=True))


def test_the_next_token_is_not_learned_from_it() -> None:
    with pytest.raises(ConfigurationError, match="it needs method='distill'"):
        pruned_toy().heal(cycles(), "lora", generated_samples=2)
