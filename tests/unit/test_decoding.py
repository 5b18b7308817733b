"""Decoding, against a slow and obvious version."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ordinal_prompt as op


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=9), st.integers(0, 3))
def test_median_minimises_the_expected_absolute_error(logits: list[float], offset: int) -> None:
    values = [offset + 1.5 * i for i in range(len(logits))]
    probabilities = torch.softmax(torch.tensor(logits, dtype=torch.float64), dim=0)
    errors = [sum(p * abs(v - guess) for p, v in zip(probabilities.tolist(), values, strict=True)) for guess in values]
    median = op.decode(torch.tensor(logits, dtype=torch.float64), "median", values).item()
    assert errors[values.index(median)] == pytest.approx(min(errors))


def test_rules() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.6, 0.2, 0.1, 0.1]]))
    assert op.decode(logits).tolist() == pytest.approx([2.0, 0.7])
    assert op.decode(logits, "argmax").tolist() == [3, 0]
    assert op.decode(logits, "median").tolist() == [2, 0]
    assert op.decode(logits, "argmax", values=torch.tensor([1.0, 2, 4, 8])).tolist() == [8, 1]
    assert op.decode(logits.half()).dtype == torch.float32
    assert op.decode(torch.randn(2, 3, 5)).shape == (2, 3)


@pytest.mark.parametrize("ranks", [82, 94, 164])
def test_median_of_equal_logits(ranks: int) -> None:
    assert op.decode(torch.zeros(ranks), "median") == ranks // 2 - 1


def test_nan_is_not_a_prediction() -> None:
    logits = torch.full((2, 5), float("nan"))
    for rule in ("expectation", "median", "argmax"):
        assert op.decode(logits, rule, values=[1, 2, 3, 4, 5]).isnan().all()


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
