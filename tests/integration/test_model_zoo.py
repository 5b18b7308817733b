"""Every classifier of timm, torchvision and transformers that can be built small takes a head, and comes back whole."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
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
LARGEST = 70_000_000  # parameters

TIMM_REFUSED = {
    "crossvit": "averages classifiers of different widths",
    "efficientvim": "averages classifiers of different widths",
}
TRANSFORMERS_EXCEPTIONS = {
    "DeiTForImageClassificationWithTeacher": "takes no labels: it is for inference alone",
    "PPLCNetForImageClassification": "returns no loss",
}
LITTLE = ["test_", "atto", "femto", "pico", "nano", "micro", "xxs", "tiny", "_xs", "mini", "small", "_s", "b0", "18"]
SIZES = {
    1: "pad_token_id num_self_attends_per_block num_blocks n_group topk_group first_k_dense_replace",
    2: "num_hidden_layers num_attention_heads num_key_value_heads n_layer n_head encoder_attention_heads num_layers"
    " decoder_attention_heads encoder_layers decoder_layers eos_token_id num_heads num_experts_per_tok"
    " num_decoder_layers",
    0: "bos_token_id",
    3: "num_labels",
    4: "num_experts num_local_experts n_routed_experts num_latents",
    8: "patch_size qk_rope_head_dim qk_nope_head_dim kv_lora_rank q_lora_rank rotary_dim linear_num_key_heads"
    " linear_num_value_heads",
    16: "head_dim d_kv v_head_dim global_head_dim linear_key_head_dim linear_value_head_dim",
    32: "hidden_size d_model n_embd embedding_size encoder_ffn_dim decoder_ffn_dim image_size intermediate_size d_ff"
    " moe_intermediate_size shared_expert_intermediate_size d_latents",
    64: "max_position_embeddings",
    99: "vocab_size",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
# What the common names of sizes do not say; None leaves an option at its default.
OPTIONS: dict[str, dict[str, Any]] = {
    "AST": {"num_mel_bins": 16, "max_length": 24, "frequency_stride": 8, "time_stride": 8},
    "AXK1": {"head_dim": 8},
    "DeepseekV3": {"head_dim": 8},
    "EfficientNet": {"image_size": 64},
    "Falcon": {"head_dim": None},
    "Funnel": {"num_blocks": None, "num_hidden_layers": None, "block_sizes": [1, 1]},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "Jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "layer_types": None},
    "LayoutLMv3": {"coordinate_size": 6, "shape_size": 4},
    "Lilt": {"hidden_size": 24},
    "Luke": {"entity_vocab_size": 10, "entity_emb_size": 8},
    "Perceiver": {"num_self_attention_heads": 1, "num_cross_attention_heads": 1, "image_size": 16},
    "Reformer": {
        "axial_pos_shape": (3, 4),
        "axial_pos_embds_dim": (16, 16),
        "lsh_attn_chunk_length": 6,
        "local_attn_chunk_length": 6,
        "attn_layers": ["local", "lsh"],
        "num_buckets": 2,
        "max_position_embeddings": 12,
    },
    "T5": {"decoder_start_token_id": 0},
    "VJEPA2": {"crop_size": 16, "frames_per_clip": 4, "pred_hidden_size": 16, "pred_num_attention_heads": 2},
    "Whisper": {"max_source_positions": 8},
    "XLNet": {"max_position_embeddings": None, "d_inner": 32},
    "Xmod": {"default_language": "en_XX"},
    "Zamba2": {"layers_block_type": ["mamba", "hybrid"], "layer_types": None, "n_mamba_heads": 2, "mamba_ngroups": 1},
}
CLIP_LIKE = ("CLIPFor", "MetaClip2", "SiglipFor")
INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    **{kind: lambda config: {"pixel_values": images(config.vision_config.image_size)} for kind in CLIP_LIKE},
    "AST": lambda _: {"input_values": torch.randn(2, 24, 16)},
    "PerceiverForImageClassificationLearned": lambda _: {"inputs": images(16)},
    "PerceiverForImage": lambda _: {"inputs": images(224)},
    "PerceiverForSequence": lambda _: {"inputs": torch.randint(3, 90, (2, 12))},
    "Siglip2": lambda config: {
        "pixel_values": torch.randn(2, 4, 3 * config.vision_config.patch_size**2),
        "pixel_attention_mask": torch.ones(2, 4).long(),
        "spatial_shapes": torch.full((2, 2), 2),
    },
    "VideoPrism": lambda config: {"pixel_values_videos": images(config.image_size, config.num_frames)},
    "VJEPA2": lambda _: {"pixel_values_videos": images(16, 4)},
    "Wav2Vec2BertFor": lambda _: {"input_features": torch.randn(2, 20, 160)},
    "Whisper": lambda config: {"input_features": torch.randn(2, config.num_mel_bins, 16)},
}


def images(size: int, *frames: int) -> torch.Tensor:
    return torch.randn(2, *frames, 3, size, size)


def smallest(module: str) -> str | None:
    """The smallest model of a timm module, or one that is nearly so, by the names."""
    sizes: dict[str, int] = {}
    likely = sorted(timm.list_models(module=module), key=lambda name: [word not in name for word in LITTLE])
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
    assert output.shape in ((2, K), (2, 1, K))
    return output.reshape(2, K)


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


def small_options(config: Any) -> dict[str, Any]:
    """Options that make a model small, those of its parts included."""
    options: dict[str, Any] = {}
    for name, size in SMALL.items():
        value = getattr(config, name, False)  # False is no number of anything
        if not isinstance(value, bool) and isinstance(value, (int, type(None))):
            options[name] = size
    for name, part in vars(config).items():
        if isinstance(part, transformers.PreTrainedConfig):
            options[name] = small_options(part)
        if name == "layer_types" and part:
            options[name] = [part[0], next((kind for kind in part if kind != part[0]), part[0])]
    return options


def small_model(name: str) -> tuple[Any, dict[str, Any]]:
    """A small model and inputs for it; raises what says why there is none."""
    cls = getattr(transformers, name)
    own = next((options for kind, options in OPTIONS.items() if name.startswith(f"{kind}For")), {})
    told: list[Exception] = []
    for options in (small_options(cls.config_class()), {}):
        given = {key: value for key, value in {**options, **own, "num_labels": 3}.items() if value is not None}
        try:
            config = cls.config_class(**given)
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in cls(config).parameters())
            if size > LARGEST:
                raise ValueError("too large")
            model = cls(config).eval()
            make = next((make for kind, make in INPUTS.items() if name.startswith(kind)), None)
            inputs = make(config) if make else inputs_of(model, config)
            with torch.no_grad():
                model(**inputs)
            return model, inputs
        except Exception as error:
            told.append(error)
    raise told[0]


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
        model, inputs = small_model(name)
    except Exception as error:
        pytest.skip(f"cannot be built small: {type(error).__name__}: {error}")
    cls = type(model)
    model, expected = swapped(model, {**inputs, "labels": torch.tensor([0, K - 1])})
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        cls.from_pretrained(tmp_path)
    fresh = cls(cls.config_class.from_pretrained(tmp_path))
    assert_same(op.load_exported(fresh, tmp_path), inputs, expected)
