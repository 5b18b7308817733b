"""Logits that mean what they say: temperature and bias from held-out labels, and another prior for another place."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ordinal_prompt.arrays import (
    Labels,
    RankNumbers,
    is_number,
    listed,
    number_tensor,
    rank_tensor,
    warn_of_probabilities,
)
from ordinal_prompt.export import PrototypeLinear, linear_layer
from ordinal_prompt.frequencies import smoothed_change
from ordinal_prompt.samples import read_logits

EM_STEPS, EM_TOLERANCE = 1000, 1e-8
LOWEST = -1e30  # in the place of -inf, of ranks that are masked


@dataclass(frozen=True)
class Calibration:
    """z / temperature + bias, of logits z (..., K).

    >>> import torch
    >>> Calibration(2.0, (0.0, 1.0))(torch.tensor([[2.0, 4.0]]))
    tensor([[1., 3.]])
    """

    temperature: float
    bias: tuple[float, ...]

    def __post_init__(self) -> None:
        if not (is_number(self.temperature) and hasattr(self.bias, "__len__") and all(map(is_number, self.bias))):
            raise TypeError(f"Expected `temperature` to be a number and `bias` to be K numbers, but got {self}.")
        if not (0 < self.temperature < math.inf and all(map(math.isfinite, self.bias))):
            raise ValueError(f"Expected a finite `temperature` above zero and finite `bias`, but got {self}.")
        object.__setattr__(self, "bias", tuple(map(float, self.bias)))  # JSON makes a list of it

    def __call__(self, logits: Any) -> Tensor:
        """Calibrated logits (..., K), of a tensor or an array."""
        logits = number_tensor(logits, "logits")
        if logits.shape[-1:] != (len(self.bias),):
            raise ValueError(f"Expected logits of {len(self.bias)} ranks, but got shape {tuple(logits.shape)}.")
        warn_of_probabilities(logits, stacklevel=3)
        calibrated: Tensor = logits / self.temperature  # floating point, also of integers
        return calibrated + torch.tensor(self.bias, dtype=calibrated.dtype, device=calibrated.device)

    @torch.no_grad()
    def fold(self, layers: nn.Module) -> nn.Module:
        """A copy of exported layers (`head.export()`) that gives the calibrated logits, at no cost.

        Raises:
            TypeError: layers that do not end in a plain linear one, which computes its weight times its input alone.
            ValueError: layers of another number of ranks.
        """
        linear: Any = layers
        while isinstance(linear, nn.Sequential) and len(linear):
            linear = linear[-1]
        places = [child for part in layers.modules() for child in part._modules.values() if child is linear]
        plain = isinstance(linear, nn.Linear) and type(linear).forward in (nn.Linear.forward, PrototypeLinear.forward)
        if not plain or len(places) > 1 or linear._forward_hooks or linear._forward_pre_hooks:
            raise TypeError(
                "Expected layers that end in a linear one, a plain one without hooks, but got "
                f"{type(layers).__name__}; pass an export."
            )
        if linear.out_features != len(self.bias):
            raise ValueError(f"Expected layers of {len(self.bias)} ranks, but they have {linear.out_features}.")
        offset = torch.tensor(self.bias, dtype=linear.weight.dtype, device=linear.weight.device)
        before = 0 if linear.bias is None else linear.bias / self.temperature
        kind = PrototypeLinear if isinstance(linear, PrototypeLinear) else nn.Linear
        folded = linear_layer(linear.weight / self.temperature, before + offset, kind)
        folded.requires_grad_(linear.weight.requires_grad).train(linear.training)
        copied: nn.Module = copy.deepcopy(layers, {id(linear): folded})
        return copied


@torch.inference_mode(False)
def calibrate(logits: Any, labels: Labels, bias: bool = True) -> Calibration:
    """Temperature, and a bias for each rank, that minimise the cross-entropy of held-out labels.

    Temperature scaling is that of Guo et al. (ICML 2017); the bias has a Gaussian prior (½‖b‖² over all samples), so
    that ranks without held-out labels keep what they have.  Deterministic, without a learning rate.

    Args:
        logits: (N, K) of samples that the model was not trained on.
        labels: (N,) rank indices.
        bias: False fits the temperature alone.

    Raises:
        ValueError: fewer than two samples, labels outside the ranks, or of ranks that are masked.
    """
    if bias not in (True, False):
        raise TypeError(f"Expected `bias` to be True or False, but got {bias!r}.")
    z, y = read_logits(logits, labels)
    if len(y) < 2:
        raise ValueError(f"Expected at least two samples to calibrate with, but got {len(y)}.")
    if bool((z.gather(1, y[:, None]) == -torch.inf).any()):
        raise ValueError("Expected a finite logit for the label of each sample, but some are -infinity (masked).")
    z, y = z.clamp_min(LOWEST), y.clone()  # no inference tensors, which could not be differentiated
    log_temperature = z.new_zeros((), requires_grad=True)
    offset = z.new_zeros(z.shape[1], requires_grad=bool(bias))
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


@torch.inference_mode(False)
def adapt_prior(
    logits: Any, train_prior: RankNumbers, prior: RankNumbers | None = None, smoothing: float = 0.0
) -> Calibration:
    """The bias that brings logits from the rank frequencies of training to those of another place.

    Args:
        logits: (..., K) of unlabelled samples from there, calibrated; of no effect where `prior` is given.
        train_prior: (K,) frequencies or counts of the ranks in training (uniform after balanced few-shot training).
        prior: (K,) those of the other place, if they are known, 0 where a rank does not occur; default: estimated from
            the logits by EM (Saerens et al., Neural Computation 2002).
        smoothing: of the estimate: ties the changes of neighbouring ranks.  0 is EM as it was published, which needs
            calibrated logits that tell the ranks apart; with 0.02, what a model cannot tell changes little, and it
            does little harm after training with few labels (measured in `benchmarks/heads/RESULTS.md`).  The penalty
            is smoothing·(K-1) times the squared differences of neighbouring biases, in nats per sample.

    Raises:
        ValueError: frequencies that are negative, or of another number than ranks; no logits to estimate them from; a
            negative `smoothing`.
    """
    if not is_number(smoothing) or not 0 <= smoothing < math.inf:
        raise ValueError(f"Expected `smoothing` to be finite and not negative, as 0.02, but got {smoothing}.")
    if smoothing and prior is not None:
        raise ValueError("Expected `smoothing` of an estimate, but `prior` is known; leave one of the two out.")
    warn_of_probabilities(number_tensor(logits, "logits"), stacklevel=3)
    z = number_tensor(logits, "logits", torch.float64).detach().cpu().double()
    if z.dim() < 1 or z.shape[-1] < 2:
        raise ValueError(f"Expected `logits` of shape (..., K), K at least 2, but got {tuple(z.shape)}.")
    ranks = z.shape[-1]
    before = _frequencies(train_prior, "train_prior", ranks)
    if prior is not None:
        after = _frequencies(prior, "prior", ranks, least=0)
    else:
        z = z.reshape(-1, ranks)
        if not len(z) or not bool(z.isfinite().all()):
            raise ValueError(
                f"Expected finite `logits` of samples to estimate the prior from, but got {len(z)} samples, or NaN or "
                "infinity; pass `prior` if it is known."
            )
        if smoothing:
            equal = z.new_full((len(z),), 1 / len(z))
            return Calibration(1.0, tuple(smoothed_change(z.log_softmax(dim=1), equal, before, smoothing).tolist()))
        after = _likely_frequencies(z, before)
    ratio = (after.clamp_min(1e-12) / before).log()
    return Calibration(1.0, tuple((ratio - ratio.mean()).tolist()))


def _likely_frequencies(logits: Tensor, before: Tensor) -> Tensor:
    """(K,) under which samples of the logits (N, K) are most likely, by EM."""
    after = before
    for _ in range(EM_STEPS):
        last = after
        after = (logits + (last / before).log()).softmax(dim=1).mean(dim=0)
        if float((after - last).abs().max()) < EM_TOLERANCE:
            return after
    warnings.warn(
        f"The estimate of the prior still changed after {EM_STEPS} steps: the logits hardly tell some ranks apart. "
        "smoothing=0.02 gives an estimate that they do tell.",
        stacklevel=3,
    )
    return after


def _frequencies(numbers: RankNumbers, name: str, ranks: int, least: float | None = None) -> Tensor:
    """(K,) with the sum 1; above zero, or from `least` on."""
    found = rank_tensor(numbers, name).detach().cpu().double()
    sound = found.isfinite() & ((found > 0) if least is None else (found >= least))
    if found.shape != (ranks,) or not bool(sound.all() & (found.sum() > 0)):
        kind = "above zero" if least is None else "that are not negative, nor all zero"
        raise ValueError(
            f"Expected `{name}` to be {ranks} frequencies {kind}, but got shape {tuple(found.shape)}: "
            f"{listed(found.flatten().tolist())}."
        )
    return found / found.sum()
