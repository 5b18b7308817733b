"""The recommended settings, and what they are made of."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import ordinal_prompt as op

NAMES = ["bad", "fair", "good", "excellent"]


def build(clip: Any, tokenizer: Any, **options: Any) -> op.OrdinalPromptHead:
    return op.OrdinalPromptHead(
        clip, NAMES, tokenizer=tokenizer, context="a photo of {} quality", **op.recipe(NAMES), **options
    )


def test_a_head_starts_at_its_names(clip: Any, tokenizer: Any) -> None:
    head = build(clip, tokenizer).eval()
    plain = op.OrdinalPromptHead(
        clip, NAMES, tokenizer=tokenizer, context="a photo of {} quality", interpolation=None
    ).eval()
    assert torch.equal(head.prototypes(), plain.prototypes())
    assert head.alignment.shape == (12, 12)
    assert head.alignment.abs().max() == 0


def test_without_a_scale_of_its_own_it_is_ten_over_the_spread(clip: Any, tokenizer: Any) -> None:
    tower = copy.copy(clip)
    tower._parameters = {name: value for name, value in clip._parameters.items() if name != "logit_scale"}
    head = build(tower, tokenizer)
    prototypes = head.eval().prototypes()
    spread = (prototypes - prototypes.mean(0)).norm(dim=1).square().mean().sqrt()
    assert head.logit_scale.exp().item() == pytest.approx(10 / spread.item(), rel=1e-4)
    assert not head.logit_scale.requires_grad
    assert build(tower, tokenizer, logit_scale=1.0).logit_scale == 1


@pytest.mark.parametrize(
    "options", [{}, {"in_features": 7}, {"normalize": False}, {"in_features": 7, "normalize": False}]
)
def test_alignment_is_exported(options: dict[str, Any], clip: Any, tokenizer: Any) -> None:
    head = build(clip, tokenizer, **options)
    unaligned = head.export()
    with torch.no_grad():
        head.alignment.normal_()
    features = torch.randn(5, head.in_features)
    expected = head(features).detach()
    torch.testing.assert_close(head.export()(features), expected, rtol=1e-4, atol=1e-4)
    assert (unaligned(features) - expected).abs().max() > 0.1
    if "in_features" not in options:
        torch.testing.assert_close(head.export_prototypes()(features), expected, rtol=1e-4, atol=1e-4)
        unit = nn.functional.normalize(features, dim=1) if head.normalize else features
        by_hand = unit @ (torch.eye(12) + 0.05 * head.alignment).T @ head.prototypes().T * head.logit_scale.exp()
        torch.testing.assert_close(expected, by_hand, rtol=1e-4, atol=1e-4)


def test_alignment_is_saved(clip: Any, tokenizer: Any, tmp_path: Any) -> None:
    head = build(clip, tokenizer).eval()
    with torch.no_grad():
        head.alignment.normal_()
    head.save_pretrained(tmp_path)
    features = torch.randn(3, 12)
    torch.testing.assert_close(op.OrdinalPromptHead.from_pretrained(tmp_path)(features), head(features))


def test_prompts_learn_more_slowly(clip: Any, tokenizer: Any) -> None:
    head = build(clip, tokenizer)
    model = nn.Sequential(nn.Linear(3, 12), head)
    rest, prompts = op.parameter_groups(model, lr=1e-3)
    assert (rest["lr"], prompts["lr"], prompts["weight_decay"]) == (1e-3, pytest.approx(5e-5), 0)
    assert {id(p) for p in prompts["params"]} == {id(p) for p in head.prompt.parameters()}
    assert {id(p) for p in rest["params"]} == {id(p) for p in (*model[0].parameters(), head.alignment)}
    head.prompt.requires_grad_(False)
    assert len(op.parameter_groups(model, lr=1e-3)) == 1
    torch.optim.AdamW(op.parameter_groups(model, lr=1e-3)).step()


def test_mistakes(clip: Any) -> None:
    with pytest.raises(ValueError, match="OrdinalPromptHead in it, but Linear has none"):
        op.parameter_groups(nn.Linear(2, 2), lr=1)
    with pytest.raises(ValueError, match="`alignment` to be finite"):
        op.OrdinalPromptHead(clip, 5, alignment=-1)
