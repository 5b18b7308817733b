"""What a head is compared on: features and labels of three parts, and what the ranks are called."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Task:
    """Features with ordered labels."""

    name: str
    features: dict[str, Tensor]  # (N, D) float32 of each part
    labels: dict[str, Tensor]  # (N,) int64 in 0…K-1 of each part
    rank_values: Tensor  # (K,), in the unit of the errors
    rank_names: tuple[str, ...] | None = None  # lowest first
    context: str | None = None  # a text that leads up to a rank's name; None is random tokens
    text_encoder: Callable[[], tuple[Any, Any]] | None = None  # model and tokenizer, loaded at the first call

    def __post_init__(self) -> None:
        widths = [self.features[part].shape[1] for part in PARTS]
        if len({*widths}) > 1:
            raise ValueError(
                f"{self.name}: the parts have features of the widths {widths[0]}, {widths[1]} and {widths[2]}."
            )
        if self.rank_names is not None and len(self.rank_names) != self.num_ranks:
            raise ValueError(
                f"{self.name}: {len(self.rank_names)} rank names were given for {self.num_ranks} ranks; give one each."
            )

    @property
    def num_ranks(self) -> int:
        """K."""
        return len(self.rank_values)

    @property
    def num_features(self) -> int:
        """D."""
        return self.features["train"].shape[1]

    def digest(self) -> str:
        """A hash of features and labels, so that runs on other data are not taken for runs on these."""
        digest = hashlib.sha256()
        for part in PARTS:
            digest.update(self.features[part].numpy().tobytes())
            digest.update(self.labels[part].numpy().tobytes())
        return digest.hexdigest()[:16]

    def to(self, device: torch.device | str) -> Task:
        """The same task with features, labels and values on a device."""
        return replace(
            self,
            features={part: features.to(device) for part, features in self.features.items()},
            labels={part: labels.to(device) for part, labels in self.labels.items()},
            rank_values=self.rank_values.to(device),
        )
