"""Metrics against other people's implementations of them; ordinality, cell by cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as scikit
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

import ordinal_prompt as op
from ordinal_prompt import metrics

dlordinal: Any = pytest.importorskip("dlordinal.metrics")
binary_calibration_error: Any = pytest.importorskip("torchmetrics.functional.classification").binary_calibration_error


def samples(number: int = 200, ranks: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and labels that lean towards them; every rank occurs."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(number, ranks, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    labels[:ranks] = torch.arange(ranks)
    return logits, labels


SEEDS, RANKS = pytest.mark.parametrize("seed", range(3)), pytest.mark.parametrize("ranks", [2, 5, 21])


@RANKS
@SEEDS
def test_errors_are_those_of_scikit_learn_and_dlordinal(ranks: int, seed: int) -> None:
    logits, labels = samples(300, ranks, seed)
    expected, chosen = op.decode(logits), logits.argmax(dim=1)
    assert metrics.mean_absolute_error(logits, labels) == pytest.approx(scikit.mean_absolute_error(labels, expected))
    assert metrics.mean_absolute_error(chosen, labels) == pytest.approx(scikit.mean_absolute_error(labels, chosen))
    assert metrics.macro_mae(chosen, labels) == pytest.approx(dlordinal.amae(labels, chosen))
    assert metrics.maximum_mae(logits, labels, rule="argmax") == pytest.approx(dlordinal.mmae(labels, chosen))
    assert metrics.accuracy(logits, labels) == pytest.approx(scikit.accuracy_score(labels, chosen))
    assert metrics.off_by_one_accuracy(logits, labels) == pytest.approx(dlordinal.accuracy_off1(labels, chosen))
    kappa = scikit.cohen_kappa_score(labels, chosen, weights="quadratic")
    assert metrics.quadratic_weighted_kappa(logits, labels) == pytest.approx(kappa)


@RANKS
@SEEDS
def test_correlations_are_those_of_scipy(ranks: int, seed: int) -> None:
    logits, labels = samples(300, ranks, seed)
    for predictions in (op.decode(logits), logits.argmax(dim=1), 1e-3 * labels + 7):  # few ties, many, all in order
        tau, rho = stats.kendalltau(predictions, labels), stats.spearmanr(predictions, labels)
        assert metrics.kendall_tau(predictions, labels) == pytest.approx(tau.statistic)
        assert metrics.spearman_rho(predictions, labels) == pytest.approx(rho.statistic)
    assert metrics.kendall_tau(logits, labels) == metrics.kendall_tau(op.decode(logits), labels)


@RANKS
@SEEDS
def test_scores_of_probabilities_are_those_of_dlordinal_and_torchmetrics(ranks: int, seed: int) -> None:
    logits, labels = samples(300, ranks, seed)
    probabilities = logits.softmax(1)
    rps = dlordinal.ranked_probability_score(labels, probabilities)
    assert metrics.ranked_probability_score(logits, labels) == pytest.approx(rps)
    assert metrics.ranked_probability_score(probabilities.log(), labels) == pytest.approx(rps)
    for bins in (1, 10, 15):
        by_threshold = [
            float(binary_calibration_error(probabilities[:, : k + 1].sum(1), (labels <= k).long(), bins))
            for k in range(ranks - 1)
        ]
        assert metrics.ordinal_calibration_error(logits, labels, bins) == pytest.approx(np.mean(by_threshold))


def test_reliability_bin_by_bin() -> None:
    logits, labels = samples(100, 3)
    confidence, frequency, counts = metrics.reliability(logits, labels, bins=4)
    probability = logits.softmax(1).cumsum(1)
    for k in range(2):
        for b in range(4):
            here = [i for i in range(100) if b / 4 <= float(probability[i, k]) < (b + 1) / 4]
            assert int(counts[k, b]) == len(here)
            if here:
                assert float(confidence[k, b]) == pytest.approx(float(probability[here, k].mean()))
                assert float(frequency[k, b]) == pytest.approx(float((labels[here] <= k).double().mean()))
    certain, _, of_bins = metrics.reliability([[0.0, -torch.inf], [-torch.inf, 0.0]], [0, 1], bins=4)
    assert of_bins.tolist() == [[1, 0, 0, 1]]
    assert (float(certain[0, 0]), float(certain[0, 3])) == (0, 1)
    assert metrics.ordinal_calibration_error([[0.0, -torch.inf]], [0]) == 0


def test_values_other_than_the_indices() -> None:
    logits, labels = samples(50, 4)
    values = torch.tensor([1.0, 2.0, 5.0, 50.0], dtype=torch.float64)
    years = op.decode(logits, values=values)
    true = values[labels]
    assert metrics.mean_absolute_error(logits, labels, values) == pytest.approx(float((years - true).abs().mean()))
    assert metrics.mean_absolute_error(years, labels, values) == metrics.mean_absolute_error(logits, labels, values)
    by_rank = metrics.mae_by_rank(years, labels, values)
    for rank in range(4):
        assert float(by_rank[rank]) == pytest.approx(float((years - true)[labels == rank].abs().mean()))
    assert metrics.off_by_one_accuracy([5.0, 50.0, 3.6], [3, 1, 1], values) == pytest.approx(2 / 3)
    assert metrics.accuracy([5.0, 50.0, 3.6], [2, 3, 1], values) == pytest.approx(2 / 3)
    table = metrics.quadratic_weighted_kappa(logits, labels, values)
    chosen, pairs = values[logits.argmax(1)], (values[logits.argmax(1)][:, None] - true).square().mean()
    assert table == pytest.approx(1 - float((chosen - true).square().mean() / pairs))


def test_ranks_that_do_not_occur() -> None:
    logits, labels = samples(40, 5)
    kept = labels != 2
    logits, labels = logits[kept], labels[kept]
    by_rank = metrics.mae_by_rank(logits, labels)
    assert by_rank.isnan().tolist() == [False, False, True, False, False]
    assert metrics.macro_mae(logits, labels) == pytest.approx(float(by_rank[~by_rank.isnan()].mean()))
    assert metrics.maximum_mae(logits, labels) == pytest.approx(float(by_rank[~by_rank.isnan()].max()))
    assert len(metrics.mae_by_rank([0.0, 1.0], [0, 0], num_ranks=7)) == 7
    kappa = scikit.cohen_kappa_score(labels, logits.argmax(1), weights="quadratic", labels=range(5))
    assert metrics.quadratic_weighted_kappa(logits, labels) == pytest.approx(kappa)
    assert metrics.accuracy([3, 0], [0, 0]) == 0.5  # a predicted rank above all labels


def test_sets() -> None:
    first, last, labels = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 1, 4, 2]), torch.tensor([1, 2, 2, 2])
    assert metrics.coverage(first, last, labels) == 0.75
    assert metrics.mean_width(first, last) == pytest.approx(7 / 4)
    by_rank = metrics.coverage_by_rank(first, last, labels, 4)
    assert by_rank.isnan().tolist() == [True, False, False, True]
    assert by_rank[1:3].tolist() == pytest.approx([1, 2 / 3])


def test_constant_predictions_have_no_correlation() -> None:
    for metric in (metrics.kendall_tau, metrics.spearman_rho):
        assert np.isnan(metric([1.0, 1.0, 1.0], [0, 1, 2]))
        assert np.isnan(metric([0.0, 1.0, 2.0], [1, 1, 1]))
    assert np.isnan(metrics.quadratic_weighted_kappa([1, 1], [1, 1]))


OF_PREDICTIONS: list[Callable[..., Any]] = [
    metrics.mean_absolute_error, metrics.mae_by_rank, metrics.macro_mae, metrics.maximum_mae, metrics.accuracy,
    metrics.off_by_one_accuracy, metrics.quadratic_weighted_kappa, metrics.kendall_tau, metrics.spearman_rho,
]  # fmt: skip
OF_LOGITS: list[Callable[..., Any]] = [
    metrics.ranked_probability_score, metrics.ordinal_calibration_error, metrics.reliability, metrics.summary
]  # fmt: skip


@pytest.mark.parametrize("metric", [*OF_PREDICTIONS, *OF_LOGITS])
def test_whatever_holds_the_samples(metric: Callable[..., Any]) -> None:
    logits, labels = samples(12, 3)
    expected = metric(logits, labels)
    holders: list[tuple[Any, Any]] = [
        (logits.numpy(), labels.numpy()),
        (logits.tolist(), labels.tolist()),
        (pd.DataFrame(logits.numpy()), pd.Series(labels.numpy(), index=range(40, 52))),
        (logits.clone().requires_grad_(), labels.int()),
        (logits.reshape(3, 4, 3), labels.reshape(3, 4)),
    ]
    for given_logits, given_labels in holders:
        torch.testing.assert_close(metric(given_logits, given_labels), expected, equal_nan=True)


@pytest.mark.parametrize("metric", [*OF_PREDICTIONS, *OF_LOGITS])
def test_mistakes(metric: Callable[..., Any]) -> None:
    logits, labels = samples(12, 3)
    with pytest.raises(ValueError, match="at least one sample"):
        metric(logits[:0], labels[:0])
    with pytest.raises(ValueError, match=r"labels in 0…2.* but got 1…3; op.rank_indices makes indices"):
        metric(logits, labels + 1)
    with pytest.raises(ValueError, match="finite `logits`"):
        metric(logits.fill_diagonal_(torch.nan), labels)
    with pytest.raises(ValueError, match="a label in every place.* NaN for 1 of 3"):
        metric(logits[:3], [0, 1, np.nan])
    with pytest.raises(TypeError, match="`labels` to be integers"):
        metric(logits, labels + 0.5)
    with pytest.raises(ValueError, match=r"\(12, 3\).* labels of shape \(11,\)"):
        metric(logits, labels[1:])
    for no_numbers in (["good", "bad"], torch.ones(2) > 0):
        with pytest.raises(TypeError, match="to be numbers"):
            metric(no_numbers, [0, 1])


def test_more_mistakes() -> None:
    with pytest.raises(ValueError, match="finite `predictions`, but 1 are NaN"):
        metrics.mean_absolute_error([1.0, torch.nan], [0, 1])
    with pytest.raises(ValueError, match="increasing `values`"):
        metrics.mean_absolute_error([1.0, 2.0], [0, 1], values=[2, 1])
    with pytest.raises(ValueError, match="values of shape"):
        metrics.mean_absolute_error(torch.zeros(2, 3), [0, 1], values=[1, 2])
    with pytest.raises(ValueError, match="labels in 0…1"):
        metrics.mean_absolute_error([1.0, 2.0], [0, 2], values=[1, 2])
    with pytest.raises(ValueError, match="K at least 2"):
        metrics.ranked_probability_score([[1.0], [2.0]], [0, 0])
    with pytest.raises(ValueError, match="`bins` to be a whole number, at least 1"):
        metrics.reliability([[1.0, 2.0]], [0], bins=0)
    with pytest.raises(ValueError, match="to have one shape"):
        metrics.coverage([0, 1], [1, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="end before they start"):
        metrics.mean_width([2], [1])


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
    with pytest.raises(TypeError, match="`prototypes` to be numbers, but got Linear"):
        op.ordinality(torch.nn.Linear(3, 4))
    with pytest.raises(ValueError, match="finite `prototypes`"):
        op.ordinality(torch.full((3, 4), float("nan")))


def test_what_looks_like_something_else() -> None:
    probabilities = torch.randn(6, 4).softmax(1)
    labels = torch.arange(6) % 4
    with pytest.raises(ValueError, match=r"got one-hot rows; pass labels\.argmax"):
        metrics.accuracy(probabilities, torch.nn.functional.one_hot(labels, 4))
    with pytest.warns(UserWarning, match="Pass their logarithm"):
        metrics.ranked_probability_score(probabilities, labels)
    stars = pd.Series(pd.Categorical([1, 3, 5, 2], [1, 2, 3, 4, 5], ordered=True))
    assert metrics.accuracy(stars, stars) == 1
    with pytest.raises(ValueError, match="`rule` to be one of"):
        metrics.mean_absolute_error([1.0], [1], rule="mode")
    with pytest.raises(ValueError, match="`num_ranks` to be 4"):
        metrics.mae_by_rank(probabilities.log(), labels, num_ranks=7)
    with pytest.raises(ValueError, match=r"one shape, but got \(2,\) and \(2,\) and \(2, 1\)"):
        metrics.coverage([0, 1], [1, 2], [[1], [1]])
    with pytest.raises(TypeError, match="names become indices with op.rank_indices"):
        metrics.accuracy(["good"], [1])
    with pytest.raises(TypeError, match="the numbers of one key at a time"):
        metrics.summary({"age": probabilities}, labels)


def test_one_hot_rows_on_both_sides_are_told() -> None:
    rows = torch.eye(5, dtype=torch.long)[torch.arange(20) % 5]
    with pytest.raises(ValueError, match="one-hot rows"):
        metrics.accuracy(rows, rows.roll(1, 0))


def test_numbers_of_ranks_that_do_not_fit() -> None:
    for number in (7, 3.0):
        with pytest.raises(ValueError, match="`num_ranks` to be the number of ranks"):
            metrics.mae_by_rank([1.0, 2.0], [0, 1], values=[1, 2, 3], num_ranks=number)


def test_a_default_device_changes_nothing() -> None:
    logits, labels = samples()
    expected = metrics.summary(logits, labels)
    with torch.device("meta"):
        assert metrics.summary(logits, labels) == expected
        assert metrics.accuracy([0, 1, 2], [0, 1, 1]) == pytest.approx(2 / 3)
        calibration = op.calibrate(logits, labels)
        op.adapt_prior(logits, [1, 1, 1, 1, 1])
        first, last = op.ConformalRanks(0.8).fit(logits, labels.tolist()).predict(logits)
        assert 0.7 < metrics.coverage(first, last, labels) <= 1
        fit = op.OrdinalPromptClassifier().fit(logits.numpy(), labels.numpy())
        assert fit.predict(logits.numpy()).shape == (200,)
        assert op.rank_indices(["b"], ["a", "b"]).tolist() == [1]
    assert calibration == op.calibrate(logits, labels)
