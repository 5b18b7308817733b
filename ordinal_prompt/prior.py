"""What the fit expects of the weights of a head before it has seen labels: a Gaussian prior."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_SD = 0.25  # of the log of the scale


@dataclass(frozen=True)
class Prior:
    """Weights of the penalties, in nats over the whole training set.

    Attributes:
        size: of the squared deviations of the weights, in units of the scale.
        tie: of the squared differences between neighbouring ranks, times (K-1)², so that it means the same for any K.
    """

    size: float
    tie: float

    def penalty(self, deviation: Tensor, bias: Tensor, log_ratio: Tensor | float) -> Tensor:
        """Of a deviation (K, D) in units of the scale, a bias (K,) and the log of the scale over the usual ones."""
        tie = self.tie * (len(deviation) - 1) ** 2
        of_weights = self.size * deviation.square().sum() + tie * deviation.diff(dim=0).square().sum()
        total: Tensor = of_weights + bias.square().sum() + log_ratio**2 / (2 * SCALE_SD**2)
        return total

    def factor(self, num_ranks: int) -> Tensor:
        """(K, K) L with L Lᵀ the covariance between ranks: of L u, with u of unit variance, the penalty is ‖u‖²."""
        unit = torch.eye(num_ranks, dtype=torch.float64, device="cpu")
        steps = unit.diff(dim=0)
        precision = self.size * unit + self.tie * (num_ranks - 1) ** 2 * steps.T @ steps
        lower: Tensor = torch.linalg.cholesky(torch.linalg.inv(precision))
        return lower


AROUND_PROTOTYPES = Prior(size=10.0, tie=10.0)
AROUND_ZERO = Prior(size=1.0, tie=1.0)
