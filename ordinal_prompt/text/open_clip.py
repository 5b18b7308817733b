"""Text encoders of open_clip: CLIP, CustomTextCLIP, CoCa, SigLIP and whatever else its text configs describe.

A causal tower that pools at the end of text (CLIP) or at an appended class token (CoCa) runs packed: embeddings and
positions are laid out here, the tower's own transformer, final norm and projection do the arithmetic.  Every other
tower (bidirectional, other pooling) runs through its own `encode_text` on full-length sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ordinal_prompt.text.packing import group_size, pack, packed_visibility, unpack
from ordinal_prompt.text.prompts import Prompts
from ordinal_prompt.text.towers import TextHalf, text_half

_IMAGE_HALF = ("visual", "logit_scale", "logit_bias")


def is_tower(model: nn.Module) -> bool:
    """Whether the module is a text tower of open_clip (or CLIP itself, which is its own text tower)."""
    return all(hasattr(model, name) for name in ("token_embedding", "positional_embedding", "transformer", "ln_final"))


def open_clip_text(tower: Any, trainable: bool = False) -> nn.Module:
    """The text encoder of a tower: packed where that is exact, else through the tower's own code.

    Args:
        tower: `open_clip.CLIP`, or the `TextTransformer` of another model.
        trainable: keep the tower's parameters trainable, and the caller's own.

    Raises:
        ValueError: the tower gives a feature per token instead of one per text.
    """
    pooling = _pooling(tower)
    if pooling == "none":
        raise ValueError(
            "Expected a text tower that gives one feature per text, but got one with pool_type 'none'; build the model "
            "with pool_type 'argmax', 'eos', 'first' or 'last'."
        )
    half = text_half(tower, tower.token_embedding.weight, _IMAGE_HALF, trainable)
    causal = getattr(tower, "attn_mask", None) is not None
    if causal and _from_open_clip(tower) and (_class_token(tower) is not None or pooling in ("argmax", "eos")):
        return CausalTextHalf(half)
    cut = bool(getattr(tower, "use_pad_mask", False)) and pooling != "last" and _class_token(tower) is None
    return TextHalf(half, *_sizes(tower), cut)


class CausalTextHalf(nn.Module):
    """A causal text tower on packed prompts (see `ordinal_prompt.text.packing`).

    Args:
        tower: the tower, without its token embedding.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.width, self.embed_dim, self.context_length = _sizes(tower)
        _run_tokens_first(tower)

    def encode(self, prompts: Prompts) -> Tensor:
        """Features (K, D) of the prompts, before normalisation."""
        tower: Any = self.tower
        dtype = tower.transformer.get_cast_dtype()
        positions = tower.positional_embedding.to(dtype)
        start, num, length = len(prompts.prefix), *prompts.suffixes.shape[:2]
        prefix = prompts.prefix.to(dtype) + positions[:start]
        suffixes = prompts.suffixes.to(dtype) + positions[start : start + length]
        visible = torch.ones(length, length, dtype=torch.bool, device=prefix.device).tril()[None]
        pooled_at = prompts.lengths - 1

        class_token = _class_token(tower)
        if class_token is not None:
            after = prompts.padding.to(dtype) + positions[min(start + length, self.context_length - 1)]
            last = class_token.to(dtype) + positions[self.context_length]
            suffixes = torch.cat([suffixes, torch.stack([after, last]).expand(num, 2, -1)], dim=1)
            visible = self._class_token_visibility(prompts)
            pooled_at = torch.full_like(prompts.lengths, length + 1)

        length = suffixes.shape[1]
        group = group_size(num, start, length, suffixes.shape[2])
        packed = pack(prefix, suffixes, group)
        mask = self._attention_mask(visible, len(packed), group, start, dtype)
        packed = tower.transformer(packed, attn_mask=mask)
        pooled = unpack(packed, num, start, group)[torch.arange(num, device=packed.device), pooled_at]
        pooled = tower.ln_final(pooled)
        projection = tower.text_projection
        if projection is not None:
            pooled = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
        features: Tensor = pooled
        return features

    def _class_token_visibility(self, prompts: Prompts) -> Tensor:
        """(K, S + 2, S + 2) bool: the suffix, one padding slot, the class token at the end of the context (CoCa).

        CoCa masks padding for its class token one position too late, and with it the token itself: it sees the first
        padding token instead.  `correct_cls_mask` and prompts without padding see no padding, and the token itself.
        """
        length = prompts.suffixes.shape[1]
        visible = torch.ones(length + 2, length + 2, dtype=torch.bool, device=prompts.lengths.device).tril()
        visible = visible.repeat(len(prompts), 1, 1)
        full = prompts.lengths + len(prompts.prefix) == self.context_length
        exact = full | bool(getattr(self.tower, "correct_cls_mask", False))
        slots = torch.arange(length + 2, device=prompts.lengths.device)
        seen = slots < (prompts.lengths + (~exact).long())[:, None]
        visible[:, -1] = seen | (exact[:, None] & (slots == length + 1))
        return visible

    def _attention_mask(self, visible: Tensor, rows: int, group: int, prefix: int, dtype: torch.dtype) -> Tensor:
        """Additive mask (L, L), or (rows * heads, L, L) where prompts differ in what their tokens see."""
        same = len(visible) == 1 or bool((visible == visible[:1]).all())
        if same:
            visible = visible[:1].expand(group, -1, -1)[None]
        else:
            padded = torch.cat([visible, visible[-1:].expand(rows * group - len(visible), -1, -1)])
            visible = padded.unflatten(0, (rows, group))
        mask = packed_visibility(visible, prefix)
        additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        if same:
            return additive[0]
        tower: Any = self.tower
        return additive.repeat_interleave(tower.heads, dim=0)


def _run_tokens_first(tower: Any) -> None:
    """Lets the transformer work on (L, N, W) inside, which its linear layers take as one matrix.

    Batch-first, `nn.MultiheadAttention` hands them a transposed view, and the products come out twice as slow.
    """
    attentions: list[Any] = [getattr(block, "attn", None) for block in tower.transformer.resblocks]
    if getattr(tower.transformer, "batch_first", False) and all(
        isinstance(a, nn.MultiheadAttention) for a in attentions
    ):
        tower.transformer.batch_first = False
        for attention in attentions:
            attention.batch_first = False


def _from_open_clip(tower: nn.Module) -> bool:
    return any(base.__module__.split(".")[0] == "open_clip" for base in type(tower).__mro__)


def _pooling(tower: nn.Module) -> str:
    return str(getattr(tower, "text_pool_type", getattr(tower, "pool_type", "argmax")))


def _class_token(tower: nn.Module) -> Tensor | None:
    token: Tensor | None = getattr(tower, "cls_emb", None)
    return token


def _sizes(tower: Any) -> tuple[int, int, int]:
    """Width, embedding size and context length (without a class token)."""
    length, width = tower.positional_embedding.shape
    projection = tower.text_projection
    if projection is None:
        embed_dim = width
    else:
        embed_dim = projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]
    return width, embed_dim, length - (_class_token(tower) is not None)
