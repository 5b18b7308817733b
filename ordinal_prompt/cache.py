"""A result that is kept until one of the tensors that it was made of changes; no values are compared.

A tensor counts what is written to it, but not what is written through `.data`.  So a lazy copy stands beside tensors
that learn: it shares their memory until either is written to, by whatever way, and then makes the tensor move.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

# Not public in PyTorch; without them, writing in place through `.data` is not seen.
_lazy_copy: Callable[[Tensor], Tensor] | None = getattr(torch, "_lazy_clone", None)
_version = operator.attrgetter("_version")
_address: Callable[[Tensor], int] = getattr(torch._C, "_data_address", Tensor.data_ptr)


Result = TypeVar("Result")


class Kept(Generic[Result]):
    """A result and the tensors that it was made of.

    Args:
        result: what is kept.
        sources: lists of the tensors that it was made of.
        learned: those of them that may be written to through `.data`.
        modules: that made it; a parametrization adds one.
    """

    def __init__(
        self,
        result: Result,
        sources: tuple[list[Tensor], ...],
        learned: Iterable[Tensor],
        modules: Sequence[nn.Module] = (),
    ) -> None:
        self.result = result
        self.sources = sources
        self.learned = [*learned]
        self.modules = modules
        self._mark()

    def holds(self, sources: tuple[list[Tensor], ...], modules: Sequence[nn.Module] = ()) -> bool:
        """Whether the sources are the same tensors, and none has been written to or moved since."""
        return (
            len(sources) == len(self.sources)
            and all(map(_same, sources, self.sources))
            and _same(modules, self.modules)
            and self._version is not None
            and _sum_of_versions(sources) == self._version
            and [*map(_address, self.learned)] == self._addresses
        )

    def _mark(self) -> None:
        shared = (t for t in self.learned if _lazy_copy is not None and _owns_memory(t))
        self._lazy_copies = [_lazy_copy(tensor.detach()) for tensor in shared]  # type: ignore[misc]  # not None here
        counted = not any(tensor.is_inference() for tensors in self.sources for tensor in tensors)
        self._version = _sum_of_versions(self.sources) if counted else None  # inference tensors count nothing
        self._addresses = [*map(_address, self.learned)]

    def __getstate__(self) -> dict[str, Any]:
        """Copies are marked anew, where there is still something to keep."""
        holds = self.holds(self.sources, self.modules)
        return {**self.__dict__, "sources": self.sources if holds else (), "_lazy_copies": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._mark()


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


def _owns_memory(tensor: Tensor) -> bool:
    """Whether nobody else's tensor would move along with this one."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type in ("cpu", "cuda")
    return plain and not tensor.is_shared() and tensor.untyped_storage().nbytes() == tensor.nbytes


def traced() -> bool:
    """Whether a graph is being traced, or a transform such as vmap is at work: what they see is not ours to keep."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
