"""How frequent ranks are, from few samples: estimates whose changes from one rank to the next are penalised."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

STEPS = 1000  # at most
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

    Zero for each where all ranks have as many samples.  The likeliest frequencies, their changes penalised, by Newton's
    method.
    """
    found = torch.tensor(counts, dtype=torch.float64, device="cpu")
    total, ranks = found.sum(), len(counts)
    steps = torch.eye(ranks, dtype=torch.float64, device="cpu").diff(dim=0)
    stiffness = 2 * SMOOTHING * (ranks - 1) * steps.T @ steps

    def loss(logs: Tensor) -> Tensor:
        return total * logs.logsumexp(dim=0) - found @ logs + logs @ stiffness @ logs / 2

    logs = torch.zeros_like(found)
    for _ in range(STEPS):
        shares = logs.softmax(dim=0)
        gradient = total * shares - found + stiffness @ logs
        if float(gradient.abs().max()) <= 1e-10 * float(total):
            break
        # Adding to all logs changes nothing: the last term keeps the mean.
        curvature = total * (shares.diag() - shares.outer(shares) + 1 / ranks**2) + stiffness
        step, size = torch.linalg.solve(curvature, gradient), 1.0
        before, slope = float(loss(logs)), float(gradient @ step)
        while size > 1e-9 and float(loss(logs - size * step)) > before - 1e-4 * size * slope:
            size /= 2
        logs = logs - size * step
        if size <= 1e-9:
            break
    return tuple((logs - logs.mean()).tolist())
