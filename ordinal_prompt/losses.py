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

from ordinal_prompt.arrays import RankNumbers, is_number, rank_tensor, warn_of_probabilities
from ordinal_prompt.distributed import gather_batch
from ordinal_prompt.labels import rank_indices
from ordinal_prompt.targets import are_ranges, read_batch

NO_LABEL = torch.iinfo(torch.int64).min  # PyTorch leaves out samples of -100, which is a mistake here
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
        return F.cross_entropy(logits, labels.long(), ignore_index=NO_LABEL, label_smoothing=label_smoothing)
    log_probs, shares = F.log_softmax(logits, dim=1), rank_shares(labels, logits)
    weights = torch.ones_like(logits[0]) if weights is None else weights
    of_sample = (shares * weights).sum(dim=1)  # no product of matrices, which autocast would make half precise
    if labels.dim() == 1:
        loss = F.cross_entropy(logits, labels.long(), weight=weights, ignore_index=NO_LABEL, reduction="none")
    elif are_ranges(labels):
        loss = -log_probs.masked_fill(shares == 0, -torch.inf).logsumexp(dim=1) * of_sample
    else:
        loss = -torch.where(shares > 0, shares * weights * log_probs, 0).sum(dim=1)
    if label_smoothing:
        spread = -(weights * log_probs).mean(dim=1)
        loss = (1 - label_smoothing) * loss + label_smoothing * spread
    return _mean(loss, of_sample, sample_weight)


def emd_loss(
    logits: Tensor, labels: Tensor, rank_weights: Tensor | None = None, sample_weight: Tensor | None = None
) -> Tensor:
    """Squared earth mover's distance between prediction and label, in ranks (Hou et al., 2016).

    Σ_k (F_k - G_k)² over the thresholds k, F and G the cumulated probabilities of prediction and label: the ranked
    probability score of a label that is an index.  A range asks nothing of the thresholds inside it.

    Args:
        logits, labels, rank_weights, sample_weight: as in `cross_entropy_loss`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    predicted, shares = F.softmax(logits, dim=1).cumsum(dim=1), rank_shares(labels, logits)
    least = most = shares.cumsum(dim=1)
    if are_ranges(labels):
        ranks = torch.arange(logits.shape[1], device=labels.device)
        most, least = ((ranks >= labels[:, place, None]).to(logits.dtype) for place in (0, 1))
    loss = (F.relu(predicted - most) + F.relu(least - predicted)).square().sum(dim=1)
    of_sample = torch.ones_like(loss) if rank_weights is None else (shares * rank_weights.to(logits)).sum(dim=1)
    return _mean(loss * of_sample, of_sample, sample_weight)


def _mean(loss: Tensor, of_sample: Tensor, sample_weight: Tensor | None) -> Tensor:
    """Of losses (B,) that hold their weights (B,); zero where no sample has weight."""
    if sample_weight is not None:
        of_sample = of_sample * sample_weight.to(loss)
        loss = torch.where(sample_weight > 0, loss * sample_weight.to(loss), 0)
    total = of_sample.sum()
    return torch.where(total > 0, loss.sum(), 0) / total.clamp_min(torch.finfo(loss.dtype).tiny)


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
    left_out = logits == -torch.inf  # ranks that are masked
    if sample_weight is not None:
        left_out = left_out | (sample_weight[:, None] <= 0)
        weight = sample_weight.to(logits)[:, None].clamp_min(torch.finfo(logits.dtype).tiny).log()
        target, prediction = target + weight, prediction + weight
    lowest = torch.finfo(logits.dtype).min / 4
    target, prediction = (F.log_softmax(part.masked_fill(left_out, lowest), dim=0) for part in (target, prediction))
    shares = shares.masked_fill(left_out, 0)
    divergence = (target.exp() * (target - prediction)).sum(dim=0)
    present = shares.amax(dim=0)
    if rank_weights is not None:
        present = present * rank_weights.to(logits)
    # The tiny floor only matters where every rank present has weight zero, and the loss is zero.
    return (divergence * present).sum() / present.sum().clamp_min(torch.finfo(logits.dtype).tiny)


def rank_shares(labels: Tensor, logits: Tensor) -> Tensor:
    """(B, K) what each rank has of each label: all or nothing, its probability, or an equal share of a range."""
    ranks = torch.arange(logits.shape[1], device=labels.device)
    if labels.dim() == 1:
        return (labels[:, None] == ranks).to(logits.dtype)
    if not are_ranges(labels):
        return labels.to(logits.dtype)
    inside = ((ranks >= labels[:, :1]) & (ranks <= labels[:, 1:])).to(logits.dtype)
    return inside / inside.sum(dim=1, keepdim=True)


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
        emd_weight: weight of the squared earth mover's distance (`emd_loss`), by which far ranks cost more than near
            ones; 0 leaves it out.  Measured (`benchmarks/heads/RESULTS.md`): 1 lowers the error where ranks are many
            and labels few; with five to eight ranks it does nothing.
        ignore_index: the label of samples without one, as -100 or NaN; they do not count.  A distribution or a
            range is missing where it consists of it.  A batch of none but such has the loss zero.  By default every
            sample must have a label.

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
    ignore_index: float | None  # type: ignore[assignment]  # -100 of its base class is no default here

    def __init__(
        self,
        ce_weight: float = 1.0,
        kl_weight: float = 1.0,
        rank_weights: RankNumbers | None = None,
        label_smoothing: float = 0.0,
        rank_values: RankNumbers | None = None,
        ignore_index: float | None = None,
        emd_weight: float = 0.0,
    ) -> None:
        super().__init__()  # a cross-entropy, so that others (skorch) know that it takes logits
        weights: dict[str, Any] = {"ce_weight": ce_weight, "kl_weight": kl_weight, "emd_weight": emd_weight}
        for name, weight in {**weights, "label_smoothing": label_smoothing}.items():
            if not is_number(weight):
                hint = "; weights of the ranks are `rank_weights`" if hasattr(weight, "__len__") else ""
                raise TypeError(f"Expected `{name}` to be a number, but got {type(weight).__name__}{hint}.")
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"Expected `{name}` to be finite and not negative, but got {weight}.")
        if not any(weights.values()):
            raise ValueError("Expected `ce_weight`, `kl_weight` or `emd_weight` to be above zero, but all are zero.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"Expected `label_smoothing` in [0, 1), but got {label_smoothing}.")
        if rank_weights is not None:
            rank_weights = rank_tensor(rank_weights, "rank_weights").detach().float()
            sound = bool((rank_weights.isfinite() & (rank_weights >= 0)).all() & rank_weights.any())
            if rank_weights.dim() != 1 or not sound:
                raise ValueError("Expected `rank_weights` to be K finite weights, none negative, not all zero.")
        if rank_values is not None:
            rank_values = rank_tensor(rank_values, "rank_values")
            rank_indices([], rank_values)  # refuses what does not increase
        if ignore_index is not None and (isinstance(ignore_index, bool) or not is_number(ignore_index)):
            raise TypeError(f"Expected `ignore_index` to be a number, as -100, but got {ignore_index!r}.")
        self.ce_weight, self.kl_weight, self.emd_weight = ce_weight, kl_weight, emd_weight
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.register_buffer("rank_weights", rank_weights, persistent=False)
        # Numbers, not a buffer: `.half()` would round years to decades.
        self.rank_values: tuple[float, ...] | None = None if rank_values is None else tuple(rank_values.tolist())
        self._begun = False

    def forward(
        self,
        logits: Tensor | Any,
        labels: Tensor,
        sample_weight: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        given = labels
        logits, labels, sample_weight = self._read(logits, labels, sample_weight)
        loss = self.ce_weight * self._ce(logits, labels, sample_weight)
        if self.kl_weight:
            loss = loss + self.kl_weight * self._kl(logits, labels, sample_weight)
        if self.emd_weight:
            loss = loss + self.emd_weight * emd_loss(logits, labels, self.rank_weights, sample_weight)
        if num_items_in_batch is None:
            return loss
        if self.ignore_index not in (None, -100):
            raise ValueError(
                f"`Trainer` counts labels that are not -100: pass ignore_index=-100, not {self.ignore_index}."
            )
        # As `Trainer` counts, whatever the labels are; none where all are missing.
        return loss * (given != -100).sum() / torch.as_tensor(num_items_in_batch).clamp_min(1)

    def terms(self, logits: Tensor, labels: Tensor, sample_weight: Tensor | None = None) -> dict[str, Tensor]:
        """The terms, before their weights: `{"ce": scalar, "kl": scalar}`, and "emd" where it has weight."""
        logits, labels, sample_weight = self._read(logits, labels, sample_weight)
        terms = {"ce": self._ce(logits, labels, sample_weight), "kl": self._kl(logits, labels, sample_weight)}
        emd = {"emd": emd_loss(logits, labels, self.rank_weights, sample_weight)} if self.emd_weight else {}
        return terms | emd

    def check(self, num_ranks: int) -> None:
        """Raises ValueError where the options are those of another number of ranks."""
        for name, own in (("rank_weights", self.rank_weights), ("rank_values", self.rank_values)):
            if own is not None and len(own) != num_ranks:
                raise ValueError(f"Expected {num_ranks} `{name}` for {num_ranks} ranks, but got {len(own)}.")

    def _read(self, logits: Any, labels: Any, sample_weight: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        batch = read_batch(logits, labels, sample_weight, self.rank_values, self.ignore_index)
        self.check(batch[0].shape[1])
        if not self._begun:
            self._begun = True
            warn_of_probabilities(batch[0])
        return batch

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

    def extra_repr(self) -> str:
        weights = f"ce_weight={self.ce_weight}, kl_weight={self.kl_weight}, emd_weight={self.emd_weight}"
        return f"{weights}, label_smoothing={self.label_smoothing}"
