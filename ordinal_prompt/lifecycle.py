"""What PyTorch does to a head: it is cast, moved, frozen, copied, saved and loaded, and its prototypes stay right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from ordinal_prompt import state
from ordinal_prompt.cache import Kept, ListedTensors, tensors_of
from ordinal_prompt.config import HeadConfig
from ordinal_prompt.distributed import handed_out
from ordinal_prompt.graph import register
from ordinal_prompt.prompt import PromptLearner
from ordinal_prompt.text.towers import text_half

Module = TypeVar("Module", bound="Lifecycle")


class Shared:
    """A frozen text encoder, in no parameter list, state dict or optimizer of the head, and shared by its copies.

    A `__deepcopy__` of the head would share it, too, but wrappers that pass on what they lack (those of PEFT) have it
    then, and are copied as the head.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        memo.update({id(part): part for part in (self.module, *tensors_of(self.module))})
        return self


class Lifecycle(nn.Module):
    """Prompts, a text encoder that may be frozen, and what is kept of both; see `RankPrototypes`."""

    config: HeadConfig
    prompt: PromptLearner
    rank_values: Tensor
    _frozen: bool
    _encoder: Shared
    _kept: Kept[Tensor] | None
    _encoder_tensors: ListedTensors
    _noted: list[float]

    def keep_prototypes(self, prototypes: Tensor) -> None:
        """Makes given prototypes (K, D) those of the prompts and the text encoder as they are now."""
        raise NotImplementedError

    def _learns(self) -> bool:
        """Whether prompts or text encoder take gradients."""
        raise NotImplementedError

    @property
    def text_encoder(self) -> Any:
        """The text half of the model that encodes the prompts, or None."""
        return self._encoder.module if self._frozen else self._modules.get("text_encoder")

    @text_encoder.setter
    def text_encoder(self, text_encoder: Any) -> None:
        if self._frozen:
            self._set_frozen(text_encoder)
        else:
            self._modules["text_encoder"] = text_encoder
            self._encoder_tensors = ListedTensors(text_encoder)

    def requires_grad_(self: Module, requires_grad: bool = True) -> Module:
        """As of any module, but prompts that do not learn (`learn_prompts=False`) stay as they are.

        PyTorch does not ask here where a whole model is unfrozen, and lets them learn.
        """
        super().requires_grad_(requires_grad)
        if not self.config.learn_prompts:
            self.prompt.requires_grad_(False)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "text_encoder":
            object.__setattr__(self, name, value)  # the property, which PyTorch would take for one more of the modules
        else:
            super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Lifecycle:
        """Training mode; a frozen text encoder stays in eval mode."""
        if mode != self.training and not self.rank_values.is_cpu and self._learns():
            self._kept = None  # values are compared on the CPU alone
        super().train(mode)
        if self._frozen and isinstance(self.text_encoder, nn.Module):
            self.text_encoder.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Lifecycle:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        self._build_rank_values()  # .bfloat16() would round years to decades
        kept = self._kept
        if self.text_encoder is not None:
            self._kept = None
        elif kept is not None:
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
        loaded = self.rank_values
        if not loaded.is_meta:
            self._build_rank_values(loaded.device)  # a state dict in half precision has rounded them
            if loaded.dtype == self.rank_values.dtype and torch.equal(loaded, self.rank_values):
                self.rank_values = loaded  # the same tensor, for which graphs were compiled

    def _prune(self) -> None:
        """What a forward pass under pruning sets anew."""
        for hook in self._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                hook(self, None)

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
        self._encoder = Shared(text_encoder)
        self._encoder_tensors = ListedTensors(text_encoder)

    def _build_rank_values(self, device: torch.device | None = None) -> None:
        embeddings = self.prompt.rank_embeddings
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        self.rank_values = torch.tensor(self.prompt.positions, dtype=dtype, device=device or embeddings.device)
