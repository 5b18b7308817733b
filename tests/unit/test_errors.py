"""A user's mistake is answered when the head is built, or on the first tensor, with the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import VISION, tiny_clip
from torch import nn

import ordinal_prompt as op

WITH_TOKENIZER = "tokenizer"  # stands for the fixture


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"ranks": 1}, ValueError, "at least 2 ranks, but got 1"),
        ({"ranks": ["one"]}, ValueError, "at least 2 ranks, but got 1"),
        ({"ranks": True}, TypeError, "number of ranks or a list"),
        ({"ranks": "bad, good"}, TypeError, "number of ranks or a list"),
        ({"ranks": 5.0}, TypeError, "number of ranks or a list"),
        ({"ranks": ["bad", "good", "bad"]}, ValueError, "distinct names in `ranks`, but got 'bad' more than once"),
        ({"ranks": ["bad", " "]}, ValueError, "to have a word, but got ' '"),
        ({"ranks": ["bad", 2]}, TypeError, r"to hold strings, but got 2 \(int\)"),
        ({"rank_values": [1, 2, 3]}, ValueError, r"5 `rank_values` for 5 ranks, but got shape \(3,\)"),
        ({"rank_values": [1, 2, 2, 3, 4]}, ValueError, "strictly increasing `rank_values`"),
        ({"rank_values": [1, 2, 3, 4, float("nan")]}, ValueError, "each rank in `rank_values`, but got NaN"),
        (
            {"context": 80},
            ValueError,
            r"at most 77 tokens, the text encoder's context length, but context and rank need 84",
        ),
        ({"context": "word " * 80, "tokenizer": WITH_TOKENIZER}, ValueError, "at most 77 tokens.* need 84"),
        ({"context": -1}, ValueError, "`context` to be at least 0"),
        ({"context": 2.5}, TypeError, "`context` to be a number of tokens or a text"),
        ({"context": "the age is"}, ValueError, "`tokenizer` to turn the context into tokens.*open_clip.get_tokenizer"),
        ({"ranks": ["bad", "good"]}, ValueError, "`tokenizer` to turn rank names into tokens"),
        ({"tokenizer": "ViT-B-32"}, TypeError, "`tokenizer` to be callable"),
        ({"context": "{} and {}", "tokenizer": WITH_TOKENIZER}, ValueError, "at most one {} in `context`.*but got 2"),
        (
            {"context": "a {}", "rank_position": "front", "tokenizer": WITH_TOKENIZER},
            ValueError,
            "leave one of them out",
        ),
        ({"interpolation": "cubic"}, ValueError, "`interpolation` to be one of .* or None, but got 'cubic'"),
        ({"rank_position": "end"}, ValueError, "`rank_position` to be one of .* but got 'end'"),
        ({"num_base_ranks": 0}, ValueError, "1 to 5 base ranks for 5 ranks, but got 0"),
        ({"num_base_ranks": 6}, ValueError, "1 to 5 base ranks for 5 ranks, but got 6"),
        ({"num_base_ranks": 2.0}, TypeError, "`num_base_ranks` to be an integer"),
        (
            {"base_rank_names": ["a", "b"], "interpolation": None, "tokenizer": WITH_TOKENIZER},
            ValueError,
            "need interpolated",
        ),
        (
            {"base_rank_names": ["a", "b"], "num_base_ranks": 4, "tokenizer": WITH_TOKENIZER},
            ValueError,
            "4 `base_rank_names`",
        ),
        ({"base_rank_names": list("abcdef"), "tokenizer": WITH_TOKENIZER}, ValueError, "1 to 5 base ranks"),
        ({"base_rank_names": "abc", "tokenizer": WITH_TOKENIZER}, TypeError, "`base_rank_names` to be a list of names"),
        ({"tokens_per_rank": 0}, ValueError, "`tokens_per_rank` to be at least 1, but got 0"),
        ({"tokens_per_rank": 1.5}, TypeError, "`tokens_per_rank` to be an integer, but got 1.5"),
        ({"ranks": ["Good", "good"], "tokenizer": WITH_TOKENIZER}, ValueError, "'Good' and 'good' are the same"),
        ({"rank_values": [1e9 + i for i in range(5)]}, ValueError, "float32 tells apart"),
        ({"tokens_per_rank": [1, 2, 3, 4, 5]}, ValueError, "need interpolation=None"),
        ({"tokens_per_rank": [1, 2], "interpolation": None}, ValueError, "5 counts in `tokens_per_rank`"),
        ({"in_features": 0}, ValueError, "`in_features` to be at least 1"),
        ({"logit_scale": 100.0}, ValueError, r"log of the factor.*math.log\(100\)"),
        ({"n_context": 4}, TypeError, "unexpected keyword argument 'n_context'"),
        ({"context": "a photo of {rank}", "tokenizer": WITH_TOKENIZER}, ValueError, "`{}` in the place of the rank"),
        ({"dtype": "float32"}, TypeError, "floating point dtype of torch, but got 'float32'"),
        ({"dtype": torch.int64}, TypeError, "floating point dtype of torch, but got torch.int64"),
        ({"tokenizer": lambda texts: texts}, TypeError, r"a row of token ids for each text, but for "),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], match: str, clip: Any, tokenizer: Any) -> None:
    if options.get("tokenizer") == WITH_TOKENIZER:
        options = {**options, "tokenizer": tokenizer}
    with pytest.raises(error, match=match):
        op.OrdinalPromptHead(clip, **{"ranks": 5, **options})


def test_mistakes_in_options_are_answered_before_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ordinal_prompt.text.hub.load_open_clip", lambda *_: pytest.fail("loads the model"))
    with pytest.raises(TypeError, match="unexpected keyword argument 'rank'"):
        op.OrdinalPromptHead.from_open_clip("ViT-B-32", rank=5, ranks=5)
    with pytest.raises(ValueError, match="`rank_position` to be one of"):
        op.OrdinalPromptHead.from_open_clip("ViT-B-32", ranks=5, rank_position="end")
    with pytest.raises(ValueError, match="at least 2 ranks, but got 1"):
        op.OrdinalPromptHeads.from_open_clip("ViT-B-32", attributes={"age": 101, "quality": 1})


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "ViT-B-32", None])
def test_a_model_without_a_text_encoder(model: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"hold a text encoder, but got {type(model).__name__}. Accepted are an open_clip"
    ):
        op.OrdinalPromptHead(model, 5)


def test_an_image_tower() -> None:
    with pytest.raises(TypeError, match="got VisionTransformer"):
        op.OrdinalPromptHead(tiny_clip().visual, 5)


def test_other_vocabularies_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"vocabulary \(100\) is not that of OpenAI's CLIP"):
        op.OrdinalPromptHead(tiny_clip(vocab_size=100), 5)


def test_a_tower_with_a_feature_per_token() -> None:
    import open_clip

    tower = open_clip.CustomTextCLIP(8, VISION, {"width": 16, "heads": 2, "layers": 1, "pool_type": "none"})
    with pytest.raises(ValueError, match="pool_type 'none'"):
        op.OrdinalPromptHead(tower, 5)


def test_numbers_of_other_libraries(clip: Any, tokenizer: Any) -> None:
    numpy = pytest.importorskip("numpy")
    head = op.OrdinalPromptHead(
        clip, numpy.int64(5), context=torch.tensor(4), num_base_ranks=numpy.int32(2), in_features=numpy.int64(7)
    )
    assert (head.num_ranks, head.in_features, head.prompt.num_base_ranks) == (5, 7, 2)
    assert op.OrdinalPromptHead(clip, numpy.array(["bad", "good"]), tokenizer=tokenizer).rank_names == ("bad", "good")
    assert op.recipe(numpy.int64(5)) == op.recipe(5)


def test_models_of_transformers_that_do_not_fit(tokenizer: Any) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with pytest.raises(TypeError, match="hold a text encoder, but got ViTModel"):
        op.OrdinalPromptHead(transformers.ViTModel(transformers.ViTConfig(**sizes)), 5)
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=30, **sizes))
    with pytest.raises(ValueError, match="vocabulary has 30; pass the tokenizer that belongs"):
        op.OrdinalPromptHead(bert, 5, tokenizer=tokenizer)
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=49408, **sizes))
    assert op.OrdinalPromptHead(bert, 5, tokenizer=tokenizer).prototypes().shape == (5, 16)


def test_unknown_pooling() -> None:
    with pytest.raises(ValueError, match="`pooling` to be one of"):
        op.text.TransformersTextEncoder(nn.Identity(), pooling="max")


@pytest.mark.parametrize(
    ("features", "error", "match"),
    [
        (torch.randn(2, 7), ValueError, r"shape \(\.\.\., 12\), but got \(2, 7\); .*build the head with in_features="),
        (torch.tensor(1.0), ValueError, r"but got \(\)"),
        (torch.ones(2, 12, dtype=torch.long), TypeError, "but got torch.int64"),
        ([[0.0] * 12], TypeError, "but got list"),
    ],
)
def test_bad_features(features: Any, error: type[Exception], match: str, head: op.OrdinalPromptHead) -> None:
    with pytest.raises(error, match=match):
        head(features)


@pytest.mark.parametrize(
    ("positions", "match"),
    [
        ([-0.1], "between the first and the last rank, 0 and 4"),
        ([4.5], "between"),
        ([float("nan")], "between"),
        ([[1.0]], r"shape \(N,\)"),
        ([], "shape"),
    ],
)
def test_bad_positions(positions: Any, match: str, head: op.OrdinalPromptHead) -> None:
    with pytest.raises(ValueError, match=match):
        head.prototypes_at(positions)


def test_positions_need_interpolation(clip: Any) -> None:
    with pytest.raises(ValueError, match="interpolation=None"):
        op.OrdinalPromptHead(clip, 5, interpolation=None).prototypes_at([1])


def test_names_the_tokenizer_drops(clip: Any) -> None:
    import open_clip

    def tokenizer(texts: list[str]) -> torch.Tensor:
        return open_clip.tokenize([text.replace("?", "") for text in texts])

    with pytest.raises(ValueError, match="gives none for '\\?'"):
        op.OrdinalPromptHead(clip, ["?", "yes"], tokenizer=tokenizer)


LOGITS, LABELS = torch.zeros(8, 5), torch.arange(8) % 5


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: op.OrdinalPromptLoss()(LOGITS, LABELS[:, None]), ValueError, "; squeeze them"),
        (lambda: op.OrdinalPromptLoss()(LOGITS, torch.ones_like(LOGITS).long()), ValueError, r"pass labels.float\(\)"),
        (lambda: op.OrdinalPromptLoss(rank_weights=[0] * 5), ValueError, "none negative, not all zero"),
        (lambda: op.OrdinalPromptLoss(0, 0), ValueError, "`kl_weight` or `emd_weight` to be above zero"),
        (lambda: op.OrdinalPromptLoss(ignore_index="none"), TypeError, "`ignore_index` to be a number, as -100"),
        (
            lambda: op.rank_indices([1, float("nan")], [1, 2], nearest=True),
            ValueError,
            "are missing .NaN.; drop",
        ),
        (lambda: op.soft_labels([0], 1), ValueError, "`num_ranks` to be a whole number, at least 2"),
        (lambda: op.adapt_prior(LOGITS[:0], [1] * 5), ValueError, "0 samples.*pass `prior` if it is known"),
        (lambda: op.adapt_prior(LOGITS / 0, [1] * 5), ValueError, "8 samples, or NaN"),
        (lambda: op.ConformalRanks("0.9"), ValueError, r"`coverage` in \(0, 1\), but got '0.9'"),
        (lambda: op.export_heads(None), TypeError, "`model` to be a torch.nn.Module, but got NoneType"),
        (
            lambda: op.load_exported("folder", nn.Linear(2, 2)),
            TypeError,
            "`model` to be a torch.nn.Module, but got str",
        ),
        (lambda: op.load_exported(nn.Linear(2, 2), {}), ValueError, "do not fit Linear: weight, bias missing. Pass"),
        (lambda: op.parameter_groups(op.OrdinalPromptHead(tiny_clip(), 3), lr=-1.0), ValueError, "`lr` to be finite"),
        (lambda: op.parameter_groups(iter([]), lr=1.0), TypeError, "`model` to be a torch.nn.Module"),
        (lambda: op.fit_head(nn.Linear(2, 2), LOGITS, LABELS), TypeError, "`head` to be an OrdinalPromptHead"),
        (lambda: op.regularization(nn.Linear(2, 2), 8), TypeError, "`head` to be an OrdinalPromptHead"),
        (lambda: op.regularization(op.OrdinalPromptHead(tiny_clip(), 3), 0), ValueError, "`num_samples` to be that of"),
        (
            lambda: op.OrdinalPromptHeads({"age": op.OrdinalPromptHead(tiny_clip(), 3)})["ages"],
            KeyError,
            "attributes 'age'",
        ),
    ],
)
def test_bad_calls(call: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_a_batch_of_ranks_without_weight_has_no_loss() -> None:
    for smoothing in (0.0, 0.1):
        loss = op.OrdinalPromptLoss(rank_weights=[0, 1, 1, 1, 1], label_smoothing=smoothing)
        logits = torch.randn(3, 5, requires_grad=True)
        loss(logits, torch.zeros(3, dtype=torch.long)).backward()
        assert logits.grad is not None
        assert not logits.grad.any()


def test_ranks_that_are_masked_out_leave_weighted_losses_finite() -> None:
    logits = torch.tensor([[1.0, 0.0, -torch.inf]])
    loss = op.OrdinalPromptLoss(kl_weight=0, rank_weights=[1, 1, 1])(logits, torch.tensor([0]))
    assert loss.item() == pytest.approx(0.3133, abs=1e-4)
