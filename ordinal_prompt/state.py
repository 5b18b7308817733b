"""What a head's state dict says beside its tensors: of which ranks it is, and of which text encoder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

KEY, SETTINGS = "text_encoder", "settings"  # in the metadata of a state dict, which torch.save keeps
SAMPLES, ROUNDING = 8, 0.02  # numbers that tell text encoders apart, also in half precision


def tell(metadata: dict[str, Any], settings: dict[str, Any], text_encoder: Sequence[Tensor]) -> None:
    """Notes settings that tensors do not show, and a few weights of a text encoder that is not in the state dict."""
    metadata[SETTINGS], metadata[KEY] = settings, _sampled(text_encoder)


def told(metadata: dict[str, Any]) -> list[float]:
    """What `tell` noted; empty where a state dict has lost its metadata."""
    noted: list[float] = metadata.get(KEY, [])
    return noted


def warn_of_others(metadata: dict[str, Any], settings: dict[str, Any]) -> None:
    """Warns where a head with other settings wrote this state dict."""
    noted: dict[str, Any] = metadata.get(SETTINGS, settings)
    other = [f"{name}={noted[name]!r} (here {own!r})" for name, own in settings.items() if noted.get(name, own) != own]
    if other:
        warnings.warn(
            f"The state dict of this head was saved with other settings, and logits will not be the same: "
            f"{', '.join(other)}. Build the head as it was built then.",
            stacklevel=2,
        )


def warn_of_another(noted: list[float], text_encoder: Sequence[Tensor]) -> None:
    """Warns where these are not the weights that were noted."""
    now = _sampled(text_encoder)
    other = any(abs(a - b) > ROUNDING * max(abs(a), abs(b)) + 1e-6 for a, b in zip(noted, now, strict=False))
    if other and len(noted) == len(now):
        warnings.warn(
            "The state dict of this head was saved with other weights of the text encoder, to which its prompts mean "
            "something else. Build the head on the text encoder that it was trained with (pretrained=).",
            stacklevel=2,
        )


def check_ranks(state_dict: dict[str, Any], prefix: str, rank_values: Tensor, errors: list[str]) -> None:
    """Adds to the errors that `load_state_dict` will raise where a state dict is that of other ranks than (K,)."""
    values = state_dict.get(f"{prefix}rank_values")
    if values is not None and values.shape == rank_values.shape and not (values.is_meta or rank_values.is_meta):
        stored = torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0
        if not torch.allclose(values.to(rank_values), rank_values, rtol=max(1e-5, stored)):
            errors.append(f"{prefix}rank_values: the checkpoint was made for other rank values: {values.tolist()}.")


def _sampled(tensors: Sequence[Tensor]) -> list[float]:
    """Some weights of some matrices, one transfer from a GPU; empty where they are of kinds that are read otherwise."""
    matrices = [tensor for tensor in tensors if _is_plain(tensor)]
    chosen = matrices[:: max(1, len(matrices) // SAMPLES)]
    middles = [matrix.detach()[tuple(size // 2 for size in matrix.shape)].float() for matrix in chosen]
    try:
        numbers: list[float] = torch.stack(middles).tolist() if middles else []
    except RuntimeError:  # on several devices, or without data
        return []
    return numbers


def _is_plain(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
    return plain and tensor.dim() > 1 and tensor.numel() > 0 and tensor.is_floating_point()
