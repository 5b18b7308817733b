"""Rank prompts: learnable context tokens and rank embeddings, laid out as token embeddings (OrdinalCLIP, section 3.2).

`ordinal_prompt.text.template` finds out what stands where; `PromptLearner` holds what is learned and lays it out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn

from ordinal_prompt.config import HeadConfig
from ordinal_prompt.interpolation import interpolation_weights
from ordinal_prompt.text import AdaptedText, Prompts, PromptTokenizer
from ordinal_prompt.text.template import PromptText, WrittenPrompts, write_prompts
from ordinal_prompt.text.tokens import openai_tokenizer

INIT_STD = 0.02
LEAST_SINGULAR_VALUE = 0.02  # of the largest: mixtures that only huge base embeddings could tell apart stay together


class PromptLearner(nn.Module):
    """What is learned of the prompts, and their layout.

    Args:
        config: the options of the head.
        text: what stands where.
        special: (start + end + 1, W) embeddings of the start ids, the end ids and the padding id.
        device, dtype: of what is learned; default those of `special`, at least float32.

    Attributes:
        context_embeddings: (M, W), or (K, M, W) where they are specific to ranks.
        rank_embeddings: (B, T, W) embeddings of the base ranks; (K, T, W) of the ranks without interpolation, where
            rank k uses the first `text.rank_tokens[k]`.
    """

    context_embeddings: Tensor
    rank_embeddings: nn.Parameter

    def __init__(
        self,
        config: HeadConfig,
        text: PromptText,
        special: Tensor,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.text = text
        self.num_ranks = config.num_ranks
        self.interpolation = config.interpolation
        self.num_base_ranks = config.num_base_ranks
        self.rank_specific_context = config.rank_specific_context
        self.positions = config.values
        dtype = dtype or torch.promote_types(torch.float32, special.dtype)
        special = special.to(device=device)
        width, per_rank = special.shape[1], [self.num_ranks] * self.rank_specific_context
        context_shape = (*per_rank, text.num_context, width)
        rank_shape = (self.num_base_ranks, max(text.rank_tokens), width)
        context = torch.empty(context_shape, device=special.device, dtype=dtype)
        if text.num_context:
            self.context_embeddings = nn.Parameter(context)
        else:  # FSDP shards no empty parameters
            self.register_buffer("context_embeddings", context)
        self.rank_embeddings = nn.Parameter(torch.empty(rank_shape, device=special.device, dtype=dtype))
        # Constants, and no buffers: DistributedDataParallel would send them, and so change them, in every step.
        self.special = special
        self.interpolation_weights: Tensor | None = None
        self._build_weights()
        self.reset_parameters()
        self.requires_grad_(config.learn_prompts)

    @classmethod
    def from_words(
        cls,
        config: HeadConfig,
        source: AdaptedText,
        tokenizer: Callable[..., Any] | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> PromptLearner:
        """Prompts that start from the context's and the ranks' words, as far as the config has some.

        Args:
            source: the text encoder, with its token embedding.
            tokenizer: texts to token ids; needed for words.
            device: default that of the token embedding.

        Raises:
            ValueError: words without a tokenizer, prompts that are too long, a tokenizer of another text encoder.
        """
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"Expected `dtype` to be a floating point dtype of torch, but got {dtype!r}.")
        has_context = isinstance(config.context, str)
        if tokenizer is None and (has_context or config.base_rank_names or config.rank_names):
            raise ValueError(
                f"Expected a `tokenizer` to turn {'the context' if has_context else 'rank names'} into tokens, but got "
                "none; pass tokenizer=open_clip.get_tokenizer(model_name) (or your transformers tokenizer), or build "
                "the head with OrdinalPromptHead.from_open_clip."
            )
        vocabulary = None if source.table is None else len(source.table)
        written = write_prompts(PromptTokenizer(tokenizer or openai_tokenizer(vocabulary)), config)
        text = written.text
        if text.num_tokens > source.encoder.context_length:
            raise ValueError(
                f"Expected prompts of at most {source.encoder.context_length} tokens, the text encoder's context "
                f"length, but context and rank need {text.num_tokens} (with start, full stop and end); shorten the "
                "context or the rank names."
            )
        special = source.embed((*text.start, *text.end, text.padding))
        prompt = cls(config, text, special, device, dtype)
        prompt._start_from_words(written, source, of_bases=config.base_rank_names is not None)
        return prompt

    def reset_parameters(self) -> None:
        """Random context and rank embeddings, N(0, 0.02)."""
        nn.init.normal_(self.context_embeddings, std=INIT_STD)
        nn.init.normal_(self.rank_embeddings, std=INIT_STD)

    @torch.no_grad()
    def _start_from_words(self, written: WrittenPrompts, source: AdaptedText, of_bases: bool) -> None:
        """Starts from the token embeddings of words.

        K names become B base embeddings by least squares: those whose mixtures come closest to the names.  Measured
        against taking the names nearest to the base positions, over three interpolations and 2 to 5 bases
        (`benchmarks/heads/base_names.py`), the mixtures are closer to the names and predict better, each time.  As in
        the published code, names that are shorter than the longest are filled up with the padding token's embedding,
        which the text encoder reads; without interpolation every name keeps its own length.
        """
        if written.context_ids is not None:
            self.context_embeddings.copy_(source.embed(written.context_ids).expand_as(self.context_embeddings))
        if written.rank_ids is None or self.special.is_meta:
            return
        longest = max(map(len, written.rank_ids))
        padded = [(*ids, *[self.text.padding] * (longest - len(ids))) for ids in written.rank_ids]
        names = torch.stack([source.embed(ids) for ids in padded])
        if self.interpolation_weights is not None and not of_bases:
            weights, rows = self._weights(_positions(self.positions)), names.double().cpu().flatten(1)
            fit = torch.linalg.lstsq(weights.double(), rows, rcond=LEAST_SINGULAR_VALUE, driver="gelsd").solution
            names = fit.unflatten(1, names.shape[1:])
        self.rank_embeddings.copy_(names)

    def forward(self, positions: Tensor | None = None) -> Prompts:
        """The prompts of the K ranks, or of N real positions (N,) between the first and the last (with interpolation).

        In training they are differentiable in what is learned.
        """
        ranks: Tensor = self.rank_embeddings
        if self.special.is_meta and not ranks.is_meta:
            raise RuntimeError(
                "This head was built on the meta device, and its start and end tokens are not in a state dict; build "
                "it on a real one (device=), or load it with from_pretrained."
            )
        context: Tensor = self.context_embeddings
        if positions is not None:
            ranks = _mix(self._weights(positions), ranks)
            if self.rank_specific_context:
                context = self._context_between(positions)
        elif self.interpolation_weights is not None:
            ranks = _mix(self.interpolation_weights.to(ranks.device), ranks)
        return self._lay_out(ranks, context)

    def _context_between(self, positions: Tensor) -> Tensor:
        """(N, M, W) contexts of positions (N,): between two ranks, between their contexts."""
        known = _positions(self.positions).to(positions)
        right = torch.searchsorted(known, positions).clamp(1, self.num_ranks - 1)
        part = (positions - known[right - 1]) / (known[right] - known[right - 1])
        context = self.context_embeddings
        return torch.lerp(context[right - 1], context[right], part.to(context.dtype)[:, None, None])

    def _lay_out(self, ranks: Tensor, context: Tensor) -> Prompts:
        """Prompts from rank embeddings (N, T, W) and context embeddings (M, W) or (N, M, W)."""
        text, num = self.text, len(ranks)
        special = self.special.to(ranks)  # a replica of nn.DataParallel may run elsewhere
        start, end, padding = special.split([len(text.start), len(text.end), 1])
        before, after = context.split([text.rank_at, text.num_context - text.rank_at], dim=-2)

        def each(part: Tensor) -> Tensor:
            return part if part.dim() == 3 else repeat(part, "t w -> n t w", n=num)

        rest = [ranks, each(after), each(end)]
        prefix = start
        if self.rank_specific_context:
            rest.insert(0, before)
        else:
            prefix = torch.cat([start, before])
        suffixes = torch.cat(rest, dim=1)

        counts = torch.tensor(text.rank_tokens, device=ranks.device).expand(num)
        lengths = suffixes.shape[1] - ranks.shape[1] + counts
        ids = torch.full(suffixes.shape[:2], text.stand_in, device=ranks.device)
        if text.end:
            ids[:, -len(text.end) :] = torch.tensor(text.end, device=ranks.device)
        if len(text.rank_tokens) > 1:  # close the gaps behind names that are shorter than the longest
            first = before.shape[-2] if self.rank_specific_context else 0
            slot = torch.arange(suffixes.shape[1], device=ranks.device)
            gap = ranks.shape[1] - counts[:, None]
            source = torch.where(slot >= first + counts[:, None], slot + gap, slot)
            inside = source < suffixes.shape[1]
            source = source.clamp_max(suffixes.shape[1] - 1)
            suffixes = torch.where(inside[..., None], suffixes.take_along_dim(source[..., None], dim=1), padding)
            ids = torch.where(inside, ids.take_along_dim(source, dim=1), text.padding)
        prefix_ids = torch.full((num, len(prefix)), text.stand_in, device=ranks.device)
        prefix_ids[:, : len(text.start)] = torch.tensor(text.start, dtype=torch.long, device=ranks.device)
        ids = torch.cat([prefix_ids, ids], dim=1)
        return Prompts(prefix, suffixes, lengths, padding[0], ids, text.padding)

    def _weights(self, positions: Tensor) -> Tensor:
        first, last = self.positions[0], self.positions[-1]
        assert self.interpolation is not None
        weights = interpolation_weights(positions.cpu(), first, last, self.num_base_ranks, self.interpolation)
        return weights.to(positions.device, torch.promote_types(self.rank_embeddings.dtype, torch.float32))

    def _build_weights(self) -> None:
        if self.interpolation is not None:
            weights = self._weights(_positions(self.positions))
            self.interpolation_weights = weights.to(self.rank_embeddings.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.text.num_context == 0:  # safetensors of Accelerate keep one of several empty tensors
            state_dict.setdefault(f"{prefix}context_embeddings", self.context_embeddings)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PromptLearner:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        self.special = fn(self.special)
        self._build_weights()  # .half() and .bfloat16() would round neighbouring ranks onto each other
        return self

    def extra_repr(self) -> str:
        kind = (
            f"{self.interpolation}, {self.num_base_ranks} base ranks" if self.interpolation else "free rank embeddings"
        )
        return f"{self.num_ranks} ranks, {self.text.num_context} context tokens, {kind}"


def _positions(positions: tuple[float, ...]) -> Tensor:
    return torch.tensor(positions, dtype=torch.float64, device="cpu")


def _mix(weights: Tensor, bases: Tensor) -> Tensor:
    """Rank embeddings (N, T, W) from weights (N, B) and base embeddings (B, T, W), summed in the weights' precision."""
    with full_precision(weights):
        mixed = torch.einsum("nb,btw->ntw", weights, bases.to(weights.dtype))
    return mixed.to(bases.dtype)


def full_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """No autocast on the tensor's device, where there is some."""
    device = tensor.device.type
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)  # not traceable in old versions
    active = known and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if active else nullcontext()
