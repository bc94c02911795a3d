# SPDX-License-Identifier: Apache-2.0
"""Byte ranges of safetensors files: read only if the files are whole, and written as the library would."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optimum_blockprune import tensors
from optimum_blockprune.cuts import ZEROS, Cut
from optimum_blockprune.errors import CheckpointError
from optimum_blockprune.tensors import (
    INDEX_FILE,
    WEIGHTS_FILE,
    StoredTensor,
    StoredWeights,
    difference,
    read_weights,
    shard_names,
)
from optimum_blockprune.weight_writing import write_weights


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


# --- cutting -------------------------------------------------------------------------------------------------------

CUT_SHAPES = {"line": (11,), "matrix": (9, 14), "stack": (3, 8, 5)}
CUT_INDICES = {
    "some": lambda size: (0, *range(2, size - 1)),
    "none": lambda size: (),
    "padded": lambda size: (*range(1, size // 2), ZEROS, ZEROS, ZEROS),
    "zeros": lambda size: (ZEROS, ZEROS),
    "mixed": lambda size: (size - 1, ZEROS, 0, 0, 1, ZEROS, size - 2, size - 1),
    "twice": lambda size: (*range(size), *range(size)),
}
CUT_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(1, 120, shape).to(dtype)


def cut_in_memory(tensor: torch.Tensor, cut: Cut) -> torch.Tensor:
    """The same cut by torch: every entry selected, then zeros where they belong."""
    indices = torch.tensor(cut.indices, dtype=torch.long)
    result = tensor.index_select(cut.axis, indices.clamp(min=0))
    return result.index_fill(cut.axis, (indices == ZEROS).nonzero().flatten(), 0)


def written_cut(stored: dict[str, torch.Tensor], cuts: dict[str, Cut], folder: Path) -> tuple[StoredWeights, Path]:
    """Saves tensors, and writes what the cuts leave of them under new names."""
    dense, result = folder / "source", folder / "result"
    for place in (dense, result):
        place.mkdir(exist_ok=True)
    save_file(stored, dense / WEIGHTS_FILE)
    weights = read_weights(dense).renamed(lambda name: f"new.{name}", cuts.get)
    write_weights(weights, result, num_parameters=0)
    return weights, result


@pytest.mark.parametrize("buffer", [1, 7, 40, 100, 16 * 2**20])
@pytest.mark.parametrize("dtype", CUT_DTYPES, ids=str)
def test_cut_copies_equal_index_select(
    dtype: torch.dtype, buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "BUFFER_BYTES", buffer)
    stored, cuts = {"whole": values((4, 3), dtype)}, {}
    for kind, shape in CUT_SHAPES.items():
        for axis, size in enumerate(shape):
            for choice, indices in CUT_INDICES.items():
                name = f"{kind}.{axis}.{choice}"
                stored[name], cuts[name] = values(shape, dtype), Cut(axis, indices(size))

    weights, result = written_cut(stored, cuts, tmp_path)

    loaded = load_file(result / WEIGHTS_FILE)
    expected = {name: cut_in_memory(tensor, cuts[name]) if name in cuts else tensor for name, tensor in stored.items()}
    assert loaded.keys() == {f"new.{name}" for name in stored}
    for name, tensor in expected.items():
        written = loaded[f"new.{name}"]
        assert (written.dtype, written.shape) == (dtype, tensor.shape) and torch.equal(written, tensor), name
    assert weights.num_bytes == sum(tensor.nbytes for tensor in expected.values())
    assert difference(weights, read_weights(result)) is None
    assert difference(read_weights(result), weights) is None


def test_shards_and_index_follow_the_cuts(sharded: Path, tmp_path: Path) -> None:
    cuts = {"wide": Cut(1, (2, 0)), "plain": Cut(0, (4, ZEROS)), "eight": Cut(0, ())}
    weights = read_weights(sharded).renamed(lambda name: name, cuts.get)
    write_weights(weights, tmp_path, num_parameters=0)
    loaded: dict[str, torch.Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        loaded.update(load_file(file))
    assert torch.equal(loaded["wide"], STORED["wide"][:, [2, 0]])
    assert torch.equal(loaded["plain"], torch.stack([STORED["plain"][4], torch.zeros(7)]))
    assert loaded["eight"].shape == (0,) and torch.equal(loaded["half"], STORED["half"])
    assert read_index(tmp_path)["metadata"] == {"total_size": sum(tensor.nbytes for tensor in loaded.values())}
    assert difference(weights, read_weights(tmp_path)) is None


def test_a_cut_is_asked_for_by_the_old_name_and_only_for_what_stays(single: Path) -> None:
    asked: list[str] = []
    weights = read_weights(single).renamed(lambda name: None if name == "half" else "new." + name, asked.append)
    assert sorted(asked) == sorted(STORED.keys() - {"half"})
    assert all(tensor.cut is None for tensor in weights.tensors.values())


def test_a_cut_survives_another_renaming(single: Path) -> None:
    once = read_weights(single).renamed(lambda name: name, {"plain": Cut(1, (3,))}.get)
    tensor = once.renamed(str.upper).tensors["PLAIN"]
    assert (tensor.shape, tensor.stored_shape, tensor.num_bytes, tensor.element_bits) == ((5, 1), (5, 7), 20, 32)
    with pytest.raises(CheckpointError, match="'plain' was cut already"):
        once.renamed(lambda name: name, {"plain": Cut(0, (1,))}.get)


@pytest.mark.parametrize("buffer", [5, 33, 16 * 2**20])
@pytest.mark.parametrize("position", [0, 17, 41])
def test_difference_finds_a_byte_of_a_cut_tensor(
    position: int, buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "BUFFER_BYTES", buffer)
    weights, result = written_cut(
        {"x": values((6, 9), torch.int8)}, {"x": Cut(1, (8, 0, 3, ZEROS, 4, 5, 6))}, tmp_path
    )
    assert difference(weights, read_weights(result)) is None
    start = read_weights(result).tensors["new.x"].start
    file = result / WEIGHTS_FILE
    data = bytearray(file.read_bytes())
    data[start + position] ^= 1
    file.write_bytes(data)
    assert difference(weights, read_weights(result)) == "new.x"
    assert difference(read_weights(result), weights) == "new.x"


def test_streams_are_compared_wherever_they_are_split() -> None:
    def stream(*parts: bytes) -> Iterator[memoryview]:
        return map(memoryview, parts)

    assert tensors._same_bytes(stream(), stream())
    assert tensors._same_bytes(stream(b"abc", b"de"), stream(b"a", b"bcd", b"e"))
    for other in ((b"abcd",), (b"abcde", b"f"), (b"ab", b"cdf"), ()):
        assert not tensors._same_bytes(stream(b"abc", b"de"), stream(*other))
        assert not tensors._same_bytes(stream(*other), stream(b"abc", b"de"))


def test_chunks_stay_within_the_buffer(single: Path) -> None:
    for cut in (None, Cut(0, (4, 4, ZEROS, 0)), Cut(1, (6, *range(5), ZEROS))):
        tensor = read_weights(single).tensors["plain"]
        tensor = tensor if cut is None else tensor.cut_to(cut)
        for size in (1, 10, 64, 1000):
            with tensor.file.open("rb") as source:
                lengths = [len(chunk) for chunk in tensor.chunks(source, memoryview(bytearray(size)))]
            assert max(lengths) <= size and sum(lengths) == tensor.num_bytes


def test_a_source_that_shrinks_while_it_is_cut(single: Path, tmp_path: Path) -> None:
    last = max(read_weights(single).tensors.values(), key=lambda tensor: tensor.start + tensor.num_bytes)
    weights = read_weights(single).renamed(lambda name: name, {last.name: Cut(0, (last.shape[0] - 1,))}.get)
    file = single / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"ends inside tensor '{last.name}': it changed while being read"):
        write_weights(weights, tmp_path, num_parameters=0)


@pytest.mark.parametrize(
    ("name", "cut", "message"),
    [
        ("plain", Cut(2, (0,)), "'plain' .* has no axis 2"),
        ("plain", Cut(0, (5,)), "'plain' .* has no entry 5 along axis 0"),
        ("scalar", Cut(0, (0,)), "'scalar' .* has no axis 0"),
        ("none", Cut(0, (ZEROS,)), "'none' .* has no elements to cut from"),
    ],
)
def test_a_cut_that_does_not_fit(name: str, cut: Cut, message: str, single: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_weights(single).renamed(lambda old: f"new.{old}", {name: cut}.get)


@pytest.mark.parametrize(("dtype", "num_bytes"), [("F4", 4), ("F6_E2M3", 6)])
def test_packed_elements_are_not_cut(dtype: str, num_bytes: int, tmp_path: Path) -> None:
    tensor = StoredTensor("packed", dtype, (2, 4), tmp_path / WEIGHTS_FILE, 0, num_bytes)
    with pytest.raises(CheckpointError, match=f"'packed' cannot be cut: its {dtype} elements share bytes"):
        tensor.cut_to(Cut(0, (1,)))


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
