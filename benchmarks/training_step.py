"""What a training step costs beside one with a linear head: forward and backward, K = 101, ViT-B/32-sized text encoder.

`alone` times the head on 64 cached features; `ResNet-18` the whole model on 32 images of 224 × 224, everything trained.
With prompts frozen (`head.prompt.requires_grad_(False)`) the prototypes are computed once.

    python benchmarks/training_step.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torchvision
from text_pass import build
from torch import nn

import ordinal_prompt as op

RANKS = 101


def heads(in_features: int | None) -> dict[str, nn.Module]:
    clip, _ = build(RANKS)
    frozen, learned = (op.OrdinalPromptHead(clip, RANKS, in_features=in_features) for _ in range(2))
    frozen.prompt.requires_grad_(False)
    return {"linear": nn.Linear(in_features or 512, RANKS), "prompts frozen": frozen, "prompts learned": learned}


def step(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    loss = op.OrdinalPromptLoss()

    def run() -> None:
        model.zero_grad()
        loss(model(inputs), labels).backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats; the least time counts")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    print(f"{'model':<12}{'head':<17}{'ms':>9}{'head/linear':>13}")
    features, images = torch.randn(64, 512, requires_grad=True), torch.randn(32, 3, 224, 224)
    steps = {
        "alone": {name: step(head, features, torch.arange(64)) for name, head in heads(None).items()},
        "ResNet-18": {
            name: step(op.replace_head(torchvision.models.resnet18(), head), images, torch.arange(32))
            for name, head in heads(512).items()
        },
    }
    for model, runs in steps.items():
        least = dict.fromkeys(runs, float("inf"))
        for _ in range(arguments.repeats + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                least[name] = min(least[name], time.perf_counter() - start)
        for name, seconds in least.items():
            print(f"{model:<12}{name:<17}{1000 * seconds:>9.2f}{seconds / least['linear']:>13.2f}", flush=True)


if __name__ == "__main__":
    main()
