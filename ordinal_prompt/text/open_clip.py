"""Text encoders of open_clip: CLIP, CustomTextCLIP, CoCa, SigLIP and whatever else its text configs describe.

A causal tower that pools at the end of text (CLIP) or at an appended class token (CoCa) runs packed: embeddings,
positions and attention are laid out for it, the tower's own transformer, norms and projections do the arithmetic.
Every other tower (bidirectional, other pooling, custom blocks, hooks, code of another's) runs through its own
`encode_text` at full length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ordinal_prompt.text.packing import SharedPrefixAttention, behind_each_other, pack, packed_mask, unpack
from ordinal_prompt.text.prompts import Prompts
from ordinal_prompt.text.towers import TextHalf, one_at_a_time, text_half

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
        TypeError: the tower's own code cannot encode prompts.
    """
    pooling = _pooling(tower)
    if pooling == "none":
        raise ValueError(
            "Expected a text tower that gives one feature per text, but got one with pool_type 'none'; build the model "
            "with pool_type 'argmax', 'eos', 'first' or 'last'."
        )
    ours = _is_stock(tower)
    # The code of another package may ask its image half for something, as OpenAI's asks it for its precision.
    half = text_half(tower, tower.token_embedding.weight, _IMAGE_HALF if ours else (), trainable)
    causal = getattr(tower, "attn_mask", None) is not None
    pooled_at_end = _class_token(tower) is not None or pooling in ("argmax", "eos")
    if causal and pooled_at_end and ours and _can_be_packed(half):
        return CausalTextHalf(half)
    cut = bool(getattr(tower, "use_pad_mask", False)) and pooling != "last" and _class_token(tower) is None
    return TextHalf(half, *_sizes(tower), cut).checked(tower.token_embedding.weight)


def through_model(model: Any, half: Any, table: Tensor, trainable: bool = False) -> nn.Module:
    """`half`, of the tower of a model; of a model of open_clip with an `encode_text` that is not open_clip's, that."""
    if not any(map(_is_from_open_clip, type(model).__mro__)) or _is_stock(model):
        return half  # type: ignore[no-any-return]
    whole = text_half(model, table, trainable=trainable)
    sizes = half.width, half.embed_dim, half.context_length
    return TextHalf(whole, *sizes, cut=getattr(half, "cut", False)).checked(table)


class CausalTextHalf(nn.Module):
    """A causal text tower on packed prompts (see `ordinal_prompt.text.packing`).

    Args:
        tower: the tower, without its token embedding.
    """

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower
        self.width, self.embed_dim, self.context_length = _sizes(tower)
        for block in tower.transformer.resblocks:
            block.attn = SharedPrefixAttention(block.attn)

    def encode(self, prompts: Prompts) -> Tensor:
        """Features (K, D) of the prompts, before normalisation."""
        packed, mask, pooled_at = self._lay_out(prompts)
        with one_at_a_time():  # with `sections` of another thread it would be something else
            packed = self.tower.transformer(packed, attn_mask=mask)
        return self._pool(packed, mask, pooled_at)

    def encode_all(self, several: Sequence[Prompts]) -> list[Tensor]:
        """Features (K, D) of the prompts of several heads, in one pass through the tower."""
        if getattr(self.tower.transformer, "grad_checkpointing", False):  # runs blocks again, when sections are gone
            return [self.encode(prompts) for prompts in several]
        laid_out = [self._lay_out(prompts) for prompts in several]
        sections = [(packed.shape[1], mask) for packed, mask, _ in laid_out]
        with one_at_a_time(), behind_each_other(self.tower, sections):
            together = torch.cat([packed for packed, _, _ in laid_out], dim=1)
            together = self.tower.transformer(together, attn_mask=sections[0][1])
        parts = together.split([length for length, _ in sections], dim=1)
        return [self._pool(part, mask, at) for part, (_, mask, at) in zip(parts, laid_out, strict=True)]

    def _lay_out(self, prompts: Prompts) -> tuple[Tensor, Tensor, Tensor]:
        """One sequence (1, P + K·S, W), its mask, and where in each suffix (K,) its feature is."""
        tower: Any = self.tower
        dtype = tower.transformer.get_cast_dtype()
        positions = tower.positional_embedding.to(dtype)
        start, num, length = len(prompts.prefix), *prompts.suffixes.shape[:2]
        prefix = prompts.prefix.to(dtype) + positions[:start]
        suffixes = prompts.suffixes.to(dtype) + positions[start : start + length]
        visible = torch.ones(length, length, dtype=torch.bool, device=prefix.device).tril()
        pooled_at = prompts.lengths - 1

        class_token = _class_token(tower)
        if class_token is not None:
            after = prompts.padding.to(dtype) + positions[min(start + length, self.context_length - 1)]
            last = class_token.to(dtype) + positions[self.context_length]
            suffixes = torch.cat([suffixes, torch.stack([after, last]).expand(num, 2, -1)], dim=1)
            visible = self._class_token_visibility(prompts)
            pooled_at = torch.full_like(prompts.lengths, length + 1)
        return pack(prefix, suffixes), packed_mask(visible, start, dtype), pooled_at

    def _pool(self, packed: Tensor, mask: Tensor, pooled_at: Tensor) -> Tensor:
        """Features (K, D) of what the transformer made of a packed sequence."""
        tower: Any = self.tower
        suffix, seen = mask.shape[-2:]
        each = unpack(packed, seen - suffix, suffix)
        pooled = tower.ln_final(each[torch.arange(len(each), device=packed.device), pooled_at])
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


def _can_be_packed(half: Any) -> bool:
    """Whether nothing would see that prompts are laid out in one sequence: no hooks, stock blocks, plain attentions."""
    blocks = half.transformer.resblocks
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in half.modules())
    stock = all(map(_is_stock, [half.transformer, *blocks]))
    return stock and not hooked and all(_is_plain(getattr(block, "attn", None)) for block in blocks)


def _is_stock(module: nn.Module) -> bool:
    """Whether a module of open_clip runs open_clip's code: of a whole model its `encode_text`, else all its methods."""
    kind = type(module)
    names = {name for base in kind.__mro__ if _is_from_open_clip(base) for name in vars(base) if name[:2] != "__"}
    if hasattr(kind, "encode_text"):
        names &= {"encode_text", "_encode_text"}
    code = [vars(module).get(name, getattr(kind, name)) for name in names]
    return bool(code) and all(_is_from_open_clip(part) for part in code if callable(part))


def _is_from_open_clip(code: Any) -> bool:
    return str(code.__module__).split(".")[0] == "open_clip"


def _is_plain(attention: Any) -> bool:
    """Whether an attention is torch's own without extras, which packing knows how to lay out."""
    return (
        type(attention) is nn.MultiheadAttention
        and "forward" not in vars(attention)
        and attention._qkv_same_embed_dim
        and attention.batch_first
        and attention.bias_k is None
        and not attention.add_zero_attn
        and not attention.dropout
    )


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
