"""Ours, fitted: `op.fit_head`, what the parts of its prompts add to it, and another prior."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from protocol import Build, Estimator, UnfitError
from task import Task
from torch import Tensor

import ordinal_prompt as op
from ordinal_prompt.fitting import fit_map

STEPS, RATE = 60, 0.01  # of learned prompts, which the recipe gives a twentieth of the rate


def fitted(
    task: Task,
    named: bool = True,
    learned: bool = False,
    prior: str | None = None,
    smoothing: float = 0.0,
    **changes: Any,
) -> Estimator:
    """`op.fit_head` around the prototypes of the names; outside the text encoder's space, around zero.

    Args:
        named: False calls the ranks by their numbers.
        prior: that of the place where the head is used, by `op.adapt_prior`: `"em"` estimates it from the features that
            are to be predicted, `"known"` is that of the whole training part.
        smoothing: of that estimate.
        learned: train the prompts and everything else from the fit on, with `op.regularization`.
        changes: options of the head in place of the recipe's.
    """
    if task.text_encoder is None:
        raise UnfitError("there is no text encoder")
    model, tokenizer = task.text_encoder()
    names = (named and task.rank_names) or tuple(f"{value:g}" for value in task.rank_values.tolist())
    options = {**op.recipe(names, prompts="fitted"), "learn_prompts": learned, **changes}
    options |= {"tokenizer": tokenizer, "context": task.context or "", "rank_values": task.rank_values}
    head = op.OrdinalPromptHead(model, names, **options)
    if head.in_features != task.num_features:
        if named and (learned or changes):
            raise UnfitError(f"features of width {task.num_features} are outside the text encoder's space")
        head = op.OrdinalPromptHead(model, names, in_features=task.num_features, normalize=False, **options)

    def fit(x: Tensor, y: Tensor) -> Any:
        op.fit_head(head, x, y)
        if learned:
            learn(head, x, y)
        head.eval().requires_grad_(False)
        if prior is None:
            return head.predict_proba
        counts = y.bincount(minlength=task.num_ranks) + 0.5
        known = task.labels["train"].bincount(minlength=task.num_ranks) + 0.5 if prior == "known" else None

        def predict(z: Tensor) -> Tensor:
            logits = head(z)
            adapted: Tensor = op.adapt_prior(logits, counts, known, smoothing)(logits)
            return adapted.softmax(dim=1)

        return predict

    return Estimator(fit)


def without_text(task: Task) -> Estimator:
    """The fit around zero, as of features that language says nothing about."""

    def fit(x: Tensor, y: Tensor) -> Any:
        fitted = fit_map(x, y, task.num_ranks)
        return lambda z: (z.double() @ fitted.weight.T + fitted.bias).softmax(dim=1).float()

    return Estimator(fit)


def learn(head: op.OrdinalPromptHead, x: Tensor, y: Tensor) -> None:
    """Full batches, a fixed number of steps, no validation."""
    head.train()
    optimizer = torch.optim.Adam(op.parameter_groups(head, RATE, scale_lr_scale=1.0))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (head.loss()(head(x), y) + op.regularization(head, len(x))).backward()
        optimizer.step()
        schedule.step()


PROMPT_HEADS: dict[str, Build] = {
    "ours-fitted": fitted,
    "ours-fitted-learned": partial(fitted, learned=True),
    "ours-fitted-two-bases": partial(fitted, num_base_ranks=2),
    "ours-fitted-names": partial(fitted, interpolation=None),  # each name where the text encoder puts it
    "ours-fitted-numbers": partial(fitted, named=False),
    "ours-fitted-no-text": without_text,
    "ours-fitted-em": partial(fitted, prior="em"),
    "ours-fitted-em-smooth": partial(fitted, prior="em", smoothing=0.02),
    "ours-fitted-known": partial(fitted, prior="known"),
}
