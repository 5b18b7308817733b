"""Values and names as rank indices, and soft labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_clip
from hypothesis import given
from hypothesis import strategies as st

import ordinal_prompt as op

STARS = [1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5]


@given(st.integers(0, 1000), st.integers(2, 30))
def test_values_of_ranks_give_their_indices(seed: int, num_ranks: int) -> None:
    random = np.random.default_rng(seed)
    values = np.cumsum(random.integers(1, 50, num_ranks)) / random.choice([1, 2, 10]) - random.integers(0, 2000)
    indices = random.integers(0, num_ranks, 50)
    for kind in (torch.float64, torch.float32):
        given_values = torch.tensor(values[indices], dtype=kind)
        assert op.rank_indices(given_values, values).tolist() == indices.tolist()
    near = torch.tensor(values[indices] + random.uniform(-0.4, 0.4, 50) * np.diff(values).min())
    slow = [int(np.abs(values - value).argmin()) for value in near.numpy()]
    assert op.rank_indices(near, values, nearest=True).tolist() == slow == indices.tolist()


@pytest.mark.parametrize(
    "values",
    [
        [1, 4.5, 2],
        (1, 4.5, 2),
        np.array([1, 4.5, 2]),
        pd.Series([1, 4.5, 2], index=[7, 8, 9]),
        torch.tensor([1, 4.5, 2]),
    ],
)
def test_any_container(values: Any) -> None:
    assert op.rank_indices(values, STARS).tolist() == [0, 7, 2]


def test_shapes_are_kept_and_ties_go_down() -> None:
    assert op.rank_indices(torch.tensor([[1.0], [2.0]]), STARS).tolist() == [[0], [2]]
    assert op.rank_indices([1.25, 9, -3], STARS, nearest=True).tolist() == [0, 8, 0]


def test_what_fits_no_rank_is_listed() -> None:
    with pytest.raises(ValueError, match=r"1 to 5, but got 0, 1.2 \(3 of 4 labels fit no rank\); .* nearest=True"):
        op.rank_indices([0, 1.2, 1.2, 3], STARS)
    with pytest.raises(ValueError, match="are missing .NaN."):
        op.rank_indices([float("nan"), 1], STARS, nearest=True)
    with pytest.raises(ValueError, match="names of ranks, 'bad', 'good', but got 'Good'"):
        op.rank_indices(["bad", "Good"], ["bad", "good"])
    with pytest.raises(ValueError, match="increasing `rank_values`"):
        op.rank_indices([1], [2, 1])
    with pytest.raises(TypeError, match="`values` to be numbers, but got str"):
        op.rank_indices(["1", "2"], STARS)


def test_a_head_knows_its_names_and_values(tokenizer: Any) -> None:
    head = op.OrdinalPromptHead(tiny_clip(), ["bad", "fair", "good"], tokenizer=tokenizer, rank_values=[1, 2, 5])
    assert head.rank_indices(["good", "bad"]).tolist() == [2, 0]
    assert head.rank_indices(np.array(["good", "bad"])).tolist() == [2, 0]
    assert head.rank_indices([5, 2]).tolist() == [2, 1]
    assert head.rank_indices([4, 2], nearest=True).tolist() == [2, 1]


@pytest.mark.parametrize("kind", ["beta", "binomial", "exponential", "poisson", "triangular"])
def test_soft_labels_are_distributions_of_dlordinal(kind: str) -> None:
    pytest.importorskip("dlordinal")
    from dlordinal import soft_labelling

    labels = op.soft_labels([0, 2, 4], 5, kind)
    table = getattr(soft_labelling, f"get_{kind}_soft_labels")(5)
    torch.testing.assert_close(labels, torch.tensor(table[[0, 2, 4]]).float())
    torch.testing.assert_close(labels.sum(1), torch.ones(3), atol=1e-3, rtol=0)
    assert op.OrdinalPromptLoss()(torch.randn(3, 5), labels).isfinite()


def test_soft_labels_of_mistakes() -> None:
    pytest.importorskip("dlordinal")
    with pytest.raises(ValueError, match="`kind` to be one of"):
        op.soft_labels([0], 5, "normal")
    with pytest.raises(ValueError, match="rank indices in 0…4"):
        op.soft_labels([5], 5)
    with pytest.raises(TypeError, match="`indices` to be integers"):
        op.soft_labels([0.5], 5)


def test_names_of_any_shape() -> None:
    names = ["bad", "fair", "good"]
    expected = torch.tensor([[2, 0], [1, 1]])
    nested = [["good", "bad"], ["fair", "fair"]]
    for kind in (nested, np.array(nested), np.array(nested, dtype=object), pd.DataFrame(nested)):
        assert torch.equal(op.rank_indices(kind, names), expected)
    with pytest.raises(ValueError, match="but got None, nan"):
        op.rank_indices(["good", None, float("nan")], names)
    with pytest.raises(TypeError, match="a list or an array of names, but got 'good'"):
        op.rank_indices("good", names)
    with pytest.raises(ValueError, match="none twice"):
        op.rank_indices(["a"], ["a", "b", "a"])


def test_values_keep_their_digits() -> None:
    days = [20240102, 20240103, 20240104]
    for kind in ([20240103.0], pd.Series([20240103.0]), np.array([20240103.0])):
        assert op.rank_indices(kind, days).tolist() == [1]
    with pytest.raises(ValueError, match="20240102 to 20240104, but got 20240105"):
        op.rank_indices([20240105.0], days)
    assert op.rank_indices(torch.tensor([1.1]).half(), [1.0, 1.1]).tolist() == [1]
    with pytest.raises(ValueError, match="fit no rank"):
        op.rank_indices(torch.tensor([1931.0]).bfloat16(), [1930, 1931])  # rounded to 1928


def test_soft_labels_of_many_ranks() -> None:
    pytest.importorskip("dlordinal")
    with pytest.warns(UserWarning, match=r"Of 101 ranks, binomial soft labels give \d+ less than another rank"):
        op.soft_labels([0], 101, "binomial")
    with pytest.raises(ValueError, match="no beta soft labels for 101 ranks; choose another"):
        op.soft_labels([0], 101, "beta")
    codes = pd.Series(pd.Categorical([3, 1], [3, 2, 1, 0], ordered=True))
    assert op.soft_labels(codes, 4).argmax(1).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("values", "ranks"),
    [
        ([0.0, 0.0018], [0.001, 0.01, 0.1, 1, 10, 100, 1000]),
        ([0, 2], [1, 10, 100, 1e3, 1e4, 1e5, 1e6]),
        ([200000.15], [200000, 200001]),
        (torch.tensor([1.9], dtype=torch.float16), [1, 5, 1000]),
    ],
)
def test_values_near_none_of_wide_scales(values: Any, ranks: Any) -> None:
    with pytest.raises(ValueError, match="fit no rank"):
        op.rank_indices(values, ranks)


def test_values_up_to_their_rounding() -> None:
    ranks = np.arange(-10, 11) / 10
    noisy = np.cumsum(np.full(21, 0.1)) - 1.1  # 1e-16 beside zero, as sums of floats are
    assert op.rank_indices(noisy, ranks).tolist() == [*range(21)]
    assert op.rank_indices(ranks.astype(np.float32), ranks).tolist() == [*range(21)]
    assert op.rank_indices(torch.tensor([1900, 1931], dtype=torch.bfloat16), [1900, 1931]).tolist() == [0, 1]
    with pytest.raises(ValueError, match="increasing `rank_values`, finite"):
        op.rank_indices([1.0], [1.0, 2.0, np.inf])


def test_categories_are_those_of_all_ranks() -> None:
    names = ["terrible", "bad", "okay", "good", "excellent"]
    few = pd.Series(pd.Categorical(["bad", "good", "okay"], names, ordered=True)).cat.remove_unused_categories()
    logits = torch.eye(5)[[1, 3, 2]] * 9
    for call in (
        lambda: op.metrics.accuracy(logits, few),
        lambda: op.calibrate(logits, few),
        lambda: op.ConformalRanks(0.5).fit(logits, few),
    ):
        with pytest.raises(ValueError, match="5 ordered categories, one for each rank, but got 3; declare all"):
            call()
    whole = pd.Categorical(["bad", "good", "okay"], names, ordered=True)
    assert op.metrics.accuracy(logits, whole) == 1.0
    with pytest.raises(ValueError, match="the same ordered categories everywhere"):
        op.metrics.accuracy(few, whole)
    with pytest.raises(TypeError, match="leave `values` out"):
        op.metrics.mean_absolute_error(whole, whole, values=[1, 2, 3, 4, 5])
    assert op.metrics.mean_absolute_error(whole, whole) == 0.0


def test_numbers_that_may_mean_names_are_refused(tokenizer: Any) -> None:
    head = op.OrdinalPromptHead(tiny_clip(), ["1", "2", "3"], tokenizer=tokenizer, context="stars")
    assert head.rank_indices(["1", "3"]).tolist() == [0, 2]
    with pytest.raises(ValueError, match="names are numbers, too"):
        head.rank_indices([1, 2])
    stars = op.OrdinalPromptHead(
        tiny_clip(), ["1", "2", "3"], tokenizer=tokenizer, context="stars", rank_values=[1, 2, 3]
    )
    assert stars.rank_indices([1, 2]).tolist() == [0, 1]


def test_families_that_make_no_distributions() -> None:
    pytest.importorskip("dlordinal")
    with pytest.raises(ValueError, match="5 ordered categories, one for each rank, but got 2"):
        op.soft_labels(pd.Categorical(["a", "b"], ["a", "b"], ordered=True), 5)
    with pytest.raises(ValueError, match="that give distributions"):
        op.soft_labels([0], 5, "exponential", tau=0.0)
