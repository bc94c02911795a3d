# SPDX-License-Identifier: Apache-2.0
"""Searches that stay close to the dense model: the divergence, what is kept for it, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from families import VOCABULARY, plain_logits, random_ids, tiny_model
from torch import Tensor
from toys import TEXTS, config, toy_folder, toy_pruner, word_tokenizer
from transformers import PreTrainedModel
from zoo import other_stacks

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan
from optimum_blockprune.batches import Batch, CalibrationWindows
from optimum_blockprune.branching import head_losses
from optimum_blockprune.card import model_card
from optimum_blockprune.errors import CalibrationError, ConfigurationError
from optimum_blockprune.fingerprints import run_fingerprint
from optimum_blockprune.losses import divergence, summary, token_nll
from optimum_blockprune.page import page
from optimum_blockprune.picture_search import search_words
from optimum_blockprune.reproduce import command_for
from optimum_blockprune.runner import BlockRunner
from optimum_blockprune.teacher import MAX_BYTES, tail_mass, tokens_kept, with_teacher


OFF = (2, 3)


def windows_of(ids: Tensor, mask: Tensor | None = None) -> CalibrationWindows:
    return CalibrationWindows.from_tokens(ids, mask, source="test")


def padded() -> CalibrationWindows:
    ids = random_ids(4, 12)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 7:], mask[3, :4] = False, False
    return windows_of(ids, mask)


def full_divergence(model: PreTrainedModel, pruned: Tensor, ids: Tensor, scored: Tensor) -> Tensor:
    """KL(dense || pruned) over all tokens of the vocabulary, summed over the scored positions, by torch alone."""
    dense = plain_logits(model, ids).double().log_softmax(-1)
    each = torch.nn.functional.kl_div(pruned.double().log_softmax(-1), dense, log_target=True, reduction="none")
    return each.sum(-1)[scored].sum()


def search_by(objective: str | None = "kl", search: str = "exact", **fields: Any) -> BlockPruner:
    return toy_pruner(objective=objective, strategy_options={"search": search}, **fields)


# The divergence
def test_with_the_whole_vocabulary_it_is_the_divergence() -> None:
    model, ids = tiny_model("llama", 6), random_ids(4, 12)
    runner = BlockRunner(model)
    taught = with_teacher(runner, windows_of(ids), 3, k=VOCABULARY)
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, -1] = False
    (batch,) = taught.batches(4)
    wanted = full_divergence(model, runner.logits(batch, OFF), ids, scored)
    summed, predictions = runner.nll(batch, OFF)
    assert summed.item() == pytest.approx(wanted.item(), rel=1e-5) and wanted > 1e-3
    assert predictions == int(scored.sum())
    assert tail_mass(taught) == 0


def test_fewer_tokens_give_a_lower_bound_that_grows() -> None:
    model, ids = tiny_model("llama", 6), random_ids(4, 12)
    runner = BlockRunner(model)
    sums, tails = [], []
    for k in (1, 4, 16, VOCABULARY // 2, VOCABULARY):
        taught = with_teacher(runner, windows_of(ids), 4, k=k)
        (batch,) = taught.batches(4)
        sums.append(runner.nll(batch, OFF)[0].item())
        tails.append(tail_mass(taught))
    assert sums == sorted(sums) and 0 < sums[0] < sums[-1]
    assert tails == sorted(tails, reverse=True) and tails[0] > 0.1


@pytest.mark.parametrize("k", [1, 5, VOCABULARY])
def test_the_same_model_gives_nothing(k: int) -> None:
    runner = BlockRunner(tiny_model("gpt2", 4))
    taught = with_teacher(runner, padded(), 2, k=k)
    for batch in taught.batches(3):
        summed, predictions = runner.nll(batch)
        assert abs(summed.item()) / predictions < 1e-9


def test_it_is_never_negative_and_zero_probabilities_are_no_trouble() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0], [3.0, 0.0, 1.0, -1.0]])
    others = torch.tensor([[0.5, 1.0, -1.0, 2.0], [3.0, 0.0, -torch.inf, -1.0]])
    for k in (1, 2, 4):
        assert divergence(logits, summary(logits, k)).tolist() == pytest.approx([0, 0], abs=1e-12)
    found = divergence(others, summary(logits, 4))
    # The pruned model excludes what the dense one expects: no finite divergence.
    assert 0 < found[0] < 1 and torch.isinf(found[1])


# What is kept
def test_padding_predicts_nothing() -> None:
    model, windows = tiny_model("llama", 6), padded()
    runner = BlockRunner(model)
    taught = with_teacher(runner, windows, 2, k=VOCABULARY)
    (batch,) = taught.batches(4)
    scored = torch.zeros_like(windows.input_ids, dtype=torch.bool)
    scored[:, :-1] = windows.attention_mask[:, 1:] & windows.attention_mask[:, :-1]
    (plain,) = windows.batches(4)
    dense, pruned = (runner.logits(plain, off).double().log_softmax(-1) for off in ((), OFF))
    wanted = (dense.exp() * (dense - pruned)).sum(-1)[scored].sum()
    summed, predictions = runner.nll(batch, OFF)
    assert predictions == int(scored.sum())
    assert summed.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_batches_and_parts_do_not_matter() -> None:
    runner, windows = BlockRunner(tiny_model("llama", 4)), padded()
    one, all_at_once = (with_teacher(runner, windows, size, k=7) for size in (1, 4))
    assert torch.equal(one.teacher.tokens, all_at_once.teacher.tokens)
    assert torch.allclose(one.teacher.values, all_at_once.teacher.values, atol=1e-5)
    rows = [3, 0, 2]
    part = one.part(rows)
    assert torch.equal(part.teacher.tokens, one.teacher.tokens[rows])
    assert torch.equal(one.first(2).teacher.rest, one.teacher.rest[:2])
    sums = [sum(runner.nll(batch, [1])[0].item() for batch in part.batches(size)) for size in (1, 3)]
    (whole,) = one.batches(4)
    singles = {row: runner.nll(whole.rows(slice(row, row + 1)), [1])[0].item() for row in rows}
    assert sums == pytest.approx([sum(singles.values())] * 2, rel=1e-4)
    assert one.fingerprint == windows.fingerprint


def test_losses_of_positions_add_up_to_those_of_whole_logits() -> None:
    runner = BlockRunner(tiny_model("llama", 4))
    (batch,) = with_teacher(runner, padded(), 2, k=9).batches(4)
    reached = runner.run_to(batch, 3, [1])
    losses = head_losses(runner, batch, reached)
    assert losses.sum().item() == pytest.approx(token_nll(runner.logits(batch, [1]), batch)[0].item(), rel=1e-5)
    assert losses[1, 7:].abs().sum() == 0


def test_how_many_tokens_are_kept() -> None:
    def kept(windows: int, seqlen: int, vocabulary: int) -> int:
        return tokens_kept(windows_of(torch.zeros(1, 1, dtype=torch.long).expand(windows, seqlen)), vocabulary)

    assert kept(2, 64, 100) == 100
    assert kept(2, 64, 50_000) == 1024
    # 8 bytes per token and 4 for the others, at every position.
    assert kept(128, 2048, 50_000) == (MAX_BYTES // (128 * 2048) - 4) // 8 == 511
    assert kept(2048, 2048, 20) == 20
    with pytest.raises(CalibrationError, match=r"objective='kl'.*num_samples .--num-samples. to 2,016 or fewer"):
        kept(2048, 2048, 50_000)


@pytest.mark.parametrize("k", [0, VOCABULARY + 1])
def test_impossible_numbers_of_tokens_are_refused(k: int) -> None:
    with pytest.raises(ConfigurationError, match="vocabulary"):
        with_teacher(BlockRunner(tiny_model("llama", 2)), padded(), 2, k=k)


# The search
def test_exact_naive_and_race_choose_alike() -> None:
    exact, naive, race = (search_by(search=search, num_blocks=3).make_plan() for search in ("exact", "naive", "race"))
    assert exact.removed_blocks == naive.removed_blocks == race.removed_blocks
    for step, twin, third in zip(exact.steps, naive.steps, race.steps, strict=True):
        assert step["candidates"] == pytest.approx(twin["candidates"], rel=1e-4)
        assert third["loss"] == pytest.approx(twin["loss"], rel=1e-4)


def test_it_is_another_search_than_that_by_the_text() -> None:
    by_text, close = search_by(None).make_plan(), search_by().make_plan()
    assert min(close.scores.values()) > 0
    assert close.scores != by_text.scores
    assert close.details["dense_loss"] == pytest.approx(0, abs=1e-7) and by_text.details["dense_loss"] > 1
    assert search_by("nll").make_plan() == by_text


def test_a_streamed_model_makes_the_same_choice(tmp_path: Path) -> None:
    folder = toy_folder(tmp_path / "dense")
    resident, streamed = search_by(num_blocks=3), search_by(num_blocks=3)
    streamed.model = BlockPruner.from_pretrained(folder, stream=True).model
    plan, other = resident.make_plan(), streamed.make_plan()
    assert other.removed_blocks == plan.removed_blocks
    assert [step["loss"] for step in other.steps] == pytest.approx([step["loss"] for step in plan.steps], rel=1e-4)


def test_a_head_that_mixes_positions_gets_whole_windows() -> None:
    pruner = search_by(search="naive", num_blocks=1)
    pruner.model.lm_head.register_forward_hook(lambda _module, _args, logits: logits * logits.shape[1])
    plan = pruner.make_plan()
    # Of single positions, the dense model would be another one than itself.
    assert plan.details["dense_loss"] == pytest.approx(0, abs=1e-7) and min(plan.scores.values()) > 0


def test_the_dense_pass_is_counted() -> None:
    naive = search_by(search="naive")
    naive.make_plan()
    # Four windows through six blocks.
    assert naive.report.block_forwards == naive.report.naive_block_forwards + 4 * 6
    assert "dense predictions" in naive.report.seconds


def test_half_blocks_are_searched_alike() -> None:
    plans = [search_by(search=search, unit="half_block").make_plan() for search in ("exact", "naive")]
    assert plans[0].removed_names == plans[1].removed_names
    assert plans[0].details["objective"] == "kl"


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_stacks_of_an_encoder_decoder_are_searched_alike(stack: str) -> None:
    plans = []
    for search in ("exact", "naive"):
        fields = config(objective="kl", stack=stack, num_samples=3, num_blocks=1, strategy_options={"search": search})
        plans.append(BlockPruner(other_stacks.tiny_model("bart"), fields, word_tokenizer()).make_plan())
    exact, naive = plans
    assert exact.removed_blocks == naive.removed_blocks
    assert exact.scores == pytest.approx(naive.scores, rel=1e-3)
    assert exact.details["dense_loss"] == pytest.approx(0, abs=1e-7) and min(exact.scores.values()) > 0


def test_the_fingerprint_of_a_run_knows_it() -> None:
    pruner = search_by()
    runner = BlockRunner(pruner.model)
    windows = padded()
    taught, fewer = (with_teacher(runner, windows, 4, k=k) for k in (9, 8))
    recipes = [pruner.config.recipe, replace(pruner.config.recipe, objective=None)]
    prints = [run_fingerprint(runner.stack, recipes[0], each) for each in (taught, fewer)]
    assert prints[0]["data"]["k"] == 9 and prints[0] != prints[1]
    assert run_fingerprint(runner.stack, recipes[1], taught)["recipe"]["objective"] == "nll"
    assert prints[0]["recipe"]["objective"] == "kl"


# What is said
def test_the_plan_says_what_was_minimised() -> None:
    pruner = search_by()
    plan = pruner.make_plan()
    assert plan.details["objective"] == "kl" and plan.details["k"] == VOCABULARY
    assert plan.details["tail_mass"] == 0
    assert all("perplexity" not in step for step in plan.steps)
    assert BlockPruningConfig.from_plan(plan).objective == "kl"
    assert BlockPruningConfig.from_plan(search_by(None).make_plan()).objective is None


def test_pictures_page_and_card_say_kl() -> None:
    pruner = search_by()
    pruner.prune()
    plan, report = pruner.plan, pruner.report
    assert "KL (nats per token)" in search_words(report) and "perplexity" not in search_words(report)
    assert "KL (nats per token)" in page(report, title="model")
    assert "KL (nats per token) after removal" in str(model_card(plan, report, title="model"))


def test_the_command_says_it() -> None:
    plan = search_by().make_plan()
    config = BlockPruningConfig(
        "sleb", num_blocks=2, dataset="text.txt", objective="kl", strategy_options={"search": "exact"}
    )
    assert "--objective kl" in command_for(plan.with_provenance(calibration={"source": "text.txt"}), config)


def test_the_flag(tmp_path: Path) -> None:
    dense, text = toy_folder(tmp_path / "dense"), tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS), encoding="utf-8")
    flags = ("--num-blocks", 1, "--num-samples", 4, "--seqlen", 16, "--dataset", text)
    run("plan", "-m", dense, "--objective", "kl", *flags, "-o", tmp_path / "plan.json")
    plan = PruningPlan.from_file(tmp_path / "plan.json")
    assert plan.details["objective"] == "kl"


def test_strategies_without_it_are_refused_before_any_text_is_read() -> None:
    with pytest.raises(ConfigurationError, match=r"'shortgpt' has no objective 'kl'.*\(sleb, search\)"):
        toy_pruner(strategy="shortgpt", objective="kl", dataset="missing.txt").make_plan()
    with pytest.raises(ConfigurationError, match=r"Unknown objective 'kll'.*'kl'"):
        BlockPruningConfig(objective="kll")


def test_batches_keep_their_teacher_on_the_way() -> None:
    runner = BlockRunner(tiny_model("llama", 2))
    (batch,) = with_teacher(runner, padded(), 4, k=5).batches(4)
    moved: Batch = batch.to("cpu")
    assert moved.teacher.k == 5 and torch.equal(moved.rows(slice(1, 3)).teacher.rest, batch.teacher.rest[1:3])
