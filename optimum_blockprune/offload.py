# SPDX-License-Identifier: Apache-2.0
"""Blocks whose weights lie elsewhere (in host memory, on disk) and come only while a module runs: accelerate's hooks.

accelerate fetches the weights of every module anew whenever it runs. `held` fetches those of a block once and keeps
them, however often the block runs meanwhile. It knows accelerate's hooks and nothing of who attached them:
`cpu_offload`, `disk_offload`, a device map with `"cpu"` or `"disk"` in it, or `stream=True`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any

from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from torch import nn


@contextmanager
def held(block: nn.Module) -> Iterator[None]:
    """Keeps the weights of a block in memory, where it runs; does nothing for a block whose weights are there.

    Inside, the block's parameters are ordinary tensors, to be read and not to be changed. May be nested.
    """
    loaded: list[tuple[nn.Module, AlignDevicesHook]] = []
    try:
        for module in block.modules():
            for hook in _fetching(module):
                loaded.append((module, hook))
                hook.pre_forward(module)
                # The hook goes on moving inputs to the module's device, but leaves the weights alone.
                hook.offload = False
        yield
    finally:
        for module, hook in loaded:
            hook.offload = True
            hook.post_forward(module, None)


def hold_while_running(block: nn.Module) -> None:
    """Makes a block fetch all its weights when it begins to run, once, and not those of each module in turn.

    Some blocks read a weight of a module inside without calling that module, so that no hook would fetch it.
    """
    # As accelerate wraps a forward: copies of the block then run their own.
    block.forward = update_wrapper(partial(_run_held, block, block.forward), block.forward)


def _run_held(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with held(block):
        return forward(*args, **kwargs)


def copied(module: nn.Module) -> nn.Module:
    """A deep copy of a module that is held, hooks included; what weights are fetched from is shared, not copied."""
    sources = [hook.weights_map for part in module.modules() for hook in _flat(getattr(part, "_hf_hook", None))]
    return copy.deepcopy(module, {id(source): source for source in sources})


def is_offloaded(modules: Iterable[nn.Module]) -> bool:
    """Whether weights of any of the modules, or of modules inside them, lie elsewhere."""
    return any(_fetching(part) for module in modules for part in module.modules())


def _fetching(module: nn.Module) -> list[AlignDevicesHook]:
    """The hooks of a module that fetch weights."""
    return [hook for hook in _flat(getattr(module, "_hf_hook", None)) if hook.offload]


def _flat(hook: ModelHook | None) -> Iterator[AlignDevicesHook]:
    if isinstance(hook, SequentialHook):
        for part in hook.hooks:
            yield from _flat(part)
    elif isinstance(hook, AlignDevicesHook):
        yield hook
