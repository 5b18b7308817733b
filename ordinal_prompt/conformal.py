"""Sets of neighbouring ranks that hold the true one with a guaranteed probability (split conformal prediction).

The guarantee is that of Vovk et al. (2005): over calibration and test samples drawn alike, the set holds the true rank
with at least the asked probability, whatever the model.  Both scores fall and then rise along the ranks, so that sets
have no gaps.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from ordinal_prompt.arrays import (
    Labels,
    RankNumbers,
    is_number,
    listed,
    number_tensor,
    rank_tensor,
    warn_of_probabilities,
)
from ordinal_prompt.samples import read_logits

SCORES = ("cdf", "rps")
TIE = 1e-6  # scores that are this close count as equal: float32 and other devices round them differently


class ConformalRanks:
    """Contiguous sets of ranks with a guaranteed coverage.

    Args:
        coverage: the least probability that a set holds the true rank, in (0, 1).
        score: `"cdf"`, |F_y - p_y / 2 - 1/2| (how far the rank's middle is from the median), or `"rps"`, the ranked
            probability score Σ_k (F_k - [y ≤ k])².
        by_rank: guarantee the coverage for each true rank alone (Mondrian); needs calibration samples of each.

    Attributes:
        thresholds: (K,) the highest score with which each rank is in a set, or (G, K) for each group; float64.
        groups: the G groups that `fit` was given, or None.

    >>> import torch
    >>> logits = torch.randn(500, 5, generator=torch.Generator().manual_seed(0))
    >>> labels = torch.distributions.Categorical(logits=logits).sample()
    >>> first, last = ConformalRanks(0.9).fit(logits, labels).predict(logits)
    >>> bool((first <= last).all())
    True
    """

    def __init__(self, coverage: float = 0.9, score: str = "cdf", by_rank: bool = False) -> None:
        if not is_number(coverage) or not 0 < float(coverage) < 1:
            raise ValueError(f"Expected `coverage` in (0, 1), but got {coverage!r}.")
        if score not in SCORES:
            raise ValueError(f"Expected `score` to be one of {SCORES}, but got {score!r}.")
        if by_rank not in (True, False):
            raise ValueError(f"Expected `by_rank` to be True or False, but got {by_rank!r}.")
        self.coverage = float(coverage)
        self.score = score
        self.by_rank = bool(by_rank)
        self.thresholds: Tensor | None = None
        self.groups: tuple[Hashable, ...] | None = None

    def fit(self, logits: Any, labels: Labels, shift: RankNumbers | None = None, groups: Any = None) -> ConformalRanks:
        """Calibrates on held-out samples.

        Args:
            logits: (..., K) of samples that the model was not trained on.
            labels: (...) rank indices.
            shift: (K,) frequency of each rank where the sets will be used, over that among these samples; for a known
                label shift (Podkopaev and Ramdas, UAI 2021).
            groups: (...) names or numbers of the group of each sample, as a hospital or a camera; the coverage then
                holds in each group alone (Mondrian, Vovk et al., 2005, section 4.5), and with `by_rank` for each rank
                in each group.

        Where the samples are too few for the coverage, sets hold all ranks, and a warning says so.

        Raises:
            ValueError: no samples, other shapes, labels outside the ranks, ratios that are negative or all zero, a
                missing group.
            TypeError: groups that are neither names nor integers.
        """
        z, y = read_logits(logits, labels)
        ranks = z.shape[1]
        weight = z.new_ones(ranks) if shift is None else rank_tensor(shift, "shift").detach().cpu().double()
        if weight.shape != (ranks,) or not bool((weight.isfinite() & (weight >= 0)).all() & (weight[y] > 0).any()):
            raise ValueError(
                f"Expected `shift` to be {ranks} ratios that are not negative, nor all zero, but got shape "
                f"{tuple(weight.shape)}: {listed(weight.flatten().tolist())}."
            )
        # The thresholds of a rank by itself know no shift; else only ratios count, and large ones would overflow.
        weight = torch.ones_like(weight) if self.by_rank else weight / weight.max()
        scores = rank_scores(z, self.score).gather(1, y[:, None])[:, 0]
        named = [None] * len(y) if groups is None else _group_list(groups, len(y))
        index = {group: place for place, group in enumerate(dict.fromkeys(named))}
        of_group = torch.tensor([index[group] for group in named], device="cpu")
        thresholds = z.new_empty(len(index), ranks)
        for place in range(len(index)):
            for part in range(ranks) if self.by_rank else [slice(None)]:
                own = of_group == place if isinstance(part, slice) else (of_group == place) & (y == part)
                thresholds[place, part] = _quantiles(scores[own], weight[y[own]], weight[part], self.coverage)
        self.thresholds = thresholds[0] if groups is None else thresholds
        self.groups = None if groups is None else tuple(index)
        short = thresholds.isinf().any(dim=1).tolist()
        if any(short):
            few = [group for group, place in index.items() if short[place] and groups is not None]
            where = f"in the groups {listed(few)} " * bool(few) + "for some ranks " * self.by_rank
            warnings.warn(
                f"{len(y)} calibration samples are {where}too few for a coverage of {self.coverage:g}: sets hold those "
                f"ranks always. At least {math.ceil(self.coverage / (1 - self.coverage) - 1e-9)} are needed"
                f"{' of each rank' * self.by_rank}{' in each group' * bool(few)}"
                f"{', and more under a shift' * (shift is not None)}.",
                stacklevel=2,
            )
        return self

    def predict(self, logits: Any, groups: Any = None) -> tuple[Tensor, Tensor]:
        """First and last rank (...) of the sets of logits (..., K); never empty, and all ranks where logits are NaN.

        Args:
            logits: (..., K).
            groups: (...) the group of each sample, one of those that `fit` was given, where it was given some.

        Raises:
            ValueError: thresholds that are not fitted, another number of ranks, missing or unknown groups.
        """
        thresholds, logits = self._fitted(), number_tensor(logits, "logits", torch.float64)
        if logits.dim() == 0 or logits.shape[-1] != thresholds.shape[-1]:
            raise ValueError(f"Expected logits of {thresholds.shape[-1]} ranks, but got {tuple(logits.shape)}.")
        warn_of_probabilities(logits, stacklevel=3)
        scores = rank_scores(logits.double(), self.score)
        if (groups is None) != (self.groups is None):
            told = f"one of {listed(self.groups)} for each sample" if self.groups else "none"
            raise ValueError(f"Expected `groups` as in fit, {told}, but got {'none' if groups is None else 'some'}.")
        if self.groups is not None:
            places = {group: place for place, group in enumerate(self.groups)}
            named = _group_list(groups, logits.shape[:-1].numel())
            unknown = dict.fromkeys(group for group in named if group not in places)
            if unknown:
                raise ValueError(
                    f"Expected `groups` among those of the calibration samples, {listed(places)}, but got "
                    f"{listed(unknown)}; calibrate with samples of those, too."
                )
            thresholds = thresholds[[places[group] for group in named]].reshape(scores.shape)
        inside = ~(scores > thresholds.to(scores.device))
        best = torch.nn.functional.one_hot(scores.argmin(dim=-1), scores.shape[-1]).bool()
        inside = inside | (best & ~inside.any(dim=-1, keepdim=True))
        last = inside.shape[-1] - 1 - inside.flip(-1).int().argmax(dim=-1)
        return inside.int().argmax(dim=-1), last

    def to_json(self) -> str:
        """What `from_json` reads: a few numbers, to be kept beside the exported layers.

        Where they run without this package, a set reaches from the first to the last rank whose score is at most its
        threshold (null: always), or holds the rank of the least score where there is none.

        >>> import torch
        >>> sets = ConformalRanks(0.5).fit(torch.eye(3), [0, 1, 2])
        >>> thresholds = json.loads(sets.to_json())["thresholds"]
        >>> p = torch.eye(3).softmax(-1)
        >>> scores = (p.cumsum(-1) - p / 2 - 0.5).abs()  # "cdf"
        >>> [[y for y in range(3) if row[y] <= thresholds[y]] for row in scores]
        [[0, 1], [1], [1, 2]]
        """
        rows = self._fitted().reshape(-1, self._fitted().shape[-1]).tolist()
        numbers = [[None if math.isinf(value) else value for value in row] for row in rows]
        state = {"coverage": self.coverage, "score": self.score, "by_rank": self.by_rank}
        if self.groups is None:
            return json.dumps({**state, "thresholds": numbers[0]})
        return json.dumps({**state, "groups": self.groups, "thresholds": numbers})

    @classmethod
    def from_json(cls, text: str) -> ConformalRanks:
        """The calibrated sets that `to_json` wrote.

        Raises:
            ValueError: a text that it did not write.
        """
        try:
            state: Mapping[str, Any] = json.loads(text)
            sets = cls(state["coverage"], state["score"], state["by_rank"])
            groups, numbers = state.get("groups"), state["thresholds"]
            rows = [
                [math.inf if value is None else value for value in row] for row in (numbers if groups else [numbers])
            ]
            thresholds = torch.tensor(rows, dtype=torch.float64, device="cpu")
            if thresholds.dim() != 2 or len(thresholds) != len(groups or [None]):
                raise ValueError(f"{len(groups or [None])} rows of thresholds are needed")
            if groups is not None and (not isinstance(groups, list) or len({*groups}) < len(groups)):
                raise ValueError(f"groups are to be a list, none twice: {groups}")
            if any(isinstance(value, bool) for row in rows for value in row) or bool(thresholds.isnan().any()):
                raise ValueError("thresholds are to be numbers, or null")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"Expected what ConformalRanks.to_json wrote, but got something else: {error!r}."
            ) from error
        sets.groups = tuple(groups) if groups else None
        sets.thresholds = thresholds if groups else thresholds[0]
        return sets

    def _fitted(self) -> Tensor:
        if self.thresholds is None:
            raise ValueError("Expected thresholds, but there are none yet; call fit on held-out samples first.")
        return self.thresholds


def rank_scores(logits: Tensor, score: str) -> Tensor:
    """(..., K) how strange each rank would be, by logits (..., K); it falls and then rises along the ranks."""
    probabilities = torch.softmax(logits, dim=-1)
    cumulated = probabilities.cumsum(dim=-1)
    if score == "cdf":
        return (cumulated - probabilities / 2 - 0.5).abs()
    below, above = cumulated.square(), (1 - cumulated).square()  # what a threshold adds to ranks above it, and up to it
    return below.cumsum(dim=-1) - below + above.flip(-1).cumsum(dim=-1).flip(-1)


def _quantiles(scores: Tensor, weights: Tensor, own: Tensor, coverage: float) -> Tensor:
    """The least score up to which the weighted samples have the coverage, the test sample counted beyond all.

    Args:
        scores, weights: (N,) of calibration samples.
        own: (...) weights that the test sample may have.
    """
    ordered, order = scores.sort()
    needed = coverage * (weights.sum() + own) * (1 - 1e-12)
    place = torch.searchsorted(weights[order].cumsum(dim=0), needed)
    return torch.cat([ordered + TIE, ordered.new_tensor([math.inf])])[place]


def _group_list(groups: Any, number: int) -> list[Hashable]:
    """The group of each of `number` samples, as plain Python values."""
    groups = groups.to_numpy() if hasattr(groups, "to_numpy") else groups
    if getattr(getattr(groups, "dtype", None), "kind", "") in ("M", "m"):
        raise TypeError(f"Expected `groups` to be names or integers, but got {groups.dtype}.")
    flat = groups.reshape(-1) if hasattr(groups, "reshape") else groups
    plain: Any = flat.tolist() if hasattr(flat, "tolist") else flat
    plain = [plain] if isinstance(plain, (str, int)) else [*plain]
    named: list[Hashable] = [group.item() if hasattr(group, "item") else group for group in plain]
    if len(named) != number:
        raise ValueError(f"Expected a group for each sample, but got {len(named)} `groups` for {number} samples.")
    missing = sum(group is None or str(group) in ("nan", "<NA>", "NaT") for group in named)
    if missing:
        raise ValueError(f"Expected a group for each sample, but {missing} of `groups` are missing; name them, too.")
    if not all(isinstance(group, (str, int)) for group in named):
        kinds = sorted({type(group).__name__ for group in named})
        raise TypeError(f"Expected `groups` to be names or integers, but got {', '.join(kinds)}.")
    return named
