"""The text half of somebody else's model: same weights, nothing of the rest.

A half is a structural copy: its modules are new objects, its tensors are the caller's own.  Freezing it, switching it
to eval mode or moving it leaves the caller's model as it was, and costs no memory.  The token embedding table, often a
third of a text encoder, is left behind: in its place stands a `PromptEmbedding`, which hands out the prompts.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ordinal_prompt.text.prompts import Prompts

if TYPE_CHECKING:
    from typing_extensions import Self


ONE_AT_A_TIME = threading.RLock()  # of threads whose heads share a text encoder, as copies do


class PromptEmbedding(nn.Module):
    """Stands where a token embedding was, and answers any ids with the prompts at hand."""

    read = False  # whether a model has asked it

    def __init__(self) -> None:
        super().__init__()
        self.prompts: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        if self.prompts is None:
            raise RuntimeError("This text encoder has left its token embedding behind and encodes prompts only.")
        if self.prompts.shape[:-1] != ids.shape:
            raise RuntimeError(
                f"This text encoder turns {tuple(self.prompts.shape[:-1])} token ids into {tuple(ids.shape)} on the "
                "way, where prompts cannot follow; choose another one, whose own code leaves the ids as they are."
            )
        if not self.read:
            self.read = True
        return self.prompts


def text_half(
    model: nn.Module, table: Tensor | None = None, drop: tuple[str, ...] = (), trainable: bool = False
) -> nn.Module:
    """A structural copy of `model` that shares its tensors.

    Args:
        model: the module to copy.
        table: the token embedding table; each embedding module that holds it is replaced.  None keeps them all.
        drop: names of attributes that are not copied (the image half) and are None in the copy.
        trainable: keep the caller's parameters, so that training changes them; otherwise frozen views of them.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is table:
            memo[id(module)] = PromptEmbedding()
        merged = vars(module).get("merged_adapters")  # of PEFT: what the caller merges must not count twice
        memo[id(merged)] = merged
    for parameter in model.parameters():
        shared = parameter if trainable else nn.Parameter(parameter.detach(), requires_grad=False)
        memo[id(parameter)] = shared
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    for name in drop:
        memo[id(getattr(model, name, None))] = None
    half: nn.Module = copy.deepcopy(model, memo)
    return half


def without_adapter(embedding: Any) -> Any:
    """A token embedding itself.

    Raises:
        TypeError: PEFT has changed it, so that it reads the ids of tokens which prompts have not.
    """
    if type(embedding).__module__.split(".")[0] == "peft":
        raise TypeError(
            f"Expected the token embedding of `text_encoder` as it was, but an adapter of PEFT stands in its place "
            f"({type(embedding).__name__}); merge the adapter first, with merge_and_unload()."
        )
    return embedding


class TextHalf(nn.Module):
    """Runs the text half of a model on prompts, through the model's own code from token ids to features.

    Exact for anything, and as slow as the model: sequences run to the longest prompt where the model masks padding,
    else to its full length.

    Args:
        tower: what `text_half` made of a model.
        width, embed_dim, context_length: see `TextEncoder`.
        cut: whether sequences may end with the longest prompt.
    """

    def __init__(self, tower: nn.Module, width: int, embed_dim: int, context_length: int, cut: bool) -> None:
        super().__init__()
        self.tower = tower
        self.width, self.embed_dim, self.context_length = width, embed_dim, context_length
        self.cut = cut

    @torch.no_grad()
    def checked(self, table: Tensor) -> Self:
        """Itself, once a prompt of one token has gone through; `embed_dim` is then the size of its feature.

        Args:
            table: (V, W) token embeddings.

        Raises:
            TypeError: the model's own code fails on prompts, does not read them, or gives something else than one
                feature per text.
        """
        ids, one = torch.zeros(1, 2, dtype=torch.long, device=table.device), table[:1].detach()
        self.embed_dim = self.tried(Prompts(one, one[None], torch.ones_like(ids[0, :1]), one[0], ids, 0)).shape[1]
        if not any(slot.read for slot in self._slots()):  # but that of the caller's model, which a function has kept
            raise TypeError(
                f"Expected `text_encoder` to use its token embedding, but {type(self.tower).__name__} does not; where "
                "a function was put in the place of its method, override the method in a subclass instead."
            )
        return self

    def tried(self, prompts: Prompts) -> Tensor:
        """Features (K, D) in eval mode; whatever another package's code raises or returns instead is a TypeError."""
        told = (
            f"Expected `text_encoder` to encode prompts, but {type(self.tower).__name__} {{}}; pass its text model by "
            "itself, or an object with the members of ordinal_prompt.text.TextEncoder."
        )
        try:
            with evaluating(self.tower):
                features = self.encode(prompts)
        except Exception as error:
            raise TypeError(told.format(f"fails on them ({type(error).__name__}: {error})")) from error
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != len(prompts):
            kind = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(told.format(f"gives {kind} instead of one feature for each ({len(prompts)}, D)"))
        return features

    def encode(self, prompts: Prompts) -> Tensor:
        """Features (K, D) of the prompts, before normalisation."""
        embeddings, ids = prompts.sequences(None if self.cut else self.context_length)
        lengths = prompts.lengths + len(prompts.prefix)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        slots = self._slots()
        with one_at_a_time():
            try:
                for slot in slots:
                    slot.prompts = embeddings.to(self._dtype())
                return self.features(ids, mask)
            finally:
                for slot in slots:
                    slot.prompts = None

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002  # subclasses need the mask
        """Features (K, D) of token ids (K, L); `mask` (K, L) is False on padding."""
        encode_text = getattr(self.tower, "encode_text", self.tower)
        output = encode_text(ids)
        features: Tensor = output[0] if isinstance(output, tuple) else output
        return features

    def _slots(self) -> list[PromptEmbedding]:
        return [module for module in self.tower.modules() if isinstance(module, PromptEmbedding)]

    def _dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.tower.parameters() if p.is_floating_point())


def one_at_a_time() -> AbstractContextManager[Any]:
    """Inside, no other thread encodes: copies of a text encoder share the modules that prompts are handed to."""
    return nullcontext() if torch.compiler.is_compiling() else ONE_AT_A_TIME


@contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """Eval mode for a while, where `module` is one: what is kept must not hold dropout's noise."""
    modes = [(part, part.training) for part in module.modules()] if isinstance(module, nn.Module) else []
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def same_weights(first: Any, second: Any) -> bool:
    """Whether two text encoders are one, or halves of the same model that compute the same."""
    if first is second or not (isinstance(first, nn.Module) and isinstance(second, nn.Module)):
        return first is second
    plain = (bool, int, float, str, type(None))  # as how features are pooled

    def marks(half: nn.Module) -> tuple[Any, ...]:
        tensors = [(t.data_ptr(), t.shape, t.dtype, t.stride()) for t in (*half.parameters(), *half.buffers())]
        options = {name: value for name, value in vars(half).items() if isinstance(value, plain) and name != "training"}
        return [*map(type, half.modules())], options, tensors

    return marks(first) == marks(second) and not any(tensor.is_meta for tensor in first.parameters())
