"""The loss: image to text and text to image (OrdinalCLIP, section 3.4, equations 6 to 8)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ordinal_prompt.arrays import RankNumbers, rank_tensor
from ordinal_prompt.distributed import gather_batch

TARGET_LOGIT = 10.0  # the published code's sharpness of the target over the batch


def cross_entropy_loss(
    logits: Tensor, labels: Tensor, rank_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Image to text: cross-entropy of the logits with the labels.

    Args:
        logits: (B, K).
        labels: (B,) integers in 0…K-1.
        rank_weights: (K,) weights; the mean over the batch is then weighted by that of each label.
        label_smoothing: share of the target that is spread over all ranks.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weight = None if rank_weights is None else rank_weights.to(logits)
    return F.cross_entropy(logits, labels.long(), weight=weight, label_smoothing=label_smoothing)


def kl_loss(logits: Tensor, labels: Tensor, rank_weights: Tensor | None = None) -> Tensor:
    """Text to image: for each rank in the batch, how far its samples are from being the ones that match it best.

    For every rank present, KL(target ‖ prediction) over the batch: target = softmax of 10·[label = rank], prediction =
    softmax of the rank's column of the logits; summed, and divided by the number of ranks present.

    Args:
        logits: (B, K).
        labels: (B,) integers in 0…K-1.
        rank_weights: (K,) weights; the mean over the ranks present is then weighted.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    is_rank = F.one_hot(labels.long(), logits.shape[1]).to(logits.dtype)
    target = F.log_softmax(TARGET_LOGIT * is_rank, dim=0)
    prediction = F.log_softmax(logits, dim=0)
    divergence = (target.exp() * (target - prediction)).sum(dim=0)
    weight = is_rank.amax(dim=0)
    if rank_weights is not None:
        weight = weight * rank_weights.to(logits)
    # The tiny floor only matters where every rank present has weight zero, and the loss is zero.
    return (divergence * weight).sum() / weight.sum().clamp_min(torch.finfo(logits.dtype).tiny)


class OrdinalPromptLoss(nn.Module):
    """CE + KL of a prompt head's logits: image to text plus text to image.

    Where torch.distributed runs and gradients are on, the KL term sees the global batch (every process must then call
    the loss), and its gradient is scaled so that averaging over processes (as DistributedDataParallel does) gives the
    gradient of one process with the whole batch.

    Args:
        ce_weight: weight of the cross-entropy.
        kl_weight: weight of the KL term; 0 leaves it out.
        rank_weights: (K,) weights of the ranks in both terms, for instance one over their frequency; a dictionary or a
            pandas Series gives them by rank, 0…K-1, in any order.
        label_smoothing: of the cross-entropy, in [0, 1).

    Shapes:
        logits (B, K) or (..., K); labels (B,) or (...), integers in 0…K-1; the loss is a scalar, in nats.

    Raises:
        ValueError: weights that are negative or not finite, labels out of range or of another shape, an empty batch.
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

    def __init__(
        self,
        ce_weight: float = 1.0,
        kl_weight: float = 1.0,
        rank_weights: RankNumbers | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        for name, weight in (("ce_weight", ce_weight), ("kl_weight", kl_weight)):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"Expected `{name}` to be finite and not negative, but got {weight}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"Expected `label_smoothing` in [0, 1), but got {label_smoothing}.")
        if rank_weights is not None:
            rank_weights = rank_tensor(rank_weights, "rank_weights").float()
            if rank_weights.dim() != 1 or not bool((rank_weights.isfinite() & (rank_weights >= 0)).all()):
                raise ValueError("Expected `rank_weights` to be K finite weights, none negative, for K ranks.")
        self.ce_weight = ce_weight
        self.kl_weight = kl_weight
        self.label_smoothing = label_smoothing
        self.register_buffer("rank_weights", rank_weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits, labels = self._check(logits, labels)
        loss = self.ce_weight * cross_entropy_loss(logits, labels, self.rank_weights, self.label_smoothing)
        return loss + self.kl_weight * self._kl(logits, labels) if self.kl_weight else loss

    def terms(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The two terms, before their weights: `{"ce": scalar, "kl": scalar}`."""
        logits, labels = self._check(logits, labels)
        return {
            "ce": cross_entropy_loss(logits, labels, self.rank_weights, self.label_smoothing),
            "kl": self._kl(logits, labels),
        }

    def _kl(self, logits: Tensor, labels: Tensor) -> Tensor:
        if not self.kl_weight:  # also spares the other processes the gathering
            return kl_loss(logits.detach(), labels, self.rank_weights)
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not (several and torch.is_grad_enabled()):
            return kl_loss(logits, labels, self.rank_weights)
        loss = kl_loss(*gather_batch(logits, labels), self.rank_weights)
        # Each process holds the gradient of its own part only; averaging divides the sum of the parts by their number.
        return loss + (dist.get_world_size() - 1) * (loss - loss.detach())

    def _check(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        for name, value in (("logits", logits), ("labels", labels)):
            if not isinstance(value, Tensor):
                raise TypeError(f"Expected `{name}` to be a tensor, but got {type(value).__name__}.")
        if not logits.is_floating_point():
            raise TypeError(f"Expected `logits` to be floating point, but got {logits.dtype}.")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(
                f"Expected `labels` to be integer rank indices, but got {labels.dtype}; map your rank values to their "
                "indices 0…K-1 first."
            )
        if logits.dim() < 1 or labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"Expected one label for each row of logits {tuple(logits.shape)}, but got labels of shape "
                f"{tuple(labels.shape)}."
            )
        logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).long()
        if len(labels) == 0:
            raise ValueError("Expected at least one sample, but got an empty batch.")
        num_ranks = logits.shape[1]
        if self.rank_weights is not None and len(self.rank_weights) != num_ranks:
            raise ValueError(
                f"Expected {num_ranks} `rank_weights` for {num_ranks} ranks, but got {len(self.rank_weights)}."
            )
        if not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in labels.aminmax())
            if low < 0 or high >= num_ranks:
                raise ValueError(f"Expected labels in 0…{num_ranks - 1} for {num_ranks} ranks, but got {low}…{high}.")
        return logits, labels

    def extra_repr(self) -> str:
        return f"ce_weight={self.ce_weight}, kl_weight={self.kl_weight}, label_smoothing={self.label_smoothing}"
