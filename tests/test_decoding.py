"""Decoding, ordinality and the training subsets, against slow and obvious versions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ordinal_prompt as op
from ordinal_prompt.protocols import few_shot_indices, label_shift_indices


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


def ordinality_cell_by_cell(prototypes: Tensor, span: int) -> float:
    unit = torch.nn.functional.normalize(prototypes.double(), dim=1)
    similarity, last = unit @ unit.T, len(unit) - 1
    cells = [similarity[i, j] > similarity[i, j + 1] for i in range(last) for j in range(i, last) if j - i < span]
    return sum(map(bool, cells)) / len(cells)


@given(ranks=st.integers(2, 12), span=st.integers(1, 14), seed=st.integers(0, 50))
def test_ordinality(ranks: int, span: int, seed: int) -> None:
    prototypes = torch.randn(ranks, 5, generator=torch.Generator().manual_seed(seed))
    assert op.ordinality(prototypes, span) == pytest.approx(ordinality_cell_by_cell(prototypes, span))
    assert op.ordinality(prototypes) == op.ordinality(7 * prototypes, ranks)


def test_chance_is_near_one_half() -> None:
    scores = [op.ordinality(torch.randn(61, 512)) for _ in range(50)]
    assert sum(scores) / len(scores) == pytest.approx(1 / 2 + 1 / 61, abs=0.01)


@pytest.mark.parametrize(
    ("shape", "span", "match"), [((1, 4), None, "K at least 2"), ((4,), None, "shape"), ((4, 4), 0, "at least 1")]
)
def test_bad_prototypes(shape: tuple[int, ...], span: int | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        op.ordinality(torch.randn(shape), span)


def test_ordinality_of_what_is_no_prototype() -> None:
    with pytest.raises(TypeError, match="`prototypes` to be a tensor, but got Linear"):
        op.ordinality(torch.nn.Linear(3, 4))
    with pytest.raises(ValueError, match="finite `prototypes`"):
        op.ordinality(torch.full((3, 4), float("nan")))


LABELS = st.lists(st.integers(-2, 6), min_size=1, max_size=60)


@given(LABELS, st.integers(1, 12), st.integers(0, 5))
def test_few_shots(labels: list[int], shots: int, seed: int) -> None:
    indices = few_shot_indices(labels, shots, torch.Generator().manual_seed(seed)).tolist()
    assert indices == sorted(set(indices))
    kept, all_counts = Counter(labels[i] for i in indices), Counter(labels)
    assert kept == {label: min(count, shots) for label, count in all_counts.items()}
    assert indices == few_shot_indices(torch.tensor(labels), shots, torch.Generator().manual_seed(seed)).tolist()


@given(LABELS, st.integers(0, 4), st.sampled_from([0.1, 0.2, 0.29, 0.5, 1.0]))
def test_label_shift(labels: list[int], num_labels: int, keep: float) -> None:
    all_counts = Counter(labels)
    num_labels = min(num_labels, len(all_counts))
    indices = label_shift_indices(labels, num_labels, keep).tolist()
    frequent = sorted(all_counts, key=lambda label: (-all_counts[label], label))[:num_labels]
    expected = {
        label: max(int(round(count * keep, 6)), 1) if label in frequent else count
        for label, count in all_counts.items()
    }
    assert Counter(labels[i] for i in indices) == expected
    assert indices == sorted(set(indices))


def test_seeds_differ() -> None:
    labels = torch.zeros(100, dtype=torch.long)
    first, second = (few_shot_indices(labels, 5, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: few_shot_indices([0, 1], 0), ValueError, "`shots` to be at least 1"),
        (lambda: few_shot_indices([0, 1], 1.5), TypeError, "`shots` to be an integer"),
        (lambda: few_shot_indices([], 1), ValueError, "at least one label"),
        (lambda: few_shot_indices([[0]], 1), ValueError, "sequence of"),
        (lambda: few_shot_indices([0.5], 1), TypeError, "integers"),
        (lambda: label_shift_indices([0, 1], 3, 0.5), ValueError, r"`num_labels` in 0…2"),
        (lambda: label_shift_indices([0, 1], 1, 0), ValueError, r"`keep` in \(0, 1\]"),
    ],
)
def test_bad_subsets(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
