"""The text half of somebody else's model: same weights, nothing of the rest.

A half is a structural copy: its modules are new objects, its tensors are the caller's own.  Freezing it, switching it
to eval mode or moving it leaves the caller's model as it was, and costs no memory.  The token embedding table, often a
third of a text encoder, is left behind: in its place stands a `PromptEmbedding`, which hands out the prompts.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ordinal_prompt.text.prompts import Prompts


class PromptEmbedding(nn.Module):
    """Stands where a token embedding was, and answers any ids with the prompts at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        if self.prompts is None or self.prompts.shape[:-1] != ids.shape:
            raise RuntimeError("This text encoder has left its token embedding behind and encodes prompts only.")
        return self.prompts


def text_half(
    model: nn.Module, table: Tensor | None = None, drop: tuple[str, ...] = (), trainable: bool = False
) -> nn.Module:
    """A structural copy of `model` that shares its tensors.

    Args:
        model: the module to copy.
        table: the token embedding table; each embedding module that holds it is replaced.  None keeps them all.
        drop: names of attributes that are not copied (the image half) and are None in the copy.
        trainable: keep the caller's parameters, so that training changes them; otherwise frozen views of them.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is table:
            memo[id(module)] = PromptEmbedding()
    for parameter in model.parameters():
        shared = parameter if trainable else nn.Parameter(parameter.detach(), requires_grad=False)
        memo[id(parameter)] = shared
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    for name in drop:
        memo[id(getattr(model, name, None))] = None
    half: nn.Module = copy.deepcopy(model, memo)
    return half


class TextHalf(nn.Module):
    """Runs the text half of a model on prompts, through the model's own code from token ids to features.

    Exact for anything, and as slow as the model: sequences run to the longest prompt where the model masks padding,
    else to its full length.

    Args:
        tower: what `text_half` made of a model.
        width, embed_dim, context_length: see `TextEncoder`.
        cut: whether sequences may end with the longest prompt.
    """

    def __init__(self, tower: nn.Module, width: int, embed_dim: int, context_length: int, cut: bool) -> None:
        super().__init__()
        self.tower = tower
        self.width, self.embed_dim, self.context_length = width, embed_dim, context_length
        self.cut = cut

    def encode(self, prompts: Prompts) -> Tensor:
        """Features (K, D) of the prompts, before normalisation."""
        embeddings, ids = prompts.sequences(None if self.cut else self.context_length)
        lengths = prompts.lengths + len(prompts.prefix)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        slots = [module for module in self.tower.modules() if isinstance(module, PromptEmbedding)]
        try:
            for slot in slots:
                slot.prompts = embeddings.to(self._dtype())
            return self.features(ids, mask)
        finally:
            for slot in slots:
                slot.prompts = None

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002  # subclasses need the mask
        """Features (K, D) of token ids (K, L); `mask` (K, L) is False on padding."""
        encode_text = getattr(self.tower, "encode_text", self.tower)
        output = encode_text(ids)
        features: Tensor = output[0] if isinstance(output, tuple) else output
        return features

    def _dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.tower.parameters() if p.is_floating_point())
