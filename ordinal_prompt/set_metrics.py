"""How often sets of ranks hold the true one, and how wide they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ordinal_prompt.arrays import Labels, label_tensor
from ordinal_prompt.samples import mean_by_rank, read_labels


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
    inside, ranks = _inside(first, last, labels, num_ranks)
    return mean_by_rank(inside, ranks, int(ranks.max()) + 1 if num_ranks is None else num_ranks)


def mean_width(first: Any, last: Any) -> float:
    """Mean number of ranks in sets from `first` to `last` (...).

    >>> mean_width([0, 1, 2], [1, 1, 4])
    2.0
    """
    low, high = _bounds(first, last)
    return float((high - low + 1).double().mean())


def _inside(first: Any, last: Any, labels: Labels, num_ranks: int | None = None) -> tuple[Tensor, Tensor]:
    """Whether each set holds the true rank (N,), and that rank (N,)."""
    low, high = _bounds(first, last, labels)
    ranks = read_labels(labels, num_ranks)
    return ((low <= ranks) & (ranks <= high)).double(), ranks


def _bounds(first: Any, last: Any, labels: Any = None) -> tuple[Tensor, Tensor]:
    given = {"first": first, "last": last, **({} if labels is None else {"labels": labels})}
    shapes = [tuple(label_tensor(part, name).shape) for name, part in given.items()]
    if len({*shapes}) > 1:
        raise ValueError(
            "Expected `first` and `last` of each set, and the labels, to have one shape, but got "
            f"{' and '.join(map(str, shapes))}."
        )
    low, high = read_labels(first, argument="first"), read_labels(last, argument="last")
    if bool((low > high).any()):
        raise ValueError(
            "Expected the first and the last rank of each set, none empty, but some end before they start."
        )
    return low, high
