"""Pictures of prototypes, of answers, and of how far to trust them (extra `plot`: matplotlib, loaded where it is used).

Each function draws into the Axes that it is given, or into new ones, and returns them; titles and labels may be changed
there.  Data may be tensors on any device, NumPy arrays or lists.  ImportError where matplotlib is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ordinal_prompt import metrics
from ordinal_prompt.arrays import Labels, is_number, number_tensor, warn_of_probabilities
from ordinal_prompt.conformal import ConformalRanks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_TICKS, MAX_LETTERS = 12, 24
COVERAGES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
PLAIN, MARKED, TRUE = "#b8c4d6", "#3465a4", "#c0392b"


def similarity(
    prototypes: Any, names: Sequence[str] | None = None, ax: Axes | None = None, centered: bool = True
) -> Axes:
    """Cosines between the prototypes of all pairs of ranks: near the diagonal high where ranks are in order.

    Args:
        prototypes: (K, D), as `head.prototypes()` or the weight of a linear layer.
        names: of the K ranks; default their indices.
        ax: where to draw.
        centered: take the mean prototype off first, which all text features share.

    Raises:
        ValueError: prototypes of another shape, or not finite; names of another number.
        TypeError: what is no number, or no Axes.
    """
    rows = _rows(prototypes)
    labels, ax = _names(names, len(rows)), _axes(ax)
    unit = F.normalize(rows - rows.mean(dim=0) if centered else rows, dim=1)
    image = ax.imshow((unit @ unit.T).numpy(), cmap="RdBu", vmin=-1, vmax=1)
    ax.figure.colorbar(image, ax=ax, shrink=0.8, label="cosine, centred" if centered else "cosine")
    _rank_ticks(ax, labels, "x")
    _rank_ticks(ax, labels, "y")
    ax.set_title(f"ordinality {metrics.ordinality(rows):.2f}, chance {0.5 + 1 / len(rows):.2f}")
    return ax


def order(prototypes: Any, names: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """The path of the prototypes from the first rank to the last, in the plane where they spread most (PCA).

    The first rank is to the left of the last.  A path without turns back is in order.

    Args:
        prototypes: (K, D).
        names: of the K ranks; default their indices.
        ax: where to draw.

    Raises:
        ValueError, TypeError: as `similarity`.
    """
    rows = _rows(prototypes)
    labels, ax = _names(names, len(rows)), _axes(ax)
    left, spread, _ = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    places = F.pad(left * spread, (0, 1))[:, :2]  # of prototypes (K, 1), too
    places = places * torch.where(places[-1] >= places[0], 1.0, -1.0)
    x, y = places.T.numpy()
    ax.plot(x, y, color=PLAIN, zorder=1)
    ax.scatter(x, y, c=range(len(rows)), cmap="viridis", zorder=2)
    for rank in _shown(len(rows)):
        ax.annotate(labels[rank], (x[rank], y[rank]), xytext=(4, 4), textcoords="offset points")
    shares = F.pad(spread.square() / spread.square().sum().clamp_min(torch.finfo(spread.dtype).tiny), (0, 1))
    told = [f"{word} principal component ({float(shares[i]):.0%})" for i, word in enumerate(("first", "second"))]
    ax.margins(0.15)  # room for names
    ax.set(xlabel=told[0], ylabel=told[1], title="ranks from the first to the last")
    return ax


def distribution(
    logits: Any,
    names: Sequence[str] | None = None,
    true: int | str | None = None,
    interval: tuple[int, int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Predicted probabilities of the ranks of one sample, with its set of ranks and its true rank.

    Args:
        logits: (K,) of the sample.
        names: of the K ranks; default their indices.
        true: index (or name) of its true rank, which an arrow marks.
        interval: first and last rank of its set, as `ConformalRanks.predict` gives them.
        ax: where to draw.

    Raises:
        ValueError: logits of another shape, or not finite; ranks outside 0…K-1; names of another number.
        TypeError: what is no number, or no Axes.
    """
    rows = _finite(logits, "logits")
    warn_of_probabilities(rows, stacklevel=3)
    if rows.dim() != 1 or len(rows) < 2:
        raise ValueError(f"Expected `logits` (K,) of one sample, K at least 2, but got shape {tuple(rows.shape)}.")
    labels = _names(names, len(rows))
    places = [_place(rank, names, len(rows), "true") for rank in ([] if true is None else [true])]
    bounds = [] if interval is None else [*interval] if hasattr(interval, "__iter__") else [interval]
    if len(bounds) not in (0, 2):
        raise ValueError(f"Expected `interval` to be the first and the last rank of a set, but got {interval!r}.")
    first, last = [_place(rank, names, len(rows), "interval") for rank in bounds] or (0, -1)
    if bounds and first > last:
        raise ValueError(f"Expected `interval` from its first to its last rank, but got {first} and {last}.")
    ax, probabilities = _axes(ax), torch.softmax(rows, dim=0).tolist()
    colors = [MARKED if first <= rank <= last else PLAIN for rank in range(len(rows))]
    ax.bar(range(len(rows)), probabilities, color=colors)
    if bounds:
        ax.axvspan(first - 0.5, last + 0.5, color=MARKED, alpha=0.12, label=f"set: {labels[first]} to {labels[last]}")
    for rank in places:
        ax.plot(rank, probabilities[rank], "v", color=TRUE, markersize=9, label=f"true: {labels[rank]}")
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    _rank_ticks(ax, labels, "x")
    ax.set(ylabel="probability", ylim=(0, 1.3 * max(probabilities)))  # room for the legend
    return ax


def reliability(logits: Any, labels: Labels, bins: int = 10, ax: Axes | None = None, label: str | None = None) -> Axes:
    """How often the rank is at most k, against the predicted probability of that, over all K-1 thresholds k.

    Args:
        logits: (..., K).
        labels: (...) rank indices.
        bins: number of bins of equal width; the area of a dot is the share of the samples in its bin.
        ax: where to draw; several calls draw into the same Axes.
        label: for the legend; default the ordinal calibration error.

    Raises:
        ValueError, TypeError: as `ordinal_prompt.metrics.reliability`; TypeError for what is no Axes.
    """
    confidence, frequency, counts = metrics.reliability(logits, labels, bins)
    ax = _axes(ax)
    number = counts.sum(dim=0)
    filled = number > 0
    predicted, found = (
        ((part.nan_to_num(nan=0.0) * counts).sum(dim=0) / number)[filled] for part in (confidence, frequency)
    )
    error = metrics.ordinal_calibration_error(logits, labels, bins)
    told = f"calibration error {error:.3f}" if label is None else f"{label}, calibration error {error:.3f}"
    ax.axline((0, 0), slope=1, color=PLAIN, linestyle="--", zorder=1)
    (line,) = ax.plot(predicted.numpy(), found.numpy(), zorder=2, label=told)
    sizes = (300 * number / number.sum())[filled]
    ax.scatter(predicted.numpy(), found.numpy(), s=sizes.numpy(), color=line.get_color(), zorder=2)
    ax.set(xlabel="predicted probability of “at most rank k”", ylabel="observed frequency", xlim=(0, 1), ylim=(0, 1))
    ax.set_aspect("equal")
    ax.legend()
    return ax


def coverage_width(
    logits: Any,
    labels: Labels,
    test_logits: Any,
    test_labels: Labels,
    score: str = "cdf",
    coverages: float | Sequence[float] = COVERAGES,
    ax: Axes | None = None,
    label: str | None = None,
) -> Axes:
    """Coverage of conformal sets on test samples, against their mean width, with the coverage that was asked for.

    Args:
        logits, labels: (N, K) and (N,) that `ConformalRanks` is fitted on.
        test_logits, test_labels: (M, K) and (M,) other samples.
        score: of `ConformalRanks`.
        coverages: asked for, one dot each.
        ax: where to draw; several calls (other scores, other models) draw into the same Axes.
        label: for the legend; default the score.

    Raises:
        ValueError, TypeError: as `ConformalRanks`; TypeError for what is no Axes.
    """
    points = []
    wanted: Any = [coverages] if is_number(coverages) else coverages
    for asked in sorted(wanted):
        first, last = ConformalRanks(asked, score).fit(logits, labels).predict(test_logits)
        points.append((metrics.mean_width(first, last), metrics.coverage(first, last, test_labels), asked))
    if not points:
        raise ValueError("Expected at least one of `coverages`, but got none.")
    widths, found, asked_for = zip(*points, strict=True)
    ax = _axes(ax)
    (line,) = ax.plot(widths, found, "o-", label=label or score)
    ax.scatter(widths, asked_for, marker="_", s=120, color=line.get_color(), zorder=3)
    ax.set(xlabel="mean width in ranks", ylabel="coverage (dash: asked for)", ylim=(None, 1.02))
    ax.legend()
    return ax


def _axes(ax: Any) -> Any:
    """The given Axes, or new ones."""
    if ax is not None:
        if not hasattr(ax, "imshow") or not hasattr(ax, "figure"):
            raise TypeError(f"Expected `ax` to be one matplotlib Axes, but got {type(ax).__name__}.")
        return ax
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError("Pictures need matplotlib; pip install 'ordinal_prompt[plot]'.") from error
    return plt.subplots(layout="constrained")[1]


def _finite(data: Any, argument: str) -> Tensor:
    tensor = number_tensor(data, argument, torch.float64).detach().cpu().double()
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"Expected finite `{argument}`, but got NaN or infinity.")
    return tensor


def _rows(prototypes: Any) -> Tensor:
    rows = _finite(prototypes, "prototypes")
    if rows.dim() != 2 or len(rows) < 2:
        raise ValueError(f"Expected `prototypes` of shape (K, D), K at least 2, but got {tuple(rows.shape)}.")
    return rows


def _names(names: Sequence[str] | None, number: int) -> list[str]:
    """A short name for each of K ranks, with nothing in it that matplotlib would take for mathematics."""
    if names is not None and (isinstance(names, (str, Mapping, Set)) or not hasattr(names, "__iter__")):
        raise TypeError(f"Expected `names` to be a list, lowest rank first, but got {names!r}.")
    known = [str(name) for name in (range(number) if names is None else names)]
    if len(known) != number:
        raise ValueError(f"Expected a name for each of the {number} ranks in `names`, but got {len(known)}.")
    short = [name if len(name) <= MAX_LETTERS else f"{name[: MAX_LETTERS - 1]}…" for name in known]
    return [name.replace("$", r"\$") for name in short]


def _place(rank: Any, names: Sequence[str] | None, number: int, argument: str) -> int:
    """The index of a rank that is given by its index or its name."""
    if isinstance(rank, str) and names is not None and rank in (known := [str(name) for name in names]):
        return known.index(rank)
    if hasattr(rank, "tolist"):
        rank = rank.tolist()
    if not hasattr(rank, "__index__") or not 0 <= rank < number:
        raise ValueError(f"Expected `{argument}` to hold ranks in 0…{number - 1}, but got {rank!r}.")
    return int(rank)


def _shown(number: int) -> range:
    """The ranks whose names there is room for."""
    return range(0, number, -(-number // MAX_TICKS))


def _rank_ticks(ax: Any, names: list[str], axis: str) -> None:
    shown = _shown(len(names))
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    long = axis == "x" and max(map(len, names)) > 3
    getattr(ax, f"set_{axis}ticks")([*shown], [names[rank] for rank in shown], **(turned if long else {}))
