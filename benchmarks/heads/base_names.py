"""How K rank names should become B base embeddings: the nearest names, or a least-squares fit of all names.

Prompts are not trained: rated words are matched to the prototypes as they start, so that the only difference is the
start.  Prints the mean absolute error on validation words, and how far the mixtures are from the names they stand for.

    python benchmarks/heads/base_names.py
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from data import DATA_SETS
from embedding import load_text_encoder

import ordinal_prompt as op


def main() -> None:
    model, tokenizer = load_text_encoder("minilm")
    task = DATA_SETS["words"](Namespace())
    rank_names = task.rank_names or ()
    options: dict[str, Any] = {"tokenizer": tokenizer, "context": task.context}
    names = op.OrdinalPromptHead(model, rank_names, interpolation=None, **options).prompt.rank_embeddings
    print(f"{'interpolation':<14}{'bases':>6}{'start':>15}{'MAE':>8}{'distance to the names':>24}")
    for interpolation in ("linear", "piecewise", "inv_prop"):
        for bases in (2, 3, 5):
            for start in ("nearest", "least squares"):
                chosen: dict[str, Any] = {"num_base_ranks": bases}
                if start == "nearest":
                    nearest = torch.linspace(0, task.num_ranks - 1, bases).round().int()
                    chosen = {"base_rank_names": [rank_names[i] for i in nearest]}
                head = op.OrdinalPromptHead(model, rank_names, interpolation=interpolation, **chosen, **options)
                prompt = head.eval().prompt
                mixed = torch.einsum("kb,btw->ktw", prompt.interpolation_weights, prompt.rank_embeddings)
                distance = (mixed - names[:, : mixed.shape[1]]).norm() / names[:, : mixed.shape[1]].norm()
                error = (op.decode(head(task.features["val"])) - task.labels["val"]).abs().mean()
                print(f"{interpolation:<14}{bases:>6}{start:>15}{error:>8.3f}{distance:>24.3f}")


if __name__ == "__main__":
    main()
