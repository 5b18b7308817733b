"""Heads on disk: a config as JSON, weights as safetensors; and text encoders from open_clip by name."""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ordinal_prompt.export import check_finite
from ordinal_prompt.prompt import PromptLearner, PromptText
from ordinal_prompt.text import adapt

CONFIG_FILE = "ordinal_prompt.json"
WEIGHTS_FILE = "ordinal_prompt.safetensors"
FORMAT = 1
# Other weights give other prototypes; other hardware differs in the last bits.
PROTOTYPE_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def save(head: Any, folder: Path) -> None:
    """Writes a head's config and weights into a folder, each file at once."""
    from safetensors.torch import save_file

    prompt: PromptLearner = head.prompt
    check_finite(**{name.replace(".", "_"): parameter for name, parameter in head.named_parameters()})
    config = {
        "format": FORMAT,
        "source": head._source,
        "rank_names": head._names,
        "rank_values": list(prompt.positions),
        "text": prompt.text.to_dict(),
        "interpolation": prompt.interpolation,
        "num_base_ranks": prompt.num_base_ranks,
        "rank_specific_context": prompt.rank_specific_context,
        "width": prompt.special.shape[1],
        "embed_dim": head.embed_dim,
        "in_features": None if head.projection is None else head.in_features,
        "normalize": head.normalize,
        "learn_logit_scale": head._learn_logit_scale or head.logit_scale.requires_grad,
        "alignment": head.alignment_scale,
        "residual": head.residual_scale,
        "freeze_text_encoder": head._frozen,
        "dtype": _name(prompt.rank_embeddings.dtype),
        "text_encoder_dtype": _name(_dtype(head.text_encoder) or prompt.special.dtype),
    }
    written = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    tensors["special"] = prompt.special.detach().cpu().contiguous()
    tensors["prototypes"] = head._cached_prototypes().detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    with _replacing(folder / WEIGHTS_FILE) as path:
        save_file(tensors, path, metadata={"config": written})  # so that a mixed pair of files is found out
    with _replacing(folder / CONFIG_FILE) as path:
        path.write_text(written, encoding="utf-8")


def load(cls: Any, folder: Path, text_encoder: Any) -> Any:
    """Builds a head from a folder; see `OrdinalPromptHead.from_pretrained`."""
    config, tensors = _read(folder)
    source = config["source"] or {}
    if text_encoder is None and source.get("pretrained"):
        try:
            text_encoder, _ = load_open_clip(source["model_name"], source["pretrained"], with_tokenizer=False)
        except (ConnectionError, ValueError) as error:
            raise type(error)(
                f"{error} Or load the prototypes alone, which predict and export, with "
                "from_pretrained(folder, text_encoder=False)."
            ) from error
    encoder: Any = None
    if text_encoder is not None and text_encoder is not False:
        encoder, _, _ = adapt(text_encoder, trainable=not config["freeze_text_encoder"])
        if (encoder.width, encoder.embed_dim) != (config["width"], config["embed_dim"]):
            raise ValueError(
                f"The head in {folder} was trained with a text encoder of width {config['width']} and embedding size "
                f"{config['embed_dim']}, but this one has {encoder.width} and {encoder.embed_dim}; pass the one it was "
                "trained with."
            )
        if config["freeze_text_encoder"] and isinstance(encoder, nn.Module):
            encoder.to(getattr(torch, config["text_encoder_dtype"]))
    positions = torch.tensor(config["rank_values"], dtype=torch.float64)
    dtype = getattr(torch, config["dtype"])
    head = cls.__new__(cls)
    nn.Module.__init__(head)
    head._assemble(
        encoder,
        PromptLearner(
            PromptText.from_dict(config["text"]),
            num_ranks=len(positions),
            positions=positions,
            interpolation=config["interpolation"],
            num_base_ranks=config["num_base_ranks"],
            rank_specific_context=config["rank_specific_context"],
            width=config["width"],
            special=tensors.pop("special"),
            dtype=dtype,
        ),
        tuple(config["rank_names"]) if config["rank_names"] else None,
        embed_dim=config["embed_dim"],
        in_features=config["in_features"],
        normalize=config["normalize"],
        log_scale=None,
        learn_logit_scale=config["learn_logit_scale"],
        alignment=config["alignment"],
        residual=config.get("residual", 0.0),
        freeze_text_encoder=encoder is None or config["freeze_text_encoder"],
    )
    head._source = config["source"]
    prototypes = tensors.pop("prototypes")
    if encoder is None:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("text_encoder.")}
    try:
        head.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"The weights in {folder} do not fit their config: {error}") from error
    if encoder is None:
        head._keep_prototypes(prototypes)
    elif not torch.allclose(head._cached_prototypes().cpu(), prototypes, atol=PROTOTYPE_TOLERANCE[dtype]):
        raise ValueError(
            f"The head in {folder} gives other prototypes with this text encoder than when it was saved; pass the text "
            "encoder that it was trained with, with the same weights."
        )
    return head.eval()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"Found no {name} in {folder}; expected a folder written by save_pretrained.")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        version = config["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged or no config of a prompt head: {error!r}.") from error
    if version != FORMAT:
        raise ValueError(
            f"{folder} was written in format {version}, but this version reads {FORMAT}; update ordinal_prompt."
        )
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} is damaged: {error}.") from error
    if metadata.get("config") != (folder / CONFIG_FILE).read_text(encoding="utf-8"):
        raise ValueError(
            f"{CONFIG_FILE} and {WEIGHTS_FILE} in {folder} do not belong together, or were edited by hand."
        )
    return config, tensors


def _dtype(module: Any) -> torch.dtype | None:
    """The precision of a module's weights, where it has some."""
    parameters = module.parameters() if isinstance(module, nn.Module) else ()
    return next((parameter.dtype for parameter in parameters if parameter.is_floating_point()), None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
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
