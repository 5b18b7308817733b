"""What a training step costs beside one with a linear head: forward, backward and AdamW, K = 101, ViT-B/32-sized text
encoder.

`alone` times the head on 64 cached features; `ResNet-18` the whole model on 32 images of 224 × 224, everything trained.
With prompts frozen (`head.prompt.requires_grad_(False)`) the prototypes are computed once.  The recipe learns a map of
D × D values besides.

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
    found: dict[str, nn.Module] = {"linear": nn.Linear(in_features or 512, RANKS)}
    for settings, options in (("paper", {}), ("recipe", op.recipe(RANKS))):
        for prompts in ("frozen", "learned"):
            head = op.OrdinalPromptHead(clip, RANKS, in_features=in_features, **options)
            head.prompt.requires_grad_(prompts == "learned")
            found[f"{settings}, prompts {prompts}"] = head
    return found


def step(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    loss = op.OrdinalPromptLoss()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A head with nothing to learn still hands gradients to what is in front of it.
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None

    def run() -> None:
        loss(model(inputs), labels).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats; the least time counts")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    print(f"{'model':<12}{'head':<25}{'ms':>9}{'head/linear':>13}")
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
            print(f"{model:<12}{name:<25}{1000 * seconds:>9.2f}{seconds / least['linear']:>13.2f}", flush=True)


if __name__ == "__main__":
    main()
