"""Heads that also use the rank names: what whoever has a text encoder can do without this library.

Each follows its paper's settings as far as they carry over to features of any text encoder: cosines are scaled as our
head scales them (10 over the spread of the names' embeddings) where CLIP would scale by 100.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from protocol import Build, Estimator, Head, UnfitError
from task import Task
from torch import Tensor, nn
from torch.nn import functional as F

import ordinal_prompt as op
from ordinal_prompt.matching import log_scale_of_spread

Predict = Callable[[Tensor], Tensor]


def name_embeddings(task: Task) -> tuple[Tensor, float]:
    """(K, D) unit-norm embeddings of the rank names in their context, and the factor on cosines."""
    if task.text_encoder is None or task.rank_names is None:
        raise UnfitError("there are no rank names, or no text encoder")
    model, tokenizer = task.text_encoder()
    options = op.recipe(task.rank_names, prompts="frozen")
    head = op.OrdinalPromptHead(model, task.rank_names, tokenizer=tokenizer, context=task.context or "", **options)
    names = head.prototypes().detach()
    if names.shape[1] != task.num_features:
        raise UnfitError(f"features of width {task.num_features} are outside the text encoder's space")
    return names, float(log_scale_of_spread(names).exp())


def zero_shot(task: Task) -> Estimator:
    """Cosines to the names' embeddings."""
    names, scale = name_embeddings(task)
    return Estimator(lambda _, __: lambda x: (scale * x @ names.T).softmax(dim=1))


def started_at_names(task: Task) -> Head:
    """A linear layer that starts at the names' embeddings."""
    names, scale = name_embeddings(task)
    layer = nn.Linear(task.num_features, task.num_ranks)
    with torch.no_grad():
        layer.weight.copy_(scale * names)
        layer.bias.zero_()
    return Head(layer, nn.CrossEntropyLoss(), rate=0.3)


def cross_modal(task: Task) -> Head:
    """Started at the names, whose embeddings are samples too, with half of the loss (Lin et al., CVPR 2023)."""
    names, _ = name_embeddings(task)
    head = started_at_names(task)
    ranks = torch.arange(task.num_ranks)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return (F.cross_entropy(logits, labels) + F.cross_entropy(head.module(names), ranks)) / 2

    return Head(head.module, loss, rate=0.3)


def clap(task: Task) -> Head:
    """Started at the names and pulled towards them, each rank by how well zero-shot does on its training samples
    (Silva-Rodríguez et al., CVPR 2024)."""
    names, scale = name_embeddings(task)
    head = started_at_names(task)
    pull: dict[str, Tensor] = {}

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        if not pull:  # the first step: the head is the zero-shot one, and the multipliers are set for good
            right = logits.detach().softmax(dim=1).gather(1, labels[:, None])[:, 0]
            sums = torch.zeros(task.num_ranks).index_add(0, labels, right)
            pull["of"] = sums / labels.bincount(minlength=task.num_ranks).clamp_min(1)
        weight: Tensor = head.module.get_parameter("weight") / scale
        return F.cross_entropy(logits, labels) + (pull["of"] * (weight - names).square().sum(dim=1)).sum()

    return Head(head.module, loss, rate=0.3)


def tip_adapter(task: Task) -> Estimator:
    """Zero-shot plus a cache of the training samples, with its usual α = 1, β = 5.5 (Zhang et al., ECCV 2022)."""
    names, scale = name_embeddings(task)

    def fit(x: Tensor, y: Tensor) -> Predict:
        cache, one_hot = F.normalize(x, dim=1), F.one_hot(y, task.num_ranks).to(x.dtype)

        def predict(z: Tensor) -> Tensor:
            z = F.normalize(z, dim=1)
            return (scale * z @ names.T + (5.5 * (z @ cache.T - 1)).exp() @ one_hot).softmax(dim=1)

        return predict

    return Estimator(fit)


def tip_adapter_f(task: Task) -> Estimator:
    """Tip-Adapter whose cache keys are trained: AdamW at 1e-3, annealed over 20 epochs of 256 (Zhang et al., 2022)."""
    names, scale = name_embeddings(task)

    def fit(x: Tensor, y: Tensor) -> Predict:
        x, one_hot = F.normalize(x, dim=1), F.one_hot(y, task.num_ranks).to(x.dtype)
        keys = x.clone().requires_grad_()
        batches = max(1, math.ceil(len(x) / 256))
        optimizer = torch.optim.AdamW([keys], lr=1e-3, eps=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20 * batches)

        def logits(z: Tensor) -> Tensor:
            return scale * z @ names.T + (5.5 * (z @ keys.T - 1)).exp() @ one_hot

        for _ in range(20):
            for batch in torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).chunk(batches):
                optimizer.zero_grad()
                F.cross_entropy(logits(x[batch]), y[batch]).backward()
                optimizer.step()
                schedule.step()
        keys.requires_grad_(False)
        return lambda z: logits(F.normalize(z, dim=1)).softmax(dim=1)

    return Estimator(fit)


def lp_plus_plus(task: Task) -> Estimator:
    """A linear layer that starts at the class sums, plus each rank's learned multiple of its name; step sizes are the
    Lipschitz constants', 300 steps, the multiples every tenth (LP++, Huang et al., CVPR 2024)."""
    names, _ = name_embeddings(task)

    def fit(x: Tensor, y: Tensor) -> Predict:
        x, one_hot = F.normalize(x, dim=1), F.one_hot(y, task.num_ranks).to(x.dtype)
        layer, cosines = nn.Linear(x.shape[1], task.num_ranks), x @ names.T
        nn.init.zeros_(layer.bias)
        layer.weight.data = one_hot.T @ x
        centres = one_hot.T @ cosines / one_hot.sum(dim=0).clamp_min(1)[:, None]
        multiples = (250 * centres.mean()).repeat(task.num_ranks).requires_grad_()
        step = 4 * len(x) / float(torch.linalg.matrix_norm(x, 2)) ** 2
        step_of_multiples = len(x) / (4 * float(cosines.square().sum(dim=0).max()))
        optimizer = torch.optim.SGD(layer.parameters(), step, momentum=0.9)
        for i in range(1, 301):
            loss = F.cross_entropy(layer(x) + multiples * cosines, y)
            *gradients, of_multiples = torch.autograd.grad(loss, [*layer.parameters(), multiples])
            for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            if i % 10 == 0:
                multiples.data -= step_of_multiples * of_multiples
        weight, bias = layer.weight.detach() + multiples.detach()[:, None] * names, layer.bias.detach()
        return lambda z: F.linear(F.normalize(z, dim=1), weight, bias).softmax(dim=1)

    return Estimator(fit)


def ss_text(task: Task) -> Estimator:
    """Names plus class sums, weighted by how many samples a class has, pushed away from their mean, in closed form
    (SS-Text+, Silva-Rodríguez et al., MICCAI 2025)."""
    names, scale = name_embeddings(task)

    def fit(x: Tensor, y: Tensor) -> Predict:
        one_hot = F.one_hot(y, task.num_ranks).to(x.dtype)
        pull = 1 / one_hot.sum(dim=0).clamp(1e-6, 1e3)
        weight = names + scale * (one_hot.T @ F.normalize(x, dim=1)) / (len(x) * pull[:, None])
        weight = weight - F.normalize(2 * weight - weight.mean(dim=0), dim=1)
        return lambda z: (scale * F.normalize(z, dim=1) @ F.normalize(weight, dim=1).T).softmax(dim=1)

    return Estimator(fit)


def gaussian(task: Task) -> Estimator:
    """Zero-shot plus Gaussian discriminant analysis with one shrunken covariance (Wang et al., ICLR 2024), α = 1."""
    names, scale = name_embeddings(task)

    def fit(x: Tensor, y: Tensor) -> Predict:
        centres = torch.stack(
            [x[y == k].mean(dim=0) if (y == k).any() else x.mean(dim=0) for k in range(task.num_ranks)]
        )
        rest, dim = (x - centres[y]).double(), x.shape[1]
        covariance = rest.T @ rest / len(x)
        trace = covariance.trace().clamp_min(1e-6)
        precision = dim * torch.linalg.inv((len(x) - 1) * covariance + trace * torch.eye(dim, dtype=torch.float64))
        weight = (centres.double() @ precision).float()
        bias = -(weight * centres).sum(dim=1) / 2
        return lambda z: (scale * z @ names.T + z @ weight.T + bias).softmax(dim=1)

    return Estimator(fit)


def prolip(task: Task) -> Estimator:
    """A map of the features, penalised by 1/N away from the identity: RLA, the form that ProLIP takes where only the
    features are at hand (Fahes et al., 2024), fitted to convergence.
    """
    names, scale = name_embeddings(task)

    def fit(x: Tensor, y: Tensor) -> Predict:
        change = torch.zeros(x.shape[1], x.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([change], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> float:
            optimizer.zero_grad()
            loss = F.cross_entropy(scale * (x + x @ change) @ names.T, y) + change.square().sum() / len(x)
            loss.backward()
            return float(loss.detach())

        optimizer.step(closure)
        weight = (scale * (names + names @ change.T)).detach()
        return lambda z: (z @ weight.T).softmax(dim=1)

    return Estimator(fit)


def ridge(task: Task) -> Estimator:
    """scikit-learn's penalised logistic regression, its strength by cross-validation on the training samples."""
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV

    def fit(x: Tensor, y: Tensor) -> Predict:
        folds = min(5, int(y.bincount()[y.unique()].min()))
        if folds < 2:
            model = LogisticRegression(C=10.0, max_iter=2000)
        else:
            model = LogisticRegressionCV(
                Cs=7, cv=folds, max_iter=2000, scoring="neg_log_loss", use_legacy_attributes=False
            )
        model.fit(x.numpy(), y.numpy())

        def predict(z: Tensor) -> Tensor:
            found = torch.zeros(len(z), task.num_ranks)
            found[:, torch.from_numpy(model.classes_)] = torch.from_numpy(model.predict_proba(z.numpy())).float()
            return found

        return predict

    return Estimator(fit)


LANGUAGE_HEADS: dict[str, Build] = {
    "zero-shot": zero_shot,
    "ridge": ridge,
    "started-at-names": started_at_names,
    "cross-modal": cross_modal,
    "clap": clap,
    "tip-adapter": tip_adapter,
    "tip-adapter-f": tip_adapter_f,
    "lp++": lp_plus_plus,
    "ss-text+": ss_text,
    "gaussian": gaussian,
    "prolip": prolip,
}
