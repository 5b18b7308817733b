"""Tiny random open_clip models, the head that most tests look at, and what makes every run the same.

Property tests draw the same cases on every machine; `--hypothesis-profile=random` draws others, and more of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import open_clip
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

import ordinal_prompt as op

SLOW_MACHINES: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", derandomize=True, database=None, **SLOW_MACHINES)
settings.register_profile("random", max_examples=1000, print_blob=True, **SLOW_MACHINES)
settings.load_profile("fixed")

VISION = {"layers": 1, "width": 16, "head_width": 16, "patch_size": 16, "image_size": 16}
TEXT_OPTIONS = {*open_clip.CLIPTextCfg.__dataclass_fields__}  # old versions of open_clip have fewer
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


def count_text_passes(head: op.OrdinalPromptHead) -> list[int]:
    """A list that grows by one whenever the head encodes its prompts."""
    passes: list[int] = []
    encode = head.text_encoder.encode

    def counted(prompts: Any) -> Any:
        passes.append(1)
        return encode(prompts)

    head.text_encoder.encode = counted
    return passes


@pytest.fixture(autouse=True)
def _independent() -> Iterator[None]:
    """Each test starts from the same random numbers, and leaves no compiled code for the next."""
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def clip() -> Iterator[open_clip.CLIP]:
    """One model for all tests, which must leave it as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = tiny_clip()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    yield model
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="session")
def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.get_tokenizer("ViT-B-32")


@pytest.fixture
def head(clip: open_clip.CLIP) -> op.OrdinalPromptHead:
    return op.OrdinalPromptHead(clip, 5, context=4)
