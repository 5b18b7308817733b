"""Rank prompts: learnable context tokens and rank embeddings, laid out as token embeddings (OrdinalCLIP, section 3.2).

A prompt reads `[start] context… rank… [.] [end]`.  `write_prompts` reads texts and options and finds out what stands
where (a `PromptText`); `PromptLearner` holds what is learned and lays it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn

from ordinal_prompt.interpolation import interpolation_weights
from ordinal_prompt.text import Prompts, PromptTokenizer

RANK_POSITIONS = ("tail", "front", "middle")
INIT_STD = 0.02
LEAST_SINGULAR_VALUE = 0.02  # of the largest: mixtures that only huge base embeddings could tell apart stay together


@dataclass(frozen=True)
class PromptText:
    """What stands where in the prompts, in token ids and token counts.

    Attributes:
        start: ids that open every prompt.
        end: ids that close it: the full stop and the end of text.
        padding: id of the padding.
        stand_in: an ordinary id, for positions whose embedding is learned.
        num_context: M, context tokens.
        rank_at: context tokens in front of the rank.
        rank_tokens: tokens of each rank: K counts in plain mode, one count for all ranks with interpolation.
    """

    start: tuple[int, ...]
    end: tuple[int, ...]
    padding: int
    stand_in: int
    num_context: int
    rank_at: int
    rank_tokens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest prompt."""
        return len(self.start) + self.num_context + max(self.rank_tokens) + len(self.end)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> PromptText:
        """The inverse of `to_dict`, also of what JSON makes of it."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        return cls(**values)


@dataclass(frozen=True)
class WrittenPrompts:
    """A `PromptText` and the token ids of the words in it; None where embeddings start at random."""

    text: PromptText
    context_ids: tuple[int, ...] | None
    rank_ids: tuple[tuple[int, ...], ...] | None


def write_prompts(
    tokens: PromptTokenizer,
    context: int | str,
    rank_position: str,
    names: Sequence[str] | None,
    tokens_per_rank: int | Sequence[int],
    interpolated: bool,
) -> WrittenPrompts:
    """Finds the token ids of context and rank names, and their places in the prompt.

    A name is tokenized where it stands, as the words after the words before it.  A full stop at the end of a template
    is the one that closes every prompt.

    Args:
        tokens: the tokenizer.
        context: number of random context tokens, or a text; one `{}` in it marks the rank's place.
        rank_position: `"tail"`, `"front"` or `"middle"` (after the first ⌊M/2⌋ context tokens).
        names: names of the ranks, or of the base ranks; None for random rank tokens.
        tokens_per_rank: T, or one count per rank; of no effect with names.
        interpolated: whether all ranks are given the same number of tokens.
    """
    before, after = "", ""
    context_ids: tuple[int, ...] | None = None
    if isinstance(context, str):
        before, _, after = context.replace("_", " ").partition("{}")
        after = after.strip().removesuffix(".")
        head = tokens.words(before)
        context_ids = head + (tokens.follow(f"{before} one", after) if after.strip() else ())
        rank_at = len(head) if "{}" in context else _rank_at(rank_position, len(context_ids))
        num_context = len(context_ids)
    else:
        num_context = context
        rank_at = _rank_at(rank_position, num_context)
    if rank_at == 0:
        before = ""
    elif not before.strip():
        before = "one"  # any word: a name inside a sentence may have other ids than at its start

    rank_ids: tuple[tuple[int, ...], ...] | None = None
    if names is not None:
        rank_ids = tuple(tokens.follow(before, name.replace("_", " ")) for name in names)
        for i, (name, ids) in enumerate(zip(names, rank_ids, strict=True)):
            if not ids:
                raise ValueError(
                    f"Expected every rank name to have a token, but the tokenizer gives none for {name!r}."
                )
            if ids in rank_ids[:i]:
                same = names[rank_ids.index(ids)]
                raise ValueError(
                    f"Expected names that the tokenizer tells apart, but {same!r} and {name!r} are the same."
                )
        counts = tuple(len(ids) for ids in rank_ids)
    else:
        counts = (tokens_per_rank,) if isinstance(tokens_per_rank, int) else tuple(tokens_per_rank)
    if interpolated:
        counts = (max(counts),)
    text = PromptText(
        start=tokens.start,
        end=tokens.full_stop + tokens.end,
        padding=tokens.padding,
        stand_in=tokens.stand_in,
        num_context=num_context,
        rank_at=rank_at,
        rank_tokens=counts,
    )
    return WrittenPrompts(text, context_ids, rank_ids)


def _rank_at(position: str, num_context: int) -> int:
    return {"front": 0, "middle": num_context // 2, "tail": num_context}[position]


class PromptLearner(nn.Module):
    """What is learned of the prompts, and their layout.

    Args:
        text: what stands where.
        num_ranks: K.
        positions: (K,) positions of the ranks for interpolation.
        interpolation: how ranks are mixed from base ranks; None for K free rank embeddings.
        num_base_ranks: B; without interpolation of no effect.
        rank_specific_context: one set of context tokens per rank.
        width: W, size of a token embedding.
        special: (start + end + 1, W) embeddings of the start ids, the end ids and the padding id.

    Attributes:
        context_embeddings: (M, W), or (K, M, W) where they are specific to ranks.
        rank_embeddings: (B, T, W) embeddings of the base ranks; (K, T, W) of the ranks without interpolation, where
            rank k uses the first `text.rank_tokens[k]`.
    """

    context_embeddings: nn.Parameter
    rank_embeddings: nn.Parameter
    interpolation_weights: Tensor | None
    special: Tensor

    def __init__(
        self,
        text: PromptText,
        *,
        num_ranks: int,
        positions: Tensor,
        interpolation: str | None,
        num_base_ranks: int,
        rank_specific_context: bool,
        width: int,
        special: Tensor,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.text = text
        self.num_ranks = num_ranks
        self.interpolation = interpolation
        self.num_base_ranks = num_base_ranks if interpolation else num_ranks
        self.rank_specific_context = rank_specific_context
        self.positions: tuple[float, ...] = tuple(positions.double().tolist())
        context_shape = (text.num_context, width)
        if rank_specific_context:
            context_shape = (num_ranks, *context_shape)  # type: ignore[assignment]  # one dimension more
        rank_shape = (self.num_base_ranks, max(text.rank_tokens), width)
        self.context_embeddings = nn.Parameter(torch.empty(context_shape, device=device, dtype=dtype))
        self.rank_embeddings = nn.Parameter(torch.empty(rank_shape, device=device, dtype=dtype))
        self.register_buffer("special", special.to(device=device), persistent=False)
        self.register_buffer("interpolation_weights", None, persistent=False)
        self._build_weights()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random context and rank embeddings, N(0, 0.02)."""
        nn.init.normal_(self.context_embeddings, std=INIT_STD)
        nn.init.normal_(self.rank_embeddings, std=INIT_STD)

    @torch.no_grad()
    def start_from_text(self, context: Tensor | None, ranks: Tensor | None, base_ranks: Tensor | None) -> None:
        """Starts from token embeddings of texts; None leaves a part as it is.

        Args:
            context: (M, W) embeddings of a context.
            ranks: (K, T, W) embeddings of the names of the ranks, padding included.
            base_ranks: (B, T, W) embeddings of the names of the base ranks, padding included.

        K names become B base embeddings by least squares: those whose mixtures come closest to the names.  Measured
        against taking the names nearest to the base positions, over three interpolations and 2 to 5 bases
        (`benchmarks/base_names.py`), the mixtures are closer to the names and predict better, each time.  As in the
        published code, names that are shorter than the longest are filled up with the padding token's embedding, which
        the text encoder reads; without interpolation every name keeps its own length.
        """
        if context is not None:
            self.context_embeddings.copy_(context.expand_as(self.context_embeddings))
        if ranks is not None and self.interpolation_weights is not None:
            weights, names = self.interpolation_weights.double().cpu(), ranks.double().cpu().flatten(1)
            fit = torch.linalg.lstsq(weights, names, rcond=LEAST_SINGULAR_VALUE, driver="gelsd").solution
            base_ranks = fit.unflatten(1, ranks.shape[1:])
        elif ranks is not None:
            base_ranks = ranks
        if base_ranks is not None:
            self.rank_embeddings.copy_(base_ranks)

    def forward(self) -> Prompts:
        """The prompts of the K ranks."""
        ranks: Tensor = self.rank_embeddings
        if self.interpolation_weights is not None:
            ranks = _mix(self.interpolation_weights, ranks)
        return self._lay_out(ranks, self.context_embeddings)

    def at(self, positions: Tensor) -> Prompts:
        """The prompts of N real positions (N,) between the first and the last rank, with interpolation only."""
        assert self.interpolation is not None  # checked by the head
        ranks = _mix(self._weights(positions), self.rank_embeddings)
        context: Tensor = self.context_embeddings
        if self.rank_specific_context:  # between two ranks, between their contexts
            known = torch.tensor(self.positions, dtype=torch.float64, device=positions.device)
            right = torch.searchsorted(known, positions.double()).clamp(1, self.num_ranks - 1)
            part = (positions.double() - known[right - 1]) / (known[right] - known[right - 1])
            context = torch.lerp(context[right - 1], context[right], part.to(context.dtype)[:, None, None])
        return self._lay_out(ranks, context)

    def _lay_out(self, ranks: Tensor, context: Tensor) -> Prompts:
        """Prompts from rank embeddings (N, T, W) and context embeddings (M, W) or (N, M, W)."""
        text, num, dtype = self.text, len(ranks), ranks.dtype
        special = self.special.to(dtype)
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
        weights = interpolation_weights(positions, first, last, self.num_base_ranks, self.interpolation)
        return weights.to(torch.promote_types(self.rank_embeddings.dtype, torch.float32))

    def _build_weights(self) -> None:
        if self.interpolation is not None:
            positions = torch.tensor(self.positions, dtype=torch.float64)
            self.interpolation_weights = self._weights(positions).to(self.rank_embeddings.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PromptLearner:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        self._build_weights()  # .half() and .bfloat16() would round neighbouring ranks onto each other
        return self

    def extra_repr(self) -> str:
        kind = (
            f"{self.interpolation}, {self.num_base_ranks} base ranks" if self.interpolation else "free rank embeddings"
        )
        return f"{self.num_ranks} ranks, {self.text.num_context} context tokens, {kind}"


def _mix(weights: Tensor, bases: Tensor) -> Tensor:
    """Rank embeddings (N, T, W) from weights (N, B) and base embeddings (B, T, W), summed in the weights' precision."""
    with full_precision(weights):
        mixed = torch.einsum("nb,btw->ntw", weights, bases.to(weights.dtype))
    return mixed.to(bases.dtype)


def full_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """No autocast, on devices that have one."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
