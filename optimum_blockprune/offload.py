# SPDX-License-Identifier: Apache-2.0
"""Blocks whose weights lie elsewhere (in host memory, on disk) and come only while a module runs: accelerate's hooks.

accelerate fetches the weights of every module anew whenever it runs. `held` fetches those of a block once and keeps
them, however often the block runs meanwhile. It knows accelerate's hooks and nothing of who attached them:
`cpu_offload`, `disk_offload`, a device map with `"cpu"` or `"disk"` in it, or `stream=True`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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
                hook.pre_forward(module)
                # The hook goes on moving inputs to the module's device, but leaves the weights alone.
                hook.offload = False
                loaded.append((module, hook))
        yield
    finally:
        for module, hook in loaded:
            hook.offload = True
            hook.post_forward(module, None)


def is_offloaded(modules: Iterable[nn.Module]) -> bool:
    """Whether weights of any of the modules, or of modules inside them, lie elsewhere."""
    return any(_fetching(part) for module in modules for part in module.modules())


def _fetching(module: nn.Module) -> list[AlignDevicesHook]:
    """The hooks of a module that fetch weights."""
    return [hook for hook in _flat(getattr(module, "_hf_hook", None)) if isinstance(hook, AlignDevicesHook)]


def _flat(hook: ModelHook | None) -> Iterator[ModelHook]:
    if isinstance(hook, SequentialHook):
        for part in hook.hooks:
            yield from _flat(part)
    elif getattr(hook, "offload", False) is True:
        yield hook
