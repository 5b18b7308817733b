"""Putting a head in the place of a model's classifier, and plain layers in the place of heads."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ordinal_prompt.attributes import OrdinalPromptHeads
from ordinal_prompt.cache import tensors_of
from ordinal_prompt.classifiers import (
    CONVOLUTIONS,
    feature_width,
    find_classifiers,
    follow_classes,
    is_activation,
    labels_of,
    named_classifier,
    set_labels,
)
from ordinal_prompt.export import check_loaded, linear_layer, no_linear_layer
from ordinal_prompt.head import OrdinalPromptHead
from ordinal_prompt.places import PointwiseHead, SharedHead, of_adapter, pointwise

PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
AUXILIARY = ("aux1", "aux2", "AuxLogits")  # torchvision's


def replace_head(model: nn.Module, head: nn.Module, name: str | None = None) -> nn.Module:
    """Puts a head in the place of a model's classifier.

    The classifier is the layer that the model itself names (timm), that gives the labels (transformers), or that has a
    classifier's name (`fc`, `classifier`, `head`, …; of a small network under such a name, its last linear layer), or
    the only linear one, or the last layer of an `nn.Sequential`.  An earlier prompt head, or what was exported of one,
    is found the same way.  The head is moved to the classifier's device.

    - Classifiers whose logits the model averages (distilled models) are replaced together by the one head.
    - Auxiliary classifiers of torchvision's GoogLeNet and Inception are switched off.
    - In the place of a 1×1 convolution the head gives logits at every position.
    - An activation behind the classifier in its `nn.Sequential`, or at the end of one around it, would cut logits off,
      and becomes `nn.Identity`.
    - The model's own count of classes (`num_classes`, `num_labels`) follows; so do the names of the labels and the
      problem type of a transformers config, so that the model computes a cross-entropy where it is given `labels=`.
      Other configs stay as they are.

    Args:
        model: a model of timm, torchvision or transformers, or any other; changed in place.
        head: the new head; one with `in_features` is checked against the classifier's.
        name: the classifier's name in the model, as in `model.named_modules()`; default: found.

    Returns:
        The model.

    Raises:
        ValueError: no classifier, or several (they are listed); a width that does not fit; a PEFT model, whose adapter
            would not hold the head; a model inside DistributedDataParallel.  The model is then as it was.
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
    given: nn.Module = model
    model = getattr(model, "_orig_mod", model)  # of a compiled one
    if isinstance(model, (OrdinalPromptHead, OrdinalPromptHeads)):
        raise ValueError(
            "Expected `model` to be the model whose head is replaced, but got a prompt head; swap the two."
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "DistributedDataParallel synchronizes the parameters that it was given, and would leave the head out; "
            "replace the head of the model first, and then wrap it."
        )
    found = find_classifiers(model) if name is None else [named_classifier(model, name.removeprefix("_orig_mod."))]
    widths = {feature_width(model, model.get_submodule(place)) for place in found}
    if len(widths) > 1:
        raise ValueError(
            f"{type(model).__name__} averages the logits of {', '.join(found)}, whose features have different widths; "
            "one head cannot take them all. Name one (name=) to replace it alone, with as many outputs as before."
        )
    for place in found:
        _check_place(model, place, head, shared=len(found) > 1)
    old: Any = model.get_submodule(found[0])
    weight = next(old.parameters(), None)
    if weight is not None and not weight.is_meta:
        head.to(weight.device)
    head.train(old.training)
    if not isinstance(old, nn.Identity):
        new: Any = head
        new.replaces_bias = getattr(old, "replaces_bias", getattr(old, "bias", None) is not None)
    restore = snapshot(model)
    try:
        put(model, found[0], head)
        for place in found[1:]:
            put(model, place, _shared(model, found[0], place))
    except BaseException:
        restore()
        raise
    _warn_of_shared_weights(model, head)
    return given


def export_heads(model: nn.Module, inplace: bool = True) -> nn.Module:
    """Replaces every prompt head inside a model by its `export()`: plain layers, and no text encoder.

    A head that is one linear map (`normalize=False`) becomes an `nn.Linear`, and what is saved of the model loads into
    the original architecture.  Any other becomes several layers.  Their weights do not fit a linear layer, so that the
    original architecture refuses them; load them with `load_exported`.  The layers have the precision of the rest of
    the model, if it has but one.

    Args:
        model: a model that holds prompt heads, or a head.
        inplace: change the model; False returns a changed copy (without copying text encoders) and leaves it as it is.

    Returns:
        The model (or, for a head, its export).

    Raises:
        ValueError: no prompt head in the model; learned tensors that are not finite, or that accelerate has offloaded.
        TypeError: no model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected `model` to be a torch.nn.Module, but got {type(model).__name__}.")
    several = [module for module in model.modules() if isinstance(module, OrdinalPromptHeads)]
    outside = (part for _, part in model.named_modules(memo={*several}))  # one of several may also stand by itself
    alone = [part for part in outside if isinstance(part, OrdinalPromptHead)]
    heads: list[OrdinalPromptHead | OrdinalPromptHeads] = [*several, *alone]
    if not heads:
        raise ValueError(f"Expected a model with an OrdinalPromptHead in it, but {type(model).__name__} has none.")
    for head in heads:
        check_loaded(head)
    exported = {id(head): _exported(head) for head in heads}
    of_heads = {id(part) for head in heads for part in head.parameters()}
    dtypes = {part.dtype for part in model.parameters() if id(part) not in of_heads and part.is_floating_point()}
    precision = next(iter(dtypes), None)
    if len(dtypes) == 1 and precision in PRECISIONS:  # features come in it, and stock layers take no other
        exported = {key: layers.to(dtype=precision) for key, layers in exported.items()}
    compiled = [(id(part), id(part._orig_mod)) for part in model.modules() if hasattr(part, "_orig_mod")]
    exported |= {key: exported[inner] for key, inner in compiled if inner in exported}
    if not inplace:
        model = exported.get(id(model)) or copy.deepcopy(model, {**exported})
    _replace(model, {id(heads): exported[id(heads)] for heads in several})  # first: they keep the heads that they hold
    _replace(model, exported)
    shared = [part for part in model.modules() if isinstance(part, SharedHead)]
    layers = [of_adapter(part.head) for part in shared]
    _replace(model, {id(part): copy.deepcopy(layer) for part, layer in zip(shared, layers, strict=True)})
    over_maps = {id(part): pointwise(part.head) for part in model.modules() if isinstance(part, PointwiseHead)}
    _replace(model, over_maps)
    return exported.get(id(model), over_maps.get(id(model), model))


def _warn_of_shared_weights(model: nn.Module, head: nn.Module) -> None:
    """Warns where a frozen text encoder is a part of the model that trains."""
    heads = [one for one in head.modules() if isinstance(one, OrdinalPromptHead) and one.config.freeze_text_encoder]
    memory = {tensor.data_ptr() for one in heads for tensor in tensors_of(one.text_encoder) if not tensor.is_meta}
    if any(part.requires_grad and part.data_ptr() in memory for part in model.parameters()):
        warnings.warn(
            f"The text encoder of this head shares its weights with {type(model).__name__}: training the model changes "
            "the prototypes, and copies of the model (averaged or best ones) do not take it along. Build the head on "
            "a copy of the text model, copy.deepcopy(text_model).",
            stacklevel=3,
        )


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts a layer where the classifier `name` is, wherever that stands; what belongs to the classifier follows."""
    old: Any = model.get_submodule(name)
    over_map = isinstance(old, CONVOLUTIONS) and not isinstance(layer, (torch.fx.GraphModule, SharedHead))
    _replace(model, {id(old): PointwiseHead(layer) if over_map else layer})
    *parents, leaf = name.split(".")
    for depth, child in reversed([*enumerate([*parents, leaf])]):
        parent = model.get_submodule(".".join(parents[:depth]))
        later = [*parent.named_children()][[*parent._modules].index(child) + 1 :]
        own = depth == len(parents)
        if isinstance(parent, nn.Sequential) and (own or all(map(_is_at_the_end, dict(later).values()))):
            for other, module in later:
                if is_activation(module):
                    setattr(parent, other, nn.Identity())
    layer = layer.head if isinstance(layer, SharedHead) else layer
    for depth in range(len(parents) + 1):
        owner: Any = model.get_submodule(".".join(parents[:depth]))
        follow_classes(owner, layer)
        if getattr(owner, "aux_logits", False) is True and [*parents, leaf][depth] not in AUXILIARY:
            owner.aux_logits = False
            for auxiliary in AUXILIARY:
                if hasattr(owner, auxiliary):
                    setattr(owner, auxiliary, None)


def snapshot(model: nn.Module) -> Callable[[], None]:
    """A function that gives a model its modules, tensors and attributes back, and its configs their labels.

    These are the tensors that it has now, with the values that they have then.
    """
    parts = [*model.modules()]
    all_of = [of for part in parts for of in (vars(part), part._modules, part._parameters, part._buffers)]
    kept = [(of, {**of}) for of in all_of]
    configs = {id(config): config for config in (getattr(part, "config", None) for part in parts)}
    labels = [(config, labels_of(config)) for config in configs.values()]

    def restore() -> None:
        for of, before in kept:
            if isinstance(of, dict):  # TorchScript's are none, and lose nothing
                of.clear()
            for name, value in before.items():
                of[name] = value
        for config, names in labels:
            set_labels(config, names)

    return restore


def _is_at_the_end(module: nn.Module) -> bool:
    return is_activation(module) or isinstance(module, (nn.Identity, nn.Dropout, nn.Flatten))


def _shared(model: nn.Module, first: str, place: str) -> SharedHead:
    """The head of the first place, for another; known by its name below the module that holds both."""
    above: list[str] = []
    for one, other in zip(first.split("."), place.split("."), strict=False):
        if one != other:
            break
        above.append(one)
    name = first.removeprefix("".join(f"{part}." for part in above))
    return SharedHead(model.get_submodule(".".join(above)), name.split(".modules_to_save.")[0])  # of any adapter


def _exported(head: OrdinalPromptHead | OrdinalPromptHeads) -> nn.Module:
    """A head's export, in a form that the layer that it replaced takes whole, or not at all."""
    layers = head.export()
    wanted: bool | None = getattr(head, "replaces_bias", None)
    if type(layers) is not nn.Linear or wanted is None or wanted == (layers.bias is not None):
        return layers
    if wanted:
        return linear_layer(layers.weight, torch.zeros_like(layers.weight[:, 0]))
    return no_linear_layer(nn.Sequential(layers)).eval()


def _replace(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Puts modules in the place of others, given by their ids; a module may stand in several places."""
    for parent in [*model.modules()]:
        for leaf, child in [*parent._modules.items()]:
            if id(child) in replacements:
                setattr(parent, leaf, replacements[id(child)])


def _check_place(model: nn.Module, name: str, head: nn.Module, shared: bool) -> None:
    """Raises ValueError where a head does not fit the place of a classifier."""
    over_map = isinstance(model.get_submodule(name), CONVOLUTIONS)
    if isinstance(head, OrdinalPromptHeads) and (over_map or shared):
        raise ValueError(
            f"Expected one head in the place of {type(model).__name__}.{name}, whose logits the model "
            f"{'averages' if shared else 'gives at every position'}, but got heads of {', '.join(head)}; their logits "
            "come in a dictionary, so replace a linear classifier."
        )
    width, needed = feature_width(model, model.get_submodule(name)), getattr(head, "in_features", None)
    if width is not None and needed is not None and width != needed:
        raise ValueError(
            f"Expected a head for features of width {width}, which is what {type(model).__name__}.{name} takes, but "
            f"this one takes {needed}; build it with in_features={width}."
        )
    if hasattr(model, "peft_config") and "modules_to_save" not in name:
        layer = name.removeprefix("base_model.model.").split(".")[0]
        raise ValueError(
            f"{type(model).__name__} saves its adapter alone, and the head would be lost. Replace the head first, then "
            f"add the adapter, with modules_to_save=[{layer!r}] in its config."
        )
