"""What a head costs on 64 cached features beside a plain linear layer: the forward pass in eval mode, and a training
step (forward, backward and AdamW), in microseconds; K = 101, D = 512, ViT-B/32-sized text encoder.

    python benchmarks/speed/forward.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence

import open_clip
import torch
from encoder import text_encoder
from timing import side_by_side
from torch import nn
from training_step import heads, step

import ordinal_prompt as op

FEATURES = 64


def evaluations(clip: open_clip.CLIP, ranks: int) -> dict[str, Callable[[], object]]:
    """Forward passes in eval mode and without gradients."""
    head = op.OrdinalPromptHead(clip, ranks).eval()
    recipe = op.OrdinalPromptHead(clip, ranks, **op.recipe(ranks)).eval()
    layers: dict[str, nn.Module] = {
        "nn.Linear": nn.Linear(head.in_features, ranks),
        "PrototypeLinear": head.export_prototypes(),
        "head, paper": head,
        "head, recipe": recipe,
    }
    features = torch.randn(FEATURES, head.in_features)

    def forward(layer: nn.Module) -> Callable[[], object]:
        return torch.no_grad()(lambda: layer(features))

    return {name: forward(layer) for name, layer in layers.items()}


def training_steps(clip: open_clip.CLIP, ranks: int) -> dict[str, Callable[[], object]]:
    """Training steps with frozen prompts; the features take gradients, as behind a backbone."""
    labels = torch.arange(FEATURES) % ranks
    return {
        name: step(head, torch.randn(FEATURES, clip.text_projection.shape[1], requires_grad=True), labels)
        for name, head in heads(clip, ranks).items()
        if "learned" not in name
    }


def report(title: str, ways: Mapping[str, Callable[[], object]], repeats: int, calls: int) -> list[str]:
    """One line for each way; ratios are to the first."""
    least = {name: min(seconds) for name, seconds in side_by_side(ways, repeats, calls).items()}
    first = next(iter(least))
    lines = [f"{title:<25}{'microseconds':>13}{f'ratio to {first}':>20}"]
    return lines + [
        f"{name:<25}{1e6 * seconds:>13.1f}{seconds / least[first]:>20.2f}" for name, seconds in least.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time a head on cached features.")
    parser.add_argument("--repeats", type=int, default=20, help="timed repeats; the least time counts")
    parser.add_argument("--calls", type=int, default=100, help="calls in each repeat")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    clip = text_encoder()
    print(*report("forward, eval mode", evaluations(clip, 101), args.repeats, args.calls), "", sep="\n")
    print(*report("training step", training_steps(clip, 101), args.repeats, args.calls), sep="\n")


if __name__ == "__main__":
    main()
