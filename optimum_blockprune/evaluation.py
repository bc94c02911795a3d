# SPDX-License-Identifier: Apache-2.0
"""Measures a model: perplexity on fixed windows, KL to a dense model, speed of prefill and decoding, size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from .architectures import layout_for
from .batches import Batch, CalibrationWindows
from .errors import ConfigurationError, NonFiniteError
from .generation import check_generation
from .inputs import Caller, evaluating, positions_of, vocabulary_of
from .losses import kl_of, perplexity_of
from .runner import BlockRunner


@dataclass(frozen=True)
class EvaluationSpec:
    """What to measure.

    Attributes:
        stride: Tokens between the starts of two windows; `None` is the window length, so that windows do not
            overlap. With a smaller stride every token but the first window's is scored with at least
            `seqlen - stride` tokens of context.
        batch_size: Windows per forward pass.
        speed: Whether to time prefill and decoding (batch of one).
        decode_tokens: Tokens to generate for the timing; fewer where the model's positions end before.
        continuations: Windows to continue greedily, to see how much the model repeats itself (`generation`); 0 for
            none.
    """

    stride: int | None = None
    batch_size: int = 1
    speed: bool = True
    decode_tokens: int = 64
    continuations: int = 20

    def __post_init__(self) -> None:
        if isinstance(self.continuations, bool) or not isinstance(self.continuations, int) or self.continuations < 0:
            raise ConfigurationError(f"continuations must be a whole number from 0 on, not {self.continuations!r}.")
        for name in ("stride", "batch_size", "decode_tokens"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigurationError(f"{name} must be a whole number of at least 1, not {value!r}.")


def evaluate_model(
    model: PreTrainedModel,
    windows: CalibrationWindows,
    spec: EvaluationSpec,
    *,
    baseline: PreTrainedModel | None = None,
) -> dict[str, Any]:
    """Measures `model` on `windows`.

    Args:
        model: The model to measure; not changed.
        windows: Held-out text.
        spec: What to measure.
        baseline: A dense model with the same vocabulary; gives the mean KL(baseline || model) in nats per token.

    Returns:
        JSON types: `perplexity`, `nll` (nats per token), `tokens` (scored), `windows`, `seqlen`, `stride`, `source`,
        `fingerprint`; `kl` with a baseline; `prefill_tokens_per_second`, `decode_tokens_per_second` where asked;
        `generation`, of a model that continues text; `parameters`, `size_bytes`, `blocks`.

    Raises:
        NonFiniteError: The loss is NaN or infinite; names the first block where that appears.
        ConfigurationError: The stride is longer than a window, or the baseline has another vocabulary.
    """
    stride = spec.stride or windows.seqlen
    if stride > windows.seqlen:
        raise ConfigurationError(f"stride={stride} is longer than a window (seqlen={windows.seqlen}).")
    if baseline is not None:
        theirs, ours = (vocabulary_of(layout_for(each)) for each in (baseline, model))
        if theirs != ours:
            raise ConfigurationError(f"KL needs one vocabulary: the baseline has {theirs} tokens, the model {ours}.")
    nll, kl, tokens = _score(model, baseline, _strided(windows, stride), spec.batch_size)
    result = {
        "source": windows.source,
        "fingerprint": windows.fingerprint,
        "windows": windows.num_windows,
        "seqlen": windows.seqlen,
        "stride": stride,
        "tokens": tokens,
        "nll": nll,
        "perplexity": perplexity_of(nll),
        **({} if kl is None else {"kl": kl}),
        **size_of(model),
    }
    if spec.speed:
        result |= speed_of(model, windows, decode_tokens=spec.decode_tokens)
    if spec.continuations:
        written = check_generation(model, windows, continuations=spec.continuations)
        result |= {} if written is None else {"generation": written}
    return result


def size_of(model: PreTrainedModel, stack: str | None = None) -> dict[str, int]:
    """`blocks` (of a stack), `parameters` (shared ones once) and `size_bytes` of the weights in their dtype."""
    parameters = list(model.parameters())
    return {
        "blocks": layout_for(model, stack).num_blocks,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "size_bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
    }


def speed_of(model: PreTrainedModel, windows: CalibrationWindows, *, decode_tokens: int) -> dict[str, float]:
    """Times one window's prefill and a greedy generation with the KV cache (batch 1, after a warm-up each).

    Returns:
        `prefill_tokens_per_second`; `decode_tokens_per_second` of a model that generates.
    """
    timed = seconds_of(model, windows, decode_tokens=decode_tokens)
    return {f"{name}_tokens_per_second": tokens / seconds for name, (tokens, seconds) in timed.items()}


def seconds_of(
    model: PreTrainedModel, windows: CalibrationWindows, *, decode_tokens: int
) -> dict[str, tuple[int, float]]:
    """Tokens and seconds of a `"prefill"` and, of a model that generates, a `"decode"`; see `speed_of`."""
    layout = layout_for(model)
    first = next(windows.batches(1))
    prompt = first if _is_special(first) else Batch(first.input_ids[:, :512])
    start = first.to(model.device)
    inputs = dict(start.extra) if len(layout.kind.stacks) > 1 else {"input_ids": start.input_ids[:, :8]}
    limit = positions_of(layout)
    if limit is not None:
        decode_tokens = max(1, min(decode_tokens, limit - 8))

    def prefill() -> None:
        Caller(model, layout)(prompt, model.device)

    def decode(tokens: int = decode_tokens) -> None:
        # One beam: what is not said here, `generate` takes from the model's own settings.
        config = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0
        )
        masks = {} if len(layout.kind.stacks) > 1 else {"attention_mask": torch.ones_like(inputs["input_ids"])}
        GenerationMixin.generate(model, **inputs, **masks, generation_config=config)

    with torch.no_grad(), evaluating(model):
        prefill()
        timed = {"prefill": (prompt.input_ids.shape[1], _seconds(prefill, model.device))}
        if model.can_generate():
            decode(min(4, decode_tokens))
            timed["decode"] = (decode_tokens, _seconds(decode, model.device))
        return timed


def _is_special(batch: Batch) -> bool:
    """Whether a batch is more than running text."""
    return bool(batch.extra) or batch.labels is not None


def _seconds(function: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what the warm-up has left
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _strided(windows: CalibrationWindows, stride: int) -> Iterator[tuple[Batch, int]]:
    """Yields one window at a time with the number of its last predictions that count.

    Windows that overlap are cut from the same running text: the n non-overlapping windows laid end to end.
    """
    if stride == windows.seqlen:
        for batch in windows.batches(1):
            yield batch, windows.seqlen - 1
        return
    if windows.attention_mask is not None or windows.extra or windows.labels is not None:
        raise ConfigurationError("A stride needs running text; tokenised rows with padding have none.")
    text = windows.input_ids.flatten()
    scored_to = 0
    for start in range(0, len(text) - 1, stride):
        end = min(start + windows.seqlen, len(text))
        yield Batch(text[None, start:end]), min(end - max(scored_to, 1), end - start - 1)
        scored_to = end
        if end == len(text):
            return


@torch.no_grad()
def _score(
    model: PreTrainedModel,
    baseline: PreTrainedModel | None,
    parts: Iterator[tuple[Batch, int]],
    batch_size: int,
) -> tuple[float, float | None, int]:
    """Mean NLL, mean KL (None without a baseline) and the number of scored predictions."""
    nll = kl = torch.zeros((), dtype=torch.float64)
    count = 0
    runner, truth_runner = BlockRunner(model), None if baseline is None else BlockRunner(baseline)
    for batch, last in tqdm(_grouped(parts, batch_size), desc="Evaluating", unit=" batches", leave=False):
        scored, targets = _targets(batch, last)
        count += int(scored.sum())
        chosen = _predictions(runner, batch, scored)
        targets = targets.to(chosen.device)
        nll = nll + F.cross_entropy(chosen, targets, reduction="none").double().sum().cpu()
        if not torch.isfinite(nll):
            runner.diagnose(batch)
            raise NonFiniteError(
                "The loss is NaN or infinite although every block's output is finite: the final norm or the head "
                "overflows. Load the model in another dtype."
            )
        if truth_runner is not None:
            kl = kl + kl_of(_predictions(truth_runner, batch, scored).to(chosen.device), chosen)
    return (nll / count).item(), None if baseline is None else (kl / count).item(), count


def _grouped(parts: Iterator[tuple[Batch, int]], batch_size: int) -> Iterator[tuple[Batch, int]]:
    """Joins neighbouring windows of one shape into batches."""
    group: list[Batch] = []
    shape: tuple[int, int] | None = None
    for batch, last in parts:
        if group and (len(group) == batch_size or shape != (batch.input_ids.shape[1], last)):
            yield _joined(group), shape[1]
            group = []
        group.append(batch)
        shape = (batch.input_ids.shape[1], last)
    if group:
        yield _joined(group), shape[1]


def _joined(group: list[Batch]) -> Batch:
    ids = torch.cat([batch.input_ids for batch in group])
    extra = {name: torch.cat([batch.extra[name] for batch in group]) for name in group[0].extra}
    labels = None if group[0].labels is None else torch.cat([batch.labels for batch in group])
    if all(batch.attention_mask is None for batch in group):
        return Batch(ids, extra=extra, labels=labels)
    masks = [torch.ones_like(b.input_ids).bool() if b.attention_mask is None else b.attention_mask for b in group]
    return Batch(ids, torch.cat(masks), extra, labels)


def _predictions(runner: BlockRunner, batch: Batch, scored: Tensor) -> Tensor:
    """Logits [n, vocabulary] in float32 of the `scored` positions; all blocks run."""
    logits = runner.logits(batch)
    return logits[scored.to(logits.device)].float()


def _targets(batch: Batch, last: int) -> tuple[Tensor, Tensor]:
    """Bool [B, S] on the CPU, the positions that count (the last `last`, no padding), and their targets."""
    if batch.labels is not None:
        scored = batch.labels != -100
        return scored, batch.labels[scored]
    windows, length = batch.input_ids.shape
    scored = (torch.arange(length - 1) >= length - 1 - last).expand(windows, -1)
    if batch.attention_mask is not None:
        scored = scored & batch.attention_mask[:, 1:] & batch.attention_mask[:, :-1]
    return F.pad(scored, (0, 1)), batch.input_ids[:, 1:][scored]
