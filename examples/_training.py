"""What the fine-tuning scripts share: ranks and splits, deterministic batches, the loop, checkpoints, metrics, plots.

Everything here is generic over batches `(inputs, labels)`; labels are rank indices 0…K-1.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

import ordinal_prompt as op
from ordinal_prompt.losses import gather_batch
from ordinal_prompt.recipes import PROMPT_LR_SCALE

CHECKPOINT = "checkpoint.pt"
CHECKPOINT_FORMAT = 1
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
RULES = ("expectation", "argmax", "median")


class UserError(Exception):
    """A mistake in options or data, told in one sentence and without a traceback."""


@contextlib.contextmanager
def clean_errors(script: str) -> Iterator[None]:
    """Ends the script with a one-line message on a `UserError`, and says how to go on after an interrupt."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"{script}: error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"{script}: interrupted; the same command goes on after the last complete epoch") from None


@contextlib.contextmanager
def needs_network(what: str, way_out: str) -> Iterator[None]:
    """Turns the many errors of a hub that cannot be reached into one sentence."""
    try:
        yield
    except Exception as error:
        if not _is_offline(error):
            raise
        raise UserError(f"could not download {what}: no hub can be reached; {way_out}.") from error


def _is_offline(error: BaseException | None) -> bool:
    kinds = {
        "ConnectError",
        "ConnectTimeout",
        "LocalEntryNotFoundError",
        "MaxRetryError",
        "OfflineModeIsEnabled",
        "URLError",
    }
    while error is not None:
        if isinstance(error, ConnectionError) or {kind.__name__ for kind in type(error).__mro__} & kinds:
            return True
        error = error.__cause__ or error.__context__
    return False


# ------------------------------------------------------------------------------------------------ ranks and splits


@dataclass(frozen=True)
class Ranks:
    """The K ranks: their values, strictly increasing, and their names, if they have any."""

    values: tuple[int, ...]
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.values) < 2:
            raise UserError(f"at least 2 ranks are needed, but there is {len(self.values)}.")
        if self.names is not None and len(self.names) != len(self.values):
            raise UserError(f"{len(self.names)} rank names were given for {len(self.values)} ranks; give one for each.")

    def __len__(self) -> int:
        return len(self.values)

    def __str__(self) -> str:
        described = f"{len(self)} ranks, {self.values[0]} … {self.values[-1]}"
        return described if self.names is None else f"{described} ({self.names[0]} … {self.names[-1]})"


def parse_ranks(text: str) -> tuple[int, ...]:
    """Rank values from `K` (0…K-1), `FIRST-LAST`, or a comma list."""
    text = text.strip()
    if match := re.fullmatch(r"(-?\d+)-(-?\d+)", text):
        values = tuple(range(int(match[1]), int(match[2]) + 1))
    elif re.fullmatch(r"\d+", text):
        values = tuple(range(int(text)))
    elif re.fullmatch(r"-?\d+(\s*,\s*-?\d+)+", text):
        values = tuple(int(part) for part in text.split(","))
    else:
        raise UserError(f"--ranks takes a number (101), a range (16-77) or a list (1,2,5), but got {text!r}.")
    if any(after <= before for before, after in itertools.pairwise(values)):
        raise UserError(f"--ranks must be strictly increasing, but got {text!r}.")
    return values


def parse_names(text: str) -> tuple[str, ...]:
    """Rank names from a comma list, or from a file with one name a line."""
    path = Path(text)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else text.split(",")
    names = tuple(line.strip() for line in lines if line.strip())
    if len(set(names)) != len(names):
        raise UserError("--rank-names must be distinct.")
    return names


@dataclass(frozen=True)
class Row:
    """One sample: what to load (a path, a text), its label as written, and where that was."""

    content: str
    label: str
    split: str | None
    group: str | None
    where: str


def read_table(
    path: Path, content: str, label: str, split: str = "split", group: str | None = None, delimiter: str = ","
) -> list[Row]:
    """Rows of a CSV file with a header; the split column counts where there is one.

    Args:
        content, label, split, group: names of the columns.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            records = [(reader.line_num, record) for record in reader]
            columns = list(reader.fieldnames or [])
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise UserError(f"{path} cannot be read as CSV: {error}.") from error
    for column in filter(None, (content, label, group)):
        if column not in columns:
            raise UserError(f"{path} has no column {column!r}; it has {', '.join(map(repr, columns)) or 'none'}.")
    if not records:
        raise UserError(f"{path} holds no rows.")
    rows = []
    for line, record in records:
        where = f"{path}, line {line}"
        if not (record[content] or "").strip() or record[label] is None:
            raise UserError(f"{where}: {content} or label is missing.")
        named = (record.get(split) or "").strip().lower() or None
        if named is not None and named not in SPLITS:
            raise UserError(f"{where}: unknown split {named!r}; known are train, val and test.")
        rows.append(
            Row(
                record[content],
                record[label].strip(),
                SPLITS[named] if named else None,
                record[group] if group else None,
                where,
            )
        )
    return rows


def rank_labels(rows: Sequence[Row], ranks: Ranks | None) -> tuple[Ranks, Tensor]:
    """The ranks (by default all integers from the smallest label to the largest), and each row's rank index."""
    named = {name: index for index, name in enumerate(ranks.names or ())} if ranks else {}
    numbers: list[int | None] = []
    for row in rows:
        try:
            number = float(row.label)
            if not number.is_integer():
                raise ValueError
            numbers.append(int(number))
        except (ValueError, OverflowError):
            if row.label not in named:
                hint = (
                    f"one of the rank names {', '.join(list(named)[:5])} …" if named else "give --rank-names for names"
                )
                raise UserError(f"{row.where}: label {row.label!r} is not an integer; {hint}.") from None
            numbers.append(None)
    if ranks is None:
        known = [number for number in numbers if number is not None]
        ranks = Ranks(tuple(range(min(known), max(known) + 1)))
    index = {value: i for i, value in enumerate(ranks.values)}
    outside = [i for i, number in enumerate(numbers) if number is not None and number not in index]
    if outside:
        first = rows[outside[0]]
        raise UserError(
            f"{first.where}: label {first.label} is outside the {ranks} ({len(outside)} such rows); set --ranks, or "
            "correct the labels."
        )
    labels = [named[row.label] if number is None else index[number] for row, number in zip(rows, numbers, strict=True)]
    return ranks, torch.tensor(labels)


def split_rows(
    rows: Sequence[Row], labels: Tensor, val_fraction: float, test_fraction: float, seed: int
) -> dict[str, Tensor]:
    """Indices of train, val and test: as the rows say, else drawn at random, stratified, and groups kept together.

    Rows without a split are training rows.  What the rows leave without samples is drawn from the training rows.
    """
    said = [row.split or "train" for row in rows]
    parts = {
        name: torch.tensor([i for i, split in enumerate(said) if split == name], dtype=torch.long)
        for name in ("train", "val", "test")
    }
    generator = torch.Generator().manual_seed(seed)
    for name, fraction in (("test", test_fraction), ("val", val_fraction)):
        train = parts["train"]
        if len(parts[name]) or fraction == 0:
            continue
        drawn = _draw(train, labels, [rows[i].group for i in train.tolist()], fraction, generator)
        parts[name], parts["train"] = train[drawn], train[~drawn]
    for name, option in (("train", ""), ("val", "; raise --val-fraction"), ("test", "; raise --test-fraction")):
        if len(parts[name]) == 0 and not (name == "val" and val_fraction == 0):
            raise UserError(f"the {name} part of the {len(rows)} samples is empty{option}.")
    return parts


def _draw(
    indices: Tensor, labels: Tensor, groups: Sequence[str | None], fraction: float, generator: torch.Generator
) -> Tensor:
    """A mask of a share of the indices: evenly along the sorted labels, or whole groups."""
    order = torch.randperm(len(indices), generator=generator)
    if any(group is not None for group in groups):
        chosen: set[str | None] = set()
        taken = 0
        for group in dict.fromkeys(groups[i] for i in order.tolist()):
            if taken >= fraction * len(indices):
                break
            chosen.add(group)
            taken += groups.count(group)
        return torch.tensor([group in chosen for group in groups])
    order = order[labels[indices[order]].argsort(stable=True)]
    steps = ((torch.arange(len(order) + 1) + 0.5) * fraction).floor()
    mask = torch.zeros(len(indices), dtype=torch.bool)
    mask[order[steps.diff() > 0]] = True
    return mask


def training_subset(train: Tensor, labels: Tensor, shots: int | None, shift: str | None, seed: int) -> Tensor:
    """The training indices that few-shot learning (`shots` per rank) or a label shift (`RANKS:KEEP`) leaves."""
    generator = torch.Generator().manual_seed(seed)
    try:
        if shift is not None:
            match = re.fullmatch(r"(\d+):([\d.]+)", shift)
            if match is None:
                raise UserError(f"--shift takes RANKS:KEEP, as 20:0.1, but got {shift!r}.")
            kept = op.protocols.label_shift_indices(labels[train], int(match[1]), float(match[2]), generator)
            train = train[kept]
        if shots is not None:
            train = train[op.protocols.few_shot_indices(labels[train], shots, generator)]
    except ValueError as error:
        raise UserError(f"--shots or --shift: {error}") from error
    return train


def check_ranks_present(ranks: Ranks, labels: Tensor, allow: bool) -> list[int]:
    """Values of the ranks that no training sample has; refused unless allowed."""
    counts = torch.bincount(labels, minlength=len(ranks))
    empty = [value for value, count in zip(ranks.values, counts.tolist(), strict=True) if count == 0]
    if empty and not allow:
        listed = ", ".join(map(str, empty[:8])) + (", …" if len(empty) > 8 else "")
        raise UserError(
            f"{len(empty)} of the {len(ranks)} ranks have no training sample ({listed}); correct --ranks, or pass "
            "--empty-ranks allow."
        )
    return empty


# ----------------------------------------------------------------------------------- processes, seeds, and batches


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
def started_processes(device: str) -> Iterator[Processes]:
    """Joins the processes of `torchrun`, if it runs: nccl on GPUs, gloo elsewhere.

    Args:
        device: `auto`, `cpu`, `cuda`, or any other that torch knows.
    """
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
            generator = torch.Generator().manual_seed(_mixed(self.seed, self.epoch))
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
            torch.manual_seed(_mixed(self.seed, epoch, index))
            return self.data[index]


def _mixed(*numbers: int) -> int:
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


# ------------------------------------------------------------------------------------------------------ files


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place once it is whole and on the disk; until then `path` stays as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the rename itself; folders cannot be synced everywhere
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_atomically(value: Any, path: Path) -> None:
    """`torch.save`, at once."""
    with replacing(path) as part:
        torch.save(value, part)


def write_text(text: str, path: Path) -> None:
    """Writes a text file, at once."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def read_checkpoint(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The run's checkpoint, or None where there is none yet.

    Raises:
        UserError: a damaged file, or one of a run with other settings.
    """
    for part in folder.glob(".*.part"):  # of a run that was killed while it wrote
        part.unlink(missing_ok=True)
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        written_as = checkpoint["format"]
    except Exception as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}); pass --fresh to start again.") from error
    if written_as != CHECKPOINT_FORMAT:
        raise UserError(f"{path} was written by another version of this script; pass --fresh to start again.")
    before = checkpoint["settings"]
    changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if changed:
        listed = ", ".join(f"{name} {before.get(name)!r}, now {settings.get(name)!r}" for name in changed[:4])
        raise UserError(
            f"{folder} holds a run with other options ({listed}); choose another --output, or pass --fresh."
        )
    return checkpoint


# ------------------------------------------------------------------------------------------------------ the loop


@dataclass(frozen=True)
class TrainOptions:
    """How to train; see `add_training_arguments` for what each means."""

    epochs: int = 30
    batch_size: int = 32
    optimizer: str = "radam"
    lr: float = 1e-3
    backbone_lr: float | None = None
    prompt_lr: float | None = None
    weight_decay: float = 5e-4
    warmup: float = 0.0
    max_grad_norm: float = 0.0
    patience: int = 0
    rule: str = "expectation"
    amp: str = "auto"
    workers: int = 0
    log_steps: bool = False

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> TrainOptions:
        options = cls(**{name: getattr(args, name) for name in cls.__dataclass_fields__})
        if args.recipe and options.prompt_lr is None:
            options = replace(options, prompt_lr=PROMPT_LR_SCALE * options.lr)
        return options


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `TrainOptions`, and of the run: device, seeds, output."""
    default = TrainOptions()
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=_count, default=default.epochs, help="default %(default)s")
    group.add_argument(
        "--batch-size", type=_count, default=default.batch_size, help="of all processes together; default %(default)s"
    )
    group.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default=default.optimizer,
        help="all with decoupled weight decay, but sgd; default %(default)s",
    )
    group.add_argument("--lr", type=_rate, default=default.lr, help="learning rate of the head; default %(default)s")
    group.add_argument("--backbone-lr", type=_rate, help="learning rate of the backbone; default --lr")
    group.add_argument(
        "--prompt-lr",
        type=_rate,
        help="learning rate of context and rank embeddings; default --lr, with --recipe a twentieth of it",
    )
    group.add_argument("--weight-decay", type=_rate, default=default.weight_decay, help="default %(default)s")
    group.add_argument(
        "--warmup",
        type=_rate,
        default=default.warmup,
        metavar="EPOCHS",
        help="epochs of linear warm-up before the cosine; default %(default)s",
    )
    group.add_argument(
        "--max-grad-norm", type=_rate, default=default.max_grad_norm, help="clip gradients; default 0, off"
    )
    group.add_argument(
        "--patience",
        type=int,
        default=default.patience,
        help="stop after so many epochs without a better validation MAE; default 0, off. The best epoch "
        "is what is tested, either way",
    )
    group.add_argument(
        "--rule",
        choices=RULES,
        default=default.rule,
        help="prediction whose validation MAE selects the epoch; default %(default)s",
    )
    group.add_argument(
        "--amp",
        choices=["auto", "off", "bf16", "fp16"],
        default=default.amp,
        help="mixed precision; auto: on GPUs that can, bf16 before fp16",
    )
    group = parser.add_argument_group("run")
    group.add_argument("--seeds", type=int, nargs="+", default=[1], help="one run for each; default 1")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, …; default %(default)s")
    group.add_argument("--workers", type=int, default=default.workers, help="loader processes; default %(default)s")
    group.add_argument("--threads", type=_count, help="torch threads; default torch's own")
    group.add_argument("--log-steps", action="store_true", help="put the loss of every step into the log")
    group.add_argument("--fresh", action="store_true", help="start again where an unfinished run could be resumed")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but got {text}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not (0 <= value < math.inf):
        raise argparse.ArgumentTypeError(f"must be finite and not negative, but got {text}")
    return value


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "radam": lambda groups, **options: torch.optim.RAdam(groups, decoupled_weight_decay=True, **options),
    "adamw": torch.optim.AdamW,
    "sgd": lambda groups, **options: torch.optim.SGD(groups, momentum=0.9, nesterov=True, **options),
}


def parameter_groups(model: nn.Module, options: TrainOptions) -> list[dict[str, Any]]:
    """Backbone, head and prompts of a model with `backbone` and `head`, each with its learning rate."""
    prompt = getattr(model.head, "prompt", None)
    prompts = [p for p in prompt.parameters() if p.requires_grad] if isinstance(prompt, nn.Module) else []
    of_prompt = {id(p) for p in prompts}
    backbone = [p for p in model.backbone.parameters() if p.requires_grad]  # type: ignore[union-attr]
    head = [p for p in model.head.parameters() if p.requires_grad and id(p) not in of_prompt]  # type: ignore[union-attr]

    def rate(own: float | None) -> float:
        return options.lr if own is None else own

    groups = [
        {"name": "backbone", "params": backbone, "lr": rate(options.backbone_lr)},
        {"name": "head", "params": head, "lr": options.lr},
        {"name": "prompt", "params": prompts, "lr": rate(options.prompt_lr)},
    ]
    return [group for group in groups if group["params"]]


def precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision, or None."""
    if amp == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


@dataclass
class Fitted:
    """What training left: the log, one record an epoch, and the epoch whose weights the model now holds."""

    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0


def fit(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], dict[str, Tensor]],
    logits: Callable[[Tensor], Tensor],
    train: DataLoader[Any],
    val: DataLoader[Any] | None,
    values: Sequence[float],
    options: TrainOptions,
    processes: Processes,
    folder: Path,
    settings: Mapping[str, Any],
    freeze_backbone: bool = False,
) -> Fitted:
    """Trains `model.backbone` and `model.head`, and leaves the best weights in the model.

    After every epoch the whole state is written to `folder` at once, and the log with it; a run that was killed goes on
    behind its last complete epoch.

    Args:
        model: inputs to outputs, on its device.
        loss: outputs and labels to named terms; their sum is the loss, averaged over processes that of the batch.
        logits: outputs to logits over the ranks (B, K).
        values: the ranks' values, in whose units errors are measured.
        settings: what must not change between a run and its resumption.
        freeze_backbone: keep the backbone as it is, and in eval mode.
    """
    device = processes.device
    model.backbone.requires_grad_(not freeze_backbone)  # type: ignore[union-attr]
    optimizer = OPTIMIZERS[options.optimizer](parameter_groups(model, options), weight_decay=options.weight_decay)
    total, warm = options.epochs * len(train), options.warmup * len(train)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1.0, total - warm))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    amp = precision(options.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16 and device.type == "cuda")
    history: list[dict[str, Any]] = []
    best: dict[str, Any] = {"epoch": 0, "score": math.inf, "model": None}
    finished = False
    checkpoint = processes.once(lambda: read_checkpoint(folder, settings))
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        schedule.load_state_dict(checkpoint["schedule"])
        scaler.load_state_dict(checkpoint["scaler"])
        history, best, finished = checkpoint["history"], checkpoint["best"], checkpoint["finished"]
        processes.say(f"{folder}: going on behind epoch {len(history)} of {options.epochs}")
        if len(checkpoint["random"]) == processes.count:
            restore_random_states(checkpoint["random"][processes.rank])
        else:
            seed_everything(_mixed(len(history), processes.rank))
        del checkpoint

    run: nn.Module = model
    if processes.count > 1 and not finished:
        if device.type == "cuda":
            run = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        run = nn.parallel.DistributedDataParallel(run, [device.index] if device.type == "cuda" else None)
    board = _tensorboard(folder) if processes.main and not finished else None
    trainable = [p for group in optimizer.param_groups for p in group["params"]]

    while len(history) < options.epochs and not finished:
        epoch = len(history) + 1
        started = time.perf_counter()
        train.batch_sampler.epoch = epoch  # type: ignore[union-attr]
        run.train()
        if freeze_backbone:
            model.backbone.eval()  # type: ignore[union-attr]
        steps: list[dict[str, Tensor]] = []
        bar = tqdm(train, desc=f"epoch {epoch}/{options.epochs}", leave=False, disable=None if processes.main else True)
        for inputs, labels in bar:
            inputs, labels = to_device(inputs, device), labels.to(device)
            with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                terms = loss(run(inputs), labels)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(torch.stack([*terms.values()]).sum()).backward()
            if options.max_grad_norm:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(trainable, options.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            steps.append({name: term.detach().float() for name, term in terms.items()})
            if not bar.disable:
                bar.set_postfix({name: f"{float(term):.3f}" for name, term in steps[-1].items()})
        table = processes.mean(torch.stack([torch.stack([*step.values()]) for step in steps])).cpu()
        record: dict[str, Any] = {"epoch": epoch, "loss": float(table.sum(dim=1).mean())}
        record |= {name: float(column.mean()) for name, column in zip(steps[0], table.T, strict=True)}
        if options.log_steps:
            record["step_losses"] = table.sum(dim=1).tolist()
        if not math.isfinite(record["loss"]):
            raise UserError(f"the loss is not finite in epoch {epoch}; lower --lr, or pass --amp off.")
        record |= {f"lr_{group['name']}": group["lr"] for group in optimizer.param_groups}
        score = -float(epoch)  # without validation the last epoch is the best
        if val is not None:
            found, truth = predict(model, logits, val, processes, amp)
            measured = ordinal_metrics(found, truth, values)
            score = measured[f"mae_{options.rule}"]
            record |= {f"val_{name}": value for name, value in measured.items()}
        if score < best["score"]:
            weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
            best = {"epoch": epoch, "score": score, "model": weights}
        record |= {"best_epoch": best["epoch"], "seconds": round(time.perf_counter() - started, 2)}
        history.append(record)
        finished = epoch == options.epochs or 0 < options.patience <= epoch - best["epoch"]
        states = processes.collect(random_states())
        if processes.main:
            save_atomically(
                {
                    "format": CHECKPOINT_FORMAT,
                    "settings": dict(settings),
                    "finished": finished,
                    "history": history,
                    "best": best,
                    "random": states,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "scaler": scaler.state_dict(),
                },
                folder / CHECKPOINT,
            )
            _log(history, folder, board)
        shown = f"val MAE {score:.3f}, best {best['score']:.3f} in epoch {best['epoch']}, " if val is not None else ""
        processes.say(f"epoch {epoch}/{options.epochs}: loss {record['loss']:.4f}, {shown}{record['seconds']:.1f} s")
    if board is not None:
        board.close()
    if processes.main:
        _log(history, folder, None)
    model.load_state_dict(best["model"])
    return Fitted(history, best["epoch"])


@torch.no_grad()
def predict(
    model: nn.Module,
    logits: Callable[[Tensor], Tensor],
    batches: DataLoader[Any],
    processes: Processes,
    amp: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits over the ranks (N, K) and labels (N,) of all samples, in their order, on every process."""
    model.eval()
    device = processes.device
    found, truth = [], []
    for inputs, labels in tqdm(batches, desc="evaluate", leave=False, disable=None if processes.main else True):
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            outputs = model(to_device(inputs, device))
        found.append(logits(outputs.float()))
        truth.append(labels.to(device))
    if processes.count == 1:
        return torch.cat(found).cpu(), torch.cat(truth).cpu()
    width = max(processes.collect(found[0].shape[1] if found else 0))
    mine = torch.cat(found) if found else torch.zeros(0, width, device=device)
    labels = torch.cat(truth) if truth else torch.zeros(0, dtype=torch.long, device=device)
    all_logits, all_labels = gather_batch(mine, labels)
    return all_logits.cpu(), all_labels.cpu()


def _log(history: Sequence[Mapping[str, Any]], folder: Path, board: Any) -> None:
    """The whole log anew, so that it always agrees with the checkpoint: JSON lines, and CSV without step losses."""
    write_text("".join(json.dumps(record) + "\n" for record in history), folder / "log.jsonl")
    columns = [name for name in history[0] if name != "step_losses"] if history else []
    lines = [",".join(columns), *(",".join(str(record.get(name, "")) for name in columns) for record in history)]
    write_text("\n".join(lines) + "\n", folder / "log.csv")
    if board is not None:
        for name in columns:
            board.add_scalar(name, history[-1][name], history[-1]["epoch"])
        board.flush()


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


# ------------------------------------------------------------------------------------------------ what is reported


def confusion_matrix(truth: Tensor, predicted: Tensor, num_ranks: int) -> Tensor:
    """Counts (K, K): rows are true ranks, columns predicted ones."""
    return torch.bincount(truth * num_ranks + predicted, minlength=num_ranks**2).reshape(num_ranks, num_ranks)


def quadratic_kappa(confusion: Tensor) -> float:
    """Cohen's kappa with quadratic weights of a confusion matrix (K, K); NaN where both sides are constant."""
    counts = confusion.double()
    rank = torch.arange(len(counts), dtype=torch.float64)
    weight = (rank[:, None] - rank[None, :]) ** 2
    expected = counts.sum(1)[:, None] * counts.sum(0)[None, :] / counts.sum()
    return float(1 - (weight * counts).sum() / (weight * expected).sum())


def ordinal_metrics(logits: Tensor, labels: Tensor, values: Sequence[float]) -> dict[str, float]:
    """Errors of logits (N, K), in the units of the ranks' values.

    MAE of each rule of `op.decode`; accuracy and quadratically weighted kappa of the argmax; and the macro MAE, which
    is the mean over the ranks present of the expectation's MAE, so that rare ranks count as much as frequent ones.
    """
    of_rank = torch.tensor(values, dtype=torch.float64)
    truth = of_rank[labels]
    errors = {rule: (op.decode(logits.double(), rule, of_rank) - truth).abs() for rule in RULES}
    best = logits.argmax(dim=1)
    present = labels.unique()
    return {
        **{f"mae_{rule}": float(error.mean()) for rule, error in errors.items()},
        "macro_mae": float(torch.stack([errors["expectation"][labels == rank].mean() for rank in present]).mean()),
        "accuracy": float((best == labels).double().mean()),
        "quadratic_kappa": quadratic_kappa(confusion_matrix(labels, best, len(values))),
    }


def ordinality_beside_chance(prototypes: Tensor, draws: int = 50) -> dict[str, float]:
    """Ordinality of prototypes (K, D), and of random ones of the same shape: mean and standard deviation."""
    generator = torch.Generator().manual_seed(0)
    chance = torch.tensor([op.ordinality(torch.randn(prototypes.shape, generator=generator)) for _ in range(draws)])
    return {
        "ordinality": op.ordinality(prototypes.cpu()),
        "ordinality_chance": float(chance.mean()),
        "ordinality_chance_sd": float(chance.std()),
    }


def plot_confusion(confusion: Tensor, ranks: Ranks, path: Path) -> None:
    """True against predicted ranks, each row as shares."""
    shares = confusion / confusion.sum(dim=1, keepdim=True).clamp_min(1)
    _plot_matrix(shares, ranks, path, "predicted rank", "true rank", "share of the true rank's samples", low=0)


def plot_similarity(prototypes: Tensor, ranks: Ranks, path: Path) -> None:
    """Cosine similarities of the prototypes."""
    unit = nn.functional.normalize(prototypes.cpu().float(), dim=1)
    _plot_matrix(unit @ unit.T, ranks, path, "rank", "rank", "cosine of the prototypes", low=None)


def _plot_matrix(
    matrix: Tensor, ranks: Ranks, path: Path, across: str, down: str, meaning: str, low: float | None
) -> None:
    from matplotlib.figure import Figure  # without pyplot: neither a display nor global state

    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(matrix.numpy(), vmin=low, cmap="viridis", interpolation="nearest")
    shown = sorted({round(i) for i in np.linspace(0, len(ranks) - 1, min(len(ranks), 11))})
    texts = [ranks.names[i] if ranks.names else str(ranks.values[i]) for i in shown]
    axes.set_xticks(shown, texts, rotation=45 if ranks.names else 0)
    axes.set_yticks(shown, texts)
    axes.set_xlabel(across)
    axes.set_ylabel(down)
    figure.colorbar(image, label=meaning)
    _save_figure(figure, path)


def plot_history(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss and validation MAE over the epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    epochs = [record["epoch"] for record in history]
    for position, (name, title) in enumerate((("loss", "training loss"), ("val_mae_expectation", "validation MAE"))):
        axes = figure.add_subplot(1, 2, position + 1)
        axes.plot(epochs, [record.get(name, math.nan) for record in history])
        axes.set_xlabel("epoch")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
    _save_figure(figure, path)


def _save_figure(figure: Any, path: Path) -> None:
    with replacing(path) as part:
        figure.savefig(part, dpi=130, format="png")


def write_predictions(rows: Sequence[Row], logits: Tensor, labels: Tensor, values: Sequence[float], path: Path) -> None:
    """Every test sample with its true value and the prediction of each rule, as CSV."""
    predictions = [
        op.decode(logits.double(), rule, torch.tensor(values, dtype=torch.float64)).tolist() for rule in RULES
    ]
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sample", "value", *RULES])
        for row, label, *predicted in zip(rows, labels.tolist(), *predictions, strict=True):
            writer.writerow([row.content, values[label], *(f"{value:.6g}" for value in predicted)])


def results_table(results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A Markdown table of results by head, one result for each seed: mean ± standard deviation."""
    columns = {
        "mae_expectation": "MAE",
        "mae_argmax": "MAE argmax",
        "mae_median": "MAE median",
        "macro_mae": "macro MAE",
        "accuracy": "accuracy",
        "quadratic_kappa": "kappa",
        "ordinality": "ordinality",
        "ordinality_chance": "by chance",
    }
    lines = ["| head | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for head, runs in results.items():
        cells = []
        for name in columns:
            found = [run[name] for run in runs if name in run]
            cell = f"{np.mean(found):.3f}" if found else "–"
            cells.append(cell + (f" ± {np.std(found, ddof=1):.3f}" if len(found) > 1 else ""))
        lines.append(f"| {head} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
