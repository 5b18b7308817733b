"""What PyTorch does to a head: it is cast, moved, frozen, copied, saved and loaded, and its prototypes stay right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ordinal_prompt import state
from ordinal_prompt.cache import Kept, ListedTensors
from ordinal_prompt.config import HeadConfig
from ordinal_prompt.distributed import handed_out
from ordinal_prompt.graph import register
from ordinal_prompt.prompt import PromptLearner
from ordinal_prompt.text.towers import text_half

Module = TypeVar("Module", bound="Lifecycle")


class Lifecycle(nn.Module):
    """Prompts, a text encoder that may be frozen, and what is kept of both; see `RankPrototypes`."""

    config: HeadConfig
    prompt: PromptLearner
    text_encoder: Any
    rank_values: Tensor
    _frozen: bool
    _kept: Kept[Tensor] | None
    _encoder_tensors: ListedTensors
    _noted: list[float]

    def keep_prototypes(self, prototypes: Tensor) -> None:
        """Makes given prototypes (K, D) those of the prompts and the text encoder as they are now."""
        raise NotImplementedError

    def requires_grad_(self: Module, requires_grad: bool = True) -> Module:
        """As of any module, but prompts that do not learn (`learn_prompts=False`) stay as they are.

        PyTorch does not ask here where a whole model is unfrozen, and lets them learn.
        """
        super().requires_grad_(requires_grad)
        if not self.config.learn_prompts:
            self.prompt.requires_grad_(False)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "text_encoder" and self.__dict__.get("_frozen"):
            self._set_frozen(value)
            return
        super().__setattr__(name, value)
        if name == "text_encoder":
            self._encoder_tensors = ListedTensors(value)

    def train(self, mode: bool = True) -> Lifecycle:
        """Training mode; a frozen text encoder stays in eval mode."""
        super().train(mode)
        if self._frozen and isinstance(self.text_encoder, nn.Module):
            self.text_encoder.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Lifecycle:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        self._build_rank_values()  # .bfloat16() would round years to decades
        kept, self._kept = self._kept, None
        if self.text_encoder is None and kept is not None:
            moved = fn(kept.result)  # to_empty() would lose them, and half precision round them
            self.keep_prototypes(kept.result.to(moved.device, torch.promote_types(moved.dtype, torch.float32)))
        if self._frozen and isinstance(self.text_encoder, nn.Module):
            before = self._encoder_tensors()
            self._set_frozen(text_half(self.text_encoder)._apply(fn))  # not that of copies
            if any(was.is_meta and not now.is_meta for was, now in zip(before, self._encoder_tensors(), strict=True)):
                self._set_frozen(None)  # to_empty() gives memory, and no weights
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            state.tell(metadata, self._settings(), self._encoder_tensors() if self._frozen else [])

    def _settings(self) -> dict[str, Any]:
        """What changes the logits, and no shape."""
        names = ("rank_names", "interpolation", "normalize", "alignment", "residual")
        own = {name: getattr(self.config, name) for name in names}
        place, pooling = self.prompt.text.rank_at, getattr(self.text_encoder, "pooling", None)
        return {**own, "the rank's place in the context": place, **({"pooling": pooling} if pooling else {})}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: Any, *args: Any) -> None:
        scale = state_dict.get(f"{prefix}logit_scale")
        if scale is not None and scale.dim() == 0:  # of release 0.1.0
            state_dict[f"{prefix}logit_scale"] = scale.reshape(1)
        state.check_ranks(state_dict, prefix, self.rank_values, args[-1])
        state.warn_of_others(metadata, self._settings())
        self._noted = state.told(metadata) if self._frozen else []
        if handed_out(self, self.prompt) and self.text_encoder is not None:
            self._kept = None
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Lifecycle:
        if self._frozen:
            memo.update({id(part): part for part in (self.text_encoder, *self._encoder_tensors())})
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reused": None}  # which holds for this one, inside its block

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # untyped in torch
        self._key = register(self)

    def __prepare_scriptable__(self) -> Lifecycle:
        raise TypeError(
            "A prompt head cannot be scripted; call op.export_heads(model) first, which leaves plain layers."
        )

    def _replicate_for_data_parallel(self) -> Lifecycle:
        raise RuntimeError(
            "nn.DataParallel cannot train a prompt head, whose text encoder stays on one device. Use "
            "DistributedDataParallel (start the same script with torchrun), or one GPU (CUDA_VISIBLE_DEVICES=0); a "
            "trained model runs under nn.DataParallel after op.export_heads(model)."
        )

    def _set_frozen(self, text_encoder: Any) -> None:
        if isinstance(text_encoder, nn.Module):
            text_encoder.requires_grad_(False).eval()
        # Beside the registered modules: part of no parameter list, state dict or optimizer, but see `_apply`.
        object.__setattr__(self, "text_encoder", text_encoder)
        self._encoder_tensors = ListedTensors(text_encoder)

    def _build_rank_values(self) -> None:
        embeddings = self.prompt.rank_embeddings
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        self.rank_values = torch.tensor(self.prompt.positions, dtype=dtype, device=embeddings.device)
