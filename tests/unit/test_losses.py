"""The two losses, against loops, and over several processes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import ordinal_prompt as op
from ordinal_prompt.losses import cross_entropy_loss, kl_loss


def kl_rank_by_rank(logits: Tensor, labels: Tensor, rank_weights: Tensor) -> Tensor:
    """The text-to-image term with a loop over the ranks present."""
    total, weight = torch.zeros((), dtype=logits.dtype), 0.0
    for rank in labels.unique():
        target = torch.softmax(10.0 * (labels == rank).to(logits.dtype), dim=0)
        prediction = torch.log_softmax(logits[:, rank], dim=0)
        total = total + rank_weights[rank] * F.kl_div(prediction, target, reduction="sum")
        weight += float(rank_weights[rank])
    return total / weight


@given(batch=st.integers(1, 12), ranks=st.integers(2, 9), weighted=st.booleans(), seed=st.integers(0, 99))
def test_kl_is_a_mean_over_the_ranks_present(batch: int, ranks: int, weighted: bool, seed: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(batch, ranks, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(ranks, (batch,))
    weights = torch.rand(ranks, dtype=torch.float64) + 0.1 if weighted else None
    fast = kl_loss(logits, labels, weights)
    slow = kl_rank_by_rank(logits, labels, weights if weighted else torch.ones(ranks))
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (fast, slow)))


def test_a_batch_of_one_has_no_kl() -> None:
    assert kl_loss(torch.randn(1, 4), torch.tensor([2])) == 0


def test_gradients_are_right() -> None:
    labels = torch.tensor([0, 2, 2, 1])
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: op.OrdinalPromptLoss(0.7, 1.3)(z, labels), [logits])


def test_options() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 3])
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    loss = op.OrdinalPromptLoss(2.0, 0.5, rank_weights=weights, label_smoothing=0.1)
    terms = loss.terms(logits, labels)
    torch.testing.assert_close(terms["ce"], F.cross_entropy(logits, labels, weight=weights, label_smoothing=0.1))
    torch.testing.assert_close(terms["kl"], kl_rank_by_rank(logits, labels, weights))
    torch.testing.assert_close(loss(logits, labels), 2 * terms["ce"] + 0.5 * terms["kl"])
    torch.testing.assert_close(op.OrdinalPromptLoss(kl_weight=0)(logits, labels), cross_entropy_loss(logits, labels))
    torch.testing.assert_close(loss(logits.reshape(2, 3, 4), labels.reshape(2, 3)), loss(logits, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    logits, labels = (20 * torch.randn(32, 9)).to(dtype), torch.randint(9, (32,))
    loss = op.OrdinalPromptLoss()(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, op.OrdinalPromptLoss()(logits.double(), labels).float())


LOGITS, LABELS = torch.zeros(3, 4), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("logits", "labels", "error", "match"),
    [
        (LOGITS, torch.tensor([0, 1, 4]), ValueError, r"labels in 0…3 for 4 ranks, but got 0…4"),
        (LOGITS, torch.tensor([-1, 1, 2]), ValueError, r"got -1…2"),
        (LOGITS, torch.tensor([0.0, 1.0, 2.0]), TypeError, "map your rank values"),
        (LOGITS, torch.tensor([True, False, True]), TypeError, "integer rank indices"),
        (LOGITS, torch.tensor([[0, 1, 2]]), ValueError, "one label for each row"),
        (LOGITS, [0, 1, 2], TypeError, "`labels` to be a tensor, but got list"),
        (LOGITS.numpy(), LABELS, TypeError, "`logits` to be a tensor, but got ndarray"),
        (LOGITS.long(), LABELS, TypeError, "`logits` to be floating point"),
        (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), ValueError, "empty batch"),
    ],
)
def test_bad_batches(logits: Tensor, labels: Tensor, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        op.OrdinalPromptLoss()(logits, labels)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ce_weight": -1}, "`ce_weight`"),
        ({"kl_weight": float("nan")}, "`kl_weight`"),
        ({"label_smoothing": 1.0}, "`label_smoothing`"),
        ({"rank_weights": [1, -1]}, "`rank_weights`"),
        ({"rank_weights": [[1.0]]}, "`rank_weights`"),
    ],
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        op.OrdinalPromptLoss(**options)


def test_rank_weights_must_fit() -> None:
    with pytest.raises(ValueError, match="4 `rank_weights` for 4 ranks, but got 3"):
        op.OrdinalPromptLoss(rank_weights=[1, 1, 1])(LOGITS, LABELS)


def _process(rank: int, sizes: list[int], folder: str) -> None:
    store = dist.FileStore(os.path.join(folder, "store"), len(sizes))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(sizes))
    batch = torch.load(os.path.join(folder, "batch.pt"))
    start = sum(sizes[:rank])
    part = slice(start, start + sizes[rank])
    weight = batch["weight"].clone().requires_grad_()
    terms = op.OrdinalPromptLoss().terms(batch["features"][part] @ weight, batch["labels"][part])
    terms["kl"].backward()
    dist.all_reduce(weight.grad)
    torch.save((terms["kl"].detach(), weight.grad / len(sizes)), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[4, 4], [5, 2, 1]])
def test_processes_see_the_global_batch(sizes: list[int], tmp_path: Any) -> None:
    weight = torch.randn(6, 4, dtype=torch.float64)
    batch = {"weight": weight, "features": torch.randn(8, 6, dtype=torch.float64), "labels": torch.randint(4, (8,))}
    torch.save(batch, tmp_path / "batch.pt")
    torch.multiprocessing.spawn(_process, args=(sizes, str(tmp_path)), nprocs=len(sizes))
    weight = weight.clone().requires_grad_()
    expected = kl_loss(batch["features"] @ weight, batch["labels"])
    expected.backward()
    for rank in range(len(sizes)):
        loss, gradient = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradient, weight.grad)
