"""How far is what is left of a head from the head itself?  Prints the table of the export guide (docs/export.md).

    python benchmarks/export/differences.py

A head of 101 ranks on a text encoder with random weights, 512 wide, logits that are 100 times the cosine as CLIP's, and
2,000 random features with norms from 1e-3 to 1e3 (of norm one where the head does not bring them to it, and in half
precision).  Differences are in logits, and in decoded ranks (the expectation); each is the largest of all samples.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

import ordinal_prompt as op

RANKS, WIDTH, OTHER_WIDTH, SAMPLES = 101, 512, 768, 2000
Forward = Callable[[Tensor], Tensor]


def build(**options: Any) -> op.OrdinalPromptHead:
    """A head with everything in it that can be learned moved away from its start."""
    torch.manual_seed(0)
    text = open_clip.transformer.TextTransformer(width=64, heads=2, layers=2, output_dim=WIDTH)
    head = op.OrdinalPromptHead(text, RANKS, logit_scale=math.log(100), **options).eval()
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name != "logit_scale":
                parameter.add_(0.01 * torch.randn_like(parameter))
    return head.requires_grad_(False)


def features(width: int) -> Tensor:
    """Of many norms."""
    generator = torch.Generator().manual_seed(1)
    unit = nn.functional.normalize(torch.randn(SAMPLES, width, generator=generator), dim=1)
    return unit * torch.logspace(-3, 3, SAMPLES)[:, None]


def difference(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest difference of logits (N, K), and that of decoded ranks."""
    of_logits = (found.float() - expected).abs()
    of_ranks = (op.decode(found.float()) - op.decode(expected)).abs()
    return float(of_logits.max()), float(of_ranks.max())


def by_onnx(layers: nn.Module, x: Tensor) -> Tensor:
    import onnxruntime

    batch = ({0: torch.export.Dim.DYNAMIC},)
    program: Any = torch.onnx.export(layers, (x[:2],), dynamo=True, dynamic_shapes=batch, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    return torch.as_tensor(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def by_torch_export(layers: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = torch.export.export(layers, (x,)).module()(x)
    return found


def saved(head: op.OrdinalPromptHead, x: Tensor) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        head.save_pretrained(folder)
        found: Tensor = op.OrdinalPromptHead.from_pretrained(folder, text_encoder=False)(x)
    return found


def reloaded(head: op.OrdinalPromptHead, x: Tensor) -> Tensor:
    """Through a state dict on disk, into a model of the architecture that the head was put into."""
    model = op.export_heads(op.replace_head(nn.Sequential(nn.Linear(head.in_features, 5)), head))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder) / "model.pt")
        fresh = nn.Sequential(nn.Linear(head.in_features, 5))
        found: Tensor = op.load_exported(fresh, Path(folder) / "model.pt")(x)
    return found


def quantized(layers: nn.Module, x: Tensor) -> Tensor:
    quantize: Any = torch.ao.quantization.quantize_dynamic
    found: Tensor = quantize(layers, {nn.Linear})(x)
    return found


def in_precision(dtype: torch.dtype) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(layers: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = layers.to(dtype)(nn.functional.normalize(x, dim=1).to(dtype))
        return found

    return run


def measure() -> dict[str, tuple[float, float]]:
    """What is left → its differences."""
    paper = build()
    recipe = build(**op.recipe(RANKS))
    projected = build(in_features=OTHER_WIDTH)
    bare = build(in_features=OTHER_WIDTH, normalize=False)
    x, other = features(WIDTH), features(OTHER_WIDTH)
    unit = nn.functional.normalize(other, dim=1)  # without normalize, logits grow with the features
    calibration = op.Calibration(1.7, tuple(torch.linspace(-1, 1, RANKS).tolist()))
    rows: dict[str, tuple[Tensor, Tensor]] = {
        "`head.export_prototypes()`": (paper.export_prototypes()(x), paper(x)),
        "`head.export()`": (paper.export()(x), paper(x)),
        "`head.export()`, our recipe": (recipe.export()(x), recipe(x)),
        "`head.export()`, `in_features=`": (projected.export()(other), projected(other)),
        "`head.export()`, `in_features=`, `normalize=False`": (bare.export()(unit), bare(unit)),
        "`op.load_exported` of a state dict": (reloaded(paper, x), paper(x)),
        "`from_pretrained(folder, text_encoder=False)`": (saved(paper, x), paper(x)),
        "`calibration.fold(head.export())`": (calibration.fold(paper.export())(x), calibration(paper(x))),
        "`torch.export` of the export": (by_torch_export(paper.export(), x), paper(x)),
        "TorchScript of the export": (torch.jit.script(paper.export())(x), paper(x)),
        "ONNX Runtime, of the export": (by_onnx(paper.export(), x), paper(x)),
        "`head.export().half()`": (in_precision(torch.float16)(paper.export(), x), paper(x)),
        "`head.export().bfloat16()`": (in_precision(torch.bfloat16)(paper.export(), x), paper(x)),
        "int8 weights (`quantize_dynamic`)": (quantized(paper.export(), x), paper(x)),
    }
    return {name: difference(*row) for name, row in rows.items()}


def main() -> None:
    warnings.filterwarnings("ignore")
    print("| what is left | logits | decoded ranks |\n|---|---:|---:|")
    for name, (of_logits, of_ranks) in measure().items():
        print(f"| {name} | {of_logits:.0e} | {of_ranks:.0e} |")


if __name__ == "__main__":
    main()
