"""The recipe that we recommend, where it departs from the paper, and why.

The paper's settings are the defaults of `OrdinalPromptHead` and `OrdinalPromptLoss`.  On frozen features of two text
sets these settings did better, with few labels and with many (`examples/RESULTS.md` has the tables, how the settings
were found, and what to doubt):

- rank names, where there are any, start rank embeddings of their own instead of three shared bases, whose mixtures are
  nearly the same text; ranks without names stay interpolated;
- a linear map near the identity between features and prototypes (`alignment`) keeps prompts from falling behind a
  linear head when there is plenty of data;
- prompts learn at a twentieth of the learning rate, since a few steps at the full rate overfit them; not to let them
  learn at all (`head.prompt.requires_grad_(False)`) costs next to nothing in error, and makes a step as cheap as a
  linear head's;
- cross-entropy alone: the text-to-image term balances the ranks, which costs mean absolute error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ordinal_prompt.head import OrdinalPromptHead

PROMPT_LR_SCALE = 0.05
ALIGNMENT = 0.05


def recipe(ranks: int | Sequence[str]) -> dict[str, Any]:
    """Options of `OrdinalPromptHead` that we recommend; train with `parameter_groups` and
    `OrdinalPromptLoss(kl_weight=0)`.

    Args:
        ranks: the number of ranks, or their names, as for the head.

    >>> recipe(["bad", "fair", "good"])
    {'interpolation': None, 'alignment': 0.05}
    >>> recipe(101)
    {'interpolation': 'linear', 'alignment': 0.05}
    """
    interpolation = "linear" if hasattr(ranks, "__index__") else None  # numbers of NumPy and torch, too
    return {"interpolation": interpolation, "alignment": ALIGNMENT}


def parameter_groups(model: nn.Module, lr: float, prompt_lr_scale: float = PROMPT_LR_SCALE) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer in which prompts learn more slowly than the rest.

    Args:
        model: a model that holds prompt heads, or a head.
        lr: learning rate of everything else that takes gradients, a trainable text encoder included.
        prompt_lr_scale: the prompts' share of it.  They take no weight decay, which would pull them away from words.

    Raises:
        ValueError: no prompt head in the model.

    Example: `torch.optim.AdamW(op.parameter_groups(model, lr=1e-3))`.
    """
    heads = [module for module in model.modules() if isinstance(module, OrdinalPromptHead)]
    if not heads:
        raise ValueError(f"Expected a model with an OrdinalPromptHead in it, but {type(model).__name__} has none.")
    prompts = [parameter for head in heads for parameter in head.prompt.parameters() if parameter.requires_grad]
    known = {id(parameter) for parameter in prompts}
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in known]
    groups = [{"params": rest, "lr": lr}, {"params": prompts, "lr": lr * prompt_lr_scale, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
