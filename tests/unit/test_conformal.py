"""Sets of ranks: contiguous, never empty, and with the coverage that they promise."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.base import BaseEstimator, ClassifierMixin
from torch import Tensor

import ordinal_prompt as op
from ordinal_prompt import metrics
from ordinal_prompt.conformal import SCORES, rank_scores


def samples(number: int, ranks: int, seed: int, constant: bool = False) -> tuple[Tensor, Tensor]:
    """Logits of a wrong model, and labels of the right one."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(number, ranks, generator=generator)
    labels = torch.multinomial((0.5 * logits).softmax(1), 1, generator=generator)[:, 0]
    return (torch.zeros_like(logits) if constant else logits), labels


SPLITS, TESTED = 200, 50


def band(coverage: float, number: int, tested: int, splits: int = SPLITS) -> tuple[float, float]:
    """The least and the most of the mean coverage over splits, each of `number` calibration and `tested` test samples.

    Without ties the coverage of one split is a beta variable between `coverage` and 1 / (number + 1) more; over the
    splits its mean, found with so many test samples, is within these bounds but for one case in a million.
    """
    spread = math.sqrt(coverage * (1 - coverage) * (1 / (tested * splits) + 1 / (splits * (number + 2))))
    far = stats.norm.ppf(1 - 1e-6) * spread
    return coverage - far, coverage + 1 / (number + 1) + far


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("ranks", [2, 5, 21, 101])
@pytest.mark.parametrize("number", [10, 100, 1000])
@pytest.mark.parametrize("kind", ["distinct", "tied", "constant"])
def test_the_coverage_is_within_the_binomial_band(score: str, ranks: int, number: int, kind: str) -> None:
    logits, labels = samples(SPLITS * (number + TESTED) // 10, ranks, 0, constant=kind == "constant")
    if kind == "tied":
        logits = logits.round()[:, :1].sign() * torch.linspace(-2, 2, ranks)
        labels = torch.multinomial((0.5 * logits).softmax(1), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    covered, narrow = [], 0
    for seed in range(SPLITS):
        chosen = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
        held_out, test = chosen[:number], chosen[number : number + TESTED]
        sets = op.ConformalRanks(0.8, score).fit(logits[held_out], labels[held_out])
        first, last = sets.predict(logits[test])
        assert bool(((first >= 0) & (first <= last) & (last < ranks)).all())
        covered.append(metrics.coverage(first, last, labels[test]))
        narrow += int((last - first + 1 < ranks).sum())
    least, most = band(0.8, number, TESTED)
    assert sum(covered) / SPLITS >= least
    if kind == "distinct":
        assert narrow > 0
        assert sum(covered) / SPLITS <= most


class Given(ClassifierMixin, BaseEstimator):
    """Takes its features for the probabilities of its classes."""

    def __init__(self, classes: int) -> None:
        self.classes_ = np.arange(classes)

    def predict_proba(self, features: Any) -> Any:
        return features

    def predict(self, features: Any) -> Any:
        return features.argmax(1)


def sets_of_mapie(held_out: Any, labels: Any, test: Any, coverage: float) -> Any:
    """(M, K) which ranks are in the set, by MAPIE's quantile of one minus a probability.

    Scores (…, K) of the ranks are laid into probabilities, with a class behind the ranks for the mass that is left.
    """
    mapie = pytest.importorskip("mapie.classification")
    given = [(1 - scores.numpy() / scores.shape[1]) / scores.shape[1] for scores in (held_out, test)]
    given = [np.concatenate([part, 1 - part.sum(1, keepdims=True)], axis=1) for part in given]
    sets = mapie.SplitConformalClassifier(Given(given[0].shape[1]), confidence_level=coverage, conformity_score="lac")
    return sets.conformalize(given[0], labels.numpy()).predict_set(given[1])[1][:, :-1, 0]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("by_rank", [False, True])
@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.95])
@pytest.mark.filterwarnings("ignore:WARNING. your conformalization dataset has less labels")
def test_sets_are_those_of_mapie(score: str, by_rank: bool, coverage: float) -> None:
    logits, labels = samples(600, 5, 0)
    held_out, test = (rank_scores(part.double(), score) for part in (logits[:400], logits[400:]))
    expected = sets_of_mapie(held_out, labels[:400], test, coverage)
    for rank in range(5) if by_rank else []:
        own = labels[:400] == rank
        expected[:, rank] = sets_of_mapie(held_out[own], labels[:400][own], test, coverage)[:, rank]
    first, last = op.ConformalRanks(coverage, score, by_rank).fit(logits[:400], labels[:400]).predict(logits[400:])
    ranks = torch.arange(5)
    inside = (first[:, None] <= ranks) & (ranks <= last[:, None])
    filled = expected.any(1)
    assert filled.mean() > 0.5  # MAPIE leaves sets empty, and where thresholds differ by rank, with gaps
    hull = np.logical_or.accumulate(expected, 1) & np.logical_or.accumulate(expected[:, ::-1], 1)[:, ::-1]
    np.testing.assert_array_equal(inside[filled], hull[filled])
    assert bool((inside[~filled].sum(1) == 1).all())


def classes(number: int, noise: Tensor, prior: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Labels by their prior (K,), and logits that depend on them alone, with noise () or (N, 1)."""
    labels = torch.multinomial(prior, number, replacement=True, generator=generator)
    distance = (torch.arange(len(prior)) - labels[:, None]).abs()
    return noise * torch.randn(number, len(prior), generator=generator) - distance, labels


@pytest.mark.parametrize("score", SCORES)
def test_each_rank_has_the_coverage(score: str) -> None:
    prior = torch.tensor([0.3, 0.3, 0.2, 0.1, 0.1])
    found: dict[bool, list[Tensor]] = {False: [], True: []}
    for seed in range(SPLITS):
        generator = torch.Generator().manual_seed(seed)
        held_out, test = (classes(number, torch.tensor(2.0), prior, generator) for number in (400, 400))
        for by_rank, rows in found.items():
            sets = op.ConformalRanks(0.8, score, by_rank=by_rank).fit(*held_out)
            rows.append(metrics.coverage_by_rank(*sets.predict(test[0]), test[1], 5))
    means = {by_rank: torch.stack(rows).nanmean(dim=0) for by_rank, rows in found.items()}
    for rank in range(5):
        number = int(400 * prior[rank])
        assert means[True][rank] >= band(0.8, number, number)[0]
    assert means[False].min() < 0.75  # what calibration over all ranks together does not give


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("by_rank", [False, True])
def test_each_group_has_the_coverage(score: str, by_rank: bool) -> None:
    prior, rate = torch.full((3,), 1 / 3), {"clear": 0.5, "blurred": 4.0}
    covered: dict[str, list[float]] = {name: [] for name in rate}
    together: list[float] = []
    for seed in range(SPLITS):
        generator = torch.Generator().manual_seed(seed)
        groups = [name for name in rate for _ in range(150)]
        noise = torch.tensor([[rate[name]] for name in groups])
        held_out, test = (classes(300, noise, prior, generator) for _ in range(2))
        sets = op.ConformalRanks(0.8, score, by_rank).fit(*held_out, groups=groups)
        first, last = sets.predict(test[0], groups=groups)
        for place, name in enumerate(rate):
            part = slice(150 * place, 150 * place + 150)
            covered[name].append(metrics.coverage(first[part], last[part], test[1][part]))
        first, last = op.ConformalRanks(0.8, score, by_rank).fit(*held_out).predict(test[0][150:])
        together.append(metrics.coverage(first, last, test[1][150:]))
    for rows in covered.values():
        assert sum(rows) / SPLITS >= band(0.8, 150, 150)[0]
    assert sum(together) / SPLITS < 0.76  # in the blurred group, without groups


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("number", [30, 300])
def test_a_known_label_shift_has_the_coverage(score: str, number: int) -> None:
    here, there = torch.tensor([0.5, 0.3, 0.1, 0.05, 0.05]), torch.tensor([0.05, 0.05, 0.1, 0.3, 0.5])
    covered: dict[bool, list[float]] = {False: [], True: []}
    widths: list[float] = []
    for seed in range(SPLITS):
        generator = torch.Generator().manual_seed(seed)
        held_out = classes(number, torch.tensor(2.0), here, generator)
        held_out = (held_out[0] + torch.tensor([2.0, 1, 0, 0, 0]), held_out[1])  # of a model that expects `here`
        test = classes(TESTED, torch.tensor(2.0), there, generator)
        for shifted, rows in covered.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # too few samples, for some of the splits
                sets = op.ConformalRanks(0.8, score).fit(*held_out, shift=there / here if shifted else None)
            first, last = sets.predict(test[0] + torch.tensor([2.0, 1, 0, 0, 0]))
            rows.append(metrics.coverage(first, last, test[1]))
        widths.append(metrics.mean_width(first, last))
    effective = int(number / float((there**2 / here).sum()))  # the weights' effective number of samples
    assert sum(covered[True]) / SPLITS >= band(0.8, effective, TESTED)[0]
    assert sum(covered[False]) / SPLITS < 0.76
    assert number < 300 or sum(widths) / SPLITS < 4.5


@pytest.mark.parametrize("score", SCORES)
def test_scores_by_their_definition_and_sets_without_gaps(score: str) -> None:
    logits = 5 * torch.randn(50, 7).double()
    found = rank_scores(logits, score)
    for row, z in zip(found, logits, strict=True):
        p = z.softmax(0)
        for y in range(7):
            cdf = [float(p[: k + 1].sum()) for k in range(7)]
            slow = abs(cdf[y] - float(p[y]) / 2 - 0.5)
            if score == "rps":
                slow = sum((cdf[k] - (y <= k)) ** 2 for k in range(7))
            assert float(row[y]) == pytest.approx(slow)
        for threshold in row:
            inside = (row <= threshold).int()
            assert inside.diff().abs().sum() <= 2  # one block
            assert not (inside[0] == 1 and inside[-1] == 1 and inside.sum() < 7)


def test_too_few_samples_give_all_ranks_and_say_so() -> None:
    logits, labels = samples(5, 4, 0)
    with pytest.warns(UserWarning, match=r"5 calibration samples are too few for a coverage of 0.9.* At least 9"):
        sets = op.ConformalRanks(0.9).fit(logits, labels)
    first, last = sets.predict(torch.randn(3, 4))
    assert first.tolist() == [0, 0, 0]
    assert last.tolist() == [3, 3, 3]
    assert op.ConformalRanks.from_json(sets.to_json()).predict(logits)[1].tolist() == [3] * 5


def test_one_sample_is_too_few_and_ranks_or_groups_are_named() -> None:
    with pytest.warns(UserWarning, match=r"1 calibration samples are too few"):
        sets = op.ConformalRanks(0.9).fit(torch.zeros(1, 3), [2])
    assert [bound.tolist() for bound in sets.predict(torch.randn(1, 3))] == [[0], [2]]
    logits, labels = samples(60, 4, 0)
    groups = ["a"] * 55 + ["b"] * 5
    with pytest.warns(
        UserWarning, match=r"samples are in the groups 'b' too few .* At least 9 .* in each group\."
    ) as told:
        sets = op.ConformalRanks(0.9).fit(logits, labels, groups=groups)
    assert len(told) == 1
    first, last = sets.predict(logits, groups=groups)
    assert bool((last - first)[55:].eq(3).all())
    assert bool((last - first)[:55].lt(3).any())
    with pytest.warns(UserWarning, match=r"for some ranks too few .* of each rank, and more under a shift"):
        op.ConformalRanks(0.9, by_rank=True).fit(logits, labels.clamp(max=2), shift=[1, 1, 1, 2])


def test_a_set_is_never_empty_and_full_where_nothing_is_known() -> None:
    sure = 50 * torch.eye(5).repeat(20, 1)
    sets = op.ConformalRanks(0.5).fit(sure, torch.arange(5).repeat(20))
    first, last = sets.predict(torch.tensor([[0.0, 0, 9, 9, 0], [torch.nan, 0, 0, 0, 0]]))
    assert first[0] <= last[0]
    assert (int(first[1]), int(last[1])) == (0, 4)


def test_ties_do_not_hang_on_the_last_bits() -> None:
    logits, labels = torch.zeros(100, 5), torch.arange(5).repeat(20)
    sets = op.ConformalRanks(0.59).fit(logits, labels)
    assert sets.thresholds is not None
    scores = rank_scores(logits[:1], "cdf")  # float32, as exported layers give them
    assert [float(score) <= threshold for score, threshold in zip(scores[0], sets.thresholds, strict=True)] == [
        False, True, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("holder", [list, np.array, pd.Series, torch.tensor])
def test_groups_of_any_kind_and_shape(holder: Any) -> None:
    logits, labels = samples(300, 5, 0)
    names = [10, 20, 30] * 100
    sets = op.ConformalRanks(0.8).fit(logits, labels, groups=holder(names))
    assert sets.groups == (10, 20, 30)
    first, last = sets.predict(logits, groups=holder(names))
    for group in (10, 20, 30):
        part = torch.tensor(names) == group
        alone = op.ConformalRanks(0.8).fit(logits[part], labels[part]).predict(logits[part])
        assert torch.equal(first[part], alone[0])
        assert torch.equal(last[part], alone[1])
    again = op.ConformalRanks.from_json(sets.to_json())
    assert again.groups == sets.groups
    assert torch.equal(again.predict(logits, groups=names)[1], last)
    assert torch.equal(sets.predict(logits.numpy(), groups=names)[1], last)
    square = sets.predict(logits.reshape(30, 10, 5), groups=torch.tensor(names).reshape(30, 10))
    assert torch.equal(square[0], first.reshape(30, 10))


def test_a_shift_by_dictionary_or_series() -> None:
    logits, labels = samples(300, 3, 0)
    found = [
        op.ConformalRanks(0.8).fit(logits, labels, shift=shift).thresholds
        for shift in ([1, 2, 4], {2: 4, 0: 1, 1: 2}, pd.Series([4, 1, 2], index=[2, 0, 1]), torch.tensor([1, 2, 4]))
    ]
    for thresholds in found:
        assert torch.equal(thresholds, found[0])


def test_a_few_numbers_are_all_that_is_kept() -> None:
    logits, labels = samples(300, 5, 0)
    sets = op.ConformalRanks(0.9, "rps").fit(logits, labels)
    again = op.ConformalRanks.from_json(sets.to_json())
    for mine, theirs in zip(sets.predict(logits), again.predict(logits), strict=True):
        assert torch.equal(mine, theirs)
    thresholds = json.loads(sets.to_json())["thresholds"]  # and without the package:
    cdf = logits[0].double().softmax(0).cumsum(0)
    inside = [y for y in range(5) if sum((float(cdf[k]) - (y <= k)) ** 2 for k in range(5)) <= thresholds[y]]
    assert (inside[0], inside[-1]) == tuple(int(bound[0]) for bound in sets.predict(logits))


def test_mistakes() -> None:
    logits, labels = samples(30, 5, 0)
    with pytest.raises(ValueError, match=r"`coverage` in \(0, 1\)"):
        op.ConformalRanks(90)
    with pytest.raises(ValueError, match="`score` to be one of"):
        op.ConformalRanks(score="aps")
    with pytest.raises(ValueError, match="call fit on held-out samples first"):
        op.ConformalRanks().predict(logits)
    with pytest.raises(ValueError, match=r"labels in 0…4"):
        op.ConformalRanks().fit(logits, labels + 1)
    with pytest.raises(ValueError, match="logits of 5 ranks"):
        op.ConformalRanks(0.5).fit(logits, labels).predict(logits[:, :3])
    with pytest.raises(ValueError, match="`shift` to be 5 ratios that are not negative, nor all"):
        op.ConformalRanks().fit(logits, labels, shift=torch.zeros(5))
    with pytest.raises(TypeError, match="`logits` to be numbers, but got str"):
        op.ConformalRanks(0.5).fit(logits, labels).predict("logits")
    with pytest.raises(ValueError, match="at least one sample"):
        op.ConformalRanks().fit(logits[:0], labels[:0])
    with pytest.raises(ValueError, match="29 `groups` for 30 samples"):
        op.ConformalRanks().fit(logits, labels, groups=["a"] * 29)
    with pytest.raises(ValueError, match="1 of `groups` are missing"):
        op.ConformalRanks().fit(logits, labels, groups=[None] + ["a"] * 29)
    with pytest.raises(TypeError, match="names or integers, but got float"):
        op.ConformalRanks().fit(logits, labels, groups=[0.5] * 30)
    grouped = op.ConformalRanks(0.5).fit(logits, labels, groups=["a", "b"] * 15)
    with pytest.raises(ValueError, match="as in fit, one of 'a', 'b' for each sample, but got none"):
        grouped.predict(logits)
    with pytest.raises(ValueError, match="among those of the calibration samples, 'a', 'b', but got 'c'; calibrate"):
        grouped.predict(logits, groups=["c"] * 30)
    with pytest.raises(ValueError, match="as in fit, none, but got some"):
        op.ConformalRanks(0.5).fit(logits, labels).predict(logits, groups=["a"] * 30)
    for text in ("", "[]", "{}", '{"coverage": 2, "score": "cdf", "by_rank": false, "thresholds": [1]}'):
        with pytest.raises(ValueError, match="what ConformalRanks.to_json wrote"):
            op.ConformalRanks.from_json(text)


def test_more_mistakes() -> None:
    logits, labels = samples(60, 3, 0)
    sets = op.ConformalRanks(np.float32(0.5), by_rank=np.bool_(False)).fit(logits, labels)
    assert torch.equal(op.ConformalRanks.from_json(sets.to_json()).thresholds, sets.thresholds)
    with pytest.raises(ValueError, match="`by_rank` to be True or False, but got 'no'"):
        op.ConformalRanks(by_rank="no")
    with pytest.raises(ValueError, match=r"`coverage` in \(0, 1\), but got None"):
        op.ConformalRanks(None)
    with pytest.raises(ValueError, match="2 rows of thresholds are needed"):
        op.ConformalRanks.from_json(
            json.dumps({**json.loads(sets.to_json()), "groups": ["a", "b"], "thresholds": [[1.0]]})
        )
    groups = [np.int64(place % 2) for place in range(60)]
    grouped = op.ConformalRanks(0.5).fit(logits, labels, groups=groups)
    assert grouped.predict(logits[0], groups=1)[0].shape == ()
    with pytest.raises(ValueError, match="60 of `groups` are missing"):
        op.ConformalRanks(0.5).fit(logits, labels, groups=pd.Series([pd.NA] * 60, dtype="string"))
    with pytest.raises(TypeError, match="names or integers, but got datetime64"):
        op.ConformalRanks(0.5).fit(logits, labels, groups=np.array(["2024-01-01"] * 60, dtype="datetime64[D]"))
    with pytest.warns(UserWarning, match="Pass their logarithm"):
        sets.predict(logits.softmax(1))
    never = op.ConformalRanks(0.5).fit(logits, labels, shift=[1, 1, 0])
    assert never.thresholds is not None


def test_large_ratios_and_ratios_of_ranks_by_themselves() -> None:
    logits, labels = samples(400, 3, 0)
    sets = op.ConformalRanks(0.9).fit(logits, labels)
    assert torch.equal(op.ConformalRanks(0.9).fit(logits, labels, shift=[1e307] * 3).thresholds, sets.thresholds)
    each = op.ConformalRanks(0.9, by_rank=True).fit(logits, labels)
    shifted = op.ConformalRanks(0.9, by_rank=True).fit(logits, labels, shift=[0, 1, 5])
    assert torch.equal(shifted.thresholds, each.thresholds)


@pytest.mark.parametrize(
    "changed",
    [
        {"thresholds": [math.nan, 1.0, 1.0]},
        {"thresholds": [True, False, True]},
        {"groups": ["a", "a"], "thresholds": [[0.1, 0.2, 0.3]] * 2},
        {"groups": "ab", "thresholds": [[0.1, 0.2, 0.3]] * 2},
    ],
)
def test_json_of_others(changed: dict[str, Any]) -> None:
    written = json.loads(op.ConformalRanks(0.5).fit(torch.eye(3), [0, 1, 2]).to_json())
    with pytest.raises(ValueError, match="to_json wrote"):
        op.ConformalRanks.from_json(json.dumps(written | changed))
