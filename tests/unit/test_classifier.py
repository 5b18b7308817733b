"""The scikit-learn classifier: labels of any ordered kind, and a good citizen of scikit-learn."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import VotingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import ordinal_prompt as op

NAMES = ["bad", "fair", "good"]
# scikit-learn repeats samples and compares to seven digits; L-BFGS stops a little earlier.
EXPECTED_FAILURES = {
    "check_sample_weight_equivalence_on_dense_data": "the optimum is found to six digits",
    "check_classifiers_classes": "words have no order by themselves: the alphabet's would be wrong in silence",
}


def task(ranks: Any, number: int = 60, width: int = 12) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    indices = np.arange(number) % len(ranks)
    features = random.normal(size=(number, width)) + indices[:, None] * np.linspace(-1, 1, width)
    return features, np.asarray(ranks)[indices]


@pytest.mark.parametrize("ranks", [NAMES, [1, 1.5, 2, 2.5], [1990, 2000, 2020], ["4", "3", "1"]])
@pytest.mark.parametrize("width", [12, 7])  # in the text encoder's space, and outside
def test_labels_of_any_ordered_kind(ranks: Any, width: int, clip: Any, tokenizer: Any) -> None:
    features, labels = task(ranks, width=width)
    classifier = op.OrdinalPromptClassifier(clip, ranks, tokenizer=tokenizer, context="it is").fit(features, labels)
    assert classifier.classes_.tolist() == list(ranks)
    predicted = classifier.predict(features)
    assert predicted.dtype == np.asarray(ranks).dtype
    assert (predicted == labels).mean() > 0.6
    probabilities = classifier.predict_proba(features)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert classifier.decision_function(features).shape == (60, len(ranks))
    index = {rank: i for i, rank in enumerate(ranks)}
    error = np.mean([abs(index[a] - index[b]) for a, b in zip(predicted, labels, strict=True)])
    assert classifier.score(features, labels) == pytest.approx(-error)
    logits = classifier.export()(torch.tensor(features, dtype=torch.float32))
    np.testing.assert_allclose(logits.softmax(1), probabilities, atol=1e-5)
    assert (classifier.head_.in_features, classifier.head_.projection is None) == (width, width == 12)


@pytest.mark.parametrize("width", [12, 7, None])  # None: without a text encoder
def test_known_frequencies_of_the_ranks(width: int | None, clip: Any, tokenizer: Any) -> None:
    features, labels = task(NAMES, width=width or 12)
    labels = np.where(np.arange(60) < 20, "bad", labels)
    options = {"tokenizer": tokenizer, "context": "it is"} if width else {}
    plain = op.OrdinalPromptClassifier(clip if width else None, NAMES, **options).fit(features, labels)
    logits = torch.tensor(plain.decision_function(features))
    counts = [float((labels == name).sum()) + 0.5 for name in NAMES]
    expected = op.adapt_prior(logits, counts, [1, 2, 5])(logits).softmax(1)
    shuffled = {"good": 5, "bad": 1, "fair": 2}
    for priors in ([1, 2, 5], np.array([0.125, 0.25, 0.625]), shuffled, pd.Series(shuffled)):
        adapted = clone(plain).set_params(priors=priors).fit(features, labels)
        np.testing.assert_allclose(adapted.predict_proba(features), expected, atol=1e-5)
        layers = adapted.export()
        exported = layers(torch.tensor(features, dtype=next(layers.parameters()).dtype))
        np.testing.assert_allclose(exported.softmax(1), expected, atol=1e-5)
    for wrong, message in (
        ([1, 2], "3 frequencies that are"),
        ({"bad": 1, "ok": 2}, "of the ranks .*those of"),
    ):
        with pytest.raises(ValueError, match=message):
            clone(plain).set_params(priors=wrong).fit(features, labels)


def test_it_stays_itself(clip: Any, tokenizer: Any) -> None:
    features, labels = task(NAMES)
    classifier = op.OrdinalPromptClassifier(clip, NAMES, tokenizer=tokenizer, context="it is").fit(features, labels)
    expected = classifier.predict_proba(features)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(classifier)).predict_proba(features), expected)
    np.testing.assert_array_equal(clone(classifier).fit(features, labels).predict_proba(features), expected)


def test_pipelines_and_searches(clip: Any, tokenizer: Any) -> None:
    features, labels = task(NAMES)
    classifier = op.OrdinalPromptClassifier(clip, NAMES, tokenizer=tokenizer)
    search = GridSearchCV(classifier, {"context": ["it is", "the quality is"]}, cv=2).fit(features, labels)
    assert search.best_score_ <= 0
    assert len(cross_val_score(make_pipeline(StandardScaler(), classifier), features, labels, cv=3)) == 3


def test_check_estimator() -> None:
    results = check_estimator(
        op.OrdinalPromptClassifier(rule="argmax"), expected_failed_checks=EXPECTED_FAILURES, on_fail=None
    )
    assert not [result["check_name"] for result in results if result["status"] == "failed"]


def test_few_labels_of_a_known_order_beat_those_of_logistic_regression() -> None:
    random = np.random.default_rng(0)
    direction = random.normal(size=(1, 30))
    labels = np.arange(200) % 10
    features = random.normal(size=(200, 30)) + labels[:, None] * direction / 5
    ours = op.OrdinalPromptClassifier().fit(features[:30], labels[:30])
    theirs = LogisticRegression(max_iter=1000).fit(features[:30], labels[:30])
    assert -ours.score(features, labels) < np.abs(theirs.predict(features) - labels).mean()


def test_mistakes(clip: Any, tokenizer: Any) -> None:
    features, labels = task(NAMES)
    with pytest.raises(ValueError, match="`ranks`, the labels in order, for labels that are words"):
        op.OrdinalPromptClassifier(clip, tokenizer=tokenizer).fit(features, labels)
    with pytest.raises(ValueError, match="`ranks`, the labels in order, for labels that are words"):
        op.OrdinalPromptClassifier().fit(features, labels)
    with pytest.raises(ValueError, match="names of ranks, 'bad', 'good', but got 'fair'"):
        op.OrdinalPromptClassifier(clip, ["bad", "good"], tokenizer=tokenizer).fit(features, labels)
    with pytest.raises(ValueError, match="`rule` to be 'median' or 'argmax'"):
        op.OrdinalPromptClassifier(rule="mean").fit(features, labels)


def test_scikit_learn_is_loaded_where_it_is_used() -> None:
    script = (
        "import sys, ordinal_prompt as op\n"
        "assert 'sklearn' not in sys.modules and 'OrdinalPromptClassifier' in dir(op)\n"
        "sys.modules['sklearn'] = None\n"
        "try:\n    op.OrdinalPromptClassifier\n"
        "except ImportError as error:\n    print(error)\n"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.strip().endswith("pip install 'ordinal_prompt[sklearn]'.")


def test_indices_with_names_serve_the_scorers_of_scikit_learn() -> None:
    names = ["terrible", "poor", "good", "excellent"]
    features, labels = task(names, 80)
    indices = op.rank_indices(labels, names).numpy()
    with pytest.warns(UserWarning, match="`rank_names` in place of `ranks`"):
        cross_val_score(op.OrdinalPromptClassifier(None, names), features, labels, cv=2, scoring="neg_log_loss")
    ours = op.OrdinalPromptClassifier(None, rank_names=names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = cross_val_score(ours, features, indices, cv=2, scoring="roc_auc_ovr")
    assert scores.min() > 0.7
    assert cross_val_predict(ours, features, indices, cv=2, method="predict_proba").shape == (80, 4)
    with pytest.raises(ValueError, match=r"but got the numbers \[0 1 2 3\]; where scikit-learn"):
        op.OrdinalPromptClassifier(None, names).fit(features, indices)


def test_names_reach_the_text_encoder(clip: Any, tokenizer: Any) -> None:
    features, labels = task(NAMES)
    options: dict[str, Any] = {"tokenizer": tokenizer, "context": "it is"}
    named = op.OrdinalPromptClassifier(clip, NAMES, **options).fit(features, labels)
    indices = op.rank_indices(labels, NAMES).numpy()
    indexed = op.OrdinalPromptClassifier(clip, rank_names=NAMES, **options).fit(features, indices)
    np.testing.assert_allclose(indexed.predict_proba(features), named.predict_proba(features))
    assert indexed.classes_.tolist() == [0, 1, 2]
    ordered = pd.Series(pd.Categorical(labels, NAMES, ordered=True))
    assert op.OrdinalPromptClassifier(clip, **options).fit(features, ordered).classes_.tolist() == NAMES


def test_labels_as_columns_and_other_lengths() -> None:
    features, labels = task(NAMES)
    classifier = op.OrdinalPromptClassifier(None, NAMES).fit(features, labels)
    expected = classifier.score(features, labels)
    assert classifier.score(features, pd.DataFrame({"y": labels})) == expected
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        classifier.score(features, labels[:5])


@pytest.mark.parametrize(
    ("options", "labels", "error", "match"),
    [
        ({"ranks": 3}, None, TypeError, "`ranks` to list the labels, lowest first, but got 3"),
        ({"ranks": {"bad": 1}}, None, TypeError, "`ranks` to list the labels"),
        ({"ranks": ["bad", "fair", "good", "good"]}, None, ValueError, "name each label once"),
        ({"ranks": NAMES}, ["bad", None, "good"] * 20, ValueError, "but got None"),
        ({}, [1.0, 1.5, 2.0] * 20, ValueError, "If labels are ordered, pass `ranks`"),
        ({"rank_names": ["low", "high"]}, None, TypeError, "to be numbers, but got str"),
        ({"ranks": NAMES, "rank_names": ["low", "high"]}, None, ValueError, "`rank_names` of 3 ranks"),
    ],
)
def test_mistaken_labels(options: Any, labels: Any, error: Any, match: str) -> None:
    features, right = task(NAMES)
    given = right if labels is None else np.array(labels, dtype=object if None in labels else None)
    with pytest.raises(error, match=match):
        op.OrdinalPromptClassifier(None, **options).fit(features, given)
    with pytest.raises(ValueError, match="`sample_weight` that is not negative"):
        op.OrdinalPromptClassifier(None, NAMES).fit(features, right, -np.ones(60))


def test_a_pickle_holds_the_text_encoder_once(clip: Any, tokenizer: Any) -> None:
    features, labels = task(NAMES)
    classifier = op.OrdinalPromptClassifier(clip, NAMES, tokenizer=tokenizer, context="it is").fit(features, labels)
    for again in (pickle.loads(pickle.dumps(classifier)), copy.deepcopy(classifier)):
        assert again.head_.text_encoder is None
        np.testing.assert_allclose(again.predict_proba(features), classifier.predict_proba(features))
        torch.testing.assert_close(again.head_.export()(torch.ones(1, 12)), classifier.export()(torch.ones(1, 12)))
        np.testing.assert_array_equal(again.fit(features, labels).predict(features), classifier.predict(features))
    assert classifier.head_.text_encoder is not None


def test_a_fit_that_fails_leaves_no_answers() -> None:
    features, labels = task([1, 2, 3])
    classifier = op.OrdinalPromptClassifier().fit(features, labels)
    classifier.set_params(priors=[1, 2])
    with pytest.raises(ValueError, match="`prior`"):
        classifier.fit(features[:, :4], labels * 10)
    with pytest.raises(NotFittedError):
        classifier.predict(features)
    assert classifier.set_params(priors=None).fit(features, labels).score(features, labels) > -0.5


def test_exported_layers_are_new() -> None:
    features, labels = task([1, 2, 3])
    classifier = op.OrdinalPromptClassifier().fit(features, labels)
    before = classifier.predict_proba(features)
    for parameter in classifier.export().half().parameters():
        parameter.data.zero_()
    assert np.array_equal(classifier.predict_proba(features), before)


def test_a_clone_has_the_same_text_encoder(clip: Any, tokenizer: Any) -> None:
    classifier = op.OrdinalPromptClassifier(clip, NAMES, tokenizer=tokenizer, priors=[0.2, 0.3, 0.5])
    copied = clone(classifier)
    assert copied.text_encoder is clip
    assert copied.priors == classifier.priors
    assert copied.priors is not classifier.priors


def test_ranks_without_an_order() -> None:
    features, labels = task(NAMES)
    with pytest.raises(TypeError, match="categories without one"):
        op.OrdinalPromptClassifier(ranks=pd.Series(labels, dtype="category").dtype).fit(features, labels)
    column = pd.DataFrame({"grade": pd.Categorical(["low", "mid", "high"] * 20, ["low", "mid", "high"], ordered=True)})
    assert op.OrdinalPromptClassifier().fit(features, column).classes_.tolist() == ["low", "mid", "high"]


def test_large_numbers_are_read_as_they_are_written(clip: Any, tokenizer: Any) -> None:
    features, labels = task([250000, 1000000, 2500000.5])
    ranks = [250000, 1000000, 2500000.5]
    classifier = op.OrdinalPromptClassifier(clip, ranks, tokenizer=tokenizer, context="an income of")
    classifier.fit(features, labels)
    assert classifier.head_ is not None
    assert classifier.head_.rank_names == ("250000", "1000000", "2500000.5")


def test_scikit_learn_that_mixes_ranks_up_is_told() -> None:
    features, labels = task(["low", "mid", "high"])
    fitted = FrozenEstimator(op.OrdinalPromptClassifier(ranks=["low", "mid", "high"]).fit(features, labels))
    other = FrozenEstimator(LogisticRegression().fit(features, labels))
    with pytest.warns(UserWarning, match="order of the ranks"):
        VotingClassifier([("a", fitted), ("b", other)], voting="soft").fit(features, labels).predict(features)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        CalibratedClassifierCV(fitted, method="sigmoid").fit(features, labels).predict(features)
