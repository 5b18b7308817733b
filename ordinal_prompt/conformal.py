"""Sets of neighbouring ranks that hold the true one with a guaranteed probability (split conformal prediction).

The guarantee is that of Vovk et al. (2005): over calibration and test samples drawn alike, the set holds the true rank
with at least the asked probability, whatever the model.  Both scores are convex in the rank, so that sets have no gaps.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ordinal_prompt.arrays import Labels, label_tensor
from ordinal_prompt.calibration import _checked

SCORES = ("cdf", "rps")


class ConformalRanks:
    """Contiguous sets of ranks with a guaranteed coverage.

    Args:
        coverage: the least probability that a set holds the true rank, in (0, 1).
        score: `"cdf"`, |F_y - p_y / 2 - 1/2| (how far the rank's middle is from the median), or `"rps"`, the ranked
            probability score Σ_k (F_k - [y ≤ k])².
        by_rank: guarantee the coverage for each true rank alone (Mondrian); needs calibration samples of each.

    >>> import torch
    >>> logits = torch.randn(500, 5, generator=torch.Generator().manual_seed(0))
    >>> labels = torch.distributions.Categorical(logits=logits).sample()
    >>> first, last = ConformalRanks(0.9).fit(logits, labels).predict(logits)
    >>> bool((first <= last).all())
    True
    """

    def __init__(self, coverage: float = 0.9, score: str = "cdf", by_rank: bool = False) -> None:
        if not 0 < coverage < 1:
            raise ValueError(f"Expected `coverage` in (0, 1), but got {coverage}.")
        if score not in SCORES:
            raise ValueError(f"Expected `score` to be one of {SCORES}, but got {score!r}.")
        self.coverage = coverage
        self.score = score
        self.by_rank = by_rank
        self.thresholds: Tensor | None = None  # (K,)

    def fit(self, logits: Tensor, labels: Labels, shift: Tensor | None = None) -> ConformalRanks:
        """Calibrates on held-out samples.

        Args:
            logits: (N, K) of samples that the model was not trained on.
            labels: (N,) rank indices.
            shift: (K,) frequency of each rank where the sets will be used, over that among these samples; for a known
                label shift (Podkopaev and Ramdas, UAI 2021).

        Where the samples are too few for the coverage, sets hold all ranks, and a warning says so.
        """
        z, y = _checked(logits, labels)
        ranks = z.shape[1]
        weight = torch.ones(ranks, dtype=torch.float64) if shift is None else shift.detach().cpu().double()
        if weight.shape != (ranks,) or not bool((weight.isfinite() & (weight > 0)).all()):
            raise ValueError(f"Expected `shift` to be {ranks} ratios above zero, but got {weight.tolist()}.")
        scores = rank_scores(z, self.score).gather(1, y[:, None])[:, 0]
        thresholds = []
        for rank in range(ranks):
            own = y == rank if self.by_rank else torch.ones_like(y, dtype=torch.bool)
            thresholds.append(_quantile(scores[own], weight[y[own]], weight[rank], self.coverage))
        self.thresholds = torch.stack(thresholds)
        if bool(self.thresholds.isinf().any()):
            count = "for some ranks " if self.by_rank else ""
            warnings.warn(
                f"{len(y)} calibration samples are {count}too few for a coverage of {self.coverage:g}: sets hold those "
                f"ranks always. At least {math.ceil(self.coverage / (1 - self.coverage) - 1e-9)} are needed"
                f"{' of each rank' if self.by_rank else ''}.",
                stacklevel=2,
            )
        return self

    def predict(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """First and last rank (...) of the sets of logits (..., K); never empty."""
        if self.thresholds is None:
            raise ValueError("Expected thresholds, but there are none yet; call fit on held-out samples first.")
        if logits.shape[-1] != len(self.thresholds):
            raise ValueError(f"Expected logits of {len(self.thresholds)} ranks, but got {tuple(logits.shape)}.")
        scores = rank_scores(logits.double(), self.score)
        inside = scores <= self.thresholds.to(scores.device)
        best = torch.nn.functional.one_hot(scores.argmin(dim=-1), scores.shape[-1]).bool()
        inside = inside | (best & ~inside.any(dim=-1, keepdim=True))
        last = inside.shape[-1] - 1 - inside.flip(-1).int().argmax(dim=-1)
        return inside.int().argmax(dim=-1), last

    def to_json(self) -> str:
        """What `from_json` reads: a few numbers, to be kept beside the exported layers."""
        if self.thresholds is None:
            raise ValueError("Expected thresholds, but there are none yet; call fit on held-out samples first.")
        numbers = [None if math.isinf(value) else value for value in self.thresholds.tolist()]
        state = {"coverage": self.coverage, "score": self.score, "by_rank": self.by_rank, "thresholds": numbers}
        return json.dumps(state)

    @classmethod
    def from_json(cls, text: str) -> ConformalRanks:
        """The calibrated sets that `to_json` wrote."""
        state: Mapping[str, Any] = json.loads(text)
        sets = cls(state["coverage"], state["score"], state["by_rank"])
        numbers = [math.inf if value is None else value for value in state["thresholds"]]
        sets.thresholds = torch.tensor(numbers, dtype=torch.float64)
        return sets


def rank_scores(logits: Tensor, score: str) -> Tensor:
    """(..., K) how strange each rank would be, by logits (..., K); convex along the ranks."""
    probabilities = torch.softmax(logits, dim=-1)
    cumulated = probabilities.cumsum(dim=-1)
    if score == "cdf":
        return (cumulated - probabilities / 2 - 0.5).abs()
    below = torch.tril(torch.ones(logits.shape[-1], logits.shape[-1], dtype=logits.dtype, device=logits.device)).T
    return (cumulated[..., None, :] - below).square().sum(dim=-1)


def set_metrics(first: Tensor, last: Tensor, labels: Labels, num_ranks: int) -> dict[str, Any]:
    """Coverage, mean width in ranks, and the coverage of each true rank (NaN where there are no samples)."""
    y = label_tensor(labels)
    inside = ((first <= y) & (y <= last)).double()
    by_rank = [inside[y == rank].mean().item() for rank in range(num_ranks)]
    width = (last - first + 1).double().mean().item()
    return {"coverage": inside.mean().item(), "width": width, "coverage_by_rank": by_rank}


def _quantile(scores: Tensor, weights: Tensor, own: Tensor, coverage: float) -> Tensor:
    """The least score up to which the weighted samples have the coverage, the test sample counted beyond all."""
    order = scores.argsort()
    reached = weights[order].cumsum(dim=0) >= coverage * (weights.sum() + own) * (1 - 1e-12)
    if not bool(reached.any()):
        return torch.tensor(math.inf, dtype=torch.float64)
    return scores[order][reached.int().argmax()]
