"""A scikit-learn classifier of ordered labels on cached features, with a language prior (extra `sklearn`)."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils.validation import (
    _check_sample_weight,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)
from torch import Tensor, nn

from ordinal_prompt.arrays import is_categorical
from ordinal_prompt.calibration import adapt_prior
from ordinal_prompt.class_labels import Array, label_indices, ordered_labels
from ordinal_prompt.decoding import decode
from ordinal_prompt.export import linear_layer
from ordinal_prompt.fitting import fit_head, fit_map
from ordinal_prompt.head import OrdinalPromptHead
from ordinal_prompt.recipes import recipe


class OrdinalPromptClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # untyped in scikit-learn
    """Classifies ordered labels by cached features, without validation data, learning rate or seed.

    The weights are those of rank prototypes that a text encoder writes, and a deviation that the training labels ask
    for: see `ordinal_prompt.fit_head`.  Features outside the text encoder's space are classified by a penalised linear
    map whose neighbouring ranks are tied.

    Args:
        text_encoder: as for `OrdinalPromptHead`, or the name of an open_clip model; None leaves language out.
        ranks: the labels in order, lowest first: names, or increasing numbers; default the labels of `fit`, which are
            then whole numbers or ordered categories.
        rank_names: what the text encoder reads for each rank; default the labels.  Without `ranks`, labels are then the
            indices 0…K-1.
        tokenizer: as for `OrdinalPromptHead`.
        pretrained: weights of an open_clip model given by its name.
        context: words around the rank's name, with {} in its place or in front of it.
        in_space: whether features live in the text encoder's space; None: where their width is that of the encoder.
        priors: (K,) frequencies of the ranks where predictions are made, if they are known and training samples were
            chosen otherwise (as many of each rank, say); a dictionary or a pandas Series gives them by label.  Default
            those of `fit`.  See `ordinal_prompt.adapt_prior`.
        rule: what `predict` gives: the `"median"` rank, which minimises the expected absolute error, or `"argmax"`.
        verbose: print the loss of every tenth step.

    Where names are not in alphabetical order, scikit-learn's scorers of probabilities (`neg_log_loss`, `roc_auc_ovr`)
    and its estimators that encode labels (voting, stacking, `cross_val_predict` of probabilities) would mix the ranks
    up: give them indices as labels (`op.rank_indices`), and `rank_names` in the place of `ranks`.

    Attributes:
        classes_: (K,) the labels in order.
        head_: the fitted head, where there is a text encoder; of a copy or a pickle with its prototypes alone.
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
        rank_names: Sequence[str] | None = None,
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
        self.rank_names = rank_names
        self.tokenizer = tokenizer
        self.pretrained = pretrained
        self.context = context
        self.in_space = in_space
        self.priors = priors
        self.rule = rule
        self.verbose = verbose

    @torch.inference_mode(False)
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> OrdinalPromptClassifier:  # noqa: N803
        """Fits to features (N, D) and labels (N,), which `ranks` hold; `sample_weight` (N,) counts like repetitions.

        Raises:
            ValueError: labels that `ranks` do not hold, words without `ranks`, fewer than two ranks, one of them twice,
                unfit `priors` or `rank_names`, negative weights.
            TypeError: `ranks` that are no list.
        """
        for name in [name for name in vars(self) if name.endswith("_") and not name.startswith("_")]:
            delattr(self, name)  # of an earlier fit: what fails now must not answer with half of both
        self._check_rule()
        y = y.iloc[:, 0] if getattr(y, "ndim", 1) == 2 and hasattr(y, "iloc") and y.shape[1] == 1 else y
        ordered = getattr(y, "cat", y).categories if is_categorical(y) and getattr(y, "cat", y).ordered else None
        X, y = validate_data(self, X, y, dtype=np.float64)  # noqa: N806
        weight = None if sample_weight is None else _check_sample_weight(sample_weight, X, dtype=np.float64)
        if weight is not None and not (weight >= 0).all():
            raise ValueError("Expected `sample_weight` that is not negative.")
        classes = ordered_labels(y, self.ranks, self.rank_names, ordered)
        if self.rank_names is not None and len({*self.rank_names}) != len(classes):
            raise ValueError(f"Expected `rank_names` of {len(classes)} ranks, but got {self.rank_names}.")
        indices = label_indices(y, classes)
        features = torch.tensor(X, device="cpu")  # a copy: memory-mapped arrays cannot be written to
        if weight is not None:
            weight = torch.tensor(weight, device="cpu")
        progress, offset = _print if self.verbose else None, self._offset(indices, weight, classes)
        self.head_: OrdinalPromptHead | None = None
        if self.text_encoder is None:
            fitted = fit_map(features, indices, len(classes), sample_weight=weight, progress=progress)
            self._layers: nn.Module = linear_layer(fitted.weight, fitted.bias + offset)
        else:
            self.head_ = fit_head(self._head(X.shape[1], classes), features.float(), indices, weight, progress).eval()
            bias: Any = self.head_.residual_bias
            bias.data += (offset / self.head_.config.residual).to(bias)
            self._layers = self.head_.export()
        self.classes_ = classes
        return self

    def decision_function(self, X: Any) -> Array:  # noqa: N803
        """Logits (N, K); of two ranks, (N,) those of the second over the first, as scikit-learn has it."""
        logits = self._logits(X).numpy()
        self._warn_scorers()
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict_proba(self, X: Any) -> Array:  # noqa: N803
        """Probabilities (N, K) of the ranks, in the order of `classes_`."""
        logits = self._logits(X)
        self._warn_scorers()
        return logits.softmax(dim=1).numpy()

    def predict(self, X: Any) -> Array:  # noqa: N803
        """Labels (N,)."""
        self._check_rule()
        indices = decode(self._logits(X), self.rule).numpy()
        return self.classes_[indices]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:  # noqa: N803
        """The negative mean absolute error of `predict`, in ranks; 0 is perfect."""
        check_is_fitted(self, "classes_")
        predicted, y = self.predict(X), column_or_1d(y)
        check_consistent_length(predicted, y, sample_weight)
        truth, found = (label_indices(labels, self.classes_) for labels in (y, predicted))
        return 0.0 - float(np.average((found - truth).abs().numpy(), weights=sample_weight))

    def export(self) -> nn.Module:
        """New plain layers that give logits (N, K) of features (N, D): neither this package nor a text encoder."""
        check_is_fitted(self, "classes_")
        return copy.deepcopy(self._layers)

    def _logits(self, X: Any) -> Tensor:  # noqa: N803
        check_is_fitted(self, "classes_")
        X = validate_data(self, X, dtype=np.float64, reset=False)  # noqa: N806
        dtype = next(self._layers.parameters()).dtype
        with torch.no_grad():
            logits: Tensor = self._layers(torch.tensor(X, dtype=dtype, device="cpu"))
        return logits.double()

    def _check_rule(self) -> None:
        if self.rule not in ("median", "argmax"):
            raise ValueError(f"Expected `rule` to be 'median' or 'argmax', but got {self.rule!r}.")

    def _offset(self, indices: Tensor, weight: Tensor | None, classes: Array) -> Tensor:
        """(K,) what `priors` add to the logits; half a sample more of each rank, for those that do not occur."""
        labels, priors = classes.tolist(), self.priors
        if priors is None:
            return torch.zeros(len(labels), dtype=torch.float64, device="cpu")
        if hasattr(priors, "to_dict"):
            if len({*priors.index}) < len(priors):
                raise ValueError(f"Expected `priors` with each label once, but got {[*priors.index]}.")
            priors = priors.to_dict()
        if isinstance(priors, Mapping):
            if {*priors} != {*labels}:
                raise ValueError(f"Expected `priors` of the ranks {labels}, but got those of {[*priors]}.")
            priors = [priors[label] for label in labels]
        if weight is not None:
            weight = weight * (len(weight) / weight.sum())
        counts = torch.bincount(indices, weight, minlength=len(labels)).double() + 0.5
        return counts.new_tensor(adapt_prior(counts.new_zeros(1, len(labels)), counts, priors).bias)

    def _warn_scorers(self) -> None:
        """Warns where scikit-learn will take columns in rank order for those of sorted labels."""
        frame: Any = sys._getframe(1)
        if (self.classes_[:-1] < self.classes_[1:]).all():
            return
        while frame is not None and not _takes_sorted_columns(frame):
            frame = frame.f_back
        if frame is not None:
            warnings.warn(
                "Here scikit-learn takes the columns of probabilities for those of sorted labels, but they are in the "
                "order of the ranks; fit on indices (op.rank_indices), with `rank_names` in place of `ranks`.",
                stacklevel=3,
            )

    def _head(self, width: int, classes: Array) -> OrdinalPromptHead:
        model, tokenizer = self.text_encoder, self.tokenizer
        if isinstance(model, str):
            from ordinal_prompt.text.hub import load_open_clip

            model, loaded = load_open_clip(model, self.pretrained)
            tokenizer = tokenizer or loaded
        numbers = classes.dtype.kind in "iuf"
        labels = [str(rank).removesuffix(".0") for rank in classes.tolist()]
        names = labels if self.rank_names is None else [*self.rank_names]
        options: dict[str, Any] = {"tokenizer": tokenizer, "context": self.context, **recipe(names, prompts="fitted")}
        if numbers:
            options["rank_values"] = classes.astype(np.float64)
        head = OrdinalPromptHead(model, names, **options)
        if self.in_space if self.in_space is not None else head.embed_dim == width:
            return head
        return OrdinalPromptHead(model, names, in_features=width, normalize=False, **options)

    def __sklearn_clone__(self) -> OrdinalPromptClassifier:
        """A clone has the same text encoder and tokenizer, which a fit does not change, not copies of them."""
        options = self.get_params(deep=False)
        shared = {name: options.pop(name) for name in ("text_encoder", "tokenizer")}
        return type(self)(**shared, **{name: clone(value, safe=False) for name, value in options.items()})

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the text encoder once, as it was given: their `head_` has its prototypes alone."""
        state: dict[str, Any] = super().__getstate__()
        head = state.get("head_")
        return state if head is None else {**state, "head_": head.without_text_encoder()}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True  # the score is an error
        return tags


def _takes_sorted_columns(frame: Any) -> bool:
    """Whether this is code of scikit-learn that does not look at `classes_`."""
    name, caller = frame.f_globals.get("__name__"), frame.f_locals.get("self")
    temperature = name == "sklearn.calibration" and getattr(caller, "method", None) == "temperature"
    return temperature or name in ("sklearn.metrics._scorer", "sklearn.ensemble._voting")


def _print(step: int, loss: float) -> None:
    if step % 10 == 0:
        print(f"step {step}: loss {loss:.5f}", file=sys.stderr)
