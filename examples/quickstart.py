"""From a linear head to a prompt head in one run: how good or bad does a word feel?

Real input, offline: 7,174 words with the mean rating of ten people (vaderSentiment), rounded to eight ranks.  Features
are sentence embeddings of all-MiniLM-L6-v2, which also encodes the prompts.  Words that begin alike ("abandon",
"abandoned") stay in one part.  Both heads choose learning rate and epoch on validation words, then meet the test words.
"""

from __future__ import annotations

import argparse
import copy
import importlib.resources
import re
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from runs import load_text_encoder
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import ordinal_prompt as op

NAMES = ["extremely negative", "very negative", "negative", "slightly negative", "neutral", "slightly positive"]
NAMES += ["positive", "very positive"]
VALUES = torch.arange(-4.0, 4.0)  # the ratings that they stand for
LEARNING_RATES = (1e-3, 1e-2, 1e-1)


def read_words() -> dict[str, int]:
    """Words and their rank indices."""
    lexicon = importlib.resources.files("vaderSentiment") / "vader_lexicon.txt"
    rows = (line.split("\t") for line in lexicon.read_text(encoding="utf-8").splitlines())
    return {word: round(float(mean)) + 4 for word, mean, *_ in rows if re.fullmatch("[a-z]{3,}", word)}


@torch.no_grad()
def embed(encoder: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Sentence embeddings (N, D): the mean over the tokens, of unit norm."""
    rows = []
    for start in tqdm(range(0, len(texts), 64), "embedding"):
        batch = tokenizer(texts[start : start + 64], padding=True, return_tensors="pt")
        hidden = encoder(**batch).last_hidden_state * batch["attention_mask"][..., None]
        rows.append(F.normalize(hidden.sum(dim=1), dim=-1))
    return torch.cat(rows)


@torch.no_grad()
def error(head: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Mean absolute error on features (N, D) with rank indices (N,), in units of the ratings."""
    return (op.decode(head.eval()(data[0]), values=VALUES) - VALUES[data[1]]).abs().mean().item()


def train(head: Any, lr: float, few: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> tuple[float, Any]:
    """Trains until ten epochs bring nothing; returns the least validation error, and the head as it was then."""
    head, (features, labels) = copy.deepcopy(head), few
    ours = isinstance(head, op.OrdinalPromptHead)
    optimizer = torch.optim.AdamW(op.parameter_groups(head, lr) if ours else head.parameters(), lr)
    loss_function = head.loss() if ours else nn.CrossEntropyLoss()
    best, kept, left = error(head, val), copy.deepcopy(head), 10
    while left:
        head.train()
        for batch in torch.randperm(len(labels)).split(max(32, len(labels) // 16)):
            optimizer.zero_grad()
            loss_function(head(features[batch]), labels[batch]).backward()
            optimizer.step()
        left -= 1
        if (now := error(head, val)) < best:
            best, kept, left = now, copy.deepcopy(head), 10
    return best, kept


def plot(path: Path, before: Tensor, after: Tensor, errors: dict[str, dict[str, Tensor]]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    for axis, rows, when in ((axes[0], before, "before training, from names"), (axes[1], after, "after training")):
        unit, told = F.normalize(rows), f"ordinality {op.ordinality(rows):.2f}, chance {0.5 + 1 / len(NAMES):.2f}"
        figure.colorbar(axis.imshow(unit @ unit.T), ax=axis, shrink=0.8, label="cosine")
        axis.set(title=f"Rank prototypes {when}\n{told}", xticks=[], yticks=range(len(NAMES)), yticklabels=NAMES)
    for name, runs in errors.items():
        mean, deviation = zip(*(torch.std_mean(run, correction=0)[::-1] for run in runs.values()), strict=True)
        axes[2].errorbar([*runs], mean, deviation, marker="o", capsize=4, label=name)
    axes[2].set(title="Error on test words", xlabel="training words per rank", ylabel="mean absolute error, in ratings")
    axes[2].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/quickstart"), help="folder; default %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="each draws other training words; default %(default)s")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    encoder, tokenizer = load_text_encoder("minilm")
    words = read_words()
    features, labels = embed(encoder, tokenizer, [*words]), torch.tensor([*words.values()])
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(features, labels, [word[:3] for word in words])
    test, val, *others = (torch.from_numpy(fold) for _, fold in folds)
    train_words = torch.cat(others)
    print(f"{len(train_words)} training, {len(val)} validation and {len(test)} test words in {len(NAMES)} ranks")
    options = op.recipe(NAMES, prompts="frozen")  # nearly as good as learned ones, and as cheap as a linear head
    options |= {"tokenizer": tokenizer, "rank_values": VALUES, "context": "the feeling of this word is"}
    prompt_head = op.OrdinalPromptHead(encoder, NAMES, **options)
    heads = {"linear head": nn.Linear(features.shape[1], len(NAMES)), "prompt head": prompt_head}
    shots = {"1": 1, "8": 8, "64": 64, "all": len(words)}
    errors = {name: {size: torch.zeros(args.seeds) for size in shots} for name in heads}
    trained: Any = None
    for size, seed in tqdm([(size, seed) for size in shots for seed in range(args.seeds)], "training"):
        few = train_words[op.protocols.few_shot_indices(labels[train_words], shots[size], torch.manual_seed(seed))]
        parts = (features[few], labels[few]), (features[val], labels[val])
        for name, head in heads.items():
            _, trained = min((train(head, lr, *parts) for lr in LEARNING_RATES), key=lambda run: run[0])
            errors[name][size][seed] = error(trained, (features[test], labels[test]))
    print("\nMean absolute error on test words, mean ± sd over seeds\nwords per rank", *heads, sep="   ")
    for size in shots:
        cells = (f"{runs[size].mean():.3f} ± {runs[size].std(correction=0):.3f}" for runs in errors.values())
        print(f"{size:>14}", *cells, sep="   ")
    torch.save(trained.export(), args.out / "head.pt")  # layers of torch.nn: it runs without ordinal_prompt
    exported = torch.load(args.out / "head.pt", weights_only=False)
    torch.testing.assert_close(exported(features[test]), trained(features[test]), rtol=1e-4, atol=1e-4)
    print(f"\nIn {args.out}: quickstart.png, and head.pt, exported, loaded and equal")
    plot(args.out / "quickstart.png", prompt_head.prototypes(), exported[-1].weight.detach(), errors)


if __name__ == "__main__":
    main()
