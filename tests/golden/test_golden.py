"""The head gives the published implementation's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ordinal_prompt as op

CASES = sorted((Path(__file__).parent / "data").glob("*.npz"))


class Case:
    """One golden file: its arrays as tensors, and the head that it describes."""

    def __init__(self, path: Path) -> None:
        arrays = np.load(path, allow_pickle=False)
        self.meta: dict[str, Any] = json.loads(str(arrays["meta"]))
        self.arrays = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "meta"}
        self.tolerance = 1e-9 if self.meta["dtype"] == "float64" else 1e-4

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def clip(self) -> open_clip.CLIP:
        meta = self.meta
        model = open_clip.CLIP(
            embed_dim=meta["embed_dim"],
            vision_cfg={"layers": 1, "width": 16, "head_width": 16, "patch_size": 16, "image_size": 16},
            text_cfg={
                "context_length": meta["context_length"],
                "vocab_size": meta["vocab_size"],
                "width": meta["text_width"],
                "heads": meta["text_heads"],
                "layers": meta["text_layers"],
            },
            quick_gelu=meta["quick_gelu"],
        ).to(getattr(torch, meta["dtype"]))
        weights = {name: value for name, value in self.arrays.items() if name in model.state_dict()}
        model.load_state_dict(weights, strict=False)
        with torch.no_grad():
            model.token_embedding.weight[self["token_ids"].long()] = self["token_rows"]
        return model

    def head(self) -> op.OrdinalPromptHead:
        meta = self.meta
        names = {}
        if meta["rank_names"] and meta["learner"] == "rank":
            names = {"base_rank_names": meta["rank_names"]}
        ranks = meta["rank_names"] if meta["rank_names"] and meta["learner"] == "plain" else meta["num_ranks"]
        return op.OrdinalPromptHead(
            self.clip(),
            ranks,
            tokenizer=open_clip.get_tokenizer("ViT-B-32"),
            context=meta["init_context"] or meta["num_context_tokens"],
            rank_position=meta["rank_tokens_position"],
            rank_specific_context=meta["rank_specific_context"],
            interpolation=meta["interpolation_type"],
            num_base_ranks=meta["num_base_ranks"] or 3,
            tokens_per_rank=meta["num_tokens_per_rank"],
            **names,
        )


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture
def head(case: Case) -> op.OrdinalPromptHead:
    head = case.head()
    with torch.no_grad():
        head.prompt.context_embeddings.copy_(case["context_embeds"])
        head.prompt.rank_embeddings.copy_(case["rank_embeds"])
    return head


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """The largest difference is small beside the largest value."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_all_cases_are_there() -> None:
    assert len(CASES) == 14


def test_prompts_start_from_the_same_texts(case: Case) -> None:
    head = case.head()
    if case.meta["init_context"]:
        torch.testing.assert_close(head.prompt.context_embeddings.detach(), case["context_embeds"])
    if case.meta["rank_names"]:
        torch.testing.assert_close(head.prompt.rank_embeddings.detach(), case["rank_embeds"])


def test_prompts_are_laid_out_alike(case: Case, head: op.OrdinalPromptHead) -> None:
    embeddings, _ = head.prompt().sequences(case["sentence_embeds"].shape[1])
    assert_close(embeddings.detach(), case["sentence_embeds"], case.tolerance)
    prompts = head.prompt()
    assert torch.equal(prompts.lengths + len(prompts.prefix) - 1, case["eot_positions"].long())


def test_features_logits_losses_and_gradients(case: Case, head: op.OrdinalPromptHead) -> None:
    features = case["image_features"].clone().requires_grad_()
    labels = case["labels"]
    logits = head(features)
    assert_close(head.text_encoder.encode(head.prompt()).detach(), case["text_features"], case.tolerance)
    assert_close(head.prototypes().detach(), F.normalize(case["text_features"], dim=-1), case.tolerance)
    assert_close(logits.detach(), case["logits"], case.tolerance)
    loss = op.OrdinalPromptLoss()
    terms = loss.terms(logits, labels)
    for name, term in terms.items():
        torch.testing.assert_close(term.detach(), case[f"{name}_loss"], rtol=case.tolerance, atol=case.tolerance)
    loss(logits, labels).backward()
    assert_close(head.prompt.context_embeddings.grad, case["grad_context_embeds"], case.tolerance)
    assert_close(head.prompt.rank_embeddings.grad, case["grad_rank_embeds"], case.tolerance)
    assert_close(features.grad, case["grad_image_features"], case.tolerance)


def test_interpolation_weights(case: Case, head: op.OrdinalPromptHead) -> None:
    if case.meta["learner"] == "rank":
        weights = head.prompt.interpolation_weights
        assert_close(weights, case["interpolation_weights"].to(weights), case.tolerance)


def test_decoding(case: Case) -> None:
    labels = case["labels"]
    expectation, argmax = op.decode(case["logits"]), op.decode(case["logits"], "argmax")
    assert_close(expectation, case["predict_y_exp"], case.tolerance)
    assert torch.equal(argmax, case["predict_y_max"].long())
    assert_close((expectation - labels).abs(), case["mae_exp"], case.tolerance)
    assert torch.equal((expectation.round() == labels).to(case["acc_exp"]), case["acc_exp"])
    assert torch.equal((argmax == labels).to(case["acc_max"]), case["acc_max"])


def test_ordinality_at_every_span(case: Case, head: op.OrdinalPromptHead) -> None:
    prototypes = head.eval().prototypes()
    first, last = case.meta["ordinality_slice"] or (0, len(prototypes))
    for kind, part in (("ordinality", prototypes[first:last]), ("ordinality_full", prototypes)):
        for span, value in zip(case[f"{kind}_spans"].tolist(), case[f"{kind}_values"].tolist(), strict=True):
            assert op.ordinality(part, span) == pytest.approx(value, abs=1e-7)
