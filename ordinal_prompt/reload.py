"""Models with exported heads, from disk into the architecture that they came from."""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ordinal_prompt.classifiers import find_classifiers, submodule
from ordinal_prompt.export import linear_layer, no_linear_layer, unit_norm
from ordinal_prompt.places import pointwise, side_by_side
from ordinal_prompt.swap import put

STATES = ("state_dict", "model_state_dict", "model")  # what checkpoints call the state dict
PREFIXES = ("module.", "_orig_mod.", "model.")
FILES = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors", "*.bin", "*.pth", "*.pt")


def load_exported(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> nn.Module:
    """Loads what was saved of a model after `export_heads` into a model of the original architecture.

    `ViTForImageClassification.from_pretrained(folder)` alone refuses such a folder, for its classifier is no linear
    layer any more.  This is its way back:
    `op.load_exported(ViTForImageClassification(ViTConfig.from_pretrained(folder)), folder)`.

    Args:
        model: of the original architecture, with or without weights, with any classifier; changed in place.
        source: a state dict, a file that holds one, or a folder with such a file, as `save_pretrained` writes it.  A
            checkpoint that holds the state dict under a name will do; prefixes of Lightning, torch.compile and
            DistributedDataParallel are taken off.

    Returns:
        The model, in eval mode; its head on the device and in the precision that the model has.

    Raises:
        FileNotFoundError: no such folder or file, or no weights in it.
        ValueError: weights that belong to another architecture, or are not all there; they are listed.
        TypeError: no model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected `model` to be a torch.nn.Module, but got {type(model).__name__}.")
    whole, model = model, getattr(model, "_orig_mod", model)  # of a compiled one
    state = _weights(source if isinstance(source, Mapping) else _read(Path(source)), model)
    like = next((part for part in model.parameters() if part.is_floating_point()), None)
    if any(name.endswith("prompt.rank_embeddings") for name in state):
        raise ValueError(
            "Expected the weights of an exported model, but these hold a prompt head. Put such a head into the model "
            "(op.replace_head), load them with load_state_dict, and then call op.export_heads."
        )
    heads = _exported(state)
    places = [*heads]
    for name in heads:
        of_attributes = _attributes(state, name)
        layers: nn.Module = side_by_side(of_attributes) if of_attributes else _layers(state, name)
        place = name
        if submodule(model, place) is None and name.endswith(".head"):
            place, layers = name.removesuffix(".head"), pointwise(layers)
        if submodule(model, place) is None:
            hint = "; merge the adapter first (merge_and_unload)" if "base_model." in place else ""
            raise ValueError(
                f"The weights have an exported head at {name}, but {type(model).__name__} has no {place}{hint}."
            )
        places.append(place)
        put(model, place, _to(layers, like))
    for name in _linear(model, state):
        places.append(name)
        put(model, name, _to(linear_layer(state[f"{name}.weight"], state.get(f"{name}.bias")), like))
    if not isinstance(source, Mapping) and Path(source).is_dir() and hasattr(model, "base_model_prefix"):
        prefixes = tuple(f"{name}." for name in places)
        of_heads = {name: tensor for name, tensor in state.items() if name.startswith(prefixes)}
        state = _read_by_transformers(model, source, prefixes) | of_heads
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # another size
        raise ValueError(f"The weights do not fit {type(model).__name__}: {error}") from error
    own = {name: part.data_ptr() for name, part in model.state_dict().items() if isinstance(part, Tensor)}
    loaded = {address for name, address in own.items() if name in state}
    missing = [name for name in missing if own.get(name) not in loaded]  # shared ones are there
    _refuse(model, {"missing": missing, "unknown": unexpected})
    return whole.eval()


def _refuse(model: nn.Module, names: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError where there are names of weights that do not fit."""
    told = [f"{_listed([*some])} {what}" for what, some in names.items() if some]
    if told:
        raise ValueError(
            f"The weights do not fit {type(model).__name__}: {'; '.join(told)}. Pass a model of the architecture that "
            "was exported."
        )


def _read_by_transformers(model: Any, folder: str | Path, heads: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights of all but the heads by the names that they have in the model, which files have others for."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would report the head as missing
    try:
        options: dict[str, Any] = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        loaded, info = type(model).from_pretrained(folder, config=model.config, **options)
    finally:
        logging.set_verbosity(verbosity)
    # What is not there, or of another size, transformers starts anew.
    kinds = {"missing_keys": "missing", "mismatched_keys": "of another size", "unexpected_keys": "unknown"}
    keys = {
        what: sorted({key if isinstance(key, str) else key[0] for key in info[kind]}) for kind, what in kinds.items()
    }
    _refuse(model, {what: [key for key in some if not key.startswith(heads)] for what, some in keys.items()})
    tensors: dict[str, Tensor] = loaded.state_dict()
    return {name: tensor for name, tensor in tensors.items() if name in model.state_dict()}


def _exported(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the exported heads in a state dict, which have an empty weight and layers with numbers for names.

    Of several heads side by side, whose layers are in `heads`, the name that they share.
    """
    marked = [
        name.removesuffix(".weight")
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and tensor.numel() == 0
    ]
    several = [name for name in marked if _attributes(state, name)]
    inside = tuple(f"{name}.heads." for name in several)
    numbered = re.compile(r"(.+)\.\d+\.weight")
    layers = {match[1] for match in map(numbered.fullmatch, state) if match}
    return [name for name in marked if name in several or (name in layers and not name.startswith(inside))]


def _attributes(state: Mapping[str, Tensor], name: str) -> dict[str, nn.Module]:
    """The layers of each of several heads side by side, in their order in the state dict."""
    inside = re.compile(re.escape(name) + r"\.heads\.([^.]+)\.(?:\d+\.)?weight")
    found = {match[1]: f"{name}.heads.{match[1]}" for match in map(inside.fullmatch, state) if match}
    plain = {place for place in found.values() if state.get(f"{place}.weight", torch.empty(0)).numel()}
    return {
        attribute: linear_layer(state[f"{place}.weight"], state.get(f"{place}.bias"))
        if place in plain
        else _layers(state, place)
        for attribute, place in found.items()
    }


def _layers(state: Mapping[str, Tensor], name: str) -> nn.Sequential:
    """The layers of an exported head, with its weights: the last linear one stands behind the norm."""
    pattern = re.compile(re.escape(name) + r"\.(\d+)\.weight")
    indices = sorted(int(match[1]) for match in map(pattern.fullmatch, state) if match)
    linear = [linear_layer(state[f"{name}.{i}.weight"], state.get(f"{name}.{i}.bias")) for i in indices]
    norm = unit_norm(linear[-1].in_features) if indices[-1] else []  # a single layer has none
    layers: Any = no_linear_layer(nn.Sequential(*linear[:-1], *norm, linear[-1]))
    layers.in_features, layers.out_features = linear[0].in_features, linear[-1].out_features
    whole: nn.Sequential = layers
    return whole


def _linear(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Names of the classifiers that were exported as one linear layer, and may be of another size in a fresh model."""
    try:
        names = find_classifiers(model)
    except ValueError:
        return []
    linear = [name for name in names if isinstance(model.get_submodule(name), nn.Linear)]
    return [name for name in linear if state.get(f"{name}.weight", torch.empty(0)).dim() == 2]


def _read(path: Path) -> Mapping[str, Tensor]:
    files = [path] if path.is_file() else next(filter(None, (sorted(path.glob(files)) for files in FILES)), [])
    if not files:
        raise FileNotFoundError(f"Found no weights in {path}; expected a file such as model.safetensors in a folder.")
    parts = [*map(_read_file, files)]
    return parts[0] if len(parts) == 1 else {name: tensor for part in parts for name, tensor in part.items()}


def _read_file(file: Path) -> Mapping[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    try:
        saved: Mapping[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Expected a state dict in {file}, but it holds more than tensors (a whole model?); load it with "
            "torch.load(file, weights_only=False) where you trust it, and pass its state_dict()."
        ) from error
    return saved


def _weights(saved: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The state dict in a checkpoint, with names as the model has them."""
    for name in STATES:
        if isinstance(saved.get(name), Mapping):
            saved = saved[name]
            break
    state: Any = OrderedDict((name, part) for name, part in saved.items() if isinstance(part, Tensor) or "." in name)
    versions: Mapping[str, Any] = getattr(saved, "_metadata", {})  # of modules whose state dicts have changed
    known, children = {*model.state_dict()}, {name.split(".")[0] for name, _ in model.named_modules()}
    more = True
    while more:
        more = False
        for prefix in PREFIXES:
            named = ((name.removeprefix(prefix), part) for name, part in state.items() if name.startswith(prefix))
            inside = OrderedDict(named)
            all_inside = bool(state) and len(inside) == len(state) and prefix[:-1] not in children
            if all_inside or len(known & {*inside}) > len(known & {*state}):  # beside a module's reference to its head
                more, state = True, inside
                below = ((f"{name}.".removeprefix(prefix), of) for name, of in versions.items() if name)
                versions = {name.removesuffix("."): of for name, of in below}
    if saved and not state:
        raise ValueError(f"Expected a state dict, but got no tensors among {_listed([*map(str, saved)])}.")
    if versions:
        state._metadata = OrderedDict(versions)
    found: dict[str, Tensor] = state
    return found


def _to(layers: nn.Module, like: Tensor | None) -> nn.Module:
    """On the device and in the precision of a tensor; where that has no data yet, as they are."""
    return layers if like is None or like.is_meta else layers.to(like.device, like.dtype)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
