"""Prompts as token embeddings, and the protocol of a text encoder that turns them into features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from einops import repeat
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """K prompts as token embeddings: the beginning that all share, and the rest of each.

    Attributes:
        prefix: (P, W) embeddings of the tokens that open every prompt (start of text, shared context).
        suffixes: (K, S, W) embeddings of what follows, up to the end of the longest prompt; shorter ones are padded.
        lengths: (K,) int64 tokens of each suffix up to and including the end of text.
        padding: (W,) embedding of the padding token.
        ids: (K, P + S) token ids; a stand-in where an embedding is learned.
        padding_id: id of the padding token.
    """

    prefix: Tensor
    suffixes: Tensor
    lengths: Tensor
    padding: Tensor
    ids: Tensor
    padding_id: int

    def __len__(self) -> int:
        return len(self.suffixes)

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest prompt, special tokens included."""
        return len(self.prefix) + self.suffixes.shape[1]

    def sequences(self, length: int | None = None) -> tuple[Tensor, Tensor]:
        """One full sequence per prompt, padded to `length` tokens (default: the longest prompt).

        Returns:
            embeddings (K, L, W) and ids (K, L).
        """
        num = (length or self.num_tokens) - self.num_tokens
        parts = [
            repeat(self.prefix, "p w -> k p w", k=len(self)),
            self.suffixes,
            repeat(self.padding, "w -> k n w", k=len(self), n=num),
        ]
        return torch.cat(parts, dim=1), torch.nn.functional.pad(self.ids, (0, num), value=self.padding_id)


@runtime_checkable
class TextEncoder(Protocol):
    """What the head needs of a text encoder.

    An object of your own with these members can be passed as `text_encoder`; where it is an `nn.Module`, it is moved,
    frozen and kept in eval mode with the head.  An optional `logit_scale` (log of the factor on the cosines, a float)
    becomes the head's default.
    """

    width: int
    """W, size of a token embedding."""
    embed_dim: int
    """D, size of a text feature."""
    context_length: int
    """The most tokens that a prompt may have, special tokens included."""

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Token embeddings (N, W) of token ids (N,), before positions are added; used only while prompts are built."""
        ...

    def encode(self, prompts: Prompts) -> Tensor:
        """Text features (K, D), before normalisation; differentiable in the embeddings of the prompts."""
        ...
