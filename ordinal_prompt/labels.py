"""Labels as people have them: values or names instead of rank indices, ranges, and soft labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ordinal_prompt.arrays import RankNumbers, number_tensor, rank_tensor

MAX_LISTED = 10
SOFT_LABELS = ("beta", "binomial", "exponential", "poisson", "triangular")


def rank_indices(values: Any, rank_values: RankNumbers | Sequence[str], nearest: bool = False) -> Tensor:
    """Rank indices, in 0…K-1, of labels that are values (stars, years, half points) or names.

    Args:
        values: numbers or names of any shape, as a tensor, an array, a pandas Series or a list.
        rank_values: the K values of the ranks, increasing, or their K names.
        nearest: take the rank whose value is nearest, of two equally near the lower; by default values must be those of
            ranks, up to the rounding of float32.

    Returns:
        int64 indices of the same shape; on the device of `values`, where that is a tensor.

    Raises:
        ValueError: values that no rank has, or that are missing; they are listed.
        TypeError: values that are neither numbers nor names.

    >>> rank_indices([1.0, 3.5, 5.0], [1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5])
    tensor([0, 5, 8])
    >>> rank_indices(["good", "bad"], ["bad", "fair", "good"])
    tensor([2, 0])
    >>> rank_indices([1931, 1938], [1930, 1940], nearest=True)
    tensor([0, 1])
    """
    if all_strings(rank_values):
        return _indices_of_names(values, [*rank_values])
    known = rank_tensor(rank_values, "rank_values").double()
    given = number_tensor(values, "values").double()
    known = known.to(given.device)
    if known.dim() != 1 or len(known) < 2 or not bool((known.diff() > 0).all()):
        raise ValueError(f"Expected increasing `rank_values`, one for each rank, but got {known.tolist()}.")
    indices = torch.bucketize(given, (known[1:] + known[:-1]) / 2)
    misses = ~given.isfinite()
    if not nearest:
        least = torch.minimum(known.diff().min() / 4, known.abs().max() * 1e-6)
        misses |= (given - known[indices]).abs() > least
    if bool(misses.any()):
        found = given[misses].unique()
        more = ", …" if len(found) > MAX_LISTED else ""
        raise ValueError(
            f"Expected values of ranks, {known[0]:g} to {known[-1]:g}, but got "
            f"{', '.join(f'{value:g}' for value in found[:MAX_LISTED].tolist())}{more} ({int(misses.sum())} of "
            f"{given.numel()} labels fit no rank); drop or mend them"
            f"{'' if nearest else ', or pass nearest=True for the nearest rank'}."
        )
    return indices


def soft_labels(indices: Any, num_ranks: int, kind: str = "triangular", **options: Any) -> Tensor:
    """Rank indices as distributions over the ranks, by the families of dlordinal (Vargas et al., 2023).

    Args:
        indices: (N,) in 0…K-1.
        num_ranks: K.
        kind: `"beta"`, `"binomial"`, `"exponential"`, `"poisson"` or `"triangular"`.
        options: of dlordinal's function for this family, as `alpha2` of `get_triangular_soft_labels`.

    Returns:
        (N, K) float32 distributions, for `OrdinalPromptLoss`.

    Raises:
        ValueError: unknown family, indices outside the ranks.
        ImportError: dlordinal is not installed.
    """
    if num_ranks < 2:
        raise ValueError(f"Expected `num_ranks` to be at least 2, but got {num_ranks}.")
    if kind not in SOFT_LABELS:
        raise ValueError(f"Expected `kind` to be one of {SOFT_LABELS}, but got {kind!r}.")
    try:
        from dlordinal import soft_labelling
    except ImportError as error:
        raise ImportError("Soft labels need dlordinal; pip install 'ordinal_prompt[labels]'.") from error
    chosen = number_tensor(indices, "indices")
    if chosen.is_floating_point() or (chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < num_ranks):
        raise ValueError(f"Expected rank indices in 0…{num_ranks - 1}, but got {chosen.tolist()[:MAX_LISTED]}.")
    table = getattr(soft_labelling, f"get_{kind}_soft_labels")(num_ranks, **options)
    return torch.as_tensor(table, dtype=torch.float32, device=chosen.device)[chosen.long()]


def all_strings(values: Any) -> bool:
    """Whether labels are names, in an array, a Series or a list."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return isinstance(values, Sequence) and len(values) > 0 and all(isinstance(value, str) for value in values)


def _indices_of_names(values: Any, names: Sequence[str]) -> Tensor:
    given = values.tolist() if hasattr(values, "tolist") else [*values]
    index = {name: rank for rank, name in enumerate(names)}
    unknown = {repr(name): None for name in given if name not in index}
    if unknown:
        shown = ", ".join([*unknown][:MAX_LISTED]) + (", …" if len(unknown) > MAX_LISTED else "")
        raise ValueError(f"Expected names of ranks, {', '.join(map(repr, names))}, but got {shown}.")
    return torch.tensor([index[name] for name in given], dtype=torch.long)
