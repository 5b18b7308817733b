"""The numbers in the export guide are those that its script measures."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "export"))

import differences

GUIDE = Path(__file__).parents[2] / "docs" / "export.md"
ROW = re.compile(
    r"^\| (?P<name>.+) \| (?P<kind>exact|approximate) \| (?P<logits>\S+) \| (?P<ranks>\S+) \|$", re.MULTILINE
)
ROUNDING = 1e-4  # what no exact export exceeds


def test_the_table_of_the_export_guide() -> None:
    """Other processors round otherwise: the same rows, differences of the same size, and as exact as is told."""
    table = {row["name"]: row for row in ROW.finditer(GUIDE.read_text(encoding="utf-8"))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured = differences.measure()
    assert [*table] == [*measured]
    for name, found in measured.items():
        row = table[name]
        for number, told in zip(found, (float(row["logits"]), float(row["ranks"])), strict=True):
            assert number <= 4 * told + 1e-6, (name, number, told)
            assert (told < ROUNDING) == (row["kind"] == "exact"), name
