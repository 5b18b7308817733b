"""Other terms of the loss on top of our recipe with frozen prompts: which of them help?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from protocol import Build, Head
from torch import Tensor
from torch.nn import functional as F

import ordinal_prompt as op

Term = Callable[[Tensor, Tensor], Tensor]


def distance(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in which a wrong rank weighs 1 + 4 · its relative distance (after NumCLIP, Du et al., 2024); the
    weight multiplies the exponential, so that negative logits do no harm."""
    ranks = torch.arange(logits.shape[1])
    return F.cross_entropy(logits + torch.log1p((ranks - labels[:, None]).abs() / (len(ranks) - 1) * 4), labels)


def unimodal(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the steps that go down before the label and up behind it (Albuquerque et al., 2021)."""
    steps, ranks = logits.softmax(dim=1).diff(dim=1), torch.arange(logits.shape[1] - 1)
    return torch.where(ranks < labels[:, None], F.relu(-steps), F.relu(steps)).sum(dim=1).mean()


def soft(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with targets that fall off as exp(-1.5 · distance) (Díaz and Marathe, CVPR 2019)."""
    targets = (-1.5 * (torch.arange(logits.shape[1]) - labels[:, None]).abs()).softmax(dim=1)
    return F.cross_entropy(logits, targets)


def with_emd(base: Build, **options: Any) -> Build:
    """The head with the squared earth mover's distance in its loss."""

    def build(task: Any) -> Head:
        head = base(task)
        assert isinstance(head, Head)
        head.loss = op.OrdinalPromptLoss(**{"kl_weight": 0, **options})
        return head

    return build


def with_term(base: Build, term: Term, weight: float, keep: float) -> Build:
    """The head with weight · term + keep · its own loss."""

    def build(task: Any) -> Head:
        head = base(task)
        assert isinstance(head, Head)
        own = head.loss
        head.loss = lambda logits, labels: keep * own(logits, labels) + weight * term(logits, labels)
        return head

    return build


def terms(name: str, base: Build) -> dict[str, Build]:
    """Heads of `base` with each of the terms, named after it."""
    return {
        f"{name}-emd-0.1": with_emd(base, emd_weight=0.1),
        f"{name}-emd-0.3": with_emd(base, emd_weight=0.3),
        f"{name}-emd": with_emd(base, emd_weight=1.0),
        f"{name}-emd-alone": with_emd(base, emd_weight=1.0, ce_weight=0.0),
        f"{name}-distance": with_term(base, distance, 1.0, 0.0),
        f"{name}-unimodal": with_term(base, unimodal, 1.0, 1.0),
        f"{name}-unimodal-10": with_term(base, unimodal, 10.0, 1.0),
        f"{name}-soft": with_term(base, soft, 1.0, 0.0),
    }
