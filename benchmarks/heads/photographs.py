"""Twenty-one ranks without names, and a network that is trained from scratch: do prompts pay there?

    python benchmarks/heads/photographs.py

Crops of photographs (scikit-image's and scikit-learn's), blurred more and more; training, validation and test show
different photographs.  A ResNet-10 and a head are trained together, with one schedule for all.  Every head is tried at
each learning rate with the first seed; the one with the lowest validation error of the expectation gets all seeds.
Prints the test MAE in ranks, expectation and median.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from embedding import load_text_encoder
from peers import HEADS
from PIL import Image, ImageFilter
from protocol import Head, evaluate
from task import PARTS, Task
from torch import Tensor

RANKS, STEP, SIDE = 21, 0.15, 48  # ranks, pixels of blur from one to the next, pixels of a crop
PHOTOS = {
    "train": "astronaut brick camera cat coffee flower.jpg gravel rocket",
    "val": "coins immunohistochemistry",
    "test": "china.jpg grass hubble_deep_field page",
}
BATCH_SIZE, WIDTH = 64, 512
CHOSEN = ("linear", "prompt-linear-projected", "ours-projected", "coop-projected", "coral", "corn")


def photo(name: str) -> Any:
    """One of scikit-image's, or, with an ending, of scikit-learn's."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    pixels = load_sample_image(name) if "." in name else getattr(data, name)()
    return Image.fromarray(pixels).convert("RGB")


def crops(part: str, number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, SIDE, SIDE) in -1…1 and their ranks, `number` of each rank, from all photographs of a part."""
    random, names = np.random.default_rng(seed), PHOTOS[part].split()
    images, labels = [], []
    for index, name in enumerate(names):
        for rank in range(RANKS):
            blurred = photo(name).filter(ImageFilter.GaussianBlur(STEP * rank))
            for _ in range(index, number, len(names)):
                x, y = (int(random.integers(side - SIDE)) for side in blurred.size)
                images.append(np.asarray(blurred.crop((x, y, x + SIDE, y + SIDE))))
                labels.append(rank)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor(labels)


def train(
    name: str, learning_rate: float, seed: int, epochs: int, task: Task, parts: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """Trains a network with a head; metrics of the validation and of the test part."""
    torch.manual_seed(seed)
    network: Any = timm.create_model("resnet10t", num_classes=0)
    head = HEADS[name](task)
    if not isinstance(head, Head):
        raise TypeError(f"{name} is fitted to features, and trains no network.")
    groups = [{"params": [*network.parameters()], "lr": learning_rate}, *head.groups(head.module, learning_rate)]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-2)
    images, labels = parts["train"]
    steps = epochs * -(-len(labels) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        network.train()
        head.module.train()
        for rows in torch.randperm(len(labels)).split(BATCH_SIZE):
            batch = images[rows]
            batch = batch.flip(3) if torch.rand(()) < 0.5 else batch
            optimizer.zero_grad()
            head.loss(head.module(network(batch)), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    head.module.eval()
    found = {}
    with torch.no_grad():
        for part in PARTS[1:]:
            images, labels = parts[part]
            output = torch.cat([head.module(network(batch)) for batch in images.split(256)])
            found[part] = evaluate(head.probabilities(output), labels, task.rank_values)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=CHOSEN, metavar="HEAD")
    parser.add_argument("--crops", type=int, default=42, help="of each rank, for training (default: 42)")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-3, 2e-3, 5e-3, 1e-2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args(arguments)
    parts = {part: crops(part, options.crops if part == "train" else 40, seed=0) for part in PARTS}
    labels = {part: ranks for part, (_, ranks) in parts.items()}
    none = {part: torch.zeros(0, WIDTH) for part in PARTS}  # features come from the network
    task = Task(
        "photographs", none, labels, torch.arange(float(RANKS)), None, "blur of the photo:",
        lambda: load_text_encoder("minilm"),
    )  # fmt: skip
    found = []
    for name in options.heads:
        tried = {lr: train(name, lr, options.seeds[0], options.epochs, task, parts) for lr in options.lr}
        rate = min(tried, key=lambda lr: tried[lr]["val"]["mae"])
        for seed in options.seeds:
            first = seed == options.seeds[0]
            test = (tried[rate] if first else train(name, rate, seed, options.epochs, task, parts))["test"]
            row = {"head": name, "lr": rate, "seed": seed}
            found.append({**row, "expectation": test["mae"], "median": test["mae_median"]})
            print(found[-1], flush=True)
    table = pd.DataFrame(found).drop(columns="seed").groupby("head", sort=False)
    print(table.mean().round(3).to_string(), table.std().round(3).to_string(), sep="\n")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning)
    main()
