"""The options of a head: each one once, with its rule and the way out of a mistake."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from ordinal_prompt.arrays import rank_tensor
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
    >>> config.num_ranks, config.values
    (3, (1.0, 2.0, 4.0))
    >>> HeadConfig(**config.to_dict()) == config
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
        _one_of("rank_position", self.rank_position, RANK_POSITIONS)
        _one_of("interpolation", self.interpolation, (*INTERPOLATIONS, None))
        self._set("ranks", _ranks(self.ranks))
        self._set("rank_values", _values(self.rank_values, self.num_ranks))
        self._set("context", _context(self.context, self.rank_position))
        if self.base_rank_names is not None:
            self._set("base_rank_names", _names("base_rank_names", self.base_rank_names))
        self._set("num_base_ranks", self._base_ranks())
        self._set("tokens_per_rank", self._tokens_per_rank())
        if self.in_features is not None:
            self._set("in_features", _integer("in_features", self.in_features, least=1))
        if self.logit_scale is not None:
            self._set("logit_scale", _log_scale(self.logit_scale))
        for name in ("alignment", "residual", "kl_weight", "confidence"):
            self._set(name, _factor(name, getattr(self, name), positive=name == "confidence"))
        for field in fields(self):
            if isinstance(field.default, bool):
                self._set(field.name, _switch(field.name, getattr(self, field.name)))

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> HeadConfig:
        """The config in the arguments of a function that has all options among them."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        """The options, ready for JSON; `HeadConfig(**options)` is the inverse, also of what JSON makes of them."""
        return asdict(self)

    @property
    def num_ranks(self) -> int:
        """K."""
        return self.ranks if isinstance(self.ranks, int) else len(self.ranks)

    @property
    def rank_names(self) -> tuple[str, ...] | None:
        """The K names of the ranks, where they have some."""
        return None if isinstance(self.ranks, int) else tuple(self.ranks)

    @property
    def numerals(self) -> bool:
        """Whether the names are numbers, other ones than the values."""
        try:
            return self.rank_names is not None and tuple(map(float, self.rank_names)) != self.values
        except ValueError:
            return False

    @property
    def values(self) -> tuple[float, ...]:
        """(K,) the value of each rank."""
        return tuple(self.rank_values or ())

    def changed(self) -> dict[str, Any]:
        """The options that are not those of a head of these ranks without options."""
        plain = asdict(HeadConfig(self.ranks, interpolation=self.interpolation)) | {"interpolation": "linear"}
        return {name: value for name, value in asdict(self).items() if value != plain[name]}

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _base_ranks(self) -> int:
        number, names = _integer("num_base_ranks", self.num_base_ranks, least=-math.inf), self.base_rank_names
        if self.interpolation is None:
            _require(
                names is None,
                "`base_rank_names` need interpolated ranks, but interpolation=None was given; pass `ranks`.",
            )
            return self.num_ranks
        if names is not None:
            told = f"Expected {number} `base_rank_names` for num_base_ranks={number}, but got {len(names)}."
            _require(number in (DEFAULT_BASE_RANKS, len(names)), told)
            number = len(names)
        elif number == DEFAULT_BASE_RANKS:
            number = min(number, self.num_ranks)
        told = f"Expected 1 to {self.num_ranks} base ranks for {self.num_ranks} ranks, but got {number}."
        _require(1 <= number <= self.num_ranks, told)
        return number

    def _tokens_per_rank(self) -> int | tuple[int, ...]:
        tokens, ranks = self.tokens_per_rank, self.num_ranks
        if hasattr(tokens, "__index__") or not isinstance(tokens, Iterable):
            return _integer("tokens_per_rank", tokens, least=1)
        counts = tuple(_integer("tokens_per_rank", count, least=1) for count in tokens)
        told = "Counts per rank in `tokens_per_rank` need interpolation=None; interpolated ranks share one."
        _require(self.interpolation is None, told)
        told = f"Expected {ranks} counts in `tokens_per_rank` for {ranks} ranks, but got {len(counts)}."
        _require(len(counts) == ranks, told)
        return counts


def _require(fits: bool, told: str, error: type[Exception] = ValueError) -> None:
    if not fits:
        raise error(told)


def _one_of(name: str, value: Any, choices: Sequence[str | None]) -> None:
    words = tuple(choice for choice in choices if choice is not None)
    more = " or None" if None in choices else ""
    _require(value in choices, f"Expected `{name}` to be one of {words}{more}, but got {value!r}.")


def _integer(name: str, value: Any, least: float) -> int:
    """An integer, of Python, NumPy or torch, of at least `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"Expected `{name}` to be an integer, but got {value!r}.")
    _require(number >= least, f"Expected `{name}` to be at least {least}, but got {number}.")
    return number


def _number(name: str, value: Any) -> float:
    fits = not isinstance(value, (bool, str)) and hasattr(value, "__float__")
    _require(fits, f"Expected `{name}` to be a number, but got {value!r}.", TypeError)
    return float(value)


def _factor(name: str, value: Any, positive: bool) -> float:
    number, bound = _number(name, value), "above 0" if positive else "from 0"
    fits = 0 <= number <= MAX_FACTOR and not (positive and number == 0)
    _require(fits, f"Expected `{name}` to be {bound} to {MAX_FACTOR:g}, but got {value}.")
    return number


def _log_scale(value: Any) -> float:
    number = _number("logit_scale", value)
    told = f"Expected `logit_scale` to be the log of the factor on the cosines, but got {value}; for a factor of 100 "
    _require(abs(number) <= math.log(MAX_FACTOR), told + "pass math.log(100).")
    return number


def _switch(name: str, value: Any) -> bool:
    fits = isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")  # NumPy's
    _require(fits, f"Expected `{name}` to be True or False, but got {value!r}.", TypeError)
    return bool(value)


def _ranks(ranks: Any) -> int | tuple[str, ...]:
    """The number of ranks, or their names."""
    ranks = _listed(ranks)
    if isinstance(ranks, (list, tuple)):
        _require(len(ranks) >= 2, f"Expected at least 2 ranks, but got {len(ranks)}.")
        return _names("ranks", ranks)
    fits = hasattr(ranks, "__index__") and not isinstance(ranks, bool)
    _require(fits, f"Expected `ranks` to be a number of ranks or a list of their names, but got {ranks!r}.", TypeError)
    _require(operator.index(ranks) >= 2, f"Expected at least 2 ranks, but got {operator.index(ranks)}.")
    return operator.index(ranks)


def _names(option: str, names: Any) -> tuple[str, ...]:
    names = _listed(names)
    fits = isinstance(names, Sequence) and not isinstance(names, str)
    _require(fits, f"Expected `{option}` to be a list of names, but got {names!r}.", TypeError)
    for name in names:
        told = f"Expected `{option}` to hold strings, but got {name!r} ({type(name).__name__}); for numbers "
        _require(isinstance(name, str), told + "pass how many there are, and their `rank_values`.", TypeError)
        _require(bool(name.strip()), f"Expected every name in `{option}` to have a word, but got {name!r}.")
    twice = ", ".join(sorted({repr(name) for name in names if list(names).count(name) > 1}))
    _require(not twice, f"Expected distinct names in `{option}`, but got {twice} more than once.")
    return tuple(map(str, names))


def _listed(values: Any) -> Any:
    """The list of an array or a Series; anything else as it is."""
    return values.tolist() if hasattr(values, "tolist") and getattr(values, "ndim", 0) == 1 else values


def _values(given: Any, num_ranks: int) -> tuple[float, ...]:
    if given is None:
        return tuple(map(float, range(num_ranks)))
    with torch.device("cpu"):
        values = rank_tensor(given, "rank_values").detach().to("cpu", torch.float64)
    told = f"Expected {num_ranks} `rank_values` for {num_ranks} ranks, but got shape {tuple(values.shape)}."
    _require(values.shape == (num_ranks,), told)
    _require(bool(values.isfinite().all()), "Expected finite `rank_values`, but got NaN or infinity.")
    told = f"Expected strictly increasing `rank_values`, but got {values.tolist()}; sort the ranks by value."
    _require(bool((values.diff() > 0).all()), told)
    told = "Expected `rank_values` that float32 tells apart; subtract their mean, or use a larger unit."
    _require(bool((values.float().diff() > 0).all()), told)
    return tuple(values.tolist())


def _context(context: Any, rank_position: str) -> int | str:
    if not isinstance(context, str):
        fits = hasattr(context, "__index__") and not isinstance(context, bool)
        _require(fits, f"Expected `context` to be a number of tokens or a text, but got {context!r}.", TypeError)
        return _integer("context", context, least=0)
    places, fields = context.count("{}"), re.findall(r"{[^{}]+}", context)
    told = f"Expected `{{}}` in the place of the rank in `context`, but got {', '.join(fields)}: {context!r}."
    _require(not fields, told)
    told = f"Expected at most one {{}} in `context`, the rank's place, but got {places}: {context!r}."
    _require(places <= 1, told)
    told = f"The {{}} in `context` marks the rank's place already, but rank_position={rank_position!r} was given; "
    _require(not places or rank_position == "tail", told + "leave one of them out.")
    return context
