"""Heads on the Hugging Face hub: a faked one, since tests reach no network."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import ModelCard, hub_mixin
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

import ordinal_prompt as op


class Hub:
    """Repositories are folders; `calls` are what was asked of the hub."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, list[dict[str, Any]]()

    def __call__(self, token: str | None = None) -> Hub:
        self.calls.append({"token": token})
        return self

    def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
        self.calls.append(options)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> str:
        self.calls.append(options)
        shutil.copytree(folder_path, self.root / repo_id)
        return f"commit of {repo_id}"

    def download(self, repo_id: str, **options: Any) -> str:
        self.calls.append(options)
        if not (self.root / repo_id).is_dir():
            raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
        return str(self.root / repo_id)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(hub_mixin, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    return hub


def test_a_head_goes_up_and_comes_back(hub: Hub, clip: Any, tokenizer: Any) -> None:
    names = ["no damage", "slight", "severe"]
    head = op.OrdinalPromptHead(clip, names, tokenizer=tokenizer, rank_values=[0, 1, 4], context="a leaf with").eval()
    commit = head.push_to_hub("user/leaves", training="On 1,200 photographs.", private=True, token="secret")
    assert commit == "commit of user/leaves"
    assert {"token": "secret"} in hub.calls
    assert any(call.get("private") for call in hub.calls)
    again = op.OrdinalPromptHead.from_pretrained("user/leaves", clip, revision="v1", token="secret")
    assert hub.calls[-1]["revision"] == "v1"
    assert hub.calls[-1]["token"] == "secret"
    features = torch.randn(4, 12)
    torch.testing.assert_close(again(features), head(features))
    alone = op.OrdinalPromptHead.from_pretrained("user/leaves", text_encoder=False)
    torch.testing.assert_close(alone(features), head(features))
    with pytest.raises(ValueError, match="other prototypes"):
        op.OrdinalPromptHead.from_pretrained("user/leaves", _another(clip))


def _another(clip: Any) -> Any:
    import copy

    other = copy.deepcopy(clip)
    with torch.no_grad():
        other.text_projection.mul_(-1)
    return other


def test_the_card_says_what_the_head_is(hub: Hub, clip: Any, tokenizer: Any) -> None:
    names = ["no damage", "slight", "severe"]
    options: dict[str, Any] = {"tokenizer": tokenizer, "rank_values": [0, 1, 4.5], "context": "a leaf with"}
    head = op.OrdinalPromptHead(clip, names, in_features=7, **options)
    head.push_to_hub("user/leaves", training="On 1,200 photographs.")
    card = ModelCard.load(hub.root / "user/leaves/README.md")
    assert card.data.library_name == "ordinal_prompt"
    assert "ordinal-regression" in card.data.tags
    for told in (
        "# leaves",
        "| 2 | severe | 4.5 |",
        "`a leaf with`",
        "in_features=7",
        "On 1,200 photographs.",
        "features (…, 7)",
        'from_pretrained("user/leaves", text_encoder=False)',
        "not calibrated",
    ):
        assert told in card.text, told


def test_no_name_breaks_the_table_of_the_card(hub: Hub, clip: Any, tokenizer: Any) -> None:
    names = ["a|b", "*loud*\n`code`", "<10"]
    op.OrdinalPromptHead(clip, names, tokenizer=tokenizer, context="`a` {} here").push_to_hub("user/odd")
    card = ModelCard.load(hub.root / "user/odd/README.md").text
    rows = ("| 0 | a\\|b | 0 |", r"| 1 | \*loud\* \`code\` | 1 |", r"| 2 | \<10 | 2 |")
    for told in (*rows, "Context: `` `a` {} here ``"):
        assert told in card, told


def test_the_card_names_the_text_encoder(hub: Hub, clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ordinal_prompt.text.hub.load_open_clip", lambda *_, **__: (clip, None))
    head = op.OrdinalPromptHead.from_open_clip("ViT-B-32", "laion2b_s34b_b79k", ranks=5, context=3)
    head.push_to_hub("user/ages", limits="Faces of adults alone.")
    card = ModelCard.load(hub.root / "user/ages/README.md").text
    for told in ("`ViT-B-32` of open_clip, weights `laion2b_s34b_b79k`", "3 tokens", "Faces of adults alone."):
        assert told in card, told
    assert 'from_pretrained("user/ages")' in card
    assert op.OrdinalPromptHead.from_pretrained("user/ages").text_encoder is not None


def bert(seed: int = 0, name: str = "user/tiny-bert") -> Any:
    """A model as transformers leaves it that was loaded from a hub."""
    torch.manual_seed(seed)
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50000, **options)).eval()
    model.config._name_or_path = name
    return model


def loads(monkeypatch: pytest.MonkeyPatch, model: Any) -> list[Any]:
    """What transformers is asked to load, in the place of which it gives this model."""
    asked: list[Any] = []

    def load(*given: Any, **_: Any) -> Any:
        asked.append(given)
        return model

    monkeypatch.setattr(transformers.BertModel, "from_pretrained", load)
    return asked


def test_a_text_model_that_transformers_loaded_from_a_hub_is_found_again(
    hub: Hub, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["bad", "fair", "good"]
    encoder = op.text.TransformersTextEncoder(bert(), pooling="cls")
    head = op.OrdinalPromptHead(encoder, names, tokenizer=tokenizer).eval()
    head.push_to_hub("user/reviews")
    card = ModelCard.load(hub.root / "user/reviews/README.md").text
    assert "`user/tiny-bert` of transformers" in card
    assert 'from_pretrained("user/reviews")' in card
    asked = loads(monkeypatch, bert())
    again = op.OrdinalPromptHead.from_pretrained("user/reviews").train()
    assert asked == [("user/tiny-bert",)]
    again(torch.randn(2, 16)).sum().backward()
    assert again.prompt.rank_embeddings.grad is not None
    assert op.OrdinalPromptHead.from_pretrained("user/reviews", text_encoder=False).text_encoder is None
    with pytest.raises(ValueError, match=r"other prototypes.*text_encoder=False"):
        op.OrdinalPromptHead.from_pretrained("user/reviews", op.text.TransformersTextEncoder(bert(seed=1), "cls"))


@pytest.mark.parametrize("found", ["nothing", "other weights", "another size", "no such class"])
def test_a_name_that_does_not_serve_leaves_the_prototypes(
    found: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = op.OrdinalPromptHead(bert(), ["bad", "good"], tokenizer=tokenizer).eval()
    head.save_pretrained(tmp_path)
    told = "user/tiny-bert.*of transformers"  # no hub can be reached
    if found == "other weights":
        told = "other prototypes"
        loads(monkeypatch, bert(seed=1))
    elif found == "another size":
        told = "width"
        loads(monkeypatch, transformers.BertModel(transformers.BertConfig(hidden_size=24, num_attention_heads=2)))
    elif found == "no such class":
        config = tmp_path / "ordinal_prompt.json"
        text = config.read_text().replace('"BertModel"', '"BertConfig"')
        tensors = load_file(tmp_path / "ordinal_prompt.safetensors")
        save_file(tensors, tmp_path / "ordinal_prompt.safetensors", metadata={"config": text})
        config.write_text(text)
        told = "BertConfig is no model"
    with pytest.warns(UserWarning, match=rf"(?s)prototypes alone were loaded.*{told}"):
        again = op.OrdinalPromptHead.from_pretrained(tmp_path)
    assert again.text_encoder is None
    features = torch.randn(2, 16)
    torch.testing.assert_close(again(features), head(features))


def test_what_has_no_name_of_a_hub_is_not_looked_for(tokenizer: Any, tmp_path: Path) -> None:
    class Changed(transformers.BertModel):  # whose code is not that of transformers
        pass

    own = bert()
    own.__class__ = Changed
    for model in (bert(name=""), bert(name=str(tmp_path)), own):
        op.OrdinalPromptHead(model, ["bad", "good"], tokenizer=tokenizer).save_pretrained(tmp_path / "head")
        assert op.OrdinalPromptHead.from_pretrained(tmp_path / "head").text_encoder is None


def test_several_heads_go_up_and_come_back(hub: Hub, clip: Any, tokenizer: Any) -> None:
    given = {"age": 7, "quality | light": ["poor", "fair", "good"]}
    heads = op.OrdinalPromptHeads(
        {name: op.OrdinalPromptHead(clip, ranks, tokenizer=tokenizer) for name, ranks in given.items()}
    ).eval()
    heads.push_to_hub("user/faces", limits="Faces of adults alone.", token="secret")
    card = ModelCard.load(hub.root / "user/faces/README.md").text
    told = ("## age", r"## quality \| light", "| 6 | 6 | 6 |", "| 2 | good | 2 |", "Faces of adults alone.")
    for text in (*told, 'op.OrdinalPromptHeads.from_pretrained("user/faces", text_encoder=False)'):
        assert text in card, text
    again = op.OrdinalPromptHeads.from_pretrained("user/faces", clip, revision="v2")
    assert hub.calls[-1]["revision"] == "v2"
    allowed = hub.calls[-1]["allow_patterns"]
    files = [str(path.relative_to(hub.root / "user/faces")) for path in (hub.root / "user/faces").rglob("*.*")]
    kept = [name for name in files if any(fnmatch(name, pattern) for pattern in allowed)]
    assert {*files} - {*kept} == {"README.md"}
    features = torch.randn(4, 12)
    for name, logits in heads(features).items():
        torch.testing.assert_close(again(features)[name], logits)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", ["user/none", "user/none/deeper", "none", "./none"])
def test_a_name_of_nothing_is_told(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        op.OrdinalPromptHead.from_pretrained(name)


def test_a_hub_out_of_reach_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ConnectionError, match=r"no folder 'user/head' here.*give a folder"):
        op.OrdinalPromptHead.from_pretrained("user/head")


def test_a_revision_of_a_folder_is_refused(head: op.OrdinalPromptHead, tmp_path: Path) -> None:
    head.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no `revision` of a local folder"):
        op.OrdinalPromptHead.from_pretrained(tmp_path, revision="main")


def test_a_head_that_diverged_is_not_pushed(hub: Hub, head: op.OrdinalPromptHead) -> None:
    with torch.no_grad():
        head.prompt.rank_embeddings.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        head.push_to_hub("user/broken")
    assert not hub.calls
