"""Decoding, against a slow and obvious version."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import ordinal_prompt as op

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@given(logits=st.lists(st.floats(-9, 9), min_size=2, max_size=9), offset=st.integers(0, 3))
@example(logits=[6.0, 6.0, -7.0], offset=0)  # the first rank falls 6e-7 short of one half
@example(logits=[0.0, 0.0, -5.0], offset=0)
@example(logits=[0.0, 3.0, 0.0, 3.0, 0.0, 0.0], offset=0)  # equal sums, whose float64 depends on the order
@example(logits=[-7.0, 6.0, 6.0], offset=0)
def test_median_is_the_first_minimiser_of_the_expected_absolute_error(
    dtype: torch.dtype, logits: list[float], offset: int
) -> None:
    """By exact sums of the probabilities that the logits, as rounded to their precision, stand for."""
    given_logits = torch.tensor(logits, dtype=dtype)
    weights = [Fraction(weight) for weight in (given_logits.double() - given_logits.double().max()).exp().tolist()]
    values = [Fraction(offset) + Fraction(3, 2) * i for i in range(len(logits))]
    errors = [sum(w * abs(v - guess) for w, v in zip(weights, values, strict=True)) for guess in values]
    median = Fraction(op.decode(given_logits, "median", [*map(float, values)]).item())
    chosen, least = errors[values.index(median)], min(errors)
    assert float((chosen - least) / least) < 1e-14  # float64's rounding of two sums of at most 9 terms
    assert median <= values[errors.index(least)]


@pytest.mark.parametrize("dtype", DTYPES)
@given(half=st.lists(st.floats(-9, 9), min_size=1, max_size=60))
def test_median_of_symmetric_logits_is_below_the_middle(dtype: torch.dtype, half: list[float]) -> None:
    logits = torch.tensor([*half, *reversed(half)], dtype=dtype)
    assert op.decode(logits, "median") == len(half) - 1


def test_rules() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.6, 0.2, 0.1, 0.1]]))
    assert op.decode(logits).tolist() == pytest.approx([2.0, 0.7])
    assert op.decode(logits, "argmax").tolist() == [3, 0]
    assert op.decode(logits, "median").tolist() == [2, 0]
    assert op.decode(logits, "argmax", values=torch.tensor([1.0, 2, 4, 8])).tolist() == [8, 1]
    assert op.decode(logits.half()).dtype == torch.float32
    assert op.decode(torch.randn(2, 3, 5)).shape == (2, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 82, 94, 164, 1001, 10_000])
def test_median_of_equal_logits(ranks: int, dtype: torch.dtype) -> None:
    assert op.decode(torch.full((2, ranks), 0.3, dtype=dtype), "median").tolist() == [(ranks - 1) // 2] * 2


def test_median_of_large_logits() -> None:
    assert op.decode(torch.tensor([3e38, 3e38, -3e38]), "median") == 0
    assert op.decode(torch.tensor([-torch.inf, 1.0, -torch.inf]), "median") == 1


def test_nan_is_not_a_prediction() -> None:
    logits = torch.tensor([[1.0, torch.nan, 0.0], [1.0, torch.inf, 0.0], [1.0, 0.0, 0.0]])
    for rule in ("expectation", "median", "argmax"):
        assert op.decode(logits, rule, values=[1, 2, 3]).isnan().tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("logits", "options", "error", "match"),
    [
        (torch.zeros(2, 3), {"rule": "mode"}, ValueError, "`rule` to be one of .* but got 'mode'"),
        (torch.zeros(2, 3), {"values": [1, 2]}, ValueError, "each of the 3 ranks"),
        (torch.zeros(2, 3).long(), {}, TypeError, "floating point tensor, but got a tensor of torch.int64"),
        ([0.0, 1.0], {}, TypeError, "but got list"),
        (torch.tensor(1.0), {}, ValueError, r"shape \(\.\.\., K\)"),
    ],
)
def test_bad_logits(logits: Any, options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        op.decode(logits, **options)


def test_values_that_float32_does_not_tell_apart() -> None:
    days = [20240101, 20240102, 20240103]
    for values in (days, torch.tensor(days), [float(day) for day in days]):
        assert op.decode(torch.eye(3) * 99, "argmax", values).tolist() == days
        assert op.decode(torch.eye(3) * 999, values=values).tolist() == days
    assert op.decode(torch.eye(3), values=[1.1, 2.2, 3.3]).dtype == torch.float32


def test_probabilities_are_not_taken_for_logits_in_silence() -> None:
    probabilities = (torch.eye(3) * 3).softmax(1)
    for rows in (probabilities, probabilities.bfloat16(), (probabilities.repeat(3, 1) * 100).round() / 100):
        with pytest.warns(UserWarning, match="probabilities\\? Pass their logarithm"):
            op.decode(rows)
