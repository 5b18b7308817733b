"""Tiny random open_clip models, and the head that most tests look at."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import open_clip
import pytest
import torch
from torch import nn

import ordinal_prompt as op

VISION = {"layers": 1, "width": 16, "head_width": 16, "patch_size": 16, "image_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}


def tiny_clip(embed_dim: int = 12, quick_gelu: bool = False, **text: object) -> open_clip.CLIP:
    """A randomly initialised CLIP whose parts all matter (open_clip initialises some of them with zeros or ones)."""
    model = open_clip.CLIP(embed_dim, vision_cfg=VISION, text_cfg={**TEXT, **text}, quick_gelu=quick_gelu)
    return shaken(model)


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit_scale" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def clip() -> open_clip.CLIP:
    torch.manual_seed(1)
    return tiny_clip()


@pytest.fixture(scope="session")
def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.get_tokenizer("ViT-B-32")


@pytest.fixture
def head(clip: open_clip.CLIP) -> op.OrdinalPromptHead:
    return op.OrdinalPromptHead(clip, 5, context=4)
