"""The heads, one entry each in `HEADS`; a head of your own is one more function from a task to a `Head` (trained with
the budget of all) or an `Estimator` (fitted without one).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from language import LANGUAGE_HEADS
from prompts import PROMPT_HEADS
from protocol import Build, Estimator, Head, UnfitError
from task import Task
from terms import terms
from torch import Tensor, nn
from torch.nn import functional as F

import ordinal_prompt as op

INTERPOLATIONS = ("linear", "inv_prop", "normal", "piecewise")


def constant(task: Task) -> Estimator:
    """The median of the training labels for every sample: what features have to beat."""

    def fit(_: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
        one_hot = F.one_hot(labels.median(), task.num_ranks).float()
        return lambda features: one_hot.expand(len(features), -1)

    return Estimator(fit)


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
    from coral_pytorch import dataset, layers, losses

    levels = torch.stack([dataset.label_to_levels(k, task.num_ranks) for k in range(task.num_ranks)])
    return Head(
        layers.CoralLayer(task.num_features, task.num_ranks),
        lambda logits, labels: losses.coral_loss(logits, levels.to(logits)[labels]),
        lambda logits: exceedance_to_probabilities(logits.sigmoid()),
    )


def corn(task: Task) -> Head:
    """CORN (Shi et al., 2021) of coral-pytorch."""
    from coral_pytorch import losses

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
    from dlordinal.output_layers import CLM

    return Head(
        nn.Sequential(nn.Linear(task.num_features, 1), CLM(task.num_ranks, "logit")),
        lambda probabilities, labels: F.nll_loss(probabilities.clamp_min(1e-7).log(), labels),
        lambda probabilities: probabilities,
    )


def soft_labels(loss: str) -> Build:
    """nn.Linear and cross-entropy with dlordinal's soft labels: "Triangular", "Beta", …"""

    def build(task: Task) -> Head:
        from dlordinal import losses

        try:
            criterion = getattr(losses, f"{loss}Loss")(nn.CrossEntropyLoss(), task.num_ranks)
        except ValueError:  # beta: parameters are tabulated for 3 to 14 ranks
            raise UnfitError(f"dlordinal has no {loss.lower()} soft labels for {task.num_ranks} ranks") from None
        return Head(nn.Linear(task.num_features, task.num_ranks), criterion)

    return build


def paper(interpolation: str | None, *, text: bool = True, project: bool = False) -> Build:
    """A prompt head with the settings and the loss of the paper (CE + KL).

    Args:
        interpolation: of the rank embeddings; None is CoOp applied to ranks.
        text: start the context and the ranks from text where the task has any, instead of random tokens.
        project: a linear projection in front of the prototypes.
    """

    def build(task: Task) -> Head:
        head = prompt_head(task, text=text, project=project, interpolation=interpolation)
        # With the default grid prompts learn at 1e-4, 3e-4 and 1e-3, a projection three times as fast.
        return Head(head, head.loss(), rate=0.015, groups=lambda head, lr: op.parameter_groups(head, lr, 1 / 3))

    return build


def recipe(prompts: str, *, project: bool = False) -> Build:
    """A prompt head with the settings that the library recommends.

    Args:
        prompts: "learned", or "frozen" as they start, so that the prototypes are those of the rank names.
        project: a linear projection in front of the prototypes.
    """

    def build(task: Task) -> Head:
        options = op.recipe(task.rank_names or task.num_ranks, prompts=prompts)
        head = prompt_head(task, text=True, project=project, **options)
        # With the default grid: 1e-3, 3e-3 and 1e-2; `parameter_groups` slows the prompts down.
        return Head(head, head.loss(), rate=0.05, groups=op.parameter_groups)

    return build


def prompt_head(task: Task, *, text: bool, project: bool, **options: Any) -> op.OrdinalPromptHead:
    """See `paper`; the options are those of `OrdinalPromptHead`."""
    if task.text_encoder is None:
        raise UnfitError("there is no text encoder")
    model, tokenizer = task.text_encoder()
    head = op.OrdinalPromptHead(
        model,
        task.rank_names if text and task.rank_names else task.num_ranks,
        tokenizer=tokenizer,
        rank_values=task.rank_values.cpu(),
        context=task.context if text and task.context is not None else 10,
        in_features=task.num_features if project else None,
        **options,
    )
    if head.in_features != task.num_features:
        raise UnfitError(
            f"features of width {task.num_features} need a projection to the text encoder's {head.embed_dim}"
        )
    return head


HEADS: dict[str, Build] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "coral": coral,
    "corn": corn,
    "clm": clm,
    "triangular": soft_labels("Triangular"),
    "beta": soft_labels("Beta"),
    "binomial": soft_labels("Binomial"),
    "exponential": soft_labels("Exponential"),
    "coop": paper(None, text=False),
    "coop-projected": paper(None, text=False, project=True),
    "names": paper(None),
    "names-projected": paper(None, project=True),
    **{f"prompt-{kind}": paper(kind) for kind in INTERPOLATIONS},
    **{f"prompt-{kind}-projected": paper(kind, project=True) for kind in INTERPOLATIONS},
    **LANGUAGE_HEADS,
    **PROMPT_HEADS,
    "ours": recipe("learned"),
    "ours-frozen": recipe("frozen"),
    "ours-projected": recipe("learned", project=True),
    "ours-frozen-projected": recipe("frozen", project=True),
    **terms("ours-frozen", recipe("frozen")),
    **terms("ours-frozen-projected", recipe("frozen", project=True)),
}
