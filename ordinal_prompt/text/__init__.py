"""Text encoders: from prompts as token embeddings to text features.

`adapt` turns what a user has (an open_clip model or its text tower, a text model of transformers, or an object that
fits the `TextEncoder` protocol) into what the head needs, without touching it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ordinal_prompt.text.open_clip import is_tower, open_clip_text, through_model
from ordinal_prompt.text.prompts import Prompts, TextEncoder
from ordinal_prompt.text.sentence import SentenceHalf, is_sentence_transformer, word_embedding
from ordinal_prompt.text.tokens import PromptTokenizer
from ordinal_prompt.text.towers import text_half, without_adapter
from ordinal_prompt.text.transformers import (
    TransformersHalf,
    TransformersTextEncoder,
    hf_text_encoder,
    is_hf_text_encoder,
    is_transformers_text,
    token_embedding,
)

__all__ = ["AdaptedText", "PromptTokenizer", "Prompts", "TextEncoder", "TransformersTextEncoder", "adapt"]


@dataclass(frozen=True)
class AdaptedText:
    """What the head takes of a model.

    Attributes:
        encoder: the text encoder, a `TextEncoder`.
        embed_tokens: token ids (N,) to token embeddings (N, W); used only while prompts are built.
        log_scale: the log of the model's own factor on cosines, where it has one.
    """

    encoder: Any
    embed_tokens: Callable[[Tensor], Tensor]
    log_scale: float | None

    @property
    def table(self) -> Tensor | None:
        """The token embeddings (V, W) of the vocabulary, where they are known."""
        table = getattr(self.embed_tokens, "weight", None)
        return table if isinstance(table, Tensor) else None

    @torch.no_grad()
    def embed(self, ids: Sequence[int]) -> Tensor:
        """Token embeddings (N, W), detached.

        Raises:
            ValueError: ids outside the vocabulary, as a foreign tokenizer gives them.
        """
        if self.table is not None and max(ids) >= len(self.table):
            raise ValueError(
                f"The tokenizer gives token id {max(ids)}, but this text encoder's vocabulary has {len(self.table)}; "
                "pass the tokenizer that belongs to the text encoder."
            )
        device = "cpu" if self.table is None else self.table.device
        return self.embed_tokens(torch.tensor(ids, dtype=torch.long, device=device)).detach()


def adapt(model: Any, trainable: bool = False) -> AdaptedText:
    """The text half of a model, ready for prompts.

    Args:
        model: `open_clip.CLIP`, `CustomTextCLIP`, `CoCa` or a text tower of theirs; a text model of transformers
            (bare, or a `TransformersTextEncoder`); a `SentenceTransformer`; or an object with the members of
            `TextEncoder`.
        trainable: keep the parameters trainable (and the caller's own) instead of frozen views of them.

    Raises:
        TypeError: the model has no text encoder that is known here, or one that cannot encode prompts.
    """
    if isinstance(model, TextEncoder):
        if trainable and not isinstance(model, nn.Module):
            raise TypeError(
                f"Expected a `text_encoder` that can be trained to be an nn.Module, but got {type(model).__name__}; "
                "derive it from nn.Module, or leave freeze_text_encoder=True."
            )
        half: Any = text_half(model) if isinstance(model, nn.Module) and not trainable else model
        return AdaptedText(half, model.embed_tokens, _log_scale(model))
    pooling = None
    if isinstance(model, TransformersTextEncoder):
        model, pooling = model.model, model.pooling
    if is_sentence_transformer(model):
        return AdaptedText(SentenceHalf(model, trainable), word_embedding(model), _log_scale(model))
    text = getattr(model, "text", None)
    tower: Any = text if isinstance(text, nn.Module) else model
    if isinstance(tower, nn.Module):
        embedding: Any = None
        if is_tower(tower):
            embedding = without_adapter(tower.token_embedding)
            half = open_clip_text(tower, trainable)
        elif is_hf_text_encoder(tower):
            embedding = token_embedding(tower.transformer)
            half = hf_text_encoder(tower, trainable)
        elif is_transformers_text(tower):
            embedding = token_embedding(tower)
            half = TransformersHalf(tower, pooling, trainable)
        if embedding is not None:
            if tower is text:
                half = through_model(model, half, embedding.weight, trainable)
            return AdaptedText(half, embedding, _log_scale(model))
    raise TypeError(
        f"Expected `text_encoder` to hold a text encoder, but got {type(model).__name__}. Accepted are an open_clip "
        "model (CLIP, CustomTextCLIP, CoCa) or its text tower, a text model of transformers, a SentenceTransformer, "
        "and any object with the members of ordinal_prompt.text.TextEncoder (width, embed_dim, context_length, "
        "embed_tokens, encode)."
    )


def _log_scale(model: Any) -> float | None:
    scale = getattr(model, "logit_scale", None)
    if isinstance(scale, Tensor):
        scale = None if scale.is_meta else float(scale.detach().reshape(-1)[0])
    return scale
