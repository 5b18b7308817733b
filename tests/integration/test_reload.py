"""Exported models come back whole from what other libraries save, or are refused; never with a fresh classifier."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from conftest import tiny_clip
from huggingface_hub import PyTorchModelHubMixin, save_torch_model
from safetensors.torch import save_file
from torch import Tensor, nn

import ordinal_prompt as op

accelerate = pytest.importorskip("accelerate")

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


class Two(nn.Module):
    """Two classifiers on one body: a linear layer, and a 1×1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.age, self.kind = nn.Linear(12, 12), nn.Linear(12, 4), nn.Conv1d(12, 4, 1)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(inputs)
        return self.age(features), self.kind(features[..., None])


INPUTS = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))


def exported_pair(seed: int = 0, **options: Any) -> Two:
    torch.manual_seed(seed)
    model = Two()
    for name in ("age", "kind"):
        op.replace_head(model, op.OrdinalPromptHead(tiny_clip(), 4, **options).eval(), name=name)
    op.export_heads(model)
    return model


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    for one, other in zip(found(INPUTS), expected(INPUTS), strict=True):
        torch.testing.assert_close(one, other)


def test_of_several_files_the_standard_one_or_none(tmp_path: Path) -> None:
    one, other = exported_pair(1), exported_pair(2)
    torch.save(one.state_dict(), tmp_path / "best.pt")
    torch.save(other.state_dict(), tmp_path / "last.pt")
    fresh = Two()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(
        ValueError, match=r"one file of weights in .*, but found best.pt, last.pt; pass the one .*best.pt"
    ):
        op.load_exported(fresh, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
    assert_equal(op.load_exported(Two(), tmp_path / "best.pt"), one)
    torch.save(one.state_dict(), tmp_path / "pytorch_model.bin")
    assert_equal(op.load_exported(Two(), tmp_path), one)
    save_file(other.state_dict(), tmp_path / "model.safetensors")
    save_file(one.state_dict(), tmp_path / "model_ema.safetensors")
    assert_equal(op.load_exported(Two(), tmp_path), other)


def test_shards_are_joined(tmp_path: Path) -> None:
    model = exported_pair()
    save_torch_model(model, tmp_path, max_shard_size=700)
    torch.save({"step": 1}, tmp_path / "optimizer.pt")
    shards = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 1
    for source in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert_equal(op.load_exported(Two(), source), model)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"one file of weights in .*model-00001-of-.*, optimizer.pt"):
        op.load_exported(Two(), tmp_path)
    (tmp_path / "optimizer.pt").unlink()
    assert_equal(op.load_exported(Two(), tmp_path), model)
    shards[0].unlink()
    with pytest.raises(ValueError, match="do not fit Two: .* missing"):
        op.load_exported(Two(), tmp_path)


def everything(model: Any) -> dict[str, Any]:
    """What a refusal must leave: the very modules and tensors, the values, and what the model says of itself."""
    tensors = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    own = {name: {**vars(part), "_modules": {**part._modules}} for name, part in model.named_modules()}
    config = getattr(model, "config", None)
    return {"tensors": tensors, "own": own, "config": config and config.to_dict()}


def assert_nothing_changed(model: Any, before: dict[str, Any]) -> None:
    now = everything(model)
    assert now["config"] == before["config"]
    assert [*now["tensors"]] == [*before["tensors"]]
    for name, (tensor, values) in now["tensors"].items():
        assert tensor is before["tensors"][name][0]
        assert torch.equal(values, before["tensors"][name][1])
    for name, attributes in now["own"].items():
        assert {**attributes, "_parameters": 0, "_buffers": 0} == {
            **before["own"][name],
            "_parameters": 0,
            "_buffers": 0,
        }


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 9
        self.body, self.fc = nn.LSTM(6, 12), nn.Linear(12, 9)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(self.body(inputs)[0])


def bert(**options: Any) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 30}
    config = transformers.BertConfig(**{**sizes, "num_hidden_layers": 1, "num_labels": 9, **options})
    return transformers.BertForSequenceClassification(config)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "one is missing": (lambda state: state.pop(next(iter(state))), "missing"),
    "one is unknown": (lambda state: state.update(more=torch.ones(1)), "more unknown"),
    "one has another size": (lambda state: state.update({next(iter(state)): torch.ones(7, 7)}), "size mismatch"),
    "another head": (lambda state: state.update({"x.weight": torch.zeros(0), "x.0.weight": torch.ones(3, 12)}), "no x"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("build", [Recurrent, bert])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_refusal_leaves_the_model_as_it_was(build: Any, wrong: str, normalize: bool, clip: Any) -> None:
    change, said = WRONG[wrong]
    model = op.replace_head(build(), op.OrdinalPromptHead(clip, 5, normalize=normalize).eval())
    state = op.export_heads(model).state_dict()
    change(state)
    fresh = build()
    before = everything(fresh)
    with pytest.raises(ValueError, match=said):
        op.load_exported(fresh, state)
    assert_nothing_changed(fresh, before)
    op.load_exported(fresh, model.state_dict())  # and it is as good as new


def test_a_refused_folder_leaves_the_model_as_it_was(clip: Any, tmp_path: Path) -> None:
    model = op.export_heads(op.replace_head(bert(), op.OrdinalPromptHead(clip, 5).eval()))
    model.save_pretrained(tmp_path)
    fresh = bert(num_hidden_layers=2)
    before = everything(fresh)
    with pytest.raises(ValueError, match="missing"):
        op.load_exported(fresh, tmp_path)
    assert_nothing_changed(fresh, before)


def test_a_lazy_model_that_was_refused_stays_lazy(clip: Any) -> None:
    model = op.export_heads(nn.Sequential(nn.Linear(6, 12), op.OrdinalPromptHead(clip, 5).eval()))
    fresh = nn.Sequential(nn.LazyLinear(12), nn.LazyLinear(4))
    with pytest.raises(ValueError, match="more unknown"):
        op.load_exported(fresh, {**model.state_dict(), "more": torch.ones(1)})
    assert fresh[0].has_uninitialized_params()
    torch.testing.assert_close(op.load_exported(fresh, model.state_dict())(INPUTS[:, :6]), model(INPUTS[:, :6]))


def test_a_model_on_the_meta_device_gets_memory(clip: Any, tmp_path: Path) -> None:
    for build, inputs in ((Recurrent, INPUTS[:, :6]), (bert, torch.tensor([[3, 4, 5]]))):
        model = op.replace_head(build().eval(), op.OrdinalPromptHead(clip, 5, normalize=False))
        op.export_heads(model)
        with accelerate.init_empty_weights():
            fresh: Any = build()
        loaded = op.load_exported(fresh, model.state_dict())
        found, expected = loaded(inputs), model(inputs)
        torch.testing.assert_close(getattr(found, "logits", found), getattr(expected, "logits", expected))
        assert all(part.requires_grad for name, part in loaded.named_parameters() if "body" in name)
    model.save_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        fresh = bert()
    torch.testing.assert_close(op.load_exported(fresh, tmp_path)(inputs).logits, expected.logits)


def test_a_model_on_the_meta_device_keeps_its_precision_and_what_it_shares(clip: Any) -> None:
    def build() -> Any:
        model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4))
        model[1].weight = model[0].weight
        return model

    model = build()
    op.replace_head(model, op.OrdinalPromptHead(clip, 5).eval())
    op.export_heads(model)
    state = model.state_dict()
    del state["1.weight"]  # as safetensors does
    with torch.device("meta"):
        fresh = build().double()
    op.load_exported(fresh, state)
    assert fresh[0].weight is fresh[1].weight
    torch.testing.assert_close(fresh(INPUTS.double()).float(), model(INPUTS))
    with torch.device("meta"):
        fresh = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4))
    with pytest.raises(ValueError, match="do not fit Sequential: 1.weight missing"):  # nobody shares it
        op.load_exported(fresh, state)
    assert fresh[0].weight.is_meta


def test_models_that_could_not_become_real_are_refused(clip: Any) -> None:
    state = op.export_heads(op.replace_head(bert(), op.OrdinalPromptHead(clip, 5).eval())).state_dict()
    with torch.device("meta"):
        fresh = bert()
    with pytest.raises(
        ValueError, match=r"on the meta device, and no file has its bert.embeddings.position_ids, .* real"
    ):
        op.load_exported(fresh, state)
    assert isinstance(fresh.classifier, nn.Linear)
    offloaded = accelerate.cpu_offload(bert(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="where accelerate has offloaded them.* Load the exported weights first"):
        op.load_exported(offloaded, state)


@pytest.mark.parametrize("options", [{}, {"in_features": 12}, {"normalize": False}])
def test_savers_that_take_empty_tensors_for_one(options: dict[str, Any], tmp_path: Path) -> None:
    model = exported_pair(**options)
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path)
    with pytest.raises((RuntimeError, ValueError), match="kind.weight"):
        accelerate.load_checkpoint_in_model(Two(), tmp_path, strict=True)
    assert_equal(op.load_exported(Two(), tmp_path), model)
    several = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 4))
    op.replace_head(
        several, op.OrdinalPromptHeads({name: op.OrdinalPromptHead(tiny_clip(), 3) for name in "ab"}).eval()
    )
    op.export_heads(several)
    accelerate.Accelerator(cpu=True).save_model(several, tmp_path / "several")
    fresh = op.load_exported(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 4)), tmp_path / "several")
    torch.testing.assert_close(fresh(INPUTS), several(INPUTS))


def test_files_of_earlier_versions() -> None:
    model = exported_pair()
    state = model.state_dict()
    markers = [name for name, tensor in state.items() if tensor.dim() == 6]
    assert markers == ["age.weight", "kind.weight", "kind.head.weight"]
    old = {**state, **{name: torch.empty(0) for name in markers}}
    assert_equal(op.load_exported(Two(), old), model)
    for kept in markers:  # of empty ones, accelerate kept one
        some = {name: tensor for name, tensor in old.items() if name == kept or name not in markers}
        assert_equal(op.load_exported(Two(), some), model)
    none = {name: tensor for name, tensor in old.items() if name not in markers}
    with pytest.raises(ValueError, match="do not fit Two"):  # may be anybody's layers
        op.load_exported(Two(), none)
    again = exported_pair(1)
    op.load_exported(again, old)  # in the place of layers that were exported, too
    assert_equal(again, model)


def test_layers_of_others_are_no_exported_head() -> None:
    class Other(Two):
        def __init__(self) -> None:
            super().__init__()
            self._modules["kind"] = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 4))

    state = {**Other().state_dict(), "age.weight": torch.empty(0), "age.4.weight": torch.ones(4, 12)}
    del state["age.bias"]
    with pytest.raises(ValueError, match="do not fit Two: .*kind.1.weight"):
        op.load_exported(Two(), state)
