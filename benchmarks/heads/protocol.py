"""How a head is judged: the training subset, the budget, the choice on the validation part, and the metrics.

Every head gets the same budget: a grid of as many learning rates, the same number of steps, and early stopping.  The
learning rate and the step are chosen by the validation MAE; the test part is only reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from sklearn.metrics import cohen_kappa_score
from task import Task
from torch import Tensor, nn

from ordinal_prompt.protocols import few_shot_indices, label_shift_indices

METRICS = ("mae", "mae_argmax", "mae_median", "macro_mae", "accuracy", "kappa")


@dataclass
class Head:
    """A head ready for training."""

    module: nn.Module  # features (N, D) to whatever its loss takes
    loss: Callable[[Tensor, Tensor], Tensor]  # of output and labels
    probabilities: Callable[[Tensor], Tensor] = lambda logits: logits.softmax(dim=-1)  # of the output; (N, K)
    # Brings the grid of learning rates to where the head learns: a linear layer on unit features takes larger steps
    # than a prompt.
    rate: float = 1.0
    groups: Callable[[nn.Module, float], list[dict[str, Any]]] = lambda module, lr: [
        {"params": [*module.parameters()], "lr": lr}
    ]


@dataclass
class Estimator:
    """A head that needs neither steps nor learning rates: `fit` takes training features (N, D) and labels (N,) and
    gives a function from features (M, D) to probabilities (M, K).
    """

    fit: Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]


Build = Callable[[Task], Head | Estimator]


class UnfitError(Exception):
    """A head that cannot be built for the task, and why; it is left out of the comparison."""


@dataclass(frozen=True)
class Budget:
    """What every head may spend on one run."""

    learning_rates: tuple[float, ...] = (0.02, 0.06, 0.2)
    steps: int = 300
    patience: int = 4  # looks at the validation part without improvement before a run stops
    batch_size: int = 512
    least_steps: int = 30  # a head that starts well may get worse before it gets better

    def __post_init__(self) -> None:
        if not all(value > 0 for value in (*self.learning_rates, self.steps, self.patience, self.batch_size)):
            raise ValueError(f"Expected learning rates, steps, patience and batch size above zero, but got {self}.")

    def checkpoints(self) -> list[int]:
        """Steps after which the validation part is looked at: 0, 1, 2, 3, and then half as many again each time."""
        steps, step = [0], 1
        while step < self.steps:
            steps.append(step)
            step = max(step + 1, round(step * 1.5))
        return [*steps, self.steps]


@dataclass(frozen=True)
class Setting:
    """A training subset: some samples per rank, all, or k of the most frequent ranks with a share of their samples."""

    name: str
    shots: int | None = None
    shift: tuple[int, float] | None = None  # k and the share

    @classmethod
    def parse(cls, text: str) -> Setting:
        """A number of shots, "all", or a label shift "RANKS:SHARE"."""
        ranks, colon, share = text.partition(":")
        try:
            if colon:
                return cls(f"shift {int(ranks)}×{float(share):g}", shift=(int(ranks), float(share)))
            return cls(text, None if text == "all" else int(text))
        except ValueError:
            raise ValueError(f"Expected shots as 16 or all, and shifts as 2:0.1, but got {text!r}.") from None

    def indices(self, labels: Tensor, seed: int) -> Tensor:
        """Of the training samples; the same for every head."""
        generator = torch.Generator().manual_seed(seed)
        if self.shots is not None:
            return few_shot_indices(labels, self.shots, generator)
        if self.shift is not None:
            return label_shift_indices(labels, *self.shift, generator)
        return torch.arange(len(labels))

    def with_few_validation(self, task: Task, seed: int) -> Task:
        """The task with as few validation as training samples per rank, at most 4; all where all are trained on."""
        if self.shots is None:
            return task
        kept = few_shot_indices(task.labels["val"], min(self.shots, 4), torch.Generator().manual_seed(seed))
        part = {name: {**kind, "val": kind["val"][kept]} for name, kind in (("x", task.features), ("y", task.labels))}
        return replace(task, features=part["x"], labels=part["y"])


def run(build: Build, task: Task, indices: Tensor, seed: int, budget: Budget) -> dict[str, float]:
    """One head on one training subset: test metrics, validation MAE, and the chosen learning rate and step."""
    results = []
    for learning_rate in budget.learning_rates:
        torch.manual_seed(seed)
        head = build(task)
        if isinstance(head, Estimator):
            return estimate(head, task, indices)
        results.append(train(head, task, indices, seed, learning_rate, budget))
    return min(results, key=lambda result: result["val_mae"])


def estimate(head: Estimator, task: Task, indices: Tensor) -> dict[str, float]:
    """Fits a head that needs no learning rate; see `run`."""
    indices = indices.to(task.labels["train"].device)
    probabilities = head.fit(task.features["train"][indices], task.labels["train"][indices])
    val_mae = mean_absolute_error(probabilities(task.features["val"]), task.labels["val"], task.rank_values)
    test = evaluate(probabilities(task.features["test"]), task.labels["test"], task.rank_values)
    return {"val_mae": val_mae, "lr": 0.0, "step": 0, **test}


def train(head: Head, task: Task, indices: Tensor, seed: int, learning_rate: float, budget: Budget) -> dict[str, float]:
    """Trains a head with one learning rate until the validation MAE has not improved for a while; see `run`."""
    device = task.labels["train"].device
    head.module.to(device)
    features, labels = (part["train"][indices.to(device)] for part in (task.features, task.labels))
    optimizer = torch.optim.Adam(head.groups(head.module, head.rate * learning_rate))
    batches = _batches(len(indices), budget.batch_size, torch.Generator().manual_seed(seed))
    checkpoints = budget.checkpoints()
    best, best_at = {"val_mae": math.inf}, 0
    chosen = torch.empty(0)
    for step in range(budget.steps + 1):
        if step in checkpoints:
            look = checkpoints.index(step)
            val_mae = mean_absolute_error(
                _probabilities(head, task.features["val"]), task.labels["val"], task.rank_values
            )
            if val_mae < best["val_mae"]:
                best, best_at = {"val_mae": val_mae, "lr": learning_rate, "step": step}, look
                chosen = _probabilities(head, task.features["test"])
            if not math.isfinite(val_mae) or (step >= budget.least_steps and look - best_at >= budget.patience):
                break
        if step < budget.steps:
            head.module.train()
            batch = next(batches).to(device)
            loss = head.loss(head.module(features[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if not len(chosen):
        raise ValueError("The error is not finite before the first step; are there very large features?")
    return best | evaluate(chosen, task.labels["test"], task.rank_values)


def evaluate(probabilities: Tensor, labels: Tensor, values: Tensor) -> dict[str, float]:
    """The `METRICS` of probabilities (N, K), in units of the rank values (K,).

    MAE of expectation, argmax and median, the mean over the ranks of the first, accuracy, and Cohen's kappa with
    quadratic weights.
    """
    truth = values[labels]
    argmax = probabilities.argmax(dim=-1)
    median = (probabilities.cumsum(dim=-1) >= 0.5 * probabilities.sum(dim=-1, keepdim=True)).int().argmax(dim=-1)
    error = ((probabilities * values).sum(dim=-1) - truth).abs()
    kappa = cohen_kappa_score(labels.cpu(), argmax.cpu(), labels=range(len(values)), weights="quadratic")
    return {
        "mae": error.mean().item(),
        "mae_argmax": (values[argmax] - truth).abs().mean().item(),
        "mae_median": (values[median] - truth).abs().mean().item(),
        "macro_mae": torch.stack([error[labels == label].mean() for label in labels.unique()]).mean().item(),
        "accuracy": (argmax == labels).float().mean().item(),
        "kappa": float(kappa),
    }


def mean_absolute_error(probabilities: Tensor, labels: Tensor, values: Tensor) -> float:
    """Of the expectation."""
    return ((probabilities * values).sum(dim=-1) - values[labels]).abs().mean().item()


@torch.no_grad()
def _probabilities(head: Head, features: Tensor) -> Tensor:
    head.module.eval()
    return head.probabilities(head.module(features)).float()


def _batches(num_samples: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of batches without end; the whole set where it fits into one."""
    if num_samples <= batch_size:
        while True:
            yield torch.arange(num_samples)
    while True:
        order = torch.randperm(num_samples, generator=generator)
        yield from order[: num_samples // batch_size * batch_size].split(batch_size)
