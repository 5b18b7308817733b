"""Labels as people have them: values or names instead of rank indices, ranges, and soft labels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ordinal_prompt.arrays import RankNumbers, label_tensor, listed, number_tensor, rank_tensor, widest_float
from ordinal_prompt.cache import traced

SOFT_LABELS = ("beta", "binomial", "exponential", "poisson", "triangular")


def rank_indices(values: Any, rank_values: RankNumbers | Sequence[str], nearest: bool = False) -> Tensor:
    """Rank indices, in 0…K-1, of labels that are values (stars, years, half points) or names.

    Args:
        values: numbers or names of any shape, as a tensor, an array, a pandas Series or a list.
        rank_values: the K values of the ranks, increasing, or their K names.
        nearest: take the rank whose value is nearest, of two equally near the lower; by default values must be those of
            ranks, up to a few roundings of float32, or of a tensor's own precision where that is lower.

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
    given = number_tensor(values, "values", torch.float64)
    rounding = max(torch.finfo(torch.float32).eps, torch.finfo(given.dtype).eps if given.is_floating_point() else 0.0)
    wide = widest_float(given.device)
    given, known = given.to(wide), rank_tensor(rank_values, "rank_values").to(wide).to(given.device)
    unseen = traced()
    if known.dim() != 1 or len(known) < 2 or not (unseen or bool((known.diff() > 0).all() & known.isfinite().all())):
        raise ValueError(
            "Expected increasing `rank_values`, finite and at least two, one for each rank, but got "
            f"{listed(known.flatten().tolist())}."
        )
    indices = torch.bucketize(given, (known[1:] + known[:-1]) / 2)
    misses = ~given.isfinite()
    if not nearest:
        gaps = known.diff()
        gap = torch.minimum(torch.cat([gaps[:1], gaps]), torch.cat([gaps, gaps[-1:]]))[indices]
        size = torch.maximum(torch.maximum(given.abs(), known[indices].abs()), gap)
        misses |= (given - known[indices]).abs() > torch.minimum(gap / 4, 4 * rounding * size)
    if unseen:
        return torch.where(misses, len(known), indices)  # no rank, which raises where it is looked up
    if bool(misses.any()):
        missing = int(given.isnan().sum())
        if missing:
            raise ValueError(
                f"Expected values of ranks, but {missing} of {given.numel()} are missing (NaN); drop them, or pass "
                'ignore_index=float("nan") to a loss that takes values.'
            )
        raise ValueError(
            f"Expected values of ranks, {known[0]:.10g} to {known[-1]:.10g}, but got "
            f"{listed(given[misses].unique().tolist())} ({int(misses.sum())} of {given.numel()} labels fit no rank); "
            f"drop or mend them{'' if nearest else ', or pass nearest=True for the nearest rank'}."
        )
    return indices


def soft_labels(indices: Any, num_ranks: int, kind: str = "triangular", **options: Any) -> Tensor:
    """Rank indices as distributions over the ranks, by the families of dlordinal (Vargas et al., 2023).

    Args:
        indices: (N,) in 0…K-1, or ordered categories.
        num_ranks: K.
        kind: `"beta"`, `"binomial"`, `"exponential"`, `"poisson"` or `"triangular"`.
        options: of dlordinal's function for this family, as `alpha2` of `get_triangular_soft_labels`.

    Returns:
        (N, K) float32 distributions, for `OrdinalPromptLoss`.

    Raises:
        ValueError: unknown family, indices outside the ranks.
        ImportError: dlordinal is not installed.
    """
    if not hasattr(num_ranks, "__index__") or num_ranks < 2:
        raise ValueError(f"Expected `num_ranks` to be a whole number, at least 2, but got {num_ranks!r}.")
    if kind not in SOFT_LABELS:
        raise ValueError(f"Expected `kind` to be one of {SOFT_LABELS}, but got {kind!r}.")
    try:
        from dlordinal import soft_labelling
    except ImportError as error:
        raise ImportError("Soft labels need dlordinal; pip install 'ordinal_prompt[labels]'.") from error
    chosen = label_tensor(indices, "indices", int(num_ranks))
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < num_ranks:
        raise ValueError(f"Expected rank indices in 0…{num_ranks - 1}, but got {listed(chosen.unique().tolist())}.")
    try:
        made = getattr(soft_labelling, f"get_{kind}_soft_labels")(int(num_ranks), **options)
        table = torch.as_tensor(made, device="cpu")
    except ValueError as error:  # beta: parameters are tabulated for 3 to 14 ranks
        told = f"dlordinal has no {kind} soft labels for {num_ranks} ranks{f' and {options}' if options else ''}"
        raise ValueError(f"{told}; choose another kind, or other options ({error}).") from error
    if not bool(((table >= 0).all(dim=1) & ((table.sum(dim=1) - 1).abs() < 1e-3)).all()):
        raise ValueError(f"Expected options of {kind} soft labels that give distributions, but got {options}.")
    astray = int((table.argmax(dim=1) != torch.arange(num_ranks, device=table.device)).sum())
    if astray:
        warnings.warn(
            f"Of {num_ranks} ranks, {kind} soft labels give {astray} less than another rank; choose another kind.",
            stacklevel=2,
        )
    return table.to(chosen.device, torch.float32)[chosen]


def all_strings(values: Any) -> bool:
    """Whether labels are names, in an array, a Series or a list."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return isinstance(values, Sequence) and len(values) > 0 and all(isinstance(value, str) for value in values)


def any_string(values: Any) -> bool:
    """Whether labels hold a name, in an array, a DataFrame or lists of any depth."""
    plain = _plain(values)
    return isinstance(plain, str) or (isinstance(plain, Sequence) and any(map(any_string, plain)))


def _indices_of_names(values: Any, names: Sequence[str]) -> Tensor:
    if len(names) < 2 or len({*names}) < len(names):
        raise ValueError(f"Expected names of ranks, at least two and none twice, but got {listed(names)}.")
    plain, index = _plain(values), {name: rank for rank, name in enumerate(names)}
    if isinstance(plain, str) or not isinstance(plain, Sequence):
        raise TypeError(f"Expected `values` to be a list or an array of names, but got {plain!r}.")
    unknown: dict[Any, None] = {}

    def look_up(given: Any) -> Any:
        given = _plain(given)
        if isinstance(given, Sequence) and not isinstance(given, str):
            return [look_up(one) for one in given]
        if given not in index:
            unknown[given] = None
        return index.get(given)

    found = look_up(plain)
    if unknown:
        raise ValueError(f"Expected names of ranks, {listed(names)}, but got {listed(unknown)}.")
    return torch.tensor(found, dtype=torch.long, device="cpu")


def _plain(values: Any) -> Any:
    values = values.to_numpy() if hasattr(values, "to_numpy") else values
    return values.tolist() if hasattr(values, "tolist") else [*values] if isinstance(values, (tuple, range)) else values
