"""Heads on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import TEXT, VISION, tiny_clip

import ordinal_prompt as op
from ordinal_prompt.checkpoint import CONFIG_FILE, WEIGHTS_FILE

OPTIONS: list[dict[str, Any]] = [
    {"ranks": 5},
    {"ranks": ["low", "middling high", "high"], "interpolation": None, "context": "a photo of {} quality"},
    {
        "ranks": 4,
        "rank_values": [1, 2, 4, 8],
        "rank_specific_context": True,
        "in_features": 7,
        "learn_logit_scale": True,
    },
    {"ranks": 4, "normalize": False, "interpolation": "piecewise", "num_base_ranks": 2, "dtype": torch.float64},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_round_trip(options: dict[str, Any], clip: Any, tokenizer: Any, tmp_path: Path) -> None:
    head = op.OrdinalPromptHead(clip, tokenizer=tokenizer, **options).eval()
    features = torch.randn(3, head.in_features, dtype=options.get("dtype"))
    head.save_pretrained(tmp_path)
    again = op.OrdinalPromptHead.from_pretrained(tmp_path, clip)
    torch.testing.assert_close(again(features), head(features))
    assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in again.named_parameters()} == {
        n: (p.shape, p.dtype, p.requires_grad) for n, p in head.named_parameters()
    }
    assert again.rank_names == head.rank_names
    assert torch.equal(again.rank_values, head.rank_values)
    assert again.train()(features).requires_grad
    torch.testing.assert_close(again.export()(features), head.export()(features))


def test_without_its_text_encoder_a_head_predicts(clip: Any, tmp_path: Path) -> None:
    head = op.OrdinalPromptHead(clip, 5, in_features=7).eval()
    head.save_pretrained(tmp_path)
    again = op.OrdinalPromptHead.from_pretrained(tmp_path)
    features = torch.randn(3, 7)
    assert again.text_encoder is None
    torch.testing.assert_close(again(features), head(features))
    torch.testing.assert_close(again.train()(features), head(features))
    torch.testing.assert_close(again.double()(features.double()).float(), head(features))
    torch.testing.assert_close(again.float().export()(features), head(features))
    again.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(op.OrdinalPromptHead.from_pretrained(tmp_path / "again")(features), head(features))
    with torch.no_grad():
        again.prompt.rank_embeddings.normal_()
    with pytest.raises(RuntimeError, match="text_encoder="):
        again(features)


def test_open_clip_by_name(tmp_path: Path) -> None:
    config = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT}
    (tmp_path / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    torch.save(tiny_clip().state_dict(), tmp_path / "weights.pt")
    head = op.OrdinalPromptHead.from_open_clip("tiny-clip", str(tmp_path / "weights.pt"), ranks=["bad", "good"]).eval()
    head.save_pretrained(tmp_path / "head")
    again = op.OrdinalPromptHead.from_pretrained(tmp_path / "head")
    assert torch.equal(again.prototypes(), head.prototypes())
    assert again.text_encoder is not None
    assert json.loads((tmp_path / "head" / CONFIG_FILE).read_text())["source"]["model_name"] == "tiny-clip"


def test_unknown_open_clip_names() -> None:
    with pytest.raises(ValueError, match=r"no model 'ViT-B32'; did you mean .*ViT-B-32"):
        op.OrdinalPromptHead.from_open_clip("ViT-B32", ranks=5)
    with pytest.raises(ValueError, match=r"no weights 'laion2b' for ViT-B-32.*laion2b_s34b_b79k"):
        op.OrdinalPromptHead.from_open_clip("ViT-B-32", "laion2b", ranks=5)


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("hub") from ConnectionError("unreachable")

    monkeypatch.setattr(open_clip, "create_model", refuse)
    with pytest.raises(ConnectionError, match="no hub can be reached"):
        op.OrdinalPromptHead.from_open_clip("ViT-B-32", "laion2b_s34b_b79k", ranks=5)


def test_other_ranks(head: op.OrdinalPromptHead, clip: Any) -> None:
    with pytest.raises(RuntimeError, match="size mismatch for rank_values"):
        op.OrdinalPromptHead(clip, 6, context=4).load_state_dict(head.state_dict())
    with pytest.raises(RuntimeError, match="rank_values: the checkpoint was made for other rank values"):
        op.OrdinalPromptHead(clip, 5, context=4, rank_values=[1, 2, 4, 8, 16]).load_state_dict(head.state_dict())


def test_other_text_encoders(head: op.OrdinalPromptHead, tmp_path: Path) -> None:
    head.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="width 16 and embedding size 12, but this one has 32 and 12"):
        op.OrdinalPromptHead.from_pretrained(tmp_path, tiny_clip(width=32))
    with pytest.raises(ValueError, match="with the same weights"):
        op.OrdinalPromptHead.from_pretrained(tmp_path, tiny_clip())


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_damaged_files(name: str, head: op.OrdinalPromptHead, tmp_path: Path) -> None:
    head.save_pretrained(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        op.OrdinalPromptHead.from_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"Found no {name}"):
        op.OrdinalPromptHead.from_pretrained(tmp_path)


def test_weights_of_another_config(head: op.OrdinalPromptHead, clip: Any, tmp_path: Path) -> None:
    head.save_pretrained(tmp_path)
    op.OrdinalPromptHead(clip, 5, context=2).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / WEIGHTS_FILE).replace(tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="do not belong together"):
        op.OrdinalPromptHead.from_pretrained(tmp_path, clip)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_round_trip_in_other_precisions(
    dtype: torch.dtype, head: op.OrdinalPromptHead, clip: Any, tmp_path: Path
) -> None:
    head.to(dtype).eval().save_pretrained(tmp_path)
    again = op.OrdinalPromptHead.from_pretrained(tmp_path, clip)
    features = torch.randn(3, 12, dtype=dtype)
    assert torch.equal(again(features), head(features))
    assert clip.ln_final.weight.dtype == torch.float32


def test_prototypes_alone_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ordinal_prompt.text.hub.load_open_clip", lambda *_, **__: (tiny_clip(), open_clip.tokenize))
    head = op.OrdinalPromptHead.from_open_clip("any", "weights", ranks=5).eval()
    head.save_pretrained(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no hub.")

    monkeypatch.setattr("ordinal_prompt.text.hub.load_open_clip", refuse)
    with pytest.raises(ConnectionError, match="text_encoder=False"):
        op.OrdinalPromptHead.from_pretrained(tmp_path)
    alone = op.OrdinalPromptHead.from_pretrained(tmp_path, text_encoder=False)
    assert torch.equal(alone.prototypes(), head.prototypes())


def test_what_is_not_finite_is_not_saved(head: op.OrdinalPromptHead, tmp_path: Path) -> None:
    with torch.no_grad():
        head.prompt.rank_embeddings.fill_(float("nan"))
    with pytest.raises(ValueError, match="prompt_rank_embeddings has values that are not finite"):
        head.save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_failed_save_leaves_the_old_one(
    head: op.OrdinalPromptHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half_written(_: Any, path: Path, **__: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", half_written)
    with pytest.raises(OSError, match="disk full"):
        head.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_large_head_is_under_a_megabyte(tmp_path: Path) -> None:
    op.OrdinalPromptHead(tiny_clip(embed_dim=512, width=512, heads=8), 101).save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1_000_000


RELEASE = Path(__file__).parent / "data" / "release_0_1_0"


@pytest.mark.parametrize("name", ["paper", "recipe"])
def test_heads_of_the_first_release_load(name: str) -> None:
    """Saved by release 0.1.0, with the logits that it gave; `text_encoder` is the tiny CLIP that they were made on."""
    from safetensors.torch import load_file

    expected = load_file(RELEASE / name / "expected.safetensors")
    clip = tiny_clip()
    clip.load_state_dict({**clip.state_dict(), **load_file(RELEASE / "text_encoder.safetensors")})
    for text_encoder in (clip, False):
        head = op.OrdinalPromptHead.from_pretrained(RELEASE / name, text_encoder)
        torch.testing.assert_close(head(expected["features"]), expected["logits"])
        torch.testing.assert_close(head.export()(expected["features"]), expected["logits"])
    assert head.rank_names == (("bad", "fair", "good", "excellent") if name == "recipe" else tuple("01234"))
    state = load_file(RELEASE / name / WEIGHTS_FILE)
    del state["special"], state["prototypes"]
    head.load_state_dict(state, strict=True)


@pytest.mark.parametrize("changed", [{"residual": 1.0}, {"normalize": False}, {"interpolation": "inv_prop"}])
def test_a_state_dict_of_other_settings_is_no_secret(changed: dict[str, Any], clip: Any) -> None:
    options: dict[str, Any] = {"residual": 5.0}
    state = op.OrdinalPromptHead(clip, 5, **options).state_dict()
    name = next(iter(changed))
    with pytest.warns(UserWarning, match=f"saved with other settings.*: {name}=.* \\(here"):
        op.OrdinalPromptHead(clip, 5, **{**options, **changed}).load_state_dict(state)


@pytest.mark.parametrize("number", range(3))
def test_a_save_that_is_killed_leaves_the_old_head_or_the_new(
    number: int, head: op.OrdinalPromptHead, clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head.eval().save_pretrained(tmp_path)
    old = head.prototypes()
    new = op.OrdinalPromptHead(clip, 5, context=2).eval()
    left, replace = [number], Path.replace

    def killed(self: Path, target: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        new.save_pretrained(tmp_path)
    monkeypatch.undo()
    found = op.OrdinalPromptHead.from_pretrained(tmp_path, clip).prototypes()
    assert torch.equal(found, old if number < 2 else new.prototypes())
    new.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([CONFIG_FILE, WEIGHTS_FILE])


def test_saved_files_have_the_permissions_of_others(head: op.OrdinalPromptHead, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    head.save_pretrained(tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
