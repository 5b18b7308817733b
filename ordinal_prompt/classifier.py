"""A scikit-learn classifier of ordered labels on cached features, with a language prior (extra `sklearn`)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn

from ordinal_prompt.calibration import adapt_prior
from ordinal_prompt.decoding import decode
from ordinal_prompt.export import linear_layer
from ordinal_prompt.fitting import fit_head, fit_map
from ordinal_prompt.head import OrdinalPromptHead
from ordinal_prompt.labels import rank_indices
from ordinal_prompt.recipes import recipe

Array = Any  # NumPy's arrays of any type


class OrdinalPromptClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # untyped in scikit-learn
    """Classifies ordered labels by cached features, without validation data, learning rate or seed.

    The weights are those of rank prototypes that a text encoder writes, and a deviation that the training labels ask
    for: see `ordinal_prompt.fit_head`.  Features outside the text encoder's space are classified by a penalised linear
    map whose neighbouring ranks are tied.

    Args:
        text_encoder: as for `OrdinalPromptHead`, or the name of an open_clip model; None leaves language out.
        ranks: the labels in order, lowest first: names, or increasing numbers; default the labels of `fit`, which are
            then numbers.
        tokenizer: as for `OrdinalPromptHead`.
        pretrained: weights of an open_clip model given by its name.
        context: words around the rank's name, with {} in its place or in front of it.
        in_space: whether features live in the text encoder's space; None: where their width is that of the encoder.
        priors: (K,) frequencies of the ranks where predictions are made, if they are known and training samples were
            chosen otherwise (as many of each rank, say); a dictionary or a pandas Series gives them by label.  Default
            those of `fit`.  See `ordinal_prompt.adapt_prior`.
        rule: what `predict` gives: the `"median"` rank, which minimises the expected absolute error, or `"argmax"`.
        verbose: print the loss of every tenth step.

    Attributes:
        classes_: (K,) the labels in order.
        head_: the fitted head, where there is a text encoder.
        n_features_in_: D.

    >>> import numpy as np
    >>> features, labels = np.eye(6), np.repeat(["bad", "fair", "good"], 2)
    >>> classifier = OrdinalPromptClassifier(None, ["bad", "fair", "good"]).fit(features, labels)
    >>> classifier.predict(features[:2]).tolist()
    ['bad', 'bad']
    """

    def __init__(
        self,
        text_encoder: Any = None,
        ranks: Sequence[Any] | None = None,
        *,
        tokenizer: Any = None,
        pretrained: str | None = None,
        context: str = "",
        in_space: bool | None = None,
        priors: Any = None,
        rule: str = "median",
        verbose: bool = False,
    ) -> None:
        self.text_encoder = text_encoder
        self.ranks = ranks
        self.tokenizer = tokenizer
        self.pretrained = pretrained
        self.context = context
        self.in_space = in_space
        self.priors = priors
        self.rule = rule
        self.verbose = verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> OrdinalPromptClassifier:  # noqa: N803
        """Fits to features (N, D) and labels (N,), which `ranks` hold; `sample_weight` (N,) counts like repetitions.

        Raises:
            ValueError: labels that `ranks` do not hold, words without `ranks`, fewer than two ranks, unfit `priors`.
        """
        if self.rule not in ("median", "argmax"):
            raise ValueError(f"Expected `rule` to be 'median' or 'argmax', but got {self.rule!r}.")
        X, y = validate_data(self, X, y, dtype=np.float64)  # noqa: N806
        if self.ranks is None:
            check_classification_targets(y)
        weight = None if sample_weight is None else _check_sample_weight(sample_weight, X, dtype=np.float64)
        self.classes_ = self._ranks(y)
        indices = rank_indices(y, self.classes_.tolist())
        features = torch.tensor(X)  # a copy: memory-mapped arrays cannot be written to
        if weight is not None:
            weight = torch.tensor(weight)
        progress, offset = _print if self.verbose else None, self._offset(indices, weight)
        self.head_: OrdinalPromptHead | None = None
        if self.text_encoder is None:
            fitted = fit_map(features, indices, len(self.classes_), sample_weight=weight, progress=progress)
            self._layers: nn.Module = linear_layer(fitted.weight, fitted.bias + offset)
        else:
            self.head_ = fit_head(self._head(X.shape[1]), features.float(), indices, weight, progress).eval()
            bias: Any = self.head_.residual_bias
            bias.data += (offset / self.head_.config.residual).to(bias)
            self._layers = self.head_.export()
        return self

    def decision_function(self, X: Any) -> Array:  # noqa: N803
        """Logits (N, K); of two ranks, (N,) those of the second over the first, as scikit-learn has it."""
        logits = self._logits(X).numpy()
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict_proba(self, X: Any) -> Array:  # noqa: N803
        """Probabilities (N, K) of the ranks, in the order of `classes_`."""
        return self._logits(X).softmax(dim=1).numpy()

    def predict(self, X: Any) -> Array:  # noqa: N803
        """Labels (N,)."""
        indices = decode(self._logits(X), self.rule).numpy()
        return self.classes_[indices]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:  # noqa: N803
        """The negative mean absolute error of `predict`, in ranks; 0 is perfect."""
        check_is_fitted(self)
        truth = rank_indices(np.asarray(y), self.classes_.tolist())
        found = rank_indices(self.predict(X), self.classes_.tolist())
        return 0.0 - float(np.average((found - truth).abs().numpy(), weights=sample_weight))

    def export(self) -> nn.Module:
        """Plain layers that give the logits (N, K) of features (N, D): neither this package nor a text encoder."""
        check_is_fitted(self)
        return self._layers

    def _logits(self, X: Any) -> Tensor:  # noqa: N803
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)  # noqa: N806
        dtype = next(self._layers.parameters()).dtype
        with torch.no_grad():
            logits: Tensor = self._layers(torch.tensor(X, dtype=dtype))
        return logits.double()

    def _offset(self, indices: Tensor, weight: Tensor | None) -> Tensor:
        """(K,) what `priors` add to the logits; half a sample more of each rank, for those that do not occur."""
        labels, priors = self.classes_.tolist(), self.priors
        if priors is None:
            return torch.zeros(len(labels), dtype=torch.float64)
        priors = priors.to_dict() if hasattr(priors, "to_dict") else priors
        if isinstance(priors, Mapping):
            if {*priors} != {*labels}:
                raise ValueError(f"Expected `priors` of the ranks {labels}, but got those of {[*priors]}.")
            priors = [priors[label] for label in labels]
        if weight is not None:
            weight = weight * (len(weight) / weight.sum())
        counts = torch.bincount(indices, weight, minlength=len(labels)).double() + 0.5
        return torch.tensor(adapt_prior(torch.zeros(1, len(labels)), counts, priors).bias, dtype=torch.float64)

    def _ranks(self, y: Array) -> Array:
        found = np.unique(y)
        if self.ranks is None:
            if found.dtype.kind not in "biuf":
                raise ValueError(f"Expected `ranks`, the labels in order, for labels that are words: {found[:10]}.")
            ranks = found
        else:
            ranks = np.asarray(self.ranks)
        if len(ranks) < 2:
            raise ValueError(f"Classifier can't train when only one class is present: {found[:1]}.")
        return ranks

    def _head(self, width: int) -> OrdinalPromptHead:
        model, tokenizer = self.text_encoder, self.tokenizer
        if isinstance(model, str):
            from ordinal_prompt.text.hub import load_open_clip

            model, loaded = load_open_clip(model, self.pretrained)
            tokenizer = tokenizer or loaded
        numbers = self.classes_.dtype.kind in "biuf"
        names = [f"{rank:g}" if numbers else str(rank) for rank in self.classes_.tolist()]
        options: dict[str, Any] = {"tokenizer": tokenizer, "context": self.context, **recipe(names, prompts="fitted")}
        if numbers:
            options["rank_values"] = self.classes_.astype(np.float64)
        head = OrdinalPromptHead(model, names, **options)
        if self.in_space if self.in_space is not None else head.embed_dim == width:
            return head
        return OrdinalPromptHead(model, names, in_features=width, normalize=False, **options)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True  # the score is an error
        return tags


def _print(step: int, loss: float) -> None:
    if step % 10 == 0:
        print(f"step {step}: loss {loss:.5f}", file=sys.stderr)
