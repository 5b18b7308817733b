"""What the head's arguments must be; each mistake is answered with the way out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ordinal_prompt.interpolation import INTERPOLATIONS
from ordinal_prompt.prompt import RANK_POSITIONS

DEFAULT_BASE_RANKS = 3
MAX_FACTOR = 1e4


def check_ranks(ranks: int | Sequence[str]) -> tuple[str, ...] | None:
    if isinstance(ranks, bool) or not isinstance(ranks, (int, Sequence)) or isinstance(ranks, str):
        raise TypeError(f"Expected `ranks` to be a number of ranks or a list of their names, but got {ranks!r}.")
    num_ranks = ranks if isinstance(ranks, int) else len(ranks)
    if num_ranks < 2:
        raise ValueError(f"Expected at least 2 ranks, but got {num_ranks}.")
    return None if isinstance(ranks, int) else check_names(ranks, "ranks")


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
    return tuple(names)


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
    if not bool((values.diff() > 0).all()):
        raise ValueError(
            f"Expected strictly increasing `rank_values`, but got {values.tolist()}; sort the ranks by value."
        )
    return values


def check_prompt_options(context: int | str, rank_position: str, interpolation: str | None) -> None:
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
    elif isinstance(context, bool) or not isinstance(context, int):
        raise TypeError(f"Expected `context` to be a number of tokens or a text, but got {context!r}.")
    elif context < 0:
        raise ValueError(f"Expected `context` to be at least 0 tokens, but got {context}.")


def check_base_ranks(number: int, names: tuple[str, ...] | None, num_ranks: int, interpolation: str | None) -> int:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"Expected `num_base_ranks` to be an integer, but got {number!r}.")
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


def check_tokens_per_rank(tokens: int | Sequence[int], num_ranks: int, interpolation: str | None) -> None:
    counts = [tokens] if isinstance(tokens, int) else list(tokens)
    if not all(isinstance(count, int) and not isinstance(count, bool) and count >= 1 for count in counts):
        raise ValueError(f"Expected `tokens_per_rank` to be positive integers, but got {tokens!r}.")
    if isinstance(tokens, int):
        return
    if interpolation is not None:
        raise ValueError(
            "A count per rank in `tokens_per_rank` needs interpolation=None; interpolated ranks share one."
        )
    if len(counts) != num_ranks:
        raise ValueError(
            f"Expected {num_ranks} counts in `tokens_per_rank` for {num_ranks} ranks, but got {len(counts)}."
        )


def check_size(size: int | None, argument: str) -> None:
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"Expected `{argument}` to be a positive integer, but got {size!r}.")


def check_log_scale(log_scale: float | None) -> None:
    if log_scale is not None and not abs(log_scale) <= math.log(MAX_FACTOR):
        raise ValueError(
            f"Expected `logit_scale` to be the log of the factor on the cosines, but got {log_scale}; for a factor of "
            "100 pass math.log(100)."
        )


def check_alignment(alignment: float) -> None:
    if not 0 <= alignment < math.inf:
        raise ValueError(f"Expected `alignment` to be finite and not negative, but got {alignment}.")
