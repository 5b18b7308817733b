"""Text encoders of sentence-transformers, their pooling, dense and normalising modules included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ordinal_prompt.text.prompts import Prompts
from ordinal_prompt.text.towers import TextHalf, evaluating, text_half
from ordinal_prompt.text.transformers import token_embedding


def is_sentence_transformer(model: Any) -> bool:
    """Whether the model is a `SentenceTransformer`."""
    return any(kind.__name__ == "SentenceTransformer" for kind in type(model).__mro__)


def word_embedding(model: nn.Module) -> nn.Embedding:
    """The token embedding of the transformer inside a `SentenceTransformer`.

    Raises:
        TypeError: none that is known.
    """
    inside = next((part for part in model.modules() if hasattr(part, "get_input_embeddings")), None)
    embedding: Any = None if inside is None else token_embedding(inside)
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(
            "Expected a SentenceTransformer with a text model of transformers inside, but found none; pass the text "
            "model by itself."
        )
    return embedding


class SentenceHalf(TextHalf):
    """Runs a `SentenceTransformer` on prompts; its features are those of `encode`.

    Raises:
        ValueError: they are not, since `encode` does something to a text before or after tokenizer and modules.
    """

    def __init__(self, model: Any, trainable: bool = False) -> None:
        table = word_embedding(model).weight
        half = text_half(model, table, trainable=trainable)
        super().__init__(half, table.shape[1], 0, int(model.max_seq_length or 512), cut=True)
        self.checked(table)
        if not table.is_meta:
            self._compare(model)

    @torch.no_grad()
    def _compare(self, model: Any, text: str = "One.") -> None:
        embedding = word_embedding(model)
        ids = torch.tensor(model.tokenizer([text])["input_ids"], device=embedding.weight.device)
        tokens, lengths = embedding(ids), torch.tensor([ids.shape[1]], device=ids.device)
        ours = self.tried(Prompts(tokens[0, :0], tokens, lengths, tokens[0, 0], ids, 0))
        with evaluating(model):
            own = model.encode([text], convert_to_tensor=True, show_progress_bar=False).to(ours)
        if own.shape != ours.shape or F.cosine_similarity(own, ours).item() < 0.999:
            name = getattr(model, "default_prompt_name", None)
            raise ValueError(
                "Expected `encode` to give what the modules of the SentenceTransformer make of a text's tokens, but "
                f"of {text!r} it gives something else (default_prompt_name={name!r}). Set model.default_prompt_name = "
                "None and begin `context` with that prompt; what else it does belongs into the tokenizer or a module."
            )

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Features (K, D) of token ids (K, L); `mask` (K, L) is False on padding."""
        features: Tensor = self.tower({"input_ids": ids, "attention_mask": mask.long()})["sentence_embedding"]
        return features[:, : getattr(self.tower, "truncate_dim", None)]
