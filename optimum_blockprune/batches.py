# SPDX-License-Identifier: Apache-2.0
"""Tokens, and what goes with them: a batch for one forward pass, and the windows that batches are cut from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .errors import CalibrationError, ConfigurationError


@dataclass(frozen=True, eq=False)
class Teacher:
    """What the dense model says at every position of some windows: its k most likely tokens, and all others together.

    Attributes:
        tokens: Int tensor `[n, S, k]`: the tokens.
        values: Float tensor `[n, S, k]`: the logarithms of their probabilities.
        rest: Float tensor `[n, S]`: the logarithm of the probability of all other tokens, -inf where there are none.
    """

    tokens: Tensor
    values: Tensor
    rest: Tensor

    @property
    def k(self) -> int:
        """Number of tokens that are told apart."""
        return self.tokens.shape[-1]

    def rows(self, rows: Any) -> Teacher:
        """Returns some of the windows: a slice, or an index tensor."""
        return Teacher(self.tokens[rows], self.values[rows], self.rest[rows])

    def flat(self) -> Teacher:
        """Returns all positions in one row, `[n * S, k]`."""
        return Teacher(self.tokens.flatten(0, 1), self.values.flatten(0, 1), self.rest.flatten())

    def to(self, device: torch.device | str) -> Teacher:
        """Returns it on `device`."""
        return Teacher(self.tokens.to(device), self.values.to(device), self.rest.to(device))


@dataclass(frozen=True, eq=False)
class Batch:
    """Some windows, ready for the model.

    Attributes:
        input_ids: Long tensor `[B, S]`: the tokens; of an encoder-decoder, those of the decoder.
        attention_mask: Bool tensor `[B, S]`, `True` on real tokens; `None` when there is no padding.
        extra: Further inputs of the model by name, such as `pixel_values`, or what an encoder reads.
        labels: Long tensor `[B, S]` with the token that each position predicts: its own where it is masked, of
            completions the next one, -100 where none; `None` where each token predicts the next one.
        teacher: What the dense model says there; where given, the loss is the divergence from it (see `losses`).
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    teacher: Teacher | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch on `device`; this one stays where it is."""
        mask, labels = self.attention_mask, self.labels
        return Batch(
            self.input_ids.to(device),
            None if mask is None else mask.to(device),
            {name: tensor.to(device) for name, tensor in self.extra.items()},
            None if labels is None else labels.to(device),
            None if self.teacher is None else self.teacher.to(device),
        )

    def beginning(self, length: int = 16) -> Batch:
        """Returns the first tokens of every window, padded or not; a batch with further inputs stays whole."""
        return self if self.extra else Batch(self.input_ids[:, :length])

    def rows(self, rows: slice) -> Batch:
        """Returns some of the windows; further inputs without a row per window are passed on whole."""
        windows = len(self.input_ids)
        return Batch(
            self.input_ids[rows],
            None if self.attention_mask is None else self.attention_mask[rows],
            {name: tensor[rows] if len(tensor) == windows else tensor for name, tensor in self.extra.items()},
            None if self.labels is None else self.labels[rows],
            None if self.teacher is None else self.teacher.rows(rows),
        )


@dataclass(frozen=True, eq=False)
class CalibrationWindows:
    """Token windows on the CPU, with where they come from. Made by `from_tokens` or `build_windows`.

    Attributes:
        input_ids: Long tensor `[n, S]`; 0 where masked.
        attention_mask: Bool tensor `[n, S]`, `True` on real tokens; `None` when there is no padding.
        source: Name or path of the data set, for people.
        fingerprint: SHA-256 (hex) of shape, tokens and mask: equal for equal tokens, whatever their source.
        recipe: `"windows"`, `"sleb"`, `"task"`, or `"tokenised"` for rows that came as tokens.
        extra: Further inputs of the model by name: one tensor per window, joined along their first dimension to a
            batch (see `Batch.extra`).
        labels: Long tensor `[n, S]`; see `Batch.labels`.
        teacher: See `Batch.teacher`. It follows from model and tokens and is no part of the fingerprint.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    source: str
    fingerprint: str
    recipe: str
    extra: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    labels: Tensor | None = None
    teacher: Teacher | None = None

    @classmethod
    def from_tokens(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        source: str,
        recipe: str = "tokenised",
        extra: Mapping[str, tuple[Tensor, ...]] | None = None,
        labels: Tensor | None = None,
    ) -> CalibrationWindows:
        """Wraps tokens `[n, S]`, their mask and what goes with them, and computes the fingerprint.

        What lies under the mask is set to 0, and a mask without padding is dropped: neither changes the model's
        result, so neither may change the fingerprint.
        """
        ids = input_ids.detach().to("cpu", torch.long).contiguous()
        mask = None if attention_mask is None else attention_mask.detach().to("cpu", torch.bool).contiguous()
        if mask is not None and bool(mask.all()):
            mask = None
        if mask is not None:
            ids = ids.masked_fill(~mask, 0)
        extra = dict(extra or {})
        digest = _fingerprint(ids, mask, [tensor for name in sorted(extra) for tensor in extra[name]], labels)
        return cls(ids, mask, source, digest, recipe, extra, labels)

    @property
    def num_windows(self) -> int:
        """Number of windows, `n`."""
        return self.input_ids.shape[0]

    @property
    def seqlen(self) -> int:
        """Tokens per window, `S`, padding included."""
        return self.input_ids.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding, in all windows together."""
        return Batch(self.input_ids, self.attention_mask).num_tokens

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields all windows in order, `batch_size` at a time; the last batch may be smaller."""
        if batch_size < 1:
            raise ConfigurationError(f"batch_size={batch_size!r} must be at least 1.")
        for start in range(0, self.num_windows, batch_size):
            rows = slice(start, start + batch_size)
            mask = None if self.attention_mask is None else self.attention_mask[rows]
            yield Batch(
                self.input_ids[rows],
                None if mask is None or bool(mask.all()) else mask,
                {name: torch.cat(tensors[rows]) for name, tensors in self.extra.items()},
                None if self.labels is None else self.labels[rows],
                None if self.teacher is None else self.teacher.rows(rows),
            )

    def first(self, count: int) -> CalibrationWindows:
        """Returns the first `count` windows: neighbours in the text, where a seeded choice is scattered over it."""
        mask = None if self.attention_mask is None else self.attention_mask[:count]
        windows = CalibrationWindows.from_tokens(
            self.input_ids[:count],
            mask,
            source=self.source,
            recipe=self.recipe,
            extra={name: tensors[:count] for name, tensors in self.extra.items()},
            labels=None if self.labels is None else self.labels[:count],
        )
        return replace(windows, teacher=None if self.teacher is None else self.teacher.rows(slice(count)))

    def part(self, rows: Sequence[int]) -> CalibrationWindows:
        """Returns some of the windows, in the order given; source and fingerprint stay those of all."""
        chosen = torch.as_tensor(rows, dtype=torch.long)
        return replace(
            self,
            input_ids=self.input_ids[chosen],
            attention_mask=None if self.attention_mask is None else self.attention_mask[chosen],
            extra={name: tuple(tensors[row] for row in rows) for name, tensors in self.extra.items()},
            labels=None if self.labels is None else self.labels[chosen],
            teacher=None if self.teacher is None else self.teacher.rows(chosen),
        )

    def describe(self) -> dict[str, Any]:
        """Returns what plans, reports and cards say about the data, as JSON values."""
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "windows": self.num_windows,
            "seqlen": self.seqlen,
            "tokens": self.num_tokens,
            "recipe": self.recipe,
        }


def refuse_shared(calibration: CalibrationWindows | None, held_out: CalibrationWindows) -> None:
    """Raises `CalibrationError` where held-out text was calibrated on.

    Windows are compared token by token; those with further inputs or labels are not, as these may differ.
    """
    if calibration is None or any(each.extra or each.labels is not None for each in (calibration, held_out)):
        return
    known = {row.numpy().tobytes() for row in calibration.input_ids}
    shared = sum(row.numpy().tobytes() in known for row in held_out.input_ids)
    if shared:
        raise CalibrationError(
            f"{shared} of {held_out.num_windows} windows of held_out_dataset are windows of dataset as well: what is "
            "chosen on a text says little about it. Leave held_out_dataset out, and a part of dataset is held out; or "
            "give other text."
        )


def _fingerprint(ids: Tensor, mask: Tensor | None, extra: Sequence[Tensor], labels: Tensor | None) -> str:
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    digest.update(ids.numpy().astype("<i8", copy=False).tobytes())
    for tensor in (mask, labels, *extra):
        if tensor is not None:
            # Half precision has no numpy type in every version.
            plain = tensor.float() if tensor.is_floating_point() else tensor
            digest.update(plain.contiguous().numpy().tobytes())
    return digest.hexdigest()
