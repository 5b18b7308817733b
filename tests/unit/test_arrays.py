"""Labels and numbers in whatever users hold them in; nothing is taken in the wrong order in silence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import ordinal_prompt as op
from ordinal_prompt.arrays import label_tensor, number_tensor, rank_tensor
from ordinal_prompt.protocols import few_shot_indices, label_shift_indices

LABELS = [2, 0, 0, 1, 2, 2]


def read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


FORMS: dict[str, Callable[[], Any]] = {
    "list": lambda: LABELS,
    "tuple": lambda: tuple(LABELS),
    "list of NumPy integers": lambda: [np.int16(label) for label in LABELS],
    "list of tensors": lambda: [torch.tensor(label) for label in LABELS],
    **{dtype: partial(np.array, LABELS, dtype) for dtype in ("i1", "u1", "<u2", "i4", ">i4", "i8", "u8")},
    "negative strides": lambda: np.array(LABELS[::-1])[::-1],
    "read-only": lambda: read_only(np.array(LABELS)),
    "objects": lambda: np.array(LABELS, dtype=object),
    "uint8 tensor": lambda: torch.tensor(LABELS, dtype=torch.uint8),
    "int32 tensor": lambda: torch.tensor(LABELS, dtype=torch.int32),
    "Series": lambda: pd.Series(LABELS),
    "Series that starts at 1": lambda: pd.DataFrame({"label": [9, *LABELS]}).iloc[1:]["label"],
    "Series in another order": lambda: pd.Series(LABELS, index=[5, 4, 3, 2, 1, 0]),
    "Series with names": lambda: pd.Series(LABELS, index=list("abcdef")),
    "Series with one index": lambda: pd.Series(LABELS, index=[0] * 6),
    "nullable Series": lambda: pd.Series(LABELS, dtype="Int64"),
    "Index": lambda: pd.Index(LABELS),
    "ordered categories": lambda: pd.Series(
        pd.Categorical.from_codes(LABELS, ["bad", "fair", "good"], ordered=True), index=range(1, 7)
    ),
    "Categorical": lambda: pd.Categorical.from_codes(LABELS, ["bad", "fair", "good"], ordered=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_labels_of_every_form(form: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = label_tensor(FORMS[form]())
        shots, shifted = (
            choose(FORMS[form](), 1, generator=torch.Generator().manual_seed(3))
            for choose in (few_shot_indices, partial(label_shift_indices, keep=0.5))
        )
    assert labels.dtype == torch.int64
    assert labels.tolist() == LABELS
    assert torch.equal(shots, few_shot_indices(LABELS, 1, torch.Generator().manual_seed(3)))
    assert torch.equal(shifted, label_shift_indices(LABELS, 1, 0.5, torch.Generator().manual_seed(3)))


MISSING = pd.Series([0, 1, None])


@pytest.mark.parametrize(
    ("labels", "error", "match"),
    [
        (MISSING, ValueError, "NaN for 1 of 3; drop those rows, then convert the rest"),
        (MISSING.dropna(), TypeError, r"whole numbers \(pandas makes them so where values were missing\); convert"),
        (MISSING.astype("Int64"), (TypeError, ValueError), "but got .*(NaN|NA)"),
        ([0, None], TypeError, "NoneType, int"),
        (None, TypeError, "but got NoneType"),
        (pd.Series([], dtype="int64"), ValueError, "at least one label"),
        ([], ValueError, "at least one label"),
        ([0.5, 1.0], TypeError, "integers, but got torch.float32; map values"),
        (pd.Series([True, False]), TypeError, "integers, but got torch.bool"),
        (pd.Series(["bad", "good"]), TypeError, "numbers, but got str"),
        (pd.Series(pd.to_datetime(["2020-01-01"])), TypeError, "numbers, but got datetime64"),
        (np.array([1, 2], dtype="timedelta64[s]"), TypeError, "numbers, but got timedelta64"),
        (pd.Categorical(["bad", "good"]), TypeError, "categories without an order; order them"),
        (pd.Categorical(["bad", None], ordered=True), ValueError, "some are missing"),
        (pd.DataFrame({"label": [0, 1]}), ValueError, r"but got shape \(2, 1\)"),
        ({"label": [0, 1]}, TypeError, "but got dict"),
        ("012", TypeError, "but got str"),
        (3, ValueError, r"but got shape \(\)"),
        ([2**70], TypeError, "numbers, but got int"),
    ],
)
def test_what_is_no_label(labels: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        few_shot_indices(labels, 1)


def test_huge_labels_cost_nothing() -> None:
    huge = [99_999_999, -(2**31), 2**62, 2**62]
    assert few_shot_indices(huge, 1, torch.Generator().manual_seed(0)).numel() == 3
    assert label_shift_indices(huge, 1, 0.5).numel() == 3
    for label in (99_999_999, -(2**31), 2**62):
        with pytest.raises(ValueError, match=f"labels in 0…3 for 4 ranks, but got .*{label}"):
            op.OrdinalPromptLoss()(torch.zeros(2, 4), torch.tensor([0, label]))


NUMBERS: dict[str, Callable[[], Any]] = {
    "list": lambda: [4, 2, 1],
    "array": lambda: np.array([4, 2, 1], dtype=">i2"),
    "negative strides": lambda: np.array([1.0, 2.0, 4.0])[::-1],
    "read-only": lambda: read_only(np.array([4.0, 2.0, 1.0])),
    "tensor": lambda: torch.tensor([4, 2, 1]),
    "mapping": lambda: {2: 1, 0: 4, 1: 2},
    "Series": lambda: pd.Series([4, 2, 1]),
    "Series in another order": lambda: pd.Series([1, 4, 2], index=[2, 0, 1]),
    "counts": lambda: pd.Series([2, 1, 0, 0, 1, 0, 0]).value_counts(ascending=True),
    "Index": lambda: pd.Index([4, 2, 1]),
}


@pytest.mark.parametrize("form", NUMBERS)
def test_numbers_go_to_their_ranks(form: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = op.OrdinalPromptLoss(rank_weights=NUMBERS[form]()).rank_weights
        decoded = op.decode(torch.eye(3), "argmax", values=NUMBERS[form]())
    assert weights is not None
    assert weights.tolist() == [4, 2, 1]
    assert decoded.dtype == torch.float32
    assert decoded.tolist() == [4, 2, 1]


@pytest.mark.parametrize(
    ("numbers", "error", "match"),
    [
        (
            pd.Series([4, 2, 1], index=[1, 2, 3]),
            ValueError,
            "the ranks 0…2, but got the index 1, 2, 3; pass a dict",
        ),
        (pd.Series([4, 2, 1], index=[0, 0, 1]), ValueError, "the index 0, 0, 1"),
        (pd.Series([4, 2, 1], index=list("abc")), ValueError, "the index 'a', 'b', 'c'"),
        (pd.Series(range(20)).iloc[3:], ValueError, "the index 3, .*12, …; pass"),
        ({0: 4, 2: 1}, ValueError, "the index 0, 2"),
        (pd.Series([4, None, 1]), ValueError, "in `w`, but got NaN for 1"),
        ([1, None], TypeError, "`w` to be numbers, but got NoneType, int"),
        (pd.Series(pd.to_datetime(["2020-01-01"])), TypeError, "`w` to be numbers, but got datetime64"),
        (["a", "b"], TypeError, "`w` to be numbers, but got str"),
    ],
)
def test_numbers_of_no_rank(numbers: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        rank_tensor(numbers, "w")


@pytest.mark.parametrize("numbers", [[], {}, pd.Series([], dtype=float), pd.DataFrame({"w": [1.0, 2.0]})])
def test_numbers_of_another_shape(numbers: Any) -> None:
    with pytest.raises(ValueError, match="`rank_weights`"):
        op.OrdinalPromptLoss(rank_weights=numbers)(torch.zeros(2, 2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="one value for each of the 2 ranks"):
        op.decode(torch.zeros(2), values=numbers)


def test_numbers_keep_their_precision() -> None:
    assert rank_tensor([0.1, 1 / 3], "values").tolist() == [0.1, 1 / 3]
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    assert rank_tensor(values, "values") is values


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_losses_take_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 2, 1])
    expected = op.OrdinalPromptLoss()(logits, labels)
    assert torch.equal(op.OrdinalPromptLoss()(logits, labels.to(dtype)), expected)
    parts = op.losses.cross_entropy_loss(logits, labels.to(dtype)) + op.losses.kl_loss(logits, labels.to(dtype))
    assert torch.equal(parts, expected)


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i1", "i8", "u1", "u2", "u4", "u8", "?", ">f4", ">i2"])
def test_arrays_of_every_kind_are_read_as_lists_are(kind: str) -> None:
    array = np.array([[0, 1, 2], [3, 4, 5]]).astype(kind)
    for given in (array, array[:, ::2], array.T, read_only(array.copy()), np.asfortranarray(array), array[0, 1]):
        for dtype in (None, torch.float64):
            found, expected = number_tensor(given, "x", dtype), torch.as_tensor(given.tolist(), dtype=dtype)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
            if found.dim():
                found.zero_()  # a copy
    assert array.max() > 0
    with pytest.raises(TypeError, match="numbers"):
        number_tensor(np.ma.masked_array([1.0, 2.0], [True, False]), "x")
