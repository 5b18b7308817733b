"""Text encoders by name: open_clip and transformers build them, and download what they have to.

A `source` is what a saved head keeps of its text encoder: `{"model_name", "pretrained"}` of open_clip, or `{"class",
"name", "revision", "pooling"}` of transformers.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ordinal_prompt.text.transformers import TransformersTextEncoder


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


def source_of(text_encoder: Any) -> dict[str, Any] | None:
    """The source of a text model that transformers loaded from a hub; None of any other, and of one from a folder."""
    wrapped = isinstance(text_encoder, TransformersTextEncoder)
    model = text_encoder.model if wrapped else text_encoder
    config, kind = getattr(model, "config", None), type(model).__name__
    name = getattr(config, "_name_or_path", None) or ""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or Path(name).exists():
        return None
    if getattr(sys.modules.get("transformers"), kind, None) is not type(model):  # code of another's, which may be gone
        return None
    revision = getattr(config, "_commit_hash", None)
    return {"class": kind, "name": name, "revision": revision, "pooling": text_encoder.pooling if wrapped else None}


def is_known(source: Mapping[str, Any] | None) -> bool:
    """Whether a source names weights."""
    return source is not None and bool(source.get("pretrained") or source.get("class"))


def load_source(source: Mapping[str, Any]) -> Any:
    """The text encoder of a source.

    Raises:
        ConnectionError: weights that cannot be downloaded.
        ValueError: names that the library does not know.
    """
    try:
        if "class" not in source:
            return load_open_clip(source["model_name"], source["pretrained"], with_tokenizer=False)[0]
        import transformers

        kind = getattr(transformers, source["class"])
        if not issubclass(kind, transformers.PreTrainedModel):
            raise ValueError(f"{source['class']} is no model.")
        model = kind.from_pretrained(source["name"], revision=source["revision"] or "main", use_safetensors=True)
        return TransformersTextEncoder(model, source["pooling"])
    except (AttributeError, ImportError, OSError, ValueError) as error:
        raise (ConnectionError if is_offline(error) else ValueError)(
            f"Could not load the text encoder of the head, {described(source)} ({error}). Load the prototypes alone, "
            "which predict and export, with from_pretrained(folder, text_encoder=False)."
        ) from error


def remembered(load: Callable[[Mapping[str, Any]], Any]) -> Callable[[Mapping[str, Any]], Any]:
    """The same, but what was loaded once is handed out again: several heads share it."""
    found: dict[str, Any] = {}

    def once(source: Mapping[str, Any]) -> Any:
        key = repr(sorted(source.items()))
        if key not in found:
            found[key] = load(source)
        return found[key]

    return once


def described(source: Mapping[str, Any]) -> str:
    """A source in words, for a model card."""
    if "class" in source:
        return f"`{source['name']}` of transformers"
    return f"`{source['model_name']}` of open_clip, weights `{source['pretrained']}`"


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
