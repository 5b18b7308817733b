"""Every Python block of the documentation runs, in the order of its page, as a reader would run it.

The blocks of a page share one namespace and an empty folder; there is no network.  What a page would download is a
small random model here.  A ```text block right behind a Python block is what that block prints.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from conftest import shaken, tiny_clip

import ordinal_prompt as op

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
BLOCK = re.compile(
    r"^```python[^\n]*\n(?P<code>.*?)^```\n(?:\n*```text\n(?P<output>.*?)^```$)?", re.DOTALL | re.MULTILINE
)
RUNNABLE = [name for name, text in PAGES.items() if BLOCK.search(text)]
EMBED_DIM = 16
IMAGE_SIZE = 16
WIDEST_CODE = 92


@pytest.fixture(autouse=True)
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small random models in the place of those that open_clip and OpenAI's clip would download."""
    clip, tokenizer = tiny_clip(embed_dim=EMBED_DIM), open_clip.get_tokenizer("ViT-B-32")
    transform = open_clip.image_transform(IMAGE_SIZE, is_train=False)
    monkeypatch.setattr("ordinal_prompt.text.hub.load_open_clip", lambda *_, **__: (clip, tokenizer))
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *_, **__: (clip, transform, transform))
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.chdir(tmp_path)


def no_network(host: str, *_: Any, **__: Any) -> Any:
    raise AssertionError(f"a page asks for {host}, but the tests have no network; give it a small model here")


@pytest.fixture
def openai_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    stub: Any = types.ModuleType("pkg_resources")  # which clip imports for this, and setuptools no longer brings
    stub.packaging = types.SimpleNamespace(version=pytest.importorskip("packaging.version"))
    monkeypatch.setitem(sys.modules, "pkg_resources", stub)
    import clip

    model = shaken(clip.model.CLIP(EMBED_DIM, IMAGE_SIZE, 1, 64, IMAGE_SIZE, 77, 49408, 16, 2, 2))
    transform = open_clip.image_transform(IMAGE_SIZE, is_train=False)
    monkeypatch.setattr(clip, "load", lambda *_, **__: (model, transform))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub whose repositories are folders."""
    import shutil

    import huggingface_hub
    from huggingface_hub import hub_mixin

    repositories = tmp_path / "hub"

    class Api:
        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, repo_id: str, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id: str, folder_path: Path, **_: Any) -> None:
            shutil.copytree(folder_path, repositories / repo_id)

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **_: str(repositories / repo_id))


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torchrun sets for one process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", str(port))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


NEEDS = {"stacks/clip.md": ["openai_clip"], "stacks/hub.md": ["hub"], "devices.md": ["torchrun"]}


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_python_of_a_page_runs(
    name: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for fixture in NEEDS.get(name, []):
        request.getfixturevalue(fixture)
    monkeypatch.setattr(sys, "argv", ["page.py"])
    text, module = PAGES[name], types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # as dataclasses and pickles look there
    for block in BLOCK.finditer(text):
        lines_before = text[: block.start("code")].count("\n")
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile("\n" * lines_before + block["code"], str(DOCS / name), "exec"), module.__dict__)
        if block["output"] is not None:
            assert capsys.readouterr().out == block["output"], f"{name}, the output behind line {lines_before}"


PRELUDE = """
import sys, torch
sys.path.insert(0, {tests!r})
import open_clip
from conftest import tiny_clip
torch.manual_seed(0)
clip, tokenizer = tiny_clip(embed_dim=16), open_clip.get_tokenizer("ViT-B-32")
import ordinal_prompt.text.hub
ordinal_prompt.text.hub.load_open_clip = lambda *_, **__: (clip, tokenizer)
"""


@pytest.mark.slow
def test_several_devices_with_two_processes(tmp_path: Path) -> None:
    """The page's test above runs it in one process, which is all that torchrun starts then; this one in two."""
    code = "\n".join(block["code"] for block in BLOCK.finditer(PAGES["devices.md"]))
    (tmp_path / "train.py").write_text(PRELUDE.format(tests=str(ROOT / "tests")) + code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=300)
    assert {path.name for path in tmp_path.iterdir()} >= {"model.pt", "head-0", "head-1"}


def test_no_block_escapes() -> None:
    for name, text in PAGES.items():
        fences = re.findall(r"^\s*(?:`{3,}|~{3,})\s*\{?\.?(?:py|python|pycon)\b", text, re.MULTILINE)
        assert len(fences) == len(BLOCK.findall(text)), f"{name}: write Python blocks as ```python, not indented"
        outputs = sum(block["output"] is not None for block in BLOCK.finditer(text))
        assert text.count("```text\n") == outputs, f"{name}: write ```text right behind the block that prints it"


def test_code_needs_no_scrolling_on_a_wide_screen() -> None:
    for name, text in PAGES.items():
        for fence in re.findall(r"^```\w+\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            assert max(map(len, fence.splitlines())) <= WIDEST_CODE, f"{name}: {max(fence.splitlines(), key=len)}"


def test_every_stack_has_a_page_with_an_example() -> None:
    stacks = {name for name in PAGES if name.startswith("stacks/")} - {"stacks/index.md"}
    assert len(stacks) >= 11
    assert stacks <= set(RUNNABLE)


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for name in PAGES:
        assert re.search(rf"[ :]{re.escape(name)}$", navigation, re.MULTILINE), name


def test_errors_told_are_those_of_the_results() -> None:
    """Mean absolute errors, with three decimals, stand in the results page as they are."""
    results = (ROOT / "benchmarks/heads/RESULTS.md").read_text(encoding="utf-8")
    for name in ("index.md", "settings.md"):
        for number in re.findall(r"(?<![\d.])\d\.\d{3}(?!\d)", PAGES[name]):
            assert number in results, f"{name}: {number}"


def test_every_public_name_is_in_the_api() -> None:
    documented = "".join(text for name, text in PAGES.items() if name.startswith("api/"))
    for name in {*op.__all__, "OrdinalPromptClassifier"}:
        assert f"`{name}`" in documented or f"::: ordinal_prompt.{name}\n" in documented, name
