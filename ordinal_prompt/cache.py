"""A result that is kept until one of the tensors that it was made of changes.

A tensor counts what is written to it, but not what is written through `.data`, or through other tensors that share its
memory.  So those that learn are also compared by their values.  Of large ones that would take long: a lazy copy stands
beside them, where it can, which shares their memory until either is written to, by whatever way, and the tensor moves.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

LARGE = 10_000  # values, above which comparing takes longer than a forward pass of the head

# Not public in PyTorch; without them, large tensors are compared, too.
_lazy_copy: Callable[[Tensor], Tensor] | None = getattr(torch, "_lazy_clone", None)
_address: Callable[[Tensor], int] = getattr(torch._C, "_data_address", Tensor.data_ptr)
_version = operator.attrgetter("_version")

Result = TypeVar("Result")


class Kept(Generic[Result]):
    """A result and the tensors that it was made of.

    Args:
        result: what is kept.
        sources: lists of the tensors that it was made of.
        learned: those of them that may be written to through `.data`.
        modules: that made it; a parametrization adds one.
        lazily: large ones are not compared; see above.
    """

    def __init__(
        self,
        result: Result,
        sources: tuple[list[Tensor], ...],
        learned: Iterable[Tensor],
        modules: Sequence[nn.Module] = (),
        lazily: bool = True,
    ) -> None:
        self.result = result
        self.sources = sources
        self.learned = [tensor for tensor in learned if _is_comparable(tensor)]
        self.modules = modules
        self.lazily = lazily
        self._mark()

    def holds(self, sources: tuple[list[Tensor], ...], modules: Sequence[nn.Module] = ()) -> bool:
        """Whether the sources are the same tensors, and none has been written to or moved since."""
        return (
            len(sources) == len(self.sources)
            and all(map(_same, sources, self.sources))
            and _same(modules, self.modules)
            and self._version is not None
            and _sum_of_versions(sources) == self._version
            and [*map(_address, self._large)] == self._addresses
            and all(map(_has_value, self._small, self._values))
        )

    def has_values(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these have the values of those that learned."""
        same = not self._large and len(tensors) == len(self._values)
        return same and all(map(_has_value, tensors, self._values))

    def _mark(self) -> None:
        self._large = [tensor for tensor in self.learned if self.lazily and _copies_lazily(tensor)]
        self._lazy_copies = [_lazy_copy(tensor.detach()) for tensor in self._large]  # type: ignore[misc]  # not None
        self._addresses = [*map(_address, self._large)]
        self._small = [tensor for tensor in self.learned if all(tensor is not large for large in self._large)]
        self._values = [tensor.detach().clone() for tensor in self._small]
        counted = not any(tensor.is_inference() for tensors in self.sources for tensor in tensors)
        self._version = _sum_of_versions(self.sources) if counted else None  # inference tensors count nothing

    def __getstate__(self) -> dict[str, Any]:
        """Copies are marked anew, where there is still something to keep."""
        alone = not any(self.sources[1:]) and self.has_values(self.learned)
        if alone or self.holds(self.sources, self.modules):
            return {**self.__dict__, "_lazy_copies": [], "_values": []}
        return {**self.__dict__, "sources": (), "learned": [], "_lazy_copies": [], "_values": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._mark()


class ListedTensors:
    """The tensors of a module, which are listed again where one of its parts was replaced."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self._list()

    def __call__(self) -> list[Tensor]:
        """As they are now."""
        if not _same([*chain.from_iterable(map(dict.values, self._dictionaries))], self._parts):
            self._list()
        return self.tensors

    def _list(self) -> None:
        inner = self.module.modules() if isinstance(self.module, nn.Module) else ()
        # Whatever reparametrizes a module, or adds to it, also takes from it: from what is not empty.
        parts: Any = (part for one in inner for part in (one._parameters, one._buffers, one._modules))
        self._dictionaries: list[dict[str, Any]] = [part for part in parts if part]
        self._parts = [*chain.from_iterable(map(dict.values, self._dictionaries))]
        self.tensors = tensors_of(self.module)

    def __reduce__(self) -> tuple[type[ListedTensors], tuple[Any]]:
        return ListedTensors, (self.module,)


def tensors_of(module: Any) -> list[Tensor]:
    """Parameters and buffers."""
    if not isinstance(module, nn.Module):
        return []
    parts = (part for inner in module.modules() for part in (*inner._parameters.values(), *inner._buffers.values()))
    return [part for part in parts if part is not None]


def _has_value(tensor: Tensor, value: Tensor) -> bool:
    if tensor.dtype != value.dtype or tensor.device != value.device:
        return False
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return True  # what is captured cannot wait for an answer
    return torch.equal(tensor, value)


def still_kept(
    kept: Kept[Result] | None, compute: Callable[[], Result], sources: tuple[list[Tensor], ...], learned: list[Tensor]
) -> Kept[Result]:
    """What was kept, where it holds; else it is computed, so that it may be used anywhere, gradients or not."""
    if kept is not None and kept.holds(sources):
        return kept
    with torch.inference_mode(False), torch.no_grad():
        return Kept(compute(), sources, learned)


def _same(before: Sequence[Any], now: Sequence[Any]) -> bool:
    return before is now or (len(before) == len(now) and all(map(operator.is_, before, now)))


def _sum_of_versions(sources: tuple[list[Tensor], ...]) -> int:
    """Grows with every write to one of the tensors."""
    return sum(sum(map(_version, tensors)) for tensors in sources)


def _is_comparable(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta


def _copies_lazily(tensor: Tensor) -> bool:
    """Whether it is large, in memory that nobody else's tensor has, and that may move."""
    if _lazy_copy is None or tensor.numel() < LARGE or tensor.device.type != "cpu" or tensor.is_shared():
        return False
    storage = tensor.untyped_storage()
    return storage.resizable() and storage.nbytes() == tensor.nbytes  # what torch.load gives is not: a copy would crash


def traced() -> bool:
    """Whether a graph is being traced, or a transform such as vmap is at work: what they see is not ours to keep."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
