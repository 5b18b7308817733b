"""The loss of several attributes, each with a weight and with labels of its own, some of which may be missing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ordinal_prompt.arrays import is_number
from ordinal_prompt.losses import OrdinalPromptLoss


class OrdinalPromptLosses(nn.Module):
    """Σ weight · loss over attributes.

    A batch needs labels of every attribute, so that all processes compute the same terms under DistributedDataParallel;
    samples without one have the `ignore_index` of its loss.  Where none has one, the term and its gradient are zero.
    Fits transformers' `Trainer(compute_loss_func=...)` as `OrdinalPromptLoss` does.

    Args:
        losses: the loss of each attribute, as `head.loss(ignore_index=-100)` makes it.
        weights: of attributes, finite and not negative; default 1.

    Shapes:
        logits: for each attribute (B, K), labels (B,) and what else `OrdinalPromptLoss` takes.  Labels of A attributes
        may also be one tensor (B, A), in the order of the losses.  The loss is a scalar.

    Raises:
        ValueError: no losses, weights of other attributes or negative ones, attributes missing in logits or labels.
        TypeError: losses that are none, logits or labels that are no dictionaries.

    >>> import torch
    >>> loss = OrdinalPromptLosses({"age": OrdinalPromptLoss(), "quality": OrdinalPromptLoss()}, {"age": 0.5})
    >>> logits = {"age": torch.zeros(2, 8), "quality": torch.zeros(2, 3)}
    >>> labels = {"age": torch.tensor([7, 2]), "quality": torch.tensor([0, 2])}
    >>> {name: round(term.item(), 2) for name, term in loss.terms(logits, labels).items()}
    {'age': 2.77, 'quality': 1.79}
    >>> round(loss(logits, labels).item(), 2)
    3.18
    """

    def __init__(self, losses: Mapping[str, OrdinalPromptLoss], weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        if not losses:
            raise ValueError("Expected the loss of at least one attribute, but got none.")
        if not isinstance(losses, Mapping):
            raise TypeError(f"Expected `losses` to be a dictionary of losses, but got {type(losses).__name__}.")
        for name, loss in losses.items():
            check_name(name)
            if not isinstance(loss, nn.Module):
                raise TypeError(f"Expected the loss of {name!r} to be a module, but got {type(loss).__name__}.")
        self.losses = nn.ModuleDict(losses)
        if weights is not None and not isinstance(weights, Mapping):
            raise TypeError(f"Expected `weights` to be a dictionary of {_listed(losses)}, but got {weights!r}.")
        given = dict(weights or {})
        unknown = [name for name in given if name not in losses]
        if unknown:
            raise ValueError(f"Expected `weights` of {_listed(losses)}, but got one of {_listed(unknown)}.")
        for name, weight in given.items():
            if not is_number(weight) or not 0 <= weight < math.inf:
                raise ValueError(f"Expected weights that are finite and not negative, but got {weight!r} for {name!r}.")
        self.weights = {name: float(given.get(name, 1.0)) for name in losses}

    def forward(
        self,
        logits: Mapping[str, Tensor] | Any,
        labels: Mapping[str, Tensor] | Tensor,
        sample_weight: Mapping[str, Tensor] | Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        terms = self.terms(logits, labels, sample_weight)
        weighted = [self.weights[name] * term for name, term in terms.items()]
        total: Tensor = sum(weighted[1:], start=weighted[0])
        if num_items_in_batch is None:
            return total
        given = [*labels.values()] if isinstance(labels, Mapping) else [labels]
        items = torch.as_tensor(num_items_in_batch).clamp_min(1)
        return total * sum((one != -100).sum() for one in given) / items  # as `Trainer` counts

    def terms(
        self,
        logits: Mapping[str, Tensor] | Any,
        labels: Mapping[str, Tensor] | Tensor,
        sample_weight: Mapping[str, Tensor] | Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of each attribute, before its weight."""
        logits = getattr(logits, "logits", logits)  # of a model of transformers
        of_each: Any = labels
        if isinstance(labels, Tensor) and labels.dim() > 1 and labels.shape[-1] == len(self.losses):
            of_each = dict(zip(self.losses, labels.unbind(dim=-1), strict=True))
        for argument, given in (("logits", logits), ("labels", of_each)):
            if not isinstance(given, Mapping):
                raise TypeError(
                    f"Expected `{argument}` to be a dictionary of {_listed(self.losses)}, but got "
                    f"{type(given).__name__}."
                )
            if set(given) != set(self.losses):
                raise ValueError(
                    f"Expected `{argument}` of {_listed(self.losses)}, but got those of {_listed(given) or 'none'}; "
                    "where no sample has a label, pass labels that are all `ignore_index`."
                )
        weights = sample_weight if isinstance(sample_weight, Mapping) else dict.fromkeys(self.losses, sample_weight)
        unknown = [name for name in weights if name not in self.losses]
        if unknown:
            raise ValueError(f"Expected `sample_weight` of {_listed(self.losses)}, but got one of {_listed(unknown)}.")
        own = {name: [] if weights.get(name) is None else [weights[name]] for name in self.losses}
        return {name: loss(logits[name], of_each[name], *own[name]) for name, loss in self.losses.items()}

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


def check_name(name: object) -> None:
    """Raises ValueError for an attribute that cannot be the name of a module."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"Expected attributes that can be names of modules, but got {name!r}; choose another name.")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
