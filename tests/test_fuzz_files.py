# SPDX-License-Identifier: Apache-2.0
"""Model folders from anybody: pruned and proven, or refused by our error, and nothing else is run or written.

The tests hold for a folder of files. Symbolic links are followed, since the cache of the Hub is made of them.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil
import tempfile
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from fuzzing import FUZZ, NAMES, mutated, spoiled, written
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toys import files_below

from optimum_blockprune import BlockPruner, PruningPlan
from optimum_blockprune.checkpoint import apply_to_checkpoint
from optimum_blockprune.errors import BlockPruningError, CheckpointError
from optimum_blockprune.tensors import read_weights
from optimum_blockprune.weight_files import check_weights


DEPTH = 3
PLAN = PruningPlan.from_removed("llama", DEPTH, [1])
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADERS, INDEXES, CONFIGS = (settings(FUZZ, max_examples=count) for count in (300, 300, 150))


def saved(shard_size: str) -> dict[str, bytes]:
    """The files of a tiny model."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_model("llama", DEPTH).save_pretrained(folder, max_shard_size=shard_size)
        return files_below(Path(folder))


SINGLE, SHARDED = saved("5GB"), saved("20KB")
LENGTH = int.from_bytes(SINGLE[WEIGHTS][:8], "little")
HEADER, DATA = json.loads(SINGLE[WEIGHTS][8 : 8 + LENGTH]), SINGLE[WEIGHTS][8 + LENGTH :]
INDEX_DATA, CONFIG = json.loads(SHARDED[INDEX]), json.loads(SINGLE["config.json"])


@contextmanager
def folder_of(files: dict[str, bytes]) -> Iterator[Path]:
    """A model folder, in a place with a secret beside it."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "dense"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        (Path(root) / "secret.safetensors").write_bytes(SINGLE[WEIGHTS])
        yield folder


def outcome(files: dict[str, bytes]) -> str | None:
    """Prunes the files; returns our error's words, `None` if the result was proven. All else is as it was before."""
    with folder_of(files) as folder:
        root, before = folder.parent, files_below(folder.parent)
        try:
            apply_to_checkpoint(PLAN, folder, root / "out")
        except BlockPruningError as error:
            assert files_below(root) == before and {path.name for path in root.iterdir()} == {
                "dense",
                "secret.safetensors",
            }
            return str(error)
        assert {name: data for name, data in files_below(root).items() if not name.startswith("out/")} == before
        return None


def stored(header: Any, data: bytes = DATA, *, length: int | None = None) -> bytes:
    """A safetensors file; `header` as JSON or as it is."""
    text = header if isinstance(header, bytes) else written(header)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def test_the_good_files_are_pruned() -> None:
    assert outcome(SINGLE) is None and outcome(SHARDED) is None


# Headers


TENSORS = st.sampled_from(sorted(name for name in HEADER if name != "__metadata__"))
OFFSETS = st.lists(
    st.sampled_from([-1, 0, 1, 8, len(DATA), len(DATA) + 8, 2**31, 2**63, 2**64, 10**30, 0.5]), max_size=3
)
SHAPES = st.lists(st.sampled_from([-1, 0, 1, 2, 2**31, 2**63, 2**64, 1.5, "1"]), max_size=4)
DTYPES = (
    st.sampled_from(["F32", "BF16", "F64", "I8", "BOOL", "F4", "F8_E4M3", "float32", "../x", "", "object"]) | NAMES
)


@st.composite
def headers(draw: st.DrawFn) -> Any:
    """The header with one entry that lies."""
    header = copy.deepcopy(HEADER)
    entry = header[draw(TENSORS)]
    kind, values = draw(
        st.sampled_from([("data_offsets", OFFSETS), ("shape", SHAPES), ("dtype", DTYPES), ("rename", NAMES)])
    )
    if kind == "rename":
        name = draw(TENSORS)
        header[draw(values)] = header.pop(name)
    else:
        entry[kind] = draw(values)
    return header


@HEADERS
@given(st.one_of(headers(), headers(), mutated(HEADER)).map(stored) | spoiled(SINGLE[WEIGHTS]))
def test_headers(content: bytes) -> None:
    said = outcome({**SINGLE, WEIGHTS: content})
    assert said is None or said.strip()


@pytest.mark.parametrize("length", [0, 1, 7, LENGTH - 1, LENGTH + 1, 10**8, 2**31, 2**60, 2**63, 2**64 - 1])
def test_the_length_of_a_header_is_not_believed(length: int, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(stored(HEADER, length=length))
    tracemalloc.start()
    for read in (read_weights, check_weights):
        with pytest.raises(CheckpointError, match="is not (a )?whole"):
            read(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("depth", [100, 100_000])
def test_a_header_that_is_nested_deeply(depth: int, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(stored(b'{"a":' + b"[" * depth + b"]" * depth + b"}"))
    for read in (read_weights, check_weights):
        with pytest.raises(CheckpointError, match="is not (a )?whole"):
            read(tmp_path)


def test_a_tensor_that_is_stored_twice() -> None:
    name = next(name for name in HEADER if name.endswith("norm.weight"))
    twice = written(HEADER)[:-1] + b"," + written({name: HEADER[name]})[1:]
    said = outcome({**SINGLE, WEIGHTS: stored(twice)})
    assert said is None or "safetensors" in said  # the two say the same; the library decides
    moved = {**HEADER[name], "data_offsets": [0, 8]}
    said = outcome({**SINGLE, WEIGHTS: stored(written(HEADER)[:-1] + b"," + written({name: moved})[1:])})
    assert said is not None and "is not a whole safetensors file" in said


@pytest.mark.parametrize("name", ["../../escape", "/etc/passwd", "model.layers.-1.x", "model.layers.99.x", "a\0b"])
def test_names_of_tensors_are_no_paths(name: str) -> None:
    """They are kept, as transformers keeps what it does not know, or refused where they number a block."""
    header = {**HEADER, name: {"dtype": "F32", "shape": [1], "data_offsets": [len(DATA), len(DATA) + 4]}}
    said = outcome({**SINGLE, WEIGHTS: stored(header, DATA + b"\0" * 4)})
    assert ("layers.99" in name) == (said is not None)


# Indexes


SHARDS = st.sampled_from(
    ["../secret.safetensors", "/etc/passwd", "/etc/x.safetensors", "..\\secret.safetensors", "C:x.safetensors"]
    + [
        "x" * 300 + ".safetensors",
        "\0.safetensors",
        "\ud800.safetensors",
        ".safetensors",
        "a\n.safetensors",
        "é" * 130,
    ]
    + ["é" * 130 + ".safetensors", "config.json", "", ".", "..", "model-00001-of-00001.safetensors"]
)


@INDEXES
@given(mutated(INDEX_DATA, values=SHARDS).map(written) | mutated(INDEX_DATA).map(written) | spoiled(SHARDED[INDEX]))
@example(written({**INDEX_DATA, "metadata": [1]}))
def test_indexes(content: bytes) -> None:
    files = {**SHARDED, INDEX: content}
    said = outcome(files)
    assert said is None or said.strip()
    with folder_of(files) as folder:
        try:
            check_weights(folder)
        except CheckpointError as error:
            assert str(error)


@given(SHARDS)
@settings(FUZZ, max_examples=30)
def test_names_of_files_stay_in_the_folder(name: str) -> None:
    first = min(INDEX_DATA["weight_map"])
    data = {**INDEX_DATA, "weight_map": {**INDEX_DATA["weight_map"], first: name}}
    said = outcome({**SHARDED, INDEX: written(data)})
    assert said is not None and (any(words in said for words in ("same folder", "lacks", "half of a character")))


def test_links_are_read_and_never_written(tmp_path: Path) -> None:
    """As in the cache of the Hub."""
    (tmp_path / "blob").write_bytes(SINGLE[WEIGHTS])
    folder = tmp_path / "dense"
    folder.mkdir()
    (folder / "config.json").write_bytes(SINGLE["config.json"])
    (folder / WEIGHTS).symlink_to(tmp_path / "blob")
    (folder / "vocab.txt").symlink_to(tmp_path / "nothing")
    apply_to_checkpoint(PLAN, folder, tmp_path / "out")
    assert (tmp_path / "blob").read_bytes() == SINGLE[WEIGHTS] and not (tmp_path / "nothing").exists()
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    (tmp_path / "blob").unlink()
    with pytest.raises(CheckpointError, match="no weights to copy"):
        apply_to_checkpoint(PLAN, folder, tmp_path / "other")


# The model's configuration


@CONFIGS
@given(mutated(CONFIG).map(written) | spoiled(SINGLE["config.json"]))
@example(written({**CONFIG, "num_hidden_layers": 10**9}))
@example(written({**CONFIG, "hidden_size": 10**12}))
@example(written({**CONFIG, "auto_map": {"AutoModelForCausalLM": "../evil.Model"}}))
def test_configurations_of_models(content: bytes) -> None:
    said = outcome({**SINGLE, "config.json": content})
    assert said is None or said.strip()


# Pickles


class Exploit:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def torch_file(path: Path, marker: Path) -> None:
    """What `torch.save` writes, with an object that runs code."""
    torch.save({"lm_head.weight": Exploit(marker)}, path)
    assert zipfile.is_zipfile(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", WEIGHTS])
@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_nothing_is_unpickled(name: str, kind: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with folder_of({"config.json": SINGLE["config.json"]}) as folder:
        if kind == "torch":
            torch_file(folder / name, marker)
        else:
            (folder / name).write_bytes(pickle.dumps({"lm_head.weight": Exploit(marker)}, protocol=2))
        with pytest.raises(CheckpointError, match="does not open|not a whole safetensors file"):
            apply_to_checkpoint(PLAN, folder, tmp_path / "out")
        # transformers opens .bin files, with an unpickler that knows tensors only.
        with pytest.raises(BlockPruningError):
            BlockPruner.from_pretrained(folder, local_files_only=True)
        assert not marker.exists() and not (tmp_path / "out").exists()
        data = (folder / name).read_bytes()
    if kind == "pickle":
        pickle.loads(data)
    else:
        torch.load(io.BytesIO(data), weights_only=False)
    assert marker.exists()  # so that the exploit is one


def test_a_pickle_beside_good_weights_is_not_opened(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with folder_of(SINGLE) as folder:
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
            torch_file(folder / name, marker)
        apply_to_checkpoint(PLAN, folder, tmp_path / "out", verify="logits")
        BlockPruner.from_pretrained(folder, local_files_only=True)
    assert not marker.exists()
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix in (".bin", ".pt")]
    shutil.rmtree(tmp_path / "out")
