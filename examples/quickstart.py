"""A linear head and a prompt head, side by side: how good or bad does a word feel?

Real input, offline: words with the mean of ten people's ratings (vaderSentiment), as eight ranks from "extremely
negative" to "very positive".  Features are all-MiniLM-L6-v2 sentence embeddings, and the same MiniLM encodes the names
of the ranks.  Both heads learn from a few words per rank.  The linear head's learning rate is chosen on validation
words; the prompt head is fitted, and needs neither.

    python examples/quickstart.py
"""

from __future__ import annotations

import argparse
import importlib.resources
import re
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from runs import load_text_encoder
from sklearn.model_selection import GroupShuffleSplit
from torch import Tensor, nn

import ordinal_prompt as op

NAMES = ["extremely negative", "very negative", "negative", "slightly negative", "neutral", "slightly positive"]
NAMES += ["positive", "very positive"]
CONTEXT, RECIPE = "the feeling of this word is", op.recipe(NAMES, prompts="fitted")
SHOTS, SEEDS, STEPS = (1, 4, 16, 64), 3, 100


def rated_words() -> tuple[list[str], Tensor]:
    """Words and the rank of their rating, rounded."""
    lexicon = importlib.resources.files("vaderSentiment") / "vader_lexicon.txt"
    rows = [line.split("\t") for line in lexicon.read_text(encoding="utf-8").splitlines()]
    rated = {word: round(float(rating)) for word, rating, *_ in rows if re.fullmatch("[a-z]{3,}", word)}
    return list(rated), op.rank_indices(list(rated.values()), [*range(-4, 4)])


@torch.no_grad()
def embed(texts: list[str], bert: Any, tokenizer: Any) -> Tensor:
    """Sentence embeddings (N, 384): the mean over the tokens of each text."""
    rows = []
    for start in range(0, len(texts), 256):
        tokens = tokenizer(texts[start : start + 256], padding=True, return_tensors="pt")
        mask = tokens["attention_mask"][..., None]
        rows.append((bert(**tokens).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1))
    return nn.functional.normalize(torch.cat(rows), dim=1)


def linear_head(lr: float, features: Tensor, labels: Tensor) -> nn.Module:
    """A linear head, trained with one learning rate."""
    head = nn.Linear(features.shape[1], len(NAMES))
    optimizer = torch.optim.AdamW(head.parameters(), lr)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(features), labels).backward()
        optimizer.step()
    return head.eval().requires_grad_(False)


def plot(path: Path, before: Tensor, after: Tensor, errors: dict[str, list[float]]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    for axis, rows, when in ((axes[0], before, "before training, from names"), (axes[1], after, "after training")):
        op.plot.similarity(rows, NAMES, axis).set(xticks=[])
        axis.set_title(f"rank prototypes {when}, centred\n{axis.get_title()}")
    for name, means in errors.items():
        axes[2].plot([*map(str, SHOTS)], means, marker="o", label=name)
    axes[2].set(title="error on test words", xlabel="training words per rank", ylabel="mean absolute error in ranks")
    axes[2].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plot", type=Path, default=Path("outputs/quickstart.png"), help="default %(default)s")
    path = parser.parse_args().plot
    bert, tokenizer = load_text_encoder("minilm")
    words, labels = rated_words()
    print(f"embedding {len(words)} rated words …")
    features = embed(words, bert, tokenizer)
    # Words with the same first four letters stay in one part: "abandon" would give "abandoned" away.
    families = [word[:4] for word in words]
    rest, test = next(GroupShuffleSplit(test_size=0.25, random_state=0).split(words, groups=families))
    kept = next(GroupShuffleSplit(test_size=0.2, random_state=0).split(rest, groups=[families[i] for i in rest]))
    training, validation = (rest[part] for part in kept)

    def error(head: nn.Module, part: Any) -> float:
        return (op.decode(head(features[part])) - labels[part]).abs().mean().item()

    errors: dict[str, list[float]] = {"linear head": [], "prompt head": []}
    print(f"mean absolute error in ranks on {len(test)} test words, mean of {SEEDS} seeds")
    for shots in SHOTS:
        found = []
        for seed in range(SEEDS):
            few = training[op.protocols.few_shot_indices(labels[training], shots, torch.manual_seed(seed))]
            linear = [linear_head(lr, features[few], labels[few]) for lr in (1e-2, 1e-1, 1.0)]
            best = min(linear, key=lambda head: error(head, validation))
            head = op.OrdinalPromptHead(bert, NAMES, tokenizer=tokenizer, context=CONTEXT, **RECIPE)
            before = head.prototypes().detach()
            op.fit_head(head, features[few], labels[few]).eval().requires_grad_(False)
            found.append((error(best, test), error(head, test)))
        for name, values in zip(errors, zip(*found, strict=True), strict=True):
            errors[name].append(sum(values) / SEEDS)
        print(f"  {shots:>2} words per rank: " + ", ".join(f"{name} {means[-1]:.3f}" for name, means in errors.items()))

    layer = head.export_prototypes()
    assert torch.allclose(layer(features[test]), head(features[test]), atol=1e-3)
    print(f"\nexported, with equal predictions and without the text model: {layer}")
    plot(path, before, layer.weight, errors)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
