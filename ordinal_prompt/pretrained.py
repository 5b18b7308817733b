"""Heads that come and go as files: in folders, and in repositories of the Hugging Face hub."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ordinal_prompt import checkpoint, sharing
from ordinal_prompt.config import HeadConfig
from ordinal_prompt.distributed import whole
from ordinal_prompt.prompt import PromptLearner
from ordinal_prompt.prototypes import RankPrototypes

Head = TypeVar("Head", bound="Pretrained")


class Pretrained(RankPrototypes):
    """Saves and loads the config (JSON) and what was learned (safetensors) of a head."""

    _source: dict[str, Any] | None = None  # the names by which the text encoder can be loaded again; see `text.hub`

    def _assemble(
        self, config: HeadConfig, prompt: PromptLearner, text_encoder: Any, embed_dim: int, log_scale: float | None
    ) -> None:
        """Puts the parts together; a head says how."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves config and weights into a folder; see `from_pretrained`.

        Files are written atomically; under FSDP every process has to take part.  Raises ValueError for learned tensors
        that are not finite, or are reparametrized.
        """
        tensors: dict[str, Tensor] = whole(self.state_dict())
        parts = (self.config, self.prompt, tensors, self.kept_prototypes(), self.text_encoder, self._source)
        checkpoint.save(Path(folder), *parts)

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
                one that came from a hub; if that gives other prototypes or cannot be had, a warning says so.  Then, on
                any other text encoder, or with `text_encoder=False`, a head comes back with its prototypes alone
                (`text_encoder` is None): it predicts and exports, but its prompts learn no more.
            revision: a branch, tag or commit of the repository.
            token: for private repositories; default the one that huggingface_hub has stored.
            cache_dir: where downloads go; default that of huggingface_hub.

        Raises:
            FileNotFoundError: no such folder or repository, or files missing in it.
            ConnectionError: a hub that cannot be reached.
            ValueError: damaged files; a text encoder of another width, or with other weights.
        """
        folder = sharing.local_folder(folder, revision, token, cache_dir)
        if text_encoder is None and checkpoint.read_source(folder).get("class"):
            try:
                return cls._load(folder, None)
            except Exception as error:  # the name may stand for other weights by now, or for nothing
                told = "The prototypes alone were loaded, which predict and export; to train, pass the text encoder."
                warnings.warn(f"{told} The one that is named does not serve: {error}", stacklevel=2)
                text_encoder = False
        return cls._load(folder, text_encoder)

    @classmethod
    def _load(cls: type[Head], folder: Path, text_encoder: Any) -> Head:
        saved = checkpoint.load(folder, text_encoder)
        head = cls.__new__(cls)
        head._assemble(saved.config, saved.prompt, saved.text_encoder, saved.embed_dim, None)
        head._source = saved.source
        saved.load_into(head)
        return head.eval()
