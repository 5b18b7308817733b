"""Batches of several processes as one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


def gather_batch(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and labels of all processes, in the order of their ranks; batches may differ in size.

    Gradients flow into this process's own part.

    Args:
        logits: (B, K).
        labels: (B,).

    Returns:
        (ΣB, K) and (ΣB,).
    """
    sizes = [torch.zeros(1, dtype=torch.long, device=labels.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(labels)], device=labels.device))
    counts = [int(size) for size in sizes]
    missing = max(counts) - len(labels)
    all_logits = [logits.new_empty(max(counts), logits.shape[1]) for _ in counts]
    all_labels = [labels.new_empty(max(counts)) for _ in counts]
    dist.all_gather(all_logits, F.pad(logits.detach(), (0, 0, 0, missing)).contiguous())
    dist.all_gather(all_labels, F.pad(labels, (0, missing)).contiguous())
    parts = [part[:count] for part, count in zip(all_logits, counts, strict=True)]
    parts[dist.get_rank()] = logits
    return torch.cat(parts), torch.cat([part[:count] for part, count in zip(all_labels, counts, strict=True)])
