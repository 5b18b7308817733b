"""Every head side by side, on features that are computed once: which one wins, where, and by how much.

    python benchmarks/heads/compare.py --data words                       # everything; hours, and can be interrupted
    python benchmarks/heads/compare.py --data sst5 --folder data/sst5 --heads linear coral corn ours-frozen
    python benchmarks/heads/compare.py --data photos/ --clip ViT-B-32 --pretrained laion2b_s34b_b79k
    python benchmarks/heads/compare.py --data features --features mine.npz --text-encoder open_clip:ViT-B-32:openai
    python benchmarks/heads/compare.py --heads linear coral ours-frozen --shots 4 all --shift --seeds 0 1   # a minute

Writes runs.csv, options.json, table.md and curves.png into the output folder.  Each run is written when it is done, and
a run that is there already is not repeated, so that an interrupted comparison goes on where it was.

The packages: pip install '.[benchmarks]'
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from data import DATA_SETS
from embedding import load_text_encoder
from peers import HEADS
from protocol import Budget, Setting, UnfitError, run
from records import Records
from report import mean_and_deviation, plot, report
from task import Task
from torch import Tensor
from tqdm import tqdm

import ordinal_prompt as op

SHOTS = ("1", "2", "4", "8", "16", "32", "64", "all")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare ordinal heads on cached features.")
    add, budget = parser.add_argument, Budget()
    sets = f"one of {', '.join(DATA_SETS)} (default: words), or a folder with a folder of images for each rank"
    add("--data", metavar="NAME", default="words", help=sets)
    add(
        "--folder", metavar="DIR", help="where the data are; of texts: train.csv, dev.csv, test.csv with text and label"
    )
    add("--clip", metavar="MODEL", help="of open_clip, for images and prompts (default: EfficientNet-Lite0 and minilm)")
    add("--pretrained", metavar="TAG", help="weights of --clip: a tag of open_clip, or a file")
    add("--features", metavar="NPZ", help="x_train, y_train, the same for val and test (and rank_values)")
    add("--rank-names", nargs="+", metavar="NAME", help="names of the ranks, lowest first")
    add("--context", help="text that leads up to a rank's name (default: the data's own, or none)")
    encoders = "minilm (default), open_clip:MODEL[:PRETRAINED], or a folder or name of transformers"
    add("--text-encoder", default="minilm", metavar="NAME", help=f"of the prompts: {encoders}")
    add("--heads", nargs="+", metavar="HEAD", choices=HEADS, default=[*HEADS], help=f"some of: {', '.join(HEADS)}")
    add("--shots", nargs="*", metavar="N", default=SHOTS, help=f"samples per rank (default: {' '.join(SHOTS)})")
    shifts = "label shifts: the most frequent ranks keep a share (default: a quarter and half of the ranks keep 0.1)"
    add("--shift", nargs="*", metavar="RANKS:SHARE", help=shifts)
    add("--seeds", nargs="+", type=int, metavar="SEED", default=range(5), help="default: 0 1 2 3 4")
    ours = "heads to set against linear, CORAL and CORN (default: those named ours)"
    add("--ours", nargs="+", metavar="HEAD", choices=HEADS, help=ours)
    add("--lr", nargs="+", type=float, metavar="RATE", default=budget.learning_rates, help="grid for every head")
    add("--steps", type=int, default=budget.steps, help="at most (default: %(default)s)")
    add("--patience", type=int, default=budget.patience, help="looks without improvement (default: %(default)s)")
    add("--batch-size", type=int, default=budget.batch_size, help="default: %(default)s")
    add("--output", type=Path, metavar="DIR", help="default: outputs/compare-DATA")
    few = "validate on as few samples per rank as are trained on, at most 4, instead of the whole validation part"
    add("--few-validation", action="store_true", help=few)
    add("--device", type=torch.device, default="cpu", help="default: %(default)s")
    add("--threads", type=int, help="CPU threads (default: torch's own choice)")
    return parser


def load_task(args: argparse.Namespace) -> Task:
    """The task that the options describe; ValueError and OSError say what is wrong with options or data."""
    if args.data not in DATA_SETS:
        if not Path(args.data).is_dir():
            raise ValueError(f"--data {args.data} is neither a folder nor one of {', '.join(DATA_SETS)}.")
        args.data, args.folder = "images", args.data
    if args.clip:
        args.text_encoder = ":".join(filter(None, ("open_clip", args.clip, args.pretrained)))
    needed = {
        **{name: ["folder"] for name in DATA_SETS if name.startswith(("sst5", "complexity", "images", "coffee"))},
        "texts": ["folder", "rank_names", "context"],
        "features": ["features"],
    }
    missing = [f"--{name.replace('_', '-')}" for name in needed.get(args.data, []) if not getattr(args, name)]
    if missing:
        raise ValueError(f"--data {args.data} needs {' and '.join(missing)}; --help says what they are.")
    task = DATA_SETS[args.data](args)
    return replace(
        task,
        rank_names=tuple(args.rank_names) if args.rank_names else task.rank_names,
        context=task.context if args.context is None else args.context,
        text_encoder=lambda: load_text_encoder(args.text_encoder),
    )


def load_settings(args: argparse.Namespace, labels: Tensor) -> list[Setting]:
    """The training subsets, in the order of the tables; ValueError where they do not fit the labels."""
    shifts = args.shift
    if shifts is None:
        present = len(labels.unique())
        shifts = [f"{k}:0.1" for k in sorted({max(1, present // 4), max(1, present // 2)})]
    settings = [Setting.parse(text) for text in (*args.shots, *shifts)]
    for setting in settings:
        setting.indices(labels, seed=0)
    return settings


def compare(
    task: Task,
    heads: Sequence[str],
    settings: Sequence[Setting],
    seeds: Sequence[int],
    budget: Budget,
    records: Records,
    few_validation: bool = False,
) -> None:
    """Runs what is missing, and adds it to the records."""
    unfit: dict[str, str] = {}
    jobs = [(setting, head, seed) for seed in seeds for setting in settings for head in heads]
    for setting, head, seed in (bar := tqdm(jobs, "runs", leave=False)):
        key = {"data": task.name, "setting": setting.name, "head": head, "seed": seed}
        if tuple(key.values()) in records or head in unfit:
            continue
        bar.set_postfix_str(f"{head}, {setting.name}, seed {seed}")
        indices = setting.indices(task.labels["train"], seed)
        start = time.perf_counter()
        try:
            judged = setting.with_few_validation(task, seed) if few_validation else task
            result = run(HEADS[head], judged, indices, seed, budget)
        except UnfitError as error:
            unfit[head] = str(error)
        else:
            seconds = round(time.perf_counter() - start, 2)
            records.add({**key, **result, "samples": len(indices), "seconds": seconds})
    for head, reason in unfit.items():
        print(f"Left out {head}: {reason}.", file=sys.stderr)


def study(args: argparse.Namespace) -> None:
    """Runs what the options ask for, and writes the report."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    output = args.output or Path("outputs") / f"compare-{Path(args.data).name}"
    heads, seeds = list(dict.fromkeys(args.heads)), list(dict.fromkeys(args.seeds))
    ours = args.ours or [head for head in heads if head.startswith("ours")]
    budget = Budget(tuple(args.lr), args.steps, args.patience, args.batch_size)
    task = load_task(args)
    settings = load_settings(args, task.labels["train"])
    options = {
        "version": op.__version__,
        "recipe": op.recipe(2),
        "data": task.name,
        "digest": task.digest(),
        "rank_names": task.rank_names,
        "context": task.context,
        "text_encoder": args.text_encoder,
        **asdict(budget),
        **({"few_validation": True} if args.few_validation else {}),
    }
    records = Records(output, options)
    compare(task.to(args.device), heads, settings, seeds, budget, records, args.few_validation)
    runs, names = records.frame(), [setting.name for setting in settings]
    title = f"Heads on {task.name}: {task.num_ranks} ranks, seeds {', '.join(map(str, seeds))}"
    text = report(runs, names, heads, ours, title)
    (output / "table.md").write_text(text, encoding="utf-8")
    plot(*mean_and_deviation(runs, names, heads, "mae"), output / "curves.png", title)
    print(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry."""
    args = parser().parse_args(arguments)
    try:
        study(args)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}; install what the comparison needs with: pip install '.[benchmarks]'")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; the same command goes on from here.")


if __name__ == "__main__":
    main()
