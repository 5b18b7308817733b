"""Frozen prototypes as plain layers: what is left once the text encoder is thrown away (OrdinalCLIP, section 3.4)."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ordinal_prompt.text.towers import evaluating

Layers = TypeVar("Layers", bound=nn.Module)

NORM_EPS = 1e-12  # that of F.normalize
RMS_NORMS = 4


class PrototypeLinear(nn.Linear):
    """A linear layer that brings its input to unit norm first, so that its outputs are scaled cosines.

    Shapes:
        input (..., in_features), output (..., out_features).

    >>> import torch
    >>> layer = PrototypeLinear(2, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[1.0, 0.0]])
    >>> layer(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000]], grad_fn=<MmBackward0>)
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.normalize(input, dim=-1), self.weight, self.bias)


def linear_layer(weight: Tensor, bias: Tensor | None, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """A layer with the given weight (K, D) and bias (K,), detached and without gradients."""
    layer = kind(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer.eval()


@torch.no_grad()
def plain_linear(layer: nn.Module, in_features: int) -> nn.Linear:
    """A linear layer as a plain one: itself, or with what an adapter (LoRA, for instance) or a hook adds to it.

    Raises:
        ValueError: what it computes is no linear map.
    """
    if type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks):
        return layer
    like = next(layer.parameters())
    probe = torch.eye(in_features, dtype=like.dtype, device=like.device)
    with evaluating(layer):
        bias = layer(probe[:1] * 0)[0]
        weight = (layer(probe) - bias).T
        trial = probe.flip(1).cumsum(0)  # any other inputs
        found, expected = trial @ weight.T + bias, layer(trial)
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise ValueError(
            f"Cannot export: the projection, a {type(layer).__name__}, computes no linear map; merge its adapter into "
            "it first, or remove the adapter."
        )
    return linear_layer(weight, bias)


def stock_layers(weight: Tensor, bias: Tensor | None, projection: nn.Linear | None, normalize: bool) -> nn.Module:
    """A whole head in layers of torch.nn; one linear map where it does not bring features to unit norm.

    Args:
        weight: (K, D) scaled prototypes.
        bias: (K,) added to the logits, or None.
        projection: the linear layer in front of them.
        normalize: whether features are brought to unit norm.
    """
    if normalize:
        layers = [*unit_norm(weight.shape[1]), linear_layer(weight / weight.shape[1] ** 0.5, bias)]
        if projection is not None:
            layers.insert(0, linear_layer(projection.weight, projection.bias))
        exported: Any = no_linear_layer(nn.Sequential(*layers)).eval()
        exported.in_features = weight.shape[1] if projection is None else projection.in_features
        exported.out_features = weight.shape[0]
        whole: nn.Module = exported
        return whole
    if projection is None:
        return linear_layer(weight, bias)
    exact = weight.double()
    if projection.bias is not None:
        shift = exact @ projection.bias.double()
        bias = (shift if bias is None else shift + bias.double()).to(weight.dtype)
    return linear_layer((exact @ projection.weight.double()).to(weight.dtype), bias)


def unit_norm(dim: int) -> list[nn.Module]:
    """Layers that bring features (..., dim) to the norm √dim, and those that are nearly zero to nearly zero.

    One RMSNorm would do, x ↦ x / √(mean x² + ε), with an epsilon as small as the norm below which features count as
    zero.  But exporters to ONNX drop numbers as small as that, and half precision has none.  Where RMSNorms follow each
    other, their epsilons multiply.
    """
    eps = (NORM_EPS**2 / dim) ** (1 / RMS_NORMS)
    return [nn.RMSNorm(dim, eps=eps, elementwise_affine=False) for _ in range(RMS_NORMS)]


def no_linear_layer(layers: Layers) -> Layers:
    """Marks layers that stand in a linear layer's place: their state dict must not pass for one of its.

    Libraries that load a state dict and find no `weight` for a layer start it anew, with a warning at best.  An empty
    one, which fits no layer, makes them refuse the file; `load_exported` knows it.
    """
    if "weight" not in layers._buffers:
        layers.register_buffer("weight", torch.empty(0))
    return layers


def stands_for_linear(module: object) -> bool:
    """Whether a module is what `export()` made of a head that is no linear layer."""
    return isinstance(module, nn.Sequential) and getattr(module, "weight", torch.ones(1)).numel() == 0


def check_finite(**tensors: Tensor) -> None:
    """Raises ValueError where a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"Cannot export or save: {name.replace('.', '_')} has values that are not finite. Training has "
                "probably diverged; load an earlier checkpoint or train with a lower learning rate."
            )
