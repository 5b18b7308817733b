"""Parameters that FSDP shards (`fully_shard`): two processes train as one does, and what they leave is whole."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_clip
from torch import Tensor, nn

import ordinal_prompt as op

FEATURES, LABELS = torch.linspace(-1, 1, 64).reshape(8, 8).sin(), torch.arange(8) % 5
FULLY_SHARD = hasattr(importlib.import_module("torch.distributed.fsdp"), "fully_shard")
KINDS: dict[str, dict[str, Any]] = {
    "learned prompts": {},
    "frozen prompts": {"learn_prompts": False},
    "trained text encoder": {"freeze_text_encoder": False},
    "no context": {"context": 0},
    "sharded text encoder": {"context": 5},
}


def build(options: dict[str, Any]) -> nn.Sequential:
    torch.manual_seed(0)
    options = {"context": 4, "learn_logit_scale": True, "residual": 1.0, "kl_weight": 0, **options}
    head = op.OrdinalPromptHead(tiny_clip(), 5, **options)
    return nn.Sequential(nn.Linear(8, 12), head)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, features: Tensor, labels: Tensor) -> None:
    model[1].loss()(model(features), labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def _same_as_one_process(rank: int, folder: str, kind: str, shard: Callable[[nn.Module, str], None]) -> None:
    one, two = build(KINDS[kind]), build(KINDS[kind])
    two.eval()(FEATURES)  # a head that has been used before
    shard(two, kind)
    first, second = (torch.optim.SGD(model.parameters(), lr=0.05) for model in (one, two))
    for _ in range(3):
        step(one.train(), first, FEATURES, LABELS)
        step(two.train(), second, FEATURES.chunk(2)[rank], LABELS.chunk(2)[rank])
        with torch.no_grad():
            torch.testing.assert_close(two.eval()(FEATURES), one.eval()(FEATURES), atol=1e-4, rtol=0)
    torch.testing.assert_close(two[1].prototypes(), one[1].prototypes(), atol=1e-4, rtol=0)
    inner, logits = one[0](FEATURES), one(FEATURES)
    for layer in (two[1].export(), two[1].export_prototypes()):
        torch.testing.assert_close(layer(inner), logits, atol=1e-4, rtol=0)
    two[1].save_pretrained(os.path.join(folder, "head"))
    loaded = op.OrdinalPromptHead.from_pretrained(os.path.join(folder, "head"), text_encoder=False)
    torch.testing.assert_close(loaded(inner), logits, atol=1e-4, rtol=0)


def _loads_new_weights(kind: str, shard: Callable[[nn.Module, str], None]) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    two, other = build(KINDS[kind]).eval(), build(KINDS[kind]).eval()
    with torch.no_grad():
        other[1].prompt.rank_embeddings.mul_(3)
    shard(two, kind)
    with torch.no_grad():
        two(FEATURES)
    two.reshard()
    set_model_state_dict(two, other.state_dict(), options=StateDictOptions(full_state_dict=True))
    with torch.no_grad():
        torch.testing.assert_close(two(FEATURES), other(FEATURES))


def _process(rank: int, folder: str, whole_model: bool) -> None:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))

    def shard(model: nn.Module, kind: str) -> None:
        if kind == "sharded text encoder":
            fully_shard(model[1].text_encoder, mesh=mesh)
            register_fsdp_forward_method(model[1].text_encoder, "encode")
            assert all(part.to_local().numel() < part.numel() for part in model[1].text_encoder.parameters())
        if not whole_model:
            fully_shard(model[1], mesh=mesh)
        fully_shard(model, mesh=mesh)

    for kind in KINDS:
        _same_as_one_process(rank, folder, kind, shard)
        _loads_new_weights(kind, shard)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not FULLY_SHARD, reason="torch before 2.6 has no fully_shard")
@pytest.mark.parametrize("whole_model", [False, True], ids=["head and model", "model"])
def test_two_sharded_processes_train_save_and_export_as_one_does(whole_model: bool, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, args=(str(tmp_path), whole_model), nprocs=2)


def test_files_of_heads_with_a_scale_without_dimension_load(head: op.OrdinalPromptHead) -> None:
    state = head.state_dict()
    state["logit_scale"] = torch.tensor(2.5)
    model = nn.Sequential(head)
    model.load_state_dict({f"0.{name}": value for name, value in state.items()})
    assert head.logit_scale.tolist() == [2.5]
