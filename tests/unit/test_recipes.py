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
    assert [tuple(p.shape) for p in (head.alignment, head.residual, head.residual_bias)] == [
        (12, 12), (4, 12), (4,)
    ]  # fmt: skip
    features = torch.randn(5, 12)
    torch.testing.assert_close(head(features), 0.3 * plain(features))  # the alignment and the residual start at zero


def test_without_a_scale_of_its_own_it_is_ten_over_the_spread(clip: Any, tokenizer: Any) -> None:
    tower = copy.copy(clip)
    tower._parameters = {name: value for name, value in clip._parameters.items() if name != "logit_scale"}
    head = build(tower, tokenizer)
    prototypes = head.eval().prototypes()
    spread = (prototypes - prototypes.mean(0)).norm(dim=1).square().mean().sqrt()
    assert head.logit_scale.exp().item() == pytest.approx(0.3 * 10 / spread.item(), rel=1e-4)
    assert head.logit_scale.requires_grad
    plain = op.OrdinalPromptHead(tower, NAMES, tokenizer=tokenizer, interpolation=None)
    assert not plain.logit_scale.requires_grad
    spread = (plain.eval().prototypes() - plain.prototypes().mean(0)).norm(dim=1).square().mean().sqrt()
    assert plain.logit_scale.exp().item() == pytest.approx(10 / spread.item(), rel=1e-4)
    assert build(tower, tokenizer, logit_scale=1.0).logit_scale == 1


def learned(head: op.OrdinalPromptHead) -> op.OrdinalPromptHead:
    with torch.no_grad():
        for parameter in (head.alignment, head.residual, head.residual_bias):
            parameter.normal_()
    return head


@pytest.mark.parametrize(
    "options", [{}, {"in_features": 7}, {"normalize": False}, {"in_features": 7, "normalize": False}]
)
@pytest.mark.parametrize("parts", [{}, {"residual": 0.0}, {"alignment": 0.0}])
def test_alignment_and_residual_are_exported(
    options: dict[str, Any], parts: dict[str, float], clip: Any, tokenizer: Any
) -> None:
    settings = {**op.recipe(NAMES), **parts, **options}
    head = op.OrdinalPromptHead(clip, NAMES, tokenizer=tokenizer, **settings)
    untrained = head.export()
    with torch.no_grad():
        for parameter in (head.alignment, head.residual, head.residual_bias):
            if parameter is not None:
                parameter.normal_()
    features = torch.randn(5, head.in_features)
    expected = head(features).detach()
    torch.testing.assert_close(head.export()(features), expected, rtol=1e-4, atol=1e-4)
    assert (untrained(features) - expected).abs().max() > 0.1
    if "in_features" not in options:
        layer = head.export_prototypes()
        torch.testing.assert_close(layer(features), expected, rtol=1e-4, atol=1e-4)
        assert (layer.bias is None) == (head.residual is None)
        assert head.export_prototypes(bias=True).bias.shape == (4,)
        unit = nn.functional.normalize(features, dim=1) if head.normalize else features
        aligned = unit if head.alignment is None else unit @ (torch.eye(12) + 0.05 * head.alignment).T
        by_hand = aligned @ head.prototypes().T * head.logit_scale.exp()
        if head.residual is not None:
            by_hand = by_hand + 5 * nn.functional.linear(unit, head.residual, head.residual_bias)
        torch.testing.assert_close(expected, by_hand, rtol=1e-4, atol=1e-4)


def test_alignment_and_residual_are_saved(clip: Any, tokenizer: Any, tmp_path: Any) -> None:
    head = learned(build(clip, tokenizer)).eval()
    head.save_pretrained(tmp_path)
    features = torch.randn(3, 12)
    loaded = op.OrdinalPromptHead.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(features), head(features))
    torch.testing.assert_close(loaded.half().float()(features), head(features), rtol=0.05, atol=0.5)
    torch.testing.assert_close(copy.deepcopy(head)(features), head(features))


@pytest.mark.parametrize("name", ["logit_scale", "alignment", "residual", "residual_bias"])
def test_what_is_not_finite_is_not_exported(name: str, clip: Any, tokenizer: Any) -> None:
    head = build(clip, tokenizer)
    with torch.no_grad():
        head.get_parameter(name).fill_(torch.nan)
    with pytest.raises(ValueError, match=f"{name} has values that are not finite"):
        head.export()


def test_prompts_learn_more_slowly(clip: Any, tokenizer: Any) -> None:
    head = build(clip, tokenizer)
    model = nn.Sequential(nn.Linear(3, 12), head)
    rest, prompts, offsets = op.parameter_groups(model, lr=1e-3)
    assert (rest["lr"], prompts["lr"], prompts["weight_decay"]) == (1e-3, pytest.approx(5e-5), 0)
    assert (offsets["lr"], offsets["weight_decay"]) == (pytest.approx(1e-2), 0)
    assert {id(p) for p in prompts["params"]} == {id(p) for p in head.prompt.parameters()}
    assert {id(p) for p in offsets["params"]} == {id(head.logit_scale), id(head.residual_bias)}
    free = (*model[0].parameters(), head.alignment, head.residual)
    assert {id(p) for p in rest["params"]} == {id(p) for p in free}
    head.prompt.requires_grad_(False)
    assert len(op.parameter_groups(model, lr=1e-3)) == 2
    torch.optim.AdamW(op.parameter_groups(model, lr=1e-3)).step()
    paper = op.OrdinalPromptHead(clip, 5)
    assert [group["lr"] for group in op.parameter_groups(paper, lr=1e-3)] == [pytest.approx(5e-5)]


def test_a_step_of_the_projection_is_one_of_a_linear_layer(clip: Any, tokenizer: Any) -> None:
    options: dict[str, Any] = {**op.recipe(NAMES, prompts="fitted"), "in_features": 7, "normalize": False}
    head = op.OrdinalPromptHead(clip, NAMES, tokenizer=tokenizer, context="it is {}", **options)
    groups = {id(p): group["lr"] for group in op.parameter_groups(head, lr=1e-3) for p in group["params"]}
    assert head.projection is not None
    features, before = torch.rand(1, 7), head(torch.zeros(1, 7))
    logits = head(features).detach()
    with torch.no_grad():
        head.projection.weight += groups[id(head.projection.weight)]  # a step of Adam, all of one sign
    moved = (head(features) - logits).abs().mean()
    assert moved <= 1e-3 * features.sum() * 1.01  # what a linear layer at this rate moves at most
    assert groups[id(head.residual)] == 1e-3
    assert before.isfinite().all()
    normalizing = op.OrdinalPromptHead(clip, 5, in_features=7)
    assert [group["lr"] for group in op.parameter_groups(normalizing, lr=1e-3)] == [1e-3, pytest.approx(5e-5)]


def test_names_are_trusted_as_far_as_features_agree(clip: Any, tokenizer: Any) -> None:
    """The learned weight of the names grows on features beside their prototypes, and shrinks on others."""
    grown = []
    for agree in (True, False):
        torch.manual_seed(0)
        head = build(clip, tokenizer)
        head.prompt.requires_grad_(False)
        labels = torch.arange(200) % 4
        features = head.prototypes()[labels if agree else 3 - labels] + 0.1 * torch.randn(200, 12)
        before = head.logit_scale.item()
        optimizer = torch.optim.Adam(op.parameter_groups(head, lr=3e-3))
        for _ in range(10):
            loss = op.OrdinalPromptLoss(kl_weight=0)(head(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        grown.append(head.logit_scale.item() - before)
    assert grown[0] > 0.1
    assert grown[1] < -0.1


def test_mistakes(clip: Any) -> None:
    with pytest.raises(ValueError, match="OrdinalPromptHead in it, but Linear has none"):
        op.parameter_groups(nn.Linear(2, 2), lr=1)
    with pytest.raises(ValueError, match="`alignment` to be from 0 to 10000, but got -1"):
        op.OrdinalPromptHead(clip, 5, alignment=-1)
    with pytest.raises(ValueError, match="`residual` to be from 0"):
        op.OrdinalPromptHead(clip, 5, residual=float("nan"))
    with pytest.raises(ValueError, match="`confidence` to be above 0 to 10000"):
        op.OrdinalPromptHead(clip, 5, confidence=0)
    with pytest.raises(TypeError, match="`confidence` to be a number, but got '0.3'"):
        op.OrdinalPromptHead(clip, 5, confidence="0.3")


def test_groups_hold_every_parameter_once(clip: Any, tokenizer: Any) -> None:
    """Also with two heads, parts that they share, and a text encoder that trains."""
    first, second = build(clip, tokenizer, freeze_text_encoder=False), build(clip, tokenizer, in_features=7)
    second.prompt, second.residual_bias = first.prompt, first.residual_bias
    model = nn.ModuleList([first, second, nn.Linear(2, 2)])
    groups = op.parameter_groups(model, lr=1.0, prompt_lr_scale=0.5, scale_lr_scale=2.0)
    assert [group["lr"] for group in groups] == [1.0, 0.5, 2.0]
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(groups[2]["params"]) == 3


def test_a_scale_that_runs_away_stays_finite(clip: Any, tokenizer: Any) -> None:
    head = build(clip, tokenizer)
    with torch.no_grad():
        head.logit_scale.fill_(100.0)
    features = torch.randn(3, 12)
    assert head(features).isfinite().all()
    torch.testing.assert_close(head.export()(features), head(features).detach())
    with torch.no_grad():
        head.alignment.fill_(3e38)  # finite, but the weight is not
    with pytest.raises(ValueError, match="weight has values that are not finite"):
        head.export()


def test_a_frozen_head_still_learns_its_scale_after_loading(clip: Any, tokenizer: Any, tmp_path: Any) -> None:
    build(clip, tokenizer).requires_grad_(False).save_pretrained(tmp_path)
    assert op.OrdinalPromptHead.from_pretrained(tmp_path, clip).logit_scale.requires_grad


def test_groups_of_heads_that_share_a_projection_or_have_no_data(clip: Any, tmp_path: Any) -> None:
    options: dict[str, Any] = {"in_features": 7, "normalize": False}
    first, second = (op.OrdinalPromptHead(clip, 5, context=4, **options) for _ in range(2))
    second.projection = first.projection
    torch.optim.AdamW(op.parameter_groups(nn.ModuleList([first, second]), lr=1e-3))
    meta = op.OrdinalPromptHead(clip, 5, context=4, device="meta", **options)
    assert [group["lr"] for group in op.parameter_groups(meta, lr=1e-3)] == [pytest.approx(5e-5), 1e-3]
    first.save_pretrained(tmp_path)
    alone = op.OrdinalPromptHead.from_pretrained(tmp_path, text_encoder=False)
    assert alone.projection is not None
    alone.projection.requires_grad_(True)
    assert op.parameter_groups(alone, lr=1e-3)
