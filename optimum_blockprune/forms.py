# SPDX-License-Identifier: Apache-2.0
"""Finds out from one run on made-up tokens how a model's blocks return and receive their streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import BlockStack
from .errors import UnsupportedModelError
from .stand_ins import Form, hidden_of, hooks, learn_form


# Blocks of two kinds may return their streams differently; a second stream may begin after the first block.
_LEARNED_BLOCKS = 3


class EndOfRun(Exception):
    """Leaves the model's forward once the last wanted block has run; is caught where it was asked for."""


def learned(stack: BlockStack, forward: Callable[[], Any]) -> Form:
    """How blocks return and receive their streams, so that bypassed ones do the same.

    Args:
        stack: The blocks of a live model.
        forward: Runs the model on made-up tokens.

    Raises:
        UnsupportedModelError: It does not run on them, or not block after block.
    """
    outputs: list[Any] = []
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def leave(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        arguments.append((args, kwargs))
        outputs.append(output)
        if len(outputs) == min(_LEARNED_BLOCKS, len(stack)):
            raise EndOfRun

    with torch.no_grad(), hooks() as hook:
        for block in stack.blocks:
            hook(block.register_forward_hook(leave, with_kwargs=True))
        try:
            forward()
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UnsupportedModelError(
                f"{stack.layout.subject}: its forward does not run on made-up tokens, so that nothing can be measured "
                f"or proven: {reason}"
            ) from error
        except EndOfRun:
            pass
    if not outputs or not isinstance(hidden_of(outputs[0]), Tensor):
        where = f"{stack.layout.subject}: its forward does not run the blocks in '{stack.path}'"
        raise UnsupportedModelError(f"{where} one after the other.")
    return learn_form(outputs, arguments)
