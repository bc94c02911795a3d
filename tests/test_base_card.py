# SPDX-License-Identifier: Apache-2.0
"""What is known of the dense model: licences are read, never made up, and no card can keep a run from going on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub.constants
import pytest
from hub_server import HubServer
from optimum.utils import logging
from toys import files_below, toy_folder
from transformers import AutoConfig, LlamaConfig

from optimum_blockprune import BlockPruner, PruningPlan, PruningReport
from optimum_blockprune.base_card import base_facts


REPO = "me/dense"
CARD = """---
license: other
license_name: tulip-research
license_link: LICENSE
language:
- en
- no
pipeline_tag: text-generation
---
# Dense
---
license: mit
---
"""
STATED = {"license": "other", "license_name": "tulip-research", "license_link": "LICENSE", "language": ["en", "no"]}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model without a card."""
    return toy_folder(tmp_path_factory.mktemp("base") / "dense")


@pytest.fixture
def repo(hub: HubServer, dense: Path) -> HubServer:
    """The tiny model on the server that stands in for the Hub, with a card."""
    hub.hub.put(REPO, {**files_below(dense), "README.md": CARD})
    return hub


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """Warnings of the module, whether or not its logger passes them on."""
    logger = logging.get_logger("optimum.blockprune.base_card")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    yield lambda: [each.getMessage() for each in caplog.records if each.name == logger.name]
    logger.removeHandler(caplog.handler)


def commit_of(hub: HubServer) -> str:
    return hub.hub.repos[REPO].at("main").oid


def card_in(folder: Path, metadata: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n", encoding="utf-8")
    return folder


# Folders


def test_a_folder_with_a_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD, encoding="utf-8")
    assert base_facts(tmp_path, network=False) == {"model": str(tmp_path), **STATED, "card": "README.md"}


@pytest.mark.parametrize("files", [{}, {"README.md": ""}, {"README.md": "# No metadata"}, {"README.md": "---\n---\n"}])
def test_nothing_stated_is_nothing_known(files: dict[str, str], tmp_path: Path, warnings) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert base_facts(tmp_path, network=True) == {"model": str(tmp_path)} and warnings() == []


@pytest.mark.parametrize(
    "metadata", [b"license: [mit", b"- a\n- b", b"license: !!python/object:os.system x", b"\xff\xfe", b"a: &b [*b]"]
)
def test_a_broken_card_warns_and_states_nothing(metadata: bytes, tmp_path: Path, warnings) -> None:
    (tmp_path / "README.md").write_bytes(b"---\n" + metadata + b"\n---\n")
    assert base_facts(tmp_path, network=False) == {"model": str(tmp_path)}
    if b"&b" not in metadata:  # odd, but can be read
        (warning,) = warnings()
        assert "README.md" in warning and "cannot be read" in warning and "\n" not in warning


@pytest.mark.parametrize(
    ("metadata", "stated"),
    [
        ("license: [mit]", {"license": "mit"}),
        ("license: [mit, apache-2.0]", {"license": ["mit", "apache-2.0"]}),
        ("license: {a: b}", {}),
        ("license: 3", {}),
        ("license: null\nlanguage: null", {}),
        ("license: ''", {}),
        ("language: fr", {"language": ["fr"]}),
        ("language: [no, [x], 3, en]", {"language": ["no", "en"]}),
        ('license_name: "two\\nlines"', {"license_name": "two lines"}),
    ],
)
def test_only_what_has_the_usual_form_counts(metadata: str, stated: dict[str, Any], tmp_path: Path) -> None:
    found = base_facts(card_in(tmp_path, metadata), network=False)
    assert found == {"model": str(tmp_path), **stated, **({"card": "README.md"} if stated else {})}


def test_how_it_was_loaded(tmp_path: Path) -> None:
    own = LlamaConfig(auto_map={"AutoModelForCausalLM": "code.Model"})
    found = base_facts(tmp_path, config=own, network=False, subfolder="part", trust_remote_code=True, token="secret")
    assert found == {"model": str(tmp_path), "subfolder": "part", "remote_code": True}
    assert base_facts(tmp_path, config=LlamaConfig(), network=False, trust_remote_code=True).keys() == {"model"}


# Pruned folders


@pytest.mark.parametrize("keeps_card", [True, False])
def test_a_pruned_folder_hands_its_licence_on(keeps_card: bool, dense: Path, tmp_path: Path) -> None:
    first = shutil.copytree(dense, tmp_path / "first")
    card_in(first, "license: mit\nlanguage: en")
    for source, target in (("first", "second"), ("second", "third")):
        pruner = BlockPruner.from_pretrained(tmp_path / source)
        pruner.prune(tmp_path / target, plan=PruningPlan.from_blocks(pruner.model, [1]))
        if not keeps_card:
            (tmp_path / target / "README.md").unlink()
    base = PruningReport.from_file(tmp_path / "third").base
    assert (base["model"], base["license"], base["language"]) == (str(tmp_path / "second"), "mit", ["en"])


@pytest.mark.parametrize("content", ["{", "[]", '{"base": []}'])
def test_a_broken_report_warns(content: str, tmp_path: Path, warnings) -> None:
    (tmp_path / "pruning_report.json").write_text(content, encoding="utf-8")
    assert base_facts(tmp_path, network=False) == {"model": str(tmp_path)} and len(warnings()) == 1


# GGUF


def gguf_file(path: Path, *, license: str | None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if license:
        writer.add_license(license)
        writer.add_languages(["en", "de"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_header_of_a_gguf_file(tmp_path: Path, warnings) -> None:
    path = gguf_file(tmp_path / "dense.gguf", license="apache-2.0")
    stated = {"license": "apache-2.0", "language": ["en", "de"], "card": "dense.gguf"}
    whole = {"model": str(path), "gguf_file": "dense.gguf", **stated}
    assert base_facts(path, network=False) == whole
    assert base_facts(tmp_path, network=False, gguf_file="dense.gguf") == {**whole, "model": str(tmp_path)}
    # A card beside a file may be about others; that of the folder that was named is about this one.
    card_in(tmp_path, "license: mit")
    assert base_facts(path, network=False)["license"] == "apache-2.0"
    assert base_facts(tmp_path, network=False, gguf_file="dense.gguf")["license"] == "mit"
    assert warnings() == []


def test_gguf_files_that_say_nothing(tmp_path: Path, warnings) -> None:
    silent = gguf_file(tmp_path / "dense.gguf", license=None)
    assert "license" not in base_facts(silent, network=False) and warnings() == []
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\0\0\0")
    assert "license" not in base_facts(tmp_path / "broken.gguf", network=False) and len(warnings()) == 1


# The Hub


def test_a_repository(repo: HubServer) -> None:
    config = AutoConfig.from_pretrained(REPO)
    repo.log.clear()
    found = base_facts(REPO, config=config, network=True)
    commit = commit_of(repo)
    place = f"https://huggingface.co/{REPO}/blob/{commit}/README.md"
    assert found == {"model": REPO, "revision": commit, **STATED, "card": place}
    here = base_facts(REPO, network=False)  # from the cache by now, of which version nobody knows
    assert here == {"model": REPO, **STATED, "card": place.replace(commit, "main")}
    seen = len(repo.log)
    assert seen and base_facts(REPO, config=config, network=True) == found and len(repo.log) == seen


def test_the_card_is_that_of_the_version(repo: HubServer) -> None:
    config, first = AutoConfig.from_pretrained(REPO), commit_of(repo)
    repo.hub.put(REPO, {"README.md": "---\nlicense: mit\n---\n"})
    found = base_facts(REPO, config=config, network=True)
    assert (found["license"], found["revision"]) == ("other", first)
    AutoConfig.from_pretrained(REPO, revision=commit_of(repo))
    found = base_facts(REPO, network=True, revision=commit_of(repo))
    assert (found["license"], found["revision"]) == ("mit", commit_of(repo)) and commit_of(repo) != first
    config._commit_hash = first  # transformers 4.57 knows it
    assert base_facts(REPO, config=config, network=True, revision="main")["license"] == "other"


def test_the_network_is_asked_only_if_it_was_anyway(repo: HubServer, monkeypatch) -> None:
    config = AutoConfig.from_pretrained(REPO)
    repo.log.clear()
    known = {"model": REPO, "revision": commit_of(repo)}
    assert base_facts(REPO, network=False) == {"model": REPO}  # nobody knows which version is in memory
    assert base_facts(REPO, config=config, network=True, local_files_only=True) == known
    assert repo.log == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert base_facts(REPO, config=config, network=True) == known and repo.log == []


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 403}, {"cut_after": 0}])
def test_what_cannot_be_fetched_is_not_known(fault: dict[str, Any], repo: HubServer, warnings) -> None:
    config = AutoConfig.from_pretrained(REPO)
    repo.fail("GET /api/models/", times=None, **fault)
    assert base_facts(REPO, config=config, network=True) == {"model": REPO, "revision": commit_of(repo)}
    assert warnings() == []


def test_a_repository_without_a_card(hub: HubServer, dense: Path, warnings) -> None:
    hub.hub.put(REPO, files_below(dense))
    config = AutoConfig.from_pretrained(REPO)
    assert base_facts(REPO, config=config, network=True).keys() == {"model", "revision"} and warnings() == []


def test_a_broken_card_keeps_nobody_from_pruning(hub: HubServer, dense: Path, tmp_path: Path, warnings) -> None:
    hub.hub.put(REPO, {**files_below(dense), "README.md": "---\nlicense: [\n---\n"})
    pruner = BlockPruner.from_pretrained(REPO)
    pruner.prune(tmp_path / "out", plan=PruningPlan.from_blocks(pruner.model, [2]))
    base = json.loads((tmp_path / "out" / "pruning_report.json").read_text())["base"]
    assert base.keys() == {"model", "revision"} and len(warnings()) == 1
    assert "Licence: not known" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_path_into_the_cache_is_the_repository(repo: HubServer) -> None:
    base_facts(REPO, config=AutoConfig.from_pretrained(REPO), network=True)
    folder = Path(huggingface_hub.try_to_load_from_cache(REPO, "README.md", revision=commit_of(repo))).parent
    found = base_facts(folder, network=False)
    assert found == {"model": REPO, "revision": commit_of(repo), **STATED, "card": "README.md"}


def test_a_gguf_file_of_a_repository(hub: HubServer, tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "dense.gguf", license="apache-2.0")
    hub.hub.put(REPO, {"dense.gguf": path.read_bytes()})
    huggingface_hub.hf_hub_download(REPO, "dense.gguf")  # as a load does
    found = base_facts(REPO, network=True, gguf_file="dense.gguf")
    assert (found["license"], found["revision"], found["card"]) == ("apache-2.0", commit_of(hub), "dense.gguf")
