"""The data sets: one function each, from the options of the command line to a `Task`.

Words and adjectives come with the packages vaderSentiment and textblob; SST-5 and texts of your own are three CSV
files; images are a folder for each rank; features of your own are one .npz file.
"""

from __future__ import annotations

import importlib.resources
import math
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import torch
from embedding import sentence_features
from families import split_families
from images import DAMAGE, coffee_leaves, folder_of_images, image_task
from task import PARTS, Task

_FEELINGS = "extremely negative, very negative, negative, slightly negative, neutral, slightly positive, positive"
FEELINGS = dict(enumerate([*_FEELINGS.split(", "), "very positive"], start=-4))
WORD_SEED = 4  # the first that puts every rank, also the rarest (21 words), into each part at least twice
_OPINIONS = "purely factual, mostly factual, rather factual, rather subjective, mostly subjective, purely subjective"
# For each rating of the adjectives: rank names by value, ranks per unit of the rating, and a context.
ADJECTIVE_SCALES: dict[str, tuple[dict[int, str], int, str]] = {
    "subjectivity": (dict(enumerate(_OPINIONS.split(", "))), 5, "this description is"),
    "polarity": ({value: FEELINGS[value] for value in range(-3, 4)}, 3, "the feeling of this description is"),
}
ADJECTIVE_SEED = 0
_EASE = "trivial, very easy, easy, rather easy, neither easy nor hard, rather hard, hard, very hard"
COMPLEXITY = _EASE.split(", ")
SOURCES = ("bible", "biomed", "europarl")  # of the sentences whose words are more or less complex
SST5_NAMES = ("very negative", "negative", "neutral", "positive", "very positive")

Pairs = Mapping[str, Sequence[tuple[str, int]]]  # texts and rank indices of each part


def words() -> Pairs:
    """Words and how they feel, from -4 to 3: the rounded mean of ten people's ratings (halves to even).

    The parts are split by word family.
    """
    lexicon = importlib.resources.files("vaderSentiment") / "vader_lexicon.txt"
    rows = (line.split("\t") for line in lexicon.read_text(encoding="utf-8").splitlines())
    rating = {word: float(mean) for word, mean, *_ in rows if re.fullmatch("[a-z]{3,}", word)}
    values = list(FEELINGS)
    return split_families({word: [(word, values.index(round(mean)))] for word, mean in rating.items()}, WORD_SEED)


def adjectives(scale: str) -> Pairs:
    """Meanings of adjectives, and some other words: "abrupt: extremely steep".

    The lexicon is that of De Smedt and Daelemans, as textblob brings it; most entries were tagged by hand.  Of a text
    that stands there several times, the first counts.  Neither a word family nor words that share a meaning ("fragile",
    "delicate") stand on both sides of a split.
    """
    names, steps, _ = ADJECTIVE_SCALES[scale]
    values = list(names)
    samples: dict[str, dict[str, int]] = {}  # by word: its texts and their ranks
    words_of: dict[str, list[str]] = {}  # that share a meaning
    lexicon = importlib.resources.files("textblob") / "en" / "en-sentiment.xml"
    for entry in ElementTree.fromstring(lexicon.read_text(encoding="utf-8")):
        word, sense, rating = entry.attrib["form"], entry.get("sense"), entry.get(scale)
        if sense and rating:
            rank = values.index(math.floor(steps * float(rating) + 0.5 + 1e-9))
            samples.setdefault(word, {}).setdefault(f"{word}: {sense}", rank)
            words_of.setdefault(sense, []).append(word)
    pairs = {word: list(texts.items()) for word, texts in samples.items()}
    return split_families(pairs, ADJECTIVE_SEED, words_of.values())


def read_texts(folder: str | Path, rank_names: Sequence[str]) -> Pairs:
    """Texts of train.csv, dev.csv and test.csv with the columns text and label (0…K-1, or the rank's name)."""
    ranks = {str(rank): rank for rank in range(len(rank_names))}
    ranks |= {name: rank for rank, name in enumerate(rank_names)}  # a name that is a number means that rank
    pairs = {}
    for part, name in zip(PARTS, ("train.csv", "dev.csv", "test.csv"), strict=True):
        path = Path(folder) / name
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        if not {"text", "label"} <= {*table.columns}:
            raise ValueError(f"{path} has the columns {', '.join(table.columns)}; it should have text and label.")
        labels = table["label"].str.strip()
        wrong = table[~labels.isin([*ranks]) | (table["text"].str.strip() == "")]
        if len(wrong):
            row = wrong.iloc[0]
            raise ValueError(
                f"{path}: {len(wrong)} rows have no text or no known label, the first one text {row['text']!r} and "
                f"label {row['label']!r}; labels are 0…{len(rank_names) - 1} or {', '.join(rank_names)}."
            )
        pairs[part] = list(zip(table["text"], labels.map(ranks), strict=True))
    return pairs


def complexity(folder: str | Path, names: Sequence[str] = COMPLEXITY, source: str | None = None) -> Pairs:
    """Words in sentences and how complex they are (CompLex, SemEval 2021): train.tsv, trial.tsv and test.tsv.

    Ranks are bins of 0.1 of the mean rating (0 to 1), or of 0.01 for 101 names; the last one is open.  All sentences of
    a `source`, one of `SOURCES`, are the test part, and those of the other two the rest.
    """
    files = {part: Path(folder) / f"{name}.tsv" for part, name in zip(PARTS, ("train", "trial", "test"), strict=True)}
    tables = {part: pd.read_csv(path, sep="\t", quoting=3, keep_default_na=False) for part, path in files.items()}
    if source:
        tables = {part: table.rename(columns={"subcorpus": "corpus"}) for part, table in tables.items()}
        whole = pd.concat(tables.values())
        tables = {part: table[table["corpus"] != source] for part, table in tables.items()}
        tables["test"] = whole[whole["corpus"] == source]
    pairs = {}
    for part, table in tables.items():
        bins = table["complexity"].to_numpy() * (10 if len(names) < 11 else 100)
        ranks = np.minimum(np.floor(bins + 1e-9), len(names) - 1).astype(int)
        pairs[part] = list(zip(table["token"] + ": " + table["sentence"], ranks.tolist(), strict=True))
    return pairs


def text_task(name: str, pairs: Pairs, names: Mapping[int, str], context: str) -> Task:
    """A task on sentence embeddings of texts; names are those of the ranks by value, lowest first."""
    features = sentence_features(name, [text for part in PARTS for text, _ in pairs[part]])
    return Task(
        name,
        dict(zip(PARTS, features.split([len(pairs[part]) for part in PARTS]), strict=True)),
        {part: torch.tensor([rank for _, rank in pairs[part]]) for part in PARTS},
        torch.tensor([float(value) for value in names]),
        tuple(names.values()),
        context,
    )


def complexity_task(kind: str, given: Namespace) -> Task:
    """Complexity of words: in a random split, of 8 or of 101 ranks, or in a source that training has not seen."""
    name, names, context = f"complexity-{kind}".rstrip("-"), COMPLEXITY, "this word in its sentence is"
    if kind == "101":
        names, context = [*map(str, range(101))], "the complexity of this word, from 0 to 100, is"
    pairs = complexity(given.folder, names, kind if kind in SOURCES else None)
    return text_task(name, pairs, dict(enumerate(names)), context)


def adjective_task(scale: str) -> Task:
    """One rating of the adjectives."""
    names, _, context = ADJECTIVE_SCALES[scale]
    return text_task(scale, adjectives(scale), names, context)


def file_task(name: str, folder: str, rank_names: Sequence[str], context: str) -> Task:
    """Texts of CSV files."""
    return text_task(name, read_texts(folder, rank_names), dict(enumerate(rank_names)), context)


def feature_task(path: str | Path, rank_names: Sequence[str] | None = None) -> Task:
    """Features of an .npz file: x_train (N, D), y_train (N,), the same for val and test; rank_values (K,) if wanted."""
    with np.load(path) as file:
        arrays = dict(file)
    missing = [name for part in PARTS for name in (f"x_{part}", f"y_{part}") if name not in arrays]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}.")
    named = len(rank_names) if rank_names else int(arrays["y_train"].max()) + 1
    values = torch.from_numpy(np.asarray(arrays.get("rank_values", np.arange(named)), dtype=np.float32))
    for part in PARTS:
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.ndim != 2 or y.shape != x.shape[:1] or not len(y) or not np.isfinite(x).all():
            raise ValueError(
                f"{path}: x_{part} and y_{part} should be (N, D) and (N,), and x finite; they are {x.shape} and "
                f"{y.shape}, and {np.isnan(x).sum()} values of x are NaN."
            )
        if not np.isin(y, np.arange(len(values))).all():
            raise ValueError(f"{path}: y_{part} holds other labels than the ranks 0…{len(values) - 1}.")
    return Task(
        Path(path).stem,
        {part: torch.from_numpy(arrays[f"x_{part}"].astype(np.float32)) for part in PARTS},
        {part: torch.from_numpy(arrays[f"y_{part}"].astype(np.int64)) for part in PARTS},
        values,
        tuple(rank_names) if rank_names else None,
    )


# A data set of your own is one more function from the options to a `Task`, with features of any encoder.
DATA_SETS: dict[str, Callable[[Namespace], Task]] = {
    "words": lambda _: text_task("words", words(), FEELINGS, "the feeling of this word is"),
    "subjectivity": lambda _: adjective_task("subjectivity"),
    "polarity": lambda _: adjective_task("polarity"),
    "sst5": lambda given: file_task("sst5", given.folder, SST5_NAMES, "a movie review that sounds"),
    "complexity": partial(complexity_task, ""),
    **{f"complexity-{kind}": partial(complexity_task, kind) for kind in ("101", *SOURCES)},
    "images": lambda given: image_task(
        "images", *folder_of_images(given.folder, given.rank_names), given.context or "", given.clip, given.pretrained
    ),
    "coffee": lambda given: image_task(
        "coffee", coffee_leaves(given.folder), DAMAGE, "a coffee leaf with", given.clip, given.pretrained
    ),
    "texts": lambda given: file_task("texts", given.folder, given.rank_names, given.context),
    "features": lambda given: feature_task(given.features, given.rank_names),
}
