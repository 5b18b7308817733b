"""Many prompts in one sequence: exact, because a causal text encoder never looks ahead.

Prompts that share a prefix are laid out as `prefix, suffix 1, suffix 2, …`.  Every token carries its *own* positional
embedding, and an attention mask lets a suffix token see the prefix and the earlier tokens of its own suffix, nothing
else.  The transformer then computes P + K·S tokens instead of K·(P + S), without knowing.

The mask is quadratic in the sequence, so that for many prompts groups of them go in sequences of their own, side by
side in the batch.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange, repeat
from torch import Tensor


def group_size(num_prompts: int, prefix: int, suffix: int, width: int) -> int:
    """Prompts per sequence that make the text pass cheapest.

    A group of g costs its prefix once, P·24W² operations, and attention over P + g·S tokens, 4W·S·(P + g·S) for every
    prompt; the sum over all groups is least at g = √(2·P·W) / S.

    >>> group_size(num_prompts=101, prefix=11, suffix=3, width=512)
    34
    """
    best = max(1, round(math.sqrt(2 * prefix * width) / suffix))
    return math.ceil(num_prompts / math.ceil(num_prompts / best))  # groups of equal size


def pack(prefix: Tensor, suffixes: Tensor, group: int) -> Tensor:
    """Lays out prompts in sequences of `group` suffixes behind one prefix; the last suffix fills up the last group.

    Args:
        prefix: (P, W).
        suffixes: (K, S, W).
        group: suffixes per sequence, g.

    Returns:
        (⌈K/g⌉, P + g·S, W)
    """
    missing = -len(suffixes) % group
    if missing:
        suffixes = torch.cat([suffixes, suffixes[-1:].expand(missing, -1, -1)])
    packed = rearrange(suffixes, "(n g) s w -> n (g s) w", g=group)
    return torch.cat([repeat(prefix, "p w -> n p w", n=len(packed)), packed], dim=1)


def unpack(packed: Tensor, num_prompts: int, prefix: int, group: int) -> Tensor:
    """The suffixes (K, S, W) out of packed sequences (⌈K/g⌉, P + g·S, W)."""
    return rearrange(packed[:, prefix:], "n (g s) w -> (n g) s w", g=group)[:num_prompts]


def packed_visibility(visible: Tensor, prefix: int) -> Tensor:
    """Which token sees which in packed sequences.

    Args:
        visible: (n, g, S, S) bool, within each suffix: row sees column.
        prefix: tokens of the shared prefix, P; causal among themselves and seen by every suffix token.

    Returns:
        (n, P + g·S, P + g·S) bool.
    """
    n, group, suffix, _ = visible.shape
    length = prefix + group * suffix
    mask = torch.zeros(n, length, length, dtype=torch.bool, device=visible.device)
    mask[:, :, :prefix] = True
    mask[:, :prefix, :prefix] = torch.ones_like(mask[0, :prefix, :prefix]).tril()
    own = torch.zeros(n, group, suffix, group, suffix, dtype=torch.bool, device=visible.device)
    index = torch.arange(group, device=visible.device)
    own[:, index, :, index] = rearrange(visible, "n g i j -> g n i j")
    mask[:, prefix:, prefix:] = rearrange(own, "n g i h j -> n (g i) (h j)")
    return mask
