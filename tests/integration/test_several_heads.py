"""Several heads inside of models, and over several processes."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from attribute_setup import OPTIONS, build, labels
from conftest import tiny_clip
from torch import nn

import ordinal_prompt as op


def test_inside_a_model_until_plain_layers_are_left(clip: Any, tmp_path: Path) -> None:
    model = torchvision.models.resnet18(weights=None).eval()
    options = {"in_features": 512, "normalize": False}
    heads = op.OrdinalPromptHeads(
        {"skin type": op.OrdinalPromptHead(clip, 5, in_features=512), "age": op.OrdinalPromptHead(clip, 9, **options)}
    )
    assert op.replace_head(model, heads) is model
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    copied = op.export_heads(model, inplace=False)
    assert isinstance(model.fc, op.OrdinalPromptHeads)
    exported = op.export_heads(model)
    assert isinstance(heads["age"], op.OrdinalPromptHead)  # the caller's own stay what they are
    assert not any(type(module).__module__.startswith("ordinal_prompt") for module in exported.modules())
    for plain in (copied, exported, pickle.loads(pickle.dumps(exported))):
        found = plain(images)
        assert list(found) == ["skin type", "age"]
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
    torch.save(exported, tmp_path / "model.pt")
    torch.save((images, expected), tmp_path / "expected.pt")
    script = (
        "import sys, torch; sys.modules['ordinal_prompt'] = sys.modules['open_clip'] = None\n"
        "model = torch.load('model.pt', weights_only=False); images, expected = torch.load('expected.pt')\n"
        "for name, logits in model(images).items(): torch.testing.assert_close(logits, expected[name], rtol=1e-4, "
        "atol=1e-4)"
    )
    environment = {**os.environ, "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=environment)
    program = torch.export.export(exported, (images,))
    torch.testing.assert_close(program.module()(images)["age"], expected["age"], rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="Missing key"):  # refused, and not started anew in silence
        torchvision.models.resnet18(weights=None).load_state_dict(exported.state_dict())
    again = op.load_exported(torchvision.models.resnet18(weights=None), exported.state_dict())
    assert list(again(images)) == ["skin type", "age"]
    for name, logits in again(images).items():
        torch.testing.assert_close(logits, exported(images)[name])
    op.replace_head(exported, nn.Linear(512, 4))
    assert exported(images).shape == (2, 4)


def test_heads_are_found_where_they_replaced_a_classifier(clip: Any) -> None:
    model = torchvision.models.resnet18(weights=None)
    heads = op.OrdinalPromptHeads({"age": op.OrdinalPromptHead(clip, 5, in_features=512)})
    op.replace_head(model, heads)
    other = op.OrdinalPromptHead(clip, 4, in_features=512)
    assert op.replace_head(model, other).fc is other


@pytest.mark.slow
def test_compiled_it_gives_the_same(clip: Any) -> None:
    heads = op.OrdinalPromptHeads(build(clip))
    compiled = torch.compile(heads, backend="eager")
    features = torch.randn(2, 7)
    expected, found = heads(features), compiled(features)
    for name in heads:
        torch.testing.assert_close(found[name], expected[name])
    heads.eval()
    torch.testing.assert_close(compiled(features), heads(features))


def _sharded(rank: int, folder: str, whole: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(folder, 2), rank=rank, world_size=2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    torch.manual_seed(3)
    text = tiny_clip()
    names = [name for name in OPTIONS if OPTIONS[name]["context"]]  # empty tensors cannot be sharded
    one, two = (op.OrdinalPromptHeads({name: build(text)[name] for name in names}) for _ in range(2))
    for module in [two] if whole else two.heads.values():
        fully_shard(module, mesh=mesh)
    features, given = torch.linspace(-1, 1, 56).reshape(8, 7).sin(), labels()
    optimizers = [torch.optim.SGD(heads.parameters(), lr=0.05) for heads in (one, two)]
    rows = slice(4 * rank, 4 * rank + 4)
    for _ in range(3):
        for heads, optimizer, part in zip((one, two), optimizers, (slice(None), rows), strict=True):
            optimizer.zero_grad()
            chosen = {name: indices[part] for name, indices in given.items() if name in names}
            heads.train().loss(kl_weight=0)(heads(features[part]), chosen).backward()
            optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(two.eval()(features), one.eval()(features), atol=1e-4, rtol=0)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "fully_shard"), reason="this torch has no fully_shard")
@pytest.mark.parametrize("whole", [True, False], ids=["together", "each head"])
def test_sharded_heads_learn_what_whole_ones_learn(whole: bool, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_sharded, args=(str(tmp_path / "store"), whole), nprocs=2)


SCRIPT = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, {tests!r})
from conftest import tiny_clip
import ordinal_prompt as op

rank, world = int(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
text = tiny_clip()
torch.manual_seed(1)
heads = op.OrdinalPromptHeads({{"a": op.OrdinalPromptHead(text, 5), "b": op.OrdinalPromptHead(text, 3)}})
loss, optimizer = heads.loss({{"b": 0.5}}), torch.optim.SGD(heads.parameters(), lr=0.1)
torch.manual_seed(2)
features, a, b = torch.randn(8, 12), torch.randint(5, (8,)), torch.randint(3, (8,))
part = slice(None)
model = heads
if world > 1:
    dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=world)
    part = slice(4 * rank, 4 * rank + 4)
    model = DistributedDataParallel(heads)
for step in range(3):
    optimizer.zero_grad()
    loss(model(features[part]), {{"a": a[part], "b": b[part]}}).backward()
    optimizer.step()
if rank == 0:
    torch.save([parameter.detach() for parameter in heads.parameters()], sys.argv[4])
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]))
    results = []
    for world in (1, 2):
        out = str(tmp_path / f"{world}.pt")
        arguments = [
            [sys.executable, "-c", script, str(r), str(world), str(tmp_path / "store"), out] for r in range(world)
        ]
        processes = [subprocess.Popen(argument) for argument in arguments]
        assert [process.wait(timeout=300) for process in processes] == [0] * world
        results.append(torch.load(out))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
