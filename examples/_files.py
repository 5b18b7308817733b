"""Files that are written at once: whatever goes wrong, what stood there before stays whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place once it is whole and on the disk; until then `path` stays as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the rename itself; folders cannot be synced everywhere
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_atomically(value: Any, path: Path) -> None:
    """`torch.save`, at once."""
    with replacing(path) as part:
        torch.save(value, part)


def write_text(text: str, path: Path) -> None:
    """Writes a text file, at once."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
