"""Reads ordered data strictly: what would be guessed elsewhere is an error here, or is counted and said."""

from __future__ import annotations

import csv
import hashlib
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps

from ordinal_prompt.protocols import few_shot_indices, label_shift_indices

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
Ints: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
log = logging.getLogger("ordered_data")  # where nobody set up logging, warnings go to stderr, one line each


class DataError(ValueError):
    """A mistake in data or options, told in one sentence."""


def listed(items: Sequence[Any], most: int = 10) -> str:
    return ", ".join(map(str, items[:most])) + (f", … ({len(items)} in all)" if len(items) > most else "")


def read_table(path: str | Path, input_column: str, label_column: str) -> tuple[list[str], list[str]]:
    """Inputs and labels of a CSV file (separated by comma, semicolon or tab), every field as it is written."""
    columns = [input_column, label_column]
    try:
        with open(path, encoding="utf-8-sig") as file:
            first = file.readline()
        headers = {sep: [name.strip() for name in next(csv.reader([first], delimiter=sep), [])] for sep in ",;\t"}
        # The separator that gives both columns, else that which gives most.
        sep, header = max(headers.items(), key=lambda item: (set(columns) <= set(item[1]), len(item[1])))
        for column in columns:
            if header.count(column) != 1:
                raise DataError(
                    f"Expected one column named {column!r} in {path}, but its columns are {listed(header) or 'none'}; "
                    "pass the name of the right one."
                )
        # The header is a row for pandas, which would rename equal columns and take surplus fields for an index.
        text: dict[str, Any] = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
        table = pd.read_csv(path, sep=sep, header=None, skipinitialspace=True, **text)[1:]
    except pd.errors.ParserError as error:  # names the line
        told = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        raise DataError(f"{path}: {told}; put quotes around fields that hold the separator {sep!r}.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no table in UTF-8 ({error}); save it as CSV in UTF-8.") from None
    if table.empty:
        raise DataError(f"{path} has no rows under its header.")
    chosen = table[[header.index(column) for column in columns]]
    for column, (_, values) in zip(columns, chosen.items(), strict=True):
        empty = values.index[values.isna() | (values.str.strip() == "")]  # fields that a short row lacks are NaN
        if len(empty):
            raise DataError(f"{path} has no {column!r} in row {listed(empty + 1)} (the header is row 1); fill it.")
    return chosen.iloc[:, 0].tolist(), chosen.iloc[:, 1].str.strip().tolist()


def read_folder(root: str | Path) -> tuple[list[str], list[str]]:
    """Paths and labels of the images in a folder that holds one folder for each rank, named by its label."""
    visible = [item for item in sorted(Path(root).iterdir()) if not item.name.startswith(".")]
    folders = [item for item in visible if item.is_dir()]
    files = [item for folder in folders for item in sorted(folder.iterdir()) if not item.name.startswith(".")]
    images = [item for item in files if item.suffix.lower() in IMAGE_SUFFIXES and item.is_file()]
    if misplaced := [item for item in files if item.is_dir()] + [
        item for item in visible if item.suffix.lower() in IMAGE_SUFFIXES and item.is_file()
    ]:
        raise DataError(f"{misplaced[0]} does not lie directly in the folder of a rank; move it there, or away.")
    if empty := {*folders} - {item.parent for item in images}:
        raise DataError(f"No images in {listed(sorted(empty))}; remove what is not the folder of a rank.")
    if others := len(files) - len(images):
        log.warning("%s: skipped %d files that are no images", root, others)
    return [*map(str, images)], [item.parent.name for item in images]


def read_images(source: str | Path, path_column: str = "path", label_column: str = "label") -> Any:
    """Paths and labels of a folder of images, or of a CSV file with paths that start beside it."""
    if Path(source).is_dir():
        return read_folder(source)
    paths, labels = read_table(source, path_column, label_column)
    return [str(Path(source).parent / path) for path in paths], labels


def rank_labels(
    labels: Sequence[str], names: Sequence[str] | None = None
) -> tuple[list[str], list[float] | None, Ints]:
    """Names of the ranks, their values where they are ascending numbers, and the rank index of each label.

    Args:
        labels: numbers, in any notation, which need no names; or words.
        names: the labels from the lowest rank to the highest; `label=name` gives a label another name for prompts.
    """
    found = [*dict.fromkeys(labels)]
    numeric = all(NUMBER.fullmatch(text) for text in [*found, *(name.split("=")[0] for name in names or ())])
    read: Any = float if numeric else str.strip
    if names is None:
        if not numeric:
            raise DataError(f"The labels {listed(found)} are no numbers; pass all, the lowest first (--rank-names).")
        names = [repr(value).removesuffix(".0") for value in sorted({*map(float, found)})]
    parts = [name.partition("=") for name in names]
    shown = [(name or label).strip() for label, _, name in parts]
    keys = [read(label) for label, _, _ in parts]
    if numeric and not np.isfinite(keys).all():
        raise DataError(f"The labels {listed(shown)} are no finite numbers.")
    if len({*keys}) < max(2, len(keys)):
        raise DataError(f"Expected at least two ranks, each once, but got {listed(shown) or 'none'}.")
    if numeric and keys not in (sorted(keys), sorted(keys, reverse=True)):
        raise DataError(f"The ranks {listed(shown)} are numbers out of order; pass them ascending or descending.")
    ranks = {key: index for index, key in enumerate(keys)}
    if outside := [label for label in found if read(label) not in ranks]:
        raise DataError(
            f"The labels {listed(outside)} are not among the ranks {listed(shown)}; mend the data, or --rank-names "
            "(label=name where prompts shall have another name)."
        )
    indices = np.array([ranks[read(label)] for label in labels])
    if empty := [name for index, name in enumerate(shown) if index not in indices]:
        log.warning("%d of %d ranks have no samples: %s", len(empty), len(shown), listed(empty))
    return shown, keys if numeric and keys[0] < keys[1] else None, indices


def split(
    indices: Ints,
    inputs: Sequence[str],
    *,
    keys: Sequence[str] | None = None,
    seed: int = 0,
    validation: float = 0.15,
    test: float = 0.2,
    shots: int | None = None,
    shift: Sequence[float] | None = None,
) -> tuple[Ints, Ints, Ints]:
    """Positions of the training (thinned out by `shots` and `shift`), validation and test samples, rank by rank.

    Of samples that are the same (have the same `keys`, by default the inputs) one is kept: none has a twin elsewhere.
    """
    seen: dict[str, int] = {}
    for i, key in enumerate(inputs if keys is None else keys):
        if indices[first := seen.setdefault(key, i)] != indices[i]:
            raise DataError(
                f"{inputs[first][:80]!r} has rank {indices[first] + 1}, and {inputs[i][:80]!r}, which is the same, has "
                f"rank {indices[i] + 1} (samples {first + 1} and {i + 1}); keep one of them."
            )
    if twins := len(inputs) - len(seen):
        log.warning("dropped %d samples that are the same as others", twins)
    random = np.random.default_rng(seed)
    order = random.permutation([*seen.values()])
    parts: tuple[list[int], ...] = ([], [], [])
    for rank in np.unique(indices):
        own = order[indices[order] == rank]
        # Shares are rounded up or down at random, so that of many rare ranks each part has some; training goes first.
        tested = min(int(len(own) * test + random.random()), len(own) - 1)
        validated = min(int(len(own) * validation + random.random()), len(own) - 1 - tested)
        for part, drawn in zip(parts, np.split(own, [len(own) - tested - validated, len(own) - tested]), strict=True):
            part.extend(drawn)
    if not all(parts):
        raise DataError(f"{len(order)} samples are too few for training, validation and test; add some.")
    train, for_validation, for_test = (np.sort(part) for part in parts)
    generator = torch.Generator().manual_seed(seed)
    if shift is not None:
        if shift[0] % 1:
            raise DataError(f"Expected a whole number of ranks to thin out, but got {shift[0]:g}.")
        train = train[label_shift_indices(indices[train], int(shift[0]), shift[1], generator)]
    if shots is not None:
        train = train[few_shot_indices(indices[train], shots, generator)]
    return train, for_validation, for_test


def check_images(paths: Sequence[str], skip: bool = False) -> tuple[list[int], list[str], float]:
    """Positions of the images that can be read, their fingerprints, and the white of those beyond 8 bits.

    White is one number for all images, so that dark ones stay darker: of 12 bits stored as 16 it is 4095.
    """
    with ThreadPoolExecutor() as pool:
        found = [*pool.map(_check, paths)]
    readable = [i for i, result in enumerate(found) if not isinstance(result, str)]
    if len(readable) < len(paths):
        faults = [f"{path}: {fault}" for path, fault in zip(paths, found, strict=True) if isinstance(fault, str)]
        told = f"{len(faults)} of {len(paths)} images cannot be read ({listed(faults, 3)})"
        if not (skip and readable):
            raise DataError(f"{told}; repair or remove them, or pass --skip-unreadable.")
        log.warning("skipped: %s", told)
    top = max((found[i][1] for i in readable), default=0.0)
    return readable, [found[i][0] for i in readable], max(1.0, top if top % 1 else 2.0 ** int(top).bit_length() - 1)


def open_image(path: str, white: float) -> Image.Image:
    """An image in RGB, upright; one of 16 bits or of floats is scaled so that `white` becomes 255."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode[0] in "IF":
            upright = Image.fromarray((np.asarray(upright) * (255 / white)).clip(0, 255).round().astype(np.uint8))
        return upright.convert("RGB")


def _check(path: str) -> Any:
    """Fingerprint of an image and its highest value (0 of 8 bits), or what is wrong with it."""
    try:
        with Image.open(path) as image:
            wide, upright = image.mode[0] in "IF", ImageOps.exif_transpose(image)
            pixels = np.asarray(upright if wide else upright.convert("RGB"))  # not a palette's indices
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return str(error)
    if wide and not (np.isfinite(pixels).all() and pixels.min() >= 0):
        return "values below zero, or not finite"
    # Of the decoded pixels, so that copies under other names or in another lossless format are found.
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest(), pixels.max() if wide else 0.0
