"""Fine-tunes a text model on labels that have an order, with a prompt head and a linear head, on transformers' Trainer.

    python examples/finetune_text.py --demo
    python examples/finetune_text.py --data reviews.csv --rank-names poor fair good --context "a review that is"
    torchrun --nproc-per-node 2 examples/finetune_text.py --data reviews.csv --encoder roberta-base

Data is a CSV file with the columns `text` and `label`.  Each head leaves in OUTPUT its checkpoints, a picture, and the
exported weights, for `op.load_exported(TextModel(…), …)`.  A killed run goes on with the same command and `--resume`.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from ordered_data import DataError, rank_labels, read_table, split
from quickstart import CONTEXT, NAMES, rated_words
from runs import at_least, in_one_sentence, keep_parts, load_text_encoder, metrics, new_parser, plot, report, weights
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, EarlyStoppingCallback, Trainer, TrainingArguments, set_seed

import ordinal_prompt as op


class TextModel(nn.Module):
    """A text encoder, the mean over its tokens, and a head: features in the space that rank names are encoded in."""

    def __init__(self, encoder: Any, head: Any) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.loss = head.loss() if isinstance(head, op.OrdinalPromptHead) else nn.CrossEntropyLoss()

    def train(self, mode: bool = True) -> TextModel:
        super().train(mode)
        self.encoder.train(mode and any(parameter.requires_grad for parameter in self.encoder.parameters()))
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        logits = self.head(nn.functional.rms_norm(mean, mean.shape[1:])).float()  # learning rates then fit any encoder
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}


def load_encoder(name: str) -> tuple[Any, Any]:
    if name == "minilm":
        return load_text_encoder(name)
    try:
        return AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except OSError:
        told = "is no folder here, and the hub has none of that name, or cannot be reached"
        raise DataError(f"The encoder {name!r} {told}; pass a folder, or --encoder minilm.") from None


def build(kind: str, lr: float, options: Any, names: list[str], values: Any) -> tuple[TextModel, Any]:
    """A model with one of the heads, and its optimizer."""
    set_seed(options.seed)
    encoder, tokenizer = load_encoder(options.encoder)
    encoder.requires_grad_(not options.frozen)
    if kind == "linear":
        model = TextModel(encoder, nn.Linear(encoder.config.hidden_size, len(names)))
        groups: Any = [{"params": model.head.parameters(), "lr": lr}]
    else:
        settings: Any = {} if options.settings == "paper" else op.recipe(names, prompts=options.settings)
        settings |= {"tokenizer": tokenizer, "rank_values": values, "context": options.context}
        own, _ = load_encoder(options.encoder)  # stays as it is, while the encoder of the texts may learn
        model = TextModel(encoder, op.OrdinalPromptHead(own, names, **settings))
        groups = op.parameter_groups(model.head, lr)
    if not options.frozen:
        groups.append({"params": encoder.parameters(), "lr": options.backbone_lr})
    if options.optimizer == "radam":  # the paper's
        return model, torch.optim.RAdam(groups, lr, weight_decay=5e-4, decoupled_weight_decay=True)
    return model, torch.optim.AdamW(groups, lr)


def train(kind: str, lr: float, options: Any, names: list[str], values: Any, parts: Any) -> tuple[float, Trainer]:
    """Trains one head at one learning rate; gives the validation error, and the trainer with the best epoch's model."""
    model, optimizer = build(kind, lr, options, names, values)
    folder = options.output / f"{kind}-lr{lr:g}"

    def mean_absolute_error(prediction: Any) -> dict[str, float]:
        logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
        return {"mae": metrics(logits, labels, values)["MAE expectation"]}

    # Without this, processes on CPUs would train one model each, and not know of each other.
    no_device = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    own = max(1, options.batch_size // int(os.environ.get("WORLD_SIZE", "1")))
    arguments = TrainingArguments(
        str(folder), num_train_epochs=options.epochs, per_device_train_batch_size=own,
        per_device_eval_batch_size=256, eval_strategy="epoch", save_strategy="epoch", logging_strategy="epoch",
        save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="mae", greater_is_better=False,
        fp16=options.fp16, bf16=options.bf16, seed=options.seed, report_to="none", use_cpu=no_device,
        restore_callback_states_from_checkpoint=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=parts["train"], eval_dataset=parts["validation"], optimizers=(optimizer, None),
        processing_class=load_encoder(options.encoder)[1], compute_metrics=mean_absolute_error,
        callbacks=[EarlyStoppingCallback(options.patience)],
    )  # fmt: skip
    # The state is written last: a checkpoint without it was left unfinished by a run that was killed.
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if options.resume]
    last = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
    trainer.train(resume_from_checkpoint=last and str(last))
    best = trainer.state.best_metric
    return float("inf") if best is None else best, trainer


def run(kind: str, options: Any, names: list[str], values: Any, parts: dict[str, Dataset]) -> dict[str, float] | None:
    """Trains one head, tests it, and leaves the exported model; metrics in the main process alone."""
    found = {lr: train(kind, lr, options, names, values, parts) for lr in options.lr}
    lr = min(found, key=lambda rate: found[rate][0])  # chosen on the validation texts
    trainer, tokenizer = found[lr][1], load_encoder(options.encoder)[1]
    model: Any = trainer.model
    tested = trainer.predict(parts["test"])
    if not trainer.is_world_process_zero():
        return None
    logits, labels = torch.as_tensor(tested.predictions), torch.as_tensor(tested.label_ids)
    plot(options.output / f"{kind}.png", logits, labels, weights(model.head), names, f"{kind} head")
    if kind == "prompt":
        op.export_heads(model)
    torch.save(model.state_dict(), options.output / f"{kind}-model.pt")
    fresh = TextModel(load_encoder(options.encoder)[0], nn.Linear(model.encoder.config.hidden_size, len(names)))
    loaded = op.load_exported(fresh, options.output / f"{kind}-model.pt")
    cut: Any = {"padding": True, "truncation": True, "return_tensors": "pt", "return_token_type_ids": False}
    batch = tokenizer(parts["test"]["text"][:8], **cut)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch)["logits"], model.cpu().eval()(**batch)["logits"])
    return metrics(logits, labels, values) | {"lr": lr}


def main() -> None:
    parser = new_parser((__doc__ or "").split("\n")[0], "outputs/text")
    add = parser.add_argument
    add("--data", help="a CSV file")
    add("--text-column", default="text")
    add("--encoder", default="minilm", help="minilm (from a package), or a folder or name of transformers")
    add("--backbone-lr", type=at_least(0, float), default=1e-4)
    add("--batch-size", type=at_least(1), default=32, help="of all processes together")
    add("--max-length", type=at_least(1), default=256, help="tokens of a text; the rest is cut off")
    add("--fp16", action="store_true")
    add("--bf16", action="store_true")
    parser.set_defaults(lr=[1e-3, 3e-3, 1e-2], epochs=10, patience=3, settings="frozen")
    options = parser.parse_args()
    if options.demo:
        # One of the words that begin alike: no part may give away another's.
        one = {word[:4]: (word, NAMES[rank]) for word, rank in zip(*rated_words(), strict=True)}
        texts, labels = map(list, zip(*one.values(), strict=True))
        options.rank_names, options.context = NAMES, CONTEXT
        options.shots = options.shots or 64
    elif options.data:
        texts, labels = read_table(options.data, options.text_column, options.label_column)
    else:
        raise DataError("No data: pass --data FILE.csv, or --demo.")
    names, numbers, indices = rank_labels(labels, options.rank_names)
    values = numbers or [*map(float, range(len(names)))]
    keys = [" ".join(text.casefold().split()) for text in texts]  # equal but for capitals and spaces is the same text
    chosen = split(indices, texts, keys=keys, seed=options.seed, shots=options.shots, shift=options.shift)
    keep_parts(options, *([texts[i] for i in part] for part in chosen))
    tokenizer = load_encoder(options.encoder)[1]
    parts = {}
    for name, part in zip(("train", "validation", "test"), chosen, strict=True):
        dataset = Dataset.from_dict({"text": [texts[i] for i in part], "labels": indices[part].tolist()})
        cut = {"truncation": True, "max_length": options.max_length}
        parts[name] = dataset.map(lambda rows: tokenizer(rows["text"], **cut), batched=True)  # noqa: B023
    print(f"{len(texts)} texts in {len(names)} ranks; training, validation, test: {[*map(len, chosen)]}")
    kinds = ("linear", "prompt") if options.head == "both" else (options.head,)
    found = {kind: run(kind, options, names, values, parts) for kind in kinds}
    if results := {kind: result for kind, result in found.items() if result}:
        report(options.output, results)
        print(f"pictures and exported models: {options.output}")


if __name__ == "__main__":
    disable_progress_bars()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*pin_memory.*")
    in_one_sentence(main)
