"""The training subsets, against what their definitions count."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ordinal_prompt.protocols import few_shot_indices, label_shift_indices

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
