"""From a linear head to a prompt head in one run: how good or bad does a word feel?

Real input, offline: 7,200 words with the mean of ten people's ratings (vaderSentiment), as eight ranks from "extremely
negative" to "very positive".  Features are all-MiniLM-L6-v2 sentence embeddings, and the same MiniLM encodes the
prompts; `--clip` does it with the text encoder of a CLIP instead.  A linear head and a prompt head learn from 8 words
per rank; the words of one family never stand on both sides.

    python examples/quickstart.py
    python examples/quickstart.py --clip ViT-B-32 --pretrained laion2b_s34b_b79k     # needs a hub
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _data import Part, RankedTexts, load_minilm, load_words, progress_bar
from _errors import UserError, needs_network, skip_unreachable_hub
from _options import count
from torch import Tensor, nn
from torch.nn import functional as F

import ordinal_prompt as op

PATIENCE = 10
LINEAR_LEARNING_RATES = (1e-3, 1e-2, 1e-1)  # the best on validation words counts
PROMPT_LEARNING_RATE = 1e-3


def mean_absolute_error(logits: Tensor, labels: Tensor) -> float:
    return (op.decode(logits) - labels).abs().mean().item()


def train(
    head: nn.Module, loss: Callable[..., Tensor], groups: Any, shots: Part, val: Part, epochs: int, bar: Any
) -> float:
    """Trains on a few words in batches of 32; keeps the epoch that was best on validation words, returns its error."""
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    best, best_state, best_epoch = float("inf"), head.state_dict(), 0
    for epoch in range(epochs):
        head.train()
        for batch in torch.randperm(len(shots)).split(32):
            optimizer.zero_grad()
            loss(head(shots.features[batch]), shots.labels[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            error = mean_absolute_error(head.eval()(val.features), val.labels)
        if error < best:
            best, best_state, best_epoch = error, copy.deepcopy(head.state_dict()), epoch
        bar.update()
        if epoch - best_epoch >= PATIENCE:
            break
    head.load_state_dict(best_state)
    return best


def few(part: Part, shots: int, seed: int) -> Part:
    kept = op.protocols.few_shot_indices(part.labels, shots, torch.Generator().manual_seed(seed))
    return Part(tuple(part.texts[i] for i in kept), part.labels[kept], part.features[kept])


def make_text_encoder(arguments: argparse.Namespace) -> tuple[Any, Any]:
    if arguments.clip is None:
        return load_minilm()
    from ordinal_prompt.checkpoint import load_open_clip

    skip_unreachable_hub()
    with needs_network(f"the text encoder {arguments.clip}", "run without --clip, with MiniLM"):
        return load_open_clip(arguments.clip, arguments.pretrained)


def embed_with_clip(model: Any, tokenizer: Any, data: RankedTexts) -> RankedTexts:
    parts = {}
    for name, part in data.parts().items():
        rows = []
        with torch.no_grad(), progress_bar(len(part), f"embedding {name} words") as bar:
            for start in range(0, len(part), 256):
                texts = list(part.texts[start : start + 256])
                rows.append(F.normalize(model.encode_text(tokenizer(texts)), dim=-1))
                bar.update(len(texts))
        parts[name] = replace(part, features=torch.cat(rows))
    return replace(data, **parts)


def plot(path: Path, before: Tensor, after: Tensor, predicted: Tensor, labels: Tensor, data: RankedTexts) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for axis, prototypes, when in ((axes[0], before, "before"), (axes[1], after, "after")):
        image = axis.imshow(prototypes @ prototypes.T, cmap="viridis")
        axis.set_title(
            f"similarity of rank prototypes {when} training\nordinality {op.ordinality(prototypes):.2f}", fontsize=10
        )
        axis.set_xticks(range(data.num_ranks), [f"{value:g}" for value in data.rank_values])
        axis.set_yticks(range(data.num_ranks), data.rank_names, fontsize=8)
        figure.colorbar(image, ax=axis, shrink=0.8, label="cosine")
    groups = [predicted[labels == rank].numpy() for rank in range(data.num_ranks)]
    axes[2].boxplot(groups, positions=data.rank_values, widths=0.6, showfliers=False)
    axes[2].plot(data.rank_values, data.rank_values, color="tab:orange", label="perfect")
    axes[2].set(xlabel="rated valence", ylabel="predicted valence", title="test words, prompt head")
    axes[2].set_xticks(data.rank_values, [f"{value:g}" for value in data.rank_values])
    axes[2].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(arguments: argparse.Namespace) -> None:
    model, tokenizer = make_text_encoder(arguments)
    if arguments.clip is None:
        data = load_words((model, tokenizer))
    else:
        data = embed_with_clip(model, tokenizer, load_words(features=False))
    val, test = data.val, data.test
    print(f"{len(data.train)} training, {len(val)} validation and {len(test)} test words in {data.num_ranks} ranks")

    def train_linear(shots: Part, bar: Any) -> nn.Module:
        heads = []
        for lr in LINEAR_LEARNING_RATES:
            head = nn.Linear(test.features.shape[1], data.num_ranks)
            groups = [{"params": head.parameters(), "lr": lr}]
            heads.append((train(head, nn.CrossEntropyLoss(), groups, shots, val, 5 * arguments.epochs, bar), head))
        return min(heads, key=lambda pair: pair[0])[1]

    def prompt_head() -> op.OrdinalPromptHead:
        return op.OrdinalPromptHead(
            model,
            data.rank_names,
            tokenizer=tokenizer,
            rank_values=data.rank_values,
            context=data.context,
            **op.recipe(data.rank_names),
        )

    def train_prompt(shots: Part, bar: Any) -> nn.Module:
        head = prompt_head()
        groups = op.parameter_groups(head, lr=PROMPT_LEARNING_RATE)
        train(head, op.OrdinalPromptLoss(kl_weight=0), groups, shots, val, arguments.epochs, bar)
        return head

    before = prompt_head().eval().prototypes()
    median = data.train.labels.median().float()
    errors: dict[str, list[float]] = {"linear head": [], "prompt head": []}
    with progress_bar(None, "training epochs") as bar:
        for seed in range(arguments.seeds):
            shots = few(data.train, arguments.shots, seed)
            for name, train_head in (("linear head", train_linear), ("prompt head", train_prompt)):
                torch.manual_seed(seed)
                trained: Any = train_head(shots, bar).eval().requires_grad_(False)
                errors[name].append(mean_absolute_error(trained(test.features), test.labels))

    print(f"\nMean absolute error on test words, {arguments.shots} training words per rank, {arguments.seeds} seeds")
    print(f"  {'constant median':<16} {(test.labels - median).abs().mean():.3f}")
    for name, values in errors.items():
        print(f"  {name:<16} {torch.tensor(values).mean():.3f} ± {torch.tensor(values).std(correction=0):.3f}")
    after, predicted = trained.prototypes(), trained.predict(test.features)  # those of the last seed

    layer = trained.export_prototypes()
    difference = (layer(test.features) - trained(test.features)).abs().max().item()
    same = torch.equal(layer(test.features).argmax(1), trained(test.features).argmax(1))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(layer.state_dict(), Path(folder) / "head.pt")
        size = (Path(folder) / "head.pt").stat().st_size
    text_size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"\nExported: {layer}")
    print(
        f"  {'same' if same else 'OTHER'} predictions on all {len(test)} test words; "
        f"largest difference of a logit {difference:.1e}"
    )
    print(f"  {size / 1e3:.0f} kB on disk; the text encoder that it no longer needs: {text_size / 1e6:.0f} MB")
    plot(arguments.plot, before, after, predicted, test.labels, data)
    print(f"  plots: {arguments.plot}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default, told in (
        ("--shots", 8, "training words per rank"),
        ("--seeds", 3, "repetitions with other training words"),
        ("--epochs", 40, "the most epochs; validation words stop training earlier"),
    ):
        parser.add_argument(name, type=count, metavar="N", default=default, help=f"{told}; default {default}")
    parser.add_argument("--clip", metavar="MODEL", help="an open_clip model in the place of MiniLM (needs a hub)")
    parser.add_argument("--pretrained", metavar="TAG", help="its weights, as in open_clip.list_pretrained()")
    parser.add_argument(
        "--plot", type=Path, default=Path("outputs/quickstart.png"), metavar="FILE", help="default %(default)s"
    )
    arguments = parser.parse_args()
    try:
        run(arguments)
    except (UserError, ValueError) as error:
        sys.exit(f"quickstart: {error}")


if __name__ == "__main__":
    main()
