"""Heads inside models that PEFT has adapted: exports keep what the adapter learned."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import tiny_clip
from torch import Tensor, nn

import ordinal_prompt as op

peft = pytest.importorskip("peft")

FEATURES = torch.linspace(-2, 2, 24).reshape(4, 6)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(self.body(inputs).relu())


def with_head(**options: Any) -> nn.Module:
    return op.replace_head(Model(), op.OrdinalPromptHead(tiny_clip(), 5, in_features=7, **options))


@pytest.mark.parametrize("normalize", [True, False])
def test_an_adapter_inside_the_head_is_exported(normalize: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
    model = peft.get_peft_model(with_head(normalize=normalize), config)
    head = model.base_model.model.fc
    assert not isinstance(head.projection, nn.Linear)
    expected = model.eval()(FEATURES).detach()
    with model.disable_adapter():
        assert (model(FEATURES) - expected).abs().max() > 1e-2
    with pytest.raises(ValueError, match="tensors of an adapter .*lora_A.*merge_and_unload"):
        head.save_pretrained(tmp_path)
    torch.testing.assert_close(op.export_heads(model, inplace=False)(FEATURES), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(op.export_heads(model)(FEATURES), expected, rtol=1e-4, atol=1e-4)


def test_a_hook_that_is_no_linear_map_is_refused() -> None:
    model = with_head()
    model.fc.projection.register_forward_hook(lambda _module, _inputs, output: output.tanh())
    with pytest.raises(ValueError, match="the projection, a Linear, computes no linear map"):
        op.export_heads(model)


def test_a_head_that_is_saved_whole_shares_its_text_encoder_and_trains() -> None:
    model = peft.get_peft_model(with_head(), peft.LoraConfig(target_modules=["body"], modules_to_save=["fc"]))
    wrapper = model.base_model.model.fc
    trained = wrapper.modules_to_save["default"]
    assert trained is not wrapper.original_module
    assert trained.text_encoder is wrapper.original_module.text_encoder
    model(FEATURES).sum().backward()
    assert trained.prompt.rank_embeddings.grad is not None
    with torch.no_grad():
        trained.prompt.rank_embeddings.normal_()
    expected = model.eval()(FEATURES).detach()
    torch.testing.assert_close(op.export_heads(model)(FEATURES), expected, rtol=1e-4, atol=1e-4)


def test_a_head_that_an_adapter_leaves_out_is_no_secret(clip: Any) -> None:
    model = nn.Sequential(nn.Linear(7, 7), op.OrdinalPromptHead(clip, 5, in_features=7))
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["0"]))
    with pytest.warns(UserWarning, match="does not learn, and is not saved with the adapter"):
        op.parameter_groups(adapted, lr=1e-3)
    saved = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op.parameter_groups(saved, lr=1e-3)


@pytest.mark.parametrize("saved", [["cls_classifier"], ["cls_classifier", "distillation_classifier"]])
def test_averaged_classifiers_follow_the_one_that_trains(saved: list[str], tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "num_labels": 5,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    images = torch.randn(2, 3, 32, 32)

    def build() -> Any:
        config = transformers.DeiTConfig(**sizes, image_size=32, patch_size=16)
        return transformers.DeiTForImageClassificationWithTeacher(config)

    torch.manual_seed(0)
    base = op.replace_head(build(), op.OrdinalPromptHead(tiny_clip(), 5, in_features=16))
    without = copy.deepcopy(base)
    config = peft.LoraConfig(target_modules=["q_proj", "query"], modules_to_save=saved)
    model = peft.get_peft_model(base, config)
    trained = model.base_model.model.cls_classifier.modules_to_save["default"]
    with torch.no_grad():
        trained.prompt.rank_embeddings.normal_()
    seen: list[Any] = []
    trained.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    output = model.eval()(images)
    for found, expected in zip((output.cls_logits, output.distillation_logits), seen, strict=True):
        torch.testing.assert_close(found, expected)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(without, tmp_path).eval()
    torch.testing.assert_close(again(images).logits, output.logits)
    exported = op.export_heads(again)
    torch.testing.assert_close(exported(images).logits, output.logits, rtol=1e-4, atol=1e-4)
    for merged in (exported.merge_and_unload(), op.export_heads(model.merge_and_unload())):
        torch.testing.assert_close(merged(images).logits, output.logits, rtol=1e-4, atol=1e-4)
        loaded = op.load_exported(build(), merged.state_dict())
        torch.testing.assert_close(loaded(images).logits, output.logits, rtol=1e-4, atol=1e-4)


def test_what_the_caller_merges_into_a_text_encoder_counts_once() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    bert = transformers.BertModel(config).eval()
    adapted = peft.get_peft_model(bert, peft.LoraConfig(target_modules=["query"], init_lora_weights=False))

    def tokenize(texts: list[str]) -> Tensor:
        rows = [[1, *(3 + ord(letter) % 40 for letter in text), 2] for text in texts]
        return torch.tensor([row + [0] * (20 - len(row)) for row in rows])

    head = op.OrdinalPromptHead(adapted, 3, tokenizer=tokenize).eval()
    before = head.prototypes()
    adapted.merge_and_unload()
    torch.testing.assert_close(head.train().eval().prototypes(), before)
    torch.testing.assert_close(head.double().float().prototypes(), before)


def test_copies_of_an_adapted_model_keep_its_wrappers() -> None:
    config = peft.LoraConfig(target_modules=["body"], modules_to_save=["fc"], init_lora_weights=False)
    model = peft.get_peft_model(with_head(), config).eval()
    copied = copy.deepcopy(model)
    assert type(copied.base_model.model.fc) is type(model.base_model.model.fc)
    exported = op.export_heads(model, inplace=False)
    assert not any(isinstance(part, op.OrdinalPromptHead) for part in exported.modules())
    torch.testing.assert_close(exported(FEATURES), model(FEATURES), rtol=1e-4, atol=1e-4)
