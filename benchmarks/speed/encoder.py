"""A ViT-B/32-sized text encoder with random weights, which change no time."""

from __future__ import annotations

from typing import Any

import open_clip
import torch

TEXT: dict[str, Any] = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
VISION: dict[str, Any] = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 32, "image_size": 32}


def text_encoder(**text: int) -> open_clip.CLIP:
    """A CLIP whose vision half is negligible; `text` changes the size of the text half."""
    torch.manual_seed(0)
    return open_clip.CLIP(512, VISION, {**TEXT, **text}).requires_grad_(False)
