"""The Hugging Face hub: heads up and down, and the card that tells a stranger what a head is."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ordinal_prompt.checkpoint import ATTRIBUTES_FILE, CONFIG_FILE, WEIGHTS_FILE
from ordinal_prompt.config import HeadConfig
from ordinal_prompt.text.hub import described, is_known, is_offline

LIMITS = (
    "The head knows no other ranks than these, takes features of the network that it was trained on and no others, and "
    "inherits what its text encoder and its labels take for granted. Its probabilities are not calibrated: see "
    "`op.calibrate`."
)
CARD = """---
library_name: ordinal_prompt
tags:
- ordinal-regression
- ordinal-classification
- ordinal-clip
---

# {title}

{what} for ordered labels, whose weights a text encoder wrote (OrdinalCLIP, Li et al., NeurIPS 2022).
It takes features (…, {width}) and gives {gives}.

```python
import ordinal_prompt as op

head = op.{kind}.from_pretrained("{repo}"{without})
values = head.predict(features)  # in the units of the ranks' values
layers = head.export()           # plain layers of torch.nn
```
{heads}
## Training
{training}

## Limits
{limits}
"""
HEAD = """
| rank | name | value |
|---:|:---|---:|
{ranks}

- Text encoder: {encoder}
- Context: {context}
- Settings that are not the defaults: {settings}
"""


def model_card(heads: Mapping[str, Any], repo: str, training: str, limits: str) -> str:
    """The README of a repository, in Markdown.

    Args:
        heads: by attribute; of one head, under the name "".
        training, limits: what is said of them.
    """
    named = {name: f"\n## {_cell(name)}\n" if name else "" for name in heads}
    first = next(iter(heads.values()))
    return CARD.format(
        title=repo.rpartition("/")[2],
        repo=repo,
        what="Classification heads" if "" not in heads else "A classification head",
        kind="OrdinalPromptHead" if "" in heads else "OrdinalPromptHeads",
        without="" if all(is_known(one.source) for one in heads.values()) else ", text_encoder=False",
        width=first.in_features,
        gives=f"logits (…, {first.num_ranks})" if "" in heads else "a dictionary of logits",
        heads="".join(named[name] + _described(one) for name, one in heads.items()),
        training=training or "Nothing was written down.",
        limits=limits or LIMITS,
    )


def _described(head: Any) -> str:
    """Ranks, text encoder and settings of one head."""
    config: HeadConfig = head.config
    ranks = zip(range(head.num_ranks), head.rank_names, config.values, strict=True)
    changed = {name: value for name, value in config.changed().items() if name not in ("ranks", "context")}
    words = isinstance(config.context, str)
    return HEAD.format(
        ranks="\n".join(f"| {i} | {_cell(name)} | {value:g} |" for i, name, value in ranks),
        encoder=described(head.source) if head.source else _kind(head.text_encoder),
        context=(_code(str(config.context)) or "none") if words else f"{config.context} tokens, started at random",
        settings=", ".join(_code(f"{name}={value!r}") for name, value in changed.items()) or "none",
    )


def _kind(text_encoder: Any) -> str:
    return "of another model" if text_encoder is None else type(text_encoder).__name__


def _cell(text: str) -> str:
    """Any text on one line of a table, as it is: neither its bars nor its marks mean anything there."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|~])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Any text as code on one line, between more backticks than it holds in a row; no text as it is."""
    if not text.strip():
        return ""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{' '.join(text.split())}{pad}{fence}"


def push(head: Any, repo: str, card: str, options: dict[str, Any]) -> Any:
    """Uploads what `head.save_pretrained` saves, and the card; options are those of `ModelHubMixin.push_to_hub`."""
    from huggingface_hub import ModelCard, ModelHubMixin

    class Shared(ModelHubMixin):  # here, so that importing this package does not import theirs
        def _save_pretrained(self, save_directory: Path) -> None:
            shutil.copytree(saved, save_directory, dirs_exist_ok=True)

        def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
            return ModelCard(card)

    with tempfile.TemporaryDirectory() as saved:
        head.save_pretrained(saved)  # first, so that what cannot be saved leaves no empty repository
        with _told(f"Could not push to {repo!r}"):
            return Shared().push_to_hub(repo, **options)


def local_folder(
    name: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """A folder of a saved head as it is; the name of a repository is downloaded, or found in the cache.

    Raises:
        FileNotFoundError: neither a folder nor a repository.
        ConnectionError: no folder, and the hub cannot be reached.
        ValueError: a revision of a local folder.
    """
    folder = Path(name)
    is_repository = isinstance(name, str) and name.count("/") == 1 and all(name.split("/")) and not folder.exists()
    if not is_repository:
        if revision is not None:
            raise ValueError(f"Expected no `revision` of a local folder, but got {revision!r} for {name}.")
        return folder
    from huggingface_hub import snapshot_download

    files = [f"*{CONFIG_FILE}", f"*{WEIGHTS_FILE}", ATTRIBUTES_FILE]  # also those of several heads, in folders
    with _told(f"Found no folder {name!r} here, and could not download it"):
        path = snapshot_download(str(name), revision=revision, token=token, cache_dir=cache_dir, allow_patterns=files)
    return Path(path)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors of the hub as what Python calls them, with the way out."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"{what}: the hub has no such repository or revision, or not for you; check both names, and pass token= "
            "for one that is private."
        ) from error
    except Exception as error:
        if not is_offline(error):
            raise
        raise ConnectionError(f"{what}: no hub can be reached. Connect to the network, or give a folder.") from error
