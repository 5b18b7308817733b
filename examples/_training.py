"""Training: its options, the loop, and the checkpoints that a killed run goes on from.

Everything here is generic over batches `(inputs, labels)`; labels are rank indices 0…K-1.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _errors import UserError
from _files import save_atomically, write_text
from _heads import Head
from _options import add_choice, add_field, count, rate, whole
from _processes import (
    Processes,
    mixed_seed,
    random_states,
    restore_random_states,
    seed_everything,
    to_device,
)
from _reports import RULES, ordinal_metrics
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import ordinal_prompt as op
from ordinal_prompt.losses import gather_batch

CHECKPOINT = "checkpoint.pt"
CHECKPOINT_FORMAT = 1


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


def load_states(parts: Mapping[str, Any], checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Gives model, optimizer, schedule and scaler their states back.

    Raises:
        UserError: states of another model.
    """
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{folder / CHECKPOINT} does not fit the model; another version may have written it. Pass --fresh to start "
            "again, or choose another --output."
        ) from error


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
    recipe: bool = False

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> TrainOptions:
        if args.recipe and args.optimizer == "sgd":
            raise UserError("--recipe learns its scales at ten times --lr, which diverges with sgd; choose another.")
        return cls(**{name: getattr(args, name) for name in cls.__dataclass_fields__})


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `TrainOptions`, and of the run: device, seeds, output."""
    default = TrainOptions()
    group = parser.add_argument_group("training")
    add = partial(add_field, group, default)
    add("--epochs", count, "N", "passes over the training samples; default %(default)s")
    add("--batch-size", count, "N", "samples in a step, of all processes together; default %(default)s")
    add_choice(group, "--optimizer", [*OPTIMIZERS], "all but sgd with decoupled weight decay")
    add("--lr", rate, "RATE", "learning rate of the head; default %(default)s")
    add("--backbone-lr", rate, "RATE", "learning rate of the backbone; default that of the head")
    add(
        "--prompt-lr", rate, "RATE", "learning rate of the prompts; default the head's, with --recipe a twentieth of it"
    )
    add("--weight-decay", rate, "RATE", "default %(default)s")
    add("--warmup", rate, "EPOCHS", "let learning rates rise for so long, before they fall along a cosine; default 0")
    add("--max-grad-norm", rate, "NORM", "clip gradients to this norm; default 0, off")
    add("--patience", whole, "EPOCHS", "stop after so many without a better validation MAE; default 0, off")
    add_choice(
        group, "--rule", RULES, "how logits become the prediction whose validation MAE selects the epoch to test"
    )
    told = "mixed precision; auto: on GPUs, bf16 where they can, else fp16"
    add_choice(group, "--amp", ["auto", "off", "bf16", "fp16"], told)
    group = parser.add_argument_group("run")
    group.add_argument("--seeds", type=int, nargs="+", metavar="SEED", default=[1], help="one run for each; default 1")
    group.add_argument("--device", default="auto", help="cpu, cuda, …; default auto: cuda where there is a GPU")
    add_field(group, default, "--workers", whole, "N", "processes that load data; default 0, the main process")
    group.add_argument("--threads", type=count, metavar="N", help="of torch; default its own choice")
    group.add_argument("--log-steps", action="store_true", help="put the loss of every step into the log")
    group.add_argument("--fresh", action="store_true", help="start again in the place of going on with an earlier run")


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "radam": lambda groups, **options: torch.optim.RAdam(groups, decoupled_weight_decay=True, **options),
    "adamw": torch.optim.AdamW,
    "sgd": lambda groups, **options: torch.optim.SGD(groups, momentum=0.9, nesterov=True, **options),
}


def parameter_groups(model: nn.Module, options: TrainOptions) -> list[dict[str, Any]]:
    """Backbone, head and prompts of a model with `backbone` and `head`, each with its learning rate.

    With the recipe the library groups the parameters of a prompt head.
    """
    head: Any = model.head
    prompts = {id(p) for p in head.prompt.parameters()} if isinstance(head, op.OrdinalPromptHead) else set()
    backbone = [p for p in model.backbone.parameters() if p.requires_grad]  # type: ignore[union-attr]
    groups: list[dict[str, Any]] = [{"name": "backbone", "params": backbone, "lr": options.lr}]
    if options.backbone_lr is not None:
        groups[0]["lr"] = options.backbone_lr
    if options.recipe and prompts:
        groups += [
            {"name": "scales" if "weight_decay" in g else "head", **g} for g in op.parameter_groups(head, options.lr)
        ]
    else:
        for name, inside in (("head", False), ("prompt", True)):
            parameters = [p for p in head.parameters() if p.requires_grad and (id(p) in prompts) == inside]
            groups.append({"name": name, "params": parameters, "lr": options.lr})
    groups = [group for group in groups if group["params"]]
    for group in groups:
        if id(group["params"][0]) in prompts:
            group["name"] = "prompt"
            group["lr"] = group["lr"] if options.prompt_lr is None else options.prompt_lr
    return groups


def precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision, or None."""
    if amp == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def fit(
    model: nn.Module,
    head: Head,
    train: DataLoader[Any],
    val: DataLoader[Any] | None,
    values: Sequence[float],
    options: TrainOptions,
    processes: Processes,
    folder: Path,
    settings: Mapping[str, Any],
    freeze_backbone: bool = False,
) -> list[dict[str, Any]]:
    """Trains `model.backbone` and `model.head`, leaves the best weights in the model, returns a record of each epoch.

    The settings are written to `folder`, and after every epoch the whole state at once, and the log; a run that was
    killed goes on behind its last complete epoch.

    Args:
        model: inputs to outputs, on its device.
        head: with the loss, which averaged over the processes is that of the batch.
        values: the ranks' values, in whose units errors are measured.
        settings: what must not change between a run and its resumption.
        freeze_backbone: keep the backbone as it is, and in eval mode.
    """
    device = processes.device
    model.backbone.requires_grad_(not freeze_backbone)  # type: ignore[union-attr]
    optimizer = OPTIMIZERS[options.optimizer](parameter_groups(model, options), weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_with_warmup(options, len(train)))
    amp = precision(options.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16 and device.type == "cuda")
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    history: list[dict[str, Any]] = []
    best: dict[str, Any] = {"epoch": 0, "score": math.inf, "model": None}
    finished = False
    checkpoint = processes.once(lambda: read_checkpoint(folder, settings))
    if checkpoint is not None:
        load_states(parts, checkpoint, folder)
        history, best, finished = checkpoint["history"], checkpoint["best"], checkpoint["finished"]
        processes.say(f"{folder}: going on behind epoch {len(history)} of {options.epochs}")
        if len(checkpoint["random"]) == processes.count:
            restore_random_states(checkpoint["random"][processes.rank])
        else:
            seed_everything(mixed_seed(len(history), processes.rank))
        del checkpoint
    if processes.main:
        write_text(json.dumps(settings, indent=2) + "\n", folder / "config.json")

    run: nn.Module = model
    if processes.count > 1 and not finished:
        if device.type == "cuda":
            run = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        run = nn.parallel.DistributedDataParallel(run, [device.index] if device.type == "cuda" else None)
    board = _tensorboard(folder) if processes.main and not finished else None

    while len(history) < options.epochs and not finished:
        epoch = len(history) + 1
        started = time.perf_counter()
        train.batch_sampler.epoch = epoch  # type: ignore[union-attr]
        run.train()
        if freeze_backbone:
            model.backbone.eval()  # type: ignore[union-attr]
        bar = tqdm(train, desc=f"epoch {epoch}/{options.epochs}", leave=False, disable=None if processes.main else True)
        steps = train_epoch(run, head, bar, optimizer, schedule, scaler, device, amp, options.max_grad_norm)
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
            found, truth = predict(model, head.logits, val, processes, amp)
            measured = ordinal_metrics(found, truth, values)
            score = measured[f"mae_{options.rule}"]
            if not math.isfinite(score):
                raise UserError(f"the model's predictions are not finite after epoch {epoch}; lower --lr.")
            record |= {f"val_{name}": value for name, value in measured.items()}
        if score < best["score"]:
            weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
            best = {"epoch": epoch, "score": score, "model": weights}
        record |= {"best_epoch": best["epoch"], "seconds": round(time.perf_counter() - started, 2)}
        history.append(record)
        finished = epoch == options.epochs or 0 < options.patience <= epoch - best["epoch"]
        states = processes.collect(random_states())
        if processes.main:
            written = {"format": CHECKPOINT_FORMAT, "settings": dict(settings), "finished": finished}
            written |= {"history": history, "best": best, "random": states}
            written |= {name: part.state_dict() for name, part in parts.items()}
            save_atomically(written, folder / CHECKPOINT)
            _log(history, folder, board)
        shown = f"val MAE {score:.3f}, best {best['score']:.3f} in epoch {best['epoch']}, " if val is not None else ""
        processes.say(f"epoch {epoch}/{options.epochs}: loss {record['loss']:.4f}, {shown}{record['seconds']:.1f} s")
    if board is not None:
        board.close()
    if processes.main:
        _log(history, folder, None)
    model.load_state_dict(best["model"])
    return history


def cosine_with_warmup(options: TrainOptions, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate's factor at each step: up in a line, then down along a cosine."""
    total, warm = options.epochs * steps_per_epoch, options.warmup * steps_per_epoch

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1.0, total - warm))))

    return factor


def train_epoch(
    run: nn.Module,
    head: Head,
    batches: Any,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    scaler: Any,
    device: torch.device,
    amp: torch.dtype | None,
    max_grad_norm: float,
) -> list[dict[str, Tensor]]:
    """One pass over the batches (a tqdm bar); the terms of each step's loss."""
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    steps = []
    for inputs, labels in batches:
        inputs, labels = to_device(inputs, device), labels.to(device)
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            terms = head.loss(run(inputs), labels)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(torch.stack([*terms.values()]).sum()).backward()
        if max_grad_norm:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trainable, max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        steps.append({name: term.detach().float() for name, term in terms.items()})
        if not batches.disable:
            batches.set_postfix({name: f"{float(term):.3f}" for name, term in steps[-1].items()})
    return steps


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
