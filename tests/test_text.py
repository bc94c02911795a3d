# SPDX-License-Identifier: Apache-2.0
"""Sources of text: what is read, how rows become documents, and what is refused with which sentence."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from optimum_blockprune.errors import CalibrationError
from optimum_blockprune.text import HUB_DATASETS, chunks, documents, iterate, open_rows, shuffled


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def chat_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, unk_token="x")))
    tokenizer.chat_template = template
    return tokenizer


def read(rows: Any, **options: Any) -> list[str]:
    return list(documents(rows, chat_tokenizer(), **options))


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def requests_made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replaces both ways to the network by a record of the calls; the data set has one row per column."""
    made: list[tuple[Any, ...]] = []
    rows = datasets.Dataset.from_dict({name: ["v"] for name in ("text", "instruction", "input", "output")})

    def load(path: str, name: str | None = None, **options: Any) -> datasets.Dataset:
        made.append((path, name, options))
        return rows

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, repo, **options: made.append((repo, options["timeout"])))
    monkeypatch.setattr(datasets, "load_dataset", load)
    return made


# Files


def test_text_file_is_one_document_without_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "book.TXT"
    path.write_bytes("\ufeffEin Größe\n\nzwei".encode())
    assert open_rows(path, "train") == (str(path), ["Ein Größe\n\nzwei"])
    assert open_rows(str(path), "test") == (str(path), ["Ein Größe\n\nzwei"])


def test_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("words")
    assert open_rows("~/a.txt", "train")[1] == ["words"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows[1].jsonl"])
def test_row_files(tmp_path: Path, name: str) -> None:
    rows = [{"text": "one"}, {"text": "two"}]
    path = tmp_path / name
    if name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    source, found = open_rows(path, "validation")
    assert source == str(path)
    assert list(iterate(found, source)) == rows


def test_file_without_a_byte_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    assert open_rows(tmp_path / "a.jsonl", "train")[1] == []


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", b"\xff\xfe\xfa"), ("a.jsonl", b'{"text": "x"}\n{oops'), ("a.parquet", b"PAR"), ("a.json", b"[]")],
)
def test_unreadable_file(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=rf"{name}' cannot be read as {path.suffix} \(UTF-8\): .+") as caught:
        open_rows(path, "train")
    assert caught.value.__cause__ is not None
    assert "error occurred while generating" not in str(caught.value)


def test_other_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nx\n")
    with pytest.raises(CalibrationError, match=r"a\.csv' is a \.csv file; readable are: \.txt, \.jsonl"):
        open_rows(tmp_path / "a.csv", "train")
    with pytest.raises(CalibrationError, match="is a folder; readable are"):
        open_rows(tmp_path, "train")


@pytest.mark.parametrize("name", ["wikitext", "Salesforce/wikitext", "missing.txt", "w" * 5000, "a\0b"])
def test_unknown_strings_never_reach_the_network(name: str, requests_made: list[Any]) -> None:
    with pytest.raises(CalibrationError, match="neither an existing path nor a known name.*alpaca, c4, wikitext2"):
        open_rows(name, "train")
    assert requests_made == []


def test_a_path_object_is_never_a_hub_name(requests_made: list[Any]) -> None:
    with pytest.raises(CalibrationError, match="neither an existing path"):
        open_rows(Path("wikitext2"), "train")
    assert requests_made == []


def test_a_near_name_is_suggested() -> None:
    with pytest.raises(CalibrationError, match="Did you mean 'wikitext2'"):
        open_rows("wikitext-2", "train")


# Objects


def test_lists_and_datasets_objects() -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    assert open_rows(("a", "b"), "train") == ("in-memory texts", ["a", "b"])
    assert open_rows([{"input_ids": [1]}], "train")[0] == "in-memory tokens"
    assert open_rows(rows, "train") == ("in-memory datasets.Dataset", rows)
    assert open_rows(rows.to_iterable_dataset(), "train")[0] == "in-memory datasets.IterableDataset"
    assert open_rows(datasets.DatasetDict(test=rows), "test")[1] is rows


def test_split_missing_in_a_dataset_dict() -> None:
    with pytest.raises(CalibrationError, match=r"DatasetDict has no split 'train'; it has: \['test'\]"):
        open_rows(datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": ["a"]})), "train")


@pytest.mark.parametrize("dataset", [None, 3, {"input_ids": [1]}, iter(["a"])])
def test_other_objects_are_refused(dataset: Any) -> None:
    with pytest.raises(
        CalibrationError, match=rf"of type {type(dataset).__name__}; possible are .*wikitext2.*list of"
    ):
        open_rows(dataset, "train")


# Named data sets


def test_hub_names_load_what_the_table_says(requests_made: list[Any]) -> None:
    assert open_rows("wikitext2", "test")[0] == "wikitext2 (Salesforce/wikitext, wikitext-2-raw-v1, test)"
    assert open_rows("c4", "validation")[0] == "c4 (allenai/c4, en/c4-validation.00000-of-00008.json.gz, validation)"
    _, alpaca = open_rows("alpaca", "train")
    assert alpaca.column_names == ["instruction", "input", "output"]
    files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert requests_made == [
        ("Salesforce/wikitext", 10.0),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "test"}),
        ("allenai/c4", 10.0),
        ("allenai/c4", None, {"data_files": files, "split": "validation", "streaming": True}),
        ("tatsu-lab/alpaca", 10.0),
        ("tatsu-lab/alpaca", None, {"split": "train"}),
    ]


def test_prepared_copy_is_used_without_asking_the_hub(requests_made: list[Any]) -> None:
    Path(datasets.config.HF_DATASETS_CACHE, "Salesforce___wikitext").mkdir(parents=True)
    open_rows("wikitext2", "train")
    assert [request[0] for request in requests_made] == ["Salesforce/wikitext"]
    assert requests_made[0][1] == "wikitext-2-raw-v1"


@pytest.mark.parametrize(("name", "split"), [("alpaca", "test"), ("c4", "test"), ("wikitext2", "dev")])
def test_split_that_a_named_data_set_lacks(name: str, split: str, requests_made: list[Any]) -> None:
    with pytest.raises(CalibrationError, match=f"'{name}' has no split '{split}'; it has: train"):
        open_rows(name, split)
    assert requests_made == []


@pytest.mark.parametrize("name", sorted(HUB_DATASETS))
def test_offline_mode_names_the_way_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CalibrationError, match=rf"'{name}' could not be loaded.*offline.*dataset=PATH \(--dataset PATH"
    ) as caught:
        open_rows(name, "train")
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_no_connection_is_noticed_before_load_dataset_retries(
    requests_made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    transport_error = HfHubHTTPError.__bases__[0]

    def unreachable(self: HfApi, repo: str, **options: Any) -> None:
        raise transport_error("name or service not known")

    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    with pytest.raises(CalibrationError, match=r"--dataset PATH.*name or service not known") as caught:
        open_rows("wikitext2", "train")
    assert type(caught.value.__cause__) is transport_error
    assert requests_made == []


def test_an_answer_of_any_kind_leaves_the_decision_to_load_dataset(
    requests_made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(self: HfApi, repo: str, **options: Any) -> None:
        raise HfHubHTTPError("503", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(HfApi, "dataset_info", busy)
    assert open_rows("wikitext2", "train")[1].num_rows == 1


def test_stream_that_breaks_off() -> None:
    def broken() -> Any:
        yield {"text": "a"}
        raise ConnectionResetError("reset by peer")

    rows = datasets.IterableDataset.from_generator(broken)
    found = iterate(rows, "c4")
    assert next(found) == {"text": "a"}
    with pytest.raises(CalibrationError, match=r"Reading c4 broke off \(ConnectionResetError: reset by peer\)"):
        next(found)


# Rows to documents


def test_plain_strings_pass_unchanged() -> None:
    assert read(["a", "", " b "]) == ["a", "", " b "]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"content": "c", "text": "t"}, "t"),
        ({"messages": TALK, "content": "c"}, "c"),
        ({"messages": TALK}, "<user>Hi\n<assistant>Hello\n"),
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n3",
        ),
        ({"instruction": "Sing", "input": "", "output": "La"}, "### Instruction:\nSing\n\n### Response:\nLa"),
    ],
)
def test_first_field_that_is_present(row: dict[str, Any], text: str) -> None:
    assert read([row]) == [text]


def test_named_field() -> None:
    assert read([{"text": "t", "body": "b"}], text_field="body") == ["b"]
    assert read([{"text": "t", "talk": TALK}], text_field="talk") == ["<user>Hi\n<assistant>Hello\n"]


def test_field_that_is_missing() -> None:
    with pytest.raises(
        CalibrationError, match="Row 1 does not have any of the fields text, content, messages.*columns are: body, id"
    ):
        read([{"text": "t"}, {"body": "b", "id": 1}])
    with pytest.raises(CalibrationError, match="Row 0 does not have a field 'body'; its columns are: text"):
        read([{"text": "t"}], text_field="body")


def test_chat_template_wraps_plain_text() -> None:
    assert read(["a", {"text": "b"}], use_chat_template=True) == ["<user>a\n", "<user>b\n"]
    row = {"instruction": "Add", "input": "1 2", "output": "3"}
    assert read([row], use_chat_template=True) == ["<user>Add\n\n1 2\n<assistant>3\n"]


@pytest.mark.parametrize("value", [None, 7, [], ["a"], [{"role": "user"}], b"bytes"])
def test_value_that_is_neither_text_nor_messages(value: Any) -> None:
    with pytest.raises(CalibrationError, match=f"Row 1 holds a {type(value).__name__} where text is expected"):
        read([{"text": "fine"}, {"text": value}])


@pytest.mark.parametrize(("row", "use"), [("plain", True), ({"messages": TALK}, False)])
def test_tokenizer_without_chat_template(row: Any, use: bool) -> None:
    with pytest.raises(CalibrationError, match=r"tokenizer has no chat template.*--use-chat-template"):
        list(documents([row], chat_tokenizer(None), use_chat_template=use))


def test_chat_template_that_refuses() -> None:
    with pytest.raises(CalibrationError, match="refuses the messages of row 0: no robots"):
        read([{"messages": [{"role": "robot", "content": "beep"}]}])


# Order and pieces


def test_shuffled_is_the_order_of_datasets() -> None:
    texts = [str(number) for number in range(50)]
    theirs = datasets.Dataset.from_dict({"text": texts}).shuffle(seed=3)["text"][:10]
    assert shuffled(texts, seed=3, count=10) == theirs
    assert sorted(shuffled(texts, seed=3, count=None)) == sorted(texts)


def test_shuffled_stream() -> None:
    stream = datasets.Dataset.from_dict({"text": [str(number) for number in range(50)]}).to_iterable_dataset()
    first, again, other = ([row["text"] for row in shuffled(stream, seed=s, count=9)] for s in (1, 1, 2))
    assert len(set(first)) == 9
    assert first == again != other


@pytest.mark.parametrize("size", [1, 3, 7, 20, 1000])
def test_chunks_lose_nothing_and_keep_to_the_size(size: int) -> None:
    texts = ["first line\nsecond", "", "x" * 25, "end\n"]
    pieces = list(chunks(texts, size))
    assert "".join(pieces) == "\n\n".join(texts)
    assert all(0 < len(piece) <= size for piece in pieces)


def test_chunks_cut_behind_a_line_break_and_read_no_further_than_needed() -> None:
    texts = iter(["aaa\nbbb\nccc", "ddd", "unread"])
    pieces = chunks(texts, 9)
    assert next(pieces) == "aaa\nbbb\n"
    assert list(texts) == ["ddd", "unread"]
