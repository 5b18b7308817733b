"""Frozen prototypes as plain layers: what is left once the text encoder is thrown away (OrdinalCLIP, section 3.4)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-12  # that of F.normalize


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


def stock_layers(weight: Tensor, bias: Tensor | None, projection: nn.Linear | None, normalize: bool) -> nn.Module:
    """A whole head in layers of torch.nn.

    Unit norm is an RMSNorm over √D, which is folded into the weight.  Without it, projection and prototypes are one
    linear map.

    Args:
        weight: (K, D) scaled prototypes.
        bias: (K,) added to the logits, or None.
        projection: the linear layer in front of them.
        normalize: whether features are brought to unit norm.
    """
    dim = weight.shape[1]
    if not normalize:
        if projection is None:
            return linear_layer(weight, bias)
        exact = weight.double()
        if projection.bias is not None:
            shift = exact @ projection.bias.double()
            bias = (shift if bias is None else shift + bias.double()).to(weight.dtype)
        return linear_layer((exact @ projection.weight.double()).to(weight.dtype), bias)
    # As small as the norm below which features count as zero; the default would damp short features.
    norm = nn.RMSNorm(dim, eps=NORM_EPS**2 / dim, elementwise_affine=False)
    layers: list[nn.Module] = [norm, linear_layer(weight / dim**0.5, bias)]
    if projection is not None:
        layers.insert(0, linear_layer(projection.weight, projection.bias))
    return nn.Sequential(*layers).eval()


def export_heads(model: nn.Module, inplace: bool = True) -> nn.Module:
    """Replaces every prompt head inside a model by its `export()`: plain layers, and no text encoder.

    Args:
        model: a model that holds prompt heads, or a head.
        inplace: change the model; False returns a changed copy (without copying text encoders) and leaves it as it is.

    Returns:
        The model (or, for a head, its export).

    Raises:
        ValueError: no prompt head in the model; learned tensors that are not finite.
    """
    from ordinal_prompt.head import OrdinalPromptHead

    heads = {name: module for name, module in model.named_modules() if isinstance(module, OrdinalPromptHead)}
    if not heads:
        raise ValueError(f"Expected a model with an OrdinalPromptHead in it, but {type(model).__name__} has none.")
    exported = {id(head): head.export() for head in heads.values()}
    if not inplace:
        memo: dict[int, object] = dict(exported)
        copied: nn.Module = copy.deepcopy(model, memo) if id(model) not in memo else exported[id(model)]
        return copied
    for parent in [*model.modules()]:
        for name, child in [*parent._modules.items()]:  # named_children() gives a shared child only once
            if id(child) in exported:
                setattr(parent, name, exported[id(child)])
    return exported.get(id(model), model)


def check_finite(**tensors: Tensor | None) -> None:
    """Raises ValueError where a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"Cannot export or save: {name} has values that are not finite. Training has probably diverged; load "
                "an earlier checkpoint or train with a lower learning rate."
            )
