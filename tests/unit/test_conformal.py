"""Sets of ranks: contiguous, never empty, and with the coverage that they promise."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy import stats

import ordinal_prompt as op
from ordinal_prompt import metrics
from ordinal_prompt.conformal import SCORES, rank_scores


def samples(number: int, ranks: int, seed: int, constant: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a wrong model, and labels of the right one."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(number, ranks, generator=generator)
    labels = torch.multinomial((0.5 * logits).softmax(1), 1, generator=generator)[:, 0]
    return (torch.zeros_like(logits) if constant else logits), labels


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("ranks", [2, 5, 21])
@pytest.mark.parametrize("number", [10, 100, 1000])
@pytest.mark.parametrize("constant", [False, True])
def test_the_coverage_is_within_the_binomial_band(score: str, ranks: int, number: int, constant: bool) -> None:
    covered = total = 0
    for seed in range(100):
        logits, labels = samples(number + 100, ranks, seed, constant)
        sets = op.ConformalRanks(0.8, score).fit(logits[:number], labels[:number])
        first, last = sets.predict(logits[number:])
        assert (first <= last).all()
        covered += int(((first <= labels[number:]) & (labels[number:] <= last)).sum())
        total += 100
    # The coverage of one split is a beta variable; over 100 splits its mean is this close to the least that it may be.
    spread = math.sqrt(0.8 * 0.2 * (1 / total + 1 / (100 * (number + 2))))
    assert covered / total >= 0.8 + stats.norm.ppf(1e-4) * spread
    if not constant and ranks > 5:
        assert covered / total <= 0.8 + 1 / (number + 1) + 0.05 + stats.norm.ppf(1 - 1e-4) * spread


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


def test_each_rank_is_covered_by_itself() -> None:
    logits, labels = samples(4000, 5, 0)
    sets = op.ConformalRanks(0.8, by_rank=True).fit(logits[:2000], labels[:2000])
    first, last = sets.predict(logits[2000:])
    assert metrics.coverage_by_rank(first, last, labels[2000:]).min() > 0.72
    assert 1 <= metrics.mean_width(first, last) < 5


def test_a_known_label_shift_keeps_the_coverage() -> None:
    logits, labels = samples(40000, 5, 0)
    shift = torch.tensor([8.0, 1.0, 1.0, 1.0, 0.1])
    kept = torch.rand(20000, generator=torch.Generator().manual_seed(1)) < shift[labels[20000:]] / 8
    shifted, truth = logits[20000:][kept], labels[20000:][kept]
    sets = op.ConformalRanks(0.8).fit(logits[:20000], labels[:20000], shift=shift)
    assert metrics.coverage(*sets.predict(shifted), truth) == pytest.approx(0.8, abs=0.03)


def test_too_few_samples_give_all_ranks_and_say_so() -> None:
    logits, labels = samples(5, 4, 0)
    with pytest.warns(UserWarning, match=r"5 calibration samples are too few for a coverage of 0.9.* At least 9"):
        sets = op.ConformalRanks(0.9).fit(logits, labels)
    first, last = sets.predict(torch.randn(3, 4))
    assert first.tolist() == [0, 0, 0]
    assert last.tolist() == [3, 3, 3]
    assert op.ConformalRanks.from_json(sets.to_json()).predict(logits)[1].tolist() == [3] * 5


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
    with pytest.raises(ValueError, match="`shift` to be 5 ratios above zero"):
        op.ConformalRanks().fit(logits, labels, shift=torch.zeros(5))
