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
        (LOGITS, torch.eye(4)[:3] * 2, ValueError, "each summing to one"),
        (LOGITS, torch.eye(4)[:3].long(), ValueError, r"got labels of shape \(3, 4\), torch.int64"),
        (LOGITS, torch.tensor([[0, 1], [2, 1], [1, 1]]), ValueError, "some end before they start"),
        (LOGITS[:, :2], torch.tensor([[0, 1]] * 3), ValueError, "got labels of shape"),  # one-hot, most probably
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


def both(loss: Any, logits: Tensor, *labels: Any) -> tuple[Tensor, Tensor]:
    """The loss and its gradient."""
    logits = logits.clone().requires_grad_()
    value = loss(logits, *labels)
    value.backward()
    assert logits.grad is not None
    return value.detach(), logits.grad


@pytest.mark.parametrize("options", [{}, {"rank_weights": [1.0, 2.0, 0.5, 3.0], "label_smoothing": 0.1}])
def test_one_hot_distributions_ranges_of_one_rank_and_equal_weights_give_the_loss_of_indices(options: Any) -> None:
    logits, labels = 3 * torch.randn(7, 4), torch.randint(4, (7,))
    expected = both(op.OrdinalPromptLoss(**options), logits, labels)
    kinds = (F.one_hot(labels, 4).float(),), (torch.stack([labels, labels], 1),), (labels, torch.full((7,), 3.0))
    for kind in kinds:
        torch.testing.assert_close(both(op.OrdinalPromptLoss(**options), logits, *kind), expected)
    values = torch.tensor([1.0, 1.5, 2.0, 4.0])
    torch.testing.assert_close(
        both(op.OrdinalPromptLoss(**options, rank_values=values), logits, values[labels]), expected
    )


def test_distributions_against_a_loop() -> None:
    logits, votes = torch.randn(5, 4).double(), torch.rand(5, 4).double()
    votes /= votes.sum(1, keepdim=True)
    loss = -sum(votes[i, k] * logits[i].log_softmax(0)[k] for i in range(5) for k in range(4)) / 5
    terms = op.OrdinalPromptLoss().terms(logits, votes)
    torch.testing.assert_close(terms["ce"], loss)
    torch.testing.assert_close(terms["ce"], F.cross_entropy(logits, votes))
    total, weight = torch.zeros(()).double(), 0.0
    for k in range(4):
        target = (10 * votes[:, k]).softmax(0)
        total += votes[:, k].max() * (target * (target.log() - logits[:, k].log_softmax(0))).sum()
        weight += float(votes[:, k].max())
    torch.testing.assert_close(terms["kl"], total / weight)


def test_of_a_range_the_whole_probability_counts() -> None:
    logits, ranges = torch.randn(3, 4), torch.tensor([[0, 1], [2, 2], [0, 3]])
    probs = logits.softmax(1)
    inside = torch.stack([probs[0, :2].sum(), probs[1, 2], torch.ones(())])
    torch.testing.assert_close(cross_entropy_loss(logits, ranges), -inside.log().mean())
    values = op.OrdinalPromptLoss(kl_weight=0, rank_values=[10, 20, 30, 50])
    given = torch.tensor([[10, 20], [30, 30], [10, 50]])
    torch.testing.assert_close(values(logits, given), -inside.log().mean())


@pytest.mark.parametrize("rank_weights", [None, [1.0, 2.0, 0.5, 3.0]])
def test_missing_labels_and_weight_zero_leave_samples_out(rank_weights: Any) -> None:
    logits, labels = 50 * torch.randn(6, 4), torch.tensor([0, -100, 3, 1, -100, 1])
    there = labels >= 0
    expected = op.OrdinalPromptLoss(rank_weights=rank_weights)(logits[there], labels[there])
    loss = op.OrdinalPromptLoss(rank_weights=rank_weights, ignore_index=-100)
    value, gradient = both(loss, logits, labels)
    torch.testing.assert_close(value, expected)
    assert (gradient[~there] == 0).all()
    value, gradient = both(op.OrdinalPromptLoss(rank_weights=rank_weights), logits, labels.clamp(0), there.float())
    torch.testing.assert_close(value, expected)
    assert (gradient[~there] == 0).all()
    value, gradient = both(loss, logits, torch.full((6,), -100))
    assert value == 0
    assert (gradient == 0).all()
    halves = op.OrdinalPromptLoss(ignore_index=-100, rank_values=[0.5, 1, 2, 3])
    torch.testing.assert_close(halves(logits[:2], torch.tensor([1, -100])), halves(logits[:1], torch.tensor([1])))
    with pytest.raises(ValueError, match="got -100…3"):
        op.OrdinalPromptLoss()(logits, labels)


def test_sample_weights_are_those_of_repeated_samples() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    times = torch.tensor([1, 3, 2, 1])
    ce = cross_entropy_loss(logits.repeat_interleave(times, 0), labels.repeat_interleave(times))
    torch.testing.assert_close(cross_entropy_loss(logits, labels, sample_weight=times), ce)
    with pytest.raises(ValueError, match="one finite `sample_weight` for each sample, none negative"):
        op.OrdinalPromptLoss()(logits, labels, -times)


def test_values_are_never_taken_for_indices() -> None:
    loss = op.OrdinalPromptLoss(rank_values=[1, 2, 3, 4])
    torch.testing.assert_close(
        loss(LOGITS, torch.tensor([1, 2, 4])), op.OrdinalPromptLoss()(LOGITS, torch.tensor([0, 1, 3]))
    )
    with pytest.raises(ValueError, match=r"values of ranks, 1 to 4, but got 0 \(1 of 3 labels fit no rank\)"):
        loss(LOGITS, LABELS)
    with pytest.raises(ValueError, match="4 `rank_values` for 4 ranks, but got 3"):
        op.OrdinalPromptLoss(rank_values=[1, 2, 3])(LOGITS, LABELS)
    with pytest.raises(ValueError, match="increasing `rank_values`"):
        op.OrdinalPromptLoss(rank_values=[1, 3, 2])


@pytest.mark.parametrize("sizes", [[4, 4], [5, 3]])
def test_gradient_accumulation_of_transformers_gives_the_loss_of_the_whole_batch(sizes: list[int]) -> None:
    logits, labels = torch.randn(8, 4), torch.randint(4, (8,))
    loss = op.OrdinalPromptLoss(kl_weight=0)
    parts = zip(logits.split(sizes), labels.split(sizes), strict=True)
    total = sum(loss(part, own, num_items_in_batch=torch.tensor(8)) for part, own in parts)
    torch.testing.assert_close(total, loss(logits, labels))

    class Output(dict[str, Tensor]):
        logits = torch.randn(8, 4)

    torch.testing.assert_close(loss(Output(), labels), loss(Output.logits, labels))


def _process(rank: int, sizes: list[int], folder: str) -> None:
    store = dist.FileStore(os.path.join(folder, "store"), len(sizes))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(sizes))
    batch = torch.load(os.path.join(folder, "batch.pt"))
    start = sum(sizes[:rank])
    part = slice(start, start + sizes[rank])
    weight = batch["weight"].clone().requires_grad_()
    loss = op.OrdinalPromptLoss(ignore_index=batch["ignore_index"])
    terms = loss.terms(batch["features"][part] @ weight, batch["labels"][part])
    terms["kl"].backward()
    dist.all_reduce(weight.grad)
    torch.save((terms["kl"].detach(), weight.grad / len(sizes)), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("missing", [[], [2, 6], [4, 5, 6, 7], [*range(8)]])
@pytest.mark.parametrize("sizes", [[4, 4], [5, 2, 1]])
def test_processes_see_the_global_batch(sizes: list[int], missing: list[int], tmp_path: Any) -> None:
    weight = torch.randn(6, 4, dtype=torch.float64)
    labels = torch.randint(4, (8,))
    labels[missing] = -100
    batch = {"weight": weight, "features": torch.randn(8, 6, dtype=torch.float64), "labels": labels}
    torch.save({**batch, "ignore_index": -100 if missing else None}, tmp_path / "batch.pt")
    torch.multiprocessing.spawn(_process, args=(sizes, str(tmp_path)), nprocs=len(sizes))
    weight, there = weight.clone().requires_grad_(), labels >= 0
    expected = kl_loss(batch["features"] @ weight, labels.clamp(0), sample_weight=there.double())
    expected.backward()
    for rank in range(len(sizes)):
        loss, gradient = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradient, weight.grad)
        assert bool(there.any()) or loss == 0


def test_the_trainer_counts_the_numbers_of_all_kinds_of_labels() -> None:
    logits, labels = torch.randn(8, 5), torch.randint(5, (8,))
    loss = op.OrdinalPromptLoss()
    expected = loss(logits, labels)
    for kind in (labels, F.one_hot(labels, 5).float(), torch.stack([labels, labels], 1)):
        items = (kind != -100).sum()  # as transformers counts
        torch.testing.assert_close(loss(logits, kind, num_items_in_batch=items), expected)


def test_missing_distributions_and_values() -> None:
    logits, votes = torch.randn(3, 4), torch.eye(4)[:3]
    expected = op.OrdinalPromptLoss()(logits[:2], votes[:2])
    votes[2] = torch.nan  # no votes, divided by their number
    torch.testing.assert_close(op.OrdinalPromptLoss()(logits, votes, [1, 1, 0]), expected)
    torch.testing.assert_close(op.OrdinalPromptLoss(ignore_index=torch.nan)(logits, votes), expected)
    votes[2] = -100
    torch.testing.assert_close(op.OrdinalPromptLoss(ignore_index=-100)(logits, votes), expected)
    stars = op.OrdinalPromptLoss(rank_values=[1, 2, 3, 4], ignore_index=float("nan"))
    torch.testing.assert_close(stars(logits, torch.tensor([1, 2, torch.nan])), expected)


def test_masked_ranks_that_are_absent_change_nothing() -> None:
    logits, labels = torch.randn(6, 5), torch.arange(6) % 4
    logits[:, 4] = -torch.inf
    value, gradient = both(op.OrdinalPromptLoss(), logits, labels)
    torch.testing.assert_close(value, op.OrdinalPromptLoss()(logits[:, :4], labels))
    assert gradient.isfinite().all()
    value, gradient = both(op.OrdinalPromptLoss(kl_weight=0), logits, F.one_hot(labels, 5).float())
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_values_keep_their_digits() -> None:
    days = [20240101, 20240102, 20240103, 20240104]
    loss = op.OrdinalPromptLoss(rank_values=days).half()
    torch.testing.assert_close(loss(LOGITS, torch.tensor(days[:3])), op.OrdinalPromptLoss()(LOGITS, LABELS))


def test_values_in_half_precision_with_missing_ones_and_in_a_graph() -> None:
    values = [1, 1.1, 1.2, 1.3]
    labels = torch.tensor(values[:3]).half()
    loss = op.OrdinalPromptLoss(rank_values=values, ignore_index=-1)
    torch.testing.assert_close(loss(LOGITS, labels), op.OrdinalPromptLoss()(LOGITS, LABELS))
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(LOGITS, torch.tensor(values[:3])), op.OrdinalPromptLoss()(LOGITS, LABELS))


def test_unusual_but_right() -> None:
    logits = torch.randn(4)
    torch.testing.assert_close(op.OrdinalPromptLoss()(logits, torch.tensor(1)), -logits.log_softmax(0)[1])
    unsigned = op.OrdinalPromptLoss()(LOGITS, LABELS.to(torch.uint16))
    torch.testing.assert_close(unsigned, op.OrdinalPromptLoss()(LOGITS, LABELS))
    assert op.OrdinalPromptLoss()(LOGITS.to("meta"), LABELS.to("meta")).is_meta
    with pytest.warns(UserWarning, match="Expected logits, but got rows .* that sum to one"):
        op.OrdinalPromptLoss()(torch.rand(3, 4).softmax(1), LABELS)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ce_weight": torch.ones(4)}, "`ce_weight` to be a number, but got Tensor; weights of the ranks are"),
        ({"label_smoothing": "0.1"}, "`label_smoothing` to be a number, but got str"),
        ({"kl_weight": None}, "`kl_weight` to be a number, but got NoneType"),
    ],
)
def test_options_that_are_no_numbers(options: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        op.OrdinalPromptLoss(**options)
    with pytest.raises(ValueError, match="one finite `sample_weight`"):
        op.OrdinalPromptLoss()(LOGITS, LABELS, torch.tensor([1, torch.inf, 1]))


def test_gradients_of_each_sample() -> None:
    logits, labels, loss = torch.randn(4, 5), torch.tensor([0, 1, 4, 2]), op.OrdinalPromptLoss()
    each = torch.vmap(torch.func.grad(loss))(logits, labels)
    for row, label, gradient in zip(logits, labels, each, strict=True):
        torch.testing.assert_close(gradient, torch.func.grad(F.cross_entropy)(row, label))


def test_the_squared_distance_that_probability_moves() -> None:
    logits, labels = torch.randn(6, 4).double(), torch.tensor([0, 3, 1, 2, 2, 0])
    loss = op.OrdinalPromptLoss(0, 0, emd_weight=2.0)
    score = op.metrics.ranked_probability_score(logits, labels)
    assert float(loss(logits, labels)) == pytest.approx(2 * score)
    assert {*loss.terms(logits, labels)} == {"ce", "kl", "emd"}
    # by hand: F = (1/2, 3/4, 1), the label's (0, 1, 1)
    golden = op.OrdinalPromptLoss(0, 0, emd_weight=1)(torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([1]))
    assert float(golden) == pytest.approx(1 / 4 + 1 / 16)
    expected = both(loss, logits, labels)
    for kind in (F.one_hot(labels, 4).double(), torch.stack([labels, labels], 1)):
        torch.testing.assert_close(both(loss, logits, kind), expected)
    assert loss(logits, torch.tensor([[0, 3]] * 6)) < 1e-12
    inside, below = torch.tensor([[0.0, 9, 9, 0]]), torch.tensor([[9.0, 0, 0, 0]])
    ranges = torch.tensor([[1, 2]])
    assert loss(inside, ranges) < 0.01 < loss(below, ranges)
    weighted = op.OrdinalPromptLoss(0, 0, emd_weight=2.0, rank_weights=[0.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(weighted(logits, labels), loss(logits[3:5], labels[3:5]))
    torch.testing.assert_close(loss(logits, labels, [0, 0, 0, 1, 1, 0]), loss(logits[3:5], labels[3:5]))
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), [logits.requires_grad_()])


def test_a_rank_that_one_sample_cannot_have_takes_no_part_in_its_kl() -> None:
    logits = LOGITS.clone()
    logits[0, 3], logits[1, 0] = -torch.inf, -torch.inf  # an absent rank, and one that another sample has
    labels = torch.tensor([0, 1, 2])
    logits.requires_grad_()
    loss = op.OrdinalPromptLoss()(logits, labels)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    column = LOGITS[[0, 2], 0]
    target = torch.tensor([10.0, 0.0]).log_softmax(0)
    first = (target.exp() * (target - column.log_softmax(0))).sum()
    others = [kl_loss(LOGITS[:, [k]], torch.where(labels == k, 0, 1), None) for k in (1, 2)]
    torch.testing.assert_close(kl_loss(logits, labels), (first + sum(others)) / 3)


def test_half_a_range_is_a_mistake() -> None:
    loss = op.OrdinalPromptLoss(ignore_index=-100)
    whole = loss(LOGITS, torch.tensor([[0, 1], [-100, -100], [2, 2]]))
    torch.testing.assert_close(whole, op.OrdinalPromptLoss()(LOGITS[[0, 2]], torch.tensor([[0, 1], [2, 2]])))
    with pytest.raises(ValueError, match="both ends of each range"):
        loss(LOGITS, torch.tensor([[0, 1], [-100, 3], [2, 2]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_no_loss(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(256, 6, requires_grad=True), torch.arange(256) % 6
    for target in (labels, torch.stack([labels, labels.clamp(min=4)], dim=1), torch.eye(6)[labels] * 0.5 + 0.5 / 6):
        loss = op.OrdinalPromptLoss(rank_weights=[0.1, 0.3, 1.0, 9.0, 300.0, 3000.0], emd_weight=1.0)
        expected = loss(logits, target)
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(loss(logits, target), expected)


def test_no_label_is_left_out_by_itself() -> None:
    labels = torch.tensor([0, -100, 2])
    with pytest.raises(IndexError, match="out of bounds"):
        cross_entropy_loss(LOGITS, labels)
    loss = torch.compile(op.OrdinalPromptLoss(rank_values=[1, 2, 3, 4]), backend="aot_eager")
    assert loss(LOGITS, torch.tensor([1.0, 2.0, 4.0])).isfinite()
    with pytest.raises((IndexError, RuntimeError)):
        loss(LOGITS, torch.tensor([1.0, torch.nan, 4.0]))


def test_accumulated_batches_without_labels_are_zero() -> None:
    missing = torch.full((3,), -100)
    loss = op.OrdinalPromptLoss(ignore_index=-100)
    assert loss(LOGITS, missing, num_items_in_batch=torch.tensor(0)) == 0
    losses = op.OrdinalPromptLosses({"a": loss})
    assert losses({"a": LOGITS}, {"a": missing}, num_items_in_batch=0) == 0
    with pytest.raises(ValueError, match="ignore_index=-100"):
        op.OrdinalPromptLoss(ignore_index=-1)(LOGITS, torch.tensor([0, -1, 2]), num_items_in_batch=2)
