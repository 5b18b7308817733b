"""Text encoders: from prompts as token embeddings to text features.

`adapt` turns what a user has (an open_clip model or its text tower, a transformers text model, or an object that fits
the `TextEncoder` protocol) into what the head needs, without touching it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ordinal_prompt.text.open_clip import is_tower, open_clip_text
from ordinal_prompt.text.prompts import Prompts, TextEncoder
from ordinal_prompt.text.tokens import PromptTokenizer
from ordinal_prompt.text.towers import text_half
from ordinal_prompt.text.transformers import (
    TransformersHalf,
    TransformersTextEncoder,
    hf_text_encoder,
    is_hf_text_encoder,
    is_transformers_text,
    text_model,
    token_embedding,
)

__all__ = ["PromptTokenizer", "Prompts", "TextEncoder", "TransformersTextEncoder", "adapt"]


def adapt(model: Any, trainable: bool = False) -> tuple[Any, Callable[[Tensor], Tensor], float | None]:
    """The text encoder of a model, its token embedding, and the model's log logit scale where it has one.

    Args:
        model: `open_clip.CLIP`, `CustomTextCLIP`, `CoCa` or a text tower of theirs; a text model of transformers
            (bare, or a `TransformersTextEncoder`); or an object with the members of `TextEncoder`.
        trainable: keep the parameters trainable (and the caller's own) instead of frozen views of them.

    Raises:
        TypeError: the model has no text encoder that is known here.
    """
    if isinstance(model, TextEncoder):
        half: Any = text_half(model) if isinstance(model, nn.Module) and not trainable else model
        return half, model.embed_tokens, _log_scale(model)
    pooling = "mean"
    if isinstance(model, TransformersTextEncoder):
        model, pooling = model.model, model.pooling
    text = getattr(model, "text", None)
    tower: Any = text if isinstance(text, nn.Module) else model
    if isinstance(tower, nn.Module):
        if is_tower(tower):
            embedding: Any = tower.token_embedding
            return open_clip_text(tower, trainable), embedding, _log_scale(model)
        if is_hf_text_encoder(tower):
            return hf_text_encoder(tower, trainable), token_embedding(tower.transformer), _log_scale(model)
        if is_transformers_text(tower):
            half = TransformersHalf(text_model(tower), pooling, trainable)
            return half, token_embedding(tower), _log_scale(model)
    raise TypeError(
        f"Expected `text_encoder` to hold a text encoder, but got {type(model).__name__}. Accepted are an open_clip "
        "model (CLIP, CustomTextCLIP, CoCa) or its text tower, a text model of transformers, and any object with the "
        "members of ordinal_prompt.text.TextEncoder (width, embed_dim, context_length, embed_tokens, encode)."
    )


def _log_scale(model: Any) -> float | None:
    scale = getattr(model, "logit_scale", None)
    if isinstance(scale, Tensor):
        scale = float(scale.detach().reshape(-1)[0])
    return scale
