"""Every classifier of timm, torchvision and transformers that can be built small takes a head, and comes back whole."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from conftest import tiny_clip
from torch import nn
from transformers.models.auto import modeling_auto

import ordinal_prompt as op
from ordinal_prompt.classifiers import feature_width, find_classifiers

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
K = 4
LARGEST = 40_000_000  # parameters

TIMM_REFUSED = {
    "crossvit": "averages classifiers of different widths",
    "efficientvim": "averages classifiers of different widths",
}
TRANSFORMERS_EXCEPTIONS = {
    "DeiTForImageClassificationWithTeacher": "takes no labels: it is for inference alone",
    "PPLCNetForImageClassification": "returns no loss",
}
SIZES = {
    32: "hidden_size d_model n_embd embedding_size encoder_ffn_dim decoder_ffn_dim image_size",
    2: "num_hidden_layers num_attention_heads num_key_value_heads n_layer n_head encoder_attention_heads"
    " decoder_attention_heads encoder_layers decoder_layers eos_token_id",
    1: "pad_token_id",
    0: "bos_token_id",
    3: "num_labels",
    8: "patch_size",
    16: "head_dim",
    37: "intermediate_size",
    64: "max_position_embeddings",
    99: "vocab_size",
}
SIZE_WORDS = [
    "test_",
    "atto",
    "femto",
    "pico",
    "nano",
    "micro",
    "xxs",
    "tiny",
    "_xs",
    "mini",
    "small",
    "_s",
    "b0",
    "18",
]
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}


def smallest(module: str) -> str | None:
    """The smallest model of a timm module, or one that is nearly so, by the names."""
    sizes: dict[str, int] = {}
    likely = sorted(timm.list_models(module=module), key=lambda name: [word not in name for word in SIZE_WORDS])
    for name in likely[:5]:
        try:
            with torch.device("meta"):
                sizes[name] = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        except Exception:  # whatever cannot be built on the meta device
            continue
    return min(sizes, key=sizes.__getitem__) if sizes else None


def shallow(name: str) -> tuple[Any, dict[str, int]]:
    """A timm model, with two blocks where that is an option of it, and that option."""
    try:
        return timm.create_model(name, depth=2), {"depth": 2}
    except Exception:  # no such option
        return timm.create_model(name), {}


def logits_of(output: Any) -> torch.Tensor:
    output = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    assert output.shape == (2, K)
    return output


def swapped(model: Any, inputs: dict[str, Any]) -> tuple[Any, torch.Tensor]:
    """Trains a step with our head, exports, and returns what the model then says, which the head said too."""
    model.eval()
    found = find_classifiers(model)
    head = op.OrdinalPromptHead(tiny_clip(), K, in_features=feature_width(model, model.get_submodule(found[0])))
    op.replace_head(model, head).train()
    output = model(**inputs)
    loss = getattr(output, "loss", None)
    loss = head.loss()(logits_of(output), torch.tensor([0, K - 1])) if loss is None else loss
    loss.backward()
    assert head.prompt.rank_embeddings.grad is not None
    model.zero_grad()
    with torch.no_grad():
        expected = logits_of(model.eval()(**inputs))
        exported = logits_of(op.export_heads(model)(**inputs))
    torch.testing.assert_close(exported, expected, rtol=1e-3, atol=1e-3)
    return model, exported


@torch.no_grad()
def assert_same(model: Any, inputs: dict[str, Any], expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits_of(model(**inputs)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("module", timm.list_modules())
def test_timm(module: str, tmp_path: Path) -> None:
    name = smallest(module)
    if name is None:
        pytest.skip("holds no models")
    model, options = shallow(name)
    inputs = {"x": torch.randn(2, *model.pretrained_cfg["input_size"])}
    for size in (model.pretrained_cfg.get("min_input_size"), (3, 128, 128)):
        try:
            with torch.no_grad():
                model.eval()(torch.randn(2, *size))
            inputs = {"x": torch.randn(2, *size)}
            break
        except Exception:  # a size that the model does not take
            continue
    key = next(iter(inspect.signature(model.forward).parameters))
    inputs = {key: inputs["x"]}
    if module in TIMM_REFUSED:
        with pytest.raises(ValueError, match="one head cannot take them all"):
            op.replace_head(model, nn.Linear(128, K))
        return
    model, expected = swapped(model, inputs)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert_same(op.load_exported(timm.create_model(name, **options), tmp_path / "model.pt"), inputs, expected)
    with pytest.raises(RuntimeError):
        timm.create_model(name, num_classes=K, checkpoint_path=str(tmp_path / "model.pt"), **options)


def test_timm_exceptions_are_few() -> None:
    assert len(TIMM_REFUSED) <= 3


def torchvision_families() -> Iterator[str]:
    families: dict[str, str] = {}
    for module in (torchvision.models, torchvision.models.video):
        for name in torchvision.models.list_models(module=module):
            families.setdefault(torchvision.models.get_model_builder(name).__module__, name)
    yield from families.values()


@pytest.mark.parametrize("name", torchvision_families())
def test_torchvision(name: str) -> None:
    def make() -> Any:
        return torchvision.models.get_model(name, weights=None)

    shape: tuple[int, ...] = (3, 96, 96)
    module = torchvision.models.get_model_builder(name).__module__
    if "video" in module:
        shape = (3, 16, 224, 224) if "mvit" in name or "s3d" in name else (3, 8, 112, 112)
    elif "inception" in name:
        shape = (3, 299, 299)
    elif "vit" in name or "maxvit" in name or "swin" in name:
        shape = (3, 224, 224)
    model = make()
    inputs = {next(iter(inspect.signature(model.forward).parameters)): torch.randn(2, *shape)}
    model, expected = swapped(model, inputs)
    assert_same(op.load_exported(make(), model.state_dict()), inputs, expected)


def classifiers_of_transformers() -> Iterator[str]:
    kinds = ("IMAGE", "SEQUENCE", "AUDIO", "VIDEO")
    for kind in kinds:
        for names in getattr(modeling_auto, f"MODEL_FOR_{kind}_CLASSIFICATION_MAPPING_NAMES").values():
            yield from [names] if isinstance(names, str) else names


def small_model(name: str) -> tuple[Any, Any]:
    """A small model and its configuration, where the common names of sizes are enough to build one."""
    cls = getattr(transformers, name)
    plain = cls.config_class()
    options = {key: value for key, value in SMALL.items() if isinstance(getattr(plain, key, None), (int, type(None)))}
    options = {key: value for key, value in options.items() if hasattr(plain, key)}
    try:
        config = cls.config_class(**options)
    except Exception:
        config = cls.config_class()
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > LARGEST:
        raise ValueError("too large")
    return cls(config).eval(), config


def inputs_of(model: Any, config: Any) -> dict[str, Any]:
    name = model.main_input_name
    if name == "input_ids":
        ids = torch.randint(3, 90, (2, 12))
        ids[:, -1] = 2
        return {name: ids}
    if name == "pixel_values":
        size = getattr(config, "image_size", None) or 64
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        frames = [config.num_frames] if "Video" in type(model).__name__ or "Timesformer" in type(model).__name__ else []
        return {name: torch.randn(2, *frames, getattr(config, "num_channels", 3), height, width)}
    return {name: torch.randn(2, 16000)}


@pytest.mark.parametrize("name", classifiers_of_transformers())
def test_transformers(name: str, tmp_path: Path) -> None:
    if name in TRANSFORMERS_EXCEPTIONS:
        pytest.skip(TRANSFORMERS_EXCEPTIONS[name])
    try:
        model, config = small_model(name)
        inputs = inputs_of(model, config)
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        pytest.skip(f"cannot be built small by the common names of sizes: {type(error).__name__}")
    cls = type(model)
    model, expected = swapped(model, {**inputs, "labels": torch.tensor([0, K - 1])})
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        cls.from_pretrained(tmp_path)
    fresh = cls(cls.config_class.from_pretrained(tmp_path))
    assert_same(op.load_exported(fresh, tmp_path), inputs, expected)
