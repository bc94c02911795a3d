# SPDX-License-Identifier: Apache-2.0
"""Holds generation with a KV cache to one pass without a cache over the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from .batches import Batch
from .inputs import GENERATED, evaluating, special_tokens
from .runner import BlockRunner


def cache_error(model: PreTrainedModel, batch: Batch, stack: str, *, typical: bool = False) -> float:
    """Generates greedily with a cache and returns the largest difference of logits by the largest logit.

    Compares logits, not tokens: random or tied logits may flip an argmax that rounding alone decides.

    Args:
        model: A model that generates.
        batch: The prompts; of an encoder-decoder, what the encoder reads (the decoder begins anew).
        stack: The stack that is looked at.
        typical: See `relative_error`.
    """
    runner = BlockRunner(model, stack)
    two_stacks = len(runner.stack.layout.kind.stacks) > 1
    inputs = batch.to(runner.device)
    prompt = {} if two_stacks else {"input_ids": inputs.input_ids}
    if prompt:
        prompt["attention_mask"] = torch.ones_like(inputs.input_ids)
    tokens = sorted(special_tokens(runner.stack.layout))
    with torch.no_grad(), evaluating(model), _plain_generation(model) as own:
        # Speech models wrap `generate` in one of their own that cuts and joins recordings.
        out = GenerationMixin.generate(model, **prompt, **inputs.extra, generation_config=_greedy(own, tokens))
    cached = torch.stack(out.logits, dim=1).float().cpu()
    read = Batch(out.sequences[:, :-1].cpu(), extra=batch.extra)
    whole = runner.logits(read).float().cpu()[:, -cached.shape[1] :]
    return relative_error(cached, whole, typical=typical)


def relative_error(actual: Tensor, truth: Tensor, *, typical: bool = False) -> float:
    """Largest difference of logits by the largest logit: of the worst position, or of the median one (`typical`)."""
    if actual.shape != truth.shape:
        return float("inf")
    errors = (actual - truth).abs().amax(-1) / truth.abs().max().clamp_min(1e-30)
    error = (errors.median() if typical else errors.max()).item()
    return error if error == error else float("inf")


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[GenerationConfig | None]:
    """Sets the model's own defaults aside (beams, assistants, several answers): `generate` would merge them in."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield own
    finally:
        model.generation_config = own


def _greedy(own: GenerationConfig | None, special: list[int]) -> GenerationConfig:
    eos = getattr(own, "eos_token_id", None)
    pad = eos[0] if isinstance(eos, (list, tuple)) else eos
    start = getattr(own, "decoder_start_token_id", None)
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=GENERATED,
        min_new_tokens=GENERATED,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
        eos_token_id=eos,
        pad_token_id=0 if pad is None else pad,
        # A random model may write padding, from which some models count positions, or an image that is not there.
        suppress_tokens=special or None,
        decoder_start_token_id=start,
        bos_token_id=getattr(own, "bos_token_id", None),
    )
