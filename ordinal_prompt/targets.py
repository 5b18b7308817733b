"""A batch as the terms of the loss take it: logits (B, K), labels of one kind, and weights; checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ordinal_prompt.arrays import number_tensor, widest_float
from ordinal_prompt.cache import traced
from ordinal_prompt.labels import rank_indices


def read_batch(
    logits: Any,
    labels: Any,
    sample_weight: Any = None,
    rank_values: Sequence[float] | None = None,
    ignore_index: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits (B, K); labels (B,) indices, (B, K) distributions or (B, 2) ranges of indices; weights (B,) or None.

    Samples without a label, and those of weight 0, get weight 0 and any label that is sound.

    Args, Raises: as of `OrdinalPromptLoss`.
    """
    logits = logits if isinstance(logits, Tensor) else getattr(logits, "logits", logits)  # of a model of transformers
    for name, value in (("logits", logits), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"Expected `{name}` to be a tensor, but got {type(value).__name__}.")
    if not logits.is_floating_point():
        raise TypeError(f"Expected `logits` to be floating point, but got {logits.dtype}.")
    if labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"Expected `labels` to be integer rank indices, but got {labels.dtype}.")
    if not logits.dim() or not logits.shape[-1]:
        raise ValueError(f"Expected `logits` of shape (..., K), but got {tuple(logits.shape)}.")
    labels = labels if labels.is_floating_point() else labels.long()  # unsigned ones, too
    num_ranks = logits.shape[-1]
    if rank_values is not None and len(rank_values) != num_ranks:
        raise ValueError(f"Expected {num_ranks} `rank_values` for {num_ranks} ranks, but got {len(rank_values)}.")
    kind = _kind(logits, labels, rank_values is not None)
    logits = logits.reshape(-1, num_ranks)
    labels = labels.reshape(-1) if kind == "indices" else labels.reshape(-1, labels.shape[-1])
    if len(labels) == 0:
        raise ValueError("Expected at least one sample, but got an empty batch.")
    there = None if sample_weight is None else (sample_weight := _weights(sample_weight, logits)) > 0
    if ignore_index is not None:
        missing = labels.isnan() if math.isnan(ignore_index) else labels == ignore_index
        if kind != "indices":
            ends, missing = missing, missing.all(dim=1)
            if kind == "ranges" and _known(labels) and bool((ends.any(dim=1) & ~missing).any()):
                raise ValueError(
                    f"Expected both ends of each range, or {ignore_index} for both, but some have one alone; a rank by "
                    "itself is a range from itself to itself."
                )
        there = ~missing if there is None else there & ~missing
        sample_weight = there.to(logits.dtype) if sample_weight is None else sample_weight * there
    if there is not None:
        sound = 1 / num_ranks if kind == "distributions" else 0 if rank_values is None else rank_values[0]
        if rank_values is not None and not labels.is_floating_point():
            labels = labels.to(widest_float(labels.device))
        labels = torch.where(there if kind == "indices" else there[:, None], labels, sound)
    if kind == "distributions":
        _check_distributions(labels)
    elif rank_values is not None:
        labels = rank_indices(labels, rank_values)
    else:
        _check_indices(labels, num_ranks)
    if kind == "ranges" and _known(labels) and bool((labels[:, 0] > labels[:, 1]).any()):
        raise ValueError("Expected ranges from their first to their last rank, but some end before they start.")
    return logits, labels, sample_weight


def are_ranges(labels: Tensor) -> bool:
    """Whether checked labels are ranges."""
    return labels.dim() == 2 and not labels.is_floating_point()


def _kind(logits: Tensor, labels: Tensor, values: bool) -> str:
    """What the labels are, from their shape and type."""
    real = labels.is_floating_point()
    if labels.shape == logits.shape[:-1]:
        if real and not values:
            raise TypeError(
                f"Expected `labels` to be integer rank indices, but got {labels.dtype}; map your rank values to "
                "their indices first (op.rank_indices), or pass rank_values= to the loss."
            )
        return "indices"
    if labels.shape == logits.shape and real:
        return "distributions"
    if labels.shape == (*logits.shape[:-1], 2) and (values or not real) and logits.shape[-1] > 2:
        return "ranges"
    hints = {logits.shape: "; for one-hot labels pass labels.float()", (*logits.shape[:-1], 1): "; squeeze them"}
    raise ValueError(
        f"Expected one label for each row of logits {tuple(logits.shape)} (or a distribution over its ranks, or the"
        f" first and the last rank of a range), but got labels of shape {tuple(labels.shape)}, {labels.dtype}"
        f"{hints.get(labels.shape, '')}."
    )


def _weights(given: Any, logits: Tensor) -> Tensor:
    weight = number_tensor(given, "sample_weight").to(logits.device).reshape(-1)
    if len(weight) != len(logits) or (_known(weight) and not bool(((weight >= 0) & weight.isfinite()).all())):
        raise ValueError("Expected one finite `sample_weight` for each sample, none negative.")
    return weight


def _check_indices(labels: Tensor, num_ranks: int) -> None:
    if _known(labels):
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= num_ranks:
            hint = f"; of samples without a label pass ignore_index={low} to the loss" if low in (-100, -1) else ""
            raise ValueError(f"Expected labels in 0…{num_ranks - 1} for {num_ranks} ranks, but got {low}…{high}{hint}.")


def _check_distributions(labels: Tensor) -> None:
    if _known(labels) and not bool(((labels >= 0).all(dim=1) & ((labels.sum(dim=1) - 1).abs() < 1e-2)).all()):
        raise ValueError(
            "Expected distributions over the ranks in `labels`, none negative, each summing to one, but some rows do "
            "not; divide votes by their number, and leave samples without votes out by a `sample_weight` of 0."
        )


def _known(labels: Tensor) -> bool:
    """Whether there are numbers to look at."""
    return not (traced() or labels.is_meta)
