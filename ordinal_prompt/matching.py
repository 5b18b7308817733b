"""Matching features to prototypes by cosine: one linear map, of features of unit norm (OrdinalCLIP, section 3.4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ordinal_prompt.config import MAX_FACTOR

LOGIT_SPREAD = 10.0  # of scaled prototypes around their mean, at the start


def unit_prototypes(features: Tensor) -> Tensor:
    """Prototypes (K, D) of unit norm, at least float32, of text features (K, D)."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def linear_map(
    prototypes: Tensor,
    log_scale: Tensor,
    alignment: Tensor | None,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    alignment_factor: float,
    residual_factor: float,
) -> tuple[Tensor, Tensor | None]:
    """Weight (K, D) and bias (K,) of the linear map from features to logits.

    Args:
        prototypes: (K, D) of unit norm.
        log_scale: (1,) the log of the factor on the cosines.
        alignment: (D, D) A of the map I + factor · A between features and prototypes.
        residual, residual_bias: (K, D) and (K,) what is added, times its factor.
    """
    dtype = prototypes.dtype
    # Beyond the bound only a training that diverges gets, and infinite logits would end it.
    weight = log_scale.to(dtype).exp().clamp(max=MAX_FACTOR) * prototypes
    if alignment is not None:
        weight = weight + alignment_factor * (weight @ alignment.to(dtype))
    if residual is not None:
        weight = weight + residual_factor * residual.to(dtype)
    return weight, None if residual_bias is None else residual_factor * residual_bias.to(dtype)


def match(features: Tensor, weight: Tensor, bias: Tensor | None, normalize: bool) -> Tensor:
    """Logits (..., K) of features (..., D), brought to unit norm first or not; weight (K, D), bias (K,)."""
    features = F.normalize(features, dim=-1) if normalize else features
    return F.linear(features, weight, None if bias is None else bias.to(weight.dtype))


def project(projection: Any, features: Tensor) -> Tensor:
    """Features (..., D) of features (..., in_features), in the projection's precision unless autocast chooses it."""
    if not isinstance(projection.weight, Tensor):
        raise TypeError(
            f"Expected the projection to be a linear layer, but it is a {type(projection).__module__}."
            f"{type(projection).__name__}; call op.export_heads(model) before you quantize the model."
        )
    autocast = torch.is_autocast_enabled(features.device.type)
    projected: Tensor = projection(features if autocast else features.to(projection.weight.dtype))
    return projected


def log_scale_of_spread(prototypes: Tensor, confidence: float = 1.0) -> Tensor:
    """() log of `LOGIT_SPREAD` over the spread of prototypes (K, D): ranks compete alike whatever their encoder."""
    spread = (prototypes - prototypes.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    return (confidence * LOGIT_SPREAD / spread).clamp(max=MAX_FACTOR).log()


def check_features(features: Tensor, width: int, projected: bool) -> None:
    """Raises TypeError or ValueError where features are not (..., width) floating point numbers."""
    if isinstance(features, torch.fx.Proxy) or torch._C._get_tracing_state():
        raise TypeError(
            "A prompt head cannot be traced by torch.fx or torch.jit (feature extraction, quantization, …): it chooses "
            "between computing its prototypes and keeping them. Call op.export_heads(model) first, which leaves plain "
            "layers."
        )
    if not isinstance(features, Tensor) or not features.is_floating_point():
        kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"Expected `features` to be a floating point tensor, but got {kind}.")
    if features.dim() == 0 or features.shape[-1] != width:
        hint = "" if projected else "; for features of another width build the head with in_features="
        raise ValueError(f"Expected `features` of shape (..., {width}), but got {tuple(features.shape)}{hint}.")
