"""How cheap the text pass is: forward and backward of all rank prompts through a ViT-B/32-sized text encoder.

Four ways, interleaved in one run: `plain` encodes K prompts at the full context length, as the published code does;
`cut` ends them at the end of text; `packed` is the library's; `floor` is a bare product of matrices of the sizes that
the packed tokens must go through (linear layers, forward and gradient of the input).  Weights are random, which changes
no time.  Memory is what the process holds at its highest point above its start, measured in a process of its own.

    python benchmarks/speed/text_pass.py                    # K = 5, 101, 1000
    python benchmarks/speed/text_pass.py --ranks 101 --repeats 5
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import open_clip
import torch
from encoder import text_encoder
from timing import side_by_side
from torch import Tensor
from torch.nn import functional as F

import ordinal_prompt as op

PLAIN_MOST_RANKS = 101  # beyond, the plain pass needs tens of gigabytes


def dense(clip: open_clip.CLIP, head: op.OrdinalPromptHead, cut: bool) -> Tensor:
    """Prototypes, one sequence per rank."""
    prompts = head.prompt()
    x, _ = prompts.sequences(None if cut else 77)
    length = x.shape[1]
    x = clip.transformer(x + clip.positional_embedding[:length], attn_mask=clip.attn_mask[:length, :length])
    x = clip.ln_final(x)[torch.arange(len(x)), prompts.lengths + len(prompts.prefix) - 1]
    return F.normalize(x @ clip.text_projection, dim=-1)


def passes(clip: open_clip.CLIP, ranks: int) -> dict[str, Callable[[], Tensor]]:
    """Forward and backward of each way; they return the prototypes and the gradients, for comparison."""
    head = op.OrdinalPromptHead(clip, ranks, context=10)
    ways: dict[str, Callable[[], Tensor]] = {}
    if ranks <= PLAIN_MOST_RANKS:
        ways["plain"] = lambda: dense(clip, head, cut=False)
    ways["cut"] = lambda: dense(clip, head, cut=True)
    ways["packed"] = head.prototypes
    prompts = head.prompt()
    target = torch.randn(ranks, head.embed_dim)

    def step(way: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            head.zero_grad(set_to_none=True)
            prototypes = way()
            (prototypes * target).sum().backward()
            gradient = head.prompt.rank_embeddings.grad
            assert gradient is not None
            return torch.cat([prototypes.detach().flatten(), gradient.flatten()])

        return run

    steps = {name: step(way) for name, way in ways.items()}
    steps["floor"] = floor(clip, len(prompts.prefix) + ranks * prompts.suffixes.shape[1])
    return steps


def floor(clip: open_clip.CLIP, tokens: int) -> Callable[[], Tensor]:
    """The products of the text encoder's linear layers for `tokens` tokens: forward, and the gradient of the input."""
    width = clip.transformer.width
    inputs = {size: torch.randn(tokens, size) for size in (width, 3 * width, 4 * width)}
    weights = []
    for block in clip.transformer.resblocks:
        layers = (block.attn.in_proj_weight, block.attn.out_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight)
        weights += [weight.detach() for weight in layers]

    def run() -> Tensor:
        for weight in weights:
            inputs[weight.shape[1]] @ weight.T
        for weight in reversed(weights):
            inputs[weight.shape[0]] @ weight
        return inputs[width]

    return run


def peak_memory(ranks: int, way: str) -> float:
    """MiB above the start of a step; call it in a fresh process."""
    step = passes(text_encoder(), ranks)[way]
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """MiB of memory that the process holds (VmRSS), or held at its highest point (VmHWM); Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"Found no {field} in /proc/self/status.")


def report(clip: open_clip.CLIP, ranks: int, repeats: int, memory: bool) -> list[str]:
    """One line for each way."""
    steps = passes(clip, ranks)
    results = {name: step() for name, step in steps.items()}
    times = side_by_side(steps, repeats)
    least = {name: min(seconds) for name, seconds in times.items()}
    lines = []
    for name, seconds in least.items():
        ratio = f"{least['plain'] / seconds:.1f}" if "plain" in least else ""
        mebibytes, difference = "", ""
        if name != "floor":
            if memory:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    mebibytes = f"{process.submit(peak_memory, ranks, name).result():.0f}"
            difference = f"{(results[name] - results['cut']).abs().max() / results['cut'].abs().max():.1e}"
        lines.append(
            f"{ranks:>5}  {name:<7}{seconds:>9.3f}{statistics.median(times[name]):>9.3f}{ratio:>11}"
            f"{seconds / least['floor']:>11.2f}{mebibytes:>8}  {difference}"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time the text pass.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[5, 101, 1000], help="numbers of ranks K")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats of each way; the least time counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory, measured in separate processes")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    print(f"ViT-B/32-sized text encoder, 10 context tokens, float32, {args.threads} threads; forward + backward")
    print(f"{'K':>5}  {'way':<7}{'seconds':>9}{'median':>9}{'plain/way':>11}{'way/floor':>11}{'MiB':>8}  difference")
    for ranks in args.ranks:
        print(*report(text_encoder(), ranks, args.repeats, not args.no_memory), sep="\n", flush=True)


if __name__ == "__main__":
    main()
