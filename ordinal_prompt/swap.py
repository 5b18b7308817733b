"""Putting a head in the place of a model's classifier, and plain layers in the place of heads."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from ordinal_prompt.head import OrdinalPromptHead

# What timm, torchvision, transformers and most plain models call their classifier.
CLASSIFIER_NAMES = frozenset(
    ["fc", "classifier", "head", "heads", "score", "last_linear", "classification_head", "output_layer", "lin_cls"]
)
MAX_LISTED = 12


def replace_head(model: nn.Module, head: nn.Module, name: str | None = None) -> nn.Module:
    """Puts a head in the place of a model's classifier.

    The classifier is the linear layer that the model itself names (timm), or that has a classifier's name (`fc`,
    `classifier`, `head`, …; of a small network under such a name, its last linear layer), or the only one, or the last
    layer of an `nn.Sequential`.  An earlier prompt head is found the same way.  The head is moved to the classifier's
    device, and the model's own count of classes (`num_classes`, `num_labels`) follows.

    Args:
        model: a model of timm, torchvision or transformers, or any other; changed in place.
        head: the new head; one with `in_features` is checked against the classifier's.
        name: the classifier's name in the model, as in `model.named_modules()`; default: found.

    Returns:
        The model.

    Raises:
        ValueError: no classifier, or several (they are listed); a width that does not fit.
        TypeError: a model or head that is no module; a named module that is no linear layer.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 10))
    >>> replace_head(model, nn.Linear(4, 3))
    Sequential(
      (0): Linear(in_features=8, out_features=4, bias=True)
      (1): ReLU()
      (2): Linear(in_features=4, out_features=3, bias=True)
    )
    """
    for argument, value in (("model", model), ("head", head)):
        if not isinstance(value, nn.Module):
            raise TypeError(f"Expected `{argument}` to be a torch.nn.Module, but got {type(value).__name__}.")
    found = _find(model) if name is None else _named(model, name)
    old: Any = model.get_submodule(found)
    width, needed = _width(model, old), getattr(head, "in_features", None)
    if width is not None and needed is not None and width != needed:
        raise ValueError(
            f"Expected a head for features of width {width}, which is what {type(model).__name__}.{found} takes, but "
            f"this one takes {needed}; build it with in_features={width}."
        )
    weight = next(old.parameters(), None)
    if weight is not None:
        head.to(weight.device)
    head.train(old.training)
    _replace(model, {id(old): head})
    parts = found.split(".")
    for depth in range(len(parts)):
        _follow_classes(model.get_submodule(".".join(parts[:depth])), head)
    return model


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
    heads = [module for module in model.modules() if isinstance(module, OrdinalPromptHead)]
    if not heads:
        raise ValueError(f"Expected a model with an OrdinalPromptHead in it, but {type(model).__name__} has none.")
    exported = {id(head): head.export() for head in heads}
    if not inplace:
        model = exported.get(id(model)) or copy.deepcopy(model, {**exported})
    _replace(model, exported)
    return exported.get(id(model), model)


def _replace(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Puts modules in the place of others, given by their ids; a module may stand in several places."""
    for parent in [*model.modules()]:
        for leaf, child in [*parent._modules.items()]:
            if id(child) in replacements:
                setattr(parent, leaf, replacements[id(child)])


def _find(model: nn.Module) -> str:
    candidates = _candidates(model)
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise ValueError(
            f"Found no linear classifier in {type(model).__name__}; pass name= with the name of the module to replace, "
            "as in model.named_modules()."
        )
    listed = ", ".join(candidates[:MAX_LISTED]) + (", …" if len(candidates) > MAX_LISTED else "")
    raise ValueError(
        f"Found {len(candidates)} modules in {type(model).__name__} that may be the classifier: {listed}; pass name= "
        "with the one to replace."
    )


def _candidates(model: nn.Module) -> list[str]:
    """Names of the linear layers that may be the classifier, the likeliest kind only."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    own = config.get("classifier") if isinstance(config, dict) else None
    if own:  # timm
        names = [own] if isinstance(own, str) else list(own)
        names = [name for name in names if _submodule(model, name) is not None]
        if all(isinstance(_submodule(model, name), (nn.Linear, nn.Identity, OrdinalPromptHead)) for name in names):
            return names
    linear = [
        name for name, module in model.named_modules() if name and _is_linear(module) and not _inside_head(model, name)
    ]
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    if classes is not None:  # transformers: the one layer outside the base model that gives the labels
        base = [*getattr(model, "base_model", model).modules()]
        outside = [name for name in linear if model.get_submodule(name) not in base]
        named = [name for name in outside if getattr(model.get_submodule(name), "out_features", None) == classes]
        if len(named) == 1:
            return named
    groups: dict[str, str] = {}  # the module with a classifier's name: its last linear layer
    for name in linear:
        parts = name.split(".")
        named = [i for i, part in enumerate(parts) if part in CLASSIFIER_NAMES]
        if named:
            groups[".".join(parts[: named[0] + 1])] = name
    if groups:
        depth = min(name.count(".") for name in groups)
        return [layer for name, layer in groups.items() if name.count(".") == depth]
    last = _last_of_sequential(model)
    return [last] if last in linear else linear


def _last_of_sequential(model: nn.Module) -> str:
    name, module = "", model
    while isinstance(module, nn.Sequential) and len(module):
        leaf, module = [*module.named_children()][-1]
        name = f"{name}.{leaf}" if name else leaf
    return name


def _named(model: nn.Module, name: str) -> str:
    module = _submodule(model, name)
    if not name or module is None:
        known = ", ".join(_candidates(model)[:MAX_LISTED]) or "none found"
        raise ValueError(
            f"{type(model).__name__} has no module named {name!r}; candidates for the classifier: {known}."
        )
    if isinstance(module, nn.Sequential):
        linear = [leaf for leaf, layer in module.named_modules() if leaf and _is_linear(layer)]
        if len(linear) == 1:
            return f"{name}.{linear[0]}"
    if not _is_linear(module) and not isinstance(module, nn.Identity):
        raise TypeError(
            f"Expected {type(model).__name__}.{name} to be a linear layer, but it is a {type(module).__name__}; name "
            "the linear layer itself."
        )
    return name


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, OrdinalPromptHead))


def _inside_head(model: nn.Module, name: str) -> bool:
    """Whether a layer is part of a prompt head."""
    parts = name.split(".")
    parents = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))
    return any(isinstance(parent, OrdinalPromptHead) for parent in parents)


def _width(model: nn.Module, old: Any) -> int | None:
    """Width of the features that reach the classifier, where it is known."""
    width = getattr(old, "in_features", None)
    if width is None and isinstance(old, nn.Identity):  # timm with num_classes=0
        width = getattr(model, "head_hidden_size", None) or getattr(model, "num_features", None)
    return width if isinstance(width, int) else None


def _follow_classes(model: Any, head: nn.Module) -> None:
    count = getattr(head, "num_ranks", getattr(head, "out_features", None))
    if count is None:
        return
    for attribute in ("num_classes", "num_labels"):
        if isinstance(getattr(model, attribute, None), int):
            setattr(model, attribute, count)
    config: Any = getattr(model, "config", None)
    if isinstance(getattr(config, "num_labels", None), int):
        config.num_labels = count
