"""Gradient accumulation with one text pass for each optimizer step, in the loops that people have."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import count_text_passes, tiny_clip
from torch import Tensor, nn

import ordinal_prompt as op

PARTS = 3
FEATURES, LABELS = torch.linspace(-1, 1, 12 * 8).reshape(12, 8).sin(), torch.arange(12) % 5
BATCHES = [*zip(FEATURES.chunk(PARTS), LABELS.chunk(PARTS), strict=True)]


def build(**options: Any) -> tuple[nn.Module, op.OrdinalPromptHead, list[int]]:
    """A model, its head, and a list that grows by one with each text pass."""
    torch.manual_seed(0)
    head = op.OrdinalPromptHead(tiny_clip(), 5, context=4, learn_logit_scale=True, in_features=16, **options)
    return nn.Sequential(nn.Linear(8, 16), head), head, count_text_passes(head)


def accumulate(model: nn.Module, head: op.OrdinalPromptHead) -> None:
    for features, labels in BATCHES:
        (head.loss()(model(features), labels) / PARTS).backward()


@pytest.mark.parametrize("freeze", [True, False], ids=["frozen text encoder", "trained text encoder"])
def test_gradients_are_those_of_a_text_pass_for_each_batch(freeze: bool) -> None:
    model, head, passes = build(freeze_text_encoder=freeze)
    accumulate(model, head)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    passes.clear()
    with head.reuse_prototypes():
        accumulate(model, head)
    assert len(passes) == 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)
    assert head.prompt.context_embeddings.grad.abs().sum() > 0


def test_behind_the_block_prototypes_are_computed_anew() -> None:
    model, head, passes = build()
    for _ in range(2):
        with head.reuse_prototypes(), head.reuse_prototypes():  # one in another is one
            accumulate(model, head)
        with torch.no_grad():
            head.prompt.rank_embeddings.mul_(2)
    accumulate(model, head)
    assert len(passes) == 2 + PARTS


@pytest.mark.parametrize("at", ["the next batch", "the end"])
def test_a_step_within_the_block_is_refused(at: str) -> None:
    model, head, _ = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def too_early() -> None:
        with head.reuse_prototypes():
            accumulate(model, head)
            head.prompt.rank_embeddings.grad = torch.ones_like(head.prompt.rank_embeddings)
            optimizer.step()
            if at == "the next batch":
                accumulate(model, head)

    with pytest.raises(RuntimeError, match="step the optimizer behind the block"):
        too_early()
    accumulate(model, head)  # and nothing of the block is left


def test_an_error_within_the_block_goes_through() -> None:
    model, head, _ = build()
    with pytest.raises(KeyError), head.reuse_prototypes():
        raise KeyError
    accumulate(model, head)
    assert head.prompt.rank_embeddings.grad is not None


def test_without_gradients_the_block_does_nothing() -> None:
    model, head, passes = build()
    for context in (torch.no_grad(), contextlib.nullcontext(head.eval())):
        with context, head.reuse_prototypes():
            for features, _ in BATCHES:
                assert model(features).shape == (4, 5)
    assert len(passes) == 1


def test_compiled_models_reuse_prototypes() -> None:
    model, head, passes = build()
    accumulate(model, head)
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    passes.clear()
    with head.reuse_prototypes():
        accumulate(compiled, head)
    assert len(passes) == 1
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def after_steps(reuse: bool) -> tuple[list[Tensor], int]:
    """The reference: two optimizer steps of PARTS batches each, in a plain loop."""
    model, head, passes = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        with head.reuse_prototypes() if reuse else contextlib.nullcontext():
            accumulate(model, head)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()], len(passes)


def test_accelerate_with_one_text_pass_for_each_step() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=PARTS, cpu=True)
    model, head, passes = build()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    reuse = contextlib.ExitStack()
    for i, (features, labels) in enumerate(BATCHES * 2):
        with accelerator.accumulate(model):
            if i % PARTS == 0:
                reuse.enter_context(head.reuse_prototypes())
            accelerator.backward(head.loss()(model(features), labels))
            if accelerator.sync_gradients:
                reuse.close()
            optimizer.step()
            optimizer.zero_grad()
    expected, _ = after_steps(reuse=False)
    assert len(passes) == 2
    torch.testing.assert_close([parameter.detach() for parameter in model.parameters()], expected)


def test_lightning_with_one_text_pass_for_each_step(tmp_path: Path) -> None:
    lightning: Any = pytest.importorskip("lightning")
    torch_model, head, passes = build()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.reuse = torch_model, contextlib.ExitStack()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
            if batch_idx % PARTS == 0:
                self.reuse.enter_context(head.reuse_prototypes())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ARG002
            return head.loss()(self.model(batch[0]), batch[1])

        def on_after_backward(self) -> None:
            if (self.trainer.fit_loop.batch_idx + 1) % PARTS == 0:
                self.reuse.close()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    trainer = lightning.Trainer(
        max_epochs=2, accumulate_grad_batches=PARTS, accelerator="cpu", default_root_dir=tmp_path, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(BATCHES, batch_size=None))
    expected, _ = after_steps(reuse=False)
    assert len(passes) == 2
    torch.testing.assert_close([parameter.detach() for parameter in torch_model.parameters()], expected)


def _process(rank: int, folder: str) -> None:
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for reuse in (False, True):
        model, head, _ = build()
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            with head.reuse_prototypes() if reuse else contextlib.nullcontext():
                for i, (features, labels) in enumerate(BATCHES):
                    with parallel.no_sync() if i < PARTS - 1 else contextlib.nullcontext():
                        (head.loss()(parallel(features[rank::2]), labels[rank::2]) / PARTS).backward()
            optimizer.step()
        torch.save(model.state_dict(), os.path.join(folder, f"{rank}-{reuse}.pt"))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_one_text_pass_for_each_step(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, args=(str(tmp_path),), nprocs=2)
    first, *others = (torch.load(tmp_path / f"{rank}-{reuse}.pt") for reuse in (False, True) for rank in range(2))
    for other in others:
        torch.testing.assert_close(other, first)


def test_gradients_behind_the_block_do_not_vanish_in_silence() -> None:
    head = op.OrdinalPromptHead(tiny_clip(), 5)
    with pytest.warns(UserWarning, match=r"call backward\(\) inside the block"), head.reuse_prototypes():
        loss = head(torch.randn(2, 12)).sum()
    loss.backward()


def test_a_copy_made_inside_the_block_learns() -> None:
    head = op.OrdinalPromptHead(tiny_clip(), 5)
    with head.reuse_prototypes():
        head(torch.randn(2, 12)).sum().backward()
        copies = copy.deepcopy(head), pickle.loads(pickle.dumps(head))
    for copied in copies:
        copied.zero_grad()
        copied(torch.randn(2, 12)).sum().backward()
        assert copied.prompt.rank_embeddings.grad is not None
