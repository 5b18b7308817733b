"""What the head's arguments must be; each mistake is answered with the way out."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ordinal_prompt.interpolation import INTERPOLATIONS
from ordinal_prompt.prompt import RANK_POSITIONS

DEFAULT_BASE_RANKS = 3
MAX_FACTOR = 1e4


def check_ranks(ranks: object) -> tuple[tuple[str, ...] | None, int]:
    """Names of the ranks, if any, and their number."""
    if isinstance(ranks, (list, tuple)) or (hasattr(ranks, "tolist") and getattr(ranks, "ndim", 0) == 1):
        names = [*ranks]  # type: ignore[misc]  # arrays iterate
        if len(names) < 2:
            raise ValueError(f"Expected at least 2 ranks, but got {len(names)}.")
        return check_names(names, "ranks"), len(names)
    if isinstance(ranks, bool) or not hasattr(ranks, "__index__"):
        raise TypeError(f"Expected `ranks` to be a number of ranks or a list of their names, but got {ranks!r}.")
    num_ranks = operator.index(ranks)
    if num_ranks < 2:
        raise ValueError(f"Expected at least 2 ranks, but got {num_ranks}.")
    return None, num_ranks


def check_names(names: Sequence[str], argument: str) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"Expected `{argument}` to be a list of names, but got {names!r}.")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"Expected `{argument}` to hold strings, but got {name!r} ({type(name).__name__}).")
        if not name.strip():
            raise ValueError(f"Expected every name in `{argument}` to have a word, but got {name!r}.")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(
            f"Expected distinct names in `{argument}`, but got {', '.join(map(repr, twice))} more than once."
        )
    return tuple(map(str, names))


def check_rank_values(values: Sequence[float] | Tensor | None, num_ranks: int) -> Tensor:
    if values is None:
        return torch.arange(num_ranks, dtype=torch.float64)
    values = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if values.shape != (num_ranks,):
        raise ValueError(
            f"Expected {num_ranks} `rank_values` for {num_ranks} ranks, but got shape {tuple(values.shape)}."
        )
    if not bool(values.isfinite().all()):
        raise ValueError("Expected finite `rank_values`, but got NaN or infinity.")
    if bool((values.diff() > 0).all()) and not bool((values.float().diff() > 0).all()):
        raise ValueError("Expected `rank_values` that float32 tells apart; subtract their mean, or use a larger unit.")
    if not bool((values.diff() > 0).all()):
        raise ValueError(
            f"Expected strictly increasing `rank_values`, but got {values.tolist()}; sort the ranks by value."
        )
    return values


def check_prompt_options(context: int | str, rank_position: str, interpolation: str | None) -> int | str:
    """The context, as an integer or a text."""
    if interpolation is not None and interpolation not in INTERPOLATIONS:
        raise ValueError(f"Expected `interpolation` to be one of {INTERPOLATIONS} or None, but got {interpolation!r}.")
    if rank_position not in RANK_POSITIONS:
        raise ValueError(f"Expected `rank_position` to be one of {RANK_POSITIONS}, but got {rank_position!r}.")
    if isinstance(context, str):
        places = context.count("{}")
        if places > 1:
            raise ValueError(
                f"Expected at most one {{}} in `context`, the rank's place, but got {places}: {context!r}."
            )
        if places and rank_position != "tail":
            raise ValueError(
                f"The {{}} in `context` marks the rank's place already, but rank_position={rank_position!r} was given; "
                "leave one of them away."
            )
        return context
    if not hasattr(context, "__index__") or isinstance(context, bool):
        raise TypeError(f"Expected `context` to be a number of tokens or a text, but got {context!r}.")
    return check_integer(context, "context", least=0)


def check_base_ranks(number: int, names: tuple[str, ...] | None, num_ranks: int, interpolation: str | None) -> int:
    number = check_integer(number, "num_base_ranks", least=-math.inf)
    if interpolation is None and names is None:
        return num_ranks
    if names is not None:
        if interpolation is None:
            raise ValueError(
                "`base_rank_names` need interpolated ranks, but interpolation=None was given; pass `ranks`."
            )
        if number not in (DEFAULT_BASE_RANKS, len(names)):
            raise ValueError(f"Expected {number} `base_rank_names` for num_base_ranks={number}, but got {len(names)}.")
        number = len(names)
    elif number == DEFAULT_BASE_RANKS:
        number = min(number, num_ranks)
    if not 1 <= number <= num_ranks:
        raise ValueError(f"Expected 1 to {num_ranks} base ranks for {num_ranks} ranks, but got {number}.")
    return number


def check_tokens_per_rank(tokens: object, num_ranks: int, interpolation: str | None) -> int | tuple[int, ...]:
    """Tokens per rank: one number, or without interpolation one for each rank."""
    if hasattr(tokens, "__index__") or not isinstance(tokens, Iterable):
        return check_integer(tokens, "tokens_per_rank", least=1)
    counts = tuple(check_integer(count, "tokens_per_rank", least=1) for count in tokens)
    if interpolation is not None:
        raise ValueError("Counts per rank in `tokens_per_rank` need interpolation=None; interpolated ranks share one.")
    if len(counts) != num_ranks:
        raise ValueError(
            f"Expected {num_ranks} counts in `tokens_per_rank` for {num_ranks} ranks, but got {len(counts)}."
        )
    return counts


def check_integer(value: object, argument: str, least: float) -> int:
    """An integer, of Python, NumPy or torch, of at least `least`."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # refused below
    except TypeError:
        raise TypeError(f"Expected `{argument}` to be an integer, but got {value!r}.") from None
    if isinstance(value, bool):
        raise TypeError(f"Expected `{argument}` to be an integer, but got {value!r}.")
    if number < least:
        raise ValueError(f"Expected `{argument}` to be at least {least}, but got {number}.")
    return number


def check_log_scale(log_scale: float | None) -> None:
    if log_scale is not None and not abs(log_scale) <= math.log(MAX_FACTOR):
        raise ValueError(
            f"Expected `logit_scale` to be the log of the factor on the cosines, but got {log_scale}; for a factor of "
            "100 pass math.log(100)."
        )


def check_factor(value: float, argument: str, positive: bool = False) -> float:
    """A factor of at least zero (or above), up to `MAX_FACTOR`."""
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"Expected `{argument}` to be a number, but got {value!r}.")
    if not (0 <= value <= MAX_FACTOR) or (positive and value == 0):
        bound = "above 0" if positive else "from 0"
        raise ValueError(f"Expected `{argument}` to be {bound} to {MAX_FACTOR:g}, but got {value}.")
    return float(value)
