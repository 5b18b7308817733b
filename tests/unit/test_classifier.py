"""The scikit-learn classifier: labels of any ordered kind, and a good citizen of scikit-learn."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
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
    for wrong, message in (([1, 2], "3 frequencies above zero"), ({"bad": 1, "ok": 2}, "of the ranks .*those of")):
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
        "assert 'sklearn' not in sys.modules and 'OrdinalPromptClassifier' in op.__all__\n"
        "sys.modules['sklearn'] = None\n"
        "try:\n    op.OrdinalPromptClassifier\n"
        "except ImportError as error:\n    print(error)\n"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.strip().endswith("pip install 'ordinal_prompt[sklearn]'.")
