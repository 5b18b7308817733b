"""Text encoders of transformers, given directly or inside open_clip's `HFTextEncoder`.

They run through their own forward on token ids, with the prompts in place of the token embedding: positions, masks,
poolers and projections are the model's own, whatever they are.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ordinal_prompt.text.prompts import Prompts
from ordinal_prompt.text.towers import TextHalf, text_half, without_adapter

POOLINGS = ("mean", "cls", "last")
_IMAGE_HALF = ("vision_model", "visual_projection", "logit_scale", "logit_bias")


def is_transformers_text(model: nn.Module) -> bool:
    """Whether the module is a text model of transformers (or a model of texts and something else that holds one)."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return False
    try:
        return isinstance(token_embedding(model), nn.Embedding) and hasattr(text_model(model), "config")
    except (AttributeError, NotImplementedError):
        return False


def is_hf_text_encoder(model: nn.Module) -> bool:
    """Whether the module is open_clip's `HFTextEncoder`."""
    return all(hasattr(model, name) for name in ("transformer", "pooler", "proj", "config"))


def hf_text_encoder(encoder: Any, trainable: bool = False) -> nn.Module:
    """The text encoder of open_clip's `HFTextEncoder`, which masks padding: sequences end with the longest prompt."""
    table = token_embedding(encoder.transformer).weight
    half = text_half(encoder, table, trainable=trainable)
    return TextHalf(half, table.shape[1], encoder.output_dim, _context_length(encoder), cut=True).checked(table)


@dataclass(frozen=True)
class TransformersTextEncoder:
    """A text model of transformers, and how its tokens become one feature.

    `OrdinalPromptHead(TransformersTextEncoder(bert, pooling="cls"), ranks, tokenizer=tokenizer)` pools the first token;
    the bare model in its place means mean pooling.

    Args:
        model: a BERT-like encoder, a CLIP or SigLIP text model, or an image-text model, whose text half is taken.
        pooling: `"mean"` over the tokens that are not padding, `"cls"` (the first token), or `"last"` (the last one, as
            in decoders made into embedding models: E5-Mistral, Qwen3-Embedding); of no effect where the model defines
            its own text feature (`get_text_features`, `text_embeds`, the pooled output of a CLIP-like text model).
            Default: what the model's own folder says (`1_Pooling/config.json` of sentence-transformers), else the mean;
            a decoder, whose first tokens see nothing of the text, has no default.

    Raises:
        ValueError: unknown pooling.
    """

    model: nn.Module
    pooling: str | None = None

    def __post_init__(self) -> None:
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise ValueError(f"Expected `pooling` to be one of {POOLINGS}, but got {self.pooling!r}.")


class TransformersHalf(TextHalf):
    """Runs the text half of a transformers model on prompts; see `TransformersTextEncoder` for the arguments."""

    def __init__(self, model: Any, pooling: str | None = None, trainable: bool = False) -> None:
        model, table = text_model(model), token_embedding(model).weight
        half = text_half(model, table, _IMAGE_HALF, trainable)
        kind = getattr(model.config, "text_config", model.config).model_type
        # SigLIP was trained without a padding mask: every text is padded to the full length.
        super().__init__(half, table.shape[1], 0, _context_length(model), cut="siglip" not in kind)
        known = pooling or _pooling_of_folder(model)
        self.pooling = known or "mean"
        # Its own feature: of a model of texts and images or sounds, and of their text models.  A layer that is called
        # the pooler, as that of BERT, was made for something else.
        has_pooler = any(name.rpartition(".")[2] == "pooler" for name, _ in model.named_modules())
        self.own_pooling = hasattr(model, "get_text_features") or "clip" in kind or not has_pooler
        self.gives_own: bool | None = None  # until the first prompt has gone through
        self.checked(table)
        if known is None and not self.gives_own and not table.is_meta and self._is_causal(table):
            raise ValueError(
                f"{type(model).__name__} is a decoder, whose tokens see only what is before them, and its folder does "
                'not say how it pools; wrap it in TransformersTextEncoder(model, pooling="last") if it is an embedding '
                'model of that kind (or pass pooling="mean").'
            )

    @torch.no_grad()
    def _is_causal(self, table: Tensor) -> bool:
        """Whether a first token has the same feature, whatever follows it."""
        first, others = table[:1].detach(), table[[1, -1]].detach()[:, None]
        ids = torch.zeros(2, 2, dtype=torch.long, device=table.device)
        self.pooling, pooling = "cls", self.pooling
        features = self.tried(Prompts(first, others, torch.ones_like(ids[:, 0]), first[0], ids, 0))
        self.pooling = pooling
        return torch.equal(features[0], features[1])

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Features (K, D) of token ids (K, L); `mask` (K, L) is False on padding."""
        run: Any = getattr(self.tower, "get_text_features", self.tower)
        output = run(input_ids=ids, **({"attention_mask": mask.long()} if self.cut else {}))
        features: Any = output if isinstance(output, Tensor) else getattr(output, "text_embeds", None)
        if features is None and self.own_pooling:
            features = getattr(output, "pooler_output", None)
        if self.gives_own is None:
            self.gives_own = features is not None
        if features is not None:
            return features  # type: ignore[no-any-return]
        if self.pooling == "cls":
            features = output.last_hidden_state[:, 0]
        elif self.pooling == "last":
            last = mask.sum(dim=1) - 1
            features = output.last_hidden_state[torch.arange(len(last), device=last.device), last]
        else:
            weights = mask.to(output.last_hidden_state.dtype)[..., None]
            features = (output.last_hidden_state * weights).sum(dim=1) / weights.sum(dim=1)
        return features  # type: ignore[no-any-return]


def _pooling_of_folder(model: Any) -> str | None:
    """What sentence-transformers wrote beside a model that was loaded from a folder."""
    path = Path(getattr(model.config, "_name_or_path", "") or "") / "1_Pooling" / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    old = {"cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken", "mean": "pooling_mode_mean_tokens"}
    chosen = [name for name, key in old.items() if config.get(key)] or [config.get("pooling_mode")]
    named = {"cls": "cls", "lasttoken": "last", "last": "last", "mean": "mean"}.get(str(chosen[0]))
    if named is None or len(chosen) > 1:
        raise ValueError(
            f"{path} pools in a way that is not known here ({', '.join(map(str, chosen))}); pass the "
            "SentenceTransformer, or wrap the model in TransformersTextEncoder(model, pooling=...)."
        )
    return named


def text_model(model: Any) -> Any:
    """The model itself, the encoder of an encoder-decoder, or what a model with a task's head builds on."""
    learned = [config for config in getattr(model, "peft_config", {}).values() if config.is_prompt_learning]
    if learned:
        raise TypeError(
            f"Expected a `text_encoder` that reads prompts as they are, but PEFT puts its own in front of them "
            f"({type(learned[0]).__name__}), which cannot be merged; pass the model without them, "
            "model.get_base_model(), and let the head's context learn in their place."
        )
    if hasattr(model, "get_text_features") or hasattr(model, "text_projection"):  # features of its own
        return model
    kind = type(model)  # models of others may build on one of transformers, too
    if re.search("For[A-Z]|Head|Decoder$", kind.__name__) or not kind.__module__.startswith("transformers."):
        model = getattr(model, "base_model", model)
    if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        return model.get_encoder()
    return model


def token_embedding(model: Any) -> Any:
    """The module that embeds the token ids of a transformers model (of its text half)."""
    half = text_model(model.text_model if hasattr(model, "get_text_features") else model)
    try:
        return without_adapter(half.get_input_embeddings())
    except (AttributeError, NotImplementedError):  # the inner text models of transformers 4, of OWL-ViT and GroupViT
        size: Any = getattr(getattr(model.config, "text_config", model.config), "vocab_size", None)
        tables = [part for part in half.modules() if isinstance(part, nn.Embedding) and part.num_embeddings == size]
        if len(tables) != 1:
            raise
        return tables[0]


def _context_length(model: Any) -> int:
    """The most tokens of a text; RoBERTa-like models count positions from behind the padding's on."""
    config: Any = getattr(model.config, "text_config", model.config)
    length = getattr(config, "max_position_embeddings", None) or 512
    padding = [
        module.padding_idx
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    ]
    return int(length) - max((index + 1 for index in padding if index is not None), default=0)
