"""Rank prototypes: prompts and a text encoder, and the one cache of what they make (OrdinalCLIP, section 3.2)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ordinal_prompt import state
from ordinal_prompt.arrays import widest_float
from ordinal_prompt.cache import Kept, same_values, tensors_of, traced, values_of
from ordinal_prompt.config import HeadConfig
from ordinal_prompt.distributed import gathered, handed_out
from ordinal_prompt.graph import current_prototypes, register
from ordinal_prompt.labels import any_string, rank_indices
from ordinal_prompt.lifecycle import Lifecycle, Shared
from ordinal_prompt.matching import unit_prototypes
from ordinal_prompt.prompt import PromptLearner, full_precision
from ordinal_prompt.reuse import one_backward
from ordinal_prompt.text import Prompts
from ordinal_prompt.text.towers import evaluating

Prototypes = TypeVar("Prototypes", bound="RankPrototypes")


class RankPrototypes(Lifecycle):
    """K rank prototypes, which a text encoder makes of prompts: what a head has before it meets features.

    While something is learned, `prototypes()` encodes the prompts at every call.  Without gradients (in eval mode,
    under `torch.no_grad()`, or with frozen prompts) the prototypes are kept until a tensor that they were made of
    changes.  Seen are optimizer steps, `load_state_dict`, writing in place, assigning `.data`, `.to()`, new tensors and
    modules, pruning, parametrizations and switched adapters, in the prompts and in `text_encoder`; of the model that it
    shares its weights with, what is written to these in place.  What is written through `.data` or past PyTorch (NumPy,
    a replayed CUDA graph) is seen of prompts on the CPU, and of a text encoder that learns there; elsewhere once a pass
    in training mode, or a switch to eval mode, lies between.
    Under FSDP, prototypes of prompts that learn are never kept, and those of frozen prompts until `load_state_dict`.

    Args:
        config: the options of the head.  A frozen text encoder is kept out of parameters, state dict and copies (copies
            of this module share it).
        prompt: the prompts.
        text_encoder: a `TextEncoder`, or None for prototypes that are given to `keep_prototypes`.
        embed_dim: D.

    Attributes:
        source: the names by which the text encoder can be loaded again, where it has some; see `text.hub`.
    """

    def __init__(self, config: HeadConfig, prompt: PromptLearner, text_encoder: Any, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.source: dict[str, Any] | None = None
        self.prompt = prompt
        self.embed_dim = embed_dim
        self._encoder = Shared(None)  # first, so that copies find what is shared before they come upon it elsewhere
        self._frozen = config.freeze_text_encoder or text_encoder is None
        self._kept: Kept[Tensor] | None = None
        self._prompt_values: list[Tensor] = []
        self._switches: list[Any] = []
        self._noted: list[float] = []
        self._warned = False
        self._reused: Kept[Tensor] | None = None
        self._key = register(self)
        self.register_buffer("rank_values", None)  # in the state dict, so that other ranks are refused
        self._build_rank_values()
        if isinstance(text_encoder, nn.Module):
            text_encoder.to(prompt.rank_embeddings.device)
        self.text_encoder = text_encoder

    @property
    def num_ranks(self) -> int:
        """K."""
        return self.prompt.num_ranks

    @property
    def rank_names(self) -> tuple[str, ...]:
        """The K names; of ranks without names, their values."""
        return self.config.rank_names or tuple(repr(value).removesuffix(".0") for value in self.config.values)

    def rank_indices(self, values: Any, nearest: bool = False) -> Tensor:
        """Rank indices of labels that are names or values of these ranks; see `ordinal_prompt.rank_indices`."""
        named = self.config.rank_names is not None and any_string(values)
        if not named and self.config.numerals:
            raise ValueError(
                f"Expected names of ranks, {', '.join(map(repr, self.rank_names[:3]))}, …, but got numbers; the names "
                "are numbers, too, but not the values of the ranks: build the head with rank_values= for numbers."
            )
        return rank_indices(values, self.rank_names if named else self.config.values, nearest)

    def prototypes(self) -> Tensor:
        """The rank prototypes, (K, D) of unit norm, at least float32.

        In training they are computed anew at every call and differentiable; without gradients once, until something
        that they depend on changes.
        """
        prototypes = self._prototypes()
        kept = self._kept is not None and prototypes is self._kept.result
        return prototypes.clone() if kept else prototypes  # which may be written to

    def _prototypes(self) -> Tensor:
        """As `prototypes`, but those that are kept are handed out as they are."""
        if self.training and self._frozen and not traced():
            self._warn_of_unfrozen()
        if self._differentiable():
            if not torch.compiler.is_compiling():
                self._kept = None  # what learns changes, in ways that are not seen everywhere
            return self._encode(self.prompt()) if self._reused is None else self._reused_prototypes(self._reused)
        if torch.compiler.is_compiling():
            return self._in_a_graph()
        if traced() and self.text_encoder is not None:
            return self._encode(self.prompt())
        return self.kept_prototypes()

    @contextmanager
    def reuse_prototypes(self) -> Iterator[None]:
        """One text pass for all that is computed inside, as for gradient accumulation.

        Gradients are those of a text pass for each batch: what the losses give to the prototypes is added up, and goes
        through the text encoder once, when the block ends.  Call `backward()` inside, and clip gradients and step the
        optimizer behind it.  The text pass runs where the block begins: under autocast, if that is on there.  With
        DistributedDataParallel, the last batch inside is the one that synchronizes.  Under FSDP it does nothing.

        Raises:
            RuntimeError: the prompts were changed inside.

        Example::

            with head.reuse_prototypes():
                for images, labels in batches:
                    (loss(model(images), labels) / len(batches)).backward()
            optimizer.step()
        """
        if not self._differentiable() or self._reused is not None or handed_out(self, self.prompt):
            yield
            return
        with one_backward([(self, self._encode(self.prompt()))]):
            yield

    def prototypes_at(self, positions: Tensor | Sequence[float]) -> Tensor:
        """Prototypes at real positions between the first and the last rank, also where no rank is.

        Args:
            positions: (N,) in the units of `rank_values`.

        Returns:
            (N, D) of unit norm; differentiable in training.

        Raises:
            ValueError: positions outside the ranks, of another shape, or a head without interpolation.
        """
        if self.prompt.interpolation is None:
            raise ValueError(
                "Prototypes between ranks need interpolated ranks, but this head has free ones (interpolation=None)."
            )
        device = self.rank_values.device
        positions = torch.as_tensor(positions, dtype=widest_float(device), device=device)
        first, last = self.prompt.positions[0], self.prompt.positions[-1]
        if positions.dim() != 1 or len(positions) == 0:
            raise ValueError(f"Expected `positions` of shape (N,), but got {tuple(positions.shape)}.")
        inside = positions.clamp(first, last)  # up to the rounding of float32, in which `rank_values` come
        if not bool(((positions - inside).abs() <= 1e-6 * max(abs(first), abs(last))).all()):
            raise ValueError(f"Expected `positions` between the first and the last rank, {first:g} and {last:g}.")
        with nullcontext() if self._differentiable() else self._constant():
            return self._encode(self.prompt(inside))

    def keep_prototypes(self, prototypes: Tensor) -> None:
        """Makes given prototypes (K, D) those of the prompts and the text encoder as they are now."""
        sources = self._sources()
        learned = (tensor for tensor in sources[1] if tensor.requires_grad) if not self._frozen else ()
        self._kept = Kept(prototypes, sources, (*sources[0], *learned), [*self.prompt.modules()])
        self._switches = self._encoder_tensors.switches()
        self._prompt_values = values_of(sources[0]) if self.text_encoder is None else []

    def kept_prototypes(self) -> Tensor:
        """The prototypes without gradients, (K, D); computed where there are none that hold."""
        kept = self._kept
        if kept is not None and self._encoder_tensors.switches() == self._switches:
            if not kept.written_to() if traced() else kept.holds(self._sources(), [*self.prompt.modules()]):
                return kept.result
            if self.text_encoder is None and same_values(self._sources()[0], self._prompt_values):
                self.keep_prototypes(kept.result)  # written to, or replaced, by what they were
                return kept.result
        with self._constant():
            prototypes = self._encode(self.prompt())
            if not (handed_out(self, self.prompt) and self._learns()):
                self.keep_prototypes(prototypes)
        return prototypes

    @contextmanager
    def _constant(self) -> Iterator[None]:
        """Inside, what is encoded may be kept and used anywhere: no autocast, no inference mode, no dropout."""
        whole = (gathered(self), evaluating(self.text_encoder))
        with torch.inference_mode(False), torch.no_grad(), full_precision(self.rank_values), whole[0], whole[1]:
            yield

    def without_text_encoder(self: Prototypes) -> Prototypes:
        """A copy that has its prototypes alone: it predicts and exports."""
        copied = copy.deepcopy(self)
        prototypes = copied.kept_prototypes()
        copied.text_encoder = None
        copied.keep_prototypes(prototypes)
        return copied

    def _reused_prototypes(self, reused: Kept[Tensor]) -> Tensor:
        if not torch.compiler.is_compiling() and not reused.holds(self._sources()):
            raise RuntimeError(
                "The prompts were changed within reuse_prototypes(); step the optimizer behind the block, and open it "
                "again for the next batches."
            )
        return reused.result

    def _in_a_graph(self) -> Tensor:
        """The prototypes without gradients, in a graph that outlives them: a compiled one asks for those that hold
        whenever it runs, an exported one encodes the prompts.
        """
        if current_prototypes is not None and not torch.compiler.is_exporting():
            current: Tensor = current_prototypes(self.rank_values, self._key)
            return current
        if self.text_encoder is None and self._kept is not None and not self._kept.written_to():
            return self._kept.result
        with torch.no_grad(), full_precision(self.rank_values):
            return self._encode(self.prompt())

    def _encode(self, prompts: Prompts) -> Tensor:
        if self.text_encoder is None:
            raise RuntimeError(
                "This head has no text encoder (it was loaded without one, or came from the meta device), so that its "
                "prompts cannot be encoded; load it with from_pretrained(folder, text_encoder=...)."
            )
        if self._noted and not torch.compiler.is_compiling():  # not before: its weights may have been loaded since
            state.warn_of_another(self._noted, self._encoder_tensors())
            self._noted = []
        return unit_prototypes(self.text_encoder.encode(prompts))

    def _differentiable(self) -> bool:
        return self.training and torch.is_grad_enabled() and self._learns()

    def _learns(self) -> bool:
        if self.text_encoder is None:
            return False
        encoder = [] if self._frozen else self.text_encoder.parameters()
        prompt = (self.prompt.rank_embeddings, self.prompt.context_embeddings, *self.prompt.parameters())
        return any(tensor.requires_grad for tensor in (*prompt, *encoder))

    def _warn_of_unfrozen(self) -> None:
        """Warns where somebody lets a frozen text encoder learn, which no optimizer or state dict of the head knows."""
        if not self._warned and any(tensor.requires_grad for tensor in self._encoder_tensors.tensors):
            self._warned = True
            warnings.warn(
                "The text encoder of this head was frozen when the head was built, and is part of no state dict: what "
                "it learns would be lost, or never reach it. Build the head with freeze_text_encoder=False.",
                stacklevel=4,
            )

    def _warn_of_gradients(self, logits: Tensor) -> None:
        """Warns in a backward pass through logits of eval mode."""
        if not self.training and logits.requires_grad and not traced() and self._learns():
            logits.register_hook(_warn_of_eval_mode)

    def _sources(self) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors that the prototypes are made of."""
        learned = [] if handed_out(self, self.prompt) else tensors_of(self.prompt)
        return learned, self._encoder_tensors()


def _warn_of_eval_mode(_: Tensor) -> None:
    warnings.warn(
        "Gradients were asked of a prompt head in eval mode, where its prototypes are constants and its prompts do not "
        "learn. To train, call head.train() (a backbone may stay in eval mode); to keep the prompts as they are, build "
        "the head with learn_prompts=False.",
        stacklevel=2,
    )
