"""The prompt head: logits over ordered ranks as cosines to language-guided rank prototypes (OrdinalCLIP, section 3).

One way through: text encoder → prompts → prototypes → logits; then `losses`, `decoding` or `export`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ordinal_prompt import checkpoint
from ordinal_prompt.config import DEFAULT_BASE_RANKS, HeadConfig
from ordinal_prompt.decoding import decode
from ordinal_prompt.export import PrototypeLinear, check_finite, linear_layer, stock_layers
from ordinal_prompt.losses import OrdinalPromptLoss
from ordinal_prompt.matching import linear_map, log_scale_of_spread, match
from ordinal_prompt.prompt import PromptLearner, full_precision
from ordinal_prompt.prototypes import RankPrototypes
from ordinal_prompt.text import adapt, hub

LOGIT_SPREAD = 10.0


class OrdinalPromptHead(RankPrototypes):
    """A classification head over K ordered ranks whose weights a text encoder writes.

    Every rank is a prompt of learnable context tokens and a rank embedding, interpolated from a few learnable base
    ranks.  A frozen text encoder turns the prompts into K unit-norm prototypes; the logits are the scaled cosines of a
    feature to them.  After training, `export()` leaves plain layers.

    Source: Li et al., OrdinalCLIP: Learning Rank Prompts for Language-Guided Ordinal Regression, NeurIPS 2022.

    Args:
        text_encoder: an open_clip model or its text tower, a text model of transformers (also wrapped in
            `ordinal_prompt.text.TransformersTextEncoder`, which chooses the pooling), or an object that fits
            `ordinal_prompt.text.TextEncoder`.  Only the text half is kept, and of the token embedding only what the
            prompts need; the model is neither changed nor copied.  Its tensors are shared: further training of it
            also changes the head (but for the embeddings of words, which are copied); pass a copy to prevent that.
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
        num_base_ranks: B in 1…K; the default is clipped to K.
        base_rank_names: B names that the base ranks start from, in place of K names; sets B.
        tokens_per_rank: T tokens per rank, or without interpolation K counts; names bring their own.
        in_features: width of the features of a backbone outside the text encoder's space, which a linear projection
            then maps into it; default `embed_dim`, without projection.
        normalize: bring features to unit norm.
        logit_scale: log of the factor on the cosines; default the model's own; of a text encoder without one, 10 over
            the spread of the prototypes at the start, so that ranks compete alike whatever their text encoder.
        learn_logit_scale: make `logit_scale` a learnable parameter.
        alignment: learn a linear map I + alignment · A, A (D, D) from zero, between features and prototypes, which lets
            the prototypes leave the text encoder's range where the data ask for it.  Exports fold it into their weight.
            0 (the paper) leaves it out; see `ordinal_prompt.recipe`.
        residual: learn a linear layer from zero, times this factor, beside the prototypes: what language does not know,
            how frequent the ranks are included.  Exports fold it into their weight and bias.  0 (the paper) leaves it
            out.
        confidence: factor on the default of `logit_scale` (without effect where `logit_scale` is given).  Below 1 the
            prototypes weigh less at the start; together with `learn_logit_scale` they gain as far as the data agree.
        learn_prompts: False leaves the prompts as they start, so that the prototypes are computed once.
        kl_weight: of the text-to-image term in the loss that `head.loss()` makes.
        freeze_text_encoder: freeze a view of the text encoder.  False trains the caller's own parameters, and makes
            them part of the state dict.
        device: where the head and its half of the text encoder live; default the text encoder's device.
        dtype: of what is learned; default float32, or wider where the text encoder is.

    Attributes:
        prompt: `prompt.context_embeddings` (M, W) or (K, M, W), `prompt.rank_embeddings` (B or K, T, W).
        logit_scale: () log of the factor on the cosines; a parameter where it learns, else a buffer.
        projection: linear layer from `in_features` to `embed_dim`, or None.
        alignment: (D, D) the A of the alignment, or None.
        residual, residual_bias: (K, D) and (K,) of the linear layer beside the prototypes, or None.
        text_encoder: the frozen text half; moved with the head, but in no parameter list and no state dict, and shared
            by copies of the head.
        config: the options.

    Raises:
        ValueError, TypeError: arguments that do not fit, saying what does.

    >>> import open_clip, torch
    >>> clip = open_clip.CLIP(
    ...     embed_dim=16, vision_cfg={"layers": 1, "width": 16, "head_width": 16, "patch_size": 16, "image_size": 16},
    ...     text_cfg={"layers": 1, "width": 16, "heads": 2},
    ... )
    >>> head = OrdinalPromptHead(clip, ranks=["bad", "fair", "good"], context="a photo of {} quality",
    ...                          tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    >>> head(torch.randn(5, 16)).shape
    torch.Size([5, 3])
    >>> head.export()
    Sequential(
      (0): RMSNorm((16,), eps=6.25e-26, elementwise_affine=False)
      (1): Linear(in_features=16, out_features=3, bias=False)
    )
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
        prompt = PromptLearner.from_words(config, source, tokenizer, device, dtype)
        log_scale = config.logit_scale
        if log_scale is None and source.log_scale is not None:
            log_scale = source.log_scale + math.log(config.confidence)
        self._assemble(config, prompt, source.encoder, source.encoder.embed_dim, log_scale)
        if log_scale is None:
            with torch.no_grad():
                self.logit_scale.copy_(log_scale_of_spread(self._cached(), config.confidence * LOGIT_SPREAD))

    def _assemble(
        self, config: HeadConfig, prompt: PromptLearner, text_encoder: Any, embed_dim: int, log_scale: float | None
    ) -> None:
        """Puts the parts together; the constructor and `from_pretrained` differ in where these come from."""
        super().__init__(prompt, text_encoder, embed_dim, config.freeze_text_encoder or text_encoder is None)
        self.config = config
        self.in_features = config.in_features or embed_dim
        self._source: dict[str, Any] | None = None
        like: dict[str, Any] = {"device": prompt.rank_embeddings.device, "dtype": prompt.rank_embeddings.dtype}
        scale = torch.tensor(log_scale or 0.0, **like)
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

    @classmethod
    def from_open_clip(
        cls, model_name: str, pretrained: str | None = None, *, ranks: int | Sequence[str], **options: Any
    ) -> OrdinalPromptHead:
        """A head on the text encoder of an open_clip model, which open_clip builds (and downloads, where it has to).

        Args:
            model_name: as in `open_clip.list_models()`, or an `hf-hub:` or `local-dir:` name.
            pretrained: a tag as in `open_clip.list_pretrained()`, or the path of a checkpoint; None for random weights.
            ranks: see `OrdinalPromptHead`.
            **options: the keyword arguments of `OrdinalPromptHead`.

        Raises:
            ValueError: unknown model or pretrained tag, with near matches.
            ConnectionError: weights or tokenizer that cannot be downloaded.
        """
        model, tokenizer = hub.load_open_clip(model_name, pretrained)
        head = cls(model, ranks, **{"tokenizer": tokenizer, **options})
        head._source = {"model_name": model_name, "pretrained": pretrained}
        return head

    @property
    def rank_names(self) -> tuple[str, ...]:
        """The K names; of ranks without names, their values."""
        return self.config.rank_names or tuple(repr(value).removesuffix(".0") for value in self.config.values)

    @property
    def normalize(self) -> bool:
        """Whether features are brought to unit norm."""
        return self.config.normalize

    def forward(self, features: Tensor) -> Tensor:
        """Logits over the ranks.

        Args:
            features: (..., in_features), of any floating point type.

        Returns:
            (..., K), at least float32, also under autocast.

        Raises:
            ValueError: features of another width, or a scalar.
            TypeError: features that are not floating point.
        """
        self._check_features(features)
        prototypes = self.prototypes()
        dtype = torch.promote_types(prototypes.dtype, torch.promote_types(features.dtype, torch.float32))
        if self.projection is not None:
            autocast = torch.is_autocast_enabled(features.device.type)
            features = self.projection(features if autocast else features.to(self.projection.weight.dtype))
        with full_precision(features):
            return match(features.to(dtype), *self._linear_map(prototypes.to(dtype)), self.normalize)

    def predict_proba(self, features: Tensor) -> Tensor:
        """Probabilities of the ranks, (..., K)."""
        return torch.softmax(self(features), dim=-1)

    def predict(self, features: Tensor, rule: str = "expectation") -> Tensor:
        """Predicted rank values, (...), in the units of `rank_values`; see `decode` for the rules."""
        return decode(self(features), rule, self.rank_values)

    def loss(self, **options: Any) -> OrdinalPromptLoss:
        """The loss that belongs to this head's settings; the options are those of `OrdinalPromptLoss`."""
        return OrdinalPromptLoss(**{"kl_weight": self.config.kl_weight, **options})

    def export_prototypes(self, bias: bool = False) -> nn.Linear:
        """The prototypes as a linear layer, detached, without gradients, and without the text encoder.

        Equal to the head on any input, for a head without `in_features`; with it, the layer takes projected features
        (`export()` brings the projection along).

        Args:
            bias: give the layer a bias also where the head has none, of zeros, so that the weights load into an
                `nn.Linear(D, K)` that has one.

        Returns:
            A new layer, weight (K, D) = exp(logit_scale) · prototypes (with alignment and residual, if any): a
            `PrototypeLinear`, or with `normalize=False` exactly `nn.Linear`.

        Raises:
            ValueError: learned tensors that are not finite.
        """
        weight, offset = self._exported_map()
        if bias and offset is None:
            offset = torch.zeros_like(weight[:, 0])
        layer = linear_layer(weight, offset, PrototypeLinear if self.normalize else nn.Linear)
        return layer.to(self.prompt.rank_embeddings.dtype)

    def export(self) -> nn.Module:
        """The whole head as layers of torch.nn, detached: neither a text encoder nor this package is needed to run it.

        Returns:
            One `nn.Linear` where the head is one linear map (`normalize=False`), else an `nn.Sequential` of the
            projection (if any), `nn.RMSNorm` and `nn.Linear`, of the head's precision.  Equal to the head on any input
            of that precision (features shorter than 1e-10 count as zero).

        Raises:
            ValueError: learned tensors that are not finite.
        """
        if self.projection is not None:
            check_finite(projection_weight=self.projection.weight, projection_bias=self.projection.bias)
        layers = stock_layers(*self._exported_map(), self.projection, self.normalize)
        return layers.to(self.prompt.rank_embeddings.dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves config (JSON) and weights (safetensors) into a folder; see `from_pretrained`.

        Files are written atomically: what was there stays whole until the new one is.

        Raises:
            ValueError: learned tensors that are not finite, or prompts that are reparametrized (pruned, for instance).
        """
        prompt = self.prompt
        if set(prompt.state_dict()) != {"context_embeddings", "rank_embeddings"}:
            raise ValueError(
                f"Cannot save prompts that are reparametrized ({', '.join(prompt.state_dict())}); make that permanent "
                "first: torch.nn.utils.prune.remove, torch.nn.utils.parametrize.remove_parametrizations."
            )
        check_finite(**{name.replace(".", "_"): tensor for name, tensor in self.state_dict().items()})
        checkpoint.save(
            Path(folder), self.config, prompt, self.state_dict(), self._cached(), self.text_encoder, self._source
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, text_encoder: Any = None) -> OrdinalPromptHead:
        """Loads what `save_pretrained` saved.

        Args:
            folder: where it was saved.
            text_encoder: the text encoder that the head was trained with; one saved as trainable takes on the weights
                that were saved.  Without it, open_clip loads the model that `from_open_clip` named.  A head on any
                other text encoder, or with `text_encoder=False`, comes back with its prototypes alone (`text_encoder`
                is None): it predicts and exports, but its prompts learn no more.

        Raises:
            FileNotFoundError: no such folder, or files missing in it.
            ValueError: damaged files; a text encoder of another width, or with other weights.
        """
        saved = checkpoint.load(Path(folder), text_encoder)
        head = cls.__new__(cls)
        head._assemble(saved.config, saved.prompt, saved.text_encoder, saved.embed_dim, None)
        head._source = saved.source
        with saved.explained():
            head.load_state_dict(saved.tensors)
        if saved.text_encoder is None:
            head.keep_prototypes(saved.prototypes)
        else:
            saved.check(head._cached())
        return head.eval()

    def extra_repr(self) -> str:
        options = {"in_features": self.in_features, "embed_dim": self.embed_dim, "num_ranks": self.num_ranks}
        given = {**options, **{name: value for name, value in self.config.changed().items() if name not in options}}
        return ", ".join(f"{name}={value!r}" for name, value in given.items())

    def _linear_map(self, prototypes: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight (K, D) and bias (K,) of the map from features (of unit norm, if they are normalized) to logits."""
        factors = (self.config.alignment, self.config.residual)
        weight = linear_map(prototypes, self.logit_scale, self.alignment, self.residual, factors)
        return weight, None if self.residual_bias is None else factors[1] * self.residual_bias.to(weight.dtype)

    @torch.no_grad()
    def _exported_map(self) -> tuple[Tensor, Tensor | None]:
        parts = {**self.state_dict(), "prototypes": self._cached()}
        check_finite(**{name.replace(".", "_"): tensor for name, tensor in parts.items()})
        weight, bias = self._linear_map(parts["prototypes"])
        check_finite(weight=weight.to(self.prompt.rank_embeddings.dtype))
        return weight, bias

    def _check_features(self, features: Tensor) -> None:
        if not isinstance(features, Tensor) or not features.is_floating_point():
            kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"Expected `features` to be a floating point tensor, but got {kind}.")
        if features.dim() == 0 or features.shape[-1] != self.in_features:
            hint = (
                ""
                if self.projection is not None
                else "; for features of another width build the head with in_features="
            )
            raise ValueError(
                f"Expected `features` of shape (..., {self.in_features}), but got {tuple(features.shape)}{hint}."
            )
