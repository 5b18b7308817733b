"""The packed text pass equals one full-length sequence per prompt, forward and backward."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from conftest import TEXT, TEXT_OPTIONS, VISION, shaken, tiny_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

import ordinal_prompt as op
from ordinal_prompt.text.open_clip import CausalTextHalf, _sizes
from ordinal_prompt.text.packing import SharedPrefixAttention, pack, packed_mask, unpack
from ordinal_prompt.text.towers import TextHalf, text_half

torch.manual_seed(7)
TOWERS: dict[str, nn.Module] = {
    "clip": tiny_clip(context_length=40),
    "class token": shaken(TextTransformer(40, 49408, 16, 2, 2, output_dim=8, embed_cls=True)),
}
if "eos_id" in TEXT_OPTIONS:
    with_eos = {**TEXT, "pool_type": "eos", "eos_id": 49407}
    classes = {"embed_cls": True, "correct_cls_mask": True}
    TOWERS["correct class token"] = shaken(TextTransformer(40, 49408, 16, 2, 2, output_dim=8, **classes))
    TOWERS["eos"] = shaken(open_clip.CustomTextCLIP(8, VISION, with_eos).text)


def reference(tower: nn.Module) -> TextHalf:
    """The tower's own code on full-length sequences."""
    half = text_half(tower, tower.token_embedding.weight, ("visual", "logit_scale", "logit_bias"))
    return TextHalf(half, *_sizes(tower), cut=False)


@settings(max_examples=40, deadline=None)
@given(
    tower=st.sampled_from(sorted(TOWERS)),
    ranks=st.integers(2, 90),
    context=st.integers(0, 9),
    position=st.sampled_from(["tail", "front", "middle"]),
    specific=st.booleans(),
    interpolation=st.sampled_from(["linear", None]),
    data=st.data(),
)
def test_packed_equals_full_sequences(
    tower: str, ranks: int, context: int, position: str, specific: bool, interpolation: str | None, data: Any
) -> None:
    torch.manual_seed(0)
    counts: Any = data.draw(st.integers(1, 4))
    if interpolation is None and data.draw(st.booleans()):
        counts = data.draw(st.lists(st.integers(1, 4), min_size=ranks, max_size=ranks))
    head = op.OrdinalPromptHead(
        TOWERS[tower], ranks, context=context, rank_position=position, rank_specific_context=specific,
        interpolation=interpolation, tokens_per_rank=counts,
    )  # fmt: skip
    assert isinstance(head.text_encoder, CausalTextHalf)
    with torch.no_grad():
        for parameter in head.prompt.parameters():
            parameter.mul_(30)
    weights = torch.randn(ranks, head.embed_dim)

    def run(encoder: nn.Module) -> tuple[Tensor, list[Tensor]]:
        features = encoder.encode(head.prompt())
        gradients = torch.autograd.grad((features * weights).sum(), [*head.prompt.parameters()], allow_unused=True)
        return features, [g if g is not None else torch.zeros(()) for g in gradients]

    fast, slow = run(head.text_encoder), run(reference(TOWERS[tower]))
    torch.testing.assert_close(fast[0], slow[0], rtol=1e-4, atol=1e-4)
    for a, b in zip(fast[1], slow[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * max(1.0, b.abs().max().item() if b.numel() else 0.0))


def test_attention_equals_the_one_it_is_made_of() -> None:
    """Under the mask that packing means, token by token."""
    prefix, prompts, suffix = 3, 4, 2
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    packed = torch.randn(1, prefix + prompts * suffix, 8, requires_grad=True)
    mask = torch.full((packed.shape[1], packed.shape[1]), -torch.inf)
    for row in range(len(mask)):
        for column in range(row + 1):
            own = row >= prefix <= column and (row - prefix) // suffix == (column - prefix) // suffix
            if column < prefix or own:
                mask[row, column] = 0
    expected = attention(packed, packed, packed, attn_mask=mask, need_weights=False)[0]
    visible = torch.ones(suffix, suffix, dtype=torch.bool).tril()
    fast = SharedPrefixAttention(attention)(
        packed, packed, packed, attn_mask=packed_mask(visible, prefix, torch.float32)
    )[0]
    torch.testing.assert_close(fast, expected)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad((x * weights).sum(), packed)[0] for x in (fast, expected)))


def test_unpack_undoes_pack() -> None:
    prefix, suffixes = torch.randn(4, 8), torch.randn(7, 3, 8)
    packed = pack(prefix, suffixes)
    assert packed.shape == (1, 4 + 7 * 3, 8)
    assert torch.equal(packed[0, :4], prefix)
    assert torch.equal(unpack(packed, 4, 3), suffixes)
