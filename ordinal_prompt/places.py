"""Heads where a model's classifier was no single linear layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ordinal_prompt.export import no_linear_layer


class PointwiseHead(nn.Module):
    """A head in the place of a 1×1 convolution: features (B, C, ...) to logits (B, K, ...) at every position."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(features.movedim(1, -1))
        return logits.movedim(-1, 1)


class SharedHead(nn.Module):
    """A head that stands elsewhere in the model, too: its parameters are registered, and saved, there alone."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.elsewhere = (head,)  # a tuple does not register it

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.elsewhere[0](features)
        return logits


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
