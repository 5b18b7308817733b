"""Heads on disk: a config as JSON, and weights as safetensors."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ordinal_prompt.config import HeadConfig
from ordinal_prompt.distributed import whole
from ordinal_prompt.export import check_finite
from ordinal_prompt.prompt import PromptLearner
from ordinal_prompt.prototypes import RankPrototypes
from ordinal_prompt.text import adapt, hub
from ordinal_prompt.text.template import PromptText

CONFIG_FILE = "ordinal_prompt.json"
WEIGHTS_FILE = "ordinal_prompt.safetensors"
PENDING_FILE = f"{CONFIG_FILE}.new"  # stands there from before the weights are written until the config is
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


def collect(head: RankPrototypes) -> tuple[str, dict[str, Tensor]]:
    """What `write` takes of a head: its config as JSON, and its tensors.

    Raises:
        ValueError: learned tensors that are not finite, or are reparametrized.
    """
    prompt, state_dict = head.prompt, whole(head.state_dict())
    check_finite(**state_dict)
    known = re.compile(rf"text_encoder\..+|(prompt\.)?({'|'.join(LEARNED)})(\.weight|\.bias|_bias)?")
    foreign = [name for name in state_dict if not known.fullmatch(name)]
    if foreign:
        raise ValueError(
            f"Cannot save a head with tensors of an adapter or a reparametrization ({', '.join(foreign)}); make them "
            "permanent first, as merge_and_unload() of PEFT and torch.nn.utils.prune.remove do."
        )
    precision = next((p.dtype for p in _parameters(head.text_encoder) if p.is_floating_point()), prompt.special.dtype)
    written = {
        "format": FORMAT,
        "source": head.source,
        "head": head.config.to_dict(),
        "text": prompt.text.to_dict(),
        "dtype": _name(prompt.rank_embeddings.dtype),
        "text_encoder_dtype": _name(precision),
    }
    tensors = {**state_dict, "special": prompt.special, "prototypes": head.kept_prototypes()}
    text = json.dumps(written, indent=2, ensure_ascii=False) + "\n"
    return text, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def write(folder: Path, config: str, tensors: Mapping[str, Tensor]) -> None:
    """Writes config and weights into a folder; what goes wrong, at whatever point, leaves the old ones or the new."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / PENDING_FILE) as path:
        path.write_text(config, encoding="utf-8")
    try:
        with replacing(folder / WEIGHTS_FILE) as path:
            save_file({**tensors}, path, metadata={"config": config})  # so that a mixed pair of files is found out
    except BaseException:
        (folder / PENDING_FILE).unlink(missing_ok=True)
        raise
    with replacing(folder / CONFIG_FILE) as path:
        path.write_text(config, encoding="utf-8")
    (folder / PENDING_FILE).unlink(missing_ok=True)  # which another process that saves here may have done


def load(folder: Path, text_encoder: Any, load_source: Callable[[Mapping[str, Any]], Any]) -> Checkpoint:
    """Reads what was saved into a folder; see `OrdinalPromptHead.from_pretrained` for `text_encoder` and errors.

    Args:
        load_source: makes a text encoder of a source; see `text.hub`.
    """
    written = _read_config(folder)
    with _weights(folder) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = HeadConfig(**written["head"])
    special, prototypes, source = tensors.pop("special"), tensors.pop("prototypes"), written["source"]
    if text_encoder is None and hub.is_known(source):
        text_encoder = load_source(source)
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


def read_source(folder: Path) -> dict[str, Any]:
    """What a saved head says of its text encoder; empty where it says nothing."""
    source: dict[str, Any] | None = _read_config(folder)["source"]
    return source or {}


def _read_config(folder: Path) -> dict[str, Any]:
    """The config that belongs to the weights, in today's format."""
    pending = (folder / PENDING_FILE).is_file()  # of a process that was killed while it saved
    for name in (WEIGHTS_FILE, *([] if pending else [CONFIG_FILE])):
        if not (folder / name).is_file():
            several = "; it holds several heads: load them with OrdinalPromptHeads.from_pretrained"
            hint = several if (folder / ATTRIBUTES_FILE).is_file() else ""
            raise FileNotFoundError(f"Found no {name} in {folder}; expected a folder written by save_pretrained{hint}.")
    with _weights(folder) as file:
        of_weights = (file.metadata() or {}).get("config")
    try:
        if pending and (folder / PENDING_FILE).read_text(encoding="utf-8") == of_weights:
            text = of_weights
        else:
            text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
        config = json.loads(text)
        version = config["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged or no config of a prompt head: {error!r}.") from error
    if version not in (1, FORMAT):
        raise ValueError(
            f"{folder} was written in format {version}, but this version reads 1 to {FORMAT}; update ordinal_prompt."
        )
    if of_weights != text:
        raise ValueError(
            f"{CONFIG_FILE} and {WEIGHTS_FILE} in {folder} do not belong together, or were edited by hand."
        )
    return _from_format_1(config) if version == 1 else config


@contextmanager
def _weights(folder: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} is damaged: {error}.") from error


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
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    beside.touch(exist_ok=False)
    mode = beside.stat().st_mode  # what is written there may come with another
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        beside.chmod(mode)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
