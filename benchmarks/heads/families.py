"""Word families, and a split into train, validation and test that keeps each family together.

"abandon" in training and "abandoned" in the test part would make the test part too easy.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from task import PARTS

Sample = TypeVar("Sample")

# Longest first, so that "fulness" goes before "ness".
_ENDINGS = sorted(
    """
    ingly edly fulness lessness ishness fully lessly ously ively ability ibility ations ation ings ing ness ments ment
    iest ier ies ied ions ion ers er ors or ed en est ily ly ous ious ful less able ible ive ish isms ism ists ist ity
    ty al ic ance ence ant ent es s d y e i
    """.split(),  # noqa: SIM905
    key=lambda ending: (-len(ending), ending),
)


def split_families(
    samples: Mapping[str, Sequence[Sample]], seed: int, together: Iterable[Sequence[str]] = ()
) -> dict[str, list[Sample]]:
    """Train, val and test (60 : 15 : 25 of the families) of the samples of each word, no word family in two of them."""
    families = word_families(samples, together)
    random.Random(seed).shuffle(families)
    bounds = [round(share * len(families)) for share in (0, 0.60, 0.75, 1)]
    return {
        part: [sample for family in families[start:end] for word in family for sample in samples[word]]
        for part, start, end in zip(PARTS, bounds, bounds[1:], strict=False)
    }


def word_families(words: Iterable[str], together: Iterable[Sequence[str]] = ()) -> list[tuple[str, ...]]:
    """Groups of words that share a stem or their first four letters, in alphabetical order.

    They are too large rather than too small: no two words that look alike may stand on both sides of a split.  The
    families of words that stand `together` become one.

    >>> word_families(["sad", "happy", "glad", "saddened", "happiness", "happen"])
    [('glad',), ('happen', 'happiness', 'happy'), ('sad', 'saddened')]
    """
    words = sorted(words)
    family = {word: word for word in words}  # leads to the first word of the family, step by step

    def root(word: str) -> str:
        while family[word] != word:
            word = family[word]
        return word

    def join(word: str, other: str) -> None:
        first, second = sorted((root(word), root(other)))
        family[second] = first

    alike: dict[str, str] = {}
    for word in words:
        for key in (f"{word[:4]}…", _stem(word)):
            join(word, alike.setdefault(key, word))
    for group in together:
        for word in group:
            join(word, group[0])
    families: dict[str, list[str]] = {}
    for word in words:
        families.setdefault(root(word), []).append(word)
    return [tuple(members) for members in families.values()]


def _stem(word: str) -> str:
    """A word without its endings, as long as three letters are left."""
    stripped = True
    while stripped:
        ending = next((e for e in _ENDINGS if word.endswith(e) and len(word) - len(e) >= 3), "")
        word = word.removesuffix(ending)
        stripped = bool(ending)
        if len(word) > 3 and word[-1] == word[-2]:
            word, stripped = word[:-1], True
    return word
