"""Options of the command line: numbers within bounds, and defaults from dataclasses."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Number = TypeVar("Number", int, float)


def _number(kind: type[Number], fits: Callable[[Number], bool], told: str) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"must be {told}, but got {text}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # argparse: invalid number value: 'x'
    return parse


whole = _number(int, lambda value: value >= 0, "at least 0")
count = _number(int, lambda value: value >= 1, "at least 1")
rate = _number(float, lambda value: 0 <= value < math.inf, "finite and not negative")
factor = _number(float, lambda value: 0 < value < math.inf, "positive")
fraction = _number(float, lambda value: 0 <= value < 1, "at least 0 and below 1")


def add_choice(group: Any, name: str, choices: Sequence[str], told: str) -> None:
    """Adds an option whose default is the first choice."""
    group.add_argument(name, choices=choices, default=choices[0], help=f"{told}; default %(default)s")


def add_field(group: Any, defaults: Any, name: str, kind: Callable[[str], Any], metavar: str, told: str) -> None:
    """Adds the option of a dataclass's field, with the default that the field has."""
    value = getattr(defaults, name.removeprefix("--").replace("-", "_"))
    group.add_argument(name, type=kind, metavar=metavar, default=value, help=told)
