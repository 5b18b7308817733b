"""Temperature, bias and priors, found again where they are known, and folded into exported layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

import ordinal_prompt as op


def samples(number: int, bias: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are too large by a factor and lack a bias, and labels."""
    generator = torch.Generator().manual_seed(0)
    right = 2 * torch.randn(number, len(bias), generator=generator)
    labels = torch.multinomial((right + bias).softmax(1), 1, generator=generator)[:, 0]
    return factor * right, labels


def test_temperature_and_bias_are_found_again() -> None:
    bias = torch.tensor([1.0, 0.0, 0.0, -1.0])
    logits, labels = samples(20000, bias, 3.0)
    found = op.calibrate(logits, labels)
    assert found.temperature == pytest.approx(3, abs=0.1)
    torch.testing.assert_close(torch.tensor(found.bias) - sum(found.bias) / 4, bias, atol=0.1, rtol=0)
    assert set(op.calibrate(logits, labels, bias=False).bias) == {0.0}


def test_the_optimum_is_that_of_scipy() -> None:
    logits, labels = samples(50, torch.zeros(3), 2.0)
    z, y = logits.double().numpy(), labels.numpy()

    def value(flat: Any) -> float:
        scaled = z / np.exp(flat[0]) + flat[1:]
        nll = np.log(np.exp(scaled).sum(1)) - scaled[np.arange(50), y]
        return float(nll.mean() + (flat**2).sum() / 100)

    expected = scipy.optimize.minimize(value, np.zeros(4), options={"gtol": 1e-9}).x
    found = op.calibrate(logits, labels)
    np.testing.assert_allclose([np.log(found.temperature), *found.bias], expected, atol=1e-4)


def test_samples_that_are_all_right_leave_a_finite_temperature() -> None:
    labels = torch.arange(40) % 4
    assert 0.01 < op.calibrate(10 * torch.eye(4)[labels], labels).temperature < 1


@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"in_features": 7}, {"residual": 1.0}])
def test_it_folds_into_exported_layers(options: dict[str, Any], clip: Any) -> None:
    head = op.OrdinalPromptHead(clip, 5, **options).eval()
    calibration = op.Calibration(1.7, (0.5, 0.0, -0.5, 1.0, 0.0))
    layers = head.export()
    features = torch.randn(6, head.in_features)
    before = layers(features)
    folded = calibration.fold(layers)
    torch.testing.assert_close(folded(features), calibration(before), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layers(features), before)
    with pytest.raises(TypeError, match="end in a linear one"):
        calibration.fold(nn.ReLU())


def test_em_finds_the_prior_of_another_place() -> None:
    generator = torch.Generator().manual_seed(0)
    prior = torch.tensor([0.6, 0.25, 0.1, 0.05])
    labels = torch.multinomial(prior, 20000, replacement=True, generator=generator)
    features = torch.eye(4)[labels] * 2 + torch.randn(20000, 4, generator=generator)
    logits = 2 * features  # the right posterior under a uniform prior, up to a constant
    found = op.adapt_prior(logits, [1, 1, 1, 1])
    torch.testing.assert_close(torch.tensor(found.bias).softmax(0), prior, atol=0.02, rtol=0)
    known = op.adapt_prior(logits, [2, 2, 2, 2], prior)
    torch.testing.assert_close(torch.tensor(known.bias).softmax(0), prior)
    before, after = ((z.argmax(1) == labels).float().mean() for z in (logits, found(logits)))
    assert after > before


def test_smoothed_estimate_is_the_optimum() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.eye(4)[torch.arange(200) % 4] * 2 + torch.randn(200, 4, generator=generator)
    logits, before, strength = 2 * features.double(), [0.4, 0.3, 0.2, 0.1], 0.05
    probs = logits.softmax(1).numpy()

    def loss(bias: np.ndarray) -> float:
        likelihood = np.log(probs @ np.exp(bias)).mean() - np.log(before @ np.exp(bias))
        return float(strength * 3 * (np.diff(bias) ** 2).sum() - likelihood)

    expected = scipy.optimize.minimize(loss, np.zeros(4), method="BFGS", tol=1e-9).x
    found = op.adapt_prior(logits, before, smoothing=strength)
    np.testing.assert_allclose(found.bias, expected - expected.mean(), atol=1e-4)
    em, nearly, stiff = (op.adapt_prior(logits, before, smoothing=value).bias for value in (0, 1e-7, 1e5))
    np.testing.assert_allclose(nearly, em, atol=1e-3)
    np.testing.assert_allclose(stiff, np.zeros(4), atol=1e-4)
    with pytest.raises(ValueError, match=r"`smoothing` to be finite and not negative, as 0\.02, but got -1"):
        op.adapt_prior(logits, before, smoothing=-1)


def test_mistakes() -> None:
    logits, labels = samples(10, torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match="at least two samples"):
        op.calibrate(logits[:1], labels[:1])
    with pytest.raises(ValueError, match=r"labels in 0…2"):
        op.calibrate(logits, labels + 1)
    with pytest.raises(ValueError, match="`train_prior` to be 3 frequencies above zero"):
        op.adapt_prior(logits, [1, 1])
    with pytest.raises(ValueError, match="logits of 2 ranks"):
        op.Calibration(1.0, (0.0, 0.0))(logits)


def test_numpy_masked_ranks_and_inference_mode() -> None:
    logits, labels = samples(100, torch.tensor([0.0, 1.0, 0.0]), 2.0)
    expected = op.calibrate(logits, labels)
    with torch.inference_mode():
        assert op.calibrate(logits * 1, labels * 1) == expected
        smooth = op.adapt_prior(logits * 1, [1, 1, 1], smoothing=0.02)
    assert smooth == op.adapt_prior(logits.numpy(), [1, 1, 1], smoothing=0.02)
    torch.testing.assert_close(expected(logits.numpy()), expected(logits))
    masked = op.calibrate(torch.cat([logits, torch.full((100, 1), -torch.inf)], 1), labels)
    assert masked.temperature == pytest.approx(expected.temperature, rel=1e-3)
    with pytest.warns(UserWarning, match="Pass their logarithm"):
        op.calibrate(logits.softmax(1), labels)
    absent = op.adapt_prior(logits, [1, 1, 1], [1, 0, 1])
    assert absent(logits).softmax(1)[:, 1].max() < 1e-6


def test_what_cannot_be_folded() -> None:
    calibration = op.Calibration(1.0, (0.0, 1.0))
    nested = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 2)))
    folded = calibration.fold(nested)
    torch.testing.assert_close(folded(torch.ones(1, 3)), calibration(nested(torch.ones(1, 3))))
    with pytest.raises(ValueError, match="layers of 2 ranks, but they have 1"):
        calibration.fold(nn.Linear(3, 1))
    with pytest.raises(TypeError, match="end in a linear one"):
        calibration.fold(nn.Sequential())
    with pytest.raises(ValueError, match="finite `temperature` above zero"):
        op.Calibration(-1.0, (0.0, 0.0))


def test_labels_of_masked_ranks() -> None:
    logits = torch.randn(50, 4)
    logits[:, 3] = -torch.inf
    labels = torch.arange(50) % 4
    with pytest.raises(ValueError, match="a finite logit for the label of each sample"):
        op.calibrate(logits, labels)


def test_integers_and_json_serve() -> None:
    calibration = op.Calibration(2.0, [0.5, 1.75])  # as JSON has it
    assert calibration == op.Calibration(2.0, (0.5, 1.75))
    assert hash(calibration) == hash(op.Calibration(2.0, (0.5, 1.75)))
    assert calibration(torch.tensor([[2, 4]])).tolist() == [[1.5, 3.75]]
    with pytest.raises(TypeError, match="K numbers"):
        op.Calibration(1.0, ("a",))


def test_layers_that_compute_more_than_their_weight_are_not_folded() -> None:
    calibration = op.Calibration(2.0, (0.5, 0.0))
    features = torch.randn(4, 3)
    hooked = nn.Linear(3, 2)
    hooked.register_forward_hook(lambda _, __, output: output * 2)
    shared = nn.Linear(2, 2)
    pruned = nn.utils.prune.l1_unstructured(nn.Linear(3, 2), "weight", 0.5)
    for layers in (hooked, pruned, nn.Sequential(nn.Linear(3, 2), shared, shared)):
        with pytest.raises(TypeError, match="end in a linear one"):
            calibration.fold(layers)
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)).eval()
    torch.testing.assert_close(calibration.fold(normed)(features), calibration(normed(features)))


def test_options_of_another_kind() -> None:
    logits, labels = torch.randn(9, 3), [0, 1, 2] * 3
    with pytest.raises(TypeError, match="`bias` to be True or False"):
        op.calibrate(logits, labels, bias="no")
    with pytest.raises(ValueError, match="leave one of the two out"):
        op.adapt_prior(logits, [1, 1, 1], [1, 2, 3], smoothing=0.1)
    with pytest.warns(UserWarning, match="probabilities"):
        op.adapt_prior(logits.softmax(1), [1, 1, 1], [1, 2, 3])
    with pytest.warns(UserWarning, match="probabilities"):
        op.Calibration(1.0, (0.0, 0.0, 0.0))(logits.softmax(1).bfloat16())
    with pytest.warns(UserWarning, match="still changed after"):
        op.adapt_prior(torch.randn(200, 5) / 10, [1, 1, 1, 1, 1])
