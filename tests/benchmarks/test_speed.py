"""The speed benchmarks run, compare like with like, and print a ratio."""

from __future__ import annotations

import sys
from pathlib import Path

import open_clip
import pytest
import torch

pytest.importorskip("torchvision")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "speed"))

import encoder
import forward
import text_pass
import timing
import training_step

RANKS = 5


@pytest.fixture
def small() -> open_clip.CLIP:
    return encoder.text_encoder(width=16, heads=2, layers=2)


def test_ways_take_turns_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []
    seconds = timing.side_by_side({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2, calls=2)
    assert "".join(calls) == "aabb" * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_all_text_passes_give_the_same_prototypes_and_gradients(small: open_clip.CLIP) -> None:
    steps = text_pass.passes(small, RANKS)
    assert [*steps] == ["plain", "cut", "packed", "floor"]
    for way in ("cut", "packed"):
        torch.testing.assert_close(steps[way](), steps["plain"](), rtol=1e-4, atol=1e-6)


def test_the_text_pass_reports_every_way(small: open_clip.CLIP) -> None:
    lines = text_pass.report(small, RANKS, repeats=1, memory=False)
    assert [line.split()[1] for line in lines] == ["plain", "cut", "packed", "floor"]


def test_training_steps_change_what_is_not_frozen(small: open_clip.CLIP) -> None:
    heads = training_step.heads(small, RANKS)
    assert [*heads] == ["linear", *(f"{s}, prompts {p}" for s in ("paper", "recipe") for p in ("frozen", "learned"))]
    features, labels = torch.randn(8, 512, requires_grad=True), torch.arange(8) % RANKS
    for name, head in heads.items():
        before = {key: value.clone() for key, value in head.named_parameters()}
        training_step.step(head, features, labels)()
        changed = [key for key, value in head.named_parameters() if not torch.equal(value, before[key])]
        assert any(key.startswith("prompt") for key in changed) == ("learned" in name)
        assert bool(changed) == (name != "paper, prompts frozen")
        assert features.grad is not None


def test_the_forward_pass_is_reported_beside_a_linear_layer(small: open_clip.CLIP) -> None:
    ways = forward.evaluations(small, RANKS)
    torch.testing.assert_close(ways["PrototypeLinear"](), ways["head, paper"]())
    first, *lines = forward.report("forward", ways, repeats=1, calls=1)
    assert "ratio to nn.Linear" in first
    assert [line.split("  ")[0] for line in lines] == ["nn.Linear", "PrototypeLinear", "head, paper", "head, recipe"]
    steps = forward.training_steps(small, RANKS)
    assert [*steps] == ["linear", "paper, prompts frozen", "recipe, prompts frozen"]
    assert len(forward.report("step", steps, repeats=1, calls=1)) == 4
