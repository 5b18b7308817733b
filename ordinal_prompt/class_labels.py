"""The labels of a scikit-learn classifier: which there are, in which order, and their indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor

from ordinal_prompt.labels import rank_indices

Array = Any  # NumPy's arrays of any type


def ordered_labels(y: Array, ranks: Any, rank_names: Sequence[str] | None, ordered: Any) -> Array:
    """(K,) the labels in order: `ranks`, ordered categories, indices of `rank_names`, or as labels (N,) sort.

    Raises:
        ValueError: words without `ranks`, fewer than two labels, one of them twice.
        TypeError: `ranks` or `rank_names` without an order.
    """
    if rank_names is not None and not _is_list(rank_names):
        raise TypeError(f"Expected `rank_names` to list the names, lowest rank first, but got {rank_names!r}.")
    if getattr(ranks, "ordered", True) is False:
        raise TypeError("Expected `ranks` in order, but got categories without one; list them, lowest first.")
    ranks = getattr(ranks, "categories", ranks)  # of a CategoricalDtype
    if ranks is None and ordered is not None:
        ranks = ordered
    if ranks is None and rank_names is not None:
        ranks = range(len(rank_names))
    if ranks is None:
        ranks = _sorted(np.asarray(y.tolist()) if y.dtype == object else y)
    elif not _is_list(ranks):
        raise TypeError(f"Expected `ranks` to list the labels, lowest first, but got {ranks!r}.")
    ranks = np.asarray(ranks)
    if len(ranks) < 2:
        raise ValueError(f"Classifier can't train when only one class is present: {ranks.tolist()}.")
    if len(np.unique(ranks)) < len(ranks):
        raise ValueError(f"Expected `ranks` to name each label once, but got {ranks.tolist()}.")
    return ranks


def label_indices(y: Array, classes: Array) -> Tensor:
    """(N,) indices of labels among the classes (K,).

    Raises:
        ValueError: labels that are none of the classes.
    """
    if classes.dtype.kind == "U" and np.asarray(y).dtype.kind in "biuf":
        raise ValueError(
            f"Expected labels among the names {classes.tolist()}, but got the numbers {np.unique(y)[:10]}; "
            "where scikit-learn encodes labels, give indices (op.rank_indices), and `rank_names`, not `ranks`."
        )
    try:
        return rank_indices(y, classes.tolist())
    except ValueError as error:  # which speaks of an option of rank_indices
        message = str(error).split(", or pass nearest=True")[0].rstrip(".")
        raise ValueError(f"{message}. The ranks are {classes.tolist()}.") from None


def _sorted(y: Array) -> Array:
    if y.dtype.kind not in "biuf":
        shown = sorted({*map(str, y)})[:10]
        raise ValueError(f"Expected `ranks`, the labels in order, for labels that are words: {shown}.")
    try:
        check_classification_targets(y)
    except ValueError as error:
        raise ValueError(f"{error} If labels are ordered, pass `ranks`: all of them, lowest first.") from None
    return np.unique(y)


def _is_list(items: Any) -> bool:
    """Whether items have an order."""
    return hasattr(items, "__len__") and not isinstance(items, (str, Set, Mapping))
