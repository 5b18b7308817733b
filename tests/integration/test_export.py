"""Exported heads are plain layers, equal to the head, and need neither CLIP nor this package."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import ordinal_prompt as op

FEATURES = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
FEATURES *= torch.logspace(-6, 4, 64)[:, None]  # raw features of any norm


def heads(clip: Any) -> dict[str, op.OrdinalPromptHead]:
    return {
        "cosine": op.OrdinalPromptHead(clip, 5),
        "bare": op.OrdinalPromptHead(clip, 5, normalize=False),
        "projected": op.OrdinalPromptHead(clip, 5, in_features=12),
        "projected, bare": op.OrdinalPromptHead(clip, 5, in_features=12, normalize=False),
    }


KINDS = ["cosine", "bare", "projected", "projected, bare"]


@pytest.mark.parametrize("kind", KINDS)
def test_export_equals_the_head(kind: str, clip: Any) -> None:
    head = heads(clip)[kind]
    exported = head.export()
    expected = head(FEATURES).detach()
    error = (exported(FEATURES) - expected).abs() / expected.abs().amax(dim=1, keepdim=True).clamp_min(1)
    assert error.max() < 1e-5
    assert exported(torch.zeros(1, 12)).isfinite().all()
    assert all(type(module).__module__.startswith("torch.nn") for module in exported.modules())
    assert not any(parameter.requires_grad for parameter in exported.parameters())
    linear = type(exported) is nn.Linear
    assert linear == (not head.normalize)
    with torch.no_grad():
        head.prompt.rank_embeddings.normal_()
    assert (head(FEATURES) - exported(FEATURES)).abs().max() > 1e-3  # detached: training goes on without it


@pytest.mark.parametrize("normalize", [True, False])
def test_export_prototypes_equals_the_head(normalize: bool, clip: Any) -> None:
    head = op.OrdinalPromptHead(clip, 5, normalize=normalize)
    layer = head.export_prototypes()
    expected = head(FEATURES).detach()
    assert ((layer(FEATURES) - expected).abs() / expected.abs().clamp_min(1)).max() < 1e-5
    assert type(layer) is (op.PrototypeLinear if normalize else nn.Linear)
    assert layer.bias is None
    assert not layer.weight.requires_grad
    torch.testing.assert_close(layer.weight, head.logit_scale.exp() * head.eval().prototypes())
    biased = head.export_prototypes(bias=True)
    nn.Linear(12, 5).load_state_dict(biased.state_dict(), strict=True)
    assert torch.equal(biased(FEATURES), layer(FEATURES))


def test_export_of_a_projected_head_takes_projected_features(clip: Any) -> None:
    head = op.OrdinalPromptHead(clip, 5, in_features=7)
    features = torch.randn(3, 7)
    torch.testing.assert_close(head.export_prototypes()(head.projection(features)), head(features))


@pytest.mark.parametrize("kind", KINDS)
def test_exports_survive_every_road_out(kind: str, clip: Any) -> None:
    head = heads(clip)[kind]
    exported, features = head.export(), torch.randn(4, 12)
    expected = exported(features)
    torch.testing.assert_close(torch.jit.script(exported)(features), expected)
    torch.testing.assert_close(torch.jit.trace(exported, features)(features), expected)
    torch.testing.assert_close(torch.export.export(exported, (features,)).module()(features), expected)
    torch.testing.assert_close(torch.compile(exported, backend="eager", fullgraph=True)(features), expected)


@pytest.mark.parametrize("opset", [None, 17, 18, 20, 22, 23])
@pytest.mark.parametrize("in_features", [None, 7])
def test_onnx_keeps_the_meaning_at_every_opset(opset: int | None, in_features: int | None, clip: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    head = op.OrdinalPromptHead(clip, 5, in_features=in_features).eval()
    features = torch.randn(9, head.in_features)
    features *= torch.tensor([1, 0, 1e-30, 1e-20, 1e-16, 1e-8, 1e-3, 1e8, 1e17])[:, None]
    batch = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.onnx.export(
        head.export(), (features[:2],), dynamo=True, opset_version=opset, dynamic_shapes=batch, verbose=False
    )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: features.numpy()})
    expected = head(features).detach()
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-4, atol=1e-4)


def norm_sums_in_float32() -> bool:
    """Old versions of torch square half precision in half precision, where small numbers vanish."""
    tiny = torch.full((1, 4), 1e-4, dtype=torch.float16)
    return bool((torch.nn.RMSNorm(4, eps=1e-12).half()(tiny) - 1).abs().max() < 0.1)


@pytest.mark.skipif(not norm_sums_in_float32(), reason="this torch's RMSNorm is not exact in half precision")
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_in_half_precision(kind: str, clip: Any) -> None:
    head = heads(clip)[kind].eval()
    features = torch.randn(8, 12) * torch.tensor([1.0, 100.0])[:, None].repeat(4, 1)
    one_hot = 100 * torch.eye(12)
    features = torch.cat([features, one_hot, torch.zeros(1, 12)])
    for dtype in (torch.float16, torch.bfloat16):
        exported = head.export().to(dtype)
        expected = head(features).detach()
        error = (exported(features.to(dtype)).float() - expected).abs() / expected.abs().max()
        assert error.max() < (0.01 if dtype == torch.float16 else 0.05)


def test_exported_prototypes_survive_too(clip: Any) -> None:
    layer, features = op.OrdinalPromptHead(clip, 5).export_prototypes(), torch.randn(4, 12)
    expected = layer(features)
    torch.testing.assert_close(torch.jit.script(layer)(features), expected)
    torch.testing.assert_close(torch.export.export(layer, (features,)).module()(features), expected)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(features), expected)


def test_an_exported_model_loads_without_this_package(clip: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 12), op.OrdinalPromptHead(clip, 5))
    features = torch.randn(3, 6)
    expected = model.eval()(features).detach()
    op.export_heads(model)
    torch.save({"model": model, "features": features, "expected": expected}, tmp_path / "model.pt")
    script = (
        "import sys, torch\n"
        "sys.modules['ordinal_prompt'] = sys.modules['open_clip'] = None\n"
        f"saved = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "torch.testing.assert_close(saved['model'](saved['features']), saved['expected'])\n"
        "assert not any('text' in name for name in saved['model'].state_dict())\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_export_heads_in_place_and_on_a_copy(clip: Any) -> None:
    head = op.OrdinalPromptHead(clip, 5)
    model = nn.ModuleDict({"backbone": nn.Linear(6, 12), "first": head, "same": head})
    features = torch.randn(3, 12)
    expected = head(features).detach()
    copy = op.export_heads(model, inplace=False)
    assert model["first"] is head
    assert copy["first"] is copy["same"]
    assert copy["backbone"] is not model["backbone"]
    assert op.export_heads(model) is model
    for exported in (copy["first"], model["first"], op.export_heads(head), op.export_heads(head, inplace=False)):
        assert not isinstance(exported, op.OrdinalPromptHead)
        torch.testing.assert_close(exported(features), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert buffer.tell() < 20_000  # nothing of the text encoder


def test_export_heads_needs_a_head() -> None:
    with pytest.raises(ValueError, match="OrdinalPromptHead in it, but Linear has none"):
        op.export_heads(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "name", ["prompt.context_embeddings", "prompt.rank_embeddings", "logit_scale", "projection.weight"]
)
def test_export_refuses_what_is_not_finite(name: str, clip: Any) -> None:
    head = op.OrdinalPromptHead(clip, 5, in_features=7)
    with torch.no_grad():
        head.state_dict()[name].fill_(float("nan"))
    with pytest.raises(ValueError, match=f"{name.split('.')[-1]}.*not finite.*lower learning rate"):
        head.export()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_exports_of_other_precisions(dtype: torch.dtype, clip: Any) -> None:
    head = op.OrdinalPromptHead(clip, 5, in_features=7).to(dtype)
    features = torch.randn(3, 7)
    exported = head.export()
    torch.testing.assert_close(exported(features.to(dtype)).float(), head(features.to(dtype)).float(), rtol=0, atol=0.3)


def test_tools_that_trace_quantize_or_script_a_model_are_told_to_export_first(clip: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 7), op.OrdinalPromptHead(clip, 5, in_features=7)).eval()
    quantize: Any = torch.ao.quantization.quantize_dynamic
    with pytest.raises(TypeError, match=r"call op.export_heads\(model\) before you quantize"):
        quantize(model, {nn.Linear})(torch.randn(2, 6))
    with pytest.raises(TypeError, match=r"cannot be traced by torch.fx .* Call op.export_heads\(model\) first"):
        torch.fx.symbolic_trace(model)
    with pytest.raises(TypeError, match=r"cannot be scripted; call op.export_heads"):
        torch.jit.script(model)
    op.export_heads(model)
    torch.jit.script(torch.fx.symbolic_trace(model))
    assert quantize(model, {nn.Linear})(torch.randn(2, 6)).shape == (2, 5)


def test_exports_made_in_inference_mode_and_under_autocast_are_plain(clip: Any) -> None:
    head = op.OrdinalPromptHead(clip, 5, in_features=7).eval()
    expected = head(torch.ones(1, 7))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        layers: Any = head.export()
    assert not any(part.is_inference() for part in layers.parameters())
    torch.testing.assert_close(layers(torch.ones(1, 7)), expected)
    features = torch.ones(1, 7, requires_grad=True)
    layers(features).sum().backward()
    assert (layers.in_features, layers.out_features) == (7, 5)


def test_a_pruned_head_exports_what_it_is_now(clip: Any) -> None:
    head = op.OrdinalPromptHead(clip, 5, residual=1.0).eval()
    prune.l1_unstructured(head, "residual", 0.5)
    with torch.no_grad():
        head.residual_orig.normal_()
    layers = head.export()
    torch.testing.assert_close(layers(torch.ones(1, 12)), head(torch.ones(1, 12)))


def test_a_head_that_accelerate_offloaded_is_refused_until_it_is_back(clip: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(6, 7), op.OrdinalPromptHead(clip, 5, in_features=7)).eval()
    expected = model(torch.ones(2, 6))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for inplace in (True, False):
        with pytest.raises(
            ValueError, match=r"on the meta device, without values\. Load them first; .*remove_hook_from"
        ):
            op.export_heads(model, inplace=inplace)
    torch.testing.assert_close(model(torch.ones(2, 6)), expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    torch.testing.assert_close(op.export_heads(model)(torch.ones(2, 6)), expected)
