"""Models with exported heads, from disk into the architecture that they came from."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ordinal_prompt.classifiers import CONVOLUTIONS, find_classifiers, submodule
from ordinal_prompt.export import is_marker, linear_layer
from ordinal_prompt.places import below, layers_from
from ordinal_prompt.swap import put, snapshot

STATES = ("state_dict", "model_state_dict", "model")  # what checkpoints call the state dict
PREFIXES = ("module.", "_orig_mod.", "model.")
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
STANDARD = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def load_exported(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> nn.Module:
    """Loads what was saved of a model after `export_heads` into a model of the original architecture.

    `ViTForImageClassification.from_pretrained(folder)` alone refuses such a folder, for its classifier is no linear
    layer any more.  This is its way back:
    `op.load_exported(ViTForImageClassification(ViTConfig.from_pretrained(folder)), folder)`.

    Args:
        model: of the original architecture, with or without weights, with any classifier; changed in place.  Tensors on
            the meta device get memory where the others are, or on the CPU.
        source: a state dict, a file that holds one, or a folder with such a file, as `save_pretrained` writes it.  A
            checkpoint that holds the state dict under a name will do; prefixes of Lightning, torch.compile and
            DistributedDataParallel are taken off.

    Returns:
        The model, in eval mode; its head on the device and in the precision that the model has.

    Raises:
        FileNotFoundError: no such folder or file, or no weights in it.
        ValueError: weights that belong to another architecture, or are not all there (they are listed); a folder with
            several files that are no shards of one and have no standard name.  The model is then as it was.
        TypeError: no model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected `model` to be a torch.nn.Module, but got {type(model).__name__}.")
    whole, model = model, getattr(model, "_orig_mod", model)  # of a compiled one
    state = _weights(source if isinstance(source, Mapping) else _read(Path(source)), model)
    _check_source(model, state)
    restore = snapshot(model)
    try:
        places = _put_heads(model, state)
        if hasattr(model, "base_model_prefix") and not isinstance(source, Mapping) and _standard(Path(source)):
            state = _named_by_transformers(model, state, source, places)
        # Some savers drop markers, and those of earlier versions were empty.
        state |= {name: part for name, part in model.state_dict().items() if is_marker(part) and not part.is_meta}
        _check(model, state)
    except BaseException:
        restore()
        raise
    device = next((part.device for part in model.parameters() if not part.is_meta), "cpu")
    for part, name, empty in _empty(model, device):
        setattr(part, name, empty)
    model.load_state_dict(state, strict=False)
    return whole.eval()


def _check_source(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError where weights are no exported model's, or the model cannot take any."""
    if any(name.endswith("prompt.rank_embeddings") for name in state):
        raise ValueError(
            "Expected the weights of an exported model, but these hold a prompt head. Put such a head into the model "
            "(op.replace_head), load them with load_state_dict, and then call op.export_heads."
        )
    if any(hasattr(part, "_hf_hook") and any(own.is_meta for own in part.parameters()) for part in model.modules()):
        raise ValueError(
            f"The weights of this {type(model).__name__} are where accelerate has offloaded them, and it would not use "
            "others. Load the exported weights first, and then offload the model."
        )


def _put_heads(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Puts layers of the exported sizes into the model, and returns their places."""
    floating = [part for part in model.parameters() if part.is_floating_point()]
    like = next((part for part in floating if not part.is_meta), next(iter(floating), None))
    heads = _exported(model, state)
    for place, layers in heads.items():
        if submodule(model, place) is None:
            hint = "; merge the adapter first (merge_and_unload)" if "base_model." in place else ""
            raise ValueError(
                f"The weights have an exported head at {place}, but {type(model).__name__} has no {place}{hint}."
            )
        put(model, place, _to(layers, like))
    linear = _linear(model, state)
    for place in linear:
        put(model, place, _to(linear_layer(state[f"{place}.weight"], state.get(f"{place}.bias")), like))
    return [*heads, *linear]


def _check(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError where weights and model do not fit, and leaves the model as it is."""
    own = {name: part for name, part in model.state_dict(keep_vars=True).items() if isinstance(part, Tensor)}
    restore = snapshot(model)
    try:
        for part, name, empty in _empty(model, "meta"):  # a trial, in which nothing is written
            (part._parameters if name in part._parameters else part._buffers)[name] = empty
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            missing, unknown = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # another size
        raise ValueError(f"The weights do not fit {type(model).__name__}: {error}") from error
    finally:
        restore()
    loaded = {_address(part) for name, part in own.items() if name in state}
    missing = [name for name in missing if not (name in own and _address(own[name]) in loaded)]  # shared: is there
    _refuse(model, {"missing": missing, "unknown": unknown})
    lost = [name for name, part in model.named_buffers() if part.is_meta and name not in own]
    if lost:
        raise ValueError(
            f"{type(model).__name__} is on the meta device, and no file has its {_listed(lost)}; build it on a real "
            "device, or with accelerate.init_empty_weights(), which leaves such buffers alone."
        )


def _address(tensor: Tensor) -> int:
    return id(tensor) if is_lazy(tensor) else tensor.data_ptr() or id(tensor)


def _empty(model: nn.Module, device: Any) -> Iterator[tuple[nn.Module, str, Any]]:
    """Tensors without values for the meta device, or of those on it for another: whose, name, and the tensor."""
    made: dict[Tensor, Tensor] = {}  # shared ones stay shared
    registered = [(part, of) for part in model.modules() for of in (part._parameters, part._buffers)]
    tensors: list[Any] = [(part, name, old) for part, of in registered for name, old in of.items()]
    for part, name, old in tensors:
        if old is None or old.is_meta == (device == "meta"):
            continue
        kind: Any = type(old)
        if is_lazy(old):
            new = kind(old.requires_grad, device, old.data.dtype)
        else:
            new = torch.empty_like(old, device=device)
            new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        yield part, name, made.setdefault(old, new)


def _refuse(model: nn.Module, names: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError where there are names of weights that do not fit."""
    told = [f"{_listed([*some])} {what}" for what, some in names.items() if some]
    if told:
        raise ValueError(
            f"The weights do not fit {type(model).__name__}: {'; '.join(told)}. Pass a model of the architecture that "
            "was exported."
        )


def _named_by_transformers(
    model: Any, state: dict[str, Tensor], folder: str | Path, places: list[str]
) -> dict[str, Tensor]:
    """The weights by the names that they have in the model, for which files of transformers may have others."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would report the head as missing
    try:
        options: dict[str, Any] = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        loaded, info = type(model).from_pretrained(folder, config=model.config, **options)
    finally:
        logging.set_verbosity(verbosity)
    # What is not there, or of another size, transformers starts anew.
    heads = tuple(f"{name}." for name in places)
    kinds = {"missing_keys": "missing", "mismatched_keys": "of another size", "unexpected_keys": "unknown"}
    keys = {
        what: sorted({key if isinstance(key, str) else key[0] for key in info[kind]}) for kind, what in kinds.items()
    }
    _refuse(model, {what: [key for key in some if not key.startswith(heads)] for what, some in keys.items()})
    known = model.state_dict()
    tensors = {name: tensor for name, tensor in loaded.state_dict().items() if name in known}
    return tensors | {name: tensor for name, tensor in state.items() if name.startswith(heads)}


def _exported(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """The layers of the exported heads in a state dict, by their places: where there is a marker and numbered layers.

    Of several markers some savers keep one.  There, numbered layers in the place of a linear layer will do.
    """
    marked = [name.removesuffix(".weight") for name, part in state.items() if is_marker(part)]
    plain = [name for name, part in model.named_modules() if isinstance(part, (nn.Linear, *CONVOLUTIONS))]
    found: dict[str, nn.Module] = {}
    for name in sorted({*marked, *plain} if marked else [], key=lambda name: (name.count("."), name)):
        layers = None if any(name.startswith(f"{outer}.") for outer in found) else layers_from(below(state, name))
        if layers is not None and type(layers) is not nn.Linear:
            found[name] = layers
    return found


def _linear(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Names of the classifiers that were exported as one linear layer, and may be of another size in a fresh model."""
    try:
        names = find_classifiers(model)
    except ValueError:
        return []
    linear = [name for name in names if isinstance(model.get_submodule(name), nn.Linear)]
    return [name for name in linear if state.get(f"{name}.weight", torch.empty(0)).dim() == 2]


def _standard(folder: Path) -> Path | None:
    """The file that libraries write weights to and look for, or the index of its shards."""
    return next((folder / name for name in STANDARD if (folder / name).is_file()), None)


def _read(path: Path) -> Mapping[str, Tensor]:
    """What is in a file, or in the one file of a folder; shards are joined."""
    standard = path if path.is_file() else _standard(path)
    if standard is None:
        files = sorted(file for file in path.glob("*") if file.suffix in SUFFIXES)
    elif standard.suffix == ".json":
        index = json.loads(standard.read_text(encoding="utf-8"))
        files = sorted({standard.parent / name for name in index["weight_map"].values()})
    else:
        files = [standard]
    if not files:
        raise FileNotFoundError(f"Found no weights in {path}; expected a file such as model.safetensors in a folder.")
    shards = standard is not None or len({re.sub(r"-\d+(?=-of-\d+\.)", "", file.name) for file in files}) == 1
    if not shards:
        raise ValueError(
            f"Expected one file of weights in {path}, but found {_listed([file.name for file in files])}; pass the one "
            f"to load, as in {str(files[0])!r}."
        )
    parts = [_read_file(file) for file in files]
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
                renamed = ((f"{name}.".removeprefix(prefix), of) for name, of in versions.items() if name)
                versions = {name.removesuffix("."): of for name, of in renamed}
    if saved and not state:
        raise ValueError(f"Expected a state dict, but got no tensors among {_listed([*map(str, saved)])}.")
    if versions:
        state._metadata = OrderedDict(versions)
    found: dict[str, Tensor] = state
    return found


def _to(layers: nn.Module, like: Tensor | None) -> nn.Module:
    """On the device and in the precision of a tensor."""
    return layers if like is None else layers.to("cpu" if like.is_meta else like.device, like.dtype)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
