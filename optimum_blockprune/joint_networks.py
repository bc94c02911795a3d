# SPDX-License-Identifier: Apache-2.0
"""Functional networks of all blocks together, and how much each block takes part in them: our extension, no paper's.

    Z_l: what block l adds to the residual stream, normalised (below), the same tokens for all blocks     [T, d]
    G = sum_l Z_l Z_l^T,  V: its leading eigenvectors,  U_l = Z_l^T V w^(-1/2),  one ICA over the rows of all U_l
    e_cl: share of network c in block l (`ica.shares`),  w_c: variance that the time course of map c carries
    participation of block l: P_l = sum_c w_c e_cl

The outputs of blocks would not do: they hold the residual stream, so that neighbours share nearly the same signal. Nor
would one ICA per block: its total is the same for every block (see `optimum_blockprune.ica`).

What is not covered: whether a block that takes part little is one the model can do without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .ica import Control, Maps, joint_subspace, rotated_maps, shares, standardised, whitened
from .measures import fp64_zeros


UPDATE, STANDARDISED = "update", "standardised"
BLOCK_SIGNALS = (UPDATE, STANDARDISED)
VARIANCE, UNIFORM = "variance", "uniform"
WEIGHTS = (VARIANCE, UNIFORM)


class BlockUpdates:
    """Hidden states of some tokens at every boundary, in the model's own precision, and the blocks' updates from them.

    Args:
        num_blocks: Number of blocks.
        tokens: Number of tokens, in all batches together.
    """

    def __init__(self, num_blocks: int, tokens: int) -> None:
        self._tokens = tokens
        self._states: list[Tensor | None] = [None] * (num_blocks + 1)
        self._stop = 0

    @property
    def stored_values(self) -> int:
        """Number of values held."""
        return sum(states.numel() for states in self._states if states is not None)

    def watch(self, rows: Tensor) -> Callable[[int, Tensor], None]:
        """Starts a batch.

        Args:
            rows: Flat positions in its [B * S].

        Returns:
            What takes its boundary states [B, S, d]; batches may take turns.
        """
        place = slice(self._stop, self._stop + len(rows))
        self._stop = place.stop

        def visit(position: int, hidden: Tensor) -> None:
            chosen = hidden.flatten(0, 1).index_select(0, rows.to(hidden.device))
            if self._states[position] is None:
                self._states[position] = chosen.new_empty(self._tokens, chosen.shape[1])
            self._states[position][place].copy_(chosen)

        return visit

    def of(self, block: int, signals: str = UPDATE) -> Tensor:
        """Z [T, d], fp64: the update of a block over the root mean square of its input, token by token.

        Args:
            block: The block.
            signals: `UPDATE` centres it over the tokens; `STANDARDISED` also scales each coordinate to deviation 1.

        Raises:
            NonFiniteError: `STANDARDISED` met NaN or infinity.
        """
        before, after = self._states[block], self._states[block + 1]
        home = fp64_zeros(before, 0).device
        before, after = before.to(home).double(), after.to(home).double()
        size = before.square().mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        update = (after - before) / size
        return standardised(update) if signals == STANDARDISED else update - update.mean(0)


@dataclass(frozen=True)
class JointNetworks:
    """Networks of all blocks.

    Attributes:
        maps: Their maps, the channels of all blocks side by side.
        sizes: Number of channels of each block.
        variances: Sum of squares of the time course of each map over the tokens [C].
    """

    maps: Maps
    sizes: tuple[int, ...]
    variances: Tensor

    def participation(self, quantile: float, weights: str = VARIANCE) -> Participation:
        """How much each block takes part.

        Without a rotation single maps mean nothing; the squared leverage of the channels is then the one network.

        Args:
            quantile: See `ica.shares`.
            weights: `VARIANCE` or `UNIFORM`.
        """
        one = self.maps.rotation_free
        parts = shares(self.maps.peak.unsqueeze(0) if one else self.maps.z, self.sizes, quantile)
        # A network that no channel belongs to is left out.
        taken = parts.sum(1) > 0
        carried = torch.ones(len(parts)).to(parts) if one or weights == UNIFORM else self.variances
        carried = torch.where(taken, carried.to(parts), 0.0)
        carried = carried / carried.sum()
        return Participation(parts.cpu(), carried.cpu(), (carried @ parts).tolist())


@dataclass(frozen=True)
class Participation:
    """Shares e [C, L] and weights w [C] of networks, and participation by block."""

    shares: Tensor
    weights: Tensor
    blocks: list[float]


def joint_networks(
    update: Callable[[int], Tensor],
    num_blocks: int,
    *,
    components: int,
    restarts: int,
    seed: int,
    control: Control = "none",
) -> JointNetworks | None:
    """Finds the networks of all blocks; `None` where no block's update varies, or no fit was finite.

    Args:
        update: Z_l [T, N_l] of a block, asked for at every use: one block's at a time is held.
        num_blocks: Number of blocks.
        components, restarts, control: See `ica.rotated_maps`.
        seed: Seed of the random starts.

    Raises:
        NonFiniteError: An update is NaN or infinite.
    """
    gram = _product(update(0))
    for block in range(1, num_blocks):
        gram += _product(update(block)).to(gram.device)
    vectors, values = joint_subspace(gram, components)
    basis = vectors / values.sqrt()
    rows = [update(block).T.to(gram.device) @ basis for block in range(num_blocks)]
    u = torch.cat(rows)
    sizes = tuple(map(len, rows))
    maps = rotated_maps(whitened(u), restarts=restarts, seed_parts=(seed,), control=control)
    if maps is None:
        return None
    # Time courses are V w^(1/2) U^T z^T / (N - 1); V is orthonormal, so that their norms need no V.
    courses = values.sqrt().unsqueeze(1) * (u.T @ maps.z.T) / (sum(sizes) - 1)
    return JointNetworks(maps, sizes, courses.square().sum(0))


def _product(z: Tensor) -> Tensor:
    return z @ z.T
