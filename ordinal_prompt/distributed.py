"""Several processes: their batches as one, and parameters that FSDP has sharded whole again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


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


def handed_out(*modules: nn.Module) -> bool:
    """Whether FSDP hands out the parameters for each forward pass: then nothing in them tells when they change."""
    return any(getattr(module, "_is_fsdp_managed_module", False) for module in modules)


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, gathered from all processes where they are sharded."""
    return {name: getattr(tensor, "full_tensor", lambda kept=tensor: kept)() for name, tensor in tensors.items()}


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Sharded parameters are whole for the time being; every process has to take part."""
    sharded = [
        (part, name, parameter)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None and hasattr(parameter, "full_tensor")  # a DTensor
    ]
    try:
        for part, name, parameter in sharded:
            part._parameters[name] = nn.Parameter(whole({"": parameter.detach()})[""], parameter.requires_grad)
        yield
    finally:
        for part, name, parameter in sharded:
            part._parameters[name] = parameter
