"""Prototypes that are handed to heads in training: of one text pass for several heads, or for several batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ordinal_prompt.cache import Kept

Given = Sequence[tuple[Any, Tensor]]  # heads (`RankPrototypes`), and prototypes (K, D) for each


@contextmanager
def given_prototypes(given: Given) -> Iterator[None]:
    """Inside, these are the prototypes of the heads, as long as nothing that they were made of changes.

    Raises:
        RuntimeError: prompts were changed inside.
    """
    try:
        for head, prototypes in given:
            head._reused = Kept(prototypes, head._sources(), ())
        yield
        for head, _ in given:
            head._reused_prototypes(head._reused)
    finally:
        for head, _ in given:
            head._reused = None


@contextmanager
def one_backward(given: Given) -> Iterator[None]:
    """Inside, these are the prototypes of the heads; their gradients are added up, and go on once, when it ends."""
    shared = [(head, prototypes.detach().requires_grad_()) for head, prototypes in given]
    with given_prototypes(shared):
        yield
    pairs = zip(given, shared, strict=True)
    reached = [(whole, own.grad) for (_, whole), (_, own) in pairs if own.grad is not None]
    if given and not reached:
        warnings.warn(
            "No gradient reached the prompts inside reuse_prototypes(), and they do not learn from these batches; call "
            "backward() inside the block.",
            stacklevel=5,
        )
    if reached:
        torch.autograd.backward([whole for whole, _ in reached], [gradient for _, gradient in reached])
