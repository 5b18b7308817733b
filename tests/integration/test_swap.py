"""Finding the classifier of other people's models."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

import ordinal_prompt as op

TIMM = [
    "resnet18",
    "vit_tiny_patch16_224",
    "convnext_atto",
    "efficientnet_b0",
    "mobilenetv3_small_100",
    "swin_tiny_patch4_window7_224",
]
TORCHVISION = {
    "resnet18": "fc", "vgg11": "classifier.6", "alexnet": "classifier.6", "mobilenet_v3_small": "classifier.3",
    "vit_b_32": "heads.head", "convnext_tiny": "classifier.2", "densenet121": "classifier",
    "efficientnet_b0": "classifier.1",
    "swin_t": "head", "googlenet": "fc", "inception_v3": "fc", "shufflenet_v2_x0_5": "fc",
}  # fmt: skip


def at(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    model = timm.create_model(name)
    head = nn.Linear(model.get_classifier().in_features, 5)
    assert op.replace_head(model, head) is model
    assert model.get_classifier() is head
    assert model.num_classes == 5


def test_timm_without_classifier() -> None:
    model = timm.create_model("resnet18", num_classes=0)
    with pytest.raises(ValueError, match="width 512, which is what ResNet.fc takes, but this one takes 7"):
        op.replace_head(model, nn.Linear(7, 5))
    op.replace_head(model, nn.Linear(512, 5))
    assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(
            name, weights=None, **({"init_weights": False} if name in ("googlenet", "inception_v3") else {})
        )
        head = nn.Linear(at(model, TORCHVISION[name]).in_features, 5)
    op.replace_head(model, head)
    assert at(model, TORCHVISION[name]) is head


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


CONFIGS = {
    "Bert": SIZES,
    "Roberta": SIZES,
    "ViT": SIZES,
    "DistilBert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
    "XLNet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_head": 8, "d_inner": 32},
    "ModernBert": {**SIZES, "vocab_size": 100, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(**CONFIGS[kind])
    model_kind = "ForImageClassification" if kind == "ViT" else "ForSequenceClassification"
    model = getattr(transformers, kind + model_kind)(config).eval()
    head = nn.Linear(16, 5)
    op.replace_head(model, head)
    assert head in model.modules()
    assert model.config.num_labels == 5
    inputs = torch.zeros(1, 3, 224, 224) if kind == "ViT" else torch.tensor([[5, 6, 7]])
    assert model(inputs).logits.shape == (1, 5)


class Plain(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


def test_plain_models() -> None:
    only = Plain(features=nn.Conv2d(1, 1, 1), out=nn.Linear(4, 2))
    assert op.replace_head(only, nn.Linear(4, 5)).out.out_features == 5
    nested = Plain(model=Plain(body=nn.Linear(4, 4), fc=nn.Linear(4, 2)))
    assert op.replace_head(nested, nn.Linear(4, 5)).model.fc.out_features == 5
    small_network = Plain(body=nn.Linear(8, 8), head=nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)))
    assert op.replace_head(small_network, nn.Linear(6, 5)).head[2].out_features == 5
    two = Plain(one=nn.Linear(4, 4), two=nn.Linear(4, 2))
    assert op.replace_head(two, nn.Linear(4, 5), name="two").two.out_features == 5
    inside = Plain(tail=nn.Sequential(nn.Dropout(), nn.Linear(4, 2)), other=nn.Linear(4, 4))
    assert op.replace_head(inside, nn.Linear(4, 5), name="tail").tail[1].out_features == 5


def test_a_layer_in_two_places_is_replaced_in_both() -> None:
    model = Plain(backbone=Plain(fc=nn.Linear(4, 2)))
    model.fc = model.backbone.fc
    head = nn.Linear(4, 5)
    op.replace_head(model, head)
    assert model.fc is model.backbone.fc is head


def test_counts_of_classes_follow_in_wrappers() -> None:
    model = Plain(inner=timm.create_model("resnet18"))
    op.replace_head(model, nn.Linear(512, 5))
    assert model.inner.num_classes == 5


def test_a_prompt_head_replaces_and_is_replaced(clip: Any) -> None:
    model = Plain(body=nn.Linear(4, 12), fc=nn.Linear(12, 1000)).eval()
    op.replace_head(model, op.OrdinalPromptHead(clip, 5))
    assert not model.fc.training
    op.replace_head(model, op.OrdinalPromptHead(clip, 7))
    assert model.fc.num_ranks == 7
    op.replace_head(model, op.OrdinalPromptHead(clip, 6, in_features=12))
    assert model.fc.in_features == 12


def test_no_candidate() -> None:
    with pytest.raises(ValueError, match="no linear classifier in Conv2d; pass name="):
        op.replace_head(nn.Conv2d(1, 1, 1), nn.Linear(1, 5))
    with pytest.raises(ValueError, match="no linear classifier in SqueezeNet"):
        op.replace_head(torchvision.models.squeezenet1_1(), nn.Linear(512, 5))


def test_several_candidates_are_listed() -> None:
    with pytest.raises(ValueError, match="Found 2 modules in Plain that may be the classifier: one, two; pass name="):
        op.replace_head(Plain(one=nn.Linear(4, 4), two=nn.Linear(4, 2)), nn.Linear(4, 5))
    with pytest.raises(ValueError, match="2 modules .* head, head_dist"):
        op.replace_head(timm.create_model("deit_tiny_distilled_patch16_224"), nn.Linear(192, 5))


def test_a_width_that_does_not_fit(clip: Any) -> None:
    model = torchvision.models.resnet18()
    with pytest.raises(
        ValueError,
        match=r"width 512, which is what ResNet.fc takes, but this one takes 12; build it with in_features=512",
    ):
        op.replace_head(model, op.OrdinalPromptHead(clip, 5))
    assert model.fc.out_features == 1000  # nothing changed


def test_wrong_names_and_kinds() -> None:
    model = Plain(conv=nn.Conv2d(1, 1, 1), fc=nn.Linear(4, 2))
    with pytest.raises(ValueError, match="no module named 'fcc'; candidates for the classifier: fc"):
        op.replace_head(model, nn.Linear(4, 5), name="fcc")
    with pytest.raises(TypeError, match="Plain.conv to be a linear layer, but it is a Conv2d"):
        op.replace_head(model, nn.Linear(4, 5), name="conv")
    with pytest.raises(TypeError, match="`model` to be a torch.nn.Module, but got str"):
        op.replace_head("resnet18", nn.Linear(4, 5))
    with pytest.raises(TypeError, match="`head` to be a torch.nn.Module"):
        op.replace_head(model, None)
