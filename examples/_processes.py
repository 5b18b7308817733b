"""Processes, seeds, and batches that depend on neither the number of processes nor an interruption."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from _errors import UserError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm


@dataclass(frozen=True)
class Processes:
    """This process among those that `torchrun` started (or the only one)."""

    rank: int
    count: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def say(self, *words: object) -> None:
        """Prints, once for all processes."""
        if self.main:
            tqdm.write(" ".join(map(str, words)))
            sys.stdout.flush()

    def share(self, value: Any) -> Any:
        """The main process's value."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def once(self, work: Callable[[], Any]) -> Any:
        """What `work` returns where the main process runs it; a `UserError` there is one on every process."""
        outcome: tuple[Any, str | None] = (None, None)
        if self.main:
            try:
                outcome = (work(), None)
            except UserError as error:
                outcome = (None, str(error))
        value, error_message = self.share(outcome)
        if error_message is not None:
            raise UserError(error_message)
        return value

    def collect(self, value: Any) -> list[Any]:
        """The values of all processes."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.count == 1:
            return tensor
        tensor = tensor.detach().clone()
        dist.all_reduce(tensor)
        return tensor / self.count


@contextlib.contextmanager
def started_processes(device: str, threads: int | None = None) -> Iterator[Processes]:
    """Joins the processes of `torchrun`, if it runs: nccl on GPUs, gloo elsewhere.

    Args:
        device: `auto`, `cpu`, `cuda`, or any other that torch knows.
        threads: of torch; None leaves them as they are.
    """
    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device}: torch knows no such device.") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; pass --device cpu.")
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(0, 1, place)
        return
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), count, place)
    finally:
        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """The states of all generators, in types that `torch.load(weights_only=True)` reads."""
    name, keys, position, has_gauss, gauss = cast(Any, np.random.get_state())
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Sets all generators to what `random_states` returned."""
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numbers, *rest = states["numpy"]
    np.random.set_state((name, np.array(numbers, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count() and states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


class GlobalBatches(Sampler[list[tuple[int, int]]]):
    """This process's part of each global batch, as (index, epoch) pairs.

    The global batches depend on seed and epoch only, not on the number of processes.  The samples are cut into
    near-equal batches of at most `batch_size`, so that there is no last batch of one or two.

    Args:
        num_samples: N.
        batch_size: of the global batch.
        seed: of the order; None keeps the samples in order.
        processes: who shares the batch.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int | None, processes: Processes) -> None:
        self.num_samples, self.batch_size, self.seed, self.processes = num_samples, batch_size, seed, processes
        self.epoch = 0

    def __len__(self) -> int:
        return math.ceil(self.num_samples / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.arange(self.num_samples)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
            order = torch.randperm(self.num_samples, generator=generator)
        for batch in order.tensor_split(len(self)):
            mine = batch.tensor_split(self.processes.count)[self.processes.rank]
            yield [(index, self.epoch) for index in mine.tolist()]


class Augmented(Dataset[Any]):
    """A dataset whose randomness depends on seed, epoch and index only: not on workers, processes, or a resumption."""

    def __init__(self, data: Any, seed: int) -> None:
        self.data, self.seed = data, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, epoch = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(self.seed, epoch, index))
            return self.data[index]


def mixed_seed(*numbers: int) -> int:
    """A seed for a combination of numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def training_batches(
    data: Any, batch_size: int, seed: int, processes: Processes, workers: int, collate: Callable[..., Any] | None = None
) -> DataLoader[Any]:
    """Shuffled batches; set the epoch on the loader's `batch_sampler`."""
    if len(data) < max(2, processes.count):
        raise UserError(f"{len(data)} training samples are too few for {processes.count} process(es).")
    if batch_size < 2 * processes.count:
        raise UserError(
            f"--batch-size {batch_size} is too small for {processes.count} process(es); it counts all of them."
        )
    batches = GlobalBatches(len(data), batch_size, seed, processes)
    return DataLoader(
        Augmented(data, seed),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        pin_memory=processes.device.type == "cuda",
    )


def evaluation_batches(
    data: Any, batch_size: int, processes: Processes, workers: int, collate: Callable[..., Any] | None = None
) -> DataLoader[Any]:
    """This process's contiguous part of the data, in order."""
    mine = torch.arange(len(data)).tensor_split(processes.count)[processes.rank].tolist()
    part = torch.utils.data.Subset(data, mine)
    return DataLoader(
        part,
        batch_size=max(1, batch_size // processes.count),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=processes.device.type == "cuda",
    )


def global_mean(mean: Tensor, count: int | Tensor) -> Tensor:
    """A mean over this process's `count` items, weighted so that the mean over processes is that over all items.

    The gradient follows: averaged over the processes, as DistributedDataParallel does, it is that of one process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return mean
    total = torch.as_tensor(count, dtype=torch.float64, device=mean.device).clone()
    own = total.clone()
    dist.all_reduce(total)
    return mean * (own * dist.get_world_size() / total).to(mean.dtype)


def to_device(inputs: Any, device: torch.device) -> Any:
    """Moves tensors, also inside dicts, lists and tuples."""
    if isinstance(inputs, Mapping):
        return {name: to_device(value, device) for name, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(to_device(value, device) for value in inputs)
    return inputs.to(device, non_blocking=True) if isinstance(inputs, Tensor) else inputs
