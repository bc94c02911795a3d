# SPDX-License-Identifier: Apache-2.0
"""What a plan folds into weights, on the server in place of the Hub: sent with the plan, found and checked with it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import torch
from command_line import output
from families import plain_logits, random_ids
from hub_server import HubServer
from huggingface_hub.errors import LocalEntryNotFoundError
from toys import config, toy_pruner, wide, word_tokenizer
from transformers import AutoModelForCausalLM

from optimum_blockprune import BlockPruner, PruningPlan
from optimum_blockprune.errors import PlanError
from optimum_blockprune.hub import push_folder
from optimum_blockprune.loading import records_beside
from optimum_blockprune.plan import PLAN_FILE


NAME, SIDECAR = "me/small", "pruning_plan.folds"


def compensated(seed: int = 0) -> BlockPruner:
    """A pruner that has fitted maps and put them into its model."""
    pruner = BlockPruner(
        wide("llama"), config("random", num_samples=6, compensation="ridge", seed=seed), word_tokenizer()
    )
    pruner.prune()
    assert pruner.plan.folds
    return pruner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compensated folder; nobody may change it."""
    return compensated().save_pretrained(tmp_path_factory.mktemp("made") / "small")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """One that may be spoilt."""
    return Path(shutil.copytree(folder, tmp_path / "small"))


def assert_same_folds(one: PruningPlan, other: PruningPlan) -> None:
    assert one == other and one.folds.digest
    here, there = one.folds.tensors(), other.folds.tensors()
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


# Sent and found


def test_a_pruner_pushes_its_maps(hub: HubServer, tmp_path: Path) -> None:
    pruner = compensated()
    pruner.push_to_hub(NAME)
    assert SIDECAR in hub.hub.files(NAME, "main")
    plan = PruningPlan.from_hub(NAME)
    assert_same_folds(plan, pruner.plan)
    rebuilt = plan.apply(wide("llama"))
    there = AutoModelForCausalLM.from_pretrained(NAME, cache_dir=tmp_path)
    assert torch.equal(plain_logits(rebuilt, random_ids()), plain_logits(there, random_ids()))


def test_the_command_pushes_them(hub: HubServer, folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert f"{hub.url}/{NAME}/commit/" in output(capsys, "push", folder, NAME)
    assert hub.hub.files(NAME, "main")[SIDECAR] == (folder / SIDECAR).read_bytes()
    assert_same_folds(PruningPlan.from_hub(NAME), PruningPlan.from_file(folder))


def test_each_revision_has_its_own(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    """Maps differ between two commits; each plan gets those of its own commit, by any name of it."""
    second = compensated(seed=1).save_pretrained(tmp_path / "second")
    first = push_folder(folder, NAME).oid
    push_folder(second, NAME, overwrite=True)
    push_folder(folder, NAME, revision="old", overwrite=True)
    plans = [PruningPlan.from_file(each) for each in (folder, second)]
    assert plans[0].folds.digest != plans[1].folds.digest
    for revision, expected in ((first, plans[0]), (None, plans[1]), ("main", plans[1]), ("old", plans[0])):
        assert_same_folds(PruningPlan.from_hub(NAME, revision=revision), expected)


def test_a_branch_may_move_on_between_the_two_downloads(
    hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = compensated(seed=1).save_pretrained(tmp_path / "second")
    push_folder(folder, NAME)
    read = PruningPlan.from_file.__func__

    def read_and_push(cls: type[PruningPlan], path: str | Path) -> PruningPlan:
        monkeypatch.undo()
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        push_folder(second, NAME, overwrite=True)
        return read(cls, path)

    monkeypatch.setattr(PruningPlan, "from_file", classmethod(read_and_push))
    assert_same_folds(PruningPlan.from_hub(NAME), PruningPlan.from_file(folder))
    assert_same_folds(PruningPlan.from_hub(NAME), PruningPlan.from_file(second))


def test_a_later_push_without_maps_takes_them_away(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    push_folder(folder, NAME)
    plain = toy_pruner(strategy="random")
    plain.prune()
    push_folder(plain.save_pretrained(tmp_path / "plain"), NAME, overwrite=True)
    assert SIDECAR not in hub.hub.files(NAME, "main")
    assert not PruningPlan.from_hub(NAME).folds


def test_a_plan_without_maps_asks_for_its_own_file_only(hub: HubServer, tmp_path: Path) -> None:
    plain = toy_pruner(strategy="random")
    plain.prune()
    plain.push_to_hub(NAME)
    hub.log.clear()
    PruningPlan.from_hub(NAME)
    assert hub.log and all(PLAN_FILE in str(each) for each in hub.log)


def test_what_is_in_the_cache_is_not_asked_for_again(hub: HubServer, folder: Path) -> None:
    push_folder(folder, NAME)
    PruningPlan.from_hub(NAME)
    assert hub.requests(f"^GET .*{SIDECAR}")
    hub.log.clear()
    PruningPlan.from_hub(NAME)
    assert not hub.requests(SIDECAR)


# Missing or another one


def test_a_repository_without_the_file(hub: HubServer, folder: Path) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in (PLAN_FILE, "config.json")}
    hub.hub.put(NAME, {name: data.decode() for name, data in files.items()})
    words = rf"'{NAME}' folds .* which '{SIDECAR}' holds, and the repository lacks it .*Push the whole pruned folder"
    with pytest.raises(PlanError, match=words):
        PruningPlan.from_hub(NAME)
    with pytest.raises(PlanError, match=words):
        records_beside(NAME, {})


def test_a_repository_with_another_file(hub: HubServer, folder: Path, copy: Path, tmp_path: Path) -> None:
    other = compensated(seed=1).save_pretrained(tmp_path / "other")
    push_folder(folder, NAME)
    hub.hub.put(NAME, {PLAN_FILE: (other / PLAN_FILE).read_text()})
    with pytest.raises(PlanError, match=f"{SIDECAR}' is not the file of this plan"):
        PruningPlan.from_hub(NAME)


def test_a_lost_connection_is_not_taken_for_a_missing_file(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_folder(folder, NAME)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between tries
    hub.fail(f"{SIDECAR}", status=503, times=None)
    with pytest.raises(LocalEntryNotFoundError):
        PruningPlan.from_hub(NAME)


@pytest.mark.parametrize("how", ["missing", "cut", "of another plan"])
def test_such_a_folder_is_not_pushed(hub: HubServer, copy: Path, tmp_path: Path, how: str) -> None:
    sidecar = copy / SIDECAR
    if how == "missing":
        sidecar.unlink()
    elif how == "cut":
        sidecar.write_bytes(sidecar.read_bytes()[:-40])
    else:
        shutil.copy(compensated(seed=1).save_pretrained(tmp_path / "other") / SIDECAR, sidecar)
    words = "is not there. Copy it beside the plan" if how == "missing" else "is not the file of this plan"
    with pytest.raises(PlanError, match=f"{SIDECAR}' .*{words}|{SIDECAR}' {words}"):
        push_folder(copy, NAME)
    assert hub.log == []
