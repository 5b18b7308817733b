"""Kept prototypes in a compiled graph, which cannot look after a cache: it looks them up when it runs."""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_keys = itertools.count()
_alive: WeakValueDictionary[int, Any] = WeakValueDictionary()


def register(module: Any) -> int:
    """A number by which a compiled graph finds a module that has `embed_dim` and `kept_prototypes()`."""
    key = next(_keys)
    _alive[key] = module
    return key


def _look_up(like: Tensor, key: int) -> Tensor:
    prototypes: Tensor = _alive[key].kept_prototypes().to(like, copy=True)
    return prototypes


# (K,) like, key -> (K, D) of the device and dtype of `like`; None where torch is too old
current_prototypes: Any = None
if hasattr(torch.Tag, "cudagraph_unsafe") and hasattr(torch.compiler, "is_exporting"):
    current_prototypes = torch.library.custom_op(
        "ordinal_prompt::current_prototypes",
        _look_up,
        mutates_args=(),
        schema="(Tensor like, int key) -> Tensor",
        tags=(torch.Tag.cudagraph_unsafe,),
    )
    current_prototypes.register_fake(lambda like, key: like.new_empty(len(like), _alive[key].embed_dim))
