# SPDX-License-Identifier: Apache-2.0
"""Byte ranges of safetensors files: read only if the files are whole, and written as the library would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optimum_blockprune.errors import CheckpointError
from optimum_blockprune.tensors import (
    INDEX_FILE,
    WEIGHTS_FILE,
    difference,
    read_weights,
    shard_names,
    write_weights,
)


STORED = {
    "wide": torch.arange(6, dtype=torch.float64).view(2, 3),
    "plain": torch.randn(5, 7),
    "half": torch.randn(3, 3).bfloat16(),
    "eight": torch.randn(4).to(torch.float8_e4m3fn),
    "odd": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3),
    "none": torch.empty(0, 4),
    "naïve ✓": torch.ones(2, dtype=torch.int16),
}
HOMES = {
    "a-1.safetensors": ("wide", "odd"),
    "a-2.safetensors": ("plain", "half", "eight"),
    "a-3.safetensors": ("none",),
}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """All tensors in one file."""
    (tmp_path / "dense").mkdir()
    save_file(STORED, tmp_path / "dense" / WEIGHTS_FILE, metadata={"format": "pt", "by": "someone"})
    return tmp_path / "dense"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Some of them in three files with names of their own."""
    (tmp_path / "dense").mkdir()
    for file, names in HOMES.items():
        save_file({name: STORED[name] for name in names}, tmp_path / "dense" / file, metadata={"format": "pt"})
    write_index(tmp_path / "dense", {name: file for file, names in HOMES.items() for name in names})
    return tmp_path / "dense"


def write_index(folder: Path, weight_map: object, **metadata: object) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))


def read_index(folder: Path) -> dict:
    return json.loads((folder / INDEX_FILE).read_text())


def same(loaded: dict[str, torch.Tensor], names: dict[str, str]) -> bool:
    """Whether `loaded` holds the stored tensors under `names` (new by old), bit for bit."""

    def flat(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(-1).view(torch.uint8)

    if loaded.keys() != set(names.values()):
        return False
    pairs = [(loaded[new], STORED[old]) for old, new in names.items()]
    return all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(flat(a), flat(b)) for a, b in pairs)


# --- writing -------------------------------------------------------------------------------------------------------


def test_a_copy_under_new_names(single: Path, tmp_path: Path) -> None:
    advanced = []
    weights = read_weights(single).renamed(lambda name: None if name == "half" else f"new.{name}")
    write_weights(weights, tmp_path, num_parameters=0, advance=lambda: advanced.append(1))
    names = {name: f"new.{name}" for name in STORED if name != "half"}
    assert same(load_file(tmp_path / WEIGHTS_FILE), names)
    assert len(advanced) == len(names)
    with safe_open(tmp_path / WEIGHTS_FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "by": "someone"}


def test_elements_stay_aligned(single: Path, tmp_path: Path) -> None:
    """Also where a source was written by something that cares less than the library."""
    order = ["odd", "plain", "half", "wide"]
    sizes = {"odd": ("BOOL", 3), "plain": ("F32", 140), "half": ("BF16", 18), "wide": ("F64", 48)}
    header, data = {}, b""
    for name in order:
        begin, data = len(data), data + bytes(range(sizes[name][1]))
        header[name] = {"dtype": sizes[name][0], "shape": list(STORED[name].shape), "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    (single / WEIGHTS_FILE).write_bytes(len(text).to_bytes(8, "little") + text + data)

    write_weights(read_weights(single), tmp_path, num_parameters=0)

    written = (tmp_path / WEIGHTS_FILE).read_bytes()
    size = int.from_bytes(written[:8], "little")
    assert size % 8 == 0
    starts = {name: entry["data_offsets"][0] for name, entry in json.loads(written[8 : 8 + size]).items()}
    assert starts == {"wide": 0, "plain": 48, "half": 188, "odd": 206}
    assert difference(read_weights(single), read_weights(tmp_path)) is None


def test_shards_are_renumbered_and_empty_ones_go(sharded: Path, tmp_path: Path) -> None:
    weight_map = read_index(sharded)["weight_map"]
    write_index(sharded, weight_map, total_size=1, total_parameters=1, by="someone")
    weights = read_weights(sharded).renamed(lambda name: None if name in HOMES["a-2.safetensors"] else name)
    write_weights(weights, tmp_path, num_parameters=9)
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert read_index(tmp_path) == {
        "metadata": {"total_size": 51, "total_parameters": 9, "by": "someone"},
        "weight_map": {"none": two, "odd": one, "wide": one},
    }
    assert same({**load_file(tmp_path / one), **load_file(tmp_path / two)}, {n: n for n in ("wide", "odd", "none")})
    assert sorted(file.name for file in tmp_path.glob("*.safetensors")) == [one, two]


def test_the_number_of_parameters_is_not_added_to_an_index_without_it(sharded: Path, tmp_path: Path) -> None:
    write_weights(read_weights(sharded), tmp_path, num_parameters=9)
    assert read_index(tmp_path)["metadata"] == {"total_size": read_weights(sharded).num_bytes}


def test_difference_finds_a_name_a_shape_and_a_bit(single: Path, tmp_path: Path) -> None:
    weights = read_weights(single)
    twin = tmp_path / "twin"
    twin.mkdir()
    for changed, found in (
        ({}, None),
        ({"plain": STORED["plain"].flatten()}, "plain"),
        ({"half": STORED["half"].view(torch.float16)}, "half"),
        ({"odd": ~STORED["odd"]}, "odd"),
        ({"more": torch.ones(1)}, "more"),
    ):
        save_file({**STORED, **changed}, twin / WEIGHTS_FILE)
        assert difference(weights, read_weights(twin)) == found


def test_a_source_that_shrinks_while_it_is_read(single: Path, tmp_path: Path) -> None:
    weights = read_weights(single)
    file = single / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="changed while being read"):
        write_weights(weights, tmp_path, num_parameters=0)


# --- reading -------------------------------------------------------------------------------------------------------


def test_a_single_file_goes_before_an_index(single: Path) -> None:
    write_index(single, {"wide": "absent.safetensors"})
    assert read_weights(single).index is None


def test_a_tensor_that_the_index_forgets_is_read(sharded: Path) -> None:
    weight_map = read_index(sharded)["weight_map"]
    del weight_map["odd"]
    write_index(sharded, weight_map)
    assert "odd" in read_weights(sharded).tensors


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "a-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks a-2.safetensors of its index; get the complete checkpoint"):
        read_weights(sharded)


def test_a_tensor_that_the_index_names_and_no_file_holds(sharded: Path) -> None:
    write_index(sharded, {**read_index(sharded)["weight_map"], "gone": "a-1.safetensors"})
    with pytest.raises(CheckpointError, match="places 'gone' in a-1.safetensors, which does not hold it"):
        read_weights(sharded)


def test_a_tensor_in_two_files(sharded: Path) -> None:
    save_file({"none": STORED["none"], "odd": STORED["odd"]}, sharded / "a-3.safetensors")
    with pytest.raises(CheckpointError, match="'odd' twice, in a-1.safetensors and in a-3.safetensors"):
        read_weights(sharded)


@pytest.mark.parametrize(
    "shard", ["../dense/a-1.safetensors", "/a.safetensors", "sub/a.safetensors", "..\\a.safetensors", "a.bin", 3, None]
)
@pytest.mark.parametrize("read", [read_weights, lambda folder: shard_names(folder / INDEX_FILE)])
def test_an_index_that_leaves_the_folder(shard: object, read: Callable[[Path], object], sharded: Path) -> None:
    write_index(sharded, {**read_index(sharded)["weight_map"], "odd": shard})
    with pytest.raises(CheckpointError, match="places tensor 'odd' in .* only safetensors files in the same folder"):
        read(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', "\udcff"])
def test_a_malformed_index(text: str, sharded: Path) -> None:
    (sharded / INDEX_FILE).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match="is not a JSON file|has no 'weight_map'"):
        read_weights(sharded)


def split(data: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def overlapping(data: bytes) -> bytes:
    header, rest = split(data)
    header["odd"]["data_offsets"] = [0, 3]
    return join(header, rest)


def backwards(data: bytes) -> bytes:
    header, rest = split(data)
    header["plain"]["data_offsets"].reverse()
    return join(header, rest)


def wrong_shape(data: bytes) -> bytes:
    header, rest = split(data)
    header["plain"]["shape"] = [5, 8]
    return join(header, rest)


def unknown_dtype(data: bytes) -> bytes:
    header, rest = split(data)
    header["plain"]["dtype"] = "F31"
    return join(header, rest)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "huge_header": lambda data: (2**62).to_bytes(8, "little") + data[8:],
    "no_json": lambda data: data[:8] + b"x" + data[9:],
    "git_lfs_pointer": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "empty": lambda _: b"",
    "overlapping": overlapping,
    "backwards": backwards,
    "wrong_shape": wrong_shape,
    "unknown_dtype": unknown_dtype,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file(damage: Callable[[bytes], bytes], single: Path) -> None:
    file = single / WEIGHTS_FILE
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model.safetensors' is not a whole safetensors file: .* Get it again"):
        read_weights(single)


@pytest.mark.parametrize(
    ("present", "hint"),
    [
        ("pytorch_model.bin", r"does not open\. Save the model again as safetensors"),
        ("model-q4.gguf", "GGUF files are not rewritten"),
        ("model.fp16.safetensors", "Variants are not supported"),
        ("notes.txt", "no weights to copy"),
    ],
)
def test_other_formats_are_refused_unread(present: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / present).write_bytes(b"cos\nsystem\n(S'false'\ntR.")  # a pickle that would run a command
    with pytest.raises(CheckpointError, match=hint):
        read_weights(tmp_path)
