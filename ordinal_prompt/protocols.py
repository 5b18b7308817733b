"""Training subsets of the paper's protocols: few shots, and shifted label distributions (OrdinalCLIP, section 4.3).

Both take labels and return indices into them, in ascending order, so that they fit `torch.utils.data.Subset`.  The test
set stays whole.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from ordinal_prompt.arrays import Labels, is_number, label_tensor


def few_shot_indices(labels: Labels, shots: int, generator: Generator | None = None) -> Tensor:
    """Indices of `shots` random samples per label; all of a label's samples where it has fewer, none twice.

    Args:
        labels: (N,) integers: a tensor, a list, an array, or a pandas Series, whose index plays no part.
        shots: samples per label, at least 1.
        generator: source of randomness; default torch's global one.

    Returns:
        (≤ shots · number of labels,) int64, ascending.

    Raises:
        ValueError: no labels, missing labels, labels of another shape, shots below 1.
        TypeError: labels that are not integers.

    >>> few_shot_indices([0, 0, 0, 1, 2, 2], shots=2, generator=torch.Generator().manual_seed(0)).tolist()
    [0, 2, 3, 4, 5]
    """
    labels = _labels(labels)
    if not hasattr(shots, "__index__") or isinstance(shots, bool):
        raise TypeError(f"Expected `shots` to be an integer, but got {shots!r}.")
    if shots < 1:
        raise ValueError(f"Expected `shots` to be at least 1, but got {shots}.")
    return _keep(labels, dict.fromkeys(labels.unique().tolist(), shots), generator)


def label_shift_indices(labels: Labels, num_labels: int, keep: float, generator: Generator | None = None) -> Tensor:
    """Indices of a training set whose most frequent labels have become rare.

    The `num_labels` most frequent labels keep max(⌊n · keep⌋, 1) of their n samples, the others all; of equally
    frequent labels the smaller goes first.

    Args:
        labels: (N,) integers: a tensor, a list, an array, or a pandas Series, whose index plays no part.
        num_labels: how many labels lose samples (the paper: 10, 20, 30, 40).
        keep: share that they keep, in (0, 1] (the paper: 0.2, 0.1).
        generator: source of randomness; default torch's global one.

    Returns:
        (≤ N,) int64, ascending.

    Raises:
        ValueError: no labels, missing labels, labels of another shape, a number of labels below 0 or above those that
            occur, a share outside (0, 1].
        TypeError: labels or a number of labels that are not integers.

    >>> label_shift_indices([0, 0, 0, 0, 1, 2], num_labels=1, keep=0.5, generator=torch.Generator().manual_seed(0))
    tensor([2, 3, 4, 5])
    """
    labels = _labels(labels)
    values, counts = labels.unique(return_counts=True)
    if not hasattr(num_labels, "__index__"):
        raise TypeError(f"Expected `num_labels` to be an integer, but got {num_labels!r}.")
    if not is_number(keep):
        raise TypeError(f"Expected `keep` to be a number, but got {keep!r}.")
    if not 0 <= num_labels <= len(values):
        raise ValueError(f"Expected `num_labels` in 0…{len(values)}, the labels that occur, but got {num_labels}.")
    if not 0 < keep <= 1:
        raise ValueError(f"Expected `keep` in (0, 1], but got {keep}.")
    frequent = counts.sort(descending=True, stable=True).indices[:num_labels]
    kept = {int(values[i]): max(math.floor(int(counts[i]) * keep + 1e-9), 1) for i in frequent}
    return _keep(labels, kept, generator)


def _keep(labels: Tensor, limits: dict[int, int], generator: Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    order = torch.randperm(len(labels), generator=generator, device=device).cpu()
    values, counts = labels.unique(return_counts=True)
    by_label = order[labels[order].argsort(stable=True)]  # runs of equal labels, each in random order
    kept = [
        run[: limits.get(value, len(run))]
        for value, run in zip(values.tolist(), by_label.split(counts.tolist()), strict=True)
    ]
    return torch.cat(kept).sort().values


def _labels(labels: Labels) -> Tensor:
    labels = label_tensor(labels).cpu()
    if labels.dim() != 1 or len(labels) == 0:
        raise ValueError(
            f"Expected `labels` to be a sequence of at least one label, but got shape {tuple(labels.shape)}."
        )
    return labels
