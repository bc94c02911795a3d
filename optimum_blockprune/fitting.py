# SPDX-License-Identifier: Apache-2.0
"""The regression behind compensation: which windows and tokens a map is fitted on, how they weigh, and its solution.

The first token of a window is no example. Its activations are massive (Sun et al., arXiv 2402.17762), and the
attention of all others leans on it: a map that does not know of it does anything to it, and what one does for the
others leaks into it, the more so the more the map shrinks. So the map is to leave it alone, which is a term of its
own. With D a change of the weight that reads y (or T - I, for a map T of what is written, y):

    sum over tokens of |y D - missing|^2 / |s|^2  +  sum over first tokens of |y D|^2 / c^2  +  a |D|^2

with 1 / c^2 the mean of 1 / |s|^2 in the window. It is next to nothing where the first token is written to the stream
like others, and a constraint where something massive is. Our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batches import CalibrationWindows
from .folds import CHANGE, DIAGONAL
from .measures import content_mask


# Tried at every cut, times the mean diagonal of y'y; our choice.
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch that a map is fitted on, and the first one of each window.

    Attributes:
        shape: Windows and their tokens.
        others: Flat positions [N] of those that are fitted.
        firsts: Flat positions [F] of the first ones.
    """

    shape: tuple[int, int]
    others: Tensor
    firsts: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Tokens:
        """From the mask [B, S] of real tokens."""
        content = content_mask(mask)
        others, firsts = (each.flatten().nonzero().squeeze(1) for each in (content, mask & ~content))
        return cls((mask.shape[0], mask.shape[1]), others, firsts)

    def fitted(self, states: Tensor) -> Tensor:
        """Of states [B, S, d] those [N, d] that are fitted, fp32."""
        return states.flatten(0, -2)[self.others.to(states.device)].float()

    def first(self, states: Tensor, weights: Tensor) -> Tensor:
        """Of states [B, S, d] the first tokens [F, d], fp32, times the root mean square weight in their windows.

        Args:
            states: What is written to the stream.
            weights: Of the tokens that are fitted, [N, 1].
        """
        windows, length = self.shape
        rows = self.others.to(weights.device) // length
        sums = weights.new_zeros(windows, 1).index_add_(0, rows, weights.square())
        counts = weights.new_zeros(windows, 1).index_add_(0, rows, torch.ones_like(weights))
        scale = (sums / counts.clamp_min(1)).sqrt()[self.firsts.to(weights.device) // length]
        return states.flatten(0, -2)[self.firsts.to(states.device)].float() * scale.to(states.device)


def weights_of(states: Tensor) -> Tensor:
    """What each token [N, d] weighs, [N, 1]: a norm reads every one at its own scale."""
    return states.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny).reciprocal()


def fitting_part(windows: CalibrationWindows, share: int) -> tuple[CalibrationWindows, CalibrationWindows]:
    """The windows that maps are fitted on, and those that judge them: one in `share`, at least one."""
    every = range(windows.num_windows)
    judges = [row for row in every if row % share == share - 1] or [windows.num_windows - 1]
    return windows.part([row for row in every if row not in judges]), windows.part(judges)


def crossed_parts(
    windows: CalibrationWindows, pairs: int, *, judging: int, fitting: int
) -> list[tuple[CalibrationWindows, CalibrationWindows]]:
    """Pairs of windows that maps are fitted on and others that judge them, each of which judges once (cross-fitting).

    Args:
        windows: At least two.
        pairs: As many, or one for every window if these are fewer.
        judging: Tokens that judge in all pairs together, but at least one window for each.
        fitting: Tokens that are fitted on in each pair, at most. Windows are whole and spread evenly.
    """
    length, every = windows.input_ids.shape[1], range(windows.num_windows)
    judges = _spread(every, max(pairs, -(-judging // length)))
    parts = [judges[first::pairs] for first in range(min(pairs, len(judges)))]
    others = [_spread([row for row in every if row not in part], -(-fitting // length)) for part in parts]
    return [(windows.part(rows), windows.part(part)) for rows, part in zip(others, parts, strict=True)]


def _spread(rows: Sequence[int], count: int) -> list[int]:
    """So many of them, evenly; all if there are no more."""
    count = min(count, len(rows))
    return [rows[(2 * number + 1) * len(rows) // (2 * count)] for number in range(count)]


def solved(sums: dict[str, Tensor], kind: str, strength: float) -> Tensor:
    """The tensor of a map, fp32, from the sums over tokens and the strength of the shrinkage.

    Args:
        sums: `moments`, y'y, and `missing`, y'(z - x) [.., d], of the tokens that are fitted, and `still`, y'y of
            those that are to stay as they are; fp64. With y what the module reads (`"change"`), or what it writes.
        kind: `"change"`, `"matrix"` or `"diagonal"`; see `Fold`.
        strength: Times the mean diagonal of y'y.
    """
    moments, missing, still = sums["moments"], sums["missing"], sums["still"]
    shrinkage = strength * moments.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    if kind == DIAGONAL:
        return (1 + missing.diagonal() / ((moments + still).diagonal() + shrinkage)).float()
    system = moments + still
    system.diagonal().add_(shrinkage)
    change = torch.cholesky_solve(missing, torch.linalg.cholesky(system))
    if kind != CHANGE:
        change.diagonal().add_(1)
    return change.float().contiguous()
