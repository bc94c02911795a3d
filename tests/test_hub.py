# SPDX-License-Identifier: Apache-2.0
"""Uploads to a server in place of the Hub: what arrives, what is refused, what failures leave and how they go on."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import output, refusal, run
from hub_cards import problems
from hub_server import HubServer
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session
from toys import assert_same_weights, config, files_below, toy_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan
from optimum_blockprune.config import CONFIG_FILE
from optimum_blockprune.errors import CheckpointError, ConfigurationError, HubError, PlanError
from optimum_blockprune.hub import check_folder, check_repo_id, push_file, push_folder, replaced


NAME = "me/small"
COMMIT, PUT = "POST .*/commit/", "^PUT /lfs"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Prunes the same toy and saves it in files of a given size, once for each size."""
    dense = toy_folder(tmp_path_factory.mktemp("base") / "dense")
    folders: dict[str, Path] = {}

    def make(max_shard_size: str) -> Path:
        if max_shard_size not in folders:
            pruner = BlockPruner.from_pretrained(dense, config(strategy="random"))
            pruner.prune()
            place = tmp_path_factory.mktemp("pruned") / "small"
            folders[max_shard_size] = pruner.save_pretrained(place, max_shard_size=max_shard_size)
        return folders[max_shard_size]

    return make


@pytest.fixture(scope="module")
def folder(made: Callable[..., Path]) -> Path:
    """A pruned folder with several files of weights; nobody may change it."""
    return made("40KB")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """One that may be spoilt."""
    return Path(shutil.copytree(folder, tmp_path / "small"))


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's retries without its pauses."""
    clock = SimpleNamespace(sleep=lambda _: None, time=time.time)
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)


def on_hub(hub: HubServer, revision: str = "main", name: str = NAME) -> dict[str, bytes]:
    """The files of a repository, but the one that the Hub makes."""
    return {path: data for path, data in hub.hub.files(name, revision).items() if path != ".gitattributes"}


def titles(hub: HubServer, revision: str = "main") -> list[str]:
    """The first lines of the commits, oldest first, without the one that the Hub makes."""
    return [commit.title for commit in reversed(hub.hub.repos[NAME].history(revision)[:-1])]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


# What arrives


def test_all_files_arrive_in_one_commit(hub: HubServer, folder: Path) -> None:
    before = files_below(folder)
    commit = push_folder(folder, "small", commit_description="More words.")
    assert on_hub(hub) == before == files_below(folder)
    (made_there, _) = hub.hub.repos[NAME].history()
    assert made_there.title.endswith("(random): less 2 of 6 blocks") and made_there.description == "More words."
    assert (commit.oid, commit.pr_url) == (made_there.oid, None)
    assert commit.commit_url == f"{hub.url}/{NAME}/commit/{made_there.oid}"
    assert not hub.hub.repos[NAME].private
    large = {path for path, blob in made_there.files.items() if blob.sha256}
    assert {path.name for path in shards(folder)} <= large and len(shards(folder)) > 2


def test_it_is_read_back_from_an_empty_cache(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    push_folder(folder, NAME)
    here = AutoModelForCausalLM.from_pretrained(folder)
    there = AutoModelForCausalLM.from_pretrained(NAME, cache_dir=tmp_path / "one")
    assert_same_weights(there.state_dict(), here.state_dict())
    assert AutoTokenizer.from_pretrained(NAME, cache_dir=tmp_path / "two")("w17")["input_ids"] == [17]
    pruner = BlockPruner.from_pretrained(NAME, config(), cache_dir=tmp_path / "three")
    assert_same_weights(pruner.model.state_dict(), here.state_dict())
    assert pruner.tokenizer is not None
    assert PruningPlan.from_hub(NAME) == PruningPlan.from_file(folder)
    assert not hub.requests(r"^(GET|HEAD) .*(\.bin|\.py)$")


def test_what_is_git_or_cache_stays_here(hub: HubServer, copy: Path) -> None:
    for name in (".git/config", ".cache/huggingface/x", "notes/mine.txt"):
        (copy / name).parent.mkdir(parents=True)
        (copy / name).write_text(name)
    push_folder(copy, NAME)
    assert on_hub(hub)["notes/mine.txt"] == b"notes/mine.txt"
    assert not any(path.startswith((".git/", ".cache")) for path in on_hub(hub))


def test_a_gitignore_is_told(hub: HubServer, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.hub.put(NAME, {".gitignore": "*.png"})
    push_folder(folder, NAME)
    assert "has a .gitignore" in caplog.text


def test_what_is_there_already_makes_no_commit(hub: HubServer, folder: Path) -> None:
    first = push_folder(folder, NAME)
    hub.log.clear()
    assert push_folder(folder, NAME).oid == first.oid
    assert len(titles(hub)) == 1 and not hub.requests(f"{PUT}|{COMMIT}")


def test_files_of_an_older_push_go_and_all_others_stay(hub: HubServer, folder: Path, made: Any) -> None:
    push_folder(folder, NAME, commit_message="one")
    others = {"notes.txt": "mine", "small-q4.gguf": "mine", "old/model.safetensors": "mine", "adapter_model.bin": "m"}
    hub.hub.put(NAME, {**others, "pytorch_model.bin": "of old", "pruning_old.png": "of old"})
    push_folder(made("5GB"), NAME, commit_message="two")
    there = on_hub(hub)
    assert {name: there.pop(name).decode() for name in others} == others
    assert there == files_below(made("5GB"))
    assert "model.safetensors" in there and "model.safetensors.index.json" not in there
    assert titles(hub) == ["one", "by hand", "two"]


def test_which_files_are_replaced() -> None:
    ours = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "pruning_plan.json", CONFIG_FILE]
    theirs = ["README.md", "config.json", "sub/model.safetensors", "adapter_model.safetensors", "model.gguf"]
    assert replaced([*ours, *theirs]) == ours


# Where it goes


def test_private(hub: HubServer, folder: Path) -> None:
    push_folder(folder, NAME, private=True)
    assert hub.hub.repos[NAME].private
    push_folder(folder, NAME, private=True)


def test_private_is_not_ignored_where_it_comes_too_late(hub: HubServer, folder: Path) -> None:
    hub.hub.put(NAME, {"README.md": "hello"})
    with pytest.raises(HubError, match="'me/small' exists and is public.*settings"):
        push_folder(folder, NAME, private=True)
    assert list(on_hub(hub)) == ["README.md"]


def test_a_branch_is_made_from_main(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    hub.hub.put(NAME, {"notes.txt": "mine"})
    push_folder(folder, NAME, revision="new/one")
    assert on_hub(hub, "new/one") == {**files_below(folder), "notes.txt": b"mine"}
    assert list(on_hub(hub)) == ["notes.txt"]
    first = push_folder(folder, NAME, revision="new/one")
    assert first.oid == hub.hub.repos[NAME].heads["new/one"]
    model = AutoModelForCausalLM.from_pretrained(NAME, revision="new/one", cache_dir=tmp_path)
    assert model.config.num_hidden_layers == 4


def test_anybody_may_open_a_pull_request(hub: HubServer, folder: Path, made: Any) -> None:
    push_folder(folder, NAME, commit_message="one")
    before = on_hub(hub)
    commit = push_folder(made("5GB"), NAME, create_pr=True, token="hf_other", commit_message="two")
    assert commit.pr_url == f"{hub.url}/{NAME}/discussions/1" and commit.pr_revision == "refs/pr/1"
    assert on_hub(hub) == before and on_hub(hub, "refs/pr/1") == files_below(made("5GB"))
    push_folder(folder, NAME, revision="refs/pr/1", commit_message="three")
    assert titles(hub, "refs/pr/1") == ["one", "two", "three"]


@pytest.mark.parametrize("arguments", [{"create_pr": True, "revision": "none"}, {"revision": "refs/pr/7"}])
def test_pull_requests_make_no_branches(hub: HubServer, folder: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(HubError, match="has no revision"):
        push_folder(folder, NAME, **arguments)
    assert on_hub(hub) == {}


# Other models


def card(base: Any) -> str:
    return f"---\nbase_model: {json.dumps(base)}\n---\n# Title\n"


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ({"pruning_plan.json": '{"base_model": "org/else"}'}, "pruned from 'org/else'"),
        ({"pruning_plan.json": "{", "README.md": card("org/else")}, "pruned from 'org/else'"),
        ({"model.safetensors": "x", "README.md": card(["a/b", "c/d"])}, "pruned from 'a/b, c/d'"),
        ({"model.safetensors": "x", "README.md": "no metadata"}, "base it does not name"),
        ({"model.safetensors": "x", "README.md": "---\n: [\n---\n"}, "base it does not name"),
        ({"sub/pytorch_model.bin": "x"}, "base it does not name"),
    ],
)
def test_another_base_is_replaced_only_when_told(
    hub: HubServer, folder: Path, there: dict[str, str], words: str
) -> None:
    hub.hub.put(NAME, there)
    base = PruningPlan.from_file(folder).base_model
    with pytest.raises(HubError, match=r"overwrite=True \(--overwrite\)") as caught:
        push_folder(folder, NAME)
    assert words in str(caught.value) and f"'{base}'" in str(caught.value)
    assert on_hub(hub) == {name: data.encode() for name, data in there.items()} and not hub.requests(PUT)
    push_folder(folder, NAME, overwrite=True)
    assert {name: on_hub(hub)[name] for name in files_below(folder)} == files_below(folder)


def test_a_card_counts_where_the_plan_names_no_base(hub: HubServer, copy: Path) -> None:
    plan = PruningPlan.from_file(copy).with_provenance(base_model=None)
    plan.save(copy)
    (copy / "README.md").write_text(card("org/dense"))
    hub.hub.put(NAME, {"model.safetensors": "x", "README.md": card("org/dense")})
    push_folder(copy, NAME)
    assert on_hub(hub) == files_below(copy)


def test_two_local_folders_are_two_bases(hub: HubServer, copy: Path, folder: Path) -> None:
    push_folder(folder, NAME)
    plan = PruningPlan.from_file(copy)
    plan.with_provenance(base_model=plan.base_model + "/").save(copy)
    push_folder(copy, NAME)
    plan.with_provenance(base_model="/elsewhere/dense").save(copy)
    with pytest.raises(HubError, match="'/elsewhere/dense'"):
        push_folder(copy, NAME)


def test_a_repository_without_weights_is_free(hub: HubServer, folder: Path) -> None:
    hub.hub.put(NAME, {"README.md": card("org/else"), "notes.txt": "mine"})
    push_folder(folder, NAME)
    assert on_hub(hub) == {**files_below(folder), "notes.txt": b"mine"}


# What is refused before anything is sent


@pytest.mark.parametrize("name", ["a b", "a/b/c", "", "-x", "a--b", "x.git", None, 3])
def test_names(name: Any, hub: HubServer, folder: Path) -> None:
    with pytest.raises(HubError, match="owner/name"):
        check_repo_id(name)
    with pytest.raises(HubError, match=re.escape(repr(name))):
        push_folder(folder, name)
    assert hub.log == []


def spoil(folder: Path, how: str) -> None:
    weights = shards(folder)[0]
    index = folder / "model.safetensors.index.json"
    {
        "config": lambda: (folder / "config.json").unlink(),
        "plan": lambda: (folder / "pruning_plan.json").unlink(),
        "broken plan": lambda: (folder / "pruning_plan.json").write_text("{}"),
        "broken config": lambda: (folder / "config.json").write_text('{"model_type'),
        "weights": weights.unlink,
        "index": index.unlink,
        "empty index": lambda: index.write_text("{}"),
        "cut": lambda: weights.write_bytes(weights.read_bytes()[:-100]),
        "cut header": lambda: weights.write_bytes(weights.read_bytes()[:50]),
        "empty": lambda: weights.write_bytes(b""),
    }[how]()


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("config", CheckpointError, "lacks config.json"),
        ("plan", CheckpointError, "lacks pruning_plan.json"),
        ("broken plan", PlanError, "format_version"),
        ("broken config", CheckpointError, "is not a JSON file"),
        ("weights", CheckpointError, "lacks the weights model-00001-of-"),
        ("index", CheckpointError, "lacks the weights model.safetensors"),
        ("empty index", CheckpointError, "its index should name"),
        ("cut", CheckpointError, "is not whole"),
        ("cut header", CheckpointError, "is not whole"),
        ("empty", CheckpointError, "is not whole"),
    ],
)
def test_what_is_not_whole(hub: HubServer, copy: Path, how: str, error: type[Exception], words: str) -> None:
    spoil(copy, how)
    with pytest.raises(error, match=words):
        push_folder(copy, NAME)
    assert hub.log == []


def test_what_is_no_pruned_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no folder"):
        check_folder(tmp_path / "none")
    temporary = Path(shutil.copytree(folder, tmp_path / ".small-1x_y2z3w"))
    with pytest.raises(CheckpointError, match="temporary folder"):
        check_folder(temporary)
    temporary.rename(tmp_path / "removed-2")
    with pytest.raises(CheckpointError, match="lacks config.json and pruning_plan.json. Push one .*: removed-2"):
        check_folder(tmp_path)
    assert check_folder(tmp_path / "removed-2") == tmp_path / "removed-2"


# Failures


def failed(folder: Path, *words: str, **arguments: Any) -> HubError:
    """The error of a push that fails, which leaves the folder as it was and says how to go on."""
    before = files_below(folder)
    with pytest.raises(HubError) as caught:
        push_folder(folder, NAME, **arguments)
    text = str(caught.value)
    assert [word for word in words if word not in text] == []
    assert f"optimum-cli blockprune push {folder} {NAME}" in text
    assert files_below(folder) == before
    return caught.value


def test_no_token(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    failed(folder, "no token", "`hf auth login`", "--token")
    failed(folder, "no token", token=False)
    assert hub.log == []


def test_a_token_that_is_none(hub: HubServer, folder: Path) -> None:
    error = failed(folder, "401", "does not accept the token", "settings/tokens", token="hf_secret")
    assert "hf_secret" not in str(error) and str(error).endswith(f'{NAME} --token "$HF_TOKEN"')
    assert isinstance(error.__cause__, HfHubHTTPError)
    assert hub.hub.repos == {}


@pytest.mark.parametrize("token", ["hf_read", "hf_other"])
def test_a_token_without_the_right(hub: HubServer, folder: Path, token: str) -> None:
    failed(folder, "403", "may not write", token=token)
    hub.hub.put(NAME, {"notes.txt": "mine"})
    failed(folder, "403", "create_pr=True", token=token)
    assert list(on_hub(hub)) == ["notes.txt"] and not hub.requests(PUT)


def test_a_private_repository_of_somebody_else(hub: HubServer, folder: Path) -> None:
    hub.hub.put(NAME, {"notes.txt": "mine"}, private=True)
    failed(folder, "403", token="hf_other", create_pr=True)
    assert list(on_hub(hub)) == ["notes.txt"]


def test_a_cut_connection_and_the_rest_later(hub: HubServer, folder: Path, no_waiting: None) -> None:
    victim = shards(folder)[1]
    commit = push_folder(folder, NAME)
    oid = hub.hub.repos[NAME].at(commit.oid).files[victim.name].sha256
    hub.reset()
    fault = hub.fail(f"{PUT}/{oid}", times=None, cut_after=10_000)
    error = failed(folder, victim.name, "connection")
    assert error.__cause__ is not None
    cut = hub.requests(f"{PUT}/{oid}")
    assert len(cut) > 1 and {each.received for each in cut} == {10_000}
    assert on_hub(hub) == {}
    stored = {each.path.partition("?")[0] for each in hub.requests(PUT) if each.status == 200}
    assert stored
    hub.faults.remove(fault)
    hub.log.clear()
    command = str(error).partition("Resume with: ")[2]
    run(*shlex.split(command)[2:])
    sent = {each.path.partition("?")[0] for each in hub.requests(PUT)}
    assert f"/lfs/{oid}" in sent and not sent & stored
    assert on_hub(hub) == files_below(folder) and len(titles(hub)) == 1


def test_a_hub_that_recovers(hub: HubServer, folder: Path, no_waiting: None) -> None:
    hub.fail(PUT, times=2, status=503)
    hub.fail("/preupload/", times=1, status=500)
    hub.fail("objects/batch", times=1, cut_after=0)
    push_folder(folder, NAME)
    assert on_hub(hub) == files_below(folder) and len(titles(hub)) == 1
    assert {500, 503} < {each.status for each in hub.log}


@pytest.mark.parametrize(
    "where", [PUT, "/preupload/", "validate-yaml", "repos/create", f"GET /api/models/{NAME}$", COMMIT]
)
def test_a_hub_that_does_not(hub: HubServer, folder: Path, where: str, no_waiting: None) -> None:
    fault = hub.fail(where, times=None, status=502, message="so sorry")
    failed(folder, "status 502", "so sorry", "Try again later")
    assert NAME not in hub.hub.repos or on_hub(hub) == {}
    hub.faults.remove(fault)
    push_folder(folder, NAME)
    assert on_hub(hub) == files_below(folder)


@pytest.mark.parametrize(
    ("where", "status", "message", "words"),
    [
        (COMMIT, 403, "Private repository storage limit reached", "storage is full"),
        (COMMIT, 409, "busy", "Something else is changing"),
        (COMMIT, 413, "too big", "max_shard_size"),
        (COMMIT, 404, "gone", "no such repository"),
        ("validate-yaml", 429, "slow down", "how often"),
        (COMMIT, 418, "tea", "refused with status 418"),
    ],
)
def test_other_refusals(hub: HubServer, folder: Path, where: str, status: int, message: str, words: str) -> None:
    hub.fail(where, times=None, status=status, message=message)
    failed(folder, words, f"{status}: {message}")
    assert on_hub(hub) == {}


def test_an_answer_that_is_no_json(hub: HubServer, folder: Path) -> None:
    hub.fail("validate-yaml", status=200, plain=True)
    failed(folder, "cannot be read", "Try again later")


def test_a_commit_of_somebody_else_meanwhile(hub: HubServer, folder: Path) -> None:
    hub.fail(COMMIT, action=lambda: hub.hub.put(NAME, {"notes.txt": "mine"}))
    failed(folder, "412", "Somebody else committed")
    assert on_hub(hub) == {"notes.txt": b"mine"}
    push_folder(folder, NAME)
    assert on_hub(hub) == {**files_below(folder), "notes.txt": b"mine"}


def test_a_connection_that_fails(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    failed(folder, "connection to the Hub failed")


def test_offline_mode(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    failed(folder, "Offline mode", "HF_HUB_OFFLINE")
    assert hub.log == []


def test_a_card_that_the_hub_refuses(hub: HubServer, copy: Path) -> None:
    (copy / "README.md").write_text("---\nlicense: mine\n---\n")
    failed(copy, "README.md", '"license" with value "mine" is not valid')
    assert not hub.requests(PUT)


def test_the_command_says_what_was_given(hub: HubServer, copy: Path) -> None:
    spaced = copy.rename(copy.with_name("a b"))
    hub.fail("repos/create", status=500)
    with pytest.raises(HubError) as caught:
        push_folder(
            spaced,
            NAME,
            private=True,
            revision="x",
            commit_message="It's 'new'",
            commit_description="-d",
            overwrite=True,
        )
    command = str(caught.value).partition("Resume with: ")[2]
    run(*shlex.split(command)[2:])
    (last, _) = hub.hub.repos[NAME].history("x")
    assert (last.title, last.description) == ("It's 'new'", "-d") and hub.hub.repos[NAME].private


def test_from_the_command_line(hub: HubServer, folder: Path, capsys: pytest.CaptureFixture) -> None:
    hub.fail(COMMIT, status=500)
    line = refusal(capsys, "push", folder, NAME)
    assert f"Resume with: optimum-cli blockprune push {folder} {NAME}" in line
    assert f"{hub.url}/{NAME}/commit/" in output(capsys, "push", folder, NAME)


# One file, and the configuration


def test_one_file(hub: HubServer, tmp_path: Path) -> None:
    hub.hub.put(NAME, {"model.safetensors": "x", "pruning_plan.json": "{}"})
    (tmp_path / "a.txt").write_text("a")
    commit = push_file(tmp_path / "a.txt", NAME, revision="b")
    assert set(on_hub(hub, "b")) == {"model.safetensors", "pruning_plan.json", "a.txt"} and "a.txt" not in on_hub(hub)
    assert commit.commit_message == "Upload a.txt"
    with pytest.raises(HubError, match="401.*push a.txt again to 'me/small'"):
        push_file(tmp_path / "a.txt", NAME, token="hf_nobody")


def test_a_configuration(hub: HubServer, tmp_path: Path) -> None:
    wanted = BlockPruningConfig("random", 0.3, seed=4)
    commit = wanted.push_to_hub("there", private=True, commit_message="Mine")
    assert set(on_hub(hub, name="me/there")) == {CONFIG_FILE} and hub.hub.repos["me/there"].private
    assert commit.commit_message == "Mine"
    assert BlockPruningConfig.from_pretrained("me/there", cache_dir=tmp_path / "cache") == wanted
    wanted.save_pretrained(tmp_path / "here", push_to_hub=True)
    assert on_hub(hub, name="me/here") == files_below(tmp_path / "here")
    wanted.save_pretrained(tmp_path / "here", push_to_hub=True, repo_id="my-org/x", create_pr=True)
    assert set(on_hub(hub, "refs/pr/1", "my-org/x")) == {CONFIG_FILE}


def test_arguments_of_a_configuration(hub: HubServer, tmp_path: Path) -> None:
    wanted = BlockPruningConfig("random")
    for push in (wanted.push_to_hub, lambda name, **more: wanted.save_pretrained(tmp_path / name, True, **more)):
        with pytest.raises(ConfigurationError, match="'commit_mesage'.*'commit_message'"):
            push("x", commit_mesage="x")
        with pytest.raises(HubError, match="'a b'"):
            push("a b")
    assert hub.log == [] and list(tmp_path.iterdir()) == []


# The server itself: what would make the tests above pass in silence


def test_downloads_go_on_where_they_stopped(hub: HubServer, tmp_path: Path) -> None:
    hub.hub.put(NAME, {"a.txt": "0123456789"})
    assert Path(hf_hub_download(NAME, "a.txt", cache_dir=tmp_path)).read_text() == "0123456789"
    url = f"{hub.url}/{NAME}/resolve/main/a.txt"
    part = get_session().get(url, headers={"Range": "bytes=3-5"})
    assert (part.status_code, part.text, part.headers["Content-Range"]) == (206, "345", "bytes 3-5/10")
    assert get_session().get(url, headers={"Range": "bytes=10-"}).status_code == 416


def test_large_objects_are_checked(hub: HubServer) -> None:
    url = f"{hub.url}/lfs/{'0' * 64}?signature={hub.key}"
    assert get_session().put(url, content=b"x").status_code == 400
    assert get_session().put(url.partition("?")[0], content=b"x").status_code == 403
    assert not hub.hub.stored("0" * 64)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("base_model: /home/me/model", '"base_model" with value'),
        ("license: mine", '"license" with value'),
        ("language: [english]", '"language" with value'),
        ("base_model_relation: pruned", '"base_model_relation" must be one of'),
        ("pipeline_tag: talk", '"pipeline_tag" must be one of'),
        ("model-index: {}", '"model-index" must be a list'),
        ("model-index: [{name: x, results: [{task: {}, dataset: {name: a, type: b}, metrics: []}]}]", "task.type"),
        ("tags: [1]", '"tags" with value'),
        ("- a", "mapping"),
        ("a: [", "yaml"),
    ],
)
def test_cards_are_checked(metadata: str, words: str) -> None:
    (first, *_), _ = problems(f"---\n{metadata}\n---\n")
    assert words in first


def test_a_good_card_passes(folder: Path) -> None:
    assert problems((folder / "README.md").read_text()) == ([], [])
    assert problems("no metadata")[1]
