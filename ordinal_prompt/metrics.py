"""How ordered rank prototypes are (OrdinalCLIP, section 4.5)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def ordinality(prototypes: Tensor, span: int | None = None) -> float:
    """Share of neighbouring pairs of similarities that are in order: the further the rank, the less similar.

    With S the cosine similarities of the prototypes, the share of the cells i ≤ j ≤ K-2 with S[i, j] > S[i, j+1].
    **Chance is near one half**, not zero: the cells i = j are in order by themselves, of the others random prototypes
    have every second, which makes 1/2 + 1/K in expectation.  Report the score beside that of random prototypes.

    Args:
        prototypes: (K, D), of any norm; the weight of a linear classifier will do.
        span: only cells with j - i < span; default all.

    Raises:
        ValueError: fewer than 2 prototypes, another shape, values that are not finite, a span below 1.
        TypeError: prototypes that are no tensor.

    >>> import torch
    >>> angle = torch.linspace(0, 3, 7)
    >>> ordinality(torch.stack([angle.cos(), angle.sin()], dim=1))
    1.0
    """
    if not isinstance(prototypes, Tensor):
        raise TypeError(f"Expected `prototypes` to be a tensor, but got {type(prototypes).__name__}.")
    if not bool(prototypes.isfinite().all()):
        raise ValueError("Expected finite `prototypes`, but got NaN or infinity.")
    if prototypes.dim() != 2 or len(prototypes) < 2:
        raise ValueError(f"Expected `prototypes` of shape (K, D), K at least 2, but got {tuple(prototypes.shape)}.")
    if span is not None and span < 1:
        raise ValueError(f"Expected `span` to be at least 1, but got {span}.")
    unit = torch.nn.functional.normalize(prototypes.double(), dim=1)
    similarity = unit @ unit.T
    ordered = similarity[:-1, :-1] > similarity[:-1, 1:]
    index = torch.arange(len(ordered), device=ordered.device)
    distance = index[None, :] - index[:, None]
    counted = (distance >= 0) & (distance < (span or len(unit)))
    return float(ordered[counted].double().mean())
