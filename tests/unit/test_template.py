"""A prompt has the token ids of its whole text, whatever its tokenizer does with blanks and punctuation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch

from ordinal_prompt.config import HeadConfig
from ordinal_prompt.text import PromptTokenizer
from ordinal_prompt.text.template import WrittenPrompts, write_prompts

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

TEXTS = ["the quality is bad.", "a photo of a 25-year-old face.", "the film, very good, was seen", "(good) 'bad' one"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
NAMES = ["bad", "very_good", "25"]
TEMPLATES = ["the quality is {}", "{} work", "a {}-year-old face", "the film, {}, was seen", "{} ", " {}", "{}"]
TEMPLATES += ["'{}'", "({})", "{}'s work.", "it_is {} ."]


def trained(kind: str, template: str = "<s> $A </s>") -> Any:
    """A small tokenizer of transformers, byte-level as GPT's and RoBERTa's or of words with "▁" as T5's and Llama's."""
    if kind == "byte-level":
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
    else:
        model = tokenizers.Tokenizer(tokenizers.models.Unigram())
        model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        trainer = tokenizers.trainers.UnigramTrainer(
            vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    model.train_from_iterator(TEXTS * 20, trainer)
    ids = [(token, SPECIAL.index(token)) for token in template.split() if token in SPECIAL]
    model.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=ids)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", unk_token="<unk>")


def written(tokenizer: Callable[..., Any], names: list[str] | None = None, **options: Any) -> WrittenPrompts:
    if names is not None:
        options["interpolation"] = None
    return write_prompts(PromptTokenizer(tokenizer), HeadConfig(names or 5, **options))


def whole_ids(prompts: WrittenPrompts) -> list[list[int]]:
    text, context = prompts.text, prompts.context_ids or ()
    at = text.rank_at
    return [[*text.start, *context[:at], *rank, *context[at:], *text.end] for rank in prompts.rank_ids or ()]


def own_ids(tokenizer: Callable[..., Any], template: str, names: list[str]) -> list[list[int]]:
    texts = [template.format(name).rstrip().removesuffix(".").replace("_", " ") + "." for name in names]
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        return [[49406, *tokenizer.encode(text), 49407] for text in texts]
    ids: list[list[int]] = tokenizer(texts)["input_ids"]
    return ids


@pytest.fixture(params=["byte-level", "words", "clip"], scope="module")
def anyones(request: Any) -> Any:
    return open_clip.get_tokenizer("ViT-B-32") if request.param == "clip" else trained(request.param)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_has_the_ids_of_its_whole_text(template: str, anyones: Any) -> None:
    assert whole_ids(written(anyones, NAMES, context=template)) == own_ids(anyones, template, NAMES)


@pytest.mark.parametrize("context", ["the quality is", " the quality_is ", "work", ""])
@pytest.mark.parametrize("position", ["front", "middle", "tail"])
def test_a_text_beside_the_rank_is_written_as_a_template(context: str, position: str, anyones: Any) -> None:
    words = context.replace("_", " ").split()
    at = {"front": 0, "middle": len(words) // 2, "tail": len(words)}[position]
    template = " ".join([*words[:at], "{}", *words[at:]])
    prompts = written(anyones, NAMES, context=context, rank_position=position)
    if position != "middle" or prompts.text.rank_at == at:  # else it stands between two tokens of one word
        assert whole_ids(prompts) == own_ids(anyones, template, NAMES)


@pytest.mark.parametrize("template", ["the quality is {}", "a photo of a {}-year-old face", "'{}'"])
def test_the_words_around_random_ranks_are_those_around_a_name(template: str, anyones: Any) -> None:
    named, random = written(anyones, ["bad", "25"], context=template), written(anyones, context=template)
    assert named.context_ids == random.context_ids
    assert (named.text.rank_at, named.text.end) == (random.text.rank_at, random.text.end)


def test_tokens_across_a_border_belong_to_the_rank(tokenizer: Any) -> None:
    prompts = written(tokenizer, ["bad", "happy"], context="it is un{}")
    assert prompts.context_ids == tuple(tokenizer.encode("it is"))
    assert prompts.rank_ids == tuple(tuple(tokenizer.encode(word)) for word in ("unbad", "unhappy"))


def test_a_full_stop_that_some_names_swallow_is_written_by_itself(tokenizer: Any) -> None:
    assert tokenizer.encode("good!.") != [*tokenizer.encode("good!"), *tokenizer.encode(".")]
    prompts = written(tokenizer, ["bad", "good!"], context="it is {}")
    assert prompts.rank_ids == tuple(tuple(tokenizer.encode(word)) for word in ("bad", "good!"))
    assert prompts.text.end == (269, 49407)


def padded(tokenizer: Any, **options: Any) -> Callable[[list[str]], torch.Tensor]:
    return lambda texts: tokenizer(texts, padding="max_length", max_length=24, return_tensors="pt", **options).input_ids


def test_a_function_that_pads_in_front_or_truncates_is_refused() -> None:
    tokenizer = trained("byte-level")
    left = padded(tokenizer, padding_side="left")
    with pytest.raises(ValueError, match=r"pad behind a text, but it pads in front of it \(\[0, 0, 0, 0\]"):
        PromptTokenizer(left)
    cutting = padded(tokenizer, truncation=True)
    for context in ("the quality is " * 9, "{}" + " the quality is" * 9, "the quality is " * 9 + "{}"):
        for side in ("left", "right"):
            tokenizer.truncation_side = side
            with pytest.raises(ValueError, match=r"read a whole text, but it cuts '.*' at 22 tokens; pass the tokeniz"):
                written(cutting, ["bad", "25"], context=context)
    assert whole_ids(written(cutting, NAMES, context="the quality is {}")) == own_ids(
        tokenizer, "the quality is {}", NAMES
    )


@pytest.mark.parametrize("template", ["<s> $A </s>", "<s> $A", "$A </s>"])
def test_padding_that_is_the_end_of_text_tells_whether_there_is_one(template: str) -> None:
    tokenizer = trained("byte-level", template)
    tokenizer.pad_token = "</s>"
    for read in (tokenizer, padded(tokenizer), padded(tokenizer, truncation=True)):
        assert whole_ids(written(read, NAMES, context="the quality is {}")) == own_ids(
            tokenizer, "the quality is {}", NAMES
        )
