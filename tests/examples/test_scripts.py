"""The scripts, on small data: what they leave, mistakes, several processes, and a run that was killed.

Tests of the default run call `main()`, which spares the imports of a fresh Python; slow ones start scripts as users do.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from examples_setup import call, run, start
from PIL import Image

pytest.importorskip("lightning")
pytest.importorskip("datasets")

from conftest import TEXT, VISION, tiny_clip

IMAGES = ("--backbone", "test_convnext.r160_in1k", "--size", 32, "--batch-size", 8, "--lr", 1e-3, "--no-augment")
METRICS = {"MAE expectation", "MAE median", "MAE argmax", "macro MAE", "accuracy", "kappa", "lr"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 3 ranks, with 12 images each, the brighter the higher."""
    root, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for rank in range(3):
        for number in range(12):
            path = root / f"{rank + 1}.0" / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(random.integers(60 * rank, 60 * rank + 90, (40, 36, 3)).astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short texts with stars from 1 to 3 in half points."""
    words = {
        1: "awful bad sad",
        1.5: "poor dull weak",
        2: "fair okay plain",
        2.5: "nice neat warm",
        3: "great superb joy",
    }
    rows = [(f"{word} {noun}", stars) for stars, some in words.items() for word in some.split() for noun in "abcdefgh"]
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(path, index=False, sep=";")
    return path


@pytest.mark.slow
def test_images(photos: Path, tmp_path: Path) -> None:
    output = run("finetune_images.py", "--data", photos, *IMAGES, "--epochs", 1, "--output", "out", cwd=tmp_path)
    assert "36 images in 3 ranks" in output
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {*results} == {"linear", "prompt"}
    assert {*results["prompt"]} == METRICS
    for kind in results:
        assert (tmp_path / "out" / f"{kind}.png").stat().st_size > 10_000
        assert not any("prompt" in name for name in torch.load(tmp_path / "out" / f"{kind}-model.pt"))


@pytest.mark.slow
def test_texts(reviews: Path, tmp_path: Path) -> None:
    options = ("--data", reviews, "--epochs", 1, "--lr", 1e-3, "--frozen", "--shots", 4, "--output", "out")
    output = run("finetune_text.py", *options, cwd=tmp_path)
    assert "120 texts in 5 ranks" in output
    assert {*json.loads((tmp_path / "out" / "metrics.json").read_text())} == {"linear", "prompt"}


def test_cached_features(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "model"
    folder.mkdir()
    model = tiny_clip()
    config = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    assert open_clip.create_model(f"local-dir:{folder}") is not None
    options = ("--data", photos, "--clip", f"local-dir:{folder}", "--context", "brightness {}", "--output", "out")
    for _ in range(2):  # the second time from the cache
        call(monkeypatch, "clip_features.py", *options, cwd=tmp_path)
        assert "exported" in capsys.readouterr().out
    assert len([*(tmp_path / "out").glob("features-*.pt")]) == 1


@pytest.mark.parametrize(
    ("script", "options", "match"),
    [
        ("finetune_images.py", [], "No data: pass --data"),
        ("finetune_images.py", ["--data", "nowhere.csv"], "nowhere.csv"),
        ("finetune_images.py", ["--data", "images", "--backbone", "resnet0"], "timm has no model 'resnet0'"),
        ("finetune_images.py", ["--data", "images", "--devices", "0", *map(str, IMAGES)], "devices=0"),
        ("clip_features.py", ["--data", "images", "--clip", "ViT-B-33"], "no model 'ViT-B-33'; did you mean ViT-B-32"),
        ("clip_features.py", ["--data", "images", "--weights", "openai"], "no hub can be reached"),
        ("finetune_text.py", ["--data", "words.csv"], "labels good, bad are no numbers"),
        ("finetune_text.py", ["--data", "words.csv", "--rank-names", "bad", "fair"], "labels good are not among"),
        (
            "finetune_text.py",
            ["--data", "few.csv", "--encoder", "no/such-model"],
            "'no/such-model' is no folder here, and the hub",
        ),
    ],
)
def test_mistakes_end_with_one_sentence(
    script: str, options: list[str], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words.csv").write_text("text,label\na,good\nb,bad\n")
    (tmp_path / "few.csv").write_text("text,label\n" + "".join(f"{i},{i % 2}\n" for i in range(40)))
    for i in range(40):
        path = tmp_path / "images" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(path)
    with pytest.raises(SystemExit, match=re.escape(match)):
        call(monkeypatch, script, *options, cwd=tmp_path)


def test_a_command_that_was_mistaken_leaves_no_run_behind(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--data", photos, *IMAGES, "--head", "linear", "--lr", 1e-3, "--epochs", 1, "--output", "out")
    for _ in range(2):
        with pytest.raises(SystemExit, match="`context`"):
            call(monkeypatch, "finetune_images.py", *options, "--head", "prompt", "--context", "{rank}", cwd=tmp_path)
    call(monkeypatch, "finetune_images.py", *options, cwd=tmp_path)
    with pytest.raises(SystemExit, match="holds a run"):
        call(monkeypatch, "finetune_images.py", *options, cwd=tmp_path)


@pytest.mark.parametrize("option", ["--epochs", "--batch-size", "--size", "--shots"])
def test_numbers_that_make_no_sense(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, "finetune_images.py", "--data", "images", option, 0, cwd=tmp_path)
    assert f"{option}: expected at least 1, but got 0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("script", ["clip_features.py", "finetune_images.py", "finetune_text.py"])
def test_a_mistake_ends_the_process(script: str, tmp_path: Path) -> None:
    errors = run(script, "--data", "nowhere.csv", cwd=tmp_path, code=1)
    assert errors.startswith(f"{script}: ")
    assert "nowhere.csv" in errors
    assert "Traceback" not in errors


def test_a_hub_that_cannot_be_reached_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import runs
    from huggingface_hub import constants

    def unreachable(*_: Any, **__: Any) -> None:
        raise TimeoutError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(runs, "getproxies", dict)
    monkeypatch.setattr("socket.create_connection", unreachable)
    runs.in_one_sentence(lambda: None)
    assert constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(runs, "getproxies", lambda: {"https": "a-proxy"})  # reaches what we cannot
    runs.in_one_sentence(lambda: None)
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    output = run("quickstart.py", cwd=tmp_path)
    rows = [line for line in output.splitlines() if "words per rank" in line]
    assert len(rows) == 4
    errors = [[float(part.split()[-1]) for part in row.split(",")] for row in rows]
    assert all(prompt < linear for linear, prompt in errors)
    assert (tmp_path / "outputs" / "quickstart.png").exists()


@pytest.mark.slow
def test_resuming_takes_the_last_whole_checkpoint_of_the_same_data(
    reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--data", reviews, "--head", "linear", "--lr", 1e-3, "--epochs", 1, "--shots", 4, "--output", "out")
    call(monkeypatch, "finetune_text.py", *options, "--frozen", cwd=tmp_path)
    found = (tmp_path / "out" / "metrics.json").read_text()
    (whole,) = (tmp_path / "out" / "linear-lr0.001").glob("checkpoint-*")
    unfinished = whole.with_name("checkpoint-999")  # as a run leaves it that is killed while it writes
    shutil.copytree(whole, unfinished, ignore=shutil.ignore_patterns("trainer_state.json"))
    with pytest.raises(SystemExit, match="was begun with other data, or another --seed"):
        call(monkeypatch, "finetune_text.py", *options, "--frozen", "--resume", "--seed", 1, cwd=tmp_path)
    with pytest.raises(SystemExit, match="out holds a run; pass --resume"):
        call(monkeypatch, "finetune_text.py", *options, "--frozen", cwd=tmp_path)
    (tmp_path / "out" / "metrics.json").unlink()
    call(monkeypatch, "finetune_text.py", *options, "--frozen", "--resume", cwd=tmp_path)
    assert (tmp_path / "out" / "metrics.json").read_text() == found


def losses_of_images(folder: Path) -> Any:
    table = pd.read_csv(folder / "prompt-lr0.001" / "metrics.csv")
    return table["train_loss"].dropna().tolist(), table["val_mae"].dropna().tolist()


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_on_images(photos: Path, tmp_path: Path) -> None:
    common = ("--data", photos, *IMAGES, "--head", "prompt", "--epochs", 3, "--accelerator", "cpu")
    for devices in (1, 2):
        run("finetune_images.py", *common, "--devices", devices, "--output", f"out{devices}", cwd=tmp_path)
    one, two = losses_of_images(tmp_path / "out1"), losses_of_images(tmp_path / "out2")
    assert one[0] == pytest.approx(two[0], abs=1e-5)
    assert one[1] == pytest.approx(two[1], abs=1e-5)


@pytest.mark.slow
def test_a_run_on_images_that_was_killed_goes_on(photos: Path, tmp_path: Path) -> None:
    options = ("--data", photos, *IMAGES, "--head", "prompt", "--output", "out", "--patience", 1000)
    last = tmp_path / "out" / "prompt-lr0.001" / "last.ckpt"
    process = start("finetune_images.py", *options, "--epochs", 500, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = torch.load(last, weights_only=False)["epoch"]
    run("finetune_images.py", *options, "--epochs", before + 3, "--resume", cwd=tmp_path)
    assert torch.load(last, weights_only=False)["epoch"] == before + 2
    assert {*json.loads((tmp_path / "out" / "metrics.json").read_text())["prompt"]} == METRICS


def losses_of_texts(folder: Path) -> list[float]:
    states = (folder / "prompt-lr0.001").glob("checkpoint-*/trainer_state.json")
    state = max(states, key=lambda path: path.stat().st_mtime)
    history = json.loads(state.read_text())["log_history"]
    return [float(row[name]) for row in history for name in ("loss", "eval_mae") if name in row]


TEXTS = ("--head", "prompt", "--lr", 1e-3, "--frozen", "--settings", "paper")


@pytest.mark.slow
def test_the_last_checkpoint_is_that_of_the_last_epoch(photos: Path, tmp_path: Path) -> None:
    options = ("--data", photos, *IMAGES, "--head", "prompt", "--output", "out", "--patience", 1000, "--lr", 0)
    run("finetune_images.py", *options, "--epochs", 3, cwd=tmp_path)  # nothing learns: no epoch is better
    assert torch.load(tmp_path / "out" / "prompt-lr0" / "last.ckpt", weights_only=False)["epoch"] == 2


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_on_texts(reviews: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        common = ("--data", reviews, *TEXTS, "--epochs", 2, "--shots", 8, "--batch-size", 8)
        run("finetune_text.py", *common, "--output", f"out{processes}", cwd=tmp_path, processes=processes)
    one, two = losses_of_texts(tmp_path / "out1"), losses_of_texts(tmp_path / "out2")
    assert len(one) == 4
    assert one == pytest.approx(two, abs=1e-5)


@pytest.mark.slow
def test_a_run_on_texts_that_was_killed_goes_on(reviews: Path, tmp_path: Path) -> None:
    options = ("--data", reviews, *TEXTS, "--output", "out", "--patience", 1000)
    process = start("finetune_text.py", *options, "--epochs", 500, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not [*(tmp_path / "out").glob("*/checkpoint-*/trainer_state.json")] and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = len(losses_of_texts(tmp_path / "out"))
    run("finetune_text.py", *options, "--epochs", 60, "--resume", cwd=tmp_path)
    assert len(losses_of_texts(tmp_path / "out")) > before
    assert {*json.loads((tmp_path / "out" / "metrics.json").read_text())["prompt"]} == METRICS
