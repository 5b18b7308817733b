"""Every head side by side, on features that are computed once: which one wins, where, and by how much.

    python examples/compare_heads.py --quick                              # two minutes, offline
    python examples/compare_heads.py --data words                         # everything; hours, and can be interrupted
    python examples/compare_heads.py --data sst5 --folder data/sst5 --heads linear coral corn ours
    python examples/compare_heads.py --data features --features mine.npz --text-encoder open_clip:ViT-B-32:openai

Every head gets the same budget: a grid of as many learning rates, the same number of steps, and early stopping; the
learning rate and the step are chosen on the validation part, the test part is only reported.  A head states the factor
that brings the grid to where it learns (a linear layer on unit features takes larger steps than a prompt).  Each run is
written to runs.csv when it is done, and a run that is there already is not repeated, so that an interrupted comparison
goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _data import (
    ADJECTIVE_SCALES,
    CACHE,
    INSTALL,
    SST5_CONTEXT,
    SST5_RANKS,
    load_adjectives,
    load_encoder,
    load_minilm,
    load_texts,
    load_words,
    progress_bar,
)
from _errors import UserError, skip_unreachable_hub
from torch import Tensor, nn
from torch.nn import functional as F

import ordinal_prompt as op
from ordinal_prompt import recipes
from ordinal_prompt.protocols import few_shot_indices, label_shift_indices

SHOTS = ("1", "2", "4", "8", "16", "32", "64", "all")
LEARNING_RATES = (0.02, 0.06, 0.2)
STEPS = 300
PATIENCE = 4
LEAST_STEPS = 30  # a head that starts well may get worse before it gets better
BATCH_SIZE = 512
METRICS = ("mae", "mae_argmax", "mae_median", "macro_mae", "accuracy", "kappa")
PEERS = ("linear", "coral", "corn")
INTERPOLATIONS = ("linear", "inv_prop", "normal", "piecewise")
COLUMNS = ("data", "setting", "head", "seed", "samples", *METRICS, "val_mae", "lr", "step", "seconds")


# --------------------------------------------------------------------------------------------------------------- heads


@dataclass(frozen=True)
class Task:
    """What a head is built for.

    Attributes:
        name: of the data.
        features, labels: of train, val and test; (N, D) float32 and (N,) int64.
        rank_values: (K,) values of the ranks.
        rank_names: K names, or None.
        context: a text for the prompts, or None for random tokens.
        text_encoder, tokenizer: for the prompts; None where no prompt head is asked for.
    """

    name: str
    features: dict[str, Tensor]
    labels: dict[str, Tensor]
    rank_values: Tensor
    rank_names: tuple[str, ...] | None = None
    context: str | None = None
    text_encoder: Any = None
    tokenizer: Any = None

    def digest(self) -> str:
        """Of features and labels: runs on other data are other runs."""
        digest = hashlib.sha256()
        for part in self.features:
            digest.update(self.features[part].numpy().tobytes())
            digest.update(self.labels[part].numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def num_ranks(self) -> int:
        """K."""
        return len(self.rank_values)

    @property
    def num_features(self) -> int:
        """D."""
        return self.features["train"].shape[1]


@dataclass
class Head:
    """A head ready for training.

    Attributes:
        module: features (N, D) to whatever its loss takes.
        loss: output and labels to a scalar.
        probabilities: output to (N, K).
        rate: factor on the learning rate of the grid.
        groups: module and learning rate to the parameter groups of an optimizer; by default one group.
    """

    module: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    probabilities: Callable[[Tensor], Tensor] = lambda logits: logits.softmax(dim=-1)
    rate: float = 1.0
    groups: Callable[[nn.Module, float], list[dict[str, Any]]] | None = None

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """The parameter groups for a learning rate of the grid."""
        if self.groups is not None:
            return self.groups(self.module, self.rate * learning_rate)
        return [{"params": [*self.module.parameters()], "lr": self.rate * learning_rate}]


class UnfitError(Exception):
    """A head that cannot be built for the data, and why; it is left out of the comparison."""


def linear(task: Task) -> Head:
    """nn.Linear and cross-entropy."""
    return Head(nn.Linear(task.num_features, task.num_ranks), nn.CrossEntropyLoss())


class CosineLinear(nn.Module):
    """Scaled cosines to K learnable prototypes: what a prompt head is without language."""

    def __init__(self, in_features: int, num_ranks: int, scale: float = 20.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_ranks, in_features) / in_features**0.5)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, features: Tensor) -> Tensor:
        return self.log_scale.exp() * F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1))


def cosine(task: Task) -> Head:
    """Cosines to learnable prototypes, learnable scale, and cross-entropy."""
    return Head(CosineLinear(task.num_features, task.num_ranks), nn.CrossEntropyLoss(), rate=0.3)


def coral(task: Task) -> Head:
    """CORAL (Cao et al., 2020) of coral-pytorch."""
    layers, losses, dataset = _peer("coral_pytorch", "layers", "losses", "dataset")
    levels = torch.stack([dataset.label_to_levels(k, task.num_ranks) for k in range(task.num_ranks)])
    return Head(
        layers.CoralLayer(task.num_features, task.num_ranks),
        lambda logits, labels: losses.coral_loss(logits, levels.to(logits)[labels]),
        lambda logits: exceedance_to_probabilities(logits.sigmoid()),
    )


def corn(task: Task) -> Head:
    """CORN (Shi et al., 2021) of coral-pytorch."""
    (losses,) = _peer("coral_pytorch", "losses")
    return Head(
        nn.Linear(task.num_features, task.num_ranks - 1),
        lambda logits, labels: losses.corn_loss(logits, labels, task.num_ranks),
        lambda logits: exceedance_to_probabilities(logits.sigmoid().cumprod(dim=-1)),
    )


def exceedance_to_probabilities(above: Tensor) -> Tensor:
    """Probabilities (N, K) of the ranks from those (N, K-1) of being above rank 0, 1, …, K-2."""
    above = F.pad(F.pad(above, (1, 0), value=1.0), (0, 1))
    return (above[..., :-1] - above[..., 1:]).clamp_min(0)


def clm(task: Task) -> Head:
    """Cumulative link model (Vargas et al., 2020) of dlordinal: one score, learnable thresholds, logit link."""
    (layers,) = _peer("dlordinal", "output_layers")
    return Head(
        nn.Sequential(nn.Linear(task.num_features, 1), layers.CLM(task.num_ranks, "logit")),
        lambda probabilities, labels: F.nll_loss(probabilities.clamp_min(1e-7).log(), labels),
        lambda probabilities: probabilities,
    )


def soft_labels(loss: str) -> Callable[[Task], Head]:
    """nn.Linear and cross-entropy with a loss of dlordinal's soft labels: "Triangular", "Beta", …"""

    def build(task: Task) -> Head:
        (losses,) = _peer("dlordinal", "losses")
        try:
            criterion = getattr(losses, f"{loss}Loss")(nn.CrossEntropyLoss(), task.num_ranks)
        except ValueError:  # beta: parameters are tabulated for 3 to 14 ranks
            raise UnfitError(f"dlordinal has no {loss.lower()} soft labels for {task.num_ranks} ranks") from None
        return Head(nn.Linear(task.num_features, task.num_ranks), criterion)

    return build


def prompts(interpolation: str | None, *, text: bool = True, project: bool = False) -> Callable[[Task], Head]:
    """A prompt head with the settings and the loss of the paper (CE + KL).

    Args:
        interpolation: of the rank embeddings; None is CoOp applied to ranks.
        text: start the context from the data's text and the ranks from their names, where there are any, instead of
            random tokens.
        project: a linear projection in front of the prototypes.
    """

    def build(task: Task) -> Head:
        head = prompt_head(task, text=text, project=project, interpolation=interpolation)
        # With the default grid prompts learn at 1e-4, 3e-4 and 1e-3, a projection three times as fast.
        return Head(
            head, op.OrdinalPromptLoss(), rate=0.015, groups=lambda head, lr: op.parameter_groups(head, lr, 1 / 3)
        )

    return build


def recipe(*, project: bool = False, freeze: bool = False) -> Callable[[Task], Head]:
    """A prompt head with the settings that the library recommends.

    Args:
        project: a linear projection in front of the prototypes.
        freeze: leave the prompts as they start, so that the prototypes are those of the rank names.
    """

    def build(task: Task) -> Head:
        head = prompt_head(task, project=project, **op.recipe(task.rank_names or task.num_ranks))
        head.prompt.requires_grad_(not freeze)
        # With the default grid: 1e-3, 3e-3 and 1e-2; `parameter_groups` slows the prompts down.
        return Head(head, op.OrdinalPromptLoss(kl_weight=0), rate=0.05, groups=op.parameter_groups)

    return build


def prompt_head(task: Task, *, text: bool = True, project: bool, **options: Any) -> op.OrdinalPromptHead:
    """See `prompts`; the options are those of `OrdinalPromptHead`."""
    head = op.OrdinalPromptHead(
        task.text_encoder,
        task.rank_names if text and task.rank_names else task.num_ranks,
        tokenizer=task.tokenizer,
        rank_values=task.rank_values,
        context=task.context if text and task.context is not None else 10,
        in_features=task.num_features if project else None,
        **options,
    )
    if head.in_features != task.num_features:
        raise UnfitError(
            f"features of width {task.num_features} need a projection to the text encoder's {head.embed_dim}"
        )
    return head


# One entry for every line of the tables; a head of your own is one more function from a task to a `Head`.
HEADS: dict[str, Callable[[Task], Head]] = {
    "linear": linear,
    "cosine": cosine,
    "coral": coral,
    "corn": corn,
    "clm": clm,
    "triangular": soft_labels("Triangular"),
    "beta": soft_labels("Beta"),
    "binomial": soft_labels("Binomial"),
    "exponential": soft_labels("Exponential"),
    "coop": prompts(None, text=False),
    "coop-projected": prompts(None, text=False, project=True),
    "names": prompts(None),
    "names-projected": prompts(None, project=True),
    **{
        f"prompt-{interpolation}{'-projected' * project}": prompts(interpolation, project=project)
        for project in (False, True)
        for interpolation in INTERPOLATIONS
    },
    "ours": recipe(),
    "ours-frozen": recipe(freeze=True),
    "ours-projected": recipe(project=True),
    "ours-frozen-projected": recipe(project=True, freeze=True),
}
CONSTANT = "constant"
ALL_HEADS = (CONSTANT, *HEADS)
PROMPT_HEADS = tuple(name for name in HEADS if name.startswith(("coop", "names", "prompt", "ours")))
QUICK_HEADS = (CONSTANT, "linear", "cosine", "coral", "corn", "clm", "triangular", "coop", "prompt-linear", "ours")


def _peer(package: str, *modules: str) -> tuple[Any, ...]:
    import importlib

    try:
        return tuple(importlib.import_module(f"{package}.{module}") for module in modules)
    except ImportError:
        raise UserError(
            f"The package {package.replace('_', '-')} is missing; install it with: pip install "
            f"{package.replace('_', '-')} (or leave its heads out with --heads)."
        ) from None


# ------------------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Budget:
    """What every head may spend on one run."""

    learning_rates: tuple[float, ...] = LEARNING_RATES
    steps: int = STEPS
    patience: int = PATIENCE
    batch_size: int = BATCH_SIZE

    def checkpoints(self) -> list[int]:
        """Steps after which the validation part is looked at: 0, 1, 2, 3, and then half as many again each time."""
        steps, step = [0], 1
        while step < self.steps:
            steps.append(step)
            step = max(step + 1, round(step * 1.5))
        return [*steps, self.steps] if self.steps else steps


@dataclass(frozen=True)
class Setting:
    """A training subset: `shots` samples per rank, or all; `shift` = (k, keep) thins the k most frequent ranks."""

    name: str
    shots: int | None = None
    shift: tuple[int, float] | None = None

    def indices(self, labels: Tensor, seed: int) -> Tensor:
        """Of the training samples; the same for every head."""
        generator = torch.Generator().manual_seed(seed)
        if self.shots is not None:
            return few_shot_indices(labels, self.shots, generator)
        if self.shift is not None:
            return label_shift_indices(labels, *self.shift, generator)
        return torch.arange(len(labels))


def evaluate(probabilities: Tensor, labels: Tensor, values: Tensor) -> dict[str, float]:
    """The metrics, in units of the rank values: MAE of expectation, argmax and median; macro MAE of the expectation."""
    truth = values[labels]
    argmax = probabilities.argmax(dim=-1)
    median = (probabilities.cumsum(dim=-1) >= 0.5 * probabilities.sum(dim=-1, keepdim=True)).int().argmax(dim=-1)
    error = ((probabilities * values).sum(dim=-1) - truth).abs()
    return {
        "mae": error.mean().item(),
        "mae_argmax": (values[argmax] - truth).abs().mean().item(),
        "mae_median": (values[median] - truth).abs().mean().item(),
        "macro_mae": torch.stack([error[labels == label].mean() for label in labels.unique()]).mean().item(),
        "accuracy": (argmax == labels).float().mean().item(),
        "kappa": quadratic_kappa(argmax, labels, len(values)),
    }


def quadratic_kappa(predicted: Tensor, labels: Tensor, num_ranks: int) -> float:
    """Cohen's kappa with quadratic weights; 0 for a constant prediction."""
    confusion = torch.bincount(labels * num_ranks + predicted, minlength=num_ranks**2).view(num_ranks, -1).double()
    index = torch.arange(num_ranks, device=confusion.device, dtype=torch.double)
    weight = (index[:, None] - index).square()
    chance = confusion.sum(1)[:, None] * confusion.sum(0) / confusion.sum()
    return 1 - ((weight * confusion).sum() / (weight * chance).sum().clamp_min(1e-12)).item()


def run(
    build: Callable[[Task], Head], task: Task, indices: Tensor, seed: int, budget: Budget, device: torch.device
) -> dict[str, float]:
    """Trains a head once for every learning rate; the metrics are those of the best step on the validation part."""
    results = [fit(build, task, indices, seed, rate, budget, device) for rate in budget.learning_rates]
    return min(results, key=lambda result: result["val_mae"])


def fit(
    build: Callable[[Task], Head],
    task: Task,
    indices: Tensor,
    seed: int,
    learning_rate: float,
    budget: Budget,
    device: torch.device,
) -> dict[str, float]:
    """Trains a head with one learning rate until the validation MAE has not improved for a while."""
    torch.manual_seed(seed)
    head = build(task)
    head.module.to(device)
    features = {part: tensor.to(device) for part, tensor in task.features.items()}
    labels = {part: tensor.to(device) for part, tensor in task.labels.items()}
    values = task.rank_values.float().to(device)
    train_features, train_labels = features["train"][indices.to(device)], labels["train"][indices.to(device)]
    groups = head.parameter_groups(learning_rate)
    optimizer = torch.optim.Adam(groups)
    batches = _batches(len(indices), budget.batch_size, torch.Generator().manual_seed(seed))
    checkpoints = budget.checkpoints()
    best: dict[str, float] = {"val_mae": math.inf}
    best_at = 0
    for step in range(budget.steps + 1):
        if step in checkpoints:
            head.module.eval()
            with torch.no_grad():
                probabilities = head.probabilities(head.module(features["val"])).float()
                val_mae = evaluate(probabilities, labels["val"], values)["mae"]
                if val_mae < best["val_mae"]:
                    probabilities = head.probabilities(head.module(features["test"])).float()
                    best = {"val_mae": val_mae, "lr": learning_rate, "step": step}
                    best |= evaluate(probabilities, labels["test"], values)
                    best_at = checkpoints.index(step)
            waited = step >= LEAST_STEPS and checkpoints.index(step) - best_at >= budget.patience
            if waited or not math.isfinite(val_mae):
                break
        if step == budget.steps:
            break
        head.module.train()
        batch = next(batches).to(device)
        loss = head.loss(head.module(train_features[batch]), train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if "mae" not in best:
        raise UserError("Training has diverged from the first step on; are there NaN or infinite features?")
    return best


def constant(task: Task, indices: Tensor) -> dict[str, float]:
    """The median of the training labels for every sample: what features have to beat."""
    median = task.labels["train"][indices].median()
    one_hot = F.one_hot(median, task.num_ranks).float()
    metrics = {
        part: evaluate(one_hot.expand(len(task.labels[part]), -1), task.labels[part], task.rank_values.float())
        for part in ("val", "test")
    }
    return {"val_mae": metrics["val"]["mae"], "lr": 0.0, "step": 0, **metrics["test"]}


def _batches(num_samples: int, batch_size: int, generator: torch.Generator) -> Iterable[Tensor]:
    """Indices of batches without end; the whole set where it fits into one."""
    if num_samples <= batch_size:
        while True:
            yield torch.arange(num_samples)
    while True:
        order = torch.randperm(num_samples, generator=generator)
        yield from order[: num_samples // batch_size * batch_size].split(batch_size)


# ------------------------------------------------------------------------------------------------------------- records


class Records:
    """The runs that are done, in a CSV file that grows by a line with each.

    Raises:
        UserError: a file of runs that were made with other options.
    """

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.path = folder / "runs.csv"
        self.rows: list[dict[str, str]] = []
        folder.mkdir(parents=True, exist_ok=True)
        stored = folder / "options.json"
        if self.path.is_file() and stored.is_file() and json.loads(stored.read_text()) != options:
            before = json.loads(stored.read_text())
            changed = [name for name in options if options[name] != before.get(name)]
            raise UserError(
                f"{folder} holds runs with other options ({', '.join(changed) or 'of another version'}); "
                "give another --output, or delete the folder."
            )
        stored.write_text(json.dumps(options, indent=2) + "\n")
        if self.path.is_file():
            lines = self.path.read_text().splitlines(keepends=True)
            if lines and not lines[-1].endswith("\n"):  # the last line of an interrupted run
                self.path.write_text("".join(lines[:-1]))
            with self.path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def has(self, **key: object) -> bool:
        """Whether a run is there."""
        return any(all(row[name] == str(value) for name, value in key.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Appends a run, and brings it to disk."""
        text = {name: f"{row[name]:.6g}" if isinstance(row[name], float) else str(row[name]) for name in COLUMNS}
        new = not self.path.is_file() or not self.path.stat().st_size
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(text)
        self.rows.append(text)

    def values(self, setting: str, head: str, metric: str) -> dict[int, float]:
        """A metric of one head in one setting, by seed."""
        return {
            int(row["seed"]): float(row[metric])
            for row in self.rows
            if row["setting"] == setting and row["head"] == head
        }


# ------------------------------------------------------------------------------------------------------------- reports


def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float, int]:
    """Mean difference over the seeds that both have, half its 95 % confidence interval (t), and how many these are."""
    from scipy import stats

    seeds = sorted(ours.keys() & theirs.keys())
    difference = np.array([ours[seed] - theirs[seed] for seed in seeds])
    if len(seeds) < 2:
        return (float(difference.mean()) if seeds else math.nan), math.nan, len(seeds)
    half = stats.t.ppf(0.975, len(seeds) - 1) * difference.std(ddof=1) / len(seeds) ** 0.5
    return float(difference.mean()), float(half), len(seeds)


def markdown_report(
    records: Records, settings: Sequence[str], heads: Sequence[str], ours: Sequence[str], what: str
) -> str:
    """Means and standard deviations of every head, and paired differences between ours and the peers."""
    present = [head for head in heads if any(row["head"] == head for row in records.rows)]
    lines = [
        f"# {what}",
        "",
        "Test MAE of the expectation, mean ± standard deviation over the seeds; bold is the best.",
    ]
    lines += ["", f"| head | {' | '.join(settings)} |", f"|:---|{'---:|' * len(settings)}"]
    table = {
        (head, setting): np.array([*records.values(setting, head, "mae").values()])
        for head in present
        for setting in settings
    }
    best = {
        setting: min((v.mean() for (_, s), v in table.items() if s == setting and len(v)), default=math.nan)
        for setting in settings
    }
    for head in present:
        cells = [_cell(table[head, setting], best[setting]) for setting in settings]
        lines.append(f"| {head} | {' | '.join(cells)} |")
    for metric, title in (("mae_median", "MAE of the median"), ("accuracy", "Accuracy"), ("kappa", "Quadratic kappa")):
        lines += ["", f"{title}:", "", f"| head | {' | '.join(settings)} |", f"|:---|{'---:|' * len(settings)}"]
        for head in present:
            means = [[*records.values(setting, head, metric).values()] for setting in settings]
            lines.append(f"| {head} | {' | '.join(f'{np.mean(m):.3f}' if m else '' for m in means)} |")
    peers = [peer for peer in PEERS if peer in present]
    for our in (head for head in ours if head in present and peers):
        lines += ["", f"## {our} against its peers", ""]
        lines += ["Paired differences of the test MAE over the seeds with 95 % confidence intervals (t); below zero,"]
        lines += [f"{our} is better.  The last line takes the peer with the best mean in each setting.", ""]
        lines += [f"| against | {' | '.join(settings)} |", f"|:---|{'---:|' * len(settings)}"]
        for peer in (*peers, "the best of them"):
            cells = []
            for setting in settings:
                known = [p for p in peers if records.values(setting, p, "mae")]
                other = peer
                if peer not in peers:
                    other = min(known, key=lambda p: float(np.mean(table[p, setting])), default=peer)
                mean, half, seeds = paired_difference(
                    records.values(setting, our, "mae"), records.values(setting, other, "mae")
                )
                cell = "" if not seeds else f"{mean:+.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")
                cells.append(f"{cell} ({other})" if cell and peer not in peers else cell)
            lines.append(f"| {peer} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: np.ndarray, best: float) -> str:
    if not len(values):
        return ""
    text = f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")
    return f"**{text}**" if values.mean() <= best + 1e-9 else text


def write_tables(
    records: Records, folder: Path, settings: Sequence[str], heads: Sequence[str], ours: Sequence[str]
) -> None:
    """table.csv (mean and sd of every metric) and paired.csv (differences to the peers)."""
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["setting", "head", "seeds", *(f"{m}_{s}" for m in METRICS for s in ("mean", "sd"))])
        for setting in settings:
            for head in heads:
                values = {metric: np.array([*records.values(setting, head, metric).values()]) for metric in METRICS}
                if len(values["mae"]):
                    ddof = int(len(values["mae"]) > 1)
                    numbers = [f(v) for v in values.values() for f in (np.mean, lambda v, d=ddof: np.std(v, ddof=d))]
                    writer.writerow([setting, head, len(values["mae"]), *(f"{number:.5f}" for number in numbers)])
    with (folder / "paired.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["setting", "ours", "peer", "seeds", "difference", "low", "high"])
        for setting in settings:
            for our in ours:
                for peer in PEERS:
                    mean, half, seeds = paired_difference(
                        records.values(setting, our, "mae"), records.values(setting, peer, "mae")
                    )
                    if seeds:
                        writer.writerow(
                            [setting, our, peer, seeds, *(f"{x:.5f}" for x in (mean, mean - half, mean + half))]
                        )


def plot(records: Records, path: Path, settings: Sequence[Setting], heads: Sequence[str], title: str) -> None:
    """Curves of the MAE over the shots, and points for the label shifts; bars are standard deviations over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = [setting.name for setting in settings if setting.shift is None]
    shifts = [setting.name for setting in settings if setting.shift is not None]
    groups = [group for group in (curves, shifts) if group]
    figure, axes = plt.subplots(
        1, len(groups), figsize=(4 + 4 * len(groups), 5), width_ratios=[max(len(g), 2) for g in groups], squeeze=False
    )
    colors = plt.get_cmap("tab20").colors
    for axis, names in zip(axes[0], groups, strict=True):
        for i, head in enumerate(heads):
            points = [(x, [*records.values(name, head, "mae").values()]) for x, name in enumerate(names)]
            points = [(x, values) for x, values in points if values]
            if points:
                axis.errorbar(
                    [x + 0.02 * (i - len(heads) / 2) for x, _ in points],
                    [np.mean(values) for _, values in points],
                    [np.std(values, ddof=1) if len(values) > 1 else 0 for _, values in points],
                    label=head,
                    color=colors[i % len(colors)],
                    marker="os^Dv<>pPX*"[i % 11],
                    markersize=4,
                    linewidth=2 if head.startswith("ours") else 1,
                    linestyle="-" if names is curves else "",
                    capsize=2,
                )
        axis.set_xticks(range(len(names)), names)
        axis.set_xlabel("training samples per rank" if names is curves else "label shift")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("test MAE (expectation)")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------- data


def load_task(args: argparse.Namespace) -> Task:
    """The data, and the text encoder where a prompt head is asked for.

    Raises:
        UserError: files or packages that are missing or damaged, labels outside the ranks, ranks without samples.
    """
    encoder = None
    if any(head in PROMPT_HEADS for head in args.heads) or args.data != "features":
        encoder = load_text_encoder(args.text_encoder)
    cache = None if args.no_cache else CACHE
    if args.data == "features":
        return features_task(Path(args.features), encoder, args.rank_names, args.context)
    # Features are MiniLM's, whatever encodes the prompts.
    minilm = encoder if args.text_encoder == "minilm" else None
    if args.data == "words":
        data = load_words(minilm, cache=cache)
    elif args.data in ADJECTIVE_SCALES:
        data = load_adjectives(args.data, minilm, cache=cache)
    else:
        named = (SST5_RANKS, SST5_CONTEXT) if args.data == "sst5" else (args.rank_names, args.context)
        data = load_texts(args.folder, *named, minilm, name=args.data, cache=cache)
    if args.rank_names and len(args.rank_names) != data.num_ranks:
        raise UserError(f"There are {len(args.rank_names)} --rank-names, but {data.num_ranks} ranks.")
    model, tokenizer = encoder or (None, None)
    features = {name: part.features for name, part in data.parts().items() if part.features is not None}
    return Task(
        data.name,
        features,
        {name: part.labels for name, part in data.parts().items()},
        torch.tensor(data.rank_values),
        tuple(args.rank_names or data.rank_names),
        args.context if args.context is not None else data.context,
        model,
        tokenizer,
    )


def load_text_encoder(name: str) -> tuple[Any, Any]:
    """Model and tokenizer of "minilm", "open_clip:NAME[:PRETRAINED]", or a folder or name of transformers."""
    if name == "minilm":
        return load_minilm()
    if name.startswith("open_clip:"):
        from ordinal_prompt.checkpoint import load_open_clip

        skip_unreachable_hub()
        _, model_name, *pretrained = name.split(":", 2)
        try:
            return load_open_clip(model_name, pretrained[0] if pretrained else None)
        except (ValueError, OSError) as error:
            raise UserError(str(error)) from None
    return load_encoder(name)


def features_task(path: Path, encoder: Any, rank_names: Sequence[str] | None, context: str | None) -> Task:
    """Features of an .npz file: x_train (N, D), y_train (N,), the same for val and test; rank_values (K,) if wanted.

    Raises:
        UserError: see `load_task`.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable .npz file: {error}") from None
    wanted = [f"{kind}_{part}" for part in ("train", "val", "test") for kind in "xy"]
    missing = [name for name in wanted if name not in arrays]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}.")
    features, labels = {}, {}
    for part in ("train", "val", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.ndim != 2 or y.shape != x.shape[:1] or not len(y) or x.shape[1] != arrays["x_train"].shape[1]:
            raise UserError(
                f"{path}: x_{part} and y_{part} should be (N, D) and (N,), but are {x.shape} and {y.shape}."
            )
        if not np.isfinite(x).all():
            raise UserError(f"{path}: x_{part} has values that are not finite.")
        if not np.equal(np.mod(y, 1), 0).all():
            raise UserError(f"{path}: y_{part} should hold rank indices 0…K-1, but holds numbers with a fraction.")
        features[part] = torch.from_numpy(x.astype(np.float32))
        labels[part] = torch.from_numpy(y.astype(np.int64))
    named = len(rank_names) if rank_names else int(labels["train"].max()) + 1
    values = torch.from_numpy(np.asarray(arrays.get("rank_values", np.arange(named)), dtype=np.float32))
    num_ranks = len(values)
    if rank_names and len(rank_names) != num_ranks:
        raise UserError(f"There are {len(rank_names)} --rank-names, but {num_ranks} rank_values in {path}.")
    for part, y in labels.items():
        if y.min() < 0 or y.max() >= num_ranks:
            raise UserError(
                f"{path}: y_{part} holds {int(y.min())}…{int(y.max())}, outside the ranks 0…{num_ranks - 1}."
            )
    empty = (torch.bincount(labels["train"], minlength=num_ranks) == 0).nonzero().flatten().tolist()
    if empty:
        shown = ", ".join(map(str, empty[:10])) + (", …" if len(empty) > 10 else "")
        print(f"Note: no training sample has rank {shown}.", file=sys.stderr)
    model, tokenizer = encoder or (None, None)
    return Task(
        path.stem, features, labels, values, tuple(rank_names) if rank_names else None, context, model, tokenizer
    )


def settings_of(args: argparse.Namespace, labels: Tensor) -> list[Setting]:
    """The training subsets, in the order of the tables."""
    settings = []
    for shots in args.shots:
        if shots != "all" and not (shots.isdigit() and int(shots) > 0):
            raise UserError(f"--shots takes positive numbers and 'all', but got {shots!r}.")
        settings.append(Setting("all", None) if shots == "all" else Setting(shots, int(shots)))
    present = len(labels.unique())
    shifts = args.shift
    if shifts is None:
        shifts = [f"{k}:0.1" for k in sorted({max(1, present // 4), max(1, present // 2)})]
    for shift in shifts:
        ranks, _, keep = shift.partition(":")
        try:
            pair = int(ranks), float(keep)
        except ValueError:
            raise UserError(f"--shift takes RANKS:SHARE, as in 2:0.1, but got {shift!r}.") from None
        if not (1 <= pair[0] <= present and 0 < pair[1] <= 1):
            raise UserError(f"--shift {shift}: ranks should be in 1…{present} and the share in (0, 1].")
        settings.append(Setting(f"shift {pair[0]}×{pair[1]:g}", None, pair))
    return settings


# -------------------------------------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Compare ordinal heads on cached features.",
        epilog="Writes runs.csv, table.md, table.csv, paired.csv and curves.png into the output folder.",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        choices=("words", *ADJECTIVE_SCALES, "sst5", "texts", "features"),
        default="words",
        help="words and how they feel (8 ranks), adjectives and how subjective (6) or positive (7) they are, all "
        "offline; SST-5 (5 ranks), or texts or features of your own (default: words)",
    )
    data.add_argument("--folder", metavar="DIR", help="of train.csv, dev.csv and test.csv with columns text and label")
    data.add_argument(
        "--features", metavar="NPZ", help="file with x_train, y_train, x_val, y_val, x_test, y_test (and rank_values)"
    )
    data.add_argument("--rank-names", nargs="+", metavar="NAME", help="names of the ranks, lowest first")
    data.add_argument(
        "--context", help="text that leads up to a rank's name (default: the data's own, or random tokens)"
    )
    data.add_argument(
        "--text-encoder",
        default="minilm",
        metavar="NAME",
        help="for the prompts: minilm, open_clip:MODEL[:PRETRAINED], or a folder or name of transformers "
        "(default: %(default)s)",
    )
    data.add_argument("--no-cache", action="store_true", help=f"do not keep sentence embeddings in {CACHE}")

    what = parser.add_argument_group("what to compare")
    what.add_argument(
        "--heads", nargs="+", metavar="HEAD", choices=ALL_HEADS, help=f"some of: {', '.join(ALL_HEADS)} (default: all)"
    )
    what.add_argument("--shots", nargs="*", metavar="N", help=f"training samples per rank (default: {' '.join(SHOTS)})")
    what.add_argument(
        "--shift",
        nargs="*",
        metavar="RANKS:SHARE",
        help="label shifts: the most frequent ranks keep a share of their samples (default: a quarter and half of the "
        "ranks keep 0.1)",
    )
    what.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: 0 1 2 3 4")
    what.add_argument(
        "--ours",
        nargs="+",
        metavar="HEAD",
        choices=ALL_HEADS,
        help="heads to set against linear, CORAL and CORN (default: those named ours)",
    )

    budget = parser.add_argument_group("budget, the same for every head")
    budget.add_argument(
        "--lr", nargs="+", type=float, metavar="RATE", help=f"default: {' '.join(map(str, LEARNING_RATES))}"
    )
    budget.add_argument("--steps", type=int, help=f"steps at most (default: {STEPS})")
    budget.add_argument(
        "--patience",
        type=int,
        default=PATIENCE,
        help="looks at the validation part without improvement before a run stops "
        "(they grow rarer by half each; default: %(default)s)",
    )
    budget.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="default: %(default)s")

    other = parser.add_argument_group("other")
    other.add_argument("--quick", action="store_true", help="a demo of about two minutes; other flags still count")
    other.add_argument("--output", type=Path, metavar="DIR", help="default: outputs/compare-DATA (or -DATA-quick)")
    other.add_argument("--device", default="cpu", help="default: %(default)s")
    other.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    return parser


def fill_in(args: argparse.Namespace) -> argparse.Namespace:
    """Defaults that depend on other arguments, and checks."""
    quick = args.quick
    args.heads = list(dict.fromkeys(args.heads or (QUICK_HEADS if quick else ALL_HEADS)))
    args.shots = args.shots if args.shots is not None else (["4", "all"] if quick else list(SHOTS))
    args.shift = args.shift if args.shift is not None or not quick else ["2:0.1"]
    args.seeds = list(dict.fromkeys(args.seeds or ([0, 1] if quick else [0, 1, 2, 3, 4])))
    args.lr = args.lr or ([0.06] if quick else list(LEARNING_RATES))
    args.steps = args.steps if args.steps is not None else (60 if quick else STEPS)
    args.ours = args.ours or [head for head in args.heads if head.startswith("ours")]
    args.output = args.output or Path("outputs") / f"compare-{args.data}{'-quick' * quick}"
    if args.data in ("sst5", "texts") and not args.folder:
        raise UserError(f"--data {args.data} needs --folder, a folder with train.csv, dev.csv and test.csv.")
    if args.data == "texts" and not (args.rank_names and args.context):
        raise UserError("--data texts needs --rank-names, lowest first, and --context, a text that leads up to them.")
    if args.data == "features" and not args.features:
        raise UserError("--data features needs --features, an .npz file with x and y of train, val and test.")
    if args.steps < 1 or args.patience < 1 or args.batch_size < 1 or not all(rate > 0 for rate in args.lr):
        raise UserError("--steps, --patience, --batch-size and --lr should be positive.")
    return args


def compare(args: argparse.Namespace) -> Records:
    """Runs what is missing, and writes the reports."""
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        device = torch.zeros(0, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    task = load_task(args)
    budget = Budget(tuple(args.lr), args.steps, args.patience, args.batch_size)
    settings = settings_of(args, task.labels["train"])
    options = {
        "version": op.__version__,
        "recipe": {**op.recipe(2), "lr scales": [recipes.PROMPT_LR_SCALE, recipes.SCALE_LR_SCALE]},
        "data": task.name,
        "digest": task.digest(),
        "samples": {part: len(labels) for part, labels in task.labels.items()},
        "rank_names": list(task.rank_names) if task.rank_names else None,
        "context": task.context,
        "text_encoder": args.text_encoder,
        "lr": args.lr,
        "steps": args.steps,
        "patience": args.patience,
        "batch_size": args.batch_size,
        "least_steps": LEAST_STEPS,
    }
    records = Records(args.output, options)
    unfit: dict[str, str] = {}
    jobs = [(setting, head, seed) for seed in args.seeds for setting in settings for head in args.heads]
    with progress_bar(len(jobs), "runs") as bar:
        for setting, name, seed in jobs:
            key = {"data": task.name, "setting": setting.name, "head": name, "seed": seed}
            if not records.has(**key) and name not in unfit:
                bar.set_postfix_str(f"{name}, {setting.name}, seed {seed}")
                indices = setting.indices(task.labels["train"], seed)
                start = time.perf_counter()
                try:
                    row = (
                        constant(task, indices)
                        if name == CONSTANT
                        else run(HEADS[name], task, indices, seed, budget, device)
                    )
                except UnfitError as reason:
                    unfit[name] = str(reason)
                else:
                    seconds = round(time.perf_counter() - start, 2)
                    records.add({**key, **row, "samples": len(indices), "seconds": seconds})
            bar.update(1)
    for name, reason in unfit.items():
        print(f"Left out {name}: {reason}.", file=sys.stderr)
    names = [setting.name for setting in settings]
    title = f"Heads on {task.name}: {task.num_ranks} ranks, seeds {', '.join(map(str, args.seeds))}"
    report = markdown_report(records, names, args.heads, args.ours, title)
    (args.output / "table.md").write_text(report, encoding="utf-8")
    write_tables(records, args.output, names, args.heads, args.ours)
    plotted = [head for head in args.heads if any(row["head"] == head for row in records.rows)]
    try:
        plot(records, args.output / "curves.png", settings, plotted, title)
    except ImportError:
        print(f"No plot: matplotlib is missing; install it with: {INSTALL}", file=sys.stderr)
    print(report)
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry."""
    args = parser().parse_args(arguments)
    try:
        compare(fill_in(args))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; the same command goes on from here.")


if __name__ == "__main__":
    main()
