"""From logits over ranks to one value (OrdinalCLIP, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ordinal_prompt.arrays import RankNumbers, rank_tensor, warn_of_probabilities, widest_float
from ordinal_prompt.cache import traced

RULES = ("expectation", "argmax", "median")


def decode(logits: Tensor, rule: str = "expectation", values: RankNumbers | None = None) -> Tensor:
    """Predicted rank values.

    Args:
        logits: (..., K), or the output of a model of transformers.
        rule: `"expectation"` Σ p_i v_i, the regressed value of the paper; `"argmax"` the most probable rank;
            `"median"` the smallest rank that at least half of the probability lies at or below, which minimises the
            expected absolute error.
        values: (K,) value of each rank; default its index.  A dictionary or a pandas Series gives them by rank, 0…K-1.

    Returns:
        (...): float for `"expectation"` and wherever `values` are given, else int64 indices.

    Logits with NaN or +inf give NaN; an index has no NaN, so that it means nothing there.

    Raises:
        ValueError: unknown rule, logits without ranks, values of another number than ranks.
        TypeError: logits that are not floating point, values that are no numbers.

    >>> import torch
    >>> logits = torch.tensor([[0.0, 2.0, 1.0, 0.0]])
    >>> decode(logits), decode(logits, "argmax"), decode(logits, "median", values=[10, 20, 30, 40])
    (tensor([1.3071]), tensor([1]), tensor([20.]))
    """
    check_rule(rule)
    logits = logits if isinstance(logits, Tensor) else getattr(logits, "logits", logits)  # of a model of transformers
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"Expected `logits` to be a floating point tensor, but got {_kind(logits)}.")
    if logits.dim() == 0 or logits.shape[-1] < 1:
        raise ValueError(f"Expected `logits` of shape (..., K), but got shape {tuple(logits.shape)}.")
    if logits.device.type == "cpu":  # elsewhere it would wait for the device
        warn_of_probabilities(logits, stacklevel=3)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if values is not None:
        values = rank_tensor(values, "values")
        dtype = torch.promote_types(dtype, _precision(values))
        values = values.to(dtype).to(logits.device)
        if values.shape != logits.shape[-1:]:
            raise ValueError(
                f"Expected one value for each of the {logits.shape[-1]} ranks, but got values of shape "
                f"{tuple(values.shape)}."
            )
    if rule == "expectation":
        if values is None:
            values = torch.arange(logits.shape[-1], device=logits.device, dtype=dtype)
        return (torch.softmax(logits, dim=-1, dtype=dtype) * values).sum(dim=-1)
    index = logits.argmax(dim=-1) if rule == "argmax" else _median(logits)
    if values is None:
        return index
    return values[index].masked_fill(~logits.amax(dim=-1).isfinite(), torch.nan)


def check_rule(rule: str) -> None:
    """Raises ValueError for an unknown rule."""
    if rule not in RULES:
        raise ValueError(f"Expected `rule` to be one of {RULES}, but got {rule!r}.")


def _precision(values: Tensor) -> torch.dtype:
    """float32, or float64 where the values of ranks are too close to each other for it (dates as numbers, say)."""
    if (
        values.dtype not in (torch.float64, torch.int64)
        or traced()
        or values.is_meta
        or values.dim() != 1
        or len(values) < 2
    ):
        return torch.float32
    rounding = (values.float().double() - values).abs().max()
    return torch.float64 if bool(rounding > 1e-3 * values.double().diff().abs().min()) else torch.float32


def _median(logits: Tensor) -> Tensor:
    """How many ranks have less probability up to them than above them.

    Both sides are summed from their ends, in float64 and without dividing by the total, whatever the precision of the
    logits.  Sides that differ by no more than the rounding of such sums are equal.
    """
    wide = logits.to(widest_float(logits.device))
    weights = (wide - wide.amax(dim=-1, keepdim=True)).exp()
    up_to, from_here = weights.cumsum(dim=-1), weights.flip(-1).cumsum(dim=-1).flip(-1)
    rounding = 1 + logits.shape[-1] * torch.finfo(wide.dtype).eps
    return (up_to[..., :-1] * rounding < from_here[..., 1:]).sum(dim=-1)


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
