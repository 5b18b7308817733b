"""Held-out samples as users have them: what a model says of each, and its true rank; checked, in float64 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ordinal_prompt.arrays import (
    Labels,
    RankNumbers,
    check_same_categories,
    is_categorical,
    label_tensor,
    number_tensor,
    rank_tensor,
    warn_of_probabilities,
)
from ordinal_prompt.decoding import check_rule, decode


def read_labels(labels: Labels, num_ranks: int | None = None, argument: str = "labels") -> Tensor:
    """Rank indices (N,) of labels of any shape.

    Raises:
        ValueError: no labels, missing ones, or indices outside 0…K-1.
        TypeError: labels that are no integers.
    """
    ranks = label_tensor(labels, argument, num_ranks).detach().cpu().reshape(-1)
    if len(ranks) == 0:
        raise ValueError("Expected at least one sample, but got none.")
    low, high = (int(bound) for bound in ranks.aminmax())
    if low < 0 or (num_ranks is not None and high >= num_ranks):
        raise ValueError(
            f"Expected {argument} in 0…{'' if num_ranks is None else num_ranks - 1}, the indices of the ranks, but got "
            f"{low}…{high}; op.rank_indices makes indices of values and names, and samples without one are left out."
        )
    return ranks


def read_logits(logits: Any, labels: Labels) -> tuple[Tensor, Tensor]:
    """Logits (N, K) without NaN or +inf, and rank indices (N,), of logits (..., K) and labels (...).

    Raises:
        ValueError: other shapes, fewer than two ranks, NaN or +inf; as `read_labels`.
        TypeError: logits that are no numbers; as `read_labels`.
    """
    warn_of_probabilities(number_tensor(logits, "logits"))  # in its own precision
    z = _numbers(logits, "logits")
    shape = tuple(label_tensor(labels).shape)
    if z.dim() < 1 or tuple(z.shape[:-1]) != shape or z.shape[-1] < 2:
        raise ValueError(
            f"Expected `logits` of shape (..., K), K at least 2, and one label for each of their rows, but got "
            f"{tuple(z.shape)} and labels of shape {shape}."
        )
    z = z.reshape(-1, z.shape[-1])
    if not bool((z < torch.inf).all()) or bool((z.amax(dim=1) == -torch.inf).any()):
        raise ValueError("Expected finite `logits`, but got NaN or infinity.")
    return z, read_labels(labels, z.shape[1])


def read_predictions(
    predictions: Any, labels: Labels, values: RankNumbers | None, rule: str, num_ranks: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted values (N,), rank indices (N,) and the value of each rank (K,).

    Args:
        predictions: logits (..., K), decoded by `rule`, or values (...).
        labels: (...) rank indices.
        values: (K,) of the ranks; default their indices.
        rule: of `decode`.
        num_ranks: K, where neither logits nor values tell; default up to the highest label.

    Raises:
        ValueError, TypeError: as `read_logits`; values that do not increase.
    """
    check_rule(rule)
    check_same_categories(predictions, labels)
    if is_categorical(predictions) and values is not None:
        raise TypeError("Expected `predictions` in the units of `values`, but got categories; leave `values` out.")
    given = label_tensor(predictions, "predictions") if is_categorical(predictions) else predictions
    given = _numbers(given, "predictions")
    numbers = None if values is None else rank_tensor(values, "values").detach().cpu().double()
    if numbers is not None and (numbers.dim() != 1 or len(numbers) < 2 or not bool((numbers.diff() > 0).all())):
        raise ValueError(f"Expected increasing `values`, one for each rank, but got {numbers.tolist()}.")
    if num_ranks is not None and (
        not hasattr(num_ranks, "__index__") or (numbers is not None and num_ranks != len(numbers))
    ):
        raise ValueError(f"Expected `num_ranks` to be the number of ranks, as of `values`, but got {num_ranks!r}.")
    shape = tuple(label_tensor(labels).shape)
    if tuple(given.shape) == shape:
        rows = len(shape) > 1 and _one_hot(label_tensor(labels))
        if rows and (bool((given != given.round()).any()) or _one_hot(given)):
            raise ValueError("Expected `labels` (...) as rank indices, but got one-hot rows; pass labels.argmax(-1).")
        ranks = read_labels(labels, num_ranks if numbers is None else len(numbers))
        if numbers is None:
            numbers = _indices(num_ranks or int(ranks.max()) + 1)
        given = given.reshape(-1)
        if not bool(given.isfinite().all()):
            raise ValueError(
                f"Expected finite `predictions`, but {int((~given.isfinite()).sum())} are NaN or infinite."
            )
        return given, ranks, numbers
    if tuple(given.shape[:-1]) != shape:
        raise ValueError(
            f"Expected `predictions` to be logits (..., K) or values (...) for labels (...), but got "
            f"{tuple(given.shape)} for labels of shape {shape}."
        )
    z, ranks = read_logits(given, labels)
    if num_ranks not in (None, z.shape[1]):
        raise ValueError(f"Expected `num_ranks` to be {z.shape[1]}, as the logits have, but got {num_ranks}.")
    numbers = _indices(z.shape[1]) if numbers is None else numbers
    return decode(z, rule, numbers), ranks, numbers


def mean_by_rank(numbers: Tensor, ranks: Tensor, num_ranks: int) -> Tensor:
    """(K,) means of numbers (N,) over the samples of each rank (N,); NaN where there are none."""
    sums = numbers.new_zeros(num_ranks, dtype=torch.float64).index_add_(0, ranks, numbers.double())
    return sums / torch.bincount(ranks, minlength=num_ranks)


def _indices(num_ranks: int) -> Tensor:
    return torch.arange(num_ranks, dtype=torch.float64, device="cpu")


def _one_hot(labels: Tensor) -> bool:
    return bool(((labels == 0) | (labels == 1)).all() & (labels.sum(dim=-1) == 1).all())


def _numbers(data: Any, argument: str) -> Tensor:
    tensor = number_tensor(data, argument, torch.float64).detach().cpu()
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"Expected `{argument}` to be numbers, but got {tensor.dtype}.")
    return tensor.double()
