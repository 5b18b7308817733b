"""Exported models come back whole from what other libraries save, or are refused; never with a fresh classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from conftest import tiny_clip
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

import ordinal_prompt as op

VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit(**options: Any) -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VIT, image_size=32, **options)).eval()


def exported(model: Any, clip: Any, width: int, **options: Any) -> tuple[Any, torch.Tensor]:
    op.replace_head(model, op.OrdinalPromptHead(clip, 5, in_features=width, **options))
    logits = model.eval()(IMAGES)
    op.export_heads(model)
    return model, getattr(logits, "logits", logits).detach()


def test_transformers_refuses_the_folder_and_load_exported_takes_it(clip: Any, tmp_path: Path) -> None:
    model, expected = exported(vit(), clip, 16)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"classifier.weight|mismatch"):
        transformers.ViTForImageClassification.from_pretrained(tmp_path)
    fresh = transformers.ViTForImageClassification(transformers.ViTConfig.from_pretrained(tmp_path))
    loaded = op.load_exported(fresh, tmp_path)
    assert loaded is fresh
    torch.testing.assert_close(loaded(IMAGES).logits, expected)
    loaded = op.load_exported(vit(num_labels=1000), tmp_path)
    torch.testing.assert_close(loaded(IMAGES).logits, expected)
    assert loaded.config.num_labels == 5


def test_a_head_that_is_one_linear_map_needs_nothing_of_ours(clip: Any, tmp_path: Path) -> None:
    model, expected = exported(vit(), clip, 16, normalize=False)
    model.save_pretrained(tmp_path)
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(IMAGES).logits, expected)
    torch.testing.assert_close(op.load_exported(vit(num_labels=7), tmp_path)(IMAGES).logits, expected)


class Small(nn.Module, PyTorchModelHubMixin):
    def __init__(self, bias: bool = True, num_classes: int = 5) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(12, num_classes, bias=bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.pool(images).flatten(1))
        return logits


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"normalize": False, "residual": 1.0}])
def test_hub_mixin_models(bias: bool, options: dict[str, Any], clip: Any, tmp_path: Path) -> None:
    model = Small(bias=bias)
    head = op.OrdinalPromptHead(clip, 5, **options)
    op.replace_head(model, head)
    if head.residual_bias is not None:
        nn.init.normal_(head.residual_bias)
    expected = model.eval()(IMAGES).detach()
    op.export_heads(model)
    model.save_pretrained(tmp_path, config={"bias": bias})
    fits = head.residual_bias is None or bias
    if options and fits:  # the linear layer takes it whole
        torch.testing.assert_close(Small.from_pretrained(tmp_path)(IMAGES), expected)
    else:
        with pytest.raises(RuntimeError, match="size mismatch for fc.weight"):
            Small.from_pretrained(tmp_path)
    torch.testing.assert_close(op.load_exported(Small(bias=bias, num_classes=9), tmp_path)(IMAGES), expected)


def test_timm_checkpoints(clip: Any, tmp_path: Path) -> None:
    model, expected = exported(timm.create_model("resnet18"), clip, 512)
    file = tmp_path / "model.pt"
    torch.save(model.state_dict(), file)
    with pytest.raises(RuntimeError, match="fc"):
        timm.create_model("resnet18", num_classes=5, checkpoint_path=str(file))
    torch.testing.assert_close(op.load_exported(timm.create_model("resnet18"), file)(IMAGES), expected)
    torch.save({"state_dict": model.state_dict()}, file)
    torch.testing.assert_close(op.load_exported(timm.create_model("resnet18"), file)(IMAGES), expected)


def test_a_state_dict_is_refused_by_the_linear_layer_even_where_it_need_not_be_complete(clip: Any) -> None:
    model, _ = exported(Small(), clip, 12)
    with pytest.raises(RuntimeError, match="size mismatch for fc.weight"):
        Small().load_state_dict(model.state_dict(), strict=False)


def test_wrong_sources(clip: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Found no weights in"):
        op.load_exported(Small(), tmp_path)
    model, _ = exported(Small(), clip, 12)
    with pytest.raises(ValueError, match="exported head at fc, but Conv2d has no fc"):
        op.load_exported(nn.Conv2d(1, 1, 1), model.state_dict())
    state = {**model.state_dict(), "more": torch.ones(1)}
    with pytest.raises(ValueError, match="do not fit Small: more unknown"):
        op.load_exported(Small(), state)
    large, _ = exported(timm.create_model("resnet18"), clip, 512)
    state = large.state_dict()
    del state["layer1.0.conv1.weight"]
    with pytest.raises(ValueError, match="do not fit ResNet: layer1.0.conv1.weight missing. Pass"):
        op.load_exported(timm.create_model("resnet18"), state)


@pytest.mark.parametrize("wrap", ["state_dict", "model", "prefix", "compiled", "both", "mapping"])
def test_checkpoints_as_people_keep_them(wrap: str, tmp_path: Path) -> None:
    model = nn.Sequential()
    model.body, model.fc = nn.Linear(12, 12), nn.Linear(12, 5)
    op.replace_head(model, op.OrdinalPromptHead(tiny_clip(), 5).eval())
    op.export_heads(model)
    expected, state = model(torch.ones(2, 12)), model.state_dict()
    saved: Any = {
        "state_dict": {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}, "epoch": 3},
        "model": {"model": state, "epoch": 3},
        "prefix": {f"module.{name}": tensor for name, tensor in state.items()},
        "both": {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()},
        "compiled": {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        "mapping": {"model_state_dict": state, "epoch": 3},
    }[wrap]
    fresh = nn.Sequential()
    fresh.body, fresh.fc = nn.Linear(12, 12), nn.Linear(12, 3)
    if wrap != "mapping":
        torch.save(saved, tmp_path / "last.pt")
        saved = tmp_path / "last.pt"
    fresh = fresh.double()
    loaded = op.load_exported(fresh, saved)
    torch.testing.assert_close(loaded(torch.ones(2, 12).double()).float(), expected)


def test_files_of_other_things(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(ValueError, match=r"holds more than tensors .*pass its state_dict\(\)"):
        op.load_exported(nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(ValueError, match="got no tensors among epoch"):
        op.load_exported(nn.Linear(2, 2), {"epoch": 3})


def test_folders_that_are_not_what_they_should_be(clip: Any, tmp_path: Path) -> None:
    small: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 30}

    def build(layers: int = 1, **changes: Any) -> Any:
        config = transformers.BertConfig(**{**small, **changes}, num_hidden_layers=layers)
        return transformers.BertForSequenceClassification(config)

    model = build()
    op.replace_head(model, op.OrdinalPromptHead(clip, 5, in_features=8).eval())
    model.save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match="these hold a prompt head"):
        op.load_exported(build(), tmp_path / "head")
    op.export_heads(model)
    model.save_pretrained(tmp_path / "exported")
    model.bert.save_pretrained(tmp_path / "bare")
    for fresh, folder, what in (
        (build(2), "exported", "missing"),
        (build(1, intermediate_size=12), "exported", "of another size"),
        (build(), "bare", "missing"),
    ):
        with pytest.raises(ValueError, match=f"do not fit BertForSequenceClassification: .* {what}"):
            op.load_exported(fresh, tmp_path / folder)
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(op.load_exported(build(), tmp_path / "exported")(ids).logits, model.eval()(ids).logits)


def test_a_lightning_module_that_holds_the_head_twice(tmp_path: Path) -> None:
    module = nn.Module()
    module.model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 5))
    module.head = op.OrdinalPromptHead(tiny_clip(), 5).eval()
    op.replace_head(module.model, module.head)
    op.export_heads(module)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "last.ckpt")
    fresh = op.load_exported(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 5)), tmp_path / "last.ckpt")
    torch.testing.assert_close(fresh(torch.ones(1, 12)), module.model(torch.ones(1, 12)))
