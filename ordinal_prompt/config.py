"""The options of a head: each one once, with its rule and the way out of a mistake."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ordinal_prompt.interpolation import INTERPOLATIONS

RANK_POSITIONS = ("tail", "front", "middle")
DEFAULT_BASE_RANKS = 3
MAX_FACTOR = 1e4


@dataclass(frozen=True)
class HeadConfig:
    """The options of `OrdinalPromptHead`, which says what they mean; here they are checked and brought to plain types.

    Raises:
        ValueError, TypeError: an option that does not fit, saying what was given and what fits.

    >>> config = HeadConfig(ranks=["bad", "fair", "good"], rank_values=[1, 2, 4])
    >>> config.num_ranks, config.rank_values, config.num_base_ranks
    (3, (1.0, 2.0, 4.0), 3)
    >>> HeadConfig.from_dict(config.to_dict()) == config
    True
    """

    ranks: int | Sequence[str]
    rank_values: Sequence[float] | None = None
    context: int | str = 10
    rank_position: str = "tail"
    rank_specific_context: bool = False
    interpolation: str | None = "linear"
    num_base_ranks: int = DEFAULT_BASE_RANKS
    base_rank_names: Sequence[str] | None = None
    tokens_per_rank: int | Sequence[int] = 1
    in_features: int | None = None
    normalize: bool = True
    logit_scale: float | None = None
    learn_logit_scale: bool = False
    alignment: float = 0.0
    residual: float = 0.0
    confidence: float = 1.0
    learn_prompts: bool = True
    kl_weight: float = 1.0
    freeze_text_encoder: bool = True

    def __post_init__(self) -> None:
        num_ranks = self._set(ranks=_ranks(self.ranks)).num_ranks
        self._set(rank_values=_rank_values(self.rank_values, num_ranks))
        _one_of("rank_position", self.rank_position, RANK_POSITIONS)
        if self.interpolation is not None:
            _one_of("interpolation", self.interpolation, INTERPOLATIONS, " or None")
        self._set(context=_context(self.context, self.rank_position))
        if self.base_rank_names is not None:
            self._set(base_rank_names=_names(self.base_rank_names, "base_rank_names"))
        self._set(num_base_ranks=self._base_ranks())
        self._set(tokens_per_rank=self._tokens_per_rank())
        if self.in_features is not None:
            self._set(in_features=integer(self.in_features, "in_features", least=1))
        self._set(logit_scale=_log_scale(self.logit_scale))
        for name in ("alignment", "residual", "kl_weight"):
            self._set(**{name: _factor(getattr(self, name), name)})
        self._set(confidence=_factor(self.confidence, "confidence", positive=True))
        for field in fields(self):
            if isinstance(field.default, bool):
                self._set(**{field.name: _switch(getattr(self, field.name), field.name)})

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> HeadConfig:
        """The config in the arguments of a function that has them all, among others."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        """The options, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> HeadConfig:
        """The inverse of `to_dict`, also of what JSON makes of it.

        Raises:
            ValueError: options that this version does not know.
        """
        unknown = sorted(set(options) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(
                f"The config has options that this version does not know: {', '.join(unknown)}; update ordinal_prompt."
            )
        return cls(**options)

    @property
    def num_ranks(self) -> int:
        """K."""
        return self.ranks if isinstance(self.ranks, int) else len(self.ranks)

    @property
    def rank_names(self) -> tuple[str, ...] | None:
        """The K names of the ranks, where they have some."""
        return None if isinstance(self.ranks, int) else tuple(self.ranks)

    @property
    def values(self) -> tuple[float, ...]:
        """(K,) the value of each rank."""
        assert self.rank_values is not None  # set in __post_init__
        return tuple(self.rank_values)

    def changed(self) -> dict[str, Any]:
        """The options that are not left at their default, ranks and their default values aside."""
        given = {field.name: (getattr(self, field.name), field.default) for field in fields(self)[1:]}
        if self.values == tuple(range(self.num_ranks)):
            del given["rank_values"]
        if self.interpolation is None or self.num_base_ranks == min(DEFAULT_BASE_RANKS, self.num_ranks):
            del given["num_base_ranks"]
        return {name: value for name, (value, default) in given.items() if value != default}

    def _set(self, **values: Any) -> HeadConfig:
        for name, value in values.items():
            object.__setattr__(self, name, value)
        return self

    def _base_ranks(self) -> int:
        number, names = integer(self.num_base_ranks, "num_base_ranks", least=-math.inf), self.base_rank_names
        if self.interpolation is None and names is not None:
            raise ValueError(
                "`base_rank_names` need interpolated ranks, but interpolation=None was given; pass `ranks`."
            )
        if self.interpolation is None:
            return self.num_ranks
        if names is not None:
            if number not in (DEFAULT_BASE_RANKS, len(names)):
                raise ValueError(
                    f"Expected {number} `base_rank_names` for num_base_ranks={number}, but got {len(names)}."
                )
            number = len(names)
        elif number == DEFAULT_BASE_RANKS:
            number = min(number, self.num_ranks)
        if not 1 <= number <= self.num_ranks:
            raise ValueError(f"Expected 1 to {self.num_ranks} base ranks for {self.num_ranks} ranks, but got {number}.")
        return number

    def _tokens_per_rank(self) -> int | tuple[int, ...]:
        tokens = self.tokens_per_rank
        if hasattr(tokens, "__index__") or not isinstance(tokens, Iterable):
            return integer(tokens, "tokens_per_rank", least=1)
        counts = tuple(integer(count, "tokens_per_rank", least=1) for count in tokens)
        if self.interpolation is not None:
            raise ValueError(
                "Counts per rank in `tokens_per_rank` need interpolation=None; interpolated ranks share one."
            )
        if len(counts) != self.num_ranks:
            raise ValueError(
                f"Expected {self.num_ranks} counts in `tokens_per_rank` for {self.num_ranks} ranks, but got "
                f"{len(counts)}."
            )
        return counts


def integer(value: object, option: str, least: float) -> int:
    """An integer, of Python, NumPy or torch, of at least `least`."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # refused below
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"Expected `{option}` to be an integer, but got {value!r}.")
    if number < least:
        raise ValueError(f"Expected `{option}` to be at least {least}, but got {number}.")
    return number


def _ranks(ranks: object) -> int | tuple[str, ...]:
    """The number of ranks, or their names."""
    if hasattr(ranks, "tolist") and getattr(ranks, "ndim", 0) == 1:  # arrays and Series
        ranks = ranks.tolist()
    if isinstance(ranks, (list, tuple)):
        if len(ranks) < 2:
            raise ValueError(f"Expected at least 2 ranks, but got {len(ranks)}.")
        return _names(ranks, "ranks")
    if isinstance(ranks, bool) or not hasattr(ranks, "__index__"):
        raise TypeError(f"Expected `ranks` to be a number of ranks or a list of their names, but got {ranks!r}.")
    number = operator.index(ranks)
    if number < 2:
        raise ValueError(f"Expected at least 2 ranks, but got {number}.")
    return number


def _names(names: Any, option: str) -> tuple[str, ...]:
    if hasattr(names, "tolist"):
        names = names.tolist()
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"Expected `{option}` to be a list of names, but got {names!r}.")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"Expected `{option}` to hold strings, but got {name!r} ({type(name).__name__}); for ranks that are "
                "numbers pass how many there are, and their `rank_values`."
            )
        if not name.strip():
            raise ValueError(f"Expected every name in `{option}` to have a word, but got {name!r}.")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(
            f"Expected distinct names in `{option}`, but got {', '.join(map(repr, twice))} more than once."
        )
    return tuple(map(str, names))


def _rank_values(values: Any, num_ranks: int) -> tuple[float, ...]:
    if values is None:
        return tuple(map(float, range(num_ranks)))
    values = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
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
    if not bool((values.float().diff() > 0).all()):
        raise ValueError("Expected `rank_values` that float32 tells apart; subtract their mean, or use a larger unit.")
    return tuple(values.tolist())


def _context(context: object, rank_position: str) -> int | str:
    if not isinstance(context, str):
        if not hasattr(context, "__index__") or isinstance(context, bool):
            raise TypeError(f"Expected `context` to be a number of tokens or a text, but got {context!r}.")
        return integer(context, "context", least=0)
    places = context.count("{}")
    if places > 1:
        raise ValueError(f"Expected at most one {{}} in `context`, the rank's place, but got {places}: {context!r}.")
    if places and rank_position != "tail":
        raise ValueError(
            f"The {{}} in `context` marks the rank's place already, but rank_position={rank_position!r} was given; "
            "leave one of them out."
        )
    return context


def _one_of(option: str, value: object, choices: Sequence[str], more: str = "") -> None:
    if value not in choices:
        raise ValueError(f"Expected `{option}` to be one of {choices}{more}, but got {value!r}.")


def _log_scale(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"Expected `logit_scale` to be a number, but got {value!r}.")
    if not abs(float(value)) <= math.log(MAX_FACTOR):
        raise ValueError(
            f"Expected `logit_scale` to be the log of the factor on the cosines, but got {value}; for a factor of "
            "100 pass math.log(100)."
        )
    return float(value)


def _factor(value: Any, option: str, positive: bool = False) -> float:
    """A factor from zero (or above) to `MAX_FACTOR`."""
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"Expected `{option}` to be a number, but got {value!r}.")
    if not 0 <= float(value) <= MAX_FACTOR or (positive and value == 0):
        bound = "above 0" if positive else "from 0"
        raise ValueError(f"Expected `{option}` to be {bound} to {MAX_FACTOR:g}, but got {value}.")
    return float(value)


def _switch(value: Any, option: str) -> bool:
    if isinstance(value, Tensor) or value not in (True, False):
        raise TypeError(f"Expected `{option}` to be True or False, but got {value!r}.")
    return bool(value)
