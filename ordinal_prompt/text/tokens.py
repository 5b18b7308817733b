"""What a tokenizer puts around a text: start, end and padding ids, the full stop, and the ids of a text's own words.

Any tokenizer will do that maps texts to token ids: open_clip's, those of transformers, or a function
`list[str] -> (N, L) ids`.  Nothing is assumed of the special ids: they are read off what the tokenizer returns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

OPENAI_VOCABULARY = 49408


class PromptTokenizer:
    """Splits a tokenizer's output into start, words, end and padding.

    Args:
        tokenizer: a callable from a list of N texts to padded token ids (N, L), or a transformers tokenizer.

    Attributes:
        start: ids before the words of every text (start of text; none for T5-like tokenizers).
        end: ids after them (end of text).
        padding: id of the padding.
        full_stop: ids of "." at the end of a sentence; empty where the tokenizer removes punctuation.
        stand_in: an ordinary id, for positions whose embedding is learned.

    >>> import open_clip
    >>> tokens = PromptTokenizer(open_clip.get_tokenizer("ViT-B-32"))
    >>> tokens.start, tokens.end, tokens.padding, tokens.full_stop
    ((49406,), (49407,), 0, (269,))
    >>> tokens.words("a photo of a dog")
    (320, 1125, 539, 320, 1929)
    """

    def __init__(self, tokenizer: Callable[..., Any]) -> None:
        if not callable(tokenizer):
            raise TypeError(
                f"Expected `tokenizer` to be callable (texts -> token ids), but got {type(tokenizer).__name__}; pass "
                "open_clip.get_tokenizer(model_name) or the tokenizer of your transformers model."
            )
        self._tokenizer = tokenizer
        self._keywords = {"context_length": 1024} if _accepts(tokenizer, "context_length") else {}
        empty, word = self._row(""), self._row("one")
        if _leading_run(word) > _leading_run(self._row("one one")):
            raise ValueError(
                f"Expected `tokenizer` to pad behind a text, but it pads in front of it ({word[:4]}…); pass the "
                "tokenizer of transformers itself in place of a function around it, or pad on the right."
            )
        pad = getattr(tokenizer, "pad_token_id", None)
        if not isinstance(pad, int):  # a padded row ends in padding
            pad = empty[-1] if empty else 0
        self.padding = pad
        self.start = tuple(empty[: common_prefix(empty, word)])
        self.end = self._strip(empty[len(self.start) :])
        if not self.end and len(empty) > len(self.start):  # end of text and padding share one id, or there is no end
            full = self._row(" ".join(["one"] * len(empty)))
            self.end = (pad,) if full[-1] == pad else ()
        words, sentence = self.words("one"), self.words("one.")
        if not words:
            raise ValueError(f"Expected the tokenizer to give ids for 'one', but got only special ids: {word[:8]}.")
        self.stand_in = words[-1]
        self.full_stop = sentence[len(words) :] if sentence[: len(words)] == words else ()

    def words(self, text: str) -> tuple[int, ...]:
        """Ids of a text without the special ids around it; underscores count as blanks."""
        row = self._row(text.replace("_", " "))
        body = self._strip(row[len(self.start) :])
        end = self.end if self.end != (self.padding,) or body[-1:] == self.end else ()
        return body[: len(body) - len(end)] if end and body[-len(end) :] == end else body

    def whole(self, text: str) -> tuple[int, ...]:
        """As `words`, of a text of which nothing may be lost.

        Raises:
            ValueError: the tokenizer cuts it.
        """
        ids, parts = self.words(text), text.replace("_", " ").split(" ")
        for rest, lost in ((parts[:-1], parts[-1]), (parts[1:], parts[0])):
            if ids == self.words(" ".join(rest)) and self.words(lost):
                raise ValueError(
                    f"Expected `tokenizer` to read a whole text, but it cuts {text!r} at {len(ids)} tokens; pass the "
                    "tokenizer of transformers itself in place of a function around it, or one that does not truncate."
                )
        return ids

    def _row(self, text: str) -> list[int]:
        with torch.device("cpu"):  # whatever the default device: tokenizers make tensors, and we read them
            ids = self._tokenizer([text], **self._keywords)
        if not isinstance(ids, torch.Tensor):
            ids = ids["input_ids"] if hasattr(ids, "keys") else ids
        try:
            row = ids[0]
            return [int(i) for i in (row.tolist() if isinstance(row, torch.Tensor) else row)]
        except (TypeError, ValueError, IndexError):
            raise TypeError(
                f"Expected the tokenizer to give a row of token ids for each text, but for {[text]} got {ids!r}."
            ) from None

    def _strip(self, ids: Sequence[int]) -> tuple[int, ...]:
        stop = len(ids)
        while stop and ids[stop - 1] == self.padding:
            stop -= 1
        return tuple(ids[:stop])


def openai_tokenizer(vocabulary: int | None) -> Callable[..., Any]:
    """open_clip's default tokenizer, for the special tokens of a model with the vocabulary of OpenAI's CLIP.

    Raises:
        ValueError: another vocabulary.
    """
    if vocabulary != OPENAI_VOCABULARY:
        raise ValueError(
            f"Expected a `tokenizer`, from which start, end and padding tokens are read: this text encoder's "
            f"vocabulary ({vocabulary}) is not that of OpenAI's CLIP ({OPENAI_VOCABULARY}). Pass "
            "tokenizer=open_clip.get_tokenizer(model_name) or your transformers tokenizer."
        )
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer: Callable[..., Any] = SimpleTokenizer()
    return tokenizer


def _accepts(function: Callable[..., Any], keyword: str) -> bool:
    try:
        return keyword in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def common_prefix(*rows: Sequence[int]) -> int:
    """How many ids at their beginning all rows share."""
    return next((i for i, ids in enumerate(zip(*rows, strict=False)) if len({*ids}) > 1), min(map(len, rows)))


def _leading_run(row: Sequence[int]) -> int:
    return next((i for i, token in enumerate(row) if token != row[0]), len(row))
