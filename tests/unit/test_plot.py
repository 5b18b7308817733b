"""Pictures: what is drawn is what was given, and where it was asked for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ordinal_prompt as op

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    plt.close("all")  # what a test before these drew
    yield
    plt.close("all")


def samples(number: int = 200, ranks: int = 5) -> tuple[Tensor, Tensor]:
    logits = 2 * torch.randn(number, ranks)
    return logits, torch.multinomial(logits.softmax(1), 1)[:, 0]


PROTOTYPES = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
NAMES = ["bad", "poor", "fair", "good", "a name that is far too long for an axis"]
DRAWN: dict[str, Callable[[Any], Axes]] = {
    "similarity": lambda ax: op.plot.similarity(PROTOTYPES, NAMES, ax),
    "order": lambda ax: op.plot.order(PROTOTYPES, NAMES, ax),
    "distribution": lambda ax: op.plot.distribution(torch.arange(5.0), NAMES, 3, (2, 4), ax),
    "reliability": lambda ax: op.plot.reliability(*samples(), ax=ax),
    "coverage_width": lambda ax: op.plot.coverage_width(*samples(), *samples(), ax=ax),
}


@pytest.mark.parametrize("kind", DRAWN)
def test_axes_are_those_given_or_new(kind: str) -> None:
    figure, ax = plt.subplots()
    assert DRAWN[kind](ax) is ax
    figure.canvas.draw()
    assert len(plt.get_fignums()) == 1
    assert DRAWN[kind](None) is not ax
    assert len(plt.get_fignums()) == 2
    with pytest.raises(TypeError, match="`ax` to be one matplotlib Axes, but got ndarray"):
        DRAWN[kind](plt.subplots(1, 2)[1])


@pytest.mark.parametrize("centered", [True, False])
def test_similarity(centered: bool) -> None:
    ax = op.plot.similarity(PROTOTYPES.clone().requires_grad_(), NAMES, centered=centered)
    rows = PROTOTYPES - PROTOTYPES.mean(dim=0) if centered else PROTOTYPES
    expected = F.cosine_similarity(rows[:, None], rows[None], dim=-1)
    np.testing.assert_allclose(ax.images[0].get_array(), expected, atol=1e-6)
    assert [text.get_text() for text in ax.get_yticklabels()] == [*NAMES[:4], "a name that is far too …"]
    assert ax.get_title() == f"ordinality {op.ordinality(PROTOTYPES):.2f}, chance 0.70"
    many = op.plot.similarity(torch.randn(101, 8).numpy())
    assert [text.get_text() for text in many.get_xticklabels()] == [*map(str, range(0, 101, 9))]


def test_the_order_of_ranks_is_a_path() -> None:
    angle = torch.linspace(0, 1, 7)
    ax = op.plot.order(torch.stack([angle.cos(), angle.sin(), 0 * angle], dim=1))
    path = ax.lines[0].get_xdata()
    assert bool((np.diff(path) > 0).all())
    assert ax.lines[0].get_xydata().shape == (7, 2)
    assert "first principal component" in ax.get_xlabel()
    assert [text.get_text() for text in ax.texts] == [*map(str, range(7))]
    two = op.plot.order([[0.0, 1.0], [1.0, 0.0]])
    assert two.lines[0].get_xdata()[0] < two.lines[0].get_xdata()[1]
    op.plot.order([[1.0], [2.0], [4.0]]).figure.canvas.draw()
    op.plot.order(torch.ones(3, 4)).figure.canvas.draw()


def test_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 3.0, 2.0, 0.0])
    ax = op.plot.distribution(logits, NAMES, true=3, interval=(torch.tensor(2), 3))
    heights = [bar.get_height() for bar in ax.containers[0]]
    np.testing.assert_allclose(heights, logits.softmax(0), rtol=1e-6)
    colors = [bar.get_facecolor() for bar in ax.containers[0]]
    assert colors[2] == colors[3] != colors[1]
    assert len(set(colors)) == 2
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["set: fair to good", "true: good"]
    assert ax.lines[0].get_xydata().tolist() == [[3, pytest.approx(heights[3])]]
    plain = op.plot.distribution(logits)
    assert plain.get_legend() is None
    assert len({bar.get_facecolor() for bar in plain.containers[0]}) == 1


def test_reliability() -> None:
    logits, labels = samples(500)
    ax = op.plot.reliability(logits, labels, bins=4, label="raw")
    cumulated, predicted, found = logits.double().softmax(1).cumsum(1)[:, :-1], [], []
    happened = (labels[:, None] <= torch.arange(4)).double()
    for b in range(4):
        here = (cumulated >= b / 4) & (cumulated < (b + 1) / 4)
        predicted.append(float(cumulated[here].mean()))
        found.append(float(happened[here].mean()))
    np.testing.assert_allclose(ax.lines[1].get_xydata(), np.stack([predicted, found], axis=1), rtol=1e-6)
    error = op.metrics.ordinal_calibration_error(logits, labels, 4)
    op.plot.reliability(op.calibrate(logits, labels)(logits), labels, ax=ax)
    told = [text.get_text() for text in ax.get_legend().get_texts()]
    assert told[0] == f"raw, calibration error {error:.3f}"
    assert len(told) == 2


def test_coverage_against_width() -> None:
    held_out, test = samples(), samples()
    ax = op.plot.coverage_width(*held_out, *test, score="rps", coverages=[0.9, 0.5], label="ours")
    expected = []
    for asked in (0.5, 0.9):
        first, last = op.ConformalRanks(asked, "rps").fit(*held_out).predict(test[0])
        expected.append((op.metrics.mean_width(first, last), op.metrics.coverage(first, last, test[1])))
    np.testing.assert_allclose(ax.lines[0].get_xydata(), expected)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["ours"]


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"`prototypes` of shape \(K, D\)"):
        op.plot.similarity(torch.ones(4))
    with pytest.raises(ValueError, match="finite `prototypes`"):
        op.plot.order(torch.full((2, 2), torch.nan))
    with pytest.raises(TypeError, match="`prototypes` to be numbers, but got Linear"):
        op.plot.order(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="each of the 5 ranks in `names`, but got 2"):
        op.plot.similarity(PROTOTYPES, ["bad", "good"])
    with pytest.raises(ValueError, match=r"`logits` \(K,\) of one sample"):
        op.plot.distribution(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="`true` to hold ranks in 0…2, but got 3"):
        op.plot.distribution(torch.zeros(3), true=3)
    with pytest.raises(ValueError, match="`interval` to hold ranks in 0…2, but got 7"):
        op.plot.distribution(torch.zeros(3), interval=(0, 7))
    with pytest.raises(ValueError, match="from its first to its last rank, but got 2 and 1"):
        op.plot.distribution(torch.zeros(3), interval=(2, 1))
    with pytest.raises(ValueError, match="at least one of `coverages`"):
        op.plot.coverage_width(*samples(), *samples(), coverages=[])


def test_matplotlib_is_asked_for_where_it_is_needed() -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import torch, ordinal_prompt as op\n"
        "try: op.plot.similarity(torch.eye(3))\n"
        "except ImportError as error: print(error)"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "pip install 'ordinal_prompt[plot]'" in output


def test_names_with_dollars_and_places_by_name() -> None:
    ax = op.plot.distribution([0.0, 1.0, 2.0], ["$", "$$", "$10"], true="$$", interval=(0, 1))
    ax.figure.canvas.draw()
    assert ax.get_xticklabels()[1].get_text() == r"\$\$"
    with pytest.raises(ValueError, match="`true` to hold ranks in 0…2, but got 1.7"):
        op.plot.distribution([0.0, 1.0, 2.0], true=1.7)
    with pytest.raises(TypeError, match="`names` to be a list, lowest rank first, but got {0: 'a'}"):
        op.plot.distribution([0.0, 1.0], {0: "a"})
    with pytest.raises(ValueError, match="the first and the last rank of a set, but got 2"):
        op.plot.distribution([0.0, 1.0, 2.0], interval=2)
