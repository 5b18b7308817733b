"""The prompt head: logits over ordered ranks as cosines to language-guided rank prototypes (OrdinalCLIP, section 3).

One way through: text encoder → prompts → prototypes → logits; then `losses`, `decoding` or `export`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ordinal_prompt.arguments import (
    DEFAULT_BASE_RANKS,
    MAX_FACTOR,
    check_base_ranks,
    check_factor,
    check_integer,
    check_log_scale,
    check_names,
    check_prompt_options,
    check_rank_values,
    check_ranks,
    check_tokens_per_rank,
)
from ordinal_prompt.decoding import decode
from ordinal_prompt.export import PrototypeLinear, check_finite, linear_layer, stock_layers
from ordinal_prompt.losses import OrdinalPromptLoss
from ordinal_prompt.prompt import PromptLearner, full_precision, write_prompts
from ordinal_prompt.text import Prompts, PromptTokenizer, adapt

OPENAI_VOCABULARY = 49408
LOGIT_SPREAD = 10.0


class OrdinalPromptHead(nn.Module):
    """A classification head over K ordered ranks whose weights a text encoder writes.

    Every rank is a prompt of learnable context tokens and a rank embedding, interpolated from a few learnable base
    ranks.  A frozen text encoder turns the prompts into K unit-norm prototypes; the logits are the scaled cosines of a
    feature to them.  After training, `export()` leaves plain layers.

    Source: Li et al., OrdinalCLIP: Learning Rank Prompts for Language-Guided Ordinal Regression, NeurIPS 2022.

    Args:
        text_encoder: an open_clip model or its text tower, a text model of transformers (also wrapped in
            `ordinal_prompt.text.TransformersTextEncoder`, which chooses the pooling), or an object that fits
            `ordinal_prompt.text.TextEncoder`.  Only the text half is kept, and of the token embedding only what the
            prompts need; the model is neither changed nor copied.  Its tensors are shared: to go on training it, pass
            a copy (`copy.deepcopy`), or the prototypes go along.
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
        freeze_text_encoder: freeze a view of the text encoder.  False trains the caller's own parameters, and makes
            them part of the state dict.
        device: where the head and its half of the text encoder live; default the text encoder's device.
        dtype: of what is learned; default float32, or wider where the text encoder is.

    Attributes:
        prompt: `prompt.context_embeddings` (M, W) or (K, M, W), `prompt.rank_embeddings` (B or K, T, W).
        logit_scale: () log of the factor on the cosines.
        projection: linear layer from `in_features` to `embed_dim`, or None.
        alignment: (D, D) the A of the alignment, or None.
        residual, residual_bias: (K, D) and (K,) of the linear layer beside the prototypes, or None.
        text_encoder: the frozen text half; moved with the head, but in no parameter list and no state dict.

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
    rank_values: Tensor
    text_encoder: Any
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
        super().__init__()
        names, num_ranks = check_ranks(ranks)
        values = check_rank_values(rank_values, num_ranks)
        context = check_prompt_options(context, rank_position, interpolation)
        base_names = check_names(base_rank_names, "base_rank_names") if base_rank_names is not None else None
        num_base_ranks = check_base_ranks(num_base_ranks, base_names, num_ranks, interpolation)
        tokens_per_rank = check_tokens_per_rank(tokens_per_rank, num_ranks, interpolation)
        if in_features is not None:
            in_features = check_integer(in_features, "in_features", least=1)
        alignment = check_factor(alignment, "alignment")
        residual = check_factor(residual, "residual")
        confidence = check_factor(confidence, "confidence", positive=True)
        check_log_scale(logit_scale)

        encoder, embed_tokens, own_log_scale = adapt(text_encoder, trainable=not freeze_text_encoder)
        log_scale = logit_scale
        if log_scale is None and own_log_scale is not None:
            log_scale = own_log_scale + math.log(confidence)
        words = base_names or names
        if tokenizer is None and (isinstance(context, str) or words is not None):
            raise ValueError(
                f"Expected a `tokenizer` to turn {'the context' if isinstance(context, str) else 'rank names'} into "
                "tokens, but got none; pass tokenizer=open_clip.get_tokenizer(model_name) (or your transformers "
                "tokenizer), or build the head with OrdinalPromptHead.from_open_clip."
            )
        tokens = PromptTokenizer(tokenizer or _openai_tokenizer(embed_tokens))
        written = write_prompts(tokens, context, rank_position, words, tokens_per_rank, interpolation is not None)
        text = written.text
        if text.num_tokens > encoder.context_length:
            raise ValueError(
                f"Expected prompts of at most {encoder.context_length} tokens, the text encoder's context length, but "
                f"context and rank need {text.num_tokens} (with start, full stop and end); shorten the context or the "
                "rank names."
            )

        weight = getattr(embed_tokens, "weight", None)
        home = device if weight is None else torch.device(device or weight.device)

        @torch.no_grad()
        def embed(ids: Sequence[int]) -> Tensor:
            table_device = None if weight is None else weight.device
            if weight is not None and max(ids) >= len(weight):
                raise ValueError(
                    f"The tokenizer gives token id {max(ids)}, but this text encoder's vocabulary has {len(weight)}; "
                    "pass the tokenizer that belongs to the text encoder."
                )
            return embed_tokens(torch.tensor(ids, dtype=torch.long, device=table_device)).detach()

        special = embed((*text.start, *text.end, text.padding))
        if dtype is None:
            dtype = torch.promote_types(torch.float32, special.dtype)
        self._assemble(
            encoder,
            PromptLearner(
                text,
                num_ranks=num_ranks,
                positions=values,
                interpolation=interpolation,
                num_base_ranks=num_base_ranks,
                rank_specific_context=rank_specific_context,
                width=encoder.width,
                special=special,
                device=torch.device(home) if home is not None else special.device,
                dtype=dtype,
            ),
            names,
            embed_dim=encoder.embed_dim,
            in_features=in_features,
            normalize=bool(normalize),
            log_scale=log_scale,
            learn_logit_scale=bool(learn_logit_scale),
            alignment=alignment,
            residual=residual,
            freeze_text_encoder=bool(freeze_text_encoder),
        )
        context_start = embed(written.context_ids) if written.context_ids is not None else None
        names_start = None
        if written.rank_ids is not None:
            longest = max(map(len, written.rank_ids))
            padded = [(*ids, *[text.padding] * (longest - len(ids))) for ids in written.rank_ids]
            names_start = torch.stack([embed(ids) for ids in padded])
        of_bases = base_names is not None
        self.prompt.start_from_text(
            context_start,
            ranks=None if of_bases else names_start,
            base_ranks=names_start if of_bases else None,
        )
        if log_scale is None:
            self._measure_logit_scale(confidence)
        self.kl_weight = kl_weight
        self.prompt.requires_grad_(learn_prompts)

    def loss(self, **options: Any) -> OrdinalPromptLoss:
        """The loss that belongs to this head's settings; the options are those of `OrdinalPromptLoss`."""
        return OrdinalPromptLoss(**{"kl_weight": self.kl_weight, **options})

    def _assemble(
        self,
        text_encoder: Any,
        prompt: PromptLearner,
        rank_names: tuple[str, ...] | None,
        *,
        embed_dim: int,
        in_features: int | None,
        normalize: bool,
        log_scale: float | None,
        learn_logit_scale: bool,
        alignment: float,
        residual: float,
        freeze_text_encoder: bool,
    ) -> None:
        """Puts the parts together; the constructor and `from_pretrained` differ in where these come from."""
        device, dtype = prompt.rank_embeddings.device, prompt.rank_embeddings.dtype
        self.prompt = prompt
        self.embed_dim = embed_dim
        self.in_features = in_features or embed_dim
        self.normalize = normalize
        self._names = rank_names
        self._frozen = freeze_text_encoder
        self._source: dict[str, Any] | None = None
        self._cache: tuple[list[Tensor], list[tuple[int, int]], Tensor] | None = None
        self.register_buffer("rank_values", None)  # in the state dict, so that other ranks are refused
        self._build_rank_values()
        scale = torch.tensor(log_scale or 0.0, device=device, dtype=dtype)
        self.logit_scale = nn.Parameter(scale, requires_grad=learn_logit_scale)
        self._learn_logit_scale = learn_logit_scale
        self.projection = None
        if in_features is not None:
            self.projection = nn.Linear(in_features, embed_dim, device=device, dtype=dtype)
        self.alignment_scale = alignment
        self.alignment = None
        if alignment:
            self.alignment = nn.Parameter(torch.zeros(embed_dim, embed_dim, device=device, dtype=dtype))
        self.residual_scale = residual
        self.residual = self.residual_bias = None
        if residual:
            self.residual = nn.Parameter(torch.zeros(prompt.num_ranks, embed_dim, device=device, dtype=dtype))
            self.residual_bias = nn.Parameter(torch.zeros(prompt.num_ranks, device=device, dtype=dtype))
        if isinstance(text_encoder, nn.Module):
            text_encoder.to(device)
            if freeze_text_encoder:
                text_encoder.requires_grad_(False).eval()
        if freeze_text_encoder:
            # Beside the registered modules: part of no parameter list, state dict or optimizer, but see `_apply`.
            object.__setattr__(self, "text_encoder", text_encoder)
        else:
            self.text_encoder = text_encoder

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
        from ordinal_prompt.checkpoint import load_open_clip

        model, tokenizer = load_open_clip(model_name, pretrained)
        head = cls(model, ranks, **{"tokenizer": tokenizer, **options})
        head._source = {"model_name": model_name, "pretrained": pretrained}
        return head

    @property
    def num_ranks(self) -> int:
        """K."""
        return self.prompt.num_ranks

    @property
    def rank_names(self) -> tuple[str, ...]:
        """The K names; of ranks without names, their values."""
        return self._names or tuple(repr(value).removesuffix(".0") for value in self.prompt.positions)

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
            features = self.projection(features.to(self._projection_dtype(features)))
        with full_precision(features):
            features = features.to(dtype)
            if self.normalize:
                features = F.normalize(features, dim=-1)
            return F.linear(features, self._weight(prototypes.to(dtype)), self._bias(dtype))

    def prototypes(self) -> Tensor:
        """The rank prototypes.

        In training they are computed anew at every call and differentiable; without gradients (in eval mode, under
        `torch.no_grad()`, or with frozen prompts) once, until a prompt parameter changes.

        Returns:
            (K, D) of unit norm, at least float32.
        """
        if self._differentiable():
            return self._encode(self.prompt())
        return self._cached_prototypes()

    def prototypes_at(self, positions: Tensor | Sequence[float]) -> Tensor:
        """Prototypes at real positions between the first and the last rank, also where no rank is.

        Args:
            positions: (N,) in the units of `rank_values`.

        Returns:
            (N, D) of unit norm; differentiable in training.

        Raises:
            ValueError: positions outside the ranks, of another shape, or a head without interpolation.
        """
        if self.prompt.interpolation is None:
            raise ValueError(
                "Prototypes between ranks need interpolated ranks, but this head has free ones (interpolation=None)."
            )
        positions = torch.as_tensor(positions, dtype=torch.float64, device=self.rank_values.device)
        first, last = self.prompt.positions[0], self.prompt.positions[-1]
        if positions.dim() != 1 or len(positions) == 0:
            raise ValueError(f"Expected `positions` of shape (N,), but got {tuple(positions.shape)}.")
        inside = positions.clamp(first, last)  # up to the rounding of float32, in which `rank_values` come
        if not bool(((positions - inside).abs() <= 1e-6 * max(abs(first), abs(last))).all()):
            raise ValueError(f"Expected `positions` between the first and the last rank, {first:g} and {last:g}.")
        with torch.set_grad_enabled(self._differentiable()):
            return self._encode(self.prompt.at(inside))

    def predict_proba(self, features: Tensor) -> Tensor:
        """Probabilities of the ranks, (..., K)."""
        return torch.softmax(self(features), dim=-1)

    def predict(self, features: Tensor, rule: str = "expectation") -> Tensor:
        """Predicted rank values, (...), in the units of `rank_values`; see `decode` for the rules."""
        return decode(self(features), rule, self.rank_values)

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
        weight = self._exported_weight()
        offset = self._bias(weight.dtype)
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
        weight = self._exported_weight()
        layers = stock_layers(weight, self._bias(weight.dtype), self.projection, self.normalize)
        return layers.to(self.prompt.rank_embeddings.dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves config (JSON) and weights (safetensors) into a folder; see `from_pretrained`.

        Each file is written beside its place and then moved there: what was there stays whole until the new one is.
        """
        from ordinal_prompt.checkpoint import save

        save(self, Path(folder))

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
        from ordinal_prompt.checkpoint import load

        head: OrdinalPromptHead = load(cls, Path(folder), text_encoder)
        return head

    def train(self, mode: bool = True) -> OrdinalPromptHead:
        """Training mode; a frozen text encoder stays in eval mode."""
        super().train(mode)
        if self._frozen and isinstance(self.text_encoder, nn.Module):
            self.text_encoder.eval()
        return self

    def extra_repr(self) -> str:
        normalize = "" if self.normalize else ", normalize=False"
        return f"in_features={self.in_features}, embed_dim={self.embed_dim}, num_ranks={self.num_ranks}{normalize}"

    def _encode(self, prompts: Prompts) -> Tensor:
        if self.text_encoder is None:
            raise RuntimeError(
                "This head was loaded without its text encoder, so that its prompts cannot change or be encoded; load "
                "it with from_pretrained(folder, text_encoder=...)."
            )
        features = self.text_encoder.encode(prompts)
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)

    def _differentiable(self) -> bool:
        if self.text_encoder is None or not self.training or not torch.is_grad_enabled():
            return False
        encoder = [] if self._frozen else self.text_encoder.parameters()
        return any(parameter.requires_grad for parameter in (*self.prompt.parameters(), *encoder))

    def _text_encoder_version(self) -> list[tuple[int, int]]:
        """Changes when a parameter of a trainable text encoder does; its many values are not compared."""
        encoder = [] if self._frozen else self.text_encoder.parameters()
        return [(parameter.data_ptr(), parameter._version) for parameter in encoder]

    def _cached_prototypes(self) -> Tensor:
        if self._cache is not None:
            learned, version, prototypes = self._cache
            if version == self._text_encoder_version() and all(map(_same, learned, self.prompt.parameters())):
                return prototypes
        # Outside autocast, inference mode and dropout, since what is kept may be used anywhere.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            full_precision(self.rank_values),
            _evaluating(self.text_encoder),
        ):
            prototypes = self._encode(self.prompt())
            self._keep_prototypes(prototypes)
        return prototypes

    def _weight(self, prototypes: Tensor) -> Tensor:
        """(K, D) weight of the linear map from features to logits."""
        # Beyond the bound only a training that diverges gets, and infinite logits would end it.
        weight = self.logit_scale.to(prototypes.dtype).exp().clamp(max=MAX_FACTOR) * prototypes
        if self.alignment is not None:
            weight = weight + self.alignment_scale * (weight @ self.alignment.to(prototypes.dtype))
        if self.residual is not None:
            weight = weight + self.residual_scale * self.residual.to(prototypes.dtype)
        return weight

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        """(K,) what is added to the logits, or None."""
        return None if self.residual_bias is None else self.residual_scale * self.residual_bias.to(dtype)

    @torch.no_grad()
    def _measure_logit_scale(self, confidence: float) -> None:
        prototypes = self._cached_prototypes()
        spread = (prototypes - prototypes.mean(dim=0)).square().sum(dim=1).mean().sqrt()
        self.logit_scale.copy_((confidence * LOGIT_SPREAD / spread).clamp(max=MAX_FACTOR).log())

    @torch.no_grad()
    def _exported_weight(self) -> Tensor:
        prompt = self.prompt
        check_finite(
            context_embeddings=prompt.context_embeddings,
            rank_embeddings=prompt.rank_embeddings,
            logit_scale=self.logit_scale,
            alignment=self.alignment,
            residual=self.residual,
            residual_bias=self.residual_bias,
        )
        prototypes = self._cached_prototypes()
        weight = self._weight(prototypes)
        check_finite(prototypes=prototypes, weight=weight.to(prompt.rank_embeddings.dtype))
        return weight

    def _projection_dtype(self, features: Tensor) -> torch.dtype:
        assert self.projection is not None
        autocast = torch.is_autocast_enabled(features.device.type)
        return features.dtype if autocast else self.projection.weight.dtype

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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        values, error_messages = state_dict.get(f"{prefix}rank_values"), args[-1]
        if (
            values is not None
            and values.shape == self.rank_values.shape
            and not torch.allclose(values.to(self.rank_values), self.rank_values)
        ):
            error_messages.append(
                f"{prefix}rank_values: the checkpoint was made for other rank values: {values.tolist()}."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OrdinalPromptHead:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        if self._frozen and isinstance(self.text_encoder, nn.Module):
            self.text_encoder._apply(fn)
        self._build_rank_values()  # .bfloat16() would round years to decades
        if self.text_encoder is None and self._cache is not None:
            self._keep_prototypes(fn(self._cache[2]))
        else:
            self._cache = None
        return self

    def _build_rank_values(self) -> None:
        embeddings = self.prompt.rank_embeddings
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        self.rank_values = torch.tensor(self.prompt.positions, dtype=dtype, device=embeddings.device)

    def _keep_prototypes(self, prototypes: Tensor) -> None:
        """Makes given prototypes those of the prompt parameters as they are now."""
        learned = [parameter.detach().clone() for parameter in self.prompt.parameters()]
        self._cache = (learned, self._text_encoder_version(), prototypes)


@contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    """Eval mode for a while: what is kept must not hold dropout's noise."""
    modes = [(part, part.training) for part in module.modules()] if isinstance(module, nn.Module) else []
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _same(before: Tensor, now: Tensor) -> bool:
    return before.device == now.device and before.dtype == now.dtype and torch.equal(before, now)


def _openai_tokenizer(embed_tokens: Any) -> Callable[..., Any]:
    """open_clip's default tokenizer, for the special tokens of a model with its vocabulary."""
    vocabulary = getattr(embed_tokens, "num_embeddings", None)
    if vocabulary != OPENAI_VOCABULARY:
        raise ValueError(
            f"Expected a `tokenizer`, from which start, end and padding tokens are read: this text encoder's "
            f"vocabulary ({vocabulary}) is not that of OpenAI's CLIP ({OPENAI_VOCABULARY}). Pass "
            "tokenizer=open_clip.get_tokenizer(model_name) or your transformers tokenizer."
        )
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer: Callable[..., Any] = SimpleTokenizer()
    return tokenizer
