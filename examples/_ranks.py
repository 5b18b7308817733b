"""What is read and how it is split: ranks, rows of a table and their labels, and the parts train, val and test."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _errors import UserError
from torch import Tensor

import ordinal_prompt as op

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}


@dataclass(frozen=True)
class Ranks:
    """The K ranks: their values, strictly increasing, and their names, if they have any."""

    values: tuple[int, ...]
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.values) < 2:
            raise UserError(f"at least 2 ranks are needed, but there is {len(self.values)}.")
        if self.names is not None and len(self.names) != len(self.values):
            raise UserError(f"{len(self.names)} rank names were given for {len(self.values)} ranks; give one for each.")

    def __len__(self) -> int:
        return len(self.values)

    def named(self, names: Sequence[str] | None) -> Ranks:
        """The same ranks with the given names, if there are any."""
        return self if names is None else Ranks(self.values, tuple(names))

    def __str__(self) -> str:
        described = f"{len(self)} ranks, {self.values[0]} … {self.values[-1]}"
        return described if self.names is None else f"{described} ({self.names[0]} … {self.names[-1]})"


def parse_ranks(text: str) -> tuple[int, ...]:
    """Rank values from `K` (0…K-1), `FIRST-LAST`, or a comma list."""
    text = text.strip()
    if match := re.fullmatch(r"(-?\d+)-(-?\d+)", text):
        values = tuple(range(int(match[1]), int(match[2]) + 1))
    elif re.fullmatch(r"\d+", text):
        values = tuple(range(int(text)))
    elif re.fullmatch(r"-?\d+(\s*,\s*-?\d+)+", text):
        values = tuple(int(part) for part in text.split(","))
    else:
        raise UserError(f"--ranks takes a number (101), a range (16-77) or a list (1,2,5), but got {text!r}.")
    if any(after <= before for before, after in itertools.pairwise(values)):
        raise UserError(f"--ranks must be strictly increasing, but got {text!r}.")
    return values


def parse_names(text: str) -> tuple[str, ...]:
    """Rank names from a comma list, or from a file with one name a line."""
    path = Path(text)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else text.split(",")
    names = tuple(line.strip() for line in lines if line.strip())
    if len(set(names)) != len(names):
        raise UserError("--rank-names must be distinct.")
    return names


@dataclass(frozen=True)
class Row:
    """One sample: what to load (a path, a text), its label as written, and where that was."""

    content: str
    label: str
    split: str | None
    group: str | None
    where: str


def read_table(path: Path, content: str, label: str, split: str = "split", group: str | None = None) -> list[Row]:
    """Rows of a CSV file with a header; the split column counts where there is one.

    Args:
        content, label, split, group: names of the columns.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            records = [(reader.line_num, record) for record in reader]
            columns = list(reader.fieldnames or [])
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise UserError(f"{path} cannot be read as CSV in UTF-8: {error}.") from error
    for column in filter(None, (content, label, group)):
        if column not in columns:
            hint = " (are its columns separated by commas?)" if len(columns) == 1 else ""
            raise UserError(f"{path} has no column {column!r}; it has {', '.join(map(repr, columns)) or 'none'}{hint}.")
    if not records:
        raise UserError(f"{path} holds no rows.")
    rows = []
    for line, record in records:
        where = f"{path}, line {line}"
        if not (record[content] or "").strip() or not (record[label] or "").strip():
            raise UserError(f"{where}: {content} or label is missing.")
        named = (record.get(split) or "").strip().lower() or None
        if named is not None and named not in SPLIT_NAMES:
            raise UserError(f"{where}: unknown split {named!r}; known are train, val and test.")
        part, together = SPLIT_NAMES[named] if named else None, record[group] if group else None
        rows.append(Row(record[content], record[label].strip(), part, together, where))
    return rows


def is_integer(label: str) -> bool:
    """Whether a label is written as an integer, as 3 or 3.0."""
    try:
        return float(label).is_integer()
    except ValueError:
        return False


def rank_labels(rows: Sequence[Row], ranks: Ranks | None) -> tuple[Ranks, Tensor]:
    """The ranks (by default all integers from the smallest label to the largest), and each row's rank index.

    A label that is a rank's name means that rank, also if it is a number.
    """
    named = {name: index for index, name in enumerate(ranks.names or ())} if ranks else {}
    numbers: list[int | None] = []
    for row in rows:
        if row.label in named:
            numbers.append(None)
            continue
        try:
            number = float(row.label)
            if not number.is_integer():
                raise ValueError
            numbers.append(int(number))
        except (ValueError, OverflowError):
            hint = f"one of the rank names {', '.join(list(named)[:5])} …" if named else "give --rank-names for names"
            raise UserError(f"{row.where}: label {row.label!r} is not an integer; {hint}.") from None
    if ranks is None:
        known = [number for number in numbers if number is not None]
        ranks = Ranks(tuple(range(min(known), max(known) + 1)))
    index = {value: i for i, value in enumerate(ranks.values)}
    outside = [i for i, number in enumerate(numbers) if number is not None and number not in index]
    if outside:
        first = rows[outside[0]]
        raise UserError(
            f"{first.where}: label {first.label} is outside the {ranks} ({len(outside)} such rows); set --ranks, or "
            "correct the labels."
        )
    labels = [named[row.label] if number is None else index[number] for row, number in zip(rows, numbers, strict=True)]
    return ranks, torch.tensor(labels)


def split_rows(
    rows: Sequence[Row], labels: Tensor, val_fraction: float, test_fraction: float, seed: int
) -> dict[str, Tensor]:
    """Indices of train, val and test: as the rows say, else drawn at random, stratified, and groups kept together.

    Rows without a split are training rows.  What the rows leave without samples is drawn from the training rows.
    """
    said = [row.split or "train" for row in rows]
    parts = {
        name: torch.tensor([i for i, split in enumerate(said) if split == name], dtype=torch.long)
        for name in ("train", "val", "test")
    }
    generator = torch.Generator().manual_seed(seed)
    for name, fraction in (("test", test_fraction), ("val", val_fraction)):
        train = parts["train"]
        if len(parts[name]) or fraction == 0:
            continue
        drawn = _draw(train, labels, [rows[i].group for i in train.tolist()], fraction, generator)
        parts[name], parts["train"] = train[drawn], train[~drawn]
    for name, option in (("train", ""), ("val", "; raise --val-fraction"), ("test", "; raise --test-fraction")):
        if len(parts[name]) == 0 and not (name == "val" and val_fraction == 0):
            raise UserError(f"the {name} part of the {len(rows)} samples is empty{option}.")
    return parts


def _draw(
    indices: Tensor, labels: Tensor, groups: Sequence[str | None], fraction: float, generator: torch.Generator
) -> Tensor:
    """A mask of a share of the indices: evenly along the sorted labels, or whole groups."""
    order = torch.randperm(len(indices), generator=generator)
    if any(group is not None for group in groups):
        chosen: set[str | None] = set()
        taken = 0
        for group in dict.fromkeys(groups[i] for i in order.tolist()):
            if taken >= fraction * len(indices):
                break
            chosen.add(group)
            taken += groups.count(group)
        return torch.tensor([group in chosen for group in groups])
    order = order[labels[indices[order]].argsort(stable=True)]
    steps = ((torch.arange(len(order) + 1) + 0.5) * fraction).floor()
    mask = torch.zeros(len(indices), dtype=torch.bool)
    mask[order[steps.diff() > 0]] = True
    return mask


def training_subset(train: Tensor, labels: Tensor, shots: int | None, shift: str | None, seed: int) -> Tensor:
    """The training indices that few-shot learning (`shots` per rank) or a label shift (`RANKS:KEEP`) leaves."""
    generator = torch.Generator().manual_seed(seed)
    try:
        if shift is not None:
            match = re.fullmatch(r"(\d+):([\d.]+)", shift)
            if match is None:
                raise UserError(f"--shift takes RANKS:KEEP, as 20:0.1, but got {shift!r}.")
            kept = op.protocols.label_shift_indices(labels[train], int(match[1]), float(match[2]), generator)
            train = train[kept]
        if shots is not None:
            train = train[op.protocols.few_shot_indices(labels[train], shots, generator)]
    except ValueError as error:
        raise UserError(f"--shots or --shift: {error}") from error
    return train


def check_ranks_present(ranks: Ranks, labels: Tensor, allow: bool) -> list[int]:
    """Values of the ranks that no training sample has; refused unless allowed."""
    counts = torch.bincount(labels, minlength=len(ranks))
    empty = [value for value, count in zip(ranks.values, counts.tolist(), strict=True) if count == 0]
    if empty and not allow:
        listed = ", ".join(map(str, empty[:8])) + (", …" if len(empty) > 8 else "")
        raise UserError(
            f"{len(empty)} of the {len(ranks)} ranks have no training sample ({listed}); correct --ranks, or pass "
            "--empty-ranks allow."
        )
    return empty
