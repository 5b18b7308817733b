"""Prompts: interpolation, names and their places."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ordinal_prompt as op
from ordinal_prompt.interpolation import INTERPOLATIONS, base_positions, interpolation_weights
from ordinal_prompt.text import PromptTokenizer


def weights_one_by_one(positions: list[float], bases: list[float], kind: str) -> torch.Tensor:
    """The published formula, a weight at a time."""
    length = positions[-1] - positions[0]
    rows = []
    for position in positions:
        row = []
        for base in bases:
            distance = torch.tensor(abs(position - base), dtype=torch.float64)
            row.append(
                {
                    "linear": 1 - distance / length,
                    "inv_prop": 1 / (distance + 1e-5),
                    "normal": torch.exp(-(distance**2)),
                }[kind]
            )
        rows.append(torch.stack(row) / sum(row))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["linear", "inv_prop", "normal"])
@given(values=st.lists(st.integers(0, 12), min_size=2, max_size=9, unique=True), bases=st.integers(1, 9))
def test_weights_are_the_published_ones(kind: str, values: list[int], bases: int) -> None:
    positions = [float(value) for value in sorted(values)]
    weights = interpolation_weights(torch.tensor(positions), positions[0], positions[-1], bases, kind)
    centres = base_positions(positions[0], positions[-1], bases).tolist()
    torch.testing.assert_close(weights, weights_one_by_one(positions, centres, kind))


@given(ranks=st.integers(2, 300), bases=st.integers(1, 300), kind=st.sampled_from(INTERPOLATIONS))
def test_weights_are_finite_and_sum_to_one(ranks: int, bases: int, kind: str) -> None:
    weights = interpolation_weights(torch.arange(ranks).float(), 0, ranks - 1, min(bases, ranks), kind)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(ranks, dtype=torch.float64))


def test_linear_does_not_pass_through_its_bases_and_piecewise_does() -> None:
    linear = interpolation_weights(torch.arange(5.0), 0, 4, 3, "linear")
    assert linear[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    piecewise = interpolation_weights(torch.arange(5.0), 0, 4, 3, "piecewise")
    assert torch.equal(piecewise[[0, 2, 4]], torch.eye(3, dtype=torch.float64))
    assert piecewise[1].tolist() == [0.5, 0.5, 0]


@pytest.mark.parametrize("interpolation", [*INTERPOLATIONS, None])
@pytest.mark.parametrize("position", ["tail", "front", "middle"])
@pytest.mark.parametrize("ranks", [2, 3, 9])
def test_every_combination_builds(interpolation: str | None, position: str, ranks: int, clip: Any) -> None:
    for bases in sorted({1, 2, min(3, ranks), ranks}):
        head = op.OrdinalPromptHead(
            clip, ranks, context=3, rank_position=position, interpolation=interpolation, num_base_ranks=bases
        )
        assert head.prompt.rank_embeddings.shape == (bases if interpolation else ranks, 1, 16)
        assert head.prototypes().isfinite().all()


def test_default_bases_are_clipped_to_the_ranks(clip: Any) -> None:
    assert op.OrdinalPromptHead(clip, 2).prompt.num_base_ranks == 2


def test_random_start_has_the_published_spread(clip: Any) -> None:
    head = op.OrdinalPromptHead(clip, 200, context=30, interpolation=None)
    assert head.prompt.context_embeddings.std().item() == pytest.approx(0.02, rel=0.2)
    assert head.prompt.rank_embeddings.std().item() == pytest.approx(0.02, rel=0.1)


def test_names_with_interpolation_come_close_to_themselves(clip: Any, tokenizer: Any) -> None:
    names = ["tiny", "small", "medium sized", "large", "very very large"]
    head = op.OrdinalPromptHead(clip, names, tokenizer=tokenizer, num_base_ranks=5)  # as many bases: an exact fit
    ids = [tokenizer.encode(name) for name in names]
    longest = max(map(len, ids))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    mixed = torch.einsum("kb,btw->ktw", head.prompt.interpolation_weights, head.prompt.rank_embeddings)
    torch.testing.assert_close(mixed, clip.token_embedding(padded), rtol=0, atol=1e-4)
    fewer = op.OrdinalPromptHead(clip, names, tokenizer=tokenizer, num_base_ranks=2)
    assert fewer.prompt.rank_embeddings.shape == (2, 3, 16)
    assert fewer.rank_names == tuple(names)


def test_base_names_start_the_base_ranks(clip: Any, tokenizer: Any) -> None:
    head = op.OrdinalPromptHead(
        clip, 9, tokenizer=tokenizer, base_rank_names=["young", "middle-aged", "very old", "ancient"]
    )
    assert head.prompt.num_base_ranks == 4
    assert head.prompt.rank_embeddings.shape == (4, 3, 16)
    assert torch.equal(
        head.prompt.rank_embeddings[2, :2], clip.token_embedding(torch.tensor(tokenizer.encode("very old")))
    )


def test_a_template_marks_the_place_of_the_rank(clip: Any, tokenizer: Any) -> None:
    for template in ("a photo of a {} year old face", "a photo of a {} year old face."):
        head = op.OrdinalPromptHead(clip, ["5", "10"], tokenizer=tokenizer, context=template, interpolation=None)
        ids = torch.stack(
            [tokenizer(["a photo of a 5 year old face."])[0], tokenizer(["a photo of a 10 year old face."])[0]]
        )
        embeddings, _ = head.prompt().sequences(77)
        torch.testing.assert_close(embeddings, clip.token_embedding(ids))


def test_rank_values_take_the_place_of_the_index(clip: Any) -> None:
    head = op.OrdinalPromptHead(clip, 4, rank_values=[0, 1, 10, 100], num_base_ranks=2)
    assert head.prompt.interpolation_weights[:, 1].tolist() == pytest.approx([0, 0.01, 0.1, 1])
    assert head.rank_names == ("0", "1", "10", "100")


def test_prototypes_at_ranks_are_the_prototypes(clip: Any) -> None:
    for specific in (False, True):
        head = op.OrdinalPromptHead(clip, 4, rank_values=[1, 2, 4, 8], rank_specific_context=specific).eval()
        torch.testing.assert_close(head.prototypes_at([1, 2, 4, 8]), head.prototypes())
        torch.testing.assert_close(head.prototypes_at(head.rank_values), head.prototypes())
        between = head.prototypes_at(torch.tensor([3.0, 5.5]))
        assert between.shape == (2, 12)
        torch.testing.assert_close(between.norm(dim=1), torch.ones(2))
        assert not between.requires_grad
        assert head.train().prototypes_at([3]).requires_grad


def test_positions_are_as_exact_as_rank_values(clip: Any) -> None:
    head = op.OrdinalPromptHead(clip, 3, rank_values=[0.1, 0.2, 0.7])
    assert head.prototypes_at([0.1, 0.7]).shape == head.prototypes_at(head.rank_values[[0, 2]]).shape == (2, 12)
    assert head.rank_names == ("0.1", "0.2", "0.7")


def test_ranks_are_mixed_in_full_precision_under_autocast(clip: Any) -> None:
    head = op.OrdinalPromptHead(clip, 1000)
    with torch.autocast("cpu", torch.bfloat16):
        suffixes = head.prompt().suffixes
    assert torch.equal(suffixes, head.prompt().suffixes)


@pytest.mark.parametrize("interpolation", ["linear", "normal", "inv_prop", "piecewise"])
def test_bases_from_names_stay_of_the_size_of_words(interpolation: str, clip: Any, tokenizer: Any) -> None:
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for values in (None, [i / 9 for i in range(10)]):
        head = op.OrdinalPromptHead(
            clip, names, tokenizer=tokenizer, interpolation=interpolation, num_base_ranks=10, rank_values=values
        )
        word = clip.token_embedding(torch.tensor(tokenizer.encode("five"))).norm()
        assert head.prompt.rank_embeddings.norm(dim=-1).max() < 20 * word


def test_interpolation_weights_stay_in_float32(clip: Any) -> None:
    head = op.OrdinalPromptHead(clip, 1001, interpolation="linear")
    exact = head.prompt.interpolation_weights.clone()
    for half in (head.half(), head.bfloat16()):
        assert torch.equal(half.prompt.interpolation_weights, exact)
        assert half.rank_values.tolist() == list(range(1001))
    assert head.double().prompt.interpolation_weights.dtype == torch.float64


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32"])
def test_tokens_of_openai(name: str) -> None:
    tokens = PromptTokenizer(open_clip.get_tokenizer(name))
    assert (tokens.start, tokens.end, tokens.padding, tokens.full_stop) == ((49406,), (49407,), 0, (269,))
    assert tokens.words("middle-aged_person") == tuple(open_clip.tokenizer._tokenizer.encode("middle-aged person"))
    assert len(tokens.words("word " * 200)) == 200  # not cut at the context length
    assert tokens.words("") == ()


def test_tokenizers_in_other_shapes() -> None:
    plain = PromptTokenizer(open_clip.tokenize)
    unpadded = PromptTokenizer(
        lambda texts: [[49406, *open_clip.tokenizer._tokenizer.encode(text), 49407] for text in texts]
    )
    assert plain.words("a dog") == unpadded.words("a dog") == (320, 1929)
    assert unpadded.end == (49407,)
    no_punctuation = PromptTokenizer(
        lambda texts: [[5 + len(word) for word in t.replace(".", "").split()] + [1, 0, 0] for t in texts]
    )
    assert no_punctuation.full_stop == ()
    assert no_punctuation.start == ()


def test_a_tokenizer_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match="ids for 'one'"):
        PromptTokenizer(lambda texts: torch.tensor([[1, 2, 0, 0] for _ in texts]))
