"""What users hold labels and numbers in: tensors, lists, NumPy arrays, pandas Series.  None of them is imported."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ordinal_prompt.cache import traced

MAX_LISTED = 10

Labels: TypeAlias = "Tensor | Sequence[int] | Any"  # Any: an array or a Series, which the core does not import
# What NumPy's numbers become on their way to torch, by kind and size; all others go through Python's.
NUMBERS = {"f2": "f4", "f4": "f4", "f8": "f8", "b1": "?"}
NUMBERS |= dict.fromkeys(("i1", "i2", "i4", "i8", "u1", "u2", "u4"), "i8")
RankNumbers: TypeAlias = "Tensor | Sequence[float] | Mapping[int, float] | Any"


def label_tensor(labels: Labels, argument: str = "labels", num_ranks: int | None = None) -> Tensor:
    """Integer labels as int64, in the order given; an index plays no part.

    A tensor stays on its device.  Ordered categories of pandas become their codes.

    Args:
        num_ranks: K, where it is known.

    Raises:
        TypeError: labels that are not integers, categories without an order.
        ValueError: missing labels, categories of another number than ranks.
    """
    if is_categorical(labels):
        categories: Any = getattr(labels, "cat", labels)  # of a pandas Series; a Categorical has the attributes itself
        if not categories.ordered:
            raise TypeError(
                f"Expected `{argument}` to be integers or ordered categories, but got categories without an order; "
                "order them with pandas.CategoricalDtype(names, ordered=True)."
            )
        if num_ranks not in (None, len(categories.categories)):
            raise ValueError(
                f"Expected `{argument}` of {num_ranks} ordered categories, one for each rank, but got "
                f"{len(categories.categories)}; declare all of them, pandas.CategoricalDtype(names, ordered=True)."
            )
        labels = categories.codes
        if (labels < 0).any():
            raise ValueError(f"Expected a label in every place of `{argument}`, but some are missing; drop those rows.")
    tensor = _tensor(labels, argument)
    if tensor.is_floating_point() and bool(tensor.isnan().any()):
        raise ValueError(
            f"Expected a label in every place of `{argument}`, but got NaN for {int(tensor.isnan().sum())} of "
            f"{tensor.numel()}; drop those rows, then convert the rest to integers."
        )
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        whole = tensor.is_floating_point() and bool((tensor == tensor.round()).all())
        hint = " that are whole numbers (pandas makes them so where values were missing)" if whole else ""
        way = "convert them to int" if whole else "map values to rank indices with op.rank_indices"
        if tensor.dim() > 1 and not whole:
            way = "of several votes, give one row for each, with sample_weight, or pass the rank that most chose"
        raise TypeError(f"Expected `{argument}` to be integers, but got {tensor.dtype}{hint}; {way}.")
    return tensor.long()


def is_categorical(data: Any) -> bool:
    """Whether data are categories of pandas."""
    categories: Any = getattr(data, "cat", data)
    return hasattr(categories, "codes") and hasattr(categories, "ordered")


def check_same_categories(*several: Any) -> None:
    """Raises ValueError for categories that differ, whose codes mean different ranks."""
    found = [[*getattr(data, "cat", data).categories] for data in several if is_categorical(data)]
    if any(other != found[0] for other in found):
        raise ValueError(
            f"Expected the same ordered categories everywhere, but got {' and '.join(map(str, found))}; declare all "
            "ranks in all of them, pandas.CategoricalDtype(names, ordered=True)."
        )


def is_number(value: Any) -> bool:
    """Whether this is one number, of Python, NumPy or torch."""
    return hasattr(value, "__float__") and not getattr(value, "shape", ())


def widest_float(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def rank_tensor(numbers: RankNumbers, argument: str) -> Tensor:
    """One number for each rank, (K,); float64 unless a tensor was given, which is returned as it is.

    A mapping and a pandas Series give the numbers by rank, 0…K-1, in any order; all others give them in rank order.

    Raises:
        TypeError: what is no number.
        ValueError: missing numbers; keys or an index other than the ranks 0…K-1.
    """
    if isinstance(numbers, Tensor):
        return numbers
    ranks: list[Any] | None = None
    if isinstance(numbers, Mapping):
        ranks, numbers = list(numbers), list(numbers.values())
    elif hasattr(numbers, "to_numpy") and not callable(index := getattr(numbers, "index", len)):
        ranks = index.tolist()
    tensor = _tensor(numbers, argument, torch.float64)
    if not torch.compiler.is_compiling() and bool(tensor.isnan().any()):
        raise ValueError(
            f"Expected a number for each rank in `{argument}`, but got NaN for {int(tensor.isnan().sum())}."
        )
    if ranks is None:
        return tensor
    if len(set(ranks)) != len(ranks) or set(ranks) != set(range(len(ranks))):
        shown = ", ".join(map(repr, ranks[:10])) + (", …" if len(ranks) > 10 else "")
        raise ValueError(
            f"Expected `{argument}` for the ranks 0…{len(ranks) - 1}, but got the index {shown}; pass a dictionary "
            "{rank: number} for all ranks, or a list in rank order."
        )
    return tensor[torch.tensor(ranks, device=tensor.device).argsort()] if ranks else tensor


def number_tensor(numbers: Any, argument: str, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of any kind and shape, in the order given; an index plays no part.

    Of a tensor given its own precision and device; of anything else `dtype`, by default torch's, on the CPU.

    Raises:
        TypeError: what is no number.
    """
    return _tensor(numbers, argument, dtype)


def _tensor(data: Any, argument: str, dtype: torch.dtype | None = None) -> Tensor:
    if isinstance(data, Tensor):
        return data
    if hasattr(data, "to_numpy"):
        data = data.to_numpy()
    kind: Any = getattr(data, "dtype", None)
    if getattr(kind, "kind", "") in ("M", "m"):  # as plain integers they would be nanoseconds
        raise TypeError(f"Expected `{argument}` to be numbers, but got {kind}.")
    if hasattr(data, "astype") and _is_native(data):
        native = torch.from_numpy(data.astype(NUMBERS[kind.str[1:]], order="C"))  # a copy, which may be written to
        return native.to(dtype or (torch.get_default_dtype() if kind.kind == "f" else native.dtype))
    if hasattr(data, "tolist"):
        data = data.tolist()
    elif isinstance(data, Sequence) and not isinstance(data, str):
        data = list(data)
    try:
        return torch.as_tensor(data, dtype=dtype, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        kinds = sorted({type(item).__name__ for item in data}) if isinstance(data, list) else [type(data).__name__]
        hint = f" ({error})"
        if "NAType" in kinds:
            hint = "; drop what is missing"
        elif "str" in kinds:
            hint = "; names become indices with op.rank_indices(names, ranks), and text numbers with float"
        elif isinstance(data, Mapping):
            hint = "; pass the numbers of one key at a time"
        raise TypeError(f"Expected `{argument}` to be numbers, but got {', '.join(kinds)}{hint}.") from None


def warn_of_probabilities(logits: Tensor, stacklevel: int = 4) -> None:
    """Warns where all rows (..., K) are those of probabilities, of which the logarithm is meant."""
    if traced() or logits.is_meta or not logits.numel():
        return
    z = logits.detach()
    # In half precision, and written with two digits, they do not quite sum to one.
    digits = 0.005 if z.numel() >= 8 * z.shape[-1] else 1e-3 / z.shape[-1]
    rounding = z.shape[-1] * max(digits, torch.finfo(z.dtype).eps if z.is_floating_point() else 0.0)
    like = (
        ((z >= 0) & (z <= 1)).all() & ((z.float().sum(dim=-1) - 1).abs() < rounding).all() & ((z > 0) & (z < 1)).any()
    )
    if bool(like):
        warnings.warn(
            "Expected logits, but got rows of numbers in 0…1 that sum to one: probabilities? Pass their logarithm, or "
            "what the model gives before its softmax.",
            stacklevel=stacklevel,
        )


def _is_native(data: Any) -> bool:
    """Whether this is an array of NumPy, of numbers that torch has."""
    kind = type(data)
    return kind.__module__ == "numpy" and kind.__name__ in ("ndarray", "memmap") and data.dtype.str[1:] in NUMBERS


def listed(items: Iterable[Any]) -> str:
    """The first of some items, for an error."""
    shown = [f"{item:.10g}" if isinstance(item, float) else repr(item) for item in items]
    return ", ".join(shown[:MAX_LISTED]) + (", …" if len(shown) > MAX_LISTED else "")
