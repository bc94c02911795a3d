# SPDX-License-Identifier: Apache-2.0
"""Every error that a user can cause, in one tree.

    BlockPruningError (ValueError)
    ├── ConfigurationError       a field, an option or a combination of them is wrong
    ├── UnknownStrategyError     no installed strategy has this name, or it cannot be imported
    ├── CalibrationError         text missing, too short, unreadable, or not loadable offline
    ├── NonFiniteError           NaN or infinity in activations or in the loss
    ├── PlanError                a plan is malformed, or was made for another model
    ├── CheckpointError          the source files are incomplete, malformed or of another format
    ├── UnsupportedModelError    this model (or the way it is loaded) cannot be pruned exactly
    ├── OutputError              the output folder exists, is full or may not be written
    ├── DistributedError         another process failed or was lost, or the processes do not agree
    ├── HubError                 the Hub refused an upload or could not be reached
    ├── VerificationError        the result was built and did not pass the gate
    └── ResumeError              what is kept for resuming belongs to another run, or is in use

A message says what was received, what is allowed and which argument or command mends it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BlockPruningError(ValueError):
    """Base class: the request, the data or the model does not fit; nothing was left half done."""


class ConfigurationError(BlockPruningError):
    """A configuration field, a strategy option or a combination of them is wrong."""


class UnknownStrategyError(ConfigurationError):
    """No installed strategy has the requested name, or the one that has cannot be imported."""


class CalibrationError(BlockPruningError):
    """Calibration or evaluation text is missing, too short, or cannot be loaded."""


class NonFiniteError(BlockPruningError):
    """A NaN or an infinity appeared in the activations or in the loss."""


class PlanError(BlockPruningError):
    """A pruning plan is malformed, or does not belong to the model it is applied to."""


class CheckpointError(BlockPruningError):
    """The files of the dense model are incomplete, malformed or in a format that is not rewritten."""


class UnsupportedModelError(BlockPruningError):
    """The model cannot be pruned exactly; the message names its model type and what to do instead."""


class OutputError(BlockPruningError):
    """The output cannot be written where it was asked for."""


class DistributedError(BlockPruningError):
    """Of several processes that work together another one failed or was lost, or they do not agree."""


class HubError(BlockPruningError):
    """The Hub refused an upload or could not be reached; the message names the whole folder and how to resume."""


class VerificationError(BlockPruningError):
    """The pruned result failed the gate; the model or folder was left as it was before."""


class ResumeError(BlockPruningError):
    """What an interrupted run left for going on does not belong to this run, or another process is using it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `" Did you mean 'x'? Available: ..."` for an unknown `name`; ends an error message."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
    return f"{hint} Available: {', '.join(names) if names else 'none'}."
