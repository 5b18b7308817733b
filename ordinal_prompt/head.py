"""The prompt head: logits over ordered ranks as cosines to language-guided rank prototypes (OrdinalCLIP, section 3).

One way through: text encoder → prompts → prototypes → logits; then `losses`, `decoding` or `export`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ordinal_prompt import export as plain
from ordinal_prompt.cache import Kept, still_kept, traced
from ordinal_prompt.config import DEFAULT_BASE_RANKS, HeadConfig
from ordinal_prompt.decoding import decode
from ordinal_prompt.distributed import gathered, handed_out, whole
from ordinal_prompt.losses import OrdinalPromptLoss
from ordinal_prompt.matching import check_features, linear_map, log_scale_of_spread, match, project
from ordinal_prompt.pretrained import Pretrained
from ordinal_prompt.prompt import PromptLearner, full_precision
from ordinal_prompt.text import adapt, hub


class OrdinalPromptHead(Pretrained):
    """A classification head over K ordered ranks whose weights a text encoder writes (Li et al., NeurIPS 2022).

    Every rank is a prompt of learnable context tokens and a rank embedding, interpolated from a few learnable base
    ranks.  A frozen text encoder turns them into K unit-norm prototypes; the logits are the scaled cosines of a feature
    to these.  After training, `export()` leaves plain layers.  Arguments that do not fit raise ValueError or TypeError.

    Args:
        text_encoder: an open_clip model or its text tower, a text model of transformers (also wrapped in
            `ordinal_prompt.text.TransformersTextEncoder`, which chooses the pooling), or an object that fits
            `ordinal_prompt.text.TextEncoder`.  Only its text half is used.  The model is neither changed nor copied:
            training it further also changes the head (but for the embeddings of words); pass a copy to prevent that.
        ranks: K ≥ 2, or K distinct names, which the rank embeddings then start from.
        tokenizer: texts to token ids, as `open_clip.get_tokenizer(name)` or a tokenizer of transformers.  Without one,
            an open_clip model with OpenAI's vocabulary can still have random context and ranks.
        rank_values: K strictly increasing numbers, in any unit (years, stars); default 0…K-1.  Decoding returns them,
            and interpolation measures distances in them.
        context: a number of random context tokens M ≥ 0, or a text that they start from.  A text with one `{}` marks
            the rank's place ("a photo of a {} year old face").
        rank_position: `"tail"` (behind the context), `"front"`, or `"middle"` (behind its first ⌊M/2⌋ tokens).
        rank_specific_context: one set of context tokens per rank instead of a shared one.
        interpolation: `"linear"` (the paper's best), `"inv_prop"`, `"normal"`, `"piecewise"` (passes through the base
            ranks), or None for K free rank embeddings (CoOp, applied to ranks).
        num_base_ranks: B in 1…K; the default, 3, is clipped to K.
        base_rank_names: B names that the base ranks start from, in place of K names; sets B.
        tokens_per_rank: T tokens per rank, or without interpolation K counts; names bring their own.
        in_features: width of features outside the text encoder's space, which a linear projection maps into it.
        normalize: bring features to unit norm.
        logit_scale: log of the factor on the cosines; default the model's own; of a text encoder without one, 10 over
            the spread of the prototypes at the start, so that ranks compete alike whatever their text encoder.
        learn_logit_scale: make `logit_scale` a learnable parameter.
        alignment: learn a linear map I + alignment · A, A (D, D) from zero, between features and prototypes, which lets
            the prototypes leave the text encoder's range where the data ask for it; 0 (the paper) leaves it out.
        residual: learn a linear layer from zero, times this factor, beside the prototypes, for what language does not
            know, such as how frequent the ranks are; 0 (the paper) leaves it out.
        confidence: factor on the default of `logit_scale`.  Below 1 the prototypes weigh less at the start; with
            `learn_logit_scale` they gain as far as the data agree.
        learn_prompts: False leaves the prompts as they start, so that the prototypes are computed once.
        kl_weight: of the text-to-image term in the loss that `loss()` makes.
        freeze_text_encoder: freeze a view of the text encoder.  False trains the caller's own parameters, and makes
            them part of the state dict.
        device, dtype: of what is learned; default the text encoder's device, and float32 or wider.

    Attributes:
        num_ranks, rank_names, rank_values, in_features, embed_dim: K, its names and values, width of features, and D.
        prompt: `prompt.context_embeddings` (M, W) or (K, M, W), `prompt.rank_embeddings` (B or K, T, W).
        logit_scale: (1,) log of the factor on the cosines; a parameter where it learns, else a buffer.
        projection: linear layer from `in_features` to `embed_dim`, or None.
        alignment, residual, residual_bias: (D, D), (K, D) and (K,) what the options of these names learn, or None.
        text_encoder: the text half; a frozen one is in no parameter list and no state dict, and shared by copies.

    >>> import open_clip, torch
    >>> text = open_clip.transformer.TextTransformer(width=16, heads=2, layers=1, output_dim=16)
    >>> head = OrdinalPromptHead(text, ranks=["bad", "fair", "good"], context="a photo of {} quality",
    ...                          tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    >>> head(torch.randn(5, 16)).shape
    torch.Size([5, 3])
    """

    logit_scale: Tensor
    projection: nn.Linear | None
    alignment: nn.Parameter | None
    residual: nn.Parameter | None
    residual_bias: nn.Parameter | None

    def __init__(
        self,
        text_encoder: Any,
        ranks: int | Sequence[str],
        *,
        tokenizer: Callable[..., Any] | None = None,
        rank_values: Sequence[float] | Tensor | None = None,
        context: int | str = 10,
        rank_position: str = "tail",
        rank_specific_context: bool = False,
        interpolation: str | None = "linear",
        num_base_ranks: int = DEFAULT_BASE_RANKS,
        base_rank_names: Sequence[str] | None = None,
        tokens_per_rank: int | Sequence[int] = 1,
        in_features: int | None = None,
        normalize: bool = True,
        logit_scale: float | None = None,
        learn_logit_scale: bool = False,
        alignment: float = 0.0,
        residual: float = 0.0,
        confidence: float = 1.0,
        learn_prompts: bool = True,
        kl_weight: float = 1.0,
        freeze_text_encoder: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = HeadConfig.from_arguments(locals())
        source = adapt(text_encoder, trainable=not config.freeze_text_encoder)
        tokenizer = tokenizer or getattr(text_encoder, "tokenizer", None)  # a SentenceTransformer has its own
        prompt = PromptLearner.from_words(config, source, tokenizer, device, dtype)
        log_scale = config.logit_scale
        if log_scale is None and source.log_scale is not None:
            log_scale = source.log_scale + math.log(config.confidence)
        self._assemble(config, prompt, source.encoder, source.encoder.embed_dim, log_scale)
        self.source = hub.source_of(text_encoder)
        if log_scale is None:
            with torch.no_grad():
                self.logit_scale.copy_(log_scale_of_spread(self.kept_prototypes(), config.confidence))

    def _assemble(
        self, config: HeadConfig, prompt: PromptLearner, text_encoder: Any, embed_dim: int, log_scale: float | None
    ) -> None:
        """Puts the parts together, for the constructor and for `from_pretrained`."""
        super().__init__(config, prompt, text_encoder, embed_dim)
        self.in_features = config.in_features or embed_dim
        self.normalize = config.normalize
        self._kept_map: Kept[tuple[Tensor, Tensor | None]] | None = None
        like: dict[str, Any] = {"device": prompt.rank_embeddings.device, "dtype": prompt.rank_embeddings.dtype}
        scale = torch.tensor([log_scale or 0.0], **like)  # not (), which FSDP cannot shard
        if config.learn_logit_scale:
            self.logit_scale = nn.Parameter(scale)
        else:  # no parameter, so that nothing that trains a whole model lets it learn
            self.register_buffer("logit_scale", scale)
        self.projection = self.alignment = self.residual = self.residual_bias = None
        if config.in_features is not None:
            self.projection = nn.Linear(config.in_features, embed_dim, **like)
        if config.alignment:
            self.alignment = nn.Parameter(torch.zeros(embed_dim, embed_dim, **like))
        if config.residual:
            self.residual = nn.Parameter(torch.zeros(self.num_ranks, embed_dim, **like))
            self.residual_bias = nn.Parameter(torch.zeros(self.num_ranks, **like))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (..., K) of features (..., in_features), at least float32, also under autocast.

        Raises ValueError for features of another width, TypeError for those that are not floating point.  Gradients
        that are asked of a head in eval mode give a warning, since its prompts do not learn there.
        """
        check_features(features, self.in_features, self.projection is not None)
        prototypes = self._prototypes()
        dtype = torch.promote_types(prototypes.dtype, torch.promote_types(features.dtype, torch.float32))
        if self.projection is not None:
            features = project(self.projection, features)
        with full_precision(features):
            weight, bias = self._linear_map(prototypes)
            logits = match(features.to(dtype), weight.to(dtype), bias, self.normalize)
        self._warn_of_gradients(logits)
        return logits

    @property
    def out_features(self) -> int:
        """K, as of the linear layer in whose place the head stands."""
        return self.num_ranks

    def predict_proba(self, features: Tensor) -> Tensor:
        """Probabilities of the ranks, (..., K)."""
        return torch.softmax(self(features), dim=-1)

    def predict(self, features: Tensor, rule: str = "expectation") -> Tensor:
        """Predicted rank values, (...), in the units of `rank_values`; see `decode` for the rules."""
        return decode(self(features), rule, self.rank_values)

    def loss(self, **options: Any) -> OrdinalPromptLoss:
        """The loss that belongs to this head's settings; the options are those of `OrdinalPromptLoss`.

        A dictionary or a pandas Series of `rank_weights` may have the names of the ranks for keys.
        """
        weights: Any = options.get("rank_weights")
        weights = weights.to_dict() if hasattr(weights, "to_dict") else weights
        if isinstance(weights, Mapping) and {*weights} == {*self.rank_names}:
            options["rank_weights"] = [weights[name] for name in self.rank_names]
        loss = OrdinalPromptLoss(**{"kl_weight": self.config.kl_weight, **options})
        loss.check(self.num_ranks)
        return loss

    @torch.inference_mode(False)
    def export_prototypes(self, bias: bool = False) -> nn.Linear:
        """The prototypes as a new linear layer, detached: no gradients, no text encoder.

        Equal to the head on any input, for a head without `in_features`; with it, the layer takes projected features
        (`export()` brings the projection along).

        Args:
            bias: give the layer a bias of zeros where the head has none, so that its weights fit an `nn.Linear(D, K)`.

        Returns:
            Weight (K, D) = exp(logit_scale) · prototypes (with alignment and residual, if any): a `PrototypeLinear`, or
            with `normalize=False` exactly `nn.Linear`.  Raises ValueError where learned tensors are not finite.
        """
        weight, offset = self._exported_map()
        if bias and offset is None:
            offset = torch.zeros_like(weight[:, 0])
        layer = plain.linear_layer(weight, offset, plain.PrototypeLinear if self.normalize else nn.Linear)
        return layer.to(self.prompt.rank_embeddings.dtype)

    @torch.inference_mode(False)
    def export(self) -> nn.Module:
        """The whole head as layers of torch.nn, detached: neither a text encoder nor this package is needed to run it.

        Returns:
            One `nn.Linear` where the head is one linear map (`normalize=False`), else an `nn.Sequential` of the
            projection (if any), `nn.RMSNorm` and `nn.Linear`, of the head's precision.  Equal to the head on any input
            of that precision (features shorter than 1e-10 count as zero); what is not finite raises ValueError.
        """
        with full_precision(self.rank_values), gathered(self):
            projection = None if self.projection is None else plain.plain_linear(self.projection, self.in_features)
        layers = plain.stock_layers(*self._exported_map(), projection, self.normalize)
        return plain.checked(layers.to(self.prompt.rank_embeddings.dtype), self)

    def extra_repr(self) -> str:
        shown = {"embed_dim": self.embed_dim, "num_ranks": self.num_ranks, **self.config.changed()}
        return ", ".join(f"{name}={value!r}" for name, value in {**shown, "in_features": self.in_features}.items())

    def _linear_map(self, prototypes: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight (K, D) and bias (K,) of the map from features to logits; kept while no gradients are wanted."""
        parts = (self.logit_scale, self.alignment, self.residual, self.residual_bias)
        compute = partial(linear_map, prototypes, *parts, self.config.alignment, self.config.residual)
        learned = [part for part in parts if part is not None]
        learns = prototypes.requires_grad or (torch.is_grad_enabled() and any(part.requires_grad for part in learned))
        if traced():
            return compute()
        if learns or handed_out(self, self.prompt):
            self._kept_map = None
            return compute()
        self._kept_map = still_kept(self._kept_map, compute, ([prototypes], learned), learned)
        return self._kept_map.result

    @torch.no_grad()
    def _exported_map(self) -> tuple[Tensor, Tensor | None]:
        plain.check_loaded(self)
        self._prune()
        prototypes, tensors = self._prototypes(), whole(self.state_dict())
        with full_precision(prototypes), gathered(self):
            weight, bias = self._linear_map(prototypes)
        plain.check_finite(**tensors, prototypes=prototypes, weight=weight.to(self.logit_scale.dtype))
        return weight, bias
