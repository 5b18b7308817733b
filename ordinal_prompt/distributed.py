"""Batches of several processes as one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def gather_batch(*parts: Tensor) -> list[Tensor]:
    """Batches (B, ...) of all processes, each (ΣB, ...), in the order of their ranks; they may differ in size.

    Gradients flow into this process's own part.
    """
    own = len(parts[0])
    sizes = [torch.zeros(1, dtype=torch.long, device=parts[0].device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([own], device=parts[0].device))
    counts = [int(size) for size in sizes]
    return [_gather(part, counts) for part in parts]


def _gather(part: Tensor, counts: list[int]) -> Tensor:
    padded = part.new_zeros(max(counts), *part.shape[1:])
    padded[: len(part)] = part.detach()
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    batches = [batch[:count] for batch, count in zip(gathered, counts, strict=True)]
    batches[dist.get_rank()] = part
    return torch.cat(batches)
