"""transformers' Trainer: our loss as its loss function, with gradients accumulated or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import ordinal_prompt as op

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 99}


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([5 + index, 7, 9]), "labels": torch.tensor(index % 5)}


def test_accumulated_gradients_are_those_of_the_whole_batch(clip: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    after = []
    for parts in (1, 2):
        torch.manual_seed(0)
        options: dict[str, Any] = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**options))
        head = op.OrdinalPromptHead(clip, 5, in_features=16)
        op.replace_head(model, head)
        arguments = transformers.TrainingArguments(
            str(tmp_path / str(parts)),
            per_device_train_batch_size=8 // parts,
            gradient_accumulation_steps=parts,
            max_steps=2,
            learning_rate=0.1,
            optim="sgd",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        loss = op.OrdinalPromptLoss(kl_weight=0)
        transformers.Trainer(model, arguments, train_dataset=Rows(), compute_loss_func=loss).train()
        after.append(head.prompt.rank_embeddings.detach().clone())
    torch.testing.assert_close(after[0], after[1], atol=1e-5, rtol=1e-4)
    assert (after[0] != 0).any()
