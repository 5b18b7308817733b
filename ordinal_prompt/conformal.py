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

from ordinal_prompt.arrays import Labels
from ordinal_prompt.samples import mean_by_rank, read_labels, read_logits

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
        z, y = read_logits(logits, labels)
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
    below, above = cumulated.square(), (1 - cumulated).square()  # what a threshold adds to ranks above it, and up to it
    return below.cumsum(dim=-1) - below + above.flip(-1).cumsum(dim=-1).flip(-1)


def coverage(first: Any, last: Any, labels: Labels) -> float:
    """Share of samples whose set of ranks, from `first` to `last` (...), holds the true rank.

    >>> coverage([0, 1, 2], [1, 1, 4], [1, 2, 2])
    0.6666666666666666
    """
    return float(_inside(first, last, labels)[0].mean())


def coverage_by_rank(first: Any, last: Any, labels: Labels, num_ranks: int | None = None) -> Tensor:
    """`coverage` over the samples of each true rank, (K,) float64; NaN where a rank does not occur.

    >>> coverage_by_rank([0, 1, 2], [1, 1, 4], [1, 2, 2])
    tensor([   nan, 1.0000, 0.5000], dtype=torch.float64)
    """
    inside, ranks = _inside(first, last, labels)
    return mean_by_rank(inside, ranks, int(ranks.max()) + 1 if num_ranks is None else num_ranks)


def mean_width(first: Any, last: Any) -> float:
    """Mean number of ranks in sets from `first` to `last` (...).

    >>> mean_width([0, 1, 2], [1, 1, 4])
    2.0
    """
    low, high = _bounds(first, last)
    return float((high - low + 1).double().mean())


def _inside(first: Any, last: Any, labels: Labels) -> tuple[Tensor, Tensor]:
    """Whether each set holds the true rank (N,), and that rank (N,)."""
    low, high = _bounds(first, last)
    ranks = read_labels(labels)
    if len(ranks) != len(low):
        raise ValueError(f"Expected a set of ranks for each label, but got {len(low)} sets for {len(ranks)} labels.")
    return ((low <= ranks) & (ranks <= high)).double(), ranks


def _bounds(first: Any, last: Any) -> tuple[Tensor, Tensor]:
    low, high = read_labels(first, argument="first"), read_labels(last, argument="last")
    if len(low) != len(high) or bool((low > high).any()):
        raise ValueError(
            "Expected the first and the last rank of each set, none empty, but some end before they start."
        )
    return low, high


def _quantile(scores: Tensor, weights: Tensor, own: Tensor, coverage: float) -> Tensor:
    """The least score up to which the weighted samples have the coverage, the test sample counted beyond all."""
    order = scores.argsort()
    reached = weights[order].cumsum(dim=0) >= coverage * (weights.sum() + own) * (1 - 1e-12)
    if not bool(reached.any()):
        return torch.tensor(math.inf, dtype=torch.float64)
    return scores[order][reached.int().argmax()]
