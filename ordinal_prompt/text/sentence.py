"""Text encoders of sentence-transformers, their pooling, dense and normalising modules included."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ordinal_prompt.text.towers import TextHalf, text_half
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
    """Runs a `SentenceTransformer` on prompts; its features are those of `encode`."""

    def __init__(self, model: Any, trainable: bool = False) -> None:
        table = word_embedding(model).weight
        half = text_half(model, table, trainable=trainable)
        super().__init__(half, table.shape[1], 0, int(model.max_seq_length or 512), cut=True)
        self.checked(table)

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Features (K, D) of token ids (K, L); `mask` (K, L) is False on padding."""
        features: Tensor = self.tower({"input_ids": ids, "attention_mask": mask.long()})["sentence_embedding"]
        return features
