"""Tables and a plot of the runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from scipy import stats

_FITTED = ("zero-shot", "tip-adapter", "tip-adapter-f", "lp++", "ss-text+", "gaussian", "prolip")
_WITH_LANGUAGE = ("started-at-names", "cross-modal", "clap", *_FITTED)
PEERS = ("linear", "coral", "corn", "ridge", *_WITH_LANGUAGE)
BEST = "the best of them"


def report(runs: pd.DataFrame, settings: Sequence[str], heads: Sequence[str], ours: Sequence[str], title: str) -> str:
    """Means and standard deviations of every head, and paired differences between ours and the peers, in Markdown.

    `runs` has one row a run; settings are the columns of the tables, heads the rows.
    """
    mean, deviation = mean_and_deviation(runs, settings, heads, "mae")
    cells = mean.map("{:.3f}".format) + deviation.map(" ± {:.3f}".format).where(deviation.notna(), "")
    best = mean <= mean.min() + 1e-9
    parts = [
        f"# {title}",
        "Test MAE of the expectation, mean ± standard deviation over the seeds; bold is the best.",
        markdown(cells.where(~best, "**" + cells + "**").where(mean.notna(), ""), "head"),
    ]
    for metric, name in (("mae_median", "MAE of the median"), ("accuracy", "Accuracy"), ("kappa", "Quadratic kappa")):
        mean = mean_and_deviation(runs, settings, heads, metric)[0]
        parts += [f"{name}:", markdown(mean.map("{:.3f}".format).where(mean.notna(), ""), "head")]
    for our in ours:
        if our in mean.index and {*PEERS} & {*mean.index}:
            parts += [
                f"## {our} against its peers",
                "Paired differences of the test MAE over the seeds with 95 % confidence intervals (t); below zero, "
                f"{our} is better.\nThe last line takes the peer with the best mean in each setting.",
                markdown(against_peers(runs, settings, our), "against"),
            ]
    return "\n\n".join(parts) + "\n"


def mean_and_deviation(
    runs: pd.DataFrame, settings: Sequence[str], heads: Sequence[str], metric: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean and standard deviation over the seeds; a row for each head that has runs, a column for each setting."""
    grouped = runs.groupby(["head", "setting"])[metric]
    rows = [head for head in heads if head in {*runs["head"]}]
    mean, deviation = (
        table.unstack().reindex(index=rows, columns=[*settings]) for table in (grouped.mean(), grouped.std())
    )
    return mean, deviation


def against_peers(runs: pd.DataFrame, settings: Sequence[str], our: str) -> pd.DataFrame:
    """Differences of the MAE between one head and each of the peers, and the best of them in each setting, as text."""
    by_seed = runs.pivot_table(index="seed", columns=["setting", "head"], values="mae")
    cells: dict[tuple[str, str], str] = {}
    for setting in settings:
        if (setting, our) not in by_seed:
            continue
        of_peer = {peer: by_seed[setting, peer] for peer in PEERS if (setting, peer) in by_seed}
        for peer, theirs in of_peer.items():
            mean, half = paired_difference(by_seed[setting, our], theirs)
            cells[peer, setting] = f"{mean:+.3f}" + (f" ± {half:.3f}" if half == half else "")
        if of_peer:
            best = min(of_peer, key=lambda peer: float(of_peer[peer].mean()))
            cells[BEST, setting] = f"{cells[best, setting]} ({best})"
    rows = [peer for peer in (*PEERS, BEST) if any(peer == known for known, _ in cells)]
    return pd.DataFrame([[cells.get((peer, setting), "") for setting in settings] for peer in rows], rows, [*settings])


def paired_difference(ours: pd.Series[float], theirs: pd.Series[float]) -> tuple[float, float]:
    """Mean difference over the seeds that both have, and half its 95 % confidence interval (t); NaN for one seed."""
    difference = (ours - theirs).dropna()
    return float(difference.mean()), float(stats.t.ppf(0.975, len(difference) - 1) * difference.sem())


def markdown(cells: pd.DataFrame, corner: str) -> str:
    """A table of texts in Markdown."""
    lines = [f"| {corner} | {' | '.join(cells.columns)} |", f"|:---|{'---:|' * len(cells.columns)}"]
    return "\n".join(
        [*lines, *(f"| {name} | {' | '.join(row)} |" for name, row in zip(cells.index, cells.to_numpy(), strict=True))]
    )


def plot(mean: pd.DataFrame, deviation: pd.DataFrame, path: Path, title: str) -> None:
    """Curves of the MAE over the shots, and points for the label shifts; bars are standard deviations over the seeds.

    Rows are heads and columns settings, as `mean_and_deviation` gives them.
    """
    mpl.use("Agg")
    shifts = [name for name in mean.columns if name.startswith("shift")]
    panels = [names for names in ([name for name in mean.columns if name not in shifts], shifts) if names]
    widths = [max(len(names), 3) for names in panels]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2 + sum(widths), 5), width_ratios=widths, squeeze=False, layout="constrained"
    )
    for axis, names in zip(axes[0], panels, strict=True):
        _draw(axis, mean[names], deviation[names], lines=names is not shifts)
        axis.set_xlabel("label shift" if names is shifts else "training samples per rank")
    axes[0][0].set_ylabel("test MAE (expectation)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw(axis: Axes, mean: pd.DataFrame, deviation: pd.DataFrame, lines: bool) -> None:
    colors = mpl.colormaps["tab10" if len(mean) <= 10 else "tab20"]
    spread = 0.4 / len(mean)  # heads stand beside each other
    for i, head in enumerate(mean.index):
        ours = str(head).startswith("ours")
        axis.errorbar(
            [x + spread * (i - (len(mean) - 1) / 2) for x in range(mean.shape[1])],
            mean.loc[head],
            deviation.loc[head].fillna(0),
            label=str(head),
            color="black" if ours else colors(i % colors.N),
            marker="os^Dv<>pd*"[i % 10],
            markersize=6 if ours else 4,
            linewidth=2.5 if ours else 1,
            linestyle="-" if lines else "",
            elinewidth=1,
            capsize=2,
            zorder=3 if ours else 2,
        )
    axis.set_xticks(range(mean.shape[1]), [str(name).removeprefix("shift ") for name in mean.columns])
    axis.set_xlim(-0.5, mean.shape[1] - 0.5)
    axis.grid(alpha=0.3)
