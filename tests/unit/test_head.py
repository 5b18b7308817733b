"""The head as a module: logits, reuse of prototypes, precision, and what PyTorch does to modules."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import tiny_clip
from torch import nn
from torch.nn import functional as F

import ordinal_prompt as op


def count_text_passes(head: op.OrdinalPromptHead) -> Any:
    return patch.object(head.text_encoder, "encode", wraps=head.text_encoder.encode)


def test_logits_are_scaled_cosines(head: op.OrdinalPromptHead) -> None:
    features = torch.randn(2, 3, 12)
    cosines = F.cosine_similarity(features[..., None, :], head.prototypes(), dim=-1)
    torch.testing.assert_close(head(features), head.logit_scale.exp() * cosines)
    assert head.logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_projection_and_bare_features(clip: Any) -> None:
    head = op.OrdinalPromptHead(clip, 5, in_features=7, normalize=False, logit_scale=math.log(2))
    features = torch.randn(3, 7)
    torch.testing.assert_close(head(features), 2 * head.projection(features) @ head.prototypes().T)
    assert (head.in_features, head.embed_dim, head.num_ranks) == (7, 12, 5)


def test_prototypes_are_computed_anew_while_they_are_learned(head: op.OrdinalPromptHead) -> None:
    with count_text_passes(head) as encode:
        for _ in range(3):
            head(torch.randn(2, 12)).sum().backward()
        assert encode.call_count == 3


def test_prototypes_are_computed_once_where_nothing_is_learned(head: op.OrdinalPromptHead) -> None:
    with count_text_passes(head) as encode:
        head.eval()
        for _ in range(3):
            head(torch.randn(2, 12))
        head.train()
        with torch.no_grad():
            head(torch.randn(2, 12))
        head.prompt.requires_grad_(False)
        head(torch.randn(2, 12))
        assert encode.call_count == 1


def test_prototypes_of_inference_mode_serve_training(clip: Any) -> None:
    head = op.OrdinalPromptHead(clip, 5, in_features=7).eval()
    head.prompt.requires_grad_(False)
    with torch.inference_mode():
        expected = head(torch.ones(2, 7))
    logits = head.train()(torch.ones(2, 7))
    logits.sum().backward()
    assert torch.equal(logits, expected)
    assert head.projection.weight.grad is not None


@pytest.mark.parametrize("change", ["in place", "data", "optimizer", "load"])
def test_a_changed_parameter_gives_new_prototypes(change: str, head: op.OrdinalPromptHead) -> None:
    before = head.eval().prototypes()
    parameter = head.prompt.rank_embeddings
    if change == "in place":
        with torch.no_grad():
            parameter.normal_()
    elif change == "data":
        parameter.data.normal_()
    elif change == "optimizer":
        parameter.grad = torch.randn_like(parameter)
        torch.optim.SGD([parameter], lr=1).step()
    else:
        head.load_state_dict(
            {
                name: value if name == "rank_values" else torch.randn_like(value)
                for name, value in head.state_dict().items()
            }
        )
    assert (head.prototypes() - before).abs().max() > 1e-3


def test_gradients_reach_prompts_projection_and_features(clip: Any) -> None:
    head = op.OrdinalPromptHead(clip, 5, in_features=7, learn_logit_scale=True)
    features = torch.randn(6, 7, requires_grad=True)
    op.OrdinalPromptLoss()(head(features), torch.randint(5, (6,))).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert features.grad.abs().max() > 0


def test_a_frozen_text_encoder_stays_frozen(head: op.OrdinalPromptHead) -> None:
    head.train()
    assert not head.text_encoder.training
    assert not any(parameter.requires_grad for parameter in head.text_encoder.parameters())
    assert {name for name, p in head.named_parameters() if p.requires_grad} == {
        "prompt.context_embeddings",
        "prompt.rank_embeddings",
    }
    nn.Sequential(head).train()
    assert not head.text_encoder.training


def test_an_unfrozen_text_encoder_is_the_callers_and_learns() -> None:
    clip = tiny_clip()
    head = op.OrdinalPromptHead(clip, 5, freeze_text_encoder=False).train()
    head(torch.randn(3, 12)).sum().backward()
    assert clip.ln_final.weight.grad is not None
    assert any(name.startswith("text_encoder.") for name in head.state_dict())
    before = head.eval().prototypes()
    with torch.no_grad():
        clip.ln_final.weight.mul_(-1)
    assert (head.prototypes() - before).abs().max() > 1e-3


def test_dropout_of_a_trainable_text_encoder_is_not_kept() -> None:
    clip = tiny_clip()
    clip.transformer.resblocks[0].mlp.append(nn.Dropout(0.5))
    head = op.OrdinalPromptHead(clip.train(), 5, freeze_text_encoder=False).train()
    assert not torch.equal(head.prototypes(), head.prototypes())
    with torch.no_grad():
        kept = head.prototypes()
    assert clip.transformer.resblocks[0].mlp[-1].training
    assert torch.equal(head.eval().prototypes(), kept)


def test_state_dict_holds_what_was_learned(head: op.OrdinalPromptHead, clip: Any) -> None:
    assert set(head.state_dict()) == {
        "logit_scale",
        "prompt.context_embeddings",
        "prompt.rank_embeddings",
        "rank_values",
    }
    other = op.OrdinalPromptHead(clip, 5, context=4)
    assert (other.eval().prototypes() - head.eval().prototypes()).abs().max() > 1e-4
    other.load_state_dict(head.state_dict(), strict=True)
    assert torch.equal(other.prototypes(), head.prototypes())
    model = nn.Sequential(nn.Linear(3, 12), head)
    model.load_state_dict(model.state_dict(), strict=True)


def test_checkpoint_of_a_large_head_is_small() -> None:
    head = op.OrdinalPromptHead(tiny_clip(embed_dim=512, width=512, heads=8), 101)
    assert sum(value.numel() * value.element_size() for value in head.state_dict().values()) < 100_000


def test_deepcopy_and_pickle(head: op.OrdinalPromptHead) -> None:
    features = torch.randn(2, 12)
    expected = head.eval()(features)
    for again in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(again(features), expected)
        with torch.no_grad():
            again.prompt.rank_embeddings.normal_()
        assert not torch.equal(again(features), expected)
    assert torch.equal(head(features), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype, head: op.OrdinalPromptHead) -> None:
    features = torch.randn(6, 12)
    expected = head(features).detach()
    head.to(dtype)
    logits = head(features.to(dtype))
    assert logits.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.3 if dtype.itemsize == 2 else 1e-4)
    op.OrdinalPromptLoss()(logits, torch.randint(5, (6,))).backward()
    assert head.prompt.rank_embeddings.grad.isfinite().all()
    assert head.prompt.rank_embeddings.dtype == dtype
    assert head.predict(features.to(dtype)).isfinite().all()


@pytest.mark.parametrize("interpolation", ["linear", "inv_prop", "normal", "piecewise"])
def test_interpolations_in_half_precision(interpolation: str, clip: Any) -> None:
    head = op.OrdinalPromptHead(clip, 101, interpolation=interpolation).half()
    assert head.prototypes().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_float32_under_autocast(dtype: torch.dtype, clip: Any) -> None:
    head = op.OrdinalPromptHead(clip, 5, in_features=7)
    features = torch.randn(6, 7)
    with torch.autocast("cpu", dtype=dtype):
        logits = head(features)
        loss = op.OrdinalPromptLoss()(logits, torch.randint(5, (6,)))
    assert logits.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(logits, head(features), rtol=0, atol=0.5)
    loss.backward()
    with torch.autocast("cpu", dtype=dtype):
        under = head.eval().prototypes()
    assert torch.equal(under, head.prototypes())


def test_features_of_another_precision_than_the_head(head: op.OrdinalPromptHead, clip: Any) -> None:
    assert head(torch.randn(2, 12, dtype=torch.bfloat16)).dtype == torch.float32
    projected = op.OrdinalPromptHead(clip, 5, in_features=7)
    assert projected(torch.randn(2, 7, dtype=torch.bfloat16)).dtype == torch.float32


def test_dtype_of_a_double_text_encoder() -> None:
    head = op.OrdinalPromptHead(tiny_clip().double(), 5)
    assert head.prompt.context_embeddings.dtype == torch.float64
    assert head(torch.randn(2, 12)).dtype == torch.float64


def test_a_half_precision_text_encoder_keeps_learnables_in_float32() -> None:
    head = op.OrdinalPromptHead(tiny_clip().bfloat16(), 5)
    assert head.prompt.context_embeddings.dtype == torch.float32
    head(torch.randn(2, 12)).sum().backward()
    assert head.prompt.context_embeddings.grad.isfinite().all()


def test_device(clip: Any) -> None:
    head = op.OrdinalPromptHead(clip, 5, device="meta")
    assert all(tensor.is_meta for tensor in (*head.parameters(), *head.buffers(), *head.text_encoder.parameters()))
    assert clip.ln_final.weight.device.type == "cpu"


@pytest.mark.slow
def test_compile(clip: Any) -> None:
    head = op.OrdinalPromptHead(clip, 5, in_features=7)
    compiled = torch.compile(head, backend="eager")
    features = torch.randn(2, 7)
    torch.testing.assert_close(compiled(features), head(features))
    compiled(features).sum().backward()
    assert head.prompt.rank_embeddings.grad is not None
    head.eval()
    torch.testing.assert_close(compiled(features), head(features))
    with torch.no_grad():
        head.prompt.rank_embeddings.normal_()
    torch.testing.assert_close(compiled(features), head(features))


def test_predictions_are_in_the_units_of_rank_values(clip: Any) -> None:
    head = op.OrdinalPromptHead(clip, 4, rank_values=[1930, 1940, 1950, 1960]).eval()
    features = torch.randn(5, 12)
    probabilities = head.predict_proba(features)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(5))
    torch.testing.assert_close(head.predict(features), probabilities @ torch.tensor([1930.0, 1940, 1950, 1960]))
    for rule in ("argmax", "median"):
        assert set(head.predict(features, rule).tolist()) <= {1930, 1940, 1950, 1960}
    head.bfloat16()
    assert head.rank_values.tolist() == [1930, 1940, 1950, 1960]


def test_a_logit_scale_of_the_model_may_have_a_dimension() -> None:
    clip = tiny_clip()
    clip.logit_scale = nn.Parameter(torch.tensor([3.0]))
    head = op.OrdinalPromptHead(clip, 5)
    assert head.logit_scale.shape == (1,)
    assert head.logit_scale.item() == 3


def test_a_head_learns() -> None:
    torch.manual_seed(3)
    head = op.OrdinalPromptHead(tiny_clip(), 5, context=4, in_features=6)
    features, labels = torch.randn(40, 6), torch.randint(5, (40,))
    features[:, 0] = labels - 2.0
    optimizer, loss = torch.optim.AdamW(head.parameters(), lr=0.01), op.OrdinalPromptLoss()
    first = loss(head(features), labels).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss(head(features), labels).backward()
        optimizer.step()
    assert loss(head(features), labels).item() < 0.6 * first
    assert (head.eval().predict(features) - labels).abs().mean() < 0.6


def test_training_in_eval_mode_is_told(head: op.OrdinalPromptHead, clip: Any) -> None:
    features = torch.randn(3, 12, requires_grad=True)
    with pytest.warns(UserWarning, match=r"eval mode.*its prompts do not learn.*call head.train\(\)"):
        head.eval()(features).sum().backward()
    assert head.prompt.rank_embeddings.grad is None
    frozen = op.OrdinalPromptHead(clip, 5, learn_prompts=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head.train()(features).sum().backward()
        frozen.eval()(features).sum().backward()
        head.eval()(features)
        with torch.no_grad():
            head(features)
