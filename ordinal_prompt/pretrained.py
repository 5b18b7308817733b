"""Heads by name: on a text encoder of open_clip, in folders, and in repositories of the Hugging Face hub."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from ordinal_prompt import checkpoint, sharing
from ordinal_prompt.config import HeadConfig
from ordinal_prompt.prompt import PromptLearner
from ordinal_prompt.prototypes import RankPrototypes
from ordinal_prompt.text import hub

Head = TypeVar("Head", bound="Pretrained")


class Pretrained(RankPrototypes):
    """Saves and loads the config (JSON) and what was learned (safetensors) of a head."""

    def _assemble(
        self, config: HeadConfig, prompt: PromptLearner, text_encoder: Any, embed_dim: int, log_scale: float | None
    ) -> None:
        """Puts the parts together; a head says how."""
        raise NotImplementedError

    @classmethod
    def check_options(cls, ranks: int | Sequence[str], **options: Any) -> None:
        """Raises what the constructor would raise, as far as no text encoder is needed to find it."""
        signature = inspect.signature(cls)
        if not {field.name for field in fields(HeadConfig)} <= {*signature.parameters}:
            return  # a subclass with options of its own
        given = signature.bind(None, ranks, **options)
        given.apply_defaults()
        HeadConfig.from_arguments(given.arguments)

    @classmethod
    def from_open_clip(
        cls: type[Head],
        model_name: str,
        pretrained: str | None = None,
        *,
        ranks: int | Sequence[str],
        **options: Any,
    ) -> Head:
        """A head, with its options, on the text encoder of an open_clip model, which open_clip builds or downloads.

        Args:
            model_name: as in `open_clip.list_models()`, or an `hf-hub:` or `local-dir:` name.
            pretrained: a tag as in `open_clip.list_pretrained()`, or the path of a checkpoint; None for random weights.

        Raises:
            ValueError: unknown model or pretrained tag, with near matches.
            ConnectionError: weights or tokenizer that cannot be downloaded.
        """
        cls.check_options(ranks, **options)  # before a download
        model, tokenizer = hub.load_open_clip(model_name, pretrained)
        make: Callable[..., Head] = cls  # the constructor is that of the head
        head = make(model, ranks, **{"tokenizer": tokenizer, **options})
        head.source = {"model_name": model_name, "pretrained": pretrained}
        return head

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves config and weights into a folder; see `from_pretrained`.

        Files are written atomically; under FSDP every process has to take part.  Raises ValueError for learned tensors
        that are not finite, or are reparametrized.
        """
        checkpoint.write(Path(folder), *checkpoint.collect(self))

    def push_to_hub(self, repo_id: str, *, training: str = "", limits: str = "", **options: Any) -> Any:
        """Saves the head into a repository of the Hugging Face hub, with a model card.

        Args:
            repo_id: "user/name"; made where there is none.
            training: what the card says of the training (data, settings, errors), in Markdown.
            limits: what it says of the limits; default those of any head.
            options: of `huggingface_hub.ModelHubMixin.push_to_hub`: `private`, `token`, `branch`, `commit_message`, …;
                `ignore_patterns="README.md"` leaves a card of yours as it is.

        Returns:
            What huggingface_hub returns: where the commit is.

        Raises:
            ValueError: as `save_pretrained`.
            FileNotFoundError, ConnectionError: no such repository for you, or a hub that cannot be reached.
        """
        return sharing.push(self, repo_id, sharing.model_card({"": self}, repo_id, training, limits), options)

    @classmethod
    def from_pretrained(
        cls: type[Head],
        folder: str | Path,
        text_encoder: Any = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> Head:
        """Loads what `save_pretrained` or `push_to_hub` saved, in eval mode.

        Args:
            folder: a folder; or "user/name", a repository of the Hugging Face hub.
            text_encoder: the one that the head was trained with; if it was saved as trainable, it takes on the weights
                that were saved.  Without it, open_clip loads the model that `from_open_clip` named, and transformers
                one that came from a hub; if that of transformers gives other prototypes or cannot be had, a warning
                says so.  Then, on any other text encoder, or with `text_encoder=False`, a head comes back with its
                prototypes alone (`text_encoder` is None): it predicts and exports, but its prompts learn no more.
            revision: a branch, tag or commit of the repository.
            token: for private repositories; default the one that huggingface_hub has stored.
            cache_dir: where downloads go; default that of huggingface_hub.

        Raises:
            FileNotFoundError: no such folder or repository, or files missing in it.
            ConnectionError: a hub that cannot be reached.
            ValueError: damaged files; a text encoder of another width, or with other weights.
        """
        return cls.from_folder(sharing.local_folder(folder, revision, token, cache_dir), text_encoder)

    @classmethod
    def from_folder(
        cls: type[Head],
        folder: Path,
        text_encoder: Any = None,
        load_source: Callable[[Mapping[str, Any]], Any] = hub.load_source,
    ) -> Head:
        """See `from_pretrained`; `load_source` makes the text encoder that the folder names."""
        if text_encoder is None and checkpoint.read_source(folder).get("class"):
            try:
                return cls._load(folder, None, load_source)
            except Exception as error:  # the name may stand for other weights by now, or for nothing
                told = "The prototypes alone were loaded, which predict and export; to train, pass the text encoder."
                warnings.warn(f"{told} The one that is named does not serve: {error}", stacklevel=2)
                text_encoder = False
        return cls._load(folder, text_encoder, load_source)

    @classmethod
    def _load(cls: type[Head], folder: Path, text_encoder: Any, load_source: Any) -> Head:
        saved = checkpoint.load(folder, text_encoder, load_source)
        head = cls.__new__(cls)
        head._assemble(saved.config, saved.prompt, saved.text_encoder, saved.embed_dim, None)
        head.source = saved.source
        saved.load_into(head)
        return head.eval()
