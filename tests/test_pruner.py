# SPDX-License-Identifier: Apache-2.0
"""The whole way of a tiny model through `BlockPruner`: load, score, plan, prune, prove, save, reload, evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import block_list, plain_logits, random_ids, silenced, tiny_model
from huggingface_hub import ModelCard
from torch.nn import functional as F
from toys import (
    NUM_BLOCKS,
    TEXTS,
    assert_same_weights,
    assert_unchanged,
    config,
    counting,
    files_below,
    snapshot,
    text,
    toy_folder,
    toy_pruner,
    word_tokenizer,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_blockprune import (
    BlockPruner,
    BlockPruningConfig,
    PruningPlan,
    PruningReport,
    available_strategies,
)
from optimum_blockprune import reading as reading_module
from optimum_blockprune.blocks import find_blocks
from optimum_blockprune.calibration import WindowSpec
from optimum_blockprune.errors import ConfigurationError, OutputError, PlanError, UnsupportedModelError
from optimum_blockprune.evaluation import EvaluationSpec, evaluate_model
from optimum_blockprune.reading import windows_for


BUILT_IN = [name for name, info in available_strategies().items() if info.distribution == "optimum-blockprune"]
BUILT_IN.remove("manual")  # it chooses nothing; test_manual.py
WITHOUT_TOKENIZER = {
    "README.md",
    "block_pruning_config.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "pruning_depth.png",
    "pruning_plan.json",
    "pruning_report.json",
}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
SEARCH = {"pruning_search.png"}  # where losses of candidates are known
NO_SPEED = EvaluationSpec(speed=False)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("dense"))


# Loading


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_is_loaded_with_its_tokenizer(dense: Path, kind: type) -> None:
    pruner = BlockPruner.from_pretrained(kind(dense))
    assert_same_weights(pruner.model.state_dict(), tiny_model("llama", NUM_BLOCKS).state_dict())
    assert pruner.tokenizer.get_vocab() == word_tokenizer().get_vocab()
    assert not pruner.model.training
    assert pruner.config == BlockPruningConfig()
    assert pruner.report.seconds.keys() == {"load"}


def test_a_loaded_model_is_taken_as_it_is(dense: Path) -> None:
    model, wanted = tiny_model("llama"), config("random")
    pruner = BlockPruner.from_pretrained(model, wanted)
    assert pruner.model is model and pruner.config is wanted and pruner.tokenizer is None
    assert BlockPruner.from_pretrained(model, tokenizer=dense).tokenizer.get_vocab() == word_tokenizer().get_vocab()


def test_arguments_for_transformers_are_passed_on(dense: Path, tmp_path: Path) -> None:
    assert BlockPruner.from_pretrained(dense, dtype="bfloat16").model.dtype is torch.bfloat16
    toy_folder(tmp_path / "inner")
    pruner = BlockPruner.from_pretrained(tmp_path, subfolder="inner")
    assert len(block_list(pruner.model)) == NUM_BLOCKS and pruner.tokenizer is not None
    with pytest.raises(ConfigurationError, match="The model is loaded already; dtype, revision would be ignored."):
        BlockPruner.from_pretrained(pruner.model, dtype="float32", revision="main")


def test_a_tokenizer_from_elsewhere_does_not_get_the_place_of_the_model(dense: Path, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "inner")
    pruner = BlockPruner.from_pretrained(tmp_path, tokenizer=str(dense), subfolder="inner")
    assert pruner.tokenizer.get_vocab() == word_tokenizer().get_vocab()
    with pytest.raises(ConfigurationError, match="No tokenizer can be loaded from"):
        BlockPruner.from_pretrained(dense, tokenizer=tmp_path)


def test_a_folder_without_tokenizer_needs_none_for_a_plan(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    pruner = BlockPruner.from_pretrained(tmp_path / "dense")
    assert pruner.tokenizer is None
    pruner.prune(tmp_path / "out", plan=PruningPlan.from_blocks(pruner.model, [3]))
    assert files_below(tmp_path / "out").keys() == WITHOUT_TOKENIZER


# Scoring and planning


def test_scores_are_the_loss_without_each_block() -> None:
    pruner = toy_pruner(depth=5)
    before = snapshot(pruner.model)
    scores = pruner.score(config(num_samples=2, batch_size=1, num_blocks=3))
    tokens = word_tokenizer()(" ".join(TEXTS), return_tensors="pt").input_ids
    windows = tokens[0, : tokens.shape[1] // 16 * 16].view(-1, 16)
    chosen = torch.randperm(8, generator=torch.Generator().manual_seed(0))[:2].sort().values
    ids = windows[chosen]
    assert sorted(scores) == [1, 2, 3]
    for block, score in scores.items():
        logits = plain_logits(silenced(pruner.model, [block]), ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert score == pytest.approx(loss.item(), rel=1e-5)
    assert_unchanged(pruner.model, before)
    assert pruner.plan is None and pruner.report == PruningReport() and pruner.config.num_blocks == 2


def test_scores_do_not_depend_on_the_budget() -> None:
    pruner = toy_pruner()
    everything_else = config(target_params=1)
    assert pruner.score(everything_else) == pruner.score()
    assert pruner.score(config("random")) == {}
    with pytest.raises(ConfigurationError, match="all 6 are protected"):
        pruner.score(config(protect_first=3, protect_last=3))


@pytest.mark.parametrize("strategy", BUILT_IN)
def test_making_a_plan_changes_nothing_but_plan_and_report(strategy: str) -> None:
    pruner = toy_pruner(strategy=strategy)
    pruner.model.train()
    block_list(pruner.model)[2].eval()
    before, random_state = snapshot(pruner.model), torch.get_rng_state()
    plan = pruner.make_plan()
    assert_unchanged(pruner.model, before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert pruner.plan is plan and plan.strategy == strategy
    assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict()))).to_dict() == plan.to_dict()


@pytest.mark.parametrize("strategy", BUILT_IN)
def test_a_strategy_meets_the_budget_repeats_itself_and_replays(strategy: str) -> None:
    first = toy_pruner(strategy=strategy)
    plan = first.make_plan()
    if plan.width:
        assert plan.removed_blocks == () and plan.width.totals()["mlp"] == {"before": 48 * NUM_BLOCKS, "after": 32 * 6}
    else:
        assert len(plan.removed_blocks) == 2 and set(plan.removed_blocks) < set(range(NUM_BLOCKS))
    searched = first.prune()
    again, replayed = toy_pruner(strategy=strategy), toy_pruner(strategy="random", dataset=None)
    assert_same_weights(again.prune().state_dict(), searched.state_dict())
    assert again.plan.to_dict() == plan.to_dict() == first.plan.to_dict()
    replayed.tokenizer = None
    assert_same_weights(replayed.prune(plan=plan).state_dict(), searched.state_dict())
    left = NUM_BLOCKS - len(plan.removed_blocks)
    assert searched.config.num_hidden_layers == len(block_list(searched)) == left


def test_a_plan_is_a_file_that_replays(tmp_path: Path) -> None:
    pruner = toy_pruner()
    path = pruner.make_plan().save(tmp_path / "plan.json")
    other = toy_pruner(dataset=None)
    other.tokenizer = None
    other.prune(plan=PruningPlan.from_file(path))
    assert_same_weights(other.model.state_dict(), pruner.prune().state_dict())
    assert other.report.strategy == "sleb" and other.report.calibration == pruner.report.calibration


# Budgets


@pytest.mark.parametrize(("sparsity", "count"), [(0.01, 1), (0.2, 2), (0.34, 3), (0.5, 3)])
def test_sparsity_is_rounded_up_to_whole_blocks(sparsity: float, count: int) -> None:
    pruner = toy_pruner(strategy="random", sparsity=sparsity)
    pruner.prune()
    assert len(pruner.plan.removed_blocks) == count
    assert pruner.report.requested == {"sparsity": sparsity}
    assert pruner.report.achieved["blocks_removed"] == pytest.approx(count / NUM_BLOCKS)


def test_no_budget_is_a_fifth() -> None:
    pruner = toy_pruner()
    pruner.prune(config=BlockPruningConfig("random"))
    assert pruner.report.requested == {"sparsity": 0.2} and len(pruner.plan.removed_blocks) == 2


def test_target_params_is_reached_by_as_few_blocks_as_possible() -> None:
    model = tiny_model("llama", NUM_BLOCKS)
    total = model.num_parameters()
    block = sum(parameter.numel() for parameter in block_list(model)[0].parameters())
    for target, count in ((total - 1, 1), (total - block, 1), (total - block - 1, 2), (total - 4 * block, 4)):
        pruner = toy_pruner(strategy="random", target_params=target)
        assert pruner.prune().num_parameters() == total - count * block <= target
        achieved = pruner.report.achieved
        assert (achieved["parameters_before"], achieved["parameters_after"]) == (total, total - count * block)


# Pruning and saving


def test_prune_returns_the_same_model_with_the_kept_blocks_themselves(ids: torch.Tensor) -> None:
    pruner = toy_pruner()
    model, blocks = pruner.model, list(block_list(pruner.model))
    truth = tiny_model("llama", NUM_BLOCKS)
    assert pruner.prune() is model
    kept = [blocks[index] for index in pruner.plan.kept_blocks]
    assert [id(block) for block in block_list(model)] == [id(block) for block in kept]
    expected = plain_logits(silenced(truth, pruner.plan.removed_blocks), ids)
    assert torch.equal(plain_logits(model, ids), expected)


def test_configuration_given_to_prune_replaces_the_first_one() -> None:
    pruner = toy_pruner(strategy="random")
    wanted = config("shortgpt", num_blocks=1)
    pruner.prune(config=wanted)
    assert pruner.config is wanted and pruner.plan.strategy == "shortgpt" and len(pruner.plan.removed_blocks) == 1


def test_the_folder_is_an_ordinary_checkpoint_with_everything_beside_it(dense: Path, tmp_path: Path) -> None:
    out, ids = tmp_path / "deep" / "out", random_ids()
    pruner = BlockPruner.from_pretrained(dense, config())
    model = pruner.prune(save_dir=str(out))
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert files_below(out).keys() == WITHOUT_TOKENIZER | TOKENIZER_FILES | SEARCH
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    assert_same_weights(reloaded.state_dict(), model.state_dict())
    assert torch.equal(plain_logits(reloaded, ids), plain_logits(model, ids))
    assert AutoTokenizer.from_pretrained(out).get_vocab() == pruner.tokenizer.get_vocab()
    assert PruningPlan.from_file(out).to_dict() == pruner.plan.to_dict()
    assert PruningPlan.from_file(out).base_model == str(dense)
    saved = BlockPruningConfig.from_pretrained(out)
    assert saved.dataset is None and saved.to_dict() == pruner.config.to_dict()
    assert ModelCard.load(out / "README.md").data.pipeline_tag == "text-generation"
    entry = json.loads((out / "config.json").read_text())["block_pruning"]
    assert entry["strategy"] == "sleb" and entry["removed_blocks"] == list(pruner.plan.removed_blocks)
    assert entry["num_blocks"] == NUM_BLOCKS and entry["base_model"] == str(dense)
    assert entry["versions"]["optimum-blockprune"] and "previous" not in entry


def test_the_report_says_what_was_asked_done_and_spent(dense: Path, tmp_path: Path) -> None:
    pruner = BlockPruner.from_pretrained(dense, config(sparsity=0.3))
    model = pruner.prune(tmp_path / "out")
    saved, report = PruningReport.from_file(tmp_path / "out"), pruner.report
    assert report.requested == {"sparsity": 0.3} and report.removed_blocks == list(pruner.plan.removed_blocks)
    assert report.achieved["blocks_before"] == 6 and report.achieved["blocks_after"] == 4
    assert report.achieved["parameters_after"] == model.num_parameters()
    share = 1 - report.achieved["parameters_after"] / report.achieved["parameters_before"]
    assert report.achieved["parameters_removed"] == share
    assert report.tokens == 64 and report.calibration == pruner.plan.calibration
    assert 0 < report.block_forwards < report.naive_block_forwards and report.head_forwards > 0
    assert report.seconds.keys() == {"load", "calibration", "search", "surgery", "save"}
    assert all(seconds > 0 for seconds in report.seconds.values()) and report.peak_memory_bytes > 10**7
    assert (report.device, report.dtype) == ("cpu", "float32")
    assert report.verification == {"mode": "logits", "passed": True} and report.evaluations == []
    assert {"python", "torch", "transformers", "optimum"} < report.versions.keys()
    written = json.loads((tmp_path / "out" / "pruning_report.json").read_text())
    assert "evaluations" not in written and written["achieved"] == report.achieved
    assert saved.to_dict() == {**report.to_dict(), "seconds": saved.seconds}


def test_a_plan_of_ones_own_reports_no_search() -> None:
    pruner = toy_pruner()
    pruner.prune(plan=PruningPlan.from_blocks(pruner.model, [4, 1]))
    report = pruner.report.to_dict()
    assert report["strategy"] == "manual" and report["removed_blocks"] == [4, 1]
    assert not report.keys() & {"requested", "block_forwards", "tokens", "calibration", "strategy_details"}


def test_pruning_twice_keeps_the_history(dense: Path, tmp_path: Path) -> None:
    pruner = BlockPruner.from_pretrained(dense)
    pruner.prune(tmp_path / "first", plan=PruningPlan.from_blocks(pruner.model, [1]))
    pruner.prune(tmp_path / "second", plan=PruningPlan.from_blocks(pruner.model, [3]))
    third = BlockPruner.from_pretrained(tmp_path / "second")
    third.prune(tmp_path / "third", plan=PruningPlan.from_blocks(third.model, [0]))
    entry, chain = json.loads((tmp_path / "third" / "config.json").read_text())["block_pruning"], []
    while entry:
        chain.append((entry["removed_blocks"], entry["num_blocks"]))
        entry = entry.get("previous")
    assert chain == [([0], 4), ([3], 5), ([1], 6)]
    # Blocks 1, then 4 (third of the rest), then 0 of the dense model are gone.
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "third")
    truth = silenced(tiny_model("llama", NUM_BLOCKS), [0, 1, 4])
    assert torch.equal(plain_logits(reloaded, random_ids()), plain_logits(truth, random_ids()))


def test_what_is_saved_is_what_was_applied(tmp_path: Path) -> None:
    pruner = toy_pruner(strategy="random")
    with pytest.raises(PlanError, match=r"There is nothing to save yet: call prune\(\) first."):
        pruner.save_pretrained(tmp_path / "out")
    pruner.prune()
    applied = pruner.plan
    later = pruner.make_plan()
    assert later.num_blocks == 4
    pruner.save_pretrained(tmp_path / "out")
    assert PruningPlan.from_file(tmp_path / "out").to_dict() == applied.to_dict()


@pytest.mark.parametrize("verify", ["logits", "keys", "off"])
def test_every_way_to_verify_saves_the_same_weights(verify: str, tmp_path: Path) -> None:
    pruner = toy_pruner(strategy="random")
    pruner.prune(tmp_path / "out", verify=verify)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_weights(reloaded.state_dict(), pruner.model.state_dict())
    assert pruner.report.verification == {"mode": verify, "passed": verify != "off"}


@pytest.mark.usefixtures("nothing_proven")
def test_only_logits_can_prove_an_unknown_family(tmp_path: Path) -> None:
    pruner = toy_pruner("stablelm", strategy="random")
    with pytest.raises(UnsupportedModelError, match="'stablelm' is not in the architecture table.*verify='logits'"):
        pruner.prune(tmp_path / "out", verify="keys")
    pruner.prune(tmp_path / "out")
    assert len(block_list(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))) == 4


def test_large_results_are_split_into_shards(tmp_path: Path) -> None:
    pruner = toy_pruner(strategy="random")
    pruner.prune()
    pruner.save_pretrained(tmp_path / "out", max_shard_size="40KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == shards and len(shards) > 2
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_weights(reloaded.state_dict(), pruner.model.state_dict())


def test_an_existing_folder_is_replaced_only_if_asked(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    pruner = toy_pruner()
    before = snapshot(pruner.model)
    with counting(pruner.model) as forwards, pytest.raises(OutputError, match="exists and is not empty.*--overwrite"):
        pruner.prune(tmp_path)
    assert not forwards and files_below(tmp_path) == {"notes.txt": b"mine"}
    assert_unchanged(pruner.model, before)
    pruner.prune(tmp_path, overwrite=True)
    assert files_below(tmp_path).keys() == WITHOUT_TOKENIZER | TOKENIZER_FILES | SEARCH
    with pytest.raises(OutputError, match="exists and is not empty"):
        pruner.save_pretrained(tmp_path)


# Evaluating


def test_evaluations_are_appended_with_their_labels(tmp_path: Path) -> None:
    pruner = toy_pruner(strategy="random")
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(text(100, seed=99))
    truth = tiny_model("llama", NUM_BLOCKS)
    before = pruner.evaluate(held_out, spec=NO_SPEED)
    pruner.prune()
    after = pruner.evaluate(held_out, spec=NO_SPEED, baseline=truth)
    named = pruner.evaluate(held_out, spec=NO_SPEED, num_samples=2, label="mine")
    assert [entry["label"] for entry in (before, after, named)] == ["dense", "pruned", "mine"]
    assert pruner.report.evaluations == [before, after, named] and "evaluation" in pruner.report.seconds
    assert (before["blocks"], after["blocks"]) == (6, 4)
    assert before["fingerprint"] == after["fingerprint"] != named["fingerprint"]
    assert (before["windows"], before["tokens"], named["windows"]) == (6, 90, 2)
    assert "kl" not in before and after["kl"] > 0
    pruner.save_pretrained(tmp_path / "out")
    assert PruningReport.from_file(tmp_path / "out").evaluations == pruner.report.evaluations
    assert BlockPruner.from_pretrained(tmp_path / "out").evaluate(TEXTS, spec=NO_SPEED)["label"] == "pruned"


def test_windows_are_evaluated_in_batches_of_the_configuration() -> None:
    for batch_size, forwards in ((1, 4), (3, 2)):
        pruner = toy_pruner(batch_size=batch_size)
        with counting(pruner.model) as calls:
            pruner.evaluate(num_samples=4, spec=None)
        seen = len(calls)
        with counting(pruner.model) as calls:
            pruner.evaluate(num_samples=4, spec=EvaluationSpec(batch_size=4))
        assert seen - len(calls) == forwards - 1


def test_a_baseline_may_be_a_folder(dense: Path) -> None:
    pruner = BlockPruner.from_pretrained(dense, config())
    assert pruner.evaluate(baseline=dense, spec=NO_SPEED)["kl"] == 0


@pytest.mark.parametrize(
    ("name", "split"), [("wikitext2", "test"), ("c4", "validation"), ("alpaca", "train"), ("mine.txt", "test")]
)
def test_named_data_sets_are_evaluated_on_held_out_text(name: str, split: str, monkeypatch) -> None:
    asked = []

    def windows_for(model, dataset, tokenizer, spec, read):
        asked.append((dataset, spec.split, spec.num_samples))
        raise ConnectionError

    monkeypatch.setattr(reading_module, "windows_for", windows_for)
    with pytest.raises(ConnectionError):
        toy_pruner().evaluate(name)
    assert asked == [(name, split, 4 if name == "c4" else None)]


def test_a_stride_reads_on_in_the_text_instead_of_choosing_windows(dense: Path) -> None:
    pruner = BlockPruner.from_pretrained(dense, config(seqlen=8))
    strided = EvaluationSpec(stride=4, speed=False)
    few = pruner.evaluate(num_samples=3, spec=strided)
    whole = WindowSpec(num_samples=None, seqlen=8)
    text = windows_for(find_blocks(pruner.model), pruner.config.dataset, pruner.tokenizer, whole)
    expected = evaluate_model(pruner.model, text.first(3), strided)
    assert few["windows"] == 3 and few["nll"] == expected["nll"]
    assert few["fingerprint"] == text.first(3).fingerprint != text.fingerprint
