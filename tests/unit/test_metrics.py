"""Ordinality, cell by cell."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ordinal_prompt as op


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
