"""Types of command-line options: numbers within bounds."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)


def _number(kind: type[Number], fits: Callable[[Number], bool], told: str) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"must be {told}, but got {text}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # argparse: invalid number value: 'x'
    return parse


count = _number(int, lambda value: value >= 1, "at least 1")
rate = _number(float, lambda value: 0 <= value < math.inf, "finite and not negative")
factor = _number(float, lambda value: 0 < value < math.inf, "positive")
fraction = _number(float, lambda value: 0 <= value < 1, "at least 0 and below 1")
