"""Several attributes of one sample (age and quality, the criteria of a grade): a head for each, on one text encoder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import quote

import torch
from torch import Tensor, nn

from ordinal_prompt import checkpoint, sharing
from ordinal_prompt.attribute_loss import OrdinalPromptLosses, check_name
from ordinal_prompt.cache import traced
from ordinal_prompt.decoding import decode
from ordinal_prompt.distributed import handed_out
from ordinal_prompt.head import OrdinalPromptHead
from ordinal_prompt.matching import unit_prototypes
from ordinal_prompt.places import side_by_side
from ordinal_prompt.reuse import given_prototypes, one_backward
from ordinal_prompt.text import hub
from ordinal_prompt.text.towers import same_weights

IGNORE_INDEX = -100

Heads = TypeVar("Heads", bound="OrdinalPromptHeads")


class OrdinalPromptHeads(nn.Module):
    """Several heads, one for each attribute, that take the same features.

    Logits, prototypes and gradients are those of the heads by themselves.  Heads that were built on one text encoder
    share it: it is kept once, and while prompts learn, packed text towers (see ARCHITECTURE.md) run once for the
    prompts of all heads.  Other text encoders, and compiled, sharded (FSDP) or checkpointed ones, run once for each.

    Args:
        heads: the head of each attribute, in their order.  They stay the caller's own objects.

    Shapes:
        features (..., in_features) give a dictionary of logits (..., K), K the ranks of the attribute.

    Raises:
        ValueError: no heads, one head twice, heads for features of different widths, or a name that cannot be one of a
            module.
        TypeError: what is no head.

    >>> import open_clip, torch
    >>> text = open_clip.transformer.TextTransformer(width=16, heads=2, layers=1, output_dim=16)
    >>> heads = OrdinalPromptHeads({"age": OrdinalPromptHead(text, 8), "quality": OrdinalPromptHead(text, 3)})
    >>> logits = heads(torch.randn(5, 16))
    >>> logits["age"].shape, logits["quality"].shape
    (torch.Size([5, 8]), torch.Size([5, 3]))
    >>> heads.loss({"age": 0.5})(logits, {"age": torch.arange(5), "quality": torch.tensor([0, 1, 2, -100, -100])}).shape
    torch.Size([])
    """

    def __init__(self, heads: Mapping[str, OrdinalPromptHead]) -> None:
        super().__init__()
        _check_heads(heads)
        self.heads = nn.ModuleDict(heads)
        first, *others = heads.values()
        self.in_features = first.in_features
        kept = [first]
        for head in others:
            twin = next((other for other in kept if _same_text_encoder(head, other)), None)
            if twin is None:
                kept.append(head)
            else:
                head.text_encoder = twin.text_encoder

    @classmethod
    def from_open_clip(
        cls: type[Heads],
        model_name: str,
        pretrained: str | None = None,
        *,
        attributes: Mapping[str, int | Sequence[str] | Mapping[str, Any]],
        **options: Any,
    ) -> Heads:
        """Heads on the text encoder of one open_clip model.

        Args:
            model_name, pretrained: as in `OrdinalPromptHead.from_open_clip`.
            attributes: for each its ranks (their number or their names), or a dictionary of options of its head, the
                ranks among them.
            options: of `OrdinalPromptHead`, for all heads that have no other.

        Raises:
            ValueError, ConnectionError: as `OrdinalPromptHead.from_open_clip`.
        """
        chosen = {}
        for name, given in attributes.items():
            own = dict(given) if isinstance(given, Mapping) else {"ranks": given}
            if "ranks" not in own and "ranks" not in options:
                raise ValueError(f"Expected `ranks` among the options of {name!r}, but got {', '.join(own) or 'none'}.")
            chosen[name] = {**options, **own}
            OrdinalPromptHead.check_options(**chosen[name])  # before a download
        model, tokenizer = hub.load_open_clip(model_name, pretrained)
        heads = {name: OrdinalPromptHead(model, **{"tokenizer": tokenizer, **own}) for name, own in chosen.items()}
        for head in heads.values():
            head.source = {"model_name": model_name, "pretrained": pretrained}
        return cls(heads)

    @property
    def names(self) -> tuple[str, ...]:
        """The attributes."""
        return tuple(self.heads)

    def __getitem__(self, name: str) -> OrdinalPromptHead:
        """The head of an attribute."""
        if name not in self.heads:
            raise KeyError(f"{name!r} is none of the attributes {', '.join(map(repr, self.heads))}")
        return cast("OrdinalPromptHead", self.heads[name])

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self) -> Iterator[str]:
        return iter(self.heads)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Logits (..., K) of each attribute, of features (..., in_features)."""
        if torch.compiler.is_compiling():
            return {name: head(features) for name, head in self.heads.items()}
        with given_prototypes(self._encode_together(least=2)):
            return {name: head(features) for name, head in self.heads.items()}

    def prototypes(self) -> dict[str, Tensor]:
        """Prototypes (K, D) of each attribute; see `OrdinalPromptHead.prototypes`."""
        with given_prototypes(self._encode_together(least=2)):
            return {name: self[name].prototypes() for name in self}

    def predict(self, features: Tensor, rule: str = "expectation") -> dict[str, Tensor]:
        """Predicted rank values (...) of each attribute; see `ordinal_prompt.decode` for the rules."""
        return {name: decode(logits, rule, self[name].rank_values) for name, logits in self(features).items()}

    def predict_proba(self, features: Tensor) -> dict[str, Tensor]:
        """Probabilities of the ranks (..., K) of each attribute."""
        return {name: torch.softmax(logits, dim=-1) for name, logits in self(features).items()}

    @contextmanager
    def reuse_prototypes(self) -> Iterator[None]:
        """One text pass for all batches inside, as for gradient accumulation; see `OrdinalPromptHead`'s."""
        with one_backward(self._encode_together(least=1)):
            yield

    def loss(self, weights: Mapping[str, float] | None = None, **options: Any) -> OrdinalPromptLosses:
        """The loss that belongs to these heads: that of each head, times the weight of its attribute (default 1).

        Labels of -100 are missing, unless `ignore_index` says otherwise.  The options are those of `OrdinalPromptLoss`,
        for all attributes; where they need different ones, make an `OrdinalPromptLosses` of `self[name].loss(...)`.
        """
        losses = {name: self[name].loss(**{"ignore_index": IGNORE_INDEX, **options}) for name in self}
        return OrdinalPromptLosses(losses, weights)

    def export(self) -> nn.Module:
        """All heads as stock layers, detached: features (..., in_features) to a dictionary of logits (..., K).

        A `torch.fx.GraphModule` of the heads' `export()`, which needs neither a text encoder nor this package.
        """
        return side_by_side({name: self[name].export() for name in self})

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves each head into a folder of its own inside `folder`, and the attributes as JSON.

        Raises:
            ValueError: as `OrdinalPromptHead.save_pretrained`.
        """
        folder, places = Path(folder), {name: quote(name, safe=" ") for name in self}
        collected = [(folder / place, *checkpoint.collect(self[name])) for name, place in places.items()]
        for written in collected:  # once nothing is wrong with any
            checkpoint.write(*written)
        with checkpoint.replacing(folder / checkpoint.ATTRIBUTES_FILE) as path:
            path.write_text(json.dumps({"format": 1, "attributes": places}, indent=2) + "\n", encoding="utf-8")

    def push_to_hub(self, repo_id: str, *, training: str = "", limits: str = "", **options: Any) -> Any:
        """Saves the heads into a repository of the Hugging Face hub; see `OrdinalPromptHead.push_to_hub`."""
        card = sharing.model_card({name: self[name] for name in self}, repo_id, training, limits)
        return sharing.push(self, repo_id, card, options)

    @classmethod
    def from_pretrained(cls: type[Heads], folder: str | Path, text_encoder: Any = None, **options: Any) -> Heads:
        """Loads what `save_pretrained` or `push_to_hub` saved, in eval mode.

        Args:
            folder: a folder; or "user/name", a repository of the Hugging Face hub.
            text_encoder: for all heads; see `OrdinalPromptHead.from_pretrained`.
            options: `revision`, `token` and `cache_dir`; see there, too.

        Raises:
            FileNotFoundError: no such folder or repository, or files missing in it.
            ValueError, ConnectionError: as `OrdinalPromptHead.from_pretrained`.
        """
        folder = sharing.local_folder(folder, **options)
        file = folder / checkpoint.ATTRIBUTES_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"Found no {checkpoint.ATTRIBUTES_FILE} in {folder}; expected a folder written by "
                "OrdinalPromptHeads.save_pretrained (a single head loads with OrdinalPromptHead.from_pretrained)."
            )
        try:
            places = {name: folder / place for name, place in json.loads(file.read_text("utf-8"))["attributes"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is damaged: {error!r}.") from error
        load = hub.remembered(hub.load_source)
        heads = {name: OrdinalPromptHead.from_folder(place, text_encoder, load) for name, place in places.items()}
        return cls(heads).eval()

    def extra_repr(self) -> str:
        return ", ".join(self.names)

    def _encode_together(self, least: int) -> list[tuple[OrdinalPromptHead, Tensor]]:
        """The heads whose prompts learn, and their prototypes, of one text pass for each text encoder that can.

        Args:
            least: text encoders with fewer heads to encode are left to these.
        """
        groups: dict[int, list[OrdinalPromptHead]] = {}
        for head in [] if traced() else map(self.__getitem__, self):
            if head._differentiable() and head._reused is None and not handed_out(head, head.prompt):
                groups.setdefault(id(head.text_encoder), []).append(head)
        found: list[tuple[OrdinalPromptHead, Tensor]] = []
        for heads in groups.values():
            encode_all = getattr(heads[0].text_encoder, "encode_all", None)
            if len(heads) < least or (encode_all is None and least > 1):
                continue
            prompts = [head.prompt() for head in heads]
            features = encode_all(prompts) if encode_all else map(heads[0].text_encoder.encode, prompts)
            found += zip(heads, map(unit_prototypes, features), strict=True)
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> OrdinalPromptHeads:
        """Moves a text encoder that heads share once, and leaves it shared."""
        groups: dict[int, list[OrdinalPromptHead]] = {}
        for head in map(self.__getitem__, self):
            if head._frozen and head.text_encoder is not None:
                groups.setdefault(id(head.text_encoder), []).append(head)
        for _, *others in groups.values():
            for head in others:
                head.text_encoder = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        finally:  # also where there is no such device
            for first, *others in groups.values():
                for head in others:
                    head.text_encoder = first.text_encoder
        return self


def _check_heads(heads: Any) -> None:
    if not isinstance(heads, Mapping):
        raise TypeError(f"Expected `heads` to be a dictionary of attributes, but got {type(heads).__name__}.")
    if not heads:
        raise ValueError("Expected a head for at least one attribute, but got none.")
    for name, head in heads.items():
        if not isinstance(head, OrdinalPromptHead):
            raise TypeError(f"Expected the head of {name!r} to be an OrdinalPromptHead, but got {type(head).__name__}.")
        check_name(name)
    if len({id(head) for head in heads.values()}) < len(heads):
        raise ValueError("Expected a head for each attribute, but got one of them twice; build each its own.")
    widths = {name: head.in_features for name, head in heads.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"Expected heads that take the same features, but their widths are {widths}; build them with the same "
            "in_features=."
        )


def _same_text_encoder(head: OrdinalPromptHead, other: OrdinalPromptHead) -> bool:
    return head._frozen == other._frozen and same_weights(head.text_encoder, other.text_encoder)
