"""Starting the examples as a user would."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))


def start(script: str, *options: Any, cwd: Path, processes: int = 1) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, str(EXAMPLES / script), *map(str, options)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, **pipes)


def run(script: str, *options: Any, cwd: Path, code: int = 0, processes: int = 1) -> str:
    """What a script prints; where it is to fail, what it says on stderr."""
    process = start(script, *options, cwd=cwd, processes=processes)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == code, output[-2000:] + errors[-4000:]
    return errors if code else output


def call(monkeypatch: pytest.MonkeyPatch, script: str, *options: Any, cwd: Path) -> None:
    """Runs a script in this process."""
    from runs import in_one_sentence

    monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
    monkeypatch.chdir(cwd)
    in_one_sentence(importlib.import_module(script.removesuffix(".py")).main)
