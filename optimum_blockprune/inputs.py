# SPDX-License-Identifier: Apache-2.0
"""What a model is called with: a batch as keyword arguments, and probes that need no data.

A decoder and an encoder read `batch.input_ids`, with whatever else the batch carries (pixels, ...). Of an
encoder-decoder, `batch.input_ids` are the decoder's tokens, and the batch carries what the encoder reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import Layout
from .batches import Batch
from .errors import UnsupportedModelError
from .kinds import DECODER


PROBE_WINDOWS, PROBE_LENGTH, GENERATED = 2, 12, 6
# 0.2 s of sound at 16 kHz.
_SAMPLES = 3200


class Caller:
    """Calls a model's forward with a batch.

    Args:
        model: The model.
        layout: Of the stack that is looked at.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._model = model
        self._two_stacks = len(layout.kind.stacks) > 1
        parameters = signature(model.forward).parameters
        self._open = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
        self._parameters = set(parameters)
        # While only the decoder is looked at, the encoder runs once per batch.
        self._keeps_encoder = self._two_stacks and layout.stack == DECODER and "encoder_outputs" in parameters
        # What the encoder alone does not read (pixels beside text) is mixed in by the model around it.
        reader = model.get_encoder().forward if self._keeps_encoder else model.forward
        self._read_by_encoder = set(signature(reader).parameters)
        self._encoded: tuple[Batch, Any] | None = None

    def __call__(self, batch: Batch, device: torch.device) -> Tensor:
        """Returns the logits, or the last hidden states of a model without a head."""
        inputs = batch.to(device)
        masks = self._masks(inputs)
        if self._two_stacks:
            arguments = {"decoder_input_ids": inputs.input_ids, **masks, **inputs.extra}
            if self._keeps_encoder and set(inputs.extra) <= self._read_by_encoder:
                arguments |= self._encoder(batch, inputs)
        else:
            arguments = {"input_ids": inputs.input_ids, **masks, **inputs.extra}
        settings = {"use_cache": False, "return_dict": True}
        arguments |= {name: value for name, value in settings.items() if self._open or name in self._parameters}
        output = self._model(**arguments)
        return output.logits if "logits" in output else output.last_hidden_state

    def forget(self) -> None:
        """Drops what the encoder gave for the last batch."""
        self._encoded = None

    def _masks(self, inputs: Batch) -> dict[str, Tensor]:
        # A mask of ones would only take kernels off their fast path.
        if inputs.attention_mask is None:
            return {}
        mask = inputs.attention_mask.long()
        if self._two_stacks:
            return {"decoder_attention_mask": mask}
        if not inputs.attention_mask[:, 0].all() and "position_ids" in self._parameters:
            # Padding on the left: absolute positions count from the first real token, as in `generate`.
            return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        return {"attention_mask": mask}

    def _encoder(self, batch: Batch, inputs: Batch) -> dict[str, Any]:
        if self._encoded is None or self._encoded[0] is not batch:
            self._encoded = (batch, self._model.get_encoder()(**inputs.extra, return_dict=True))
        return {"encoder_outputs": self._encoded[1]}


def probe_batch(
    model: nn.Module, layout: Layout, *, windows: int = PROBE_WINDOWS, length: int = PROBE_LENGTH
) -> Batch:
    """Returns random inputs for the model, the same at every call, on the CPU; special tokens do not occur.

    Args:
        model: The model; not changed.
        layout: Of the stack that is looked at.
        windows, length: Shape of the tokens.

    Raises:
        UnsupportedModelError: The model needs an input that cannot be made up.
    """
    generator = torch.Generator().manual_seed(0)
    limit = positions_of(layout)
    length = length if limit is None else max(2, min(length, limit - GENERATED))
    tokens = ordinary_tokens(layout)

    def ids() -> Tensor:
        return tokens[torch.randint(0, len(tokens), (windows, length), generator=generator)]

    if len(layout.kind.stacks) == 1:
        return Batch(ids())
    read = _encoder_input(model, layout, windows, ids, generator)
    decoded = ids()
    # A cut vocabulary may lack the token that the configuration names.
    decoded[:, 0] = min(decoder_start(model), vocabulary_of(layout) - 1)
    return Batch(decoded, extra=read)


def ordinary_tokens(layout: Layout) -> Tensor:
    """Token ids that no field of the configuration names as special (padding, images, ends, ...)."""
    special = special_tokens(layout)
    return torch.tensor([token for token in range(vocabulary_of(layout)) if token not in special])


def special_tokens(layout: Layout) -> set[int]:
    """Token ids that the configuration names."""
    special: set[int] = set()
    for config in (layout.root, layout.config):
        for name, value in config.to_dict().items():
            if name.endswith(("_token_id", "_token_index", "_token_ids")):
                special |= {token for token in (value if isinstance(value, list) else [value]) if type(token) is int}
    return {token for token in special if 0 <= token < vocabulary_of(layout)}


def positions_of(layout: Layout) -> int | None:
    """The longest input that the stack's position embeddings allow; `None` if nothing limits it.

    Encoders that count positions from the padding token lose some of them.
    """
    sides = {DECODER: ("max_target_positions", "max_decoder_position_embeddings")}
    names = (*sides.get(layout.stack, ("max_encoder_position_embeddings",)), "max_position_embeddings")
    limits = (getattr(layout.config, name, None) for name in names)
    limit = next((limit for limit in limits if isinstance(limit, int) and limit >= 2), None)
    if limit is None or layout.kind.is_text_decoder:
        return limit
    return max(2, limit - (getattr(layout.config, "pad_token_id", None) or 0) - 1)


def vocabulary_of(layout: Layout) -> int:
    """Number of tokens."""
    sizes = (getattr(config, "vocab_size", None) for config in (layout.config, layout.root))
    return next(size for size in sizes if isinstance(size, int))


def decoder_start(model: nn.Module) -> int:
    """The token that an encoder-decoder's output begins with."""
    for config in (
        getattr(model, "generation_config", None),
        model.config,
        model.config.get_text_config(decoder=True),
    ):
        for name in ("decoder_start_token_id", "bos_token_id"):
            token = getattr(config, name, None)
            if isinstance(token, int):
                return token
    return 0


def _encoder_input(
    model: nn.Module, layout: Layout, windows: int, ids: Any, generator: torch.Generator
) -> dict[str, Tensor]:
    name, config = model.main_input_name, layout.root
    if name == "input_ids":
        return {"input_ids": ids()}
    if name == "input_features" and hasattr(config, "num_mel_bins"):
        shape: tuple[int, ...] = (windows, config.num_mel_bins, 2 * config.max_source_positions)
    elif name == "input_features" and hasattr(config, "input_feat_per_channel"):
        shape = (windows, 8 * PROBE_LENGTH, config.input_feat_per_channel * config.input_channels)
    elif name == "input_values":
        shape = (windows, _SAMPLES)
    else:
        raise UnsupportedModelError(
            f"{layout.subject} reads '{name}', for which no probe can be made up, so the result cannot be proven."
        )
    return {name: torch.randn(shape, generator=generator)}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model in evaluation mode; afterwards each module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
