"""Several heads on one text encoder: what each would be by itself, in one text pass."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from attribute_setup import build, labels
from conftest import shaken, tiny_clip
from open_clip.transformer import TextTransformer
from torch import nn

import ordinal_prompt as op
from ordinal_prompt.text.open_clip import CausalTextHalf
from ordinal_prompt.text.towers import same_weights


def bert() -> op.text.TransformersTextEncoder:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return op.text.TransformersTextEncoder(shaken(BertModel(BertConfig(vocab_size=49408, **sizes))), pooling="cls")


TOWERS: dict[str, Any] = {
    "clip": tiny_clip,
    "class token": lambda: shaken(TextTransformer(40, 49408, 16, 2, 2, output_dim=12, embed_cls=True)),
    "custom text": lambda: shaken(TextTransformer(40, 49408, 16, 2, 2, output_dim=12, no_causal_mask=True)),
}


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("frozen", [True, False])
def test_prototypes_and_gradients_are_those_of_separate_heads(tower: str, frozen: bool) -> None:
    torch.manual_seed(3)
    text = TOWERS[tower]()
    alone = build(copy.deepcopy(text), freeze_text_encoder=frozen)
    heads = op.OrdinalPromptHeads(build(text, freeze_text_encoder=frozen))
    features = torch.randn(8, 7)

    prototypes = heads.prototypes()
    for name, head in alone.items():
        assert prototypes[name].requires_grad
        torch.testing.assert_close(prototypes[name], head.prototypes(), rtol=0, atol=1e-5)

    loss = heads.loss()
    logits = heads(features)
    loss(logits, labels()).backward()
    expected = {name: head(features) for name, head in alone.items()}
    sum(alone[name].loss()(expected[name], labels()[name]) for name in alone).backward()
    for name, head in alone.items():
        torch.testing.assert_close(logits[name], expected[name], rtol=1e-5, atol=1e-5)
        others = dict(heads[name].named_parameters())
        for own, parameter in head.named_parameters():
            torch.testing.assert_close(others[own].grad, parameter.grad, rtol=1e-4, atol=1e-5, msg=f"{name} {own}")


def passes(heads: op.OrdinalPromptHeads) -> Any:
    tower = heads["age"].text_encoder.tower
    return patch.object(tower.transformer, "forward", wraps=tower.transformer.forward)


def test_one_text_pass_serves_all_heads(clip: Any) -> None:
    heads = op.OrdinalPromptHeads(build(clip))
    assert len({id(heads[name].text_encoder) for name in heads}) == 1
    with passes(heads) as run:
        heads(torch.randn(2, 7))
        assert run.call_count == 1
        heads.prototypes()
        assert run.call_count == 2
        with heads.reuse_prototypes():
            heads(torch.randn(2, 7))
            heads(torch.randn(2, 7))
        assert run.call_count == 3
        heads.eval()
        before = run.call_count
        for _ in range(3):
            heads(torch.randn(2, 7))
        assert run.call_count - before == len(heads)  # once each, and kept


def test_mixed_precision(clip: Any) -> None:
    heads, alone, features = op.OrdinalPromptHeads(build(clip)), build(clip), torch.randn(4, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, expected = heads(features), {name: head(features) for name, head in alone.items()}
    for name in heads:
        assert logits[name].dtype == torch.float32
        torch.testing.assert_close(logits[name], expected[name], rtol=0, atol=0.3)
    parameters = dict(heads.named_parameters())
    rows = torch.stack([torch.ones(2, 7), torch.zeros(2, 7)])
    mapped = torch.vmap(lambda x: torch.func.functional_call(heads, parameters, x))(rows)
    torch.testing.assert_close(mapped["age"][0], heads(rows[0])["age"])


def test_frozen_prompts_take_no_part(clip: Any) -> None:
    heads = op.OrdinalPromptHeads(build(clip))
    heads["age"].prompt.requires_grad_(False)
    heads(torch.randn(2, 7))
    with patch.object(CausalTextHalf, "encode_all", autospec=True, side_effect=CausalTextHalf.encode_all) as run:
        heads(torch.randn(2, 7))
    assert [len(call.args[1]) for call in run.call_args_list] == [3]


def test_accumulated_gradients(clip: Any) -> None:
    heads, again = op.OrdinalPromptHeads(build(clip)), op.OrdinalPromptHeads(build(clip))
    features, given = torch.randn(8, 7), labels()
    loss = heads.loss(kl_weight=0)
    with heads.reuse_prototypes():
        for part in (slice(0, 4), slice(4, 8)):
            (loss(heads(features[part]), {name: rows[part] for name, rows in given.items()}) / 2).backward()
    loss(again(features), given).backward()
    for (name, ours), theirs in zip(heads.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)
    with pytest.raises(RuntimeError, match="The prompts were changed within"), heads.reuse_prototypes():
        torch.optim.SGD(heads.parameters(), lr=1).step()


def test_a_checkpointed_tower_runs_once_for_each_head() -> None:
    text = tiny_clip()
    expected = op.OrdinalPromptHeads(build(text)).prototypes()
    text.transformer.grad_checkpointing = True
    heads = op.OrdinalPromptHeads(build(text))
    found = heads.prototypes()
    for name in heads:
        torch.testing.assert_close(found[name], expected[name])
    found["age"].sum().backward()
    assert heads["age"].prompt.rank_embeddings.grad is not None


def test_text_encoders_that_differ_are_not_shared(clip: Any) -> None:
    model = bert()
    one, other = (op.text.TransformersTextEncoder(model.model, pooling=pooling) for pooling in ("cls", "mean"))
    heads = op.OrdinalPromptHeads({"a": op.OrdinalPromptHead(one, 3), "b": op.OrdinalPromptHead(other, 3)})
    assert heads["a"].text_encoder is not heads["b"].text_encoder
    assert (heads["a"].text_encoder.pooling, heads["b"].text_encoder.pooling) == ("cls", "mean")
    both = op.OrdinalPromptHeads({"a": op.OrdinalPromptHead(one, 3), "b": op.OrdinalPromptHead(one, 4)})
    assert both["a"].text_encoder is both["b"].text_encoder
    both(torch.randn(2, 16))["a"].sum().backward()
    copied = copy.deepcopy(clip)
    heads = op.OrdinalPromptHeads({"a": op.OrdinalPromptHead(clip, 3), "b": op.OrdinalPromptHead(copied, 3)})
    assert not same_weights(heads["a"].text_encoder, heads["b"].text_encoder)
    mixed = {"a": op.OrdinalPromptHead(copied, 3), "b": op.OrdinalPromptHead(copied, 3, freeze_text_encoder=False)}
    logits = op.OrdinalPromptHeads(mixed)(torch.randn(2, 12))
    assert {name: part.shape for name, part in logits.items()} == {"a": (2, 3), "b": (2, 3)}


@pytest.mark.parametrize("change", ["double", "deepcopy", "pickle", "cast and back"])
def test_the_text_encoder_stays_shared(change: str, clip: Any) -> None:
    heads = op.OrdinalPromptHeads(build(clip))
    before = heads.eval()(torch.ones(2, 7))
    if change == "double":
        heads.double()
    elif change == "deepcopy":
        heads = copy.deepcopy(heads)
    elif change == "pickle":
        heads = pickle.loads(pickle.dumps(heads))
    else:
        heads.bfloat16()
        heads.float()
    assert len({id(heads[name].text_encoder) for name in heads}) == 1
    after = heads(torch.ones(2, 7).to(next(heads.parameters()).dtype))
    for name in heads:
        torch.testing.assert_close(after[name].float(), before[name], atol=2.0 if "cast" in change else 1e-4, rtol=0)
    with passes(heads) as run:
        heads.train()(torch.ones(2, 7).to(next(heads.parameters()).dtype))
    assert run.call_count == 1
    assert not any("text_encoder" in name for name in heads.state_dict())


def test_predictions_by_name(clip: Any) -> None:
    heads = op.OrdinalPromptHeads(build(clip)).eval()
    features = torch.randn(2, 3, 7)
    for name in heads:
        assert torch.equal(heads.predict(features, "median")[name], heads[name].predict(features, "median"))
        assert torch.equal(heads.predict_proba(features)[name], heads[name].predict_proba(features))


def test_round_trip(clip: Any, tmp_path: Path) -> None:
    given = build(clip)
    heads = op.OrdinalPromptHeads({"age": given["age"], "a/b: skin": given["quality"]}).eval()
    features = torch.randn(3, 7)
    heads.save_pretrained(tmp_path / "heads")
    again = op.OrdinalPromptHeads.from_pretrained(tmp_path / "heads", clip)
    assert again.names == ("age", "a/b: skin")
    assert again["age"].text_encoder is again["a/b: skin"].text_encoder
    assert not again.training
    torch.testing.assert_close(again(features), heads(features))
    bare = op.OrdinalPromptHeads.from_pretrained(tmp_path / "heads", text_encoder=False)
    torch.testing.assert_close(bare(features), heads(features))
    torch.testing.assert_close(bare.double()(features.double())["age"].float(), heads(features)["age"])
    again.load_state_dict(heads.state_dict())


def test_from_open_clip_loads_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(name: str, *_: Any, **__: Any) -> Any:
        loaded.append(name)
        torch.manual_seed(1)
        return tiny_clip(), None

    monkeypatch.setattr("ordinal_prompt.text.hub.load_open_clip", load)
    attributes: Any = {"age": 9, "quality": {"ranks": 3, "context": 2}}
    heads = op.OrdinalPromptHeads.from_open_clip("ViT", "tag", attributes=attributes, in_features=7, context=4)
    assert loaded == ["ViT"]
    assert heads["age"].prompt.context_embeddings.shape[0] == 4
    assert heads["quality"].prompt.context_embeddings.shape[0] == 2
    heads.eval().save_pretrained(tmp_path)
    again = op.OrdinalPromptHeads.from_pretrained(tmp_path)
    assert loaded == ["ViT", "ViT"]
    torch.testing.assert_close(again(torch.ones(1, 7)), heads(torch.ones(1, 7)))
    with pytest.raises(ValueError, match="`ranks` among the options of 'age', but got context"):
        op.OrdinalPromptHeads.from_open_clip("ViT", attributes={"age": {"context": 3}})


def test_mistakes(clip: Any, tmp_path: Path) -> None:
    head, wide = op.OrdinalPromptHead(clip, 3), op.OrdinalPromptHead(clip, 3, in_features=7)
    with pytest.raises(TypeError, match="`heads` to be a dictionary of attributes, but got list"):
        op.OrdinalPromptHeads([head])
    with pytest.raises(ValueError, match="at least one attribute"):
        op.OrdinalPromptHeads({})
    with pytest.raises(TypeError, match="the head of 'a' to be an OrdinalPromptHead, but got Linear"):
        op.OrdinalPromptHeads({"a": nn.Linear(2, 2)})
    for name in ("", "a.b", "values"):
        with pytest.raises(ValueError, match="choose another name"):
            op.OrdinalPromptHeads({name: head})
    with pytest.raises(ValueError, match="one of them twice"):
        op.OrdinalPromptHeads({"a": head, "b": head})
    with pytest.raises(ValueError, match=r"widths are \{'a': 12, 'b': 7\}; build them with the same in_features="):
        op.OrdinalPromptHeads({"a": head, "b": wide})
    with pytest.raises(FileNotFoundError, match="no ordinal_prompt_attributes.json"):
        op.OrdinalPromptHeads.from_pretrained(tmp_path)
    (tmp_path / "ordinal_prompt_attributes.json").write_text("[]")
    with pytest.raises(ValueError, match="is damaged"):
        op.OrdinalPromptHeads.from_pretrained(tmp_path)
    heads = op.OrdinalPromptHeads({"a": head})
    with pytest.raises(ValueError, match="`features` of shape"):
        heads(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"one head in the place of Sequential.0.*come in a dictionary"):
        op.replace_head(nn.Sequential(nn.Conv2d(12, 3, 1)), heads, name="0")


def test_a_move_that_fails_leaves_the_heads_whole(clip: Any) -> None:
    heads = op.OrdinalPromptHeads(build(clip)).eval()
    features = torch.randn(2, 7)
    before = heads(features)
    with pytest.raises((RuntimeError, AssertionError)):
        heads.to("cuda:99")
    torch.testing.assert_close(heads(features), before)


def test_a_head_that_cannot_be_saved_leaves_the_old_ones(clip: Any, tmp_path: Path) -> None:
    heads = op.OrdinalPromptHeads(build(clip)).eval()
    heads.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with torch.no_grad():
        heads["age"].prompt.rank_embeddings.add_(1)
        heads["fitted"].prompt.rank_embeddings.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        heads.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_head_that_also_stands_by_itself_is_exported_in_both_places(clip: Any) -> None:
    model = nn.Module()
    model.heads = op.OrdinalPromptHeads(build(clip)).eval()
    model.age, heads = model.heads["age"], model.heads
    features = torch.randn(2, 7)
    before = heads(features)
    op.export_heads(model)
    assert not any(isinstance(part, op.OrdinalPromptHead) for part in model.modules())
    torch.testing.assert_close(model.age(features), before["age"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.heads(features), before, rtol=1e-4, atol=1e-4)
    assert isinstance(heads["age"], op.OrdinalPromptHead)  # the caller's own stay as they were
