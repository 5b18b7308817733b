"""The loss: image to text and text to image (OrdinalCLIP, section 3.4, equations 6 to 8).

Labels may be rank indices, distributions over the ranks, or ranges of ranks; a distribution on one rank, and a range of
one rank, give the loss of its index.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ordinal_prompt.arrays import RankNumbers, rank_tensor
from ordinal_prompt.distributed import gather_batch
from ordinal_prompt.labels import rank_indices

TARGET_LOGIT = 10.0  # the published code's sharpness of the target over the batch


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    rank_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Image to text: cross-entropy of the logits with the labels.

    Args:
        logits: (B, K).
        labels: (B,) integers in 0…K-1; (B, K) distributions, floating point; or (B, 2) integers, the first and the last
            rank of ranges, of which the whole probability counts.
        rank_weights: (K,) weights; the mean over the batch is then weighted by that of each label.
        label_smoothing: share of the target that is spread over all ranks.
        sample_weight: (B,) weights of the samples in the mean; 0 leaves one out.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights = None if rank_weights is None else rank_weights.to(logits)
    if labels.dim() == 1 and sample_weight is None and weights is None:
        return F.cross_entropy(logits, labels.long(), label_smoothing=label_smoothing)
    log_probs, shares = F.log_softmax(logits, dim=1), rank_shares(labels, logits)
    weights = torch.ones_like(logits[0]) if weights is None else weights
    of_sample = shares @ weights
    if labels.dim() == 1:
        loss = F.cross_entropy(logits, labels.long(), weight=weights, reduction="none")
    elif _are_ranges(labels):
        loss = -log_probs.masked_fill(shares == 0, -torch.inf).logsumexp(dim=1) * of_sample
    else:
        loss = -(shares * weights * log_probs).sum(dim=1)
    if label_smoothing:
        spread = -(weights * log_probs).mean(dim=1)
        loss = (1 - label_smoothing) * loss + label_smoothing * spread
    if sample_weight is not None:
        of_sample = of_sample * sample_weight.to(logits)
        loss = torch.where(sample_weight > 0, loss * sample_weight.to(logits), 0)
    total = of_sample.sum()  # zero where no sample has weight; the loss is then zero, too
    return torch.where(total > 0, loss.sum(), 0) / total.clamp_min(torch.finfo(logits.dtype).tiny)


def kl_loss(
    logits: Tensor, labels: Tensor, rank_weights: Tensor | None = None, sample_weight: Tensor | None = None
) -> Tensor:
    """Text to image: for each rank in the batch, how far its samples are from being the ones that match it best.

    For every rank present, KL(target ‖ prediction) over the batch: target = softmax of 10·[label = rank], prediction =
    softmax of the rank's column of the logits; summed, and divided by the number of ranks present.  Where labels are
    distributions or ranges, a rank's share of the label takes the place of [label = rank], and a rank counts by the
    largest share that it has.

    Args:
        logits: (B, K).
        labels: as in `cross_entropy_loss`.
        rank_weights: (K,) weights; the mean over the ranks present is then weighted.
        sample_weight: (B,) weights of the samples in both softmaxes; 0 leaves one out.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target, prediction = TARGET_LOGIT * (shares := rank_shares(labels, logits)), logits
    if sample_weight is not None:
        left_out = sample_weight[:, None] <= 0
        weight = sample_weight.to(logits)[:, None].clamp_min(torch.finfo(logits.dtype).tiny).log()
        lowest = torch.finfo(logits.dtype).min / 4
        target, prediction = ((part + weight).masked_fill(left_out, lowest) for part in (target, prediction))
        shares = shares.masked_fill(left_out, 0)
    target, prediction = F.log_softmax(target, dim=0), F.log_softmax(prediction, dim=0)
    divergence = (target.exp() * (target - prediction)).sum(dim=0)
    present = shares.amax(dim=0)
    if rank_weights is not None:
        present = present * rank_weights.to(logits)
    # The tiny floor only matters where every rank present has weight zero, and the loss is zero.
    return (divergence * present).sum() / present.sum().clamp_min(torch.finfo(logits.dtype).tiny)


def rank_shares(labels: Tensor, logits: Tensor) -> Tensor:
    """(B, K) what each rank has of each label: all or nothing, its probability, or an equal share of a range."""
    if labels.dim() == 1:
        return F.one_hot(labels.long(), logits.shape[1]).to(logits.dtype)
    if not _are_ranges(labels):
        return labels.to(logits.dtype)
    ranks = torch.arange(logits.shape[1], device=labels.device)
    inside = ((ranks >= labels[:, :1]) & (ranks <= labels[:, 1:])).to(logits.dtype)
    return inside / inside.sum(dim=1, keepdim=True)


def _are_ranges(labels: Tensor) -> bool:
    return labels.dim() == 2 and not labels.is_floating_point()


class OrdinalPromptLoss(nn.CrossEntropyLoss):
    """CE + KL of a prompt head's logits: image to text plus text to image.

    Where torch.distributed runs and gradients are on, the KL term sees the global batch (every process must then call
    the loss), and its gradient is scaled so that averaging over processes (as DistributedDataParallel does) gives the
    gradient of one process with the whole batch.

    Fits transformers' `Trainer(compute_loss_func=...)`: the model's output may take the place of its logits, and where
    the trainer accumulates gradients, each part of the batch counts by its size.

    Args:
        ce_weight: weight of the cross-entropy.
        kl_weight: weight of the KL term; 0 leaves it out.
        rank_weights: (K,) weights of the ranks in both terms, for instance one over their frequency; a dictionary or a
            pandas Series gives them by rank, 0…K-1, in any order.
        label_smoothing: of the cross-entropy, in [0, 1).
        rank_values: (K,) the values of the ranks.  Labels are then always values (stars, years), never indices.
        ignore_index: the label of samples without one, as -100; they do not count.  A batch of none but such has the
            loss zero.  By default every sample must have a label.

    Shapes:
        logits (B, K) or (..., K).  Labels (B,) or (...): rank indices, integers in 0…K-1, or values of `rank_values`.
        Labels (B, K) or (..., K), floating point: distributions, as the votes of raters or mixtures.  Labels (B, 2) or
        (..., 2), integers (or values): ranges, from their first to their last rank.  `sample_weight` (B,) or (...).
        The loss is a scalar, in nats.

    Raises:
        ValueError: weights that are negative, not finite or all zero; labels that do not fit; an empty batch.
        TypeError: logits that are not floating point, labels that are not integers.

    >>> import torch
    >>> logits, labels = torch.eye(3) * 5, torch.tensor([0, 1, 2])
    >>> loss = OrdinalPromptLoss()
    >>> round(loss(logits, labels).item(), 4)
    0.0262
    >>> {name: round(term.item(), 4) for name, term in loss.terms(logits, labels).items()}
    {'ce': 0.0134, 'kl': 0.0128}
    """

    rank_weights: Tensor | None
    rank_values: Tensor | None
    ignore_index: int | None  # type: ignore[assignment]  # -100 of its base class is no default here

    def __init__(
        self,
        ce_weight: float = 1.0,
        kl_weight: float = 1.0,
        rank_weights: RankNumbers | None = None,
        label_smoothing: float = 0.0,
        rank_values: RankNumbers | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()  # a cross-entropy, so that others (skorch) know that it takes logits
        for name, weight in (("ce_weight", ce_weight), ("kl_weight", kl_weight)):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"Expected `{name}` to be finite and not negative, but got {weight}.")
        if not ce_weight + kl_weight:
            raise ValueError("Expected `ce_weight` or `kl_weight` to be above zero, but both are zero.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"Expected `label_smoothing` in [0, 1), but got {label_smoothing}.")
        if rank_weights is not None:
            rank_weights = rank_tensor(rank_weights, "rank_weights").float()
            sound = bool((rank_weights.isfinite() & (rank_weights >= 0)).all() & rank_weights.any())
            if rank_weights.dim() != 1 or not sound:
                raise ValueError("Expected `rank_weights` to be K finite weights, none negative, not all zero.")
        if rank_values is not None:
            rank_values = rank_tensor(rank_values, "rank_values").float()
            rank_indices(rank_values[:0], rank_values)  # refuses what does not increase
        if ignore_index is not None and (isinstance(ignore_index, bool) or not hasattr(ignore_index, "__float__")):
            raise TypeError(f"Expected `ignore_index` to be a number, as -100, but got {ignore_index!r}.")
        self.ce_weight, self.kl_weight = ce_weight, kl_weight
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.register_buffer("rank_weights", rank_weights, persistent=False)
        self.register_buffer("rank_values", rank_values, persistent=False)

    def forward(
        self,
        logits: Tensor | Any,
        labels: Tensor,
        sample_weight: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        given = labels
        logits, labels, sample_weight = self._check(logits, labels, sample_weight)
        loss = self.ce_weight * self._ce(logits, labels, sample_weight)
        if self.kl_weight:
            loss = loss + self.kl_weight * self._kl(logits, labels, sample_weight)
        if num_items_in_batch is None:
            return loss
        counted = labels.shape[0] if self.ignore_index is None else (given != self.ignore_index).sum()
        return loss * counted / num_items_in_batch

    def terms(self, logits: Tensor, labels: Tensor, sample_weight: Tensor | None = None) -> dict[str, Tensor]:
        """The two terms, before their weights: `{"ce": scalar, "kl": scalar}`."""
        checked = self._check(logits, labels, sample_weight)
        return {"ce": self._ce(*checked), "kl": self._kl(*checked)}

    def _ce(self, logits: Tensor, labels: Tensor, sample_weight: Tensor | None) -> Tensor:
        return cross_entropy_loss(logits, labels, self.rank_weights, self.label_smoothing, sample_weight)

    def _kl(self, logits: Tensor, labels: Tensor, sample_weight: Tensor | None) -> Tensor:
        if not self.kl_weight:  # also spares the other processes the gathering
            return kl_loss(logits.detach(), labels, self.rank_weights, sample_weight)
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not (several and torch.is_grad_enabled()):
            return kl_loss(logits, labels, self.rank_weights, sample_weight)
        weight = torch.ones_like(logits[:, 0]) if sample_weight is None else sample_weight.to(logits.dtype)
        logits, labels, weight = gather_batch(logits, labels, weight)
        loss = kl_loss(logits, labels, self.rank_weights, weight)
        # Each process holds the gradient of its own part only; averaging divides the sum of the parts by their number.
        return loss + (dist.get_world_size() - 1) * (loss - loss.detach())

    def _check(
        self, logits: Tensor | Any, labels: Tensor, sample_weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits (B, K), labels as indices, distributions or ranges of indices, and weights (B,)."""
        logits = getattr(logits, "logits", logits)  # of a model of transformers
        for name, value in (("logits", logits), ("labels", labels)):
            if not isinstance(value, Tensor):
                raise TypeError(f"Expected `{name}` to be a tensor, but got {type(value).__name__}.")
        if not logits.is_floating_point():
            raise TypeError(f"Expected `logits` to be floating point, but got {logits.dtype}.")
        if labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"Expected `labels` to be integer rank indices, but got {labels.dtype}.")
        num_ranks = logits.shape[-1] if logits.dim() else 0
        for name, own in (("rank_weights", self.rank_weights), ("rank_values", self.rank_values)):
            if own is not None and len(own) != num_ranks:
                raise ValueError(f"Expected {num_ranks} `{name}` for {num_ranks} ranks, but got {len(own)}.")
        kind = self._kind(logits, labels)
        logits = logits.reshape(-1, num_ranks)
        labels = labels.reshape(len(logits), *[labels.shape[-1]] * (kind != "indices"))
        if len(labels) == 0:
            raise ValueError("Expected at least one sample, but got an empty batch.")
        if sample_weight is not None:
            sample_weight = sample_weight.reshape(-1)
            if len(sample_weight) != len(logits) or not bool((sample_weight >= 0).all()):
                raise ValueError("Expected one `sample_weight` for each sample, none negative.")
        if self.ignore_index is not None and kind != "distributions":
            there = (labels != self.ignore_index).reshape(len(labels), -1).all(dim=1)
            sample_weight = there.to(logits.dtype) if sample_weight is None else sample_weight * there
            if self.rank_values is not None:
                labels = labels.double()
            first = 0 if self.rank_values is None else self.rank_values[0].double()
            labels = torch.where(there if kind == "indices" else there[:, None], labels, first)
        if kind == "distributions":
            self._check_distributions(labels)
        elif self.rank_values is not None:
            labels = rank_indices(labels, self.rank_values.to(labels.device))
        elif not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in labels.aminmax())
            if low < 0 or high >= num_ranks:
                raise ValueError(f"Expected labels in 0…{num_ranks - 1} for {num_ranks} ranks, but got {low}…{high}.")
        if kind == "ranges" and bool((labels[:, 0] > labels[:, 1]).any()):
            raise ValueError("Expected ranges from their first to their last rank, but some end before they start.")
        return logits, labels, sample_weight

    def _kind(self, logits: Tensor, labels: Tensor) -> str:
        """What the labels are, from their shape and type."""
        real, values = labels.is_floating_point(), self.rank_values is not None
        if logits.dim() and labels.shape == logits.shape[:-1]:
            if real and not values:
                raise TypeError(
                    f"Expected `labels` to be integer rank indices, but got {labels.dtype}; map your rank values to "
                    "their indices first (op.rank_indices), or pass rank_values= to the loss."
                )
            return "indices"
        if logits.dim() and labels.shape == logits.shape and real:
            return "distributions"
        if logits.dim() and labels.shape == (*logits.shape[:-1], 2) and (values or not real) and logits.shape[-1] > 2:
            return "ranges"
        hints = {logits.shape: "; for one-hot labels pass labels.float()", (*logits.shape[:-1], 1): "; squeeze them"}
        raise ValueError(
            f"Expected one label for each row of logits {tuple(logits.shape)} (or a distribution over its ranks, or the"
            f" first and the last rank of a range), but got labels of shape {tuple(labels.shape)}, {labels.dtype}"
            f"{hints.get(labels.shape, '')}."
        )

    def _check_distributions(self, labels: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        if not bool(((labels >= 0).all(dim=1) & ((labels.sum(dim=1) - 1).abs() < 1e-2)).all()):
            raise ValueError(
                "Expected distributions over the ranks in `labels`, none negative, each summing to one, but some rows "
                "do not; divide votes by their number."
            )

    def extra_repr(self) -> str:
        return f"ce_weight={self.ce_weight}, kl_weight={self.kl_weight}, label_smoothing={self.label_smoothing}"
