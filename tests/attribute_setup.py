"""Heads of several attributes, as different as can be, and labels for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ordinal_prompt as op

OPTIONS: dict[str, dict[str, Any]] = {
    "age": {"ranks": 21, "context": 6, "in_features": 7},
    "quality": {"ranks": 3, "context": 0, "in_features": 7, "interpolation": None, "tokens_per_rank": [1, 3, 2]},
    "blur": {"ranks": 5, "context": 2, "in_features": 7, "rank_specific_context": True, "rank_position": "front"},
    "fitted": {"ranks": 4, "context": 3, "in_features": 7, "alignment": 1.0, "residual": 1.0},
}


def build(text: Any, **more: Any) -> dict[str, op.OrdinalPromptHead]:
    torch.manual_seed(5)
    return {name: op.OrdinalPromptHead(text, **options, **more) for name, options in OPTIONS.items()}


def labels(rows: int = 8) -> dict[str, Tensor]:
    torch.manual_seed(9)
    return {name: torch.randint(options["ranks"], (rows,)) for name, options in OPTIONS.items()}
