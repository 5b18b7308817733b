"""Finding the classifier of other people's models."""

from __future__ import annotations

import copy
import dataclasses
import io
import re
import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision
import transformers
from conftest import tiny_clip
from torch import nn

import ordinal_prompt as op
from ordinal_prompt.classifiers import labels_of

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


def test_all_classifiers_whose_logits_are_averaged_get_the_one_head(clip: Any) -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32).eval()
    head = op.OrdinalPromptHead(clip, 5, in_features=192)
    op.replace_head(model, head)
    images, features = torch.randn(2, 3, 32, 32), []
    model.head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    model.head_dist.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    logits = model(images)
    torch.testing.assert_close(logits, (head(features[0]) + head(features[1])) / 2)
    assert not any("dist.prompt" in name or "head_dist.projection" in name for name in model.state_dict())
    for copied in (op.export_heads(model, inplace=False), op.export_heads(model)):
        torch.testing.assert_close(copied(images), logits)
    again = op.load_exported(timm.create_model("deit_tiny_distilled_patch16_224", img_size=32), model.state_dict())
    torch.testing.assert_close(again(images), logits)
    op.replace_head(model, op.OrdinalPromptHead(clip, 7, in_features=192))  # both of the exported ones, whole
    assert model(images).shape == (2, 7)


def distilled() -> Any:
    config: Any = transformers.DeiTConfig(**SIZES, image_size=32, patch_size=16)
    config.num_labels = 10
    return transformers.DeiTForImageClassificationWithTeacher(config).eval()


def test_a_head_that_is_shared_is_found_again_by_its_name(clip: Any) -> None:
    model, images = distilled(), torch.randn(2, 3, 32, 32)
    op.replace_head(model, op.OrdinalPromptHead(clip, 5, in_features=16))
    expected = model(images).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    whole = nn.Sequential(model)
    for copied in (copy.deepcopy(model), copy.deepcopy(whole)[0], torch.load(buffer, weights_only=False)):
        assert copied.distillation_classifier.head is copied.cls_classifier
        torch.testing.assert_close(copied(images).logits, expected)
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6):  # earlier ones cannot compile the model itself
        compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images).logits, expected)
    head = op.OrdinalPromptHead(clip, 7, in_features=16)
    op.replace_head(model, head)
    assert model.distillation_classifier.head is model.cls_classifier is head
    output = model(images)
    torch.testing.assert_close(output.logits, (output.cls_logits + output.distillation_logits) / 2)
    assert output.logits.shape == (2, 7)
    timm_model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32)
    for ranks in (5, 7):
        op.replace_head(timm_model, op.OrdinalPromptHead(clip, ranks, in_features=192))
    assert timm_model.eval()(images).shape == (2, 7)


def test_averaged_classifiers_of_different_widths_are_refused_before_anything_changes() -> None:
    model = timm.create_model("crossvit_tiny_240")
    before = str(model)
    with pytest.raises(ValueError, match=r"averages the logits of head.0, head.1, .* one head cannot take"):
        op.replace_head(model, nn.Linear(96, 5))
    assert str(model) == before


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_are_switched_off(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None, init_weights=False)
    op.replace_head(model, nn.Linear(model.fc.in_features, 5)).train()
    assert model(torch.randn(2, 3, 299, 299)).shape == (2, 5)


def test_an_auxiliary_classifier_that_is_named_is_replaced() -> None:
    model = torchvision.models.get_model("googlenet", weights=None, init_weights=False)
    op.replace_head(model, nn.Linear(1024, 5), name="aux1.fc2")
    assert model.aux1.fc2.out_features == 5


@pytest.mark.parametrize("make", [torchvision.models.squeezenet1_1, lambda: timm.create_model("dla46x_c")])
def test_a_pointwise_convolution_is_replaced_at_every_position(make: Any, clip: Any) -> None:
    model, images = make().eval(), torch.randn(2, 3, 64, 64)
    place = "classifier.1" if hasattr(model, "classifier") else "fc"
    width = at(model, place).in_channels
    seen: list[Any] = []
    op.replace_head(model, op.OrdinalPromptHead(clip, 5, in_features=width))
    at(model, place).register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    logits = model(images)
    assert logits.shape == (2, 5)
    if hasattr(model, "classifier"):
        assert type(model.classifier[2]) is nn.Identity  # an activation would cut logits off
    features, output = seen[0]
    pixels = features.permute(0, 2, 3, 1).reshape(-1, width)
    torch.testing.assert_close(output.permute(0, 2, 3, 1).reshape(-1, 5), at(model, place).head(pixels))
    op.export_heads(model)
    torch.testing.assert_close(model(images), logits)
    torch.testing.assert_close(op.load_exported(make(), model.state_dict())(images), logits)
    op.replace_head(model, op.OrdinalPromptHead(clip, 7, in_features=width))
    assert model(images).shape == (2, 7)


def test_an_export_is_replaced_whole(clip: Any) -> None:
    for head in (
        op.OrdinalPromptHead(clip, 5, in_features=512),
        op.OrdinalPromptHead(clip, 5, in_features=512, normalize=False),
    ):
        model = timm.create_model("resnet18")
        op.export_heads(op.replace_head(model, head))
        new = op.OrdinalPromptHead(clip, 7, in_features=512)
        assert op.replace_head(model, new).fc is new


def test_transformers_names_the_ranks_and_computes_a_cross_entropy(tokenizer: Any, clip: Any) -> None:
    options: Any = {**SIZES, "num_labels": 1, "problem_type": "regression"}
    config = transformers.BertConfig(**options)
    model = transformers.BertForSequenceClassification(config).eval()
    names = ["bad", "fair", "good"]
    head = op.OrdinalPromptHead(clip, names, tokenizer=tokenizer, context="it is", in_features=16)
    op.replace_head(model, head)
    assert model.config.id2label == dict(enumerate(names))
    assert model.config.label2id == {"bad": 0, "fair": 1, "good": 2}
    output = model(torch.tensor([[5, 6, 7], [5, 6, 8]]), labels=torch.tensor([0, 2]))
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, torch.tensor([0, 2])))


def test_a_model_on_the_meta_device_leaves_the_head_its_weights(clip: Any) -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    head = op.OrdinalPromptHead(clip, 5, in_features=512)
    op.replace_head(model, head)
    assert not any(parameter.is_meta for parameter in head.parameters())


def test_a_peft_model_whose_adapter_would_not_hold_the_head(clip: Any) -> None:
    peft: Any = pytest.importorskip("peft")
    base = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))
    model: Any = peft.get_peft_model(base, peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(
        ValueError, match=r"head would be lost. Replace the head first, .* modules_to_save=\['classifier'"
    ):
        op.replace_head(model, op.OrdinalPromptHead(clip, 5, in_features=16))
    kept: Any = peft.get_peft_model(base, peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    head = op.OrdinalPromptHead(clip, 5, in_features=16)
    op.replace_head(kept, head)
    saved = peft.get_peft_model_state_dict(kept)
    assert any("rank_embeddings" in name for name in saved)
    assert kept(torch.tensor([[5, 6, 7]])).logits.shape == (1, 5)


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
    with pytest.raises(ValueError, match="no linear classifier in Sequential"):
        op.replace_head(nn.Sequential(nn.Conv2d(1, 1, 3)), nn.Linear(1, 5))


def test_several_candidates_are_listed() -> None:
    with pytest.raises(ValueError, match="Found 2 modules in Plain that may be the classifier: one, two; pass name="):
        op.replace_head(Plain(one=nn.Linear(4, 4), two=nn.Linear(4, 2)), nn.Linear(4, 5))


def test_a_width_that_does_not_fit(clip: Any) -> None:
    model = torchvision.models.resnet18()
    with pytest.raises(
        ValueError,
        match=r"width 512, which is what ResNet.fc takes, but this one takes 12; build it with in_features=512",
    ):
        op.replace_head(model, op.OrdinalPromptHead(clip, 5))
    assert model.fc.out_features == 1000  # nothing changed


def test_wrong_names_and_kinds() -> None:
    model = Plain(conv=nn.Conv2d(1, 1, 3), fc=nn.Linear(4, 2))
    with pytest.raises(ValueError, match="no module named 'fcc'; candidates for the classifier: fc"):
        op.replace_head(model, nn.Linear(4, 5), name="fcc")
    with pytest.raises(TypeError, match="Plain.conv to be a linear layer, but it is a torch.nn.modules.conv.Conv2d"):
        op.replace_head(model, nn.Linear(4, 5), name="conv")
    with pytest.raises(TypeError, match="`model` to be a torch.nn.Module, but got str"):
        op.replace_head("resnet18", nn.Linear(4, 5))
    with pytest.raises(TypeError, match="`head` to be a torch.nn.Module"):
        op.replace_head(model, None)


class _Net(nn.Module):
    """Parts by name; runs none of them."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def linear(out: int = 5, width: int = 12) -> nn.Linear:
    return nn.Linear(width, out)


AMBIGUOUS: dict[str, tuple[nn.Module, list[str]]] = {
    "several attributes": (
        _Net(heads=nn.ModuleDict({"age": linear(), "sex": linear(2)})), ["heads.age", "heads.sex"],
    ),
    "a list": (_Net(classifier=nn.ModuleList([linear(), linear()])), ["classifier.0", "classifier.1"]),
    "a score of attention": (_Net(pool=_Net(score=linear(1)), out=linear()), ["pool.score", "out"]),
    "an inner fc": (_Net(block=_Net(fc=linear(12)), out=linear()), ["block.fc", "out"]),
    "an unknown last layer": (_Net(encoder=_Net(head=linear(12)), logits=linear()), ["encoder.head", "logits"]),
    "summed classifiers": (
        _Net(classifier=_Net(low=nn.Conv2d(40, 21, 1), high=nn.Conv2d(128, 21, 1))),
        ["classifier.low", "classifier.high"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_may_be_meant_is_listed(case: str) -> None:
    model, candidates = AMBIGUOUS[case]
    with pytest.raises(ValueError, match=rf"Found 2 modules .*: {', '.join(map(re.escape, candidates))}; pass name="):
        op.replace_head(model, linear(3))


CLEAR: dict[str, tuple[nn.Module, str]] = {
    "an MLP that is written backwards": (_Net(head=_Net(out=linear(), dense=linear(12, 30))), "head.out"),
    "a head behind a whole network": (nn.Sequential(_Net(fc=linear(12)), linear()), "1"),
    "an activation at the end": (nn.Sequential(linear(12), nn.ReLU(), linear(), nn.Softmax(1)), "2"),
    "a classifier that was taken off": (_Net(body=nn.Conv2d(3, 12, 3), fc=nn.Identity()), "fc"),
}


@pytest.mark.parametrize("case", CLEAR)
def test_the_classifier_is_found(case: str) -> None:
    model, place = CLEAR[case]
    head = op.replace_head(model, linear(3)).get_submodule(place)
    assert isinstance(head, nn.Linear)
    assert head.out_features == 3


def test_an_activation_around_the_classifier_goes(clip: Any) -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = linear()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    model = nn.Sequential(Body(), nn.Sequential(nn.Dropout(), nn.Softmax(1)), nn.Softmax(1))
    model[1] = nn.Dropout()
    head = op.OrdinalPromptHead(clip, 5)
    op.replace_head(model, head).eval()
    torch.testing.assert_close(model(torch.ones(2, 12)), head(torch.ones(2, 12)))


def test_models_that_are_refused(clip: Any) -> None:
    small: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**small, intermediate_size=8, vocab_size=30)
    head = op.OrdinalPromptHead(clip, 5, in_features=8)
    for kind in (transformers.BertForQuestionAnswering, transformers.BertForMultipleChoice):
        with pytest.raises(ValueError, match="gives no classes; build the model ForSequenceClassification"):
            op.replace_head(kind(config), head)


def test_a_lazy_classifier_is_replaced(clip: Any) -> None:
    model = _Net(fc=nn.LazyLinear(5))
    op.replace_head(model, op.OrdinalPromptHead(clip, 5))
    assert isinstance(model.fc, op.OrdinalPromptHead)
    assert (model.fc.in_features, model.fc.out_features) == (12, 5)


def test_a_count_of_classes_that_is_read_only() -> None:
    class Wrapped(_Net):
        @property
        def num_labels(self) -> int:
            return 2

    model = Wrapped(classifier=linear(2))
    assert op.replace_head(model, linear(5)).get_submodule("classifier").out_features == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_exports_have_the_precision_of_the_model(dtype: torch.dtype, clip: Any) -> None:
    model = nn.Sequential(linear(12).to(dtype), linear().to(dtype))
    op.replace_head(model, op.OrdinalPromptHead(clip, 5).eval())
    features = torch.ones(2, 12, dtype=dtype)
    expected = model(features)
    op.export_heads(model)
    torch.testing.assert_close(model(features).to(expected.dtype), expected, rtol=0.05, atol=0.05)


def test_a_compiled_head_is_exported(clip: Any) -> None:
    compiled: Any = torch.compile(op.OrdinalPromptHead(clip, 5).eval(), backend="eager")
    model = nn.Sequential(linear(12), compiled)
    expected = model(torch.ones(2, 12))
    op.export_heads(model)
    assert type(model[1]) is nn.Sequential
    torch.testing.assert_close(model(torch.ones(2, 12)), expected)


def test_the_classifier_of_a_compiled_model(clip: Any) -> None:
    for name in (None, "2", "_orig_mod.2"):
        model = nn.Sequential(linear(12), nn.ReLU(), linear(), nn.Softmax(1)).eval()
        compiled: Any = torch.compile(model, backend="eager")
        compiled(torch.ones(2, 12))
        head = op.OrdinalPromptHead(clip, 7)
        assert op.replace_head(compiled, head, name=name) is compiled
        assert model[2] is head
        expected = head(model[:2](torch.ones(2, 12)))
        torch.testing.assert_close(compiled(torch.ones(2, 12)), expected)
        torch.testing.assert_close(op.export_heads(compiled)(torch.ones(2, 12)), expected)
    compiled = torch.compile(nn.Sequential(linear(12), linear()), backend="eager")
    inside: Any = nn.Sequential(linear(12), compiled)
    op.replace_head(inside, op.OrdinalPromptHead(clip, 7))
    assert inside(torch.ones(2, 12)).shape == (2, 7)
    assert isinstance(inside[1]._orig_mod[1], op.OrdinalPromptHead)
    with pytest.raises(ValueError, match="but got a prompt head; swap the two"):
        op.replace_head(torch.compile(op.OrdinalPromptHead(clip, 5)), linear())


@dataclasses.dataclass(frozen=True)
class Frozen:
    num_labels: int = 5


@dataclasses.dataclass(frozen=True)
class FrozenWithNames(Frozen):
    id2label: Any = dataclasses.field(default_factory=lambda: {0: "a", 1: "b"})


class Slots:
    __slots__ = ("num_labels",)

    def __init__(self) -> None:
        self.num_labels = 5


class Pair(NamedTuple):
    num_labels: int = 5
    id2label: Any = {0: "a"}  # noqa: RUF012  # of one test


class Checked:
    """Takes the first of what is written, and not the second."""

    def __init__(self) -> None:
        self.__dict__.update(num_labels=5, id2label={0: "a"}, label2id={"a": 0})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "id2label" and len(value) > 2:
            raise ValueError("too many")
        super().__setattr__(name, value)


@pytest.mark.parametrize("kind", [Frozen, FrozenWithNames, Slots, Pair, Checked, lambda: SimpleNamespace(num_labels=5)])
def test_a_config_that_is_not_of_transformers_stays_as_it_is(kind: Any, tokenizer: Any, clip: Any) -> None:
    model: Any = _Net(fc=linear())
    model.config, model.num_classes = kind(), 5
    before = repr(model.config), labels_of(model.config)
    head = op.OrdinalPromptHead(clip, ["bad", "fair", "good"], tokenizer=tokenizer)
    assert op.replace_head(model, head).fc is head
    assert model.num_classes == 3
    assert (repr(model.config), labels_of(model.config)) == before


def test_a_config_with_names_of_labels_follows(tokenizer: Any, clip: Any) -> None:
    model: Any = _Net(fc=linear())
    model.config = SimpleNamespace(num_labels=2, id2label={0: "no", 1: "yes"})
    op.replace_head(model, op.OrdinalPromptHead(clip, ["bad", "fair", "good"], tokenizer=tokenizer))
    assert vars(model.config) == {"num_labels": 3, "id2label": {0: "bad", 1: "fair", 2: "good"}}


def test_a_model_that_refuses_its_new_count_of_classes_is_as_it_was(clip: Any) -> None:
    class Strict(_Net):
        @property
        def num_labels(self) -> int:
            return 2

        @num_labels.setter
        def num_labels(self, value: int) -> None:
            raise RuntimeError(f"{value} labels are not for me")

    inner: Any = nn.Sequential(linear(), nn.Softmax(1))
    inner.num_classes, inner.config = 5, transformers.BertConfig()
    inner.config.num_labels = 5
    names = inner.config.id2label
    model: Any = Strict(classifier=inner)
    before = [*model.modules()]
    with pytest.raises(RuntimeError, match="3 labels are not for me"):
        op.replace_head(model, op.OrdinalPromptHead(clip, 3))
    assert [*model.modules()] == before
    assert (inner.num_classes, inner.config.num_labels, inner.config.id2label) == (5, 5, names)
    assert inner.config.problem_type is None


def test_a_text_encoder_that_is_part_of_the_model_is_no_secret() -> None:
    clip = tiny_clip()
    model = nn.Module()
    model.text, model.fc = clip, nn.Linear(12, 5)
    with pytest.warns(UserWarning, match="shares its weights with Module.*copy.deepcopy"):
        op.replace_head(model, op.OrdinalPromptHead(clip, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op.replace_head(model, op.OrdinalPromptHead(copy.deepcopy(clip), 5))
        op.replace_head(model, op.OrdinalPromptHead(clip, 5, freeze_text_encoder=False))
        clip.requires_grad_(False)
        op.replace_head(model, op.OrdinalPromptHead(clip, 5))


class Halved(op.OrdinalPromptHead):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features) / 2


@pytest.mark.parametrize("change", ["hook", "method", "class"])
def test_what_changes_the_logits_of_a_head_is_not_lost_in_silence(change: str) -> None:
    head = (Halved if change == "class" else op.OrdinalPromptHead)(tiny_clip(), 5).eval()
    seen: list[Any] = []
    head.register_forward_hook(lambda *_: seen.append(0))  # a hook that looks on is none
    if change == "hook":
        head.register_forward_hook(lambda _, __, logits: logits + 1)
    elif change == "method":
        forward = head.forward
        head.forward = lambda features: forward(features) + 1  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="hooks, or a forward of its own"):
        head.export()
    plain = op.OrdinalPromptHead(tiny_clip(), 5).eval()
    plain.register_forward_hook(lambda *_: seen.append(0))
    plain.export()
    assert seen


def test_a_config_of_transformers_may_have_no_names_yet(clip: Any) -> None:
    config = transformers.PvtConfig(
        num_labels=3, depths=[1] * 4, hidden_sizes=[8, 8, 8, 8], num_attention_heads=[1] * 4
    )
    model = op.replace_head(
        transformers.PvtForImageClassification(config), op.OrdinalPromptHead(clip, 5, in_features=8)
    )
    assert model.config.num_labels == 5
    assert model.config.id2label == dict(enumerate("01234"))
