"""A head fitted to cached features in closed loop: no validation data, no learning rate, no seed.

The weights of the head are those of the prototypes plus a deviation, W = s·T + Δ, and the fit is their maximum a
posteriori: the cross-entropy of the training labels, plus a prior of fixed size, which fades as labels come.  The prior
says that Δ is small, that it changes little from one rank to the next (the numerical continuity of OrdinalCLIP, section
3.3, as a Gaussian on differences), that the prototypes weigh about as much as they usually do, and that ranks are about
as frequent as in training, smoothed along the ranks.  A prior around the weights of the class names is that of CLAP
(Silva-Rodríguez et al., CVPR 2024); there it is a constraint per class.

For features outside the text encoder's space language says nothing about Δ; what is left is a penalised linear head
whose neighbouring ranks are tied.  `benchmarks/heads/RESULTS.md` says on which data the four numbers were chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ordinal_prompt.arrays import (
    Labels,
    RankNumbers,
    is_categorical,
    is_number,
    label_tensor,
    number_tensor,
    rank_tensor,
)
from ordinal_prompt.frequencies import usual_bias
from ordinal_prompt.head import OrdinalPromptHead
from ordinal_prompt.matching import check_features, log_scale_of_spread
from ordinal_prompt.prior import AROUND_PROTOTYPES, AROUND_ZERO, SCALE_SD, Prior

FOREIGN_SCALE = 20.0  # of deviations from zero, on features of unit norm
EXACT = 2e8  # products in one pass over the data, up to which float64 costs little
FLATTEST = 0.1  # of the largest singular value of the prototypes


@torch.inference_mode(False)
def fit_head(
    head: OrdinalPromptHead,
    features: Any,
    labels: Labels,
    sample_weight: Any = None,
    progress: Callable[[int, float], None] | None = None,
) -> OrdinalPromptHead:
    """Fits a head to cached features, deterministically; a starting point for fine-tuning, or all that it takes.

    Sets `logit_scale`, `residual`, `residual_bias` and `projection` (and `alignment` to zero); the prompts stay as they
    are.  To fine-tune a network behind a head with `in_features`, let `op.parameter_groups` choose the learning rates,
    or put its export, one `nn.Linear`, in its place.

    Args:
        head: built with `**op.recipe(ranks, prompts="fitted")`, or any head with a residual; one with `in_features`
            also needs `normalize=False`, so that it holds the linear head.
        features: (N, in_features), of any norm.
        labels: (N,) rank indices; see `head.rank_indices` for values and names.
        sample_weight: (N,) not negative; a weight of 2 counts like the sample twice.
        progress: called with the number and the loss of every step.

    Returns:
        The head.

    Raises:
        ValueError: a head without a residual, labels or weights that do not fit, features that are not finite.
        TypeError: no head.
    """
    if not isinstance(head, OrdinalPromptHead):
        raise TypeError(f"Expected `head` to be an OrdinalPromptHead, but got {type(head).__name__}.")
    if head.residual is None or head.residual_bias is None:
        raise ValueError(
            "Expected a head with a residual, which the fit sets, but this one has none; build it with "
            '**op.recipe(ranks, prompts="fitted").'
        )
    if head.projection is not None and head.normalize:
        raise ValueError(
            "Expected a head that holds the linear head, but this one brings projected features to unit norm; build it "
            "with normalize=False."
        )
    x, y, weight = _checked(head, features, labels, sample_weight)
    prototypes = head.prototypes().detach().cpu().double()
    if head.projection is None:
        x = F.normalize(x, dim=1) if head.normalize else x
        fitted = fit_map(x, y, prototypes, sample_weight=weight, progress=progress)
        _set(head.logit_scale, prototypes.new_tensor(fitted.log_scale))
        scale = math.exp(float(head.logit_scale.detach()))  # as it is stored
        _set(head.residual, (fitted.weight - scale * prototypes) / head.config.residual)
        if head.alignment is not None:
            _set(head.alignment, torch.zeros_like(head.alignment))
    else:
        fitted = fit_map(x, y, head.num_ranks, sample_weight=weight, progress=progress)
        # W = V P, with V the prototypes, where need be with a residual that makes them well-conditioned.
        scaled = float(head.logit_scale.detach().exp()) * prototypes
        left, values, right = torch.linalg.svd(scaled, full_matrices=False)
        values = values.clamp_min(FLATTEST * float(values.max()))
        _set(head.residual, (left * values @ right - scaled) / head.config.residual)
        _set(head.projection.weight, right.T @ ((left / values).T @ fitted.weight))
        _set(head.projection.bias, prototypes.new_zeros(head.embed_dim))
    _set(head.residual_bias, fitted.bias / head.config.residual)
    return head


def regularization(head: OrdinalPromptHead, num_samples: int, counts: RankNumbers | None = None) -> Tensor:
    """() the penalty of `fit_head` for a training loop: `head.loss()(logits, labels) + op.regularization(head, N)`.

    For a head in the text encoder's space (without `in_features`), full batches have the fit as their optimum.  Where
    prompts learn, call it inside `head.reuse_prototypes()`, which spares it a text pass of its own.

    Args:
        head: with a residual.
        num_samples: N, of the whole training set; the penalty fades as 1 / N.
        counts: (K,) training samples of each rank; default as many of each.

    Raises:
        ValueError: a head without a residual, or with a projection; no samples.
        TypeError: no head.
    """
    if not isinstance(head, OrdinalPromptHead):
        raise TypeError(f"Expected `head` to be an OrdinalPromptHead, but got {type(head).__name__}.")
    if not is_number(num_samples) or not num_samples >= 1:
        raise ValueError(f"Expected `num_samples` to be that of the training set, at least 1, but got {num_samples}.")
    if head.residual is None or head.residual_bias is None or head.projection is not None:
        raise ValueError(
            "Expected a head with a residual and without in_features; penalise others by weight decay, or start them "
            "with op.fit_head."
        )
    usual = log_scale_of_spread(head.prototypes().detach())
    deviation = head.config.residual * head.residual / usual.exp()
    bias = head.config.residual * head.residual_bias
    if counts is not None:
        found = rank_tensor(counts, "counts").double()
        if found.shape != bias.shape or not bool((found.isfinite() & (found >= 0)).all() & found.any()):
            raise ValueError(f"Expected `counts` of {len(bias)} ranks, none negative, not all zero.")
        bias = bias - torch.tensor(usual_bias(tuple(found.tolist())), device="cpu").to(bias)
    return AROUND_PROTOTYPES.penalty(deviation, bias, head.logit_scale[0] - usual) / num_samples


@dataclass(frozen=True)
class FittedMap:
    """Weight (K, D), bias (K,) and the log of the scale of the prototypes in the weight."""

    weight: Tensor
    bias: Tensor
    log_scale: float


@torch.inference_mode(False)
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]  # untyped in torch
def fit_map(
    features: Tensor,
    labels: Tensor,
    prototypes: Tensor | int,
    prior: Prior | None = None,
    sample_weight: Tensor | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> FittedMap:
    """The maximum a posteriori linear map from features to logits, by L-BFGS to convergence.

    Args:
        features: (N, D); of unit norm where there are prototypes.
        labels: (N,) rank indices.
        prototypes: (K, D) of unit norm; or K, for features that language says nothing about, which are centred and
            brought to unit norm on average.
        prior: default `AROUND_PROTOTYPES`, or `AROUND_ZERO` without prototypes.
        sample_weight: (N,).
        progress: called with the number and the loss of every step.
    """
    known = isinstance(prototypes, Tensor)
    num_ranks = len(prototypes) if isinstance(prototypes, Tensor) else prototypes
    dtype = torch.float64 if features.numel() * num_ranks <= EXACT else torch.float32
    x, labels = features.to(dtype), labels.clone()  # no inference tensors, which could not be differentiated
    share = x.new_ones(len(x)) if sample_weight is None else sample_weight.to(dtype)
    total = float(share.sum())
    usual = x.new_tensor(usual_bias(tuple(torch.bincount(labels, share, num_ranks).tolist())))
    share = share / total
    mean, norm = torch.zeros_like(x[0]), 1.0
    if not known:
        mean = share @ x
        norm = float((share @ (x - mean).square().sum(dim=1)).sqrt()) or 1.0
    x = (x - mean) / norm
    log_scale, offset = math.log(FOREIGN_SCALE), None
    if isinstance(prototypes, Tensor):
        log_scale = float(log_scale_of_spread(prototypes))
        offset = math.exp(log_scale) * x @ prototypes.to(dtype).T
    # The deviation lies in the span of the features: with fewer samples than features, fewer values are looked for.
    basis = torch.linalg.qr(x.T)[0] if len(x) < x.shape[1] else None
    reduced = x if basis is None else x @ basis
    prior = prior or (AROUND_PROTOTYPES if known else AROUND_ZERO)
    factor = math.exp(log_scale) * prior.factor(num_ranks).to(x)
    free = x.new_zeros(num_ranks, reduced.shape[1], requires_grad=True)
    bias, ratio = x.new_zeros(num_ranks, requires_grad=True), x.new_zeros((), requires_grad=known)

    def loss() -> Tensor:
        logits = F.linear(reduced, factor @ free, bias + usual)
        if offset is not None:
            logits = logits + ratio.exp() * offset
        penalty = free.square().sum() + bias.square().sum() + ratio**2 / (2 * SCALE_SD**2)
        return share @ F.cross_entropy(logits, labels, reduction="none") + penalty / total

    _minimize(loss, [free, bias, ratio] if known else [free, bias], progress)
    with torch.no_grad():
        deviation = factor @ free
        weight = (deviation if basis is None else deviation @ basis.T) / norm
        shift = bias + usual - weight @ mean
        if isinstance(prototypes, Tensor):
            weight = weight + float(ratio.detach().exp()) * math.exp(log_scale) * prototypes.to(dtype)
    return FittedMap(weight.double(), shift.detach().double(), log_scale + float(ratio.detach()))


def _minimize(
    loss: Callable[[], Tensor], parameters: list[Tensor], progress: Callable[[int, float], None] | None
) -> None:
    exact = parameters[0].dtype == torch.float64
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=500,
        tolerance_grad=1e-9 if exact else 1e-6,
        tolerance_change=1e-14 if exact else 1e-9,
        line_search_fn="strong_wolfe",
    )
    count = 0

    def closure() -> float:
        nonlocal count
        optimizer.zero_grad()
        value = loss()
        value.backward()
        count += 1
        loss_now = float(value.detach())
        if progress is not None:
            progress(count, loss_now)
        return loss_now

    with torch.enable_grad():
        optimizer.step(closure)


def _checked(
    head: OrdinalPromptHead, features: Any, labels: Labels, sample_weight: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    x = number_tensor(features, "features").detach().cpu()
    check_features(x, head.in_features, head.projection is not None)
    if x.dim() != 2 or not bool(x.isfinite().all()):
        raise ValueError(f"Expected finite `features` of shape (N, {head.in_features}), but got {tuple(x.shape)}.")
    told = head.config.rank_names is not None or head.config.values != tuple(range(head.num_ranks))
    by_name = told and is_categorical(
        labels
    )  # codes are those of the categories, which may be fewer, or in other order
    y = (head.rank_indices(labels) if by_name else label_tensor(labels, num_ranks=head.num_ranks)).cpu()
    if y.shape != x.shape[:1] or not len(y):
        raise ValueError(f"Expected one label for each of {len(x)} samples, but got labels of shape {tuple(y.shape)}.")
    if int(y.min()) < 0 or int(y.max()) >= head.num_ranks:
        raise ValueError(
            f"Expected labels in 0…{head.num_ranks - 1}, but got {int(y.min())}…{int(y.max())}; head.rank_indices "
            "makes indices of values and names."
        )
    if sample_weight is None:
        return x.double(), y, None
    weight = number_tensor(sample_weight, "sample_weight").detach().cpu().double()
    if weight.shape != y.shape or not bool((weight.isfinite() & (weight >= 0)).all()) or not float(weight.sum()):
        raise ValueError("Expected one finite `sample_weight` for each sample, none negative, not all zero.")
    return x.double(), y, weight


@torch.no_grad()
def _set(parameter: Tensor | nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value.reshape(parameter.shape))
