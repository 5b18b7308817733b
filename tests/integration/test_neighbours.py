"""Losses, metrics and training loops of the neighbours, on a prompt head's logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score
from torch import Tensor, nn

import ordinal_prompt as op

K = 5
ALPHAS = np.array([0.0, *[0.05] * (2 * K - 2), 0.0])


def dlordinal_losses() -> dict[str, Any]:
    losses = pytest.importorskip("dlordinal.losses")
    targets = torch.arange(K)
    return {
        "beta": lambda: losses.BetaLoss(nn.CrossEntropyLoss(), K),
        "binomial": lambda: losses.BinomialLoss(nn.CrossEntropyLoss(), K),
        "cdwce": lambda: losses.CDWCELoss(K),
        "emd": lambda: losses.EMDLoss(K),
        "exponential": lambda: losses.ExponentialLoss(nn.CrossEntropyLoss(), K),
        "general triangular": lambda: losses.GeneralTriangularLoss(nn.CrossEntropyLoss(), K, ALPHAS),
        "geometric": lambda: losses.GeometricLoss(nn.CrossEntropyLoss(), K),
        "mce": lambda: losses.MCELoss(K, use_logits=True),
        "mce and wk": lambda: losses.MCEAndWKLoss(K, use_logits=True),
        "poisson": lambda: losses.PoissonLoss(nn.CrossEntropyLoss(), K),
        "slace": lambda: losses.SLACELoss(1.0, K),
        "sord": lambda: losses.SORDLoss(1.0, K, targets),
        "triangular": lambda: losses.TriangularLoss(nn.CrossEntropyLoss(), K),
        "wk": lambda: losses.WKLoss(K, use_logits=True),
    }


@pytest.mark.parametrize("name", dlordinal_losses())
def test_losses_of_dlordinal_train_a_prompt_head(name: str, clip: Any) -> None:
    torch.manual_seed(0)
    head = op.OrdinalPromptHead(clip, K, context=4, learn_logit_scale=True)
    loss = dlordinal_losses()[name]()
    features, labels = torch.randn(20, 12), torch.arange(20) % K
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        value = loss(head(features), labels)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert head.prompt.rank_embeddings.grad is not None
    assert values[-1] < values[0]


def test_metrics_of_torchmetrics_take_what_decode_gives(head: op.OrdinalPromptHead) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    labels = torch.arange(20) % K
    with torch.no_grad():
        logits = head(torch.randn(20, 12))
    expected, ranks = op.decode(logits), op.decode(logits, "argmax").long()
    error = torchmetrics.functional.mean_absolute_error(expected, labels.float())
    torch.testing.assert_close(error, (expected - labels).abs().mean())
    kappa = torchmetrics.functional.cohen_kappa(ranks, labels, task="multiclass", num_classes=K, weights="quadratic")
    assert kappa.item() == pytest.approx(cohen_kappa_score(ranks, labels, weights="quadratic"), abs=1e-5)
    accuracy = torchmetrics.functional.accuracy(logits, labels, task="multiclass", num_classes=K, average="micro")
    assert accuracy.item() == pytest.approx((ranks == labels).float().mean().item())


class Net(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 12), head

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(features))
        return logits


def test_skorch_gives_probabilities_of_a_head_trained_with_our_loss(clip: Any) -> None:
    skorch = pytest.importorskip("skorch")
    head = op.OrdinalPromptHead(clip, K)
    net = skorch.NeuralNetClassifier(
        Net, module__head=head, criterion=op.OrdinalPromptLoss, max_epochs=2, verbose=0, train_split=None
    )
    features, labels = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32), np.arange(20) % K
    probabilities = net.fit(features, labels).predict_proba(features)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    logits = net.module_.eval()(torch.from_numpy(features))
    np.testing.assert_allclose(probabilities, logits.softmax(dim=1).detach().numpy(), atol=1e-6)
