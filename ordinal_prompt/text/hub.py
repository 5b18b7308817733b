"""Text encoders by name: open_clip builds them, and downloads what it has to."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn


def load_open_clip(
    model_name: str, pretrained: str | None, with_tokenizer: bool = True
) -> tuple[nn.Module, Callable[..., Any] | None]:
    """An open_clip model and its tokenizer by name; see `OrdinalPromptHead.from_open_clip`."""
    import open_clip

    if ":" not in model_name:  # not a folder or a repository of a hub
        _check_known(model_name, pretrained)
    try:
        model = open_clip.create_model(model_name, pretrained=pretrained)
        return model, open_clip.get_tokenizer(model_name) if with_tokenizer else None
    except (OSError, RuntimeError) as error:
        if not is_offline(error):
            raise
        raise ConnectionError(
            f"Could not download {model_name!r} (pretrained={pretrained!r}): no hub can be reached. Connect to the "
            "network, or pass pretrained= with the path of a checkpoint on disk."
        ) from error


def _check_known(model_name: str, pretrained: str | None) -> None:
    import open_clip

    known = open_clip.list_models()
    name = model_name.replace("/", "-")  # as open_clip reads OpenAI's names
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else "; see open_clip.list_models()."
        raise ValueError(f"open_clip has no model {model_name!r}{hint}")
    if pretrained is None or Path(pretrained).exists():
        return
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained.lower() not in {tag.lower() for tag in tags} | {tag.lower().replace("-", "_") for tag in tags}:
        raise ValueError(
            f"open_clip has no weights {pretrained!r} for {model_name}, and no such file exists; known are "
            f"{', '.join(tags) or 'none'}."
        )


def is_offline(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that a hub could not be reached."""
    kinds = {
        "ConnectError",
        "ConnectTimeout",
        "LocalEntryNotFoundError",
        "MaxRetryError",
        "OfflineModeIsEnabled",
        "URLError",
    }
    while error is not None:
        if isinstance(error, ConnectionError) or {kind.__name__ for kind in type(error).__mro__} & kinds:
            return True
        error = error.__cause__ or error.__context__
    return False
