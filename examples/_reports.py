"""What is reported of a run: metrics, tables, plots, predictions."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _files import replacing
from _ranks import Ranks, Row
from torch import Tensor, nn

import ordinal_prompt as op

RULES = ("expectation", "argmax", "median")


def confusion_matrix(truth: Tensor, predicted: Tensor, num_ranks: int) -> Tensor:
    """Counts (K, K): rows are true ranks, columns predicted ones."""
    return torch.bincount(truth * num_ranks + predicted, minlength=num_ranks**2).reshape(num_ranks, num_ranks)


def quadratic_kappa(confusion: Tensor) -> float:
    """Cohen's kappa with quadratic weights of a confusion matrix (K, K); NaN where both sides are constant."""
    counts = confusion.double()
    rank = torch.arange(len(counts), dtype=torch.float64)
    weight = (rank[:, None] - rank[None, :]) ** 2
    expected = counts.sum(1)[:, None] * counts.sum(0)[None, :] / counts.sum()
    return float(1 - (weight * counts).sum() / (weight * expected).sum())


def ordinal_metrics(logits: Tensor, labels: Tensor, values: Sequence[float]) -> dict[str, float]:
    """Errors of logits (N, K), in the units of the ranks' values.

    MAE of each rule of `op.decode`; accuracy and quadratically weighted kappa of the argmax; and the macro MAE, which
    is the mean over the ranks present of the expectation's MAE, so that rare ranks count as much as frequent ones.
    """
    of_rank = torch.tensor(values, dtype=torch.float64)
    truth = of_rank[labels]
    errors = {rule: (op.decode(logits.double(), rule, of_rank) - truth).abs() for rule in RULES}
    best = logits.argmax(dim=1)
    present = labels.unique()
    return {
        **{f"mae_{rule}": float(error.mean()) for rule, error in errors.items()},
        "macro_mae": float(torch.stack([errors["expectation"][labels == rank].mean() for rank in present]).mean()),
        "accuracy": float((best == labels).double().mean()),
        "quadratic_kappa": quadratic_kappa(confusion_matrix(labels, best, len(values))),
    }


def ordinality_beside_chance(prototypes: Tensor, draws: int = 50) -> dict[str, float]:
    """Ordinality of prototypes (K, D), and of random ones of the same shape: mean and standard deviation."""
    generator = torch.Generator().manual_seed(0)
    chance = torch.tensor([op.ordinality(torch.randn(prototypes.shape, generator=generator)) for _ in range(draws)])
    return {
        "ordinality": op.ordinality(prototypes.cpu()),
        "ordinality_chance": float(chance.mean()),
        "ordinality_chance_sd": float(chance.std()),
    }


def plot_confusion(confusion: Tensor, ranks: Ranks, path: Path) -> None:
    """True against predicted ranks, each row as shares."""
    shares = confusion / confusion.sum(dim=1, keepdim=True).clamp_min(1)
    _plot_matrix(shares, ranks, path, "predicted rank", "true rank", "share of the true rank's samples", low=0)


def plot_similarity(prototypes: Tensor, ranks: Ranks, path: Path) -> None:
    """Cosine similarities of the prototypes."""
    unit = nn.functional.normalize(prototypes.cpu().float(), dim=1)
    _plot_matrix(unit @ unit.T, ranks, path, "rank", "rank", "cosine of the prototypes", low=None)


def _plot_matrix(
    matrix: Tensor, ranks: Ranks, path: Path, across: str, down: str, meaning: str, low: float | None
) -> None:
    from matplotlib.figure import Figure  # without pyplot: neither a display nor global state

    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(matrix.numpy(), vmin=low, cmap="viridis", interpolation="nearest")
    shown = sorted({round(i) for i in np.linspace(0, len(ranks) - 1, min(len(ranks), 11))})
    texts = [ranks.names[i] if ranks.names else str(ranks.values[i]) for i in shown]
    axes.set_xticks(shown, texts, rotation=45 if ranks.names else 0)
    axes.set_yticks(shown, texts)
    axes.set_xlabel(across)
    axes.set_ylabel(down)
    figure.colorbar(image, label=meaning)
    _save_figure(figure, path)


def plot_history(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss over the epochs, and validation MAE where there was validation."""
    from matplotlib.figure import Figure

    titles = {"loss": "training loss", "val_mae_expectation": "validation MAE"}
    shown = [name for name in titles if name in history[0]]
    figure = Figure(figsize=(4 * len(shown), 3.4), layout="constrained")
    epochs = [record["epoch"] for record in history]
    for position, name in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), position + 1)
        axes.plot(epochs, [record[name] for record in history], marker="." if len(epochs) < 10 else None)
        axes.set_xlabel("epoch")
        axes.set_ylabel(titles[name])
        axes.grid(alpha=0.3)
    _save_figure(figure, path)


def _save_figure(figure: Any, path: Path) -> None:
    with replacing(path) as part:
        figure.savefig(part, dpi=130, format="png")


def write_predictions(rows: Sequence[Row], logits: Tensor, labels: Tensor, values: Sequence[float], path: Path) -> None:
    """Every test sample with its true value and the prediction of each rule, as CSV."""
    predictions = [
        op.decode(logits.double(), rule, torch.tensor(values, dtype=torch.float64)).tolist() for rule in RULES
    ]
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sample", "value", *RULES])
        for row, label, *predicted in zip(rows, labels.tolist(), *predictions, strict=True):
            writer.writerow([row.content, values[label], *(f"{value:.6g}" for value in predicted)])


def results_table(results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A Markdown table of results by head, one result for each seed: mean ± standard deviation."""
    columns = {
        "mae_expectation": "MAE",
        "mae_argmax": "MAE argmax",
        "mae_median": "MAE median",
        "macro_mae": "macro MAE",
        "accuracy": "accuracy",
        "quadratic_kappa": "kappa",
        "ordinality": "ordinality",
        "ordinality_chance": "by chance",
    }
    lines = ["| head | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for head, runs in results.items():
        cells = []
        for name in columns:
            found = [run[name] for run in runs if name in run]
            cell = f"{np.mean(found):.3f}" if found else "–"
            cells.append(cell + (f" ± {np.std(found, ddof=1):.3f}" if len(found) > 1 else ""))
        lines.append(f"| {head} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
