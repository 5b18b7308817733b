"""The loss of several attributes: weights, and labels that are missing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attribute_setup import build, labels
from torch import nn

import ordinal_prompt as op


def test_missing_labels(clip: Any) -> None:
    heads = op.OrdinalPromptHeads(build(clip))
    features, given = torch.randn(8, 7), labels()
    given["age"][:5] = -100
    given["blur"][:] = -100
    loss = heads.loss({"age": 0.5, "quality": 2})
    terms = loss.terms(heads(features), given)
    expected = heads["age"].loss()(heads["age"](features)[5:], given["age"][5:])
    torch.testing.assert_close(terms["age"], expected)
    assert terms["blur"].item() == 0
    total = loss(heads(features), given)
    torch.testing.assert_close(total, 0.5 * terms["age"] + 2 * terms["quality"] + terms["fitted"])
    total.backward()
    for name, parameter in heads.named_parameters():  # all of them, so that no process waits for another
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert not any(parameter.grad.any() for parameter in heads["blur"].parameters())


def test_sample_weights_of_all_or_of_each(clip: Any) -> None:
    heads = op.OrdinalPromptHeads(build(clip))
    logits, given, weight = heads(torch.randn(8, 7)), labels(), torch.rand(8)
    loss = heads.loss()
    for_all, each = loss(logits, given, weight), loss(logits, given, dict.fromkeys(heads, weight))
    assert for_all == each != loss(logits, given)


def test_mistakes(clip: Any) -> None:
    heads = op.OrdinalPromptHeads({"a": op.OrdinalPromptHead(clip, 3)})
    loss, logits = heads.loss(), heads(torch.randn(2, 12))
    with pytest.raises(ValueError, match=r"`labels` of 'a', but got those of 'b'; .* all `ignore_index`"):
        loss(logits, {"b": torch.zeros(2, dtype=torch.long)})
    with pytest.raises(TypeError, match="`logits` to be a dictionary of 'a', but got Tensor"):
        loss(logits["a"], {"a": torch.zeros(2, dtype=torch.long)})
    with pytest.raises(ValueError, match="`weights` of 'a', but got one of 'b'"):
        heads.loss({"b": 1})
    with pytest.raises(ValueError, match="finite and not negative, but got -1 for 'a'"):
        heads.loss({"a": -1})
    with pytest.raises(ValueError, match="loss of at least one attribute"):
        op.OrdinalPromptLosses({})
    with pytest.raises(TypeError, match="the loss of 'a' to be a module, but got function"):
        op.OrdinalPromptLosses({"a": nn.functional.cross_entropy})


def test_more_mistakes() -> None:
    losses = op.OrdinalPromptLosses({"age": op.OrdinalPromptLoss()})
    batch = {"age": torch.zeros(2, 3)}, {"age": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match="`sample_weight` of 'age', but got one of 'ages'"):
        losses(*batch, {"ages": torch.ones(2)})
    with pytest.raises(TypeError, match="`weights` to be a dictionary of 'age', but got 0.5"):
        op.OrdinalPromptLosses({"age": op.OrdinalPromptLoss()}, 0.5)
    with pytest.raises(ValueError, match="can be names of modules, but got 'a.b'"):
        op.OrdinalPromptLosses({"a.b": op.OrdinalPromptLoss()})
    with pytest.raises(TypeError, match="`losses` to be a dictionary"):
        op.OrdinalPromptLosses([op.OrdinalPromptLoss()])
    other = op.OrdinalPromptLosses({"age": torch.nn.CrossEntropyLoss()})
    torch.testing.assert_close(other(*batch), torch.tensor(3.0).log())


def test_the_trainer_of_transformers() -> None:
    """Accumulated over parts of a batch it is the loss of the whole; labels may be the columns of one tensor."""
    heads = {"age": op.OrdinalPromptLoss(ignore_index=-100, kl_weight=0), "sex": op.OrdinalPromptLoss(kl_weight=0)}
    losses = op.OrdinalPromptLosses(heads, {"age": 0.5})
    logits = {"age": torch.randn(8, 4), "sex": torch.randn(8, 2)}
    columns = torch.stack([torch.arange(8) % 4, torch.arange(8) % 2], dim=1)
    named = {"age": columns[:, 0], "sex": columns[:, 1]}
    expected = losses(logits, named)
    torch.testing.assert_close(losses(logits, columns), expected)
    output = SimpleNamespace(logits=logits)
    torch.testing.assert_close(losses(output, columns, num_items_in_batch=(columns != -100).sum()), expected)
    parts = [
        losses({name: part[at : at + 4] for name, part in logits.items()}, columns[at : at + 4], num_items_in_batch=16)
        for at in (0, 4)
    ]
    torch.testing.assert_close(sum(parts), expected)
