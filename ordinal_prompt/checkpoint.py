"""Heads on disk: a config as JSON, and weights as safetensors."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ordinal_prompt.config import HeadConfig
from ordinal_prompt.export import check_finite
from ordinal_prompt.prompt import PromptLearner
from ordinal_prompt.prototypes import RankPrototypes
from ordinal_prompt.text import adapt, hub
from ordinal_prompt.text.template import PromptText

CONFIG_FILE = "ordinal_prompt.json"
WEIGHTS_FILE = "ordinal_prompt.safetensors"
ATTRIBUTES_FILE = "ordinal_prompt_attributes.json"  # of several heads, each in a folder of its own
FORMAT = 2
LEARNED = ("context_embeddings", "rank_embeddings", "rank_values", "logit_scale", "projection", "alignment", "residual")
# Other weights give other prototypes; other hardware differs in the last bits.
PROTOTYPE_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Checkpoint:
    """The parts of a head that was saved.

    Attributes:
        folder: where it was saved.
        config: the options of the head.
        prompt: prompts with their layout; what they learned is in `tensors`.
        text_encoder: of the head, or None for its prototypes alone.
        tensors: the state dict of the head.
        prototypes: (K, D) as they were when the head was saved.
        source: the names by which the text encoder can be loaded again, if it has some; see `text.hub`.
    """

    folder: Path
    config: HeadConfig
    prompt: PromptLearner
    text_encoder: Any
    tensors: dict[str, Tensor]
    prototypes: Tensor
    source: dict[str, Any] | None

    @property
    def embed_dim(self) -> int:
        """D."""
        return self.prototypes.shape[1]

    def load_into(self, head: RankPrototypes) -> None:
        """Gives a head of the same parts what was learned.

        Raises:
            ValueError: weights that do not fit, or a text encoder that gives other prototypes than were saved.
        """
        try:
            head.load_state_dict(self.tensors)
        except RuntimeError as error:
            raise ValueError(f"The weights in {self.folder} do not fit their config: {error}") from error
        if self.text_encoder is None:
            head.keep_prototypes(self.prototypes)
            return
        tolerance = PROTOTYPE_TOLERANCE[self.prompt.rank_embeddings.dtype]
        with torch.no_grad():
            prototypes = head.prototypes().cpu()
        if not torch.allclose(prototypes, self.prototypes, atol=tolerance):
            raise ValueError(
                f"The head in {self.folder} gives other prototypes with this text encoder than when it was saved; pass "
                "the text encoder that it was trained with, with the same weights, or text_encoder=False, which loads "
                "the prototypes alone."
            )


def save(
    folder: Path,
    config: HeadConfig,
    prompt: PromptLearner,
    state_dict: Mapping[str, Tensor],
    prototypes: Tensor,
    text_encoder: Any,
    source: dict[str, Any] | None,
) -> None:
    """Writes a head's config and weights into a folder, each file atomically; see `Checkpoint` for the arguments."""
    from safetensors.torch import save_file

    check_finite(**state_dict)
    known = re.compile(rf"text_encoder\..+|(prompt\.)?({'|'.join(LEARNED)})(\.weight|\.bias|_bias)?")
    foreign = [name for name in state_dict if not known.fullmatch(name)]
    if foreign:
        raise ValueError(
            f"Cannot save a head with tensors of an adapter or a reparametrization ({', '.join(foreign)}); make them "
            "permanent first, as merge_and_unload() of PEFT and torch.nn.utils.prune.remove do."
        )
    precision = next((p.dtype for p in _parameters(text_encoder) if p.is_floating_point()), prompt.special.dtype)
    written = {
        "format": FORMAT,
        "source": source,
        "head": config.to_dict(),
        "text": prompt.text.to_dict(),
        "dtype": _name(prompt.rank_embeddings.dtype),
        "text_encoder_dtype": _name(precision),
    }
    text = json.dumps(written, indent=2, ensure_ascii=False) + "\n"
    tensors = {**state_dict, "special": prompt.special, "prototypes": prototypes}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS_FILE) as path:
        save_file(tensors, path, metadata={"config": text})  # so that a mixed pair of files is found out
    with replacing(folder / CONFIG_FILE) as path:
        path.write_text(text, encoding="utf-8")


def load(folder: Path, text_encoder: Any) -> Checkpoint:
    """Reads what was saved into a folder; see `OrdinalPromptHead.from_pretrained` for `text_encoder` and errors."""
    written, tensors = _read(folder)
    config = HeadConfig(**written["head"])
    special, prototypes, source = tensors.pop("special"), tensors.pop("prototypes"), written["source"]
    if text_encoder is None and hub.is_known(source):
        text_encoder = hub.load_source(source)
    encoder: Any = None
    if text_encoder is not None and text_encoder is not False:
        encoder = adapt(text_encoder, trainable=not config.freeze_text_encoder).encoder
        saved, given = (special.shape[1], prototypes.shape[1]), (encoder.width, encoder.embed_dim)
        if given != saved:
            raise ValueError(
                f"The head in {folder} was trained with a text encoder of width {saved[0]} and embedding size "
                f"{saved[1]}, but this one has {given[0]} and {given[1]}; pass the one it was trained with."
            )
        if config.freeze_text_encoder and isinstance(encoder, nn.Module):
            encoder.to(getattr(torch, written["text_encoder_dtype"]))
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("text_encoder.")}
    dtype = getattr(torch, written["dtype"])
    prompt = PromptLearner(config, PromptText.from_dict(written["text"]), special, dtype=dtype)
    return Checkpoint(folder, config, prompt, encoder, tensors, prototypes, source)


def shared_text_encoder(folders: Sequence[Path]) -> Any:
    """The text encoder of open_clip that the heads in all folders name, loaded once; None where there is no such."""
    first, *others = map(read_source, folders)
    one = all(source == first for source in others) and not first.get("class")
    return hub.load_source(first) if one and hub.is_known(first) else None


def read_source(folder: Path) -> dict[str, Any]:
    """What a saved head says of its text encoder; empty where it says nothing."""
    source: dict[str, Any] | None = _read(folder)[0]["source"]
    return source or {}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config, in today's format, and the tensors."""
    from safetensors import SafetensorError, safe_open

    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            several = "; it holds several heads: load them with OrdinalPromptHeads.from_pretrained"
            hint = several if (folder / ATTRIBUTES_FILE).is_file() else ""
            raise FileNotFoundError(f"Found no {name} in {folder}; expected a folder written by save_pretrained{hint}.")
    try:
        text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
        config = json.loads(text)
        version = config["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged or no config of a prompt head: {error!r}.") from error
    if version not in (1, FORMAT):
        raise ValueError(
            f"{folder} was written in format {version}, but this version reads 1 to {FORMAT}; update ordinal_prompt."
        )
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} is damaged: {error}.") from error
    if metadata.get("config") != text:
        raise ValueError(
            f"{CONFIG_FILE} and {WEIGHTS_FILE} in {folder} do not belong together, or were edited by hand."
        )
    return (_from_format_1(config) if version == 1 else config), tensors


def _from_format_1(config: dict[str, Any]) -> dict[str, Any]:
    """Today's form of a config of release 0.1.0, where the options of the head stood beside the rest."""
    names = set(HeadConfig.__dataclass_fields__) & set(config)
    ranks = config["rank_names"] or len(config["rank_values"])
    head = {"ranks": ranks, "context": config["text"]["num_context"], **{name: config[name] for name in names}}
    return {**config, "head": head}


def _parameters(module: Any) -> Iterator[nn.Parameter]:
    return module.parameters() if isinstance(module, nn.Module) else iter(())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place once it is written; whatever goes wrong, `path` stays whole."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
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
