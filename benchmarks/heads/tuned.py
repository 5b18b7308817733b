"""Fine-tuning a network on few photographs, without validation data: where should its head start?

    python benchmarks/heads/tuned.py --folder data/coffee_leaf --shots 16

EfficientNet-Lite0, all of it trained, with batch norms as they are; the same schedule for every head.  Prints the test
MAE (expectation, median) with the network frozen and after fine-tuning, where the head starts from a fit.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from embedding import load_text_encoder
from images import DAMAGE, coffee_leaves, efficientnet, split_ranks, without_twins
from PIL import Image
from protocol import Setting, evaluate
from sklearn.linear_model import LogisticRegressionCV
from torch import Tensor, nn

import ordinal_prompt as op

EPOCHS, BATCH_SIZE, BACKBONE_RATE, HEAD_RATE = 8, 16, 1e-4, 1e-3
WIDTH, CONTEXT = 1280, "a coffee leaf with"


def linear(_: Tensor, __: Tensor) -> Any:
    """From random weights."""
    return nn.Linear(WIDTH, len(DAMAGE))


def linear_fitted(x: Tensor, y: Tensor) -> Any:
    """From scikit-learn's penalised logistic regression (linear probing, then fine-tuning: Kumar et al., ICLR 2022)."""
    folds: Any = {"cv": min(5, int(y.bincount().min())), "scoring": "neg_log_loss", "use_legacy_attributes": False}
    fitted, layer = LogisticRegressionCV(Cs=7, max_iter=2000, **folds).fit(x.numpy(), y.numpy()), linear(x, y)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(fitted.coef_))
        layer.bias.copy_(torch.from_numpy(fitted.intercept_))
    return layer


def prompts(**options: Any) -> op.OrdinalPromptHead:
    model, tokenizer = load_text_encoder("minilm")
    return op.OrdinalPromptHead(model, DAMAGE, tokenizer=tokenizer, context=CONTEXT, in_features=WIDTH, **options)


def paper(_: Tensor, __: Tensor) -> Any:
    """The paper's settings, the projection from random weights."""
    return prompts()


def ours_fitted(x: Tensor, y: Tensor) -> Any:
    """Our recipe, from `op.fit_head`."""
    return op.fit_head(prompts(**op.recipe(DAMAGE, prompts="fitted"), normalize=False), x, y)


def ours_exported(x: Tensor, y: Tensor) -> Any:
    """The same fit as the one linear layer that it exports."""
    return ours_fitted(x, y).export()


HEADS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "linear": linear,
    "linear-fitted": linear_fitted,
    "paper": paper,
    "ours-fitted": ours_fitted,
    "ours-fitted-exported": ours_exported,
}


def features(network: Any, images: Tensor) -> Tensor:
    """(N, WIDTH) of images (N, 3, H, W)."""
    rows: Tensor = network.extract_features(images).mean(dim=(2, 3))
    return rows


def batches(number: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(EPOCHS):
        yield from torch.randperm(number, generator=generator).split(BATCH_SIZE)


def judge(network: Any, head: Any, images: Tensor, labels: Tensor) -> dict[str, float]:
    """MAE of expectation and median."""
    with torch.no_grad():
        logits = torch.cat([head.eval()(features(network, batch)) for batch in images.split(64)])
    found = evaluate(logits.softmax(dim=1), labels, torch.arange(float(len(DAMAGE))))
    return {"expectation": found["mae"], "median": found["mae_median"]}


def fine_tune(network: Any, head: Any, images: Tensor, labels: Tensor, seed: int) -> None:
    """Trains network and head, the batch norms in eval mode."""
    ours = isinstance(head, op.OrdinalPromptHead)
    groups: Any = op.parameter_groups(head, HEAD_RATE) if ours else [{"params": head.parameters(), "lr": HEAD_RATE}]
    optimizer = torch.optim.AdamW([*groups, {"params": network.parameters(), "lr": BACKBONE_RATE}])
    loss = head.loss() if ours else nn.CrossEntropyLoss()
    head.train()
    for batch in batches(len(images), torch.Generator().manual_seed(seed)):
        optimizer.zero_grad()
        loss(head(features(network, images[batch])), labels[batch]).backward()
        optimizer.step()


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the coffee leaves")
    parser.add_argument("--shots", default="16", help="training photographs per grade")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=[*HEADS])
    options = parser.parse_args()
    pretrained, transform = efficientnet()
    pictures = [*without_twins(coffee_leaves(options.folder)).values()]
    ranks = torch.tensor([rank for _, rank in pictures])
    parts = split_ranks(ranks, len(DAMAGE))

    def read(rows: Tensor) -> tuple[Tensor, Tensor]:
        images = [transform(Image.open(pictures[row][0]).convert("RGB")) for row in rows.tolist()]
        return torch.stack(images), ranks[rows]

    test = read(torch.tensor(parts["test"]))
    found = []
    for seed in options.seeds:
        chosen = Setting.parse(options.shots).indices(ranks[parts["train"]], seed)
        images, labels = read(torch.tensor(parts["train"])[chosen])
        with torch.no_grad():
            x = torch.cat([features(pretrained, batch) for batch in images.split(64)])
        for name in options.heads:
            torch.manual_seed(seed)
            network, head = copy.deepcopy(pretrained), HEADS[name](x, labels)
            before = judge(network, head, *test) if "fitted" in name else {}
            fine_tune(network, head, images, labels, seed)
            after = judge(network, head, *test)
            frozen = {f"frozen, {rule}": error for rule, error in before.items()}
            found.append({"head": name, "seed": seed, **frozen, **{f"tuned, {rule}": e for rule, e in after.items()}})
            print(found[-1], flush=True)
    table = pd.DataFrame(found).drop(columns="seed").groupby("head", sort=False)
    print(table.mean().round(3).to_string(na_rep=""), table.std().round(3).to_string(na_rep=""), sep="\n")


if __name__ == "__main__":
    main()
