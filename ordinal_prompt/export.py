"""Frozen prototypes as plain layers: what is left once the text encoder is thrown away (OrdinalCLIP, section 3.4)."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from ordinal_prompt.distributed import handed_out
from ordinal_prompt.text.towers import evaluating

Layers = TypeVar("Layers", bound=nn.Module)

NORM_EPS = 1e-12  # that of F.normalize
RMS_NORMS = 4
MARKER = (1,) * 6  # the shape of no layer's weight, and of nothing that could be stretched to one


class PrototypeLinear(nn.Linear):
    """A linear layer that brings its input to unit norm first, so that its outputs are scaled cosines.

    What computes with its weight and the raw input takes it for a plain linear layer.  LoRA does: it learns on features
    that have any norm, and merging it changes the outputs.  Put adapters on the backbone, or on the export of a head
    with `normalize=False`.

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

    Libraries that load a state dict and find no `weight` for a layer start it anew, with a warning at best.  This one,
    which fits no layer, makes them refuse the file; `load_exported` knows it.  It is not empty, since some libraries
    take all empty tensors for one, and save it once.
    """
    if "weight" not in layers._buffers:
        layers.register_buffer("weight", torch.zeros(MARKER))
    return layers


def is_marker(weight: object) -> bool:
    """Whether this is what `no_linear_layer` left; it was empty in files of earlier versions."""
    return isinstance(weight, Tensor) and not is_lazy(weight) and (weight.numel() == 0 or weight.shape == MARKER)


def stands_for_linear(module: object) -> bool:
    """Whether a module is what `export()` made of a head that is no linear layer."""
    return isinstance(module, nn.Sequential) and is_marker(getattr(module, "weight", None))


def check_finite(**tensors: Tensor) -> None:
    """Raises ValueError where a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"Cannot export or save: {name.replace('.', '_')} has values that are not finite. Training has "
                "probably diverged; load an earlier checkpoint or train with a lower learning rate."
            )


def check_loaded(head: nn.Module) -> None:
    """Raises ValueError where only some of a head has values; all of one may be on the meta device."""
    on_meta = {name: part.is_meta for name, part in head.state_dict().items() if isinstance(part, Tensor)}
    offloaded = any(hasattr(part, "_hf_hook") for part in head.modules())
    if any(on_meta.values()) and (offloaded or not all(on_meta.values())):
        names = [name for name, there_is_none in on_meta.items() if there_is_none]
        raise ValueError(
            f"Cannot export: weights of the head ({', '.join(names[:3])}) are on the meta device, without values. Load "
            "them first; where accelerate has offloaded the model, with "
            "accelerate.hooks.remove_hook_from_submodules(model)."
        )


@torch.no_grad()
def checked(layers: Layers, head: Any) -> Layers:
    """The layers of a head, which hooks, or a `forward` of its own, must not make other logits than they give.

    Raises:
        ValueError: they do.
    """
    own = "forward" in vars(head) or not type(head).forward.__module__.startswith("ordinal_prompt.")
    like = next(layers.parameters())
    changed = own or head._forward_hooks or head._forward_pre_hooks
    if like.is_meta or handed_out(head, head.prompt) or not changed:
        return layers
    features = torch.randn(4, head.in_features, generator=torch.Generator().manual_seed(0)).to(like)
    with evaluating(head):
        found, expected = layers(features), head(features)
    if not torch.allclose(found.to(expected), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise ValueError(
            f"Cannot export: {type(head).__name__} has hooks, or a forward of its own, that change its logits, and "
            "would be lost. Remove them (what register_forward_hook returned has remove()), or build them into the "
            "layers that export() gives without them."
        )
    return layers
