"""Logits that mean what they say: temperature and bias from held-out labels, and another prior for another place."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ordinal_prompt.arrays import Labels, RankNumbers, rank_tensor
from ordinal_prompt.samples import read_logits

EM_STEPS, EM_TOLERANCE = 1000, 1e-8


@dataclass(frozen=True)
class Calibration:
    """z / temperature + bias, of logits z (..., K).

    >>> import torch
    >>> Calibration(2.0, (0.0, 1.0))(torch.tensor([[2.0, 4.0]]))
    tensor([[1., 3.]])
    """

    temperature: float
    bias: tuple[float, ...]

    def __call__(self, logits: Tensor) -> Tensor:
        """Calibrated logits (..., K)."""
        if logits.shape[-1] != len(self.bias):
            raise ValueError(f"Expected logits of {len(self.bias)} ranks, but got shape {tuple(logits.shape)}.")
        return logits / self.temperature + torch.tensor(self.bias, dtype=logits.dtype, device=logits.device)

    @torch.no_grad()
    def fold(self, layers: nn.Module) -> nn.Module:
        """A copy of exported layers (`head.export()`) that gives the calibrated logits, at no cost.

        Raises:
            TypeError: layers that do not end in a linear one.
        """
        layers = copy.deepcopy(layers)
        linear = layers[-1] if isinstance(layers, nn.Sequential) else layers
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"Expected layers that end in a linear one, but got {type(layers).__name__}; pass an export."
            )
        offset = torch.tensor(self.bias, dtype=linear.weight.dtype, device=linear.weight.device)
        linear.weight /= self.temperature
        before = 0 if linear.bias is None else linear.bias / self.temperature
        linear.bias = nn.Parameter(before + offset, requires_grad=linear.weight.requires_grad)
        return layers


def calibrate(logits: Tensor, labels: Labels, bias: bool = True) -> Calibration:
    """Temperature, and a bias for each rank, that minimise the cross-entropy of held-out labels.

    Temperature scaling is that of Guo et al. (ICML 2017); the bias has a Gaussian prior (½‖b‖² over all samples), so
    that ranks without held-out labels keep what they have.  Deterministic, without a learning rate.

    Args:
        logits: (N, K) of samples that the model was not trained on.
        labels: (N,) rank indices.
        bias: False fits the temperature alone.

    Raises:
        ValueError: fewer than two samples, labels outside the ranks.
    """
    z, y = read_logits(logits, labels)
    if len(y) < 2 or not bool(z.isfinite().all()):
        raise ValueError(f"Expected at least two samples with finite logits, but got {len(y)}.")
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    offset = torch.zeros(z.shape[1], dtype=torch.float64, requires_grad=bias)
    optimizer = torch.optim.LBFGS(
        [log_temperature, offset] if bias else [log_temperature], max_iter=200, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(z / log_temperature.exp() + offset, y)
        # The temperature of separable samples would be zero: a prior of the same size, around one.
        loss = loss + (offset.square().sum() + log_temperature**2) / (2 * len(z))
        loss.backward()
        return float(loss.detach())

    with torch.enable_grad():
        optimizer.step(closure)
    return Calibration(float(log_temperature.detach().exp()), tuple(offset.detach().tolist()))


def adapt_prior(
    logits: Tensor, train_prior: RankNumbers, prior: RankNumbers | None = None, smoothing: float = 0.0
) -> Calibration:
    """The bias that brings logits from the rank frequencies of training to those of another place.

    Args:
        logits: (N, K) of unlabelled samples from there, calibrated; of no effect where `prior` is given.
        train_prior: (K,) frequencies or counts of the ranks in training (uniform after balanced few-shot training).
        prior: (K,) those of the other place, if they are known; default: estimated from the logits by EM (Saerens et
            al., Neural Computation 2002).
        smoothing: of the estimate: ties the changes of neighbouring ranks.  0 is EM as it was published, which needs
            calibrated logits that tell the ranks apart; with 0.02, what a model cannot tell changes little, and it
            does little harm after training with few labels (measured in `benchmarks/heads/RESULTS.md`).  The penalty
            is smoothing·(K-1) times the squared differences of neighbouring biases, in nats per sample.

    Raises:
        ValueError: frequencies that are negative, or of another number than ranks; no logits to estimate them from; a
            negative `smoothing`.
    """
    if not 0 <= smoothing < float("inf"):
        raise ValueError(f"Expected `smoothing` to be finite and not negative, as 0.02, but got {smoothing}.")
    ranks = logits.shape[-1]
    before = _frequencies(train_prior, "train_prior", ranks)
    if prior is not None:
        after = _frequencies(prior, "prior", ranks)
    else:
        z = logits.detach().cpu().double().reshape(-1, ranks)
        if not len(z) or not bool(z.isfinite().all()):
            raise ValueError(
                f"Expected finite `logits` of samples to estimate the prior from, but got {len(z)} samples, or NaN or "
                "infinity; pass `prior` if it is known."
            )
        after = _smoothed_frequencies(z, before, smoothing) if smoothing else _likely_frequencies(z, before)
    ratio = (after.clamp_min(1e-12) / before).log()
    return Calibration(1.0, tuple((ratio - ratio.mean()).tolist()))


def _likely_frequencies(logits: Tensor, before: Tensor) -> Tensor:
    """(K,) under which samples of the logits (N, K) are most likely, by EM."""
    after = before
    for _ in range(EM_STEPS):
        last = after
        after = (logits + (last / before).log()).softmax(dim=1).mean(dim=0)
        if float((after - last).abs().max()) < EM_TOLERANCE:
            break
    return after


def _smoothed_frequencies(logits: Tensor, before: Tensor, smoothing: float) -> Tensor:
    """The same with a penalty on differences between neighbouring biases, by L-BFGS from no change."""
    log_probs, strength = logits.log_softmax(dim=1), smoothing * (len(before) - 1)
    bias = torch.zeros_like(before, requires_grad=True)
    optimizer = torch.optim.LBFGS([bias], max_iter=EM_STEPS, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        likelihood = (log_probs + bias).logsumexp(dim=1).mean() - (before.log() + bias).logsumexp(dim=0)
        loss = strength * bias.diff().square().sum() - likelihood
        loss.backward()
        return float(loss.detach())

    with torch.enable_grad():
        optimizer.step(closure)
    return (before.log() + bias.detach()).softmax(dim=0)


def _frequencies(numbers: RankNumbers, name: str, ranks: int) -> Tensor:
    found = rank_tensor(numbers, name).detach().cpu().double()
    if found.shape != (ranks,) or not bool((found.isfinite() & (found > 0)).all()):
        raise ValueError(f"Expected `{name}` to be {ranks} frequencies above zero, but got {found.tolist()}.")
    return found / found.sum()
