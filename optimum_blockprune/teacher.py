# SPDX-License-Identifier: Apache-2.0
"""What the dense model predicts on the windows of a search, run once and kept, so that a search can stay close to it.

Of every position the k most likely tokens are kept and the mass of all others (see `losses.divergence`). How many is
our choice: as many as the vocabulary has, at most 1,024, fewer where all positions together would take more than
1 GiB. It follows from the number of positions alone, so that every run of a search keeps as many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from tqdm.auto import tqdm

from .batches import Batch, CalibrationWindows, Teacher
from .branching import head_of
from .errors import CalibrationError, ConfigurationError
from .inputs import vocabulary_of
from .losses import head_rows, position_logits, predicted, summary
from .memory import BatchSize
from .passes import branches, in_order_of_blocks
from .runner import BlockOutput, BlockRunner
from .stand_ins import hidden_of, rows_of


# Our choice: tokens told apart at a position, at most and at least, and what they may take.
MOST, FEWEST, MAX_BYTES = 1024, 32, 2**30
# A token and its log-probability take 8 bytes, the mass of the others 4.
_TOKEN_BYTES, _REST_BYTES = 8, 4


def with_teacher(
    runner: BlockRunner, windows: CalibrationWindows, batch_size: int, k: int | None = None
) -> CalibrationWindows:
    """Runs the dense model once over all windows; their loss is then KL(dense || pruned).

    Args:
        runner: Runs the dense model; its counters count this pass.
        windows: The windows.
        batch_size: Windows per forward pass to begin with; halved where memory runs out.
        k: Tokens to tell apart at every position; see `tokens_kept` unless given.

    Returns:
        The same windows with their `teacher`, of which only the positions that predict something mean anything.

    Raises:
        CalibrationError: There are so many positions that too few tokens could be kept.
        ConfigurationError: `k` is not between 1 and the vocabulary.
    """
    vocabulary = vocabulary_of(runner.stack.layout)
    k = tokens_kept(windows, vocabulary) if k is None else k
    if not 1 <= k <= vocabulary:
        raise ConfigurationError(f"k={k!r} must be between 1 and the vocabulary of {vocabulary:,} tokens.")
    shape, whole = windows.input_ids.shape, _needs_whole_windows(runner, next(iter(windows.batches(1))))
    teacher = Teacher(
        torch.zeros((*shape, k), dtype=torch.int32), torch.zeros((*shape, k)), torch.full(shape, -torch.inf)
    )

    def measure(size: int) -> None:
        with tqdm(total=windows.num_windows, desc="Dense model", leave=False) as bar:
            for start, batch, reached in _dense(runner, windows, size):
                rows = teacher.rows(slice(start, start + len(batch.input_ids))).flat()  # a view
                _keep(runner, rows, batch, reached, whole=whole)
                bar.update(len(batch.input_ids))

    BatchSize(batch_size).run(measure)
    return replace(windows, teacher=teacher)


def tokens_kept(windows: CalibrationWindows, vocabulary: int) -> int:
    """How many tokens are told apart at each position of the windows; see the module.

    Raises:
        CalibrationError: Fewer than 32 of a larger vocabulary.
    """
    positions = windows.input_ids.numel()
    k = min(vocabulary, MOST, (MAX_BYTES // positions - _REST_BYTES) // _TOKEN_BYTES)
    least = min(vocabulary, FEWEST)
    if k < least:
        most = MAX_BYTES // (least * _TOKEN_BYTES + _REST_BYTES)
        raise CalibrationError(
            f"objective='kl' keeps what the dense model predicts, and {windows.num_windows:,} windows of "
            f"{windows.seqlen:,} tokens are too many for that: at most {most:,} tokens together. Lower num_samples "
            f"(--num-samples) to {most // windows.seqlen:,} or fewer, or seqlen (--seqlen)."
        )
    return k


def tail_mass(windows: CalibrationWindows) -> float:
    """Mean probability that the dense model gives to the tokens that are not told apart; 0 where all are."""
    whole = Batch(windows.input_ids, windows.attention_mask, labels=windows.labels)
    return windows.teacher.rest[predicted(whole)].double().exp().mean().item()


def _needs_whole_windows(runner: BlockRunner, batch: Batch) -> bool:
    """Whether the head looks at several positions, or at something else than tokens; no counter counts this."""
    batch, runner = batch.beginning(), BlockRunner(runner.model, runner.stack.layout.stack)
    value, head = runner.run_to(batch, runner.num_blocks - 1).value, head_of(runner)
    if batch.extra or hidden_of(value).shape[:2] != batch.input_ids.shape:
        return True
    together = head(batch, value).flatten(0, 1).float()
    for chosen, alone in position_logits(head, value, batch, together.shape[-1]):
        same = together[chosen.to(together.device)]
        # Half precision differs between shapes of the same product.
        if (same - alone.float()).abs().max() > 2e-2 * same.abs().max():
            return True
    return False


def _dense(runner: BlockRunner, windows: CalibrationWindows, size: int) -> Iterator[tuple[int, Batch, BlockOutput]]:
    """The first window of every batch, the batch, and what comes out of the last block."""

    def numbered() -> Iterator[tuple[int, Batch]]:
        start = 0
        for batch in windows.batches(size):
            yield start, batch
            start += len(batch.input_ids)

    if in_order_of_blocks(runner):
        for start, batch, _, reached in branches(runner, numbered(), (), [None]):
            yield start, batch, reached
        return
    for start, batch in numbered():
        yield start, batch, runner.run_to(batch, runner.num_blocks - 1)


def _keep(runner: BlockRunner, rows: Teacher, batch: Batch, reached: BlockOutput, *, whole: bool) -> None:
    """Writes what the head says of a batch into `rows`; a bounded number of logits exists at a time."""
    heads, head, windows = runner.counters.head_forwards, head_of(runner), len(batch.input_ids)
    vocabulary, length = vocabulary_of(runner.stack.layout), batch.input_ids.shape[1]
    if whole:
        for some, part in head_rows(batch, vocabulary):
            for window, logits in enumerate(head(part, rows_of(reached.value, some, windows)), some.start):
                _write(rows, slice(window * length, (window + 1) * length), summary(logits, rows.k))
    else:
        for chosen, logits in position_logits(head, reached.value, batch, vocabulary):
            _write(rows, chosen.cpu(), summary(logits, rows.k))
    runner.counters.head_forwards = heads + windows  # per window, in however many parts the head ran


def _write(rows: Teacher, places: slice | torch.Tensor, found: Teacher) -> None:
    found = found.to("cpu")
    rows.tokens[places], rows.values[places], rows.rest[places] = found.tokens, found.values, found.rest
