"""Heads where a model's classifier was no single linear layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ordinal_prompt.export import linear_layer, no_linear_layer, unit_norm


class PointwiseHead(nn.Module):
    """A head in the place of a 1×1 convolution: features (B, C, ...) to logits (B, K, ...) at every position."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(features.movedim(1, -1))
        return logits.movedim(-1, 1)


class Elsewhere(NamedTuple):
    """A module by its name inside of another, without being registered; in a copy of that other, the copy's."""

    holder: nn.Module
    name: str

    def __deepcopy__(self, memo: dict[int, Any]) -> Elsewhere:
        return Elsewhere(memo.get(id(self.holder), self.holder), self.name)


class SharedHead(nn.Module):
    """A head that stands elsewhere in the model, too: its parameters are registered, and saved, there alone.

    It is looked up by name, so that it is the one that trains where PEFT, FSDP and the like put another there.
    """

    def __init__(self, holder: nn.Module, name: str) -> None:
        super().__init__()
        self.elsewhere = Elsewhere(holder, name)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(features)
        return logits

    @property
    def head(self) -> nn.Module:
        return self.elsewhere.holder.get_submodule(self.elsewhere.name)

    @property
    def in_features(self) -> int | None:
        return getattr(self.head, "in_features", None)

    @property
    def out_features(self) -> int | None:
        return getattr(self.head, "out_features", None)


def of_adapter(module: Any) -> nn.Module:
    """What runs in a place: where PEFT saves a module whole, the active adapter's copy of it."""
    saved, active = getattr(module, "modules_to_save", None), getattr(module, "active_adapters", None)
    if not isinstance(saved, nn.ModuleDict) or not active:
        running: nn.Module = module
        return running
    return module.original_module if module.disable_adapters else saved[active[0]]


def pointwise(layers: nn.Module) -> nn.Module:
    """`PointwiseHead` of plain layers, as a graph that runs without this package."""
    graph = torch.fx.Graph()
    last = graph.call_method("movedim", (graph.placeholder("features"), 1, -1))
    graph.output(graph.call_method("movedim", (graph.call_module("head", (last,)), -1, 1)))
    return no_linear_layer(torch.fx.GraphModule(PointwiseHead(layers), graph)).eval()


def side_by_side(layers: Mapping[str, nn.Module]) -> nn.Module:
    """Plain layers of several heads, from features (..., in_features) to a dictionary, as a graph like `pointwise`."""
    root, graph = nn.Module(), torch.fx.Graph()
    root.heads = nn.ModuleDict(layers)
    features = graph.placeholder("features")
    graph.output({name: graph.call_module(f"heads.{name}", (features,)) for name in layers})
    return no_linear_layer(torch.fx.GraphModule(root, graph)).eval()


def below(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The part of a state dict that belongs to a module."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): part for key, part in state.items() if key.startswith(prefix)}


def layers_from(state: Mapping[str, Tensor]) -> nn.Module | None:
    """The plain layers of a head from their weights; None where these are not such a head's."""
    several = dict.fromkeys(name.split(".")[1] for name in state if name.startswith("heads."))
    if several:
        layers = {name: layers_from(below(state, f"heads.{name}")) for name in several}
        parts = {name: part for name, part in layers.items() if part is not None}
        return side_by_side(parts) if len(parts) == len(layers) else None
    if any(name.startswith("head.") for name in state):
        inner = layers_from(below(state, "head"))
        return None if inner is None else pointwise(inner)
    weight = state.get("weight")
    if weight is not None and weight.dim() == 2:
        return linear_layer(weight, state.get("bias"))
    return _numbered(state)


def _numbered(state: Mapping[str, Tensor]) -> nn.Module | None:
    """Layers with numbers for names: the last linear one stands behind the norm."""
    indices = sorted(int(name.split(".")[0]) for name in state if re.fullmatch(r"\d+\.weight", name))
    if not indices or any(state[f"{i}.weight"].dim() != 2 for i in indices):
        return None
    linear = [linear_layer(state[f"{i}.weight"], state.get(f"{i}.bias")) for i in indices]
    norm = unit_norm(linear[-1].in_features) if indices[-1] else []  # a single layer has none
    layers: Any = no_linear_layer(nn.Sequential(*linear[:-1], *norm, linear[-1]))
    layers.in_features, layers.out_features = linear[0].in_features, linear[-1].out_features
    whole: nn.Sequential = layers
    return whole
