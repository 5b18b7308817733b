"""Where a model's classifier is, the linear layer or 1×1 convolution that gives its logits; and its classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import activation

from ordinal_prompt.attributes import OrdinalPromptHeads
from ordinal_prompt.export import stands_for_linear
from ordinal_prompt.head import OrdinalPromptHead
from ordinal_prompt.places import SharedHead

# What timm, torchvision, transformers and most plain models call their classifier.
CLASSIFIER_NAMES = frozenset(
    ["fc", "classifier", "head", "heads", "score", "last_linear", "classification_head", "output_layer", "lin_cls"]
)
NO_CLASSES = ("ForQuestionAnswering", "ForMultipleChoice")  # of transformers: their linear layer gives no classes
MAX_LISTED = 12
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LABELS = ("num_labels", "problem_type", "id2label", "label2id")  # of a transformers config


def find_classifiers(model: nn.Module) -> list[str]:
    """The name of the classifier; several names where the model takes the logits of several together.

    Raises:
        ValueError: no classifier, or several that are not known to belong together (they are listed).
    """
    if type(model).__name__.endswith(NO_CLASSES):
        raise ValueError(
            f"{type(model).__name__} gives no classes; build the model ForSequenceClassification of this architecture."
        )
    own = _named_by_timm(model) or _named_by_transformers(model)
    if own:
        return own
    candidates = _candidates(model)
    if len(candidates) > 1:  # of transformers, and inside its base model
        classes = getattr(getattr(model, "config", None), "num_labels", 0)
        fitting = [name for name in candidates if num_outputs(model.get_submodule(name)) == classes]
        candidates = fitting if len(fitting) == 1 else candidates
    if len(candidates) == 1:
        return candidates
    if not candidates:
        raise ValueError(
            f"Found no linear classifier in {type(model).__name__}; pass name= with the name of the module to replace, "
            "as in model.named_modules()."
        )
    raise ValueError(
        f"Found {len(candidates)} modules in {type(model).__name__} that may be the classifier: {_listed(candidates)}; "
        "pass name= with the one to replace."
    )


def named_classifier(model: nn.Module, name: str) -> str:
    """The classifier of this name, or the only one inside the module of this name.

    Raises:
        ValueError: no such module.
        TypeError: a module that is no classifier.
    """
    module = submodule(model, name)
    if not name or module is None:
        known = _listed(_named_by_timm(model) or _named_by_transformers(model) or _candidates(model)) or "none found"
        raise ValueError(
            f"{type(model).__name__} has no module named {name!r}; candidates for the classifier: {known}."
        )
    if isinstance(module, nn.Identity) or is_classifier(module):
        return name
    inside = _classifiers(module)
    if isinstance(module, nn.Sequential) and len(inside) == 1:
        return f"{name}.{inside[0]}"
    raise TypeError(
        f"Expected {type(model).__name__}.{name} to be a linear layer, but it is a {type(module).__module__}."
        f"{type(module).__name__}; name the linear layer itself."
    )


def is_classifier(module: Any) -> bool:
    """Whether a module may be a classifier: a linear map at every position, or what stands for one."""
    if isinstance(module, CONVOLUTIONS):
        return set(module.kernel_size) == set(module.stride) == {1} and module.groups == 1
    if isinstance(module, torch.fx.GraphModule):  # what was exported of several heads
        return isinstance(getattr(module, "heads", None), nn.Module) and hasattr(module, "weight")
    ours = (OrdinalPromptHead, OrdinalPromptHeads, SharedHead)
    return isinstance(module, (nn.Linear, *ours)) or stands_for_linear(module)


def feature_width(model: nn.Module, classifier: Any) -> int | None:
    """Width of the features that reach the classifier, where it is known."""
    if isinstance(classifier, nn.modules.lazy.LazyModuleMixin):
        return None  # not known before the first batch
    width = getattr(classifier, "in_features", getattr(classifier, "in_channels", None))
    if width is None and isinstance(classifier, nn.Identity):  # timm with num_classes=0
        width = getattr(model, "head_hidden_size", None) or getattr(model, "num_features", None)
    elif width is None and isinstance(classifier, nn.Sequential):
        first = classifier[0]
        width = first.normalized_shape[0] if isinstance(first, nn.RMSNorm) else getattr(first, "in_features", None)
    return width if isinstance(width, int) else None


def num_outputs(classifier: Any) -> int | None:
    """K, where it is known."""
    if isinstance(classifier, torch.fx.GraphModule):
        classifier = getattr(classifier, "head", None)
    if isinstance(classifier, nn.Sequential):
        classifier = classifier[-1]
    count = getattr(classifier, "num_ranks", getattr(classifier, "out_features", None))
    return count if isinstance(count, int) else None


def follow_classes(model: Any, head: nn.Module) -> None:
    """Makes a model's own count of classes, and its names for them, those of a head."""
    count = num_outputs(head)
    if count is None:
        return
    for attribute in ("num_classes", "num_labels"):
        fixed = (
            isinstance(getattr(type(model), attribute, None), property) and getattr(type(model), attribute).fset is None
        )
        if not fixed and isinstance(getattr(model, attribute, None), int):
            setattr(model, attribute, count)
    _follow_labels(getattr(model, "config", None), head, count)


def _follow_labels(config: Any, head: nn.Module, count: int) -> None:
    """The labels of a config that names them, as transformers' do; one that cannot be written stays as it is."""
    before = labels_of(config)
    if not (isinstance(before.get("num_labels"), int) and "id2label" in before):
        return
    labels: dict[str, Any] = {"num_labels": count}  # also makes names of the labels
    if count > 1:
        labels["problem_type"] = "single_label_classification"
    names = getattr(head, "rank_names", None)
    if names:
        labels["id2label"] = dict(enumerate(names))
        labels["label2id"] = {name: index for index, name in enumerate(names)}
    try:
        set_labels(config, {name: value for name, value in labels.items() if name in before})
    except Exception:  # a frozen one, or one that checks what is written
        set_labels(config, before)


def labels_of(config: Any) -> dict[str, Any]:
    """What a config says of the labels."""
    return {name: getattr(config, name) for name in LABELS if hasattr(config, name)}


def set_labels(config: Any, labels: Mapping[str, Any]) -> None:
    """Writes what is different."""
    for name, value in labels.items():
        if getattr(config, name) != value:
            setattr(config, name, value)


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    """The module of this name, or None."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _named_by_timm(model: nn.Module) -> list[str]:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    own = config.get("classifier") if isinstance(config, dict) else None
    names = []
    for name in [own] if isinstance(own, str) else own or []:
        module = submodule(model, name)
        if module is None:
            continue
        inside = [] if is_classifier(module) else _classifiers(module)  # of one that was replaced
        names.append(f"{name}.{inside[0]}" if len(inside) == 1 else name)
    fits = all(isinstance(module := submodule(model, name), nn.Identity) or is_classifier(module) for name in names)
    return names if fits else []


def _named_by_transformers(model: nn.Module) -> list[str]:
    """The layers outside the base model that give the labels; of two such (distillation), the logits are averaged."""
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    if classes is None:
        return []
    base = [*getattr(model, "base_model", model).modules()]
    outside = [name for name in _linear(model) if model.get_submodule(name) not in base]
    named = [name for name in outside if num_outputs(model.get_submodule(name)) == classes]
    together = all("classifier" in name or "head" in name for name in named)
    return named if together or len(named) == 1 else []


def is_activation(module: nn.Module) -> bool:
    """Whether this is one of torch's activations."""
    return type(module).__module__ == activation.__name__


def _candidates(model: nn.Module) -> list[str]:
    """Names of the layers that may be the classifier, the likeliest kind only."""
    linear = _linear(model)
    last = _last_of_sequential(model)
    if last and is_classifier(model.get_submodule(last)):
        return [last]
    groups: dict[str, list[str]] = {}  # the module with a classifier's name: the linear layers in it
    for name in linear or _classifiers(model):
        parts = name.split(".")
        named = [i for i, part in enumerate(parts) if part in CLASSIFIER_NAMES]
        if named:
            groups.setdefault(".".join(parts[: named[0] + 1]), []).append(name)
    removed = [name for name, module in model.named_children() if isinstance(module, nn.Identity)]
    groups |= {name: [name] for name in removed if name in CLASSIFIER_NAMES}
    if not groups:
        return linear or _last_of_several(model, _classifiers(model))
    depth = min(name.count(".") for name in groups)
    found = [
        layer for name, inside in groups.items() if name.count(".") == depth for layer in _last(model, name, inside)
    ]
    # A layer further out is no part of what is named like a classifier, and may be behind it.
    return found + [name for name in linear if name.count(".") < depth]


def _last(model: nn.Module, name: str, inside: list[str]) -> list[str]:
    """Of the layers inside a small network, the last; several where that cannot be told."""
    module = model.get_submodule(name)
    if len(inside) == 1:
        return inside
    if isinstance(module, (nn.ModuleDict, nn.ModuleList)):
        return inside
    if isinstance(module, nn.Sequential):
        return inside[-1:] if inside[-1].count(".") == name.count(".") + 1 else _last_of_several(model, inside)
    return _last_of_several(model, inside)


def _last_of_several(model: nn.Module, names: list[str]) -> list[str]:
    """The layers whose outputs are not as many as another's inputs."""
    layers = {name: model.get_submodule(name) for name in names}
    widths = {name: feature_width(model, layer) for name, layer in layers.items()}
    outputs = {name: getattr(layer, "out_channels", num_outputs(layer)) for name, layer in layers.items()}
    ends = [name for name in names if all(outputs[name] != widths[other] for other in names if other != name)]
    return ends or names


def _classifiers(model: nn.Module) -> list[str]:
    """Names of all layers that may be a classifier, but for those inside of one."""
    names: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in names[-1:])
        replaced = "original_module" in name.split(".")  # PEFT keeps what it trains a copy of
        if name and not inside and not replaced and is_classifier(module):
            names.append(name)
    return names


def _linear(model: nn.Module) -> list[str]:
    return [name for name in _classifiers(model) if not isinstance(model.get_submodule(name), CONVOLUTIONS)]


def _last_of_sequential(model: nn.Module) -> str:
    name, module = "", model
    while isinstance(module, nn.Sequential) and len(module) and not is_classifier(module):
        layers = [(leaf, layer) for leaf, layer in module.named_children() if not is_activation(layer)]
        if not layers:
            break
        leaf, module = layers[-1]
        name = f"{name}.{leaf}" if name else leaf
        if "_orig_mod" in module._modules:  # a compiled one
            name, module = f"{name}._orig_mod", module.get_submodule("_orig_mod")
    return name


def _listed(names: list[str]) -> str:
    return ", ".join(names[:MAX_LISTED]) + (", …" if len(names) > MAX_LISTED else "")
