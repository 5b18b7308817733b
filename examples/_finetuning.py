"""What fine-tuning on images and on texts has in common: the options of the data, a run, and what each run leaves."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _errors import UserError
from _files import write_text
from _heads import Head
from _options import add_choice, count, fraction
from _processes import Processes, evaluation_batches, seed_everything, training_batches
from _ranks import Ranks, Row, check_ranks_present, split_rows, training_subset
from _reports import (
    confusion_matrix,
    ordinal_metrics,
    ordinality_beside_chance,
    plot_confusion,
    plot_history,
    plot_similarity,
    results_table,
    write_predictions,
)
from _training import TrainOptions, fit, predict
from torch import Tensor, nn
from torch.utils.data import DataLoader

# What may differ between a run and its resumption.
FREE_SETTINGS = frozenset(
    "data val test root output head seeds device workers threads fresh log_steps eval_batch_size preset".split()  # noqa: SIM905
)
# What a run leaves in its folder.
FILES = """
    checkpoint.pt config.json log.jsonl log.csv results.json predictions.csv model.json model.pt head.pt
    confusion.png similarity.png history.png
""".split()  # noqa: SIM905
FOLDERS = ("encoder", ".encoder-new", "tensorboard")


@dataclass
class Data:
    """Rows, ranks, and the parts of one split.

    Attributes:
        labels: each row's rank index.
        parts: indices of the rows of train, val and test.
        skipped: how many samples could not be read.
        features: of the rows, where they are computed once.
    """

    rows: list[Row]
    ranks: Ranks
    labels: Tensor
    parts: dict[str, Tensor]
    skipped: int = 0
    features: Tensor | None = None

    @property
    def values(self) -> list[float]:
        """The ranks' values, in whose units errors are measured."""
        return [float(value) for value in self.ranks.values]


@dataclass(frozen=True)
class Trained:
    """A trained model, its log, and the test samples: their batches, logits over the ranks (N, K), and labels (N,)."""

    model: nn.Sequential
    history: list[dict[str, Any]]
    test: DataLoader[Any]
    logits: Tensor
    labels: Tensor


# ------------------------------------------------------------------------------------------------------------- options


def new_parser(script: str, description: str | None) -> argparse.ArgumentParser:
    """A parser whose usage is one line."""
    return argparse.ArgumentParser(
        script,
        usage=f"{script}.py (DATA | --demo) [options]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_data_arguments(
    parser: argparse.ArgumentParser, content: str, sources: str, group_example: str, default_ranks: str
) -> Any:
    """The options of the data; returns their group.

    Args:
        content: the column of what is rated, `path` or `text`.
        sources: what data may be given as.
        group_example: of rows that belong together.
        default_ranks: where the ranks come from without `--ranks`.
    """
    group = parser.add_argument_group("data")
    group.add_argument("data", type=Path, nargs="?", help=sources)
    group.add_argument("--val", type=Path, metavar="DATA", help="validation data, where it is kept apart")
    group.add_argument("--test", type=Path, metavar="DATA", help="test data, where it is kept apart")
    for name, told in (
        (content, f"of the {content}s"),
        ("label", "of the labels"),
        ("split", "that says train, val or test, used where there is one"),
    ):
        help_text = f"column {told}; default %(default)s"
        group.add_argument(f"--{name}-column", metavar="NAME", default=name, help=help_text)
    group.add_argument("--group-column", metavar="NAME", help=f"column of what must stay in one part ({group_example})")
    group.add_argument(
        "--ranks",
        help=f"all labels: a number of them from 0 on (5), a range (16-77) or a list (1,2,5); default {default_ranks}",
    )
    group.add_argument(
        "--rank-names", metavar="NAMES", help="comma list, or a file with one name a line, from the lowest rank"
    )
    add_choice(group, "--empty-ranks", ["refuse", "allow"], "what to do about ranks without a training sample")
    for option, part, share in (("--val-fraction", "validation", 0.1), ("--test-fraction", "test", 0.2)):
        group.add_argument(
            option,
            type=fraction,
            metavar="SHARE",
            default=share,
            help=f"of the training samples, drawn for {part} where no such data is given; default %(default)s",
        )
    group.add_argument("--split-seed", type=int, metavar="SEED", default=0, help="of drawing them; default %(default)s")
    group.add_argument("--shots", type=count, metavar="N", help="train on N samples per rank only")
    group.add_argument(
        "--shift",
        metavar="RANKS:KEEP",
        help="shift the labels: the RANKS most frequent ranks keep the share KEEP of their training samples (20:0.1)",
    )
    return group


# ---------------------------------------------------------------------------------------------------------------- data


def as_part(rows: Sequence[Row], part: str, before: Sequence[Row]) -> list[Row]:
    """Rows of the validation or test data that were given apart."""
    if any(row.split == part for row in before):
        raise UserError(f"--{part} was given, but the data has a {part} part already.")
    return [replace(row, split=part) for row in rows]


def split_data(
    args: argparse.Namespace, rows: list[Row], ranks: Ranks, labels: Tensor, processes: Processes, skipped: int = 0
) -> Data:
    """The data in its parts, checked and counted."""
    parts = split_rows(rows, labels, args.val_fraction, args.test_fraction, args.split_seed)
    empty = check_ranks_present(ranks, labels[parts["train"]], args.empty_ranks == "allow")
    counts = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
    notes = f"; {skipped} samples skipped" if skipped else ""
    notes += f"; {len(empty)} ranks without training samples" if empty else ""
    processes.say(f"{args.data}: {ranks}; {counts}{notes}")
    return Data(rows, ranks, labels, parts, skipped)


# ---------------------------------------------------------------------------------------------------------------- runs


def run_all(
    args: argparse.Namespace,
    data: Data,
    run: Callable[[argparse.Namespace, str, int, Data, Processes], dict[str, Any]],
    processes: Processes,
) -> dict[str, list[dict[str, Any]]]:
    """Every head with every seed; the test results by head."""
    results: dict[str, list[dict[str, Any]]] = {}
    for name in dict.fromkeys(args.head):
        results[name] = [run(args, name, seed, data, processes) for seed in dict.fromkeys(args.seeds)]
    table = results_table(results)
    if processes.main:
        write_text(table + "\n", args.output / "results.md")
    processes.say(f"\nTest, {len(data.parts['test'])} samples (MAE in units of the ranks):\n{table}")
    processes.say(f"\nPlots, predictions and exported models are in {args.output}.")
    return results


def start_run(args: argparse.Namespace, name: str, seed: int, processes: Processes) -> Path:
    """The folder of a run, emptied of an earlier one if that is asked for; and the seed is set."""
    folder: Path = args.output / f"{name}-seed{seed}"
    if args.fresh and processes.main:
        for file in FILES:
            (folder / file).unlink(missing_ok=True)
        for inner in FOLDERS:
            shutil.rmtree(folder / inner, ignore_errors=True)
    processes.share(None)
    seed_everything(seed)
    return folder


def train_and_test(
    args: argparse.Namespace,
    backbone: nn.Module,
    head: Head,
    samples: Callable[[str, Tensor], Any],
    data: Data,
    seed: int,
    folder: Path,
    processes: Processes,
    *,
    key: Callable[[Row], str] = lambda row: row.content,
    collate: Callable[..., Any] | None = None,
    eval_batch_size: int | None = None,
) -> Trained:
    """Trains a backbone with a head, or goes on with it, and predicts the test part.

    Args:
        samples: name and indices of a part to a dataset with `rows` and `labels`.
        key: what a sample is known by when a run goes on.
    """
    model = nn.Sequential(OrderedDict(backbone=backbone, head=head.module)).to(processes.device)
    seed_everything(seed + processes.rank)  # dropout differs between processes
    few = training_subset(data.parts["train"], data.labels, args.shots, args.shift, seed)
    sets = {part: samples(part, indices) for part, indices in {**data.parts, "train": few}.items()}
    options = TrainOptions.from_args(args)
    settings = _settings(args, head.name, seed, [sets["train"], sets["val"]], key)
    train = training_batches(sets["train"], options.batch_size, seed, processes, options.workers, collate)
    val, test = (
        evaluation_batches(sets[part], eval_batch_size or options.batch_size, processes, options.workers, collate)
        for part in ("val", "test")
    )
    processes.say(f"{folder}: head {head.name}, seed {seed}, {len(few)} training samples")
    freeze, seen = args.freeze_backbone, val if len(sets["val"]) else None
    history = fit(model, head, train, seen, data.values, options, processes, folder, settings, freeze)
    return Trained(model, history, test, *predict(model, head.logits, test, processes))


def _settings(
    args: argparse.Namespace, name: str, seed: int, sets: Sequence[Any], key: Callable[[Row], str]
) -> dict[str, Any]:
    """What must not change between a run and its resumption, in types of JSON."""
    options = {option: value for option, value in vars(args).items() if option not in FREE_SETTINGS}
    samples = [(key(row), int(label)) for part in sets for row, label in zip(part.rows, part.labels, strict=True)]
    digest = hashlib.blake2b(repr(samples).encode(), digest_size=8).hexdigest()
    return {**options, "head": name, "seed": seed, "samples": digest}


# ------------------------------------------------------------------------------------------------------------- reports


def check_export(again: Tensor, logits: Tensor, tolerances: tuple[float, float], what: Path) -> float:
    """The largest difference between an export's logits and the model's, refused beyond tolerances (rtol, atol)."""
    difference = float((again - logits).abs().max())
    if not torch.allclose(again, logits, *tolerances):
        raise UserError(f"{what} does not give the model's predictions: logits differ by up to {difference:.2g}.")
    return difference


def describe_export(head: Head, ranks: Ranks, folder: Path, **more: Any) -> None:
    """Writes model.json, which says how to use what was exported."""
    told = {"head": head.name, "ranks": ranks.values, "rank_names": ranks.names, "outputs": head.meaning, **more}
    write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", folder / "model.json")


def write_report(head: Head, seed: int, trained: Trained, data: Data, folder: Path, **more: Any) -> dict[str, Any]:
    """Measures on the test part, and writes results, predictions and plots; returns the results."""
    logits, labels, history = trained.logits, trained.labels, trained.history
    results = {"head": head.name, "seed": seed, **ordinal_metrics(logits, labels, data.values)}
    if head.prototypes:
        prototypes = head.prototypes().float().cpu()
        results |= ordinality_beside_chance(prototypes)
        plot_similarity(prototypes, data.ranks, folder / "similarity.png")
    results |= {
        "best_epoch": history[-1]["best_epoch"],
        "epochs": len(history),
        "test_samples": len(labels),
        "seconds": round(sum(record["seconds"] for record in history), 1),
        **more,
    }
    rows = [data.rows[i] for i in data.parts["test"].tolist()]
    write_predictions(rows, logits, labels, data.values, folder / "predictions.csv")
    confusion = confusion_matrix(labels, logits.argmax(dim=1), len(data.ranks))
    plot_confusion(confusion, data.ranks, folder / "confusion.png")
    plot_history(history, folder / "history.png")
    write_text(json.dumps(results, indent=2) + "\n", folder / "results.json")
    return results
