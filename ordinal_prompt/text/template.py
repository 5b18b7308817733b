"""From words to what stands where in a prompt: `[start] context… rank… [.] [end]`, in token ids and token counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ordinal_prompt.config import HeadConfig
from ordinal_prompt.text.tokens import PromptTokenizer, common_prefix

Ids = tuple[int, ...]


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

    A prompt has the ids of its whole text, since tokenizers give a word other ids behind a blank, a bracket or a hyphen
    than at the start of a text.  A full stop at the end of a template is the one that closes every prompt.

    Raises:
        ValueError: names without a token, or that have the same tokens; texts that the tokenizer cuts.
    """
    names, context, ids = config.base_rank_names or config.rank_names, config.context, None
    num_context, template = 0, None
    if isinstance(context, int):
        num_context = context
    elif "{}" in context:
        template = context
    else:
        context = context.replace("_", " ").strip()
        ids = tokens.whole(context)
        num_context = len(ids)
    rank_at = _rank_at(config.rank_position, num_context)
    if ids is not None and rank_at in (0, num_context):  # else the rank stands between any two tokens
        template = f"{context} {{}}".strip() if rank_at == num_context else f"{{}} {context}"
    before, rank_ids, after, end = _cut(tokens, template or ("one {}" if rank_at else "{}"), names or ())
    if template is not None:
        ids, num_context, rank_at = before + after, len(before + after), len(before)
    if names is not None:
        _check_distinct(names, rank_ids)
        counts = tuple(map(len, rank_ids))
    else:
        counts = (config.tokens_per_rank,) if isinstance(config.tokens_per_rank, int) else (*config.tokens_per_rank,)
    text = PromptText(
        start=tokens.start,
        end=end,
        padding=tokens.padding,
        stand_in=tokens.stand_in,
        num_context=num_context,
        rank_at=rank_at,
        rank_tokens=counts if config.interpolation is None else (max(counts),),
    )
    return WrittenPrompts(text, ids or None, None if names is None else rank_ids)


def _cut(tokens: PromptTokenizer, template: str, names: Sequence[str]) -> tuple[Ids, tuple[Ids, ...], Ids, Ids]:
    """Ids before the ranks, of each rank, after them, and those that close every prompt.

    Together they are the ids of the whole texts; tokens across a border belong to the rank.  Where the full stop
    becomes one token with the end of some names, it is written by itself.
    """
    before, _, after = template.partition("{}")
    after = after.rstrip().removesuffix(".")
    for stop in (".", "") if tokens.full_stop else ("",):
        texts = [tokens.whole(f"{before}{name}{after}{stop}".rstrip()) for name in names]
        head, part, one = map(tokens.words, (before.rstrip(), f"{before}one", f"{before}one{after}{stop}".rstrip()))
        tail = one[len(part) :] if one[: len(part)] == part else tokens.words(f"{after}{stop}")
        head = head[: common_prefix(head, *texts)]
        rests = [ids[len(head) :] for ids in texts]
        size = common_prefix(tail[::-1], *[rest[::-1] for rest in rests])
        tail = tail[len(tail) - size :]
        if tail:
            break
    ranks = tuple(rest[: len(rest) - size] for rest in rests)
    closing = tokens.full_stop if not stop or tail[-len(tokens.full_stop) :] == tokens.full_stop else ()
    return head, ranks, tail[: len(tail) - len(closing)] if stop else tail, closing + tokens.end


def _check_distinct(names: Sequence[str], rank_ids: Sequence[tuple[int, ...]]) -> None:
    for i, (name, ids) in enumerate(zip(names, rank_ids, strict=True)):
        if not ids:
            raise ValueError(f"Expected every rank name to have a token, but the tokenizer gives none for {name!r}.")
        if ids in rank_ids[:i]:
            same = names[rank_ids.index(ids)]
            raise ValueError(f"Expected names that the tokenizer tells apart, but {same!r} and {name!r} are the same.")


def _rank_at(position: str, num_context: int) -> int:
    return {"front": 0, "middle": num_context // 2, "tail": num_context}[position]
