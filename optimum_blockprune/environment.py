# SPDX-License-Identifier: Apache-2.0
"""What a run ran on: package versions and peak memory, for plans and reports."""

from __future__ import annotations

import sys
from importlib.metadata import version

import torch
from transformers import PreTrainedModel


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the result."""
    packages = ("optimum-blockprune", "optimum", "torch", "transformers")
    return {"python": ".".join(map(str, sys.version_info[:3])), **{name: version(name) for name in packages}}


def peak_memory(model: PreTrainedModel) -> int | None:
    """Largest allocation (bytes) on the model's GPU, or the largest resident size of this process on a CPU.

    `None` where the platform does not tell.
    """
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
