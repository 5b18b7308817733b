"""Data is read strictly: what was silent once is an error, or is counted and said."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import examples_setup  # noqa: F401  # the examples' folder on the path
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torchmetrics")

from ordered_data import DataError, check_images, open_image, rank_labels, read_folder, read_table, split


def table(tmp_path: Path, text: str, encoding: str = "utf-8") -> tuple[list[str], list[str]]:
    (tmp_path / "data.csv").write_text(text, encoding=encoding)
    return read_table(tmp_path / "data.csv", "text", "label")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_separators_and_byte_order_marks_are_read_without_asking(separator: str, encoding: str, tmp_path: Path) -> None:
    rows = [["text", "label", "more"], ["fine, really", "1.0", "a;b\tc"], ["None", "NA", ""]]
    text = "\n".join(separator.join(f'"{field}"' for field in row) for row in rows)
    assert table(tmp_path, text, encoding) == (["fine, really", "None"], ["1.0", "NA"])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("text,label\nfair, but awful,2\n", "line 2.*put quotes around fields that hold the separator ','"),
        ("text,label,label\na,1,2\n", "one column named 'label' in .*, but its columns are text, label, label"),
        ("words,label\na,1\n", "one column named 'text' in .*, but its columns are words, label"),
        ("text,label\na,1\nb\n", r"no 'label' in row 3 \(the header is row 1\)"),
        ("text,label\na,1\n  ,2\n", "no 'text' in row 3"),
        ("text,label\n", "no rows under its header"),
        ("", "columns are none"),
    ],
)
def test_tables_that_would_be_guessed(text: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=match):
        table(tmp_path, text)
    (tmp_path / "data.csv").write_bytes(b"text,label\n\xff\xfe,1\n")
    with pytest.raises(DataError, match="no table in UTF-8"):
        read_table(tmp_path / "data.csv", "text", "label")


def test_numbers_are_ranks_in_any_notation() -> None:
    names, values, indices = rank_labels(["2", "1.0", "1.50", "2.0", "+1"])
    assert (names, values, indices.tolist()) == (["1", "1.5", "2"], [1, 1.5, 2], [2, 0, 1, 2, 0])
    names, values, indices = rank_labels(["1.0", "3.00"], ["1", "1.5", "2", "2.5", "3"])
    assert (values, indices.tolist()) == ([1, 1.5, 2, 2.5, 3], [0, 4])
    names, values, indices = rank_labels(["1", "2", "3"], ["3", "2", "1"])  # best first
    assert (names, values, indices.tolist()) == (["3", "2", "1"], None, [2, 1, 0])
    names, values, indices = rank_labels(["1", "2"], ["1=bad", "2=good"])
    assert (names, values, indices.tolist()) == (["bad", "good"], [1, 2], [0, 1])


@pytest.mark.parametrize(
    ("labels", "names", "match"),
    [
        (["poor", "good", "excellent"], None, "are no numbers; pass all, the lowest first"),
        (["1", "2", "7"], ["1", "2", "3"], "labels 7 are not among the ranks 1, 2, 3"),
        (["Good", "bad"], ["bad", "good"], "labels Good are not among"),
        (["1", "2", "3"], ["1", "3", "2"], "numbers out of order"),
        (["1", "1.0"], None, "at least two ranks, each once"),
        (["1", "1e400"], None, "labels 1, inf are no finite numbers"),
        (["1", "2"], ["1", "1.0", "2"], "at least two ranks, each once"),
    ],
)
def test_labels_that_fit_no_rank(labels: list[str], names: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        rank_labels(labels, names)


def test_empty_ranks_are_said(caplog: pytest.LogCaptureFixture) -> None:
    rank_labels(["1", "3"], ["1", "2", "3"])
    assert "1 of 3 ranks have no samples: 2" in caplog.text


def test_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("good", "bad", ".cache"):
        (tmp_path / name / ".ipynb_checkpoints").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name / ".ipynb_checkpoints" / "a.png")
    for name in ("good", "bad"):
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.PNG")
    (tmp_path / "good" / "notes.txt").touch()
    paths, labels = read_folder(tmp_path)
    assert [Path(path).name for path in paths] == ["a.PNG"] * 2
    assert labels == ["bad", "good"]
    assert "skipped 1 files that are no images" in caplog.text
    (tmp_path / "good" / "checkpoints").mkdir()
    with pytest.raises(DataError, match="checkpoints does not lie directly in the folder of a rank"):
        read_folder(tmp_path)
    (tmp_path / "good" / "checkpoints").rmdir()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="No images in .*empty"):
        read_folder(tmp_path)


def test_a_split_is_by_rank_and_keeps_twins_together(caplog: pytest.LogCaptureFixture) -> None:
    indices = np.repeat([0, 1, 2], [40, 20, 3])
    inputs = [*map(str, range(63))]
    parts = split(indices, inputs, seed=1)
    assert sorted(i for part in parts for i in part) == [*range(63)]
    assert all(np.array_equal(a, b) for a, b in zip(parts, split(indices, inputs, seed=1), strict=True))
    assert set(indices[parts[0]]) == {0, 1, 2}
    inputs[5] = inputs[7]
    assert sum(map(len, split(indices, inputs))) == 62
    assert "dropped 1 samples that are the same as others" in caplog.text
    inputs[45] = inputs[7]
    with pytest.raises(DataError, match=r"'7' has rank 1, and '7', which is the same, has rank 2 \(samples 6 and 46\)"):
        split(indices, inputs)
    few, validation, test = split(indices, [*map(str, range(63))], shots=2)
    assert np.bincount(indices[few])[:2].tolist() == [2, 2]
    assert len(validation) > 4
    assert len(test) > 4
    with pytest.raises(DataError, match="whole number of ranks to thin out, but got 2.7"):
        split(indices, [*map(str, range(63))], shift=(2.7, 0.2))
    with pytest.raises(DataError, match="2 samples are too few"):
        split(np.array([0, 1]), ["a", "b"])


def test_wide_images_are_scaled_and_unreadable_ones_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    Image.fromarray((ramp * 4095).astype(np.uint16)).save(tmp_path / "wide.png")
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray((ramp * 255).astype(np.uint8)).save(tmp_path / "plain.png")
    for name, white in (("wide.png", 4095), ("float.tif", 1)):
        _, _, found = check_images([str(tmp_path / name)])
        assert found == white
        pixels = np.asarray(open_image(str(tmp_path / name), found))
        np.testing.assert_allclose(pixels[..., 0], ramp * 255, atol=1)
    assert np.asarray(open_image(str(tmp_path / "plain.png"), 1.0)).shape == (8, 8, 3)
    (tmp_path / "broken.png").write_bytes((tmp_path / "plain.png").read_bytes()[:60])
    paths = [str(tmp_path / name) for name in ("plain.png", "broken.png")]
    with pytest.raises(DataError, match=r"1 of 2 images cannot be read \(.*broken.png.*--skip-unreadable"):
        check_images(paths)
    assert check_images(paths, skip=True)[0] == [0]
    assert "skipped: 1 of 2 images" in caplog.text
    Image.fromarray(-ramp.astype(np.float32)).save(tmp_path / "negative.tif")
    with pytest.raises(DataError, match="values below zero, or not finite"):
        check_images([str(tmp_path / "negative.tif")])


def test_copies_of_an_image_are_found_under_other_names_and_formats(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.bmp")
    _, keys, _ = check_images([str(tmp_path / "a.png"), str(tmp_path / "b.bmp")])
    assert keys[0] == keys[1]
    for color in ("red", "blue"):  # the same indices of another palette
        Image.new("RGB", (4, 4), color).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / f"{color}.png")
    _, keys, _ = check_images([str(tmp_path / "red.png"), str(tmp_path / "blue.png")])
    assert keys[0] != keys[1]


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
