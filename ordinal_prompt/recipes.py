"""The recipe that we recommend, where it departs from the paper, and the learning rates that belong to it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ordinal_prompt.distributed import gathered
from ordinal_prompt.head import OrdinalPromptHead

ALIGNMENT = 0.05
RESIDUAL = 5.0
CONFIDENCE = 0.3
PROMPT_LR_SCALE = 0.05
SCALE_LR_SCALE = 10.0


def recipe(ranks: int | Sequence[str], prompts: str = "learned") -> dict[str, Any]:
    """Options of `OrdinalPromptHead` that we recommend; `head.loss()` and `parameter_groups` follow them.

    The paper's settings are the defaults of `OrdinalPromptHead`.  On frozen features of texts these did better, with
    few labels and with many (`benchmarks/heads/RESULTS.md` has the tables, how they were found, and what to doubt):

    - rank names, where there are any, start rank embeddings of their own instead of three shared bases, whose mixtures
      are nearly the same text; ranks without names stay interpolated;
    - the names weigh a third of what they usually do at the start (`confidence`), and that weight is learned: it grows
      within a few steps where the features agree with the names, and names that mean little cost little;
    - a linear map near the identity between features and prototypes (`alignment`) and a linear layer beside them
      (`residual`) learn what language does not know, so that with plenty of data nothing is lost to a linear head;
    - prompts learn at a twentieth of the learning rate, since a few steps at the full rate overfit them; with frozen
      prompts the error is nearly the same, and there is no text pass.  The weight of the names and the bias, K + 1
      numbers, learn ten times faster;
    - cross-entropy alone: the text-to-image term balances the ranks, which costs mean absolute error.

    Args:
        ranks: the number of ranks, or their names, as for the head.
        prompts: `"learned"`; `"frozen"`: nearly the same error, and a training step costs what a linear head's does; or
            `"fitted"`: for `fit_head`, which needs no training loop; names, too, are interpolated from three bases.

    Raises:
        ValueError: `prompts` that are neither.

    >>> recipe(["bad", "fair", "good"])["interpolation"], recipe(101)["interpolation"]
    (None, 'linear')
    """
    if prompts not in ("learned", "frozen", "fitted"):
        raise ValueError(f"Expected `prompts` to be 'learned', 'frozen' or 'fitted', but got {prompts!r}.")
    if prompts == "fitted":
        options = {"interpolation": "piecewise", "residual": 1.0, "learn_logit_scale": True}
        return {**options, "learn_prompts": False, "kl_weight": 0.0}
    return {
        "interpolation": "linear" if hasattr(ranks, "__index__") else None,  # numbers of NumPy and torch, too
        "alignment": ALIGNMENT,
        "residual": RESIDUAL,
        "confidence": CONFIDENCE,
        "learn_logit_scale": True,
        "learn_prompts": prompts == "learned",
        "kl_weight": 0.0,
    }


def parameter_groups(
    model: nn.Module,
    lr: float,
    prompt_lr_scale: float = PROMPT_LR_SCALE,
    scale_lr_scale: float = SCALE_LR_SCALE,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: prompts learn more slowly than the rest, the single numbers of a head faster.

    Args:
        model: a model that holds prompt heads, or a head.
        lr: learning rate of everything else that takes gradients, a trainable text encoder included.
        prompt_lr_scale: the prompts' share of it.  They take no weight decay, which would pull them away from words.
        scale_lr_scale: the share of `logit_scale` and of the residual's bias, where they learn, without weight decay.
            Meant for Adam-style optimizers, whose steps are normalized; pass 1 for SGD.

    Raises:
        ValueError: no prompt head in the model; a negative learning rate.
        TypeError: no model.

    The projection of a head with `normalize=False` learns as a linear layer in its place would: a step of it goes on
    through the prototypes, which make it longer, and is shortened by as much (the mean over the ranks of the sum of
    |weight|; measured in `benchmarks/heads/RESULTS.md`).

    Example: `torch.optim.AdamW(op.parameter_groups(model, lr=1e-3))`.
    """
    if not 0 <= lr < float("inf"):  # which torch checks of no group that has its own
        raise ValueError(f"Expected `lr` to be finite and not negative, but got {lr}.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected `model` to be a torch.nn.Module, but got {type(model).__name__}.")
    heads = [module for module in model.modules() if isinstance(module, OrdinalPromptHead)]
    if not heads:
        raise ValueError(f"Expected a model with an OrdinalPromptHead in it, but {type(model).__name__} has none.")
    names = [name for name, module in model.named_modules() if isinstance(module, OrdinalPromptHead)]
    if hasattr(model, "peft_config") and not any("modules_to_save" in name for name in names):
        warnings.warn(
            "The prompt head of this PEFT model does not learn, and is not saved with the adapter; name it in the "
            'adapter\'s config, as modules_to_save=["classifier"].',
            stacklevel=2,
        )
    prompts = {parameter for head in heads for parameter in head.prompt.parameters()}
    scales = {part for head in heads for name, part in head.named_parameters() if _is_scale(name)}
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": lr},
        {"params": [], "lr": lr * prompt_lr_scale, "weight_decay": 0.0},
        {"params": [], "lr": lr * scale_lr_scale, "weight_decay": 0.0},
    ]
    projected: set[nn.Parameter] = set()
    for head in heads:
        if head.projection is not None and not head.normalize:
            own = [part for part in head.projection.parameters() if part.requires_grad and part not in projected]
            if own:
                groups.append({"params": own, "lr": lr / max(1.0, _stretch(head))})
                projected.update(own)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter not in projected:
            groups[1 if parameter in prompts else 2 if parameter in scales else 0]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def _is_scale(name: str) -> bool:
    """Whether a parameter of a head is its scale or its bias, also below a parametrization or pruning."""
    return any(part.removesuffix("_orig") in ("logit_scale", "residual_bias") for part in name.split("."))


@torch.no_grad()
def _stretch(head: OrdinalPromptHead) -> float:
    """By how much the logits move at most where each projected feature moves by one."""
    if head.logit_scale.is_meta or head.prompt.rank_embeddings.is_meta:
        return 1.0  # not known yet
    with gathered(head):
        weight, _ = head._linear_map(head.prototypes())
    return float(weight.abs().sum(dim=1).mean())
