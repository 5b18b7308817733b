"""Interpolation of rank embeddings from a few base ranks (OrdinalCLIP, section 3.3).

The K ranks sit at positions v_0 < … < v_{K-1} (their indices, or `rank_values`), the B base ranks at B evenly spaced
positions from the first rank to the last.  A rank embedding is a fixed convex mixture of the learnable base embeddings,
so neighbouring ranks are neighbours before training starts.

Deviation from the published code: `normal` is computed as a softmax, so that it stays finite however far a rank is from
its bases (the published quotient is 0/0 there); `piecewise` is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

INTERPOLATIONS = ("linear", "inv_prop", "normal", "piecewise")


def base_positions(first: float, last: float, num_base_ranks: int) -> Tensor:
    """Positions of the base ranks: evenly spaced from `first` to `last`, the middle where there is only one.

    Returns:
        (B,) float64, in the units of `first` and `last`.

    >>> base_positions(0, 4, 3)
    tensor([0., 2., 4.], dtype=torch.float64)
    """
    if num_base_ranks == 1:
        return torch.tensor([(first + last) / 2], dtype=torch.float64, device="cpu")
    return torch.linspace(first, last, num_base_ranks, dtype=torch.float64, device="cpu")


def interpolation_weights(positions: Tensor, first: float, last: float, num_base_ranks: int, kind: str) -> Tensor:
    """Weights with which base ranks mix into the rank at each position.

    Args:
        positions: (N,) positions, in the units of `first` and `last`.
        first: position of the first rank.
        last: position of the last rank.
        num_base_ranks: B.
        kind: with d the distance to a base and L = last - first, before each row is divided by its sum: `"linear"`
            1 - d/L; `"inv_prop"` 1/(d + 1e-5); `"normal"` exp(-d²); `"piecewise"` linear between the two neighbouring
            bases, zero for the others, so that the bases themselves are attained.

    Returns:
        (N, B) float64; rows sum to 1.

    >>> interpolation_weights(torch.tensor([0.0, 1.0]), 0, 4, 3, "linear")
    tensor([[0.6667, 0.3333, 0.0000],
            [0.4286, 0.4286, 0.1429]], dtype=torch.float64)
    """
    bases = base_positions(first, last, num_base_ranks).to(positions.device)
    distance = (positions.double()[:, None] - bases).abs()
    if kind == "normal":
        return torch.softmax(-(distance**2), dim=1)
    if kind == "linear":
        weights = 1 - distance / (last - first)
    elif kind == "inv_prop":
        weights = 1 / (distance + 1e-5)
    elif kind == "piecewise":
        spacing = (last - first) / max(num_base_ranks - 1, 1)
        weights = (1 - distance / spacing).clamp_min(0)
    else:
        raise ValueError(f"Expected `interpolation` to be one of {INTERPOLATIONS} or None, but got {kind!r}.")
    return weights / weights.sum(dim=1, keepdim=True)
