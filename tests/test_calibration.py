# SPDX-License-Identifier: Apache-2.0
"""Windows cut from text, and rows that come as tokens. The tokenizer is bytes: one byte, one token."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from optimum_blockprune.batches import Batch, CalibrationWindows
from optimum_blockprune.calibration import WindowSpec, build_windows
from optimum_blockprune.errors import CalibrationError, ConfigurationError


ROWS = [f"row {number:02d} " + "abcdefghij"[number % 10] * (number % 7) for number in range(40)]
JOINED = "\n\n".join(ROWS)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a BOS token that is added by default, as Llama's tokenizers do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, **{character: index for index, character in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=16)


TOKENIZER = byte_tokenizer()


def texts_of(windows: CalibrationWindows) -> list[str]:
    return [TOKENIZER.decode(row, clean_up_tokenization_spaces=False) for row in windows.input_ids]


def build(dataset: Any, **spec: Any) -> CalibrationWindows:
    return build_windows(dataset, TOKENIZER, WindowSpec(**spec))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What we log from INFO and Transformers from WARNING up; neither passes its records on to pytest's handler."""
    ours, messages, handler = logging.getLogger("optimum.blockprune.calibration"), [], logging.Handler()
    handler.emit = lambda record: messages.append(f"{record.levelname} {record.getMessage()}")
    for logger in (ours, logging.getLogger("transformers")):
        monkeypatch.setattr(logger, "handlers", [handler])
    ours.setLevel(logging.INFO)
    yield messages
    ours.setLevel(logging.NOTSET)


# Recipe "windows"


def test_all_windows_of_the_whole_text_in_order() -> None:
    windows = build(ROWS, num_samples=None, seqlen=16)
    count = len(JOINED) // 16
    assert texts_of(windows) == [JOINED[16 * index : 16 * (index + 1)] for index in range(count)]
    assert (windows.num_windows, windows.seqlen, windows.num_tokens) == (count, 16, 16 * count)
    assert windows.input_ids.dtype == torch.long and windows.attention_mask is None
    assert windows.source == "in-memory texts" and windows.recipe == "windows"


def test_no_special_token_is_inserted() -> None:
    assert TOKENIZER("a")["input_ids"][0] == TOKENIZER.bos_token_id
    assert TOKENIZER.bos_token_id not in build(ROWS, num_samples=None, seqlen=16).input_ids


def test_choice_is_seeded_in_order_and_among_four_times_the_tokens_needed() -> None:
    pool = [JOINED[8 * index : 8 * (index + 1)] for index in range(4 * 5)]
    chosen = {seed: texts_of(build(ROWS, num_samples=5, seqlen=8, seed=seed)) for seed in range(6)}
    for texts in chosen.values():
        positions = [pool.index(text) for text in texts]
        assert len(positions) == 5 and positions == sorted(set(positions))
    assert len({tuple(texts) for texts in chosen.values()}) == 6
    assert texts_of(build(ROWS, num_samples=5, seqlen=8, seed=3)) == chosen[3]


def test_exactly_enough_text_needs_no_choice() -> None:
    windows = build([JOINED[:35]], num_samples=4, seqlen=8, seed=9)
    assert texts_of(windows) == [JOINED[start : start + 8] for start in (0, 8, 16, 24)]


def test_endless_stream_is_not_read_whole() -> None:
    read = []

    def endless() -> Iterator[dict[str, str]]:
        for number in range(10**9):
            read.append(number)
            yield {"text": f"document {number} " * 10}

    windows = build(datasets.IterableDataset.from_generator(endless), num_samples=3, seqlen=32)
    assert windows.num_windows == 3
    assert windows.source == "in-memory datasets.IterableDataset"
    assert len(read) < 50


def test_every_source_of_the_same_text_gives_the_same_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = datasets.Dataset.from_dict({"text": ROWS})
    (tmp_path / "a.txt").write_text(JOINED)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ROWS))
    rows.to_parquet(tmp_path / "a.parquet")
    files = [tmp_path / name for name in ("a.txt", "a.jsonl", "a.parquet")]
    sources = [ROWS, [JOINED], rows, rows.to_iterable_dataset(), *files]
    assert len({build(source, num_samples=4, seqlen=16).fingerprint for source in sources}) == 1


def test_field_and_chat_template_reach_the_rows() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    spec = WindowSpec(num_samples=1, seqlen=9, text_field="body", use_chat_template=True)
    windows = build_windows([{"text": "no", "body": "yes"}], tokenizer, spec)
    assert texts_of(windows) == ["[user]yes"]


def test_long_text_is_tokenised_without_a_warning(log: list[str]) -> None:
    # A tokenizer of its own: the warning would be given once per tokenizer.
    windows = build_windows(["word " * 30_000], byte_tokenizer(), WindowSpec(num_samples=None, seqlen=1024))
    assert windows.num_windows == 150_000 // 1024
    assert log == []


def test_seqlen_is_clipped_to_the_model(log: list[str]) -> None:
    assert build(ROWS, num_samples=2, seqlen=64, max_length=16).seqlen == 16
    assert log == ["INFO seqlen=64 is clipped to the model's limit of 16 tokens."]
    assert build(ROWS, num_samples=2, seqlen=16, max_length=16).seqlen == 16
    assert len(log) == 1


# Recipe "sleb"


def test_sleb_recipe_joins_shuffled_rows(log: list[str]) -> None:
    text = "\n\n".join(datasets.Dataset.from_dict({"text": ROWS}).shuffle(seed=5)["text"][:12])
    windows = build(ROWS, num_samples=12, seqlen=20, seed=5, recipe="sleb")
    assert texts_of(windows) == [text[20 * index : 20 * (index + 1)] for index in range(len(text) // 20)]
    assert windows.recipe == "sleb"
    assert log == [f"INFO Recipe 'sleb' made {len(text) // 20} windows of 12 rows."]


def test_sleb_recipe_needs_one_window_only() -> None:
    assert build(["a" * 33, "b" * 33], num_samples=128, seqlen=64, recipe="sleb").num_windows == 1
    with pytest.raises(CalibrationError, match=r"68 tokens found, 100 needed \(1 windows of 100 tokens\)"):
        build(["a" * 33, "b" * 33], num_samples=128, seqlen=100, recipe="sleb")


# Text that does not do


def test_too_little_text_says_how_much_is_needed() -> None:
    advice = r"Lower num_samples \(--num-samples\) to 3 or fewer, lower seqlen \(--seqlen\), or give more text"
    with pytest.raises(CalibrationError, match=rf"texts is too short: 1,000 tokens found, 2,048 needed \(8.*{advice}"):
        build(["x" * 1000], num_samples=8, seqlen=256)
    with pytest.raises(CalibrationError, match=r"10 tokens found, 16 needed .*Lower seqlen \(--seqlen\), or give"):
        build(["x" * 10], num_samples=None, seqlen=16)


def test_nothing_to_read() -> None:
    with pytest.raises(CalibrationError, match="in-memory texts is empty"):
        build([])
    with pytest.raises(CalibrationError, match="in-memory datasets.Dataset is empty"):
        build(datasets.Dataset.from_dict({"text": []}))
    with pytest.raises(CalibrationError, match="holds no text: not one token"):
        build([""], num_samples=None)


def test_text_without_a_tokenizer() -> None:
    with pytest.raises(CalibrationError, match=r"needs a tokenizer: give tokenizer="):
        build_windows(ROWS, None, WindowSpec())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("recipe", "gptq", "'gptq' is unknown; possible: windows, sleb"),
        ("num_samples", 0, "num_samples=0 must be a whole number of at least 1"),
        ("num_samples", 1.5, "num_samples=1.5 must be"),
        ("seqlen", 1, "seqlen=1 must be a whole number of at least 2"),
        ("seqlen", None, "seqlen=None must be"),
        ("seed", -1, "seed=-1 must be a whole number of at least 0"),
        ("seed", True, "seed=True must be"),
        ("max_length", 0, "max_length=0 must be a whole number of at least 2"),
    ],
)
def test_impossible_specification(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        WindowSpec(**{field: value})


# Rows that come as tokens


def test_tokenised_rows_are_padded_on_the_right_to_the_longest() -> None:
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": torch.tensor([[8, 9]])}, {"input_ids": np.array([1, 2, 3, 4])}]
    windows = build_windows(rows, None, WindowSpec(num_samples=3, seqlen=10))
    assert windows.input_ids.tolist() == [[5, 6, 7, 0], [8, 9, 0, 0], [1, 2, 3, 4]]
    assert windows.attention_mask.tolist() == [[True] * 3 + [False], [True] * 2 + [False] * 2, [True] * 4]
    assert windows.attention_mask.dtype == torch.bool
    assert (windows.num_windows, windows.seqlen, windows.num_tokens) == (3, 4, 9)
    assert (windows.source, windows.recipe) == ("in-memory tokens", "tokenised")


def test_tokenised_rows_of_one_length_have_no_mask() -> None:
    rows = [{"input_ids": [5, 6], "attention_mask": [1, 1]}, {"input_ids": [7, 8]}]
    assert build(rows, num_samples=2).attention_mask is None


def test_given_padding_on_the_left_is_kept_and_blanked() -> None:
    rows = [{"input_ids": [2, 2, 6, 7], "attention_mask": [0, 0, 1, 1]}, {"input_ids": [3, 4, 5, 6]}]
    windows = build(rows, num_samples=2)
    assert windows.input_ids.tolist() == [[0, 0, 6, 7], [3, 4, 5, 6]]
    assert windows.attention_mask.tolist() == [[False, False, True, True], [True] * 4]


def test_longer_rows_are_cut_padding_first(log: list[str]) -> None:
    rows = [
        {"input_ids": [1, 2, 3, 4, 5]},
        {"input_ids": [0, 0, 0, 7, 8, 9, 10], "attention_mask": [0, 0, 0, 1, 1, 1, 1]},
        {"input_ids": [0, 0, 7, 8], "attention_mask": [0, 0, 1, 1]},
        {"input_ids": [1, 2, 3]},
    ]
    windows = build(rows, num_samples=None, seqlen=3)
    assert windows.input_ids.tolist() == [[1, 2, 3], [7, 8, 9], [0, 7, 8], [1, 2, 3]]
    assert windows.num_tokens == 11
    assert log == ["INFO 3 of 4 tokenised examples are cut to their first 3 tokens."]


def test_tokenised_choice_is_seeded_and_in_order() -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[number, 100] for number in range(30)]})
    first = [build(rows, num_samples=6, seed=seed).input_ids[:, 0].tolist() for seed in (0, 0, 1)]
    assert first[0] == first[1] == sorted(set(first[0])) != first[2]
    assert build(list(rows), num_samples=6).input_ids[:, 0].tolist() == first[0]


def test_tokenised_stream_is_not_read_whole() -> None:
    def endless() -> Iterator[dict[str, list[int]]]:
        for number in range(10**9):
            yield {"input_ids": [number, 1]}

    windows = build(datasets.IterableDataset.from_generator(endless), num_samples=3)
    assert windows.num_windows == 3 and int(windows.input_ids.max()) < 12


def test_too_few_tokenised_rows() -> None:
    with pytest.raises(CalibrationError, match="2 tokenised examples found, 8 needed. Lower num_samples .* to 2 or"):
        build([{"input_ids": [1, 2]}] * 2, num_samples=8)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": []}, "Row 1 has no tokens"),
        ({"text": "x"}, "Row 1 has no 'input_ids'"),
        ("text", "Row 1 has no 'input_ids'"),
        ({"input_ids": [1]}, "Row 1 has 1 real tokens in its first 8; 2 are needed"),
        ({"input_ids": [1, 2, 3], "attention_mask": [0, 0, 0]}, "Row 1 has 0 real tokens"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 1]}, "Row 1 has 3 input_ids but an attention_mask of 2"),
        ({"input_ids": [1, -100]}, r"Row 1 has a negative token id \(-100\)"),
        ({"input_ids": [[1, 2], [3, 4]]}, r"Row 1: input_ids must hold .* shape \[n\] or \[1, n\]; .* shape \[2, 2\]"),
        ({"input_ids": [0.5, 2.0]}, "Row 1: input_ids must hold whole numbers .* torch.float32"),
        ({"input_ids": 7}, "Row 1: input_ids must hold whole numbers"),
        ({"input_ids": ["a", "b"]}, "Row 1: input_ids is not a list of numbers"),
        ({"input_ids": None}, "Row 1: input_ids is not a list of numbers"),
    ],
)
def test_tokenised_row_that_does_not_do(row: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        build([{"input_ids": [1, 2, 3]}, row], num_samples=None, seqlen=8)


def test_sleb_recipe_cannot_cut_tokens() -> None:
    with pytest.raises(CalibrationError, match="Recipe 'sleb' cuts text, but in-memory tokens is tokenised"):
        build([{"input_ids": [1, 2]}], recipe="sleb")


# The values


def test_fingerprint_is_that_of_the_tokens() -> None:
    ids = torch.arange(12).view(3, 4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    padded = mask.clone()
    padded[0, 3] = False
    other_padding = ids.clone()
    other_padding[0, 3] = 77

    def of(tokens: torch.Tensor, attention_mask: torch.Tensor | None = None, source: str = "a") -> str:
        return CalibrationWindows.from_tokens(tokens, attention_mask, source=source).fingerprint

    assert of(ids) == of(ids.int(), mask, source="b") == of(ids.T.contiguous().T)
    assert of(ids, padded) == of(other_padding, padded.long())
    assert len({of(ids), of(ids.view(4, 3)), of(ids + 1), of(ids.flip(0)), of(ids, padded)}) == 5
    assert len(of(ids)) == 64 and int(of(ids), 16) > 0


def test_description_is_json() -> None:
    windows = CalibrationWindows.from_tokens(
        torch.tensor([[1, 2], [3, 0]]), torch.tensor([[1, 1], [1, 0]]), source="s"
    )
    described = {"source": "s", "windows": 2, "seqlen": 2, "tokens": 3, "recipe": "tokenised"}
    assert json.loads(json.dumps(windows.describe())) == {**described, "fingerprint": windows.fingerprint}


def test_batches_cover_all_windows_and_drop_idle_masks() -> None:
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[4, 2] = False
    windows = CalibrationWindows.from_tokens(torch.arange(15).view(5, 3), mask, source="s")
    batches = list(windows.batches(2))
    assert torch.equal(torch.cat([batch.input_ids for batch in batches]), windows.input_ids)
    assert [batch.num_tokens for batch in batches] == [6, 6, 2]
    assert [batch.attention_mask is None for batch in batches] == [True, True, False]
    with pytest.raises(ConfigurationError, match="batch_size=0 must be at least 1"):
        next(windows.batches(0))


def test_batch_moves_as_a_whole() -> None:
    batch = Batch(torch.zeros(1, 2, dtype=torch.long), torch.tensor([[True, False]]))
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.attention_mask.device.type == "meta"
    assert batch.input_ids.device.type == "cpu"
    assert Batch(batch.input_ids).to("meta").attention_mask is None


@pytest.mark.parametrize("recipe", ["windows", "sleb"])
def test_global_random_state_is_neither_used_nor_changed(recipe: str) -> None:
    def states() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    rows = datasets.Dataset.from_dict({"text": ROWS})
    results = set()
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = states()
        results.add(build(rows, num_samples=4, seqlen=16, recipe=recipe).fingerprint)
        build([{"input_ids": [number, 1]} for number in range(9)], num_samples=3)
        assert states() == before
    assert len(results) == 1
