"""The package as a whole: imports, public names, docstrings, and the README, executed."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import tiny_clip

import ordinal_prompt as op

ROOT = Path(__file__).parents[2]
MODULES = sorted(module.name for module in pkgutil.walk_packages(op.__path__, "ordinal_prompt."))


def test_import_loads_nothing_heavy() -> None:
    script = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import ordinal_prompt\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new & {'open_clip', 'torchvision', 'transformers', 'matplotlib', 'safetensors', 'timm', 'numpy',"
        " 'huggingface_hub'}))\n"
        "print('torch._dynamo' in set(sys.modules) - before)"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False"]


def test_import_adds_no_log_handlers() -> None:
    script = (
        "import logging, torch; n = logging.root.handlers[:]; import ordinal_prompt; assert logging.root.handlers == n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names() -> None:
    assert sorted(op.__all__) == op.__all__
    for name in op.__all__:
        assert getattr(op, name).__doc__, name


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    torch.manual_seed(0)
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_doctests() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(examples) >= 12


def test_readme_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader would; the hub's weights are a small random model's here."""
    clip = tiny_clip(embed_dim=16)

    def load(*_: Any, **__: Any) -> Any:
        return clip, open_clip.get_tokenizer("ViT-B-32")

    monkeypatch.setattr("ordinal_prompt.text.hub.load_open_clip", load)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(snippets) >= 4
    namespace: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), namespace)
    assert not any(isinstance(module, op.OrdinalPromptHead) for module in namespace["model"].modules())
    assert namespace["ages"].shape == (2,)


def test_numbers_of_learned_values_in_the_architecture_page() -> None:
    head = op.OrdinalPromptHead(tiny_clip(embed_dim=512, width=512, heads=8), 101)
    learned = sum(parameter.numel() for parameter in head.parameters() if parameter.requires_grad)
    table = (ROOT / "ARCHITECTURE.md").read_text()
    assert f"| {learned:,} |" in table
    assert f"{torch.nn.Linear(512, 101).weight.numel() + 101:,}" in table


def test_readme_commands_are_those_of_ci() -> None:
    assert "bin/python -m pytest" in (ROOT / ".ci" / "run").read_text()
    assert (ROOT / "README.md").read_text().count("-m pytest") == 1
