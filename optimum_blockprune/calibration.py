# SPDX-License-Identifier: Apache-2.0
"""Token windows for calibration and evaluation: the same text, tokenizer and seed always give the same windows.

No special tokens are inserted, whatever the tokenizer does by default: windows are cut from running text, as in the
released code of SLEB and GPTQ, so a window does not begin with a BOS token. Two recipes cut text:

    windows  documents joined by blank lines, in order, up to four times the tokens needed; cut into full windows; a
             seeded choice of `num_samples` of them, in the order of the text.
    sleb     `num_samples` shuffled *rows* joined by blank lines, all full windows of them kept (SLEB, arXiv
             2402.09025: 128 rows of WikiText-2 make about four windows of 2048).

Rows that are tokenised already are windows as they are. The remainder of the text is dropped by both recipes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from optimum.utils import logging
from torch import Tensor
from tqdm.auto import tqdm

from .batches import CalibrationWindows
from .errors import CalibrationError, ConfigurationError
from .model_rows import RowInputs, is_model_row, windows_from_rows
from .recipe import CALIBRATION_RECIPES
from .text import chunks, documents, iterate, open_rows, shuffled


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Optimum's handler serves the loggers below "optimum." only.
logger = logging.get_logger("optimum.blockprune.calibration")

_POOL_FACTOR = 4
# Four characters a token is usual for English; the bound keeps one call of the tokenizer to a few seconds, and is
# large enough for the whole test split of WikiText-2 to be tokenised at once, as published perplexities have it.
_CHARACTERS_PER_TOKEN = 4
_MAX_CHUNK = 1 << 22


@dataclass(frozen=True)
class WindowSpec:
    """How to cut windows.

    Attributes:
        num_samples: Windows (recipe `sleb`: rows) to use; `None` for all full windows of the whole text.
        seqlen: Tokens per window, at least 2.
        seed: Seed of the choice, at least 0; no global generator is read or changed.
        text_field: Field of the rows that holds the text; `None` finds it (see `text.documents`).
        use_chat_template: Renders plain text as one user message through the tokenizer's chat template.
        recipe: `"windows"` or `"sleb"`; see the module.
        split: Split to take of a named data set.
        max_length: The longest input that the model takes, in tokens; `seqlen` is clipped to it.
        inputs: What rows may hold for the model besides `input_ids`; `None` if nothing.
        beside: Instead of the `num_samples` windows (recipe `sleb`: rows) that are chosen without it, this many of the
            others: those that come next in the order of the seed. The two sets share nothing.

    Raises:
        ConfigurationError: When a value is impossible.
    """

    num_samples: int | None = 128
    seqlen: int = 2048
    seed: int = 0
    text_field: str | None = None
    use_chat_template: bool = False
    recipe: str = "windows"
    split: str = "train"
    max_length: int | None = None
    inputs: RowInputs | None = None
    beside: int | None = None

    def __post_init__(self) -> None:
        if self.recipe not in CALIBRATION_RECIPES:
            known = ", ".join(CALIBRATION_RECIPES)
            raise ConfigurationError(f"Calibration recipe {self.recipe!r} is unknown; possible: {known}.")
        for name, least in (("num_samples", 1), ("seqlen", 2), ("seed", 0), ("max_length", 2), ("beside", 1)):
            value = getattr(self, name)
            if value is None and name in ("num_samples", "max_length", "beside"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigurationError(f"{name}={value!r} must be a whole number of at least {least}.")

    @property
    def needed(self) -> int | None:
        """Windows that the text has to have; `None` where all of them are wanted."""
        return None if self.num_samples is None else self.num_samples + (self.beside or 0)


def build_windows(dataset: Any, tokenizer: PreTrainedTokenizerBase | None, spec: WindowSpec) -> CalibrationWindows:
    """Turns a data set into token windows.

    Args:
        dataset: `"wikitext2"`, `"c4"` or `"alpaca"` (from the Hub), a path to a .txt, .jsonl, .json or .parquet file,
            a list of strings, a list of dicts with `input_ids` (and, if padded, `attention_mask`), or a
            `datasets.Dataset` or `IterableDataset`.
        tokenizer: Needed for everything but rows with `input_ids`.
        spec: How many windows, how long and how chosen.

    Returns:
        Windows of `spec.seqlen` tokens (at most `spec.max_length`). Rows with `input_ids` are cut to it, and shorter
        ones padded on the right to the longest.

    Raises:
        CalibrationError: When the data set is missing, unreadable, not text, or too short.
    """
    seqlen = clipped_seqlen(spec)
    source, rows = open_rows(dataset, spec.split)
    first = next(iterate(rows, source), None)
    if first is None:
        raise CalibrationError(f"{source} is empty: there is no text to calibrate on. Give another dataset=... .")
    if spec.inputs is not None and isinstance(first, Mapping) and is_model_row(first, spec.inputs):
        chosen = _model_rows(rows, source, spec)
        return windows_from_rows(chosen, spec.inputs, source=source, seqlen=seqlen)
    if isinstance(first, Mapping) and "input_ids" in first and spec.text_field is None:
        ids, mask = padded(_tokenised_rows(rows, source, spec, seqlen))
        return CalibrationWindows.from_tokens(ids, mask, source=source)
    if tokenizer is None:
        raise CalibrationError(f"{source} holds text, which needs a tokenizer: give tokenizer=... .")
    ids = _text_windows(rows, source, tokenizer, spec=spec, seqlen=seqlen)
    return CalibrationWindows.from_tokens(ids, source=source, recipe=spec.recipe)


def clipped_seqlen(spec: WindowSpec) -> int:
    """Tokens per window: no more than the model takes."""
    if spec.max_length is None or spec.seqlen <= spec.max_length:
        return spec.seqlen
    logger.info("seqlen=%d is clipped to the model's limit of %d tokens.", spec.seqlen, spec.max_length)
    return spec.max_length


def _model_rows(rows: Any, source: str, spec: WindowSpec) -> list[Any]:
    """Chosen rows; of a stream its first ones, or those that come next."""
    if hasattr(rows, "__len__"):
        return [rows[index] for index in chosen_rows(len(rows), spec, source)]
    first = 0 if spec.beside is None else spec.num_samples
    chosen = list(islice(iterate(rows, source), first, spec.needed))
    if len(chosen) < (spec.beside or 0):
        raise too_few(source, first + len(chosen), spec)
    return chosen


def chosen_rows(total: int, spec: WindowSpec, source: str) -> list[int]:
    """Indices below `total`, ascending; all of them when as many are wanted, or more."""
    count = total if spec.num_samples is None else min(spec.num_samples, total)
    generator = torch.Generator().manual_seed(spec.seed)
    order = torch.arange(total) if count == total else torch.randperm(total, generator=generator)
    if spec.beside is not None and total < spec.needed:
        raise too_few(source, total, spec)
    chosen = order[:count] if spec.beside is None else order[count : spec.needed]
    return chosen.sort().values.tolist()


def too_few(source: str, found: int, spec: WindowSpec) -> CalibrationError:
    """The error where not as many windows are left over as are to be held out."""
    return CalibrationError(
        f"{source} is too short: it has {found} windows, and {spec.needed} are needed: {spec.num_samples} to "
        f"calibrate on, {spec.beside} held out. Lower num_samples (--num-samples) or held_out_samples "
        "(--held-out-samples), or give a held_out_dataset (--held-out-dataset)."
    )


def _text_windows(
    rows: Any, source: str, tokenizer: PreTrainedTokenizerBase, *, spec: WindowSpec, seqlen: int
) -> Tensor:
    """Cuts text into windows `[n, seqlen]` by the recipe of `spec`."""
    needed, wanted = (spec.num_samples or 1) * seqlen, None
    if spec.recipe == "sleb":
        rows, needed = shuffled(rows, seed=spec.seed, count=spec.needed), seqlen
        rows = rows if spec.beside is None else list(islice(iterate(rows, source), spec.num_samples, None))
    elif spec.num_samples is not None:
        wanted = _POOL_FACTOR * needed
    bar = tqdm(iterate(rows, source), desc="Tokenising", unit=" docs", leave=False, disable=None)
    with bar:
        texts = documents(bar, tokenizer, text_field=spec.text_field, use_chat_template=spec.use_chat_template)
        stream = _token_stream(texts, tokenizer, wanted)
    if spec.beside is not None and stream.numel() < seqlen:
        raise too_few(source, stream.numel() // seqlen, spec)
    if stream.numel() < needed:
        raise _too_short(source, stream.numel(), needed, seqlen)
    windows = stream[: stream.numel() // seqlen * seqlen].view(-1, seqlen)
    if spec.recipe == "sleb":
        logger.info("Recipe 'sleb' made %d windows of %s rows.", len(windows), spec.num_samples or "all")
        return windows
    return windows[chosen_rows(len(windows), spec, source)]


def _token_stream(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, wanted: int | None) -> Tensor:
    """Returns the first `wanted` tokens (`None`: all) of the joined texts, reading little more than that."""
    size = _MAX_CHUNK if wanted is None else min(_MAX_CHUNK, _CHARACTERS_PER_TOKEN * wanted)
    pieces, found = [torch.empty(0, dtype=torch.long)], 0
    for chunk in chunks(texts, size):
        # `verbose=False`: running text is longer than the model's limit on purpose, which would be warned about.
        encoded = tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)
        pieces.append(torch.tensor(encoded["input_ids"], dtype=torch.long))
        found += len(pieces[-1])
        if wanted is not None and found >= wanted:
            break
    return torch.cat(pieces)[:wanted]


def _too_short(source: str, found: int, needed: int, seqlen: int) -> CalibrationError:
    if not found:
        return CalibrationError(f"{source} holds no text: not one token was found. Give another dataset=... .")
    fit = found // seqlen
    fewer = f"num_samples (--num-samples) to {fit} or fewer, lower " if fit else ""
    return CalibrationError(
        f"{source} is too short: {found:,} tokens found, {needed:,} needed ({needed // seqlen} windows of {seqlen}"
        f" tokens). Lower {fewer}seqlen (--seqlen), or give more text."
    )


def _tokenised_rows(rows: Any, source: str, spec: WindowSpec, seqlen: int) -> list[tuple[Tensor, Tensor]]:
    """Reads and checks the chosen rows: pairs of tokens and mask, each 1-D and at most `seqlen` long."""
    if spec.recipe != "windows":
        raise CalibrationError(f"Recipe {spec.recipe!r} cuts text, but {source} is tokenised: use recipe 'windows'.")
    if not hasattr(rows, "__len__"):  # a stream may have no end
        limit = None if spec.num_samples is None else _POOL_FACTOR * spec.num_samples
        rows = list(islice(iterate(rows, source), limit))
    if spec.num_samples is not None and len(rows) < spec.num_samples:
        raise CalibrationError(
            f"{source} is too short: {len(rows)} tokenised examples found, {spec.num_samples} needed. Lower"
            f" num_samples (--num-samples) to {len(rows)} or fewer, or give more examples."
        )
    pairs = [(index, *_read_tokens(rows[index], index)) for index in chosen_rows(len(rows), spec, source)]
    longer = sum(len(ids) > seqlen for _, ids, _ in pairs)
    if longer:
        logger.info("%d of %d tokenised examples are cut to their first %d tokens.", longer, len(pairs), seqlen)
    return [_cut_row(ids, mask, index, seqlen) for index, ids, mask in pairs]


def _read_tokens(row: Any, index: int) -> tuple[Tensor, Tensor]:
    if not isinstance(row, Mapping) or "input_ids" not in row:
        raise CalibrationError(f"Row {index} has no 'input_ids', but the rows before it are tokenised.")
    ids = _vector(row["input_ids"], "input_ids", index)
    if not len(ids):
        raise CalibrationError(f"Row {index} has no tokens: its 'input_ids' is empty.")
    given = row.get("attention_mask")
    mask = torch.ones_like(ids) if given is None else _vector(given, "attention_mask", index)
    if len(mask) != len(ids):
        raise CalibrationError(f"Row {index} has {len(ids)} input_ids but an attention_mask of {len(mask)}.")
    if bool((ids < 0).any()):
        raise CalibrationError(f"Row {index} has a negative token id ({int(ids.min())}).")
    return ids, mask.bool()


def _vector(value: Any, name: str, index: int) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(f"Row {index}: {name} is not a list of numbers ({error}).") from error
    # An empty list makes a float tensor.
    whole = not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex())
    if not whole or tensor.ndim not in (1, 2) or (tensor.ndim == 2 and len(tensor) != 1):
        raise CalibrationError(
            f"Row {index}: {name} must hold whole numbers of shape [n] or [1, n]; it is {tensor.dtype} of shape"
            f" {list(tensor.shape)}."
        )
    return tensor.detach().to("cpu", torch.long).flatten()


def _cut_row(ids: Tensor, mask: Tensor, index: int, seqlen: int) -> tuple[Tensor, Tensor]:
    real = mask.nonzero().flatten()
    # Padding on the left goes first when a row is too long: what counts are its first real tokens.
    start = max(0, min(int(real[0]), len(ids) - seqlen)) if len(real) else 0
    ids, mask = ids[start : start + seqlen], mask[start : start + seqlen]
    if int(mask.sum()) < 2:
        raise CalibrationError(f"Row {index} has {int(mask.sum())} real tokens in its first {seqlen}; 2 are needed.")
    return ids, mask


def padded(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Tokens and masks of rows of any length, `[n, S]` each, padded on the right to the longest."""
    ids = torch.nn.utils.rnn.pad_sequence([tokens for tokens, _ in rows], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([real for _, real in rows], batch_first=True)
    return ids, mask
