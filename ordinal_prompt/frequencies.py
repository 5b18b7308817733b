"""How frequent ranks are, from few samples: estimates whose changes from one rank to the next are penalised."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

STEPS = 1000
SMOOTHING = 1.0  # of counted ranks, in nats over all samples


def smoothed_change(log_probs: Tensor, weight: Tensor, before: Tensor, smoothing: float) -> Tensor:
    """(K,) the logs of the likeliest frequencies over those before, of mean zero; by L-BFGS from no change.

    Args:
        log_probs: (N, K) of samples, as they are under the frequencies before.
        weight: (N,) of the samples, with the sum 1.
        before: (K,) frequencies.
        smoothing: times K-1 and the squared differences of neighbours, in nats per sample.
    """
    change = torch.zeros_like(before, requires_grad=True)
    optimizer = torch.optim.LBFGS([change], max_iter=STEPS, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        likelihood = weight @ (log_probs + change).logsumexp(dim=1) - (before.log() + change).logsumexp(dim=0)
        loss = smoothing * (len(before) - 1) * change.diff().square().sum() - likelihood
        loss.backward()
        return float(loss.detach())

    with torch.enable_grad():
        optimizer.step(closure)
    return change.detach() - change.detach().mean()


@lru_cache(maxsize=64)
def usual_bias(counts: tuple[float, ...]) -> tuple[float, ...]:
    """The logs of frequencies that K counts of labels suggest, of mean zero: ranks that do not occur are rare.

    Zero for each where all ranks have as many samples.
    """
    found = torch.tensor(counts, dtype=torch.float64)
    total, ranks = float(found.sum()), len(counts)
    uniform = torch.full((ranks,), 1 / ranks, dtype=torch.float64)
    one_hot = torch.eye(ranks, dtype=torch.float64).log()
    return tuple(smoothed_change(one_hot, found / total, uniform, SMOOTHING / total).tolist())
