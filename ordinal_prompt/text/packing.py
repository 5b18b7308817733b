"""Many prompts in one sequence: exact, because a causal text encoder never looks ahead.

Prompts that share a prefix are laid out as `prefix, suffix 1, suffix 2, …`, each token with its *own* positional
embedding.  A suffix token attends to the prefix and to the earlier tokens of its own suffix, nothing else, so that the
prefix is computed once: P + K·S tokens instead of K·(P + S).

A mask over the whole sequence would do, but nearly all of it would be empty.  `SharedPrefixAttention` takes the place
of the attention in a copy of the text encoder, with the same weights, and attends within suffixes and to the prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class SharedPrefixAttention(nn.Module):
    """`nn.MultiheadAttention` on packed prompts.

    Equal to the attention it is made of under the mask that packing means; no dropout, as in a frozen text encoder.

    Args:
        attention: the attention whose weights are used; they stay its own.

    Attributes:
        sections: of several packed sequences behind each other, each with a prefix of its own, the lengths and the
            masks; None for a single one.  See `behind_each_other`.
    """

    sections: list[tuple[int, Tensor]] | None = None

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, query: Tensor, *_: Tensor, attn_mask: Tensor, **__: Any) -> tuple[Tensor, None]:
        """Attention of every token, called as the attention that it replaces.

        Args:
            query: (1, P + K·S, W) packed prompts; keys and values are the same.
            attn_mask: (S, P + S) additive mask of a suffix on prefix and suffix, or (K, S, P + S) one for each prompt;
                its shape says where the prefix ends.

        Returns:
            (1, P + K·S, W), and None in the place of attention weights.
        """
        own = self.attention
        projected = F.linear(query[0], own.in_proj_weight, own.in_proj_bias)
        sections = self.sections or [(len(projected), attn_mask)]
        parts = projected.split([length for length, _ in sections])
        merged = [self._attend(part, mask) for part, (_, mask) in zip(parts, sections, strict=True)]
        return F.linear(torch.cat(merged), own.out_proj.weight, own.out_proj.bias)[None], None

    def _attend(self, projected: Tensor, attn_mask: Tensor) -> Tensor:
        """What the tokens of one packed sequence gather from each other, (P + K·S, W), of their q, k and v."""
        own = self.attention
        length, seen = attn_mask.shape[-2:]
        prefix = seen - length
        sizes = [prefix, len(projected) - prefix]
        (shared_q, q), (shared_k, k), (shared_v, v) = (
            rearrange(part, "l (h d) -> h l d", h=own.num_heads).split(sizes, dim=1)
            for part in projected.chunk(3, dim=-1)
        )
        first = F.scaled_dot_product_attention(shared_q[None], shared_k[None], shared_v[None], is_causal=True)[0]

        q = q * own.head_dim**-0.5
        each_q, each_k, each_v = (rearrange(part, "h (k s) d -> h k s d", s=length) for part in (q, k, v))
        to_prefix = rearrange(q @ shared_k.mT, "h (k s) p -> h k s p", s=length)
        to_own = each_q @ each_k.mT + attn_mask[..., prefix:]
        precision = torch.promote_types(q.dtype, torch.float32)
        weights = torch.cat([to_prefix, to_own], dim=-1).softmax(dim=-1, dtype=precision).to(q.dtype)
        on_prefix, on_own = weights.split([prefix, length], dim=-1)
        from_prefix = rearrange(on_prefix, "h k s p -> h (k s) p") @ shared_v
        from_own = rearrange(on_own @ each_v, "h k s d -> h (k s) d")
        return rearrange(torch.cat([first, from_prefix + from_own], dim=1), "h l d -> l (h d)")


@contextmanager
def behind_each_other(module: nn.Module, sections: list[tuple[int, Tensor]]) -> Iterator[None]:
    """Attention within each of several packed sequences, given by their lengths and masks, for a while."""
    attentions = [part for part in module.modules() if isinstance(part, SharedPrefixAttention)]
    try:
        for attention in attentions:
            attention.sections = sections
        yield
    finally:
        for attention in attentions:
            attention.sections = None


def pack(prefix: Tensor, suffixes: Tensor) -> Tensor:
    """One sequence (1, P + K·S, W) of a prefix (P, W) and suffixes (K, S, W)."""
    return torch.cat([prefix, rearrange(suffixes, "k s w -> (k s) w")])[None]


def unpack(packed: Tensor, prefix: int, suffix: int) -> Tensor:
    """The suffixes (K, S, W) of a packed sequence (1, P + K·S, W)."""
    return rearrange(packed[0, prefix:], "(k s) w -> k s w", s=suffix)


def packed_mask(visible: Tensor, prefix: int, dtype: torch.dtype) -> Tensor:
    """The additive mask (…, S, P + S) of suffixes that see the prefix, and of themselves `visible` (…, S, S)."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
    return F.pad(mask, (prefix, 0))
