"""From words to what stands where in a prompt: `[start] context… rank… [.] [end]`, in token ids and token counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ordinal_prompt.config import HeadConfig
from ordinal_prompt.text.tokens import PromptTokenizer


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
    """A `PromptText` and the token ids of the words in it; None where embeddings start at random, or there are none."""

    text: PromptText
    context_ids: tuple[int, ...] | None
    rank_ids: tuple[tuple[int, ...], ...] | None


def write_prompts(tokens: PromptTokenizer, config: HeadConfig) -> WrittenPrompts:
    """Finds the token ids of context and rank names, and their places in the prompt.

    A name is tokenized where it stands, as the words after the words before it.  A full stop at the end of a template
    is the one that closes every prompt.

    Raises:
        ValueError: names without a token, or that have the same tokens.
    """
    before, context_ids = "", None
    if isinstance(config.context, str):
        before, place, after = config.context.replace("_", " ").partition("{}")
        after = after.strip().removesuffix(".")
        head = tokens.words(before)
        context_ids = head + (tokens.follow(f"{before} one", after) if after.strip() else ())
        num_context = len(context_ids)
        rank_at = len(head) if place else _rank_at(config.rank_position, num_context)
    else:
        num_context = config.context
        rank_at = _rank_at(config.rank_position, num_context)
    if rank_at == 0:
        before = ""
    elif not before.strip():
        before = "one"  # any word: a name inside a sentence may have other ids than at its start

    names, rank_ids = config.base_rank_names or config.rank_names, None
    if names is not None:
        rank_ids = tuple(tokens.follow(before, name.replace("_", " ")) for name in names)
        _check_distinct(names, rank_ids)
        counts = tuple(map(len, rank_ids))
    else:
        counts = (config.tokens_per_rank,) if isinstance(config.tokens_per_rank, int) else (*config.tokens_per_rank,)
    text = PromptText(
        start=tokens.start,
        end=tokens.full_stop + tokens.end,
        padding=tokens.padding,
        stand_in=tokens.stand_in,
        num_context=num_context,
        rank_at=rank_at,
        rank_tokens=counts if config.interpolation is None else (max(counts),),
    )
    return WrittenPrompts(text, context_ids or None, rank_ids)


def _check_distinct(names: Sequence[str], rank_ids: Sequence[tuple[int, ...]]) -> None:
    for i, (name, ids) in enumerate(zip(names, rank_ids, strict=True)):
        if not ids:
            raise ValueError(f"Expected every rank name to have a token, but the tokenizer gives none for {name!r}.")
        if ids in rank_ids[:i]:
            same = names[rank_ids.index(ids)]
            raise ValueError(f"Expected names that the tokenizer tells apart, but {same!r} and {name!r} are the same.")


def _rank_at(position: str, num_context: int) -> int:
    return {"front": 0, "middle": num_context // 2, "tail": num_context}[position]
