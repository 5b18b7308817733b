"""Metrics of ordered labels, by the field's names; each in plain torch, as one number or one for each rank.

`predictions` are logits (..., K), which are decoded by `rule`, or one prediction for each label (...), in the units of
`values`.  Labels (...) are rank indices; `ordinal_prompt.rank_indices` makes them of values and names.  All may be
tensors on any device, NumPy arrays, pandas Series or lists.  Of probabilities pass the logarithm.

All raise ValueError where there are no samples, predictions are NaN, labels are missing or outside the ranks, or shapes
do not fit, and TypeError where predictions are no numbers or labels no integers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ordinal_prompt.arrays import Labels, RankNumbers, number_tensor
from ordinal_prompt.conformal import rank_scores
from ordinal_prompt.samples import mean_by_rank, read_logits, read_predictions
from ordinal_prompt.set_metrics import coverage, coverage_by_rank, mean_width

__all__ = [
    "accuracy",
    "coverage",
    "coverage_by_rank",
    "kendall_tau",
    "macro_mae",
    "mae_by_rank",
    "maximum_mae",
    "mean_absolute_error",
    "mean_width",
    "off_by_one_accuracy",
    "ordinal_calibration_error",
    "ordinality",
    "quadratic_weighted_kappa",
    "ranked_probability_score",
    "reliability",
    "spearman_rho",
    "summary",
]


def mean_absolute_error(
    predictions: Any, labels: Labels, values: RankNumbers | None = None, rule: str = "expectation"
) -> float:
    """Mean of |prediction - value of the true rank|, MAE.

    Args:
        predictions: logits (..., K), or predicted values (...).
        labels: (...) rank indices.
        values: (K,) value of each rank, as years; default its index, so that the error is in ranks.
        rule: how logits are decoded, see `ordinal_prompt.decode`.

    >>> mean_absolute_error([2.5, 1.0], [2, 1], values=[1, 2, 3])
    0.75
    """
    predicted, ranks, numbers = read_predictions(predictions, labels, values, rule)
    return float((predicted - numbers[ranks]).abs().mean())


def mae_by_rank(
    predictions: Any,
    labels: Labels,
    values: RankNumbers | None = None,
    rule: str = "expectation",
    num_ranks: int | None = None,
) -> Tensor:
    """MAE over the samples of each true rank, (K,) float64; NaN where a rank does not occur.

    Args:
        predictions, labels, values, rule: as in `mean_absolute_error`.
        num_ranks: K, where neither logits nor values tell; default up to the highest label.

    >>> mae_by_rank([0.0, 1.0, 1.0, 3.0], [0, 0, 3, 3])
    tensor([0.5000,    nan,    nan, 1.0000], dtype=torch.float64)
    """
    predicted, ranks, numbers = read_predictions(predictions, labels, values, rule, num_ranks)
    return mean_by_rank((predicted - numbers[ranks]).abs(), ranks, len(numbers))


def macro_mae(predictions: Any, labels: Labels, values: RankNumbers | None = None, rule: str = "expectation") -> float:
    """Mean over the ranks that occur of their MAE, so that rare ranks count alike (Baccianella et al., ISDA 2009).

    >>> macro_mae([0.0, 0.0, 0.0, 3.0], [0, 0, 0, 1])
    1.0
    """
    return float(mae_by_rank(predictions, labels, values, rule).nanmean())


def maximum_mae(
    predictions: Any, labels: Labels, values: RankNumbers | None = None, rule: str = "expectation"
) -> float:
    """MAE of the rank that fares worst (Cruz-Ramírez et al., Neurocomputing 2014, MMAE).

    >>> maximum_mae([0.0, 0.0, 0.0, 3.0], [0, 0, 0, 1])
    2.0
    """
    return float(mae_by_rank(predictions, labels, values, rule).nan_to_num(nan=0.0).max())


def accuracy(predictions: Any, labels: Labels, values: RankNumbers | None = None, rule: str = "argmax") -> float:
    """Share of samples whose predicted rank is the true one; predictions between ranks count for the nearest.

    >>> accuracy([0, 1, 2, 0], [0, 1, 1, 2])
    0.5
    """
    return _share_within(0, predictions, labels, values, rule)


def off_by_one_accuracy(
    predictions: Any, labels: Labels, values: RankNumbers | None = None, rule: str = "argmax"
) -> float:
    """Share of samples whose predicted rank is the true one or its neighbour, whatever the distance of their values.

    >>> off_by_one_accuracy([0, 1, 2, 0], [0, 1, 1, 2])
    0.75
    """
    return _share_within(1, predictions, labels, values, rule)


def quadratic_weighted_kappa(
    predictions: Any, labels: Labels, values: RankNumbers | None = None, rule: str = "argmax"
) -> float:
    """Agreement beyond chance, disagreements weighted by their squared distance (Cohen, Psychological Bulletin 1968).

    1 - mean (p - y)² / mean over all pairs of samples (p_i - y_j)²: the usual kappa where predictions are ranks, and
    defined for predictions between ranks, too.  With `values`, distances are those of the values.  NaN where all
    predictions and all labels are one and the same.

    >>> quadratic_weighted_kappa([0, 1, 2, 0], [0, 1, 1, 2])
    0.0
    """
    predicted, ranks, numbers = read_predictions(predictions, labels, values, rule)
    true = numbers[ranks]
    by_chance = predicted.var(correction=0) + true.var(correction=0) + (predicted.mean() - true.mean()).square()
    return float(1 - (predicted - true).square().mean() / by_chance)


def kendall_tau(predictions: Any, labels: Labels, rule: str = "expectation") -> float:
    """Rank correlation of predictions and labels by pairs, corrected for ties: tau-b (Kendall, Biometrika 1945).

    NaN where all predictions, or all labels, are equal.

    >>> kendall_tau([0.1, 0.4, 0.3], [0, 1, 2])
    0.3333333333333333
    """
    predicted, ranks, _ = read_predictions(predictions, labels, None, rule)
    ties = [numbers.unique(return_counts=True)[1] for numbers in (predicted, ranks)]
    pairs = [math.comb(len(ranks), 2) - int((counts * (counts - 1) // 2).sum()) for counts in ties]
    ordered, difference = [predicted[ranks == rank].sort().values for rank in ranks.unique()], 0
    for high in range(1, len(ordered)):
        lower = torch.cat(ordered[:high]).sort().values
        below, up_to = (torch.searchsorted(lower, ordered[high], right=right) for right in (False, True))
        difference += int((below + up_to - len(lower)).sum())  # pairs in order, less those that are not
    return difference / math.sqrt(math.prod(pairs)) if all(pairs) else math.nan


def spearman_rho(predictions: Any, labels: Labels, rule: str = "expectation") -> float:
    """Correlation of the ranks of predictions and labels, ties sharing their mean rank (Spearman, 1904).

    NaN where all predictions, or all labels, are equal.

    >>> spearman_rho([0.1, 0.4, 0.3, 0.9], [0, 1, 2, 3])
    0.8
    """
    predicted, ranks, _ = read_predictions(predictions, labels, None, rule)
    first, second = (_mean_ranks(numbers) for numbers in (predicted, ranks))
    first, second = first - first.mean(), second - second.mean()
    return float((first @ second) / (first.square().sum() * second.square().sum()).sqrt())


def ranked_probability_score(logits: Any, labels: Labels) -> float:
    """Mean of Σ_k (F_k - [y ≤ k])², F the cumulated probabilities (Epstein, J. Applied Meteorology 1969).

    0 is perfect, K - 1 the worst.  Proper: the true probabilities give the least.  Divide by K - 1 for the score on
    [0, 1].

    >>> import torch
    >>> ranked_probability_score(torch.zeros(1, 4), [1])
    0.375
    """
    z, y = read_logits(logits, labels)
    return float(rank_scores(z, "rps").gather(1, y[:, None]).mean())


def ordinal_calibration_error(logits: Any, labels: Labels, bins: int = 15) -> float:
    """Expected calibration error of the cumulated probabilities, mean over the K-1 thresholds between ranks.

    At each threshold, the probability of "the rank is at most k" is compared with how often that is so, in bins of
    equal width (Guo et al., ICML 2017, equation 3, for the K-1 binary questions that ordered labels answer).

    >>> import torch
    >>> ordinal_calibration_error(torch.zeros(4, 2), [0, 0, 0, 1])
    0.25
    """
    confidence, frequency, counts = reliability(logits, labels, bins)
    gaps = (confidence - frequency).abs().nan_to_num(nan=0.0) * counts
    return float(gaps.sum() / counts.sum())


def reliability(logits: Any, labels: Labels, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """What a reliability diagram of the cumulated probabilities shows.

    Args:
        logits: (..., K).
        labels: (...) rank indices.
        bins: number of bins, of equal width.

    Returns:
        (K-1, bins) each: mean probability of "the rank is at most k", frequency of it (both NaN in empty bins), and
        number of samples (float64), for each threshold k and bin.
    """
    if not hasattr(bins, "__index__") or bins < 1:
        raise ValueError(f"Expected `bins` to be a whole number, at least 1, but got {bins!r}.")
    z, y = read_logits(logits, labels)
    probability = torch.softmax(z, dim=1).cumsum(dim=1)[:, :-1].clamp(max=1)
    thresholds = torch.arange(probability.shape[1], device="cpu")
    happened = (y[:, None] <= thresholds).double()
    places = (probability * bins).long().clamp(max=bins - 1) + bins * thresholds
    sums = [
        z.new_zeros(probability.shape[1] * bins).index_add_(0, places.flatten(), part.flatten())
        for part in (probability, happened, torch.ones_like(happened))
    ]
    confidence, frequency, counts = (part.reshape(-1, bins) for part in sums)
    return confidence / counts, frequency / counts, counts


def summary(logits: Any, labels: Labels, values: RankNumbers | None = None) -> dict[str, float]:
    """All metrics of logits (..., K) at their defaults, by name; errors in the units of `values` (K,).

    >>> import torch
    >>> found = summary(torch.eye(3) * 9, [0, 1, 2])
    >>> found["accuracy"], round(found["mean_absolute_error"], 3)
    (1.0, 0.0)
    """
    z, y = read_logits(logits, labels)
    of_values = (mean_absolute_error, macro_mae, maximum_mae, accuracy, off_by_one_accuracy, quadratic_weighted_kappa)
    others = (kendall_tau, spearman_rho, ranked_probability_score, ordinal_calibration_error)
    found = {metric.__name__: metric(z, y, values) for metric in of_values}
    return found | {metric.__name__: metric(z, y) for metric in others}


@torch.no_grad()
def ordinality(prototypes: Any, span: int | None = None) -> float:
    """Share of neighbouring pairs of similarities that are in order: the further the rank, the less similar.

    With S the cosine similarities of the prototypes, the share of the cells i ≤ j ≤ K-2 with S[i, j] > S[i, j+1].
    **Chance is near one half**, not zero: the cells i = j are in order by themselves, of the others random prototypes
    have every second, which makes 1/2 + 1/K in expectation.  Report the score beside that of random prototypes.

    Args:
        prototypes: (K, D), of any norm; the weight of a linear classifier will do.
        span: only cells with j - i < span; default all.

    Raises:
        ValueError: fewer than 2 prototypes, another shape, values that are not finite, a span below 1.
        TypeError: prototypes that are no numbers.

    >>> import torch
    >>> angle = torch.linspace(0, 3, 7)
    >>> ordinality(torch.stack([angle.cos(), angle.sin()], dim=1))
    1.0
    """
    prototypes = number_tensor(prototypes, "prototypes")
    if not bool(prototypes.isfinite().all()):
        raise ValueError("Expected finite `prototypes`, but got NaN or infinity.")
    if prototypes.dim() != 2 or len(prototypes) < 2:
        raise ValueError(f"Expected `prototypes` of shape (K, D), K at least 2, but got {tuple(prototypes.shape)}.")
    if span is not None and (not hasattr(span, "__index__") or span < 1):
        raise ValueError(f"Expected `span` to be a whole number, at least 1, but got {span!r}.")
    unit = torch.nn.functional.normalize(prototypes.double(), dim=1)
    similarity = unit @ unit.T
    ordered = similarity[:-1, :-1] > similarity[:-1, 1:]
    index = torch.arange(len(ordered), device=ordered.device)
    distance = index[None, :] - index[:, None]
    counted = (distance >= 0) & (distance < (span or len(unit)))
    return float(ordered[counted].double().mean())


def _share_within(distance: int, predictions: Any, labels: Labels, values: RankNumbers | None, rule: str) -> float:
    predicted, ranks, numbers = read_predictions(predictions, labels, values, rule)
    bounds = (numbers[1:] + numbers[:-1]) / 2
    nearest = (predicted - 0.5).ceil() if values is None else torch.bucketize(predicted, bounds)
    return float(((nearest - ranks).abs() <= distance).double().mean())


def _mean_ranks(numbers: Tensor) -> Tensor:
    """(N,) ranks of numbers (N,), float64; equal ones share their mean."""
    _, groups, counts = numbers.unique(return_inverse=True, return_counts=True)
    shared: Tensor = counts.cumsum(dim=0) - (counts.double() - 1) / 2
    return shared[groups]
