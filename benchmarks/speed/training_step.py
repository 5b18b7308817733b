"""What a training step costs beside one with a linear head: forward, backward and AdamW of a whole model on 32 images
of 224 × 224, everything trained; K = 101, ViT-B/32-sized text encoder.

With frozen prompts the prototypes are computed once.  The recipe also learns a map of D × D values.

    python benchmarks/speed/training_step.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import open_clip
import torch
import torchvision
from encoder import text_encoder
from timing import side_by_side
from torch import Tensor, nn

import ordinal_prompt as op


def heads(clip: open_clip.CLIP, ranks: int, in_features: int | None = None) -> dict[str, nn.Module]:
    """A linear head, and prompt heads with both settings, frozen and learned.

    Args:
        in_features: width of the features; None is that of the text encoder.
    """
    found: dict[str, nn.Module] = {}
    for settings, options in (("paper", {}), ("recipe", op.recipe(ranks))):
        for prompts in ("frozen", "learned"):
            head = op.OrdinalPromptHead(clip, ranks, in_features=in_features, **options)
            head.prompt.requires_grad_(prompts == "learned")
            found[f"{settings}, prompts {prompts}"] = head
    return {"linear": nn.Linear(head.in_features, ranks), **found}


def step(model: nn.Module, inputs: Tensor, labels: Tensor) -> Callable[[], None]:
    """One training step."""
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time training steps of a ResNet-18.")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats; the least time counts")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    images, labels = torch.randn(32, 3, 224, 224), torch.arange(32)
    steps = {
        name: step(op.replace_head(torchvision.models.resnet18(), head), images, labels)
        for name, head in heads(text_encoder(), 101, in_features=512).items()
    }
    least = {name: min(seconds) for name, seconds in side_by_side(steps, args.repeats).items()}
    print(f"{'head':<25}{'ms':>9}{'head/linear':>13}")
    for name, seconds in least.items():
        print(f"{name:<25}{1000 * seconds:>9.2f}{seconds / least['linear']:>13.2f}")


if __name__ == "__main__":
    main()
